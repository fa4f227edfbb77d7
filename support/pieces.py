"""The pieces that a pattern cuts a text into, and their ids by tiktoken: for a run of any length of any character.

tiktoken splits and merges fast, but its regular expressions panic in a run of a million blanks. The `regex` package
does not: it splits such a text here, which takes longer. The two also know different editions of
Unicode: to the older one a newly encoded letter is no letter yet. The edition that counts is tiktoken's, which is also
that of the `tokenizers` package, so that the ids are those which transformers gives.
"""

import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from itertools import groupby

import regex
import tiktoken

from support.errors import TokenizerError

BLOCK = 100_000  # characters; tiktoken copes with ten times as many blanks in a row

# For each class a character that both packages put into it, which stands in for those that only tiktoken does.
STAND_INS = {
    r"\p{Lu}": "Þ",
    r"\p{Ll}": "þ",
    r"\p{Lt}": "ǅ",
    r"\p{Lm}": "ʰ",
    r"\p{Lo}": "ƻ",
    r"\p{M}": "\u0301",
    r"\p{Nd}": "٣",
    r"\p{N}": "½",
    r"\p{P}": "¿",
    r"\p{S}": "±",
    r"\s": "\u3000",
}
NO_CLASS = "\ufdd0"  # never to be assigned


def split(text, pattern):
    """text -> [piece, …], what `pattern` matches from left to right, by tiktoken's edition of Unicode."""
    cutter, seen = regex.compile(pattern), as_tiktoken_sees(text)
    if seen is text and not cutter.groups:
        return cutter.findall(text)
    return [text[match.start() : match.end()] for match in cutter.finditer(seen)]


def as_tiktoken_sees(text):
    """text -> a text of the same length, in which `regex` finds the classes that tiktoken finds in this one."""
    if text.isascii():
        return text
    characters = set(text)
    if new := characters.difference(seen_as):
        find_stand_ins(new)
    stand_ins = {character: seen_as[character] for character in characters if seen_as[character] != character}
    return text.translate(str.maketrans(stand_ins)) if stand_ins else text


seen_as = {}  # {character: its stand-in, or itself where both packages agree}, for the characters met so far


def find_stand_ins(characters):
    """Find the stand-ins of some characters."""
    text = "".join(characters)
    seen, differing = {}, set()
    for kind in STAND_INS:  # tiktoken leaves out what its pattern does not match
        seen[kind] = set(bytes(class_encoder(kind).encode_ordinary(text)).decode())
        differing |= seen[kind].symmetric_difference(regex.findall(kind, text))
    for character in characters:
        other = next((other for kind, other in STAND_INS.items() if character in seen[kind]), NO_CLASS)
        seen_as[character] = other if character in differing else character


@cache
def class_encoder(kind):
    """A tiktoken.Encoding whose "ids" are the bytes of those characters of a text that are in a class."""
    every_byte = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(kind, pat_str=kind, mergeable_ranks=every_byte, special_tokens={})


