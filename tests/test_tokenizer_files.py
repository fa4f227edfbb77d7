"""support/tokenizer_files.py against tokenizers, transformers and tiktoken."""

import json
from dataclasses import replace

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer_bpe import BYTE_LEVEL, CHAT, HARD, TEXT, bpe, published, split_by, trained_by_tokenizers  # noqa: F401
from transformers import AutoTokenizer

from support.errors import TokenizerError
from support.gguf import gguf_tokenizer
from support.pieces import class_encoder, split
from support.tokenizer_files import (
    BYTE_TO_CHAR,
    CHAT_TEMPLATE,
    SPLITS,
    TokenizerSpec,
    chatml,
    read_tokenizer,
    to_printable,
    write_tokenizer,
)
from tokenizer_bpe import PATTERN, SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer

# Patterns that `tokenizers` reads in one way, and tiktoken or the `regex` package in another; a text that shows it
TWO_READINGS = [
    (r"\p{N}{1,3}+|\p{L}+", "20123"),  # a repeated group, or a possessive one
    (r"\p{N}{1,3}(?=(?:\p{N}{3})*$)|\D", "12345\n1234"),  # the end of a line, or of the text
    (r"^#+ |\p{L}|\s", "a\n## b"),
    (r"[[:alpha:]]+", "thé"),
    (r"\w+", "a²b"),
    (r"\p{L}{,2}|\s+|\p{N}", "abc"),
    (r"(?i:ss)", "ß"),
    (r"\s{2}?\p{L}", "a"),
]


@pytest.mark.parametrize(("pattern", "text"), TWO_READINGS)
def test_a_pattern_that_means_two_things_is_refused(pattern, text, tmp_path):
    matches = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    theirs = [piece for piece, _ in matches.pre_tokenize_str(text)]
    ours = bytes(class_encoder(pattern).encode_ordinary(text)).decode()
    assert theirs != split(text, pattern) or "".join(theirs) != ours
    trained_by_tokenizers(split_by(pattern), TEXT, 320).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="which can mean two things"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("pattern", ["", r"\s*", r"(?=\d)|\p{L}+", r" ?\p{L}*|\s", r"(?<=(?:\d)*[)])|\p{L}+"])
def test_a_split_that_matches_nothing_at_all(pattern, tmp_path):
    """There tiktoken drops a character, or panics."""
    trained_by_tokenizers(split_by(r"\p{L}+"), TEXT, 320).save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match="matches between two characters") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [(r"[\x{61}-\x{7a}]+", "which can mean two things"), (r"\p{L}{2}{3}", "cannot be read: multiple")],
)
def test_a_split_that_python_cannot_read(pattern, words, tmp_path):
    trained_by_tokenizers(split_by(pattern), TEXT, 320).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(tmp_path)


# Those of Llama 3, GPT-4o and Qwen3.5
PUBLISHED = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+[\p{L}\p{M}]++|\p{N}| ?[^\s\p{L}\p{M}\p{N}]++[\r\n]*+|\s*[\r\n]"
    r"|\s+(?!\S)|\s",
]


FOREIGN = [r"\d", r"\p{L}+| ?\p{N}+", r"\s+(?=\d)|\p{L}{2}", r"(\p{L}+)|\p{N}", r"\p{L}+|(?:(?!\p{N})[\s\S])+"]


@pytest.mark.parametrize("pattern", FOREIGN + PUBLISHED)
def test_what_a_foreign_split_does_not_match_is_kept(pattern, tmp_path):
    theirs = trained_by_tokenizers(split_by(pattern), TEXT, 320)
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    opened = load_tokenizer(tmp_path)
    for text in ("hello world, 12!", "  a1 b22\n\n\tc333 \U0001f642", "", TEXT[:2000]):
        assert opened.encode(text) == opened.encode_naive(text) == theirs.encode(text).ids
        assert opened.decode(opened.encode(text)) == text
    opened.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode(TEXT[:2000]) == opened.encode(TEXT[:2000])
    again.save_pretrained(tmp_path / "third")
    written = [(tmp_path / name / "tokenizer.json").read_text(encoding="utf-8") for name in ("again", "third")]
    assert written[0] == written[1]


def kinds():
    return [BPETokenizer.train(TEXT, 400), ByteTokenizer(), CharTokenizer.train([TEXT, *HARD, str(CHAT)])]


