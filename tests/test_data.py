"""Data: the built-in problems and their grammar, the entropy, the verifier, files, token streams.

The arithmetic of every solution is done again here, by a parser that shares nothing with data.py. Tests on
real data need $ALIGN_DATA and are skipped without it.
"""

import builtins
import collections
import contextlib
import csv
import gzip
import io
import json
import math
import os
import random
import re
import sys
import threading
import time
import types
import urllib.error
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Problem, load_pairs, load_problems, load_sentiment, load_text, word_problems
from support import errors, records, sentiment, splits, streams
from support import word_problems as built_in
from support.answers import extract_answer, same_answer
from support.errors import DataError

REAL = Path(os.environ.get("ALIGN_DATA", ""))
needs_gsm8k = pytest.mark.skipif(not (REAL / "gsm8k/test.jsonl").is_file(), reason="no gsm8k/ in $ALIGN_DATA")
PRONOUNS = {"he": "men", "his": "men", "him": "men", "she": "women", "her": "women"}


@pytest.fixture(scope="module")
def problems() -> dict[int, list[Problem]]:
    return {level: word_problems("train", 3000, (level,)) for level in (1, 2, 3)}


def worked(solution: str) -> list[int]:
    """Redo each line `... a op b = c ...`; the results in order."""
    results = []
    for line in solution.split("\n")[:-1]:
        (a, op, b, c), *more = re.findall(r"(\d+) (\S) (\d+) = (\d+)", line)
        assert not more, line
        a, b, c = int(a), int(b), int(c)
        assert (a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b) == c, line
        results.append(c)
    return results


# The problems.


@pytest.mark.parametrize("level", [1, 2, 3])
def test_arithmetic_steps_and_answer(problems, level):
    for problem in problems[level]:
        results = worked(problem.solution)
        assert len(results) == level == problem.level
        assert problem.solution.endswith(f"\n#### {results[-1]}")
        assert problem.answer == str(results[-1]) == extract_answer(problem.solution)
        assert all(0 < result <= 60 for result in results), problem
        for before, line in zip(results, problem.solution.split("\n")[1:-1], strict=False):
            assert re.search(rf"\b{before}\b", line.split(" = ")[0]), "an intermediate result is not used"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_number_in_the_solution_comes_from_the_question_or_a_step(problems, level):
    for problem in problems[level]:
        known = collections.Counter(re.findall(r"\d+", problem.question))
        for line in problem.solution.split("\n")[:-1]:
            a, b, c = re.findall(r"\d+", line)
            known -= collections.Counter([a, b])
            known[c] += 1
        assert sum(known.values()) == 1, problem  # all are used up but the answer: no distractor


@pytest.mark.parametrize("level", [1, 2, 3])
def test_english(problems, level):
    texts = [problem.question for problem in problems[level]]
    texts += [line for problem in problems[level] for line in problem.solution.split("\n")[:-1]]
    texts += [built_in.narrative(random.Random(f"{level}/{i}"))[0] for i in range(1000)]
    plurals = set(built_in.PLURAL.values())
    for text in texts:
        assert "  " not in text
        assert text == text.strip()
        assert not re.search(r"\{|\}|\b[aA] [aeiou]|\ban (?!hour)", text), text
        for sentence in re.split(r"(?<=[.?]) ", text):
            assert sentence[0].isupper(), sentence
        assert text.endswith((".", "?"))
        for number, noun in re.findall(r"(?<!\$)\b(\d+) (?:more |fewer )?(?:big |small |new )?(\w+)", text):
            assert not (noun in plurals and number == "1"), text
            assert not (noun in built_in.PLURAL and number != "1"), text
    for problem in problems[level]:
        assert problem.question.endswith("?")
        assert problem.question.count("?") == 1
        for line in problem.solution.split("\n"):
            assert len(line.split()) <= 10, line


def test_pronouns_have_one_reading(problems):
    seen = set()
    sex = dict.fromkeys(built_in.MEN, "men") | dict.fromkeys(built_in.WOMEN, "women")
    for problem in problems[2] + problems[3]:
        words = re.findall(r"\w+", problem.question)
        names = list(dict.fromkeys(word for word in words if word in sex))
        used = {PRONOUNS[word.lower()] for word in words if word.lower() in PRONOUNS}
        if names:
            assert used <= {sex[names[0]]}, problem.question
            assert all(sex[friend] != sex[names[0]] for friend in names[1:]), problem.question
            seen.add((sex[names[0]], *used))
        else:
            assert not used
    assert {("men", "men"), ("women", "women")} <= seen


def test_nothing_happens_twice_in_one_story(problems):
    """Another friend, another stop, another toy each time; only the question repeats a name."""
    for problem in problems[3]:
        told = problem.question[: problem.question.rindex(". ")]
        stops = re.findall(r"(?:At|leaves) the (bridge|market|park|beach|museum)", told)
        toys = re.findall(r"buys a (\w+)", told)
        friends = re.findall(r"(?:to|from|for|with|by|gives) ([A-Z]\w+)|(\w+) (?:gives|brings|plants)", told)
        friends = [a or b for a, b in friends if (a or b) in built_in.MEN + built_in.WOMEN]
        hero = re.search("|".join(built_in.MEN + built_in.WOMEN), told)
        friends = [friend for friend in friends if friend != hero[0]]
        for group in (stops, toys, friends):
            assert len(set(group)) == len(group), problem.question


def test_the_answer_counts_what_is_asked(problems):
    """The noun after "How many" is the noun of the last worked line ("How much" asks for dollars)."""
    for problem in problems[1] + problems[2] + problems[3]:
        asked = re.search(r"How (many|much|far)(?: more)?(?: (\w+))?", problem.question)
        noun = {"many": asked[2], "much": "dollars", "far": "miles"}[asked[1]]
        last = re.search(r"= \d+ (?:more )?(\w+)", problem.solution.split("\n")[-2])[1]
        assert noun in (last, built_in.PLURAL.get(last)), problem


def test_short_and_varied(problems):
    for level, low, high in ((1, 15, 25), (2, 20, 32), (3, 27, 42)):
        lengths = [len(problem.question.split()) for problem in problems[level]]
        assert low <= np.median(lengths) <= high
        assert max(lengths) <= 48
        stories = collections.Counter(problem.story for problem in problems[level])
        assert len(stories) == len(built_in.THEMES) >= 8
        assert min(stories.values()) > 0.5 * len(problems[level]) / len(stories)
        operators = collections.Counter(re.findall(r" ([-+*/]) ", "".join(p.solution for p in problems[level])))
        assert min(operators[op] for op in "+-*/") > 0.05 * operators.total()


