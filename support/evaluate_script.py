"""The script of evaluate.py, but for the measuring: its flags; problems, checkpoints and folder; the table."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from data import DEFAULT_TASK, encode_prompt, load_problems
from support.answers import measure_of
from support.checkpoints import open_chat_model
from support.checks import Count, Seed, Whole, check
from support.errors import ConfigError
from support.records import drop_too_long
from support.runs import RUNS
from support.tables import file_name, gain_of, make_folder, metric_rows, sample_rows, show_results
from support.tasks import refuse_levels, refuse_skip_bad


@dataclass
class Config:
    """Measure a checkpoint on held-out problems, or two on the same."""

    checkpoint: str
    """A run directory such as runs/sft, a checkpoint directory, a .gguf file, or a name on the Hugging Face hub."""
    against: str | None = None
    """A second checkpoint for the same problems: the difference is given with an interval and McNemar's exact test."""
    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), gsm8k, or the path of a .jsonl, .json or .csv of questions and
    answers."""
    skip_bad: bool = False
    """Skip and count records that cannot be read or used, instead of stopping at the first one."""
    split: Literal["test", "valid", "train"] = "test"
    """Make choices on valid; look at test once."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    problems: Count | None = None
    """Number of problems; default: all, or of the built-in ones 1,000 (20,000 of train)."""
    instruction: str = ""
    """Text after each question that says how to answer, for a model that was not fine-tuned to end with #### and a
    number."""
    samples: Whole = 0
    """Answers to sample per problem, at temperature 1, for pass@k and majority; 0 turns them off."""
    max_new_tokens: Count = 96
    """Longest answer in tokens."""
    out: str | None = None
    """Folder for table.md and result.json, which are overwritten; default one under runs/evaluate."""
    seed: Seed = 0
    """Random seed of the sampling."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda or mps (Apple)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the answers, as in the stages; auto is the fastest that the hardware multiplies."""

    def __post_init__(self):
        check(self)
        refuse_levels(self)
        refuse_skip_bad(self)
        if not self.samples and self.seed != type(self).seed:
            raise ConfigError("--seed has no effect on greedy answers: give --samples, or leave it out")


def names_of(config):
    """The checkpoints to measure, as the user names them: one, or two."""
    return [config.checkpoint] if config.against is None else [config.checkpoint, config.against]


def open_all(config, dist):
    """-> the problems that fit every model; [(name, model in CPU memory, tokenizer)]; the folder of the results, which
    is there. CheckpointError, ConfigError, DataError."""
    problems = load_problems(config.data, config.split, config.problems, tuple(config.levels), config.skip_bad)
    if config.samples and measure_of(problems) == "f1":
        raise ConfigError(f"--samples needs answers to check, and no problem of {config.data} has a number after ####")
    if config.instruction:
        problems = [replace(p, question=f"{p.question}\n{config.instruction}") for p in problems]
    names = names_of(config)
    folder = Path(config.out) if config.out else RUNS / "evaluate" / file_name(*names, config.data, config.split)
    models = [(name, *open_chat_model(name)) for name in names]  # on the CPU: the device needs room for one
    if dist.is_main:
        make_folder(folder)
    for _, policy, tokenizer in models:
        lengths = [len(encode_prompt(tokenizer, p)) for p in problems]
        room = policy.config.context - config.max_new_tokens
        problems = drop_too_long(problems, lengths, room, f"{config.split} prompt", dist)
    return problems, models, folder


def write_report(config, folder, record, metrics, checked):
    """Print and write the table of a record, {"settings", "commit", "results", "pair" if two models were compared}.
    metrics: evaluate.METRICS. checked: whether any problem has an answer to check. ConfigError."""
    results, names = record["results"], names_of(config)
    n_problems = results[0]["n"]
    title = f"{config.data}, {config.split}, {n_problems} problems"
    rows = [[title, *names], *metric_rows(results, metrics, () if checked else ("accuracy",))]
    rows += sample_rows(results, n_problems) if checked else []
    notes = []
    if pair := record.get("pair"):
        alone = f"right alone {pair['only_second']} times, the other {pair['only_first']}"
        notes.append(f"{config.checkpoint} less {config.against}: {gain_of(pair)}; {alone}")
    show_results(folder, rows, notes, record)
