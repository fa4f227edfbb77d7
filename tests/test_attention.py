"""attention.py against torch's own kernel, a plain loop, and the properties that masks and caches must have."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import (
    Attention,
    KVCache,
    causal_mask,
    document_mask,
    fast_attention,
    naive_attention,
    padding_mask,
    worked_example,
)
from positional import rope_cos_sin, rope_frequencies

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
                e = [math.exp(float(q[b, h, t] @ k[b, g, s]) / math.sqrt(q.shape[-1])) for s in seen]
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


def test_worked_example():
    out, weights = worked_example()
    torch.testing.assert_close(weights[0, 0, 2], torch.tensor([0.2483, 0.2483, 0.5035]), atol=5e-5, rtol=0)
    torch.testing.assert_close(out[0, 0, :, 0], torch.tensor([10.0, 16.6976, 22.5525]), atol=5e-4, rtol=0)


@pytest.mark.parametrize(("H", "G"), HEADS)
@pytest.mark.parametrize("case", ["causal", "mask", "decode", "chunk"])
def test_fast_equals_naive_forward_and_backward(H, G, case):
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


def test_naive_gradcheck():
    q, k, v = random(1, 2, 3, D, grad=True), random(1, 1, 3, D, grad=True), random(1, 1, 3, D, grad=True)
    assert torch.autograd.gradcheck(lambda *x: naive_attention(*x, causal_mask(3, 3))[0], (q, k, v))


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


def layer(G=2, qk_norm=True):
    return Attention(12, 6, G, D, bias=True, qk_norm=qk_norm).double()


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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from([1, 2, 3, 6]))
def test_any_split_into_cached_calls_equals_one_pass(chunks, G):
    torch.manual_seed(1)
    n = sum(chunks)
    attn, x = layer(G), random(B, n, 12)
    whole, cache, start, parts = attn(x, rope(torch.arange(n))), KVCache(1, B, G, n, D, torch.float64), 0, []
    for size in chunks:
        at = torch.arange(start, start + size)
        parts.append(attn(x[:, start : start + size], rope(at), cache=cache))
        cache.length += size
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


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
