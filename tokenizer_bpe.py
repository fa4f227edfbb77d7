"""Byte-pair encoding: from text to ids and back, trained here, opened anywhere.

Start with the 256 bytes as tokens. Count which two neighbouring tokens occur together most often, make them one new
token, write the pair down as a *merge*, repeat (Sennrich et al. 2016, arXiv:1508.07909; on bytes instead of
characters since GPT-2, Radford et al. 2019). To encode, split the text into bytes and apply the merges in the order
in which they were learned. Every string has ids, because every byte has one; frequent words are one token, rare ones
a few.

    aaabdaaabac   --aa→Z-->   ZabdZabac   --ab→Y-->   ZYdZYac   --ZY→X-->   XdXac        5 ids instead of 11

Ids: 0..255 are the bytes, 256 + k is the k-th merge, the special tokens come last. Three kinds share one interface:
`BPETokenizer`, `ByteTokenizer` (no merges: nothing to train, the longest sequences) and `CharTokenizer` (one id per
character seen in training). `encode_naive` and `train_bpe_naive` are the algorithm to read; `tiktoken`, given our
ranks, and `train_bpe` do the work. `save_pretrained` writes the format of Hugging Face's `tokenizers`; it and
`transformers.AutoTokenizer` give the same ids, with one difference: they read special tokens in any text, we only on
request (see `encode`).

Simplified: no Unicode normalisation in training (NFC is applied where a loaded tokenizer asks for it), no byte
fallback, no dropout. `load_tokenizer` also opens byte-level BPE of GPT-2's, Qwen2's and SmolLM2's make; any other is
refused with a reason, because a tokenizer that is almost right gives ids that are silently wrong.

Run it: `python tokenizer_bpe.py` (seconds, no download).
"""

import hashlib
import heapq
import json
import multiprocessing
import os
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path

import regex
import tiktoken

from support.errors import TokenizerError

# Merges never cross the borders that this pattern draws, so "dog." and "dog!" share the token "dog". It is GPT-4's
# split as changed by Qwen2: each digit stands alone. If "12" and "123" were tokens, the same digit would have another
# id for every group it falls into, and column-wise arithmetic could not be learned from one digit to the next.
# In order: contractions | a word with one leading non-letter | a digit | punctuation | line ends | other spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# The splits of other makes, which their tokenizer.json names instead of writing them out. SmolLM2 cuts out the digits
# before it applies GPT-2's pattern, so that pattern's "end of text" is also "before a digit".
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

REST = r"[\s\S])+"  # see read_pattern

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # end of a document, and padding; a turn's two ends
ROLES = ("system", "user", "assistant")
# ChatML. The generation markers let transformers give the mask of what the assistant said (see encode_chat).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------- training


def train_bpe_naive(texts, n_merges):
    """The algorithm, to be read: texts -> [(left id, right id), …], the merges in the order in which they are learned.

    It recounts everything for each merge. Ties go to the pair with the smallest left id, then right id, the bytes in
    the order of the characters that tokenizer.json writes for them (BYTE_ORDER): that is the rule of `tokenizers`.
    """
    rows = [([BYTE_ORDER.index(b) for b in word], count) for word, count in count_words(texts).items()]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for ids, count in rows:
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break  # every word is one token already: the text supports no larger vocabulary
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        rows = [(merge(ids, best, 256 + len(merges)), count) for ids, count in rows]
        merges.append(best)
    return [tuple(BYTE_ORDER[i] if i < 256 else i for i in pair) for pair in merges]


