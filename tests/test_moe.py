"""moe.py against transformers' Mixtral and Qwen3-MoE, the dense form, counts by hand, and autograd."""

import copy
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_metrics, assert_same_weights, flags_of, metrics, resumed_at, script, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe
import optim
import pretrain
from lora import add_lora, lora_layers
from moe import (
    MoE,
    balancing_loss,
    dense_experts,
    expert,
    experts_loop,
    load_balancing_loss,
    route,
    router_z_loss,
    sparse_experts,
    update_biases,
    within_capacity,
)
from support.expert_load import dropped_assignments, expert_load, load_record
from support.expert_products import experts_grouped, padded
from transformer import Transformer, TransformerConfig

C, INNER, E, K = 8, 5, 7, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer(scale=1.0, dtype=torch.float64, **changes):
    """A small MoE with weights that are large enough to matter."""
    config = dict(width=C, expert_width=INNER, n_head=2, n_expert=E, n_expert_active=K, balancing="none")
    config |= dict(routed_scale=1.0) | changes
    built = MoE(TransformerConfig(**config))
    for p in built.parameters():
        torch.nn.init.normal_(p, std=scale)
    return built.to(dtype)


def formula(built, x):
    """The layer token by token, as the docstring's formula reads."""
    out = []
    for token in x.flatten(0, -2):
        logits = built.router.weight @ token
        score = logits.softmax(-1) + (0 if built.selection_bias is None else built.selection_bias)
        chosen = score.argsort(descending=True)[: built.n_active].tolist()
        weights = logits.softmax(-1)[chosen]
        weights = weights / weights.sum() if built.normalise else weights
        y = torch.zeros_like(token)
        for w, e in zip(weights, chosen, strict=True):
            h = built.up[e] @ token
            h = F.gelu(h, approximate="tanh") if built.gate is None else F.silu(built.gate[e] @ token) * h
            y = y + built.scale * w * (built.down[e] @ h)
        if built.shared is not None:
            up, down = built.shared["up"].weight, built.shared["down"].weight
            h = up @ token
            h = (
                F.silu(built.shared["gate"].weight @ token) * h
                if "gate" in built.shared
                else F.gelu(h, approximate="tanh")
            )
            y = y + down @ h
        out.append(y)
    return torch.stack(out).view_as(x)


# ---------------------------------------------------------------------------------------------------------------
# The losses and the router


@pytest.mark.parametrize("k", [1, 2, 3])
def test_switch_loss_equals_transformers(k):
    logits = torch.randn(29, E, dtype=torch.float64, requires_grad=True)
    theirs = load_balancing_loss_func((logits,), E, k)
    probs, _, index = route(logits, k)
    ours = load_balancing_loss(probs, index, E)
    torch.testing.assert_close(k * ours, theirs, check_dtype=False, atol=1e-6, rtol=0)  # theirs counts in fp32
    (g,) = torch.autograd.grad(k * ours, logits, retain_graph=True)
    torch.testing.assert_close(g, torch.autograd.grad(theirs, logits)[0], atol=1e-7, rtol=0)


def test_switch_loss_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.6, 0.2, 0.2], [0.4, 0.4, 0.2]])
    index = torch.tensor([[0], [1], [0], [0]])
    # f = (3/4, 1/4, 0), P = (0.4, 0.4, 0.2)
    assert load_balancing_loss(probs, index, 3).item() == pytest.approx(3 * (0.75 * 0.4 + 0.25 * 0.4))
    assert load_balancing_loss(probs.view(2, 2, 3), index.view(2, 2, 1), 3).item() == pytest.approx(1.2)
    even = torch.full((6, 3), 1 / 3)
    assert load_balancing_loss(even, torch.arange(12).view(6, 2) % 3, 3).item() == pytest.approx(1)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    by_hand = (torch.tensor(2.0).log() ** 2 + (torch.e**1 + torch.tensor(torch.e) ** 2).log() ** 2) / 2
    torch.testing.assert_close(router_z_loss(logits), by_hand)


