"""Attention: each token reads itself and those before it. One head, many heads, shared heads; masks; the KV cache.

    Attention(Q, K, V) = softmax(Q Kᵀ / √D + mask) V       mask: −∞ where hidden, else 0. arXiv:1706.03762, §3.2

Three learned matrices turn each token's vector into a query and a key of D numbers, and a value: rows of Q, K and V.
Three tokens by hand, D = 2: q₂ = (1, 1) meets k₀ = (1, 0), k₁ = (0, 1), k₂ = (1, 1). The dot products are 1, 1, 2;
divided by √2 they are 0.7071, 0.7071, 1.4142; their exponentials 2.0281, 2.0281, 4.1133 sum to 8.1695. So the weights
are 0.2483, 0.2483, 0.5035, and with values of one number, 10, 20, 30, the output is 2.48 + 4.97 + 15.10 = 22.55.

A query asks "which keys match me?", the softmax turns the scores into weights that sum to 1, and the output is the
weighted mean of the values. If the numbers of q and k are independent, with mean 0 and variance 1, their dot product
has variance D: the division by √D brings it back to 1.

A *head* is one such attention over its own D numbers of each query, key and value. H of them run side by side, so one
token can look at H places at once, each for another reason; a last matrix, `wo`, mixes their H · D outputs back to C,
the width of a token's vector. Keys and values may have fewer heads, G: each then serves H / G query heads.

Letters: B rows (one sequence each), T queries, S keys, C width, H query heads, G key/value heads, D head width.

One layer, `Attention.forward`, for B rows of T new tokens:

    q = wq(x)                              cut into H heads                          (B, T, C) -> (B, H, T, D)
    k, v = wk(x), wv(x)                    cut into G heads                          (B, T, C) -> (B, G, T, D) each
    q, k = q_norm(q), k_norm(k)            if qk_norm: RMSNorm of each head by itself
    q = apply_rope(q, cos, sin), k so too  if rope is given: rotated by the token's position; v is not
    k, v = cache.update(layer, k, v)       what the cache holds, then these          (B, G, S, D) each; no cache: S = T
    out = fast_attention(q, k, v, mask)    torch's kernels for naive_attention:      (B, H, T, D)
        k = k.repeat_interleave(H / G, 1)  v too: one for each query head            (B, H, S, D) each
        scores = q kᵀ / √D                 −∞ where the mask is False                (B, H, T, S)
        weights = softmax(scores)          over the S keys: rows sum to 1            (B, H, T, S)
        out = weights v                                                              (B, H, T, D)
    y = wo(out)                            the heads side by side                    (B, H, T, D) -> (B, T, C)

The backward pass (dx is short for dL/dx; for a row w = softmax(s) of weights, ∂w_i/∂s_j = w_i (δ_ij − w_j)):

    dv = weightsᵀ dout                     then summed over the heads that share v   (B, H, S, D) -> (B, G, S, D)
    dweights = dout vᵀ                                                               (B, H, T, S)
    dscores = weights ⊙ (dweights − Σ_S weights ⊙ dweights)                          (B, H, T, S), rows sum to 0
    dq = dscores k / √D,  dk = dscoresᵀ q / √D, then summed as dv is                 (B, H, T, D), (B, G, S, D)

In the example at the top ∂out/∂score_s = w_s (v_s − out) = −3.12, −0.63, 3.75: raising the score of a key whose value
is above out raises out. Where one weight is near 1, all these derivatives are near 0: large scores stop learning. That
is what √D (and qk_norm) prevents.

    option          default  model's    what it changes (the model is transformer.py's)
    n_kv_head, G    H        2 (H = 6)  wk, wv and the KV cache shrink by H / G. G = H: multi-head; G = 1: multi-query
                                        (arXiv:1911.02150), between them grouped-query attention (arXiv:2305.13245)
    head_dim, D     C / H    32         the width of every head; H · D may differ from C
    qk_norm         False    True       bounds a score by √D · max |gain of q| · max |gain of k|: stable at high
                                        learning rates (arXiv:2309.14322; in Qwen3, arXiv:2505.09388)
    bias            False    False      a bias in wq, wk, wv and wo
    window, W       None     None       a query sees itself and the W − 1 tokens before it (Mistral, arXiv:2310.06825)
    sinks           0        0          with a window: how many first tokens stay visible to all (arXiv:2309.17453)

The same lines serve every use. In code a mask is boolean, True = visible. *Decoding*: a text is written token by token,
and each needs the keys and values of all earlier ones; a *cache* holds them, each token's in a *slot*, and its `length`
counts the tokens read so far, pads too. *Prefill*: the prompt is read in one pass, which fills the cache; a later
*chunk* adds several tokens at once. *Left pads* fill up the shorter prompts of a batch; they take slots of a KVCache.
*Packed*: several documents in one row, hidden from each other. n counts the tokens of a row from 0, without its pads.

    use                  T   S                 mask                            cache
    training             T   T                 causal (T, T)                   none
    training, packed     T   T                 document_mask (B, 1, T, T)      none
    prefill              T   T                 causal (T, T)                   KVCache: fills slots 0 … T − 1
    prefill, left pads   T   T                 padding_mask (B, 1, T, T)       KVCache: fills slots 0 … T − 1
    decoding, token n    1   n + 1             none: the newest sees all       KVCache: fills slot n
    decoding, left pads  1   length + 1        padding_mask (B, 1, 1, S)       KVCache: fills slot `length`
    later chunk          T   length + T        causal (T, S) or padding_mask   KVCache: fills the next T slots
    all above, window W  T, S as above         as above + the layer's window   as above
    prefill, window W    T   T                 causal + the layer's window     RollingKVCache: keeps the sinks, last W
    decoding, token n    1   ≤ sinks + W       none: the slots are the window  RollingKVCache: fills one slot

Traps, the ones that bite most first:

* With a cache S > T, and the causal triangle must sit at the *bottom right*: query t stands at key slot S − T + t.
  torch's F.scaled_dot_product_attention (SDPA: the whole formula in one kernel) puts it at the top left with
  `is_causal=True`: in decoding, T = 1, the newest query would see only the oldest key.
* Every query must see at least itself. One that sees nothing is a softmax over −∞ alone: NaN in the formula (SDPA
  returns 0), and 0 · NaN = NaN carries it into every later layer. So a pad sees itself.
* Left pads shift the slots, not the positions: besides the padding mask, give `rope` each row's own positions. RoPE
  sees only differences and forgives a constant shift, until its table ends; learned positions do not forgive it.
* All layers write at the same place of the cache, so their *caller* moves `cache.length`, once, after the last layer:
  the model does; if you call one layer by itself, you do.
* A window added to a model that was trained without one breaks it. Attention weights must sum to 1, and a head that
  finds nothing to look at has learned to put them on the first tokens. Keep those visible, as sinks, and it works.

What it costs. A head's scores are T · S dot products; a KVCache takes 2 (K and V) · n_layer · B · G · max_len · D
numbers, a RollingKVCache sinks + W in the place of max_len. With a window and no other mask about 2 · T · W of the
products are computed (W ≥ 64, T ≥ 2 W), band by band; packed rows, left pads and shorter chunks pay for all T · S. What
a window hides is not lost: each further layer lets an output depend on W − 1 tokens more.

Simplified: no dropout on the weights; the kernels are torch's. Run it: `python attention.py`.
"""

