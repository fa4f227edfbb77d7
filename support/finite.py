"""Numbers that are not finite: one NaN or infinity among the weights makes every number that follows from them NaN."""

import math

import torch

from support.errors import CheckpointError, DivergedError


def is_finite(tensor):
    """Whether all numbers of a tensor are finite. A sum is finite only if all its terms are, and takes a thirtieth of
    the time of isfinite; but one of large numbers may overflow, and then each is looked at."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def check_finite(tensors, where):
    """Raises CheckpointError, which names the first of {name: tensor} that is not finite, and the file or directory
    `where`."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            n = f"{tensor.numel() - tensor.isfinite().sum():,} of {tensor.numel():,} numbers"
            raise CheckpointError(
                f"{where}: {name} has {n} that are NaN or infinite: it is damaged, or its training diverged; "
                "use an earlier checkpoint"
            )


def check_state(state, where, name=""):
    """The same for a nested state, such as an optimizer's: its tensors, under names such as optimizers.0.state.3."""
    if isinstance(state, torch.Tensor):
        check_finite({name: state}, where)
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            check_state(value, where, f"{name}.{key}" if name else str(key))


def diverged(results):
    """The DivergedError for results of a model, such as "logits", that are not finite."""
    return DivergedError(
        f"the model's {results} are not finite: its training has diverged (take an earlier checkpoint, or train with a "
        "smaller --lr), or its numbers overflow (try --dtype fp32)"
    )


def check_logprobs(logprobs, mask):
    """DivergedError if the log-probability of a sampled token that the mask counts is NaN: see generate.sample."""
    if (logprobs.isnan() & mask).any():
        raise diverged("logits")
