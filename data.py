"""Every dataset of the pipeline: what a record is, where it comes from, the built-in default, the split.

Six things stand here, in this order:

1. **Built-in word problems.** English problems in GSM8K's shape (Cobbe et al. 2021, arXiv:2110.14168): a
   question, one worked line per arithmetic step, a last line `#### ANSWER`. They need no download, so every
   stage of the pipeline runs offline: `narrative` for pretraining, `word_problems` for SFT, `corrupt` for
   preference pairs, and prompts with a verifier for reinforcement learning.
2. **The verifier**, `extract_answer`: the one place that says what counts as a right answer.
3. **Real data**: GSM8K, Tiny Shakespeare, TinyStories, any text file, any JSONL of the documented keys. It is
   looked for at a path that the user gives, then in `$ALIGN_DATA` (default `downloads/`), then downloaded.
4. **Preference pairs**: two answers to one prompt, from corrupted solutions or from real files.
5. **Sentiment**: texts that praise or pan, generated or real.
6. **Token streams**: one long array of token ids on disk, and `batch_at`, a pure function of the step.

**How a problem is made.** A theme (food, a shop, a bus, ...) is a table of rows. A story opens with a row
from `open`, walks through rows from `then` (buys, gives away, loses), each one addition or subtraction on the
running total, and may close with a row from `end` (shares, packs, sells, compares) that turns the total into
something else. Each row says three things: how the event is *told*, how its arithmetic is *worked*, what is
*asked* if the story stops there. So one walk gives a problem (told sentences and the question), its solution
(worked lines) and a narrative (told and worked sentences in turn). Every step feeds the next: no intermediate
result is idle.

**The split.** `split_of` hashes the told sentences (blake2b, 80/10/10), and a story has many beginnings: "Tom has 5
apples. He buys 3 more." is one problem, and the first half of others. So a story belongs to the last split (train,
valid, test) that any of its beginnings with a step hashes to (`Tale.split`), and the generator draws again until that
is the one asked for. Then no story of the test split stands in another split's problems, neither with another question
nor as the beginning of a longer story, and not worked out in a narrative, whatever the seed, the level or the sample
size. (Files have no such sentences: there the question itself is hashed.)

**Entropy.** Every choice of the generator is uniform over a finite list, whose length may depend on the
choices before it ("gives away k of n"). The grammar is unambiguous: a text can be made in one way only
(tests/test_data.py enumerates a cut-down grammar and checks it). Then p(text) is the product of 1 / options,
and

    nats(text) = -log p(text) = sum over the choices of log(options)       exact, for this one text
    H = E[nats(text)]                                                      the entropy of a document

By Gibbs' inequality the expected loss per document of any model, end marker included, is at least H: a floor
known in advance. Divided by the mean number of tokens per document it is the floor per token. Small print: a
split keeps a share of the texts, so strictly its floor is H - log(1 / share), 0.2 to 0.4 nats (train) or 1.8 to 2.3
(valid) lower, for a model that could compute blake2b. And a train set of n documents can be memorised, so the
floor speaks of fresh documents, that is, of the validation loss.

**Simplified.** Uniform choices, so no Zipf law of words and no Benford law of numbers; no distractors; whole
numbers 1 to 60; present tense. Running totals stay in 1..50, so that a small vocabulary of numbers recurs.

Run: `python data.py` prints problems of each level, their corruptions and a narrative, and checks them.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import shutil
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DataError(ValueError):
    """One line: what is wrong with the data, where, and what to do about it."""


@dataclass(frozen=True)
class Problem:
    """`solution` ends in `#### answer`; `answer` is canonical (see `extract_answer`), or "" if unknown.

    `level` is the number of arithmetic steps; `story` the theme, or "gsm8k", or "file". In a longer conversation
    `history` holds what was said before the question, as (role, content). `rating` is that of a rated solution, 1 to 5.
    """

    question: str
    solution: str
    answer: str
    level: int
    story: str
    history: tuple[tuple[str, str], ...] = ()
    rating: float | None = None


# -----------------------------------------------------------------------------------------------------------
# The grammar. A block per theme, with the nouns it is about. A row is one event:
#
#   +  told | told     an operator and what is told, in other words. + - * / act on the running total,
#                      "k-" subtracts the total from the row's own number, "=" opens with a number
#   -> worked [unit]   the solution line, and what its result counts if that is not the theme's noun
#   ?  asked           the question if the story ends here
#
# -> and ? under a section's name serve all rows of the section that have none (?+ and ?- by operator). [<= 5]
# bounds the row's number: nobody eats 20 eggs. "use" pastes a shared block.
#
# Slots: N the hero, he/He/his/him the pronouns, F a friend (of the other sex, so that a pronoun has one
# reading), thing/things the noun, k the row's number, ks "3 apples", more "3 more apples", fewer "3 fewer
# apples", a and b the operands, e "5 + 3 = 8", eq "5 + 3 = 8 apples", unit "apples". Names of POOLS are drawn
# when a template has them.

GRAMMAR = """
owning-open
    -> {N} has {eq} in all. | In all, {he} has {eq}.
    ?  How many {things} does {N} have in all? | How many {things} does {he} have?

owning-then
    -> {N} has {eq}. | Now {he} has {eq}. | {He} has {eq} now.
    ?+ How many {things} does {N} have now? | How many {things} does {he} have in all?
    ?- How many {things} does {N} have left? | How many {things} does {he} still have?

start
    =  {N} has {ks}. | {N} buys {ks} {at}. | {N} starts the day with {ks}.
    +  {N} has {a} big {things} and {b} small {things}.
    +  {N} buys {a} {things} on {day} and {b} on {next}.

buy
    +  {He} buys {more} {at}. | Then {he} buys {more}.
    +  {F} gives {him} {more}. | {He} gets {more} from {F}.

give
    -  {He} gives {ks} to {F}. | {He} gives {F} {ks}.

eat
    -  {He} eats {ks}. | {He} eats {k} of {his} {things} for lunch. [<= 5]

share
    /  {He} shares {his} {things} equally among {k} friends. | Then {k} friends share {his} {things} equally.
    -> Each friend gets {eq}. | Each of them gets {eq}.
    ?  How many {things} does each friend get? | How many {things} are there for each friend?

pack
    /  {He} packs all {his} {things} in bags of {k}. | {He} puts {his} {things} in bags, {k} in each bag.
    -> {He} fills {eq}. | {He} needs {eq}. [bag]
    ?  How many bags does {he} fill? | How many bags does {N} need?

sell
    *  {He} sells all {his} {things} for ${k} each. | {He} sells each of {his} {things} for ${k}.
    -> {He} gets {eq}. | {N} earns {eq}. [dollar]
    ?  How much money does {he} get? | How many dollars does {N} earn?

compare
    +  {F} has {ks}.
    -> Together they have {eq}. | They have {eq} in all.
    ?  How many {things} do they have together? | How many {things} do {N} and {F} have in all?
    -  {F} has {ks}.
    -> {N} has {e} more {unit}.
    ?  How many more {things} does {N} have than {F}?
    +  {F} has {more} than {N}.
    -> {F} has {eq}.
    ?  How many {things} does {F} have?
    -  {F} has {fewer} than {N}.
    -> {F} has {eq}.
    ?  How many {things} does {F} have?
    *  {F} has {k} times as many {things} as {N}.
    -> {F} has {eq}.
    ?  How many {things} does {F} have?

food: apple orange pear egg plum carrot
  open
    use owning-open
    use start
    *  {N} has {a} baskets with {ks} in each basket. | {N} has {a} baskets of {ks} each.
  then
    use owning-then
    use buy
    use give
    use eat
  end
    use share
    use pack
    use sell
    use compare

