"""attention.py against torch's own kernel, a plain loop, and the properties that masks and caches must have."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import (
    Attention,
    KVCache,
    RollingKVCache,
    causal_mask,
    document_mask,
    fast_attention,
    naive_attention,
    padding_mask,
    visible_mask,
    window_mask,
)
from positional import apply_rope, rope_cos_sin, rope_frequencies
from support.attention_maps import attention_entropy, attention_weights
from support.devices import TRAITS, cast_once
from support.sdpa import banded_attention

B, T, S, D = 2, 5, 7, 4  # pairwise distinct, so that a swapped axis cannot pass
HEADS = [(6, 6), (6, 3), (6, 2), (6, 1)]  # (H, G): multi-head, grouped, grouped, multi-query


def random(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_loop(q, k, v, mask):
    """Attention with four loops and math.exp: nothing shared with the code under test."""
    H, G = q.shape[1], k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(H):
            g = h // (H // G)
            for t in range(q.shape[2]):
                seen = [s for s in range(k.shape[2]) if mask[b, t, s]]
                e = [math.exp((q[b, h, t] @ k[b, g, s]).item() / math.sqrt(q.shape[-1])) for s in seen]
                out[b, h, t] = sum(w / sum(e) * v[b, g, s] for w, s in zip(e, seen, strict=True))
    return out


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_naive_is_the_formula(H, G):
    q, k, v = random(B, H, T, D), random(B, G, S, D), random(B, G, S, 3)
    mask = torch.rand(B, T, S) < 0.6
    mask[:, :, 0] = True
    out, weights = naive_attention(q, k, v, mask[:, None])
    torch.testing.assert_close(out, by_loop(q, k, v, mask), atol=1e-10, rtol=0)
    assert weights.shape == (B, H, T, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    assert (weights[~mask[:, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("case", ["causal", "mask", "decode", "chunk"])
@pytest.mark.parametrize("repeated", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_fast_equals_naive_forward_and_backward(monkeypatch, H, G, case, repeated):
    """With a mask, keys and values that heads share are repeated on a GPU: they fit none of its fast kernels."""
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], repeats_shared_heads=repeated))
    t, s = {"causal": (S, S), "mask": (T, S), "decode": (1, S), "chunk": (T, S)}[case]
    q, k, v = random(B, H, t, D, grad=True), random(B, G, s, D, grad=True), random(B, G, s, D, grad=True)
    mask = (torch.rand(B, 1, t, s) < 0.5) | causal_mask(t, s) if case == "mask" else None
    naive, _ = naive_attention(q, k, v, mask if case == "mask" else causal_mask(t, s))
    fast = fast_attention(q, k, v, mask)
    torch.testing.assert_close(fast, naive, atol=1e-12, rtol=0)
    up = random(*naive.shape)
    for a, b in zip(torch.autograd.grad(fast, (q, k, v), up), torch.autograd.grad(naive, (q, k, v), up), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_naive_equals_torch_sdpa():
    q, k, v = random(B, 6, T, D), random(B, 6, S, D), random(B, 6, S, D)
    mask = torch.rand(B, 1, T, S) < 0.5
    mask[..., 0] = True
    torch.testing.assert_close(
        naive_attention(q, k, v, mask)[0], F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )


def test_the_softmax_of_bf16_scores_is_in_fp32():
    q, k, v = (random(B, 6, S, D).bfloat16() for _ in range(3))
    out, weights = naive_attention(q, k, v)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 6, S))


def test_naive_gradcheck():
    q, k, v = random(1, 2, 3, D, grad=True), random(1, 1, 3, D, grad=True), random(1, 1, 3, D, grad=True)
    assert torch.autograd.gradcheck(lambda *x: naive_attention(*x, causal_mask(3, 3))[0], (q, k, v))


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_the_gradient_is_the_docstrings(H, G):
    q, k, v = random(B, H, T, D, grad=True), random(B, G, S, D, grad=True), random(B, G, S, 3, grad=True)
    out, weights = naive_attention(q, k, v, causal_mask(T, S))
    dout = random(*out.shape)
    repeated = [x.repeat_interleave(H // G, dim=1) for x in (k, v)]
    dweights = dout @ repeated[1].mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dk, dv = dscores.mT @ q / math.sqrt(D), weights.mT @ dout
    shared = [x.unflatten(1, (G, H // G)).sum(2) for x in (dk, dv)]
    expected = (dscores @ repeated[0] / math.sqrt(D), *shared)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), dout), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(dscores.sum(-1), torch.zeros(B, H, T, dtype=torch.float64), atol=1e-12, rtol=0)


def test_causal_mask_sits_at_the_bottom_right():
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(causal_mask(3, 5), expected)


def test_padding_mask_hides_pads_but_never_blinds():
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    mask = padding_mask(real, 4)
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(mask[1, 0], causal_mask(4, 4))
    assert padding_mask(real, 2)[0, 0].int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]


def test_document_mask():
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def sight(m, n, window, sinks):
    """Whether the query at position m sees the key at n, as the paper of each says it."""
    return 0 <= n <= m and (m - n < window or n < sinks)


def test_window_mask():
    assert window_mask(5, 5, 2)[:, :].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert window_mask(2, 5, 2, sinks=1).int().tolist() == [[1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    for window in (1, 2, 4, 9):
        for sinks in (0, 1, 3):
            expected = [[sight(m, n, window, sinks) for n in range(7)] for m in range(7)]
            assert window_mask(7, 7, window, sinks).tolist() == expected
            causal = causal_mask(3, 7)
            assert torch.equal(window_mask(3, 7, window, sinks), torch.tensor(expected[4:]))
            assert torch.equal(window_mask(3, 7, window, sinks, causal), torch.tensor(expected[4:]))


def test_window_mask_counts_real_tokens_of_ones_own_document():
    real = torch.tensor([[False, False, True, True, True, True]])
    mask = window_mask(6, 6, 2, 1, padding_mask(real, 6))[0, 0].int().tolist()
    assert mask[5] == [0, 0, 1, 0, 1, 1]  # the sink is the first real token
    assert mask[0] == [1, 0, 0, 0, 0, 0]  # a pad sees itself
    mask = window_mask(6, 6, 2, 1, document_mask(torch.tensor([[0, 0, 1, 1, 1, 1]])))[0, 0].int().tolist()
    assert mask[5] == [0, 0, 1, 0, 1, 1]  # the sink is the document's first token
    assert mask[1] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 2), (70, 1)])
@pytest.mark.parametrize(("t", "s"), [(151, 151), (140, 151), (1, 151)])  # two bands and a rest, with a cache, decoding
def test_windowed_paths_equal_naive_forward_and_backward(window, sinks, t, s):
    q, k, v = random(1, 6, t, D, grad=True), random(1, 2, s, D, grad=True), random(1, 2, s, D, grad=True)
    mask = torch.tensor([[sight(m, n, window, sinks) for n in range(s)] for m in range(s - t, s)])
    naive, _ = naive_attention(q, k, v, mask)
    up = random(*naive.shape)
    expected = torch.autograd.grad(naive, (q, k, v), up)
    outs = [fast_attention(q, k, v, None, window, sinks), banded_attention(q, k, v, window, sinks)]
    outs += [fast_attention(q, k, v, causal_mask(t, s)[None, None], window, sinks)]
    outs += [naive_attention(q, k, v, visible_mask(q, k, None, window, sinks))[0]]
    for out in outs:
        torch.testing.assert_close(out, naive, atol=1e-12, rtol=0)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), up), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_window_equals_flex_attention():
    """An implementation with no line in common: torch's FlexAttention, uncompiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, sinks, n = 5, 2, 40
    q, k, v = random(1, 6, n, 16), random(1, 2, n, 16), random(1, 2, n, 16)
    block = create_block_mask(lambda b, h, i, j: (i >= j) & ((i - j < window) | (j < sinks)), 1, 1, n, n, device="cpu")
    theirs = flex_attention(q, k, v, block_mask=block, enable_gqa=True)
    torch.testing.assert_close(fast_attention(q, k, v, None, window, sinks), theirs, atol=1e-6, rtol=0)


