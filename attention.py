"""Attention: from the formula, worked by hand, to grouped heads, sliding windows and caches that never grow.

    Attention(Q, K, V) = softmax(Q Kᵀ / √D + mask) V          Vaswani et al. 2017, arXiv:1706.03762, Eq. 1

Each query asks "which keys match me?", the softmax turns the scores into weights that sum to 1, and the output
is the weighted mean of the values. The division by √D keeps the scores' variance at 1 for unit-variance q and k:
without it the softmax saturates and its gradient vanishes.

One head is the formula. Many heads run H of them side by side on slices of width D and mix the results with one
matrix, so that a token can look at several places at once. The heads may share keys and values, and all the kinds
that have a name are one formula with another G:

    out_h = softmax(q_h k_gᵀ / √D + mask) v_g,   g = ⌊h G / H⌋          H query heads, G key/value heads

G = H is multi-head, G = 1 multi-query (arXiv:1911.02150), anything between grouped-query attention
(arXiv:2305.13245). Sharing costs little quality and divides the cache:

    cache bytes = 2 (K and V) x layers x B x G x S x D x bytes per number

QK-norm (Qwen3, arXiv:2505.09388) puts an RMSNorm on every query and key head, which bounds the scores and keeps
training stable at high learning rates.

Masks are boolean, True = visible, and always broadcast to (B, heads, T, S). Four kinds, one rule: causal (no future),
padding (no pad tokens), document (no neighbours in a packed row), window. The rule: every query sees at least itself.
A query that sees nothing would be a softmax over −∞ alone, NaN, and 0 x NaN = NaN carries it into every later layer.

A sliding window W (Mistral, arXiv:2310.06825) shows a query itself and the W − 1 tokens before it. The work falls from
T² to T·W, and news still travels far: through n layers over n (W − 1) tokens. But a model trained with full attention
breaks when its first tokens leave the window. A softmax must put its mass somewhere, and a head that finds nothing to
look at has learned to put it on the tokens that everyone sees. Keep those few *sinks* visible for ever, and it reads on
(StreamingLLM, arXiv:2309.17453). Query m sees key n if

    0 ≤ m − n < W   or   n < sinks and n ≤ m

So a windowed layer never needs more than sinks + W keys: `RollingKVCache` keeps just those, in a ring, and decodes a
stream of any length in constant memory and constant time per token. Positions keep counting along the stream: a key is
stored turned by RoPE at its own place in the text, and so the outputs are those of one full pass with the same mask,
up to rounding, which grows with the place: fp32 rounds the second pair's angle to 1/16 at a million tokens.
StreamingLLM numbers the tokens *within the cache* instead, which keeps the distance to the
sinks below what training has shown, but then every key must be turned anew in every step, and no full pass gives the
same numbers. The window itself sees true distances either way.

Letters: B batch, T query time, S key time, C width, H query heads, G key/value heads, D head width, W window.
Simplified: no dropout on the attention weights (modern recipes train without). No kernel of our own: torch's SDPA, for
a long windowed sequence on one band of keys after the other. FlexAttention, which compiles such masks into one kernel,
is not used: on a CPU it has no backward pass. `benchmarks/attention.py` measures the forms and a stream of 100,000.

Run it: `python attention.py` works three tokens by hand and checks every path against the formula.
"""

import copy
import math
import time

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
    key = torch.arange(real.shape[1], device=real.device)  # (S,)
    query = key[-T:, None]  # (T, 1)
    return ((real[:, None] & (key <= query)) | (key == query))[:, None]


def document_mask(documents):
    """documents (B, T), a number per document -> (B, 1, T, T): causal, and only inside one's own document."""
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return (same & causal_mask(*same.shape[1:], documents.device))[:, None]


def in_sight(query, key, window, sinks=0):
    """The window's formula above on positions: query (..., T), key (..., S) -> (..., T, S). A key below 0 is a pad, or
    a slot that is still empty."""
    query, key = query[..., :, None], key[..., None, :]
    near = query - key < window
    if sinks:
        near = near | (key < sinks)
    return near & (key <= query) & (key >= 0)


def window_mask(T, S, window, sinks=0, mask=None, device=None):
    """A final mask with a window laid over it, default the causal one: (T, S), or (B, 1, T, S) if the mask is.

    The sinks are the first that a query may see at all: in a padded row its first real tokens, in a packed row the
    first of its document.
    """
    if mask is None:
        at = torch.arange(S, device=device)
        return in_sight(at[S - T :], at, window, sinks)
    near = torch.ones(T, S, dtype=torch.bool, device=mask.device).triu(S - T - window + 1)
    if sinks:
        near = near | (mask.cumsum(-1, dtype=torch.int32) <= sinks)
    return mask & near


