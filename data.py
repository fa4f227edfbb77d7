"""Data: what a record is, which split it belongs to, every data set by name, and what a training step reads.

Five kinds of record, and who reads them:

    text      a string                            pretrain.py                          next token
    Problem   question, worked solution, answer   sft.py                               imitate
                                                  evaluate.py, grpo.py, dpo.py and     answer and be judged
                                                  all others that sample answers
    Pair      prompt, better and worse answer     reward_model.py; dpo.py              prefer
                                                  --pairs offline
    Judged    prompt, an answer, good or bad      dpo.py --pairs offline --variant kto like or not
    Review    text, 1 or 0                        encoder.py                           masked token, then classify

Every data set by name, its records, and how they are split. Each Pair can also be read as two Judged:

    word, word_large         text, Problem, Pair   generated, each story in one split
    gsm8k                    text, Problem         its own test file; valid: the last 500 problems of the train file
    instructions, ratings    text, Problem         by the hash
    style                    Problem, Pair         by the hash; polite against rude wordings
    ultrafeedback, hh        Pair                  their own test files; train and valid by the hash
    tinystories              text                  a file each for train and valid; one story a document
    tinyshakespeare          text                  one document: the first 90 % is train, the rest valid
    sentiment                Review                generated: 8,000 film reviews for train, 1,000 for valid and for test
    polarity, reviews, imdb  Review                their own test files; train and valid by the hash
    a path                   any one kind          by the hash; JSONL, JSON, CSV, TSV (support/records.py: their keys)
                             text                  plain text: one document, as tinyshakespeare

"word", the default, needs no download: a story of GSM8K's kind, one worked line per arithmetic step, and a last line
such as "#### 8". "word_large" is the same with numbers of up to four digits. They and gsm8k have a verifier, a function
that reads an answer and checks it. Without `n` word and word_large give 20,000 problems for train, 1,000 for valid and
1,000 for test (SIZES); most stages ask for fewer. The files of the others lie below $ALIGN_DATA (default downloads/);
what is missing there is downloaded if support/downloads.py has an address for it.

From a name to the batch of a step:

    records = load_text | load_problems | load_pairs | load_judged | load_reviews (name, split)
    text:     stream = ids of all documents, <|endoftext|> after each of several           (tokens,)
              inputs, targets = batch_at(stream, step, batch, context, seed, rank, world)  (batch, context) each
    examples: for i in rows_at(len(records), step, batch, seed):                           `batch` of them
                  ids, mask = tokenizer.encode_chat(conversation(records[i]))              True on what sft.py trains on
                  prompt = encode_prompt(tokenizer, records[i])                            ids; an answer follows
                  prompt, answers = encode_answers(tokenizer, records[i])                  a Pair's two, a Judged's one

`batch_at` returns the `batch` windows of one rank (by default there is one), `rows_at` the whole batch, of which each
rank takes its slice.

**The step.** What a step reads is a pure function of (seed, step), so a resumed run needs only its step. Each epoch
reads every example once, in an order drawn from (seed, epoch). A stream is cut into windows from an offset that each
epoch draws, and each window is read once. What lies before the first window and after the last, fewer than two windows
of tokens, waits for another epoch; but a stream of two windows or more never gives its last (tokens mod context).

**The split.** Nothing is ever selected on the test split. A hash (`split_of`, blake2b) of the first question decides,
80 / 10 / 10 %: a record stays in its split when the file grows, is shuffled, or holds it twice, and a conversation is
in the split of each longer one that begins like it. (But of gsm8k's train file the last 500 problems are valid.) The
built-in stories are split by what happens in them, so that no test story is in train with another question or as the
beginning of a longer one (support/word_problems.py).

**A task** is a generated data set with a row in TASKS: word, word_large, or your own (support/tasks.py shows one).

Run it: `python data.py`.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from support.downloads import DATASETS, has_test_file, none_left
from support.errors import DataError
from support.output import run_demo
from support.records import holds_records, read_documents, read_judged, read_pairs, read_problems, read_reviews
from support.sentiment import sentiment_reviews
from support.splits import check_split, split_of
from support.tasks import DEFAULT_TASK, TASKS, corruption_kinds, refuse_unsound, task_of, wrong_solutions
from tokenizer_bpe import ByteTokenizer

SIZES = {"train": 20_000, "valid": 1_000, "test": 1_000}  # how many problems or texts of a task, if nobody says

# -----------------------------------------------------------------------------------------------------------------
# What a record is.


@dataclass(frozen=True)
class Problem:
    """A question and how it is answered.

    `answer` is canonical (support/answers.py), and the last line of `solution` is `#### answer`, or what the task has
    instead. If no answer can be checked, `answer` is "" and `solution` free text. `level` is the number of arithmetic
    steps; `story` the theme, or "gsm8k", or "file". In a longer conversation `history` holds what was said before the
    question, as (role, content). `rating` is that of a rated solution, 1 to 5. `task` is the row of TASKS whose
    verifier judges the answers; "" takes the usual one, the number after ####. `calls` is the solution with the calls
    of a calculator in it, `<<48/2=24>>24`, where they are known: what agent.py demonstrates.
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


