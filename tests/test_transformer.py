"""transformer.py against transformers' own Qwen3 and GPT-2, and the properties every decoder must have."""

import json
import math
import sys
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from attention import document_mask
from generate import generate
from transformer import (
    CheckpointError,
    Transformer,
    TransformerConfig,
    _target_logprobs,
    gpt2_config,
    layout_of,
    masked_mean,
    token_logprobs,
)

SMALL = dict(vocab_size=37, context=24, n_layer=2, n_head=4, n_kv_head=2, width=16)


def randomise(model):
    """Every weight random, gains and biases too: at their initial 1 and 0 half of the mistakes stay hidden."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def tiny(**changes):
    return randomise(Transformer(TransformerConfig(**(SMALL | changes))))


BASE = dict(vocab_size=37, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=24)
SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=12, rope_theta=20.0)
THEIRS = {  # name -> a config of transformers' own; the name begins with its model_type
    "qwen3": Qwen3Config(**BASE, head_dim=6, rope_theta=777.0, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**BASE, head_dim=6),
    "gpt2": GPT2Config(vocab_size=37, n_positions=24, n_embd=18, n_layer=2, n_head=3),
    "llama": LlamaConfig(**BASE, rope_theta=55.0, rms_norm_eps=0.1),
    "llama tied, wide heads": LlamaConfig(**BASE, head_dim=6, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**BASE),
}


def theirs_of(name):
    return randomise(AutoModelForCausalLM.from_config(THEIRS[name], attn_implementation="eager"))


def gpt2():
    return theirs_of("gpt2")


@pytest.fixture
def tokens():
    return torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", THEIRS)
def test_their_checkpoint_here_and_back(name, tmp_path, tokens):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == theirs.config.model_type
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "back"))
    tied = {"lm_head.weight"} if ours.config.tie_embeddings else set()  # a tied copy may or may not be written
    assert a.keys() - tied == b.keys() - tied
    assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() and a[k].dtype == b[k].dtype for k in b)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_their_checkpoint_in_shards(name, tmp_path, tokens):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    ours = Transformer.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"has no {shards[1].name}; model.safetensors.index.json names it"):
        Transformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is corrupt"):
        Transformer.from_pretrained(tmp_path)


def test_a_base_model_without_the_prefix(tmp_path, tokens):
    theirs = theirs_of("llama tied, wide heads")
    theirs.model.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_an_older_config_json(tmp_path, tokens):
    """As published before transformers 5, with what Llama 1 and 2 leave out."""
    config = LlamaConfig(
        **BASE | dict(num_key_value_heads=4), rope_parameters=dict(rope_type="default", rope_theta=1e4)
    )
    theirs = randomise(AutoModelForCausalLM.from_config(config))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_hub_names(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    asked = []
    hub = type(sys)("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: asked.append(name) or str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert Transformer.from_pretrained("Qwen/Qwen3-0.6B").config.width == 16
    assert asked == ["Qwen/Qwen3-0.6B"]
    for path in (tmp_path / "not" / "there", "tests/nothing", "./nothing", "nothing"):  # paths, and no hub names
        with pytest.raises(CheckpointError, match="is not there; a checkpoint is a directory"):
            Transformer.from_pretrained(path)
    assert asked == ["Qwen/Qwen3-0.6B"]

    def offline(name, allow_patterns):
        raise OSError("no network\nand many more lines")

    hub.snapshot_download = offline
    with pytest.raises(CheckpointError, match=r"Qwen3-0\.6B .* the Hugging Face hub does not give it: no network$"):
        Transformer.from_pretrained("Qwen/Qwen3-0.6B")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        Transformer.from_pretrained("Qwen/Qwen3-0.6B")


def test_a_checkpoint_is_refused_before_memory_is_spent(tmp_path):
    """A model of this config would need 4 TB."""
    tiny(n_layer=1).save_pretrained(tmp_path)
    for key, size in [("hidden_size", 10**6), ("intermediate_size", 10**6), ("vocab_size", 10**6)]:
        damage_config(key, size)(tmp_path)
    with pytest.raises(CheckpointError, match=r"its config asks for .*1000000"):
        Transformer.from_pretrained(tmp_path)


def test_gpt2_without_the_prefix_and_with_its_mask_buffers(tmp_path, tokens):
    """OpenAI's own upload names its tensors so."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = {k.removeprefix("transformer."): v for k, v in tensors.items() if k != "lm_head.weight"}
    plain |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    save_file(plain, tmp_path / "model.safetensors")
    ours = Transformer.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_the_dtype_of_an_opened_checkpoint(tmp_path):
    tiny().bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert Transformer.from_pretrained(tmp_path).embed.weight.dtype == torch.float32
    assert Transformer.from_pretrained(tmp_path, dtype=None).embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(**SMALL),
        TransformerConfig(**SMALL, tie_embeddings=False),
        TransformerConfig(**SMALL, rope_theta=55.0, norm_eps=0.1, head_dim=6, ffn_width=24),
        gpt2_config(**SMALL | {"n_kv_head": 4}),
        gpt2_config(**SMALL | {"n_kv_head": 4}, norm_eps=0.1, ffn_width=24),
        TransformerConfig(**SMALL, qk_norm=False, rope_theta=55.0),
        TransformerConfig(**SMALL, qk_norm=False, tie_embeddings=False, head_dim=6),
        TransformerConfig(**SMALL, qk_norm=False, qkv_bias=True),
        TransformerConfig(**SMALL, qk_norm=False, qkv_bias=True, tie_embeddings=False, head_dim=6),
    ],
    ids=lambda c: layout_of(c) + (", tied" if c.tie_embeddings else "") + f", {c.norm_eps} {c.rope_theta} {c.head_dim}",
)
def test_our_checkpoint_there(config, tmp_path, tokens):
    ours = randomise(Transformer(config))
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=1e-4, rtol=0)
    greedy = theirs.generate(tokens[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, tokens[:1].tolist(), 8, temperature=0).ids.tolist() == greedy[:, 11:].tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "post"},
        {"positions": "none"},
        {"positions": "sinusoidal"},
        {"activation": "gelu"},
        {"norm": "layer"},
        {"qkv_bias": True},
        {"qk_norm": False, "bias": True},
        {"bias": True, "dropout": 0.3},
        {"bias": True, "qkv_bias": False},
        {"norm_placement": "sandwich"},
        {"positions": "learned", "tie_embeddings": False, "norm_eps": 0.1, "head_dim": 6},
        {"norm_placement": "post", "rope_theta": 55.0, "ffn_width": 24},
    ],
    ids=str,
)
def test_our_own_layout(changes, tmp_path, tokens):
    ours = tiny(**changes)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "attention_to_alignment"
    again = Transformer.from_pretrained(tmp_path, dropout=ours.config.dropout)
    assert again.config == ours.config
    assert torch.equal(again.eval()(tokens), ours(tokens))
    assert Transformer.from_pretrained(tmp_path).config.dropout == 0  # the file's does not pass to the next stage


