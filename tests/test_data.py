"""data.py: data sets by name, the splits, pairs, and what a step reads. Tests on real data need $ALIGN_DATA and are
skipped without it."""

import collections
import json
import os
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import data
from data import load_judged, load_pairs, load_problems, load_reviews, load_text, make_problems
from support import downloads, splits, tasks
from support import word_problems as built_in
from support.answers import extract_answer, same_answer
from support.errors import DataError

REAL = Path(os.environ.get("ALIGN_DATA") or "downloads")  # as downloads.data_folder
needs_gsm8k = pytest.mark.skipif(not (REAL / "gsm8k/test.jsonl").is_file(), reason="no gsm8k/ in $ALIGN_DATA")
needs_pairs = pytest.mark.skipif(not (REAL / "preferences").is_dir(), reason="no preferences/ in $ALIGN_DATA")


# Real data and files.


@needs_gsm8k
def test_gsm8k_golds():
    counts = {split: 0 for split in splits.SPLITS}
    questions = []
    for split in splits.SPLITS:
        for problem in load_problems("gsm8k", split):
            counts[split] += 1
            gold = problem.solution.rsplit("#### ", 1)[1]
            assert Decimal(problem.answer) == Decimal(gold.replace(",", ""))
            assert "<<" not in problem.solution
            assert problem.calls == "" or "<<" in problem.calls
            assert problem.level >= 1
            assert problem.story == "gsm8k"
            questions.append(problem.question)
    assert counts == {"train": 6973, "valid": 500, "test": 1319}
    assert len(set(questions)) == 8792
    first = load_problems("gsm8k", "train", n=3)
    assert len(first) == 3
    assert (first[0].answer, first[0].level) == ("72", 2)
    assert "48/2 = 24 clips" in first[0].solution


@pytest.mark.skipif(not (REAL / "tinystories/valid.txt").is_file(), reason="no tinystories/ in $ALIGN_DATA")
def test_tinystories():
    assert len(load_text("tinystories", "valid")) == 198
    assert len(load_text("tinystories", "train")) == 2734


@pytest.mark.skipif(not (REAL / "tinyshakespeare/input.txt").is_file(), reason="no tinyshakespeare/ in $ALIGN_DATA")
def test_tinyshakespeare():
    (train,), (valid,) = load_text("tinyshakespeare"), load_text("tinyshakespeare", "valid")
    assert (len(train), len(valid)) == (1_003_854, 111_540)


def test_word_is_the_default():
    assert load_problems(n=5) == make_problems("word", "train", 5)
    assert load_problems("word", "test", n=4, levels=(3,)) == make_problems("word", "test", 4, (3,))


