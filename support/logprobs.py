"""log π of given targets, without the logits of all of them at once."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def target_logprobs(x, output, targets, temperature=1.0, chunk_numbers=2**24, *, counted=None):
    """log softmax(x outputᵀ / temperature)[targets] in fp32 or wider: x (B, T, C), output (V, C), targets (B, T)
    -> (B, T).

    The logits of a chunk of tokens live only while the chunk is worked on (at most 64 MiB of them), and are
    computed again in the backward pass. With 50,000 words and 32 x 1,024 tokens that is 64 MiB instead of 6 GiB.

    counted: boolean (B, T); only there, and 0 elsewhere.
    """
    if counted is not None:
        places = counted.flatten().nonzero().squeeze(1)  # (k,)
        x, wanted = x.flatten(0, 1).index_select(0, places)[None], targets.flatten()[places][None]  # (1, k, C), (1, k)
        at_places = target_logprobs(x, output, wanted, temperature, chunk_numbers)[0]  # (k,)
        return at_places.new_zeros(targets.numel()).index_copy(0, places, at_places).view(targets.shape)  # (B, T)

    def of_chunk(x, targets):  # (k, C), (k,) -> (k,)
        logits = F.linear(x, output)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if temperature == 1 else logits / temperature  # a pass over (k, V) each way
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