def test_dropout_acts_in_training_only(tokens):
    model = tiny(dropout=0.5)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(tokens, temperature):
    model = tiny().double()
    logits = model(tokens) / temperature
    expected = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(model, tokens, temperature).double(), expected, atol=1e-5, rtol=0)


def test_token_logprobs_of_padded_and_packed_rows(tokens):
    model, a, b = tiny().double(), tokens[:1, :4], tokens[:1, 4:]
    alone = [token_logprobs(model, x, 0.7) for x in (a, b)]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a], 1)
    real = torch.tensor([[False] * 3 + [True] * 4])
    out = token_logprobs(model, padded, 0.7, (real.long().cumsum(1) - 1).clamp(min=0), real)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 3:], alone[0], atol=1e-5, rtol=0)
    positions, documents = torch.tensor([[*range(4), *range(7)]]), torch.tensor([[0] * 4 + [1] * 7])
    for mask in (document_mask(documents), document_mask(documents)[:, 0]):
        packed = token_logprobs(model, tokens[:1], 0.7, positions, mask)
        torch.testing.assert_close(packed[:, :3], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[:, 4:], alone[1], atol=1e-5, rtol=0)  # entry 3 crosses the border
    shared = token_logprobs(model, tokens[:1], 0.7, positions[0], document_mask(documents))  # positions (T,)
    torch.testing.assert_close(shared, packed)