import math

import torch
from torch import nn

from norms import RMSNorm
from positional import apply_rope
from support.architecture import check_attention
from support.attention_maps import attention_weights
from support.cache_rows import RowsOfKVCache, RowsOfRollingKVCache
from support.devices import attention_dtype, cast_once
from support.output import run_demo
from support.rolling_cache import check_sight, held_tokens, roll_rows
from support.sdpa import banded_attention, sdpa

# ---------------------------------------------------------------------------------------------------------------
# The formula.


def naive_attention(q, k, v, mask=None):
    """The formula, for reading, for tests of `fast_attention`, and where the weights are wanted.

    q (B, H, T, D); k, v (B, G, S, D) with H a multiple of G; mask boolean, broadcastable to (B, H, T, S), True =
    visible. Returns the output (B, H, T, D) and the attention weights (B, H, T, S). The softmax runs in fp32 at least.
    """
    H, G = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))  # (B, H, S, D): each serves H / G neighbouring heads
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1)  # (B, H, T, S)
    return weights.to(v.dtype) @ v, weights


# ---------------------------------------------------------------------------------------------------------------
# Who sees whom: boolean masks, True = visible.


def causal_mask(T, S, device=None):
    """(T, S): no future. Query t stands at key slot S − T + t and sees the slots up to its own."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def padding_mask(real, T):
    """real (B, S), True on real tokens -> (B, 1, T, S), queries the last T: causal, no pads; a pad sees itself."""
    key = torch.arange(real.shape[1], device=real.device)  # (S,)
    query = key[-T:, None]  # (T, 1)
    return ((real[:, None] & (key <= query)) | (key == query))[:, None]


def document_mask(documents):
    """documents (B, T), a number per document -> (B, 1, T, T): causal, and only inside one's own document."""
    T, same = documents.shape[1], documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return (same & causal_mask(T, T, documents.device))[:, None]


