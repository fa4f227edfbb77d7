"""What the script of evaluate.py does before and after it measures: problems, checkpoints and folder; the table."""

from dataclasses import replace
from pathlib import Path

from data import encode_prompt, load_problems
from support.answers import measure_of
from support.checkpoints import open_chat_model
from support.errors import ConfigError
from support.records import drop_too_long
from support.runs import RUNS
from support.tables import file_name, gain_of, make_folder, metric_rows, sample_rows, show_results


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
