"""Positions: attention by itself sees a set of tokens, not a sequence. Three ways to tell it the order.

    learned      x_p ← x_p + row p of a table                          GPT-2: simple; knows nothing past its last row
    sinusoidal   x_p ← √C x_p + PE[p]                                  Vaswani et al. 2017, §3.4 and 3.5
                 PE[p, 2i] = sin(p ω_i),  PE[p, 2i + 1] = cos(p ω_i)
    rotary       (a, b) ← (a cos pω_i − b sin pω_i,  a sin pω_i + b cos pω_i)              RoPE, arXiv:2104.09864,
                 for each pair i of features of a query or key at position p               Eq. 13 to 15, 34

In the last two ω_i = θ^(−2i/D) radians per position, θ = 10,000, D the width of a query or key (in PE: C). Pair 0 turns
fastest and tells neighbours apart, the last turns slowly and tells paragraphs apart. RoPE, the default, in a model:

    ω        = rope_frequencies(D, θ, scaling)              (D/2,)
    angles   = positions · ω, for both features of a pair   (..., T) -> (..., T, D)
    cos, sin = κ cos(angles), κ sin(angles)                 (..., T, D) each, once for all layers; κ, the attention
                                                            factor, is 1 but for yarn
    q, k     = apply_rope(q, cos, sin), and k so too        (B, H, T, D), (B, G, T, D): in each layer; not the values
    score    = ⟨R(m) q, R(n) k⟩ = ⟨q, R(n − m) k⟩           R(p): the rotation at position p. q is at m, k at n,
                                                            neither yet rotated; R(m)ᵀ R(n) = R(n − m)

So for given q and k the score depends on the distance n − m alone: attention is relative without a parameter, and a
rotated vector keeps its norm. (PE[p + j] too is a rotation of PE[p], the same for every p, but attention has to learn
to use it.) Here RoPE ends 0.38 nats per character below learned positions in validation loss (results/positions.md).

Past the trained length L: pair i makes r_i = L ω_i / 2π turns within L. A fast pair has met every angle. A slow pair,
r_i < 1, has met only part of the circle, and past L it reaches angles that it never met. If its ω_i is divided by s, it
stays within the known part up to length s L; but nearby tokens then differ by smaller angles. `scaling`, a dict in
Hugging Face's form, says which pairs are slowed; its `factor` is s, except in dynamic.

    linear    ω_i / s for every pair                arXiv:2306.15595. Simple, but neighbours come s times closer
    dynamic   θ ← θ s^(D/(D−2))                     "NTK": pair 0 as before, the last divided by s exactly, the others
                                                    between. s = f ℓ/L − (f − 1) for ℓ > L tokens, f the dict's factor
    llama3    keep_i ω_i + (1 − keep_i) ω_i / s     keep_i rises from 0 at r_i = 1 to 1 at r_i = 4 (Llama 3.1's dict)
    yarn      the same, keep_i from 0 at r_i = 1    arXiv:2309.00071; and scores times (0.1 ln s + 1)², a fit by its
              to 1 at r_i = 32                      authors

The default model runs RoPE with θ = 10,000 and no scaling.

Traps:

* Which features make a pair? The paper, GPT-J and Meta's Llama code pair neighbours (2i, 2i + 1); GPT-NeoX and Hugging
  Face's Llama and Qwen pair (i, i + D/2), because halves are cheaper to slice. The two differ by a permutation of the
  rows of W_q and W_k, so neither learns better. But weights trained with one and run with the other raise no error: the
  model is wrong, and may be nearly as bad as without positions. This repository uses halves; `interleaved_to_half`
  converts weights of the other kind.
* "dynamic" changes ω as a text grows, but the keys in the cache (attention.py) were rotated by the old ω. So the
  longest length is given beforehand: `rope_frequencies(..., length=...)`. A Transformer gives none: ℓ = L and s = 1.
* YaRN's keep_i is linear in i between ends rounded outwards, as its authors code it; in the paper (§3.2), in r_i.

A small model trained on L = 64 bytes reads 4 L (nats per byte, one seed; results/benchmarks.md):

              first L   2nd L   4th L   after 40 training steps on 4 L: 1st L, 4th L
    as is        0.56    1.02    2.95   0.62, 0.98
    linear       3.43    3.71    3.68   1.34, 1.29
    dynamic      0.61    0.60    2.94   0.61, 1.04      the best on the 2nd L (length = 4 L)
    llama3       1.15    1.59    1.65   0.65, 0.61
    yarn         0.90    1.05    1.13   0.59, 0.54      usable to 4 L, but worse on short texts until it is trained

Letters: B batch, T time, C width, H query heads, G key/value heads, D head width. Run it: `python positional.py`.
"""

