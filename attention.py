"""Attention: from the formula, worked by hand, to grouped heads with a key/value cache.

    Attention(Q, K, V) = softmax(Q Kᵀ / √D + mask) V          Vaswani et al. 2017, arXiv:1706.03762, Eq. 1

Each query asks "which keys match me?", the softmax turns the scores into weights that sum to 1, and the output
is the weighted mean of the values. The division by √D keeps the scores' variance at 1 for unit-variance q and k:
without it the softmax saturates and its gradient vanishes.

One head is the formula. Many heads run H of them side by side on slices of width D and mix the results with one
matrix, so that a token can look at several places at once. The heads may share keys and values: H queries, G
key/value heads, each serving H/G neighbouring queries. G = H is multi-head, G = 1 multi-query (arXiv:1911.02150),
anything between grouped-query attention (arXiv:2305.13245). Sharing costs little quality and divides the cache:

    cache bytes = 2 (K and V) x layers x B x G x S x D x bytes per number

QK-norm (Qwen3, arXiv:2505.09388) puts an RMSNorm on every query and key head, which bounds the scores and keeps
training stable at high learning rates.

Masks are boolean, True = visible, and always broadcast to (B, heads, T, S). Three kinds, one rule:
causal (no future), padding (no pad tokens), document (no neighbours in a packed row). The rule: every query sees
at least itself. A query that sees nothing would be a softmax over −∞ alone, NaN, and 0 x NaN = NaN carries it into
every later layer.

Letters: B batch, T query time, S key time, C width, H query heads, G key/value heads, D head width.
Simplified: no dropout on the attention weights (modern recipes train without), no sliding window.

Run it: `python attention.py` works three tokens by hand and checks every path against the formula.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from norms import RMSNorm
from positional import apply_rope


def naive_attention(q, k, v, mask=None):
    """The formula, and the oracle that the fast path is tested against.

    q (B, H, T, D); k, v (B, G, S, D) with H a multiple of G; mask boolean, broadcastable to (B, H, T, S), True =
    visible. Returns the output (B, H, T, D) and the weights (B, H, T, S). The softmax runs in fp32 at least.
    """
    k = repeat_heads(k, q.shape[1] // k.shape[1])  # (B, H, S, D)
    v = repeat_heads(v, q.shape[1] // v.shape[1])  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)
    return weights.to(v.dtype) @ v, weights


def repeat_heads(x, n):
    """(B, G, S, D) -> (B, G·n, S, D): key/value head g serves the query heads g·n … g·n + n − 1, its neighbours."""
    B, G, S, D = x.shape
    return x[:, :, None].expand(B, G, n, S, D).reshape(B, G * n, S, D)


def causal_mask(T, S, device=None):
    """(T, S): query t stands at key slot S − T + t and sees the slots up to its own.

    The trap: with a cache S > T, and the triangle must sit at the *bottom right*. SDPA's `is_causal=True` puts it
    at the top left, where the newest query would see only the oldest key.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def padding_mask(real, T):
    """real (B, S), True on real tokens -> (B, 1, T, S): causal, without the pads; a pad still sees itself."""
    S = real.shape[1]
    itself = torch.eye(S, dtype=torch.bool, device=real.device)[S - T :]  # (T, S)
    return ((real[:, None] & causal_mask(T, S, real.device)) | itself)[:, None]


def document_mask(documents):
    """documents (B, T), a number per document -> (B, 1, T, T): causal, and only inside one's own document."""
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return (same & causal_mask(*same.shape[1:], documents.device))[:, None]


