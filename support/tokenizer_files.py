"""Tokenizer files: Hugging Face's tokenizer.json and tokenizer_config.json (read and written), OpenAI's two files of
GPT-2 (read), and the tokenizer in a llama.cpp GGUF file (read).

A file is read into a `TokenizerSpec`, from which tokenizer_bpe.py makes a tokenizer, and written from one. A tokenizer
that might give different ids here is rejected with a reason, because almost right means silently wrong ids.

From a file that is written here `transformers.AutoTokenizer` gives the same ids, with three exceptions: it reads the
name of a special token in any text as that token; where an answer begins with white space, that and the line end after
"assistant" can become one token; and in a checkpoint whose config.json says "qwen2" it splits every text as Qwen2 does,
whatever tokenizer.json says.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import regex

from support.errors import TokenizerError
from support.files import read_json, reason, to_json, write_together

# The supported patterns that split a text before merging, under GGUF's names. tokenizer_bpe.PATTERN is Qwen2's. The
# tokenizer.json of GPT-2 and of SmolLM2 refers to the pattern by name. SmolLM2 first splits off the digits and then
# applies GPT-2's pattern, so where that pattern says "end of text", "before a digit" matches too.
SPLITS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}

# The syntax of other patterns: what `tokenizers` (Oniguruma), tiktoken (Rust) and `regex` read in the same way. They
# differ on ^ and $ (the ends of a line, or of the text), \w and [[:alpha:]] (are ² and é in them?), {1,3}+ (a repeated
# group, or a possessive one), {,3}, {3}?, sets within sets, and (?i:...), where ss may match ß, though not if it holds
# only the ends of English contractions.
ESCAPE = r"\\(?:[pP]\{[A-Z][a-z]?\}|[dDsSnrt]|[^\w\s<>])"
CLASS = rf"\[\^?(?:{ESCAPE}|(?!&&|--|~~|\|\|)[^\\\[\]])+\]"
CONTRACTION = r"'?(?:[dmst]|ll|re|ve|\[[dmst]+\])"
OPENING = rf"\((?:(?!\?)|\?(?::|<?[=!]|i:(?={CONTRACTION}(?:\|{CONTRACTION})*\))))"
COUNT = r"\{\d+(?:\}(?![+?])|,\d*\}(?!\+))"
SYNTAX = rf"(?:{ESCAPE}|{CLASS}|{OPENING}|{COUNT}|[^\\\[({{^$])*+"

# ChatML as a Jinja template. From the generation markers transformers computes the mask of the assistant's tokens, the
# same mask that Tokenizer.encode_chat returns.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = {"<|im_start|>", "<|im_end|>"}  # the special tokens of ChatML
ENDOFTEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")


@dataclass
class TokenizerSpec:
    """The content of a tokenizer's files."""

    kind: str  # bpe, byte or char
    vocab: dict  # {id: bytes} of the ordinary tokens
    special_ids: dict  # {"<|endoftext|>": id, …}
    eos_token: str | None = None  # the name of a special token
    added_ids: dict = field(default_factory=dict)  # {"<think>": id, …}: always single tokens, but not special
    merges: list = field(default_factory=list)  # [(left bytes, right bytes), …] in training order
    pattern: str | None = None  # splits the text before merging
    nfc: bool = False  # whether characters are composed first (é from e and ´)
    chat_template: str | None = None  # Jinja
    default_system: str | None = None  # the system turn of a chat that does not begin with one
    no_chat: str | None = None  # why its chat template is not supported

    def __post_init__(self):
        self.eos_token = eos_of(self.special_ids, self.eos_token)

    @property
    def fingerprint(self):
        """A hash of this mapping from text to ids."""
        content = [self.kind, sorted(self.vocab.items()), sorted(self.special_ids.items())]
        if self.added_ids:
            content.append(sorted(self.added_ids.items()))
        if self.default_system is not None:
            content.append(self.default_system)
        if self.kind == "bpe":
            content += [self.merges, self.pattern, self.nfc]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def eos_of(special_ids, eos_token=None):
    """The special token that ends a text: eos_token, else the end of a turn, else of a document, else None."""
    return next((name for name in (eos_token, "<|im_end|>", ENDOFTEXT) if name in special_ids), None)