def train_bpe(texts, n_merges):
    """The same merges, fast. A merge changes only the words that hold its pair, and in them only the neighbours' pairs:
    `where` finds the words, the counts are kept up to date, and a heap knows the best pair.

    The heap's counts may be old, but never too low: a pair is pushed again whenever its count grows, and one that is
    popped with an outdated count is pushed back with the right one.
    """
    words, place = count_words(texts), bytes(BYTE_ORDER.index(b) for b in range(256))
    rows, counts = [list(word.translate(place)) for word in words], list(words.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> its count; -> the rows it is in, or was in once
    for row, ids in enumerate(rows):
        for pair in pairwise(ids):
            pairs[pair] += counts[row]
            where[pair].add(row)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            if pairs[best]:
                heapq.heappush(heap, (-pairs[best], best))
            continue
        grown = set()
        for row in where.pop(best):
            for gone, made in merge_in_place(rows[row], best, 256 + len(merges)):
                pairs[gone] -= counts[row]
                pairs[made] += counts[row]
                where[made].add(row)
                grown.add(made)
        del pairs[best]
        for pair in grown:
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
        merges.append(best)
    return [tuple(BYTE_ORDER[i] if i < 256 else i for i in pair) for pair in merges]


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


def merge_in_place(ids, pair, new):
    """The same on the list itself; yields, for each neighbour, the pair that it was in and the one that it is in now.

    [1, 2, 3], (1, 2), 9 -> [9, 3], yielding ((2, 3), (9, 3))
    """
    left, right = pair
    i, last = 0, len(ids) - 1
    while i < last:
        if ids[i] == left and ids[i + 1] == right:
            ids[i : i + 2] = [new]
            last -= 1
            if i > 0:
                yield (ids[i - 1], left), (ids[i - 1], new)
            if i < last:
                yield (right, ids[i + 1]), (new, ids[i + 1])
        i += 1


BATCH = 2**22  # characters that one process counts at a time: this, not the size of the text, bounds the memory
# The last place where a space follows a letter or a digit, or where one of these begins a line: no piece crosses it.
BORDER = regex.compile(r"(?r)(?<=[\p{L}\p{N}])\s|(?<=[\r\n])(?=[\p{L}\p{N}])")


def count_words(texts):
    """How often each piece that PATTERN cuts out occurs: {bytes: count}. A text has far fewer words than places.

    texts: a string, the Path of a file (read piece by piece: it may be larger than the memory), or several of them.
    """
    jobs, words = batches(texts), Counter()
    first = list(islice(jobs, 2))
    processes = 1 if len(first) < 2 else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if processes == 1:
        for batch in chain(first, jobs):
            words.update(count_batch(batch))
    else:
        # Forked, so that a script without `if __name__ == "__main__"` may train. The workers touch nothing but strings.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
            waiting = deque()
            for batch in chain(first, jobs):
                waiting.append(pool.submit(count_batch, batch))
                if len(waiting) > 2 * processes:
                    words.update(waiting.popleft().result())
            for counted in waiting:
                words.update(counted.result())
    if not words:
        raise TokenizerError("the training text is empty: there is nothing to count")
    return {word.encode(): count for word, count in words.items()}


def count_batch(batch):
    """[text, …] -> {word: count}"""
    split, words = regex.compile(PATTERN), Counter()
    for text in batch:
        utf8(text)
        words.update(split.findall(text))
    return words


def batches(texts):
    """Lists of texts of BATCH characters or a little more; a longer text is cut where PATTERN cuts it in any case."""
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
            with text.open(encoding="utf-8", newline="") as file:  # \r stays what it is
                while block := file.read(BATCH):
                    yield block
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{text} cannot be read: {error}") from None
    else:
        utf8(text)
        yield from (text[i : i + BATCH] for i in range(0, len(text), BATCH))


def cut(blocks):
    """Blocks of one text, which may end inside a word -> the same text cut at BORDERs, where a word always ends."""
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) >= BATCH and (border := BORDER.search(rest)):
            yield rest[: border.start()]
            rest = rest[border.start() :]
    if rest:
        yield rest


