"""Token streams: the ids of a whole text in one file, which pretraining reads from disk piece by piece.

A stream is a flat file of uint16 or uint32 ids plus a JSON file (the sidecar) that describes it. Its name is a digest
of the texts and the tokenizer, so all runs with the same ones share it. `make_streams` writes the streams that are
missing; `data.batch_at` cuts a step's windows out of a stream.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import distributed
from tqdm import tqdm

from support.errors import ConfigError, DataError, TokenizerError
from support.files import must_write, replacing, to_json, write_whole
from support.locks import file_lock
from support.runs import RUNS


def write_stream(path: str | Path, pieces: Iterable[Sequence[int]], vocab_size: int, fingerprint: str) -> Path:
    """Write pieces of token ids one after another as one flat array -> the path.

    The type is uint16 if the vocabulary has at most 65,536 ids, else uint32. `PATH.json` records the type and the
    tokenizer's `fingerprint`: the ids of another tokenizer would train a bad model without any error.
    """
    path = Path(path)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    sidecar = Path(f"{path}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, tokens = hashlib.sha256(), 0
    with replacing(path) as partial:
        with open(partial, "wb") as file:
            for piece in pieces:
                ids = np.asarray(piece, dtype=np.int64)
                if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):  # a cast would wrap around silently
                    raise DataError(f"{path}: a token id outside 0..{vocab_size - 1} after the first {tokens}")
                data = ids.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(ids)
        if not tokens:
            raise DataError(f"{path}: no tokens to write")
        sidecar.unlink(missing_ok=True)  # if killed from here on, the stream has no sidecar and open_stream rejects it
    description = dict(dtype=dtype.name, tokens=tokens, fingerprint=fingerprint, sha256=digest.hexdigest())
    write_whole(sidecar, to_json(description, indent=1) + "\n")
    return path


def stream_path(folder: str | Path, texts: Sequence[str], tokenizer) -> Path:
    """The path of the stream of these texts under this tokenizer, the same in every run."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # so that ["ab"] and ["a", "b"] differ
        digest.update(data)
    return Path(folder) / f"{digest.hexdigest()[:24]}.bin"


def tokenise(path: Path, texts: Sequence[str], tokenizer, chunk: int = 1000) -> None:
    """Write the stream of `texts` to the path that `stream_path` gives, unless it exists. With several documents,
    <|endoftext|> follows each of them; a single text gets none.

    `chunk` documents at a time are encoded on all cores, into one file per chunk under PATH.parts. An interrupted run
    continues after the last finished chunk. (A single text is encoded in one go.) A second run that needs a stream of
    the same folder waits for the first. ConfigError on a full disk.
    """
    with must_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.parent):
            if not (path.exists() and Path(f"{path}.json").exists()):
                _tokenise(path, texts, tokenizer, chunk)


def _tokenise(path, texts, tokenizer, chunk):
    parts = Path(f"{path}.parts")
    parts.mkdir(exist_ok=True)
    end = [tokenizer.endoftext_id] if len(texts) > 1 else []
    files = []
    starts = range(0, len(texts), chunk)
    for i in tqdm(starts, desc="tokenising", unit="part", leave=False, disable=len(texts) <= chunk):
        files.append(parts / f"{i}.npy")
        if not files[-1].exists():
            ids = [np.array(ids + end, dtype=np.uint32) for ids in tokenizer.encode_batch(texts[i : i + chunk])]
            with replacing(files[-1]) as temporary:
                np.save(temporary, np.concatenate(ids))
    write_stream(path, (np.load(file) for file in files), tokenizer.vocab_size, tokenizer.fingerprint)
    shutil.rmtree(parts)


def open_stream(path: str | Path, fingerprint: str, check: bool = False) -> np.memmap:
    """The stream as a read-only (tokens,) array on disk. DataError if it is not what `write_stream` wrote.

    check: also read the whole file and compare its sha256, a second or two per GB.
    """
    path, sidecar = Path(path), Path(f"{path}.json")
    remedy = "delete it and tokenise again"
    for file in (path, sidecar):
        if not file.is_file():
            raise DataError(f"no {file}: {remedy}")
    try:
        description = json.loads(sidecar.read_text(encoding="utf-8"))
        dtype, tokens = np.dtype(description["dtype"]), int(description["tokens"])
        written_with = description["fingerprint"]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{sidecar} cannot be read ({error!r}): {remedy}") from error
    if written_with != fingerprint:
        raise DataError(f"{path} was made with tokenizer {written_with}, this run has {fingerprint}: {remedy}")
    if path.stat().st_size != tokens * dtype.itemsize:
        raise DataError(f"{path} has {path.stat().st_size} bytes, not {tokens} x {dtype.itemsize}: {remedy}")
    if check:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != description.get("sha256"):
                raise DataError(f"{path} has changed since it was written: {remedy}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


class Streams(dict):
    """{"train", "valid"}: the ids of each split, (tokens,) arrays on disk. A run saves only their file names, digests
    of text and tokenizer, so that a resumed run can check that the text is still the same."""

    def __init__(self, data, arrays):
        super().__init__(arrays)
        self.data = data

    def state_dict(self):
        return {split: Path(array.filename).name for split, array in self.items()}

    def load_state_dict(self, saved):
        if saved != self.state_dict():
            raise ConfigError(f"--resume continues a run as it was, but the text of --data {self.data} has changed")


def make_streams(config, dist, tokenizer, context, texts):
    """Encode the texts into runs/streams, once for all runs that need the same stream. Rank 0 writes; all ranks map the
    files into memory."""
    paths = {split: stream_path(RUNS / "streams", texts[split], tokenizer) for split in ("train", "valid")}
    texts_by_name = {f"the {split} text of --data {config.data}": path.name for split, path in paths.items()}
    dist.same({"the tokenizer": tokenizer.fingerprint} | texts_by_name)
    if dist.is_main:
        for split, path in paths.items():
            try:
                tokenise(path, texts[split], tokenizer)
            except TokenizerError as error:  # a character that the alphabet of --init lacks
                raise TokenizerError(f"the {split} text of {config.data}: {error}") from None
    if dist.world > 1:
        distributed.barrier()
    arrays = {split: open_stream(path, tokenizer.fingerprint, dist.is_main) for split, path in paths.items()}
    for split, array in arrays.items():
        if len(array) <= context:
            raise ConfigError(
                f"the {split} text of {config.data} has {len(array)} tokens, a window needs {context + 1}: "
                + ("give more text" if config.init else "give more text or a smaller --model.context")
            )
    return Streams(config.data, arrays)
