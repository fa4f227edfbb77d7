"""norms.py against torch, transformers and autograd."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from norms import LayerNorm, RMSNorm, deep_stack, layer_norm, layer_norm_gradient, place, rms_norm, rms_norm_gradient

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
    ln, rms = LayerNorm(8, 0.3).to(dtype), RMSNorm(8, 0.2).to(dtype)  # an ε that shows
    ln.weight.data, ln.bias.data, rms.weight.data = g.data.clone(), b.data.clone(), g.data.clone()
    up = torch.randn(SHAPE, dtype=dtype)
    for module, out in ((ln, layer_norm(x, g, b, 0.3)), (rms, rms_norm(x, g, 0.2))):
        torch.testing.assert_close(module(x), out)
        (dx,) = torch.autograd.grad(module(x), x, up)
        torch.testing.assert_close(dx, torch.autograd.grad(out, x, up, retain_graph=True)[0])
        (dg,) = torch.autograd.grad(module(x), module.weight, up)
        torch.testing.assert_close(dg, torch.autograd.grad(out, g, up)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_by_hand_is_exact_in_any_layout_and_under_autocast(dtype):
    """x and what comes back lie in memory in different orders, as around attention; the gain is fp32."""
    x = torch.randn(3, 5, 4, 64).to(dtype).requires_grad_()
    up = torch.randn(3, 4, 5, 64).to(dtype).transpose(1, 2)
    module = RMSNorm(64)
    torch.nn.init.normal_(module.weight)
    with torch.autocast("cpu", torch.bfloat16):  # backward too: its products must not be rounded
        dx, dg = torch.autograd.grad(module(x), (x, module.weight), up)
    exact = x.detach().double().requires_grad_(), module.weight.detach().double().requires_grad_()
    expected = torch.autograd.grad(rms_norm(*exact), exact, up.double())
    assert (dx.dtype, dg.dtype) == (dtype, torch.float32)
    near = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=1e-3, rtol=2**-8)  # bf16's own rounding
    torch.testing.assert_close(dx.double(), expected[0], **near)
    torch.testing.assert_close(dg.double(), expected[1], atol=1e-5, rtol=1e-5)  # a sum over tokens, in fp32


def test_rms_norm_equals_transformers():
    x, g, _ = inputs(torch.float32)
    theirs, ours = Qwen3RMSNorm(8, eps=1e-6), RMSNorm(8)
    theirs.weight.data = ours.weight.data = g.data
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_low_precision_keeps_its_dtype_and_fp32_statistics(make, dtype):
    module = make(64)  # fp32 parameters, as under autocast
    torch.nn.init.constant_(module.weight, 1.003)  # in bf16 it would be 1
    x = torch.randn(5, 64) * 300 + 200  # squares overflow fp16
    out = module(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), module(x.to(dtype).float()), atol=2e-2, rtol=2e-2)
    naive = layer_norm if make is LayerNorm else rms_norm
    torch.testing.assert_close(naive(x.to(dtype), module.weight).float(), out.float(), atol=2e-2, rtol=0)
    exact = naive(x.to(dtype).double(), module.weight.double())
    assert (out.double() / exact).mean().item() == pytest.approx(1, abs=1e-3)  # rounded is the result alone


def test_what_each_ignores():
    x, g, _ = inputs()
    torch.testing.assert_close(layer_norm(7 * x + 5, g, eps=0), layer_norm(x, g, eps=0))
    torch.testing.assert_close(rms_norm(7 * x, g, eps=0), rms_norm(x, g, eps=0))
    assert (rms_norm(x + 5, g) - rms_norm(x, g)).abs().max() > 0.1
    torch.testing.assert_close(rms_norm(x, torch.ones(8)).pow(2).mean(-1), torch.ones(2, 3).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gain_dtype", [torch.float16, torch.float32, torch.float64])
def test_without_gradients_the_module_gives_the_same(dtype, gain_dtype):
    x, rms = (torch.randn(SHAPE) * 3 + 1).to(dtype), RMSNorm(8).to(gain_dtype)
    torch.nn.init.normal_(rms.weight)
    with torch.no_grad():
        without = rms(x)
    torch.testing.assert_close(without, rms(x).detach())
    assert without.dtype == dtype
    with torch.no_grad():
        big = RMSNorm(8).to(gain_dtype)(torch.full((1, 8), 300.0).to(dtype))
    torch.testing.assert_close(big, torch.ones(1, 8).to(dtype))  # fp16: mean(x²) would be inf


def test_layer_norm_is_rms_norm_of_the_centred():
    x, g, _ = inputs()
    torch.testing.assert_close(rms_norm(x - x.mean(-1, keepdim=True), g, 1e-5), layer_norm(x, g), atol=1e-12, rtol=0)


def test_a_network_that_writes_centred_vectors_needs_no_mean():
    """The whole claim on a pre-norm stack: centre what goes into the stream, and both norms are one."""
    x, gain = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    W = torch.randn(3, 8, 8, dtype=torch.float64)

    def run(x, W, norm):
        for w in W:
            x = place(x, lambda z, w=w: z.relu() @ w.t(), "pre", lambda z: norm(z, gain, eps=1e-6))
        return norm(x, gain, eps=1e-6)

    expected = run(x, W, layer_norm)
    centred = W - W.mean(dim=1, keepdim=True)  # each column: what one input adds to the C features
    torch.testing.assert_close(run(x - x.mean(-1, keepdim=True), centred, rms_norm), expected, atol=1e-12, rtol=0)
    assert (run(x, W, rms_norm) - expected).abs().max() > 1e-2


def test_place():
    x = torch.tensor([[3.0, 4.0]])

    def double(z):
        return 2 * z

    def norm(z):
        return z / z.norm()

    assert place(x, double, "post", norm).flatten().tolist() == pytest.approx([0.6, 0.8])
    assert place(x, double, "pre", norm).flatten().tolist() == pytest.approx([4.2, 5.6])
    assert place(x, double, "sandwich", norm).flatten().tolist() == pytest.approx([3.6, 4.8])


def test_gradients_by_depth():
    post, pre, sandwich = (deep_stack(p, 16)[0] for p in ("post", "pre", "sandwich"))
    assert max(post) / min(post) < 2.5  # no block is special
    for sizes in (pre, sandwich):  # 1 / √l
        ratios = [sizes[0] / sizes[n] * (n + 1) ** -0.5 for n in (3, 8, 15)]
        assert all(0.6 < r < 1.3 for r in ratios), ratios
    shallow = {p: deep_stack(p, 2) for p in ("post", "pre", "sandwich")}
    assert post[-1] / shallow["post"][0][-1] > 0.7  # the last block's gradient does not care how deep it stands
    assert pre[-1] / shallow["pre"][0][-1] < 0.6
    deep = {p: deep_stack(p, 16) for p in ("post", "pre", "sandwich")}
    assert deep["post"][2] / shallow["post"][2] > 2  # √8 = 2.8
    assert deep["pre"][2] / shallow["pre"][2] < 1.9
    loud = {p: deep_stack(p, 16, first=30.0) for p in ("pre", "sandwich")}
    assert loud["pre"][1] > 20  # one loud branch fills the stream
    assert loud["sandwich"][1] == pytest.approx(deep["sandwich"][1], rel=0.05)
