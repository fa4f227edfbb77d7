"""Tasks: problems that are generated here, and all that the stages ask about them. A task is a row of TASKS.

data.py makes records of a task's problems; the stages ask its row for the verifier and the rest. Data sets that lie in
files are in support/downloads.py.

A task of your own is a generator and a row of TASKS. Every stage takes it by its name. If a stage needs a checkpoint to
start from, that is trained on the task too, and the task's verifier judges the answers (tests/test_tasks.py has an
example; grpo.py wants --format_weight 0 where they do not end in `#### number`):

    def sums(split, n, levels, seed): ...          in support/sums.py: at most n tuples ("2 + 3?", "#### 5", "5"), no
                                                   question in two splits (support.splits.split_of says which)
    "sums": Task(problems=sums)                    python sft.py --data sums; python grpo.py --data sums
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from support import word_problems as word
from support.answers import extract_answer, same_answer
from support.errors import ConfigError, DataError


@dataclass(frozen=True)
class Task:
    """A task that every stage takes by its name in TASKS. Such a row needs `problems` alone.

    problems     (split, n, levels, seed) -> at most n different problems of a split (fewer if it has no more), as
                 tuples of data.Problem's first fields, (question, solution, answer) at least; no problem is in two
                 splits. `levels`: numbers of arithmetic steps, e.g. (1, 2)
    text         (split, n) -> n documents for pretraining; None: its problems, the question and the solution
    entropy      () -> nats per document of that text and their standard error, where they are known
    answer       text -> the answer that it commits to, or None
    same_answer  (a, b) -> whether two answers are the same; a problem's own solution must have the problem's answer
    keeps_story  (question, solution, text) -> whether an answer still uses the question's names and things; the reward
                 for the number does not check it
    corruptions  {kind of error: the fewest steps that a problem needs to have it}, the hardest to see first
    corrupt      (problem, kind, rng) -> a wrong solution, for preference pairs; DataError if there is none
    rename       text -> the same with other names, which should change no judgement
    pretrain     {field of pretrain.Config: value}, beside its defaults, for a start that a stage makes for itself
    sft          the same for sft.Config
    with_calls   solution -> the same with the calls of a calculator in it: Problem.calls
    micro_batch  completions in one forward pass of grpo.py's update: more where rows are short
    """

    problems: Callable | None = None
    text: Callable | None = None
    entropy: Callable | None = None
    answer: Callable = extract_answer
    same_answer: Callable = same_answer
    keeps_story: Callable | None = None
    corruptions: dict[str, int] = field(default_factory=dict)
    corrupt: Callable | None = None
    rename: Callable | None = None
    pretrain: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    with_calls: Callable | None = None
    micro_batch: int = 32


DEFAULT_TASK = "word"
LARGE_TASK = "word_large"  # numbers of up to four digits, for a model that has a calculator

_STORIES = {  # what both sizes of numbers have
    "keeps_story": word.keeps_story,
    "corruptions": word.CORRUPTIONS,
    "corrupt": word.corrupt,
    "rename": word.rename,
    "with_calls": word.with_calls,
}
TASKS = {
    DEFAULT_TASK: Task(
        problems=word.word_problems,
        text=word.narrative_texts,
        entropy=word.narrative_entropy,
        **_STORIES,
        micro_batch=128,
    ),
    LARGE_TASK: Task(problems=partial(word.word_problems, large=word.FOUR_DIGITS), text=word.worked_texts, **_STORIES),
}
FILE_DATA = Task(pretrain={"vocab_size": 2048, "model": {"context": 512}})  # real text: more words, longer windows


def task_of(name: str | Path) -> Task:
    """The row of a task; for every other data set one row, FILE_DATA."""
    return TASKS.get(str(name), FILE_DATA)


def has_verifier(name: str | Path) -> bool:
    """Whether every problem of a data set has an answer that can be checked."""
    return str(name) in TASKS or str(name) == "gsm8k"


def skipping(name: str | Path, skip_bad: bool) -> dict:
    """{"skip_bad": True} where that makes a difference, else {}: a task is generated and has no bad records."""
    return {"skip_bad": True} if skip_bad and str(name) not in TASKS else {}


def refuse_levels(config) -> None:
    """ConfigError if --levels is given with a data set that is no task: its problems have the levels that they have."""
    default = next(f.default_factory() for f in fields(config) if f.name == "levels")
    if str(config.data) not in TASKS and list(config.levels) != default:
        raise ConfigError(f"--levels has no effect with --data {config.data}, which is no task: leave it out")


def refuse_skip_bad(config) -> None:
    """ConfigError if --skip_bad is given where all data are generated: they have no bad records."""
    names = [str(getattr(config, "data", "")), *getattr(config, "text", ())]  # --text: of encoder.py
    if config.skip_bad and all(name in TASKS or name == "sentiment" for name in names):
        raise ConfigError(f"--skip_bad has no effect with --data {config.data}, which is generated: leave it out")


def refuse_unsound(name: str, problems: list, split: str, n: int) -> None:
    """DataError if the verifier of a task refuses the solution of one of its problems, or if the task gave none of the
    n that it was asked for."""
    task = TASKS[name]
    for problem in problems:
        answer = task.answer(problem.solution)
        if answer is None or not task.same_answer(answer, problem.answer):
            raise DataError(
                f"task {name}: its own solution of {problem.question[:60]!r} does not verify: it gives {answer!r}, the "
                f"answer is {problem.answer!r}"
            )
    if n and not problems:
        raise DataError(f"task {name} has no problem in the split {split}")


def corruption_kinds(name: str, kinds: Sequence[str] | None) -> list[str]:
    """The kinds of wrong solution that a task's pairs take in turn; None: all that it has. DataError if it has none, or
    not one of these."""
    known = TASKS[name].corruptions
    if not known:
        raise DataError(f"task {name} has no corrupted solutions to make pairs of: sample them")
    if unknown := set(kinds or ()) - set(known):
        raise DataError(f"unknown corruption {min(unknown)!r}: choose from {', '.join(known)}")
    return list(known if kinds is None else kinds)


def wrong_solutions(name: str, problems: list, n_levels: int, split: str, seed: int, kinds: list[str]) -> list:
    """-> (a wrong solution, its kind) of each data.Problem of a task: `kinds` in turn, or the next that the problem can
    have. One that can have none of them takes another kind; one line, on rank 0, counts these. n_levels: the levels of
    the problems alternate, so the turn changes after so many, and each level meets every kind."""
    wrong, others = [], Counter()
    for i, problem in enumerate(problems):
        rng = random.Random(f"pair/{seed}/{split}/{problem.question}")
        wrong.append(corrupted(TASKS[name], problem, i // n_levels, rng, kinds))
        others[wrong[-1][1]] += 1
    others = {kind: count for kind, count in others.items() if kind not in kinds}
    if kinds and others and os.environ.get("RANK", "0") == "0":
        instead = ", ".join(f"{count} {kind}" for kind, count in others.items())
        can_not = f"{sum(others.values())} of {len(wrong)} problems can have no {' or '.join(dict.fromkeys(kinds))}"
        print(f"{name}, {split}: {can_not}; they take another corruption: {instead}")
    return wrong


def corrupted(task: Task, problem, turn: int, rng: random.Random, kinds: Sequence[str]) -> tuple[str, str]:
    """One of `wrong_solutions`. DataError if the problem can have no kind at all."""
    asked, others = ([k for k in ks if problem.level >= task.corruptions[k]] for ks in (kinds, task.corruptions))
    start = turn % max(1, len(asked))
    for kind in [*asked[start:], *asked[:start], *others]:
        try:
            return task.corrupt(problem, kind, rng), kind
        except DataError:  # in this problem every such error would show
            continue
    raise DataError(f"no corruption fits the solution of {problem.question!r}")
