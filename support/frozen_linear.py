"""The frozen Linear under an adapter of lora.py: from outside, and on disk, a plain Linear of the merged weight."""

import contextlib

import torch
from torch import nn

from support.devices import in_float64


class FrozenLinear(nn.Module):
    """Takes over the tensors of a Linear, not copies, and freezes them: `base_weight` (out, in), `bias` (out,) or None.

    A subclass adds what is trained, the adapter. Its `weight` is the merged weight, (out, in), and `reset()` gives the
    adapter a start that adds nothing. `state_dict` holds the merged weight and the bias. `load_state_dict` takes such a
    plain state: it becomes the frozen one, and the adapter is reset.
    """

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.base_weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.checksum = in_float64(self.base_weight.detach()).sum().item()  # load_lora_state asks whether they changed

    def as_linear(self):
        """A frozen Linear of the merged weight."""
        bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias, device="meta").requires_grad_(False)
        linear.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        linear.bias = self.bias
        return linear

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