def utf8(text):
    """The text's bytes. Half a surrogate pair, as broken JSON may hold, has none; tiktoken would make it U+FFFD."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text must be a str, not {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        where = f"character {text[error.start]!r} at position {error.start}"
        raise TokenizerError(f"{where} is half of a surrogate pair, which UTF-8 cannot hold") from None


# ------------------------------------------------------------------------------------- what the three kinds share


class Tokenizer:
    """Special tokens, chat, decoding, files. A kind adds `encode_ordinary` and `to_json`."""

    kind = None
    chat_template = None  # Jinja, of the file that it came from: see read_chat_template
    default_system = None  # what the system says in a chat that does not begin with it
    no_chat = None  # why it cannot frame a chat

    def __init__(self, vocab, special_ids, eos_token=None):
        """vocab: {id: bytes} of the plain tokens. special_ids: {"<|endoftext|>": id, …}. eos_token: a special token's
        name for tokenizer_config.json; by default the end of a turn, or else of a document."""
        self.vocab, self.special_ids, self.added_ids = vocab, dict(special_ids), {}
        self.text_ids = set(vocab)  # what stands for text, and not for the end of one
        self._bytes = vocab | {i: name.encode() for name, i in self.special_ids.items()}
        names = [name for name in (eos_token, "<|im_end|>", "<|endoftext|>") if name in self.special_ids]
        self.eos_token = names[0] if names else None

    def add_words(self, ids):
        """ids: {"<think>": id, …}, words that are tokens as they stand, in any text, but no special ones: Qwen3 thinks
        and calls its tools between such. A file's `normalized` is not looked at: it matters for accents behind one."""
        self.added_ids = dict(ids)
        self.text_ids |= set(ids.values())
        self._bytes |= {i: name.encode() for name, i in ids.items()}

    @property
    def vocab_size(self):
        return max(self._bytes) + 1  # a loaded vocabulary may have gaps: this is the size of the embedding

    @property
    def endoftext_id(self):
        """Ends a document, and pads."""
        for name in ("<|endoftext|>", self.eos_token):
            if name in self.special_ids:
                return self.special_ids[name]
        raise TokenizerError("this tokenizer has no <|endoftext|>: it can neither separate documents nor pad")

    @property
    def im_end_id(self):
        """Ends a turn of a chat."""
        if "<|im_end|>" not in self.special_ids:
            raise TokenizerError("this tokenizer has no <|im_end|>: it cannot frame a chat")
        return self.special_ids["<|im_end|>"]

    @property
    def stop_ids(self):
        """What ends an answer: the end of the turn, or of the document; those of the two that there are."""
        names = ("<|im_end|>", "<|endoftext|>" if "<|endoftext|>" in self.special_ids else self.eos_token)
        return tuple(self.special_ids[name] for name in dict.fromkeys(names) if name in self.special_ids)

    @property
    def fingerprint(self):
        """A name for this mapping of text to ids: streams and checkpoints of another tokenizer are refused by it."""
        return hashlib.sha256(repr(self._content()).encode()).hexdigest()[:16]

    def _content(self):
        content = [self.kind, sorted(self.vocab.items()), sorted(self.special_ids.items())]
        content += [sorted(self.added_ids.items())] if self.added_ids else []
        return content if self.default_system is None else [*content, self.default_system]

    def encode(self, text, allowed_special=()):
        """text -> ids. allowed_special: "all", or the names of the special tokens that may be read as such.

        By default none: their names are plain characters. Otherwise whoever writes a prompt, or a page of the
        training data, could type <|im_end|><|im_start|>system and speak with another's voice.
        """
        allowed = set(self.special_ids) if allowed_special == "all" else set(allowed_special)
        for name in sorted(allowed - set(self.special_ids)):
            raise TokenizerError(f"{name!r} is not a special token here; they are {[*self.special_ids]}")
        whole = {name: self.special_ids[name] for name in allowed} | self.added_ids
        if not whole:
            return self.encode_ordinary(text)
        utf8(text)
        longest_first = sorted(whole, key=len, reverse=True)
        ids = []
        for piece in regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text):
            ids += [whole[piece]] if piece in whole else self.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts):
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def token_bytes(self, token_id):
        """The bytes that one id stands for; a special token's are its name."""
        try:
            return self._bytes[int(token_id)]
        except KeyError:
            raise TokenizerError(f"id {int(token_id)} is not in the vocabulary of {self.vocab_size} tokens") from None

    def decode_bytes(self, ids):
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids):
        """ids -> text. Bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_chat(self, messages, add_generation_prompt=False):
        """[{"role", "content"}, …] -> ids, mask: True on the assistant's words and the <|im_end|> after them.

        The special tokens are put in as ids, so a content cannot forge one. The text between two of them is encoded
        in one go, as transformers does with CHAT_TEMPLATE. Only an answer is encoded apart from its "assistant\\n",
        because it is sampled apart: ids then differ from the template's if an answer begins with an empty line, whose
        line end would merge with the one before it. If the tokenizer came with a default system turn, a chat without
        one begins with that.
        """
        if self.no_chat:
            raise TokenizerError(self.no_chat)
        if not {"<|im_start|>", "<|im_end|>"} <= set(self.special_ids):
            raise TokenizerError("this tokenizer has no <|im_start|> and <|im_end|>: it cannot frame a chat")
        start, end = self.special_ids["<|im_start|>"], self.im_end_id
        opening, newline = [start, *self.encode("assistant\n")], self.encode("\n")
        ids, mask = [], []
        if self.default_system is not None and messages and check_message(0, messages[0])[0] != "system":
            ids = [start, *self.encode(f"system\n{self.default_system}"), end, *newline]
            mask = [False] * len(ids)
        for number, message in enumerate(messages):
            role, content = check_message(number, message)
            if role == "assistant":
                head, answer = opening, [*self.encode(content), end]
            else:
                head, answer = [start, *self.encode(f"{role}\n{content}"), end], []
            ids += head + answer + newline
            mask += [False] * len(head) + [True] * len(answer) + [False] * len(newline)
        if add_generation_prompt:
            ids, mask = ids + opening, mask + [False] * len(opening)
        return ids, mask

    def read_chat_template(self, template):
        """Frame chats as the Jinja template of a loaded file does. It must be ChatML, with a default system turn or
        none; of any other no_chat keeps the reason: a model asked in a strange frame answers strangely."""
        self.chat_template = template
        if template == CHAT_TEMPLATE:
            return
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            self.no_chat = "to read its chat template: pip install jinja2"
            return
        # Spaces at the ends show a template that strips them, a beginning of text (bos) one that asks for it.
        turns = [{"role": role, "content": f" the {role}'s words "} for role in ("system", "user", "assistant", "user")]
        known = {"add_generation_prompt": True, "bos_token": "<a beginning>", "eos_token": self.eos_token}
        try:
            sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # it may come from anywhere
            read = sandbox.from_string(regex.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
            for messages in (turns[1:2], turns[:2], turns[1:], turns):  # the first time, find it; then, is it all?
                text = read.render(messages=messages, **known)
                if messages == turns[1:2]:
                    start, end = map(regex.escape, ("<|im_start|>", "<|im_end|>\n"))
                    found = regex.match(f"{start}system\n(.*?){end}{start}user", text, regex.DOTALL)
                    self.default_system = found and found[1]
                if text != self.decode(self.encode_chat(messages, True)[0]):
                    raise TokenizerError("its chat template is not ChatML, the only one that is known here")
        except TokenizerError as error:
            self.no_chat, self.default_system = str(error), None
        except (TemplateError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
            self.no_chat, self.default_system = f"its chat template does not work: {error}", None

    def save_pretrained(self, path, model_max_length=None):
        """Write tokenizer.json and tokenizer_config.json into a directory, each under a temporary name first."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        names = sorted((self.special_ids | self.added_ids).items(), key=lambda item: item[1])
        added = [{"id": i, "content": name, **flags, "special": name in self.special_ids} for name, i in names]
        tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        tokenizer |= {"normalizer": None, "post_processor": None, **self.to_json()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        # A name that the vocabulary lacks would make transformers add it, as an id that the model has no row for.
        if self.eos_token:
            config |= {"eos_token": self.eos_token}
            config |= {"pad_token": self.token_bytes(self.endoftext_id).decode()}
        if self.no_chat:
            config |= {"chat_template": self.chat_template}
        elif {"<|im_start|>", "<|im_end|>"} <= set(self.special_ids):  # what encode_chat writes
            first = json.dumps(f"<|im_start|>system\n{self.default_system}<|im_end|>\n", ensure_ascii=False)
            first = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {first} }}}}{{% endif %}}"
            config |= {"chat_template": CHAT_TEMPLATE if self.default_system is None else first + CHAT_TEMPLATE}
        if model_max_length is not None:
            config |= {"model_max_length": model_max_length}
        for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (path / f"{name}.tmp").write_text(text + "\n", encoding="utf-8")
            os.replace(path / f"{name}.tmp", path / name)

    @classmethod
    def from_pretrained(cls, path):
        """Of this kind; load_tokenizer opens any."""
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise TokenizerError(f"{path} holds a {tokenizer.kind} tokenizer, not a {cls.kind} tokenizer")
        return tokenizer


