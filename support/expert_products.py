"""The experts' products where moe.experts_loop is not the fastest: a kernel on a GPU, few numbers of rows on a CPU.

Each form takes and returns what experts_loop does: x (T, C), tokens (rows,), n_rows (E,), gate, up, down -> (rows, C).
"""

import torch
import torch.nn.functional as F

from support.devices import product_dtype, traits


def fast_experts(x, up, experts_loop):
    """-> the form for rows like x and experts like up (E, inner, C): experts_loop itself, but for bf16."""
    if product_dtype(x) != torch.bfloat16:
        return experts_loop
    if traits(x).grouped_products and x.shape[1] % 8 == 0 and up.shape[1] % 8 == 0:  # it takes whole 16 bytes
        return experts_grouped
    # On a CPU oneDNN compiles new bf16 kernels for each number of rows that it has not seen: let them be few.
    return padded(experts_loop, traits(x).expert_rows)


def experts_grouped(x, tokens, n_rows, gate, up, down):
    """One kernel per matrix, and no transfer of n_rows to the host."""
    dtype = product_dtype(x)
    ends = n_rows.cumsum(0).to(torch.int32)  # (E,)

    def linear(x, weight):
        return F.grouped_mm(x.to(dtype), weight.to(dtype).mT, offs=ends)

    x = x.index_select(0, tokens)  # (rows, C)
    if gate is None:
        return linear(F.gelu(linear(x, up), approximate="tanh"), down)
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def padded(experts, multiple):
    """`experts` with more rows, until each expert has a multiple of so many: token 0's, whose results are left out."""

    def with_more(x, tokens, n_rows, *matrices):
        more = -n_rows % multiple  # (E,)
        shift = (more.cumsum(0) - more).repeat_interleave(n_rows)  # (rows,)
        places = torch.arange(len(tokens), device=x.device) + shift
        tokens = tokens.new_zeros(len(tokens) + int(more.sum())).index_copy(0, places, tokens)
        return experts(x, tokens, n_rows + more, *matrices).index_select(0, places)

    return with_more if multiple > 1 else experts
