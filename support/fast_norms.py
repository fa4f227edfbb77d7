"""RMSNorm by the fastest kernel. In training on a CPU or an Apple GPU torch has none: there with the gradient of
norms.py."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from support.devices import traits


def fast_rms_norm(x, weight, eps):
    """norms.rms_norm(x, weight, eps): x (..., C), weight (C,) -> (..., C) in the dtype of x."""
    if x.dtype == weight.dtype and not torch.is_grad_enabled():  # decoding: the fewest calls win
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)  # as in norms.LayerNorm
    gain = weight.to(wide)
    if traits(x).fused_rms_norm or torch.compiler.is_compiling():  # one kernel forward, one backward
        return F.rms_norm(x.to(wide), gain.shape, gain, eps).to(x.dtype)
    return RMSNormByHand.apply(x, gain, eps)


class RMSNormByHand(torch.autograd.Function):
    """rms_norm with the gradient derived in norms.py. On a CPU F.rms_norm is a chain of small operations, each a pass
    over (..., C), and its backward pass a longer one. Here the sums over the features and over the tokens are products
    of a matrix and a vector."""

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
