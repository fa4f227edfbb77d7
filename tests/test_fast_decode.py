"""support/fast_decode.py: the step against the model, and that it leaves alone whatever it was not written for."""

from dataclasses import fields, replace

import pytest
import torch
from planted import SIZES, GatedAttention, GatedConfig, gated, randomised, scaled
from torch import nn

from attention import Attention
from generate import generate
from lora import add_lora
from support.devices import TRAITS
from support.fast_decode import ANY_VALUE, REQUIRED, DecodeStep, StaticStep, decoding_dtype
from transformer import Transformer, TransformerConfig, token_logprobs

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]


@pytest.fixture
def model():
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(40, context=48, n_layer=2, n_head=2, n_kv_head=1, width=16))
    for p in raw.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return raw


def uneven(**change):
    """A small model whose gains and biases are random too, or half of a decoding step's mistakes stay hidden."""
    torch.manual_seed(0)
    config = TransformerConfig(40, **({"context": 30, "n_layer": 2, "n_head": 4, "n_kv_head": 1, "width": 32} | change))
    raw = Transformer(config).eval()
    for p in raw.parameters():
        torch.nn.init.normal_(p, mean=0.2, std=0.4)
    return raw


@pytest.mark.parametrize(
    "change",
    [{}, {"qk_norm": False}, {"qk_norm": False, "qkv_bias": True}, {"tie_embeddings": False}, {"n_kv_head": 2}],
    ids=str,
)
@pytest.mark.parametrize("rows", [3, 6], ids="{} rows".format)  # its matrices lie otherwise from 4 rows on
def test_the_decode_step_equals_the_model(change, rows):
    raw = uneven(**change)
    assert DecodeStep.fits(raw, raw.make_cache(1, 1))
    tokens, real = torch.randint(40, (rows, 12)), torch.ones(rows, 12, dtype=torch.bool)
    real[1, :3] = real[2, :7] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = raw(tokens, positions, real)
        cache = raw.make_cache(rows, 12)
        raw(tokens[:, :8], positions[:, :8], real[:, :8], cache)
        cache.store[..., 8:, :] = torch.nan  # what nobody wrote may be anything
        still = cache.repeat(1, 12)
        still.store[..., 8:, :] = torch.nan
        step, static = DecodeStep(raw, cache), StaticStep(DecodeStep(raw, still), real)
        for t in range(8, 12):
            logits = step(tokens[:, t], positions[:, t], real[:, : t + 1])
            torch.testing.assert_close(logits, whole[:, t], atol=2e-4, rtol=1e-4)
            logits = static(tokens[:, t], positions[:, t])
            torch.testing.assert_close(logits, whole[:, t], atol=2e-4, rtol=1e-4)


def test_under_autocast_the_decode_step_rounds_what_the_model_rounds():
    raw = uneven(n_kv_head=2)
    tokens, at = torch.randint(40, (3, 12)), torch.full((3,), 11)
    with torch.no_grad():
        exact = raw(tokens)[:, -1]
        with torch.autocast("cpu", torch.bfloat16):
            cache = raw.make_cache(3, 12)
            rounded = raw(tokens)[:, -1]
            raw(tokens[:, :11], cache=cache)
            found = DecodeStep(raw, cache)(tokens[:, 11], at)
    assert cache.store.dtype == torch.float32  # on a CPU
    assert found.dtype == rounded.dtype == torch.bfloat16
    noise = (rounded.float() - exact).norm()
    assert 0 < noise < 0.02 * exact.norm()
    assert 0 < (found.float() - exact).norm() < 2 * noise  # rounded elsewhere, but no more than that


@pytest.mark.parametrize("heads", [2, 4], ids="{} key heads".format)
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("by_sdpa", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_under_autocast_the_cache_is_bf16(monkeypatch, by_sdpa, static, heads):
    """By SDPA, or by two products as on a GPU; with pads, which NaN would betray, and slots that nobody wrote."""
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], bf16_cache=True, decodes_by_sdpa=by_sdpa))
    raw = uneven(n_kv_head=heads)
    tokens, real = torch.randint(40, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    real[1, :3] = real[2, :7] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        exact = raw(tokens, positions, real)[:, -1]
        with torch.autocast("cpu", torch.bfloat16):
            cache, read = raw.make_cache(3, 11), (tokens[:, :11], positions[:, :11], real[:, :11])
            raw(*read, cache)
            rounded = raw(tokens, positions, real)[:, -1]
            cache = cache.repeat(1, 14, decoding_dtype(raw, cache))
            cache.store[..., 11:, :] = torch.nan
            seen = torch.nn.functional.pad(real, (0, 2), value=True)
            step = DecodeStep(raw, cache)
            step = StaticStep(step, seen) if static else step
            found = step(tokens[:, 11], positions[:, 11], *([] if static else [real]))
    assert found.dtype == cache.store.dtype == torch.bfloat16
    noise = (rounded.float() - exact).norm()
    assert 0 < (found.float() - exact).norm() < 2 * noise < 0.04 * exact.norm()


def test_a_device_that_is_slow_at_bf16_decodes_from_fp32(model, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], bf16_cache=bf16))
            assert decoding_dtype(model, model.make_cache(1, 1)) == dtype