def utf8(text):
    """The bytes of a text. TokenizerError on half a surrogate pair (from broken JSON); tiktoken would encode U+FFFD."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text must be a str, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        where = f"character {text[error.start]!r} in {around(text, error.start)}"
        raise TokenizerError(f"{where} is half of a surrogate pair, which UTF-8 cannot hold") from None


def around(text, i):
    """Character i of a text with its neighbours, quoted, so that a reader finds it in a long file."""
    return repr(text[max(0, i - 20) : i + 21])


class FastEncoder:
    """The ids of tokenizer_bpe.encode_naive, by tiktoken.

    tiktoken knows no merges: it joins the neighbours whose union has the lowest id, and takes a piece that is a token
    as it stands. That is the same if ids rise with the merges (checked here) and each token can be spelled in one way.
    Training sees to both: before the merge that makes "abcd", every "abcd" whose ends are token ends was cut in the
    same way, so that no later pair can spell it again. A loaded file must pass tokenizer_bpe.check_spelling.
    """

    def __init__(self, merges, ids, pattern, nfc=False):
        """merges: [(left bytes, right bytes), …] in order; ids: {bytes: id}; nfc: compose characters (é from e and ´)
        first. Raises TokenizerError."""
        merged = [ids.get(left + right, -1) for left, right in merges]
        if -1 in merged or merged != sorted(set(merged)) or len(merged) != sum(len(token) > 1 for token in ids):
            raise TokenizerError("the merges do not make the vocabulary's tokens one by one in the order of their ids")
        self.ids, self.pattern, self.nfc = ids, pattern, nfc
        self.tiktoken = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ids, special_tokens={})
        # SmolLM2's vocabulary lacks 21 bytes, mostly those that UTF-8 never uses; tiktoken would panic on them.
        self.absent = bytes(byte for byte in range(256) if bytes([byte]) not in ids)

    def prepare(self, text):
        """text -> the text that is split. Raises TokenizerError if it holds a byte that has no id."""
        data = utf8(text)
        if self.nfc:
            text = compose(text)
            data = text.encode()
        if self.absent and len(data.translate(None, self.absent)) < len(data):
            raise TokenizerError(f"the text holds one of the bytes {list(self.absent)}, which this vocabulary lacks")
        return text

    def encode(self, text):
        """text -> ids. A text with a block of nothing but white space does not go to tiktoken whole; a run of 2 BLOCK
        blanks always fills such a block, wherever it begins. Raises TokenizerError."""
        text = self.prepare(text)
        blank = len(text) >= BLOCK and any(
            text[i : i + BLOCK].isspace() for i in range(0, len(text) - BLOCK + 1, BLOCK)
        )
        if not blank:
            try:
                return self.tiktoken.encode_ordinary(text)
            except BaseException as error:  # Rust's panic, which an odd pattern of a loaded file can cause elsewhere
                if type(error).__name__ != "PanicException":
                    raise
        ids_of, ids = {}, []
        for piece in split(text, self.pattern):
            if piece not in ids_of:
                ids_of[piece] = self.one_piece.encode_ordinary(piece)
            ids += ids_of[piece]
        return ids

    def encode_batch(self, texts):
        """The ids of each text, on several threads: tiktoken releases Python's lock."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    @cached_property
    def one_piece(self):
        """tiktoken, which takes any text for one piece."""
        return tiktoken.Encoding("piece", pat_str=r"[\s\S]+", mergeable_ranks=self.ids, special_tokens={})


def compose(text):
    """text -> its NFC. The marks of a long run are put in order here: unicodedata takes n² steps for n of them."""
    for vowel in "\u0f73\u0f75\u0f81":  # Tibetan; the only ones that are no marks of a class, but fall into such
        text = text.replace(vowel, unicodedata.normalize("NFD", vowel))
    if any(map(unicodedata.combining, text[::100])):  # such a run has one there
        text = regex.sub(r"\p{M}{100,}", lambda run: ordered_marks(run[0]), text)
    return unicodedata.normalize("NFC", text)


def ordered_marks(run):
    """Unicode's canonical order: by combining class, where that is not 0; marks of one class keep their order."""
    groups = groupby(run, lambda mark: unicodedata.combining(mark) > 0)
    return "".join(mark for _, group in groups for mark in sorted(group, key=unicodedata.combining))


def doubtful_tokens(merges):
    """Tokens that may not come out whole when the merges [(left bytes, right bytes), …] are applied in order to their
    bytes. The shortest of those that do not is among them, and of those that do only a few.

    A token left + right is safe if both parts are, and no merge joins a piece across the border between them too
    early. Going back in time from left | right, the piece that was merged later is split again, and two others touch at
    the border: x | y. A merge of x and y must not come before the one that used up x, or y. (Of two equal pairs the
    left one is merged first.)
    """
    place = {pair: k for k, pair in enumerate(merges)}
    made = {left + right: (k, left, right) for k, (left, right) in enumerate(merges)}
    byte = (-1, b"", b"")  # made before all merges

    def is_in_order(k, part):
        return len(part) == 1 or made.get(part, (k,))[0] < k

    if len(made) < len(merges) or not all(is_in_order(k, part) for k, pair in enumerate(merges) for part in pair):
        yield from made  # a token in two ways, or before its parts: no such file is known
        return
    for token, (k, x, y) in made.items():
        while len(x) > 1 or len(y) > 1:
            (a, _, x_right), (b, y_left, _) = made.get(x, byte), made.get(y, byte)
            if a > b:
                x, too_early = x_right, a
            else:
                y, too_early = y_left, b + 1
            if place.get((x, y), k) < too_early:
                yield token
                break
