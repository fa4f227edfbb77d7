"""The built-in word problems: what is made of a grammar of small stories (support/word_grammar.py).

English problems in GSM8K's shape (Cobbe et al. 2021, arXiv:2110.14168): a question, one worked line per arithmetic
step, a last line `#### ANSWER`. They need no download, so every stage runs offline: `narrative_texts` for pretraining,
`word_problems` for SFT and reinforcement learning, `corrupt` for preference pairs. tasks.TASKS has them as a row.

**How a problem is made.** A theme (food, a shop, a bus, ...) is a table of rows. A story opens with a row from `open`,
walks through rows from `then` (buys, gives away, loses), each one addition or subtraction on the running total, and may
close with a row from `end` (shares, packs, sells, compares) that turns the total into something else. Each row has a
*sentence* for the event, a line in which its arithmetic is *worked*, and what is *asked* if the story stops there. So
one walk gives a problem (the sentences and the question), its solution (the worked lines) and a narrative (sentences
and worked lines in turn). Every step feeds the next: no intermediate result is idle.

**The split** is that of the sentences (`split_of`, a hash), and a story has many beginnings: "Tom has 5 apples. He
buys 3 more." is one problem, and the first half of others. So a story belongs to the last split (train, valid, test)
that any of its beginnings with a step hashes to (`Story.split`), and the generator draws again until that is the one
asked for. Then no story of the test split stands in another split's problems, neither with another question nor as the
beginning of a longer story, and not worked out in a narrative, whatever the seed, the level or the sample size.

**Entropy.** Every choice of the generator is uniform over a finite list, whose length may depend on the choices before
it ("gives away k of n"). The grammar is unambiguous: a text can be made in one way only (tests/test_word_problems.py
enumerates a cut-down grammar and checks it). Then p(text) is the product of 1 / options, and

    nats(text) = -log p(text) = sum over the choices of log(options)       exact, for this one text
    H = E[nats(text)]                                                      the entropy of a document

By Gibbs' inequality the expected loss per document of any model, end marker included, is at least H: a floor known in
advance. Divided by the mean number of tokens per document it is the floor per token. Small print: a split keeps a share
of the texts, so strictly its floor is H - log(1 / share), 0.2 to 0.4 nats (train) or 1.8 to 2.3 (valid) lower, for a
model that could compute blake2b. And a train set of n documents can be memorised, so the floor speaks of fresh
documents, that is, of the validation loss.

**Simplified.** Uniform choices, so no Zipf law of words and no Benford law of numbers; no distractors; whole numbers 1
to 60; present tense. Running totals stay in 1..50, so that a small vocabulary of numbers recurs.

**Large numbers.** With large=FOUR_DIGITS the same grammar tells stories with such numbers, for a model that
has a calculator (agent.py): `with_calls` writes its calls into a solution.
"""

import math
import random
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from support.answers import extract_answer
from support.errors import DataError
from support.splits import SPLITS, check_split, split_of
from support.word_grammar import (
    DAYS,
    HOURS,
    MEN,
    NOUNS,
    PLURAL,
    POOLS,
    SINGULAR,
    STORIES,
    THEMES,
    WEATHER,
    WOMEN,
    Row,
    Theme,
    count,
)

# -----------------------------------------------------------------------------------------------------------------
# A story: choices, one after another, and what they cost in nats.

SOLVE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else None,  # None: does not come out even
}


class Large(NamedTuple):
    """Numbers beyond those of training. Totals reach `highest`; the others are what an opening draws from."""

    highest: int
    factors: range
    addends: range
    start: range


TO_99 = Large(99, range(6, 10), range(25, 50), range(51, 99))
FOUR_DIGITS = Large(9999, range(12, 100), range(100, 5000), range(100, 5000))