class Review(NamedTuple):
    """A text and whether it praises or pans."""

    text: str
    label: int  # 1 positive, 0 negative


def turns_before_answer(record):
    """All that was said before the answer of a Problem, Pair or Judged: turns, {"role", "content"} each, the last one
    the question."""
    question = record.question if isinstance(record, Problem) else record.prompt
    return [{"role": role, "content": content} for role, content in (*record.history, ("user", question))]


# -----------------------------------------------------------------------------------------------------------------
# The split of a record.


def split_key(record):
    """The text whose hash decides the split: of a review its text, else the first question. Conversations that begin
    with the same question are therefore in one split, with or without a system turn before it: SFT trains on all the
    answers of a conversation."""
    if isinstance(record, Review):
        return record.text
    return next(turn["content"] for turn in turns_before_answer(record) if turn["role"] == "user")


def of_split(what, records, name, split):
    """The records of a file that are in a split, by the hash. But if the data set has its own test file, all of that is
    test, and what the hash calls test in the train file is train. DataError if there are none. what: the noun for
    messages."""
    own_test = has_test_file(name)
    if own_test and split == "test":
        kept = records  # of the test file
    elif name == "gsm8k":
        kept = records[:-500] if split == "train" else records[-500:]
    else:
        hashed = {"train", "test"} if own_test and split == "train" else {split}
        kept = [record for record in records if split_of(split_key(record)) in hashed]
    if not kept:
        raise none_left(what, name, split, len(records))
    return kept


# -----------------------------------------------------------------------------------------------------------------
# The records of a split. What the loaders take (load_text and load_reviews without n and levels):
#
#   name      a row of the table above, or a path; str or Path
#   split     "train", "valid" or "test"
#   n         at most so many; None: all, or of a task as many as SIZES says
#   levels    of a task alone: the numbers of arithmetic steps, in turn
#   skip_bad  records of a file that cannot be read or used are left out and counted, in one printed line; otherwise the
#             first of them is a DataError


def make_problems(name, split, n, levels=(1, 2), seed=0):
    """The first n problems of a task. DataError if its verifier refuses the solution of one: a policy that learned such
    solutions by heart would show 0 % for ever."""
    task = TASKS[name]
    problems = [Problem(*fields, task=name) for fields in task.problems(split, n, levels, seed)]
    if task.with_calls:
        problems = [replace(problem, calls=task.with_calls(problem.solution)) for problem in problems]
    refuse_unsound(name, problems, split, n)
    return problems[:n]


def load_text(name=DEFAULT_TASK, split="train", skip_bad=False):
    """The documents of a split, "train" or "valid", for pretraining -> [str, …]: a task's `text`, if it has one; of
    other problems what was said before, the question and the solution; of plain text its documents."""
    name = str(name)
    check_split(split, ("train", "valid"))
    if task_of(name).text:
        return task_of(name).text(split, SIZES[split])
    if name in TASKS or holds_records(name):
        problems = load_problems(name, split, skip_bad=skip_bad)
        return ["\n".join([*(turn["content"] for turn in turns_before_answer(p)), p.solution]) for p in problems]
    return read_documents(name, split, skip_bad)


def load_problems(name=DEFAULT_TASK, split="train", n=None, levels=(1, 2), skip_bad=False):
    """The problems of a split -> [Problem, …]."""
    name = str(name)
    check_split(split)
    if name in TASKS:
        return make_problems(name, split, SIZES[split] if n is None else n, levels)
    problems = [Problem(**fields) for fields in read_problems(name, split, skip_bad)]
    return of_split("problem", problems, name, split)[:n]


def load_pairs(name=DEFAULT_TASK, split="train", n=None, levels=(1, 2), seed=0, kinds=None, skip_bad=False):
    """The preference pairs of a split -> [Pair, …], without those that teach nothing: both answers the same, or one
    empty (a printed line says how many).

    A task makes them: the solution of a problem against a corrupted one, drawn by `seed`. The `kinds` of corruption
    (default: all that the task has) come in turn, so one that is named twice comes twice as often; a problem that can
    have none of them takes another kind, and one printed line counts these.
    """
    name = str(name)
    check_split(split)
    if name in TASKS:
        kinds, problems = corruption_kinds(name, kinds), load_problems(name, split, n, levels)
        wrong = wrong_solutions(name, problems, len(levels), split, seed, kinds)
        return [Pair(p.question, p.solution, text, kind) for p, (text, kind) in zip(problems, wrong, strict=True)]
    pairs = [Pair(**fields) for fields in read_pairs(name, split, skip_bad)]
    return of_split("pair", pairs, name, split)[:n]


