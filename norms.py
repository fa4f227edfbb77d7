"""Normalisation: LayerNorm and RMSNorm, their gradients, and where a norm stands in a block.

    LayerNorm   y = (x − μ) / √(σ² + ε) ⊙ g + b      μ, σ² over the C features of one token    arXiv:1607.06450
    RMSNorm     y = x / √(mean(x²) + ε) ⊙ g                                                     arXiv:1910.07467

Both give every token's vector the same length, √C before the gain g. A transformer is a stack of blocks, each of two
*branches*, attention and feed-forward. Each branch adds its output to one running vector per token, the *residual
stream*. A norm before a branch gives it inputs of one scale, however large the stream has grown. RMSNorm, forward and
backward, each token by itself (⊙ multiplies element by element):

    r     = √(mean(x²) + ε)                          x (..., C) -> (..., 1), in fp32 at least
    x̂     = x / r                                    (..., C)
    y     = g ⊙ x̂                                    (..., C), in the dtype of x

    u     = g ⊙ dL/dy                                (..., C), the gradient that arrives at x̂
    dL/dx = (u − x̂ · mean(u ⊙ x̂)) / r                (..., C)
    dL/dg = Σ_tokens x̂ ⊙ dL/dy                       (C,)

LayerNorm is RMSNorm of x − μ, plus b; on the way back the gradient loses its mean too:

    x̂     = (x − μ) / √(σ² + ε)                      (..., C)
    dL/dx = (u − mean(u) − x̂ · mean(u ⊙ x̂)) / √(σ² + ε),   dL/db = Σ_tokens dL/dy

because x − μ = P x with the symmetric matrix P = I − 1 1ᵀ / C, which subtracts the mean. So dL/dx is P times RMSNorm's
gradient at x − μ; and P x̂ = x̂, because x̂ has mean 0 already.

Where it stands (`place` below), with x the residual stream and f a branch:

    post       x ← Norm(x + f(x))          Vaswani et al. 2017: each norm rescales the stream itself
    pre        x ← x + f(Norm(x))          arXiv:2002.04745: nothing stands in the stream but one norm at its end
    sandwich   x ← x + Norm(f(Norm(x)))    arXiv:2105.13290, Gemma 2 (arXiv:2408.00118): every branch adds a vector of
                                           one length, whatever the size of its weights

The default model runs RMSNorm before each branch (pre) with ε = 1e-6, and on the query and key of every attention head
(attention.py explains heads).

The trap is precision. In fp16 squares above 65,504 are infinite, so an activation of 256 is enough to make the
statistics inf. They are taken in fp32 at least, and the result returns in the input's dtype.

The gradient. r² = mean(x²) + ε gives ∂r/∂x_j = x_j / (C r) = x̂_j / C, so ∂x̂_i/∂x_j = (δ_ij − x̂_i x̂_j / C) / r with
δ_ij = 1 if i = j, else 0. Times u_i, summed over i, that is RMSNorm's dL/dx above. In words: the part of u along x̂ is
removed (up to ε), as stretching x changes nothing; the rest is divided by r: the larger x, the smaller the gradient.

What the missing mean changes. RMSNorm saves a reduction and a bias, at no significant cost (results/norm-kind.md). It
notices a constant that is added to x: it divides by √(σ² + μ²), LayerNorm by σ, so the differences between the features
come out 1 / √(1 + μ²/σ²) times as large as LayerNorm's. For C independent features of mean 0, μ is about σ/√C, and
nothing is lost. On vectors of mean 0 the two are equal, so a trained pre-norm LayerNorm model becomes an RMSNorm one
(arXiv:2305.14858): take the mean out of all that writes into the stream (the embeddings, untied from the output, and
each branch's last matrix and bias), and add each norm's b, times the matrix that reads it, to that matrix's bias.

What the placement changes in a stack whose branches each put out as much variance as comes in (`deep_stack` below).
(A block is one branch here; a transformer's has two, so its depth counts double. In transformer.py branches
begin smaller, see the end.)

* post: each norm divides x + f(x) by √2. On the way back the two paths double the gradient's square, and the norm
  halves it: all blocks' weights get gradients of one size. If each branch changes by a share δ in an independent
  direction, the output moves by δ √(depth / 2): that makes post-norm hard to train (arXiv:2004.08249). Here it trains
  without a warm-up at 12 layers (results/norm-placement.md) and fails even with one at 48 (results/norm-depth.md).
* pre: after l blocks the stream's variance is 1 + l, as each adds 1. On the way back the final norm divides the
  gradient by √(1 + depth). At block k two gradients add up: the one around the branch, and the one through it, which
  its norm divides by √k, the std of its input: the sum is √(1 + 1/k) times as long. The product over k = l + 1 … depth
  is √((1 + depth)/(1 + l)), so block l's weights get 1 / √(1 + l): deeper ones get smaller gradients. The same δ moves
  the output by δ √(1/2 + 1/3 + … + 1/(1 + depth)), about δ √ln depth. The weakness: late branches add little, and one
  branch with large weights drowns all the others.
* sandwich: all branches weigh the same at the start, whatever the size of their weights; their gains learn the rest.
  The stream grows as in pre, and the weights' gradients fall with l as there.

transformer.py divides the matrices that write into the stream by √(2 n_layer) at the start. That levels the gradients.
In a character model of 12 blocks the gradient of the first block, divided by that of the last, is 1.1 in pre and 0.98
in post. In sandwich, whose second norm undoes the division, it is 3.6 (results/norm-placement.md).

The modules call torch's fused kernels (all of the formula in one pass over memory); where RMSNorm has none for training
(CPU, Apple GPU), support/fast_norms.py supplies one.

Letters: C width, l the number of a block, L the loss; everything before the last dimension is left alone.

Run it: `python norms.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from support.fast_norms import fast_rms_norm
from support.output import run_demo


def layer_norm(x, weight, bias=None, eps=1e-5):
    """The formula: x (..., C), weight and bias (C,) -> (..., C) in x's dtype. Statistics in fp32 at least."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)  # (..., 1); over C, not C − 1
    y = centred * torch.rsqrt(variance + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def rms_norm(x, weight, eps=1e-6):
    """The formula: x (..., C), weight (C,) -> (..., C) in x's dtype. Statistics in fp32 at least."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rms_norm_gradient(x, weight, upstream, eps=1e-6):
    """dL/dx of rms_norm in closed form, derived above; all (..., C) but weight (C,)."""
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # (..., 1)
    x_hat, u = x / r, upstream * weight
    return (u - x_hat * (u * x_hat).mean(-1, keepdim=True)) / r


def layer_norm_gradient(x, weight, upstream, eps=1e-5):
    """dL/dx of layer_norm in closed form, derived above; all (..., C) but weight (C,)."""
    centred = x - x.mean(-1, keepdim=True)
    r = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # (..., 1)
    x_hat, u = centred / r, upstream * weight
    return (u - u.mean(-1, keepdim=True) - x_hat * (u * x_hat).mean(-1, keepdim=True)) / r


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


class RMSNorm(nn.Module):
    """rms_norm with a learned gain: x (..., C) -> (..., C)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return fast_rms_norm(x, self.weight, self.eps)  # rms_norm, by the fastest kernel for it


def place(x, branch, placement, norm):
    """One residual step by the table above: x (..., C) -> (..., C); norm is a function without parameters here.
    transformer.Block writes the same out, with norms that have gains."""
    if placement == "post":
        return norm(x + branch(x))
    added = branch(norm(x))
    return x + (norm(added) if placement == "sandwich" else added)


def deep_stack(placement, depth, first=1.0):
    """`depth` untrained blocks -> the gradient norm of each block's matrix, the RMS of the final stream, and how far
    the output moves, relative to its length, if every matrix moves by 1 % of its norm in a random direction.

    Block l adds W_l relu(input), W_l drawn so that as much variance comes out as goes in; the first is multiplied by
    `first`. The loss is a random linear function of the normalised stream.
    """
    C, rng = 128, torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 256, C, generator=rng)  # (tokens, C) each: what comes in, dL/d(output)
    W = torch.randn(depth, C, C, generator=rng) * (2 / C) ** 0.5  # relu halves the mean square
    W[0] *= first
    move = torch.randn(depth, C, C, generator=rng)
    move *= 0.01 * W.norm(dim=(1, 2), keepdim=True) / move.norm(dim=(1, 2), keepdim=True)
    one = torch.ones(C)

    def forward(W):
        z = x
        for w in W:
            z = place(z, lambda z, w=w: z.relu() @ w.t(), placement, lambda z: rms_norm(z, one))
        return z, rms_norm(z, one)

    W.requires_grad_()
    stream, y = forward(W)
    (gradient,) = torch.autograd.grad((y * upstream).sum() / len(x), W)
    with torch.no_grad():
        moved = ((forward(W + move)[1] - y).norm() / y.norm()).item()
    return gradient.norm(dim=(1, 2)).tolist(), stream.pow(2).mean().sqrt().item(), moved