def test_route_by_hand():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()  # the probabilities themselves: they sum to 1
    probs, weights, index = route(logits, 2)
    assert index.tolist() == [[0, 2]]
    torch.testing.assert_close(probs, logits.exp())
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))
    torch.testing.assert_close(weights, logits.gather(1, index).softmax(-1))  # softmax after the top-k
    torch.testing.assert_close(route(logits, 2, normalise=False)[1], torch.tensor([[0.4, 0.3]]))
    probs, weights, index = route(logits, 2, bias=torch.tensor([0.0, 0.25, 0.0, 0.0]))  # 0.4, 0.35, 0.3, 0.2
    assert index.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.2]]))  # the bias chooses, the weights do not know it
    torch.testing.assert_close(probs, logits.exp())


# ---------------------------------------------------------------------------------------------------------------
# The layer


def theirs_like(kind, ours):
    common = dict(hidden_size=C, num_experts_per_tok=K, hidden_act="silu")
    if kind == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(intermediate_size=INNER, num_local_experts=E, **common))
    else:
        config = dict(moe_intermediate_size=INNER, num_experts=E, norm_topk_prob=ours.normalise)
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**config, **common))
    block = block.to(ours.up.dtype)
    block.gate.weight.data = ours.router.weight.data.clone()
    block.experts.gate_up_proj.data = torch.cat([ours.gate.data, ours.up.data], dim=1)
    block.experts.down_proj.data = ours.down.data.clone()
    return block


@pytest.mark.parametrize(("kind", "normalise"), [("mixtral", True), ("qwen3", True), ("qwen3", False)])
def test_layer_equals_transformers_forward_and_backward(kind, normalise):
    ours = layer(norm_topk_prob=normalise, dtype=torch.float32)
    theirs = theirs_like(kind, ours)
    x = torch.randn(2, 11, C)
    mine, other, up = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(2, 11, C)
    y, expected = ours(mine), theirs(other)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    (y * up).sum().backward()
    (expected * up).sum().backward()
    pairs = [(mine, other), (ours.router.weight, theirs.gate.weight), (ours.down, theirs.experts.down_proj)]
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-4)
    both = torch.cat([ours.gate.grad, ours.up.grad], dim=1)
    torch.testing.assert_close(both, theirs.experts.gate_up_proj.grad, atol=1e-3, rtol=1e-4)
    assert ours.router.weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("balancing", ["aux", "bias"])
@pytest.mark.parametrize("n_shared", [0, 2])
def test_layer_equals_the_formula(activation, balancing, n_shared):
    changes = dict(norm_topk_prob=n_shared == 0, routed_scale=1.5 if n_shared else 1.0)
    built = layer(activation=activation, balancing=balancing, n_shared_expert=n_shared, **changes)
    assert built.scale == changes["routed_scale"]
    if balancing == "bias":
        built.selection_bias.normal_(std=0.3)
    x = torch.randn(2, 9, C, dtype=torch.float64)
    torch.testing.assert_close(built(x), formula(built, x))
    torch.testing.assert_close(built.eval()(x), formula(built, x))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("experts", [experts_loop, experts_grouped])
@pytest.mark.parametrize("whole", [1, 8])
def test_fast_equals_dense_forward_and_backward(experts, gated, whole):
    exact, experts = experts is experts_loop, padded(experts, whole)
    dtype = torch.float64 if exact else torch.float32  # the kernel takes no float64
    built = layer(0.4, dtype, activation="swiglu" if gated else "gelu", width=16, expert_width=8)
    x, up = torch.randn(31, 16, dtype=dtype, requires_grad=True), torch.randn(31, 16, dtype=dtype)
    weights, index = torch.rand(31, K, dtype=dtype, requires_grad=True), torch.rand(31, E).topk(K).indices
    index[index == 4] = 4 if exact else 5  # in one of the two cases expert 4 stays without tokens
    for keep in (None, torch.rand(31, K) < 0.7):
        kept = weights if keep is None else weights * keep
        one_hot = torch.zeros(31, E, dtype=dtype)
        one_hot = one_hot.scatter_add(1, index, kept)  # an expert may be chosen twice here
        dense = dense_experts(x, torch.arange(E).expand(31, E), one_hot, built.gate, built.up, built.down)
        fast = sparse_experts(x, index, weights, built.gate, built.up, built.down, keep, experts)
        tolerance = dict(atol=1e-10, rtol=1e-10) if exact else dict(atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(fast, dense, **tolerance)
        leaves = [x, weights, *(p for p in (built.gate, built.up, built.down) if p is not None)]
        wanted, got = torch.autograd.grad(dense, leaves, up), torch.autograd.grad(fast, leaves, up)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "norm_topk_prob": False}, {"n_shared_expert": 1}])