def test_no_story_is_in_a_later_splits_text():
    """However it is asked about, worked out in a narrative, or gone on with: a story of the test split, known by what
    is told up to any sentence, is in no problem or narrative of train or valid; one of valid is in none of train."""
    stories, texts = {}, {}  # {split: what its problems and narratives tell}, {split: those and their beginnings}
    for split in splits.SPLITS:
        told = []
        for seed in (0, 1):
            for problem in word_problems(split, 2000, (1, 1, 1, 2, 3), seed=seed):
                told.append(problem.question[: problem.question.rindex(". ") + 1])
            for text in built_in.narrative_texts(split, 4000, seed=seed):
                sentences = re.split(r"(?<=[.]) ", text)[1:]  # without the scene
                told.append(" ".join(s for s in sentences if "=" not in s))
        stories[split] = set(told)
        ends = [[match.end() for match in re.finditer(r"[.](?= |$)", story)] for story in told]
        texts[split] = {story[:end] for story, cuts in zip(told, ends, strict=True) for end in cuts}
        assert len(stories[split]) < 0.97 * len(told)  # many came more than once: there was something to find
        assert len(texts[split]) > 1.3 * len(stories[split])
    for early, late in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not stories[late] & texts[early]
    assert stories["train"] & texts["test"]  # a test problem may go on from what is known: nothing learns from it


def test_splits_shares():
    rng = random.Random(0)
    for levels, train, test in (((1,), 0.8, 0.1), ((2,), 0.64, 0.19)):
        found = [built_in.narrative(rng, levels)[2].split for _ in range(4000)]
        assert abs(found.count("train") / 4000 - train) < 0.03
        assert abs(found.count("test") / 4000 - test) < 0.03
    for split in splits.SPLITS:  # the split does not change how many long stories there are
        long = [text.count(" = ") - 1 for text in built_in.narrative_texts(split, 2000)]
        assert abs(np.mean(long) - 0.5) < 0.05
    assert splits.split_of("Tom  has\n5 APPLES.") == splits.split_of("tom has 5 apples.")
    counts = collections.Counter(splits.split_of(str(i)) for i in range(5000))
    assert abs(counts["train"] - 4000) < 150
    assert abs(counts["valid"] - 500) < 100


def test_deterministic_distinct_balanced():
    a = word_problems("train", 4000, (1, 2), seed=3)
    assert len({problem.question for problem in a}) == 4000
    assert [problem.level for problem in a] == [1, 2] * 2000
    assert a[:500] == word_problems("train", 500, (1, 2), seed=3)
    assert a[7] == Problem(*built_in.word_problem(7, "train", (1, 2), seed=3), task="word")
    assert a[:50] != word_problems("train", 50, (1, 2), seed=4)
    assert [p.level for p in word_problems("valid", 6, (3, 1))] == [3, 1] * 3


def test_repeats_are_drawn_again(monkeypatch):
    original = built_in.word_problem
    monkeypatch.setattr(built_in, "word_problem", lambda i, *rest: original(i % 10 if i < 10**6 else i, *rest))
    assert len({problem.question for problem in word_problems("train", 30)}) == 30


@pytest.mark.parametrize("levels", [(), (0,), (1, 4)])
def test_bad_levels(levels):
    with pytest.raises(DataError, match="levels must be"):
        built_in.word_problem(0, levels=levels)


# Corruptions.


@pytest.mark.parametrize("kind", built_in.CORRUPTIONS)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_corrupt(problems, level, kind):
    rng = random.Random(level)
    if kind == "skipped_step" and level == 1:
        with pytest.raises(DataError, match="level 2 or 3"):
            built_in.corrupt(problems[1][0], kind, rng)
        return
    places = set()
    for problem in problems[level]:
        text = built_in.corrupt(problem, kind, rng)
        old, new = problem.solution.split("\n"), text.split("\n")
        assert not same_answer(extract_answer(text), problem.answer)
        if kind == "missing_answer":
            assert new == old[:-1]
            continue
        steps = [re.search(r"(\d+) (\S) (\d+) = (\d+)(.*)", line) for line in new[:-1]]
        assert new[-1] == f"#### {steps[-1][4]}"  # consistent: the answer is the last result
        wrong = []
        for i, step in enumerate(steps):
            a, op, b, c = int(step[1]), step[2], int(step[3]), int(step[4])
            assert c >= 0
            if {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op] != c:
                wrong.append(i)
            if i:  # carried on: the line before feeds this one
                assert int(steps[i - 1][4]) in (a, b)
            assert (c == 1) == (re.search(r"= \d+ (?:more )?(\w+)", new[i])[1] in built_in.PLURAL)
        if kind == "skipped_step":
            assert len(new) == len(old) - 1
            assert not wrong
            places.add(next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y)))
        else:
            assert len(new) == len(old)
            first = next(i for i, (x, y) in enumerate(zip(old, new, strict=True)) if x != y)
            places.add(first)
            assert wrong == ([first] if kind == "wrong_sum" else [])
            before = re.search(r"\d+ (\S) \d+ =", old[first])[1]
            assert (steps[first][2] != before) == (kind == "wrong_operator")
            for i in range(first + 1, level):  # below, only the number that is carried on differs
                a, op, b = re.search(r"(\d+) (\S) (\d+) =", old[i]).groups()
                carried = re.search(r"= (\d+)", old[i - 1])[1]
                if a == carried:
                    a = steps[i - 1][4]
                else:
                    b = steps[i - 1][4]
                assert (a, op, b) == steps[i].groups()[:3]
    if kind != "missing_answer":
        assert places == set(range(level))  # any step can be the wrong one


def test_corrupt_refuses():
    gsm = Problem("Q?", "She sold 48/2 = 24 clips.\n#### 24", "24", 1, "gsm8k")
    with pytest.raises(DataError, match="built-in form"):
        built_in.corrupt(gsm, "wrong_sum", random.Random(0))
    with pytest.raises(DataError, match="unknown corruption"):
        built_in.corrupt(gsm, "typo", random.Random(0))
    assert built_in.corrupt(gsm, "missing_answer", random.Random(0)) == "She sold 48/2 = 24 clips."


# Narratives and their entropy.


class Script:
    """Stands in for random.Random: follows a list of choices, then takes the first of each."""

    def __init__(self, choices):
        self.choices, self.path = choices, []

    def randrange(self, n):
        i = len(self.path)
        self.path.append((self.choices[i] if i < len(self.choices) else 0, n))
        return self.path[-1][0]


def every_walk(make):
    """make(rng) for every sequence of choices there is, with -log p counted by the scripted rng itself."""
    choices = []
    while True:
        rng = Script(choices)
        yield make(rng), sum(math.log(n) for _, n in rng.path)
        path = rng.path
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        choices = [choice for choice, _ in path[:-1]] + [path[-1][0] + 1]


