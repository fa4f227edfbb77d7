"""What a tokenizer knows of its ids: the bytes of each, the special ones, its files. For tokenizer_bpe.Tokenizer."""

from support.errors import TokenizerError
from support.tokenizer_files import CHATML, ENDOFTEXT, TokenizerSpec, eos_of, write_tokenizer


class Vocabulary:
    """The tables of ids, of any kind of tokenizer."""

    kind = None
    merges, pattern, nfc = (), None, False  # BPE's
    chat_template = None  # of the file that it came from, in Jinja
    default_system = None  # what the system says in a chat that does not begin with it
    no_chat = None  # why it cannot frame a chat

    def __init__(self, vocab, special_ids, eos_token=None):
        """vocab: {id: bytes} of the plain tokens. special_ids: {"<|endoftext|>": id, …}. eos_token: the name of the
        special token that other libraries take for the end; by default the end of a turn, or else of a document."""
        self.vocab, self.special_ids = vocab, dict(special_ids)
        self.added_ids = {}  # words that are tokens as they stand, but not special: see add_words
        self.text_ids = set(vocab)  # what stands for text, and not for the end of one
        self._bytes = vocab | {i: name.encode() for name, i in self.special_ids.items()}
        self.eos_token = eos_of(special_ids, eos_token)

    def add_words(self, ids):
        """ids: {"<think>": id, …}, words that are one token each in any text, but not special: Qwen3 marks its thoughts
        and tool calls with such words. They are looked for before NFC, whatever a file's `normalized` says."""
        self.added_ids = dict(ids)
        self.text_ids |= set(ids.values())
        self._bytes |= {i: name.encode() for name, i in ids.items()}

    def token_bytes(self, token_id):
        """The bytes that one id stands for; a special token's are its name."""
        try:
            return self._bytes[int(token_id)]
        except KeyError:
            raise TokenizerError(f"id {int(token_id)} is not in the vocabulary of {self.vocab_size} tokens") from None

    def decode_bytes(self, ids):
        return b"".join(map(self.token_bytes, ids))

    def decode_answer(self, ids):
        """A sampled answer as its judges read it: without the stop tokens at its end, other special tokens by their
        names, so that `1<|im_start|>8` is not 18. Ids that no token has (of a padded vocabulary) become U+FFFD, and are
        dropped at the end."""
        while ids and (ids[-1] in self.stop_ids or ids[-1] not in self._bytes):
            ids = ids[:-1]
        return b"".join(self._bytes.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")

    @property
    def vocab_size(self):
        return max(self._bytes) + 1  # a loaded vocabulary may have gaps: this is the size of the embedding

    @property
    def endoftext_id(self):
        """Ends a document, and pads."""
        for name in (ENDOFTEXT, self.eos_token):
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
        names = ("<|im_end|>", ENDOFTEXT if ENDOFTEXT in self.special_ids else self.eos_token)
        return tuple(self.special_ids[name] for name in dict.fromkeys(names) if name in self.special_ids)

    def chat_ids(self):
        """The ids of <|im_start|> and <|im_end|>. Raises TokenizerError where a chat cannot be framed."""
        if self.no_chat:
            raise TokenizerError(self.no_chat)
        if not set(self.special_ids) >= CHATML:
            raise TokenizerError("this tokenizer has no <|im_start|> and <|im_end|>: it cannot frame a chat")
        return self.special_ids["<|im_start|>"], self.special_ids["<|im_end|>"]

    def spec(self):
        """What save_pretrained writes; see support/tokenizer_files.py."""
        bpe = dict(merges=list(self.merges), pattern=self.pattern, nfc=self.nfc)
        chat = dict(chat_template=self.chat_template, default_system=self.default_system, no_chat=self.no_chat)
        return TokenizerSpec(self.kind, self.vocab, self.special_ids, self.eos_token, self.added_ids, **bpe, **chat)

    @property
    def fingerprint(self):
        """A hash of this mapping of text to ids, by which streams and checkpoints of another tokenizer are refused."""
        return self.spec().fingerprint

    def save_pretrained(self, path):
        """Write tokenizer.json and tokenizer_config.json into a directory."""
        write_tokenizer(self.spec(), path)