def test_gradcheck_through_router_experts_and_losses(changes):
    built = layer(0.7, n_expert=4, n_expert_active=2, expert_width=3, width=4, balancing="aux", **changes)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in built.named_parameters()]

    def run(x, *parameters):
        y = torch.func.functional_call(built, dict(zip(names, parameters, strict=True)), (x,))
        return y, *built.losses

    assert torch.autograd.gradcheck(run, (x, *built.parameters()))


def test_an_unused_expert_has_no_gradient_and_the_used_ones_have():
    built = layer()
    with torch.no_grad():
        x = torch.randn(13, C, dtype=torch.float64).abs()
        built.router.weight[4] = -10  # x is positive: nobody goes there
    built(x).square().sum().backward()
    assert built.counts[4] == 0
    assert (built.counts > 0).sum() > 2
    for p in (built.gate, built.up, built.down):
        assert torch.equal(p.grad.abs().amax((1, 2)) > 0, built.counts > 0)
    assert built.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("normalise", [True, False])
def test_one_renormalised_expert_leaves_the_router_without_gradient(normalise):
    built = layer(n_expert_active=1, norm_topk_prob=normalise)
    built(torch.randn(6, C, dtype=torch.float64)).sum().backward()
    assert (built.router.weight.grad.abs().max() < 1e-12) == normalise


def test_more_active_experts_than_experts_is_refused():
    class Config:
        width, ffn_width, expert_width, n_expert, n_expert_active, norm_topk_prob = 8, 8, None, 2, 3, True
        activation, n_shared_expert, balancing, capacity_factor, routed_scale = "gelu", 0, "aux", None, 1.0

    with pytest.raises(ValueError, match="n_expert_active is 3; it must be between 1 and n_expert, 2"):
        MoE(Config)
    Config.n_expert_active = 2
    assert MoE(Config).up.shape == (2, 8, 8)  # no expert_width: ffn_width


def test_default_scale():
    scales = [TransformerConfig(n_expert=4, norm_topk_prob=n).resolved().routed_scale for n in (True, False)]
    assert scales == [2.0, 1.0]
    assert TransformerConfig(n_expert=4, routed_scale=2.5).resolved().routed_scale == 2.5


def test_initial_weights():
    built = MoE(TransformerConfig(width=96, expert_width=64, n_layer=8, n_expert=4, n_shared_expert=1))
    for name, p in built.named_parameters():
        expected = 0.02 / 4 if "down" in name else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.1), name
    assert built(torch.randn(2, 3, 96)).shape == (2, 3, 96)  # a config whose defaults nobody has filled in


# ---------------------------------------------------------------------------------------------------------------
# Capacity


def test_capacity_by_hand():
    index = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0], [2, 0]])  # loads 5, 3, 2 of 10
    # factor 0.9: ⌈0.9 · 10 / 3⌉ = 3 places. First choices: expert 0 takes tokens 0, 1, 2; expert 1 token 3; expert 2
    # token 4. Second choices: 1 takes tokens 0 and 2, 2 takes token 1, 0 is full.
    kept = within_capacity(index, 3, 0.9)
    assert kept.tolist() == [[True, True], [True, True], [True, True], [True, False], [True, False]]
    # factor 0.6: 2 places. 0 takes 0, 1; 1 takes 3 and, of the second choices, token 0; 2 takes 4 and then 1.
    kept = within_capacity(index, 3, 0.6)
    assert kept.tolist() == [[True, True], [True, True], [False, False], [True, False], [True, False]]
    assert within_capacity(index, 3, 2.0).all()


def test_capacity_does_not_round_noise_up():
    index = torch.zeros(100, 1, dtype=torch.int64)
    assert 1.1 * 100 / 2 > 55
    assert within_capacity(index, 2, 1.1).sum() == 55
    assert within_capacity(index, 100, 0.01).sum() == 1  # at least one place