def demo():
    """x = (1, 1, 7, 7): mean 4, deviation 3, root mean square 5. Then the trap of fp16, and the three placements."""
    x, one = torch.tensor([1.0, 1.0, 7.0, 7.0]), torch.ones(4)
    upstream = torch.tensor([1.0, 0.0, 0.0, 0.0])  # dL/dy
    by_hand = {
        # mean(u) = 1/4 and mean(u ⊙ x̂) = −1/4, so dL/dx = (u − 1/4 + x̂/4) / 3; for RMSNorm it is (u − x̂/20) / 5
        "LayerNorm": (layer_norm, F.layer_norm, layer_norm_gradient, [-1.0, -1.0, 1.0, 1.0], [1 / 6, -1 / 6, 0.0, 0.0]),
        "RMSNorm": (rms_norm, F.rms_norm, rms_norm_gradient, [0.2, 0.2, 1.4, 1.4], [0.198, -0.002, -0.014, -0.014]),
    }
    print("x = (1, 1, 7, 7): μ = 4, σ = 3, √mean(x²) = 5; dL/dy = (1, 0, 0, 0)")
    for name, (norm, fused, gradient, y, dx) in by_hand.items():
        torch.testing.assert_close(norm(x, one, eps=0.0), torch.tensor(y))
        torch.testing.assert_close(norm(10 * x, one, eps=0.0), torch.tensor(y))  # the length of x does not matter
        torch.testing.assert_close(fused(x, (4,), one, eps=1e-6), torch.tensor(y))
        torch.testing.assert_close(gradient(x, one, upstream, eps=0.0), torch.tensor(dx))
        same = torch.allclose(norm(x + 5, one, eps=0.0), torch.tensor(y))
        assert same == (name == "LayerNorm")  # the missing mean
        numbers = ["".join(f"{number:>8.3f}" for number in row) for row in (y, dx)]
        print(f"  {name:<10}y ={numbers[0]}   dL/dx ={numbers[1]}   x + 5 gives {'the same' if same else 'another'} y")
    torch.testing.assert_close(rms_norm(x - 4, one, eps=0.0), layer_norm(x, one, eps=0.0))
    left = (rms_norm(x, one).std() / layer_norm(x, one).std()).item()
    assert abs(left - (1 + (4 / 3) ** 2) ** -0.5) < 1e-5
    print(f"  RMSNorm(x − μ) = LayerNorm(x); RMSNorm(x)'s differences are {left:.1f} = 1 / √(1 + μ²/σ²) times as large")

    big = torch.full((1, 4), 300.0, dtype=torch.float16)
    square = big.pow(2).mean(-1, keepdim=True)
    naive, ours = big * torch.rsqrt(square), RMSNorm(4)(big)
    assert square.isinf().all()
    assert naive.eq(0).all()
    assert ours.eq(1).all()
    print(f"\nan fp16 input of 300: mean(x²) in fp16 is {square.item()}, so y = {naive[0, 0]:.0f}", end="")
    print(f"; statistics in fp32 give {ours[0, 0]:.0f}")

    depth, shown = 16, (1, 2, 4, 8, 16)
    print(f"\n{depth} untrained blocks: gradient norm of block l's weights; the output's move if all move by 1 %")
    print(f"  {'block l':<24}" + "".join(f"{n:>8}" for n in shown) + "   stream's RMS   move   move of 2 blocks")
    last = {}
    for first in (1.0, 30.0):
        for placement in ("post", "pre", "sandwich"):
            norms, length, move = deep_stack(placement, depth, first)
            name = placement if first == 1 else f"{placement}, block 1 x {first:.0f}"
            print(f"  {name:<24}" + "".join(f"{norms[n - 1]:>8.2f}" for n in shown), end="")
            print(f"{length:>15.1f}{move:>7.1%}{deep_stack(placement, 2, first)[2]:>19.1%}")
            last[placement, first] = norms[-1]
            if first == 1 and placement != "sandwich":  # the laws above, for δ = 0.01
                share = depth / 2 if placement == "post" else sum(1 / n for n in range(2, depth + 2))
                assert abs(move / (0.01 * share**0.5) - 1) < 0.25
                level = [g * (1 if placement == "post" else (1 + l) ** 0.5) for l, g in enumerate(norms, 1)]
                assert max(level) / min(level) < 2
                assert abs(length / (1 if placement == "post" else 1 + depth) ** 0.5 - 1) < 0.2
    # of the last block's gradient: pre's is the smallest, and only sandwich's is not drowned by a large first block
    assert last["post", 1.0] > 2 * last["pre", 1.0]
    assert last["sandwich", 30.0] > 3 * last["pre", 30.0]


if __name__ == "__main__":
    run_demo(demo)