def in_sight(query, key, window, sinks=0):
    """The window, on positions: query (..., T), key (..., S) -> (..., T, S). A key below 0 is a pad, or an empty slot.
    Query m sees key n if 0 ≤ m − n < window, or n < sinks and n ≤ m."""
    query, key = query[..., :, None], key[..., None, :]
    near = query - key < window
    if sinks:
        near = near | (key < sinks)
    return near & (key <= query) & (key >= 0)


def window_mask(T, S, window, sinks=0, mask=None, device=None):
    """A mask, default the causal one, with a window laid over it: (T, S), or (B, 1, T, S) if the mask is. Sinks are the
    first tokens that the mask shows: in a padded row its first real tokens, in a packed row those of the document."""
    if mask is None:
        position = torch.arange(S, device=device)
        return in_sight(position[S - T :], position, window, sinks)
    near = torch.ones(T, S, dtype=torch.bool, device=mask.device).triu(S - T - window + 1)
    if sinks:  # counts the visible keys from the left: 1 at a query's first, 2 at its second, …
        near = near | (mask.cumsum(-1, dtype=torch.int32) <= sinks)
    return mask & near


def visible_mask(q, k, mask=None, window=None, sinks=0):
    """What q (B, H, T, D) sees of k (B, G, S, D), written out: `mask`, default causal, and the window if there is one.
    (T, S), or (B, 1, T, S) if the mask is."""
    T, S = q.shape[2], k.shape[2]
    if window is not None:
        return window_mask(T, S, window, sinks, mask, q.device)
    return causal_mask(T, S, q.device) if mask is None else mask


# ---------------------------------------------------------------------------------------------------------------
# The layer.


