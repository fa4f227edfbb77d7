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

Past the trained length L. Pair i makes r_i = L ω_i / 2π turns while a training sequence lasts. The fast pairs go round
many times and meet every angle; the slow ones (r_i < 1) see only the first part of their circle, and from position L
on attention is asked about angles that it never met: the loss jumps. The cure is to slow pairs down, by a factor s =
new length / L at most, so that the new positions map to angles that are known:

    linear    ω_i / s for every pair             position interpolation, arXiv:2306.15595. Simple, but neighbours, which
                                                 the fast pairs tell apart, come s times closer
    NTK       θ ← θ s^(D/(D−2)), so ω_i s^(−2i/(D−2)): pair 0 as before, the last one divided by s exactly
    dynamic   NTK with s = f ℓ/L − (f − 1), f the dict's factor, for a sequence of ℓ > L tokens: short ones as before
    llama3    k_i ω_i + (1 − k_i) ω_i / s        k_i rises from 0 at r_i = 1 to 1 at r_i = 4 turns (Llama 3.1's code)
    yarn      the same, k_i from 0 at 1 turn to 1 at 32; and scores times (0.1 ln s + 1)², arXiv:2309.00071

Fast pairs keep their speed, slow pairs are interpolated, the rest lies between: llama3 goes by the number of turns;
YaRN by i, as its authors' code does (the paper, §3.2, goes by turns). `python benchmarks/positional.py` trains a
small model on L bytes and reads 4 L. Unscaled, its loss is five times as high in the last quarter as in the first. It
stays usable with llama3 and better with yarn, at some cost to short texts; linear ruins both. After 40 steps on long
windows yarn's loss is nearly level (0.51 to 0.59 nats; before, 0.56 in the first quarter); unscaled, it ends at 0.98.

The trap of "dynamic": if ω changes while a sequence grows, the keys in the cache were turned by the old ω and no longer
fit. So here the longest length is said beforehand, once: `rope_frequencies(..., length=...)`. A Transformer says its
context, so in it dynamic leaves the frequencies alone.

Letters: B batch, T time, C width, H heads, D head width. Run it: `python positional.py`.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class LearnedPositions(nn.Module):
    """positions (..., T) -> (..., T, C): a row of a table of `max_len`."""

    def __init__(self, max_len, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_len, dim).normal_(std=0.02))

    def forward(self, positions):
        # On CUDA the check would make the CPU wait for the GPU in every step; indexing past the end stops there too,
        # if less politely. Nothing would stop a negative position: −1 would quietly be the last row.
        if positions.numel() and not (positions.is_cuda or torch.compiler.is_compiling()):
            for position in (positions.min().item(), positions.max().item()):
                if not 0 <= position < len(self.weight):
                    raise ValueError(f"position {position} asked for, the table has {len(self.weight)}")
        return self.weight[positions]  # (..., T, C)


def sinusoidal_positions(positions, dim):
    """positions (..., T), dim even -> (..., T, dim) in fp32: sine and cosine of each frequency side by side."""
    angles = positions[..., None].float() * rope_frequencies(dim).to(positions.device)  # (..., T, dim/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., T, dim)