def check_message(number, message):
    """-> role, content."""
    if isinstance(message, dict) and set(message) == {"role", "content"}:
        role, content = message["role"], message["content"]
        if role in ROLES and isinstance(content, str):
            return role, content
    raise TokenizerError(f"message {number} must have a role of {', '.join(ROLES)} and a content, but is {message!r}")


# ------------------------------------------------------------------------------------------------- the three kinds


class BPETokenizer(Tokenizer):
    """Byte-level BPE."""

    kind = "bpe"

    def __init__(self, merges, vocab, special_ids, pattern=PATTERN, eos_token=None, nfc=False):
        """merges: [(left bytes, right bytes), …] in order. nfc: compose characters (é from e and ´) before encoding.

        tiktoken knows no merges: it joins the neighbours whose union has the lowest id, and takes a piece that is a
        token as it stands. That is the same if ids rise with the merges and each token can be spelled in one way.
        Training sees to both: before the merge that makes "abcd", every "abcd" that stands between two borders was cut
        in the same way, so that no later pair can spell it again. For a loaded file both are checked.
        """
        super().__init__(vocab, special_ids, eos_token)
        self.merges, self.pattern, self.nfc = merges, pattern, nfc
        self._ids = {data: i for i, data in vocab.items()}
        made = [self._ids.get(left + right, -1) for left, right in merges]
        if -1 in made or made != sorted(set(made)) or len(made) != sum(len(data) > 1 for data in self._ids):
            raise TokenizerError("the merges do not make the vocabulary's tokens one by one in the order of their ids")
        # SmolLM2's vocabulary lacks 21 bytes, mostly those that UTF-8 never uses; tiktoken would panic on them.
        self._absent = bytes(b for b in range(256) if bytes([b]) not in self._ids)
        self._split = regex.compile(pattern)
        self._fast = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=self._ids, special_tokens={})

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS):
        """texts: as for count_words; vocab_size counts bytes, merges and special tokens. Texts too short to yield so
        many merges give a smaller vocabulary."""
        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            least = f"256 bytes and {len(special_tokens)} special tokens"
            raise TokenizerError(f"vocab_size {vocab_size} is too small: it counts {least} too")
        vocab, merges = {i: bytes([i]) for i in range(256)}, []
        for left, right in train_bpe(texts, n_merges):
            merges.append((vocab[left], vocab[right]))
            vocab[len(vocab)] = vocab[left] + vocab[right]
        return cls(merges, vocab, number(special_tokens, len(vocab)))

    def encode_ordinary(self, text):
        return self._fast.encode_ordinary(self._prepare(text))

    def encode_batch(self, texts):
        """The ids of each text, on several threads: tiktoken lets go of Python's lock."""
        if self.added_ids:
            return super().encode_batch(texts)
        return self._fast.encode_ordinary_batch([self._prepare(text) for text in texts], num_threads=os.cpu_count())

    def encode_naive(self, text):
        """The algorithm, to be read: in each piece, merge the pair that was learned first until none is left."""
        rank, ids = {pair: i for i, pair in enumerate(self.merges)}, []
        for piece in self._split.finditer(self._prepare(text)):
            ids += [self._ids[part] for part in spell(piece[0].encode(), rank)]
        return ids

    def _prepare(self, text):
        data = utf8(text)
        if self._absent and len(data.translate(None, self._absent)) < len(data):
            raise TokenizerError(f"the text holds one of the bytes {list(self._absent)}, which this vocabulary lacks")
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def _content(self):
        return [*super()._content(), self.merges, self.pattern, self.nfc]

    def to_json(self):
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        merges = [[show(left), show(right)] for left, right in self.merges]
        model = bpe_model(self.vocab) | {"merges": merges}
        steps = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}, "decoder": BYTE_LEVEL}
        return {"normalizer": {"type": "NFC"} if self.nfc else None, **steps, "model": model}