# ----------------------------------------------------------------------------------------- bytes in printable form


def byte_alphabet():
    """GPT-2's printable stand-in for each byte, in which tokenizer.json writes tokens: {byte: character}.

    The 188 printable bytes of Latin-1 stand for themselves, the rest become the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


BYTE_TO_CHAR = byte_alphabet()
BYTE_ORDER = list(BYTE_TO_CHAR)  # the bytes in the order of their characters, by which `tokenizers` sorts them
BYTE_PLACE = bytes(BYTE_ORDER.index(byte) for byte in range(256))  # of each byte, its place in that order
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_printable(data):
    """b" a" -> "Ġa"."""
    return "".join(BYTE_TO_CHAR[b] for b in data)


def from_printable(token):
    """ "Ġa" -> b" a"."""
    return bytes(CHAR_TO_BYTE[c] for c in token)


# --------------------------------------------------------------------------------------------------------- reading


def read_tokenizer(path):
    """-> (TokenizerSpec, the file it was read from). path: a directory or a tokenizer.json. Raises TokenizerError."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    openai = not file.exists() and (path / "vocab.bpe").exists() and (path / "encoder.json").exists()
    if openai:
        file = path / "encoder.json"
    if not file.exists():
        raise TokenizerError(f"{file} is not there; a tokenizer is bpe, char, byte, or a directory that holds one")
    content, config_file = read_object(file), file.with_name("tokenizer_config.json")
    config = read_object(config_file) if config_file.exists() else {}
    with errors_of(file):
        spec = spec_of(from_openai(content, path / "vocab.bpe") if openai else content, config)
    with errors_of(config_file):
        refuse_other_ids(spec, config)
    if template := chat_template_of(file.parent, config):
        follow_chat_template(spec, template)
    return spec, file


@contextmanager
def errors_of(file):
    """Turns any error in the content of a file into a TokenizerError of one line that names the file."""
    try:
        yield
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from None
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError, regex.error):
        raise TokenizerError(f"{file} is corrupt: not in the format of tokenizers and transformers") from None


def read_object(file):
    try:
        content = read_json(file)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} is corrupt: no JSON object")
    return content


def from_openai(vocab, merges_file):
    """GPT-2's encoder.json ({token: id}) and vocab.bpe (a version line, then lines of "left right") -> the content of
    the same tokenizer's tokenizer.json."""
    merges = merges_file.read_text(encoding="utf-8").split("\n")[1:-1]
    special = [{"content": ENDOFTEXT, "id": vocab[ENDOFTEXT]}]
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False}
    return {"model": {"vocab": vocab, "merges": merges}, "added_tokens": special, "pre_tokenizer": pre_tokenizer}


def spec_of(content, config):
    """The contents of tokenizer.json and tokenizer_config.json -> TokenizerSpec. Raises TokenizerError, or an error
    that `errors_of` turns into one."""
    model, steps = content["model"], content["pre_tokenizer"] or {}
    algorithm = model.get("type", "BPE")
    if algorithm not in ("BPE", "WordLevel"):
        raise TokenizerError(f"a {algorithm} model is not supported here")
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos  # older files spell the token out as an object
    eos = eos if isinstance(eos, str) else None
    special, added = added_tokens(content["added_tokens"], eos, model["vocab"])
    plain = {token: i for token, i in model["vocab"].items() if token not in special | added}
    nfc = refuse_unknown_steps(content, model)
    if algorithm == "WordLevel" and steps == [ONE_CHARACTER]:
        kind, merges, pattern = "char", [], None
        vocab = {i: token.encode() for token, i in plain.items()}
    elif algorithm == "BPE":
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(from_printable(left), from_printable(right)) for left, right in pairs]
        pattern = read_pattern(steps)
        if pattern is None and merges:
            raise TokenizerError("a BPE that does not split a text first is not supported here")
        kind = "byte" if pattern is None else "bpe"
        vocab = {i: from_printable(token) for token, i in plain.items()}
    else:
        raise TokenizerError(f"a {algorithm} model with this pre-tokenizer is not supported here")
    if nfc and kind != "bpe":
        raise TokenizerError(f"NFC of a {kind} tokenizer: not supported here, and the ids would be wrong without")
    ids = [*plain.values(), *special.values(), *added.values()]
    if len(set(ids)) < len(ids):
        raise TokenizerError("two of its tokens have the same id")
    return TokenizerSpec(kind, vocab, special, eos, added, merges, pattern, nfc)


