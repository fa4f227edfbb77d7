"""Data: what a record is, which split it belongs to, every data set by name, and what a training step reads.

Five kinds of record, and who reads them:

    text      a string                                         pretrain.py, encoder.py    next word, missing word
    Problem   question, worked solution, answer                sft.py, grpo.py, ppo.py    imitate; answer and be judged
    Pair      prompt, a better and a worse answer              dpo.py, reward_model.py    prefer
    Judged    prompt, an answer, good or bad                   dpo.py --variant kto       like or not
    Review    text, 1 or 0                                     encoder.py                 classify

From a name to the batch of a step:

    records = load_text | load_problems | load_pairs | load_judged | load_sentiment (name, split)
    name    = a row of TASKS       problems that are generated, with a verifier. "word", the default, needs no download:
                                   a story of GSM8K's kind, one worked line per arithmetic step, "#### 8"
            | a row of DATASETS    files below $ALIGN_DATA (default downloads/), downloaded if they are not there
            | a path               JSONL, JSON, CSV, TSV or plain text of the user's own
    split   = "train" | "valid" | "test": a published test file is test; else by a hash of what was asked, 80/10/10 %

    text:     stream = ids of all documents, one after another                               (tokens,)
              inputs, targets = batch_at(stream, step, batch, context, seed, rank, world)    (batch, context) each
                                                                                             of each rank
    examples: numbers = rows_at(len(records), step, batch, seed)                             (batch,) of all ranks
              ids = encode_prompt(tokenizer, records[i]), encode_group(tokenizer, pair)      from here on no text

The defaults take "word" with one and two arithmetic steps: 20,000 problems for train, 1,000 for valid, 1,000 for test.

**The step.** What a step reads is a pure function of (seed, step): everything once per epoch, in an order drawn from
(seed, epoch). So a resumed run needs only its step, and two processes with batch b see what one sees with batch 2b.

**The split.** Nothing is ever selected on the test split. Where a test file is published, valid is a part of the train
file. A hash (`split_of`, blake2b) keeps a record in its split when the file grows, is shuffled, or holds it twice; in a
conversation it is taken of all that was said before the answer. The built-in stories are split by what happens in them,
so that no test story is in train with another question or as the beginning of a longer one (support/word_problems.py,
which also derives the text's entropy).

**A task of your own** is a generator and a row of TASKS. Every stage takes it by its name, pretrains and fine-tunes
what it starts from on it, and judges answers by its verifier (tests/test_tasks.py has one):

    def sums(split, n, levels, seed): ...          in support/sums.py: at most n tuples ("2 + 3?", "#### 5", "5"), no
                                                   question in two splits (support.splits.split_of says which)
    "sums": Task(problems=sums)                    python sft.py --data sums; python grpo.py --data sums

Run it: `python data.py`.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import word_problems as word
from support.answers import extract_answer, same_answer
from support.downloads import data_folder, fetch, files, imdb_reviews
from support.errors import DataError
from support.output import run_demo
from support.records import (
    file_kind,
    judged_fields,
    pair_fields,
    problem_fields,
    read_all,
    read_text,
    report_skipped,
    review_fields,
)
from support.sentiment import sentiment_reviews
from support.splits import check_split, split_of

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
    task), or else where the pair comes from."""

    prompt: str
    chosen: str
    rejected: str
    kind: str
    history: tuple[tuple[str, str], ...] = ()  # earlier turns, (role, content) each

    @property
    def answers(self):
        return self.chosen, self.rejected

    @property
    def judged(self):
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
    def answers(self):
        return (self.answer,)


class Review(NamedTuple):
    """A text and whether it praises or pans."""

    text: str
    label: int  # 1 positive, 0 negative


def split_key(history: tuple[tuple[str, str], ...], question: str) -> str:
    """The text whose hash decides the split: everything that was said before the answer."""
    return " ".join([*(content for _, content in history), question])


# -----------------------------------------------------------------------------------------------------------------
# Tasks: problems that are generated here, and all that the stages ask about them.


