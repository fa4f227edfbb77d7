"""tokenizer_bpe.py against tokenizers, tiktoken and transformers."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from support.errors import TokenizerError
from support.tokenizer_files import SPLITS, from_printable
from tokenizer_bpe import (
    PATTERN,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    merge,
    train_bpe,
    train_bpe_naive,
)

TEXT = (
    Path(__file__).with_name("test_transformer.py").read_text(encoding="utf-8")
    + "naïve façade, 12345 × 67; 你好 🙂 don't I'LL\n\n\t x"
)
BYTE_LEVEL = tokenizers.pre_tokenizers.ByteLevel
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


def test_the_example_of_wikipedia():
    assert train_bpe_naive("aaabdaaabac", 3) == [(97, 97), (97, 98), (256, 257)]
    assert merge([1, 2, 3, 1, 2, 2], (1, 2), 9) == [9, 3, 9, 2]
    assert merge([1, 1, 1], (1, 1), 9) == [9, 1]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("abcd ", min_size=1, max_size=30) | st.text(min_size=1, max_size=30), min_size=1, max_size=6))
def test_fast_training_equals_plain_training(texts):
    assert train_bpe(texts, 30) == train_bpe_naive(texts, 30)


@settings(max_examples=50, deadline=None)
@given(st.text("ab 1'é\n🙂\x00", min_size=1, max_size=200))
@example(TEXT)
def test_training_equals_the_tokenizers_package(text):
    theirs = trained_by_tokenizers(split_by(PATTERN), text, 256 + 200)
    merges = [
        (from_printable(left), from_printable(right)) for left, right in json.loads(theirs.to_str())["model"]["merges"]
    ]
    assert BPETokenizer.train(text, 256 + 200, special_tokens=()).merges == merges


def split_by(pattern):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return tokenizers.pre_tokenizers.Sequence([split, BYTE_LEVEL(add_prefix_space=False, use_regex=False)])


def trained_by_tokenizers(pre_tokenizer, text, size, special=(), alphabet=None):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizer, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=BYTE_LEVEL.alphabet() if alphabet is None else alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    theirs.train_from_iterator([text], trainer)
    return theirs


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


def test_the_split_is_qwen2s():
    assert SPLITS["qwen2"] == PATTERN  # so that it is written into a file, and known again, as that


@pytest.mark.parametrize(
    ("make", "plain", "with_words"),
    [
        (lambda: BPETokenizer.train("the cat sat on the mat; naïve 12", 290), "3d8bc7d6267b2304", "91917bb3d6a28ba9"),
        (ByteTokenizer, "a8db87984af53a9b", "9c14762de1e51e64"),
        (lambda: CharTokenizer.train("abc é 🙂"), "10fb6f4347dd175b", "950fd3f2c9da762e"),
    ],
    ids=["bpe", "byte", "char"],
)
def test_a_fingerprint_never_changes(make, plain, with_words):
    """Streams on disk and checkpoints carry it: one that changes makes them strangers."""
    tokenizer = make()
    assert tokenizer.fingerprint == plain
    tokenizer.add_words({"<think>": 1000})
    tokenizer.default_system = "Be kind."
    assert tokenizer.fingerprint == with_words


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


def test_errors(bpe):
    chars = CharTokenizer.train("abc")
    cases = [
        (lambda: chars.encode("abxc"), "'x' at position 2"),
        (lambda: bpe.decode([99999]), "id 99999"),
        (lambda: bpe.encode("x", allowed_special=["<|nope|>"]), "not a special token"),
        (lambda: BPETokenizer.train("abc", 200), "too small"),
        (lambda: BPETokenizer.train("", 300), "empty"),
        (lambda: CharTokenizer.train([]), "empty"),
        (lambda: bpe.encode_chat([{"role": "robot", "content": "x"}]), "message 0"),
    ]
    for call, message in cases:
        with pytest.raises(TokenizerError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def published(name):
    path = Path(os.environ.get("ALIGN_DATA", "downloads")) / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def test_real_text():
    text = published("taylorswift.txt").read_text(encoding="utf-8")
    tokenizer = BPETokenizer.train(text, 800)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text[:20_000]) == tokenizer.encode_naive(text[:20_000])
    theirs = trained_by_tokenizers(split_by(PATTERN), text, 800 - 3)
    merges = [
        (from_printable(left), from_printable(right)) for left, right in json.loads(theirs.to_str())["model"]["merges"]
    ]
    assert tokenizer.merges == merges
