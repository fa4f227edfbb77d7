"""The harder half of attention.RollingKVCache: several tokens at once, rows with pads, and which token a slot holds.

A row's pads take no slot, so a token's slot follows from its position, which differs from row to row. T new tokens may
overwrite what the first of them still see, so they read a copy of the old slots with themselves after it, under a mask.
"""

import torch


def roll_rows(cache, layer, k, v, mask, in_sight):
    """What `RollingKVCache.roll` does with pads or several tokens: stores k and v, (B, G, T, D) each -> the keys, the
    values and the mask of these T queries:

        length = 0  k, v and mask as given; the layer adds the window
        else        the old slots with k, v after them, and a mask (B, 1, T, S) with the window in it

    mask: None or padding_mask's, over all the tokens so far. in_sight: attention's. ValueError on another mask.
    """
    keys, values, (B, _, T, _) = cache.keys[layer], cache.values[layer], k.shape
    if mask is None and cache.pads is None and cache.length == 0:  # the first call, without pads: all rows alike
        stay = [n for n in range(T) if n < cache.sinks or n >= T - cache.window]  # those that later tokens may see
        slots = [cache.slot(n) for n in stay]
        keys[:, :, slots], values[:, :, slots] = k[:, :, stay], v[:, :, stay]
        return k, v, None
    if layer == 0:  # all layers get the same mask, and to look at it is to wait for the GPU
        cache.pads = checked_pads(cache, mask, B, T)
    position = torch.arange(cache.length, cache.length + T, device=k.device).expand(B, T)
    if mask is not None:  # its newest query sees all real tokens of the row, so what it does not see are pads
        position = position - (~mask[:, 0, -1]).sum(-1, keepdim=True)  # (B, T), below 0 for pads
    all_k, all_v = k, v
    if cache.length > 0:  # copies of the old slots, before they are written over
        held = min(cache.length, keys.shape[2])
        all_k, all_v = torch.cat([keys[:, :, :held], k], 2), torch.cat([values[:, :, :held], v], 2)
        old = held_tokens(cache, held, position[:, :1] - 1)  # (B, held)
        mask = in_sight(position, torch.cat([old, position], 1), cache.window, cache.sinks)[:, None]
        mask[..., held:] |= torch.eye(T, dtype=torch.bool, device=k.device)  # a pad sees itself
    # Store the tokens that later queries may see. A pad that is its row's newest token sees itself, so it gets
    # position 0: the row's first real token gets it too and overwrites the pad.
    if T == 1:  # nothing to choose, and nonzero() would wait for the GPU
        row, t = torch.arange(B, device=k.device), torch.zeros(B, dtype=torch.long, device=k.device)
    else:
        stays = (position >= 0) & ((position < cache.sinks) | (position > position[:, -1:] - cache.window))
        row, t = stays.nonzero(as_tuple=True)
    n = position[row, t]
    slot = n.where(n < cache.sinks, cache.sinks + (n - cache.sinks) % cache.window)
    keys[row, :, slot], values[row, :, slot] = k[row, :, t], v[row, :, t]  # (row, G, D) each
    return all_k, all_v, mask


def held_tokens(cache, held, newest):
    """Which token each of the first `held` slots holds if `newest` (B, 1) is the last: (B, held), −1 for none.
    Window 3, 1 sink, newest 7: [0, 7, 5, 6]."""
    slot = torch.arange(held, device=newest.device)  # (held,)
    ring = newest - (newest - slot) % cache.window  # (B, held): the last n ≤ newest with n ≡ slot (mod window)
    ring = ring.masked_fill(ring < cache.sinks, -1)
    return torch.where(slot < cache.sinks, slot.where(slot <= newest, -1), ring)


def checked_pads(cache, mask, B, T):
    """The number of pads in each row, (B,), or None if there are none. ValueError unless the mask is padding_mask's and
    goes on where the earlier ones were: from any other the tokens' positions would be wrong, without a sign of it."""
    if mask is None:
        if cache.pads is not None and cache.pads.any():
            raise ValueError("the rolling cache holds rows with pads: it needs padding_mask's mask in every call")
        return None
    S, device = cache.length + T, mask.device
    if mask.dim() != 4 or mask.shape[1:] != (1, T, S) or mask.shape[0] not in (1, B):
        raise ValueError(f"a rolling cache needs a mask of shape {(B, 1, T, S)}, not {tuple(mask.shape)}")
    real, key = mask[:, 0, -1], torch.arange(S, device=device)  # (B, S), (S,)
    query = key[-T:, None]  # (T, 1)
    padded = (real[:, None] & (key <= query)) | (key == query)  # (B, T, S) padding_mask's for these real tokens
    pads = (~real).sum(-1).expand(B)  # a row of pads alone: all but the newest, which sees itself
    before = torch.zeros_like(pads) if cache.pads is None else cache.pads
    goes_on = (pads == before) | ((before >= cache.length - 1) & (pads > before))  # or it held pads alone so far
    right = (mask[:, 0] == padded).all() & (real[:, 1:] >= real[:, :-1]).all() & goes_on.all()
    if not right:
        raise ValueError(
            "a rolling cache takes no mask but padding_mask's, with all pads on the left, none after a real token"
        )
    return pads if pads.any() else None


def check_sight(cache, window, sinks):
    """ValueError for a layer with another window or other sinks than the cache keeps."""
    if (cache.window, cache.sinks) != (window, sinks):
        raise ValueError(
            f"the cache keeps {cache.sinks} sinks and a window of {cache.window}, the layer sees {sinks} and {window}"
        )
