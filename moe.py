"""Mixture of experts: many feed-forwards, of which each token passes through a few.

    p = softmax(W_r x)                                       router probabilities over E experts       (T, E)
    S = the K experts with the largest p                     (p + b, b the selection bias, if balanced by bias)
    y = s Σ_{e ∈ S} w_e down_e(silu(gate_e x) ⊙ up_e x)      w_e = p_e / Σ_{S} p, or p_e itself        (T, C)

Parameters grow with E, the work per token only with K. Here the softmax stands *before* the top-k. Taken after it,
over the K chosen logits, it gives p_e / Σ_S p, the renormalised weights: exp cancels the rest of the sum. So Mixtral
(arXiv:2401.04088), which writes it after, and Qwen3-MoE with `norm_topk_prob` are one formula. Not renormalised
(Switch; OLMoE) the weights sum to less than 1, and with K = 1 it must be so: p / p = 1 would leave the router without
a gradient.

The constant s (`routed_scale`; DeepSeek-V3's routed_scaling_factor) is K by default if the weights sum to 1, else 1. A
dense feed-forward cut into K parts adds the parts up, s = 1 and weights that sum to 1 take their mean instead: the
branch would write 1/K of the dense one's, and an optimizer whose steps do not depend on the gradient's size (Adam,
Muon) does not make up for it.

The choice itself has no gradient: a router only learns from the experts that it picked, which learn more than the
others and are picked more often. Left alone, a few experts take everything. Against it:

* Switch loss (arXiv:2101.03961, Eq. 4): E Σ_e f_e P_e, f the share of the assignments, P the mean probability; 1 if
  even. f is a count without a gradient, the price on P. A strong price bends the model, a weak one does not help.
* bias only (arXiv:2408.15664; in DeepSeek-V3, arXiv:2412.19437, §2.1.2, beside a small loss per sequence): b_e moves by
  +u after a step in which expert e had less than its share and by −u if it had more. b decides who is chosen, never
  with what weight: no gradient, no price. DeepSeek adds it to sigmoid scores, here it meets probabilities of about 1/E.
  u sets the pace, and the swing that remains.
* z-loss (ST-MoE, arXiv:2202.08906, Eq. 5): mean(logsumexp(W_r x)²) keeps the logits small, so that the softmax can
  still change its mind. The router computes in fp32 even under autocast (with --fsdp and bf16 from weights that arrive
  in bf16): a bf16 probability of 0.3 is off by 0.001.

Dropless is the default: experts get what they are sent. With `capacity_factor` an expert takes at most
⌈factor · T K / E⌉ assignments, first choices first, then in the order of the tokens; what is over passes by on the
residual stream alone and is counted. Only in training mode: whether a token is dropped depends on those beside it,
so decoding by steps would differ from one pass, and a rollout from its scoring. For pretraining, then, and for nothing
else: an opened checkpoint is dropless.

What the statistics mean when a step is cut. Per layer, `counts` adds up over the training forwards since the last
`update_biases`, so over all micro-batches of a step, and the functions below sum it over the DDP ranks; the forward
that activation checkpointing repeats inside `backward` is not counted again. Bias balancing and z-loss, a mean over
tokens, thus do not depend on the cut. The Switch loss does: f and P are of *this rank's micro-batch*, and a mean of
products is not the product of the means. It asks each part to be even, which is a little more than asking it of the
whole. The losses belong to the last forward; call `balancing_losses` between it and its backward. Reentrant
checkpointing (`use_reentrant=True`) builds no graph in that forward: the losses then have no gradient.

Simplified: pads are tokens like others, so they count; experts have no biases; no expert parallelism. Only pretrain.py
balances: later stages train the router by their own loss alone, and the biases stay.

Letters: T tokens (batch and time flattened), C width, E experts, K active ones. Run it: `python moe.py`.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import distributed, nn


def route(logits, k, normalise=True, bias=None):
    """Router logits (T, E) -> probs (T, E), weights (T, K), index (T, K). bias (E,) takes part in the choice alone."""
    probs = logits.softmax(-1)
    index = (probs if bias is None else probs + bias).topk(k, dim=-1).indices  # (T, K)
    weights = probs.gather(-1, index)  # (T, K)
    return probs, weights / weights.sum(-1, keepdim=True) if normalise else weights, index


def tally(index, n):
    """How often each of 0 … n−1 stands in index: (n,). bincount would wait for the GPU to know its own size."""
    index = index.flatten()
    return torch.zeros(n, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def load_balancing_loss(router_probs, expert_index, n_expert):
    """Switch loss E Σ f_e P_e, arXiv:2101.03961, Eq. 4-6: probs (..., E), index (..., K) -> a scalar, 1 when even.

    f is the share of all assignments and sums to 1. transformers' load_balancing_loss_func divides by the tokens
    instead and is K times as large; it also averages f and P over the layers before it multiplies them.
    """
    f = tally(expert_index, n_expert) / expert_index.numel()  # (E,)
    return n_expert * (f * router_probs.flatten(0, -2).mean(0)).sum()


def router_z_loss(logits):
    """mean(logsumexp(logits)²), arXiv:2202.08906, Eq. 5: (..., E) -> a scalar."""
    return logits.logsumexp(-1).square().mean()


def within_capacity(index, n_expert, factor):
    """Which assignments an expert of limited room takes: index (T, K) -> True or False (T, K)."""
    T, K = index.shape
    capacity = math.ceil(round(factor * T * K / n_expert, 6))  # 1.1 · 50 is 55.00000000000001: no reason for a 56th
    queue = index.t().flatten()  # (K·T,): all first choices, then all second choices
    order = queue.argsort(stable=True)
    counts = tally(queue, n_expert)
    place = torch.empty_like(queue)  # in the queue of its expert
    place[order] = torch.arange(T * K, device=index.device) - (counts.cumsum(0) - counts)[queue[order]]
    return (place < capacity).view(K, T).t()


def expert(x, gate, up, down):
    """One feed-forward: x (T, C), gate (inner, C) or None for GELU, up (inner, C), down (C, inner) -> (T, C)."""
    if gate is None:
        return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def dense_experts(x, index, weights, gate, up, down):
    """The formula: every token through every expert, most of it times 0. x (T, C), index and weights (T, K), the
    experts' matrices (E, inner, C) and down (E, C, inner) -> (T, C). E / K times the work; the oracle of the tests."""
    mix = weights.new_zeros(len(x), len(up)).scatter(1, index, weights)  # (T, E)
    inner = torch.einsum("tc,eic->tei", x, up)  # (T, E, inner)
    if gate is None:
        inner = F.gelu(inner, approximate="tanh")
    else:
        inner = F.silu(torch.einsum("tc,eic->tei", x, gate)) * inner
    return torch.einsum("tei,eci,te->tc", inner, down, mix)


