"""Every dataset of the pipeline: what a record is, where it comes from, the built-in default, the split.

Four things stand here, in this order:

1. **Built-in word problems.** English problems in GSM8K's shape (Cobbe et al. 2021, arXiv:2110.14168): a
   question, one worked line per arithmetic step, a last line `#### ANSWER`. They need no download, so every
   stage of the pipeline runs offline: `narrative` for pretraining, `word_problems` for SFT, `corrupt` for
   preference pairs, and prompts with a verifier (`extract_answer`) for reinforcement learning.
2. **Real data**: GSM8K, Tiny Shakespeare, TinyStories, any text file, any JSONL of the documented keys. Looked
   for at a path that the user gives, then in `$ALIGN_DATA` (default `downloads/`), then downloaded.
3. **Token streams**: one long array of token ids on disk, and `batch_at`, which is a pure function of the step.
4. The verifier, `extract_answer`: the one place that says what counts as a right answer.

**How a problem is made.** A theme (food, a shop, a bus, ...) is a table of rows. A story opens with a starting
row, walks through middle rows (buys, gives away, loses) that each do one addition or subtraction to the running
total, and may close with an ending row (shares, packs, sells, compares) that turns the total into something else.
Each row says three things: how the event is *told*, how its arithmetic is *worked*, what is *asked* after it.
So one walk through the tables gives a problem (told sentences + question), its solution (worked lines) and a
narrative (told and worked sentences in turn). Every step feeds the next: no intermediate result is idle.

**The split.** `split_of` hashes the question itself (blake2b, 80/10/10). Generators for a split draw again until
the hash agrees, so a test question cannot occur in train, whatever the seed, the level or the sample size.

**Entropy.** All choices of the generator are uniform over a finite list: p(choice) = 1 / number of options. The
grammar is unambiguous: from a text one can read back every choice that made it (tests/test_data.py enumerates
a cut-down grammar and checks that no two walks give the same text). Then p(text) = Π 1/options, and

    nats(text) = −log p(text) = Σ log(options)          exactly, for this one text
    H = E[nats(text)]                                   the entropy of one document

By Gibbs' inequality no model's expected loss per document, end marker included, is below H: a floor known in
advance. Divide by the mean tokens per document for the floor per token. Small print: a split keeps the texts
with one hash value, so strictly its entropy is H − log(1 / share), up to 2.3 nats less, for a model that could
invert blake2b. None will.

**Simplified.** Uniform choices, so numbers have no Benford law and names no Zipf law. No distractors, integers
0 to 60 only, present tense only. A running total stays in 1..50 so that a small vocabulary of numbers recurs.

Run: `python data.py` prints problems of each level, their corruptions and a narrative, and checks them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """One line: what is wrong with the data, where, and what to do about it."""


@dataclass(frozen=True)
class Problem:
    """`solution` ends in `#### answer`; `answer` is canonical (see `extract_answer`), "" if it cannot be verified.

    `level` is the number of arithmetic steps; `story` the theme, or "gsm8k", or "file".
    """

    question: str
    solution: str
    answer: str
    level: int
    story: str


# ---------------------------------------------------------------------------------------------------------------
# The vocabulary. Small on purpose: words recur, so a model of a million parameters can learn all of them.

MEN = ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Adam", "Luke", "Noah", "Paul")
WOMEN = ("Anna", "Mia", "Jane", "Emma", "Kate", "Sara", "Zoe", "Lucy", "Nora", "Ella")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
POOLS = {  # slots that are drawn when a template names them
    "at": ("at the market", "at the shop", "at the fair"),
    "where": ("at home", "at school", "in the park", "in the garden"),
    "stop": ("market", "school", "park", "beach"),
    "ride": ("bus", "train", "boat"),
    "job": ("washing a car", "walking a dog", "painting a fence"),
    "toy": ("ball", "kite", "cap", "game", "puzzle", "lamp"),
    "gift": ("book", "pencil", "card", "balloon"),
}
WEATHER = ("sunny", "rainy", "cold", "warm", "windy")
HOURS = ("day", "morning", "afternoon", "evening")

FOOD = ("apple", "orange", "pear", "egg", "plum", "carrot")
THINGS = ("book", "pencil", "marble", "sticker", "card", "shell", "coin", "stamp", "balloon", "toy car")
BAKED = ("cookie", "muffin", "bun", "cupcake")
FLOWERS = ("rose", "tulip", "daisy", "flower")
UNITS = ("dollar", "mile", "page", "minute", "hour", "bag", "pile", "plate", "vase", "cup", "taxi", "row", "team")
PLURAL = {noun: noun + "s" for noun in (*FOOD, *THINGS, *BAKED, *FLOWERS, *UNITS, "car", *POOLS["toy"])}
PLURAL |= {"daisy": "daisies", "person": "people", "child": "children"}
SINGULAR = {plural: noun for noun, plural in PLURAL.items()}


def count(n: int, noun: str, adjective: str = "") -> str:
    """count(1, "apple") -> "1 apple"; count(2, "daisy", "more ") -> "2 more daisies"."""
    return f"{n} {adjective}{noun if n == 1 else PLURAL[noun]}"


# ---------------------------------------------------------------------------------------------------------------
# The grammar. In a template: N the hero, he/He/his/him the hero's pronouns, F a friend (of the other sex, so that a
# pronoun has one reading, and new in each row), thing/things the theme's noun, k the number that the row brings, ks
# "3 apples", more "3 more apples", fewer "3 fewer apples", a and b the operands, e "5 + 3 = 8", eq "5 + 3 = 8
# apples", any name in POOLS a draw from that pool. Alternatives are separated by "|".


class Row(NamedTuple):
    op: str  # "" opens with a plain number; "k-" subtracts the total from the row's number
    told: tuple[str, ...]
    worked: tuple[str, ...]  # () = the theme's
    ask: tuple[str, ...]  # () = the theme's for this operator
    unit: str  # what the result counts; "" = the theme's noun


def row(op: str, told: str, worked: str = "", ask: str = "", unit: str = "") -> Row:
    told_, worked_, ask_ = (tuple(text.split("|")) if text else () for text in (told, worked, ask))
    return Row(op, told_, worked_, ask_, unit)


class Theme(NamedTuple):
    things: tuple[str, ...]
    starts: tuple[Row, ...]
    middles: tuple[Row, ...]  # only "+" and "-": they keep the unit, so any number of them can follow
    endings: tuple[Row, ...]  # last step only: they change the unit or the owner
    worked: tuple[str, ...]
    ask: dict[str, tuple[str, ...]]
    person: bool = True
    start: range = range(5, 21)
    least: int = 1  # smallest k of a middle row; 2 where "1 person get off" would need another verb form


BUY = row("+", "{He} buys {more} {at}.|Then {he} buys {more}.")
GET = row("+", "{F} gives {him} {more}.|{He} gets {more} from {F}.")
FIND = row("+", "{He} finds {more} {where}.")
GIVE = row("-", "{He} gives {ks} to {F}.|{He} gives {F} {ks}.")
LOSE = row("-", "{He} loses {ks} {where}.|Then {he} loses {k} of them.")
EAT = row("-", "{He} eats {ks}.|{He} eats {k} of them for lunch.")
SHARE = row(
    "/",
    "{He} shares them equally among {k} friends.|{k} friends share them equally.",
    "Each friend gets {eq}.|Each of them gets {eq}.",
    "How many {things} does each friend get?|How many {things} are there for each friend?",
)
PACK = row(
    "/",
    "{He} packs them in bags of {k}.|{He} puts {k} of them in each bag.",
    "{He} fills {eq}.|{He} needs {eq}.",
    "How many bags does {he} fill?|How many bags does {N} need?",
    "bag",
)
SELL = row(
    "*",
    "{He} sells them all for ${k} each.|{He} sells each {thing} for ${k}.",
    "{He} gets {eq}.|{N} earns {eq}.",
    "How much money does {he} get?|How many dollars does {N} earn?",
    "dollar",
)
COMPARE = (
    row(
        "+",
        "{F} has {ks}.",
        "Together they have {eq}.|They have {eq} in all.",
        "How many {things} do they have together?|How many {things} do {N} and {F} have in all?",
    ),
    row("-", "{F} has {ks}.", "{N} has {e} more {unit}.", "How many more {things} does {N} have than {F}?"),
    row("+", "{F} has {more} than {N}.", "{F} has {eq}.", "How many {things} does {F} have?"),
    row("-", "{F} has {fewer} than {N}.", "{F} has {eq}.", "How many {things} does {F} have?"),
    row("*", "{F} has {k} times as many {things} as {N}.", "{F} has {eq}.", "How many {things} does {F} have?"),
)


def owning(starts, middles, endings, things) -> Theme:
    """A theme about what somebody has: the commonest kind, so its wording is written once."""
    worked = ("{N} has {eq}.", "Now {he} has {eq}.", "{He} has {eq} now.")
    ask = {
        "+": ("How many {things} does {N} have now?", "How many {things} does {he} have in all?"),
        "-": ("How many {things} does {N} have left?", "How many {things} does {he} still have?"),
        "*": ("How many {things} does {N} have in all?", "How many {things} does {he} have?"),
    }
    return Theme(things, starts, middles, endings, worked, ask)


def has(container: str, containers: str) -> tuple[Row, ...]:
    """How a story of owning may open."""
    return (
        row("", "{N} has {ks}.|{N} buys {ks} {at}.|{N} starts the day with {ks}."),
        row("*", f"{{N}} has {{a}} {containers} with {{ks}} in each {container}.|{{N}} has {{a}} {containers} of {{ks}}."),
        row("+", "{N} has {a} big {things} and {b} small {things}."),
        row("+", "{N} buys {a} {things} on {day} and {b} on {next}."),
    )


THEMES: dict[str, Theme] = {
    "food": owning(has("basket", "baskets"), (BUY, GET, GIVE, EAT), (SHARE, PACK, SELL, *COMPARE), FOOD),
    "things": owning(
        has("box", "boxes"),
        (BUY, GET, FIND, GIVE, LOSE),
        (
            SHARE,
            SELL,
            *COMPARE,
            row(
                "/",
                "{He} sorts them into piles of {k}.|{He} puts them in piles of {k}.",
                "{He} makes {eq}.",
                "How many piles does {he} make?|How many piles does {N} make?",
                "pile",
            ),
        ),
        THINGS,
    ),
    "baking": owning(
        (
            row("", "{N} bakes {ks}.|{N} bakes {ks} for a party."),
            row("*", "{N} bakes {a} trays of {ks}.|{N} bakes {a} trays with {ks} on each tray."),
            row("+", "{N} bakes {a} {things} in the morning and {b} in the evening."),
        ),
        (row("+", "{He} bakes {more}.|{F} brings {him} {more}."), GIVE, EAT, row("-", "{His} family eats {ks}.")),
        (
            SHARE,
            PACK,
            SELL,
            row(
                "/",
                "{He} puts {k} of them on each plate.",
                "{He} needs {eq}.|{He} fills {eq}.",
                "How many plates does {he} need?|How many plates does {N} fill?",
                "plate",
            ),
        ),
        BAKED,
    ),
    "garden": owning(
        (
            row("", "{N} plants {ks}.|{N} has {ks} in {his} garden."),
            row("*", "{N} plants {a} rows of {ks}.|{N} plants {a} rows with {ks} in each row."),
            row("+", "{N} plants {a} {things} on {day} and {b} on {next}."),
        ),
        (
            row("+", "{He} plants {more}.|{F} plants {more} for {him}."),
            row("-", "A rabbit eats {ks}.|A storm breaks {k} of them."),
            row("-", "{He} picks {ks} for {F}."),
        ),
        (
            SELL,
            row(
                "/",
                "{He} picks them all and puts {k} in each vase.",
                "{He} fills {eq}.|{He} needs {eq}.",
                "How many vases does {he} fill?|How many vases does {N} need?",
                "vase",
            ),
            row(
                "*",
                "Each {thing} needs {k} cups of water.",
                "They need {eq} of water.",
                "How many cups of water do they need?|How many cups of water does {N} need?",
                "cup",
            ),
        ),
        FLOWERS,
    ),
    "shop": Theme(
        ("dollar",),
        (
            row("", "{N} buys a {toy} for ${k}.|{N} buys a {toy} that costs ${k}."),
            row("*", "{N} buys {a} {toys} for ${k} each.|{N} buys {a} {toys}. Each {toy} costs ${k}."),
            row("+", "{N} buys a {toy} for ${a} and a {toy2} for ${b}."),
        ),
        (
            row("+", "{He} also buys a {toy} for ${k}.|Then {he} buys a {toy} for ${k}."),
            row("-", "The shop takes ${k} off the price.|{He} uses a coupon for ${k} off."),
        ),
        (
            row(
                "k-",
                "{He} pays with ${k}.|{He} gives the shop ${k}.",
                "{He} gets {eq} back.",
                "How much change does {he} get?|How many dollars does {N} get back?",
            ),
            row(
                "/",
                "{k} friends share the cost equally.",
                "Each friend pays {eq}.",
                "How much does each friend pay?|How many dollars does each friend pay?",
            ),
            row("+", "{F} spends ${k} more than {N}.", "{F} spends {eq}.", "How much does {F} spend?"),
            row("-", "{F} spends ${k} less than {N}.", "{F} spends {eq}.", "How much does {F} spend?"),
            row("*", "{F} spends {k} times as much as {N}.", "{F} spends {eq}.", "How much does {F} spend?"),
        ),
        ("{N} pays {eq}.", "{He} spends {eq}.", "The cost is {eq}."),
        dict.fromkeys("+-*", ("How much does {N} pay in all?", "How many dollars does {he} spend?")),
    ),
    "savings": Theme(
        ("dollar",),
        (
            row("", "{N} has ${k}.|{N} has ${k} in {his} piggy bank."),
            row("*", "{N} saves ${k} a week for {a} weeks.|{N} earns ${k} an hour and works for {a} hours."),
            row("+", "{N} earns ${a} on {day} and ${b} on {next}."),
        ),
        (
            row("+", "{F} gives {him} ${k}.|{He} gets ${k} from {F}."),
            row("+", "{He} earns ${k} more by {job}."),
            row("-", "{He} buys a {toy} for ${k}.|{He} spends ${k} on a {toy}."),
            row("-", "{He} gives ${k} to {F}."),
        ),
        (
            row(
                "k-",
                "{He} wants a {toy} that costs ${k}.|A {toy} costs ${k}.",
                "{He} needs {e} more {unit}.",
                "How much more money does {he} need for the {toy}?",
            ),
            row(
                "/",
                "{He} spends it all on {toys} that cost ${k} each.|{He} buys {toys} for ${k} each with all of it.",
                "{He} buys {eq}.",
                "How many {toys} does {he} buy?",
                "toy",
            ),
            row(
                "/",
                "{He} shares the money equally among {k} friends.",
                "Each friend gets {eq}.",
                "How much money does each friend get?|How many dollars does each friend get?",
            ),
            row("*", "{F} has {k} times as much money as {N}.", "{F} has {eq}.", "How much money does {F} have?"),
            row("+", "{F} has ${k} more than {N}.", "{F} has {eq}.", "How much money does {F} have?"),
            row("-", "{F} has ${k} less than {N}.", "{F} has {eq}.", "How much money does {F} have?"),
        ),
        ("{N} has {eq}.", "Now {he} has {eq}.", "{He} has {eq} now."),
        {
            "+": ("How much money does {N} have now?", "How many dollars does {he} have in all?"),
            "-": ("How much money does {N} have left?", "How many dollars does {he} have left?"),
            "*": ("How much money does {N} have in all?", "How many dollars does {he} get?"),
        },
    ),
    "trip": Theme(
        ("mile",),
        (
            row("", "{N} walks {ks} on {day}.|{N} rides {his} bike for {ks}."),
            row("*", "{N} walks {ks} a day for {a} days.|{N} runs {ks} a day for {a} days."),
            row("+", "{N} walks {a} {things} on {day} and {b} on {next}."),
        ),
        (
            row("+", "Then {he} walks {more}.|After a rest, {he} walks {more}."),
            row("+", "Then {he} runs {more}.|With {F}, {he} runs {more}."),
        ),
        (
            row(
                "k-",
                "{He} wants to go {ks} in all.|{His} goal is {ks}.",
                "{He} has {eq} to go.",
                "How many miles does {he} still have to go?|How many more miles does {N} have to go?",
            ),
            row(
                "*",
                "Each mile takes {him} {k} minutes.",
                "{He} needs {eq}.",
                "How many minutes does {he} need?|How many minutes does it take {him}?",
                "minute",
            ),
            row(
                "/",
                "{He} goes {ks} an hour.",
                "{He} needs {eq}.",
                "How many hours does {he} need?|How many hours does it take {him}?",
                "hour",
            ),
            row("+", "{F} goes {more} than {N}.", "{F} goes {eq}.", "How many miles does {F} go?"),
            row("-", "{F} goes {fewer} than {N}.", "{F} goes {eq}.", "How many miles does {F} go?"),
            row("*", "{F} goes {k} times as far as {N}.", "{F} goes {eq}.", "How many miles does {F} go?"),
        ),
        ("{N} goes {eq}.", "In all, {he} goes {eq}.", "So far, {he} goes {eq}."),
        dict.fromkeys("+*", ("How many miles does {N} go in all?", "How far does {he} go in all?")),
    ),
    "reading": Theme(
        ("page",),
        (
            row("", "{N} has a book of {ks}.|{N} starts a book that has {ks}."),
            row("*", "{N} has {a} books of {ks} each.|{N} wants to read {a} books. Each book has {ks}."),
            row("+", "{N} has to read {a} {things} for school and {b} for fun."),
        ),
        (
            row("-", "{He} reads {ks} on the bus.|{He} reads {ks} at home."),
            row("-", "{He} reads {ks} {where} with {F}.|{He} reads {ks} to {F}."),
        ),
        (
            row(
                "/",
                "From now on, {he} reads {ks} a day.|Each day from now on, {he} reads {ks}.",
                "{He} needs {eq}.",
                "How many days does {he} need to finish?|How many days does it take {him} to finish?",
                "day",
            ),
            row(
                "*",
                "Each page takes {him} {k} minutes.|{He} needs {k} minutes for each page.",
                "{He} needs {eq}.",
                "How many minutes does {he} need to finish?|How many minutes does it take {him} to finish?",
                "minute",
            ),
        ),
        ("{N} has {eq} to read.", "Now {he} has {eq} to read.", "{He} has to read {eq}."),
        {
            "-": ("How many pages are left?", "How many pages does {he} still have to read?"),
            **dict.fromkeys("+*", ("How many pages does {N} have to read?", "How many pages are there in all?")),
        },
        start=range(10, 41),
    ),
    "ride": Theme(
        ("person",),
        (
            row("", "There are {ks} on a {ride}.|A {ride} leaves the {stop} with {ks}."),
            row("*", "A train has {a} cars with {ks} in each car.|Each of the {a} cars of a train has {ks} in it."),
            row("+", "There are {a} children and {b} adults on a {ride}."),
        ),
        (
            row("+", "At the {stop}, {k} more people get on.|Then {k} more people get on."),
            row("-", "At the {stop}, {k} people get off.|Then {k} people get off."),
        ),
        (
            row(
                "*",
                "Each person pays ${k}.|A ticket costs ${k} for each person.",
                "They pay {eq}.",
                "How much do they pay in all?|How many dollars do they pay in all?",
                "dollar",
            ),
            row(
                "/",
                "They get off and share taxis, {k} in each taxi.",
                "They need {eq}.",
                "How many taxis do they need?|How many taxis do they fill?",
                "taxi",
            ),
            row("/", "They sit in rows of {k}.", "They fill {eq}.", "How many rows do they fill?", "row"),
        ),
        ("It carries {eq}.", "Now it carries {eq}.", "It has {eq} on it."),
        {
            "-": ("How many people are left?", "How many people stay on?"),
            **dict.fromkeys("+*", ("How many people are there in all?", "How many people are there now?")),
        },
        person=False,
        least=2,
    ),
    "class": Theme(
        ("child",),
        (
            row("", "There are {ks} in a class.|A class has {ks}."),
            row("*", "A class has {a} tables with {ks} at each table.|In a class, {ks} sit at each of {a} tables."),
            row("+", "A class has {a} boys and {b} girls.|There are {a} boys and {b} girls in a class."),
        ),
        (
            row("+", "Then {k} new children join the class.|On {day}, {k} new children come."),
            row("-", "Then {k} children go home.|On {day}, {k} children are sick at home."),
        ),
        (
            row(
                "/",
                "The teacher makes teams of {k}.|They play in teams of {k}.",
                "There are {e} {unit}.|This makes {eq}.",
                "How many teams does the teacher make?|How many teams are there?",
                "team",
            ),
            row(
                "*",
                "Each child gets {k} {gifts}.|The teacher gives {k} {gifts} to each child.",
                "They get {eq}.",
                "How many {gifts} do they get in all?|How many {gifts} does the teacher need?",
                "gift",
            ),
        ),
        ("The class has {eq}.", "Now the class has {eq}.", "That makes {eq}."),
        {
            "-": ("How many children are left?", "How many children are still there?"),
            **dict.fromkeys("+*", ("How many children are there in all?", "How many children are in the class now?")),
        },
        person=False,
        least=2,
    ),
}

STORIES = tuple(THEMES)
SOLVE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else None,  # None: does not come out even
}


@lru_cache(maxsize=None)
def numbers(op: str, total: int, left: int, least: int) -> Sequence[int]:
    """The numbers k that a row with `op` may bring when `left` more steps follow; empty if the row cannot stand here.

    Totals stay in 1 + left .. 50 - left, so that a chain never runs dry before its last step.
    """
    if op == "+":
        return range(least, min(20, 50 - left - total) + 1)
    if op == "-":
        return range(least, min(20, total - 1 - left) + 1)
    if op == "k-":  # not 2 * total: k - total would equal total, and a skipped step would go unseen
        return [k for k in range(total + 1, min(total + 20, 60) + 1) if k != 2 * total]
    if op == "*":
        return range(2, 7) if 2 <= total <= 10 else ()
    return [k for k in range(2, 7) if total % k == 0 and total // k <= 10]


class Draw(dict):
    """The slots of one story, drawn from `rng` the moment a template names them, and the price in nats so far."""

    def __init__(self, rng):
        self.rng, self.nats, self.used = rng, 0.0, []

    def choice(self, options):
        self.nats += math.log(len(options))
        return options[self.rng.randrange(len(options))]

    def fill(self, templates: Sequence[str]) -> str:
        return self.choice(templates).format_map(self)

    def __missing__(self, key: str) -> str:
        if key == "day":
            i = self.choice(range(4))
            self["day"], self["next"] = DAYS[i], DAYS[i + 1]
        elif key == "F":
            self["F"] = self.choice([name for name in self.friends if name not in self.used])
            self.used.append(self["F"])
        elif key in ("toy", "toys", "toy2"):
            slot = "toy2" if key == "toy2" else "toy"
            self[slot] = self.choice([toy for toy in POOLS["toy"] if toy not in self.used])
            self.used.append(self[slot])
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
        """One row with its numbers -> told sentence, worked line ("" without an operator), result."""
        for slot in ("F", "day", "next", "toy", "toys", "toy2", "gift", "gifts", *POOLS):
            self.pop(slot, None)  # each row draws its own
        thing = self["thing"]
        self.update(a=a, b=b, k=k, ks=count(k, thing))
        self.update(more=count(k, thing, "more "), fewer=count(k, thing, "fewer "))
        told = self.fill(row.told)
        if not row.op:
            return told, "", k
        op = row.op[-1]
        c = SOLVE[op](a, b)
        unit = row.unit or thing
        unit = self[unit] if unit in ("toy", "gift") else unit
        self.update(e=f"{a} {op} {b} = {c}", eq=f"{a} {op} {b} = {count(c, unit)}")
        self["unit"] = unit if c == 1 else PLURAL[unit]
        return told, self.fill(row.worked or theme.worked), c


class Tale(NamedTuple):
    story: str
    beats: list[tuple[str, str]]  # (told, worked); worked is "" where nothing is computed
    asks: tuple[str, ...]  # templates of the closing question
    answer: int


def tell(draw: Draw, level: int) -> Tale:
    """One walk through the tables with `level` arithmetic steps."""
    story = draw.choice(STORIES)
    theme = THEMES[story]
    if theme.person:
        draw.hero()
    draw["thing"] = draw.choice(theme.things)
    draw["things"] = PLURAL[draw["thing"]]

    row = draw.choice(theme.starts)
    if row.op == "*":
        a = draw.choice(range(2, 7))
        b = draw.choice(range(2, min(10, 48 // a) + 1))
    elif row.op == "+":
        a, b = draw.choice(range(3, 21)), draw.choice(range(3, 21))
    else:
        a, b = 0, draw.choice(theme.start)
    told, worked, total = draw.beat(theme, row, a, b, k=b)
    beats = [(told, worked)]

    for left in reversed(range(level - bool(row.op))):  # steps still to come after this one
        rows = theme.middles if left else theme.middles + theme.endings
        row = draw.choice([row for row in rows if numbers(row.op, total, left, theme.least)])
        k = draw.choice(numbers(row.op, total, left, theme.least))
        a, b = (k, total) if row.op == "k-" else (total, k)
        told, worked, total = draw.beat(theme, row, a, b, k)
        beats.append((told, worked))
    return Tale(story, beats, row.ask or theme.ask[row.op], total)


# ---------------------------------------------------------------------------------------------------------------
# What is made of a story: problems, wrong solutions, narratives.


SPLITS = ("train", "valid", "test")
SPLIT_OF_DIGIT = ("train",) * 8 + ("valid", "test")


def check_split(split: str, splits: Sequence[str] = SPLITS) -> None:
    if split not in splits:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(splits)}")


def split_of(text: str) -> str:
    """ "train" (80 %), "valid" or "test" (10 % each), by a hash of the text alone; case and blanks do not count."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest()
    return SPLIT_OF_DIGIT[int.from_bytes(digest, "big") % 10]