def cut_down(monkeypatch, numbers: int, wordings: int | None, themes) -> None:
    """Two names of each sex, few of everything else, and at most `numbers` numbers for each slot."""

    def few(*bounds):
        full = builtins.range(*bounds)
        return full if len(full) <= 2 else full[:numbers]

    pick = slice(wordings)
    small = {}
    for name in themes:
        theme = built_in.THEMES[name]
        sections = {
            section: tuple(
                row._replace(told=row.told[pick], worked=row.worked[pick]) for row in getattr(theme, section)
            )
            for section in ("open", "then", "end")
        }
        small[name] = theme._replace(things=theme.things[:1], start=theme.start[1 : 1 + numbers], **sections)
    built_in.numbers.cache_clear()
    monkeypatch.setattr(built_in, "range", few, raising=False)
    monkeypatch.setattr(built_in, "THEMES", small)
    monkeypatch.setattr(built_in, "STORIES", tuple(small))
    monkeypatch.setattr(built_in, "MEN", built_in.MEN[:2])
    monkeypatch.setattr(built_in, "WOMEN", built_in.WOMEN[:2])
    monkeypatch.setattr(built_in, "WEATHER", built_in.WEATHER[:1])
    monkeypatch.setattr(built_in, "HOURS", built_in.HOURS[:1])
    sizes = {"stop": 3, "toy": 4}  # as many as one story may use up
    monkeypatch.setattr(built_in, "POOLS", {name: pool[: sizes.get(name, 1)] for name, pool in built_in.POOLS.items()})


@pytest.fixture
def fresh_numbers():
    yield
    built_in.numbers.cache_clear()


def check_exact(make) -> int:
    total, texts = 0.0, set()
    for (text, nats), counted in every_walk(make):
        assert nats == pytest.approx(counted, abs=1e-9)
        assert text not in texts, f"two walks give: {text}"
        texts.add(text)
        total += math.exp(-nats)
    assert total == pytest.approx(1, abs=1e-9)
    return len(texts)


def test_nats_are_exact_on_whole_narratives(monkeypatch, fresh_numbers):
    """All themes, one wording each: no two walks give the same text, and the probabilities add up to 1."""
    cut_down(monkeypatch, numbers=2, wordings=1, themes=built_in.THEMES)
    assert check_exact(lambda rng: built_in.narrative(rng)[:2]) > 10_000


def test_nats_are_exact_with_all_wordings(monkeypatch, fresh_numbers):
    """All themes with all wordings and two numbers a slot, one arithmetic step."""

    def story(rng):
        draw = built_in.Draw(rng)
        beats = built_in.tell(draw, 1).beats
        return " ".join(part for beat in beats for part in beat if part), draw.nats

    cut_down(monkeypatch, numbers=2, wordings=None, themes=built_in.THEMES)
    assert check_exact(story) > 10_000


def test_narratives():
    texts = built_in.narrative_texts("train", 1500)
    assert texts[:20] == built_in.narrative_texts("train", 20)
    assert texts[:20] != built_in.narrative_texts("train", 20, seed=1)
    assert not set(texts) & set(built_in.narrative_texts("valid", 300))
    for text in texts:
        assert 3 <= len(re.findall(r"[.](?: |$)", text)) <= 6
        for a, op, b, c in re.findall(r"(\d+) (\S) (\d+) = (\d+)", text):
            a, b, c = int(a), int(b), int(c)
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[op], text
    assert {op for text in texts for op in re.findall(r" ([-+*/]) ", text)} == set("+-*/")
    names = " ".join(texts)
    assert all(name in names for name in built_in.MEN + built_in.WOMEN)


def test_narrative_entropy():
    mean, error = built_in.narrative_entropy(1000)
    nats = np.array([built_in.narrative(random.Random(i))[1] for i in range(1000)])
    assert error == pytest.approx(nats.std() / math.sqrt(1000), rel=0.2)
    assert abs(mean - nats.mean()) < 5 * error
    assert built_in.narrative_entropy(1000) == (mean, error)


# The verifier.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("####18", "18"),
        ("Tom has 5 + 3 = 8 apples.\n#### 8", "8"),
        ("#### 8\nand more 9 text", "8"),
        ("#### 8\r\n", "8"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $5.", "5"),
        ("#### 50%", "50"),
        ("#### -7", "-7"),
        ("#### - 7", "-7"),
        ("#### −7", "-7"),
        ("#### -$7", "-7"),
        ("#### $-7", "-7"),
        ("#### .5", "0.5"),
        ("#### -.5", "-0.5"),
        ("#### 3.50", "3.5"),
        ("#### 18.0", "18"),
        ("#### -0", "0"),
        ("#### -0.00", "0"),
        ("#### 007", "7"),
        ("#### 100", "100"),
        ("#### 18 apples", "18"),
        ("#### $1,234.50 per day.", "1234.5"),
        ("#### 5\n#### 5", "5"),
        ("#### 5 #### 5.0", "5"),
        ("#### 12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        ("#### 5 #### 7", None),
        ("#### 5\n#### 7", None),
        ("#### 5\n####", None),
        ("####", None),
        ("####\n5", None),
        ("#### five", None),
        ("#### 1 2", None),
        ("#### 5 or 6", None),
        ("#### 5, 6", None),
        ("#### 1,2", None),
        ("#### 12,34", None),
        ("#### 1/2", None),
        ("#### 5-3", None),
        ("#### 5 - 3", None),
        ("#### --5", None),
        ("#### -$-5", None),
        ("#### 1.2.3", None),
        ("#### 1e3", None),
        ("#### 5k", None),
        ("#### x = 5", None),
        ("#### ½", None),
        ("#### 5 ½", None),
        ("#### ٥", None),
        ("##### 5", None),
        ("### 5", None),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_blanks_behind_the_marker_take_no_time():
    began = time.perf_counter()
    for line in (
        " " * 50_000,
        " " * 50_000 + "x",
        "$" + " " * 50_000 + "x",
        "-" + " " * 50_000,
        "5" + " " * 50_000 + "x6",
    ):
        assert extract_answer("####" + line) is None
    assert extract_answer("#### $ - " + " " * 50_000 + "5") == extract_answer("#### - $ 5") == "-5"
    assert time.perf_counter() - began < 5  # nested choices of where the blanks belong took minutes


def test_extract_answer_docstring_is_true():
    for inputs, outputs in re.findall(r'^    ("####.*?)\s*-> (.*)$', extract_answer.__doc__, flags=re.M):
        inputs = [eval(text) for text in re.findall(r'"[^"]*"', inputs)]
        wanted = re.findall(r'"[^"]*"|None', outputs.split("   ")[0])
        wanted = [None if text == "None" else text.strip('"') for text in wanted]
        if len(wanted) < len(inputs):
            wanted = wanted[:1] * len(inputs)
        assert [extract_answer(text) for text in inputs] == wanted


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3) | st.integers(), st.booleans())
def test_extract_answer_round_trip(number, commas):
    text = f"{number:,f}" if commas and isinstance(number, Decimal) else f"{Decimal(number):f}"
    answer = extract_answer(f"so it is\n#### {text}")
    assert Decimal(answer) == number
    assert extract_answer(f"#### {answer}") == answer
    assert same_answer(answer, str(number))


@settings(max_examples=200)
@given(st.text(alphabet="#0123456789 .,$%-+\nax½", max_size=30))
def test_extract_answer_never_fails_and_is_canonical(text):
    answer = extract_answer(text)
    if answer is not None:
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", answer)
        assert answer != "-0"
        assert "####" in text


