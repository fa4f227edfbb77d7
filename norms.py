"""Normalisation: LayerNorm and RMSNorm, the statistics, the gain, the gradient.

    LayerNorm   y = (x − μ) / √(σ² + ε) ⊙ g + b      μ, σ² over the C features of one token    arXiv:1607.06450
    RMSNorm     y = x / √(mean(x²) + ε) ⊙ g                                                     arXiv:1910.07467

Both give every token vector a fixed length, so that a block sees inputs of one scale however large the residual
stream has grown. LayerNorm also removes the mean. RMSNorm leaves it, saves a reduction and a bias, and trains as
well: what matters is the length. What the missing mean changes:

* LayerNorm does not notice a constant added to x, RMSNorm does. It is exact: LayerNorm(x) = RMSNorm(x − μ). So a
  network whose matrices write zero-mean vectors into the stream computes the same with either, and a trained pre-norm
  LayerNorm model turns into an RMSNorm one by centring those matrices (arXiv:2305.14858).
* The stream is free to use the direction (1, …, 1): C dimensions instead of C − 1. The price: a large offset there
  uses the length up. RMSNorm divides by √(σ² + μ²) where LayerNorm divides by σ, so what differs between the features
  shrinks to 1 / √(1 + μ²/σ²). Of C independent features the mean is about σ/√C, and nothing is lost.

The gradient. Write RMSNorm as y = g ⊙ x̂ with x̂ = x / r, r = √(mean(x²) + ε), and u = g ⊙ dL/dy for what arrives
at x̂. From ∂r/∂x_j = x_j / (C r) follows ∂x̂_i/∂x_j = (δ_ij − x̂_i x̂_j / C) / r, and summed over i with u_i

    dL/dx = (u − x̂ · mean(u ⊙ x̂)) / r                        dL/dg = Σ_tokens x̂ ⊙ dL/dy

that is, the upstream gradient without its part along x̂, because stretching x changes nothing, divided by r: large
inputs learn slowly. LayerNorm first multiplies x by the symmetric matrix I − 11ᵀ/C, which takes the mean away; so
the gradient passes through the same matrix on its way back and loses its mean too (that of x̂ is 0 already):

    dL/dx = (u − mean(u) − x̂ · mean(u ⊙ x̂)) / √(σ² + ε)      x̂ = (x − μ) / √(σ² + ε),  dL/db = Σ_tokens dL/dy

Where the norm stands, x the residual stream and f a branch (attention or feed-forward):

    post       x ← Norm(x + f(x))          Vaswani et al. 2017: each norm rescales the stream itself
    pre        x ← x + f(Norm(x))          arXiv:2002.04745: the stream is an open road, and one norm stands at its end
    sandwich   x ← x + Norm(f(Norm(x)))    arXiv:2105.13290, Gemma 2 (arXiv:2408.00118): what a branch adds has length
                                           1 too, however large its weights

Say each branch returns as much variance as its input has. With post, the norm after block l divides x + f(x) by √2, on
the way back too, which just undoes the doubling by the branch: every block, the last one as well, keeps a gradient of
the same size however deep the stack, and a step moves the output of L blocks by √L times what one would
(arXiv:2004.08249). Hence the warm-up that post-norm is said to need; here it does without one at 12 layers
(results/norm-placement.md) and fails with one at 48 (results/norm-depth.md). With pre, the stream's variance grows to
1 + l, and so the norm in front of block l divides its share and its gradient by √(1 + l): the deeper the stack, the
gentler its last blocks; a step moves the output by √ln L. The weakness of pre: late branches add little to a long
stream, and one branch with large weights drowns all the others. Sandwich mends that: at the start all branches weigh
the same, whatever their weights; the gains learn the rest. `python norms.py` prints gradients and moves for the three.

The trap is precision: in fp16, squares above 65,504 are infinite, so an activation of 256 is enough to turn the
statistics into inf. They are taken in fp32 whatever comes in, and the result returns in the input's dtype.

Simplified: no kernel of our own. The modules call torch's fused one where it is the fastest, and say where not.

Letters: C width; everything before the last dimension is left alone. Run it: `python norms.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


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
        # (FSDP in bf16 does narrow them, on their way to the forward; the optimizer keeps them in fp32.)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps).to(x.dtype)


class RMSNormByHand(torch.autograd.Function):
    """rms_norm with the gradient derived above. Without a GPU F.rms_norm is a chain of small operations, each a pass
    over (..., C), and autograd follows it with a longer one. By hand both are short; the sums over the features and
    over the tokens are products of a matrix and a vector."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        wide = torch.promote_types(gain.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r_inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps)  # (..., 1), fp32 at least
        ctx.save_for_backward(x, gain, r_inverse)
        return (x * r_inverse).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, gain, r_inverse = ctx.saved_tensors
        upstream, C = upstream.to(r_inverse.dtype), x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):  # backward may be called inside it
            both = (x * upstream).reshape(-1, C)  # (N, C)
            dgain = r_inverse.view(1, -1) @ both  # (1, C): Σ_tokens x̂ ⊙ upstream
            along = (both @ gain.to(both.dtype)).view_as(r_inverse)  # (..., 1): Σ_C u ⊙ x
        dx = (x * (along * r_inverse.square() / -C)).addcmul_(upstream, gain).mul_(r_inverse)  # x = r x̂
        return dx.to(x.dtype), dgain[0].to(gain.dtype), None