def layer(G=2, qk_norm=True, **window):
    return Attention(12, 6, G, D, bias=True, qk_norm=qk_norm, **window).double()


def rope(positions):
    cos, sin = rope_cos_sin(positions, rope_frequencies(D))
    return cos.double(), sin.double()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_module_is_projections_around_the_formula(qk_norm):
    attn, x = layer(qk_norm=qk_norm), random(B, T, 12)
    if qk_norm:
        torch.nn.init.normal_(attn.q_norm.weight)
        torch.nn.init.normal_(attn.k_norm.weight)

    def heads(linear, n, norm=None):
        y = F.linear(x, linear.weight, linear.bias).view(B, T, n, D)
        if norm is not None:
            y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        return y.permute(0, 2, 1, 3)

    mask = causal_mask(T, T).expand(B, T, T)
    out = by_loop(heads(attn.wq, 6, attn.q_norm), heads(attn.wk, 2, attn.k_norm), heads(attn.wv, 2), mask)
    out = F.linear(out.permute(0, 2, 1, 3).reshape(B, T, 24), attn.wo.weight, attn.wo.bias)
    torch.testing.assert_close(attn(x), out, atol=1e-10, rtol=0)


def test_under_autocast_only_the_matrices_are_rounded(monkeypatch):
    """On a CPU attention itself stays in fp32, forward and backward, and the input is converted once for q, k and v."""
    layer, x = Attention(24, 6, 2, qk_norm=True), torch.randn(B, T, 24, requires_grad=True)
    turn, up = rope_cos_sin(torch.arange(T), rope_frequencies(4)), torch.randn(B, T, 24)
    seen = []

    def spied(q, k, v, **how):
        seen.extend([t.dtype for t in (q, k, v)] + [torch.is_autocast_enabled("cpu")])
        return sdpa(q, k, v, **how)

    sdpa = F.scaled_dot_product_attention
    exact = torch.autograd.grad(layer(x, turn), (x, *layer.parameters()), up)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, turn)
        assert cast_once(x).dtype == torch.bfloat16
    assert seen == [torch.float32] * 3 + [False]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, turn), atol=0.01, rtol=0.02)
    for found, expected in zip(torch.autograd.grad(out, (x, *layer.parameters()), up.bfloat16()), exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert cast_once(x) is x


def test_a_changed_token_changes_no_earlier_output():
    attn, x = layer(), random(B, T, 12)
    before = attn(x)
    for t in range(T):
        y = x.clone()
        y[:, t] += 1
        after = attn(y)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


def test_packed_documents_equal_documents_alone():
    attn, lengths = layer(), [2, 4, 3]
    pieces = [random(1, n, 12) for n in lengths]
    documents = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])
    positions = torch.tensor([[t for n in lengths for t in range(n)]])
    packed = attn(torch.cat(pieces, 1), rope(positions), document_mask(documents))
    alone = torch.cat([attn(p, rope(torch.arange(n))) for p, n in zip(pieces, lengths, strict=True)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=0)


def test_left_padding_changes_nothing_for_real_tokens():
    attn, x, pads = layer(), random(1, T, 12), 3
    padded = torch.cat([random(1, pads, 12), x], 1)
    real = torch.tensor([[False] * pads + [True] * T])
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    out = attn(padded, rope(positions), padding_mask(real, T + pads))
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, pads:], attn(x, rope(torch.arange(T))), atol=1e-12, rtol=0)