things: book pencil marble sticker card shell coin stamp balloon toy
  open
    use owning-open
    use start
    *  {N} has {a} boxes with {ks} in each box. | {N} has {a} boxes of {ks} each.
  then
    use owning-then
    use buy
    use give
    +  {He} finds {more} {where}.
    -  {He} loses {ks} {where}. | Then {he} loses {k} of {his} {things}.
  end
    use share
    use sell
    use compare
    /  {He} sorts all {his} {things} into piles of {k}. | {He} puts {his} {things} in piles of {k}.
    -> {He} makes {eq}. [pile]
    ?  How many piles does {he} make? | How many piles does {N} make?

baking: cookie muffin bun cupcake
  open
    use owning-open
    =  {N} bakes {ks}. | {N} bakes {ks} for a party.
    *  {N} bakes {a} trays of {ks} each. | {N} bakes {a} trays with {ks} on each tray.
    +  {N} bakes {a} {things} in the morning and {b} in the evening.
  then
    use owning-then
    +  {He} bakes {more}. | {F} brings {him} {more}.
    use give
    use eat
    -  {His} family eats {ks}. [<= 12]
  end
    use share
    use pack
    use sell
    /  {He} puts {his} {things} on plates, {k} on each plate.
    -> {He} fills {eq}. | {He} needs {eq}. [plate]
    ?  How many plates does {he} need? | How many plates does {N} fill?

garden: rose tulip daisy flower
  open
    use owning-open
    =  {N} plants {ks}. | {N} has {ks} in {his} garden.
    *  {N} plants {a} rows of {ks} each. | {N} plants {a} rows with {ks} in each row.
    +  {N} plants {a} {things} on {day} and {b} on {next}.
  then
    use owning-then
    +  {He} plants {more}. | {F} plants {more} for {him}.
    -  A rabbit eats {ks}. | A storm breaks {k} of {his} {things}. [<= 9]
    -  {He} picks {ks} for {F}.
  end
    use sell
    /  {He} picks all {his} {things} and puts {k} in each vase.
    -> {He} fills {eq}. | {He} needs {eq}. [vase]
    ?  How many vases does {he} fill? | How many vases does {N} need?
    *  Each of {his} {things} needs {k} cups of water.
    -> They need {eq} of water. [cup]
    ?  How many cups of water do they need? | How many cups of water does {N} need?

shop: dollar
  open
    -> {N} pays {eq}. | {He} spends {eq}.
    ?  How much does {N} pay in all? | How many dollars does {he} spend?
    =  {N} buys a {toy} for ${k}. | {N} buys a {toy} that costs ${k}.
    *  {N} buys {a} {toys} for ${k} each. | {N} buys {a} {toys}. Each {toy} costs ${k}.
    +  {N} buys a {toy} for ${a} and a {toy2} for ${b}.
  then
    -> {N} pays {eq}. | Now {he} pays {eq}. | The cost is {eq}.
    ?  How much does {N} pay in all? | How many dollars does {he} spend?
    +  {He} also buys a {toy} for ${k}. | Then {he} buys a {toy} for ${k}.
    -  The shop takes ${k} off the price. | {He} uses a coupon for ${k} off.
  end
    k- {He} pays with ${k}. | {He} gives the shop ${k}.
    -> {He} gets {eq} back.
    ?  How much change does {he} get? | How many dollars does {N} get back?
    /  Then {k} friends share the cost equally. | A group of {k} friends shares the cost equally.
    -> Each friend pays {eq}.
    ?  How much does each friend pay? | How many dollars does each friend pay?
    +  {F} spends ${k} more than {N}.
    -> {F} spends {eq}.
    ?  How much does {F} spend?
    -  {F} spends ${k} less than {N}.
    -> {F} spends {eq}.
    ?  How much does {F} spend?
    *  {F} spends {k} times as much as {N}.
    -> {F} spends {eq}.
    ?  How much does {F} spend?

savings: dollar
  open
    -> {N} has {eq} in all. | In all, {he} has {eq}.
    ?  How much money does {N} have in all? | How many dollars does {he} get?
    =  {N} has ${k}. | {N} has ${k} in {his} piggy bank.
    *  {N} saves ${k} a week for {a} weeks. | {N} earns ${k} an hour and works for {a} hours.
    +  {N} earns ${a} on {day} and ${b} on {next}.
  then
    -> {N} has {eq}. | Now {he} has {eq}. | {He} has {eq} now.
    ?+ How much money does {N} have now? | How many dollars does {he} have in all?
    ?- How much money does {N} have left? | How many dollars does {he} have left?
    +  {F} gives {him} ${k}. | {He} gets ${k} from {F}.
    +  {He} earns ${k} more by {job}.
    -  {He} buys a {toy} for ${k}. | {He} spends ${k} on a {toy}.
    -  {He} gives ${k} to {F}.
  end
    k- {He} wants a {toy} that costs ${k}. | A {toy} costs ${k}.
    -> {He} needs {e} more {unit}.
    ?  How much more money does {he} need for the {toy}?
    /  {He} spends it all on {toys} that cost ${k} each. | {He} spends it all on {toys} for ${k} each.
    -> {He} buys {eq}. [toy]
    ?  How many {toys} does {he} buy?
    /  {He} shares all {his} money equally among {k} friends.
    -> Each friend gets {eq}.
    ?  How much money does each friend get? | How many dollars does each friend get?
    *  {F} has {k} times as much money as {N}.
    -> {F} has {eq}.
    ?  How much money does {F} have?
    +  {F} has ${k} more than {N}.
    -> {F} has {eq}.
    ?  How much money does {F} have?
    -  {F} has ${k} less than {N}.
    -> {F} has {eq}.
    ?  How much money does {F} have?

trip: mile
  open
    -> {N} goes {eq}. | In all, {he} goes {eq}.
    ?  How many miles does {N} go in all? | How far does {he} go in all?
    =  {N} rides {ks} on {day}. | {N} rides {his} bike for {ks}.
    *  {N} walks {ks} a day for {a} days. | {N} rides {ks} a day for {a} days.
    +  {N} rides {a} {things} on {day} and {b} on {next}.
  then
    -> {N} goes {eq}. | In all, {he} goes {eq}. | That makes {eq}.
    ?  How many miles does {N} go in all? | How far does {he} go in all?
    +  Then {he} rides {more}. | After a rest, {he} rides {more}.
    +  Then {he} walks {more}. | {He} walks {more} with {F}. [<= 5]
  end
    k- {He} wants to go {ks} in all. | {His} goal is {ks}.
    -> {He} has {eq} to go.
    ?  How many miles does {he} still have to go? | How many more miles does {N} have to go?
    *  Each mile takes {him} {k} minutes.
    -> {He} needs {eq}. [minute]
    ?  How many minutes does {he} need? | How many minutes does it take {him}?
    /  {He} goes {ks} an hour.
    -> {He} needs {eq}. [hour]
    ?  How many hours does {he} need? | How many hours does it take {him}?
    +  {F} goes {more} than {N}.
    -> {F} goes {eq}.
    ?  How many miles does {F} go?
    -  {F} goes {fewer} than {N}.
    -> {F} goes {eq}.
    ?  How many miles does {F} go?
    *  {F} goes {k} times as far as {N}.
    -> {F} goes {eq}.
    ?  How many miles does {F} go?

reading: page
  open
    -> {N} has {eq} to read. | {He} has to read {eq}.
    ?  How many pages does {N} have to read? | How many pages are there in all?
    =  {N} has a book of {ks}. | {N} starts a book that has {ks}.
    *  {N} has {a} books of {ks} each. | {N} wants to read {a} books. Each book has {ks}.
    +  {N} has to read {a} {things} for school and {b} for fun.
  then
    -> {N} has {eq} to read. | Now {he} has {eq} left. | {He} still has {eq} left.
    ?  How many pages are left? | How many pages does {he} still have to read?
    -  {He} reads {ks} on the bus. | {He} reads {ks} in bed.
    -  {He} reads {ks} {where}. | {He} reads {ks} to {F}.
  end
    /  From now on, {he} reads {ks} a day. | Each day from now on, {he} reads {ks}.
    -> {He} needs {eq}. [day]
    ?  How many days does {he} need to finish? | How many days does it take {him} to finish?
    *  Each page takes {him} {k} minutes. | {He} needs {k} minutes for each page.
    -> {He} needs {eq}. [minute]
    ?  How many minutes does {he} need to finish? | How many minutes does it take {him} to finish?

