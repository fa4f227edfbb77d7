"""What a run records: metrics.jsonl and samples.md in its directory, and the trackers.

    log = Log(run_dir, config, dist)               one per run; only rank 0 records
    log(step, loss=2.1, lr=1e-3)                   numbers: a line of metrics.jsonl, a point in each tracker
    log.samples(step, "The cat sat")               text that the model generates: samples.md and the trackers
    log.show(step, ["attention"], {"w": weight})   a picture of the run, a histogram: the trackers only
    log.close()
    steps, losses = read_metrics(run_dir)["loss"]

The trackers are TensorBoard and, with --wandb PROJECT, Weights & Biases. The first line of metrics.jsonl holds all
settings, the commit and the device; every later line is one step. A resumed run first cuts both files back to the step
that it resumes from, so that they contain each step once.

A full disk does not end a run that is under way: what cannot be written is said once and is missing from the log. Nor
does an error of Weights & Biases.
"""

import json
import math
import os
import re
import subprocess
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from support.files import UNWRITTEN, append_whole, may_fail, must_write, to_json, write_whole
from support.output import lose_output
from support.trackers import TensorBoard, WandB


class Log:
    """metrics.jsonl, samples.md and the trackers of a run, open until `close`; see above."""

    def __init__(self, run_dir, config, dist, first_step=0):
        """first_step: the number of steps that the run has already done; records of later steps are removed."""
        self.run_dir, self.active = run_dir, dist.is_main
        if not self.active:
            return
        header = {"config": asdict(config), "commit": commit(), "torch": torch.__version__}
        header |= {"device": str(dist.device), "world": dist.world}
        self.path = run_dir / "metrics.jsonl"
        lines = lines_up_to(self.path, first_step) or [to_json(header)]
        with must_write(run_dir):
            write_whole(self.path, "".join(line + "\n" for line in lines))
            cut_samples(run_dir / "samples.md", first_step)
            self.trackers = [WandB(run_dir, config, header, resumed=first_step > 0)] if config.wandb else []
            self.trackers.append(TensorBoard(run_dir / "tensorboard", first_step))
        UNWRITTEN.difference_update([path for path in UNWRITTEN if Path(path).is_relative_to(run_dir)])
        lose_output()

    def __call__(self, step, **record):
        """Record the numbers of a step, by name. One that is not finite is null in metrics.jsonl."""
        if not self.active:
            return
        with may_fail(self.path):
            append_whole(self.path, to_json({"step": step, **record}) + "\n")
        for tracker in self.trackers:
            tracker.numbers(step, record)

    def samples(self, step, text):
        """Record generated text, as Markdown: in samples.md, after a comment with the step, and in the trackers."""
        if not self.active:
            return
        path = self.run_dir / "samples.md"
        with may_fail(path):
            append_whole(path, f"<!-- step {step} -->\n" + text.rstrip("\n") + "\n\n")
        for tracker in self.trackers:
            tracker.text(step, text)

    def show(self, step, pictures=(), histograms=()):
        """Trackers only. pictures: names of PNG files in the run directory, of which those that are not there are left
        out; histograms: {name: tensor}, shown without the values that are not finite or beyond ±1e20, the last of
        TensorBoard's buckets, and left out if no value remains."""
        if not self.active:
            return
        pictures = {name: self.run_dir / f"{name}.png" for name in pictures}
        pictures = {name: path for name, path in pictures.items() if path.is_file()}
        histograms = {name: values.detach().float().cpu() for name, values in dict(histograms).items()}
        histograms = {name: values[values.abs() < 1e20] for name, values in histograms.items()}  # NaN is not < 1e20
        histograms = {name: values for name, values in histograms.items() if len(values)}
        for tracker in self.trackers:
            tracker.show(step, pictures, histograms)

    def flush(self):
        """Before a checkpoint: a run that is resumed from it writes no earlier step again."""
        for tracker in self.trackers if self.active else ():
            tracker.flush()

    def close(self):
        """Close the trackers."""
        for tracker in self.trackers if self.active else ():
            tracker.close()
        self.trackers = []


def read_metrics(run_dir):
    """metrics.jsonl -> {name: (steps, values)}, without the values that are not finite."""
    series = {}
    for record in records_of(Path(run_dir) / "metrics.jsonl"):
        for name, value in record.items():
            if "step" in record and name != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def lines_up_to(path, step):
    """The lines of metrics.jsonl that a run resumed at `step` keeps, header first; an empty list for a new run."""
    if not step or not path.exists():
        return []
    return [to_json(record) for record in records_of(path) if record.get("step", -1) <= step]


def records_of(path):
    """The lines of metrics.jsonl as dicts, header first, without the half of one that a killed process may leave."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def cut_samples(path, step):
    """Cut samples.md off where the first step after `step` begins."""
    if path.exists():
        marks = re.finditer(rb"^<!-- step (\d+) -->$", path.read_bytes(), re.M)
        later = [mark.start() for mark in marks if int(mark[1]) > step]
        if later:
            os.truncate(path, later[0])


@cache
def commit():
    """The commit of this repository, with + appended if files have changed since; "" without git. Asked once: a process
    goes on with the code that it has read."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, encoding="utf-8", check=False).stdout.strip()
    except OSError:
        return ""