def specs():
    """One of each kind, with all that a file can say, made by hand."""
    special = {"<|endoftext|>": 900, "<|im_start|>": 901, "<|im_end|>": 902, "<|other|>": 903}
    every_byte = {byte: bytes([byte]) for byte in range(256)}
    vocab = {3 * byte: bytes([byte]) for byte in range(256)} | {800: b" a", 801: b"\xc3\xa9", 810: b" a\xc3\xa9"}
    merges = [(b" ", b"a"), (b"\xc3", b"\xa9"), (b" a", b"\xc3\xa9")]
    return [
        TokenizerSpec("byte", every_byte, {}),
        TokenizerSpec(
            "byte", every_byte, special, "<|other|>", {"<think>": 950}, default_system='Be "kind", \\o/ 🙂.\n'
        ),
        TokenizerSpec("char", {0: b"a", 1: b"\xc3\xa9", 2: b"\n"}, special, "<|im_end|>"),
        TokenizerSpec("bpe", vocab, special, "<|endoftext|>", {"  ": 950, "<think>": 951}, merges, PATTERN, nfc=True),
        TokenizerSpec("bpe", vocab, special, "<|im_end|>", {}, merges, SPLITS["gpt-2"], default_system=""),
    ]


@pytest.mark.parametrize("spec", specs(), ids=["plain", "all", "char", "bpe", "gpt-2"])
def test_what_is_written_is_read(spec, tmp_path):
    write_tokenizer(spec, tmp_path)
    again, file = read_tokenizer(tmp_path)
    assert file == tmp_path / "tokenizer.json"
    assert replace(again, chat_template=None) == spec
    assert again.fingerprint == spec.fingerprint


@pytest.mark.parametrize("first", [900, 0], ids=["after a gap", "before the words"])  # 0: as SmolLM2 has them
@pytest.mark.parametrize("number", [1, 2, 3], ids=["byte", "char", "bpe"])
def test_tokenizers_and_transformers_give_every_name_its_id(number, first, tmp_path):
    spec = specs()[number]
    ids = {name: i - 900 + first for name, i in spec.special_ids.items()}
    added = {name: i - 900 + first for name, i in spec.added_ids.items()}
    spec = replace(spec, vocab={i + 60: data for i, data in spec.vocab.items()}, special_ids=ids, added_ids=added)
    write_tokenizer(spec, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for name, i in (ids | added).items():
        assert theirs.token_to_id(name) == auto.convert_tokens_to_ids(name) == i
        assert theirs.encode(f"a{name}").ids == auto(f"a{name}")["input_ids"] == [theirs.token_to_id("a"), i]
        assert theirs.decode([i], skip_special_tokens=False) == name


@pytest.mark.parametrize("system", [None, "", "Be kind.\nNow!"])
def test_the_frame_as_text_is_the_frame_in_ids(bpe, system, monkeypatch):  # noqa: F811
    monkeypatch.setattr(bpe, "default_system", system)
    for messages in (CHAT, CHAT[1:], CHAT[2:3]):
        assert chatml(messages, system) == bpe.decode(bpe.encode_chat(messages, True)[0])


@pytest.mark.parametrize("kind", range(3), ids=["bpe", "byte", "char"])
def test_saved_ids_equal_tokenizers_and_transformers(kind, tmp_path):
    ours = kinds()[kind]
    ours.save_pretrained(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert (auto.eos_token, auto.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for text in HARD:
        plain = text.replace("<|im_end|>", "<|im_ end|>") if kind != 2 else text.replace("<|im_end|>", "")
        assert theirs.encode(plain).ids == ours.encode(plain) == auto(plain)["input_ids"]
        assert theirs.decode(ours.encode(plain)) == plain == ours.decode(ours.encode(plain))
    assert theirs.encode("yes<|im_end|>").ids == ours.encode("yes<|im_end|>", allowed_special="all")
    again = load_tokenizer(tmp_path)
    assert type(again) in (type(ours), BPETokenizer)
    assert again.fingerprint == ours.fingerprint
    assert auto.chat_template == CHAT_TEMPLATE
    assert again.stop_ids == ours.stop_ids
    assert [again.encode(t) for t in HARD] == [ours.encode(t) for t in HARD]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "by name", "chat_template.jinja"])
def test_a_default_system_turn_is_kept(bpe, where, tmp_path):  # noqa: F811
    """As Qwen2.5's and SmolLM2's templates have it; opened, saved and opened again the frame is transformers' own."""
    bpe.save_pretrained(tmp_path)
    said = 'Be "kind", \\o/ naïve 🙂.\nNow!'
    turn = "{{- '<|im_start|>system\\n' }}{{ " + json.dumps(said, ensure_ascii=False) + " }}{{ '<|im_end|>\\n' }}"
    template = "{%- if messages[0].role != 'system' %}" + turn + "{%- endif %}" + CHAT_TEMPLATE
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = {"tokenizer_config.json": template, "by name": [{"name": "default", "template": template}]}.get(where)
    if found is None:
        del config["chat_template"]
        (tmp_path / where).write_text(template, encoding="utf-8")
    else:
        config["chat_template"] = found
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    auto = AutoTokenizer.from_pretrained(tmp_path)
    opened = load_tokenizer(tmp_path)
    assert opened.default_system == said
    opened.save_pretrained(tmp_path / "again")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for messages in (chat, [{"role": "system", "content": "Be rude."}, *chat]):
        theirs = auto.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for ours in (opened, load_tokenizer(tmp_path / "again")):
            ids, mask = ours.encode_chat(messages)
            assert (ids, [int(m) for m in mask]) == (theirs["input_ids"], theirs["assistant_masks"])
        again = AutoTokenizer.from_pretrained(tmp_path / "again")
        assert again.apply_chat_template(messages, tokenize=False) == opened.decode(ids)
    assert opened.fingerprint == load_tokenizer(tmp_path / "again").fingerprint != bpe.fingerprint


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "its chat template is not ChatML"),
        ('{{ "a" * 10**15 }}', "its chat template does not work: MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "its chat template does not work: maximum recursion"),
    ],
)
def test_a_strange_frame_is_refused_when_it_is_asked_for(bpe, template, why, tmp_path):  # noqa: F811
    bpe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for _ in range(2):  # saved it is the same
        opened = load_tokenizer(tmp_path)
        assert opened.encode("plain text") == bpe.encode("plain text")
        with pytest.raises(TokenizerError, match=why):
            opened.encode_chat([{"role": "user", "content": "Hi"}])
        opened.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template