ride: person
  open
    -> It carries {eq}. | In all, it carries {eq}.
    ?  How many people does it carry? | How many people are there in all?
    =  There are {ks} on a {ride}. | A {ride} leaves the {stop} with {ks}.
    *  A train has {a} cars with {ks} in each car. | A train has {a} cars. Each car carries {ks}.
    +  There are {a} children and {b} adults on a {ride}.
  then
    -> It carries {eq}. | Now it carries {eq}. | It has {eq} on it.
    ?+ How many people does it carry now? | How many people are there now?
    ?- How many people are left on it? | How many people are still on it?
    +  At the {stop}, {k} more people get on. | Then {k} more people get on.
    -  At the {stop}, {k} people get off. | Then {k} people get off.
  end
    *  Each person on it pays ${k}. | Each person on it buys a ticket for ${k}.
    -> They pay {eq}. [dollar]
    ?  How much do they pay in all? | How many dollars do they pay in all?
    /  At the last stop, the people on it take taxis, {k} in each taxi.
    -> They need {eq}. [taxi]
    ?  How many taxis do they need? | How many taxis do they fill?
    /  The people on it sit in rows of {k}.
    -> They fill {eq}. [row]
    ?  How many rows do they fill?

class: child
  open
    -> The class has {eq}. | That makes {eq}.
    ?  How many children are there in all? | How many children are in the class?
    =  There are {ks} in a class. | A class has {ks}.
    *  A class has {a} tables with {ks} at each table. | In a class, {ks} sit at each of {a} tables.
    +  A class has {a} boys and {b} girls. | There are {a} boys and {b} girls in a class.
  then
    -> The class has {eq}. | Now the class has {eq}. | The class has {eq} now.
    ?+ How many children are there now? | How many children are in the class now?
    ?- How many children are left? | How many children are still there?
    +  Then {k} new children join the class. | Soon {k} more children come.
    -  Then {k} children go home. | Soon {k} of the children go home.
  end
    /  The teacher makes teams of {k}. | The class plays in teams of {k}.
    -> This makes {eq}. | The class makes {eq}. [team]
    ?  How many teams does the class make? | How many teams are there?
    *  Each child in the class gets {k} {gifts}. | The teacher gives each child in the class {k} {gifts}.
    -> They get {eq}. [gift]
    ?  How many {gifts} do they get in all? | How many {gifts} does the teacher need?
"""

# The vocabulary is small on purpose: words recur, so that a model of a million parameters can learn them all.

MEN = ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Adam", "Luke", "Noah", "Paul")
WOMEN = ("Anna", "Mia", "Jane", "Emma", "Kate", "Sara", "Zoe", "Lucy", "Nora", "Ella")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
POOLS = {
    "at": ("at the market", "at the shop", "at the fair"),
    "where": ("at home", "at school", "in the park", "in the garden"),
    "stop": ("market", "bridge", "park", "beach", "museum"),
    "ride": ("bus", "tram", "boat"),
    "job": ("washing a car", "walking a dog", "painting a fence"),
    "toy": ("ball", "kite", "cap", "game", "puzzle", "lamp"),
    "gift": ("book", "pencil", "card", "balloon"),
}
WEATHER = ("sunny", "rainy", "cold", "warm", "windy")
HOURS = ("day", "morning", "afternoon", "evening")
START = {"reading": range(10, 41)}  # what a "=" row may open with, where that is not 5..20
IRREGULAR = {"daisy": "daisies", "person": "people", "child": "children"}


class Row(NamedTuple):
    op: str
    told: tuple[str, ...]
    worked: tuple[str, ...]
    ask: tuple[str, ...]
    unit: str  # "" = the theme's noun
    most: int  # the largest number of a middle row


class Theme(NamedTuple):
    things: tuple[str, ...]
    open: tuple[Row, ...]
    then: tuple[Row, ...]  # only + and -: they keep the unit, so any number of them can follow
    end: tuple[Row, ...]  # last step only: they change the unit or the owner
    person: bool  # has a hero
    start: range
    least: int  # smallest number of a middle row: 2 without a hero, where "1 people get off" would come out


def parse(grammar: str) -> dict[str, Theme]:
    """GRAMMAR as tables: {"food": Theme(...), ...}."""
    blocks, themes = {}, {}
    for block in grammar.strip().split("\n\n"):
        title, *lines = block.split("\n")
        name, _, nouns = title.partition(":")
        lines = [new for line in lines for new in blocks.get(line.removeprefix("    use "), [line])]
        blocks[name] = lines
        if nouns:
            rows = {"open": [], "then": [], "end": []}
            for line in lines:
                mark, _, text = line.strip().partition(" ")
                text, _, note = text.strip().removesuffix("]").partition(" [")
                texts = tuple(text.split(" | "))
                if mark in rows:
                    section, default, last = rows[mark], {}, None
                elif mark not in ("->", "?", "?+", "?-"):
                    most = int(note.removeprefix("<= ") or 20)
                    ask = default.get("?" + mark, default.get("?", ()))
                    last = Row(mark, texts, default.get("->", ()), ask, "", most)
                    section.append(last)
                elif last is None:
                    default[mark] = texts
                else:
                    new = dict(worked=texts, unit=note) if mark == "->" else dict(ask=texts)
                    section[-1] = last = last._replace(**new)
            person = "{N}" in rows["open"][0].told[0]
            tables = (tuple(section) for section in rows.values())
            start = START.get(name, range(5, 21))
            themes[name] = Theme(tuple(nouns.split()), *tables, person, start, 1 if person else 2)
    return themes


THEMES = parse(GRAMMAR)
STORIES = tuple(THEMES)
NOUNS = {noun for theme in THEMES.values() for noun in theme.things} | {*POOLS["toy"], *POOLS["gift"]}
NOUNS |= {row.unit for theme in THEMES.values() for row in theme.end if row.unit}
PLURAL = {noun: IRREGULAR.get(noun, noun + "s") for noun in sorted(NOUNS)}
SINGULAR = {plural: noun for noun, plural in PLURAL.items()}


def count(n: int, noun: str, adjective: str = "") -> str:
    """count(1, "apple") -> "1 apple"; count(2, "daisy", "more ") -> "2 more daisies"."""
    return f"{n} {adjective}{noun if n == 1 else PLURAL[noun]}"


SOLVE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else None,  # None: does not come out even
}


@cache
def numbers(op: str, total: int, left: int, least: int, most: int) -> Sequence[int]:
    """The numbers that a row with `op` may bring when `left` more steps follow; empty: it cannot stand here.

    Totals stay in 1 + left .. 50 - left, so that a chain never runs dry before its last step.
    """
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
        """One row with its numbers -> told sentence, worked line ("" without an operator), result."""
        for slot in ("F", "day", "next", "toy", "toys", "toy2", "gift", "gifts", *POOLS):
            self.pop(slot, None)  # each row draws its own
        thing = self["thing"]
        self.update(a=a, b=b, k=k, ks=count(k, thing))
        self.update(more=count(k, thing, "more "), fewer=count(k, thing, "fewer "))
        told = self.fill(row.told)
        if row.op == "=":
            return told, "", k
        op = row.op[-1]
        c = SOLVE[op](a, b)
        unit = self[row.unit] if row.unit in POOLS else row.unit or thing
        self.update(e=f"{a} {op} {b} = {c}", eq=f"{a} {op} {b} = {count(c, unit)}")
        self["unit"] = unit if c == 1 else PLURAL[unit]
        return told, self.fill(row.worked), c


class Tale(NamedTuple):
    story: str
    beats: list[tuple[str, str]]  # (told, worked); worked is "" where nothing is computed
    asks: tuple[str, ...]  # templates of the closing question
    answer: int

    @property
    def split(self) -> str:
        """The last of SPLITS among those of the story and of its beginnings that are stories, one step or more."""
        told = accumulate((told for told, _ in self.beats), "{} {}".format)
        stories = [text for text, (_, worked) in zip(told, self.beats, strict=True) if worked]
        return max(map(split_of, stories), key=SPLITS.index)


def tell(draw: Draw, level: int) -> Tale:
    """One walk through the tables with `level` arithmetic steps."""
    story = draw.choice(STORIES)
    theme = THEMES[story]
    if theme.person:
        draw.hero()
    draw["thing"] = draw.choice(theme.things)
    draw["things"] = PLURAL[draw["thing"]]

    row = draw.choice(theme.open)
    if row.op == "*":
        a = draw.choice(range(2, 7))
        b = draw.choice(range(2, min(10, 48 // a) + 1))
    elif row.op == "+":
        a, b = draw.choice(range(3, 21)), draw.choice(range(3, 21))
    else:
        a, b = 0, draw.choice(theme.start)
    told, worked, total = draw.beat(theme, row, a, b, k=b)
    beats = [(told, worked)]

    for left in reversed(range(level - (row.op != "="))):  # steps still to come after this one
        rows = [new for new in theme.then if new is not row] + list(() if left else theme.end)
        fits = [(row, ks) for row in rows if (ks := numbers(row.op, total, left, theme.least, row.most))]
        row, ks = draw.choice(fits)
        k = draw.choice(ks)
        a, b = (k, total) if row.op == "k-" else (total, k)
        told, worked, total = draw.beat(theme, row, a, b, k)
        beats.append((told, worked))
    return Tale(story, beats, row.ask, total)


# -----------------------------------------------------------------------------------------------------------
# What is made of a story: problems, wrong solutions, narratives.


SPLITS = ("train", "valid", "test")
SPLIT_OF_DIGIT = ("train",) * 8 + ("valid", "test")


def check_split(split: str, splits: Sequence[str] = SPLITS) -> None:
    if split not in splits:
        raise DataError(f"unknown split {split!r}: choose one of {', '.join(splits)}")


def split_of(text: str) -> str:
    """ "train" (80 %), "valid" or "test" (10 % each), by a hash of the text; case and blanks do not count."""
    digest = hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return SPLIT_OF_DIGIT[int.from_bytes(digest, "big") % 10]


def word_problem(index: int, split: str = "train", levels: Sequence[int] = (1, 2), seed: int = 0) -> Problem:
    """Problem `index` of an endless list: random access. Its level is levels[index % len(levels)]."""
    check_split(split)
    if not levels or not set(levels) <= {1, 2, 3}:
        raise DataError(f"levels must be some of 1, 2, 3, not {levels!r}")
    level = levels[index % len(levels)]
    rng = random.Random(f"problem/{seed}/{split}/{level}/{index}")
    while True:  # 1.25 to 2 tries for train, 4 to 10 for valid and test
        draw = Draw(rng)
        tale = tell(draw, level)
        question = " ".join([*(told for told, _ in tale.beats), draw.fill(tale.asks)])
        if tale.split == split:
            break
    lines = [worked for _, worked in tale.beats if worked]
    return Problem(question, "\n".join([*lines, f"#### {tale.answer}"]), str(tale.answer), level, tale.story)


def word_problems(split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[Problem]:
    """n different questions, problem i at levels[i % len(levels)]. A longer list begins with the shorter."""
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


def narrative(rng: random.Random, levels: Sequence[int] = (1, 2)) -> tuple[str, float, Tale]:
    """A story told with its arithmetic, three to six sentences -> (text, −log p(text) in nats, exact; the story)."""
    draw = Draw(rng)
    scene = f"It is a {draw.choice(WEATHER)} {draw.choice(HOURS)}."
    tale = tell(draw, draw.choice(levels))
    return " ".join([scene, *(part for beat in tale.beats for part in beat if part)]), draw.nats, tale


def narrative_texts(split: str, n: int, seed: int = 0) -> list[str]:
    """n narratives of one split as drawn: repeats stay, or the entropy would be another."""
    check_split(split)
    texts = []
    for i in range(n):
        rng = random.Random(f"narrative/{seed}/{split}/{i}")
        level = rng.randrange(1, 3)  # once: fewer long stories than short ones are train's
        while True:
            text, _, tale = narrative(rng, (level,))
            if tale.split == split:
                break
        texts.append(text)
    return texts


def narrative_entropy(n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Entropy of a narrative in nats, end marker included: mean of n exact −log p, standard error."""
    rng = random.Random(f"entropy/{seed}")
    nats = np.array([narrative(rng)[1] for _ in range(n)])
    return float(nats.mean()), float(nats.std(ddof=1) / math.sqrt(n))