def test_same_answer():
    assert same_answer("5", "5.0")
    assert not same_answer("5", "5.0000000000000000000000000000001")
    assert not same_answer("5", "6")
    assert not same_answer(None, None)
    assert not same_answer("", "")
    assert not same_answer("5", "five")


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
    assert load_problems(n=5) == word_problems("train", 5)
    assert load_problems("word", "test", n=4, levels=(3,)) == word_problems("test", 4, (3,))


def test_user_file(tmp_path):
    file = tmp_path / "own.jsonl"
    records = [
        {"question": "A?", "answer": "He has 1+1=<<1+1=2>>2 pens.\n#### 2"},
        {"question": "B?", "solution": "Two and two.", "answer": 4},
        {"question": "C?", "answer": "$1,200"},
        {"question": "D?", "answer": "Blue, I think."},
        {"question": "G?", "answer": "12 people came to the party."},
        {"question": "H?", "answer": "5 in each box.\n3 boxes hold 5 * 3 = 15, so fifteen."},
        {"messages": [{"role": "user", "content": "E?"}, {"role": "assistant", "content": "x\n#### 7"}]},
    ]
    records += [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(100)]
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    found = {split: load_problems(file, split) for split in splits.SPLITS}
    assert sum(len(part) for part in found.values()) == 107
    assert all(splits.split_of(problem.question) == split for split, part in found.items() for problem in part)
    by = {problem.question: problem for part in found.values() for problem in part}
    assert by["A?"].solution == "He has 1+1=2 pens.\n#### 2"
    assert (by["B?"].solution, by["B?"].answer) == ("Two and two.\n#### 4", "4")
    assert (by["C?"].solution, by["C?"].answer) == ("#### 1200", "1200")
    assert (by["D?"].solution, by["D?"].answer) == ("Blue, I think.", "")
    assert (by["G?"].solution, by["G?"].answer) == ("12 people came to the party.", "")
    assert (by["H?"].solution, by["H?"].answer) == ("5 in each box.\n3 boxes hold 5 * 3 = 15, so fifteen.", "")
    assert (by["E?"].answer, by["E?"].story) == ("7", "file")
    shifts = "cout << x; cin >> y;\nHe has 3+(4)=<<3+(4)=7>>7, half: <<7/2=3.5>>3.5 pens.\n#### 3.5"
    problem = data.problem_from({"question": "F?", "answer": shifts}, "", "")  # only what is an annotation goes
    assert problem.solution == "cout << x; cin >> y;\nHe has 3+(4)=7, half: 3.5 pens.\n#### 3.5"
    assert (problem.level, problem.answer) == (2, "3.5")
    assert [data.problem_from({"question": "F?", "answer": x}, "", "").answer for x in (1e-05, 1e20, 2.5)] == [
        "0.00001",
        "100000000000000000000",
        "2.5",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "line 2: not JSON"),
        ("[1, 2]", "line 2: a record is an object"),
        ('{"question": "A \\ud83d?", "answer": "5"}', "half of a surrogate pair"),
        ('{"prompt": "p \\ud83d", "response": "r", "rating": 5}', "half of a surrogate pair"),
        ('{"question": "A?", "answer": ' + "9" * 5000 + "}", "line 2: cannot be read as JSON"),
        ("[" * 100_000, "line 2: cannot be read as JSON"),
        ('{"question": "A?"}', "line 2: the key 'answer' is missing"),
        ('{"answer": "5"}', "line 2: the key 'question' is missing"),
        ('{"question": "", "answer": "5"}', "line 2: 'question' must be text"),
        ('{"question": "A?", "answer": null}', "line 2: 'answer' must be text"),
        ('{"question": "A?", "answer": "#### 5 or 6"}', "line 2: no single number"),
        ('{"question": "A?", "answer": "<<1+1=2>>"}', "line 2: 'answer' holds nothing but calculator annotations"),
        ('{"question": "A?", "solution": "x", "answer": "many"}', "line 2: no single number"),
        ('{"question": "A?", "solution": "x\\n#### 3", "answer": "4"}', "line 2: the solution ends in 3"),
        ('{"messages": [{"role": "user", "content": "A?"}]}', "line 2: messages must be"),
        ('{"messages": "A?"}', "line 2: messages must be"),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "5"}]}',
            "line 2: the content of message 1 must",
        ),
    ],
)
def test_bad_records_name_the_line(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "A?", "answer": "5"}\n' + line + "\n")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_problems(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_problems, load_text])
def test_bad_files(tmp_path, load):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes(b"abc caf\xe9")
    for name, message in [
        (tmp_path / "none.txt", "no such file, and not one of the known datasets word, gsm8k"),
        ("gsm9k", "no such file, and not one of the known datasets word, gsm8k"),
        (tmp_path, "is a folder"),
        (empty, "is empty"),
        (latin, "not UTF-8 (byte 7)"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)):
            load(name)


def test_bad_splits(tmp_path):
    for call in (
        lambda: word_problems("dev", 1),
        lambda: load_problems("word", "dev"),
        lambda: load_text("word", "test"),
        lambda: load_text("tinyshakespeare", "test"),
        lambda: built_in.narrative_texts("dev", 1),
        lambda: data.find("gsm8k", "valid"),
    ):
        with pytest.raises(DataError, match="unknown split"):
            call()
    one = tmp_path / "one.jsonl"
    one.write_text('{"question": "A?", "answer": "5"}')
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
    file.write_text("x")
    assert data.find("gsm8k") == file
    assert data.find(file) == file
    with pytest.raises(DataError, match="built in"):
        data.find("word")
    with pytest.raises(DataError, match=r"tinystories: no .*valid.txt.* by hand"):
        data.find("tinystories", "valid")
    monkeypatch.delenv("ALIGN_DATA")
    assert data.data_folder() == Path("downloads")


class Reply(io.BytesIO):
    headers = {"Content-Length": "5"}  # noqa: RUF012


def test_download(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    file = tmp_path / "gsm8k/test.jsonl"

    def offline(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"cannot download https://raw.*no route.*put the file at") as caught:
        data.find("gsm8k", "test")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)

    asked = []
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Reply(b"hello"))
    with pytest.raises(DataError, match="has changed: sha256 2cf24d"):
        data.find("gsm8k", "test")
    assert not list(file.parent.iterdir())  # neither the file nor a part of it

    good = data.DATASETS["gsm8k"]["test"]._replace(
        sha256="2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    )
    monkeypatch.setitem(data.DATASETS["gsm8k"], "test", good)
    assert data.find("gsm8k", "test").read_text() == "hello"
    assert list(file.parent.iterdir()) == [file]
    assert asked[-1].endswith("/grade_school_math/data/test.jsonl")

    file.unlink()
    monkeypatch.setitem(data.DATASETS["gsm8k"], "test", good._replace(sha256=None))
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: Reply(b"hel"))
    with pytest.raises(DataError, match="3 of 5 bytes came"):  # the connection broke
        data.find("gsm8k", "test")
    assert not list(file.parent.iterdir())


