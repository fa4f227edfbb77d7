"""LoRA and DoRA: train a thin correction to frozen weights, then fold it in.

    y = W x + s B A x          W (out, in) frozen, A (r, in), B (out, r), s = α / r           Eq. 3, arXiv:2106.09685

Full fine-tuning learns W + ΔW with a ΔW of W's size. LoRA claims that the ΔW of an adaptation has low rank and
learns it as a product. With δ = dL/dy the chain rule gives, for one token,

    dL/dB = s δ (A x)ᵀ                    dL/dA = s (Bᵀ δ) xᵀ                   dL/dx = Wᵀ δ + s Aᵀ (Bᵀ δ)

No product has W's shape: dL/dW = δ xᵀ, a third of the work of a full training step, is never formed, and neither
are its Adam moments: 16 bytes per weight become 4. B starts at zero, so training starts at the given model, exactly.
A starts random (Kaiming-uniform, here U(−1/√in, 1/√in)): were both zero, both gradients above would be zero for
good. As B = 0, A does not move in the first step. s = α/r lets the learning rate survive a change of r.

DoRA (arXiv:2402.09353) looks at length and direction of each output row apart, as weight normalisation does (the paper
writes columns; rows are what its authors' code and PEFT take):

    W' = m ⊙ V / ‖V‖          V = W + s B A,  ‖·‖ over each row,  m (out,) starts at ‖W‖                        Eq. 5

so W' = W at the start, whatever s. With G = dL/dW' and v̂ = V_i/‖V_i‖ the exact gradients of row i are

    dL/dm_i = G_i · v̂                     dL/dV_i = (m_i/‖V_i‖) (G_i − (G_i · v̂) v̂)

The projection G − (G·v̂)v̂ comes from differentiating ‖V‖. §4.3 of the paper treats ‖V‖ as a constant and leaves it
out, dL/dV_i ≈ (m_i/‖V_i‖) G_i, which saves the graph of an (out, in) matrix at next to no accuracy. So do
we. Plain LoRA couples the two: a longer ΔW changes length and direction together. The price: ‖V‖ must be computed in
every forward pass, r·out·in multiplications per layer however short the batch.

**For a training stage** (sft, dpo, ppo, grpo); `lora: LoraConfig = field(default_factory=LoraConfig)` in its Config:

    raw, tokenizer, _ = open_checkpoint(init, dist.device, config.dropout)
    add_lora(raw, **asdict(config.lora), seed=config.seed)   # rank 0 adds none. Freezes all but the adapters
    optimizers = make_optimizers(raw, ...)                   # as before: a frozen weight has no gradient, no step
    state["lora"] = lora_state(raw)                          # in checkpoint("last"); the weights are saved as before
    load_lora_state(raw, state["lora"], open_checkpoint(init)[0])       # on resume, after load_state, if rank > 0

`state_dict()` of a model with adapters is that of the merged model, without an adapter in it, so `save_pretrained`
writes plain checkpoints that anyone opens, and nothing else changes. For the same reason `load_state_dict` takes a
plain state and puts it under adapters that start anew; that is no way to resume, so `load_lora_state` puts back both
the adapters and, from --init, the weights that they correct. A layer's `.weight` is the merged one too, so code that
reads weights instead of calling layers stays right. Two helpers:
`with merged(raw):` around `generate` decodes at the plain model's speed, and `with lora_off(raw):` is the model as
it came, which is the reference policy of DPO, PPO and GRPO without a second copy in memory.

Adapters alone are saved in PEFT's files, under the names that `transformers` gives the layers: `save_lora`,
`load_lora`; `PeftModel.from_pretrained(AutoModelForCausalLM..., path)` opens them (but not DoRA on a mixture's router,
which the targets ffn.* include).

Simplified: Linear layers only (no embeddings, no batched experts). No dropout on the adapter's input: it would make
rollout and training differ in RL, and early stopping does its job. One adapter at a time.

Run it: `python lora.py` checks the start, a merge, the way back, and what it costs.
"""

import contextlib
import json
import math
import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from support.checkpoints import open_checkpoint
from support.errors import CheckpointError
from support.hf import LAYOUTS, layout_of
from transformer import Transformer, TransformerConfig


