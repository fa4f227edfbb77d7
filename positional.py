"""Positions: attention by itself sees a set of tokens, not a sequence. Three ways to tell it the order.

learned      a vector per position, added to the embedding (GPT-2). Simple; knows nothing past the last one.
sinusoidal   PE[p, 2i] = sin(p ω_i), PE[p, 2i + 1] = cos(p ω_i), ω_i = 10000^(−2i/C), added to the embedding
             (Vaswani et al. 2017, §3.5). PE[p + k] is a fixed rotation of PE[p], whatever p.
rotary       rotate each pair of a query's and key's features by p ω_i (RoPE, Su et al. 2021, arXiv:2104.09864):

    (a, b) ← (a cos pω_i − b sin pω_i,  a sin pω_i + b cos pω_i)              Eq. 13 to 15, 34

Rotations compose, R(m)ᵀ R(n) = R(n − m), so ⟨R(m) q, R(n) k⟩ depends on n − m alone: attention becomes relative
without a single parameter, and lengths stay what they were. Small i turn fast and tell neighbours apart, large i
turn slowly and tell paragraphs apart; θ, 10000 by default, sets the slowest.

Which features make a pair? The paper, GPT-J and Meta's own Llama code pair neighbours (2i, 2i + 1); GPT-NeoX, and
Hugging Face's Llama and Qwen, pair (i, i + D/2), because two halves are cheaper to slice than every other element.
The two differ by a permutation of the rows of W_q and W_k, nothing else, so neither learns better. But weights
trained with one and run with the other give a model that is wrong yet not garbage: a trap. This repository uses
halves throughout, and `interleaved_to_half` turns weights of the other kind.

Simplified: the angles are those of training. Reaching past the trained length by rescaling ω is not covered.

Letters: B batch, T time, C width, H heads, D head width. Run it: `python positional.py`.
"""

import torch
from torch import nn


class LearnedPositions(nn.Module):
    """positions (..., T) -> (..., T, C): a row of a table of `max_len`."""

    def __init__(self, max_len, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_len, dim).normal_(std=0.02))

    def forward(self, positions):
        # On CUDA the check would make the CPU wait for the GPU in every step; indexing past the end stops there too,
        # if less politely. Nothing would stop a negative position: −1 would quietly be the last row.
        if positions.numel() and not positions.is_cuda:
            for position in (positions.min().item(), positions.max().item()):
                if not 0 <= position < len(self.weight):
                    raise ValueError(f"position {position} asked for, the table has {len(self.weight)}")
        return self.weight[positions]  # (..., T, C)


def sinusoidal_positions(positions, dim):
    """positions (..., T), dim even -> (..., T, dim) in fp32: sine and cosine of each frequency side by side."""
    angles = positions[..., None].float() * rope_frequencies(dim).to(positions.device)  # (..., T, dim/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., T, dim)


def rope_frequencies(head_dim, theta=10000.0):
    """ω_i = θ^(−2i/D) for i = 0 … D/2 − 1, in radians per position: (D/2,) fp32."""
    if head_dim % 2:
        raise ValueError(f"sines and cosines come in pairs: a width of {head_dim} is odd")
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rope_cos_sin(positions, frequencies):
    """positions (..., T), frequencies (D/2,) -> cos, sin, each (..., T, D) fp32: both halves hold the same angles."""
    angles = positions[..., None].float() * frequencies.to(positions.device)  # (..., T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., T, D)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by the angles of cos, sin, (T, D) or (B, T, D): pairs are (i, i + D/2). x's dtype."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D): the same for all heads
    half = x.shape[-1] // 2
    signed_sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    # (a, b) cos + (b, a) (−sin, sin): with the sign in the small table, one roll swaps the halves, and its gradient
    # is a roll. The usual cat([-b, a]) negates half of x on the way in and half of the gradient on the way back.
    return (x * cos + x.roll(half, dims=-1) * signed_sin).to(x.dtype)


def apply_rope_interleaved(x, positions, theta=10000.0):
    """The other convention, in the paper's own terms: neighbours (2i, 2i + 1) are a complex number, rotating is
    multiplying by e^{i p ω}. x (B, H, T, D), positions (T,). Here for comparison; the models use `apply_rope`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, H, T, D/2)
    angles = positions[:, None].to(x.dtype) * rope_frequencies(x.shape[-1], theta).to(x.dtype)  # (T, D/2)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def interleaved_to_half(weight, n_head):
    """Rows of a W_q or W_k (H·D, C) trained with neighbouring pairs, reordered for halves."""
    out, inner = weight.shape
    return weight.view(n_head, out // n_head // 2, 2, inner).transpose(1, 2).reshape(out, inner)


def main():
    torch.manual_seed(0)
    D = 32
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)
    frequencies = rope_frequencies(D)

    def at(x, position):
        return apply_rope(x, *rope_cos_sin(torch.tensor([position]), frequencies))

    print("RoPE: the score of a query at m and a key at n depends on n − m alone")
    scores = {(m, n): (at(q, m) * at(k, n)).sum().item() for m, n in [(0, 7), (5, 12), (90, 97), (0, 8)]}
    for (m, n), score in scores.items():
        print(f"  m = {m:2d}, n = {n:2d}, n − m = {n - m}: {score:.4f}")
    assert abs(scores[0, 7] - scores[90, 97]) < 1e-4
    assert abs(scores[0, 7] - scores[0, 8]) > 1e-3
    assert abs(at(q, 1000).norm() - q.norm()) < 1e-4

    positions = torch.arange(9)
    W = torch.randn(2 * D, 16)  # two heads
    x = torch.randn(9, 16)
    theirs = apply_rope_interleaved((x @ W.t()).view(1, 9, 2, D).transpose(1, 2), positions)
    turned = (x @ interleaved_to_half(W, 2).t()).view(1, 9, 2, D).transpose(1, 2)
    ours = apply_rope(turned, *rope_cos_sin(positions, frequencies))
    # The features come out in another order, the scores are the same.
    worst = (theirs @ theirs.transpose(-1, -2) - ours @ ours.transpose(-1, -2)).abs().max().item()
    assert worst < 1e-3
    print(f"\nneighbouring pairs = halves with permuted weights: largest difference in a score {worst:.1e}")

    k, pe = 3, sinusoidal_positions(torch.arange(50), D)  # (50, D)
    turns = [torch.tensor([[w.cos(), w.sin()], [-w.sin(), w.cos()]]) for w in k * frequencies]
    M = torch.block_diag(*turns)  # (D, D): turns (sin, cos) of pair i by k ω_i; knows k, not p
    worst = (pe[:-k] @ M.t() - pe[k:]).abs().max().item()
    assert worst < 1e-4
    print(f"sinusoidal: one matrix takes PE[p] to PE[p + {k}] for every p: largest difference {worst:.1e}")

    print("\ntokens until a pair has turned once, 2π/ω_i, for D = 32")
    print(f"{'i':>15}" + "".join(f"{i:>10}" for i in range(0, D // 2, 3)))
    for theta in (10_000.0, 1_000_000.0):
        wavelengths = (2 * torch.pi / rope_frequencies(D, theta)).tolist()
        print(f"  θ = {theta:>9,.0f}" + "".join(f"{w:>10,.0f}" for w in wavelengths[::3]))


if __name__ == "__main__":
    main()