def test_dropped_tokens_pass_by_and_are_counted():
    built = layer(n_expert_active=1, norm_topk_prob=False, capacity_factor=1.0)
    with torch.no_grad():
        built.router.weight.zero_()
        built.router.weight[2] = 1  # positive tokens all go to expert 2, which has ⌈14 / 7⌉ = 2 places
    x = torch.rand(2, 7, C, dtype=torch.float64)
    y = built(x).flatten(0, 1)
    torch.testing.assert_close(y[:2], formula(built, x).flatten(0, 1)[:2])
    assert y[2:].abs().max() == 0
    assert y[:2].abs().amax(1).min() > 0
    assert dropped_assignments(built).tolist() == [12]
    assert load_record(built)["load_dropped"] == pytest.approx(12 / 14)
    assert "load_dropped" not in load_record(layer())  # no capacity
    assert expert_load(built).tolist() == [[0, 0, 1, 0, 0, 0, 0]]  # what was asked for, before the drops
    built(x)
    assert dropped_assignments(built).tolist() == [24]
    update_biases(built, 0.1)
    assert dropped_assignments(built).tolist() == [0]
    torch.testing.assert_close(built.eval()(x), formula(built, x))  # decoding drops nothing
    assert dropped_assignments(built).tolist() == [0]


# ---------------------------------------------------------------------------------------------------------------
# Balancing and its statistics


def skewed(balancing):
    built = layer(0.3, n_expert=8, n_expert_active=2, balancing=balancing)
    x = torch.randn(512, C, dtype=torch.float64) + torch.randn(C, dtype=torch.float64)
    built(x)
    load = 8 * expert_load(built)[0]
    assert load.min() < 0.1
    assert load.max() > 2.5
    update_biases(built, 0.0)
    return built, x


def test_bias_balancing_evens_out_a_skewed_router():
    built, x = skewed("bias")
    before = copy.deepcopy(dict(built.named_parameters()))
    for _ in range(600):
        built(x)
        update_biases(built, 0.001)
    built(x)
    load = 8 * expert_load(built)[0]
    assert load.min() > 0.8
    assert load.max() < 1.2
    assert all(torch.equal(p, before[name]) for name, p in built.named_parameters())
    y = built(x)
    torch.testing.assert_close(y, formula(built, x))