def make_gpt2():
    """-> a tokenizer of GPT-2's make, trained by `tokenizers`; the pattern that it splits by."""
    return trained_by_tokenizers(BYTE_LEVEL(add_prefix_space=False), TEXT, 500, ["<|endoftext|>"]), SPLITS["gpt-2"]


def make_qwen2():
    """Qwen2 composes characters first, and adds its special tokens after the others."""
    theirs = trained_by_tokenizers(split_by(PATTERN), TEXT, 500)
    theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    theirs.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS])
    return theirs, PATTERN


def make_smollm2():
    """SmolLM2 cuts the digits out before GPT-2's pattern, has the special tokens first, and lacks some bytes."""
    steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL(add_prefix_space=False)]
    alphabet = sorted(set(BYTE_LEVEL.alphabet()) - {BYTE_TO_CHAR[0xFF], BYTE_TO_CHAR[0xC1]})
    steps = tokenizers.pre_tokenizers.Sequence(steps)
    return trained_by_tokenizers(steps, TEXT, 500, SPECIAL_TOKENS, alphabet), SPLITS["smollm"]


def make_qwen3():
    """Qwen3 has words besides, tokens in any text, that are not special; GPT-NeoX has such for runs of blanks."""
    theirs, pattern = make_qwen2()
    words = ["<think>", "</think>", "<think>more", "    ", "  "]
    theirs.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return theirs, pattern


@pytest.mark.parametrize("make", [make_gpt2, make_qwen2, make_smollm2, make_qwen3])
def test_tokenizers_of_other_makes_open(make, tmp_path):
    theirs, pattern = make()
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}}), encoding="utf-8"
    )
    ours = load_tokenizer(tmp_path)
    assert (ours.pattern, ours.eos_token) == (pattern, "<|endoftext|>")
    assert ours.vocab_size == theirs.get_vocab_size()
    ours.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.fingerprint == ours.fingerprint

    @settings(max_examples=200, deadline=None)
    @given(
        st.text()
        | st.text("a1 '\n\té´s\u0301")
        | st.sampled_from(HARD)
        | st.lists(st.sampled_from(["<think>", "</think>", "more", "<", "think>", " ", "  ", "é"])).map("".join)
    )
    def same_ids(text):
        text = text.replace("<|", "< |")
        expected = theirs.encode(text).ids
        for tokenizer in (ours, again):
            assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0] == expected
        assert ours.added_ids or ours.encode_naive(text) == expected
        assert written.encode(text).ids == expected
        assert ours.nfc or ours.decode(expected) == text

    same_ids()
    assert ours.encode("a<|endoftext|>", allowed_special="all") == theirs.encode("a<|endoftext|>").ids


