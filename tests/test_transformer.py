"""transformer.py against transformers' own Qwen3 and GPT-2, and the properties every decoder must have."""

import json
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from attention import document_mask
from generate import generate
from transformer import (
    CheckpointError,
    Transformer,
    TransformerConfig,
    _target_logprobs,
    gpt2_config,
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


def qwen3(tie):
    config = Qwen3Config(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=24,
        rope_theta=777.0,
        tie_word_embeddings=tie,
    )
    return randomise(Qwen3ForCausalLM(config))


def gpt2():
    return randomise(GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=24, n_embd=16, n_layer=2, n_head=4)))


@pytest.fixture
def tokens():
    return torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("make", [lambda: qwen3(True), lambda: qwen3(False), gpt2], ids=["qwen3", "untied", "gpt2"])
def test_their_checkpoint_here_and_back(make, tmp_path, tokens):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path / "back")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "back"))
    assert a.keys() - {"lm_head.weight"} == b.keys() - {"lm_head.weight"}
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(**SMALL),
        TransformerConfig(**SMALL, tie_embeddings=False),
        gpt2_config(**SMALL | {"n_kv_head": 4}),
    ],
    ids=["qwen3", "untied", "gpt2"],
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
    [{"norm_placement": "post"}, {"positions": "none"}, {"positions": "sinusoidal"}, {"activation": "gelu"}],
    ids=str,
)
def test_our_own_layout(changes, tmp_path, tokens):
    ours = tiny(**changes)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "attention_to_alignment"
    assert torch.equal(Transformer.from_pretrained(tmp_path).eval()(tokens), ours(tokens))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs(tokens, temperature):
    model = tiny().double()
    logits = model(tokens) / temperature
    expected = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_logprobs(model, tokens, temperature).double(), expected, atol=1e-5, rtol=0)


def test_chunked_logprobs_equal_plain_ones_and_their_gradients():
    torch.manual_seed(0)
    x, output = torch.randn(2, 7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets, up = torch.randint(0, 11, (2, 7)), torch.randn(2, 7)
    plain, chunked = (_target_logprobs(x, output, targets, 0.8, n) for n in (2**24, 33))
    torch.testing.assert_close(chunked, plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, output), up) for y in (chunked, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    assert masked_mean(x, mask).item() == pytest.approx(8 / 3)
    assert masked_mean(x, torch.zeros(2, 2)).item() == 0


@pytest.mark.parametrize(
    ("norm", "placement", "activation", "positions"),
    list(product(["rms", "layer"], ["pre", "post"], ["swiglu", "gelu"], ["rope", "learned", "sinusoidal", "none"])),
)
def test_every_parameter_learns(norm, placement, activation, positions, tokens):
    model = tiny(norm=norm, norm_placement=placement, activation=activation, positions=positions, bias=True)
    token_logprobs(model, tokens).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all()
        if not name.endswith("wk.bias"):  # without RoPE or QK-norm, a shift of all keys changes no weight
            assert p.grad.abs().sum() > 0, name


def test_padding_and_documents(tokens):
    model, a, b = tiny().double(), tokens[:1, :4], tokens[:1, 4:]
    alone = [model(a), model(b)]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a], 1)
    real = torch.tensor([[False] * 3 + [True] * 4])
    out = model(padded, (real.long().cumsum(1) - 1).clamp(min=0), real)
    torch.testing.assert_close(out[:, 3:], alone[0], atol=1e-10, rtol=0)
    positions = torch.tensor([[*range(4), *range(7)]])
    packed = model(tokens[:1], positions, document_mask(torch.tensor([[0] * 4 + [1] * 7])))
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


def test_it_can_overfit(tokens):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = -token_logprobs(model, tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


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
        (damage_config("rope_scaling", {"rope_type": "yarn"}), "yarn"),
        (damage_config("num_key_value_heads", 3), "n_kv_head 3"),
        (damage_config("vocab_size", 50), "shape"),
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