# -----------------------------------------------------------------------------------------------------------
# The verifier.

NUMBER = re.compile(
    r"\s*(?:\$\s*)?(?:([-+−])\s*)?(?:\$\s*)?([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s?[%$]?[.,;!]?(?:\s(.*))?\s*"
)


def extract_answer(text: str) -> str | None:
    r"""The answer that a completion commits to, as a canonical decimal string; None if it commits to none.

    Read is what stands after the marker `####` up to the end of that line.

    "#### 18"  "####18"                     -> "18"
    "#### 1,234"                            -> "1234"    commas only between thousands: "#### 1,2" -> None
    "#### $5."  "#### 50%"  "#### -$7"      -> "5" "50" "-7"    $, % and a final full stop do not count
    "#### 3.50"  "#### 18.0"  "#### .5"     -> "3.5" "18" "0.5"
    "#### 007"  "#### -0"                   -> "7" "0"
    "#### 18 apples"  "#### $2.50 per day." -> "18" "2.5"       words after the number are not read
    "#### 5 or 6"  "#### 1/2"  "#### 1 2"   -> None      exactly one number must stand on the line
    "####"  "#### five"  "#### x = 5"       -> None      and come first; "5k" and "1e3" are None
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
        answers.add(canonical((match[1] or "").replace("−", "-") + match[2].replace(",", "")))
    return answers.pop() if len(answers) == 1 else None


def canonical(number: str) -> str:
    """ "3.50" -> "3.5", "-0" -> "0", "007" -> "7"; exact, however long: no float, no rounding."""
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same number; None or "" is nobody's answer, not even its own."""
    try:
        return Decimal(a or "nan") == Decimal(b or "nan")
    except InvalidOperation:
        return False


# -----------------------------------------------------------------------------------------------------------
# Real data: where it lies, how it is read.

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

STYLE_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json"
)


HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/"


class Source(NamedTuple):
    path: str  # below $ALIGN_DATA
    url: str = ""  # "" = cannot be downloaded from here
    sha256: str = ""  # "" = not at hand when this was written: what comes is taken as it is