def added_tokens(tokens, eos, vocab):
    """tokenizer.json's added_tokens -> {name: id} of the special tokens, and of the others. Tokens that end a document
    or delimit chat turns are special even if the file says otherwise. `tokenizers` does not believe their ids: a name
    has its id in the vocabulary, or else the next free one."""
    special, added, free = {}, {}, len(vocab)
    for token in tokens:
        name = token["content"]
        if type(token["id"]) is not int:
            raise TokenizerError(f"the id of its token {name!r} is {token['id']!r}, no whole number")
        if name in special or name in added:
            raise TokenizerError(f"{name!r} is among its added_tokens twice")
        number = vocab.get(name, free) if name else None
        if token["id"] != number:
            raise TokenizerError(f"its token {name!r} has the id {token['id']}, but `tokenizers` gives it {number}")
        free = max(free, number + 1)
        ends = name in (eos, ENDOFTEXT, *CHATML)
        (special if ends or token.get("special", True) else added)[name] = number
        refuse_options(token)
    return special, added


def refuse_options(token):
    for option in ("single_word", "lstrip", "rstrip"):
        if token.get(option):
            raise TokenizerError(f"its token {token['content']!r} is {option}: not supported here")


def refuse_other_ids(spec, config):
    """TokenizerError if tokenizer_config.json changes the ids that `spec` gives: by another token, by an option of a
    token, or by a space before a text, which the two plain classes do not add."""
    tokens = [config.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    for key in ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"):
        extra = config.get(key) or []
        tokens += [*extra.values()] if isinstance(extra, dict) else extra
    decoder = (config.get("added_tokens_decoder") or {}).values()
    for token in decoder:
        refuse_options(token)
    known = [None, *spec.special_ids, *spec.added_ids]
    for token in [*tokens, *decoder]:
        name = token["content"] if isinstance(token, dict) else token
        if name not in known:
            raise TokenizerError(f"it names the token {name!r}, which tokenizer.json does not have: not supported here")
    plain = ("PreTrainedTokenizerFast", "TokenizersBackend")
    if config.get("add_prefix_space") and config.get("tokenizer_class") not in plain:
        raise TokenizerError("its add_prefix_space puts a space before a text: not supported here")


def refuse_unknown_steps(content, model):
    """Whether the text is normalised to NFC, the only supported normalisation. TokenizerError on any other step."""
    normalizer, after = ((content.get(key) or {}).get("type") for key in ("normalizer", "post_processor"))
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    used = [option for option in options if model.get(option)]
    if normalizer not in (None, "NFC") or after not in (None, "ByteLevel") or used:
        parts = [part for part in (normalizer, after, *used) if part not in (None, "NFC", "ByteLevel")]
        raise TokenizerError(f"{', '.join(parts)}: not supported here, and the ids would be wrong without")
    return normalizer == "NFC"


def read_pattern(steps):
    """The regular expression equivalent to the pre-tokenizers of a tokenizer.json; None if the text is not split."""
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        gpt2_split = last.get("use_regex", True)  # ByteLevel itself splits, by GPT-2's pattern
        if kinds == ["ByteLevel"]:
            return SPLITS["gpt-2"] if gpt2_split else None
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and gpt2_split:
            return SPLITS["smollm"]
        isolates = [steps[0].get(key) for key in ("behavior", "invert")] == ["Isolated", False]
        if kinds == ["Split", "ByteLevel"] and isolates and not gpt2_split and "Regex" in steps[0]["pattern"]:
            return match_everything(steps[0]["pattern"]["Regex"])
    raise TokenizerError(f"the pre-tokenizer {' + '.join(map(str, kinds))} is not supported with these settings")


def match_everything(pattern):
    """Extend a pattern so that text it does not match becomes a word too; tiktoken would drop that text. The patterns
    of SPLITS already match everything. TokenizerError on a pattern that may cut a text in another way here."""
    if pattern in SPLITS.values():
        return pattern
    known = regex.match(SYNTAX, pattern).end()
    if known < len(pattern):
        rest = pattern[known : known + 10]
        raise TokenizerError(f"its split {pattern!r} has {rest!r}, which can mean two things: not supported")
    without_lookaround = regex.sub(r"\(\?<?[=!]", "(?:|", pattern)  # each may match nothing
    try:
        matches_nothing = regex.fullmatch(without_lookaround, "")
    except regex.error as error:
        raise TokenizerError(f"its split {pattern!r} cannot be read: {error}") from None
    if matches_nothing:
        raise TokenizerError(f"its split {pattern!r} matches between two characters: not supported here")
    inner = pattern[: (len(pattern) - len(completed(""))) // 2]
    return pattern if pattern == completed(inner) else completed(pattern)


def completed(pattern):
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def spec_of_gguf(metadata, path):
    """The byte-level BPE in a GGUF file's metadata -> TokenizerSpec. Raises TokenizerError."""
    algorithm, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if algorithm != "gpt2" or split not in SPLITS:
        supported = f"gpt2 with a split of {', '.join(SPLITS)}"
        raise TokenizerError(
            f"{path}: a {algorithm} tokenizer with the split {split!r} is not known here; known: {supported}"
        )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        raise TokenizerError(f"{path}: its texts begin with a token of their own (add_bos_token): not supported here")
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        types = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
        spec = TokenizerSpec(
            kind="bpe",
            vocab={i: from_printable(token) for i, (token, type_) in enumerate(types) if type_ == 1},
            special_ids={token: i for i, (token, type_) in enumerate(types) if type_ == 3},
            eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
            added_ids={token: i for i, (token, type_) in enumerate(types) if type_ == 4},
            merges=[
                tuple(from_printable(part) for part in pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]
            ],
            pattern=SPLITS[split],
            nfc=split == "qwen2",
        )
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: the tokenizer is corrupt: {error}") from None
    if "tokenizer.chat_template" in metadata:
        follow_chat_template(spec, metadata["tokenizer.chat_template"])
        if spec.no_chat:
            raise TokenizerError(f"{path}: {spec.no_chat}")
    return spec


# -------------------------------------------------------------------------------------------------- chat templates


def chat_template_of(folder, config):
    """The chat template of a directory, from chat_template.jinja or tokenizer_config.json; None if there is none."""
    file, template = folder / "chat_template.jinja", config.get("chat_template")
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {reason(error)}") from None
    if isinstance(template, list):  # several named templates
        with errors_of(folder / "tokenizer_config.json"):
            return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def follow_chat_template(spec, template):
    """Set up `spec` to format chats as a file's Jinja template does. The template must be ChatML, with or without a
    default system turn. For any other, `no_chat` records the reason: a model answers badly in a format that it was not
    trained on. Compared are turns without thoughts, up to where an answer begins: Qwen3's template, which rewrites
    thoughts, passes."""
    spec.chat_template = template
    if template == CHAT_TEMPLATE:
        return
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        spec.no_chat = "to read its chat template: pip install jinja2"
        return
    # The spaces at both ends reveal a template that strips them; the bos_token one that uses it.
    turns = [{"role": role, "content": f" the {role}'s words "} for role in ("system", "user", "assistant", "user")]
    variables = {"add_generation_prompt": True, "bos_token": "<a beginning>", "eos_token": spec.eos_token}
    try:
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # the template is untrusted
        jinja = sandbox.from_string(regex.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
        text = jinja.render(messages=turns[1:2], **variables)
        if not set(spec.special_ids) >= CHATML:
            raise TokenizerError("this tokenizer has no <|im_start|> and <|im_end|>: it cannot frame a chat")
        start, end = map(regex.escape, ("<|im_start|>", "<|im_end|>\n"))
        system = regex.match(f"{start}system\n(.*?){end}{start}user", text, regex.DOTALL)
        spec.default_system = system and system[1]
        for messages in (turns[1:2], turns[:2], turns[1:], turns):
            if jinja.render(messages=messages, **variables) != chatml(messages, spec.default_system):
                raise TokenizerError("its chat template is not ChatML, the only one that is known here")
    except TokenizerError as error:
        spec.no_chat, spec.default_system = str(error), None
    except Exception as error:  # the template may do anything
        spec.no_chat, spec.default_system = f"its chat template does not work: {reason(error)}", None


def check_message(number, message):
    """-> role, content. Raises TokenizerError."""
    if isinstance(message, dict) and set(message) == {"role", "content"}:
        role, content = message["role"], message["content"]
        if role in ROLES and isinstance(content, str):
            return role, content
    raise TokenizerError(f"message {number} must have a role of {', '.join(ROLES)} and a content, but is {message!r}")


def chatml(messages, default_system=None):
    """A chat as text, up to the beginning of the answer: what the ids of Tokenizer.encode_chat(messages, True) decode
    to."""
    if default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def chat_template_for(spec):
    """The chat template to save with a tokenizer, or None: the one that encode_chat follows, or the original if it is
    not supported."""
    if spec.no_chat:
        return spec.chat_template
    if not set(spec.special_ids) >= CHATML:
        return None
    if spec.default_system is None:
        return CHAT_TEMPLATE
    system = json.dumps(f"<|im_start|>system\n{spec.default_system}<|im_end|>\n", ensure_ascii=False)
    return f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system} }}}}{{% endif %}}{CHAT_TEMPLATE}"