@pytest.mark.parametrize("load", [load_problems, load_text])
def test_bad_files(tmp_path, load):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n", encoding="utf-8")
    latin.write_bytes(b"abc caf\xe9")
    for name, message in [
        (tmp_path / "none.txt", f"no such file, and not one of the known datasets {', '.join(tasks.TASKS)}, gsm8k"),
        ("gsm9k", f"no such file, and not one of the known datasets {', '.join(tasks.TASKS)}, gsm8k"),
        (tmp_path, "is a folder"),
        (empty, "is empty"),
        (latin, "not UTF-8 (byte 7)"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            load(name)


def test_bad_splits(tmp_path):
    for call in (
        lambda: make_problems("word", "dev", 1),
        lambda: load_problems("word", "dev"),
        lambda: load_text("word", "test"),
        lambda: load_text("tinyshakespeare", "test"),
        lambda: built_in.narrative_texts("dev", 1),
        lambda: downloads.find("gsm8k", "valid"),
    ):
        with pytest.raises(DataError, match="unknown split"):
            call()
    one = tmp_path / "one.jsonl"
    one.write_text('{"question": "A?", "answer": "5"}', encoding="utf-8")
    for split in set(splits.SPLITS) - {splits.split_of("A?")}:
        with pytest.raises(DataError, match=f"no problem in the split {split}"):
            load_problems(one, split)


def test_text_file_is_cut_in_order(tmp_path):
    file = tmp_path / "book.txt"
    text = "".join(chr(ord("a") + i % 26) for i in range(999)) + "é"
    file.write_text(text, encoding="utf-8")
    (train,), (valid,) = load_text(file), load_text(str(file), "valid")
    assert train + valid == text
    assert len(train) == 900


def test_find_looks_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    file = tmp_path / "gsm8k/train.jsonl"
    file.parent.mkdir()
    file.write_text("x", encoding="utf-8")
    assert downloads.find("gsm8k") == file
    assert downloads.find(file) == file
    with pytest.raises(DataError, match="built in"):
        downloads.find("word")
    with pytest.raises(DataError, match=r"tinystories: no .*valid.txt.* by hand"):
        downloads.find("tinystories", "valid")
    monkeypatch.delenv("ALIGN_DATA")
    assert downloads.data_folder() == Path("downloads")


def write_gsm8k(folder, n_train):
    """Made-up files that stand where the download would."""
    (folder / "gsm8k").mkdir()
    for split, n in (("train", n_train), ("test", 40)):
        lines = (json.dumps({"question": f"{split} {i}?", "answer": f"#### {i}"}) for i in range(n))
        (folder / f"gsm8k/{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_a_name_is_one_as_a_path_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    write_gsm8k(tmp_path, 600)
    for split, n in (("train", 100), ("valid", 500), ("test", 40)):
        problems = load_problems(Path("gsm8k"), split)
        assert len(problems) == n
        assert problems == load_problems("gsm8k", split)
    assert [p.question for p in load_problems("gsm8k", "train")] == [f"train {i}?" for i in range(100)]
    assert [p.question for p in load_problems("gsm8k", "valid")] == [f"train {i}?" for i in range(100, 600)]
    assert load_text(Path("gsm8k"), "valid") == load_text("gsm8k", "valid")
    (tmp_path / "preferences").mkdir()
    records = [json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) for i in range(60)]
    for split, part in (("train", records[:30]), ("test", records[30:])):
        (tmp_path / f"preferences/ultrafeedback_{split}.jsonl").write_text("\n".join(part), encoding="utf-8")
    assert [p.prompt for p in load_pairs(Path("ultrafeedback"), "test")] == [f"p{i}" for i in range(30, 60)]
    (tmp_path / "sentiment").mkdir()
    for split in ("train", "test"):
        lines = "".join(f"{split} {i}\t{i % 2}\n" for i in range(60))
        (tmp_path / f"sentiment/sentence_polarity_{split}.tsv").write_text(f"text\tlabel\n{lines}", encoding="utf-8")
    assert [r.text for r in load_reviews(Path("polarity"), "test")] == [f"test {i}" for i in range(60)]
    word = Path("word")
    assert load_problems(word, n=3) == load_problems("word", n=3)
    assert load_text(word, "valid") == load_text("word", "valid")
    assert load_pairs(word, n=3) == load_pairs("word", n=3)
    assert load_judged(word, n=3) == load_judged("word", n=3)
    assert load_reviews(Path("sentiment"), "valid") == load_reviews("sentiment", "valid")
    assert tasks.has_verifier(word)
    assert tasks.has_verifier(Path("gsm8k"))
    assert tasks.task_of(word) is tasks.TASKS["word"]


def test_gsm8k_without_a_row_for_train_says_so(tmp_path, monkeypatch):
    """More records would be split by place, not by hash."""
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    write_gsm8k(tmp_path, 500)
    with pytest.raises(DataError, match=r"train\.jsonl has 500 problems, and the last 500 are valid: none is left for"):
        load_problems("gsm8k", "train")
    assert len(load_problems("gsm8k", "valid")) == 500


def test_a_test_file_without_a_pair_is_not_asked_for_more_by_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    (tmp_path / "preferences").mkdir()
    line = json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"})
    (tmp_path / "preferences/ultrafeedback_test.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=r"ultrafeedback has no pair in the split test$"):
        load_pairs("ultrafeedback", "test")


def test_judged_answers_take_no_argument_that_they_do_not_know():
    with pytest.raises(TypeError, match="nonsense"):
        load_judged("some.jsonl", nonsense=3)


def test_a_data_set_without_labelled_texts_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    monkeypatch.setattr(downloads, "fetch", lambda *_: pytest.fail("a file was asked for"))
    for name in ("gsm8k", "style", "word"):
        for split in splits.SPLITS:
            message = f"{name} has no labelled texts: choose sentiment, polarity, reviews, imdb, or the path of a file"
            with pytest.raises(DataError, match=message):
                load_reviews(name, split)
    kinds = {load_problems: "problems", load_text: "text for pretraining", load_pairs: "preference pairs"}
    for load, kind in kinds.items():
        with pytest.raises(DataError, match=f"sentiment has no {kind}: choose word"):
            load("sentiment")


@pytest.mark.skipif(not (REAL / "ratings").is_dir(), reason="no ratings/ in $ALIGN_DATA")
def test_real_ratings_and_instructions():
    ratings = [problem.rating for split in splits.SPLITS for problem in load_problems("ratings", split)]
    assert collections.Counter(ratings) == {1: 40, 2: 65, 3: 57, 4: 289, 5: 189}
    assert sum(len(load_problems("instructions", split)) for split in splits.SPLITS) == 1100


def test_word_pairs():
    pairs = load_pairs("word", "train", 600, (1, 2, 3))
    problems = {problem.question: problem for problem in make_problems("word", "train", 600, (1, 2, 3))}
    counts = collections.Counter()
    for pair in pairs:
        problem = problems[pair.prompt]
        assert pair.chosen == problem.solution
        assert not same_answer(extract_answer(pair.rejected), problem.answer)
        assert (pair.kind == "missing_answer") == ("####" not in pair.rejected)
        counts[problem.level, pair.kind] += 1
    assert all(counts[1, kind] in (66, 67) for kind in built_in.CORRUPTIONS if kind != "skipped_step")
    assert all(counts[level, kind] >= 40 for level in (2, 3) for kind in built_in.CORRUPTIONS)
    assert counts[1, "skipped_step"] == 0
    assert load_pairs("word", "train", 30, (1, 2, 3)) == pairs[:30]  # a longer list begins with the shorter
    often = collections.Counter(
        p.kind for p in load_pairs("word", "train", 600, (2,), kinds=["wrong_sum"] * 3 + ["missing_answer"])
    )
    assert often == {"wrong_sum": 450, "missing_answer": 150}
    with pytest.raises(DataError, match="typo"):
        load_pairs("word", "train", 10, kinds=["typo"])
    again = load_pairs("word", "train", 600, (1, 2, 3), seed=1)
    assert [pair.prompt for pair in again] == [pair.prompt for pair in pairs]
    assert sum(a.rejected != b.rejected for a, b in zip(again, pairs, strict=True)) > 200


def test_a_problem_that_can_have_none_of_the_kinds_takes_another_and_is_counted(capsys, monkeypatch):
    pairs = load_pairs("word", "train", 60, (1, 2), kinds=["skipped_step"])
    assert [pair.kind for pair in pairs] == ["wrong_sum", "skipped_step"] * 30
    line = "word, train: 30 of 60 problems can have no skipped_step; they take another corruption: 30 wrong_sum\n"
    assert capsys.readouterr().out == line
    load_pairs("word", "train", 60, (1, 2), kinds=["skipped_step", "wrong_sum"])
    load_pairs("word", "train", 60, (1, 2))
    monkeypatch.setenv("RANK", "1")
    load_pairs("word", "train", 60, (1, 2), kinds=["skipped_step"])
    assert not capsys.readouterr().out


@needs_pairs
@pytest.mark.parametrize(("name", "total"), [("ultrafeedback", 1200 - 4 - 2 - 1), ("style", 1100 - 6)])
def test_real_pairs(name, total):
    found = {split: load_pairs(name, split) for split in splits.SPLITS}
    assert sum(map(len, found.values())) == total
    prompts = {split: {pair.prompt for pair in pairs} for split, pairs in found.items()}
    assert not prompts["train"] & (prompts["valid"] | prompts["test"])
    assert not prompts["valid"] & prompts["test"]
    assert all(pair.chosen and pair.rejected and pair.chosen != pair.rejected for ps in found.values() for pair in ps)
    if name == "ultrafeedback":
        assert len(found["test"]) == 199
        assert sum(pair.kind == "equal_scores" for pairs in found.values() for pair in pairs) == 134


@pytest.mark.skipif(not (REAL / "sentiment").is_dir(), reason="no sentiment/ in $ALIGN_DATA")
@pytest.mark.parametrize(("name", "train", "test"), [("polarity", 9596, 1066), ("reviews", 1800, 200)])
def test_real_sentiment(name, train, test):
    parts = {split: load_reviews(name, split) for split in splits.SPLITS}
    assert len(parts["train"]) + len(parts["valid"]) == train
    assert 0.09 * train < len(parts["valid"]) < 0.12 * train
    assert len(parts["test"]) == test
    assert sum(r.label for r in parts["test"]) * 2 == test
    texts = [{r.text for r in part} for part in parts.values()]
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & texts[2]


def test_batches_cover_each_epoch_once():
    context, tokens = 7, 7 * 20 + 3
    stream = np.arange(tokens, dtype=np.uint16)
    windows = (tokens - context) // context
    borders = set()
    for epoch in range(6):
        starts = []
        for step in range(epoch * windows, (epoch + 1) * windows):
            inputs, targets = data.batch_at(stream, step, 1, context, seed=5)
            assert inputs.dtype == targets.dtype == np.int64
            assert np.array_equal(inputs[0], np.arange(inputs[0, 0], inputs[0, 0] + context))
            assert np.array_equal(targets, inputs + 1)
            starts.append(int(inputs[0, 0]))
        assert starts != sorted(starts)
        assert {b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)} == {context}
        assert len(set(starts)) == windows
        borders.add(min(starts))
    assert len(borders) > 1  # another offset each epoch
    assert not np.array_equal(data.batch_at(stream, 0, 4, 7, 0)[0], data.batch_at(stream, 0, 4, 7, 1)[0])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch_of_one(world):
    stream = np.arange(500, dtype=np.uint16)
    for step in range(40):  # over several epochs, with batches that straddle their borders
        whole, _ = data.batch_at(stream, step, 5 * world, 9, seed=1)
        parts = [data.batch_at(stream, step, 5, 9, seed=1, rank=rank, world=world)[0] for rank in range(world)]
        assert np.array_equal(whole, np.concatenate(parts))
    first = [set(data.batch_at(stream, 0, 5, 9, 1, rank, world)[0][:, 0]) for rank in range(world)]
    assert len(set.union(*first)) == 5 * world  # no window twice


def test_batch_is_a_function_of_the_step():
    stream = np.arange(300, dtype=np.uint32)
    steps = [data.batch_at(stream, step, 3, 8, seed=2) for step in range(30)]
    data.epoch_windows.cache_clear()
    for step in reversed(range(30)):
        assert np.array_equal(data.batch_at(stream, step, 3, 8, seed=2), steps[step])


def test_shortest_stream():
    inputs, targets = data.batch_at(np.arange(9), 0, 2, 8, seed=0)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets[0, -1] == 8
    with pytest.raises(DataError, match=r"has 8 tokens, one window needs context \+ 1 = 9"):
        data.batch_at(np.arange(8), 0, 1, 8, seed=0)