def slices_loop(x, counts, gate, up, down):
    """Rows sorted by expert, counts (E,) of them each -> the same rows after their expert. A loop over E slices."""
    # unbind, not gate[e]: the gradient of an index is a whole (E, inner, C) of zeros, and there would be E of them.
    gates = [None] * len(up) if gate is None else gate.unbind()
    pieces = zip(x.split(counts.tolist()), gates, up.unbind(), down.unbind(), strict=True)
    out = [expert(*piece) for piece in pieces if len(piece[0])]
    return torch.cat(out) if out else x


def slices_grouped(x, counts, gate, up, down):
    """The same as slices_loop; in bf16 on a GPU one kernel per matrix, and no transfer of the counts to the host."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    ends = counts.cumsum(0).to(torch.int32)  # (E,)

    def linear(x, weight):
        return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=ends)

    if gate is None:
        return linear(F.gelu(linear(x, up), approximate="tanh"), down)
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def sparse_experts(x, index, weights, gate, up, down, keep=None, slices=slices_loop, whole=1):
    """The fast path: each token through its K experts, except where keep (T, K) is False. As dense_experts.

    whole: rows are added until each expert has a multiple of `whole`; what comes of them is thrown away.
    """
    (T, K), E = index.shape, len(up)
    queue = index.flatten()  # (T·K,), entry t·K + k is token t's k-th choice
    order = queue.argsort(stable=True)
    if keep is not None:
        order = order[keep.flatten()[order]]
    counts = tally(queue[order], E)
    if whole > 1:  # the added rows are the last token's, and bound for an entry after all others
        parts = [F.pad(part, (0, -len(part) % whole), value=T * K) for part in order.split(counts.tolist())]
        order, counts = torch.cat(parts), torch.tensor([len(part) for part in parts])
    rows = slices(x.index_select(0, (order // K).clamp(max=T - 1)), counts, gate, up, down)  # (T·K or so, C)
    rows = rows.new_zeros(T * K + 1, x.shape[1]).index_copy(0, order, rows)[:-1]  # back in the tokens' order
    return (rows.unflatten(0, (T, K)) * weights[..., None]).sum(1)  # (T, C)


class MoE(nn.Module):
    """Router, experts and shared experts in the place of a feed-forward: (..., C) -> (..., C).

    The weights are Mixtral's and Qwen3-MoE's: `router.weight` (E, C) is their gate.weight; `gate[e]`, `up[e]` (inner,
    C) and `down[e]` (C, inner) are experts.e.gate_proj, up_proj and down_proj (Mixtral: w1, w3, w2). Shared experts
    stand side by side in one of n_shared_expert · inner, as DeepSeek's shared_experts. With balancing by bias the
    buffer `selection_bias` (E,) is DeepSeek's gate.e_score_correction_bias.
    """

    def __init__(self, config):
        super().__init__()
        config = config.resolved() if hasattr(config, "resolved") else config
        C, E, inner = config.width, config.n_expert, config.expert_width or config.ffn_width
        if not 1 <= config.n_expert_active <= E:
            raise ValueError(f"n_expert_active is {config.n_expert_active}; it must be between 1 and n_expert, {E}")
        self.n_expert, self.n_active, self.normalise = E, config.n_expert_active, config.norm_topk_prob
        self.balancing, self.capacity_factor, self.scale = config.balancing, config.capacity_factor, config.routed_scale
        gated, wide = config.activation == "swiglu", config.n_shared_expert * inner
        self.router = nn.Linear(C, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, inner, C)) if gated else None
        self.up = nn.Parameter(torch.empty(E, inner, C))
        self.down = nn.Parameter(torch.empty(E, C, inner))
        self.shared = None
        if wide:
            self.shared = nn.ModuleDict({"up": nn.Linear(C, wide, bias=False), "down": nn.Linear(wide, C, bias=False)})
            if gated:
                self.shared["gate"] = nn.Linear(C, wide, bias=False)
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
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.router.weight.to(wide))  # (T, E)
        probs, weights, index = route(logits, self.n_active, self.normalise, self.selection_bias)
        keep = None
        if self.training and self.capacity_factor is not None:
            keep = within_capacity(index, self.n_expert, self.capacity_factor)
        if self.training:
            self._record(logits, probs, index, keep)
        # The kernel takes bf16 and rows of whole 16 bytes; for anything else torch loops over the experts too.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        fits = dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and self.up.shape[1] % 8 == 0
        slices = slices_grouped if x.is_cuda and fits else slices_loop
        # On a CPU oneDNN compiles new bf16 kernels for each number of rows that it has not seen: let them be few.
        whole = 32 if dtype == torch.bfloat16 and not x.is_cuda else 1
        matrices = self.gate, self.up, self.down
        y = sparse_experts(x, index, self.scale * weights, *matrices, keep, slices, whole)  # (T, C)
        if self.shared is not None:
            gate = self.shared["gate"].weight if "gate" in self.shared else None
            y = y + expert(x, gate, self.shared["up"].weight, self.shared["down"].weight)
        return y.to(x.dtype).view(shape)

    def _record(self, logits, probs, index, keep):
        aux = load_balancing_loss(probs, index, self.n_expert) if self.balancing == "aux" else probs.new_zeros(())
        losses = (aux, router_z_loss(logits))  # made in a repeated forward too, which must save what the first one did
        if torch._C._current_graph_task_id() >= 0:  # inside a backward: checkpointing repeats the forward
            return
        self.losses = losses
        self.counts += tally(index, self.n_expert)
        if keep is not None:
            self.dropped += (~keep).sum()


def moe_layers(model):
    return [m for m in model.modules() if isinstance(m, MoE)]


def balancing_losses(model):
    """{"aux", "z"}: scalars summed over the MoE layers, of the last forward in training mode, on this rank.

    aux is 0 unless the layers balance by it. Multiply both with the micro-batch's share of the step's tokens.
    """
    layers = moe_layers(model)
    if any(layer.losses is None for layer in layers):
        raise RuntimeError("balancing_losses needs a forward in training mode first: model.train()")
    return {name: sum(layer.losses[i] for layer in layers) for i, name in enumerate(("aux", "z"))}


def balancing_price(model, aux_weight, z_weight):
    """What a training loss adds per token: aux_weight · aux + z_weight · z of `balancing_losses`, a scalar; 0 without
    MoE layers."""
    losses = balancing_losses(model)
    return torch.as_tensor(aux_weight * losses["aux"] + z_weight * losses["z"])


def _total(counters):
    """One tensor per layer -> stacked, and summed over the ranks: all ranks must call."""
    total = torch.stack(counters)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total


def expert_load(model):
    """(layers, E): each expert's share of the assignments since the last update_biases. All ranks must call."""
    counts = _total([layer.counts for layer in moe_layers(model)])
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def load_record(model):
    """`expert_load` in multiples of the even share, as the log keeps it: the least, the most, and load/LAYER/EXPERT."""
    layers = moe_layers(model)
    load = expert_load(model) * layers[0].n_expert  # (layers, E)
    record = {"load_min": load.min().item(), "load_max": load.max().item()}
    return record | {f"load/{i}/{e}": x for i, row in enumerate(load.tolist()) for e, x in enumerate(row)}


