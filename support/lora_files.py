"""Saving adapters: in a run, to resume it, and in PEFT's file format.

A stage passes `LoraState(model, base)` to its Run. It saves the adapters alone and restores them over the weights of
`base`. `save_lora` and `load_lora` write and read adapter_model.safetensors and adapter_config.json as `peft` does,
with the layer names of `transformers`. `PeftModel.from_pretrained(AutoModelForCausalLM..., path)` opens them, with two
exceptions: DoRA on a mixture's router, which the targets ffn.* include; and a layer that is none by itself there, such
as GPT-2's wq, which the targets attn.* include: then all names in the file are this project's. A merged checkpoint is
another thing: save_pretrained writes it without a word on where an answer ends; support.runs.save, with chat=True,
writes that too.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora import add_lora, lora_layers, lora_off, merge_lora, unmerge_lora
from support.checkpoints import open_checkpoint
from support.devices import in_float64
from support.errors import CheckpointError
from support.files import as_bytes, read_json, replacing, to_json
from support.finite import check_finite
from support.hf import LAYOUTS, layout_of
from transformer import Transformer


def lora_state(model):
    """{name: a copy of the tensor} of the adapters alone: everything that training changes; trainer_state.pt holds
    it."""
    state = {}
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B", "magnitude"):
            if getattr(layer, part) is not None:
                state[f"{name}.{part}"] = getattr(layer, part).detach().cpu().clone()
    return state


@torch.no_grad()
def load_lora_state(model, state, base=None):
    """Restore the `state` that lora_state saved, in a model with the same adapters.

    base: the plain model that the adapters were added to; its weights are copied first. It may be None if the model
    still has these frozen weights. After load_state_dict it has the merged weights instead, and the adapters would be
    applied twice. With base, the model must hold the saved, merged weights, and the result is compared with them.
    """
    merged_weights = {}
    if base is not None:
        merged_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        model.load_state_dict(base.state_dict())
    for name, layer in lora_layers(model).items():
        weight = in_float64(layer.base_weight)  # the order of summation depends on the device, so compare approximately
        if abs(weight.sum().item() - layer.checksum) > 1e-9 * weight.abs().sum().item():
            raise CheckpointError(f"{name}: the weights under the adapter are not those of add_lora; give them as base")
    layers = lora_layers(model).items()
    adapters = {f"{name}.{part}": p for name, layer in layers for part, p in layer.named_parameters()}
    adapters = {name: p for name, p in adapters.items() if p.requires_grad}
    for name in sorted(adapters.keys() ^ state.keys()):
        missing_from = "the saved ones" if name in adapters else "the model's"
        raise CheckpointError(f"the adapters differ: {name} is not among {missing_from}")
    for name, p in adapters.items():
        if p.shape != state[name].shape:
            raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, the model wants {tuple(p.shape)}")
        p.copy_(state[name])
    restored = model.state_dict() if merged_weights else {}
    for name, weight in merged_weights.items():
        if not torch.allclose(restored[name], weight, rtol=1e-4, atol=1e-5):
            raise CheckpointError(f"{name}: base and adapters do not make the saved model: the base has changed since")


def drop_lora(model):
    """Put the Linears of the frozen weights back, without the adapters; returns the model, still frozen."""
    unmerge_lora(model)
    with lora_off(model):
        merge_lora(model)
    for module in model.modules():
        module.__dict__.pop("unmerged", None)
    return model


class LoraState:
    """The adapters of `model` as a part of a Run; the frozen weights are those of the checkpoint `base`."""

    def __init__(self, model, base):
        self.model, self.base = model, base

    def state_dict(self):
        return lora_state(self.model)

    def load_state_dict(self, state):
        if lora_layers(self.model):  # the adapters belong to the weights of the base
            load_lora_state(self.model, state, open_checkpoint(self.base)[0])


# ---------------------------------------------------------------------------------------------------------------
# PEFT's files. Its tensor names are "base_model.model." and the names of the model that it wraps.

PEFT_PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def _file_names(model):
    """{layer name: its name in `transformers`}, for layers that are separate layers there too. GPT-2's queries, keys
    and values are not (they are one matrix). Empty for models that are not a Transformer."""
    layout = LAYOUTS[layout_of(model.config)] if isinstance(model, Transformer) else None
    if layout is None:
        return {}
    hf_names = list(layout.names.values())
    pairs = [(a, b) for a, b in layout.names.items() if a.endswith(".weight") and hf_names.count(b) == 1]
    pairs = [(a.removesuffix(".weight"), b.removesuffix(".weight")) for a, b in pairs]
    return {a.format(i): b.format(i) for a, b in pairs for i in range(model.config.n_layer)}


def save_lora(model, path, base=None):
    """Write the adapters alone in PEFT's layout. base: the checkpoint that they belong to, for PEFT's config.

    The layer names are those of `transformers` if all adapted layers have one there, else this project's.
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
    first = next(iter(layers.values()))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, Transformer) else None,
        "base_model_name_or_path": None if base is None else str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(names[name] for name in layers),
        "use_dora": first.magnitude is not None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / SETTINGS) as peft_config, replacing(path / WEIGHTS) as weights:
        save_file(tensors, weights, metadata={"format": "pt"})
        peft_config.write_bytes(as_bytes(to_json(settings, indent=2) + "\n"))


def load_lora(model, path):
    """Add the adapters in a directory of save_lora or PEFT to a plain model; returns it. Raises CheckpointError."""
    path = Path(path)
    try:
        settings = read_json(path / SETTINGS)
        tensors = load_file(path / WEIGHTS)
        rank, alpha, dora = int(settings["r"]), float(settings["lora_alpha"]), settings.get("use_dora", False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} holds no adapter: {Path(error.filename or WEIGHTS).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the adapter cannot be read: {error!r}") from None
    check_finite({name: tensor.float() for name, tensor in tensors.items()}, path)  # as the model will hold them
    expected = {"peft_type": "LORA", "bias": "none", "use_rslora": False, "modules_to_save": None}
    expected |= {"rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None}
    variants = ("alora_invocation_tokens", "layer_replication", "target_parameters", "use_qalora", "use_bdlora")
    expected |= dict.fromkeys([*variants, "kasa_config", "monteclora_config"])
    for name, value in expected.items():  # settings that change the result and are not implemented here
        if (settings.get(name, value) or None) != (value or None):
            raise CheckpointError(f"{path / SETTINGS}: {name} = {settings[name]!r} is not supported, only {value!r}")

    start = settings.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        raise CheckpointError(f"{path / SETTINGS}: init_lora_weights = {start!r} changes the base too; not supported")

    names = {hf_name: name for name, hf_name in _file_names(model).items()}
    parts = {peft_part: part for part, peft_part in PEFT_PARTS.items()}
    state = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        ending = next((part for part in parts if name.endswith(f".{part}")), None)
        if ending is None:
            raise CheckpointError(f"{path}: {key!r} is no part of an adapter of a Linear layer")
        name = name.removesuffix(f".{ending}")
        state[f"{names.get(name, name)}.{parts[ending]}"] = tensor
    targets = sorted({key.rpartition(".")[0] for key in state})
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    add_lora(model, rank, alpha, targets, dora)
    try:
        load_lora_state(model, state)
    except CheckpointError as error:
        for name, p in drop_lora(model).named_parameters():
            p.requires_grad_(name in trainable)
        raise CheckpointError(f"{path}: {error}") from None
    return model