class RMSNorm(nn.Module):
    """rms_norm with a learned gain: x (..., C) -> (..., C)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        if x.dtype == self.weight.dtype and not torch.is_grad_enabled():  # decoding: the fewest calls win
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, self.weight.dtype)  # as in LayerNorm
        gain = self.weight.to(wide)
        if x.is_cuda or torch.compiler.is_compiling():  # one kernel forward, one backward
            return F.rms_norm(x.to(wide), gain.shape, gain, self.eps).to(x.dtype)
        return RMSNormByHand.apply(x, gain, self.eps)


def place(x, branch, placement, norm):
    """One residual step by the table above: x (..., C) -> (..., C); norm is a function without parameters here."""
    if placement == "post":
        return norm(x + branch(x))
    added = branch(norm(x))
    return x + (norm(added) if placement == "sandwich" else added)


def deep_stack(placement, depth=32, first=1.0, width=128, tokens=256, seed=0):
    """`depth` blocks at birth -> the gradient norm of each block's matrix, the RMS of the final stream, and how far
    the output moves, relative to its length, if every matrix moves by 1 % of its norm in a random direction.

    Block l adds W_l relu(input), W_l drawn so that as much variance comes out as goes in; the first is made `first`
    times as large. The loss is a random linear function of the normalised stream.
    """
    rng = torch.Generator().manual_seed(seed)
    x, up = torch.randn(2, tokens, width, generator=rng)
    W = torch.randn(depth, width, width, generator=rng) * (2 / width) ** 0.5  # relu halves the mean square
    W[0] *= first
    move = torch.randn(depth, width, width, generator=rng)
    move *= 0.01 * W.norm(dim=(1, 2), keepdim=True) / move.norm(dim=(1, 2), keepdim=True)
    one = torch.ones(width)

    def forward(W):
        z = x
        for w in W:
            z = place(z, lambda z, w=w: z.relu() @ w.t(), placement, lambda z: rms_norm(z, one))
        return z, rms_norm(z, one)

    W.requires_grad_()
    stream, y = forward(W)
    (gradient,) = torch.autograd.grad((y * up).sum() / tokens, W)
    with torch.no_grad():
        moved = ((forward(W + move)[1] - y).norm() / y.norm()).item()
    return gradient.norm(dim=(1, 2)).tolist(), stream.pow(2).mean().sqrt().item(), moved


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

    print("\nthe missing mean: how much of the features' differences is left, 1 / √(1 + μ²/σ²) of them")
    z = torch.randn(1000, 192)
    z = (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, correction=0)
    one = torch.ones(192)
    for ratio in (0.0, 0.1, 1.0, 5.0):
        left = [f(z + ratio, one).std(-1, correction=0).mean().item() for f in (layer_norm, rms_norm)]
        assert abs(left[0] - 1) < 1e-3
        assert abs(left[1] - (1 + ratio**2) ** -0.5) < 1e-3
        print(f"  μ/σ = {ratio:<4}  LayerNorm {left[0]:.3f}   RMSNorm {left[1]:.3f}")
    up = torch.randn(4, 192)
    centred = x - x.mean(-1, keepdim=True)
    assert (rms_norm(centred, gain, eps=1e-5) - layer_norm(x, gain)).abs().max() < 1e-5
    sums = [g(x, gain, up).sum(-1).abs().max().item() for g in (layer_norm_gradient, rms_norm_gradient)]
    print(f"  RMSNorm(x − μ) = LayerNorm(x); sum of dL/dx over a token: {sums[0]:.0e} and {sums[1]:.1f}")
    assert sums[0] < 1e-4 < sums[1]

    shown = (1, 2, 4, 8, 16, 32)
    print("\ngradient norm of block l's weights at birth, 32 blocks; move: of the output if all weights move by 1 %")
    print(f"  {'block l':<28}" + "".join(f"{n:>8}" for n in shown) + "  stream   move   move of 2 blocks")
    found = {}
    for first in (1.0, 30.0):
        for placement in ("post", "pre", "sandwich"):
            norms, length, move = found[placement, first] = deep_stack(placement, 32, first)
            name = placement if first == 1 else f"{placement}, block 1 x {first:.0f}"
            print(f"  {name:<28}" + "".join(f"{norms[n - 1]:>8.3f}" for n in shown), end="")
            print(f"{length:>8.1f}{move:>7.1%}{deep_stack(placement, 2, first)[2]:>10.1%}")
    last = {key: norms[-1] for key, (norms, *_) in found.items()}
    assert last["post", 1.0] > 3 * last["pre", 1.0]
    assert last["sandwich", 30.0] > 3 * last["pre", 30.0]
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