def one_pass(attn, x, real, window, sinks):
    """The whole layer at once, each row alone and without its pads: what every cache must reproduce."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        row = x[b : b + 1, real[b]]
        n = row.shape[1]
        if n == 0:
            continue

        def heads(linear, norm=None, row=row, n=n):
            y = linear(row).view(1, n, -1, D)
            return (y if norm is None else norm(y)).transpose(1, 2)

        turn = rope(torch.arange(n))
        q, k = apply_rope(heads(attn.wq, attn.q_norm), *turn), apply_rope(heads(attn.wk, attn.k_norm), *turn)
        mask = torch.tensor([[sight(i, j, window, sinks) for j in range(n)] for i in range(n)])
        mixed = F.scaled_dot_product_attention(q, k, heads(attn.wv), mask, enable_gqa=True)
        out[b, real[b]] = attn.wo(mixed.transpose(1, 2).reshape(n, -1))
    return out


@pytest.mark.parametrize("kind", ["full", "window", "sinks", "rolling", "rolling sinks"])
@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    pads=st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)),
    window=st.integers(1, 5),
    sinks=st.integers(1, 3),
    G=st.sampled_from([1, 2, 6]),
)
def test_any_split_into_cached_calls_equals_one_pass(kind, chunks, pads, window, sinks, G):
    torch.manual_seed(1)
    n = sum(chunks)
    window = 10**6 if kind == "full" else window
    sinks = sinks if "sinks" in kind else 0
    attn, x = layer(G, **({} if kind == "full" else {"window": window, "sinks": sinks})), random(B, n, 12)
    real = torch.arange(n) >= torch.tensor(pads or (0, 0))[:, None]  # left padding; a row may be pads alone
    position = (real.cumsum(1) - 1).clamp(min=0)
    if "rolling" in kind:
        cache = RollingKVCache(1, B, G, window, D, torch.float64, sinks=sinks)
    else:
        cache = KVCache(1, B, G, n, D, torch.float64)
    parts, start = [], 0
    with torch.no_grad():
        for size in chunks:
            end = start + size
            mask = padding_mask(real[:, :end], size) if pads else None
            parts.append(attn(x[:, start:end], rope(position[:, start:end]), mask, cache))
            cache.length += size
            start = end
        got = torch.cat(parts, 1)
        assert got.isfinite().all()
        expected = one_pass(attn, x, real, window, sinks)
        torch.testing.assert_close(got[real], expected[real], atol=1e-11, rtol=0)
        whole = attn(x, rope(position), padding_mask(real, n) if pads else None)
        torch.testing.assert_close(whole[real], expected[real], atol=1e-11, rtol=0)


def test_rolling_cache_repeat_and_keep():
    attn, x = layer(window=3, sinks=1), random(2, 9, 12)
    real = torch.arange(9) >= torch.tensor([[0], [2]])
    position = (real.cumsum(1) - 1).clamp(min=0)
    whole = attn(x, rope(position), padding_mask(real, 9))
    cache = RollingKVCache(1, 2, 2, 3, D, torch.float64, sinks=1)
    with torch.no_grad():
        attn(x[:, :5], rope(position[:, :5]), padding_mask(real[:, :5], 5), cache)
        cache.length += 5
        cache = cache.repeat(3, 100)
        assert (cache.length, cache.window, cache.sinks) == (5, 3, 1)
        rows = torch.tensor([0, 1, 5])  # of prompts 0, 0 and 1
        cache.keep(rows)
        which = rows // 3
        for t in range(5, 9):
            mask = padding_mask(real[which, : t + 1], 1)
            out = attn(x[which, t : t + 1], rope(position[which, t : t + 1]), mask, cache)
            cache.length += 1
            torch.testing.assert_close(out[:, 0], whole[which, t], atol=1e-12, rtol=0)


def test_rolling_cache_does_not_grow():
    attn, cache = layer(window=4, sinks=2), RollingKVCache(1, 1, 2, 4, D, torch.float64, sinks=2)
    before = cache.keys[0].data_ptr(), cache.keys[0].shape
    x = random(1, 400, 12)
    with torch.no_grad():
        for t in range(400):
            out = attn(x[:, t : t + 1], rope(torch.tensor([t])), None, cache)
            cache.length += 1
    assert (cache.keys[0].data_ptr(), cache.keys[0].shape) == before == (before[0], (1, 2, 6, D))
    torch.testing.assert_close(out[:, 0], attn(x, rope(torch.arange(400)))[:, -1], atol=1e-12, rtol=0)


def test_gradients_flow_through_a_windowed_layer():
    attn, x = layer(window=2, sinks=1), random(1, 4, 12, grad=True)
    assert torch.autograd.gradcheck(lambda x: attn(x, rope(torch.arange(4))), (x,))


@pytest.mark.parametrize("window", [{}, {"window": 3, "sinks": 1}])
def test_attention_weights_are_those_that_made_the_output(window):
    model = torch.nn.Sequential(layer(**window), layer(**window))
    x, n = random(B, 9, 12), 9
    first, second = attention_weights(model, x)
    assert first.shape == second.shape == (B, 6, n, n)
    torch.testing.assert_close(first.sum(-1), torch.ones(B, 6, n, dtype=torch.float64))
    seen = [[sight(i, j, window.get("window", n), window.get("sinks", 0)) for j in range(n)] for i in range(n)]
    assert torch.equal(first > 0, torch.tensor(seen).expand(B, 6, n, n))
    values = model[0].wv(x).view(B, n, 2, D).repeat_interleave(3, dim=2)  # (B, S, H, D)
    mixed = torch.einsum("bhts,bshd->bthd", first, values).reshape(B, n, -1)
    torch.testing.assert_close(model[0].wo(mixed), model[0](x), atol=1e-12, rtol=0)
    assert model[0].record is None  # switched off again


def test_attention_weights_in_a_cached_call():
    attn, x = layer(window=3, sinks=1), random(1, 6, 12)
    cache = KVCache(1, 1, 2, 6, D, torch.float64)
    attn(x[:, :5], None, None, cache)
    cache.length = 5
    (weights,) = attention_weights(attn, x[:, 5:], None, None, cache)
    (whole,) = attention_weights(attn, x)
    torch.testing.assert_close(weights[:, :, 0], whole[:, :, 5], atol=1e-12, rtol=0)


def test_a_pad_sees_itself_in_a_rolling_cache():
    attn, x = layer(window=2, sinks=1), random(1, 6, 12)
    real = torch.tensor([[False] * 4 + [True] * 2])
    cache = RollingKVCache(1, 1, 2, 2, D, torch.float64, sinks=1)
    for start, end in ((0, 1), (1, 3), (3, 4), (4, 6)):
        mask = padding_mask(real[:, :end], end - start)
        (weights,) = attention_weights(attn, x[:, start:end], None, mask, cache)  # the formula: 0 / 0 would show
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        cache.length = end


def test_entropy():
    even, one = torch.full((2, 8), 1 / 8), torch.eye(8)[:2]
    torch.testing.assert_close(attention_entropy(even), torch.full((2,), math.log(8)))
    assert attention_entropy(one).tolist() == [0.0, 0.0]
    weights = torch.rand(3, 5, dtype=torch.float64).softmax(-1)
    expected = [-sum(w * math.log(w) for w in row) for row in weights.tolist()]
    assert attention_entropy(weights).tolist() == pytest.approx(expected)


def test_cache_repeat_and_keep():
    cache = KVCache(2, 2, 1, 3, D)
    for i in range(2):
        cache.update(i, torch.randn(2, 1, 3, D), torch.randn(2, 1, 3, D))
    cache.length = 3
    more = cache.repeat(3, 5)
    assert more.length == 3
    assert more.keys[1].shape == (6, 1, 5, D)
    for row in range(6):
        assert torch.equal(more.values[1][row, :, :3], cache.values[1][row // 3])
    expected = more.keys[0][[1, 4], :, :3].clone()
    more.keep(torch.tensor([1, 4]))
    assert more.keys[0].shape[0] == 2
    assert torch.equal(more.keys[0][:, :, :3], expected)


def test_errors():
    cache = KVCache(1, 1, 1, 2, D)
    with pytest.raises(ValueError, match="holds 2 tokens, 3 were asked for"):
        cache.update(0, torch.zeros(1, 1, 3, D), torch.zeros(1, 1, 3, D))
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        Attention(12, 6, 4, D)
    with pytest.raises(ValueError, match="a window of 0 tokens"):
        Attention(12, 6, 2, D, window=0)
    with pytest.raises(ValueError, match="sinks is 2"):
        Attention(12, 6, 2, D, sinks=2)
    with pytest.raises(ValueError, match="sinks is -1"):
        Attention(12, 6, 2, D, window=4, sinks=-1)
    with pytest.raises(ValueError, match="keeps 0 sinks and a window of 4, the layer sees 1 and 4"):
        layer(window=4, sinks=1)(random(1, 1, 12), cache=RollingKVCache(1, 1, 2, 4, D, torch.float64))
    with pytest.raises(ValueError, match="a width of 50 cannot be cut into 6 heads evenly; give head_dim"):
        Attention(50, 6)
    for sizes, name in (((12, 0), "n_head"), ((12, 6, 0), "n_kv_head"), ((12, 6, 2, 0), "head_dim")):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):  # not a silent default
            Attention(*sizes)
    assert Attention(50, 6, head_dim=8).wq.weight.shape == (48, 50)
    assert Attention(48, 6).head_dim == 8


def test_a_rolling_cache_refuses_what_it_would_compute_wrongly():
    """Masks that are not padding_mask's, and pads that come or go between the calls."""
    attn, x = layer(window=3, sinks=1), random(4, 9, 12)

    def real(pads, n, repeats=1):  # of two rows: no pad, and some
        return (torch.arange(n) >= torch.tensor([[0], [pads]])).repeat_interleave(repeats, 0)

    def begun(mask, b=2):
        cache = RollingKVCache(1, b, 2, 3, D, torch.float64, sinks=1)
        attn(x[:b, :5], None, mask, cache)
        cache.length = 5
        return cache

    def padded():
        return begun(padding_mask(real(2, 5), 5))

    hole = real(2, 5)
    hole[0, 2] = False
    packed = document_mask(torch.tensor([[0, 0, 1, 1, 1]] * 2))
    for mask in (packed, packed[:1], packed & padding_mask(real(1, 5), 5), padding_mask(hole, 5)):
        with pytest.raises(ValueError, match="takes no mask but padding_mask's"):
            begun(mask)
    for mask in (causal_mask(5, 5), padding_mask(real(2, 9), 5), padding_mask(real(2, 5), 3), packed[:, 0]):
        with pytest.raises(ValueError, match=r"needs a mask of shape \(2, 1, 5, 5\)"):
            begun(mask)
    for cache in (padded(), padded().repeat(2, 9), begun(None)):
        b = len(cache.keys[0])
        for end in (6, 7):  # one pad, where there were two, or none
            with pytest.raises(ValueError, match="takes no mask but padding_mask's"):
                attn(x[:b, 5:end], None, padding_mask(real(1, end, b // 2), end - 5), cache)
    for end in (6, 7):
        with pytest.raises(ValueError, match="it needs padding_mask's mask in every call"):
            attn(x[:2, 5:end], None, None, padded())
    cache = padded()
    cache.keep(torch.tensor([0]))  # a row without pads: None is right again
    expected = attn(x[:1, 5:6], None, None, begun(None, b=1))
    torch.testing.assert_close(attn(x[:1, 5:6], None, None, cache), expected, atol=1e-12, rtol=0)
