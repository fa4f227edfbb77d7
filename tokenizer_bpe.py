r"""Byte-pair encoding: from text to ids and back, trained here, opened anywhere.

A model reads numbers, so a text becomes ids first. Its bytes are ids already, but four or five per word. So find the
two neighbours that occur together most often, make the pair one new token, write it down as a *merge*, and repeat
(Sennrich et al. 2016, arXiv:1508.07909; on bytes instead of characters since GPT-2, Radford et al. 2019). Every text
has ids, because every byte has one; frequent words are one token, rare ones a few. Before all this a regular
expression, PATTERN below, cuts the text into words, and no merge crosses a cut. The size V of the vocabulary is a
trade: with more merges a text has fewer ids, but each id costs a row of the embedding (V, C) and a logit at every
position. `python pretrain.py` trains V = 768 on its own text: 256 bytes, 509 merges, 3 special tokens. Later stages
take the checkpoint's tokenizer.

    aaabdaaabac   --aa→Z-->   ZabdZabac   --ab→Y-->   ZYdZYac   --ZY→X-->   XdXac        5 ids instead of 11

Training: a text -> n merges

    words = how often each word of the text occurs      " dog": 77
    parts = the bytes of each word                      [32, 100, 111, 103]
    for new in 256, 257, …, 255 + n:
        pairs = how often each two neighbours occur     over all words, times how often the word does
        best  = the most frequent; ties by `tie_order`  (111, 103), "o" + "g"
        in every word, best -> new                      [32, 100, 256]
        merges += best

Encoding: a text and the merges -> ids

    for each word of the text:
        parts = its bytes
        while some two neighbours are a merge:
            join those whose merge was learned first
        ids += the id of each part

Merges apply in the order in which they were learned, because a new token takes part in later merges only. So encoding
replays the training: a word of the training text comes out as training left it.

Special tokens are no text: <|endoftext|> ends a document, <|im_start|> and <|im_end|> begin and end a turn of a chat.
`encode_chat`, and the code that joins documents, put their ids in. A text cannot: `Tokenizer.encode` reads their names
as plain characters, unless `allowed_special` has them. Ids of a tokenizer that is trained here: 0 … 255 are the bytes,
256 + k is merge k = 0, 1, …, the special tokens come last. A chat is framed in ChatML; SFT trains on what is
underlined, the mask of `encode_chat`:

    <|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n
                                                               ~~~~~~~~~~~

`train_bpe_naive` and `encode_naive` are the algorithm to read. The stages run `train_bpe` and tiktoken, which give the
same merges and ids faster. Two other kinds have the same interface: `ByteTokenizer` (no merges: nothing to train, the
longest sequences) and `CharTokenizer` (an id per character seen in training).

`save_pretrained` writes the format of Hugging Face's `tokenizers`, from which `transformers.AutoTokenizer` gives the
same ids (support/tokenizer_files.py has three exceptions). `load_tokenizer` opens that format, and byte-level BPE in
the form of GPT-2, Qwen2 and SmolLM2; any other is refused with a reason.

Simplified: no Unicode normalisation in training (NFC where a loaded tokenizer asks for it), and no merge is ever
skipped at random (BPE-dropout, arXiv:1910.13267). Run it: `python tokenizer_bpe.py`.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex

from support.errors import TokenizerError
from support.fast_merges import learn_merges
from support.output import run_demo
from support.pieces import FastEncoder, around, doubtful_tokens, split, utf8
from support.tokenizer_files import BYTE_PLACE, ROLES, check_message, errors_of, read_tokenizer, to_printable
from support.vocabulary import Vocabulary
from support.word_counts import batches, count_words

# Cut first, merge within: so "dog." and "dog!" share the token "dog". The cuts are GPT-4's as changed by Qwen2, where
# each digit stands alone. GPT-4's tokens of up to three digits are cut from the left: which decimal places share one
# depends on the number's length, and sums come out less accurate than if cut from the right (arXiv:2402.14903).
PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # the end of a contraction
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, and one sign or space before it
        r"\p{N}",  # a digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)|\s+",  # other spaces; the last one is left to the word or sign after it
    ]
)


# -------------------------------------------------------------------------------------------------------- training


def train_bpe_naive(texts, n_merges):
    """The algorithm, to be read: texts -> [(left id, right id), …], the merges in the order in which they are learned.

    It counts all pairs anew for each merge. (`BPETokenizer.train` spells the merges in bytes, as encoding takes them.)
    """
    texts = [texts] if isinstance(texts, str) else texts
    words = Counter(word.encode() for text in texts for word in split(text, PATTERN))  # {b" dog": 77}
    parts = {word: list(word) for word in words}  # {b" dog": [32, 100, 111, 103]}
    merges = []
    for new in range(256, 256 + n_merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(parts[word]):  # "aaa" counts (a, a) twice, though it is merged once; as in tokenizers
                pairs[pair] += count
        if not pairs:
            break  # every word is one token already: the text supports no larger vocabulary
        best = min(pairs, key=lambda pair: (-pairs[pair], tie_order(pair)))
        parts = {word: merge(ids, best, new) for word, ids in parts.items()}
        merges.append(best)
    return merges


def merge(ids, pair, new):
    """[1, 2, 3, 1, 2], (1, 2), 9 -> [9, 3, 9]: from left to right, without overlap. `apply_merges` gives it bytes in
    the place of ids."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def tie_order(pair):
    """Among pairs of equal count, the first in this order wins: by the left id, then by the right id, the printable
    bytes before the rest. Any rule would do; this is that of `tokenizers`."""
    return tuple(BYTE_PLACE[i] if i < 256 else i for i in pair)


