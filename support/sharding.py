"""FSDP's sharded tensors, of which each rank holds some rows: from shards to full tensors and back.

    whole(model)                       within, all weights on every rank       lora.py, rollouts.py, grpo_report.py
    averaging(model, now)              within, whether a backward pass averages gradients     the training loops
    accumulating(model, autocast)      within, the backward passes of one optimizer step        grpo.py
    exchange(model, autocast)          average the gradients of passes that did not             here, by `accumulating`
    unsharded(model, dist)             a plain copy, to save and to sample from          pretrain_report.py, runs.py
    gathered(state, keep)              an optimizer's state with full tensors, to save          runs.py
    shard_like(x, like)                this rank's shard of a full tensor, to resume            runs.py
    full_tensor(x)                     one tensor, where a formula needs all of it              optim.py
    in_stacks(params, ahead, f)        what Muon does to matrices, to several at once           optim.py

What is not sharded is returned unchanged, so callers need no special case. All ranks must call `whole`, `accumulating`,
`unsharded`, `gathered` and `full_tensor` together, or the calling ranks wait forever.
"""

import contextlib

import torch

from support.errors import ConfigError
from support.hf import load_weights


def refuse_fsdp(config, dist, scaler):
    """ConfigError if --fsdp is given where it cannot be had."""
    if not config.fsdp:
        return
    if dist.world == 1 or scaler.is_enabled():
        need = "bf16 or fp32" if dist.world > 1 else "torchrun, to start the processes that share the model"
        raise ConfigError(f"--fsdp needs {need}")
    adapters = getattr(config, "lora", None)
    for flag, given in (
        ("--lora.rank", adapters is not None and adapters.rank > 0),
        ("--sampler_dtype", getattr(config, "sampler_dtype", "same") != "same"),
        ("--stale", getattr(config, "stale", 0) > 0),
        ("--refresh_reference", getattr(config, "refresh_reference", 0) > 0),
    ):
        if given:
            raise ConfigError(f"--fsdp and {flag} do not work together here; leave one of them out")


@contextlib.contextmanager
def whole(model):
    """Within, every rank holds all weights of a model that FSDP has cut, as `generate` needs, and a call of the model
    waits for no other rank. All ranks must enter and leave; any other model stays as it is. The blocks' weights are in
    the dtype that they are gathered in. Backward passes within must not average gradients: `exchange` follows them."""
    parts = [module for module in model.modules() if hasattr(module, "reshard")]  # fully_shard gives it its methods
    if getattr(model, "is_whole", False):  # by an outer `whole`
        parts = []
    if parts:
        model.is_whole = True
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.unshard()
    try:
        yield model
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)  # fully_shard's defaults
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()
        if parts:
            model.is_whole = False


@contextlib.contextmanager
def averaging(model, now):
    """Within, a backward pass averages the gradients over the ranks if `now`; else each rank adds them to its own. Of a
    model that DDP wraps or FSDP has cut; any other stays as it is."""
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard gives a module its methods
        model.set_requires_gradient_sync(now)
    with model.no_sync() if not now and hasattr(model, "no_sync") else contextlib.nullcontext():
        yield


def exchange(model, autocast):
    """Within `whole`, of a model that FSDP has cut: average over the ranks the gradients that passes without averaging
    have left, by one more pass, of one token, with a gradient of 0. (A pass over prompts and their answers calls a
    block several times. After each call FSDP would send the gradients that are there by then, so ranks with different
    numbers of passes would send different tensors.)"""
    model.set_requires_gradient_sync(True)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.embed.weight.device)
    with autocast():
        nothing = 0.0 * model(token).float().sum()
    nothing.backward()


@contextlib.contextmanager
def accumulating(model, autocast):
    """Around the backward passes of one optimizer step, of which the ranks may make different numbers: `whole`, and at
    the end `exchange`. Any model that FSDP has not cut stays as it is."""
    with whole(model):
        yield
        if hasattr(model, "reshard"):  # fully_shard gives a module its methods
            exchange(model, autocast)


def unsharded(model, dist):
    """The model itself; under FSDP a plain copy of it in rank 0's CPU memory, and None on the other ranks. Needed by
    `save_pretrained` and `generate`, which read the weights on one rank alone. All ranks must call."""
    if not hasattr(model, "reshard"):  # fully_shard gives a module its methods
        return model
    weights = gathered(model.state_dict(), dist.is_main)
    if not dist.is_main:
        return None
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    return load_weights(type(model), model.config, None, shapes, weights.get, "the sharded model")


def gathered(x, keep):
    """Nested dicts and lists -> the same with full tensors instead of sharded ones: in CPU memory if `keep`, else None.
    All ranks must call. Works tensor by tensor, so a GPU needs memory for one. Everything else stays as it is."""
    if isinstance(x, dict):
        return {key: gathered(value, keep) for key, value in x.items()}
    if isinstance(x, list):
        return [gathered(value, keep) for value in x]
    if not is_sharded(x):
        return x
    full = x.full_tensor()
    return full.cpu() if keep else None


def shard_like(x, like):
    """A full tensor -> this rank's shard of it, cut as the sharded tensor `like` is. Returns x itself if `like` is not
    sharded or x is a scalar (Adam's count of steps). All ranks hold the same x, so nothing is sent."""
    if not is_sharded(like) or x.dim() == 0:
        return x
    from torch.distributed.tensor import distribute_tensor  # slow to import, so only where it is used

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_tensor(x):
    """A sharded tensor gathered from all ranks, which must all call; any other tensor unchanged."""
    return x.full_tensor() if is_sharded(x) else x


STACK = 2**24  # numbers that in_stacks puts through f together at most: bounds the memory


def in_stacks(params, ahead, f):
    """f(ahead(p)) of each parameter that has a gradient, as (p, update) pairs; f takes a stack (n, *shape) of matrices
    and treats each by itself. Those of one shape go through f together, at most STACK numbers.

    Under FSDP a rank holds some rows of each matrix, but f needs them all: every rank gathers the matrix, computes the
    same, and keeps its own rows of the result. What `ahead` stores, such as a momentum, stays
    sharded as p is."""
    for group in same_shape_groups(params, STACK):
        updates = f(torch.stack([full_tensor(ahead(p)) for p in group]))  # (n, *shape)
        yield from ((p, shard_like(update, p)) for p, update in zip(group, updates, strict=True))


def same_shape_groups(params, limit):
    """Parameters that have a gradient -> lists of parameters of one shape, each list of at most `limit` numbers in all
    or of a single parameter. A sharded parameter gets a list of its own, so only one full copy exists at a time."""
    by_shape = {}  # {shape: parameters}
    for p in params:
        if p.grad is not None:
            by_shape.setdefault(p.shape, []).append(p)
    for shape, group in by_shape.items():
        size = 1 if is_sharded(group[0]) else max(1, limit // shape.numel())
        yield from (group[i : i + size] for i in range(0, len(group), size))


def is_sharded(x):
    """Whether a tensor is a DTensor, FSDP's class. Recognised by its method, since the class is slow to import."""
    return hasattr(x, "full_tensor")