def word_problem(index: int, split: str = "train", levels: Sequence[int] = (1, 2), seed: int = 0) -> Problem:
    """Problem number `index` of an endless list: random access, nothing stored. Its level is levels[index % len]."""
    check_split(split)
    if not levels or not set(levels) <= {1, 2, 3}:
        raise DataError(f"levels must be some of 1, 2, 3, not {levels!r}")
    level = levels[index % len(levels)]
    rng = random.Random(f"problem/{seed}/{split}/{index}")
    while True:  # 1.25 tries for train, 10 for valid and test
        draw = Draw(rng)
        tale = tell(draw, level)
        question = " ".join([told for told, _ in tale.beats]) + " " + draw.fill(tale.asks)
        if split_of(question) == split:
            break
    lines = [worked for _, worked in tale.beats if worked]
    return Problem(question, "\n".join([*lines, f"#### {tale.answer}"]), str(tale.answer), level, tale.story)


def word_problems(split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[Problem]:
    """n problems with n different questions; problem i has level levels[i % len(levels)]. A longer list only adds."""
    problems, seen = [], set()
    for i in range(n):
        index = i
        while (problem := word_problem(index, split, levels, seed)).question in seen:
            index += len(levels) * 10**9  # the same level, and an index that no list reaches
        seen.add(problem.question)
        problems.append(problem)
    return problems


CORRUPTIONS = ("wrong_sum", "skipped_step", "wrong_operator", "missing_answer")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)((?: more)?) (\w+)")


