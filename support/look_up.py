"""A table of vectors that are looked up by position."""

import torch
import torch.nn.functional as F

from support.devices import traits


def look_up(table, positions):
    """Rows of a table (n, C) by position: (..., T) -> (..., T, C). table[positions] would quietly read the last row at
    position −1. ValueError outside 0 … n − 1; on CUDA, where the check would make the CPU wait for the GPU in every
    step, F.embedding itself stops there, if less politely."""
    if positions.numel() and not (traits(positions).stops_at_bad_index or torch.compiler.is_compiling()):
        for position in (positions.min().item(), positions.max().item()):
            if not 0 <= position < len(table):
                raise ValueError(f"position {position} asked for, the table has {len(table)}")
    return F.embedding(positions, table)