def spell(piece, rank):
    """The parts of `piece` when no pair of neighbours is left that rank, {(left, right): place}, holds."""
    parts = [bytes([b]) for b in piece]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        parts = merge(parts, best, best[0] + best[1])
    return parts


class ByteTokenizer(Tokenizer):
    """An id per byte: its value."""

    kind = "byte"

    def __init__(self, special_tokens=SPECIAL_TOKENS, eos_token=None):
        super().__init__({i: bytes([i]) for i in range(256)}, number(special_tokens, 256), eos_token)

    def encode_ordinary(self, text):
        return list(utf8(text))

    def to_json(self):
        return {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": bpe_model(self.vocab) | {"merges": []}}


class CharTokenizer(Tokenizer):
    """An id per character of the training text, in their order; any other character is an error."""

    kind = "char"
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}  # noqa: RUF012

    def __init__(self, characters, special_tokens=SPECIAL_TOKENS, eos_token=None):
        vocab = {i: c.encode() for i, c in enumerate(characters)}
        super().__init__(vocab, number(special_tokens, len(vocab)), eos_token)
        self._ids = {c: i for i, c in enumerate(characters)}

    @classmethod
    def train(cls, texts, special_tokens=SPECIAL_TOKENS):
        characters = set()
        for batch in batches(texts):
            characters.update(*batch)
        if not characters:
            raise TokenizerError("the training text is empty: there is nothing to count")
        return cls(sorted(characters | set("\n".join(ROLES))), special_tokens)  # the chat frame must be writable too

    def encode_ordinary(self, text):
        utf8(text)
        try:
            return [self._ids[c] for c in text]
        except KeyError as missing:
            where = f"character {missing} at position {text.index(missing.args[0])}"
            raise TokenizerError(f"{where} was not in the training text of this character tokenizer") from None

    def to_json(self):
        # unk_token names no token, so that `tokenizers` too refuses a character that it does not know.
        model = {"type": "WordLevel", "vocab": self._ids | self.special_ids, "unk_token": "<|unknown|>"}
        return {"pre_tokenizer": self.split, "decoder": {"type": "Fuse"}, "model": model}


