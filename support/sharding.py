"""FSDP's sharded tensors: every rank has some rows of each, and here they become whole ones, or parts again.

    unsharded(model, dist)       a plain copy to save and to sample with              pretrain.py, runs.py
    gathered(state, keep)        an optimizer's state with whole tensors, to save     runs.py
    share_of(x, like)            a whole tensor cut again, to resume                  runs.py, optim.py
    whole(x)                     one tensor, where a formula needs all of it          optim.py
    of_one_shape(params, most)   what Muon may stack                                  optim.py

What is not sharded passes through all of them as it is, so the callers have one path. The first, second and fourth are
calls of all ranks: one that does not call leaves the others waiting.
"""

from support.hf import fill


def unsharded(model, dist):
    """The model itself; under FSDP a plain copy of it in rank 0's CPU memory, and None on the other ranks. For
    `save_pretrained` and `generate`, which read the weights without a forward of all ranks. All ranks must call."""
    if not hasattr(model, "reshard"):  # fully_shard gives a module its methods
        return model
    weights = gathered(model.state_dict(), dist.is_main)
    if not dist.is_main:
        return None
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    return fill(type(model), model.config, None, shapes, weights.get, "the sharded model")


def gathered(x, keep):
    """Nested dicts and lists -> the same with each sharded tensor made whole: in CPU memory if `keep`, else None. All
    ranks must call. It goes tensor by tensor, so a GPU needs room for one. Everything else stays as it is."""
    if isinstance(x, dict):
        return {key: gathered(value, keep) for key, value in x.items()}
    if isinstance(x, list):
        return [gathered(value, keep) for value in x]
    if not is_sharded(x):
        return x
    full = x.full_tensor()
    return full.cpu() if keep else None


def share_of(x, like):
    """A whole tensor -> this rank's part of it, cut as the sharded tensor `like` is; x itself if that is not sharded,
    or if x has nothing to cut (Adam's count of steps). All ranks hold the same x, so nothing is sent."""
    if not is_sharded(like) or x.dim() == 0:
        return x
    from torch.distributed.tensor import distribute_tensor  # slow to import, so only where it is used

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(x):
    """A sharded tensor, gathered from all ranks, which must all call; any other as it is."""
    return x.full_tensor() if is_sharded(x) else x


def of_one_shape(params, most):
    """Parameters that have a gradient -> lists of one shape each, of at most `most` numbers together, or one parameter.
    A sharded one stands alone, so that no more than one is whole at a time."""
    alike = {}  # {shape: parameters}
    for p in params:
        if p.grad is not None:
            alike.setdefault(p.shape, []).append(p)
    for shape, same in alike.items():
        size = 1 if is_sharded(same[0]) else max(1, most // shape.numel())
        yield from (same[i : i + size] for i in range(0, len(same), size))


def is_sharded(x):
    """Whether a tensor is FSDP's: a DTensor, known by its method, since the class is slow to import."""
    return hasattr(x, "full_tensor")