def dropped_assignments(model):
    """(layers,): assignments over the experts' capacity since the last update_biases. All ranks must call."""
    return _total([layer.dropped for layer in moe_layers(model)])


@torch.no_grad()
def update_biases(model, u):
    """After each optimizer step: move the selection biases by ±u against the step's load, and start counting anew.

    Layers that do not balance by bias only start anew. All ranks must call, and all make the same move.
    """
    layers = moe_layers(model)
    for layer, counts in zip(layers, _total([layer.counts for layer in layers]), strict=True):
        if layer.selection_bias is not None:
            layer.selection_bias += u * torch.sign(counts.double().mean() - counts).to(layer.selection_bias)
        layer.counts.zero_()
        layer.dropped.zero_()


def main():
    def layer(**changes):  # TransformerConfig's fields; this file comes before that one
        config = dict(width=24, expert_width=32, activation="swiglu", n_expert=8, n_expert_active=2)
        config |= dict(n_shared_expert=0, norm_topk_prob=True, balancing="none", capacity_factor=None)
        config |= dict(routed_scale=1.0) | changes
        return MoE(SimpleNamespace(**config))

    torch.manual_seed(0)
    moe = layer()
    x = torch.randn(4, 64, 24) + torch.randn(24)  # tokens that have something in common: the router will lean
    moe.router.weight.data *= 10
    logits = F.linear(x.flatten(0, 1), moe.router.weight)
    probs, weights, index = route(logits, 2)
    after = logits.gather(1, index).softmax(-1)  # softmax after the top-k
    worst = (moe(x).flatten(0, 1) - dense_experts(x.flatten(0, 1), index, weights, moe.gate, moe.up, moe.down)).abs()
    assert worst.max() < 1e-6
    assert (weights - after).abs().max() < 1e-6
    even = load_balancing_loss(torch.full((8, 4), 0.25), torch.arange(16).view(8, 2) % 4, 4)
    assert abs(even.item() - 1) < 1e-6
    print(f"sorted slices = all experts for all tokens: largest difference {worst.max():.1e}")
    print(f"softmax before top-k, renormalised = after: {(weights - after).abs().max():.1e}\n")

    tight = layer(capacity_factor=1.0)
    tight.load_state_dict(moe.state_dict())
    tight(x)
    lost = dropped_assignments(tight).item()
    load = expert_load(tight)[0]
    room = math.ceil(2 * 256 / 8)
    assert lost == (load * 512 - room).clamp(min=0).sum().round()  # what each expert has too many of

    print(f"{'load in multiples of the even share':<40}{'least':>7}{'most':>7}   Switch loss")
    for balancing, steps in (("none", 0), ("aux", 100), ("bias", 100)):
        balanced = layer(balancing=balancing)
        balanced.load_state_dict(moe.state_dict() | ({"selection_bias": torch.zeros(8)} if balancing == "bias" else {}))
        optimizer = torch.optim.SGD([balanced.router.weight], lr=0.1 if balancing == "aux" else 0.0)
        for _ in range(steps):
            balanced(x)
            if balancing == "aux":
                optimizer.zero_grad()
                balancing_losses(balanced)["aux"].backward()
                optimizer.step()
            update_biases(balanced, 0.01)
        balanced(x)
        load = 8 * expert_load(balanced)[0]
        probs, _, index = route(F.linear(x.flatten(0, 1), balanced.router.weight), 2, bias=balanced.selection_bias)
        switch = load_balancing_loss(probs, index, 8)
        title = {"none": "as it is", "aux": "100 steps down the Switch loss", "bias": "100 steps of the bias by ±0.01"}
        print(f"{title[balancing]:<40}{load.min():>7.2f}{load.max():>7.2f}{switch:>14.3f}")
        assert steps == 0 or (load.min() > 0.5 and load.max() < 2)
    print(f"\nat a capacity factor of 1, {lost} of {512} assignments of the unbalanced router are dropped")


if __name__ == "__main__":
    main()