# --------------------------------------------------------------------------------------------------------- writing

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def split_by(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


ONE_CHARACTER = split_by(r"[\s\S]")


def write_tokenizer(spec, path):
    """Write tokenizer.json and tokenizer_config.json into a directory, each under a temporary name first."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    names = sorted((spec.special_ids | spec.added_ids).items(), key=lambda item: item[1])
    added = [{"id": i, "content": name, **flags, "special": name in spec.special_ids} for name, i in names]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    tokenizer |= {"normalizer": {"type": "NFC"} if spec.nfc else None, "post_processor": None, **steps_of(spec)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # If the vocabulary lacked a name given here, transformers would add it, with an id that the model has no row for.
    if spec.eos_token:
        config |= {"eos_token": spec.eos_token}
        config |= {"pad_token": ENDOFTEXT if ENDOFTEXT in spec.special_ids else spec.eos_token}
    if template := chat_template_for(spec):
        config |= {"chat_template": template}
    contents = {"tokenizer_config.json": config, "tokenizer.json": tokenizer}
    texts = {name: to_json(content, ensure_ascii=False, indent=1) + "\n" for name, content in contents.items()}
    write_together({path / name: text for name, text in texts.items()})


def steps_of(spec):
    """tokenizer.json's pre-tokenizer, decoder and model. The vocabulary has the special and the added tokens too: to a
    name that is not there `tokenizers` gives the next free id, whatever id the file's added_tokens say."""
    names = spec.special_ids | spec.added_ids
    if spec.kind == "char":
        # No token is called <|unknown|>, so `tokenizers` too raises an error on an unknown character.
        vocab = {character.decode(): i for i, character in spec.vocab.items()} | names
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"}
        return {"pre_tokenizer": ONE_CHARACTER, "decoder": {"type": "Fuse"}, "model": model}
    disabled = dict.fromkeys(["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"])
    disabled |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocab = {to_printable(data): i for i, data in spec.vocab.items()} | names
    merges = [[to_printable(left), to_printable(right)] for left, right in spec.merges]
    split = BYTE_LEVEL
    if spec.pattern is not None:
        split = {"type": "Sequence", "pretokenizers": [split_by(spec.pattern), BYTE_LEVEL]}
    model = {"type": "BPE", **disabled, "vocab": vocab, "merges": merges}
    return {"pre_tokenizer": split, "decoder": BYTE_LEVEL, "model": model}