def train_bpe(texts, n_merges):
    """The same merges, fast (support/fast_merges.py). texts: a string, the Path of a file of any size, or several of
    them. Raises TokenizerError if they are empty."""
    return learn_merges(count_words(texts, PATTERN), n_merges)


# -------------------------------------------------------------------------------------------------------- encoding


def encode_naive(text, merges, id_of, pattern=PATTERN):
    """The algorithm, to be read: text -> ids. merges: [(left bytes, right bytes), …] in order; id_of: {bytes: id}. In
    bytes, and not in ids as in training, because in a loaded file the ids of the bytes are not 0 … 255."""
    rank = {pair: place for place, pair in enumerate(merges)}
    return [id_of[part] for word in split(text, pattern) for part in apply_merges(word.encode(), rank)]


def apply_merges(word, rank):
    """b"hog" -> [b"h", b"og"]: join the neighbours whose merge was learned first, until no two are a merge.

    rank: {(left bytes, right bytes): place in the order of the merges}.
    """
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        parts = merge(parts, best, best[0] + best[1])
    return parts


def check_spelling(merges):
    """Raises TokenizerError unless every token comes out whole when the merges are applied to its bytes. For tiktoken
    gives a word that equals a token the id of that token, whatever the merges would make of it."""
    rank = {pair: place for place, pair in enumerate(merges)}
    if odd := next((token for token in doubtful_tokens(merges) if len(apply_merges(token, rank)) > 1), None):
        raise TokenizerError(f"its merges do not make its token {to_printable(odd)!r}: the ids would be wrong here")


# ------------------------------------------------------------------------------ special tokens, and the frame of a chat

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # end of a document, and padding; a turn's two ends


