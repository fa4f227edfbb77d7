"""Byte-pair encoding: from text to ids and back, trained here, opened anywhere.

Start with the 256 bytes as tokens. Count which two neighbouring tokens occur together most often, make them one new
token, write the pair down as a *merge*, repeat (Sennrich et al. 2016, arXiv:1508.07909). To encode, split the text
into bytes and apply the merges in the order in which they were learned. Every string has ids, because every byte
has one; frequent words are one token, rare ones a few.

    aaabdaaabac   --aa→Z-->   ZabdZabac   --ab→Y-->   ZYdZYac   --ZY→X-->   XdXac        5 ids instead of 11

Merges never cross the borders that `PATTERN` draws first, so "dog." and "dog!" share the token "dog". It is the
split of GPT-4 with one change, made by Llama 1 and Qwen: each digit stands alone. With tokens such as "12" and
"123" the place of a digit would depend on its neighbours, and addition would have to be learned per token.

Special tokens (<|endoftext|>, <|im_start|>, <|im_end|>) are ids that no text can produce: `encode` reads their names
as plain characters unless it is told to allow them. Otherwise a user could type <|im_end|> and speak as someone else.

`tokenizer.json` is the format of Hugging Face's `tokenizers`, which opens it with the same ids; encoding is done by
`tiktoken` with our ranks, which is the same algorithm in Rust. `encode_naive` is the algorithm to read.

Two simpler kinds stand beside it: one id per character, and one per byte.

Run it: `python tokenizer_bpe.py`.
"""

import hashlib
import heapq
import json
import os
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken


class TokenizerError(ValueError):
    """A tokenizer or a text that cannot be used: one line says what is wrong, where, and what to do."""


# contractions | words with one leading non-letter | one digit | punctuation | line ends | spaces
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
)  # end of a document; begin and end of a chat turn
ROLES = ("system", "user", "assistant")
# ChatML. The generation markers let transformers give the mask of what the assistant said (see encode_chat).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_bpe_naive(words, n_tokens):
    """The algorithm, to be read: {bytes: count} -> the merges that make n_tokens new tokens, as pairs of ids.

    Recounts everything each time. Ties go to the pair with the smallest ids, as in `tokenizers`. Two merges may
    spell the same bytes (ab + cd, abc + d): they share an id.
    """
    rows = [(list(word), count) for word, count in words.items()]
    spelling = [bytes([i]) for i in range(256)]
    known = {data: i for i, data in enumerate(spelling)}
    merges = []
    while len(spelling) < 256 + n_tokens:
        pairs = Counter()
        for ids, count in rows:
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break  # every word is one token already
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        new = add_token(spelling, known, best)
        rows = [(merge(ids, best, new), count) for ids, count in rows]
    return merges


def add_token(spelling, ids, pair):
    """The id of two tokens' bytes together, a new one unless they have it: spelling[id] = bytes, ids[bytes] = id."""
    data = spelling[pair[0]] + spelling[pair[1]]
    if data not in ids:
        ids[data] = len(spelling)
        spelling.append(data)
    return ids[data]