def test_chunked_logprobs_equal_plain_ones_and_their_gradients():
    torch.manual_seed(0)
    x, output = torch.randn(2, 7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets, up = torch.randint(0, 11, (2, 7)), torch.randn(2, 7)
    for numbers in (1, 33, 55, 11 * 13):  # 1, 3, 5 and 13 tokens a chunk of the 14
        plain, chunked = (_target_logprobs(x, output, targets, 0.8, n) for n in (2**24, numbers))
        torch.testing.assert_close(chunked, plain)
        for a, b in zip(*(torch.autograd.grad(y, (x, output), up) for y in (chunked, plain)), strict=True):
            torch.testing.assert_close(a, b)


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    assert masked_mean(x, mask).item() == pytest.approx(8 / 3)
    assert masked_mean(x, mask.float()).item() == pytest.approx(8 / 3)
    assert masked_mean(x, torch.zeros(2, 2)).item() == 0
    assert masked_mean(x, torch.zeros(2, 2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(
    ("norm", "placement", "activation", "positions"),
    list(
        product(
            ["rms", "layer"], ["pre", "post", "sandwich"], ["swiglu", "gelu"], ["rope", "learned", "sinusoidal", "none"]
        )
    ),
)
def test_every_parameter_learns(norm, placement, activation, positions, tokens):
    model = tiny(norm=norm, norm_placement=placement, activation=activation, positions=positions, bias=True)
    token_logprobs(model, tokens).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all()
        if not name.endswith("wk.bias"):  # without RoPE or QK-norm, a shift of all keys changes no weight
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_no_token_sees_the_future(positions, placement, tokens):
    model = tiny(positions=positions, norm_placement=placement)
    before = model(tokens)
    for t in (1, 5, 10):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # and every later one sees the change


def test_last_only_and_the_end_of_the_context(tokens):
    model = tiny()
    torch.testing.assert_close(model(tokens, last_only=True), model(tokens)[:, -1:])
    with pytest.raises(ValueError, match="25 tokens do not fit the model's context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_padding_and_documents(tokens):
    model, a, b = tiny().double(), tokens[:1, :4], tokens[:1, 4:]
    alone = [model(a), model(b)]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a], 1)
    real = torch.tensor([[False] * 3 + [True] * 4])
    out = model(padded, (real.long().cumsum(1) - 1).clamp(min=0), real)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, 3:], alone[0], atol=1e-10, rtol=0)
    positions = torch.tensor([[*range(4), *range(7)]])
    documents = document_mask(torch.tensor([[0] * 4 + [1] * 7]))
    for mask in (documents, documents[:, 0]):  # (B, 1, T, T) and (B, T, T)
        packed = model(tokens[:1], positions, mask)
        torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-10, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_any_split_into_cached_calls_equals_one_pass(chunks):
    model, n = tiny().double(), sum(chunks)
    if n > 24:
        return
    tokens = torch.randint(0, 37, (2, n))
    cache = model.make_cache(2, n)
    parts = [model(piece, cache=cache) for piece in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-10, rtol=0)


def test_birth():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig())
    tokens = torch.randint(0, 512, (4, 50))
    assert abs(-token_logprobs(model, tokens).mean().item() - math.log(512)) < 0.15
    assert model.blocks[0].attn.wo.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert model.blocks[0].attn.wq.weight.std().item() == pytest.approx(0.02, rel=0.05)
    attn, ffn, norms = 192 * (192 * 2 + 64 * 2), 192 * 512 * 3, 192 * 2 + 32 * 2
    assert model.num_params() == 512 * 192 + 4 * (attn + ffn + norms) + 192
    assert model.flops_per_token(100) == 6 * (512 * 192 + 4 * (attn + ffn)) + 6 * 4 * 192 * 100
    untied = Transformer(TransformerConfig(tie_embeddings=False))
    assert untied.num_params() == model.num_params() + 512 * 192
    assert untied.flops_per_token(100) == model.flops_per_token(100)
    per_block = 4 * 192 * 192 + 4 * 192 + 8 * 192 * 192 + 5 * 192 + 4 * 192
    old = Transformer(gpt2_config())
    assert old.num_params() == (512 + 256) * 192 + 4 * per_block + 2 * 192
    assert old.blocks[3].ffn.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert not old.blocks[0].attn.wq.bias.any()
    assert (old.norm.weight == 1).all()