def number(special_tokens, first):
    """{name: id}, counted from `first`."""
    return {name: first + i for i, name in enumerate(special_tokens)}


# ------------------------------------------------------------------------------------------------------- files


def byte_alphabet():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json writes tokens: {byte: character}.

    The 188 printable bytes of Latin-1 stand for themselves, the rest become the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


BYTE_TO_CHAR = byte_alphabet()
BYTE_ORDER = sorted(BYTE_TO_CHAR, key=BYTE_TO_CHAR.get)  # the bytes, in the order of their characters
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def show(data):
    """b" a" -> "Ġa"."""
    return "".join(BYTE_TO_CHAR[b] for b in data)


def unshow(token):
    """ "Ġa" -> b" a"."""
    return bytes(CHAR_TO_BYTE[c] for c in token)


def bpe_model(vocab):
    off = dict.fromkeys(["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"])
    off |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **off, "vocab": {show(data): i for i, data in vocab.items()}}


def load_tokenizer(path):
    """Any kind, from a directory or a tokenizer.json: ours, or byte-level BPE of GPT-2's, Qwen2's or SmolLM2's make;
    or the two files in which OpenAI published GPT-2's."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    openai = not file.exists() and (path / "vocab.bpe").exists() and (path / "encoder.json").exists()
    if openai:
        file = path / "encoder.json"
    if not file.exists():
        raise TokenizerError(f"{file} is not there; a tokenizer is bpe, char, byte, or a directory that holds one")
    content, config_file = read_json(file), file.with_name("tokenizer_config.json")
    config = read_json(config_file) if config_file.exists() else {}
    try:
        tokenizer = build(from_openai(content, path / "vocab.bpe") if openai else content, config)
        if template := chat_template_of(file.parent, config):
            tokenizer.read_chat_template(template)
        return tokenizer
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from None
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError, regex.error):
        raise TokenizerError(f"{file} is corrupt: not in the format of the tokenizers package") from None


def from_openai(vocab, merges_file):
    """GPT-2's encoder.json ({token: id}) and vocab.bpe (a line of version, then "left right" a line) as tokenizer.json
    would have them."""
    merges = merges_file.read_text(encoding="utf-8").split("\n")[1:-1]
    special = [{"content": "<|endoftext|>", "id": vocab["<|endoftext|>"]}]
    steps = {"type": "ByteLevel", "add_prefix_space": False}
    return {"model": {"vocab": vocab, "merges": merges}, "added_tokens": special, "pre_tokenizer": steps}


def read_json(file):
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} is corrupt: no JSON object")
    return content


def build(content, config):
    """The tokenizer that a tokenizer.json describes; only what is known to give the same ids is let through."""
    model, steps = content["model"], content["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos  # older files spell the token out as an object
    special, added = {}, {}
    for token in content["added_tokens"]:
        ends = token["content"] in (eos, *SPECIAL_TOKENS)
        (special if ends or token.get("special", True) else added)[token["content"]] = token["id"]
        narrow = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        if narrow and token["content"] in added:
            raise TokenizerError(f"its token {token['content']!r} is {narrow[0]}: not supported here")
    names = sorted(special, key=special.get)
    plain = {token: i for token, i in model["vocab"].items() if token not in special | added}
    kind = model.get("type", "BPE")
    normalizer, after = ((content.get(key) or {}).get("type") for key in ("normalizer", "post_processor"))
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    used = [option for option in options if model.get(option)]
    if normalizer not in (None, "NFC") or after not in (None, "ByteLevel") or used:
        parts = [part for part in (normalizer, after, *used) if part not in (None, "NFC", "ByteLevel")]
        raise TokenizerError(f"{', '.join(parts)}: not supported here, and the ids would be wrong without")
    if kind == "WordLevel" and steps == [CharTokenizer.split]:
        tokenizer = CharTokenizer(sorted(plain, key=plain.get), names, eos)
        found = {data.decode(): i for i, data in tokenizer.vocab.items()}
    elif kind == "BPE":
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        pattern = read_pattern(steps)
        if pattern is None and not pairs:
            tokenizer = ByteTokenizer(names, eos)
        else:
            vocab = {i: unshow(token) for token, i in plain.items()}
            merges = [(unshow(left), unshow(right)) for left, right in pairs]
            tokenizer = BPETokenizer(merges, vocab, special, pattern, eos, normalizer == "NFC")
            check_spelling(tokenizer)
        found = {show(data): i for i, data in tokenizer.vocab.items()}
    else:
        raise TokenizerError(f"a {kind} model with this pre-tokenizer is not supported here")
    if (found, tokenizer.special_ids) != (plain, special):
        raise TokenizerError(f"these are not the ids of a {tokenizer.kind} tokenizer")
    tokenizer.add_words(added)
    return tokenizer


def check_spelling(tokenizer):
    """Whether each token is what its own merges make of it (see BPETokenizer). Raises TokenizerError."""
    rank = {pair: i for i, pair in enumerate(tokenizer.merges)}
    if odd := next((t for t in map(b"".join, tokenizer.merges) if len(spell(t, rank)) > 1), None):
        raise TokenizerError(f"its merges do not make its token {show(odd)!r}: the ids would be wrong here")


def chat_template_of(folder, config):
    """The chat template of a directory: chat_template.jinja, or in tokenizer_config.json; None if there is none."""
    file, found = folder / "chat_template.jinja", config.get("chat_template")
    if file.exists():
        return file.read_text(encoding="utf-8")
    if isinstance(found, list):  # several by name
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found


def read_pattern(steps):
    """The regular expression that a tokenizer.json's pre-tokenizers amount to; None: the text is not split at all."""
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        whole = last.get("use_regex", True)
        if kinds == ["ByteLevel"]:
            return GPT2_PATTERN if whole else None
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and whole:
            return SMOLLM_PATTERN
        cut = [steps[0].get(key) for key in ("behavior", "invert")]
        if kinds == ["Split", "ByteLevel"] and cut == ["Isolated", False] and not whole:
            pattern = steps[0]["pattern"]["Regex"]
            if pattern in (PATTERN, GPT2_PATTERN, SMOLLM_PATTERN) or pattern.endswith(REST):
                return pattern
            if regex.search(r"\{\d*,?\d*\}\+", pattern):  # a repeated group to tokenizers, possessive to others
                raise TokenizerError(f"its split {pattern!r} repeats {{m,n}}+, which means two things: not supported")
            return rf"{pattern}|(?:(?!{pattern}){REST}"  # what it leaves out is a piece too; tiktoken would drop it
    raise TokenizerError(f"the pre-tokenizer {' + '.join(map(str, kinds))} is not supported with these settings")