def merge(ids, pair, new):
    """[1, 2, 3, 1, 2], (1, 2), 9 -> [9, 3, 9]: from left to right, without overlap."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train_bpe(words, n_tokens):
    """The same merges, fast: only the words that hold the merged pair are touched, and a heap knows the best pair.

    The heap's counts may be old, never too low where it matters: a pair is pushed again whenever its count grows,
    and one that is popped with an outdated count is pushed back with the right one.
    """
    rows = [list(word) for word in words]
    counts = list(words.values())
    pairs, where = Counter(), defaultdict(set)
    for row, ids in enumerate(rows):
        for pair in pairwise(ids):
            pairs[pair] += counts[row]
            where[pair].add(row)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    spelling = [bytes([i]) for i in range(256)]
    known = {data: i for i, data in enumerate(spelling)}
    merges = []
    while heap and len(spelling) < 256 + n_tokens:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            if pairs[best] > 0:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        merges.append(best)
        new, changed = add_token(spelling, known, best), set()
        for row in where.pop(best):
            before = rows[row]
            after = rows[row] = merge(before, best, new)
            for pair in pairwise(before):
                pairs[pair] -= counts[row]
            for pair in pairwise(after):
                pairs[pair] += counts[row]
                where[pair].add(row)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def count_words(texts, pattern=PATTERN):
    """How often each piece that the pattern cuts out occurs: {bytes: count}."""
    split, words = regex.compile(pattern), Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        words.update(split.findall(text))
    return {word.encode(): count for word, count in words.items()}


def byte_alphabet():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json writes tokens: {byte: character}.

    The 188 printable bytes of Latin-1 stand for themselves, the rest become the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class Tokenizer:
    """What the three kinds share: special tokens, chat, decoding, files. `vocab` is the bytes of each plain id."""

    def __init__(self, vocab, special_ids, chat_template=CHAT_TEMPLATE):
        self.vocab = vocab  # {id: bytes}
        self.special_ids = dict(special_ids)  # {"<|endoftext|>": id, …}
        self.chat_template = chat_template
        self._bytes = vocab | {i: name.encode() for name, i in self.special_ids.items()}

    @property
    def vocab_size(self):
        return max(self._bytes) + 1

    @property
    def endoftext_id(self):
        """Ends a document, and pads. A tokenizer without one uses its last special token."""
        return self.special_ids.get("<|endoftext|>", max(self.special_ids.values(), default=0))

    @property
    def stop_ids(self):
        """What ends an answer: the end of the turn, or of the document."""
        return tuple(self.special_ids[s] for s in ("<|im_end|>", "<|endoftext|>") if s in self.special_ids)

    @property
    def fingerprint(self):
        """A name for these ids: streams and checkpoints of another tokenizer are refused by it."""
        parts = [f"{i} {data!r}" for i, data in sorted(self._bytes.items())]
        return hashlib.sha256("\n".join([getattr(self, "pattern", ""), *parts]).encode()).hexdigest()[:16]

    def encode(self, text, allowed_special=()):
        """text -> ids. allowed_special: "all", or the names of the special tokens that may be read as such."""
        allowed = self.special_ids if allowed_special == "all" else set(allowed_special)
        unknown = set(allowed) - set(self.special_ids)
        if unknown:
            raise TokenizerError(f"{sorted(unknown)[0]!r} is not a special token here; they are {[*self.special_ids]}")
        if not allowed:
            return self.encode_ordinary(text)
        ids = []
        for piece in regex.split("(" + "|".join(map(regex.escape, allowed)) + ")", text):
            ids += [self.special_ids[piece]] if piece in allowed else self.encode_ordinary(piece)
        return ids

    def decode_bytes(self, ids):
        try:
            return b"".join(self._bytes[int(i)] for i in ids)
        except KeyError as missing:
            raise TokenizerError(f"id {missing} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """ids -> text. Bytes that are no UTF-8, as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages, add_generation_prompt=False):
        """[{"role", "content"}, …] -> ids, mask: True on the assistant's words and the <|im_end|> after them.

        Piece by piece, so that a content can neither merge with the frame around it nor forge a special token.
        """
        if not {"<|im_start|>", "<|im_end|>"} <= set(self.special_ids):
            raise TokenizerError("this tokenizer has no <|im_start|> and <|im_end|>: it cannot frame a chat")
        start, end = self.special_ids["<|im_start|>"], self.special_ids["<|im_end|>"]
        newline, ids, mask = self.encode("\n"), [], []
        for number, message in enumerate(messages):
            if set(message) != {"role", "content"} or message["role"] not in ROLES:
                raise TokenizerError(f"message {number}: a role of {', '.join(ROLES)} and a content, not {message!r}")
            head = [start, *self.encode(message["role"] + "\n")]
            body = [*self.encode(message["content"]), end]
            ids += head + body + newline
            mask += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(newline)
        if add_generation_prompt:
            head = [start, *self.encode("assistant\n")]
            ids, mask = ids + head, mask + [False] * len(head)
        return ids, mask

    def save_pretrained(self, path):
        """Write tokenizer.json and tokenizer_config.json, each under a temporary name first."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        added = [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for name, i in sorted(self.special_ids.items(), key=lambda item: item[1])
        ]
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
        }
        tokenizer |= {"post_processor": None, **self.to_json()}
        turn_end = "<|im_end|>" if "<|im_end|>" in self.special_ids else "<|endoftext|>"
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": turn_end,
            "pad_token": "<|endoftext|>",
        }
        config |= {"clean_up_tokenization_spaces": False, "chat_template": self.chat_template}
        for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (path / f"{name}.tmp").write_text(text + "\n", encoding="utf-8")
            os.replace(path / f"{name}.tmp", path / name)


class BPETokenizer(Tokenizer):
    """Byte-level BPE. ids: the 256 bytes, then a token per merge, then the special tokens."""

    def __init__(self, merges, vocab, special_ids, pattern=PATTERN, chat_template=CHAT_TEMPLATE):
        super().__init__(vocab, special_ids, chat_template)
        self.merges, self.pattern = merges, pattern  # merges: [(left bytes, right bytes), …]
        self._ids = {data: i for i, data in vocab.items()}
        # tiktoken merges the pair whose union has the lowest id: the merges' order, as long as ids follow it.
        self._fast = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=self._ids, special_tokens=special_ids)
        self._split = regex.compile(pattern)

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS):
        """texts: a string or many; vocab_size counts bytes, merges and special tokens. Texts too short to yield so
        many merges give a smaller vocabulary."""
        n_tokens = vocab_size - 256 - len(special_tokens)
        if n_tokens < 0:
            raise TokenizerError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens"
            )
        words = count_words(texts)
        if not words:
            raise TokenizerError("the training text is empty: there is nothing to count")
        spelling, merges = [bytes([i]) for i in range(256)], []
        known = {data: i for i, data in enumerate(spelling)}
        for pair in train_bpe(words, n_tokens):
            merges.append((spelling[pair[0]], spelling[pair[1]]))
            add_token(spelling, known, pair)
        vocab = dict(enumerate(spelling))
        special_ids = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
        return cls(merges, vocab, special_ids)

    def encode_ordinary(self, text):
        return self._fast.encode_ordinary(text)

    def encode_naive(self, text):
        """The algorithm, to be read: in each piece, merge the pair that was learned first until none is left."""
        rank, ids = {pair: i for i, pair in enumerate(self.merges)}, []
        for piece in self._split.findall(text):
            parts = [bytes([b]) for b in piece.encode()]
            while len(parts) > 1:
                best = min(pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
                if best not in rank:
                    break
                parts = merge(parts, best, best[0] + best[1])
            ids += [self._ids[part] for part in parts]
        return ids

    def to_json(self):
        def show(data):
            return "".join(BYTE_TO_CHAR[b] for b in data)

        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
        model |= {
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
        }
        model |= {"vocab": {show(data): i for i, data in self.vocab.items()}}
        model |= {"merges": [[show(left), show(right)] for left, right in self.merges]}
        return {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
            "model": model,
        }


class ByteTokenizer(BPETokenizer):
    """No merges: an id per byte. The longest sequences and nothing to train."""

    def __init__(self):
        special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        super().__init__([], {i: bytes([i]) for i in range(256)}, special)


class CharTokenizer(Tokenizer):
    """An id per character of the training text, in their order; any other character is an error."""

    def __init__(self, characters, special_ids, chat_template=CHAT_TEMPLATE):
        super().__init__({i: c.encode() for i, c in enumerate(characters)}, special_ids, chat_template)
        self._ids = {c: i for i, c in enumerate(characters)}

    @classmethod
    def train(cls, texts, special_tokens=SPECIAL_TOKENS):
        characters = set().union(*([texts] if isinstance(texts, str) else texts))
        if not characters:
            raise TokenizerError("the training text is empty: there is nothing to count")
        characters = sorted(characters | set("\n".join(ROLES)))  # the chat frame must be writable too
        return cls(characters, {name: len(characters) + i for i, name in enumerate(special_tokens)})

    def encode_ordinary(self, text):
        try:
            return [self._ids[c] for c in text]
        except KeyError as missing:
            at = text.index(missing.args[0])
            raise TokenizerError(
                f"character {missing} at position {at} was not in the training text of this character tokenizer"
            ) from None

    def to_json(self):
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        vocab = self._ids | self.special_ids  # WordLevel insists on an unknown token that it never needs
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|endoftext|>"}
        return {"pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}


def load_tokenizer(path):
    """Any kind, from a directory or a tokenizer.json: ours, or a byte-level BPE of GPT-2's or Qwen's make."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model, pre = content["model"], content["pre_tokenizer"]
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
    except FileNotFoundError:
        raise TokenizerError(
            f"{file} is not there; a tokenizer is bpe, char, byte, or a directory that holds one"
        ) from None
    except (OSError, ValueError, TypeError, KeyError):
        raise TokenizerError(f"{file} is corrupt: no JSON in the format of the tokenizers package") from None
    template = None
    config = file.with_name("tokenizer_config.json")
    if config.exists():
        try:
            template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError):
            raise TokenizerError(f"{config} is corrupt: no JSON object") from None
    template = template or CHAT_TEMPLATE
    try:
        if model.get("type") == "WordLevel" and pre.get("type") == "Split":
            plain = [t for t in sorted(model["vocab"], key=model["vocab"].get) if t not in special]
            return CharTokenizer(plain, special, template)
        if model.get("type", "BPE") == "BPE":
            vocab = {
                i: bytes(CHAR_TO_BYTE[c] for c in token) for token, i in model["vocab"].items() if token not in special
            }
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            merges = [tuple(bytes(CHAR_TO_BYTE[c] for c in token) for token in pair) for pair in pairs]
            return BPETokenizer(merges, vocab, special, read_pattern(pre, file), template)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{file}: its vocabulary or merges cannot be read as byte-level BPE") from None
    raise TokenizerError(f"{file}: a {model.get('type')} model with this pre-tokenizer is not supported here")