import math

import torch
from torch import nn

from support.look_up import look_up
from support.output import run_demo
from support.rope_settings import given_attention_factor, read_scaling
from support.rotation import fast_rotate


class LearnedPositions(nn.Module):
    """positions (..., T) -> (..., T, C): a row of a table of `max_len`. ValueError on a position outside it; on an
    NVIDIA GPU torch's own check stops the process instead."""

    def __init__(self, max_len, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_len, dim).normal_(std=0.02))

    def forward(self, positions):
        return look_up(self.weight, positions)  # (..., T, C)


def sinusoidal_positions(positions, dim):
    """positions (..., T), dim even -> (..., T, dim) in fp32: sine and cosine of each frequency side by side."""
    angles = positions[..., None].float() * rope_frequencies(dim).to(positions.device)  # (..., T, dim/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., T, dim)


def rope_frequencies(head_dim, theta=10000.0, scaling=None, context=None, length=None):
    """ω_i = θ^(−2i/D) for i = 0 … D/2 − 1, in radians per position, slowed down as `scaling` says: (D/2,) fp32.

    scaling: Hugging Face's `rope_scaling` (or `rope_parameters`) dict: its `rope_type` is default, linear, dynamic,
        yarn or llama3. A `rope_theta` inside it, as transformers 5 writes it, overrides `theta`.
    context: the model's max_position_embeddings. dynamic always needs it, yarn and llama3 where the dict does not say
        at what length the model was trained.
    length: the longest sequence to come, default `context`; only "dynamic" looks at it.
    YaRN also turns the scores up: `rope_attention_factor` says by how much. Raises ValueError on a dict it cannot use.
    """
    if head_dim % 2:
        raise ValueError(f"sines and cosines come in pairs: a width of {head_dim} is odd")
    kind, factor, L, theta = read_scaling(scaling, context, theta)  # L: the trained length
    s, i = factor, torch.arange(head_dim // 2, dtype=torch.float32)
    if kind == "dynamic" and head_dim > 2:  # a single pair turns at ω_0 = 1 whatever θ
        s = factor * max(length or L, L) / L - (factor - 1)
        theta = theta * s ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / theta ** (2 * i / head_dim)  # transformers' order of operations: equal to the last bit
    if kind in ("default", "dynamic"):
        return frequencies
    if kind == "linear":
        keep = torch.zeros_like(i)  # (D/2,): 1 left alone, 0 divided by s
    elif kind == "llama3":
        turns = L * frequencies / (2 * math.pi)  # r_i
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        first, last = (
            head_dim * math.log(L / (2 * math.pi * r)) / (2 * math.log(theta))  # the i whose r_i is r
            for r in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)  # the authors' bounds, though i ends at D/2 − 1
        keep = 1 - ((i - first) / (last - first or 0.001)).clamp(0, 1)  # 0.001: not 0/0 where the ends meet
    return frequencies * keep + frequencies / s * (1 - keep)


def rope_attention_factor(scaling=None, context=None):
    """What YaRN multiplies cosines and sines by (§3.4): scores grow by its square. 1 for every other scaling."""
    kind, s, *_ = read_scaling(scaling, context)
    if kind != "yarn":
        return 1.0
    given = given_attention_factor(scaling, s)
    return 0.1 * math.log(s) + 1 if given is None else given


def rope_cos_sin(positions, frequencies, attention_factor=1.0):
    """positions (..., T), frequencies (D/2,) -> cos, sin, each (..., T, D) fp32: both halves hold the same angles.

    attention_factor: `rope_attention_factor(scaling, context)`; it multiplies both tables, hence queries and keys.
    """
    angles = positions[..., None].float() * frequencies.to(positions.device)  # (..., T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., T, D)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x, cos, sin):
    """(a, b) -> (a cos − b sin, b cos + a sin), a and b the halves of x (..., D): each pair by its own angle. cos and
    sin broadcast to x; their two halves are equal."""
    a, b = x.chunk(2, dim=-1)  # (..., D/2) each
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by the angles of cos, sin, (T, D) or (B, T, D): pairs are (i, i + D/2). x's dtype.
    support/rotation.py is `rotate` in fewer passes over memory."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D): the same for all heads
    return fast_rotate(x, cos, sin)


def apply_rope_interleaved(x, positions, theta=10000.0):
    """The other convention, in the paper's own terms: neighbours (2i, 2i + 1) are a complex number, rotating is
    multiplying by e^{i p ω}. x (B, H, T, D), positions (T,). For comparison; the models use `apply_rope`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, H, T, D/2)
    angles = positions[:, None].to(x.dtype) * rope_frequencies(x.shape[-1], theta).to(x.dtype)  # (T, D/2)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def interleaved_to_half(weight, n_head):
    """Rows of a W_q or W_k (H·D, C) trained with neighbouring pairs -> (H·D, C) for halves: in each head, feature
    2i + j goes to j·D/2 + i (j = 0 or 1). Biases, and gains of norms on heads, permute likewise."""
    out, inner = weight.shape
    pairs = weight.view(n_head, out // n_head // 2, 2, inner)  # (H, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(out, inner)  # (H, 2, D/2, C) -> (H·D, C)


def demo():
    """RoPE on one pair: a quarter turn per position. Then the two conventions, and the scalings pair by pair."""
    torch.manual_seed(0)
    quarter = torch.tensor([math.pi / 2])  # (1,) an ω chosen for the example
    q, k = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])

    def at(x, position):
        return rotate(x, *rope_cos_sin(torch.tensor(position), quarter))  # (D,)

    print("RoPE by hand: one pair, a quarter turn per position, q = (1, 0), k = (1, 2)")
    for position, by_hand in enumerate([(1, 2), (-2, 1), (-1, -2), (2, -1)]):
        torch.testing.assert_close(at(k, position), torch.tensor(by_hand).float(), atol=1e-6, rtol=0)
    print("  k at 0, 1, 2, 3: (1, 2), (-2, 1), (-1, -2), (2, -1)")
    for (m, n), by_hand in {(0, 0): 1, (1, 0): 2, (2, 1): 2, (3, 2): 2, (2, 0): -1, (7, 5): -1, (0, 1): -2}.items():
        score = at(q, m) @ at(k, n)
        assert abs(score - by_hand) < 1e-5
        print(f"  query at {m}, key at {n}: n − m = {n - m:2d}, score {round(score.item()):2d}")

    D, T = 32, 9
    frequencies, positions = rope_frequencies(D), torch.arange(T)
    torch.testing.assert_close(frequencies[[0, 8]], torch.tensor([1.0, 0.01]))  # 10,000^0, 10,000^(−1/2)
    W, x = torch.randn(2 * D, 16), torch.randn(T, 16)  # two heads
    theirs = apply_rope_interleaved((x @ W.t()).view(1, T, 2, D).transpose(1, 2), positions)
    ours = (x @ interleaved_to_half(W, 2).t()).view(1, T, 2, D).transpose(1, 2)
    ours = apply_rope(ours, *rope_cos_sin(positions, frequencies))
    # The features come out in another order, the scores are the same.
    worst = (theirs @ theirs.transpose(-1, -2) - ours @ ours.transpose(-1, -2)).abs().max().item()
    assert worst < 1e-3
    print(f"\nneighbouring pairs = halves with permuted weights: largest difference in a score {worst:.1e}")

    step, pe = 3, sinusoidal_positions(torch.arange(50), D)  # (50, D)
    rotations = [torch.tensor([[w.cos(), w.sin()], [-w.sin(), w.cos()]]) for w in step * frequencies]
    M = torch.block_diag(*rotations)  # (D, D): rotates (sin, cos) of pair i by 3 ω_i; knows 3, not p
    worst = (pe[:-step] @ M.t() - pe[step:]).abs().max().item()
    assert worst < 1e-4
    print(f"sinusoidal: one matrix takes PE[p] to PE[p + {step}] for every p: largest difference {worst:.1e}")

    L, s = 256, 4
    print(f"\ntrained on {L} tokens, stretched to {s * L}: how many times slower pair i turns, D = {D}, θ = 10,000")
    pairs = range(0, D // 2, 3)
    turns = (L * frequencies / (2 * torch.pi)).tolist()
    print(f"{'pair i':>22}" + "".join(f"{i:>8}" for i in pairs) + "   scores times")
    print(f"{'turns in 256 tokens':>22}" + "".join(f"{turns[i]:>8.2f}" for i in pairs))
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        scaling = {"rope_type": kind, "factor": s, "low_freq_factor": 1, "high_freq_factor": 4}
        if kind == "dynamic":
            scaling["factor"] = 1  # then s = length / L
        slower = (frequencies / rope_frequencies(D, 10000.0, scaling, L, s * L)).tolist()
        factor = rope_attention_factor(scaling, L) ** 2
        print(f"{kind:>22}" + "".join(f"{slower[i]:>8.2f}" for i in pairs) + f"{factor:>15.3f}")
        assert abs(slower[-1] - s) < 1e-4  # the slowest pair: interpolated in full
        assert (abs(slower[0] - 1) < 1e-6) == (kind != "linear")  # the fastest: left alone, except by linear


if __name__ == "__main__":
    run_demo(demo)
