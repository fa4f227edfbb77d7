"""The file formats of tokenizers: Hugging Face's tokenizer.json and tokenizer_config.json in and out; the two files in
which OpenAI published GPT-2's, and what a GGUF file of llama.cpp's holds, in.

A file is read into a `TokenizerSpec`, which tokenizer_bpe.py makes a tokenizer of, and written from one. What is not
known to give the same ids here is refused with a reason: a tokenizer that is almost right gives ids that are silently
wrong.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import regex

from support.errors import TokenizerError

# How the makes that are known here cut a text before they merge, by GGUF's names. tokenizer_bpe.PATTERN is Qwen2's.
# GPT-2's and SmolLM2's tokenizer.json name theirs instead of writing them out. SmolLM2 cuts out the digits before it
# applies GPT-2's pattern, so that pattern's "end of text" is also "before a digit".
SPLITS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}
REST = r"[\s\S])+"  # how a split ends that was completed by `complete`

# ChatML as a Jinja template. The generation markers let transformers give the mask of what the assistant said, as
# Tokenizer.encode_chat does.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = {"<|im_start|>", "<|im_end|>"}  # the special tokens that it needs
ENDOFTEXT = "<|endoftext|>"


@dataclass
class TokenizerSpec:
    """What the files of a tokenizer say."""

    kind: str  # bpe, byte or char
    vocab: dict  # {id: bytes} of the plain tokens
    special_ids: dict  # {"<|endoftext|>": id, …}
    eos_token: str | None = None  # the name of a special token
    added_ids: dict = field(default_factory=dict)  # {"<think>": id, …}: tokens in any text, but not special
    merges: list = field(default_factory=list)  # [(left bytes, right bytes), …] in the order of training
    pattern: str | None = None  # how the text is cut before it is merged
    nfc: bool = False  # whether characters are composed (é from e and ´) before that
    chat_template: str | None = None  # Jinja
    default_system: str | None = None  # what the system says in a chat that does not begin with it
    no_chat: str | None = None  # why its chat template cannot be followed here

    def __post_init__(self):
        self.eos_token = eos_of(self.special_ids, self.eos_token)

    @property
    def fingerprint(self):
        """A name for this mapping of text to ids."""
        content = [self.kind, sorted(self.vocab.items()), sorted(self.special_ids.items())]
        if self.added_ids:
            content.append(sorted(self.added_ids.items()))
        if self.default_system is not None:
            content.append(self.default_system)
        if self.kind == "bpe":
            content += [self.merges, self.pattern, self.nfc]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def eos_of(special_ids, eos_token=None):
    """The special token that ends a text: the one asked for, else the end of a turn, else of a document, else None."""
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
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def show(data):
    """b" a" -> "Ġa"."""
    return "".join(BYTE_TO_CHAR[b] for b in data)


def unshow(token):
    """ "Ġa" -> b" a"."""
    return bytes(CHAR_TO_BYTE[c] for c in token)


# --------------------------------------------------------------------------------------------------------- reading


def read_tokenizer(path):
    """-> (TokenizerSpec, the file that it is from). path: a directory or a tokenizer.json. Raises TokenizerError."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    openai = not file.exists() and (path / "vocab.bpe").exists() and (path / "encoder.json").exists()
    if openai:
        file = path / "encoder.json"
    if not file.exists():
        raise TokenizerError(f"{file} is not there; a tokenizer is bpe, char, byte, or a directory that holds one")
    content, config_file = read_json(file), file.with_name("tokenizer_config.json")
    config = read_json(config_file) if config_file.exists() else {}
    with errors_of(file):
        spec = spec_of(from_openai(content, path / "vocab.bpe") if openai else content, config)
        if template := chat_template_of(file.parent, config):
            follow_chat_template(spec, template)
    return spec, file


@contextmanager
def errors_of(file):
    """What goes wrong with a file's content, in one line that names the file."""
    try:
        yield
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from None
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError, regex.error):
        raise TokenizerError(f"{file} is corrupt: not in the format of the tokenizers package") from None


def read_json(file):
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} is corrupt: no JSON object")
    return content


def from_openai(vocab, merges_file):
    """GPT-2's encoder.json ({token: id}) and vocab.bpe (a line of version, then "left right" a line) as tokenizer.json
    would have them."""
    merges = merges_file.read_text(encoding="utf-8").split("\n")[1:-1]
    special = [{"content": ENDOFTEXT, "id": vocab[ENDOFTEXT]}]
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False}
    return {"model": {"vocab": vocab, "merges": merges}, "added_tokens": special, "pre_tokenizer": pre_tokenizer}