def test_records_of_every_form_are_records_in_pretraining_too(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    expected = load_text(tmp_path / "a.jsonl", "train")
    assert len(expected) > 20
    assert expected[0].startswith("What is ")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.tsv").write_text("question\tanswer\n" + "".join(f"{r['question']}\t{r['answer']}\n" for r in rows))
    (tmp_path / "d.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    for name in ("b.jsonl.gz", "c.tsv", "d.csv"):
        assert load_text(tmp_path / name, "train") == expected


def test_damaged_files_and_other_datasets_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    (tmp_path / "a.csv").write_text('question,answer\n"1 + 1? 2"x,2\n')
    (tmp_path / "b.csv").write_text("question,answer\n" + "long " * 40_000 + ",2\n" * 1)
    whole = gzip.compress(bytes(range(256)) * 50)
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:30] + b"\xff" * 9 + whole[39:])
    for call, words in [
        (lambda: load_problems(tmp_path / "a.csv"), "line 2: not CSV"),
        (lambda: load_problems(tmp_path / "c.jsonl.gz"), "cannot read"),
        (lambda: load_problems("tinyshakespeare"), "has no problems: choose word"),
        (lambda: load_text("polarity"), "has no text for pretraining: choose word"),
    ]:
        with pytest.raises(DataError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    [(place, row)] = records.read_records(tmp_path / "b.csv")
    assert (place, len(row["question"])) == ("record 1", 200_000)
    assert splits.split_of("half of a pair: \ud83d") in splits.SPLITS


# Conversations, instructions, ratings.


def turn(role, content):
    return {"role": role, "content": content}


def test_conversations(tmp_path):
    long = [turn("system", "Be brief."), turn("user", "A?"), turn("assistant", "B."), turn("user", " C? ")]
    long.append(turn("assistant", "#### Why\nBecause.\n"))
    short = [turn("user", "2 + 3?"), turn("assistant", "5")]
    path = write_pairs(tmp_path / "chats.jsonl", {"messages": long}, {"messages": short})
    found = []
    for split in splits.SPLITS:
        with contextlib.suppress(DataError):  # two records do not fill three splits
            found += load_problems(path, split)
    first, second = sorted(found, key=lambda problem: problem.question, reverse=True)
    assert (first.question, first.solution, first.answer) == ("C?", "#### Why\nBecause.", "")
    assert first.history == (("system", "Be brief."), ("user", "A?"), ("assistant", "B."))
    assert (second.question, second.solution, second.history) == ("2 + 3?", "5", ())  # as it stands
    again = data.conversation_from(long[1:], "x", "file")  # the same question after other words: another key
    assert data.conversation_key(again) != data.conversation_key(first)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "must be user and assistant in turn"),
        ([turn("system", "s")], "must be user and assistant in turn"),
        ([turn("assistant", "a")], "must be user and assistant in turn"),
        ([turn("user", "a"), turn("user", "b"), turn("assistant", "c")], "must be user and assistant in turn"),
        ([turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "end with the assistant"),
        ([turn("user", "a"), turn("assistant", " ")], "the content of message 2"),
        ([turn("user", 3), turn("assistant", "b")], "the content of message 1"),
        ([1, 2], "a list of {role, content}"),
    ],
)
def test_bad_conversations(turns, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        data.problem_from({"messages": turns}, "f.jsonl line 9", "file")
    assert str(caught.value).startswith("f.jsonl line 9: ")


def test_ratings_in_csv_and_jsonl(tmp_path):
    rows = [{"prompt": f"ask {i}", "response": f'say "{i}",\nor not', "rating": 1 + i % 5} for i in range(80)]
    with open(tmp_path / "rated.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response", "rating"])
        writer.writeheader()
        writer.writerows(rows)
    write_pairs(tmp_path / "rated.jsonl", *rows)
    for split in splits.SPLITS:
        problems = load_problems(tmp_path / "rated.csv", split)
        assert problems == load_problems(tmp_path / "rated.jsonl", split)
        for problem in problems:
            i = int(problem.question.split()[1])
            assert (problem.solution, problem.rating, problem.answer) == (rows[i]["response"], 1 + i % 5, "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("p,r,6", "the rating is 6, it must be from 1 to 5"),
        ("p,r,0.5", "the rating is 0.5, it must"),
        ("p,r,nan", "the rating is nan, it must"),
        ("p,r,good", "the rating is 'good', not a number"),
        ("p,r,", "the rating is '', not a number"),
        ("p,r,1e999", "the rating is 1e999, it must"),
        ("p,,4", "the response is empty"),
        (",r,4", "'prompt' is empty"),
        ("p,r", "not as many fields"),
        ("p,r,4,5", "not as many fields"),
    ],
)
def test_bad_ratings_name_their_record(tmp_path, row, message):
    (tmp_path / "rated.csv").write_text(f"prompt,response,rating\np,r,5\n{row}\n")
    with pytest.raises(DataError, match=re.escape(f"rated.csv record 2: {message}")):
        load_problems(tmp_path / "rated.csv")


def test_instructions(tmp_path):
    records = [{"instruction": f"do {i}", "input": "" if i % 2 else "x", "output": str(i)} for i in range(60)]
    (tmp_path / "all.json").write_text(json.dumps(records))
    assert "do 7\n7" in load_text(tmp_path / "all.json") + load_text(tmp_path / "all.json", "valid")
    found = [problem for split in splits.SPLITS for problem in load_problems(tmp_path / "all.json", split)]
    assert {p.question for p in found} == {f"do {i}" + ("" if i % 2 else "\nx") for i in range(60)}
    assert all(p.solution == re.findall(r"\d+", p.question)[0] for p in found)


@pytest.mark.parametrize("said", ["cout << x; cin >> y;", "Use a << 2, then b >> 1.", "<<1+1=2>>", "1+1=<<1+1=2>>2"])
def test_whatever_is_no_worked_problem_is_taken_as_it_stands(said):
    for record in (
        {"instruction": "i", "output": said},
        {"prompt": "p", "response": said, "rating": 5},
        {"messages": [turn("user", "u"), turn("assistant", said)]},
    ):
        problem = data.problem_from(record, "", "file")
        assert (problem.solution, problem.level, problem.answer) == (said, 1, "")