def test_the_dtype_of_the_cache_is_left_where_the_model_runs_its_own_forward():
    raw = Transformer(TransformerConfig(40, n_layer=1, width=16, n_head=2, n_kv_head=1, norm="layer"))
    with torch.autocast("cpu", torch.bfloat16):
        assert decoding_dtype(raw, raw.make_cache(1, 1)) is None
        rollout = generate(raw, [[1, 2, 3]], 5)
    assert rollout.mask.all()


def test_rows_leave_in_fours(model, monkeypatch):
    """However many rows are left, a step is computed for a multiple of 4, or for all that were there."""
    calls, compute = [], DecodeStep.compute

    def counted(self, token, *more):
        calls.append(len(token))
        return compute(self, token, *more)

    monkeypatch.setattr(DecodeStep, "compute", counted)
    uniforms = torch.rand(27, 40, generator=torch.Generator().manual_seed(0))
    rollout = generate(model, PROMPTS, 40, 9, stop_ids=(3, 5), uniforms=uniforms)
    lengths, counts = rollout.mask.sum(1), list(calls)
    alone = [generate(model, [PROMPTS[i // 9]], 40, stop_ids=(3, 5), uniforms=uniforms[[i]]) for i in (0, 13, 26)]
    assert counts[0] == 27
    assert all(n % 4 == 0 for n in counts if n < 27)
    assert len(set(counts)) > 3
    assert all(n >= (lengths > t + 1).sum() for t, n in enumerate(counts))
    for i, row in zip((0, 13, 26), alone, strict=True):
        assert torch.equal(rollout.ids[i][rollout.mask[i]], row.ids[0])


def test_other_layouts_do_without_the_decode_step():
    for change in ({"norm": "layer"}, {"activation": "gelu"}, {"positions": "learned"}, {"norm_placement": "post"}):
        raw = Transformer(TransformerConfig(40, n_layer=1, width=16, n_head=2, n_kv_head=1, **change))
        assert not DecodeStep.fits(raw, raw.make_cache(1, 1))


# ------------------------------------------------------------------------------------------ what it has never heard of


class SilentlyGatedAttention(Attention):
    """The same without a tensor of its own."""

    def forward(self, x, *more):
        out = super().forward(x, *more)
        return out * torch.sigmoid(x[:, -out.shape[1] :])


def with_module(path, change):
    """A model of the usual config in which one module is another."""

    def build():
        raw = randomised(Transformer(TransformerConfig(**SIZES)))
        parent, _, name = path.rpartition(".")
        setattr(raw.get_submodule(parent), name, change(raw.get_submodule(path), raw.config))
        return raw

    return build


def like(kind):
    """The same attention with another forward."""

    def change(attn, c):
        other = kind(c.width, c.n_head, c.n_kv_head, c.head_dim, c.qkv_bias, c.qk_norm, c.norm_eps)
        other.load_state_dict(attn.state_dict(), strict=False)
        return other.eval()

    return change


class ScaledOutput(Transformer):
    """Other logits without a tensor, a field or a forward of its own."""

    @property
    def output(self):
        return 0.5 * super().output


class Cap(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.02, 0.02)


def hooked(pre):
    def build():
        raw = randomised(Transformer(TransformerConfig(**SIZES)))
        if pre:
            raw.blocks[1].ffn.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
        else:
            raw.blocks[0].register_forward_hook(lambda module, inputs, out: out + 0.5)  # steering
        return raw

    return build


def windowed():
    """One layer slides; the config does not say so."""
    raw = randomised(Transformer(TransformerConfig(**SIZES)))
    raw.blocks[0].attn.window = 3
    return raw


def another_eps():
    raw = randomised(Transformer(TransformerConfig(**SIZES)))
    raw.blocks[1].norm2.eps = 30.0
    return raw


def another_method():
    raw = randomised(Transformer(TransformerConfig(**SIZES)))
    forward = raw.blocks[0].ffn.forward
    raw.blocks[0].ffn.forward = lambda x: 0.5 * forward(x)
    return raw


UNKNOWN = {
    "a gate in attention, with a field": gated,
    "a logit scale, with a field and without a tensor": scaled,
    "another attention with a tensor, but no field": with_module("blocks.1.attn", like(GatedAttention)),
    "another attention without a tensor or a field": with_module("blocks.1.attn", like(SilentlyGatedAttention)),
    "another Linear": with_module(
        "blocks.0.ffn.up", lambda up, c: Cap(c.width, c.ffn_width, bias=False).requires_grad_(False)
    ),
    "another norm": with_module("norm", lambda norm, c: nn.LayerNorm(c.width)),
    "a hook": hooked(False),
    "a hook before": hooked(True),
    "a window in one layer": windowed,
    "another epsilon": another_eps,
    "another method": another_method,
    "another output matrix": lambda: randomised(ScaledOutput(TransformerConfig(**SIZES))),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("what", UNKNOWN)
def test_what_was_added_to_the_model_acts_in_rollouts_too(what, static):
    """The trap: decoding goes on in the old arithmetic, and every log-probability of a rollout is another's."""
    raw = UNKNOWN[what]()
    assert not DecodeStep.fits(raw, raw.make_cache(1, 1))
    rollout = generate(raw, PROMPTS, 9, n=2, generator=torch.Generator().manual_seed(1), static=static)
    plain = Transformer(TransformerConfig(**SIZES)).eval()
    plain.load_state_dict({k: v for k, v in raw.state_dict().items() if k in plain.state_dict()})
    apart = []
    with torch.no_grad():
        for i, ids in enumerate(rollout.ids.tolist()):
            tokens = torch.tensor([PROMPTS[i // 2] + ids])
            expected = token_logprobs(raw, tokens)[0, -9:]
            torch.testing.assert_close(rollout.logprobs[i], expected, atol=1e-5, rtol=0)
            apart.append((token_logprobs(plain, tokens)[0, -9:] - expected).abs().max().item())
    assert max(apart) > 1e-2  # what was added makes a difference


@pytest.mark.parametrize("static", [False, True])
def test_a_field_in_the_config_itself(monkeypatch, static):
    """Not a subclass but the class is changed, and so is the method of the class that reads the field."""
    forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, *more: 0.7 * forward(self, x, *more))
    raw = randomised(Transformer(GatedConfig(**SIZES)))
    assert not DecodeStep.fits(raw, raw.make_cache(1, 1))
    raw = randomised(Transformer(TransformerConfig(**SIZES)))  # the method alone, as in a notebook
    assert not DecodeStep.fits(raw, raw.make_cache(1, 1))
    rollout = generate(raw, PROMPTS[:1], 9, static=static)
    with torch.no_grad():
        expected = token_logprobs(raw, torch.tensor([PROMPTS[0] + rollout.ids[0].tolist()]))[0, -9:]
    torch.testing.assert_close(rollout.logprobs[0], expected, atol=1e-5, rtol=0)


def test_every_field_is_declared_one_way():
    assert not ANY_VALUE & REQUIRED.keys()
    assert ANY_VALUE | REQUIRED.keys() == {f.name for f in fields(TransformerConfig)}


def test_another_cache_is_left_alone():
    raw = randomised(Transformer(TransformerConfig(**SIZES)))

    class Cache(type(raw.make_cache(1, 1))):
        pass

    cache = raw.make_cache(1, 4)
    assert DecodeStep.fits(raw, cache)
    cache.__class__ = Cache
    assert not DecodeStep.fits(raw, cache)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_act_in_the_step(dora):
    raw = add_lora(randomised(Transformer(TransformerConfig(**SIZES))), 3, 6, ["attn.*", "ffn.*"], dora)
    for p in raw.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    assert DecodeStep.fits(raw, raw.make_cache(1, 1))
    rollout = generate(raw, PROMPTS[:1], 9)
    with torch.no_grad():
        expected = token_logprobs(raw, torch.tensor([PROMPTS[0] + rollout.ids[0].tolist()]))[0, -9:]
    torch.testing.assert_close(rollout.logprobs[0], expected, atol=1e-4, rtol=0)

    layer = raw.blocks[0].attn.wq

    class Other(type(layer)):  # with a forward of its own it no longer acts as a Linear
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Other
    assert not DecodeStep.fits(raw, raw.make_cache(1, 1))