def load_judged(name, split="train", n=None, levels=(1, 2), seed=0, kinds=None, skip_bad=False):
    """Single answers of a split -> [Judged, …], from at most n records. The records of a path may be pairs or single
    answers, or both; all else is as for `load_pairs`."""
    name = str(name)
    if name in TASKS or name in DATASETS:
        records = load_pairs(name, split, n, levels, seed, kinds, skip_bad)
    else:
        check_split(split)
        records = [Pair(**f) if "chosen" in f else Judged(**f) for f in read_judged(name, skip_bad)]
        records = of_split("answer", records, name, split)[:n]
    return [one for record in records for one in (record.judged if isinstance(record, Pair) else [record])]


def load_reviews(name="sentiment", split="train", skip_bad=False):
    """The labelled texts of a split -> [Review, …], of both labels."""
    name = str(name)
    check_split(split)
    if name == "sentiment":
        return [Review(*review) for review in sentiment_reviews(split, 8_000 if split == "train" else 1_000)]
    reviews = [Review(*review) for review in read_reviews(name, split, skip_bad)]
    reviews = of_split("text", reviews, name, split)
    if len({review.label for review in reviews}) < 2:
        raise DataError(f"{name}: the split {split} needs texts of both labels, it has {len(reviews)} texts")
    return reviews


# -----------------------------------------------------------------------------------------------------------------
# What a step reads: a pure function of (seed, step).


@lru_cache(maxsize=4)
def epoch_windows(seed, epoch, windows, offsets):
    """Where an epoch's first window begins, 0 to offsets − 1, and the order of its windows, (windows,)."""
    rng = np.random.default_rng([seed, epoch])
    return int(rng.integers(offsets)), rng.permutation(windows)


def batch_at(stream, step, batch, context, seed, rank=0, world=1):
    """The batch of one rank at one step -> inputs, targets: (batch, context) int64, targets one token ahead.

    stream (tokens,): all documents, one after another (support/streams.py keeps it on disk).

    Each epoch cuts the stream into windows of `context` tokens that do not overlap, from a random offset (so
    the borders fall elsewhere next time), and visits them in random order, each once. A step of all ranks
    together takes the next world * batch of them, so 2 ranks with batch b see what 1 rank with batch 2b sees.
    """
    tokens = len(stream)
    if tokens < context + 1:
        raise DataError(f"the stream has {tokens} tokens, one window needs context + 1 = {context + 1}")
    windows = max(1, (tokens - context) // context)  # leaves room for the offset and for the last target
    offsets = min(context, tokens - windows * context)
    rows = []
    first = (step * world + rank) * batch
    for number in range(first, first + batch):  # windows are numbered through all epochs
        offset, order = epoch_windows(seed, number // windows, windows, offsets)
        start = offset + int(order[number % windows]) * context
        rows.append(stream[start : start + context + 1])
    block = np.stack(rows).astype(np.int64)  # (batch, context + 1)
    return block[:, :-1], block[:, 1:]


@lru_cache(maxsize=4)
def epoch_rows(seed, epoch, n):
    """The order in which an epoch reads n examples, (n,)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def rows_at(n, step, batch, seed):
    """Which of n examples are in the batch of this step, of all ranks together: epochs without replacement."""
    numbers = range(step * batch, (step + 1) * batch)  # counted through all epochs
    return [int(epoch_rows(seed, i // n, n)[i % n]) for i in numbers]


# -----------------------------------------------------------------------------------------------------------------
# From a record to ids.


def conversation(problem):
    """The turns of a problem and its solution; the last one is the assistant's."""
    return [*turns_before_answer(problem), {"role": "assistant", "content": problem.solution}]


def encode_prompt(tokenizer, record):
    """The ids up to where the assistant begins its last turn."""
    return tokenizer.encode_chat(turns_before_answer(record), add_generation_prompt=True)[0]  # ids, without the mask


def encode_answer(tokenizer, text):
    """The ids of an answer and its end, as if it were sampled."""
    return [*tokenizer.encode(text), tokenizer.im_end_id]


def encode_answers(tokenizer, record):
    """A Pair or a Judged -> prompt ids, [chosen ids, rejected ids] or [the answer's ids]."""
    texts = [record.answer] if isinstance(record, Judged) else [record.chosen, record.rejected]
    return encode_prompt(tokenizer, record), [encode_answer(tokenizer, text) for text in texts]


def demo():
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
    one, two = (half[:, 0] for half in halves)
    print(f"0 … 29 in windows of 6: step 3 on one process reads those from {whole[:, 0]}, on two {one} and {two}")


if __name__ == "__main__":
    run_demo(demo)