def spec_of(content, config):
    """The contents of tokenizer.json and tokenizer_config.json -> TokenizerSpec. Raises TokenizerError, or what
    `errors_of` turns into one."""
    model, steps = content["model"], content["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos  # older files spell the token out as an object
    special, added = added_tokens(content["added_tokens"], eos)
    plain = {token: i for token, i in model["vocab"].items() if token not in special | added}
    nfc = refuse_unknown_steps(content, model)
    algorithm = model.get("type", "BPE")
    if algorithm == "WordLevel" and steps == [ONE_CHARACTER]:
        kind, merges, pattern = "char", [], None
        vocab = {i: token.encode() for token, i in plain.items()}
    elif algorithm == "BPE":
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(unshow(left), unshow(right)) for left, right in pairs]
        pattern = read_pattern(steps)
        kind = "byte" if pattern is None and not merges else "bpe"
        vocab = {i: unshow(token) for token, i in plain.items()}
    else:
        raise TokenizerError(f"a {algorithm} model with this pre-tokenizer is not supported here")
    if len(vocab) < len(plain):  # two tokens share an id
        raise TokenizerError(f"these are not the ids of a {kind} tokenizer")
    return TokenizerSpec(kind, vocab, special, eos, added, merges, pattern, nfc)


def added_tokens(tokens, eos):
    """tokenizer.json's added_tokens -> {name: id} of the special ones, and of the words that are tokens in any text.
    What ends a document or frames a chat is special, whatever the file says."""
    special, added = {}, {}
    for token in tokens:
        name = token["content"]
        ends = name in (eos, ENDOFTEXT, *CHATML)
        (special if ends or token.get("special", True) else added)[name] = token["id"]
        narrow = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        if narrow and name in added:
            raise TokenizerError(f"its token {name!r} is {narrow[0]}: not supported here")
    return special, added


def refuse_unknown_steps(content, model):
    """Whether the text is normalised to NFC, the only normalisation that is known here. Raises TokenizerError."""
    normalizer, after = ((content.get(key) or {}).get("type") for key in ("normalizer", "post_processor"))
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    used = [option for option in options if model.get(option)]
    if normalizer not in (None, "NFC") or after not in (None, "ByteLevel") or used:
        parts = [part for part in (normalizer, after, *used) if part not in (None, "NFC", "ByteLevel")]
        raise TokenizerError(f"{', '.join(parts)}: not supported here, and the ids would be wrong without")
    return normalizer == "NFC"


def read_pattern(steps):
    """The regular expression that a tokenizer.json's pre-tokenizers amount to; None: the text is not split at all."""
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        splits_too = last.get("use_regex", True)  # by GPT-2's pattern
        if kinds == ["ByteLevel"]:
            return SPLITS["gpt-2"] if splits_too else None
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and splits_too:
            return SPLITS["smollm"]
        isolates = [steps[0].get(key) for key in ("behavior", "invert")] == ["Isolated", False]
        if kinds == ["Split", "ByteLevel"] and isolates and not splits_too:
            return complete(steps[0]["pattern"]["Regex"])
    raise TokenizerError(f"the pre-tokenizer {' + '.join(map(str, kinds))} is not supported with these settings")


def complete(pattern):
    """What a split leaves out is a word too; tiktoken would drop it. The known splits leave nothing out."""
    if pattern in SPLITS.values() or pattern.endswith(REST):
        return pattern
    if regex.search(r"\{\d*,?\d*\}\+", pattern):  # a repeated group to tokenizers, possessive to others
        raise TokenizerError(f"its split {pattern!r} repeats {{m,n}}+, which means two things: not supported")
    return rf"{pattern}|(?:(?!{pattern}){REST}"


