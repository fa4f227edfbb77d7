"""What a run logs of its experts: the share of the assignments that each one got, and those that a capacity dropped."""

from moe import moe_layers
from support.expert_counts import sum_over_ranks


def expert_load(model):
    """(layers, E): each expert's share of the assignments since the last update_biases. All ranks must call."""
    counts = sum_over_ranks([layer.counts for layer in moe_layers(model)])
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def dropped_assignments(model):
    """(layers,): assignments over the experts' capacity since the last update_biases. All ranks must call."""
    return sum_over_ranks([layer.dropped for layer in moe_layers(model)])


def load_record(model):
    """`expert_load` in multiples of the even share, as the log keeps it: the least, the most, and load/LAYER/EXPERT,
    where LAYER counts the mixtures alone; with a capacity also load_dropped, the share of the assignments that were
    dropped. {} without mixtures. All ranks must call."""
    layers = moe_layers(model)
    if not layers:
        return {}
    load = expert_load(model) * layers[0].n_expert  # (layers, E)
    record = {"load_min": load.min().item(), "load_max": load.max().item()}
    if layers[0].capacity_factor is not None:
        n = sum_over_ranks([layer.counts for layer in layers]).sum()
        record["load_dropped"] = (dropped_assignments(model).sum() / n.clamp(min=1)).item()
    return record | {f"load/{i}/{e}": x for i, row in enumerate(load.tolist()) for e, x in enumerate(row)}