class KVCache:
    """Keys and values of the tokens already seen, for all layers, in memory allocated once.

    Decoding token t needs the keys and values of 0 … t−1 and they never change, so they are kept: a step costs one
    token's work instead of t's. `update` writes after the `length` slots in use and returns views, never copies;
    the model moves `length` once all layers have written.
    """

    def __init__(self, n_layer, batch, n_kv_head, max_len, head_dim, dtype=torch.float32, device=None):
        # keys and values of all layers in one tensor, so that a decoding step writes both at once
        self.store = torch.empty(n_layer, 2, batch, n_kv_head, max_len, head_dim, dtype=dtype, device=device)
        self.length = 0

    @property
    def keys(self):
        return [layer[0] for layer in self.store]  # n_layer times (B, G, max_len, D)

    @property
    def values(self):
        return [layer[1] for layer in self.store]

    def update(self, layer, k, v):
        """Append k and v, each (B, G, T, D), to a layer; returns all its keys and values, (B, G, length + T, D)."""
        store, end = self.store[layer], self.length + k.shape[2]  # (2, B, G, max_len, D)
        if end > store.shape[3]:
            raise ValueError(f"the cache holds {store.shape[3]} tokens, {end} were asked for")
        store[0, :, :, self.length : end] = k
        store[1, :, :, self.length : end] = v
        return store[0, :, :, :end], store[1, :, :, :end]

    def repeat(self, n, max_len):
        """A cache of B·n rows with room for `max_len` tokens: each row n times, so a prompt is computed once."""
        L, _, B, G, _, D = self.store.shape
        out = KVCache(L, B * n, G, max_len, D, self.store.dtype, self.store.device)
        out.length = self.length
        rows = out.store.view(L, 2, B, n, G, max_len, D)[..., : self.length, :]
        rows.copy_(self.store[:, :, :, None, :, : self.length])  # (L, 2, B, 1, G, S, D) -> (L, 2, B, n, G, S, D)
        return out

    def keep(self, rows):
        """Drop all but the rows of the index `rows`, in place: finished sequences leave the batch."""
        for layer in self.store:  # (2, B, G, max_len, D)
            layer[:, : len(rows), :, : self.length] = layer[:, rows, :, : self.length]
        self.store = self.store[:, :, : len(rows)]


class RollingKVCache:
    """Keys and values of each row's first `sinks` and last `window` tokens, for all layers: all that windowed layers
    can see. Used like KVCache by a model whose layers have the same window and sinks; its memory never grows.

    Token n of a row, its pads not counted, goes into slot n if it is a sink, else into sinks + (n − sinks) mod window,
    over the one that has just left the window. The order of the slots does not matter: a softmax over keys does not
    know one, and each key carries its position in its rotation.
    """

    def __init__(self, n_layer, batch, n_kv_head, window, head_dim, dtype=torch.float32, device=None, sinks=0):
        self.window, self.sinks, self.length = window, sinks, 0  # length counts the tokens seen, not those kept
        shape = (batch, n_kv_head, sinks + window, head_dim)
        # zeros, not empty: where one row has pads, a slot that is not filled yet is masked, and 0 x NaN is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layer)]

    def roll(self, layer, k, v, mask=None):
        """Take in k and v, each (B, G, T, D); returns the keys, the values and the mask for these T queries.

        mask: None or padding_mask's, over all the tokens so far, (B, 1, T, length + T); only pads on the left.
        """
        keys, values, (B, _, T, _) = self.keys[layer], self.values[layer], k.shape
        if T == 1 and mask is None:  # decoding: one write, and all that the cache then holds is in sight
            n, held = self.length, min(self.length + 1, keys.shape[2])
            slot = n if n < self.sinks else self.sinks + (n - self.sinks) % self.window
            keys[:, :, slot], values[:, :, slot] = k[:, :, 0], v[:, :, 0]
            return keys[:, :, :held], values[:, :, :held], None

        position = torch.arange(self.length, self.length + T, device=k.device).expand(B, T)
        if mask is not None:  # each row counts its own tokens; its pads are below 0
            position = position - (~mask[:, 0, -1]).sum(-1, keepdim=True)  # (B, T)
        seen = k, v, mask
        if self.length > 0:  # the old keys must be read before the new ones are written over them
            held = min(self.length, keys.shape[2])
            slot, newest = torch.arange(held, device=k.device), position[:, :1] - 1  # (held,), (B, 1)
            lap = newest - (newest - slot) % self.window  # (B, held): the last n ≤ newest with n ≡ slot (mod window)
            lap = lap.masked_fill(lap < self.sinks, -1)  # none did
            old = torch.where(slot < self.sinks, slot.where(slot <= newest, -1), lap)
            mask = in_sight(position, torch.cat([old, position], 1), self.window, self.sinks)  # (B, T, held + T)
            mask |= torch.eye(T, held + T, dtype=torch.bool, device=k.device).roll(held, 1)  # a pad sees itself
            seen = torch.cat([keys[:, :, :held], k], 2), torch.cat([values[:, :, :held], v], 2), mask[:, None]
        if T == 1:  # no question to the GPU; what a pad writes into slot 0, the row's first token overwrites
            row, t = torch.arange(B, device=k.device), torch.zeros(B, dtype=torch.long, device=k.device)
        else:
            stays = (position >= 0) & ((position < self.sinks) | (position > position[:, -1:] - self.window))
            row, t = stays.nonzero(as_tuple=True)
        n = position[row, t].clamp(min=0)
        slot = n.where(n < self.sinks, self.sinks + (n - self.sinks) % self.window)
        keys[row, :, slot], values[row, :, slot] = k[row, :, t], v[row, :, t]  # (row, G, D) each
        return seen

    def repeat(self, n, max_len):
        """A cache of B·n rows, each row n times; `max_len`, which KVCache asks for, makes no difference here."""
        out = copy.copy(self)
        out.keys = [x.repeat_interleave(n, dim=0) for x in self.keys]
        out.values = [x.repeat_interleave(n, dim=0) for x in self.values]
        return out

    def keep(self, rows):
        """Drop all but the rows of the index `rows`: finished sequences leave the batch."""
        self.keys, self.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]


