"""Data: what a record is, which split it belongs to, every data set by name, and what a training step reads.

Five kinds of record, and who reads them:

    text      a string                            pretrain.py, encoder.py              next word, missing word
    Problem   question, worked solution, answer   sft.py                               imitate
                                                  evaluate.py, grpo.py, dpo.py and     answer and be judged
                                                  all others that sample answers
    Pair      prompt, better and worse answer     reward_model.py; dpo.py of a file    prefer
    Judged    prompt, an answer, good or bad      dpo.py --variant kto of a file       like or not
    Review    text, 1 or 0                        encoder.py                           classify

From a name to the batch of a step:

    records = load_text | load_problems | load_pairs | load_judged | load_sentiment (name, split)
    name    = a row of TASKS       problems that are generated, and a function that reads an answer and checks it.
                                   "word", the default, needs no download: a story of GSM8K's kind, one worked line per
                                   arithmetic step, "#### 8". "word_large" is the same with numbers of up to four digits
            | a row of DATASETS    files below $ALIGN_DATA (default downloads/), downloaded if they are not there
            | a path               JSONL, JSON, CSV or TSV of the user's own; for load_text also plain text
    split   = "train" | "valid" | "test"

    text:     stream = ids of all documents, one after another                             (tokens,)
              inputs, targets = batch_at(stream, step, batch, context, seed, rank, world)  (batch, context) each
    examples: numbers = rows_at(len(records), step, batch, seed)                           `batch` of them
              prompt = encode_prompt(tokenizer, records[i])                                ids until generate.py decodes
              prompt, answers = encode_answers(tokenizer, pair)

In `batch_at`, `batch` is that of one rank; in `rows_at` that of all ranks, of which each takes its slice. Without `n`,
a task gives 20,000 problems for train, 1,000 for valid and 1,000 for test (SIZES); most stages ask for fewer.

**The step.** What a step reads is a pure function of (seed, step), so a resumed run needs only its step. Each epoch
reads every example once, in an order drawn from (seed, epoch). A stream is cut into windows, and each epoch reads every
window once; it leaves out fewer than two windows' tokens, others each time.

**The split.** Nothing is ever selected on the test split. A hash (`split_of`, blake2b) of all that was said before the
answer decides, 80 / 10 / 10 %: a record stays in its split when the file grows, is shuffled, or holds it twice. Where
a test file is published, all of it is test, and the train file is divided into train and valid: by the hash, or
in gsm8k by place (valid is the last 500 problems). Text has no test split: one long text is cut at 90 %, and the two
files of tinystories are train and valid. The built-in stories are split by what happens in them, so that no test story
is in train with another question or as the beginning of a longer one (support/word_problems.py).

**A task of your own** is a generator and a row of TASKS (support/tasks.py). Every stage takes it by its name, pretrains
and fine-tunes what it starts from on it, and judges answers by its verifier (tests/test_tasks.py has one):

    def sums(split, n, levels, seed): ...          in support/sums.py: at most n tuples ("2 + 3?", "#### 5", "5"), no
                                                   question in two splits (support.splits.split_of says which)
    "sums": Task(problems=sums)                    python sft.py --data sums; python grpo.py --data sums

Run it: `python data.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.downloads import DATASETS, find, has_test_file, refuse
from support.errors import DataError
from support.output import run_demo
from support.records import file_kind, problem_fields, read_all, read_judged, read_pairs, read_reviews, read_text
from support.sentiment import sentiment_reviews
from support.splits import check_split, split_of
from support.tasks import DEFAULT_TASK, TASKS, corruption_kinds, task_of, wrong_solutions
from tokenizer_bpe import ByteTokenizer

SIZES = {"train": 20_000, "valid": 1_000, "test": 1_000}  # how many problems or texts of a task, if nobody says

# -----------------------------------------------------------------------------------------------------------------
# What a record is.


@dataclass(frozen=True)
class Problem:
    """A question and how it is answered.

    `answer` is canonical (see `extract_answer`), and the last line of `solution` is `#### answer`, or what the task has
    instead; "" if no answer can be checked, and `solution` is free text. `level` is the number of arithmetic steps;
    `story` the theme, or "gsm8k", or "file". In a longer conversation `history` holds what was said before the
    question, as (role, content). `rating` is that of a rated solution, 1 to 5. `task` is the row of TASKS whose
    verifier judges the answers; "" takes the usual one, the number after ####. `calls` is the solution with
    the calls of a calculator in it, `<<48/2=24>>24`, where they are known: what agent.py demonstrates.
    """

    question: str
    solution: str
    answer: str
    level: int = 1
    story: str = ""
    history: tuple[tuple[str, str], ...] = ()
    rating: float | None = None
    task: str = ""
    calls: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first. `kind` is what is wrong with `rejected` (a corruption of the
    task), or "equal_scores" where their judge saw no difference, or else where the pair comes from."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    history: tuple[tuple[str, str], ...] = ()  # earlier turns, (role, content) each

    @property
    def answers(self) -> tuple[str, ...]:
        return self.chosen, self.rejected

    @property
    def judged(self) -> list[Judged]:
        """The two as single answers."""
        chosen = Judged(self.prompt, self.chosen, True, self.history)
        return [chosen, Judged(self.prompt, self.rejected, False, self.history)]


@dataclass(frozen=True)
class Judged:
    """An answer to a prompt, and whether it is good."""

    prompt: str
    answer: str
    good: bool
    history: tuple[tuple[str, str], ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer,)

    @property
    def judged(self) -> list[Judged]:
        return [self]


class Review(NamedTuple):
    """A text and whether it praises or pans."""

    text: str
    label: int  # 1 positive, 0 negative


def asked(record: Problem | Pair | Judged) -> list[dict[str, str]]:
    """All that was said before the answer, {"role", "content"} each; the last is the question."""
    question = record.prompt if isinstance(record, Pair | Judged) else record.question
    return [{"role": role, "content": content} for role, content in (*record.history, ("user", question))]


# -----------------------------------------------------------------------------------------------------------------
# The split of a record.


def split_key(record: Problem | Pair | Judged | Review) -> str:
    """The text whose hash decides the split: all that was said before the answer; of a review its text."""
    if isinstance(record, Review):
        return record.text
    return " ".join(turn["content"] for turn in asked(record))


def part_of(name: str, split: str) -> str:
    """Which file of a data set the records of a split come from, "train" or "test"."""
    return "test" if split == "test" and has_test_file(name) else "train"


def of_split(what: str, records: list, name: str, split: str) -> list:
    """The records of a file that are in a split, by the hash. But if the data set has its own test file, all of that is
    test, and what the hash calls test in the train file is train. DataError if there are none. what: a record's name in
    that message."""

    def place(record):
        hashed = split_of(split_key(record))
        if not has_test_file(name):
            return hashed
        return "test" if split == "test" else "valid" if hashed == "valid" else "train"

    kept = [record for record in records if place(record) == split]
    if not kept:
        advice = "" if part_of(name, split) == "test" else ": the split is by hash, add more records"
        raise DataError(f"{name} has no {what} in the split {split}{advice}")
    return kept


# -----------------------------------------------------------------------------------------------------------------
# The records of a split. A name is a row of TASKS, a row of DATASETS, or a path; support/records.py says what the
# records of a file may hold.


def has_verifier(name: str | Path) -> bool:
    """Whether every problem of a data set has an answer that can be checked."""
    return str(name) in TASKS or str(name) == "gsm8k"


def make_problems(name: str, split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[Problem]:
    """The first n problems of a task. DataError if its verifier refuses the solution of one: a policy that learned such
    solutions by heart would show 0 % for ever."""
    task = TASKS[name]
    problems = [Problem(*fields, task=name) for fields in task.problems(split, n, levels, seed)]
    if task.with_calls:
        problems = [replace(problem, calls=task.with_calls(problem.solution)) for problem in problems]
    for problem in problems:
        answer = task.answer(problem.solution)
        if answer is None or not task.same_answer(answer, problem.answer):
            raise DataError(
                f"task {name}: its own solution of {problem.question[:60]!r} does not verify: it gives {answer!r}, the "
                f"answer is {problem.answer!r}"
            )
    if n and not problems:
        raise DataError(f"task {name} has no problem in the split {split}")
    return problems[:n]


def load_text(name: str | Path = DEFAULT_TASK, split: str = "train", skip_bad: bool = False) -> list[str]:
    """The documents of a split, "train" or "valid", for pretraining. skip_bad: as for `load_problems`.

    a task             its texts: 20,000 for train, 1,000 for valid
    "tinystories"      one story a document
    "gsm8k", "instructions", "ratings", or a path of records: a problem and its solution a document, in a conversation
                       with what was said before
    "tinyshakespeare"  or a path of plain text: one document; the first 90 % of its characters is train, the rest valid
    """
    name = str(name)
    check_split(split, ("train", "valid"))
    if task_of(name).text:
        return task_of(name).text(split, SIZES[split])
    has_records = file_kind(name) in (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
    if name in TASKS or name in ("gsm8k", "instructions", "ratings") or has_records:
        return [
            "\n".join([*(turn["content"] for turn in asked(problem)), problem.solution])
            for problem in load_problems(name, split, skip_bad=skip_bad)
        ]
    refuse(name, "text for pretraining")
    path = find(name, split)
    text = read_text(path)
    if name == "tinystories":
        return [story.strip("\n") for story in text.split("<|endoftext|>") if story.strip()]
    cut = len(text) * 9 // 10
    part = text[:cut] if split == "train" else text[cut:]
    if not part:
        raise DataError(f"{path} is too short to split: {len(text)} characters")
    return [part]


def load_problems(
    name: str | Path = DEFAULT_TASK,
    split: str = "train",
    n: int | None = None,
    levels: Sequence[int] = (1, 2),
    skip_bad: bool = False,
) -> list[Problem]:
    """The problems of a split, at most n. skip_bad: records that cannot be read or used are counted and left out, in
    one printed line, instead of ending it.

    a task    generated at `levels`: 20,000 for train, 1,000 for valid and for test, unless n says otherwise
    "gsm8k"   test is the published test split; valid the last 500 of the published train split, train the rest
    "instructions", "ratings", "style", or a path: the records that `problem_fields` knows; the split by hash
    """
    name = str(name)
    check_split(split)
    if name in TASKS:
        return make_problems(name, split, SIZES[split] if n is None else n, levels)
    refuse(name, "problems")
    path = find(name, part_of(name, split))
    parse = partial(problem_fields, story="gsm8k" if name == "gsm8k" else "file")
    problems = [Problem(**fields) for fields in read_all(path, parse, skip_bad)]
    if name != "gsm8k":
        return of_split("problem", problems, name, split)[:n]
    if split == "train" and len(problems) <= 500:
        raise DataError(f"{path} has {len(problems)} problems, and the last 500 are valid: none is left for train")
    return {"train": problems[:-500], "valid": problems[-500:], "test": problems}[split][:n]


def load_pairs(
    name: str | Path = DEFAULT_TASK,
    split: str = "train",
    n: int | None = None,
    levels: Sequence[int] = (1, 2),
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> list[Pair]:
    """The preference pairs of a split, at most n. skip_bad: as for `load_problems`. `levels`, `seed` and `kinds` are of
    tasks alone.

    a task           the problems of `load_problems`, each solution against a corrupted one, the `kinds` (default: all
                     that the task has) in turn, so that one that is named twice comes twice as often; a problem that
                     can have none of `kinds` takes another, in one printed line. `seed` draws the corruptions
    "ultrafeedback"  its own test file; valid and train by hash. Pairs of equal scores have the kind "equal_scores"
    "hh"             Anthropic's helpful-base dialogues (arXiv:2204.05862), split as "ultrafeedback" is
    "style"          polite against rude wordings; the split by hash
    a path           the records that `pair_fields` knows; the split by hash

    Pairs that teach nothing (both answers the same, or one empty) are left out and counted (`read_pairs`).
    """
    name = str(name)
    check_split(split)
    if name in TASKS:
        kinds, problems = corruption_kinds(name, kinds), load_problems(name, split, n, levels)
        wrong = wrong_solutions(name, problems, len(levels), split, seed, kinds)
        return [Pair(p.question, p.solution, text, kind) for p, (text, kind) in zip(problems, wrong, strict=True)]
    refuse(name, "preference pairs")
    kind = name if name in DATASETS else "file"
    pairs = [Pair(**fields) for fields in read_pairs(find(name, part_of(name, split)), kind, skip_bad)]
    return of_split("pair", pairs, name, split)[:n]


def load_judged(
    name: str | Path,
    split: str = "train",
    n: int | None = None,
    skip_bad: bool = False,
    levels: Sequence[int] = (1, 2),
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> list[Judged]:
    """Single answers of a split, each good or bad, from at most n records. The other arguments: as for `load_pairs`.

    a path           the records that `judged_fields` knows, or pairs; the split by hash
    all other names  the two answers of each pair of `load_pairs`

    Records with an empty answer, or with two equal ones, are left out and counted.
    """
    name = str(name)
    if name in TASKS or name in DATASETS:
        records = load_pairs(name, split, n, levels, seed, kinds, skip_bad)
    else:
        check_split(split)
        records = [Pair(**f) if "chosen" in f else Judged(**f) for f in read_judged(find(name), skip_bad)]
        records = of_split("answer", records, name, split)[:n]
    return [judged for record in records for judged in record.judged]


def load_sentiment(name: str | Path = "sentiment", split: str = "train", skip_bad: bool = False) -> list[Review]:
    """The labelled texts of a split, "train", "valid" or "test". skip_bad: as for `load_problems`.

    "sentiment"  generated: 8,000 for train, 1,000 for valid and for test
    "polarity"   sentences from reviews (Pang and Lee, ACL 2005); "reviews", whole ones (ACL 2004); "imdb", from
                 $ALIGN_DATA or through Hugging Face's `datasets`. They have their own test files; valid and train by
                 the hash of the text
    a path       the records that `review_fields` knows; the split by the hash of the text
    """
    name = str(name)
    check_split(split)
    if name == "sentiment":
        return [Review(*review) for review in sentiment_reviews(split, 8_000 if split == "train" else 1_000)]
    refuse(name, "labelled texts")
    reviews = [Review(*review) for review in read_reviews(name, part_of(name, split), skip_bad)]
    reviews = of_split("text", reviews, name, split)
    if len({review.label for review in reviews}) < 2:
        raise DataError(f"{name}: the split {split} needs texts of both labels, it has {len(reviews)} texts")
    return reviews


# -----------------------------------------------------------------------------------------------------------------
# What a step reads: a pure function of (seed, step).


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window begins, 0 to offsets − 1, and the order of its windows, (windows,)."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(offsets)), rng.permutation(windows)


def batch_at(
    stream: np.ndarray, step: int, batch: int, context: int, seed: int, rank: int = 0, world: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of one rank at one step -> inputs, targets: (batch, context) int64, targets one token ahead.

    stream (tokens,): all documents, one after another (support/streams.py keeps it on disk).

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


def rows_at(n: int, step: int, batch: int, seed: int) -> list[int]:
    """Which of n examples are in the batch of this step, of all ranks together: epochs without replacement."""
    numbers = np.arange(step * batch, (step + 1) * batch)  # (batch,), counted through all epochs
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in np.unique(numbers // n)}
    return [int(orders[i // n][i % n]) for i in numbers]


# -----------------------------------------------------------------------------------------------------------------
# From a record to ids.


def chat(problem: Problem) -> list[dict[str, str]]:
    """A problem as a conversation; its last turn is the assistant's."""
    return [*asked(problem), {"role": "assistant", "content": problem.solution}]