def test_it_can_overfit(tokens):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = -token_logprobs(model, tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_opening_a_checkpoint_leaves_the_random_numbers_alone(tmp_path):
    tiny().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    Transformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def damage_config(key, value):
    def do(path):
        config = json.loads((path / "config.json").read_text())
        config[key] = value
        (path / "config.json").write_text(json.dumps(config))

    return do


def damage_tensors(change):
    def do(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return do


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "not a model's config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:500]), "corrupt"),
        (damage_config("model_type", "mamba"), "'mamba' is not known here; known: qwen3, gpt2"),
        (damage_config("hidden_act", "relu"), "hidden_act = 'relu' is not supported"),
        (damage_config("num_key_value_heads", 3), "n_kv_head 3"),
        (damage_config("vocab_size", 50), r"embed_tokens.weight has shape \(37, 16\), .* \(50, 16\)"),
        (lambda p: (p / "config.json").write_bytes(b"\xff{}"), "not a model's config.json"),
        (lambda p: (p / "config.json").write_text("[1]"), "not a model's config.json"),
        (lambda p: (p / "config.json").write_text('{"model_type": "qwen3"}'), "lacks 'vocab_size'"),
        (lambda p: (p / "config.json").write_text('{"model_type": "gpt2"}'), "lacks 'vocab_size'"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "corrupt"),
        (damage_config("model_type", ["qwen3"]), "is not known here"),
        (damage_config("quantization_config", {"bits": 4}), "quantization_config = .* is not supported"),
        (damage_config("partial_rotary_factor", 0.5), "partial_rotary_factor = 0.5 is not supported"),
        (damage_config("attention_bias", True), "attention_bias = True is not supported"),
        (damage_config("rope_parameters", [1]), "config.json: "),
        (damage_config("rope_theta", "high"), "config.json: .*high"),
        (damage_config("rope_theta", 0), "rope_theta is 0"),
        (damage_config("rms_norm_eps", -1), "norm_eps is -1"),
        (damage_config("num_hidden_layers", "2"), "n_layer is '2'"),
        (damage_config("num_hidden_layers", 3), "lack 'model.layers.2."),
        (damage_config("num_hidden_layers", 1), "hold 'model.layers.1."),
        (damage_config("hidden_size", 16.5), "width is 16.5"),
        (damage_config("head_dim", 3), "must be even"),
        (damage_config("head_dim", -2), "head_dim is -2"),
        (damage_config("intermediate_size", "wide"), "ffn_width is 'wide'"),
        (damage_tensors(lambda t: t.update({"model.norm.weight": torch.ones(())})), "shape"),
        (damage_tensors(lambda t: t.pop("model.norm.weight")), "lack 'model.norm.weight'"),
        (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "hold 'extra'"),
    ],
)
def test_bad_checkpoints(tmp_path, damage, message):
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


QKV, PROJ = (f"transformer.h.1.attn.{x}.weight" for x in ("c_attn", "c_proj"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config("activation_function", "relu"), "activation_function = 'relu' is not supported"),
        (damage_config("scale_attn_by_inverse_layer_idx", True), "scale_attn_by_inverse_layer_idx"),
        (damage_config("tie_word_embeddings", False), "tie_word_embeddings"),
        (damage_config("n_head", 3), "not a multiple of n_head 3"),
        (damage_config("n_positions", 30), r"wpe.weight has shape \(24, 16\)"),
        (damage_tensors(lambda t: t.pop(QKV)), "lack 'transformer.h.1.attn.c_attn.weight'"),
        (damage_tensors(lambda t: t.update({QKV: torch.ones(16, 2)})), r"c_attn.weight has shape \(16, 2\)"),
        (
            damage_tensors(lambda t: t.update({QKV: torch.ones(16, 24)})),
            r"c_attn.weight has shape \(16, 24\), .* \(16, 48\)",
        ),
        (damage_tensors(lambda t: t.update({PROJ: torch.ones(16, 4, 4)})), r"shape \(16, 4, 4\)"),
        (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "hold 'extra'"),
    ],
)
def test_bad_gpt2_checkpoints(tmp_path, damage, message):
    Transformer(gpt2_config(**SMALL | {"n_kv_head": 4})).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config("norm", "batch"), "choose one of rms, layer"),
        (damage_config("dropout", 2.0), "dropout is 2.0"),
        (damage_config("n_head", 3), "n_head 3 is not a multiple"),
        (damage_config("ffn_width", -4), "ffn_width is -4"),
        (damage_tensors(lambda t: t.pop("embed.weight")), "lack 'embed.weight'"),
        (damage_tensors(lambda t: t.update(extra=torch.ones(1))), "hold 'extra'"),
    ],
)
def test_bad_checkpoints_of_our_own(tmp_path, damage, message):
    tiny(norm_placement="post").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_configs(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        Transformer.from_pretrained(tmp_path / "missing")
    for changes, message in [
        ({"norm": "batch"}, "choose one of rms, layer"),
        ({"n_kv_head": 3}, "multiple"),
        ({"width": 18}, "not a multiple of n_head"),
        ({"head_dim": 5}, "must be even"),
        ({"n_layer": 0}, "at least 1"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            TransformerConfig(**SMALL | changes)