@dataclass(frozen=True)
class Task:
    """A task that every stage takes by its name in TASKS. Only `problems` is needed.

    problems     (split, n, levels, seed) -> at most n different problems of a split (fewer if it has no more), as
                 tuples of Problem's first fields, (question, solution, answer) at least; no problem is in two splits.
                 `levels` is --levels
    text         (split, n) -> n documents for pretraining; None: its problems, the question and the solution
    entropy      () -> nats per document of that text and their standard error, where they are known
    answer       text -> the answer that it commits to, or None
    same_answer  (a, b) -> whether two answers are the same; a problem's own solution must have the problem's answer
    keeps_story  (question, solution, text) -> whether an answer speaks of the question's names and things in the task's
                 own words: what a reward for the number does not ask, and a policy may lose
    corruptions  {kind of error: the fewest steps that a problem needs to have it}, the hardest to see first
    corrupt      (problem, kind, rng) -> a wrong solution, for preference pairs; DataError if there is none
    rename       text -> the same with other names, which should change no judgement
    pretrain     what pretrain.py is told (beside its defaults) for a start that a stage makes for itself
    sft          the same for sft.py
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


TASKS = {
    "word": Task(
        problems=word.word_problems,
        text=word.narrative_texts,
        entropy=word.narrative_entropy,
        keeps_story=word.keeps_story,
        corruptions=word.CORRUPTIONS,
        corrupt=word.corrupt,
        rename=word.rename,
        with_calls=word.with_calls,
        micro_batch=128,
    ),
    "word_large": Task(
        problems=partial(word.word_problems, large=word.FOUR_DIGITS),
        text=word.worked_texts,
        keeps_story=word.keeps_story,
        corruptions=word.CORRUPTIONS,
        corrupt=word.corrupt,
        rename=word.rename,
        with_calls=word.with_calls,
    ),
}
DEFAULT_TASK, LARGE_TASK = [*TASKS][:2]  # LARGE_TASK: numbers of up to four digits, for a model that has a calculator
SIZES = {"train": 20_000, "valid": 1_000, "test": 1_000}  # how many problems or texts of a task, if nobody says
NO_TASK = Task(pretrain={"vocab_size": 2048, "model": {"context": 512}})  # real text: more words, longer windows


def task_of(name: str | Path) -> Task:
    """The row of a task; for every other data set one row, NO_TASK."""
    return TASKS.get(name, NO_TASK)


def has_verifier(name: str | Path) -> bool:
    """Whether every problem of a data set has an answer that can be checked."""
    return name in TASKS or name == "gsm8k"


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


def word_problems(split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[Problem]:
    """n different built-in problems, problem i at levels[i % len(levels)]. A longer list begins with the shorter."""
    return make_problems(DEFAULT_TASK, split, n, levels, seed)


# -----------------------------------------------------------------------------------------------------------------
# Data sets by name: where each file lies.

GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
STYLE = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/04_preference-tuning-with-dpo/"
HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/"

# {} is the split. What has no URL has to be put there by hand.
DATASETS = {
    "gsm8k": files("gsm8k/{}.jsonl", GSM8K + "grade_school_math/data/{}.jsonl"),
    "tinyshakespeare": files("tinyshakespeare/input.txt", SHAKESPEARE, splits=("train", "valid")),
    "tinystories": files("tinystories/{}.txt", splits=("train", "valid")),
    "polarity": files("sentiment/sentence_polarity_{}.tsv"),
    "reviews": files("sentiment/movie_reviews_{}.jsonl.gz"),
    "imdb": files("sentiment/imdb_{}.jsonl.gz"),
    "ultrafeedback": files("preferences/ultrafeedback_{}.jsonl"),
    "hh": files("preferences/hh_helpful_{}.jsonl.gz", HH + "{}.jsonl.gz"),
    "instructions": files("instruction/instruction_data.json", splits=("train",)),
    "ratings": files("ratings/rated_responses.csv", splits=("train",)),
    "style": files(
        "preferences/short_style_preferences.json", STYLE + "instruction-data-with-preference.json", splits=("train",)
    ),
}
PROBLEMS = ("gsm8k", "instructions", "ratings", "style")
TEXTS = ("tinystories", "tinyshakespeare", "gsm8k", "instructions", "ratings")
PAIRS = ("ultrafeedback", "hh", "style")


def find(name: str | Path, split: str = "train") -> Path:
    """The file that holds `split` of a data set, downloaded if need be; or `name` itself where it is a path.

    A known name wins over a file of the same name: write `./gsm8k` for the file.
    """
    if str(name) in TASKS:
        raise DataError(f"{name} is built in and has no file: use load_problems or load_text")
    if str(name) in DATASETS:
        check_split(split, tuple(DATASETS[str(name)]))
        return fetch(str(name), DATASETS[str(name)][split])
    path = Path(name)
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the file in it")
    if not path.is_file():
        known = ", ".join([*TASKS, *DATASETS])
        raise DataError(f"{name}: no such file, and not one of the known datasets {known}")
    return path


def refuse(name: str | Path, what: str, offer: Sequence[str]) -> None:
    """DataError if this is a data set of another kind."""
    if name in DATASETS and name not in offer:
        raise DataError(f"{name} has no {what}: choose {', '.join([*TASKS, *offer])}, or the path of a file")


# -----------------------------------------------------------------------------------------------------------------
# The records of a split.


def load_text(name: str | Path = DEFAULT_TASK, split: str = "train", skip_bad: bool = False) -> list[str]:
    """The documents of a split, "train" or "valid", for pretraining. skip_bad: as for `load_problems`.

    a task             its texts: 20,000 for train, 1,000 for valid
    "tinystories"      one story a document
    "gsm8k", "instructions", "ratings", or a path of records (see `read_records`): a problem and its solution a
                       document, in a conversation with what was said before
    "tinyshakespeare"  or a path: one document; the first 90 % of its characters is train, the rest valid
    """
    check_split(split, ("train", "valid"))
    if task_of(name).text:
        return task_of(name).text(split, SIZES[split])
    records = file_kind(name) in (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
    if name in TASKS or name in ("gsm8k", "instructions", "ratings") or records:
        return [
            "\n".join([*(content for _, content in problem.history), problem.question, problem.solution])
            for problem in load_problems(name, split, skip_bad=skip_bad)
        ]
    refuse(name, "text for pretraining", TEXTS)
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
    "instructions", "ratings", or a path: the records that `problem_fields` knows; the split by hash
    """
    check_split(split)
    if name in TASKS:
        return make_problems(name, split, SIZES[split] if n is None else n, levels)
    refuse(name, "problems", PROBLEMS)
    published = name == "gsm8k"
    path = find(name, "test" if published and split == "test" else "train")
    story = "gsm8k" if published else "file"
    problems = [Problem(**fields) for fields in read_all(path, partial(problem_fields, story=story), skip_bad)]
    if published:
        problems = {"train": problems[:-500], "valid": problems[-500:], "test": problems}[split]
    else:
        problems = [p for p in problems if split_of(split_key(p.history, p.question)) == split]
    if not problems:
        raise DataError(f"{path} has no problem in the split {split}: the split is by hash, add more records")
    return problems[:n]


