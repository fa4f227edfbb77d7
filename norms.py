"""Normalisation: LayerNorm and RMSNorm, the statistics, the gain, the gradient.

    LayerNorm   y = (x − μ) / √(σ² + ε) ⊙ g + b      μ, σ² over the C features of one token    arXiv:1607.06450
    RMSNorm     y = x / √(mean(x²) + ε) ⊙ g                                                     arXiv:1910.07467

Both give every token vector a fixed length, so that a block sees inputs of one scale however large the residual
stream has grown. LayerNorm also removes the mean. RMSNorm leaves it, saves a reduction and a bias, and trains as
well: what matters is the length. The visible difference: LayerNorm does not notice a constant added to x, RMSNorm
does.

The gradient. Write RMSNorm as y = g ⊙ x̂ with x̂ = x / r, r = √(mean(x²) + ε), and u = g ⊙ dL/dy for what arrives
at x̂. From ∂r/∂x_j = x_j / (C r) follows ∂x̂_i/∂x_j = (δ_ij − x̂_i x̂_j / C) / r, and summed over i with u_i

    dL/dx = (u − x̂ · mean(u ⊙ x̂)) / r                        dL/dg = Σ_tokens x̂ ⊙ dL/dy

that is, the upstream gradient without its part along x̂, because stretching x changes nothing, divided by r: large
inputs learn slowly. LayerNorm first multiplies x by the symmetric matrix I − 11ᵀ/C, which takes the mean away; so
the gradient passes through the same matrix on its way back and loses its mean too (that of x̂ is 0 already):

    dL/dx = (u − mean(u) − x̂ · mean(u ⊙ x̂)) / √(σ² + ε)      x̂ = (x − μ) / √(σ² + ε),  dL/db = Σ_tokens dL/dy

The trap is precision: in fp16, squares above 65,504 are infinite, so an activation of 256 is enough to turn the
statistics into inf. They are taken in fp32 whatever comes in, and the result returns in the input's dtype.

Simplified: no kernel of our own. The modules call torch's fused one where it is the fastest, and say where not.

Letters: C width; everything before the last dimension is left alone. Run it: `python norms.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn


def layer_norm(x, weight, bias=None, eps=1e-5):
    """The formula: x (..., C), weight and bias (C,) -> (..., C) in x's dtype. Statistics in fp32 at least."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)  # (..., 1); over C, not C − 1
    y = (centred * torch.rsqrt(variance + eps)).to(x.dtype) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def rms_norm(x, weight, eps=1e-6):
    """The formula: x (..., C), weight (C,) -> (..., C) in x's dtype. Statistics in fp32 at least."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return (y.to(x.dtype) * weight).to(x.dtype)


def rms_norm_gradient(x, weight, upstream, eps=1e-6):
    """dL/dx of rms_norm in closed form, as derived above; all (..., C) but weight (C,)."""
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # (..., 1)
    unit, u = x / r, upstream * weight
    return (u - unit * (u * unit).mean(-1, keepdim=True)) / r


def layer_norm_gradient(x, weight, upstream, eps=1e-5):
    """dL/dx of layer_norm in closed form, as derived above; all (..., C) but weight (C,)."""
    centred = x - x.mean(-1, keepdim=True)
    r = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # (..., 1)
    unit, u = centred / r, upstream * weight
    return (u - u.mean(-1, keepdim=True) - unit * (u * unit).mean(-1, keepdim=True)) / r


class LayerNorm(nn.Module):
    """layer_norm with a learned gain and, by default, a bias, by torch's fused kernel: x (..., C) -> (..., C)."""

    def __init__(self, dim, eps=1e-5, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x):
        # Autocast brings bf16 activations to fp32 gains, and the kernel wants one dtype. The wider one: a gain of
        # 1.003 is 1 in bf16, so narrowing the gains would hide most of what they learn. No-op if the dtypes agree.
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm with a learned gain: x (..., C) -> (..., C)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        wide = torch.promote_types(x.dtype, self.weight.dtype)  # as in LayerNorm
        gain = self.weight.to(wide)
        if x.is_cuda:  # one kernel forward, one backward
            return F.rms_norm(x.to(wide), gain.shape, gain, self.eps).to(x.dtype)
        # Without a GPU F.rms_norm is a chain of small operations, and its backward is slower than the formula's:
        # the gradient of x² passes over (..., C) several times. A norm is one pass each way.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(wide, torch.float32))
        r_inverse = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)  # (..., 1), fp32 at least
        return (x * r_inverse * gain).to(x.dtype)


def main():
    torch.manual_seed(0)
    x = torch.randn(4, 192) * 3 + 1
    gain, bias = torch.randn(192), torch.randn(192)
    rows = [
        ("LayerNorm", layer_norm(x, gain, bias), F.layer_norm(x, (192,), gain, bias), layer_norm),
        ("RMSNorm", rms_norm(x, gain), F.rms_norm(x, (192,), gain, 1e-6), rms_norm),
    ]
    print(f"{'':<11}{'formula − fused':>16}{'y(10 x) − y(x)':>16}{'y(x + 5) − y(x)':>17}   (largest differences)")
    for name, ours, fused, f in rows:
        one = torch.ones(192)
        same = (ours - fused).abs().max().item()
        scale = (f(10 * x, one) - f(x, one)).abs().max().item()
        shift = (f(x + 5, one) - f(x, one)).abs().max().item()
        assert same < 1e-5
        assert scale < 1e-4
        assert (shift < 1e-4) == (name == "LayerNorm")  # the missing mean
        print(f"{name:<11}{same:>16.1e}{scale:>16.1e}{shift:>17.1e}")
    big = torch.full((1, 192), 300.0, dtype=torch.float16)
    square = big.pow(2).mean(-1, keepdim=True)  # the trap: 90,000 is inf in fp16, and x / inf is 0
    naive, ours = big * torch.rsqrt(square + 1e-6), RMSNorm(192)(big)
    assert square.isinf().all()
    assert naive.eq(0).all()
    assert ours.sub(1).abs().max() < 1e-2
    print(
        f"\nfp16 input of 300: mean(x²) taken in fp16 is {square.item()}, which normalises to {naive[0, 0]:.0f};",
        end="",
    )
    print(f" fp32 statistics give {ours[0, 0]:.3f}")


if __name__ == "__main__":
    main()
