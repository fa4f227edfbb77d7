"""FSDP's sharded tensors, of which each rank holds some rows: from shards to full tensors and back.

    unsharded(model, dist)             a plain copy of the model, to save and to sample from    pretrain.py, runs.py
    gathered(state, keep)              an optimizer's state with full tensors, to save          runs.py
    shard_like(x, like)                this rank's shard of a full tensor, to resume            runs.py, optim.py
    full_tensor(x)                     one tensor, where a formula needs all of it              optim.py
    same_shape_groups(params, limit)   the matrices that Muon may stack                         optim.py

What is not sharded is returned unchanged, so callers need no special case. All ranks must call the first, second and
fourth function together, or the calling ranks wait forever.
"""

from support.hf import load_weights


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
