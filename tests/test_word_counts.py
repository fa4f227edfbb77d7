"""support/word_counts.py against a plain count."""

from collections import Counter

import pytest
import regex
from test_tokenizer_bpe import TEXT

from support import word_counts
from support.errors import TokenizerError
from support.pieces import split
from support.word_counts import BORDER, blocks, count_words, cut
from tokenizer_bpe import PATTERN, train_bpe


def test_counting_in_processes_and_from_a_file_changes_nothing(tmp_path, monkeypatch):
    """Batches of a few characters end in the middle of words, of runs of spaces and line ends, of what is one piece."""
    text = (TEXT[:500] + " \n\n  \t x\r\n'll 12 'S.\n\n..\n,\n  ;") * 3
    (tmp_path / "a.txt").write_bytes(text.encode())
    plain = read_plainly(text)
    assert count_words(text, PATTERN) == plain == count_words(tmp_path / "a.txt", PATTERN)
    for size in (1, 300):
        monkeypatch.setattr(word_counts, "BATCH", size)
        assert list(cut(blocks(text))) != [text] == ["".join(cut(blocks(text)))]
        assert count_words(tmp_path / "a.txt", PATTERN) == plain
        assert count_words([text[:999], text[999:]], PATTERN) == read_plainly(text[:999]) + read_plainly(text[999:])
    with pytest.raises(TokenizerError, match="surrogate"):  # from a worker
        count_words(["a b " * 500, "c \ud83d"] * 9, PATTERN)


def test_a_text_without_a_border_is_searched_once(monkeypatch):
    class Border:
        searched = 0

        def search(self, text):
            self.searched += len(text)
            return BORDER.search(text)

    border = Border()
    monkeypatch.setattr(word_counts, "BATCH", 100)
    monkeypatch.setattr(word_counts, "BORDER", border)
    text = "." * 20_000
    assert list(cut(blocks(text))) == [text]
    assert border.searched < 1.1 * len(text)
    text = "a" * 250 + " b" + "." * 500  # a border in the third block; the next only after one that has none
    assert list(cut(blocks(text))) == ["a" * 250, " b" + "." * 500]


def test_a_border_is_one_for_tiktoken_too(monkeypatch):
    """A letter newer than its tables is punctuation to it, and takes the line end after it into its piece."""
    monkeypatch.setattr(word_counts, "BATCH", 1)
    text = "é\U000323b0\n\U000323b0 .\n\U000323b0\nx\n" * 3
    assert count_words(text, PATTERN) == Counter(piece.encode() for piece in split(text, PATTERN))


def read_plainly(text):
    return Counter(piece.encode() for piece in regex.findall(PATTERN, text))


def test_a_file_is_the_text_in_it(tmp_path):
    path, text = tmp_path / "a.txt", "one\r\ntwo\rthree\r\n" * 9
    path.write_bytes(text.encode())
    assert train_bpe(path, 12) == train_bpe(text, 12) != train_bpe(text.replace("\r", ""), 12)
    path.write_bytes(b"\xff\xfe")
    for bad in (path, tmp_path / "nothing.txt"):
        with pytest.raises(TokenizerError, match=f"{bad.name} cannot be read"):
            train_bpe(bad, 1)