def load_pairs(
    name: str | Path = DEFAULT_TASK,
    split: str = "train",
    n: int | None = None,
    levels: Sequence[int] = (1, 2),
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> list[Pair]:
    """The preference pairs of a split, at most n. skip_bad: as for `load_problems`.

    a task           the problems of `load_problems`, each solution against a corrupted one, the `kinds` (default: all
                     that the task has) in turn, so that one that is named twice comes twice as often; `seed` draws the
                     corruptions
    "ultrafeedback"  test is the published test split; of the published train split the prompts whose hash says
                     "valid" are valid and the rest train. Pairs of equal scores have the kind "equal_scores"
    "hh"             Anthropic's helpful-base dialogues (arXiv:2204.05862), split as "ultrafeedback" is
    "style"          polite against rude wordings; the split by hash
    a path           the records that `pair_fields` knows; the split by hash

    Pairs that teach nothing (both answers the same, or one empty) are skipped and counted, in one printed line. White
    space alone is empty, but answers that differ in it differ.
    """
    check_split(split)
    if name in TASKS:
        known = TASKS[name].corruptions
        if not known:
            raise DataError(f"task {name} has no corrupted solutions to make pairs of: sample them")
        if unknown := set(kinds or ()) - set(known):
            raise DataError(f"unknown corruption {min(unknown)!r}: choose from {', '.join(known)}")
        kinds = list(known if kinds is None else kinds)
        problems = load_problems(name, split, n, levels)
        return [corrupted_pair(problem, i // len(levels), split, seed, kinds) for i, problem in enumerate(problems)]
    refuse(name, "preference pairs", PAIRS)
    published = name in ("ultrafeedback", "hh")
    path = find(name, split if published and split == "test" else "train")
    kind = str(name) if name in DATASETS else "file"
    pairs, same, empty = [], [], []
    records = read_all(path, lambda record, where: (where, Pair(**pair_fields(record, where, kind))), skip_bad)
    for place, pair in records:
        place = place.removeprefix(f"{path} ")
        if not pair.chosen.strip() or not pair.rejected.strip():
            empty.append(place)
        elif pair.chosen == pair.rejected:
            same.append(place)
        elif belongs(split_key(pair.history, pair.prompt), split, published):
            pairs.append(pair)
    report_skipped(path, {"pairs of equal answers": same, "pairs with an empty answer": empty})
    if not pairs:
        raise DataError(f"{path} has no pair in the split {split}: the split is by hash, add more records")
    return pairs[:n]


def load_judged(name: str | Path, split: str = "train", n: int | None = None, skip_bad=False, **more) -> list[Judged]:
    """Single answers of a split, each good or bad, from at most n records. skip_bad: as for `load_problems`.

    a path           the records that `judged_fields` knows, or pairs; the split by hash of the prompt
    all other names  the two answers of each pair of `load_pairs`, which takes `more`

    Records with an empty answer, or with two equal ones, are skipped and counted.
    """

    def parse(record, where):
        if "chosen" in record or "rejected" in record:
            return where, Pair(**pair_fields(record, where, "file")).judged
        return where, [Judged(**judged_fields(record, where))]

    if name in TASKS or name in DATASETS:
        return [judged for pair in load_pairs(name, split, n, skip_bad=skip_bad, **more) for judged in pair.judged]
    check_split(split)
    path = find(name)
    kept, same, empty = [], [], []
    for place, answers in read_all(path, parse, skip_bad):
        if not all(judged.answer.strip() for judged in answers):
            empty.append(place.removeprefix(f"{path} "))
        elif answers[0].answer == answers[-1].answer and len(answers) == 2:
            same.append(place.removeprefix(f"{path} "))
        elif split_of(split_key(answers[0].history, answers[0].prompt)) == split:
            kept.append(answers)
    report_skipped(path, {"pairs of equal answers": same, "records with an empty answer": empty})
    if not kept:
        raise DataError(f"{path} has no answer in the split {split}: the split is by hash, add more records")
    return [judged for answers in kept[:n] for judged in answers]


def corrupted_pair(problem: Problem, turn: int, split: str, seed: int, kinds: Sequence[str]) -> Pair:
    """The solution of a task's problem against the corruption whose turn it is, or the next that is possible."""
    rng, task = random.Random(f"pair/{seed}/{split}/{problem.question}"), TASKS[problem.task]
    asked, others = ([k for k in ks if problem.level >= task.corruptions[k]] for ks in (kinds, task.corruptions))
    start = turn % max(1, len(asked))
    for kind in [*asked[start:], *asked[:start], *others]:
        try:
            return Pair(problem.question, problem.solution, task.corrupt(problem, kind, rng), kind)
        except DataError:  # in this problem every such error would show
            continue
    raise DataError(f"no corruption fits the solution of {problem.question!r}")


def belongs(key: str, split: str, published: bool) -> bool:
    """Whether a record is in the split. published: it stands in the published file, where all of the test file is
    test, and what the hash calls test in the train file is train."""
    if not published:
        return split_of(key) == split
    return split == "test" or (split_of(key) == "valid") == (split == "valid")


def load_sentiment(name: str | Path = "sentiment", split: str = "train", skip_bad: bool = False) -> list[Review]:
    """The labelled texts of a split, "train", "valid" or "test". skip_bad: as for `load_problems`.

    "sentiment"  generated: 8,000 for train, 1,000 for valid and for test
    "polarity"   sentences from reviews (Pang and Lee, ACL 2005); "reviews", whole ones (ACL 2004); "imdb", from
                 $ALIGN_DATA or through Hugging Face's `datasets`. test is the published test file; valid the part of
                 the train file that split_of calls so, a tenth, and train the rest
    a path       the records that `review_fields` knows; the split by the hash of the text
    """
    check_split(split)
    if name == "sentiment":
        return [Review(*review) for review in sentiment_reviews(split, 8_000 if split == "train" else 1_000)]
    published = str(name) in DATASETS
    file = "test" if published and split == "test" else "train"
    if name == "imdb" and not (data_folder() / DATASETS["imdb"][file].path).is_file():
        path, reviews = "imdb", imdb_reviews(file, DATASETS["imdb"][file])
    else:
        path = find(name, file)
        reviews = read_all(path, review_fields, skip_bad)
    reviews = [Review(*review) for review in reviews]
    reviews = [review for review in reviews if belongs(review.text, split, published)]
    if len({review.label for review in reviews}) < 2:
        raise DataError(f"{path}: the split {split} needs texts of both labels, it has {len(reviews)} texts")
    return reviews


# -----------------------------------------------------------------------------------------------------------------
# What a step reads: a pure function of (seed, step).


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    """Where an epoch's first window begins, 0 to offsets − 1, and the order of its windows, (windows,)."""
    rng = np.random.default_rng([seed % 2**32, epoch])
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


def rows_at(n, step, batch, seed):
    """Which of n examples are in the batch of this step: epochs without replacement, a pure function of step."""
    numbers = np.arange(step * batch, (step + 1) * batch)  # (batch,), counted through all epochs
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in np.unique(numbers // n)}
    return [int(orders[i // n][i % n]) for i in numbers]


# -----------------------------------------------------------------------------------------------------------------
# From a record to ids: the last place where text stands.


def chat(problem):
    """A problem as a conversation; its last turn is the assistant's."""
    earlier = [{"role": role, "content": content} for role, content in problem.history]
    return [
        *earlier,
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.solution},
    ]


def encode_prompt(tokenizer, problem):
    """The ids up to where the assistant begins its last turn."""
    return tokenizer.encode_chat(chat(problem)[:-1], add_generation_prompt=True)[0]


def encode_group(tokenizer, pair):
    """-> (prompt ids, [chosen ids, rejected ids]), each answer with its end, as if it were sampled; of a Judged one."""
    prompt = encode_prompt(tokenizer, Problem(pair.prompt, "", answer="", history=pair.history))
    return prompt, [[*tokenizer.encode(answer), tokenizer.im_end_id] for answer in pair.answers]


# -----------------------------------------------------------------------------------------------------------------


def demo() -> None:
    """Problems of each level with their arithmetic done again, their wrong solutions, and what steps read of them."""

    def show(text, indent):
        print(textwrap.fill(text, 118, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2)))

    rng = random.Random(0)
    for level in (1, 2, 3):
        problems = word_problems("train", 500, (level,))
        for problem in problems:
            steps = [word.STEP.search(line).groups() for line in problem.solution.split("\n")[:-1]]
            assert len(steps) == level
            assert all(word.SOLVE[op](int(a), int(b)) == int(c) for a, op, b, c, *_ in steps), problem
            assert extract_answer(problem.solution) == problem.answer == steps[-1][3], problem
        words = np.mean([len(problem.question.split()) for problem in problems])
        print(f"Level {level}: {len(problems)} problems checked, {words:.0f} words a question, for example")
        show(problems[2].question, 2)
        show(problems[2].solution.replace("\n", " / "), 4)

    print("\nThe last one, wrong in each way:")
    for kind in word.CORRUPTIONS:
        wrong = word.corrupt(problem := problems[2], kind, rng)
        assert not same_answer(extract_answer(wrong), problem.answer)
        show(f"{kind:15s} " + wrong.replace("\n", " / "), 2)

    text, nats, story = word.narrative(rng)
    mean, error = word.narrative_entropy(1000)
    print(
        f"\nA narrative for pretraining, {nats:.2f} nats; the mean of all is {mean:.2f} ± {error:.2f} ({story.split}):"
    )
    show(text, 2)

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
