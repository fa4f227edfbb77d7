"""support/shifted.py: problems that differ from training in what their name says."""

import json
import re

from conftest import ROOT
from test_word_problems import worked

from data import load_problems
from evaluate import is_correct
from support.shifted import NEW_THINGS, SHIFTS, new_words, plural, shifted_problems
from support.word_problems import LANGUAGE, NAMES, other_words


def test_every_solution_verifies_and_no_question_is_one_of_training():
    training = {p.question for p in load_problems("word", "train", 5000, (1, 2))}
    for name in SHIFTS:
        problems = shifted_problems(name, 200)
        assert len(problems) == (50 if name == "by hand" else 200)
        assert all(is_correct(p.solution, p) for p in problems), name
        assert not training & {p.question for p in problems}
        assert len({p.question for p in problems}) == len(problems)


def test_more_steps_and_larger_numbers():
    assert {p.level for p in shifted_problems("more steps", 100)} == {3}
    largest = []
    for problem in shifted_problems("larger numbers", 300):
        results = worked(problem.solution)
        assert len(results) == problem.level <= 2
        largest.append(max(int(n) for n in re.findall(r"\d+", problem.question + problem.solution)))
    assert max(largest) <= 99
    assert sum(n > 50 for n in largest) > 0.85 * len(largest)


def test_a_story_that_cannot_go_on_is_drawn_again():
    """Problem 623 is the first of two steps that opens where no row can follow."""
    assert len({p.question for p in shifted_problems("larger numbers", 630)}) == 630


def test_new_words_are_new_and_nothing_else_changes():
    table = new_words()
    assert not {word.lower() for word in table.values()} & LANGUAGE
    assert len(set(table.values())) == len(table)  # no two things become one
    assert set(table) > NAMES
    known = {re.sub(r"[A-Za-z]+", "", p.question): p for p in load_problems("word", "test", 600, (1, 2))}
    for problem in shifted_problems("new words", 300):
        old = known[re.sub(r"[A-Za-z]+", "", problem.question)]  # the same numbers in the same places
        assert problem.question != old.question
        words = re.findall(r"[A-Za-z]+", problem.question)
        assert not {*words} & {*table} - ({"book", "books"} if {"page", "pages"} & {*words} else set())
        assert problem.answer == old.answer
    assert other_words("Tom has 2 pears.", table) != "Tom has 2 pears."
    assert other_words("Tom has a book of 30 pages.", table) == "Otto has a book of 30 pages."  # it is read
    assert "book" not in other_words("Tom has 2 books.", table)
    assert [plural(noun) for noun in ("lily", "scarf", "drum")] == ["lilies", "scarves", "drums"]
    assert not [thing for thing in NEW_THINGS if thing.endswith(("s", "x", "ch"))]  # `plural` does not know these


IN_WORDS = {"half": 2, "twice": 2, "two": 2, "each hand": 2, "three": 3, "four": 4, "quarter": 4, "seven": 7, "week": 7}


def test_by_hand():
    """Each line of a solution is right, and follows from the question's numbers."""
    for line in (ROOT / "tests/handwritten.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        *steps, answer = record["answer"].split("\n")
        known = {*re.findall(r"\d+", record["question"])}
        known |= {str(n) for word, n in IN_WORDS.items() if word in record["question"].lower()}
        for step in steps:
            left, right = step.split(" = ")
            a, op, b = left.split()
            assert {a, b} <= known, record
            known.add(right)
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op] == int(
                right
            )
        assert answer == f"#### {right}"
