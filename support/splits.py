"""The split that a text belongs to, by its hash.

Unlike a shuffled list, a hash gives a text the same split in every version of a file and at every sample size, and
gives two copies of a text the same split.
"""

import hashlib
from collections.abc import Sequence

from support.errors import DataError

SPLITS = ("train", "valid", "test")
SPLIT_OF_DIGIT = ("train",) * 8 + ("valid", "test")


def check_split(split: str, splits: Sequence[str] = SPLITS) -> None:
    """DataError if the split is not one of `splits`."""
    if split not in splits:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(splits)}")


def split_of(text: str) -> str:
    """ "train" (80 %), "valid" or "test" (10 % each), by a hash of the text that ignores case and whitespace."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return SPLIT_OF_DIGIT[int.from_bytes(digest, "big") % 10]
