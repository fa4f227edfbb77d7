"""LoRA and DoRA: train a thin correction to frozen weights, then fold it in.

    LoRA   y = W x + s B A x            W (out, in) frozen, A (r, in), B (out, r), s = α / r     Eq. 3, arXiv:2106.09685
    DoRA   y = m ⊙ (V / ‖V‖) x          V = W + s B A, ‖·‖ of each row, m (out,)                 Eq. 5, arXiv:2402.09353

Full fine-tuning learns W + ΔW with a ΔW of W's size. LoRA's claim is that the ΔW of an adaptation has low rank, so that
a product of two thin matrices can hold it: r (in + out) numbers instead of in · out, 1.6 % of 1,024 x 1,024 at r = 8.
One layer:

    start     A = random, B = 0, m = ‖W‖           the layer applies W' = W at first: exactly the given model
    forward   low = A x                            (..., in) -> (..., r)
              y = W x + s B low                    (..., out)
              y = m / ‖W + s B A‖ ⊙ y              DoRA only; a bias is frozen, and added after it
    backward, one token (gradients of A, B, m add up over tokens); g = dL/dy (out,); δ = g, for DoRA δ = m / ‖V‖ ⊙ g:
              dL/dB = s δ (A x)ᵀ                   (out, r)
              dL/dA = s (Bᵀ δ) xᵀ                  (r, in)
              dL/dx = Wᵀ δ + s Aᵀ (Bᵀ δ)           (in,)
              dL/dm = g ⊙ V x / ‖V‖                (out,)
    merge     W ← W + s B A,  or m / ‖V‖ ⊙ V       a plain Linear again: no cost in decoding

dL/dW = δ xᵀ, a third of the work of a full training step, is never formed. Without a gradient W needs no moments
either: of 16 bytes per weight under AdamW (itself, its gradient, two moments, in fp32) 4 remain, and of the 12 under
Muon, which has one moment, also 4. Activations stay: dL/dA needs x.

`rank` is 0 by default: every stage trains all weights. With --lora.rank 8 the defaults run LoRA with α = 16 on all
Linear layers of attention and feed-forward (of a mixture: the router and the shared experts); DoRA is off.

In a training stage whose Config has `lora: LoraConfig` (all from sft.py on but encoder, reward_model, grpo_plain):

    add_lora(policy, **asdict(config.lora), seed=config.seed)    # rank 0 adds none. Freezes all but the adapters
    optimizers = make_optimizers(policy, ...)                    # as without: a frozen weight has no gradient, no step
    with merged(policy): generate(policy, ...)                   # decodes at the plain model's speed
    with lora_off(policy): ...                                   # the model as it came: the reference policy of DPO,
                                                                 # PPO and GRPO, with no second copy in memory

Why B starts at 0 and A does not: were both 0, both gradients would stay 0. With B = 0, A's is 0 only in the first step.
A is drawn from U(−1/√in, 1/√in), as in nn.Linear and in PEFT, Hugging Face's library of adapters (in the paper
Gaussian). The 1/r in s is for Adam. Take one token x: Adam's first step moves each B_ij by lr against the sign of
δ_i (A x)_j, so the r terms of (B A x)_i have one sign and add up; 1/r undoes that, and the learning rate survives a
change of r. Under Muon B A x grows only as √r, so there a larger r learns more slowly. Weight decay pulls A and B
towards 0, so LoRA's W' towards the given model; DoRA's m, a vector, does not decay: only its directions go back.

Why DoRA: plain LoRA couples length and direction, a longer ΔW changes both. DoRA learns them apart, as weight
normalisation does. (The paper takes columns; its authors' code and PEFT take output rows, and so does this file.) With
G = dL/dW' and v̂ = V_i/‖V_i‖ the exact gradients of row i are

    dL/dm_i = G_i · v̂                     dL/dV_i = (m_i/‖V_i‖) (G_i − (G_i · v̂) v̂)

§4.3 of the paper treats ‖V‖ as a constant, and so does this file: dL/dV_i = (m_i/‖V_i‖) G_i, without the graph of an
(out, in) matrix; the paper measures next to no loss of accuracy. The price of DoRA: ‖V‖ is computed in every forward
pass, r·out·in multiplications and an (out, in) matrix per layer, however short the batch.

What is saved. `state_dict()` of a model with adapters is that of the merged model, so `save_pretrained` writes plain
checkpoints that anyone opens (support/frozen_linear.py). support/lora_files.py keeps the adapters themselves: for
resuming, and in PEFT's files. A layer's `.weight` is the merged one too, so code that reads weights instead of calling
layers stays right.

Simplified: Linear layers only (no embeddings, no batched experts). No dropout on the adapter's input: it would make
rollout and training differ in RL. (Against overfitting the stages keep the checkpoint that validates best.) One adapter
at a time.

Run it: `python lora.py`.
"""

import contextlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from support.checks import Positive, Whole, check
from support.errors import CheckpointError
from support.frozen_linear import FrozenLinear
from support.lora_targets import chosen_linears
from support.output import run_demo
from support.sharding import whole
from transformer import Transformer, TransformerConfig


@dataclass
class LoraConfig:
    """Low-rank adapters: train them instead of the weights."""

    rank: Whole = 0
    """Rank r of the adapters; 0 trains all weights."""
    alpha: Positive = 16.0
    """The adapter's output is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["attn.*", "ffn.*"])
    """Which Linear layers: patterns (* ? [...]) for the end of their names, such as wq, attn.* or blocks.0.*."""
    dora: bool = False
    """DoRA: learn the length of each output row apart from its direction."""

    def __post_init__(self):
        check(self, CheckpointError, dashes="lora.")
        if not self.targets:
            raise CheckpointError("lora.targets is empty; name the layers to adapt, for example wq and wv")
        if not self.rank and (self.alpha, self.targets, self.dora) != (16.0, ["attn.*", "ffn.*"], False):
            raise CheckpointError("lora.rank is 0: alpha, targets and dora do nothing; give a rank or leave them out")


class LoRALinear(FrozenLinear):
    """A frozen Linear and its adapter: x (..., in) -> (..., out). From outside it looks like a Linear of the merged
    weight: it saves and loads as one."""

    acts_as = nn.Linear  # support/fast_decode.py may read .weight and .bias instead of calling the layer

    def __init__(self, linear, rank, alpha, dora=False, generator=None):
        super().__init__(linear)  # base_weight (out, in) and bias: the Linear's own tensors, frozen
        self.rank, self.alpha, self.s, self.enabled = rank, alpha, alpha / rank, True
        # Adapters are fp32 even on bf16 weights, which cannot take a small step: it rounds to nothing.
        like = {"dtype": torch.promote_types(linear.weight.dtype, torch.float32), "device": linear.weight.device}
        A = torch.empty(rank, self.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(self.in_features)
        self.lora_A = nn.Parameter(A.to(**like))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.magnitude = nn.Parameter(self.row_norms()) if dora else None  # m (out,)

    def direction(self):
        """V = W + s B A (out, in), rows of any length, in the adapter's dtype, whatever autocast says."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.base_weight.to(self.lora_A.dtype) + self.s * (self.lora_B @ self.lora_A)

    @torch.no_grad()  # §4.3 of DoRA: a constant for the gradient
    def row_norms(self):
        # the clamp: a row of zeros divided by its length would be NaN
        return torch.linalg.vector_norm(self.direction(), dim=1).clamp_min(1e-12)  # (out,)

    @property
    def weight(self):
        """The merged weight, (out, in), in the base's dtype; the gradient flows to the adapter."""
        if not self.enabled:
            return self.base_weight
        weight = self.direction()
        if self.magnitude is not None:
            weight = (self.magnitude / self.row_norms())[:, None] * weight
        return weight.to(self.base_weight.dtype)

    def forward(self, x):
        y = F.linear(x, self.base_weight)  # (..., out)
        if self.enabled:
            low = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (..., r)
            y = y + self.s * F.linear(low, self.lora_B).to(y.dtype)
            if self.magnitude is not None:
                y = (self.magnitude / self.row_norms() * y).to(y.dtype)  # bf16 would round a factor of 1.003 to 1
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def reset(self):
        """B to zero and m to ‖W‖: the adapter does nothing again."""
        self.lora_B.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_norms())


# ---------------------------------------------------------------------------------------------------------------
# Putting adapters into a model, and out of it.


def lora_layers(model):
    """{name: layer} of the layers with an adapter."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def is_merged(model):
    """Whether merge_lora was called and not undone."""
    return any(hasattr(module, "unmerged") for module in model.modules())


def _replace(model, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def add_lora(model, rank, alpha, targets, dora=False, *, seed=0):
    """Freeze `model` and give each Linear that `targets` names an adapter, in place; returns the model.

    targets: patterns for the end of a layer's name; CheckpointError on one that matches no Linear. rank 0 changes
    nothing. The start values are those of `seed` on every rank; no random number of the caller's is used.
    """
    config = LoraConfig(rank, alpha, list(targets), dora)  # checks
    if config.rank == 0:
        return model
    if lora_layers(model) or is_merged(model):
        raise CheckpointError("this model has adapters already; drop_lora (support/lora_files.py) removes them")
    chosen = chosen_linears(model, config.targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in chosen.items():
        _replace(model, name, LoRALinear(linear, rank, alpha, dora, generator).train(linear.training))
    return model


@torch.no_grad()
def merge_lora(model):
    """Put a plain Linear of the merged weight in the place of each layer with an adapter; returns the model.

    The layers are kept aside until `unmerge_lora` puts the same ones back, so the way back is exact: subtracting
    s B A from a merged weight would leave rounding errors, a little more each time. All stays frozen; to train the
    merged model, `model.requires_grad_(True)`.
    """
    for name, layer in lora_layers(model).items():
        linear = layer.as_linear()
        object.__setattr__(linear, "unmerged", layer)  # unknown to nn.Module: no submodule, no parameter
        _replace(model, name, linear.train(layer.training))
    return model


def unmerge_lora(model):
    """Undo merge_lora bit for bit; the adapters are the same tensors as before, so an optimizer still holds them."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "unmerged"):
            _replace(model, name, module.unmerged.train(module.training))
    return model