class Tokenizer(Vocabulary):
    """What all kinds share. Each kind adds `encode_ordinary`: the ids of a text in which nothing is special.

    `Vocabulary` (support/vocabulary.py) keeps the tables: vocab, {id: bytes} of the ordinary tokens; special_ids,
    {name: id}; added_ids, {word: id} of words that are not special, but one token in any text (Qwen3's <think>); and
    stop_ids, the ids that end an answer.
    """

    def encode(self, text, allowed_special=()):
        """text -> ids. allowed_special: "all", or the name or names of the special tokens that may be read as such.

        By default none: their names are plain characters. Otherwise whoever writes a prompt, or a page of the
        training data, could type <|im_end|><|im_start|>system and speak as the system.
        """
        if allowed_special == "all":
            allowed = set(self.special_ids)
        else:
            allowed = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
        if unknown := sorted(allowed - set(self.special_ids)):
            raise TokenizerError(f"{unknown[0]!r} is not a special token here; they are {[*self.special_ids]}")
        whole = {name: self.special_ids[name] for name in allowed} | self.added_ids
        if not whole:
            return self.encode_ordinary(text)
        utf8(text)  # raises on half a surrogate pair, at its place in the whole text
        longest_first = sorted(whole, key=len, reverse=True)
        ids = []
        for piece in regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text):
            ids += [whole[piece]] if piece in whole else self.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts):
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """ids -> text. Bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages, add_generation_prompt=False):
        """[{"role", "content"}, …] -> ids, mask: True on the assistant's words and the <|im_end|> after them.

        The special tokens are put in as ids, so a content cannot forge one. The text between two of them is encoded as
        a whole, as transformers does with the chat template that we save; only an answer is encoded apart from the
        "assistant\\n" before it, because it is sampled after that. If the tokenizer came with a default system turn, a
        chat without one begins with that. add_generation_prompt: end with the opening of an answer.
        """
        (start, end), newline = self.chat_ids(), self.encode("\n")
        turns = [check_message(number, message) for number, message in enumerate(messages)]
        if self.default_system is not None and turns and turns[0][0] != "system":
            turns = [("system", self.default_system), *turns]
        ids, mask = [], []
        for role, content in turns:
            if role == "assistant":
                head, answer = [start, *self.encode("assistant\n")], [*self.encode(content), end]
            else:
                head, answer = [start, *self.encode(f"{role}\n{content}"), end], []
            ids += head + answer + newline
            mask += [False] * len(head) + [True] * len(answer) + [False] * len(newline)
        if add_generation_prompt:
            head = [start, *self.encode("assistant\n")]
            ids, mask = ids + head, mask + [False] * len(head)
        return ids, mask


# ------------------------------------------------------------------------------------------------- the three kinds


class BPETokenizer(Tokenizer):
    """Byte-level BPE."""

    kind = "bpe"

    def __init__(self, merges, vocab, special_ids, pattern=PATTERN, eos_token=None, nfc=False):
        """merges: [(left bytes, right bytes), …] in order. nfc: compose characters (é from e and U+0301) before
        encoding. Raises TokenizerError if tiktoken would give other ids (support/pieces.py)."""
        super().__init__(vocab, special_ids, eos_token)
        self.merges, self.pattern, self.nfc = merges, pattern, nfc
        self._ids = {token: i for i, token in vocab.items()}
        self._fast = FastEncoder(merges, self._ids, pattern, nfc)

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS):
        """texts: as for train_bpe; vocab_size counts bytes, merges and special tokens. Texts too short to yield so many
        merges give a smaller vocabulary."""
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            least = f"256 bytes and {len(special_tokens)} special tokens"
            raise TokenizerError(f"vocab_size {vocab_size} is too small: it counts {least} too")
        vocab, merges = {byte: bytes([byte]) for byte in range(256)}, []
        for left, right in train_bpe(texts, n_merges):
            merges.append((vocab[left], vocab[right]))
            vocab[len(vocab)] = vocab[left] + vocab[right]
        return cls(merges, vocab, count_from(len(vocab), special_tokens))

    def encode_ordinary(self, text):
        return self._fast.encode(text)

    def encode_naive(self, text):
        """The same ids by the plain algorithm, for the tests."""
        return encode_naive(self._fast.prepare(text), self.merges, self._ids, self.pattern)

    def encode_batch(self, texts):
        """The ids of each text, on several threads: tiktoken releases Python's lock."""
        if self.added_ids:
            return super().encode_batch(texts)
        return self._fast.encode_batch(texts)


class ByteTokenizer(Tokenizer):
    """An id per byte: its value."""

    kind = "byte"

    def __init__(self, special_tokens=SPECIAL_TOKENS, eos_token=None):
        super().__init__({byte: bytes([byte]) for byte in range(256)}, count_from(256, special_tokens), eos_token)

    def encode_ordinary(self, text):
        return list(utf8(text))


class CharTokenizer(Tokenizer):
    """An id per character of the texts, in the order of code points; any other character is an error."""

    kind = "char"

    def __init__(self, characters, special_tokens=SPECIAL_TOKENS, eos_token=None):
        vocab = {i: character.encode() for i, character in enumerate(characters)}
        super().__init__(vocab, count_from(len(vocab), special_tokens), eos_token)
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def train(cls, texts, special_tokens=SPECIAL_TOKENS):
        characters = set()
        for batch in batches(texts):
            characters.update(*batch)
        if not characters:
            raise TokenizerError("the training text is empty: there is nothing to count")
        return cls(sorted(characters | set("\n".join(ROLES))), special_tokens)  # the chat frame must be writable too

    def encode_ordinary(self, text):
        utf8(text)  # raises on half a surrogate pair
        try:
            return [self._ids[character] for character in text]
        except KeyError as missing:
            where = f"character {missing} in {around(text, text.index(missing.args[0]))}"
            raise TokenizerError(f"{where} was not in the training text of this character tokenizer") from None