@cache
def numbers(op: str, total: int, left: int, least: int, most: int, large: Large | None = None) -> Sequence[int]:
    """The numbers that a row with `op` may bring when `left` more steps follow; empty: it cannot stand here.

    Totals stay in 1 + left .. 50 - left, so that a chain never runs dry before its last step. large: in 1 + left ..
    highest - left.
    """
    if large:
        highest = large.highest
        most = most if most < 20 else highest // 2
        ranges = {"+": (least, min(most, highest - left - total)), "-": (least, min(most, total - 1 - left))}
        ranges |= {"k-": (total + 1, min(highest, 2 * total - 1)), "*": (2, min(99, highest // total))}
        return range(ranges[op][0], ranges[op][1] + 1) if op in ranges else [k for k in range(2, 100) if total % k == 0]
    if op == "+":
        return range(least, min(most, 50 - left - total) + 1)
    if op == "-":
        return range(least, min(most, total - 1 - left) + 1)
    if op == "k-":  # not 2 * total: k - total would equal total, and a skipped step would go unseen
        return [k for k in range(5, 61, 5) if total < k <= total + 30 and k != 2 * total]
    if op == "*":
        return range(2, 7) if 2 <= total <= 10 else ()
    return [k for k in range(2, 7) if total % k == 0 and total // k <= 10]


class Draw(dict):
    """The slots of a story, each drawn from `rng` when a template first names it, and the nats so far."""

    def __init__(self, rng):
        self.rng, self.nats, self.used = rng, 0.0, []

    def choice(self, options):
        self.nats += math.log(len(options))
        return options[self.rng.randrange(len(options))]

    def new(self, options: Sequence[str]) -> str:
        """A choice that this story has not made yet: a second friend is another friend."""
        self.used.append(self.choice([option for option in options if option not in self.used]))
        return self.used[-1]

    def fill(self, templates: Sequence[str]) -> str:
        return self.choice(templates).format_map(self)

    def __missing__(self, key: str) -> str:
        if key == "day":
            i = self.choice(range(4))
            self["day"], self["next"] = DAYS[i], DAYS[i + 1]
        elif key == "F":
            self["F"] = self.new(self.friends)
        elif key == "stop":
            self["stop"] = self.new(POOLS["stop"])
        elif key == "toy2":
            self["toy2"] = self.new(POOLS["toy"])
        elif key in ("toy", "toys"):
            self["toy"] = self.new(POOLS["toy"])
            self["toys"] = PLURAL[self["toy"]]
        elif key == "gifts":
            self["gift"] = self.choice(POOLS["gift"])
            self["gifts"] = PLURAL[self["gift"]]
        else:
            self[key] = self.choice(POOLS[key])
        return self[key]

    def hero(self) -> None:
        men = self.choice((True, False))
        hero = self.choice(MEN if men else WOMEN)
        self.friends = WOMEN if men else MEN
        he, his, him = ("he", "his", "him") if men else ("she", "her", "her")
        self.update(N=hero, he=he, He=he.capitalize(), his=his, His=his.capitalize(), him=him)

    def beat(self, theme: Theme, row: Row, a: int, b: int, k: int) -> tuple[str, str, int]:
        """One row with its numbers -> sentence, worked line ("" without an operator), result."""
        for slot in ("F", "day", "next", "toy", "toys", "toy2", "gift", "gifts", *POOLS):
            self.pop(slot, None)  # each row draws its own
        thing = self["thing"]
        self.update(a=a, b=b, k=k, ks=count(k, thing))
        self.update(more=count(k, thing, "more "), fewer=count(k, thing, "fewer "))
        sentence = self.fill(row.sentence)
        if row.op == "=":
            return sentence, "", k
        op = row.op[-1]
        c = SOLVE[op](a, b)
        unit = self[row.unit] if row.unit in POOLS else row.unit or thing
        self.update(e=f"{a} {op} {b} = {c}", eq=f"{a} {op} {b} = {count(c, unit)}")
        self["unit"] = unit if c == 1 else PLURAL[unit]
        return sentence, self.fill(row.worked), c


class Story(NamedTuple):
    """A story as it was drawn: its sentences, and the question that may follow them."""

    theme: str
    beats: list[tuple[str, str]]  # (sentence, worked line); the line is "" where nothing is computed
    asks: tuple[str, ...]  # templates of the closing question
    answer: int

    @property
    def split(self) -> str:
        """The last of SPLITS among those of the story and of its beginnings that are stories, one step or more."""
        beginnings = accumulate((sentence for sentence, _ in self.beats), "{} {}".format)
        stories = [text for text, (_, worked) in zip(beginnings, self.beats, strict=True) if worked]
        return max(map(split_of, stories), key=SPLITS.index)


def generate_story(draw: Draw, level: int, large: Large | None = None) -> Story | None:
    """One walk through the tables with `level` arithmetic steps. large: with such numbers; None if no row can follow:
    after 98 miles, where the next steps only add and 99 is the highest."""
    name = draw.choice(STORIES)
    theme = THEMES[name]
    if theme.person:
        draw.hero()
    draw["thing"] = draw.choice(theme.things)
    draw["things"] = PLURAL[draw["thing"]]

    row = draw.choice(theme.open)
    if row.op == "*":
        a = draw.choice(large.factors if large else range(2, 7))
        b = draw.choice(large.factors if large else range(2, min(10, 48 // a) + 1))
    elif row.op == "+":
        addends = large.addends if large else range(3, 21)
        a, b = draw.choice(addends), draw.choice(addends)
    else:
        a, b = 0, draw.choice(large.start if large else theme.start)
    sentence, worked, total = draw.beat(theme, row, a, b, k=b)
    beats = [(sentence, worked)]

    for left in reversed(range(level - (row.op != "="))):  # steps still to come after this one
        rows = [new for new in theme.then if new is not row] + list(() if left else theme.end)
        fits = [(row, ks) for row in rows if (ks := numbers(row.op, total, left, theme.least, row.most, large))]
        if not fits:
            return None
        row, ks = draw.choice(fits)
        k = draw.choice(ks)
        a, b = (k, total) if row.op == "k-" else (total, k)
        sentence, worked, total = draw.beat(theme, row, a, b, k)
        beats.append((sentence, worked))
    return Story(name, beats, row.ask, total)


# -----------------------------------------------------------------------------------------------------------------
# Problems.


class WordProblem(NamedTuple):
    """The first five fields of data.Problem."""

    question: str
    solution: str
    answer: str
    level: int
    story: str


def word_problem(
    index: int, split: str = "train", levels: Sequence[int] = (1, 2), seed: int = 0, large: Large | None = None
) -> WordProblem:
    """Problem `index` of an endless list: random access. Its level is levels[index % len(levels)]."""
    check_split(split)
    if not levels or not set(levels) <= {1, 2, 3}:
        raise DataError(f"levels must be some of 1, 2, 3, not {levels!r}")
    return _word_problem(index, split, levels[index % len(levels)], seed, large)


@lru_cache(2**16)  # a stage, the starts that it makes and each run of an experiment ask for the same ones
def _word_problem(index: int, split: str, level: int, seed: int, large: Large | None) -> WordProblem:
    rng = random.Random(f"problem/{seed}/{split}/{level}/{index}")
    while True:  # 1.25 to 2 tries for train, 4 to 10 for valid and test
        draw = Draw(rng)
        story = generate_story(draw, level, large)
        if story is None:
            continue
        question = " ".join([*(sentence for sentence, _ in story.beats), draw.fill(story.asks)])
        if story.split == split:
            break
    lines = [worked for _, worked in story.beats if worked]
    return WordProblem(question, "\n".join([*lines, f"#### {story.answer}"]), str(story.answer), level, story.theme)


def word_problems(
    split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0, large: Large | None = None
) -> list[WordProblem]:
    """n different questions, problem i at levels[i % len(levels)]. A longer list begins with the shorter."""
    problems, seen = [], set()
    for i in range(n):
        index = i
        while (problem := word_problem(index, split, levels, seed, large)).question in seen:
            index += len(levels) * 10**9  # the same level, and an index that no list reaches
        seen.add(problem.question)
        problems.append(problem)
    return problems


def with_calls(solution: str) -> str:
    """A solution that leaves each result to a calculator, as GSM8K writes it: "Tom has 5 + 3 = 8 apples." becomes "Tom
    has <<5+3=8>>8 apples." """
    return STEP.sub(r"<<\1\2\3=\4>>\4\5 \6", solution)


# -----------------------------------------------------------------------------------------------------------------
# Does an answer tell the question's story? A reward for the number alone does not ask.

LETTERS = re.compile(r"[A-Za-z]+")
NAMES = {*MEN, *WOMEN}


def language() -> set[str]:
    """Every word that the grammar can write, in lower case."""
    rows = [row for theme in THEMES.values() for row in (*theme.open, *theme.then, *theme.end)]
    templates = [text for row in rows for text in (*row.sentence, *row.worked, *row.ask)]
    fixed = " ".join(re.sub(r"{\w+}", " ", text) for text in templates)
    slots = " ".join([*NAMES, *DAYS, *PLURAL, *SINGULAR, *(text for pool in POOLS.values() for text in pool)])
    return {word.lower() for word in LETTERS.findall(f"{fixed} {slots} he his him she her")}


LANGUAGE = language()


def names_and_things(text: str) -> set[str]:
    """The names in a text, and its nouns in the singular."""
    words = {SINGULAR.get(word, word) for word in LETTERS.findall(text)}
    return words & (NAMES | NOUNS)


def keeps_story(question: str, solution: str, text: str) -> bool:
    """Whether an answer speaks of the question and in its language: every name and thing in it is one of the question's
    or of its solution's (which may have to say "dollars" for $), and every word one that the grammar can write."""
    words = LETTERS.findall(text)
    if not words or any(word.lower() not in LANGUAGE for word in words):
        return False
    return names_and_things(text) <= names_and_things(f"{question} {solution}")


# -----------------------------------------------------------------------------------------------------------------
# Wrong solutions.

# The kinds of error, the hardest to see first, each with the fewest steps that a problem needs to have it.
CORRUPTIONS = {"wrong_sum": 1, "skipped_step": 2, "wrong_operator": 1, "missing_answer": 1}
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)((?: more)?) (\w+)")


def corrupt(problem: WordProblem, kind: str, rng: random.Random) -> str:
    """A wrong solution of a built-in problem, for preference pairs: one error, then sound work on top of it.

    wrong_sum       one result is off by 1, 2 or 10:          "Tom has 5 + 3 = 9 apples."
    wrong_operator  one step computes something else:         "Tom has 5 - 3 = 2 apples."
    skipped_step    one line is missing. Only from level 2 on; at level 1 nothing would be left: DataError
    missing_answer  no `#### ANSWER` line

    The error is carried into every later line and the final answer, so that no number fails to match the next
    line. The final answer is never the right one.
    """
    lines = problem.solution.split("\n")
    if kind == "missing_answer":
        return "\n".join(line for line in lines if "####" not in line)
    if kind not in CORRUPTIONS:
        raise DataError(f"unknown corruption {kind!r}: choose one of {', '.join(CORRUPTIONS)}")
    steps = [STEP.search(line) for line in lines[:-1]]
    if not steps or None in steps:
        raise DataError(f"{kind} needs the built-in form 'a + b = c things' on every line: {problem.solution!r}")
    if kind == "skipped_step" and len(steps) == 1:
        raise DataError("skipped_step needs a problem of level 2 or 3: one step less leaves nothing")

    wrong = []
    for i, step in enumerate(steps):
        a, op, b, c = int(step[1]), step[2], int(step[3]), int(step[4])
        if kind == "wrong_sum":
            changes = [(op, c + d) for d in (-10, -2, -1, 1, 2, 10)]
        elif kind == "wrong_operator":
            changes = [(o, SOLVE[o](a, b)) for o in SOLVE if o != op]
        else:  # the next line starts from what this one started from
            before = (a, b) if i == 0 else (int(steps[i - 1][4]),)
            changes = [(None, value) for value in before]
        wrong += [(i, o, value) for o, value in changes if value is not None and value >= 0 and value != c]
    rng.shuffle(wrong)
    for i, o, value in wrong:
        text = carry_on(lines, steps, i, o, value)
        if text and extract_answer(text) != problem.answer:
            return text
    raise DataError(f"{kind} finds no wrong solution for {problem.question!r}")


def carry_on(lines: list[str], steps: list[re.Match], i: int, op: str | None, value: int) -> str | None:
    """The solution with `value` as result of step i, through `op` (None: no such line), and what follows.

    None if a later step does not come out even or falls below zero: the error would show.
    """
    out = lines[:i]
    if op is not None:
        out.append(rewrite(lines[i], steps[i], steps[i][1], op, steps[i][3], value))
    for old, step, line in zip(steps[i:], steps[i + 1 :], lines[i + 1 :], strict=False):
        a, b = int(step[1]), int(step[3])
        a, b = (value, b) if step[1] == old[4] else (a, value)  # "k-" rows have the total on the right
        value = SOLVE[step[2]](a, b)
        if value is None or value < 0:
            return None
        out.append(rewrite(line, step, a, step[2], b, value))
    return "\n".join([*out, f"#### {value}"])


def rewrite(line: str, step: re.Match, a, op: str, b, c: int) -> str:
    noun = SINGULAR.get(step[6], step[6])  # "= 1 apples" would give the wrong solution away
    result = count(c, noun, "more " if step[5] else "")
    return f"{line[: step.start()]}{a} {op} {b} = {result}{line[step.end() :]}"


# -----------------------------------------------------------------------------------------------------------------
# Text for pretraining, and its entropy.


def narrative(rng: random.Random, levels: Sequence[int] = (1, 2)) -> tuple[str, float, Story]:
    """A story told with its arithmetic, three to six sentences -> (text, −log p(text) in nats, exact; the story).

    The arithmetic comes step by step or, in half of the stories where that differs, all at the end. A solution comes
    after its whole problem: a model that has only read step by step has to learn in SFT to look further back, and one
    seed took three times as long (commit 90f783b).
    """
    draw = Draw(rng)
    scene = f"It is a {draw.choice(WEATHER)} {draw.choice(HOURS)}."
    story = generate_story(draw, draw.choice(levels))
    told = [part for beat in story.beats for part in beat if part]
    at_end = [sentence for sentence, _ in story.beats] + [worked for _, worked in story.beats if worked]
    if at_end != told:
        told = draw.choice((told, at_end))
    return " ".join([scene, *told]), draw.nats, story


def narrative_texts(split: str, n: int, seed: int = 0) -> list[str]:
    """n narratives of one split as drawn: repeats stay, or the entropy would be another."""
    check_split(split)
    texts = []
    for i in range(n):
        rng = random.Random(f"narrative/{seed}/{split}/{i}")
        level = rng.randrange(1, 3)  # once: fewer long stories than short ones are train's
        while True:
            text, _, story = narrative(rng, (level,))
            if story.split == split:
                break
        texts.append(text)
    return texts


def worked_texts(split: str, n: int) -> list[str]:
    """n problems with large numbers and their solutions, of all levels; none of those that are asked later, as the seed
    is another."""
    problems = word_problems(split, n, (1, 2, 3), seed=1, large=FOUR_DIGITS)
    return [f"{problem.question}\n{problem.solution}" for problem in problems]


def narrative_entropy(n: int = 2000) -> tuple[float, float]:
    """Entropy of a narrative in nats, end marker included: mean of n exact −log p, standard error."""
    rng = random.Random("entropy/0")
    nats = np.array([narrative(rng)[1] for _ in range(n)])
    return float(nats.mean()), float(nats.std(ddof=1) / math.sqrt(n))


# -----------------------------------------------------------------------------------------------------------------
# The same story with other names.


def _turn(words):
    return dict(zip(words, [*words[1:], words[0]], strict=True))


def rename(text: str) -> str:
    """The same story with other names and other things: every name and noun becomes the next one of its list."""
    table = _turn(MEN) | _turn(WOMEN)
    for theme in THEMES.values():
        if len(theme.things) > 1:
            turned = _turn(theme.things)
            table |= turned | {PLURAL[a]: PLURAL[b] for a, b in turned.items()}
    return other_words(text, table)


def other_words(text: str, table: dict[str, str]) -> str:
    """The text with the words of a table replaced, but for the book whose pages are read."""
    kept = ("book", "books") if re.search(r"\bpages?\b", text) else ()
    return re.sub(r"[A-Za-z]+", lambda word: word[0] if word[0] in kept else table.get(word[0], word[0]), text)