def rope_frequencies(head_dim, theta=10000.0, scaling=None, context=None, length=None):
    """ω_i = θ^(−2i/D) for i = 0 … D/2 − 1, in radians per position, stretched as `scaling` says: (D/2,) fp32.

    scaling: Hugging Face's `rope_scaling` (or `rope_parameters`) dict: its `rope_type` is default, linear, dynamic,
        yarn or llama3. A `rope_theta` inside it, as transformers 5 writes it, goes before `theta`.
    context: the model's max_position_embeddings. Needed where the dict does not say what it was trained with.
    length: the longest sequence to come, default `context`; only "dynamic" looks at it.
    YaRN also turns the scores up: `rope_attention_factor` says by how much. Raises ValueError on a dict it cannot use.
    """
    if head_dim % 2:
        raise ValueError(f"sines and cosines come in pairs: a width of {head_dim} is odd")
    kind, s, trained, theta = _read_scaling(scaling, context, theta)
    i = torch.arange(head_dim // 2, dtype=torch.float32)
    if kind == "dynamic" and head_dim > 2:
        stretch = s * max(length or trained, trained) / trained - (s - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / theta ** (2 * i / head_dim)  # transformers' order of operations: equal to the last bit
    if kind in ("default", "dynamic"):
        return frequencies
    if kind == "linear":
        keep = torch.zeros_like(i)
    elif kind == "llama3":
        turns = trained * frequencies / (2 * math.pi)  # that a pair makes within the trained length
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        first, last = (
            head_dim * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(theta))  # the i that makes `turns`
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        keep = 1 - ((i - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * keep + frequencies / s * (1 - keep)


def rope_attention_factor(scaling=None, context=None):
    """What YaRN multiplies cosines and sines by, so that scores grow by its square; 1 for every other scaling.

    More keys flatten the softmax; YaRN sharpens it again by 1/t with √(1/t) = 0.1 ln s + 1 (§3.4). DeepSeek's
    `mscale` and `mscale_all_dim` split that factor, an `attention_factor` in the dict replaces it.
    """
    kind, s, *_ = _read_scaling(scaling, context)
    if kind != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def factor(mscale):
        return 0.1 * mscale * math.log(s) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return factor(scaling["mscale"]) / factor(scaling["mscale_all_dim"])
    return factor(1)


def _read_scaling(scaling, context, theta=10000.0):
    """-> kind, factor s, trained length, θ. Raises ValueError, one line, on anything that would be guesswork."""
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict):
        raise ValueError(
            f"RoPE scaling is {scaling!r}; it must be a dict such as {{'rope_type': 'linear', 'factor': 4}}"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    needs = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": (),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in needs:
        raise ValueError(f"RoPE scaling {kind!r} is not known; choose one of {', '.join(needs)}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("RoPE over a part of the head (partial_rotary_factor) is not supported")
    missing = [key for key in needs[kind] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"RoPE scaling {kind!r} lacks {', '.join(missing)}")
    trained = context
    if kind in ("yarn", "llama3"):
        trained = scaling.get("original_max_position_embeddings") or context
    if trained is None and kind in ("dynamic", "yarn", "llama3"):
        raise ValueError(f"RoPE scaling {kind!r} needs the length that the model was trained with")
    factor = scaling.get("factor")
    if factor is None:  # DeepSeek's YaRN: the new length over the old one
        factor = (context or trained) / trained if kind == "yarn" else 1.0
    if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ValueError(f"RoPE scaling by a factor of {factor!r}; it must be a number of at least 1")
    theta = scaling.get("rope_theta") or theta
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 0")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError("RoPE scaling 'llama3' needs low_freq_factor below high_freq_factor")
    return kind, factor, trained, theta


def rope_cos_sin(positions, frequencies, attention_factor=1.0):
    """positions (..., T), frequencies (D/2,) -> cos, sin, each (..., T, D) fp32: both halves hold the same angles.

    attention_factor: `rope_attention_factor(scaling, context)`; it multiplies both tables, hence queries and keys.
    """
    angles = positions[..., None].float() * frequencies.to(positions.device)  # (..., T, D/2)
    angles = torch.cat([angles, angles], dim=-1)  # (..., T, D)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x, cos, sin):
    """(a, b) -> (a cos − b sin, b cos + a sin), a and b the halves of x's last dimension, in three calls."""
    (a, b), (s, _), out = x.chunk(2, dim=-1), sin.chunk(2, dim=-1), x * cos
    first, second = out.chunk(2, dim=-1)
    first.addcmul_(b, s, value=-1)
    second.addcmul_(a, s)
    return out.to(x.dtype)


class Rotation(torch.autograd.Function):
    """`rotate` with its gradient: the rotation back. Autograd would take the halves apart and together again."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        cos, sin = ctx.saved_tensors
        return rotate(upstream, cos, -sin), None, None


def apply_rope(x, cos, sin):
    """Rotate x (B, H, T, D) by the angles of cos, sin, (T, D) or (B, T, D): pairs are (i, i + D/2). x's dtype."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D): the same for all heads
    return Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else rotate(x, cos, sin)


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
        assert (abs(slower[0] - 1) < 1e-6) == (kind != "linear")  # the fastest: left alone, but by linear


if __name__ == "__main__":
    main()
