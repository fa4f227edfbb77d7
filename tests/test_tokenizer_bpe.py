"""tokenizer_bpe.py against tokenizers, tiktoken and transformers."""

import json
import os
import random
import time
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tokenizer_bpe
from support import pieces
from support.errors import TokenizerError
from support.pieces import doubtful_tokens
from support.tokenizer_files import SPLITS, from_printable, match_everything
from tokenizer_bpe import (
    PATTERN,
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    apply_merges,
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


RUNS = [
    " ",
    "\n",
    "\t",
    " \t\u00a0",
    "\r\n",
    " \n",
    "a",
    "aA",
    "7",
    ".",
    "'",
    "'s",
    "你",
    "🙂",
    "\u0301\u0316",
    "e\u0301",
    "²",
]
RUNS_OF_ANY_LENGTH = st.lists(st.tuples(st.sampled_from(RUNS), st.integers(1, 120)), max_size=6).map(
    lambda runs: "".join((run * n)[:n] for run, n in runs)
)


@settings(max_examples=150, deadline=None)
@given(RUNS_OF_ANY_LENGTH.filter(bool))
def test_training_on_runs_equals_plain_training(text):
    assert train_bpe(text, 40) == train_bpe_naive(text, 40)


@pytest.mark.parametrize("run", [" ", ".", "你", "\u0301\u0316"])
def test_training_is_linear_in_a_run(run):
    def seconds(n):
        started = time.process_time()
        merges = train_bpe((run * n)[:n] + "a", 20)
        return time.process_time() - started, merges

    few, (many, merges) = seconds(20_000)[0], seconds(400_000)
    assert many < 60 * few  # 20 times as much; if it were quadratic, 400 times
    if run == ".":
        assert merges[:3] == [(46, 46), (256, 256), (257, 257)]


@settings(max_examples=50, deadline=None)
@given(st.text("ab 1'é\n🙂\x00\U000323b0", min_size=1, max_size=200))
@example(TEXT)
@example("é\U000323b0\n" * 9)  # a letter, but not yet in the edition of Unicode that tokenizers and tiktoken have
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
    assert ids == theirs["input_ids"]
    assert [int(m) for m in mask] == theirs["assistant_masks"]
    prompt = auto.apply_chat_template(chat[:2], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert bpe.encode_chat(chat[:2], True)[0] == prompt["input_ids"]


def test_a_line_end_merges_with_the_frame_but_for_an_answers():
    bpe = BPETokenizer.train("a\n\n\n\nb\n\n" * 20, 300)
    (two,), (one,) = bpe.encode("\n\n"), bpe.encode("\n")
    assert two in bpe.encode_chat([{"role": "user", "content": "\nx"}])[0]
    ids, mask = bpe.encode_chat([{"role": "assistant", "content": "\nx"}])
    assert two not in ids
    assert ids[mask.index(True)] == one  # the answer's first


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


PATTERNS = SPLITS | {
    "llama-3": PATTERN.replace(r"\p{N}", r"\p{N}{1,3}", 2).replace(r"\p{L}\p{N}{1,3}", r"\p{L}\p{N}"),
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "odd": match_everything(r"(\p{L}+)| ?\p{N}+"),
}


@pytest.fixture(scope="module")
def of_runs():
    """{name of a pattern: a tokenizer that has tokens for runs}"""
    texts = [TEXT, *((run * 300)[:300] + "\n" for run in RUNS)]
    of_ours = BPETokenizer.train(texts, 700)
    return {n: BPETokenizer(of_ours.merges, of_ours.vocab, of_ours.special_ids, p) for n, p in PATTERNS.items()}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("block", [3, pieces.BLOCK])
def test_runs_of_any_class_have_the_ids_of_the_plain_algorithm(of_runs, name, block, monkeypatch):
    """A block of 3: all of these texts are split here. Otherwise tiktoken splits them."""
    monkeypatch.setattr(pieces, "BLOCK", block)
    tokenizer = of_runs[name]

    @settings(max_examples=80, deadline=None)
    @given(RUNS_OF_ANY_LENGTH)
    def same_ids(text):
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode_naive(text) == tokenizer.encode_batch(["x", text])[1]
        assert tokenizer.decode(ids) == text

    same_ids()


@pytest.mark.parametrize("name", [*SPLITS, "llama-3"])
def test_a_run_of_a_million_blanks(of_runs, name, capfd):
    """tiktoken alone panics, and the panic is no Exception."""
    tokenizer, end = of_runs[name], of_runs[name].im_end_id
    for run in (" ", " \t\u00a0")[: 2 if name == "qwen2" else 1]:
        text = (run * 1_000_000)[:1_000_000] + "b"
        ids = tokenizer.encode_naive(text)
        assert tokenizer.encode(f"a<|im_end|>{text}", "all") == [*tokenizer.encode("a"), end, *ids]
        assert tokenizer.encode_batch(["", text])[1] == ids
    assert capfd.readouterr().err == ""


def test_a_panic_that_no_rule_foresees(of_runs):
    """The pattern of a loaded file may make tiktoken panic elsewhere, here in punctuation."""
    text = "." * 1_100_000
    assert of_runs["odd"].encode(text) == of_runs["odd"].encode_naive(text)


@settings(max_examples=100, deadline=None)
@given(st.text("a 1.\n\U000323b0\U000323b1\U00011de0\ua7ce\u20c1é\U00020000"))
def test_letters_newer_than_tiktokens_unicode(text):
    """Of 17,000 letters that `regex` knows tiktoken says, as does the tokenizers package, that they are none."""
    tokenizer = test_letters_newer_than_tiktokens_unicode.tokenizer
    theirs = split_by(PATTERN).pre_tokenize_str(text)
    assert [piece.encode() for piece in pieces.split(text, PATTERN)] == [from_printable(piece) for piece, _ in theirs]
    assert tokenizer.encode(text) == tokenizer.encode_naive(text)


test_letters_newer_than_tiktokens_unicode.tokenizer = BPETokenizer.train("a\U00020000 é\U00020000a " * 9, 300)


def test_a_letter_that_only_one_of_the_two_knows(monkeypatch):
    class Encoder:
        def __init__(self, kind):
            self.letters = {r"\p{Lo}": "你\u0378", r"\p{Ll}": "aß"}.get(kind, "")

        def encode_ordinary(self, text):
            return "".join(c for c in text if c in self.letters).encode()

    monkeypatch.setattr(pieces, "seen_as", {})
    monkeypatch.setattr(pieces, "class_encoder", Encoder)
    assert pieces.as_tiktoken_sees("ß你") == "ß你"
    assert pieces.as_tiktoken_sees("aß你é\u0378") == "aß你\ufdd0ƻ"
    assert pieces.split("ß é\u0378", r"\p{L}+") == ["ß", "\u0378"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ae\u0301\u0316\u0344\u0f73\u0f71\u09be\u0323", max_size=9).map(lambda s: s * 60)).map("".join))
def test_composing_a_run_of_marks(text):
    assert pieces.compose(text) == unicodedata.normalize("NFC", text)


def test_composing_is_linear_in_a_run():
    started = time.process_time()  # unicodedata alone takes a minute or two
    marks = pieces.compose("a" + "\u0301\u0316" * 100_000)
    assert marks == "á" + "\u0316" * 100_000 + "\u0301" * 99_999
    assert pieces.compose("\u0f73" * 100_000) == "\u0f71" * 100_000 + "\u0f72" * 100_000
    assert time.process_time() - started < 3


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


def test_the_name_of_one_special_token_may_be_asked_for(bpe):
    assert bpe.encode("a<|im_end|>b", "<|im_end|>") == bpe.encode("a<|im_end|>b", ["<|im_end|>"])
    with pytest.raises(TokenizerError, match=r"^'<\|nope\|>' is not a special token here"):
        bpe.encode("a", "<|nope|>")


def test_the_docstring_underlines_the_mask(bpe):
    lines = tokenizer_bpe.__doc__.splitlines()
    [at] = [i for i, line in enumerate(lines) if line and not line.strip(" ~")]
    ids, mask = bpe.encode_chat([{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}])
    assert lines[at - 1].strip() == bpe.decode(ids).replace("\n", r"\n")
    trained = bpe.decode([i for i, flag in zip(ids, mask, strict=True) if flag])
    assert "".join(c for c, mark in zip(lines[at - 1], lines[at], strict=False) if mark == "~") == trained


def test_a_text_too_short_for_its_vocabulary():
    tokenizer = BPETokenizer.train("ab ab", 1000)
    assert tokenizer.vocab_size == 256 + len(tokenizer.merges) + 3 < 300
    assert tokenizer.decode(tokenizer.encode("ab abc")) == "ab abc"


def test_errors(bpe):
    chars = CharTokenizer.train("abc")
    cases = [
        (lambda: chars.encode("abxc"), "'x' in 'abxc' was not in"),
        (lambda: chars.encode("a" * 30 + "bx" + "c" * 30), f"'x' in '{'a' * 19}bx{'c' * 20}' was"),
        (lambda: bpe.encode("a\ud800b"), r"'\\ud800' in 'a\\ud800b' is half"),
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


def test_the_quick_test_of_spelling_misses_nothing():
    """Against applying the merges to every token: random tables, in order and not."""
    chance, clean = random.Random(0), 0
    for trial in range(3000):
        tokens, merges = [b"a", b"b", b"c"][: 2 + trial % 2], []
        for _ in range(chance.randint(1, 8)):
            pair = chance.choice(tokens), chance.choice(tokens)
            tokens.append(pair[0] + pair[1])
            merges.append(pair)
        if trial % 5 == 0:
            chance.shuffle(merges)
        rank = {pair: place for place, pair in enumerate(merges)}
        wrong = {token for token in map(b"".join, merges) if len(apply_merges(token, rank)) > 1}
        doubtful = set(doubtful_tokens(merges))
        assert not wrong or wrong & doubtful, merges
        clean += not doubtful
    assert clean > 500  # it is not one that doubts everything


def test_the_quick_test_of_spelling_trusts_a_trained_table():
    tokenizer = BPETokenizer.train(Path(__file__).read_text(encoding="utf-8"), 600)
    assert not list(doubtful_tokens(tokenizer.merges))