class Attention(nn.Module):
    """Causal self-attention, H query heads and G key/value heads of width D. The options are in the table above."""

    def __init__(
        self, width, n_head, n_kv_head=None, head_dim=None, bias=False, qk_norm=False, eps=1e-6, window=None, sinks=0
    ):
        super().__init__()
        check_attention(width, n_head, n_kv_head, head_dim, window, sinks)
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        self.head_dim = head_dim or width // n_head
        self.window, self.sinks = window, sinks
        self.wq = nn.Linear(width, n_head * self.head_dim, bias=bias)
        self.wk = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.wv = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.wo = nn.Linear(n_head * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.record = None  # a list, while support/attention_maps.py collects the weights

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, last_only=False):
        """x (B, T, C) -> (B, T, C).

        rope: (cos, sin), each (T, D) or (B, T, D), of the T new tokens' positions; None leaves positions out.
        mask: None is causal; else boolean, broadcastable to (B, H, T, S). It must hide the future itself; only this
            layer's window is added.
        cache: a KVCache, or any object with its `update`; or, with a window, a RollingKVCache: then mask must be
            None or padding_mask's.
        layer: which of the cache's layers this one is.
        last_only: the output of the last token alone, (B, 1, C); the cache still gets the keys and values of all T.
        """
        (B, T, _), H, G, D = x.shape, self.n_head, self.n_kv_head, self.head_dim
        x = cast_once(x)  # to autocast's dtype, for wq, wk and wv together
        q = self.wq(x[:, -1:] if last_only else x)  # (B, T_q, H·D): T_q is T, with last_only 1
        k, v = self.wk(x), self.wv(x)  # (B, T, G·D) each
        if attention_dtype(x) != x.dtype:  # fp32 on a CPU, where torch's backward pass in bf16 is slow
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = q.view(B, -1, H, D), k.view(B, T, G, D), v.view(B, T, G, D)
        if self.q_norm is not None:  # before RoPE, which keeps lengths: the bound on the scores still holds
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T_q, D), (B, G, T, D) twice
        if rope is not None:
            q = apply_rope(q, *(table[..., -q.shape[2] :, :] for table in rope))  # those of the last T_q positions
            k = apply_rope(k, *rope)

        window = self.window
        if isinstance(cache, RollingKVCache):
            check_sight(cache, window, self.sinks)
            # Only the first call needs the window: later the slots, or the mask of `roll`, leave out what it hides
            window = window if cache.length == 0 else None
            k, v, mask = cache.roll(layer, k, v, mask)  # (B, G, S, D) twice
        elif cache is not None:
            k, v = cache.update(layer, k, v)  # (B, G, S, D) twice

        if last_only and mask is not None:
            mask = mask[..., -1:, :]
        if self.record is None:
            out = fast_attention(q, k, v, mask, window, self.sinks)  # (B, H, T_q, D)
        else:  # for attention_weights: the fused kernel never holds them
            out, weights = naive_attention(q, k, v, visible_mask(q, k, mask, window, self.sinks))
            self.record.append(weights.detach())
        out = out.to(x.dtype).transpose(1, 2).reshape(B, -1, H * D)  # (B, T_q, H·D), heads side by side
        return self.wo(out)  # (B, T_q, C)


# ---------------------------------------------------------------------------------------------------------------
# The cache: keys and values of the tokens already read, each computed once. A step still reads all S of them.


class KVCache(RowsOfKVCache):
    """Keys and values of all layers, allocated once. `length`: tokens read, pads included. `update` writes
    after them and returns views, never copies; the caller moves `length` once all layers have written. `repeat`
    and `keep` of rows are in support/cache_rows.py."""

    def __init__(self, n_layer, batch, n_kv_head, max_len, head_dim, dtype=torch.float32, device=None):
        # keys and values of all layers in one tensor: support/fast_decode.py writes both of a layer at once
        self.store = torch.empty(n_layer, 2, batch, n_kv_head, max_len, head_dim, dtype=dtype, device=device)
        self.length = 0

    def update(self, layer, k, v):
        """Append k and v, each (B, G, T, D), to a layer; returns all its keys and values, (B, G, length + T, D)."""
        store, end = self.store[layer], self.length + k.shape[2]  # (2, B, G, max_len, D)
        if end > store.shape[3]:
            raise ValueError(f"the cache holds {store.shape[3]} tokens, {end} were asked for")
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]