def test_the_switch_loss_evens_out_a_skewed_router():
    built, x = skewed("aux")
    optimizer = torch.optim.Adam([built.router.weight], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        built(x)
        balancing_loss(built, 1.0, 0.0).backward()
        optimizer.step()
        update_biases(built, 0.1)
    built(x)
    load = 8 * expert_load(built)[0]
    assert load.min() > 0.7
    assert load.max() < 1.4


def test_one_bias_step_by_hand():
    built = layer(n_expert=3, n_expert_active=1, balancing="bias")
    built.counts += torch.tensor([6, 2, 4])  # the share is 4
    update_biases(built, 0.25)
    assert built.selection_bias.tolist() == [-0.25, 0.25, 0.0]
    update_biases(built, 0.25)  # nothing counted since: no move
    assert built.selection_bias.tolist() == [-0.25, 0.25, 0.0]
    assert "selection_bias" in built.state_dict()
    assert "counts" not in built.state_dict()
    assert "selection_bias" not in layer(balancing="aux").state_dict()
    other = layer(n_expert=3, n_expert_active=1)
    other.counts += 1
    update_biases(other, 0.25)
    assert other.selection_bias is None
    assert other.counts.tolist() == [0, 0, 0]


def test_losses_are_those_of_the_last_training_forward_summed_over_layers():
    stack = torch.nn.Sequential(layer(balancing="aux"), layer(balancing="aux"))
    with pytest.raises(RuntimeError, match="training mode"):
        balancing_loss(stack, 1.0, 1.0)
    stack.eval()(torch.randn(4, C, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="training mode"):
        balancing_loss(stack, 1.0, 1.0)
    assert expert_load(stack).tolist() == [[0.0] * E] * 2
    stack.train()
    stack(torch.randn(9, C, dtype=torch.float64))
    x = torch.randn(6, C, dtype=torch.float64)
    stack(x)
    aux, z, loads = 0, 0, []
    for one in stack:
        logits = x @ one.router.weight.t()
        probs, _, index = route(logits, K)
        aux, z = aux + load_balancing_loss(probs, index, E), z + router_z_loss(logits)
        loads.append(torch.bincount(index.flatten(), minlength=E))
        x = one.eval()(x)
    torch.testing.assert_close(balancing_loss(stack, 1.0, 0.0), aux)
    torch.testing.assert_close(balancing_loss(stack, 0.3, 0.02), 0.3 * aux + 0.02 * z)
    for one, load in zip(stack, loads, strict=True):
        assert one.counts.sum() == K * 15
        assert (one.counts >= load).all()


def test_a_model_without_experts_has_nothing_to_balance():
    dense = torch.nn.Linear(2, 2)
    assert balancing_loss(dense, 0.3, 0.02) == 0.0
    assert load_record(dense) == {}
    assert expert_load(dense).numel() == dropped_assignments(dense).numel() == 0
    update_biases(dense, 0.1)


def test_a_step_in_pieces_counts_as_the_whole():
    whole, cut = layer(balancing="bias"), layer(balancing="bias")
    cut.load_state_dict(whole.state_dict())
    x = torch.randn(12, 3, C, dtype=torch.float64)
    ((whole(x).square().sum() / 36) + balancing_loss(whole, 0.0, 0.1)).backward()
    for piece in (x[:3], x[3:4], x[4:]):
        share = len(piece) / 12
        ((cut(piece).square().sum() / 36) + share * balancing_loss(cut, 0.0, 0.1)).backward()
    assert torch.equal(whole.counts, cut.counts)
    torch.testing.assert_close(expert_load(cut), expert_load(whole))
    for a, b in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    update_biases(whole, 0.1)
    update_biases(cut, 0.1)
    assert torch.equal(whole.selection_bias, cut.selection_bias)
    assert whole.selection_bias.abs().max() == pytest.approx(0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    plain = layer(balancing="aux", capacity_factor=0.8)
    saving = layer(balancing="aux", capacity_factor=0.8)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(12, C, dtype=torch.float64)
    results = []
    for built, forward in ((plain, plain), (saving, lambda x: checkpoint(saving, x, use_reentrant=reentrant))):
        for _ in range(2):  # two micro-batches
            inputs = x.clone().requires_grad_()
            loss = forward(inputs).square().sum()
            if not reentrant:
                loss = loss + balancing_loss(built, 1.0, 0.1)
            kept = built.losses
            loss.backward()
            assert built.losses is kept  # not those of the repeated forward
        results.append((built.counts, built.dropped, inputs.grad, *(p.grad for p in built.parameters())))
    assert results[0][0].sum() == 2 * 12 * K
    assert results[0][1] > 0
    for a, b in zip(*(r if not reentrant else r[:2] for r in results), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_layer_counts_as_an_eager_one():
    """And whether it repeats a forward, which no graph can hold, is not asked."""
    eager = layer(balancing="aux", capacity_factor=0.8)
    compiled = copy.deepcopy(eager)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    results = []
    for built, forward in ((eager, eager), (compiled, torch.compile(compiled, backend="eager"))):
        for x in torch.randn(2, 12, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
            (forward(x).square().sum() + balancing_loss(built, 1.0, 0.1)).backward()
        results.append((built.counts, built.dropped, *(p.grad for p in built.parameters())))
    torch.testing.assert_close(results[1], results[0])
    assert not [reason for reason in breaks if "graph_task" in reason]


def test_a_trained_layer_can_be_copied():
    built = layer(balancing="aux")
    built(torch.randn(3, C, dtype=torch.float64))
    twin = copy.deepcopy(built)  # grpo does so for its reference model
    assert twin.losses is None
    assert built.losses is not None
    assert torch.equal(twin.up, built.up)


def test_the_router_decides_in_fp32_under_autocast():
    """In a subprocess: on some CPUs oneDNN's AMX kernels die at the first bf16 product."""
    code = """
import torch
from moe import *
from support.expert_products import experts_grouped
from transformer import TransformerConfig
torch.manual_seed(0)
config = TransformerConfig(width=32, expert_width=16, n_head=2, n_expert=16, n_expert_active=2, balancing="aux")
built = MoE(config.resolved())
x = torch.randn(500, 32)
exact = built(x)
counts, losses = built.counts.clone(), built.losses
update_biases(built, 0)
with torch.autocast("cpu", torch.bfloat16):
    rough = built(x)
assert rough.dtype == x.dtype and (rough - exact).abs().max() > 0
assert (rough - exact).abs().max() < 0.03 * exact.abs().max()
assert torch.equal(built.counts, counts)
assert torch.equal(torch.stack(built.losses), torch.stack(losses))
rough.sum().backward()
with torch.autocast("cpu", torch.bfloat16):
    probs, weights, index = route(x @ built.router.weight.t(), 2)
    grouped = sparse_experts(x, index, weights, built.gate, built.up, built.down, experts=experts_grouped)
    looped = sparse_experts(x, index, weights, built.gate, built.up, built.down)
assert (grouped - looped).abs().max() < 0.02 * exact.abs().max()
"""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(moe.__file__),
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("half", [False, True])
def test_experts_compute_few_numbers_of_rows_in_bf16_on_a_cpu(monkeypatch, half):
    """Many numbers of tokens: in fp32 as many rows as were sent, in bf16 multiples of 32."""
    rows, built = [], layer(dtype=torch.float32, width=16, expert_width=8)
    monkeypatch.setattr(moe, "expert", lambda x, *matrices: rows.append(len(x)) or expert(x.float(), *matrices))
    for T in range(40, 140, 7):
        built(torch.randn(1, T, 16, dtype=torch.bfloat16 if half else torch.float32))
    uneven = [n for n in rows if n % 32]
    assert len(set(uneven)) == 0 if half else len(set(uneven)) > 20
    assert half or sum(rows) == sum(K * T for T in range(40, 140, 7))


# ---------------------------------------------------------------------------------------------------------------
# Any shape


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 10**6))
    n_expert = draw(1, 9)
    built = layer(
        width=4 * draw(1, 3),
        expert_width=draw(1, 6),
        n_expert=n_expert,
        n_expert_active=draw(1, n_expert),
        n_shared_expert=draw(0, 2),
        activation=data.draw(st.sampled_from(["swiglu", "gelu"])),
        norm_topk_prob=data.draw(st.booleans()),
        balancing=data.draw(st.sampled_from(["aux", "bias", "none"])),
        n_kv_head=1,
    )
    B, T = draw(1, 3), draw(1, 6)
    x = torch.randn(B, T, built.router.in_features, dtype=torch.float64)
    y = built(x)
    torch.testing.assert_close(y, formula(built, x))
    shuffled = torch.randperm(T)
    torch.testing.assert_close(built(x[:, shuffled]), y[:, shuffled])  # no token knows of another
    torch.testing.assert_close(built.eval()(x[:1, :1]), y[:1, :1])
    assert built.counts.sum() == 2 * B * T * built.n_active
    assert expert_load(built).sum().item() == pytest.approx(1)


@settings(max_examples=60)
@given(data=st.data())
def test_any_capacity(data):
    T, n_expert = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    k, factor = data.draw(st.integers(1, n_expert)), data.draw(st.floats(0.05, 3))
    index = (
        torch.rand(T, n_expert, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).topk(k).indices
    )
    room = int(-(-round(factor * T * k / n_expert, 6) // 1))
    kept, taken = torch.zeros(T, k, dtype=torch.bool), [0] * n_expert
    for choice in range(k):  # the rule as a loop
        for t in range(T):
            e = index[t, choice]
            kept[t, choice] = taken[e] < room
            taken[e] += int(taken[e] < room)
    assert torch.equal(within_capacity(index, n_expert, factor), kept)


def test_one_expert_is_a_feed_forward():
    built = layer(n_expert=1, n_expert_active=1)
    x = torch.randn(4, C, dtype=torch.float64)
    torch.testing.assert_close(built(x), expert(x, built.gate[0], built.up[0], built.down[0]))


def test_no_tokens_at_all():
    built = layer()
    assert built.eval()(torch.zeros(0, 3, C, dtype=torch.float64)).shape == (0, 3, C)


# ---------------------------------------------------------------------------------------------------------------
# In pretraining

MODEL = dict(context=32, n_layer=2, n_head=2, n_kv_head=1, width=16, n_expert=4, n_expert_active=2, moe_every=1)
RUN = dict(data="text.txt", tokenizer="char", steps=6, batch=8, micro_batch=8, warmup=2, eval_every=3, eval_tokens=200)


def train(balancing="bias", moe_every=1, **changes):
    model = TransformerConfig(**MODEL | {"balancing": balancing, "moe_every": moe_every})
    rate = {"bias_rate": 0.004} if balancing == "bias" else {}
    return pretrain.main(pretrain.Config(**RUN | rate | {"device": "cpu", "model": model} | changes))


def test_the_routers_losses_reach_the_router(here, monkeypatch):
    gradients, step = [], pretrain.optimizer_step

    def watched(model, *rest):
        gradients.append(model.blocks[0].ffn.router.weight.grad.clone())
        return step(model, *rest)

    monkeypatch.setattr(pretrain, "optimizer_step", watched)
    for name, weights_of_loss in (("none", (0.0, 0.0)), ("aux", (1.0, 0.0)), ("z", (0.0, 1.0))):
        aux, z = weights_of_loss
        train("aux", name=name, steps=1, aux_weight=aux, z_weight=z)
    none, *others = gradients
    assert not any(torch.equal(none, other) for other in others)


def test_pretraining_logs_and_draws_the_load(here):
    train("aux", moe_every=2, name="aux")
    assert (here / "runs/aux/experts.png").is_file()
    least, most = metrics(here / "runs/aux", "load_min"), metrics(here / "runs/aux", "load_max")
    assert sorted(least) == [3, 6]  # with each validation
    loads = [metrics(here / "runs/aux", f"load/0/{e}")[6] for e in range(4)]  # one of the two layers is a mixture
    assert metrics(here / "runs/aux", "load/1/0") == {}
    assert sum(loads) == pytest.approx(4)
    assert (least[6], most[6]) == (min(loads), max(loads))
    price = metrics(here / "runs/aux", "balancing_loss")
    assert price[1] == pytest.approx(0.01 + 0.001 * math.log(4) ** 2, rel=0.05)  # at birth nearly even, logits near 0


@pytest.mark.parametrize("changes", [{"micro_batch": 3}, {"recompute": True}])
def test_the_cut_of_a_step_and_recomputing_change_nothing(here, changes):
    train(name="whole")
    train(name="other", **changes)
    assert_same_weights(here / "runs/whole/last", here / "runs/other/last", atol=2e-5, rtol=1e-4)
    assert_same_metrics(here / "runs/whole", here / "runs/other", ("loss", "balancing_loss"), rel=1e-3)
    bias = weights(here / "runs/other/last")
    (name,) = (n for n in bias if n.startswith("blocks.0") and "selection_bias" in n)
    assert bias[name].abs().max() > 0.003


def test_two_processes_equal_one(here):
    model = {f"model.{name}": value for name, value in MODEL.items()} | {"model.balancing": "bias"}
    flags = flags_of(RUN | {"device": "cpu", "bias_rate": 0.004} | model)
    for processes in (1, 2):
        done = script("pretrain.py", *flags, "--name", f"by{processes}", cwd=here, processes=processes)
        assert done.returncode == 0, done.stderr
    assert_same_weights(here / "runs/by1/last", here / "runs/by2/last", atol=2e-5, rtol=1e-4)
    assert_same_metrics(here / "runs/by1", here / "runs/by2", ("load_min", "load_max", "balancing_loss"), rel=1e-3)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_skipped_step_moves_no_bias(here, monkeypatch, fault):
    """Nor do its counts weigh in the next step."""

    def loss(*args):
        nll = plain(*args)
        if next(calls) != 1:  # of the second step
            return nll
        if fault == "loss":
            return nll * math.nan
        nll.register_hook(lambda gradient: gradient * math.nan)
        return nll

    def update(model, u):
        counted.append([layer.counts.sum().item() for layer in moe.moe_layers(model)])
        move(model, u)

    calls, counted = itertools.count(), []
    plain, move = pretrain.next_token_loss, pretrain.update_biases
    monkeypatch.setattr(pretrain, "next_token_loss", loss)
    monkeypatch.setattr(pretrain, "update_biases", update)
    train(name="skips", skip_nonfinite=True, save_every=1, keep=3, steps=3)
    first, second, third = (weights(here / f"runs/skips/step_000000{i}") for i in (1, 2, 3))
    name = "blocks.0.ffn.selection_bias"
    assert metrics(here / "runs/skips", "skipped") == {1: 0, 2: 1, 3: 1}
    assert first[name].abs().max() > 0
    for weight in first:
        assert torch.equal(first[weight], second[weight]), weight
    assert not torch.equal(second[name], third[name])
    assert counted == [[8 * 32 * 2] * 2] * 3  # windows, tokens, active experts; two layers


def test_resuming_keeps_the_biases(here):
    train(name="through", warmup=6)
    train(name="broken", warmup=6, steps=3)  # within the warm-up the learning rate does not know the last step
    with resumed_at(3):
        train(name="broken", warmup=6, resume=True)
    assert_same_weights(here / "runs/through/last", here / "runs/broken/last")
    assert_same_metrics(here / "runs/through", here / "runs/broken", ["load_max"])


def test_muon_treats_experts_as_matrices_of_their_own():
    stack = torch.randn(11, 5, 9)  # more experts than rows or columns
    for matrices in (stack, stack.mT):
        alone = torch.stack([optim.orthogonalise(m) for m in matrices])
        torch.testing.assert_close(optim.orthogonalise(matrices), alone, atol=1e-4, rtol=1e-4)
    a, b = torch.nn.Parameter(stack.clone()), torch.nn.Parameter(stack[1].clone())
    a.grad = torch.randn(11, 5, 9)
    b.grad = a.grad[1].clone()
    optim.Muon([a, b], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(a[1], b, atol=1e-5, rtol=1e-4)
    raw = Transformer(TransformerConfig(**MODEL, vocab_size=20))
    second, muon = optim.make_optimizers(raw, "muon", 1e-3, 0.1)
    (adamw,) = optim.make_optimizers(raw, "adamw", 1e-3, 0.1)
    experts = {id(p) for block in raw.blocks for p in (block.ffn.gate, block.ffn.up, block.ffn.down)}
    assert experts <= {id(p) for g in muon.param_groups for p in g["params"]}
    routers = {id(block.ffn.router.weight) for block in raw.blocks}  # labels, like an embedding: not Muon's
    for optimizer in (second, adamw):
        assert routers <= {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.1 for p in g["params"]}
    assert experts <= {id(p) for g in adamw.param_groups if g["weight_decay"] == 0.1 for p in g["params"]}


def test_adapters_of_a_router_are_not_muons_either():
    model = add_lora(Transformer(TransformerConfig(**MODEL, vocab_size=20)), 2, 4, ["router", "wq"])
    adamw, muon = optim.make_optimizers(model, "muon", 1e-3, 0.1)
    of = {name: {id(p) for p in layer.parameters() if p.requires_grad} for name, layer in lora_layers(model).items()}
    for ids, optimizer in ((of["blocks.0.ffn.router"], adamw), (of["blocks.0.attn.wq"], muon)):
        assert ids <= {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_muon_drives_an_expert_without_tokens_on_and_adamw_does_not():
    steps = []
    for kind in (optim.Muon, optim.AdamW):
        experts = torch.nn.Parameter(torch.zeros(2, 8, 8))
        optimizer = kind([experts], lr=1.0, weight_decay=0.0)
        for t in range(200):
            before = experts.detach().clone()
            experts.grad = torch.randn(2, 8, 8)
            experts.grad[1] *= t < 50  # from then on expert 1 has no tokens
            optimizer.step()
            if t in (49, 199):
                steps.append((experts.detach() - before)[1].norm())
    assert steps[1] > 0.9 * steps[0]
    assert steps[3] < 1e-3 * steps[2]