@contextlib.contextmanager
def merged(model):
    """Within: the merged model, which decodes as fast as one that never had adapters. Do not train within. A model that
    is merged already stays so. (A run with --fsdp has no adapters; then this only gives each rank all the weights
    within.)"""
    with whole(model):
        was_merged = is_merged(model)  # by an outer `merged`, or by merge_lora
        try:
            yield merge_lora(model)
        finally:
            if not was_merged:
                unmerge_lora(model)


@contextlib.contextmanager
def lora_off(model):
    """Within: the model without its adapters, a reference policy that costs no memory. ValueError within `merged`:
    there the adapters are part of the weights."""
    if is_merged(model):
        raise ValueError("the adapters are merged into the weights; unmerge_lora comes first")
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def demo():
    """A 2 x 2 layer by hand, forward and backward; then a whole model: the start, a merge, the way back."""
    W, x = torch.tensor([[1.0, 2.0], [1.0, 8.0]]), torch.ones(1, 2, requires_grad=True)
    g = torch.tensor([[1.0, 0.0]])  # dL/dy
    by_hand = {  # V = W + 2 B A = [[3, 4], [5, 12]], whose rows have the lengths 5 and 13
        "LoRA": ([7, 17], {"B": [[4], [0]], "A": [[2, 2]], "x": [[3, 4]]}),
        "DoRA": ([14, 17], {"B": [[8], [0]], "A": [[4, 4]], "x": [[6, 8]], "m": [1.4, 0]}),  # m = (10, 13)
    }
    print("W = [[1, 2], [1, 8]], A = [[1, 1]], B = [[1], [2]], s = 2, m = (10, 13), x = (1, 1), dL/dy = (1, 0)")
    for title, (y, gradients) in by_hand.items():
        linear = nn.Linear(2, 2, bias=False)
        linear.weight.data = W.clone()
        layer = LoRALinear(linear, rank=1, alpha=2, dora=title == "DoRA")
        torch.testing.assert_close(layer(x), x @ W.t())  # B = 0 and m = ‖W‖: the given layer
        of_A, of_B = torch.autograd.grad(layer(x), [layer.lora_A, layer.lora_B], g)
        assert of_A.eq(0).all()  # at the start A has none, B has
        assert of_B.ne(0).any()
        layer.lora_A.data, layer.lora_B.data = torch.ones(1, 2), torch.tensor([[1.0], [2.0]])
        if layer.magnitude is not None:
            layer.magnitude.data = torch.tensor([10.0, 13.0])
        torch.testing.assert_close(layer(x)[0], torch.tensor(y).float())
        torch.testing.assert_close(x @ layer.weight.t(), layer(x))  # merged
        tensors = {"B": layer.lora_B, "A": layer.lora_A, "x": x, "m": layer.magnitude}
        computed = torch.autograd.grad(layer(x), [tensors[name] for name in gradients], g)
        for gradient, expected in zip(computed, gradients.values(), strict=True):
            torch.testing.assert_close(gradient, torch.tensor(expected).float())
        print(f"  {title}  y = {y}   " + "   ".join(f"dL/d{name} = {value}" for name, value in gradients.items()))

    print("\na whole model: the largest difference of a logit by adding the adapters, and by merging them")
    torch.manual_seed(0)
    config = TransformerConfig()
    tokens = torch.randint(0, config.vocab_size, (4, 32))
    print(f"{'':<14}{'trained':>9}{'share':>8}{'added':>14}{'merged':>16}{'unmerged':>10}{'off':>7}")
    for title, rank, dora in (("LoRA, r = 1", 1, False), ("LoRA, r = 8", 8, False), ("DoRA, r = 8", 8, True)):
        model = Transformer(config).eval()
        with torch.no_grad():
            base = model(tokens)
            n = model.num_params()
            add_lora(model, rank, 16, ["attn.*", "ffn.*"], dora)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            start = (model(tokens) - base).abs().max().item()
            for p in model.parameters():  # as if it had been trained
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
            apart = model(tokens)
            with merged(model):
                same = (model(tokens) - apart).abs().max().item()
            back = torch.equal(model(tokens), apart)
            with lora_off(model):
                off = torch.equal(model(tokens), base)
        assert start < 1e-5
        assert same < 1e-4 < (apart - base).abs().max().item()
        assert back
        assert off
        print(f"{title:<14}{trained:>9,}{trained / n:>8.1%}{start:>14.1e}{same:>16.1e}{'exact':>10}{'exact':>7}")
    print(f"of {n:,} parameters")


if __name__ == "__main__":
    run_demo(demo)