def corrupt(problem: Problem, kind: str, rng: random.Random) -> str:
    """A wrong solution of a built-in problem, for preference pairs: one error, then sound work on top of it.

    wrong_sum       one result is off by 1, 2 or 10:          "Tom has 5 + 3 = 9 apples."
    wrong_operator  one step computes something else:         "Tom has 5 - 3 = 2 apples."
    skipped_step    one line is missing. Only from level 2 on; at level 1 nothing would be left: DataError
    missing_answer  no `#### ANSWER` line

    The error is carried into every later line and the final answer, so that a reward model cannot find it by a
    number that does not match the next line. The final answer is never the right one.
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
    """The solution with result `value` in step i, through `op` (None: the line is left out), and what follows.

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
    return f"{line[: step.start()]}{a} {op} {b} = {count(c, noun, step[5].lstrip() + ' ' * bool(step[5]))}{line[step.end() :]}"


def narrative(rng: random.Random) -> tuple[str, float]:
    """A story told with its arithmetic, three to six sentences -> (text, −log p(text) in nats, exact)."""
    draw = Draw(rng)
    scene = f"It is a {draw.choice(WEATHER)} {draw.choice(HOURS)}."
    tale = tell(draw, draw.choice((1, 2)))
    return " ".join([scene, *(part for beat in tale.beats for part in beat if part)]), draw.nats


