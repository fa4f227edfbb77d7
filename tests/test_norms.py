"""norms.py against torch, transformers and autograd."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from norms import LayerNorm, RMSNorm, layer_norm, layer_norm_gradient, rms_norm, rms_norm_gradient

SHAPE = (2, 3, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(dtype=torch.float64):
    x = (torch.randn(SHAPE, dtype=dtype) * 3 + 1).requires_grad_()
    return x, torch.randn(8, dtype=dtype, requires_grad=True), torch.randn(8, dtype=dtype, requires_grad=True)


def test_formulas_equal_torch():
    x, g, b = inputs()
    torch.testing.assert_close(layer_norm(x, g, b), F.layer_norm(x, (8,), g, b, 1e-5), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer_norm(x, g), F.layer_norm(x, (8,), g, None, 1e-5), atol=1e-12, rtol=0)
    torch.testing.assert_close(rms_norm(x, g), F.rms_norm(x, (8,), g, 1e-6), atol=1e-12, rtol=0)


def test_gradients():
    x, g, b = inputs()
    assert torch.autograd.gradcheck(layer_norm, (x, g, b))
    assert torch.autograd.gradcheck(rms_norm, (x, g))
    up = torch.randn(SHAPE, dtype=torch.float64)
    for norm, closed in ((layer_norm, layer_norm_gradient), (rms_norm, rms_norm_gradient)):
        (expected,) = torch.autograd.grad(norm(x, g), x, up)
        torch.testing.assert_close(closed(x, g, up).detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_equal_the_formulas_in_value_and_gradient(dtype):
    x, g, b = inputs(dtype)
    ln, rms = LayerNorm(8).to(dtype), RMSNorm(8).to(dtype)
    ln.weight.data, ln.bias.data, rms.weight.data = g.data.clone(), b.data.clone(), g.data.clone()
    up = torch.randn(SHAPE, dtype=dtype)
    for module, out in ((ln, layer_norm(x, g, b)), (rms, rms_norm(x, g))):
        torch.testing.assert_close(module(x), out)
        (dx,) = torch.autograd.grad(module(x), x, up)
        torch.testing.assert_close(dx, torch.autograd.grad(out, x, up, retain_graph=True)[0])
        (dg,) = torch.autograd.grad(module(x), module.weight, up)
        torch.testing.assert_close(dg, torch.autograd.grad(out, g, up)[0])


def test_rms_norm_equals_transformers():
    x, g, _ = inputs(torch.float32)
    theirs, ours = Qwen3RMSNorm(8, eps=1e-6), RMSNorm(8)
    theirs.weight.data = ours.weight.data = g.data
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_low_precision_keeps_its_dtype_and_fp32_statistics(make, dtype):
    module = make(64)  # fp32 parameters, as under autocast
    x = torch.randn(5, 64) * 300 + 200  # squares overflow fp16
    out = module(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), module(x.to(dtype).float()), atol=2e-2, rtol=2e-2)
    naive = layer_norm if make is LayerNorm else rms_norm
    torch.testing.assert_close(naive(x.to(dtype), torch.ones(64, dtype=dtype)).float(), out.float(), atol=2e-2, rtol=0)


def test_what_each_ignores():
    x, g, _ = inputs()
    torch.testing.assert_close(layer_norm(7 * x + 5, g, eps=0), layer_norm(x, g, eps=0))
    torch.testing.assert_close(rms_norm(7 * x, g, eps=0), rms_norm(x, g, eps=0))
    assert (rms_norm(x + 5, g) - rms_norm(x, g)).abs().max() > 0.1
    torch.testing.assert_close(rms_norm(x, torch.ones(8)).pow(2).mean(-1), torch.ones(2, 3).double(), atol=1e-5, rtol=0)
