"""Token streams: pretraining reads one long array of ids from disk, without loading it.

A stream is a flat file of uint16 or uint32 and, beside it, a JSON file that says how to read it. It stands under a name
made of its texts and its tokenizer, so every run that wants the same one shares it: `make_streams` makes what is not
there, `data.batch_at` cuts a step's windows out of it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import distributed

from support.errors import ConfigError, DataError
from support.locks import alone
from support.runs import RUNS


def write_stream(path: str | Path, pieces: Iterable[Sequence[int]], vocab_size: int, fingerprint: str) -> Path:
    """Write pieces of token ids one after another as one flat array -> the path.

    uint16 up to 65,536 ids, else uint32: half the disk and half the reading. Beside it `PATH.json` says how
    to read it and which tokenizer (`fingerprint`) made it: another tokenizer's ids train wrongly and do not
    complain.
    """
    path = Path(path)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    sidecar = Path(f"{path}.json")
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, tokens = hashlib.sha256(), 0
    try:
        with open(partial, "wb") as file:
            for piece in pieces:
                ids = np.asarray(piece, dtype=np.int64)
                if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):  # a cast would wrap in silence
                    raise DataError(f"{path}: a token id outside 0..{vocab_size - 1} after the first {tokens}")
                data = ids.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(ids)
        if not tokens:
            raise DataError(f"{path}: no tokens to write")
        sidecar.unlink(missing_ok=True)  # killed from here on: a stream without sidecar, which open_stream refuses
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    about = dict(dtype=dtype.name, tokens=tokens, fingerprint=fingerprint, sha256=digest.hexdigest())
    partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, sidecar)
    return path


def stream_path(folder: str | Path, texts: Sequence[str], tokenizer) -> Path:
    """Where the stream of these texts under this tokenizer stands: the same for every run that wants it."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # so that ["ab"] and ["a", "b"] differ
        digest.update(data)
    return Path(folder) / f"{digest.hexdigest()[:24]}.bin"


def tokenise(path: Path, texts: Sequence[str], tokenizer, some: int = 1000) -> None:
    """Write the stream of `texts` to what `stream_path` names, unless it is there. Several documents are followed by
    <|endoftext|> each; one alone is a text without borders.

    `some` documents at a time, on all cores, into a file of their own under PATH.parts. Whoever is interrupted finds
    them there the next time and goes on after the last. (One text alone is encoded in one go.) A second run that wants
    a stream of the same folder waits for the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        if not (path.exists() and Path(f"{path}.json").exists()):
            _tokenise(path, texts, tokenizer, some)


def _tokenise(path, texts, tokenizer, some):
    from tqdm import tqdm

    parts = Path(f"{path}.parts")
    parts.mkdir(exist_ok=True)
    end = [tokenizer.endoftext_id] if len(texts) > 1 else []
    files = []
    for i in tqdm(range(0, len(texts), some), desc="tokenising", unit="part", leave=False, disable=len(texts) <= some):
        files.append(parts / f"{i}.npy")
        if not files[-1].exists():
            ids = [np.array(ids + end, dtype=np.uint32) for ids in tokenizer.encode_batch(texts[i : i + some])]
            partial = parts / f"{i}.{os.getpid()}.part"
            with open(partial, "wb") as file:
                np.save(file, np.concatenate(ids))
            os.replace(partial, files[-1])
    write_stream(path, (np.load(file) for file in files), tokenizer.vocab_size, tokenizer.fingerprint)
    shutil.rmtree(parts)


def open_stream(path: str | Path, fingerprint: str, check: bool = False) -> np.memmap:
    """The stream as a read-only (tokens,) array on disk; refused if it is not what `write_stream` left.

    check: read it all and compare its sha256 too, a second or two per GB.
    """
    path, sidecar = Path(path), Path(f"{path}.json")
    again = "delete it and tokenise again"
    for file in (path, sidecar):
        if not file.is_file():
            raise DataError(f"no {file}: {again}")
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        dtype, tokens, made_with = np.dtype(about["dtype"]), int(about["tokens"]), about["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{sidecar} cannot be read ({error!r}): {again}") from error
    if made_with != fingerprint:
        raise DataError(f"{path} was made with tokenizer {made_with}, this run has {fingerprint}: {again}")
    if path.stat().st_size != tokens * dtype.itemsize:
        raise DataError(f"{path} has {path.stat().st_size} bytes, not {tokens} x {dtype.itemsize}: {again}")
    if check:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about.get("sha256"):
                raise DataError(f"{path} has changed since it was written: {again}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


class Streams(dict):
    """{"train", "valid"}: the ids of a text, (tokens,) arrays on disk. What a run keeps of them are their names, which
    are digests of text and tokenizer: a resumed run must find the same."""

    def __init__(self, data, arrays):
        super().__init__(arrays)
        self.data = data

    def state_dict(self):
        return {split: Path(array.filename).name for split, array in self.items()}

    def load_state_dict(self, saved):
        if saved != self.state_dict():
            raise ConfigError(f"--resume continues a run as it was, but the text of --data {self.data} has changed")


def make_streams(config, dist, tokenizer, context, texts):
    """The texts as ids in runs/streams, made once by rank 0 for every run that wants the same; all ranks map the files
    into memory."""
    paths = {split: stream_path(RUNS / "streams", texts[split], tokenizer) for split in ("train", "valid")}
    if dist.is_main:
        for split, path in paths.items():
            tokenise(path, texts[split], tokenizer)
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
