"""Torch's fused attention, as attention.fast_attention calls it: around its slow cases, and band by band.

q (B, H, T, D), k and v (B, G, S, D), H a multiple of G -> (B, H, T, D). The (T, S) weights are never stored.
"""

import torch
import torch.nn.functional as F

from support.devices import traits


def sdpa(q, k, v, mask=None, is_causal=False):
    """mask: boolean, True = visible, broadcastable to (B, H, T, S); or is_causal, for T = S; or neither: all seen."""
    repeats = q.shape[1] // k.shape[1]
    gqa = repeats > 1
    if gqa and traits(q).repeats_shared_heads and q.shape[2] > 1 and (mask is not None or q.dtype == torch.float32):
        # Shared heads with a mask, or in fp32, fit neither the flash nor the memory-efficient kernel: SDPA would switch
        # to its math backend, which stores (T, S) weights. Repeated keys and values cost less.
        k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))  # (B, H, S, D)
        gqa = False
    with torch.autocast("cpu", enabled=False):  # which would convert fp32 back: see Attention.forward
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)


def banded_attention(q, k, v, window, sinks=0):
    """Attention under attention.window_mask(T, S, window, sinks), without the work outside it: T' ≤ block queries at a
    time, which see S' keys, at most window + block − 1 and the sinks. About T · (window + block) scores instead of
    T · S, where block is the window, but at least 64; no mask exceeds (T', S')."""
    T, S = q.shape[2], k.shape[2]
    block, position = max(window, 64), torch.arange(S, device=q.device)
    out = []
    for start in range(S - T, S, block):
        end, first = min(start + block, S), max(start - window + 1, 0)
        some = [slice(min(sinks, first)), slice(first, end)]  # the sinks before the band, the band
        query, key = position[start:end, None], torch.cat([position[part] for part in some])  # (T', 1), (S',)
        seen = (key <= query) & ((query - key < window) | (key < sinks))  # (T', S')
        band = (torch.cat([x[:, :, part] for part in some], 2) for x in (k, v))
        out.append(sdpa(q[:, :, start - S + T : end - S + T], *band, seen))
    return torch.cat(out, dim=2)