def test_bad_records_are_counted_and_left_out_where_asked(tmp_path, capsys):
    rows = [f"p{i},r{i},{3 if i % 20 else 7}" for i in range(100)]
    path = tmp_path / "rated.csv"
    path.write_text("\n".join(["prompt,response,rating", *rows, "p,,4"]) + "\n")
    with pytest.raises(DataError, match="record 1: the rating is 7"):
        load_problems(path, "train")
    kept = [p for split in splits.SPLITS for p in load_problems(path, split, skip_bad=True)]
    assert len(kept) == 95
    assert all(p.rating == 3 for p in kept)
    said = capsys.readouterr().out.splitlines()
    line = "rated.csv: skipped 6 records that cannot be used (first: record 1: the rating is 7, it must be from 1 to 5)"
    assert len(said) == 3
    assert all(s.endswith(line) for s in said)
    with pytest.raises(DataError, match="record 1: the rating is 7"):
        load_text(path, "train")
    texts = [text for split in ("train", "valid") for text in load_text(path, split, skip_bad=True)]
    assert sorted(texts) == sorted(f"{p.question}\n{p.solution}" for p in kept if splits.split_of(p.question) != "test")

    path = write_pairs(tmp_path / "pairs.jsonl", *[pair_record(f"prompt {i}") for i in range(100)], {"prompt": "p"})
    with pytest.raises(DataError, match="line 101"):
        load_pairs(path, "train")
    assert sum(len(load_pairs(path, split, skip_bad=True)) for split in splits.SPLITS) == 100
    assert "skipped 1 records that cannot be used (first: line 101: the key" in capsys.readouterr().out


@pytest.mark.skipif(not (REAL / "ratings").is_dir(), reason="no ratings/ in $ALIGN_DATA")
def test_real_ratings_and_instructions():
    ratings = [problem.rating for split in splits.SPLITS for problem in load_problems("ratings", split)]
    assert collections.Counter(ratings) == {1: 40, 2: 65, 3: 57, 4: 289, 5: 189}
    assert sum(len(load_problems("instructions", split)) for split in splits.SPLITS) == 1100


# Preference pairs.


