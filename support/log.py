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
"""

import html
import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from support.locks import unlock_run


class Log:
    """metrics.jsonl, samples.md and the trackers of a run, open until `close`; see above."""

    def __init__(self, run_dir, config, dist, first_step=0):
        """first_step: the number of steps that the run has already done; records of later steps are removed."""
        self.run_dir, self.active = run_dir, dist.is_main
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        header = {
            "config": asdict(config),
            "commit": commit(),
            "torch": torch.__version__,
            "device": str(dist.device),
            "world": dist.world,
        }
        self.path = run_dir / "metrics.jsonl"
        lines = lines_up_to(self.path, first_step) or [json.dumps(header)]
        self.path.write_text("".join(line + "\n" for line in lines))
        cut_samples(run_dir / "samples.md", first_step)
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        self.wandb = open_wandb(run_dir, config, header, resumed=first_step > 0) if config.wandb else None

    def __call__(self, step, **record):
        """Record the numbers of a step, by name."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        for name, value in record.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(record, step=step)

    def samples(self, step, text):
        """Record generated text, as Markdown: in samples.md, after a comment with the step, and in the trackers."""
        if not self.active:
            return
        with (self.run_dir / "samples.md").open("a") as file:
            file.write(f"<!-- step {step} -->\n" + text.rstrip("\n") + "\n\n")
        self.board.add_text("samples", text, step)
        if self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def show(self, step, pictures=(), histograms=()):
        """Trackers only. pictures: names of PNG files in the run directory; histograms: {name: tensor}."""
        if not self.active:
            return
        from matplotlib.image import imread

        histograms = {name: values.detach().float().cpu() for name, values in dict(histograms).items()}
        for name in pictures:
            self.board.add_image(name, imread(self.run_dir / f"{name}.png"), step, dataformats="HWC")
        for name, values in histograms.items():
            self.board.add_histogram(name, values, step)
        if self.wandb is not None:
            import wandb

            media = {name: wandb.Image(str(self.run_dir / f"{name}.png")) for name in pictures}
            media |= {name: wandb.Histogram(values.numpy()) for name, values in histograms.items()}
            self.wandb.log(media, step=step)

    def close(self):
        """Close the trackers and unlock the run directory, which `open_run` locked."""
        if self.active:
            self.board.close()
            if self.wandb is not None:
                self.wandb.finish()
            unlock_run(self.run_dir)


def read_metrics(run_dir):
    """metrics.jsonl -> {name: (steps, values)}."""
    series = {}
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if "step" in record and name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series


def lines_up_to(path, step):
    """The lines of metrics.jsonl that a run resumed at `step` keeps, header first; an empty list for a new run."""
    if not step or not path.exists():
        return []
    lines = [
        line for line in path.read_text().splitlines() if line.endswith("}")
    ]  # a killed process may leave half a line
    return [line for line in lines if json.loads(line).get("step", -1) <= step]


def cut_samples(path, step):
    """Cut samples.md off where the first step after `step` begins."""
    if path.exists():
        marks = re.finditer(rb"^<!-- step (\d+) -->$", path.read_bytes(), re.M)
        later = [mark.start() for mark in marks if int(mark[1]) > step]
        if later:
            os.truncate(path, later[0])


def open_wandb(run_dir, config, header, resumed):
    """Open a Weights & Biases run. A resumed run continues the W&B run whose id the file wandb_id holds."""
    import wandb

    id_file = run_dir / "wandb_id"
    if not (resumed and id_file.exists()):
        id_file.write_text(wandb.util.generate_id())
    settings = {"project": config.wandb, "name": config.name, "config": header}
    return wandb.init(**settings, id=id_file.read_text(), resume="allow")


def commit():
    """The commit of this repository, with + appended if files have changed since; "" without git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