class RollingKVCache(RowsOfRollingKVCache):
    """Keys and values of each row's first `sinks` and last `window` tokens, for all layers: all that windowed layers
    can see. Used like KVCache by a model whose layers have the same window and sinks; its memory never grows.

    Token n goes into slot n if it is a sink, else into sinks + (n − sinks) mod window: so from n = sinks + window on it
    overwrites token n − window. The slots need no order: attention sums over them, and each key is rotated by its
    position in the text, so the outputs are those of one pass with window_mask. (StreamingLLM counts positions inside
    the cache: sinks never appear farther away than in training, but each step must rotate all keys anew.)"""

    def __init__(self, n_layer, batch, n_kv_head, window, head_dim, dtype=torch.float32, device=None, sinks=0):
        self.window, self.sinks, self.length = window, sinks, 0  # length: tokens read, pads included
        self.pads = None  # (B,) how many tokens of each row are pads; None: none
        shape = (batch, n_kv_head, sinks + window, head_dim)
        # zeros, not empty: where one row has pads, a slot that is not filled yet is masked, and 0 · NaN is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]

    def slot(self, n):
        """Which slot token n goes into."""
        return n if n < self.sinks else self.sinks + (n - self.sinks) % self.window

    def roll(self, layer, k, v, mask=None):
        """Store k and v, each (B, G, T, D); returns the keys, the values and the mask for these T queries.

        One token and no pads: here. Several tokens at once, or rows with pads: support/rolling_cache.py.
        mask: None or padding_mask's, over all the tokens so far, (B, 1, T, length + T); only pads on the left.
        ValueError on another one, or on None after pads.
        """
        keys, values = self.keys[layer], self.values[layer]  # (B, G, sinks + window, D) each
        if k.shape[2] > 1 or mask is not None or self.pads is not None:
            return roll_rows(self, layer, k, v, mask, in_sight)
        slot, held = self.slot(self.length), min(self.length + 1, keys.shape[2])
        keys[:, :, slot], values[:, :, slot] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, :held], values[:, :, :held], None  # the filled slots, the new one among them: all are seen


# ---------------------------------------------------------------------------------------------------------------
# The fast path: naive_attention's output by torch's fused kernels, which never store the (T, S) weights.


def fast_attention(q, k, v, mask=None, window=None, sinks=0):
    """naive_attention's output under visible_mask: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D)."""
    T, S = q.shape[2], k.shape[2]
    if window is not None and window >= S:
        window = None  # it hides nothing
    if mask is None and window is None and T in (1, S):
        return sdpa(q, k, v, is_causal=T > 1)  # one new token sees the whole cache: no mask at all
    if mask is None and window is not None and 2 * window <= T:
        return banded_attention(q, k, v, window, sinks)  # bands of keys in a loop
    if mask is None and window is not None and T == 1 and not sinks:
        return sdpa(q, k[:, :, -window:], v[:, :, -window:])  # the last keys alone
    return sdpa(q, k, v, visible_mask(q, k, mask, window, sinks))  # the mask written out, over all T · S


# ---------------------------------------------------------------------------------------------------------------
# By hand.


