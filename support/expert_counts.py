"""Counting what each expert of moe.py gets: without waiting for a GPU, once per forward, over all ranks."""

import torch
from torch import distributed


def histogram(index, n):
    """How often each of 0 … n−1 stands in index: (n,). bincount would make the CPU wait for the GPU."""
    index = index.flatten()
    return torch.zeros(n, dtype=torch.int64, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def repeats_a_forward():
    """Whether this forward runs inside a backward: then activation checkpointing repeats one that was counted. It still
    has to compute the layer's losses, for it must save the same tensors as the first. (With use_reentrant=True the
    first builds no graph, and the losses have no gradient.)"""
    if torch.compiler.is_compiling():  # pretrain.py refuses checkpointing there, and the question would cut the graph
        return False
    return torch._C._current_graph_task_id() >= 0


def sum_over_ranks(counters):
    """One tensor per layer -> stacked, and summed over the ranks; empty without layers. All ranks must call."""
    if not counters:
        return torch.zeros(0)
    total = torch.stack(counters)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total
