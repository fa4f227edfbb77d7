"""log π of given targets: where all logits would take more than 64 MiB, they never exist at the same time."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.products import linear


def target_logprobs(x, output, targets, temperature=1.0, chunk_numbers=2**24, *, counted=None):
    """log softmax(x outputᵀ / temperature)[targets] in fp32 or wider: x (B, T, C), output (V, C), targets (B, T)
    -> (B, T).

    Where there are more than `chunk_numbers` logits, the tokens are processed in chunks. The logits of a chunk (at most
    64 MiB) are freed after it and computed again in the backward pass. For a vocabulary of 50,000 and 32 x 1,024 tokens
    that is 64 MiB instead of 6 GiB.

    counted: boolean (B, T); the result is computed where it is True and is 0 elsewhere.
    """
    if counted is not None:
        index = counted.flatten().nonzero().squeeze(1)  # (k,)
        x, selected = x.flatten(0, 1).index_select(0, index)[None], targets.flatten()[index][None]  # (1, k, C), (1, k)
        logprobs = target_logprobs(x, output, selected, temperature, chunk_numbers)[0]  # (k,)
        return logprobs.new_zeros(targets.numel()).index_copy(0, index, logprobs).view(targets.shape)  # (B, T)

    def of_chunk(x, targets):  # (k, C), (k,) -> (k,)
        logits = linear(x, output)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature  # skips a pass over (k, V), forward and backward
        return -F.cross_entropy(logits, targets, reduction="none")

    V, shape = output.shape[0], targets.shape
    x, targets = x.flatten(0, 1), targets.flatten()  # (B·T, C), (B·T,)
    size = max(1, chunk_numbers // V)
    if len(x) <= size:
        out = of_chunk(x, targets)
    else:
        pieces = zip(x.split(size), targets.split(size), strict=True)
        out = torch.cat([checkpoint(of_chunk, *piece, use_reentrant=False) for piece in pieces])
    return out.view(shape)