def demo():
    """Three tokens by hand; the masks; one layer in training, prefill and decoding; the slots of a rolling cache."""
    print("three tokens by hand: q = k = (1, 0), (0, 1), (1, 1); v = 10, 20, 30; none sees those after it")
    q, v = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)], [10.0, 20.0, 30.0]
    outputs, by_hand = [], torch.zeros(3, 3)
    for t in range(3):
        scores = [(q[t][0] * q[s][0] + q[t][1] * q[s][1]) / math.sqrt(2) for s in range(t + 1)]  # causal: keys 0 … t
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        outputs.append(sum(weight * value for weight, value in zip(weights, v, strict=False)))
        by_hand[t, : t + 1] = torch.tensor(weights)
        columns = ["".join(f"{x:>8.4f}" for x in numbers) for numbers in (scores, weights)]
        print(f"  token {t}   q·k / √2{columns[0]:<26}softmax{columns[1]:<26}output {outputs[t]:.3f}")
    assert (by_hand[2] - torch.tensor([0.2483, 0.2483, 0.5035])).abs().max() < 5e-5
    assert max(abs(a - b) for a, b in zip(outputs, (10, 16.698, 22.5525), strict=True)) < 1e-3
    q, v = torch.tensor(q)[None, None], torch.tensor(v)[None, None, :, None]  # (B=1, H=1, T=3, D=2), (1, 1, 3, 1)
    out, weights = naive_attention(q, q, v, causal_mask(3, 3))
    torch.testing.assert_close(out.flatten(), torch.tensor(outputs))
    torch.testing.assert_close(weights[0, 0], by_hand)
    torch.testing.assert_close(fast_attention(q, q, v), out)
    print("  naive_attention and fast_attention give the same")
    rises = torch.func.grad(lambda s: s.softmax(-1) @ v.flatten())(torch.tensor([1.0, 1.0, 2.0]) / math.sqrt(2))
    torch.testing.assert_close(rises, weights[0, 0, 2] * (v.flatten() - outputs[2]))  # w_s (v_s − out)
    torch.testing.assert_close(rises, torch.tensor([-3.116, -0.634, 3.750]), atol=1e-3, rtol=0)
    print("  ∂output/∂score of token 2, from autograd and as w (v − output): " + ", ".join(f"{x:.3f}" for x in rises))

    masks = {
        "causal": causal_mask(8, 8),
        "window 3": window_mask(8, 8, 3),
        "+ 2 sinks": window_mask(8, 8, 3, 2),
        "documents": document_mask(torch.tensor([[0] * 3 + [1] * 5]))[0, 0],
        "3 pads": padding_mask(torch.arange(8)[None] >= 3, 8)[0, 0],
    }
    print("\nwhat a query (row) sees of the keys (columns)")
    print("".join(f"  {name:<10}" for name in masks).rstrip())
    for query in range(8):
        row = ["".join("█" if seen else "·" for seen in mask[query]) for mask in masks.values()]
        print("".join(f"  {text:<10}" for text in row).rstrip())

    torch.manual_seed(0)
    C, H, G, D, T = 24, 6, 2, 4, 5
    layer, x, cache, outs = Attention(C, H, G, D, qk_norm=True), torch.randn(1, T, C), KVCache(1, 1, G, T, D), []
    print(f"\none layer, C = {C}, H = {H}, G = {G}, D = {D}, and 5 tokens: prefill and decode give what training gives")
    (at_once,), whole = attention_weights(layer, x), layer(x)  # (1, H, T, T), (1, T, C)
    print(f"  train    x {(*x.shape,)!s:<11}  weights {(*at_once.shape,)!s:<13}  no cache")
    for use, start, end in (("prefill", 0, 3), ("decode", 3, 4), ("decode", 4, 5)):
        (weights,) = attention_weights(layer, x[:, start:end], cache=cache)  # fills slots start … end − 1
        torch.testing.assert_close(weights, at_once[:, :, start:end, :end])
        outs.append(layer(x[:, start:end], cache=cache))  # the same slots again: `length` has not moved
        cache.length = end
        shapes = f"x {(1, end - start, C)!s:<11}  weights {(*weights.shape,)!s:<13}"
        print(f"  {use:<8} {shapes}  the cache then holds k, v {(1, G, end, D)}")
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)

    W, sinks, T = 3, 1, 8
    cache, outs = RollingKVCache(1, 1, G, W, D, sinks=sinks), []
    layer, x = Attention(C, H, G, D, window=W, sinks=sinks), torch.randn(1, T, C)
    print(f"\nwhich token each slot of a rolling cache holds, window {W}, {sinks} sink, after token")
    for t in range(T):
        outs.append(layer(x[:, t : t + 1], cache=cache))
        cache.length += 1
        slots = held_tokens(cache, sinks + W, torch.tensor([[t]]))[0].tolist()
        print(f"  {t}: " + " ".join("·" if token < 0 else str(token) for token in slots), end="")
    assert slots == [0, 7, 5, 6]
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))  # one pass, band by band
    print(f"\nthe {T} tokens one by one through {sinks + W} slots give what one pass with window_mask gives")


if __name__ == "__main__":
    run_demo(demo)
