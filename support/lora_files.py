"""What is kept of adapters: by a run that is resumed, and in PEFT's files.

`LoraState(model, base)` is what a stage gives its Run: the adapters alone, put back over the weights of `base`.
`save_lora` and `load_lora` write and read adapter_model.safetensors and adapter_config.json as `peft` does, under the
names that `transformers` gives the layers; `PeftModel.from_pretrained(AutoModelForCausalLM..., path)` opens them (but
not DoRA on a mixture's router, which the targets ffn.* include).
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora import add_lora, drop_lora, lora_layers
from support.checkpoints import open_checkpoint
from support.errors import CheckpointError
from support.hf import LAYOUTS, layout_of
from transformer import Transformer


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
# PEFT's files. Its names, after "base_model.model.", are those of the model that it wraps.

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