def cast_once(x):
    """x in the dtype of autocast, where that is on: what several matrices read is converted once, not by each."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C), with H query heads and G key/value heads of width D.

    window: how many tokens a query sees, itself included; None is all of them. sinks: first tokens that stay visible.
    """

    def __init__(
        self,
        width,
        n_head,
        n_kv_head=None,
        head_dim=None,
        bias=False,
        qk_norm=False,
        eps=1e-6,
        window=None,
        sinks=0,
    ):
        super().__init__()
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        self.head_dim = head_dim or width // n_head
        if n_head % self.n_kv_head:
            raise ValueError(f"{n_head} query heads cannot share {self.n_kv_head} key/value heads evenly")
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} tokens would hide a query from itself; it must be at least 1")
        if sinks < 0 or (sinks and window is None):
            raise ValueError(f"sinks is {sinks}; it must be 0 or more, and only a window makes a difference to them")
        self.window, self.sinks = window, sinks
        self.wq = nn.Linear(width, n_head * self.head_dim, bias=bias)
        self.wk = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.wv = nn.Linear(width, self.n_kv_head * self.head_dim, bias=bias)
        self.wo = nn.Linear(n_head * self.head_dim, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if qk_norm else None
        self.record = None  # a list, while attention_weights collects them

    def forward(self, x, rope=None, mask=None, cache=None, layer=0, last_only=False):
        """x (B, T, C) -> (B, T, C); with last_only of the last token alone, (B, 1, C), beside the keys of all.

        rope: (cos, sin), each (T, D) or (B, T, D).
        mask: None is causal; else boolean, broadcastable to (B, H, T, S), and final but for this layer's window.
        cache: a KVCache, or where there is a window a RollingKVCache, with which the mask can only be padding_mask's.
        layer: the number of this layer in the cache.
        """
        B, T, _ = x.shape
        x = cast_once(x)
        q, k, v = self.wq(x[:, -1:] if last_only else x), self.wk(x), self.wv(x)
        if x.dtype == torch.bfloat16 and not x.is_cuda:
            q, k, v = q.float(), k.float(), v.float()  # SDPA's bf16 backward pass is slow on a CPU
        q = q.view(B, -1, self.n_head, self.head_dim)
        k = k.view(B, T, self.n_kv_head, self.head_dim)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        if self.q_norm is not None:  # per head, before the rotation: RoPE keeps lengths, so the bound survives
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, G, T, D)
        if rope is not None:
            q = apply_rope(q, *(table[..., -q.shape[2] :, :] for table in rope))
            k = apply_rope(k, *rope)
        window = self.window
        if isinstance(cache, RollingKVCache):
            if (cache.window, cache.sinks) != (window, self.sinks):
                raise ValueError(
                    f"the cache keeps {cache.sinks} sinks and a window of {cache.window}, "
                    f"the layer sees {self.sinks} and {window}"
                )
            window = window if cache.length == 0 else None  # later masks come with the window in them
            k, v, mask = cache.roll(layer, k, v, mask)  # (B, G, S, D)
        elif cache is not None:
            k, v = cache.update(layer, k, v)  # (B, G, S, D)
        if last_only and mask is not None:
            mask = mask[..., -1:, :]
        if self.record is not None:
            out, weights = naive_attention(q, k, v, final_mask(q, k, mask, window, self.sinks))
            self.record.append(weights.detach())
        else:
            out = fast_attention(q, k, v, mask, window, self.sinks)  # (B, H, T, D)
        out = out.to(x.dtype).transpose(1, 2).reshape(B, -1, self.n_head * self.head_dim)
        return self.wo(out)  # (B, T, C)


