"""The rows of a key/value cache, for generate.py: a prompt is computed once for all of its answers, and sequences that
have ended leave the batch. Parents of the caches in attention.py."""

import copy


class RowsOfKVCache:
    """Of a cache whose `store` is (L, 2, B, G, max_len, D), filled up to `length`."""

    @property
    def keys(self):
        return [store[0] for store in self.store]  # L times (B, G, max_len, D)

    @property
    def values(self):
        return [store[1] for store in self.store]

    def repeat(self, repeats, max_len, dtype=None):
        """A cache with each row `repeats` times, room for `max_len` tokens, and another dtype if one is given."""
        L, _, B, G, _, D = self.store.shape
        out = type(self)(L, B * repeats, G, max_len, D, dtype or self.store.dtype, self.store.device)
        out.length = self.length
        copies = out.store.view(L, 2, B, repeats, G, max_len, D)[..., : self.length, :]
        copies.copy_(self.store[:, :, :, None, :, : self.length])  # (L, 2, B, 1, G, S, D) to all repeats
        return out

    def keep(self, rows):
        """Keep only these rows (integer indices), in place."""
        for store in self.store:  # (2, B, G, max_len, D)
            store[:, : len(rows), :, : self.length] = store[:, rows, :, : self.length]
        self.store = self.store[:, :, : len(rows)]


class RowsOfRollingKVCache:
    """Of a cache whose `keys` and `values` are lists of (B, G, slots, D), and whose `pads` are (B,) or None."""

    def repeat(self, repeats, max_len, dtype=None):
        """A cache with each row `repeats` times; `max_len` and `dtype`, which KVCache has, have no effect here."""
        out = copy.copy(self)
        out.keys = [x.repeat_interleave(repeats, dim=0) for x in self.keys]
        out.values = [x.repeat_interleave(repeats, dim=0) for x in self.values]
        out.pads = None if self.pads is None else self.pads.repeat_interleave(repeats)
        return out

    def keep(self, rows):
        """Keep only these rows (integer indices)."""
        self.keys, self.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        self.pads = None if self.pads is None else self.pads[rows]