def read_pattern(pre, file):
    """The split pattern of a tokenizer.json's pre_tokenizer."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and "Regex" in steps[0]["pattern"]:
        return steps[0]["pattern"]["Regex"]
    raise TokenizerError(f"{file}: the pre-tokenizer {' + '.join(map(str, kinds))} is not supported here")


def main():
    print("aaabdaaabac, three merges:")
    merges = train_bpe_naive({b"aaabdaaabac": 1}, 3)
    vocab, ids = {i: bytes([i]) for i in range(256)}, list(b"aaabdaaabac")
    for new, pair in enumerate(merges, 256):
        vocab[new] = vocab[pair[0]] + vocab[pair[1]]
        ids = merge(ids, pair, new)
        print(f"  {vocab[pair[0]].decode()} + {vocab[pair[1]].decode()} -> {new}: {ids}")
    assert [vocab[i] for i in ids] == [b"aaab", b"d", b"aaab", b"a", b"c"]

    text = Path(__file__).read_text(encoding="utf-8")
    words = count_words(text)
    assert train_bpe(words, 60) == train_bpe_naive(words, 60)
    hard = "naïve 🙂 12345 <|im_end|>\n\n\tdon't"
    print("\ntrained on this file: the fast trainer's merges are the plain one's, our encoder's ids tiktoken's")
    for size in (259, 400, 800):
        tokenizer = BPETokenizer.train(text, size)
        for t in (text, hard, ""):
            assert tokenizer.decode(tokenizer.encode(t)) == t
            assert tokenizer.encode(t) == tokenizer.encode_naive(t)
        print(f"  vocabulary {size}: {len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token")
    ids, mask = tokenizer.encode_chat([{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}])
    print("\na chat, and what SFT trains on:")
    for i, flag in zip(ids, mask, strict=True):
        print(f"  {i:4d} {tokenizer.decode([i])!r:<15} {'trained' if flag else ''}")


if __name__ == "__main__":
    main()
