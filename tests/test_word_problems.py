"""support/word_problems.py: the built-in problems and their grammar, the splits, the entropy, wrong solutions.

The arithmetic of every solution is done again here, by a parser that shares nothing with the generator.
"""

import builtins
import collections
import hashlib
import itertools
import math
import random
import re

import numpy as np
import pytest

from data import Problem, load_problems, make_problems
from support import splits
from support import word_problems as built_in
from support.answers import extract_answer, same_answer
from support.errors import DataError
from support.tasks import DEFAULT_TASK, LARGE_TASK

PRONOUNS = {"he": "men", "his": "men", "him": "men", "she": "women", "her": "women"}


@pytest.fixture(scope="module")
def problems() -> dict[int, list[Problem]]:
    return {level: make_problems(DEFAULT_TASK, "train", 3000, (level,)) for level in (1, 2, 3)}


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
            for problem in make_problems(DEFAULT_TASK, split, 2000, (1, 1, 1, 2, 3), seed=seed):
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


def test_the_default_problems_are_what_they_were():
    """Of every version since the split is that of the stories: starts and results rest on them."""
    digest = hashlib.sha256()
    for split in splits.SPLITS:
        digest.update(repr(built_in.word_problems(split, 300, (1, 2, 3), 5)).encode())
        digest.update(repr(built_in.narrative_texts("train", 300, 3)).encode())
    digest.update(repr(built_in.narrative_entropy(300)).encode())
    assert digest.hexdigest()[:16] == "b60df4edf91d1942"


def test_large_numbers():
    """The same stories with numbers of up to four digits, right in each step, in splits of their own."""
    told = {}
    for split in splits.SPLITS:
        problems = load_problems(LARGE_TASK, split, 1500, (2, 3))
        for problem in problems:
            results = worked(problem.solution)
            assert len(results) == problem.level
            assert problem.answer == str(results[-1])
            numbers = [int(n) for n in re.findall(r"\d+", problem.question + problem.solution)]
            assert max(numbers) <= 9999
            assert problem.calls.count("<<") == problem.level
            assert re.sub(r"<<(\d+)(.)(\d+)=(\d+)>>", r"\1 \2 \3 = ", problem.calls) == problem.solution
        long = [len(problem.answer) >= 3 for problem in problems]
        assert sum(long) > 0.85 * len(long)
        told[split] = {problem.question[: problem.question.rindex(". ") + 1] for problem in problems}
        for text in built_in.worked_texts(split, 300):
            question, _, solution = text.partition("\n")
            worked(solution)
            told[split].add(question[: question.rindex(". ") + 1])
    assert not told["train"] & (told["valid"] | told["test"])
    assert built_in.with_calls("Tom has 5 - 3 = 2 more apples.\n#### 2") == "Tom has <<5-3=2>>2 more apples.\n#### 2"


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
    a = make_problems(DEFAULT_TASK, "train", 4000, (1, 2), seed=3)
    assert len({problem.question for problem in a}) == 4000
    assert [problem.level for problem in a] == [1, 2] * 2000
    assert a[:500] == make_problems(DEFAULT_TASK, "train", 500, (1, 2), seed=3)
    assert a[7] == Problem(*built_in.word_problem(7, "train", (1, 2), seed=3), task="word")
    assert a[:50] != make_problems(DEFAULT_TASK, "train", 50, (1, 2), seed=4)
    assert [p.level for p in make_problems(DEFAULT_TASK, "valid", 6, (3, 1))] == [3, 1] * 3


def test_repeats_are_drawn_again(monkeypatch):
    original = built_in.word_problem
    monkeypatch.setattr(built_in, "word_problem", lambda i, *rest: original(i % 10 if i < 10**6 else i, *rest))
    assert len({problem.question for problem in make_problems(DEFAULT_TASK, "train", 30)}) == 30


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


LUKE = "Luke has 2 boxes with 4 marbles in each box. He finds 17 more marbles at home. How many marbles has he in all?"
LUKE_SOLVED = "Luke has 2 * 4 = 8 marbles in all.\nNow he has 8 + 17 = 25 marbles.\n#### 25"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (LUKE_SOLVED, True),
        ("In all, he has 2 * 4 = 9 marbles.\n#### 9", True),  # wrong, and of marbles
        ("He has 1 marble.\n#### 1", True),  # one of the question's things
        ("Te has 2 * 4 = 8 marbles.\n#### 8", False),  # no word of the language
        ("Luke has 2 * 4 = 8 eggs.\n#### 8", False),  # another thing
        ("Noah has 2 * 4 = 8 marbles.\n#### 8", False),  # another name
        ("He finds 8 marbles with Luke in 2 boxes.\n#### 8", True),
        ("#### 25", False),  # no story at all
        ("", False),
    ],
)
def test_an_answer_keeps_the_story(text, kept):
    assert built_in.keeps_story(LUKE, LUKE_SOLVED, text) == kept


def test_every_solution_keeps_its_story_and_few_keep_anothers():
    problems = make_problems(DEFAULT_TASK, "test", 300, (1, 2, 3))
    assert all(built_in.keeps_story(p.question, p.solution, p.solution) for p in problems)
    pairs = itertools.pairwise(problems)
    assert sum(built_in.keeps_story(p.question, p.solution, q.solution) for p, q in pairs) < 30


def test_dollars_are_in_a_question_that_says_only_the_sign():
    question, solution = "Jane has $5. She gets $3 from Tom. How much money does Jane have now?", "5 + 3 = 8 dollars"
    assert built_in.keeps_story(question, solution, "Jane has 5 + 3 = 8 dollars.")
    assert not built_in.keeps_story(question, solution, "Jane has 5 + 3 = 8 cards.")


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
                row._replace(sentence=row.sentence[pick], worked=row.worked[pick]) for row in getattr(theme, section)
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
        beats = built_in.generate_story(draw, 1).beats
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
    orders = ["".join("=" if "=" in s else "s" for s in re.split(r"(?<=[.]) ", text)) for text in texts]
    two_steps = [order for order in orders if order.count("=") == 2]  # s: the scene or a sentence, =: arithmetic
    assert set(two_steps) == {"ss=s=", "sss==", "sss=s=", "ssss=="}
    assert 0.45 < sum(order.endswith("==") for order in two_steps) / len(two_steps) < 0.55
    names = " ".join(texts)
    assert all(name in names for name in built_in.MEN + built_in.WOMEN)


def test_narrative_entropy():
    mean, error = built_in.narrative_entropy(1000)
    nats = np.array([built_in.narrative(random.Random(i))[1] for i in range(1000)])
    assert error == pytest.approx(nats.std() / math.sqrt(1000), rel=0.2)
    assert abs(mean - nats.mean()) < 5 * error
    assert built_in.narrative_entropy(1000) == (mean, error)
