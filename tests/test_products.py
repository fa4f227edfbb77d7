"""support/products.py: fp32 products through oneDNN."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from attention import KVCache
from support import products
from support.fast_decode import DecodeStep
from support.products import fast_linears, linear
from transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch lacks oneDNN's product"
)


@pytest.fixture
def calls(monkeypatch):
    """As on an AMD CPU; the shapes that oneDNN multiplies."""
    shapes, product = [], products.onednn_product
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(
        products, "onednn_product", lambda x, w, b=None: shapes.append(tuple(x.shape)) or product(x, w, b)
    )
    return shapes


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_a_product_in_float64(calls, monkeypatch, avx512, bias):
    monkeypatch.setattr(products, "HAS_AVX512", avx512)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 50, 24), torch.randn(40, 24)
    inputs = [x, weight] + ([torch.randn(40)] if bias else [])
    upstream = torch.randn(3, 50, 40)
    fast = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y, expected = linear(*fast), exact[0] @ exact[1].T + (exact[2] if bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
    gradients = torch.autograd.grad(y, fast, upstream)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)
    assert len(calls) == (3 if avx512 else 2)


def test_a_compiled_graph_multiplies_by_onednn_too(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "HAS_AVX512", True)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 50, 24), torch.randn(40, 24), torch.randn(40)]
    upstream, counts = torch.randn(3, 50, 40), []

    def count(graph, example):
        counts.append(sum(n.target is torch.ops.alignment.onednn_product.default for n in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(linear, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    ours, plain = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    y, expected = compiled(*ours), linear(*plain)
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y, ours, upstream), torch.autograd.grad(expected, plain, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert counts == [1, 2]  # forward; backward: for x and for the weight


def test_frozen_weights_need_no_gradient(calls):
    x, weight = torch.randn(80, 24, requires_grad=True), torch.randn(40, 24)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(80, 24))
    assert len(calls) == 2


def test_few_rows_and_other_dtypes_are_left_to_torch(calls):
    weight = torch.randn(40, 24)
    linear(torch.randn(63, 24), weight)
    linear(torch.randn(80, 24).double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(80, 24), weight).dtype is torch.bfloat16
    assert not calls


def test_a_model_keeps_its_layers_and_a_copy_its_own_weights(calls):
    model = fast_linears(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
    x = torch.randn(2, 40, 24)
    plain = nn.functional.linear(nn.functional.linear(x, model[0].weight, model[0].bias).relu(), model[2].weight)
    torch.testing.assert_close(model(x), plain + model[2].bias)
    torch.testing.assert_close(twin(x), twin[2].bias.expand(2, 40, 8))
    assert type(model[0]) is nn.Linear
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert len(calls) == 4


def test_the_fast_decoding_step_takes_such_a_model(calls):
    model = Transformer(TransformerConfig(vocab_size=64, context=64, n_layer=1, n_head=2, n_kv_head=1, width=32))
    cache = KVCache(1, 1, 1, 16, 16)
    assert DecodeStep.fits(fast_linears(model), cache)
    model.blocks[0].attn.wq.forward = lambda x: x
    assert not DecodeStep.fits(model, cache)