def final_mask(q, k, mask=None, window=None, sinks=0):
    """What q (B, H, T, D) may see of k (B, G, S, D), written out: `mask`, default causal, with the window laid over."""
    T, S = q.shape[2], k.shape[2]
    if window is not None:
        return window_mask(T, S, window, sinks, mask, q.device)
    return causal_mask(T, S, q.device) if mask is None else mask


def fast_attention(q, k, v, mask=None, window=None, sinks=0):
    """naive_attention's output under final_mask by torch's fused kernel: never stores the (T, S) weights."""
    T, S = q.shape[2], k.shape[2]
    if window is not None and window < S:
        if mask is None and 2 * window <= T:
            return banded_attention(q, k, v, window, sinks)
        if mask is None and T == 1 and not sinks:
            k, v = k[:, :, -window:], v[:, :, -window:]
        else:
            mask = window_mask(T, S, window, sinks, mask, q.device)
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    is_causal = mask is None and T > 1  # one new token sees the whole cache: no mask at all
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda and T > 1 and (mask is not None or q.dtype == torch.float32):
        # Shared heads with a mask, or in fp32, fit neither the flash nor the memory-efficient kernel: SDPA would take
        # the formula without a word and store (T, S) weights. Repeated keys and values cost less.
        n, gqa = q.shape[1] // k.shape[1], False
        k, v = repeat_heads(k, n), repeat_heads(v, n)
    with torch.autocast("cpu", enabled=False):  # which would convert fp32 back: see Attention.forward
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)


def banded_attention(q, k, v, window, sinks=0):
    """A causal window without the work outside it: `block` queries at a time, which see window + block − 1 keys and the
    sinks. T · (window + block) scores instead of T · S, and never a (T, S) mask."""
    T, S = q.shape[2], k.shape[2]
    block, at = max(window, 64), torch.arange(S, device=q.device)
    out = []
    for start in range(S - T, S, block):
        end, first = min(start + block, S), max(start - window + 1, 0)
        key = torch.cat([at[: min(sinks, first)], at[first:end]])  # (S',) the sinks that the band leaves out, the band
        seen = in_sight(at[start:end], key, window, sinks)  # (T', S')
        band = (torch.cat([x[:, :, : min(sinks, first)], x[:, :, first:end]], 2) for x in (k, v))
        out.append(fast_attention(q[:, :, start - S + T : end - S + T], *band, seen))
    return torch.cat(out, dim=2)


@torch.no_grad()
def attention_weights(model, *inputs, **more):
    """The weights of each Attention in `model` when it is called with these inputs, in the order of the calls: a list
    of (B, H, T, S), fp32 at least. Rows sum to 1; weights[layer][b, h] is the heat map of one head.

    The formula computes them, since the fused kernel never holds them. With a RollingKVCache S counts slots.
    """
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    weights = []
    for layer in layers:
        layer.record = weights
    try:
        model(*inputs, **more)
    finally:
        for layer in layers:
            layer.record = None
    return weights


def attention_entropy(weights):
    """−Σ w ln w in nats, weights (..., S) -> (...). Its exponential is the number of tokens a query looks at: 1 if it
    stares at one, n if it takes the mean of n."""
    return torch.special.entr(weights).sum(-1)