def main():
    print("aaabdaaabac, three merges:")
    spelling, ids = {i: bytes([i]) for i in range(256)}, list(b"aaabdaaabac")
    for new, (left, right) in enumerate(train_bpe_naive("aaabdaaabac", 3), 256):
        spelling[new] = spelling[left] + spelling[right]
        ids = merge(ids, (left, right), new)
        print(f"  {spelling[left].decode()} + {spelling[right].decode()} -> {new}: {ids}")
    assert [spelling[i] for i in ids] == [b"aaab", b"d", b"aaab", b"a", b"c"]

    text = Path(__file__).read_text(encoding="utf-8")
    assert train_bpe(text, 60) == train_bpe_naive(text, 60)
    print("\ntrained on this file: the fast trainer's merges are the plain one's, our encoder's ids tiktoken's")
    for size in (259, 400, 800):
        tokenizer = BPETokenizer.train(text, size)
        for t in (text, "naïve 🙂 12345 <|im_end|>\n\n\tdon't", ""):
            assert tokenizer.decode(tokenizer.encode(t)) == t
            assert tokenizer.encode(t) == tokenizer.encode_naive(t)
        print(f"  vocabulary {size}: {len(text.encode()) / len(tokenizer.encode(text)):.2f} bytes per token")

    ids, mask = tokenizer.encode_chat([{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}])
    print("\na chat, and what SFT trains on:")
    for i, flag in zip(ids, mask, strict=True):
        print(f"  {i:4d} {tokenizer.decode([i])!r:<15} {'trained' if flag else ''}")


if __name__ == "__main__":
    main()