def write_pairs(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def pair_record(prompt, chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_word_pairs():
    pairs = load_pairs("word", "train", 600, (1, 2, 3))
    problems = {problem.question: problem for problem in word_problems("train", 600, (1, 2, 3))}
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
    assert {p.kind for p in load_pairs("word", "train", 60, (1,), kinds=["skipped_step"])} <= set(built_in.CORRUPTIONS)
    with pytest.raises(DataError, match="typo"):
        load_pairs("word", "train", 10, kinds=["typo"])
    again = load_pairs("word", "train", 600, (1, 2, 3), seed=1)
    assert [pair.prompt for pair in again] == [pair.prompt for pair in pairs]
    assert sum(a.rejected != b.rejected for a, b in zip(again, pairs, strict=True)) > 200


def test_pairs_of_dialogues(tmp_path, monkeypatch):
    """Anthropic's transcripts, by name, from a file that stands where the download would."""
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    one = {"chosen": "\n\nHuman: Is it 2?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it 2?\n\nAssistant: No: 3."}
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nNice day.\n\nHuman: Human: what?\n\nAssistant:"
    long = {"chosen": start + " A human.", "rejected": start + " Who knows?"}
    (tmp_path / "preferences").mkdir()
    with gzip.open(tmp_path / "preferences/hh_helpful_test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in (one, long))
    short, deep = load_pairs("hh", "test")
    assert (short.prompt, short.chosen, short.rejected, short.kind) == ("Is it 2?", "Yes.", "No: 3.", "hh")
    assert short.history == ()
    assert (deep.prompt, deep.chosen, deep.rejected) == ("Human: what?", "A human.", "Who knows?")
    assert deep.history == (("user", "Hi"), ("assistant", "Hello.\n\nNice day."))
    bad = [
        {"chosen": start + " x", "rejected": one["rejected"]},
        {"chosen": start + " x\n\nHuman: more", "rejected": start + " y"},
        {"chosen": "\n\nHuman: \n\nAssistant: x", "rejected": "\n\nHuman: \n\nAssistant: y"},
        {"chosen": one["chosen"], "rejected": f"Well.{one['rejected']}"},
        {"chosen": one["chosen"], "rejected": ""},
    ]
    messages = ("differ before", "the Assistant last", "must be Human", "must be", "'rejected' must be Human")
    for record, message in zip(bad, messages, strict=True):
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            load_pairs(write_pairs(tmp_path / "bad.jsonl", record), "train")


def test_what_has_a_prompt_is_no_dialogue(tmp_path):
    answers = {"chosen": "Human: the speaker", "rejected": "robot"}
    for key in ("prompt", "instruction"):
        pair = data.pair_from({key: "Name a role", **answers}, "", "x.jsonl")
        assert pair == data.Pair("Name a role", "Human: the speaker", "robot", "file")


def test_a_dialogues_history_decides_its_split(tmp_path):
    ask = [f"\n\nHuman: {i}\n\nAssistant: ok\n\nHuman: same\n\nAssistant:" for i in range(60)]
    path = write_pairs(tmp_path / "d.jsonl", *[{"chosen": f"{a} yes", "rejected": f"{a} no"} for a in ask])
    for split in splits.SPLITS:
        assert {p.history[0][1] for p in load_pairs(path, split)} == {
            str(i) for i in range(60) if splits.split_of(f"{i} ok same") == split
        }


def test_pairs_of_a_file(tmp_path, capsys):
    records = [pair_record(f"prompt {i}") for i in range(100)]
    records[3] |= {"rejected": " good\n"}
    records[5] |= {"chosen": "  "}
    records[8] |= {"rejected": ""}
    path = write_pairs(tmp_path / "pairs.jsonl", *records)
    found = {split: load_pairs(path, split) for split in splits.SPLITS}
    said = capsys.readouterr().out.splitlines()
    line = "pairs.jsonl: skipped 1 pairs of equal answers (first: line 4), 2 pairs with an empty answer "
    assert len(said) == 3
    assert all(f"{line}(first: line 6)" in s for s in said)
    for split, pairs in found.items():
        assert pairs
        assert all(splits.split_of(pair.prompt) == split for pair in pairs)
        assert all((pair.chosen, pair.rejected, pair.kind) == ("good", "bad", "file") for pair in pairs)
    assert sum(map(len, found.values())) == 97
    assert load_pairs(path, "train", 5) == found["train"][:5]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "the key 'rejected' is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "'rejected' must be text, not list"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"chosen": "a", "rejected": "b"}, "the key 'prompt' is missing"),
        ([1], "a record is an object {...}, not list"),
    ],
)
def test_bad_pairs_name_their_record(tmp_path, record, message):
    path = write_pairs(tmp_path / "pairs.jsonl", pair_record("p"), record)
    with pytest.raises(DataError, match=re.escape(f"pairs.jsonl line 2: {message}")):
        load_pairs(path)


def test_scores_that_cannot_be_read_name_their_record(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    (tmp_path / "preferences").mkdir()
    path = tmp_path / "preferences/ultrafeedback_test.jsonl"
    write_pairs(path, pair_record("p"), pair_record("q") | {"metadata": {"score_chosen": 4, "score_rejected": 4}})
    assert [pair.kind for pair in load_pairs("ultrafeedback", "test")] == ["ultrafeedback", "equal_scores"]
    write_pairs(path, pair_record("p"), pair_record("q") | {"metadata": "score_chosen: 4"})
    with pytest.raises(DataError, match=r"line 2: 'metadata' must be an object \{\.\.\.\}, not str"):
        load_pairs("ultrafeedback", "test")


def test_pairs_that_are_not_there(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"prompt": "p",')
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_pairs(tmp_path / "cut.jsonl")
    with pytest.raises(DataError, match="gsm8k has no preference pairs"):
        load_pairs("gsm8k")
    one = write_pairs(tmp_path / "one.jsonl", pair_record("p"))
    other = next(split for split in splits.SPLITS if split != splits.split_of("p"))
    with pytest.raises(DataError, match=f"no pair in the split {other}"):
        load_pairs(one, other)


def test_style_pairs_read_an_array(tmp_path, monkeypatch):
    records = [{"instruction": f"say {i}", "input": "x" * (i % 2), "chosen": "a", "rejected": "b"} for i in range(60)]
    (tmp_path / "preferences").mkdir()
    (tmp_path / "preferences/short_style_preferences.json").write_text(json.dumps(records))
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    prompts = [pair.prompt for split in splits.SPLITS for pair in load_pairs("style", split)]
    assert sorted(prompts) == sorted(f"say {i}" + "\nx" * (i % 2) for i in range(60))


needs_pairs = pytest.mark.skipif(not (REAL / "preferences").is_dir(), reason="no preferences/ in $ALIGN_DATA")


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


# Sentiment.


def test_generated_reviews():
    parts = {split: load_sentiment("sentiment", split) for split in splits.SPLITS}
    assert [len(part) for part in parts.values()] == [8000, 1000, 1000]
    for split, part in parts.items():
        assert all(splits.split_of(r.text) == split for r in part)
        assert len({r.text for r in part}) == len(part)
        assert 0.45 < np.mean([r.label for r in part]) < 0.55
        assert not any("{" in r.text or "}" in r.text for r in part)
    assert sentiment.sentiment_reviews("valid", 50) == parts["valid"][:50]
    assert sentiment.sentiment_reviews("valid", 50, seed=1) != parts["valid"][:50]


def test_the_label_of_a_generated_review_is_what_its_verdicts_say():
    """Read by a list of its own: for each kind of sentence, which word decides and whether it is turned round."""
    praise, blame = set(sentiment.REVIEW_WORDS["praise"]), set(sentiment.REVIEW_WORDS["blame"])
    readings = [
        (r"the \w+ is not (\w+) , it is (\w+) \.", 2, True),
        (r"one (\w+) \w+ does not save a film as (\w+) as this one \.", 2, True),
        (r"the \w+ may be (\w+) ; what stays is the (\w+) \w+ \.", 2, True),
        (r"the \w+ is (\w+) , even if the \w+ is (\w+) \.", 1, True),
        (r"although the \w+ is (\w+) , the \w+ is (\w+) \.", 2, True),
        (r"i had heard that the \w+ is (\w+) , but it is (\w+) \.", 2, True),
        (r"my \w+ finds the \w+ (\w+) , i do not \.", 1, False),
        (r"nobody could call the \w+ (\w+) \.", 1, False),
        (r"the \w+ is anything but (\w+) \.", 1, False),
        (r"the \w+ is not (\w+) \.", 1, False),
        (r"i find the \w+ (\w+) \.", 1, True),
        (r"the \w+ is (\w+) \.", 1, True),
    ]
    kinds = collections.Counter()
    for review in load_sentiment("sentiment", "valid"):
        text, found = review.text, []
        for pattern, group, straight in readings:
            for match in re.finditer(pattern, text):
                word = match[group]
                assert word in praise | blame
                found.append((word in praise) == straight)
                kinds[pattern] += 1
            text = re.sub(pattern, "", text)
        assert found, review
        assert set(found) == {bool(review.label)}, review
        assert not (praise | blame) & set(text.split()), review
    assert len(kinds) == len(readings)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.json", "a.tsv.gz", "a.jsonl.gz"])
def test_reviews_of_a_file(tmp_path, name):
    reviews = [(f'review {i} with "quotes, and commas"', i % 2) for i in range(60)]
    kind = name.split(".")[1]
    if kind == "tsv":
        text = "text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in reviews)
    elif kind == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([("label", "text"), *((("negative", "positive")[n], t) for t, n in reviews)])
        text = file.getvalue()
    else:
        rows = [json.dumps({"text": t, "label": label, "id": "x"}) for t, label in reviews]
        text = "\n".join(rows) if kind == "jsonl" else f"[{','.join(rows)}]"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    parts = {split: load_sentiment(path, split) for split in splits.SPLITS}
    assert sorted(r for part in parts.values() for r in part) == sorted(reviews)
    assert all(splits.split_of(r.text) == split for split, part in parts.items() for r in part)


def test_bad_reviews_name_their_record(tmp_path):
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(40))
    for line, message in [
        ({"text": "x", "label": 2}, "line 41: 'label' must be 1 or 0, positive or negative, not 2"),
        ({"text": "x"}, "line 41: 'label' must be"),
        ({"label": 1}, "line 41: the key 'text' is missing"),
        ({"text": 5, "label": 1}, "line 41: 'text' must be text"),
    ]:
        path.write_text(good + json.dumps(line))
        with pytest.raises(DataError, match=message):
            load_sentiment(path)
    path.write_text(good.replace('"label": 0', '"label": 1'))
    with pytest.raises(DataError, match="the split train needs texts of both labels"):
        load_sentiment(path)
    (tmp_path / "b.tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot read .*Not a gzipped file"):
        load_sentiment(tmp_path / "b.tsv.gz")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(good.encode())[:60])
    with pytest.raises(DataError, match=r"cannot read .*ended before"):
        load_sentiment(tmp_path / "b.tsv.gz")
    with pytest.raises(DataError, match="unknown split"):
        load_sentiment("sentiment", "dev")


def test_imdb_from_the_folder_or_from_datasets_or_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    rows = [{"text": f"film {i}<br />end", "label": i % 2} for i in range(50)]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    parts = {split: load_sentiment("imdb", split) for split in splits.SPLITS}
    assert asked == [("stanfordnlp/imdb", part) for part in ("train", "train", "test")]
    assert len(parts["train"]) + len(parts["valid"]) == len(parts["test"]) == 50
    assert not set(parts["train"]) & set(parts["valid"])
    assert parts["test"][0] == ("film 0\nend", 0)

    def fail(name, split):
        raise ConnectionError("no network\nhere")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(DataError, match=r"the download failed \(ConnectionError: no network here\)"):
        load_sentiment("imdb")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="no package to download it: pip install"):
        load_sentiment("imdb")
    (tmp_path / "sentiment").mkdir()
    lines = "".join(json.dumps({"text": f"mine {i}", "label": i % 2}) + "\n" for i in range(9))
    (tmp_path / "sentiment/imdb_test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(load_sentiment("imdb", "test")) == 9
    with pytest.raises(DataError, match=r"polarity: no .*this dataset has no automatic download"):
        load_sentiment("polarity")


@pytest.mark.skipif(not (REAL / "sentiment").is_dir(), reason="no sentiment/ in $ALIGN_DATA")
@pytest.mark.parametrize(("name", "train", "test"), [("polarity", 9596, 1066), ("reviews", 1800, 200)])
def test_real_sentiment(name, train, test):
    parts = {split: load_sentiment(name, split) for split in splits.SPLITS}
    assert len(parts["train"]) + len(parts["valid"]) == train
    assert 0.09 * train < len(parts["valid"]) < 0.12 * train
    assert len(parts["test"]) == test
    assert sum(r.label for r in parts["test"]) * 2 == test
    texts = [{r.text for r in part} for part in parts.values()]
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & texts[2]


# ----------------------------------------------------------------------------------------------------------------
# Token streams.


@pytest.mark.parametrize(("vocab", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_stream_round_trip(tmp_path, vocab, dtype):
    docs = [[0, vocab - 1, 2], [], [5]]
    path = streams.write_stream(tmp_path / "sub/a.bin", iter(docs), vocab, "tok")
    stream = streams.open_stream(path, "tok")
    assert stream.dtype == dtype
    assert stream.tolist() == [token for doc in docs for token in doc]
    about = json.loads(Path(f"{path}.json").read_text())
    assert about["tokens"] == len(stream)
    assert about["sha256"] == data.hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.bin", "a.bin.json"]
    assert not stream.flags.writeable


def test_stream_in_chunks(tmp_path):
    docs = [list(range(i, i + 50_000)) for i in range(50)]
    stream = streams.open_stream(streams.write_stream(tmp_path / "a", docs, 60_000, "tok"), "tok")
    assert np.array_equal(stream, np.array(docs).reshape(-1))


class Letters:
    """A tokenizer of one id per character, which counts the texts that it was given."""

    fingerprint, vocab_size, endoftext_id = "letters", 300, 299

    def __init__(self, most=math.inf):
        self.seen, self.most = [], most

    def encode_batch(self, texts):
        if len(self.seen) + len(texts) > self.most:
            raise KeyboardInterrupt
        self.seen += texts
        return [[ord(c) for c in text] for text in texts]


def test_a_tokenisation_that_broke_off_goes_on(tmp_path):
    texts = [f"text {i}" for i in range(25)]
    expected = [i for text in texts for i in [*map(ord, text), 299]]
    path = streams.stream_path(tmp_path, texts, Letters())
    with pytest.raises(KeyboardInterrupt):
        streams.tokenise(path, texts, Letters(most=13), some=4)
    assert not path.exists()
    tokenizer = Letters()
    streams.tokenise(path, texts, tokenizer, some=4)
    assert tokenizer.seen == texts[12:]  # the first three parts were there
    assert streams.open_stream(path, "letters", check=True).tolist() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    streams.tokenise(path, texts, None)  # it is there: nothing is done

    other, begun = tmp_path / "other.bin", threading.Event()

    class Slow(Letters):  # while one run tokenises, a second that wants the same stream waits and finds it made
        def encode_batch(self, some):
            begun.set()
            time.sleep(0.2)
            return super().encode_batch(some)

    first = threading.Thread(target=streams.tokenise, args=(other, texts, Slow()))
    first.start()
    assert begun.wait(10)
    streams.tokenise(other, texts, None)
    assert Path(f"{other}.json").exists()
    first.join()
    other.unlink()  # as the message about a damaged stream advises
    streams.tokenise(other, texts, Letters())
    assert streams.open_stream(other, "letters").tolist() == expected


def test_one_document_has_no_border(tmp_path):
    path = streams.stream_path(tmp_path, ["abc"], Letters())
    streams.tokenise(path, ["abc"], Letters())
    assert streams.open_stream(path, "letters").tolist() == [97, 98, 99]


def test_streams_of_other_texts_or_tokenizers_stand_elsewhere(tmp_path):
    other = Letters()
    other.fingerprint = "other"
    cases = [(["ab"], Letters()), (["a", "b"], Letters()), (["", "ab"], Letters()), (["ab"], other)]
    paths = {streams.stream_path(tmp_path, texts, tokenizer) for texts, tokenizer in cases}
    assert len(paths) == len(cases)
    assert streams.stream_path(tmp_path, ["ab"], Letters()) in paths


@pytest.mark.parametrize("bad", [-1, 100])
def test_stream_refuses_ids_outside_the_vocabulary(tmp_path, bad):
    streams.write_stream(tmp_path / "a", [[1, 2]], 100, "tok")
    with pytest.raises(DataError, match=r"outside 0\.\.99"):
        streams.write_stream(tmp_path / "a", [[1], [bad]], 100, "tok")
    assert streams.open_stream(tmp_path / "a", "tok").tolist() == [1, 2]  # the old stream is untouched
    assert len(list(tmp_path.iterdir())) == 2


def test_stream_refusals(tmp_path):
    with pytest.raises(DataError, match="no tokens"):
        streams.write_stream(tmp_path / "a", [], 10, "tok")
    with pytest.raises(DataError, match=r"no .*/a:"):
        streams.open_stream(tmp_path / "a", "tok")
    path = streams.write_stream(tmp_path / "a", [[1, 2, 3]], 10, "tok")
    sidecar = Path(f"{path}.json")
    with pytest.raises(DataError, match="made with tokenizer tok, this run has other"):
        streams.open_stream(path, "other")
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match="has 8 bytes, not 3 x 2"):
        streams.open_stream(path, "tok")
    sidecar.write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        streams.open_stream(path, "tok")
    sidecar.unlink()
    with pytest.raises(DataError, match=r"no .*a\.json"):
        streams.open_stream(path, "tok")


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
    data.epoch_order.cache_clear()
    for step in reversed(range(30)):
        assert np.array_equal(data.batch_at(stream, step, 3, 8, seed=2), steps[step])


def test_shortest_stream():
    inputs, targets = data.batch_at(np.arange(9), 0, 2, 8, seed=0)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets[0, -1] == 8
    with pytest.raises(DataError, match=r"has 8 tokens, one window needs context \+ 1 = 9"):
        data.batch_at(np.arange(8), 0, 1, 8, seed=0)


def test_main_runs(capsys):
    data.main()
    out = capsys.readouterr().out
    assert "Level 3: 500 problems checked" in out
    assert "nats" in out


def test_stream_checksum(tmp_path):
    path = streams.write_stream(tmp_path / "a", [[1, 2, 3]], 10, "tok")
    assert streams.open_stream(path, "tok", check=True).tolist() == [1, 2, 3]
    np.array([1, 2, 4], dtype=np.uint16).tofile(path)
    assert streams.open_stream(path, "tok").tolist() == [1, 2, 4]  # of the right size, so only the checksum tells
    with pytest.raises(errors.DataError, match="has changed since it was written"):
        streams.open_stream(path, "tok", check=True)
