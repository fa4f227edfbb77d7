"""Mixture of experts: many feed-forwards, of which each token passes through a few.

    p = softmax(W_r x)                                 router probabilities over E experts
    y = s Σ_{e ∈ top} w_e expert_e(x)                  top: the K likeliest, w_e = p_e / Σ_top p (or p_e), s a constant
    expert_e(x) = down_e(silu(gate_e x) ⊙ up_e x)      a SwiGLU feed-forward; with GELU: down_e gelu(up_e x)

Switch, arXiv:2101.03961, Eq. 1 and 2 (K = 1); Mixtral, arXiv:2401.04088; Qwen3-MoE, arXiv:2505.09388; shared experts:
DeepSeekMoE, arXiv:2401.06066. Parameters grow with E, the work per token only with K. One layer, T tokens (batch and
time flattened):

    logits = x W_rᵀ, in fp32                           (T, C) -> (T, E)
    probs  = softmax(logits)                           (T, E)
    index  = top K of probs + b                        (T, K), b the selection bias (E,), if balanced by bias
    w      = probs at index, / their sum               (T, K); the division if norm_topk_prob
    sort the T·K pairs (token, expert) by expert       n_rows (E,), how many assignments each expert has
    for e in range(E):                                 the loop, or one kernel for all
        rows_e = expert_e(rows of x sent to e)         (n_rows_e, C) -> (n_rows_e, C)
    y      = s Σ_k w_k · row of the k-th choice        (T, C)
    y      = y + shared experts(x)                     (T, C), if there are any: every token passes through those
    in training, for balancing: losses from logits, probs and index; counts += how often each expert was chosen

The default model has no mixture (n_expert = 0). With a mixture the defaults are K = 2, weights that sum to 1, s = K,
every assignment served, and balancing by the Switch loss; shared experts, the bias and a capacity are off. An expert is
ffn_width / (K + shared) wide, so a token costs what a dense feed-forward costs, plus E · C for the router.

**Balancing.** Top-k has no gradient: the router learns only through the weights of the experts that it picked. Only
these are trained, too, so they become better and are picked more often. Left alone, a few take almost everything: in
results/moe.md the busiest gets 3.6 times the even share, where E / K = 4 times is the most there can be; in 600 steps
that costs nothing significant. Against it, `--model.balancing`:

    aux     loss += 0.01 · E Σ_e f_e P_e     the Switch loss, arXiv:2101.03961, Eq. 4: f_e is expert e's share of the
                                             assignments, its load, P_e its mean probability. E Σ f P is 1 if f or P
                                             is even, and can be below 1 while the load is uneven: watch the load, not
                                             this loss. f is a count, so the gradient goes through P. A large weight
                                             (--aux_weight, here 0.01) costs loss, a small one does not balance
    bias    b_e ← b_e ± 0.001, each step     arXiv:2408.15664: + if expert e had less than its share, − if it had more.
                                             b decides who is chosen, never with what weight: no gradient, no term in
                                             the loss. --bias_rate sets the pace, and how far the loads swing in the end
    none

With all three pretrain.py adds the z-loss (ST-MoE, arXiv:2202.08906, Eq. 5), 0.001 (--z_weight) ·
mean(logsumexp(logits)²): it keeps the logits small, so that the softmax does not saturate.

The gradients at the router's logits l, with g_e = s dL/dy · expert_e(x) of one token; the losses are means over T:

    weights that sum to 1   dL/dl_e = w_e (g_e − Σ_top w_j g_j) in top, else 0
    w_e = p_e               dL/dl_e = p_e ([e ∈ top] g_e − Σ_top p_j g_j)
                            A step raises the logit of an expert that lowers L more than the mix does. In the second
                            an expert outside top counts as one that adds 0: its logit rises where the mix raises L.
    Switch loss             d/dl_te = (E / T) p_te (f_e − Σ_j p_tj f_j): a step lowers l_te if f_e is above the token's
                            mean of f
    z-loss                  d/dl_te = (2 / T) logsumexp(l_t) p_te

Both losses are summed over the model's mixtures: with four of them aux weighs 4 · 0.01. Only pretrain.py balances:
later stages train the router by their own loss alone, and the biases stay. (DeepSeek-V3, arXiv:2412.19437, §2.1.2, adds
b to sigmoid scores and a small loss per sequence; here b meets probabilities of about 1/E, so lower --bias_rate as E
grows.)

**Traps.**

* K = 1 with weights that sum to 1: w = p / p = 1, and the router gets no gradient but the balancing losses'
  (pretrain.py refuses it). Switch and OLMoE do not divide.
* The scale s (`routed_scale`; DeepSeek's routed_scaling_factor). A dense feed-forward cut into K parts *adds* them up;
  weights that sum to 1 take the *mean*, 1/K of that. Steps of Adam and Muon do not grow with the gradient, so with the
  same init and the same steps the branch would start and stay K times smaller. So s is K by default if the weights
  sum to 1, else 1, as in Switch and OLMoE. (Opened checkpoints of Mixtral and Qwen3-MoE have s = 1.)
* Softmax before or after the top-k? Over the K chosen logits it gives p_e / Σ_top p: the renormalised weights. So
  Mixtral, which writes it after, and Qwen3-MoE with `norm_topk_prob` are one formula.
* bf16: a probability of 0.3 is off by up to 0.001 there. So the router computes in fp32, under autocast too. (With
  --fsdp and bf16 its weights come rounded to bf16 all the same.)
* `capacity_factor`: of a forward's T tokens an expert takes at most ⌈factor · T K / E⌉ assignments, first choices
  first, then in the order of the tokens. The rest are dropped: that expert adds nothing to that token, whose other
  weights stay (load_dropped in the log). So a token's output depends on the other tokens of the micro-batch, with K > 1
  even on later ones, whose first choices are served before its second: the model is not causal, and decoding token by
  token would not give what one pass gives. Hence a capacity acts in training mode only; an opened checkpoint has none.
* A step in micro-batches. The bias does not depend on the cut, as its counts add up over micro-batches and DDP ranks;
  nor does the z-loss, a mean over tokens. A capacity does; so does the Switch loss: a mean of products f P is not
  the product of the means. It asks each micro-batch of each rank to be even, a little more than asking it of the whole.
* An expert without tokens has a gradient of 0, not None. AdamW lets it come to rest in tens of steps; Muon, which
  normalises the momentum, drives it on in its last direction for hundreds.

Simplified: pads are tokens like others, so they count; experts have no biases; no expert parallelism.

Letters: T tokens, C width, E experts, K active ones. Run it: `python moe.py`.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from support.devices import in_float64
from support.expert_counts import histogram, repeats_a_forward, sum_over_ranks
from support.expert_products import fast_experts
from support.output import run_demo


def route(logits, k, normalise=True, bias=None):
    """Router logits (T, E) -> probs (T, E), weights (T, K), index (T, K). bias (E,) takes part in the choice alone."""
    probs = logits.softmax(-1)
    index = (probs if bias is None else probs + bias).topk(k, dim=-1).indices  # (T, K)
    weights = probs.gather(-1, index)  # (T, K)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return probs, weights, index


def load_balancing_loss(router_probs, expert_index, n_expert):
    """Switch loss E Σ f_e P_e, arXiv:2101.03961, Eq. 4-6: probs (..., E), index (..., K) -> (); 1 if f or P is even.

    f is the share of all assignments and sums to 1. transformers' load_balancing_loss_func divides by the tokens
    instead and is K times as large; it also averages f and P over the layers before it multiplies them.
    """
    f = histogram(expert_index, n_expert) / expert_index.numel()  # (E,)
    return n_expert * (f * router_probs.flatten(0, -2).mean(0)).sum()


def router_z_loss(logits):
    """mean(logsumexp(logits)²), arXiv:2202.08906, Eq. 5: (..., E) -> a scalar."""
    return logits.logsumexp(-1).square().mean()


def within_capacity(index, n_expert, factor):
    """Which assignments are served if every expert takes at most its capacity: index (T, K) -> bool (T, K)."""
    T, K = index.shape
    capacity = math.ceil(round(factor * T * K / n_expert, 6))  # 1.1 · 50 is 55.00000000000001: no reason for a 56th
    queue = index.t().flatten()  # (K·T,): all first choices, then all second choices
    asked = F.one_hot(queue, n_expert).cumsum(0, dtype=torch.int32)  # (K·T, E): asked for each so far, with this one
    place = asked.gather(1, queue[:, None])[:, 0] - 1  # (K·T,) in the queue of its expert
    return (place < capacity).view(K, T).t()


def expert(x, gate, up, down):
    """One feed-forward: x (T, C), gate (inner, C) or None for GELU, up (inner, C), down (C, inner) -> (T, C)."""
    if gate is None:
        return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def dense_experts(x, index, weights, gate, up, down):
    """The formula: every token through every expert, most of it times 0. x (T, C), index and weights (T, K), the
    experts' matrices (E, inner, C) and down (E, C, inner) -> (T, C). E / K times the work; the tests' reference."""
    mix = weights.new_zeros(len(x), len(up)).scatter(1, index, weights)  # (T, E)
    gates = [None] * len(up) if gate is None else gate
    return sum(mix[:, e, None] * expert(x, gates[e], up[e], down[e]) for e in range(len(up)))


def experts_loop(x, tokens, n_rows, gate, up, down):
    """A loop over the experts. x (T, C); tokens (rows,), the rows of x to compute, expert 0's first; n_rows (E,), how
    many are each expert's -> the experts' outputs for these rows of x, (rows, C)."""
    # unbind, not gate[e]: the gradient of an index is a whole (E, inner, C) of zeros, and there would be E of them.
    gates = [None] * len(up) if gate is None else gate.unbind()
    pieces = zip(x.index_select(0, tokens).split(n_rows.tolist()), gates, up.unbind(), down.unbind(), strict=True)
    out = [expert(*piece) for piece in pieces if len(piece[0])]
    return torch.cat(out) if out else x[:0]


def sparse_experts(x, index, weights, gate, up, down, keep=None, experts=experts_loop):
    """The same as dense_experts: each token through its K experts only, and not where keep (T, K) is False. experts
    computes the products: `experts_loop`, or a faster equal of it (support/expert_products.py)."""
    T, K = index.shape
    chosen = index.flatten()  # (T·K,), entry t·K + k is token t's k-th choice
    order = chosen.argsort(stable=True)  # the entries, sorted by expert; order // K: their tokens
    if keep is not None:
        order = order[keep.flatten()[order]]
    n_rows = histogram(chosen[order], len(up))  # (E,)
    rows = experts(x, order // K, n_rows, gate, up, down)  # (T·K or fewer, C)
    rows = rows.new_zeros(T * K, x.shape[1]).index_copy(0, order, rows)  # back in the tokens' order
    return (rows.unflatten(0, (T, K)) * weights[..., None]).sum(1)  # (T, C)


class MoE(nn.Module):
    """Router, experts and shared experts in place of a feed-forward: (..., C) -> (..., C).

    Shared experts stand side by side in one of width n_shared_expert · inner, as DeepSeek's shared_experts. With
    balancing by bias the buffer `selection_bias` (E,) is DeepSeek's gate.e_score_correction_bias.
    """

    def __init__(self, config):
        super().__init__()
        config = config.resolved() if hasattr(config, "resolved") else config  # else a plain namespace (demo)
        C, E, inner = config.width, config.n_expert, config.expert_width or config.ffn_width
        if not 1 <= config.n_expert_active <= E:
            raise ValueError(f"n_expert_active is {config.n_expert_active}; it must be between 1 and n_expert, {E}")
        self.n_expert, self.n_active, self.normalise = E, config.n_expert_active, config.norm_topk_prob
        self.balancing, self.capacity_factor, self.scale = config.balancing, config.capacity_factor, config.routed_scale
        gated, shared_width = config.activation == "swiglu", config.n_shared_expert * inner
        self.router = nn.Linear(C, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, inner, C)) if gated else None
        self.up = nn.Parameter(torch.empty(E, inner, C))
        self.down = nn.Parameter(torch.empty(E, C, inner))
        self.shared = None
        if shared_width:
            self.shared = nn.ModuleDict({"up": nn.Linear(C, shared_width, bias=False)})
            self.shared["down"] = nn.Linear(shared_width, C, bias=False)
            if gated:
                self.shared["gate"] = nn.Linear(C, shared_width, bias=False)
        self.register_buffer("selection_bias", torch.zeros(E) if self.balancing == "bias" else None)
        self.register_buffer("counts", torch.zeros(E, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)
        self.losses = None  # (aux, z) of the last training forward, with their graph
        small = 0.02 / math.sqrt(2 * getattr(config, "n_layer", 1))  # where the branch writes into the residual stream
        for name, p in self.named_parameters():
            nn.init.normal_(p, std=small if "down" in name else 0.02)

    def __getstate__(self):
        """For copy.deepcopy and pickle, which refuse tensors that have a graph."""
        return self.__dict__ | {"losses": None}

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)  # (T, C)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)  # fp32, or float64
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))  # (T, E)
        # probs (T, E), weights and index (T, K)
        probs, weights, index = route(logits, self.n_active, self.normalise, self.selection_bias)
        keep = None
        if self.training and self.capacity_factor is not None:
            keep = within_capacity(index, self.n_expert, self.capacity_factor)  # (T, K)
        if self.training:
            self._record(logits, probs, index, keep)
        experts = fast_experts(x, self.up, experts_loop)
        y = sparse_experts(x, index, self.scale * weights, self.gate, self.up, self.down, keep, experts)  # (T, C)
        if self.shared is not None:
            gate = self.shared["gate"].weight if "gate" in self.shared else None
            y = y + expert(x, gate, self.shared["up"].weight, self.shared["down"].weight)
        return y.to(x.dtype).view(shape)

    def _record(self, logits, probs, index, keep):
        aux = load_balancing_loss(probs, index, self.n_expert) if self.balancing == "aux" else probs.new_zeros(())
        losses = aux, router_z_loss(logits)
        if repeats_a_forward():  # activation checkpointing needs the losses computed again, but counted once
            return
        self.losses = losses
        self.counts += histogram(index, self.n_expert)
        if keep is not None:
            self.dropped += (~keep).sum()


def moe_layers(model):
    return [m for m in model.modules() if isinstance(m, MoE)]


def balancing_loss(model, aux_weight, z_weight):
    """What training adds to the loss per token, a scalar: aux_weight · Switch loss (0 unless the layers balance by it)
    + z_weight · z-loss, summed over the MoE layers, of the last forward in training mode, on this rank; 0 without MoE
    layers. Call it between that forward and its backward, and multiply by the micro-batch's share of the step's tokens.
    """
    layers = moe_layers(model)
    if any(layer.losses is None for layer in layers):
        raise RuntimeError("balancing_loss needs a forward in training mode first: model.train()")
    aux, z = (sum(layer.losses[i] for layer in layers) for i in (0, 1))
    return torch.as_tensor(aux_weight * aux + z_weight * z)


@torch.no_grad()
def update_biases(model, u):
    """After each optimizer step: move the selection biases by ±u against the step's load, over all its micro-batches
    and ranks, and start counting anew. Layers that do not balance by bias only start anew. All ranks must call, and all
    make the same move."""
    layers = moe_layers(model)
    for layer, counts in zip(layers, sum_over_ranks([layer.counts for layer in layers]), strict=True):
        if layer.selection_bias is not None:
            counts = in_float64(counts)  # (E,)
            layer.selection_bias += u * torch.sign(counts.mean() - counts).to(layer.selection_bias)
        layer.counts.zero_()
        layer.dropped.zero_()


def demo():
    """Four tokens, three experts, two active: weights, loads, the Switch loss, the bias, a capacity. Then 100 steps."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    again, weights, index = route(probs.log(), 2)
    torch.testing.assert_close(again, probs)
    torch.testing.assert_close(weights, torch.tensor([[5 / 8, 3 / 8], [5 / 8, 3 / 8], [2 / 3, 1 / 3], [5 / 8, 3 / 8]]))
    torch.testing.assert_close(weights, probs.log().gather(1, index).softmax(-1))  # softmax after the top-k
    print("three experts, K = 2    probabilities   experts  weights")
    for t in range(4):
        row = "   ".join("  ".join(f"{x:.3g}" for x in numbers[t].tolist()) for numbers in (probs, index, weights))
        print(f"  token {t}{'':<15}{row}")
    counts = histogram(index, 3)
    assert counts.tolist() == [3, 4, 1]
    switch = load_balancing_loss(probs, index, 3)  # f = (3, 4, 1) / 8, P = (0.45, 0.3, 0.25)
    assert abs(switch - 3 * (3 / 8 * 0.45 + 4 / 8 * 0.3 + 1 / 8 * 0.25)) < 1e-6
    print(f"  assignments {counts.tolist()}: Switch loss 3 (3/8 · 0.45 + 4/8 · 0.3 + 1/8 · 0.25) = {switch:.2f}")
    logits, f = probs.log().requires_grad_(), counts / 8
    (slope,) = torch.autograd.grad(load_balancing_loss(logits.softmax(-1), index, 3), logits)
    torch.testing.assert_close(slope, 3 / 4 * probs * (f - (probs @ f)[:, None]))
    print("  its gradient at the logits of token 0: " + "  ".join(f"{v:+.3f}" for v in slope[0].tolist()), end="")
    print(": expert 1, the busiest, goes down most, expert 2 up")
    bias = 0.06 * torch.sign(counts.double().mean() - counts).float()  # the even share is 8/3
    _, moved, chosen = route(probs.log(), 2, bias=bias)
    assert histogram(chosen, 3).tolist() == [3, 2, 3]
    torch.testing.assert_close(moved[0], torch.tensor([5 / 7, 2 / 7]))  # tokens 0 and 1 go to experts 0 and 2 now
    print("  with a bias of (−0.06, −0.06, +0.06) they are [3, 2, 3]; the weights come from p alone")
    keep = within_capacity(index, 3, 1.0)  # ⌈8/3⌉ = 3 each, and expert 1 has four
    assert keep.tolist() == [[True, True], [True, True], [True, True], [True, False]]
    print("  at a capacity factor of 1 an expert takes 3: the second choice of token 3 is dropped")

    def layer(balancing):  # TransformerConfig's fields; this file comes before that one
        sizes = dict(width=24, expert_width=32, n_expert=8, n_expert_active=2, n_shared_expert=0)
        choices = dict(activation="swiglu", norm_topk_prob=True, routed_scale=1.0, capacity_factor=None)
        return MoE(SimpleNamespace(**sizes, **choices, balancing=balancing))

    torch.manual_seed(0)
    moe = layer("none")
    x = torch.randn(4, 64, 24) + torch.randn(24)  # tokens that have something in common: the router will lean
    moe.router.weight.data *= 10
    _, weights, index = route(F.linear(x.flatten(0, 1), moe.router.weight), 2)
    dense = dense_experts(x.flatten(0, 1), index, weights, moe.gate, moe.up, moe.down)
    worst = (moe(x).flatten(0, 1) - dense).abs().max()
    assert worst < 1e-6
    print(f"\neight experts, 256 tokens: two experts per token = all experts, most of them times 0, up to {worst:.1e}")

    print(f"{'load in multiples of the even share':<40}{'least':>7}{'most':>7}")
    titles = {"none": "as it is", "aux": "100 steps down the Switch loss", "bias": "100 steps of the bias by ± 0.01"}
    for balancing, steps in (("none", 0), ("aux", 100), ("bias", 100)):
        balanced = layer(balancing)
        balanced.load_state_dict(moe.state_dict(), strict=False)  # a selection bias begins at 0
        optimizer = torch.optim.SGD([balanced.router.weight], lr=0.1)
        for _ in range(steps):
            balanced(x)
            if balancing == "aux":
                optimizer.zero_grad()
                balancing_loss(balanced, aux_weight=1.0, z_weight=0.0).backward()
                optimizer.step()
            update_biases(balanced, 0.01)
        balanced(x)
        load = 8 * balanced.counts / balanced.counts.sum()
        print(f"  {titles[balancing]:<38}{load.min():>7.2f}{load.max():>7.2f}")
        assert steps == 0 or (load.min() > 0.5 and load.max() < 2)


if __name__ == "__main__":
    run_demo(demo)