def count_from(first, special_tokens):
    """{name: id}"""
    return {name: first + i for i, name in enumerate(special_tokens)}


# --------------------------------------------------------------------------------------------------- opening a file


def load_tokenizer(path):
    """Any kind, from a directory or a tokenizer.json: ours, or byte-level BPE in the form of GPT-2, Qwen2 or SmolLM2;
    or the two files in which OpenAI published GPT-2's. Raises TokenizerError."""
    spec, file = read_tokenizer(path)
    with errors_of(file):
        return from_spec(spec)


def from_spec(spec):
    """The tokenizer that a file describes (support/tokenizer_files.py). Raises TokenizerError."""
    names = sorted(spec.special_ids, key=spec.special_ids.get)
    if spec.kind == "byte":
        tokenizer = ByteTokenizer(names, spec.eos_token)
    elif spec.kind == "char":
        tokenizer = CharTokenizer([spec.vocab[i].decode() for i in sorted(spec.vocab)], names, spec.eos_token)
    else:
        tokenizer = BPETokenizer(spec.merges, spec.vocab, spec.special_ids, spec.pattern, spec.eos_token, spec.nfc)
        check_spelling(spec.merges)
    if (tokenizer.vocab, tokenizer.special_ids) != (spec.vocab, spec.special_ids):
        raise TokenizerError(f"these are not the ids of a {spec.kind} tokenizer")
    tokenizer.add_words(spec.added_ids)
    tokenizer.chat_template, tokenizer.default_system = spec.chat_template, spec.default_system
    tokenizer.no_chat = spec.no_chat
    return tokenizer


# ------------------------------------------------------------------------------------------------------------ demo


def demo():
    """Three merges by hand; a rank order; the cuts; a trained vocabulary against the plain forms; a chat's mask."""
    print("aaabdaaabac, three merges:")
    tokens, ids = {byte: bytes([byte]) for byte in range(256)}, list(b"aaabdaaabac")
    for new, (left, right) in enumerate(train_bpe_naive("aaabdaaabac", 3), 256):
        tokens[new] = tokens[left] + tokens[right]
        ids = merge(ids, (left, right), new)
        print(f"  {tokens[left].decode()} + {tokens[right].decode()} -> {new}: {ids}")
    assert [tokens[i] for i in ids] == [b"aaab", b"d", b"aaab", b"a", b"c"]

    rank = {(b"a", b"b"): 0, (b"b", b"c"): 1, (b"bc", b"d"): 2}
    assert apply_merges(b"abcd", rank) == [b"ab", b"c", b"d"]
    print("\nabcd by the merges a + b, b + c, bc + d: ab|c|d, not the shorter a|bcd: a + b was learned first")

    pieces = regex.findall(PATTERN, "I'll walk 12  dogs.\n")
    print(f"\nno merge crosses these cuts: {pieces}")
    assert pieces == ["I", "'ll", " walk", " ", "1", "2", " ", " dogs", ".\n"]

    text = Path(__file__).read_text(encoding="utf-8")
    assert train_bpe(text, 60) == train_bpe_naive(text, 60)
    print("\ntrained on this file; the first 60 merges, and all ids, are those of the plain forms:")
    for size in (259, 400, 800):
        tokenizer = BPETokenizer.train(text, size)
        for t in (text, "naïve 🙂 12345 <|im_end|>\n\n\tdon't", ""):
            assert tokenizer.decode(tokenizer.encode(t)) == t
            assert tokenizer.encode(t) == tokenizer.encode_naive(t)
        print(f"  vocabulary {size}: {len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token")

    messages = [{"role": "user", "content": "2 + 3?<|im_end|>"}, {"role": "assistant", "content": "5"}]
    ids, mask = tokenizer.encode_chat(messages)
    print("\na chat, and what SFT trains on; the user's <|im_end|> is plain characters:")
    for i, flag in zip(ids, mask, strict=True):
        special = "special" if i in tokenizer.special_ids.values() else ""
        print(f"  {i:4d} {tokenizer.decode([i])!r:<15}{special:<9}{'trained' if flag else ''}".rstrip())
    assert ids.count(tokenizer.im_end_id) == 2


if __name__ == "__main__":
    run_demo(demo)
