"""The data sets by name: where each of their files lies, and downloading it if it is missing.

A file is looked for in $ALIGN_DATA (default `downloads/`). If it is not there, it is downloaded to that folder and its
sha256 is checked. For data.py and support/records.py: `find` gives the file, `refuse` raises if a data set has no such
records, `part_of` says which of its files a split is in, and `none_left` is the error if a split is empty.
"""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.errors import DataError
from support.files import replacing
from support.splits import check_split
from support.tasks import TASKS

SHA256 = {  # of downloaded files; a file that is not listed here is not checked
    "gsm8k/train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "gsm8k/test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "tinyshakespeare/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "preferences/short_style_preferences.json": "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
}


class Source(NamedTuple):
    """One file of a data set."""

    path: str  # below $ALIGN_DATA
    url: str = ""  # "" = no automatic download


def files(path: str, url: str = "", splits: Sequence[str] = ("train", "test")) -> dict[str, Source]:
    """{split: its file}; {} in the path and the URL stands for the name of the split."""
    return {split: Source(path.format(split), url.format(split)) for split in splits}


GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
STYLE = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/04_preference-tuning-with-dpo/"
HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/"

# {} is the split; only a published test file is called test. What has no URL has to be put there by hand. polarity:
# sentences from film reviews (Pang and Lee, ACL 2005); reviews: whole ones (ACL 2004); hh: Anthropic's helpful-base
# dialogues (arXiv:2204.05862).
DATASETS = {
    "gsm8k": files("gsm8k/{}.jsonl", GSM8K + "grade_school_math/data/{}.jsonl"),
    "tinyshakespeare": files("tinyshakespeare/input.txt", SHAKESPEARE, splits=("train", "valid")),
    "tinystories": files("tinystories/{}.txt", splits=("train", "valid")),
    "polarity": files("sentiment/sentence_polarity_{}.tsv"),
    "reviews": files("sentiment/movie_reviews_{}.jsonl.gz"),
    "imdb": files("sentiment/imdb_{}.jsonl.gz"),
    "ultrafeedback": files("preferences/ultrafeedback_{}.jsonl"),
    "hh": files("preferences/hh_helpful_{}.jsonl.gz", HH + "{}.jsonl.gz"),
    "instructions": files("instruction/instruction_data.json", splits=("train",)),
    "ratings": files("ratings/rated_responses.csv", splits=("train",)),
    "style": files(
        "preferences/short_style_preferences.json", STYLE + "instruction-data-with-preference.json", splits=("train",)
    ),
}

# What a kind of record is called in messages, and the data sets that have it, beside the tasks.
KINDS = {
    "text for pretraining": ("tinystories", "tinyshakespeare", "gsm8k", "instructions", "ratings"),
    "problems": ("gsm8k", "instructions", "ratings", "style"),
    "preference pairs": ("ultrafeedback", "hh", "style"),
    "labelled texts": ("sentiment", "polarity", "reviews", "imdb"),
}


def data_folder() -> Path:
    return Path(os.environ.get("ALIGN_DATA") or "downloads")


def fetch(name: str, source: Source) -> Path:
    """The path of the file, downloaded first if it is missing. An incomplete download never has the final name."""
    path = data_folder() / source.path
    if path.is_dir():
        raise DataError(f"{path} is a folder where the file of {name} is expected: remove it")
    if path.is_file():
        return path
    by_hand = f"put the file at {path} by hand, or set ALIGN_DATA to the folder that has {source.path}"
    if not source.url:
        raise DataError(f"{name}: no {path}, and this dataset has no automatic download: {by_hand}")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            with urllib.request.urlopen(source.url, timeout=30) as reply, open(partial, "wb") as file:
                size = int(reply.headers.get("Content-Length") or 0) or None
                with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                    while chunk := reply.read(1 << 16):
                        file.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
                if size and file.tell() != size:  # a broken connection looks like the end of the file
                    raise OSError(f"{file.tell()} of {size} bytes came")
            expected = SHA256.get(source.path)
            if expected and digest.hexdigest() != expected:
                raise DataError(f"{source.url} has changed: sha256 {digest.hexdigest()}, not {expected}; {by_hand}")
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise DataError(f"{name}: cannot download {source.url} ({error}): {by_hand}") from error
    return path


def fetch_missing(name: str | Path) -> None:
    """Download what a data set still lacks, as far as its files have an address."""
    for source in DATASETS.get(str(name), {}).values():
        if source.url:
            fetch(str(name), source)


def imdb_reviews(part: str, source: Source) -> list[tuple[str, int]]:
    """The IMDB reviews (Maas et al. 2011), 25,000 each in train and test, through Hugging Face's `datasets` -> (text,
    label) of each."""
    path = data_folder() / source.path
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"imdb: no {path}, and no package to download it: pip install -e '.[hub]'") from None
    try:
        reviews = load_dataset("stanfordnlp/imdb", split=part)
    except Exception as error:  # any error of the network, the hub or the cache
        message = " ".join(str(error).split())[:200]
        raise DataError(f"imdb: no {path}, and the download failed ({type(error).__name__}: {message})") from error
    return [(review["text"].replace("<br />", "\n"), review["label"]) for review in reviews]


def find(name: str | Path, split: str = "train") -> Path:
    """The file that holds `split` of a data set, downloaded if need be; or `name` itself where it is a path.

    A known name wins over a file of the same name: write `./gsm8k` for the file.
    """
    if str(name) in TASKS:
        raise DataError(f"{name} is built in and has no file: use load_problems or load_text")
    if str(name) in DATASETS:
        check_split(split, tuple(DATASETS[str(name)]))
        return fetch(str(name), DATASETS[str(name)][split])
    path = Path(name)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the file in it")
    if not path.is_file():
        known = ", ".join([*TASKS, *DATASETS, "sentiment"])
        raise DataError(f"{name}: no such file, and not one of the known datasets {known}")
    return path


def has_test_file(name: str) -> bool:
    """Whether a data set has a test file of its own. A path has none, nor has a data set of one file."""
    return "test" in DATASETS.get(name, ())


def part_of(name: str, split: str) -> str:
    """Which file of a data set the records of a split come from, "train" or "test"."""
    return "test" if split == "test" and has_test_file(name) else "train"


def none_left(what: str, name: str, split: str, n: int) -> DataError:
    """The error if none of the n records of a file is in a split. what: what a record is."""
    if name == "gsm8k":
        return DataError(f"{find(name)} has {n} {what}s, and the last 500 are valid: none is left for {split}")
    advice = "" if part_of(name, split) == "test" else ": the split is by hash, add more records"
    return DataError(f"{name} has no {what} in the split {split}{advice}")


def refuse(name: str, what: str) -> None:
    """DataError if this is a task or a data set that has no such records. what: a row of KINDS."""
    offer = [*([] if what == "labelled texts" else TASKS), *KINDS[what]]
    known = {*TASKS, *DATASETS, *KINDS["labelled texts"]}
    if name in known and name not in offer:
        raise DataError(f"{name} has no {what}: choose {', '.join(offer)}, or the path of a file")
