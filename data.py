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

import hashlib
import http.client
import os
import random
import re
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import word_problems as built_in
from support.answers import NUMBER, extract_answer, same_answer
from support.errors import DataError
from support.records import encodable, prompt_of, read_all, read_records, read_text, report_skipped, text_of
from support.sentiment import sentiment_reviews
from support.splits import SPLITS, check_split, split_of
from support.word_problems import (
    CORRUPTIONS,
    SOLVE,
    STEP,
    corrupt,
    narrative,
    narrative_entropy,
    narrative_texts,
)


@dataclass(frozen=True)
class Problem:
    """`solution` ends in `#### answer`; `answer` is canonical (see `extract_answer`), or "" if unknown.

    `level` is the number of arithmetic steps; `story` the theme, or "gsm8k", or "file". In a longer conversation
    `history` holds what was said before the question, as (role, content). `rating` is that of a rated solution, 1 to 5.
    `task` is the row of TASKS whose verifier judges the answers; "" takes the default one.
    """

    question: str
    solution: str
    answer: str
    level: int = 1
    story: str = ""
    history: tuple[tuple[str, str], ...] = ()
    rating: float | None = None
    task: str = ""


# -----------------------------------------------------------------------------------------------------------
# Tasks: problems that are made here, and all that the stages ask about them.


@dataclass(frozen=True)
class Task:
    """A task that every stage takes by its name in TASKS. Only `problems` is needed.

    problems     (split, n, levels, seed) -> n different problems of a split, as tuples of Problem's first fields,
                 (question, solution, answer) at least; no problem is in two splits. --levels of the command line are
                 passed through
    text         (split, n) -> n documents for pretraining; None: its problems, the question and the solution
    entropy      () -> nats per document of that text and their standard error, where it is known
    answer       text -> the answer that it commits to, or None
    same_answer  (a, b) -> whether two answers are the same; a problem's own solution has to pass
    corruptions  {kind of error: the fewest steps that a problem needs to have it}, the hardest to see first
    corrupt      (problem, kind, rng) -> a wrong solution for preference pairs; DataError if there is none
    rename       text -> the same with other names, which should change no judgement
    pretrain     settings of pretrain.py, other than its defaults, for a start that a stage makes for itself
    sft          the same of sft.py
    micro_batch  how many completions grpo.py trains on in one forward pass
    """

    problems: Callable | None = None
    text: Callable | None = None
    entropy: Callable | None = None
    answer: Callable = extract_answer
    same_answer: Callable = same_answer
    corruptions: dict[str, int] = field(default_factory=dict)
    corrupt: Callable | None = None
    rename: Callable | None = None
    pretrain: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    micro_batch: int = 32


TASKS = {
    "word": Task(
        problems=built_in.word_problems,
        text=narrative_texts,
        entropy=narrative_entropy,
        corruptions=CORRUPTIONS,
        corrupt=corrupt,
        rename=built_in.rename,
        micro_batch=128,  # its rows are short
    ),
}
DEFAULT_TASK = next(iter(TASKS))
FILES = Task(pretrain={"vocab_size": 2048, "model": {"context": 512}})  # real text: more words, longer windows


def task_of(name: str | Path) -> Task:
    """The row of a task; for anything else that has a name (a file, GSM8K) what holds for all of those."""
    return TASKS.get(name, FILES)


def has_verifier(name: str | Path) -> bool:
    """Whether every problem of a data set has an answer that can be checked."""
    return name in TASKS or name == "gsm8k"


def make_problems(name: str, split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[Problem]:
    """At most n problems of a task. Raises DataError on the first whose own solution the task's verifier refuses: with
    it every policy would show 0 % for ever."""
    task = TASKS[name]
    problems = [Problem(*fields, task=name) for fields in task.problems(split, n, levels, seed)]
    for problem in problems:
        found = task.answer(problem.solution)
        if found is None or not task.same_answer(found, problem.answer):
            raise DataError(
                f"task {name}: its own solution of {problem.question[:60]!r} does not verify: it gives {found!r}, the "
                f"answer is {problem.answer!r}"
            )
    if not problems:
        raise DataError(f"task {name} has no problem in the split {split}")
    return problems


def word_problems(split: str, n: int, levels: Sequence[int] = (1, 2), seed: int = 0) -> list[Problem]:
    """n different built-in problems, problem i at levels[i % len(levels)]. A longer list begins with the shorter."""
    return make_problems(DEFAULT_TASK, split, n, levels, seed)


# -----------------------------------------------------------------------------------------------------------
# Real data: where it lies, how it is read.

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

STYLE_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json"
)


HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/helpful-base/"


