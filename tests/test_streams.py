"""support/streams.py: token streams on disk."""

import hashlib
import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from support import errors, streams
from support.errors import DataError


@pytest.mark.parametrize(("vocab", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_stream_round_trip(tmp_path, vocab, dtype):
    docs = [[0, vocab - 1, 2], [], [5]]
    path = streams.write_stream(tmp_path / "sub/a.bin", iter(docs), vocab, "tok")
    stream = streams.open_stream(path, "tok")
    assert stream.dtype == dtype
    assert stream.tolist() == [token for doc in docs for token in doc]
    about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
    assert about["tokens"] == len(stream)
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.bin", "a.bin.json"]
    assert not stream.flags.writeable


def test_stream_in_chunks(tmp_path):
    docs = [list(range(i, i + 50_000)) for i in range(50)]
    stream = streams.open_stream(streams.write_stream(tmp_path / "a", docs, 60_000, "tok"), "tok")
    assert np.array_equal(stream, np.array(docs).reshape(-1))


class Letters:
    """A tokenizer of one id per character, which counts the texts that it was given."""

    fingerprint, vocab_size, endoftext_id = "letters", 300, 299

    def __init__(self, most=math.inf):
        self.seen, self.most = [], most

    def encode_batch(self, texts):
        if len(self.seen) + len(texts) > self.most:
            raise KeyboardInterrupt
        self.seen += texts
        return [[ord(c) for c in text] for text in texts]


def test_a_tokenisation_that_broke_off_goes_on(tmp_path):
    texts = [f"text {i}" for i in range(25)]
    expected = [i for text in texts for i in [*map(ord, text), 299]]
    path = streams.stream_path(tmp_path, texts, Letters())
    with pytest.raises(KeyboardInterrupt):
        streams.tokenise(path, texts, Letters(most=13), chunk=4)
    assert not path.exists()
    tokenizer = Letters()
    streams.tokenise(path, texts, tokenizer, chunk=4)
    assert tokenizer.seen == texts[12:]  # the first three parts were there
    assert streams.open_stream(path, "letters", check=True).tolist() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    streams.tokenise(path, texts, None)  # it is there: nothing is done

    other, begun = tmp_path / "other.bin", threading.Event()

    class Slow(Letters):  # while one run tokenises, a second that wants the same stream waits and finds it made
        def encode_batch(self, some):
            begun.set()
            time.sleep(0.2)
            return super().encode_batch(some)

    first = threading.Thread(target=streams.tokenise, args=(other, texts, Slow()))
    first.start()
    assert begun.wait(10)
    streams.tokenise(other, texts, None)
    assert Path(f"{other}.json").exists()
    first.join()
    other.unlink()  # as the message about a damaged stream advises
    streams.tokenise(other, texts, Letters())
    assert streams.open_stream(other, "letters").tolist() == expected


def test_one_document_has_no_border(tmp_path):
    path = streams.stream_path(tmp_path, ["abc"], Letters())
    streams.tokenise(path, ["abc"], Letters())
    assert streams.open_stream(path, "letters").tolist() == [97, 98, 99]


def test_streams_of_other_texts_or_tokenizers_stand_elsewhere(tmp_path):
    other = Letters()
    other.fingerprint = "other"
    cases = [(["ab"], Letters()), (["a", "b"], Letters()), (["", "ab"], Letters()), (["ab"], other)]
    paths = {streams.stream_path(tmp_path, texts, tokenizer) for texts, tokenizer in cases}
    assert len(paths) == len(cases)
    assert streams.stream_path(tmp_path, ["ab"], Letters()) in paths


@pytest.mark.parametrize("bad", [-1, 100])
def test_stream_refuses_ids_outside_the_vocabulary(tmp_path, bad):
    streams.write_stream(tmp_path / "a", [[1, 2]], 100, "tok")
    with pytest.raises(DataError, match=r"outside 0\.\.99"):
        streams.write_stream(tmp_path / "a", [[1], [bad]], 100, "tok")
    assert streams.open_stream(tmp_path / "a", "tok").tolist() == [1, 2]  # the old stream is untouched
    assert len(list(tmp_path.iterdir())) == 2


def test_stream_refusals(tmp_path):
    with pytest.raises(DataError, match="no tokens"):
        streams.write_stream(tmp_path / "a", [], 10, "tok")
    with pytest.raises(DataError, match=r"no .*/a:"):
        streams.open_stream(tmp_path / "a", "tok")
    path = streams.write_stream(tmp_path / "a", [[1, 2, 3]], 10, "tok")
    sidecar = Path(f"{path}.json")
    with pytest.raises(DataError, match="made with tokenizer tok, this run has other"):
        streams.open_stream(path, "other")
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match="has 8 bytes, not 3 x 2"):
        streams.open_stream(path, "tok")
    bad = sidecar.read_text(encoding="utf-8").replace('"tokens": 3', '"tokens": Infinity')
    for content in (bad, "{}"):
        sidecar.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="cannot be read"):
            streams.open_stream(path, "tok")
    sidecar.unlink()
    with pytest.raises(DataError, match=r"no .*a\.json"):
        streams.open_stream(path, "tok")


def test_stream_checksum(tmp_path):
    path = streams.write_stream(tmp_path / "a", [[1, 2, 3]], 10, "tok")
    assert streams.open_stream(path, "tok", check=True).tolist() == [1, 2, 3]
    np.array([1, 2, 4], dtype=np.uint16).tofile(path)
    assert streams.open_stream(path, "tok").tolist() == [1, 2, 4]  # of the right size, so only the checksum tells
    with pytest.raises(errors.DataError, match="has changed since it was written"):
        streams.open_stream(path, "tok", check=True)