def test_words_that_are_tokens_but_not_special(tmp_path):
    theirs, _ = make_qwen3()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, end = load_tokenizer(tmp_path), "<|im_end|>"
    assert end in ours.special_ids
    assert set(ours.added_ids) == {"<think>", "</think>", "<think>more", "    ", "  "}
    ids = theirs.encode(f"<think>a</think>b{end}").ids
    assert ours.encode(f"<think>a</think>b{end}", allowed_special=[end]) == ids
    assert [i for i in ids if i not in ours.text_ids] == [ours.im_end_id]
    assert theirs.decode(ids) == ours.decode([i for i in ids if i in ours.text_ids])  # it skips special tokens
    chat = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "<think>a</think>b"}]
    ours.save_pretrained(tmp_path / "again")
    hf = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert hf.apply_chat_template(chat, return_dict=False) == ours.encode_chat(chat)[0]
    other = load_tokenizer(tmp_path / "again")
    other.added_ids = {}
    assert other.fingerprint != ours.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    names = [token["content"] for token in content["added_tokens"]]
    content["added_tokens"][names.index(end)]["special"] = False  # whatever a file says, it frames a chat
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
    content["added_tokens"][names.index("</think>")]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match="'</think>' is lstrip"):
        load_tokenizer(tmp_path)
    content["added_tokens"][names.index("</think>")]["lstrip"] = False
    content["added_tokens"][names.index(end)] |= {"special": True, "rstrip": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path)(f"a{end}\n")["input_ids"] == ours.encode(f"a{end}", "all")
    with pytest.raises(TokenizerError, match=r"'<\|im_end\|>' is rstrip"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tokens: tokens[0].update(id=5), "has the id 5, but `tokenizers` gives it 597"),
        (lambda tokens: tokens[0].update(id=-1), "has the id -1,"),
        (lambda tokens: tokens[0].update(id=10**30), "has the id 10{30},"),
        (lambda tokens: tokens[0].update(id=tokens[1]["id"]), "has the id 598,"),
        (lambda tokens: tokens.append(tokens[0] | {"id": 600}), "is among its added_tokens twice"),
        (lambda tokens: tokens.append(tokens[0] | {"id": 600, "content": ""}), "'' has the id 600,"),
        (lambda tokens: tokens.append(tokens[0] | {"id": 610, "content": "<a>"}), "has the id 610, .* gives it 600"),
    ],
)
def test_ids_that_tokenizers_would_not_give(bpe, change, why, tmp_path):  # noqa: F811
    bpe.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content["added_tokens"])
    file.write_text(json.dumps(content), encoding="utf-8")
    if all(0 <= token["id"] < 2**32 for token in content["added_tokens"]):
        theirs = tokenizers.Tokenizer.from_file(str(file))
        assert any(theirs.token_to_id(token["content"]) != token["id"] for token in content["added_tokens"])
    with pytest.raises(TokenizerError, match=why):
        load_tokenizer(tmp_path)


def test_an_id_that_a_gap_in_the_vocabulary_gives_twice(bpe, tmp_path):  # noqa: F811
    """`tokenizers` counts on from the number of words, also where a word has that id."""
    bpe.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    last = max(bpe.vocab)
    vocab[to_printable(bpe.vocab[last])] = len(vocab)
    content["added_tokens"].append(content["added_tokens"][0] | {"id": len(vocab), "content": "<a>"})
    file.write_text(json.dumps(content), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(file))
    assert theirs.token_to_id("<a>") == theirs.token_to_id(to_printable(bpe.vocab[last]))
    with pytest.raises(TokenizerError, match="two of its tokens have the same id"):
        load_tokenizer(tmp_path)