def worked_example(show=lambda line: None):
    """Three tokens, one head of width 2, every number on paper.

    q₂ = (1, 1) meets k₀ = (1, 0), k₁ = (0, 1), k₂ = (1, 1): the dot products are 1, 1, 2; divided by √2 they are
    0.7071, 0.7071, 1.4142; their exponentials 2.0281, 2.0281, 4.1133 sum to 8.1695. So the weights are 0.2483,
    0.2483, 0.5035, and with the values 10, 20, 30 the output is 2.48 + 4.97 + 15.10 = 22.55. Tokens 0 and 1 go the
    same way with one and two keys in sight. Nothing but plain numbers here: -> (3 outputs, 3 rows of weights).
    """
    q = k = [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    v = [10.0, 20.0, 30.0]
    outputs, rows = [], []
    for t in range(3):
        dots = [q[t][0] * k[s][0] + q[t][1] * k[s][1] for s in range(t + 1)]  # causal: keys 0 … t
        scores = [dot / math.sqrt(2) for dot in dots]
        exponentials = [math.exp(score) for score in scores]
        weights = [e / sum(exponentials) for e in exponentials]
        outputs.append(sum(w * value for w, value in zip(weights, v, strict=False)))
        rows.append(weights + [0.0] * (2 - t))
        for name, numbers in (("q·k", dots), ("/ √2", scores), ("exp", exponentials), ("/ sum", weights)):
            show(f"  token {t}  {name:<6}" + "".join(f"{x:>9.4f}" for x in numbers))
        terms = " + ".join(f"{w:.4f} x {value:.0f}" for w, value in zip(weights, v, strict=False))
        show(f"  token {t}  output {terms} = {outputs[t]:.3f}")
    return outputs, rows


def draw(mask):
    """Rows of a boolean (T, S) as text: █ seen, · hidden."""
    return ["".join("█" if seen else "·" for seen in row) for row in mask.tolist()]


def main():
    torch.manual_seed(0)
    print("three tokens by hand: q = k = (1, 0), (0, 1), (1, 1); v = 10, 20, 30; a token cannot see those after it")
    outputs, rows = worked_example(print)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[None, None]  # (B=1, H=1, T=3, D=2)
    v = torch.tensor([[10.0], [20.0], [30.0]])[None, None]  # (1, 1, 3, 1)
    out, weights = naive_attention(x, x, v, causal_mask(3, 3))
    torch.testing.assert_close(out.flatten(), torch.tensor(outputs))
    torch.testing.assert_close(weights[0, 0], torch.tensor(rows))
    assert abs(outputs[2] - 22.5525) < 1e-3
    nats = ", ".join(f"{h:.3f}" for h in attention_entropy(weights)[0, 0].tolist())
    print(f"  naive_attention gives the same; entropies of the three rows: {nats} nats (at most ln 1, ln 2, ln 3)")

    n = 8
    shown = {
        "causal": causal_mask(n, n),
        "window 3": window_mask(n, n, 3),
        "+ 2 sinks": window_mask(n, n, 3, 2),
        "documents": document_mask(torch.tensor([[0] * 3 + [1] * 5]))[0, 0],
        "3 pads": padding_mask(torch.arange(n)[None] >= 3, n)[0, 0],
    }
    print("\nwhat a query (row) sees of the keys (columns)")
    print("  " + "".join(f"{name:<12}" for name in shown))
    for line in zip(*(draw(mask) for mask in shown.values()), strict=True):
        print("  " + "".join(f"{row:<12}" for row in line))

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

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one token is too little work to share
    W, sinks, n = 16, 2, 3000
    layer = Attention(24, H, 2, D, qk_norm=True, window=W, sinks=sinks)
    x = torch.randn(1, n, 24)
    cache, out, seconds = RollingKVCache(1, 1, 2, W, D, sinks=sinks), [], []
    with torch.no_grad():
        for t in range(n):
            start = time.perf_counter()
            out.append(layer(x[:, t : t + 1], cache=cache))
            cache.length += 1
            seconds.append(time.perf_counter() - start)
        worst = (torch.cat(out, dim=1) - layer(x)).abs().max().item()  # layer(x): one pass, band by band
    torch.set_num_threads(threads)
    assert worst < 1e-5
    early, late = (sorted(part)[len(part) // 2] * 1e6 for part in (seconds[:500], seconds[-500:]))
    rolling, full = (2 * 2 * slots * D * 4 / 1024 for slots in (cache.keys[0].shape[2], n))
    assert cache.keys[0].shape[2] == W + sinks
    print(f"\na stream of {n:,} tokens through a window of {W} and {sinks} sinks, token by token")
    print(f"  median time per token: {early:.0f} µs in the first 500, {late:.0f} µs in the last 500")
    print(f"  rolling cache {rolling:.2f} KiB throughout; one that keeps everything: {full:.0f} KiB by now")
    print(f"  the same as one full pass: largest difference {worst:.1e}")
    print("  100,000 tokens: python benchmarks/attention.py")


if __name__ == "__main__":
    main()