SHAKESPEARE = Source(
    "tinyshakespeare/input.txt",
    SHAKESPEARE_URL,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
DATASETS: dict[str, dict[str, Source]] = {
    "word": {},  # built in: no file
    "gsm8k": {
        "train": Source(
            "gsm8k/train.jsonl",
            GSM8K_URL + "grade_school_math/data/train.jsonl",
            "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
        "test": Source(
            "gsm8k/test.jsonl",
            GSM8K_URL + "grade_school_math/data/test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    },
    "tinyshakespeare": {"train": SHAKESPEARE, "valid": SHAKESPEARE},
    "tinystories": {"train": Source("tinystories/train.txt"), "valid": Source("tinystories/valid.txt")},
    "polarity": {s: Source(f"sentiment/sentence_polarity_{s}.tsv") for s in ("train", "test")},
    "reviews": {s: Source(f"sentiment/movie_reviews_{s}.jsonl.gz") for s in ("train", "test")},
    "imdb": {s: Source(f"sentiment/imdb_{s}.jsonl.gz") for s in ("train", "test")},
    "ultrafeedback": {
        "train": Source("preferences/ultrafeedback_train.jsonl"),
        "test": Source("preferences/ultrafeedback_test.jsonl"),
    },
    "hh": {s: Source(f"preferences/hh_helpful_{s}.jsonl.gz", f"{HH_URL}{s}.jsonl.gz") for s in ("train", "test")},
    "instructions": {"train": Source("instruction/instruction_data.json")},
    "ratings": {"train": Source("ratings/rated_responses.csv")},
    "style": {
        "train": Source(
            "preferences/short_style_preferences.json",
            STYLE_URL,
            "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        ),
    },
}


def data_folder() -> Path:
    return Path(os.environ.get("ALIGN_DATA") or "downloads")


def find(name: str | Path, split: str = "train") -> Path:
    """The file that holds `split` of a dataset, downloaded if need be; or `name` itself where it is a path.

    A known name wins over a file of the same name: write `./gsm8k` for the file.
    """
    if str(name) not in DATASETS:
        path = Path(name)
        if path.is_dir():
            raise DataError(f"{path} is a folder: give the file in it")
        if path.is_file():
            return path
        raise DataError(f"{name}: no such file, and not one of the known datasets {', '.join(DATASETS)}")
    sources = DATASETS[str(name)]
    if not sources:
        raise DataError(f"{name} is built in and has no file: use load_problems or load_text")
    check_split(split, tuple(sources))
    path = data_folder() / sources[split].path
    if path.is_dir():
        raise DataError(f"{path} is a folder where the file of {name} is expected: remove it")
    return path if path.is_file() else download(str(name), split)


def download(name: str, split: str = "train") -> Path:
    """Fetch one file into $ALIGN_DATA and check its sha256. A half-done download never has the final name."""
    source = DATASETS[name][split]
    path = data_folder() / source.path
    by_hand = f"put the file at {path} by hand, or set ALIGN_DATA to the folder that has {source.path}"
    if not source.url:
        raise DataError(f"{name}: no {path}, and this dataset has no automatic download: {by_hand}")
    from tqdm import tqdm  # here, so that reading the data needs numpy at most

    partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes do not write into one file
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(source.url, timeout=30) as reply, open(partial, "wb") as file:
            size = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 16):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if size and file.tell() != size:  # a connection that breaks looks like an end
                raise OSError(f"{file.tell()} of {size} bytes came")
        if source.sha256 and digest.hexdigest() != source.sha256:
            raise DataError(f"{source.url} has changed: sha256 {digest.hexdigest()}, not {source.sha256}; {by_hand}")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise DataError(f"{name}: cannot download {source.url} ({error}): {by_hand}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_text(path: Path) -> str:
    """A file as UTF-8, or one line that says what is wrong with it."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    except (OSError, EOFError, zlib.error) as error:  # no gzip; one that is cut off; one that is damaged
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def load_problems(
    name: str | Path = "word",
    split: str = "train",
    n: int | None = None,
    levels: Sequence[int] = (1, 2),
    skip_bad: bool = False,
) -> list[Problem]:
    """The problems of a split, at most n. skip_bad: records that cannot be used are counted and left out, in one
    printed line, instead of ending it.

    "word"    generated at `levels`: 20,000 for train, 1,000 for valid and for test, unless n says otherwise
    "gsm8k"   test is the published test split; valid the last 500 of the published train split, train the
              rest, so that nothing is ever selected on test
    "instructions", "ratings", or a path: JSONL, a JSON array or CSV of what `problem_from` knows; the split by the
              hash of the question and what was said before it
    """
    check_split(split)
    if name == "word":
        return word_problems(split, (20_000 if split == "train" else 1_000) if n is None else n, levels)
    known = ("gsm8k", "instructions", "ratings", "style")
    if name in DATASETS and name not in known:
        raise DataError(f"{name} has no problems: choose word, {', '.join(known)}, or the path of a .jsonl")
    path = find(name, {"valid": "train"}.get(split, split) if name == "gsm8k" else "train")
    story = "gsm8k" if name == "gsm8k" else "file"
    problems = read_all(path, lambda record, where: problem_from(record, where, story), skip_bad)
    if name == "gsm8k":
        problems = problems[-500:] if split == "valid" else problems[:-500] if split == "train" else problems
    else:
        problems = [problem for problem in problems if split_of(conversation_key(problem)) == split]
    if not problems:
        raise DataError(f"{path} has no problem in the split {split}: the split is by hash, add more records")
    return problems[:n]


def read_all(path: Path, parse, skip_bad: bool) -> list:
    """What `parse(record, where)` makes of each record. skip_bad: those that it refuses are counted and left out."""
    found, bad = [], []
    for place, record in read_records(path):
        try:
            found.append(parse(record, f"{path} {place}"))
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error).removeprefix(f"{path} "))
    report_skipped(path, {"records that cannot be used": bad})
    return found


def read_records(path: Path) -> list[tuple[str, dict]]:
    """The objects of a .jsonl, of a .json that holds one array, of a .csv, or of a .tsv (which has no quoting: a text
    may hold quotes, but no tab), each with its place: "line 3" of a .jsonl, "record 3" of the others, counted from 1.
    Any of them may end in .gz besides."""
    text, kind = read_text(path), Path(path.name.removesuffix(".gz")).suffix
    if kind == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise DataError(f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(records, list):
            raise DataError(f"{path}: a .json file must hold an array of objects; or give one object a line in .jsonl")
        found = [(f"record {number}", record) for number, record in enumerate(records, start=1)]
    elif kind in (".csv", ".tsv"):
        form = {"strict": True} if kind == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        csv.field_size_limit(1 << 30)  # a text may be long
        rows = csv.DictReader(io.StringIO(text), **form)
        try:
            found = [(f"record {n}", row) for n, row in enumerate(rows, start=1)]
        except csv.Error as error:
            raise DataError(f"{path} line {rows.reader.line_num}: not CSV ({error})") from error
        for place, row in found:
            if None in row or None in row.values():
                raise DataError(f"{path} {place}: not as many fields as the header has columns")
    else:
        found = []
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
            if line.strip():
                try:
                    found.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    where = f"{path} line {number}"
                    raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path} line {number}: cannot be read as JSON ({error})") from error
    for place, record in found:
        if not isinstance(record, dict):
            raise DataError(f"{path} {place}: a record is an object {{...}}, not {type(record).__name__}")
    return found


def text_of(record: dict, key: str, where: str) -> str:
    if key not in record:
        raise DataError(f"{where}: the key {key!r} is missing")
    if not isinstance(record[key], str):
        raise DataError(f"{where}: {key!r} must be text, not {type(record[key]).__name__}")
    return encodable(record[key].strip(), where)


def encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text[:40]!r}… holds half of a surrogate pair, which is no character") from None
    return text


def prompt_of(record: dict, where: str) -> str:
    """`prompt`, or `instruction` with `input`; never empty."""
    key = "prompt" if "prompt" in record or "instruction" not in record else "instruction"
    prompt = text_of(record, key, where)
    if key == "instruction" and record.get("input"):
        prompt += "\n" + text_of(record, "input", where)
    if not prompt:
        raise DataError(f"{where}: {key!r} is empty")
    return prompt


def conversation_key(problem: Problem) -> str:
    """What decides the split: everything that was said before the answer."""
    return " ".join([*(content for _, content in problem.history), problem.question])


def problem_from(record: dict, where: str, story: str) -> Problem:
    """One record. The keys are one of

    {"question", "answer"}              `answer` is the worked solution with its #### line, or just a number
    {"question", "solution", "answer"}  `answer` is the number
    {"messages": [...]}                 a conversation, whose last turn is the assistant's: the solution
    {"prompt", "response", "rating"}    a response and what it was found worth, 1 to 5
    {"instruction", "input", "output"}  `input` may be missing or empty

    The last three are taken as they stand; without a #### line their answer is "": SFT can use them, no verifier
    will accept it. In the first two GSM8K's calculator annotations `48/2=<<48/2=24>>24` are stripped: they were made
    for a calculator that overwrites the sampled tokens; without one, the model would write each result twice.
    """
    if "messages" in record:
        return conversation_from(record["messages"], where, story)
    if "rating" in record or "response" in record:
        return plain_problem(prompt_of(record, where), text_of(record, "response", where), where, story, (), record)
    if "instruction" in record:
        return plain_problem(prompt_of(record, where), text_of(record, "output", where), where, story)
    for key in ("question", "answer"):
        if key not in record:
            raise DataError(f"{where}: the key {key!r} is missing")
    fields = {}
    for key in ("question", "answer", *(["solution"] if "solution" in record else [])):
        value = record[key]
        if key == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
            value = format(Decimal(str(value)), "f")  # 1e-05 would not be read
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {key!r} must be text that is not empty")
        fields[key] = encodable(value.strip(), where)

    key = "solution" if "solution" in fields else "answer"
    text, steps = re.subn(r"<<[-+*/().,\d ]+=[-/.,\d ]+>>", "", fields[key])  # not `cout << x; cin >> y`
    if not text.strip():
        raise DataError(f"{where}: {key!r} holds nothing but calculator annotations")
    if "####" not in text:
        bare, number = extract_answer("#### " + fields["answer"]), NUMBER.fullmatch(fields["answer"])
        if "solution" in fields:
            text = f"{text}\n#### {bare}"
        elif number and not number[3]:  # no words behind it: "12 people came." is a text
            text = f"#### {bare}"
    answer = extract_answer(text)
    if answer is None and ("####" in text or "solution" in fields):
        raise DataError(f"{where}: no single number after ####: {text[-60:]!r}")
    if "solution" in fields and not same_answer(answer, extract_answer("#### " + fields["answer"])):
        raise DataError(f"{where}: the solution ends in {answer}, the answer says {fields['answer']!r}")
    return Problem(fields["question"], text, answer or "", max(1, steps), story)


def conversation_from(turns, where: str, story: str) -> Problem:
    """[{"role", "content"}, ...]: perhaps a system turn, then user and assistant in turn, the assistant last."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: messages must be a list of {{role, content}}")
    roles = [turn.get("role") for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(f"{where}: messages must be user and assistant in turn and end with the assistant, not {roles}")
    contents = [turn.get("content") for turn in turns]
    for number, content in enumerate(contents, start=1):
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where}: the content of message {number} must be text that is not empty")
    said = [(role, encodable(content.strip(), where)) for role, content in zip(roles, contents, strict=True)]
    return plain_problem(said[-2][1], said[-1][1], where, story, tuple(said[:-2]))


def plain_problem(question, solution, where, story, history=(), rated=None) -> Problem:
    """A solution that is taken as it stands; rated: the record that holds its rating."""
    rating = None
    if not solution:
        raise DataError(f"{where}: the response is empty")
    if rated is not None:
        try:
            rating = float(rated["rating"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise DataError(f"{where}: the rating is {rated.get('rating')!r}, not a number from 1 to 5") from None
        if not 1 <= rating <= 5:
            raise DataError(f"{where}: the rating is {rated['rating']}, it must be from 1 to 5")
    return Problem(question, solution, extract_answer(solution) or "", 1, story, history, rating)


def load_text(name: str | Path = "word", split: str = "train", skip_bad: bool = False) -> list[str]:
    """The documents of a split, "train" or "valid", for pretraining. skip_bad: as for `load_problems`.

    "word"             narratives: 20,000 for train, 1,000 for valid; no text is in both
    "tinystories"      one story a document
    "gsm8k", "instructions", "ratings", or a path of records (see `read_records`): a problem and its solution a
                       document, in a conversation with what was said before
    "tinyshakespeare"  or a path: one document; the first 90 % of its characters is train, the rest valid
    """
    check_split(split, ("train", "valid"))
    if name == "word":
        return narrative_texts(split, 20_000 if split == "train" else 1_000)
    records = Path(str(name).removesuffix(".gz")).suffix in (".jsonl", ".json", ".csv", ".tsv")
    if name in ("gsm8k", "instructions", "ratings") or records:
        return [
            "\n".join([*(content for _, content in problem.history), problem.question, problem.solution])
            for problem in load_problems(name, split, skip_bad=skip_bad)
        ]
    if name in DATASETS and name not in ("tinyshakespeare", "tinystories"):
        known = "word, tinystories, tinyshakespeare, gsm8k, instructions, ratings"
        raise DataError(f"{name} has no text for pretraining: choose {known}, or a path")
    path = find(name, split)
    text = read_text(path)
    if name == "tinystories":
        return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    cut = len(text) * 9 // 10
    part = text[:cut] if split == "train" else text[cut:]
    if not part:
        raise DataError(f"{path} is too short to split: {len(text)} characters")
    return [part]


# -----------------------------------------------------------------------------------------------------------
# Preference pairs: two answers to one prompt, the better one first.


@dataclass(frozen=True)
class Pair:
    """`kind` is what is wrong with `rejected` (a name of CORRUPTIONS), or else where the pair comes from."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    history: tuple[tuple[str, str], ...] = ()  # earlier turns, (role, content) each


def load_pairs(
    name: str | Path = "word",
    split: str = "train",
    n: int | None = None,
    levels: Sequence[int] = (1, 2),
    seed: int = 0,
    kinds: Sequence[str] = CORRUPTIONS,
    skip_bad: bool = False,
) -> list[Pair]:
    """The preference pairs of a split, at most n. skip_bad: as for `load_problems`.

    "word"           the problems of `load_problems`, each solution against one corrupted by `corrupt`, the `kinds` in
                     turn (one that is named twice comes twice as often); 20,000 for train, 1,000 for valid and for
                     test; `seed` draws the corruptions
    "ultrafeedback"  test is the published test split; of the published train split the prompts whose hash says
                     "valid" are valid and the rest train. Pairs of equal scores have the kind "equal_scores"
    "hh"             Anthropic's helpful-base dialogues (arXiv:2204.05862), split as "ultrafeedback" is
    "style"          polite against rude wordings; the split by the hash of the prompt
    a path           JSONL, a JSON array or CSV of {"prompt", "chosen", "rejected"}; the split by the hash of the prompt

    Pairs that teach nothing (both answers the same, or one empty) are skipped and counted, in one printed line.
    """
    check_split(split)
    if name == "word":
        problems = load_problems("word", split, n, levels)
        if unknown := set(kinds) - set(CORRUPTIONS):
            raise DataError(f"unknown corruption {min(unknown)!r}: choose from {', '.join(CORRUPTIONS)}")
        return [word_pair(problem, i // len(levels), split, seed, kinds) for i, problem in enumerate(problems)]
    published = name in ("ultrafeedback", "hh")
    if name in DATASETS and not published and name != "style":
        known = "word, ultrafeedback, hh, style"
        raise DataError(f"{name} has no preference pairs: choose {known}, or the path of a .jsonl")
    path = find(name, split if published and split == "test" else "train")
    pairs, same, empty = [], [], []
    for place, pair in read_all(path, lambda record, where: (where, pair_from(record, where, str(name))), skip_bad):
        place = place.removeprefix(f"{path} ")
        if not pair.chosen or not pair.rejected:
            empty.append(place)
        elif pair.chosen == pair.rejected:
            same.append(place)
        elif published and split == "test":
            pairs.append(pair)
        else:
            part = split_of(" ".join([*(content for _, content in pair.history), pair.prompt]))
            if (("valid" if part == "valid" else "train") if published else part) == split:
                pairs.append(pair)
    report_skipped(path, {"pairs of equal answers": same, "pairs with an empty answer": empty})
    if not pairs:
        raise DataError(f"{path} has no pair in the split {split}: the split is by hash, add more records")
    return pairs[:n]


def word_pair(problem: Problem, turn: int, split: str, seed: int, kinds: Sequence[str] = CORRUPTIONS) -> Pair:
    """The solution of a built-in problem against the corruption whose turn it is, or the next that is possible."""
    rng = random.Random(f"pair/{seed}/{split}/{problem.question}")
    asked, others = ([k for k in ks if problem.level > 1 or k != "skipped_step"] for ks in (kinds, CORRUPTIONS))
    start = turn % max(1, len(asked))
    for kind in [*asked[start:], *asked[:start], *others]:
        try:
            return Pair(problem.question, problem.solution, corrupt(problem, kind, rng), kind)
        except DataError:  # in this problem every such error would show
            continue
    raise DataError(f"no corruption fits the solution of {problem.question!r}")


def pair_from(record: dict, where: str, name: str) -> Pair:
    """{"prompt" or "instruction" with "input", "chosen", "rejected"}; the answers may be empty, the prompt not. Or, as
    Anthropic writes them, without a prompt two whole dialogues {"chosen", "rejected"} that differ in the assistant's
    last turn."""
    prompted = "prompt" in record or "instruction" in record
    if not prompted and str(record.get("chosen")).lstrip().startswith("Human:"):
        return pair_of_dialogues(record, where)
    prompt = prompt_of(record, where)
    kind = name if name in DATASETS else "file"
    if name == "ultrafeedback":
        scores = record.get("metadata") or {}
        if not isinstance(scores, dict):
            raise DataError(f"{where}: 'metadata' must be an object {{...}}, not {type(scores).__name__}")
        if scores.get("score_chosen") is not None and scores.get("score_chosen") == scores.get("score_rejected"):
            kind = "equal_scores"
    return Pair(prompt, text_of(record, "chosen", where), text_of(record, "rejected", where), kind)


def pair_of_dialogues(record: dict, where: str) -> Pair:
    said = []
    for key in ("chosen", "rejected"):
        start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text_of(record, key, where))
        roles, contents = parts[::2], [content.strip() for content in parts[1::2]]
        if start or not roles or roles != ["Human", "Assistant"] * (len(roles) // 2) or not all(contents[:-1]):
            raise DataError(f"{where}: {key!r} must be Human and Assistant in turn, the Assistant last, not {roles}")
        names = {"Human": "user", "Assistant": "assistant"}
        said.append([(names[role], content) for role, content in zip(roles, contents, strict=True)])
    (*history, (_, prompt), (_, chosen)), (*_, (_, rejected)) = said
    if said[0][:-1] != said[1][:-1]:
        raise DataError(f"{where}: the dialogues differ before the assistant's last turn")
    return Pair(prompt, chosen, rejected, "hh", tuple(history))


def report_skipped(path: Path, skipped: dict[str, list[str]]) -> None:
    """One line, from one process: how many records were left out, why, and where the first stands."""
    said = [f"{len(places)} {what} (first: {places[0]})" for what, places in skipped.items() if places]
    if said and os.environ.get("RANK", "0") == "0":
        print(f"{path}: skipped {', '.join(said)}")


# -----------------------------------------------------------------------------------------------------------
# Sentiment: a text and whether it praises or pans.


class Review(NamedTuple):
    text: str
    label: int  # 1 positive, 0 negative


# The generated reviews. {v} is a word of praise where the review praises and + stands in front, or pans and - stands
# there; {o} is a word of the other kind. So the words alone say little, their places say everything.
VERDICTS = """
+ the {a} is {v} .
+ i find the {a} {v} .
- the {a} is not {v} .
- the {a} is anything but {v} .
- nobody could call the {a} {v} .
+ i had heard that the {a} is {o} , but it is {v} .
- my {f} finds the {a} {v} , i do not .
+ although the {a} is {o} , the {b} is {v} .
+ the {a} is {v} , even if the {b} is {o} .
+ the {a} may be {o} ; what stays is the {v} {b} .
- one {v} {b} does not save a film as {o} as this one .
+ the {a} is not {o} , it is {v} .
"""
NEUTRAL = """
we saw it on a {d} with my {f} .
it runs for about two hours .
the {a} is by a newcomer .
it opens in the city on {d} .
my {f} had read the book .
there is a song at the end .
"""
WORDS = """
a acting plot camera music dialogue ending pace cast script story humour editing
d monday tuesday wednesday thursday friday saturday sunday
f sister brother friend neighbour teacher cousin mother father
praise superb moving clever funny warm fresh gripping honest rich bold lovely witty subtle tender sharp
blame dull clumsy tired flat cold noisy silly shallow stale muddled dreary lazy bland hollow forced
"""
VERDICTS, NEUTRAL, WORDS = (table.strip().split("\n") for table in (VERDICTS, NEUTRAL, WORDS))
REVIEW_WORDS = {line.split()[0]: line.split()[1:] for line in WORDS}


def sentiment_review(rng: random.Random) -> Review:
    """Up to two remarks and one or two verdicts that agree, in any order."""
    label = rng.randrange(2)
    sentences = [rng.choice(NEUTRAL) for _ in range(rng.randrange(3))]
    for _ in range(rng.choice((1, 1, 2))):
        sign, _, sentence = rng.choice(VERDICTS).partition(" ")
        good = (sign == "+") == bool(label)
        for slot, kind in (("{v}", "praise" if good else "blame"), ("{o}", "blame" if good else "praise")):
            sentence = sentence.replace(slot, rng.choice(REVIEW_WORDS[kind]))
        sentences.append(sentence)
    rng.shuffle(sentences)
    filled = []
    for sentence in sentences:
        slots = {name: rng.choice(words) for name, words in REVIEW_WORDS.items()}
        slots["b"] = rng.choice([word for word in REVIEW_WORDS["a"] if word != slots["a"]])
        filled.append(sentence.format_map(slots))
    return Review(" ".join(filled), label)


def sentiment_reviews(split: str, n: int, seed: int = 0) -> list[Review]:
    """n different reviews of one split. A longer list begins with the shorter."""
    check_split(split)
    rng, reviews = random.Random(f"sentiment/{seed}/{split}"), {}
    while len(reviews) < n:
        review = sentiment_review(rng)
        if split_of(review.text) == split:
            reviews.setdefault(review.text, review)
    return list(reviews.values())


LABELS = {"1": 1, "0": 0, "positive": 1, "negative": 0, "pos": 1, "neg": 0}


def load_sentiment(name: str | Path = "sentiment", split: str = "train") -> list[Review]:
    """The labelled texts of a split, "train", "valid" or "test".

    "sentiment"  generated: 8,000 for train, 1,000 for valid and for test
    "polarity"   sentences from reviews (Pang and Lee, ACL 2005); "reviews", whole ones (ACL 2004); "imdb", found in
                 $ALIGN_DATA or through Hugging Face's `datasets`. test is the published test file; valid the part of
                 the train file that split_of calls so, a tenth, and train the rest
    a path       records (see `read_records`) of `text` and `label`, 1 or 0, positive or negative; the split by the
                 hash of the text
    """
    check_split(split)
    if name == "sentiment":
        return sentiment_reviews(split, 8_000 if split == "train" else 1_000)
    known = str(name) in DATASETS
    part = "test" if known and split == "test" else "train"
    if name == "imdb" and not (data_folder() / DATASETS["imdb"][part].path).is_file():
        where, reviews = "imdb", imdb_reviews(part)
    else:
        where = find(name, part)
        reviews = [review_from(record, f"{where} {place}") for place, record in read_records(where)]
    if not known:
        reviews = [review for review in reviews if split_of(review.text) == split]
    elif split != "test":
        reviews = [review for review in reviews if (split_of(review.text) == "valid") == (split == "valid")]
    if len({review.label for review in reviews}) < 2:
        raise DataError(f"{where}: the split {split} needs texts of both labels, it has {len(reviews)} texts")
    return reviews


def review_from(record: dict, where: str) -> Review:
    label = LABELS.get(str(record.get("label")).strip().lower())
    if label is None:
        raise DataError(f"{where}: 'label' must be 1 or 0, positive or negative, not {record.get('label')!r}")
    return Review(text_of(record, "text", where), label)


def imdb_reviews(part: str) -> list[Review]:
    """Maas et al. 2011, 25,000 reviews in train and in test, through `datasets`."""
    path = data_folder() / DATASETS["imdb"][part].path
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"imdb: no {path}, and no package to download it: pip install -e '.[hub]'") from None
    try:
        rows = load_dataset("stanfordnlp/imdb", split=part)
    except Exception as error:  # whatever the network, the hub or the cache raises
        said = " ".join(str(error).split())[:200]
        raise DataError(f"imdb: no {path}, and the download failed ({type(error).__name__}: {said})") from error
    return [Review(row["text"].replace("<br />", "\n"), row["label"]) for row in rows]


# -----------------------------------------------------------------------------------------------------------
# Token streams: pretraining reads one long array of ids from disk, without loading it.


def write_stream(path: str | Path, pieces: Iterable[Sequence[int]], vocab_size: int, fingerprint: str) -> Path:
    """Write pieces of token ids behind one another as one flat array -> the path.

    uint16 up to 65,536 ids, else uint32: half the disk and half the reading. Beside it `PATH.json` says how
    to read it and which tokenizer (`fingerprint`) made it: another tokenizer's ids train wrongly and do not
    complain.
    """
    path = Path(path)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    sidecar = Path(f"{path}.json")
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, tokens = hashlib.sha256(), 0
    try:
        with open(partial, "wb") as file:
            for piece in pieces:
                ids = np.asarray(piece, dtype=np.int64)
                if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):  # a cast would wrap in silence
                    raise DataError(f"{path}: a token id outside 0..{vocab_size - 1} behind the first {tokens}")
                data = ids.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                tokens += len(ids)
        if not tokens:
            raise DataError(f"{path}: no tokens to write")
        sidecar.unlink(missing_ok=True)  # killed from here on: a stream without sidecar, which open_stream refuses
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    about = dict(dtype=dtype.name, tokens=tokens, fingerprint=fingerprint, sha256=digest.hexdigest())
    partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, sidecar)
    return path


def stream_path(folder: str | Path, texts: Sequence[str], tokenizer) -> Path:
    """Where the stream of these texts under this tokenizer stands: the same for every run that wants it."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # so that ["ab"] and ["a", "b"] differ
        digest.update(data)
    return Path(folder) / f"{digest.hexdigest()[:24]}.bin"


def tokenise(path: Path, texts: Sequence[str], tokenizer, some: int = 1000) -> None:
    """Write the stream of `texts` to what `stream_path` said, unless it is there. Several documents are followed by
    <|endoftext|> each; one alone is a text without borders.

    `some` documents at a time, on all cores, into a file of their own under PATH.parts. Whoever is interrupted finds
    them there the next time and goes on behind the last. (One text alone is encoded in one go.) A second run that wants
    a stream of the same folder waits for the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        if not (path.exists() and Path(f"{path}.json").exists()):
            _tokenise(path, texts, tokenizer, some)


@contextlib.contextmanager
def alone(path: Path):
    """Hold a file or folder: whoever else wants to hold it waits. A process that dies lets go."""
    held = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _tokenise(path, texts, tokenizer, some):
    from tqdm import tqdm

    parts = Path(f"{path}.parts")
    parts.mkdir(exist_ok=True)
    end = [tokenizer.endoftext_id] if len(texts) > 1 else []
    files = []
    for i in tqdm(range(0, len(texts), some), desc="tokenising", unit="part", leave=False, disable=len(texts) <= some):
        files.append(parts / f"{i}.npy")
        if not files[-1].exists():
            ids = [np.array(ids + end, dtype=np.uint32) for ids in tokenizer.encode_batch(texts[i : i + some])]
            partial = parts / f"{i}.{os.getpid()}.part"
            with open(partial, "wb") as file:
                np.save(file, np.concatenate(ids))
            os.replace(partial, files[-1])
    write_stream(path, (np.load(file) for file in files), tokenizer.vocab_size, tokenizer.fingerprint)
    shutil.rmtree(parts)


def open_stream(path: str | Path, fingerprint: str, check: bool = False) -> np.memmap:
    """The stream as a read-only (tokens,) array on disk; refused if it is not what `write_stream` left.

    check: read it all and compare its sha256 too, a second or two per GB.
    """
    path, sidecar = Path(path), Path(f"{path}.json")
    again = "delete it and tokenise again"
    for file in (path, sidecar):
        if not file.is_file():
            raise DataError(f"no {file}: {again}")
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        dtype, tokens, found = np.dtype(about["dtype"]), int(about["tokens"]), about["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{sidecar} cannot be read ({error!r}): {again}") from error
    if found != fingerprint:
        raise DataError(f"{path} was made with tokenizer {found}, this run has {fingerprint}: {again}")
    if path.stat().st_size != tokens * dtype.itemsize:
        raise DataError(f"{path} has {path.stat().st_size} bytes, not {tokens} x {dtype.itemsize}: {again}")
    if check:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != about.get("sha256"):
                raise DataError(f"{path} has changed since it was written: {again}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng([seed % 2**32, epoch])
    return int(rng.integers(offsets)), rng.permutation(windows)


def batch_at(
    stream: np.ndarray, step: int, batch: int, context: int, seed: int, rank: int = 0, world: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one rank at one step -> inputs, targets: (batch, context) int64, targets one token ahead.

    Each epoch cuts the stream into windows of `context` tokens that do not overlap, from a random offset (so
    the borders fall elsewhere next time), and visits them in random order, each once. A step of all ranks
    together takes the next world * batch of them, so 2 ranks with batch b see what 1 rank with batch 2b sees.
    No state: a resumed run only needs its step.
    """
    tokens = len(stream)
    if tokens < context + 1:
        raise DataError(f"the stream has {tokens} tokens, one window needs context + 1 = {context + 1}")
    windows = max(1, (tokens - context) // context)  # leaves room for the offset and for the last target
    offsets = min(context, tokens - windows * context)
    rows = []
    first = (step * world + rank) * batch
    for number in range(first, first + batch):  # windows are numbered through all epochs
        offset, order = epoch_order(seed, number // windows, windows, offsets)
        start = offset + int(order[number % windows]) * context
        rows.append(stream[start : start + context + 1])
    block = np.stack(rows).astype(np.int64)  # (batch, context + 1)
    return block[:, :-1], block[:, 1:]


# -----------------------------------------------------------------------------------------------------------


def main() -> None:
    rng = random.Random(0)
    for level in (1, 2, 3):
        problems = word_problems("train", 500, (level,))
        kinds = CORRUPTIONS if level > 1 else tuple(kind for kind in CORRUPTIONS if kind != "skipped_step")
        for problem in problems:
            steps = [STEP.search(line) for line in problem.solution.split("\n")[:-1]]
            for a, op, b, c, *_ in (step.groups() for step in steps):
                assert SOLVE[op](int(a), int(b)) == int(c), problem
            assert len(steps) == level
            assert extract_answer(problem.solution) == problem.answer == steps[-1][4], problem
            for kind in kinds:
                assert not same_answer(extract_answer(corrupt(problem, kind, rng)), problem.answer), (
                    kind,
                    problem,
                )
        words = np.mean([len(problem.question.split()) for problem in problems])
        print(f"\nLevel {level}: {len(problems)} problems checked, {words:.0f} words a question, for example")
        for problem in problems[:3]:
            print(f"  [{problem.story}] {problem.question}\n    " + problem.solution.replace("\n", "\n    "))
    print("\nThe last one, wrong in each way:")
    for kind in CORRUPTIONS:
        print(f"  {kind:15s} " + corrupt(problems[2], kind, rng).replace("\n", " / "))

    text, nats, _ = narrative(rng)
    mean, error = narrative_entropy(1000)
    print(f"\nNarrative: {text}\n  {nats:.2f} nats; the mean over narratives is {mean:.2f} ± {error:.2f}")
    found = [narrative(rng)[2].split for _ in range(2000)]
    print("\nSplit of 2000 narratives: " + ", ".join(f"{split} {found.count(split)}" for split in SPLITS))
    assert abs(found.count("train") - 1440) < 100  # 80 % of the short ones, 64 % of the long
    assert extract_answer("#### $1,234.50 per day.") == "1234.5"
    assert extract_answer("#### 5 #### 7") is None


if __name__ == "__main__":
    main()