SMOLLM2 = {
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
}
FRAME = {"content": "<|im_start|>", "special": True, "single_word": False, "lstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("config", "text", "why"),
    [
        ({"bos_token": "<a>"}, "x<a>y", "names the token '<a>'"),
        ({"pad_token": {"__type": "AddedToken", "content": "<a>"}}, "x<a>y", "names the token '<a>'"),
        ({"additional_special_tokens": ["<|im_end|>", "<a>"]}, "x<a>y", "names the token '<a>'"),
        ({"extra_special_tokens": {"image_token": "<a>"}}, "x<a>y", "names the token '<a>'"),
        ({"extra_special_tokens": {"e": "<|im_end|>"}, "additional_special_tokens": ["<a>"]}, "x<a>y", "token '<a>'"),
        ({"model_specific_special_tokens": {"image_token": "<a>"}}, "x<a>y", "names the token '<a>'"),
        ({"added_tokens_decoder": {"600": FRAME | {"content": "<a>"}}}, "x<a>y", "names the token '<a>'"),
        ({"added_tokens_decoder": {"598": FRAME | {"rstrip": True}}}, "x<|im_start|>\ny", "'<|im_start|>' is rstrip"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "the cat", "add_prefix_space"),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True}, "the cat", None),
        (
            {"additional_special_tokens": ["<|im_end|>"], "unk_token": None, "add_bos_token": False},
            "x<|im_end|>y",
            None,
        ),
        ({"added_tokens_decoder": {"598": FRAME}, "extra_special_tokens": {}}, "x<|im_start|>\ny", None),
    ],
)
def test_what_tokenizer_config_says_of_the_ids(bpe, config, text, why, tmp_path):  # noqa: F811
    bpe.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(written | config), encoding="utf-8")
    same = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == bpe.encode(text, allowed_special="all")
    assert same == (why is None)
    if why is None:
        assert load_tokenizer(tmp_path).fingerprint == bpe.fingerprint
        return
    with pytest.raises(TokenizerError, match=why.replace("|", r"\|")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.train("cafe\u0301é")], ids=["byte", "char"])
def test_nfc_of_bytes_and_characters_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(file)).encode("cafe\u0301").ids
    assert theirs != tokenizer.encode("cafe\u0301")
    with pytest.raises(TokenizerError, match=r"NFC of a (byte|char) tokenizer: not supported here"):
        load_tokenizer(tmp_path)


def test_what_gpt2_and_smollm2_lack(tmp_path):
    make_gpt2()[0].save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.stop_ids == (ours.endoftext_id,)
    with pytest.raises(TokenizerError, match="cannot frame a chat"):
        ours.encode_chat(CHAT)
    alphabet = sorted(set(BYTE_LEVEL.alphabet()) - {BYTE_TO_CHAR[0xF0]})
    trained_by_tokenizers(split_by(PATTERN), "abc", 400, alphabet=alphabet).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"bytes \[240\], which this vocabulary lacks"):
        load_tokenizer(tmp_path).encode("a smile 🙂")
    # "é" written as e and an accent has no byte 0xC3 until it is composed
    alphabet = sorted(set(BYTE_LEVEL.alphabet()) - {BYTE_TO_CHAR[0xC3]})
    theirs = trained_by_tokenizers(split_by(PATTERN), "abc", 400, alphabet=alphabet)
    theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"bytes \[195\], which this vocabulary lacks"):
        load_tokenizer(tmp_path).encode("e\u0301")


def test_the_byte_alphabet_is_gpt2s():
    assert sorted(BYTE_TO_CHAR.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert BYTE_TO_CHAR[32] == "Ġ"


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BY_STRING = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": UNIGRAM}, "a Unigram model is not supported here"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BY_STRING, BYTES]}},
            r"Split \+ ByteLevel is not",
        ),
        ({"pre_tokenizer": BYTES}, "a BPE that does not split a text first is not supported here"),
    ],
)
def test_what_is_valid_but_not_supported(bpe, change, why, tmp_path):  # noqa: F811
    bpe.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    tokenizers.Tokenizer.from_file(str(file))
    with pytest.raises(TokenizerError, match=why):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is corrupt: no JSON object"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is corrupt: no JSON object"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "tokenizer_config.json is corrupt"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 5}', "tokenizer_config.json is corrupt"),
        ("tokenizer_config.json", b'{"eos_token": ["a"]}', r"tokenizer_config.json: it names the token \['a'\]"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read: 'utf-8' codec can't decode"),
        ("chat_template.jinja", None, "chat_template.jinja cannot be read: Is a directory"),
    ],
)
def test_the_broken_file_is_named(bpe, name, content, why, tmp_path):  # noqa: F811
    bpe.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=why) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert name == "tokenizer.json" or "tokenizer.json is corrupt" not in str(error.value)