SIZES = {"train": 20_000, "valid": 1_000, "test": 1_000}  # how many a task makes, if nobody says


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
    if str(name) in TASKS:
        raise DataError(f"{name} is built in and has no file: use load_problems or load_text")
    if str(name) not in DATASETS:
        path = Path(name)
        if path.is_dir():
            raise DataError(f"{path} is a folder: give the file in it")
        if path.is_file():
            return path
        raise DataError(f"{name}: no such file, and not one of the known datasets {', '.join([*TASKS, *DATASETS])}")
    sources = DATASETS[str(name)]
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


def load_problems(
    name: str | Path = DEFAULT_TASK,
    split: str = "train",
    n: int | None = None,
    levels: Sequence[int] = (1, 2),
    skip_bad: bool = False,
) -> list[Problem]:
    """The problems of a split, at most n. skip_bad: records that cannot be used are counted and left out, in one
    printed line, instead of ending it.

    a task    generated at `levels`: 20,000 for train, 1,000 for valid and for test, unless n says otherwise
    "gsm8k"   test is the published test split; valid the last 500 of the published train split, train the
              rest, so that nothing is ever selected on test
    "instructions", "ratings", or a path: JSONL, a JSON array or CSV of what `problem_from` knows; the split by the
              hash of the question and what was said before it
    """
    check_split(split)
    if name in TASKS:
        return make_problems(name, split, SIZES[split] if n is None else n, levels)
    known = ("gsm8k", "instructions", "ratings", "style")
    if name in DATASETS and name not in known:
        raise DataError(f"{name} has no problems: choose {', '.join([*TASKS, *known])}, or the path of a .jsonl")
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


def load_text(name: str | Path = DEFAULT_TASK, split: str = "train", skip_bad: bool = False) -> list[str]:
    """The documents of a split, "train" or "valid", for pretraining. skip_bad: as for `load_problems`.

    a task             its texts: 20,000 for train, 1,000 for valid; no text is in both
    "tinystories"      one story a document
    "gsm8k", "instructions", "ratings", or a path of records (see `read_records`): a problem and its solution a
                       document, in a conversation with what was said before
    "tinyshakespeare"  or a path: one document; the first 90 % of its characters is train, the rest valid
    """
    check_split(split, ("train", "valid"))
    if task_of(name).text:
        return task_of(name).text(split, SIZES[split])
    records = Path(str(name).removesuffix(".gz")).suffix in (".jsonl", ".json", ".csv", ".tsv")
    if name in (*TASKS, "gsm8k", "instructions", "ratings") or records:
        return [
            "\n".join([*(content for _, content in problem.history), problem.question, problem.solution])
            for problem in load_problems(name, split, skip_bad=skip_bad)
        ]
    if name in DATASETS and name not in ("tinyshakespeare", "tinystories"):
        known = "tinystories, tinyshakespeare, gsm8k, instructions, ratings"
        raise DataError(f"{name} has no text for pretraining: choose {', '.join(TASKS)}, {known}, or a path")
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
    "style"          polite against rude wordings; the split by the hash of the prompt
    a path           JSONL, a JSON array or CSV of {"prompt", "chosen", "rejected"}; the split by the hash of the prompt

    Pairs that teach nothing (both answers the same, or one empty) are skipped and counted, in one printed line.
    """
    check_split(split)
    if name in TASKS:
        known = TASKS[name].corruptions
        if not known:
            raise DataError(f"task {name} has no corrupted solutions to make pairs of: sample them")
        kinds = list(known) if kinds is None else kinds
        if unknown := set(kinds) - set(known):
            raise DataError(f"unknown corruption {min(unknown)!r}: choose from {', '.join(known)}")
        problems = load_problems(name, split, n, levels)
        return [corrupted_pair(problem, i // len(levels), split, seed, kinds) for i, problem in enumerate(problems)]
    published = name in ("ultrafeedback", "hh")
    if name in DATASETS and not published and name != "style":
        known = ", ".join([*TASKS, "ultrafeedback", "hh", "style"])
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


# -----------------------------------------------------------------------------------------------------------
# Sentiment: a text and whether it praises or pans.


class Review(NamedTuple):
    text: str
    label: int  # 1 positive, 0 negative


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
        return [Review(*review) for review in sentiment_reviews(split, 8_000 if split == "train" else 1_000)]
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
    """-> a group of two: (prompt ids, [chosen ids, rejected ids]), each answer with its end, as if it were sampled."""
    problem = Problem(pair.prompt, pair.chosen, answer="", level=1, story=pair.kind, history=pair.history)
    prompt = encode_prompt(tokenizer, problem)
    return prompt, [[*tokenizer.encode(answer), tokenizer.im_end_id] for answer in (pair.chosen, pair.rejected)]


def rows_at(n, step, batch, seed):
    """Which of n examples are in the batch of this step: epochs without replacement, a pure function of step."""
    wanted = np.arange(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng((seed, e)).permutation(n) for e in np.unique(wanted // n)}
    return [int(orders[i // n][i % n]) for i in wanted]


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