class KVCache:
    """Keys and values of the tokens already seen, for all layers, in memory allocated once.

    Decoding token t needs the keys and values of 0 … t−1 and they never change, so they are kept: a step costs one
    token's work instead of t's. `update` writes behind the `length` slots in use and returns views, never copies;
    the model moves `length` once all layers have written.
    """

    def __init__(self, n_layer, batch, n_kv_head, max_len, head_dim, dtype=torch.float32, device=None):
        shape = (batch, n_kv_head, max_len, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.length = 0

    def update(self, layer, k, v):
        """Append k and v, each (B, G, T, D), to a layer; returns all its keys and values, (B, G, length + T, D)."""
        end = self.length + k.shape[2]
        if end > self.keys[layer].shape[2]:
            raise ValueError(f"the cache holds {self.keys[layer].shape[2]} tokens, {end} were asked for")
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def repeat(self, n, max_len):
        """A cache of B·n rows with room for `max_len` tokens: each row n times, so a prompt is computed once."""
        L, (B, G, _, D) = len(self.keys), self.keys[0].shape
        out = KVCache(L, B * n, G, max_len, D, self.keys[0].dtype, self.keys[0].device)
        out.length = self.length
        for mine, theirs in zip(self.keys + self.values, out.keys + out.values, strict=True):
            rows = theirs.view(B, n, G, max_len, D)[:, :, :, : self.length]
            rows.copy_(mine[:, None, :, : self.length])  # (B, 1, G, S, D) -> (B, n, G, S, D)
        return out

    def keep(self, rows):
        """Drop all but the rows of the index `rows`, in place: finished sequences leave the batch."""
        for store in (self.keys, self.values):
            for layer, x in enumerate(store):
                x[: len(rows), :, : self.length] = x[rows, :, : self.length]
                store[layer] = x[: len(rows)]


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C), with H query heads and G key/value heads of width D."""

    def __init__(self, width, n_head, n_kv_head=None, head_dim=None, bias=False, qk_norm=False, eps=1e-6):
        super().__init__()
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        self.head_dim = head_dim or width // n_head
        if n_head % self.n_kv_head:
            raise ValueError(f"{n_head} query heads cannot share {self.n_kv_head} key/value heads evenly")
        self.wq = nn.Linear(width, n_head * self.head_dim, bias=bias)
        self.wk = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.wv = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.wo = nn.Linear(n_head * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else None

    def forward(self, x, rope=None, mask=None, cache=None, layer=0):
        """x (B, T, C); rope = (cos, sin), each (T, D) or (B, T, D); mask None = causal, or boolean and final,
        broadcastable to (B, H, T, S); cache a KVCache, of which this is layer number `layer`."""
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_head, self.head_dim)
        k = self.wk(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.wv(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        if self.q_norm is not None:  # per head, before the rotation: RoPE keeps lengths, so the bound survives
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, G, T, D)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, G, S, D)
        out = fast_attention(q, k, v, mask)  # (B, H, T, D)
        return self.wo(out.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))  # (B, T, C)


def fast_attention(q, k, v, mask=None):
    """naive_attention's output by torch's fused kernel: never stores the (T, S) weights. mask None = causal."""
    T, S = q.shape[2], k.shape[2]
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    is_causal = mask is None and T > 1  # one new token sees the whole cache: no mask at all
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)


def worked_example():
    """Three tokens, one head of width 2, every number on paper.

    q₂ = (1, 1) meets k₀ = (1, 0), k₁ = (0, 1), k₂ = (1, 1): the dot products are 1, 1, 2; divided by √2 they are
    0.7071, 0.7071, 1.4142; their exponentials 2.0281, 2.0281, 4.1133 sum to 8.1695. So the weights are 0.2483,
    0.2483, 0.5035, and with the values 10, 20, 30 the output is 2.483 + 4.965 + 15.105 = 22.552.
    """
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[None, None]  # q = k: (B=1, H=1, T=3, D=2)
    v = torch.tensor([[10.0], [20.0], [30.0]])[None, None]  # (1, 1, 3, 1)
    return naive_attention(x, x, v, causal_mask(3, 3))


def main():
    torch.manual_seed(0)
    out, weights = worked_example()
    print("three tokens by hand (rows: queries; a token cannot see the tokens after it)")
    for t in range(3):
        row = "  ".join(f"{w:.4f}" for w in weights[0, 0, t].tolist())
        print(f"  token {t}: weights {row}  ->  output {out[0, 0, t].item():.3f}")
    torch.testing.assert_close(weights[0, 0, 2], torch.tensor([0.2483, 0.2483, 0.5035]), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[0, 0, 2], torch.tensor([22.5525]), atol=1e-3, rtol=0)

    B, T, H, D = 2, 7, 6, 8
    q = torch.randn(B, H, T, D)
    print("\ngrouped heads, T = 7, H = 6, D = 8: fused kernel against the formula, and the cache for 4,096 tokens")
    for G in (6, 3, 2, 1):
        k, v = torch.randn(B, G, T, D), torch.randn(B, G, T, D)
        worst = (fast_attention(q, k, v) - naive_attention(q, k, v, causal_mask(T, T))[0]).abs().max().item()
        assert worst < 1e-5
        kind = {6: "multi-head", 1: "multi-query"}.get(G, "grouped-query")
        size = 2 * G * 4096 * D * 4 / 1024
        print(f"  G = {G}  {kind:<14} largest difference {worst:.1e}   {size:6.0f} KiB per layer and row")

    layer = Attention(24, H, 2, D, qk_norm=True)
    x = torch.randn(B, T, 24)
    cache = KVCache(1, B, 2, T, D)
    steps = []
    for t in range(T):  # one token at a time must give what one pass gives
        steps.append(layer(x[:, t : t + 1], cache=cache))
        cache.length += 1
    worst = (torch.cat(steps, dim=1) - layer(x)).abs().max().item()
    assert worst < 1e-5
    print(f"\ndecoding token by token with the cache = one full pass: largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