def test_errors(bpe, tmp_path):  # noqa: F811
    with pytest.raises(TokenizerError, match="is not there"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", '{"model": {"type": "Unigram"}, "pre_tokenizer": {}, "added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(TokenizerError, match=r"corrupt|not supported"):
            load_tokenizer(tmp_path)
    bpe.save_pretrained(tmp_path)
    good = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for broken in (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"model": {"vocab": good["model"]["vocab"] | {"!": 10**30}}},
    ):
        broken = {key: good[key] | value for key, value in broken.items()}
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | broken), encoding="utf-8")
        with pytest.raises(TokenizerError, match="corrupt"):
            load_tokenizer(tmp_path)
    for number in (float("nan"), float("inf"), 2.5, True):
        tokens = [good["added_tokens"][0] | {"id": number}, *good["added_tokens"][1:]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | {"added_tokens": tokens}), encoding="utf-8")
        with pytest.raises(TokenizerError, match=f"the id of its token .* is {number}, no whole number"):
            load_tokenizer(tmp_path)


def test_a_gguf_file_whose_tokenizer_is_broken(bpe):  # noqa: F811
    tokens = [to_printable(token) for token in bpe.vocab.values()] + list(SPECIAL_TOKENS)
    good = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": [1] * len(bpe.vocab) + [3] * 3,
        "merges": [f"{to_printable(left)} {to_printable(right)}" for left, right in bpe.merges],
        "eos_token_id": 599,
    }

    def opened(**changes):
        return gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in (good | changes).items()}, "x.gguf")

    assert opened().encode(TEXT) == bpe.encode(TEXT)
    for changes in (
        {"merges": [3, *good["merges"][1:]]},
        {"merges": good["merges"][::-1]},
        {"merges": None},
        {"tokens": [None, *tokens[1:]]},
        {"tokens": [*tokens[:-1], None]},
        {"token_type": [1]},
        {"eos_token_id": 10**9},
    ):
        with pytest.raises(TokenizerError, match=r"^x\.gguf: the tokenizer is corrupt: ") as error:
            opened(**changes)
        assert "\n" not in str(error.value)


def test_tokens_that_their_merges_do_not_make(tmp_path):
    """tiktoken takes a piece that is a token as it stands and joins any two neighbours whose union is one; a file whose
    merges would cut such a token is refused, whether it asks for the first (`ignore_merges`) or not."""
    from tokenizers import Tokenizer

    tokens = [*(bytes([b]) for b in range(256)), b"bc", b"ab", b"cd", b"abcd"]
    merges = [(b"b", b"c"), (b"a", b"b"), (b"c", b"d"), (b"ab", b"cd")]
    ours = BPETokenizer(merges, dict(enumerate(tokens)), {})
    ours.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    assert Tokenizer.from_file(str(file)).encode("abcd").ids == ours.encode_naive("abcd") == [97, 256, 100]
    for asked in (False, True):
        content = json.loads(file.read_text(encoding="utf-8"))
        content["model"]["ignore_merges"] = asked
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(TokenizerError, match="do not make its token 'abcd'"):
            load_tokenizer(tmp_path)


def test_gpt2_as_published(tmp_path):
    """tiktoken builds GPT-2's ranks from the same two files by its own code."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder, text = published("gpt2"), published("taylorswift.txt").read_text(encoding="utf-8")
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    ours = load_tokenizer(folder)
    assert (ours.vocab_size, ours.endoftext_id) == (50257, 50256)
    assert ours.encode("Hello, world") == [15496, 11, 995]
    assert ours.encode("a<|endoftext|>", allowed_special="all") == [64, 50256]
    ours.save_pretrained(tmp_path)
    package = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    @settings(max_examples=150, deadline=None)
    @given(st.text())
    @example(text)
    @example("".join(HARD))
    def same_ids(text):
        text = text.replace("<|endoftext|>", "")
        assert ours.encode(text) == theirs.encode_ordinary(text) == package.encode(text).ids

    same_ids()
    assert ours.encode(text[:5000]) == ours.encode_naive(text[:5000])
