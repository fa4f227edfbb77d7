"""Counting the words of a text, the input of BPE training. Uses all cores; a file may be larger than the memory."""

import multiprocessing
import os
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import regex

from support.errors import TokenizerError
from support.pieces import as_tiktoken_sees, split, utf8

BATCH = 2**22  # characters that one process counts at a time; this bounds the memory, not the size of the text
# A long text is cut at the last place where a space follows a letter or digit, or where a letter or digit begins a
# line. No word of tokenizer_bpe.PATTERN crosses such a place; a word of another pattern may.
BORDER = regex.compile(r"(?r)(?<=[\p{L}\p{N}])\s|(?<=[\r\n])(?=[\p{L}\p{N}])")


def count_words(texts, pattern):
    """Count the words that `pattern` matches: {bytes: count}. A text has far fewer different words than words.

    texts: a string, the Path of a file (read piece by piece), or several of them. pattern: tokenizer_bpe.PATTERN, the
    one that BORDER is made for. Raises TokenizerError.
    """
    jobs, words = batches(texts), Counter()
    first = list(islice(jobs, 2))
    processes = 1 if len(first) < 2 else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if processes == 1:
        for batch in chain(first, jobs):
            words.update(count_batch(batch, pattern))
    else:
        # Forked, so that scripts without `if __name__ == "__main__"` work. The workers handle nothing but strings.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            pending = deque()
            for batch in chain(first, jobs):
                pending.append(pool.submit(count_batch, batch, pattern))
                if len(pending) > 2 * processes:
                    words.update(pending.popleft().result())
            for job in pending:
                words.update(job.result())
    if not words:
        raise TokenizerError("the training text is empty: there is nothing to count")
    return {word.encode(): count for word, count in words.items()}


def count_batch(batch, pattern):
    """[text, …] -> {word: count}"""
    words = Counter()
    for text in batch:
        utf8(text)
        words.update(split(text, pattern))
    return words


def batches(texts):
    """Lists of texts with about BATCH characters in all; longer texts are cut at a BORDER."""
    batch, length = [], 0
    for text in [texts] if isinstance(texts, str | Path) else texts:
        for piece in cut(blocks(text)):
            batch.append(piece)
            length += len(piece)
            if length >= BATCH:
                yield batch
                batch, length = [], 0
    yield batch


def blocks(text):
    """A string or a file in blocks of BATCH characters."""
    if isinstance(text, Path):
        try:
            with text.open(encoding="utf-8", newline="") as file:  # keep \r unchanged
                while block := file.read(BATCH):
                    yield block
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{text} cannot be read: {error}") from None
    else:
        utf8(text)
        yield from (text[i : i + BATCH] for i in range(0, len(text), BATCH))


def cut(blocks):
    """Blocks of one text, which may end inside a word -> the same text in pieces that end at a BORDER, between
    words."""
    parts = []  # of the piece that waits for its border
    for block in blocks:
        before = parts[-1][-1] if parts else ""
        parts.append(block)
        if len(block) >= BATCH and (border := BORDER.search(as_tiktoken_sees(before + block))):
            at = border.start() - len(before)
            yield "".join([*parts[:-1], block[:at]])
            parts = [block[at:]]
    if parts:
        yield "".join(parts)
