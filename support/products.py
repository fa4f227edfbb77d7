"""Matrix products in fp32 on AMD's CPUs. `fast_linears` lets a model use them: one that a run trains (support/runs.py),
and a decoder that is opened (support/checkpoints.py).

torch multiplies fp32 matrices with Intel's MKL, which keeps to AVX2 on other makers' CPUs. oneDNN, which torch brings
along too, uses what the CPU has: on two cores of an AMD EPYC with AVX-512, 470 instead of 219 GFLOP/s
(results/benchmarks.md). The results differ by rounding.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
FEWEST_ROWS = 64  # below them oneDNN's start costs more than it saves

# An AMD CPU, and a torch that has what `linear` needs; none of this has a public name.
IS_AMD = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "").startswith("AMD")
HAS_PRODUCT = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_is_faster():
    """Whether `linear` multiplies by oneDNN on this machine."""
    return IS_AMD and HAS_PRODUCT


def onednn_product(x, weight, bias=None):
    """x (…, in), weight (out, in), of any strides -> x weightᵀ + bias, (…, out), without a gradient."""
    if torch.compiler.is_compiling():
        return product_in_graph(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("alignment::onednn_product", mutates_args=())
def product_in_graph(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same for torch.compile, which cannot trace oneDNN's own operator and would leave the product to MKL."""
    return onednn_product(x, weight, bias)


@product_in_graph.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class OneDNNLinear(torch.autograd.Function):
    """y = x Wᵀ + b; ∂L/∂x = g W, ∂L/∂W = gᵀ x, ∂L/∂b = Σ g, with g = ∂L/∂y summed over the rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors  # (…, in), (out, in)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, x = g.flatten(0, -2), x.flatten(0, -2)  # (n, out), (n, in)
        grad_x = onednn_product(g, weight.t()) if for_x else None
        grad_weight = None
        if for_weight:  # with AVX2 alone MKL is faster at this one
            grad_weight = onednn_product(rows.t(), x.t()) if HAS_AVX512 else rows.t() @ x
        return grad_x, grad_weight, rows.sum(0) if for_bias else None


def linear(x, weight, bias=None):
    """torch.nn.functional.linear, faster in fp32 on an AMD CPU, for many rows."""
    plain = (
        not onednn_is_faster()
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.dim() < 2
    )
    plain = plain or x.numel() < FEWEST_ROWS * x.shape[-1] or torch.is_autocast_enabled("cpu")
    plain = plain or type(weight) not in (torch.Tensor, nn.Parameter)  # such as FSDP's
    if plain:
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias)


def fast_linears(model):
    """Let the model's linear layers compute by `linear`, where that is faster. The layers stay nn.Linear."""
    for module in model.modules() if onednn_is_faster() else ():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)
    return model


def own_attributes(module):
    """The names that were set on this module itself, but for what `fast_linears` set."""
    names = vars(module).keys()
    return names - {"forward"} if getattr(vars(module).get("forward"), "func", None) is _forward else names


def _forward(layer, x):
    return linear(x, layer.weight, layer.bias)