def narrative_texts(split: str, n: int, seed: int = 0) -> list[str]:
    """n narratives of one split, as the generator draws them: repeats are kept, or the entropy would change."""
    check_split(split)
    texts = []
    for i in range(n):
        rng = random.Random(f"narrative/{seed}/{split}/{i}")
        while split_of(text := narrative(rng)[0]) != split:
            pass
        texts.append(text)
    return texts


def narrative_entropy(n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Entropy of a narrative in nats: the mean of n exact −log p, and its standard error. Includes the end marker."""
    rng = random.Random(f"entropy/{seed}")
    nats = np.array([narrative(rng)[1] for _ in range(n)])
    return float(nats.mean()), float(nats.std(ddof=1) / math.sqrt(n))


# ---------------------------------------------------------------------------------------------------------------
# The verifier.

NUMBER = re.compile(
    r"\s*([-+−]?)\s*\$?\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s?[%$]?[.,;!]?(?:\s(.*))?\s*"
)


def extract_answer(text: str) -> str | None:
    r"""The answer that a completion commits to, as a canonical decimal string; None if it commits to none.

    Read is what stands after the marker `####` up to the end of that line.

    "#### 18"  "####18"                     -> "18"
    "#### 1,234"                            -> "1234"    commas only where thousands have them: "#### 1,2" -> None
    "#### $5."  "#### 50%"  "#### -$7"      -> "5" "50" "-7"    $, % and a final full stop do not count
    "#### 3.50"  "#### 18.0"  "#### .5"     -> "3.5" "18" "0.5"
    "#### 007"  "#### -0"                   -> "7" "0"
    "#### 18 apples"  "#### $2.50 per day." -> "18" "2.5"       words after the number are not read
    "#### 5 or 6"  "#### 1/2"  "#### 1 2"   -> None      exactly one number must stand on the line
    "####"  "#### five"  "#### x = 5"       -> None      and it comes first; glued letters ("5k", "1e3") are None
    "#### 5\n#### 5"                        -> "5"       several markers that agree
    "#### 5 #### 7"  "#### 5\n####"         -> None      markers that differ, or one that cannot be read
    "The answer is 5."                      -> None      no marker

    The last two rows matter in reinforcement learning: a policy that may list its guesses will.
    """
    answers = set()
    for piece in text.split("####")[1:]:
        match = NUMBER.fullmatch(re.split(r"[\r\n]", piece, maxsplit=1)[0])
        if not match or any(char.isnumeric() for char in match[3] or ""):
            return None
        answers.add(canonical(match[1].replace("−", "-") + match[2].replace(",", "")))
    return answers.pop() if len(answers) == 1 else None


def canonical(number: str) -> str:
    """ "3.50" -> "3.5", "-0" -> "0", "007" -> "7"; exact, however long (no float, no rounding to a context)."""
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same number; None or "" is nobody's answer, not even its own."""
    try:
        return Decimal(a or "nan") == Decimal(b or "nan")
    except InvalidOperation:
        return False