def encode_prompt(tokenizer, record: Problem | Pair | Judged) -> list[int]:
    """The ids up to where the assistant begins its last turn."""
    return tokenizer.encode_chat(asked(record), add_generation_prompt=True)[0]  # ids, without the mask


def encode_answers(tokenizer, pair: Pair | Judged) -> tuple[list[int], list[list[int]]]:
    """-> prompt ids, [chosen ids, rejected ids], each answer with its end, as if it were sampled. A Judged has one."""
    return encode_prompt(tokenizer, pair), [[*tokenizer.encode(text), tokenizer.im_end_id] for text in pair.answers]


# -----------------------------------------------------------------------------------------------------------------


def demo() -> None:
    """The split of a question, a pair as text and as ids, and what steps read."""
    questions = ["Is 4 odd?", " is 4  ODD?", "Is 3 odd?", "Is 5 odd?"]
    splits = [split_of(split_key(Problem(question, "", ""))) for question in questions]
    print("The hash puts", ", ".join(f"{q!r} into {split}" for q, split in zip(questions, splits, strict=True)))
    assert splits == ["train", "train", "valid", "test"]  # capitals and white space do not count

    pair = load_pairs(DEFAULT_TASK, "train", 1, levels=(2,), kinds=["wrong_sum"])[0]
    print(f"\nA pair of the default task, with a {pair.kind}:\n  {pair.prompt}")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        print(f"  {name:8}  {' / '.join(answer.splitlines())}")
    assert pair.chosen.split("\n")[-1] == "#### 18" != pair.rejected.split("\n")[-1]
    tokenizer = ByteTokenizer()  # an id per byte; 257 is <|im_start|>, 258 <|im_end|>
    prompt, (chosen, rejected) = encode_answers(tokenizer, Pair("2 + 2?", "4", "5", "wrong_sum"))
    print(f"A smaller one as ids: prompt {prompt[:6]} … {prompt[-3:]}, chosen {chosen}, rejected {rejected}")
    assert tokenizer.decode(prompt) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"

    steps = [rows_at(5, step, 2, seed=0) for step in range(5)]
    print(f"\nTwo epochs of five examples, two a step: {steps}")
    assert sorted(np.concatenate(steps)) == sorted([*range(5)] * 2)
    whole, targets = batch_at(np.arange(30), 3, 4, 6, seed=0)  # (4, 6) each: windows of 6 tokens
    assert np.array_equal(targets, whole + 1)  # one token ahead
    halves = [batch_at(np.arange(30), 3, 2, 6, seed=0, rank=rank, world=2)[0] for rank in (0, 1)]  # (2, 6) each
    assert np.array_equal(whole, np.concatenate(halves))
    print(f"Step 3 on one process reads the windows {whole[:, 0]}, on two {halves[0][:, 0]} and {halves[1][:, 0]}")


if __name__ == "__main__":
    run_demo(demo)