def spec_of_gguf(metadata, path):
    """The byte-level BPE in a GGUF file's metadata -> TokenizerSpec. Raises TokenizerError."""
    algorithm, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if algorithm != "gpt2" or split not in SPLITS:
        known = f"gpt2 with a split of {', '.join(SPLITS)}"
        raise TokenizerError(
            f"{path}: a {algorithm} tokenizer with the split {split!r} is not known here; known: {known}"
        )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        raise TokenizerError(f"{path}: its texts begin with a token of their own (add_bos_token): not supported here")
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        types = list(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
        spec = TokenizerSpec(
            kind="bpe",
            vocab={i: unshow(token) for i, (token, type_) in enumerate(types) if type_ == 1},
            special_ids={token: i for i, (token, type_) in enumerate(types) if type_ == 3},
            eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
            added_ids={token: i for i, (token, type_) in enumerate(types) if type_ == 4},
            merges=[tuple(unshow(part) for part in pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]],
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
    """The chat template of a directory: chat_template.jinja, or in tokenizer_config.json; None if there is none."""
    file, template = folder / "chat_template.jinja", config.get("chat_template")
    if file.exists():
        return file.read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name
        return next((one["template"] for one in template if one["name"] == "default"), None)
    return template


def follow_chat_template(spec, template):
    """Frame chats as a file's Jinja template does. It must be ChatML, with a default system turn or none; of any other
    `no_chat` keeps the reason: a model asked in a strange frame answers strangely."""
    spec.chat_template = template
    if template == CHAT_TEMPLATE:
        return
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        spec.no_chat = "to read its chat template: pip install jinja2"
        return
    # Spaces at the ends show a template that strips them, a beginning of text (bos) one that asks for it.
    turns = [{"role": role, "content": f" the {role}'s words "} for role in ("system", "user", "assistant", "user")]
    known = {"add_generation_prompt": True, "bos_token": "<a beginning>", "eos_token": spec.eos_token}
    try:
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # it may come from anywhere
        jinja = sandbox.from_string(regex.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
        text = jinja.render(messages=turns[1:2], **known)
        if not set(spec.special_ids) >= CHATML:
            raise TokenizerError("this tokenizer has no <|im_start|> and <|im_end|>: it cannot frame a chat")
        start, end = map(regex.escape, ("<|im_start|>", "<|im_end|>\n"))
        system = regex.match(f"{start}system\n(.*?){end}{start}user", text, regex.DOTALL)
        spec.default_system = system and system[1]
        for messages in (turns[1:2], turns[:2], turns[1:], turns):
            if jinja.render(messages=messages, **known) != chatml(messages, spec.default_system):
                raise TokenizerError("its chat template is not ChatML, the only one that is known here")
    except TokenizerError as error:
        spec.no_chat, spec.default_system = str(error), None
    except (TemplateError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        spec.no_chat, spec.default_system = f"its chat template does not work: {error}", None


def chatml(messages, default_system=None):
    """A chat as text, with the beginning of an answer: what Tokenizer.encode_chat(messages, True) decodes to."""
    if default_system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default_system}, *messages]
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def chat_template_for(spec):
    """The template to write beside a tokenizer, or None: what encode_chat does, or else what it could not follow."""
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


def write_tokenizer(spec, path, model_max_length=None):
    """Write tokenizer.json and tokenizer_config.json into a directory, each under a temporary name first."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    names = sorted((spec.special_ids | spec.added_ids).items(), key=lambda item: item[1])
    added = [{"id": i, "content": name, **flags, "special": name in spec.special_ids} for name, i in names]
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    tokenizer |= {"normalizer": {"type": "NFC"} if spec.nfc else None, "post_processor": None, **steps_of(spec)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # A name that the vocabulary lacks would make transformers add it, as an id that the model has no row for.
    if spec.eos_token:
        config |= {"eos_token": spec.eos_token}
        config |= {"pad_token": ENDOFTEXT if ENDOFTEXT in spec.special_ids else spec.eos_token}
    if template := chat_template_for(spec):
        config |= {"chat_template": template}
    if model_max_length is not None:
        config |= {"model_max_length": model_max_length}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (path / f"{name}.tmp").write_text(text + "\n", encoding="utf-8")
        os.replace(path / f"{name}.tmp", path / name)


def steps_of(spec):
    """tokenizer.json's pre-tokenizer, decoder and model."""
    if spec.kind == "char":
        # unk_token names no token, so that `tokenizers` too refuses a character that it does not know.
        vocab = {character.decode(): i for i, character in spec.vocab.items()} | spec.special_ids
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"}
        return {"pre_tokenizer": ONE_CHARACTER, "decoder": {"type": "Fuse"}, "model": model}
    off = dict.fromkeys(["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"])
    off |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocab = {show(data): i for i, data in spec.vocab.items()}
    merges = [[show(left), show(right)] for left, right in spec.merges]
    split = BYTE_LEVEL
    if spec.pattern is not None:
        split = {"type": "Sequence", "pretokenizers": [split_by(spec.pattern), BYTE_LEVEL]}
    model = {"type": "BPE", **off, "vocab": vocab, "merges": merges}
    return {"pre_tokenizer": split, "decoder": BYTE_LEVEL, "model": model}