@dataclass
class LoraConfig:
    """Low-rank adapters: train them instead of the weights."""

    rank: int = 0
    """Rank r of the adapters; 0 trains all weights."""
    alpha: float = 16.0
    """The adapter's output is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["attn.*", "ffn.*"])
    """Which Linear layers: patterns (* ? [...]) for the end of their names, such as wq, attn.* or blocks.0.*."""
    dora: bool = False
    """DoRA: learn the length of each output row apart from its direction."""

    def __post_init__(self):
        if self.rank < 0:
            raise CheckpointError(f"lora.rank is {self.rank}; it must be 0 (off) or more")
        if not self.alpha > 0:
            raise CheckpointError(f"lora.alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise CheckpointError("lora.targets is empty; name the layers to adapt, for example wq and wv")


class LoRALinear(nn.Module):
    """A frozen Linear and its adapter: x (..., in) -> (..., out). Takes the Linear's own tensors, not copies."""

    def __init__(self, linear, rank, alpha, dora=False, generator=None):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.rank, self.alpha, self.enabled = rank, alpha, True
        self.base_weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.checksum = self.base_weight.detach().double().sum().item()  # load_lora_state asks whether they changed
        # Adapters are fp32 even on bf16 weights, which cannot take a small step: it rounds to nothing.
        like = {"dtype": torch.promote_types(linear.weight.dtype, torch.float32), "device": linear.weight.device}
        A = torch.empty(rank, self.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(self.in_features)
        self.lora_A = nn.Parameter(A.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.magnitude = nn.Parameter(self.row_norms()) if dora else None

    def direction(self):
        """V = W + s B A, (out, in), in the adapter's dtype, whatever autocast says."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.base_weight.to(self.lora_A.dtype) + self.alpha / self.rank * (self.lora_B @ self.lora_A)

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
            y = y + self.alpha / self.rank * F.linear(low, self.lora_B).to(y.dtype)
            if self.magnitude is not None:
                y = (self.magnitude / self.row_norms() * y).to(y.dtype)  # bf16 would round a factor of 1.003 to 1
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def reset(self):
        """B to zero and m to ‖W‖: the adapter does nothing again."""
        self.lora_B.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_norms())

    # What it looks like from outside: a Linear of the merged weight.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with contextlib.nullcontext() if keep_vars else torch.no_grad():
            tensors = {"weight": self.weight, "bias": self.bias}
        for name, tensor in tensors.items():
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        for name, own in (("weight", self.base_weight), ("bias", self.bias)):
            if own is None:
                continue
            given = state.get(prefix + name)
            if given is None:
                missing.append(prefix + name)
            elif given.shape != own.shape:
                errors.append(f"{prefix + name} has shape {tuple(given.shape)}, not {tuple(own.shape)}")
            else:
                with torch.no_grad():
                    own.copy_(given)
        if strict:
            known = [prefix + "weight"] + ([prefix + "bias"] if self.bias is not None else [])
            unexpected += [key for key in state if key.startswith(prefix) and key not in known]
        self.reset()

    def extra_repr(self):
        kind = "DoRA" if self.magnitude is not None else "LoRA"
        return f"{self.in_features} -> {self.out_features}, {kind} rank={self.rank}, alpha={self.alpha}"


# ---------------------------------------------------------------------------------------------------------------
# Putting adapters into a model, and out of it.


def lora_layers(model):
    """{name: layer} of the layers with an adapter."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def _replace(model, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def add_lora(model, rank, alpha, targets, dora=False, *, seed=0):
    """Freeze `model` and give each Linear that `targets` names an adapter, in place; returns the model.

    targets: patterns of fnmatch; one counts where it matches a layer's name, or the end of it behind a dot. rank 0
    changes nothing. The start values are those of `seed` on every rank; no random number of the caller's is used.
    Raises CheckpointError on a pattern that matches no Linear.
    """
    config = LoraConfig(rank, alpha, list(targets), dora)  # checks
    if config.rank == 0:
        return model
    if lora_layers(model) or any(hasattr(module, "unmerged") for module in model.modules()):
        raise CheckpointError("this model has adapters already; merge_lora or drop_lora comes first")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {}
    for pattern in config.targets:
        hits = [n for n in linears if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
        if not hits:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none at all"
            raise CheckpointError(f"lora target {pattern!r} matches no Linear layer; there are {kinds}")
        chosen |= {name: linears[name] for name in hits}
    holders = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, linear in chosen.items():
        if holders.count(id(linear.weight)) > 1:  # a merge would change one side of the tie alone
            raise CheckpointError(f"lora target {name} shares its weight with another layer; leave it out")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in chosen.items():
        _replace(model, name, LoRALinear(linear, rank, alpha, dora, generator).train(linear.training))
    return model


@torch.no_grad()
def merge_lora(model):
    """Put a plain Linear of the merged weight in the place of each layer with an adapter; returns the model.

    The layers are kept aside until `unmerge_lora` puts the very same ones back, so the way back is exact: taking
    s B A away from a merged weight again would leave rounding errors, a little more each time. All stays frozen;
    to train the merged model, `model.requires_grad_(True)`.
    """
    for name, layer in lora_layers(model).items():
        bias = layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, bias, device="meta").requires_grad_(False)
        linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        linear.bias = layer.bias
        object.__setattr__(linear, "unmerged", layer)  # behind nn.Module's back: no submodule, no parameter
        _replace(model, name, linear.train(layer.training))
    return model


def unmerge_lora(model):
    """Undo merge_lora bit for bit; the adapters are the same tensors as before, so an optimizer still holds them."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "unmerged"):
            _replace(model, name, module.unmerged.train(module.training))
    return model


def drop_lora(model):
    """Put the Linears of the frozen weights back, without the adapters; returns the model, still frozen."""
    unmerge_lora(model)
    with lora_off(model):
        merge_lora(model)
    for module in model.modules():
        module.__dict__.pop("unmerged", None)
    return model


@contextlib.contextmanager
def merged(model):
    """Within: the merged model, which decodes as fast as one that never had adapters. Do not train within."""
    merge_lora(model)
    try:
        yield model
    finally:
        unmerge_lora(model)


@contextlib.contextmanager
def lora_off(model):
    """Within: the model without its adapters, a reference policy that costs no memory. Not within `merged`, whose
    layers hold adapters that nothing can take away: ValueError."""
    if any(hasattr(module, "unmerged") for module in model.modules()):
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


def lora_state(model):
    """{name: tensor} of the adapters alone: what trainer_state.pt keeps, and all that training changes. Copies."""
    state = {}
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B", "magnitude"):
            if getattr(layer, part) is not None:
                state[f"{name}.{part}"] = getattr(layer, part).detach().cpu().clone()
    return state


@torch.no_grad()
def load_lora_state(model, state, base=None):
    """Put `lora_state` back into a model with the same adapters.

    base: the plain model that they were added to, from which the frozen weights are copied first. It may be left out
    if these are still there. They are not after load_state_dict, and merged weights would be corrected twice. With base
    the model must hold the saved, merged weights: what comes out is compared with them.
    """
    merged_weights = {}
    if base is not None:
        merged_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.load_state_dict(base.state_dict())
    for name, layer in lora_layers(model).items():
        weight = layer.base_weight.double()  # each device sums in an order of its own: close is the same
        if abs(weight.sum().item() - layer.checksum) > 1e-9 * weight.abs().sum().item():
            raise CheckpointError(f"{name}: the weights under the adapter are not those of add_lora; give them as base")
    own = {f"{name}.{part}": p for name, layer in lora_layers(model).items() for part, p in layer.named_parameters()}
    own = {name: p for name, p in own.items() if p.requires_grad}
    for name in sorted(own.keys() ^ state.keys()):
        where = "the saved ones" if name in own else "the model's"
        raise CheckpointError(f"the adapters differ: {name} is not among {where}")
    for name, p in own.items():
        if p.shape != state[name].shape:
            raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(p.shape)}")
        p.copy_(state[name])
    now = model.state_dict() if merged_weights else {}
    for name, weight in merged_weights.items():
        if not torch.allclose(now[name], weight, rtol=1e-4, atol=1e-5):
            raise CheckpointError(f"{name}: base and adapters do not make the saved model: the base has changed since")


class LoraState:
    """What a run keeps of the adapters of `model`, whose frozen weights are those of the checkpoint `base`."""

    def __init__(self, model, base):
        self.model, self.base = model, base

    def state_dict(self):
        return lora_state(self.model)

    def load_state_dict(self, state):
        if lora_layers(self.model):  # what the adapters correct are the weights of the base
            load_lora_state(self.model, state, open_checkpoint(self.base)[0])


# ---------------------------------------------------------------------------------------------------------------
# PEFT's files. Its names, behind "base_model.model.", are those of the model that it wraps.

PEFT_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def _file_names(model):
    """Our layer name -> the name in `transformers`, for layers that stand there one for one. GPT-2's queries, keys
    and values do not (they are one matrix), and other models than a Transformer keep the names that they have."""
    layout = LAYOUTS[layout_of(model.config)] if isinstance(model, Transformer) else None
    if layout is None:
        return {}
    theirs = list(layout.names.values())
    pairs = [(a, b) for a, b in layout.names.items() if a.endswith(".weight") and theirs.count(b) == 1]
    pairs = [(a.removesuffix(".weight"), b.removesuffix(".weight")) for a, b in pairs]
    return {a.format(i): b.format(i) for a, b in pairs for i in range(model.config.n_layer)}


def save_lora(model, path, base=None):
    """Write the adapters alone in PEFT's layout. base: the checkpoint that they belong to, for PEFT's config.

    The names are those of `transformers` if all adapted layers have one there, else our own.
    """
    layers = lora_layers(model)
    if not layers:
        raise CheckpointError("this model has no adapters to save; add_lora comes first")
    names = _file_names(model)
    if not all(name in names for name in layers):
        names = {name: name for name in layers}
    tensors = {}
    for key, tensor in lora_state(model).items():
        name, _, part = key.rpartition(".")
        tensors[f"base_model.model.{names[name]}.{PEFT_PARTS[part]}"] = tensor
    one = next(iter(layers.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, Transformer) else None,
        "base_model_name_or_path": None if base is None else str(base),
        "r": one.rank,
        "lora_alpha": one.alpha,
        "target_modules": sorted(names[name] for name in layers),
        "use_dora": one.magnitude is not None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
    (path / f"{SETTINGS}.tmp").write_text(json.dumps(settings, indent=2) + "\n")
    for name in (WEIGHTS, SETTINGS):
        os.replace(path / f"{name}.tmp", path / name)


def load_lora(model, path):
    """Add the adapters that save_lora or PEFT wrote to a plain model; returns it. Raises CheckpointError."""
    path = Path(path)
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
        rank, alpha, dora = int(settings["r"]), float(settings["lora_alpha"]), settings.get("use_dora", False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} holds no adapter: {Path(error.filename or WEIGHTS).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the adapter cannot be read: {error!r}") from None
    expected = {"peft_type": "LORA", "bias": "none", "use_rslora": False, "modules_to_save": None}
    expected |= {"rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None}
    expected |= {"alora_invocation_tokens": None}
    for name, value in expected.items():  # what would change the result and is not written here
        if (settings.get(name, value) or None) != (value or None):
            raise CheckpointError(f"{path / SETTINGS}: {name} = {settings[name]!r} is not supported, only {value!r}")

    start = settings.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        raise CheckpointError(f"{path / SETTINGS}: init_lora_weights = {start!r} changes the base too; not supported")

    ours = {theirs: name for name, theirs in _file_names(model).items()}
    parts = {theirs: part for part, theirs in PEFT_PARTS.items()}
    state = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        ending = next((e for e in parts if name.endswith(f".{e}")), None)
        if ending is None:
            raise CheckpointError(f"{path}: {key!r} is no part of an adapter of a Linear layer")
        name = name.removesuffix(f".{ending}")
        state[f"{ours.get(name, name)}.{parts[ending]}"] = tensor
    targets = sorted({key.rpartition(".")[0] for key in state})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    add_lora(model, rank, alpha, targets, dora)
    try:
        load_lora_state(model, state)
    except CheckpointError as error:
        for name, p in drop_lora(model).named_parameters():
            p.requires_grad_(name in trained)
        raise CheckpointError(f"{path}: {error}") from None
    return model


def main():
    torch.manual_seed(0)
    config = TransformerConfig()
    tokens = torch.randint(0, config.vocab_size, (4, 32))
    print(f"{'':<14}{'trained':>9}{'share':>8}{'start − base':>14}{'merged − apart':>16}{'unmerged':>10}{'off':>7}")
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
    print(f"\nof {n:,} parameters; the columns are largest differences of logits")


if __name__ == "__main__":
    main()
