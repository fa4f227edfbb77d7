"""tokenizer_bpe.py against tokenizers, tiktoken and transformers."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenizer_bpe import (
    BYTE_TO_CHAR,
    CHAT_TEMPLATE,
    GPT2_PATTERN,
    PATTERN,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    TokenizerError,
    count_words,
    load_tokenizer,
    merge,
    train_bpe,
    train_bpe_naive,
)

TEXT = (
    Path(__file__).with_name("test_transformer.py").read_text() + "naïve façade, 12345 × 67; 你好 🙂 don't I'LL\n\n\t x"
)
HARD = ["", " ", "\n\n \t", "🙂🙃 naïve", "12345+678=13023", "don't DON'T", "<|im_end|>", "a\u0301\u200d", TEXT[:500]]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2? <|im_end|>"},
    {"role": "assistant", "content": "4\n#### 4"},
    {"role": "user", "content": "sure"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXT, 600)


def kinds():
    return [BPETokenizer.train(TEXT, 400), ByteTokenizer(), CharTokenizer.train([TEXT, *HARD, str(CHAT)])]


def test_the_example_of_wikipedia():
    assert train_bpe_naive({b"aaabdaaabac": 1}, 3) == [(97, 97), (97, 98), (256, 257)]
    assert merge([1, 2, 3, 1, 2, 2], (1, 2), 9) == [9, 3, 9, 2]
    assert merge([1, 1, 1], (1, 1), 9) == [9, 1]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abcd", min_size=1, max_size=9).map(str.encode), st.integers(1, 4), max_size=9))
def test_fast_training_equals_plain_training(words):
    assert train_bpe(words, 30) == train_bpe_naive(words, 30)


def test_training_equals_the_tokenizers_package(tmp_path):
    """Its ids follow the sorted characters that stand for the bytes, ours the bytes; a tie in the counts may then go
    the other way. So words are counted by it in our order: bytes that sort alike in both (printable ASCII)."""
    text = "".join(c for c in TEXT if 33 <= ord(c) < 127 or c == "\n")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n"), "removed")
    theirs.pre_tokenizer = split
    alphabet = sorted(set(text) - {"\n"})
    size = len(alphabet) + 150
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([text], trainer)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    words = count_words(text, r"[^\n]+")
    spelling = {i: bytes([i]) for i in range(256)}
    ours = []
    for pair in train_bpe(words, 150):
        left, right = spelling[pair[0]], spelling[pair[1]]
        spelling[len(spelling)] = left + right
        ours.append([left.decode(), right.decode()])
    assert ours == merges[:150]


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
    assert again.chat_template == CHAT_TEMPLATE
    assert again.stop_ids == ours.stop_ids
    assert [again.encode(t) for t in HARD] == [ours.encode(t) for t in HARD]


def test_chat_equals_the_stored_template(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    chat = [m | {"content": m["content"].replace("<|im_end|>", "")} for m in CHAT]
    theirs = auto.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = bpe.encode_chat(chat)
    # Encoded as one text, "user\n" + "sure" could merge over the border; ours never does. Here nothing does.
    assert ids == theirs["input_ids"]
    assert [int(m) for m in mask] == theirs["assistant_masks"]
    prompt = auto.apply_chat_template(chat[:2], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert bpe.encode_chat(chat[:2], True)[0] == prompt["input_ids"]


def test_content_cannot_forge_a_turn(bpe):
    ids, mask = bpe.encode_chat(CHAT)
    assert ids.count(bpe.special_ids["<|im_end|>"]) == len(CHAT)
    trained = [i for i, flag in zip(ids, mask, strict=True) if flag]
    end = bpe.special_ids["<|im_end|>"]
    assert trained == [*bpe.encode("4\n#### 4"), end, *bpe.encode("yes"), end]


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_survives_and_the_plain_encoder_agrees(text):
    tokenizer = test_any_text_survives_and_the_plain_encoder_agrees.tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode_naive(text)


test_any_text_survives_and_the_plain_encoder_agrees.tokenizer = BPETokenizer.train(TEXT, 600)


@given(st.binary())
def test_any_bytes_can_be_spelled(data):
    assert ByteTokenizer().decode_bytes(list(data)) == data


def test_digits_stand_alone(bpe):
    assert [bpe.decode([i]) for i in bpe.encode("12345")] == list("12345")
    assert all(sum(c.isdigit() for c in data.decode(errors="replace")) <= 1 for data in bpe.vocab.values())


def test_special_tokens_must_be_asked_for(bpe):
    end = bpe.special_ids["<|im_end|>"]
    assert end not in bpe.encode("a<|im_end|>")
    assert bpe.encode("a<|im_end|>b", allowed_special=["<|im_end|>"]) == [*bpe.encode("a"), end, *bpe.encode("b")]
    assert bpe.decode(bpe.encode("a<|im_end|>")) == "a<|im_end|>"
    assert [bpe.special_ids[s] for s in SPECIAL_TOKENS] == [597, 598, 599]


def test_a_text_too_short_for_its_vocabulary():
    tokenizer = BPETokenizer.train("ab ab", 1000)
    assert tokenizer.vocab_size == 256 + len(tokenizer.merges) + 3 < 300
    assert tokenizer.decode(tokenizer.encode("ab abc")) == "ab abc"


def test_a_gpt2_tokenizer_opens(tmp_path):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    theirs.train_from_iterator([TEXT], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.pattern == GPT2_PATTERN != PATTERN
    for text in HARD:
        assert ours.encode(text) == theirs.encode(text).ids
    with pytest.raises(TokenizerError, match="cannot frame a chat"):
        ours.encode_chat(CHAT)


def test_the_byte_alphabet_is_gpt2s():
    assert sorted(BYTE_TO_CHAR.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert BYTE_TO_CHAR[32] == "Ġ"


def test_errors(bpe, tmp_path):
    chars = CharTokenizer.train("abc")
    cases = [
        (lambda: chars.encode("abxc"), "'x' at position 2"),
        (lambda: bpe.decode([99999]), "id 99999"),
        (lambda: bpe.encode("x", allowed_special=["<|nope|>"]), "not a special token"),
        (lambda: BPETokenizer.train("abc", 200), "too small"),
        (lambda: BPETokenizer.train("", 300), "empty"),
        (lambda: CharTokenizer.train([]), "empty"),
        (lambda: bpe.encode_chat([{"role": "robot", "content": "x"}]), "message 0"),
        (lambda: load_tokenizer(tmp_path), "is not there"),
    ]
    for call, message in cases:
        with pytest.raises(TokenizerError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    for content in ("{", "[]", '{"model": {"type": "Unigram"}, "pre_tokenizer": {}, "added_tokens": []}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"corrupt|not supported"):
            load_tokenizer(tmp_path)


def test_real_text():
    path = Path(os.environ.get("ALIGN_DATA", "downloads")) / "tokenizers" / "taylorswift.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    text = path.read_text(encoding="utf-8")
    tokenizer = BPETokenizer.train(text, 800)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text[:20_000]) == tokenizer.encode_naive(text[:20_000])
