"""metrics.jsonl, TensorBoard, Weights & Biases."""

import html
import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from support.locks import let_go


def commit():
    """Of this repository, with + if files differ from it; nothing without git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


class Log:
    """metrics.jsonl, TensorBoard and, if asked for, Weights & Biases: one record per call. Silent off rank 0.

    A resumed run's file is cut back to the step it resumes from, and so is samples.md: each step stands in them once.
    """

    def __init__(self, run_dir, config, dist, first_step=0):
        self.active, self.path, self.wandb = dist.is_main, run_dir / "metrics.jsonl", None
        self.run_dir = run_dir
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        kept = []
        if first_step and self.path.exists():
            lines = [x for x in self.path.read_text().splitlines() if x.endswith("}")]  # a kill may cut the last one
            kept = [x for x in lines if json.loads(x).get("step", -1) <= first_step]
        header = {
            "config": asdict(config),
            "commit": commit(),
            "torch": torch.__version__,
            "device": str(dist.device),
            "world": dist.world,
        }
        self.path.write_text("".join(line + "\n" for line in kept or [json.dumps(header)]))
        said = run_dir / "samples.md"
        if said.exists():
            marks = re.finditer(rb"^<!-- step (\d+) -->$", said.read_bytes(), re.M)
            later = [mark.start() for mark in marks if int(mark[1]) > first_step]
            if later:
                os.truncate(said, later[0])
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)
        if config.wandb:
            import wandb

            known = run_dir / "wandb_id"  # a resumed run goes on in the same one there
            if not (first_step and known.exists()):
                known.write_text(wandb.util.generate_id())
            about = {"project": config.wandb, "name": config.name, "config": header}
            self.wandb = wandb.init(**about, id=known.read_text(), resume="allow")

    def __call__(self, step, **record):
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        for name, value in record.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(record, step=step)

    def samples(self, step, text):
        """What the model said, in Markdown: into samples.md, behind a comment with the step, and to the trackers."""
        if not self.active:
            return
        with (self.run_dir / "samples.md").open("a") as file:
            file.write(f"<!-- step {step} -->\n" + text.rstrip("\n") + "\n\n")
        self.board.add_text("samples", text, step)
        if self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def show(self, step, pictures=(), histograms=()):
        """For the trackers alone. pictures: names of PNG files in the run directory; histograms: {name: tensor}."""
        if not self.active:
            return
        from matplotlib.image import imread

        for name in pictures:
            self.board.add_image(name, imread(self.run_dir / f"{name}.png"), step, dataformats="HWC")
        for name, values in dict(histograms).items():
            self.board.add_histogram(name, values.detach().float().cpu(), step)
        if self.wandb is not None:
            import wandb

            shown = {name: wandb.Image(str(self.run_dir / f"{name}.png")) for name in pictures}
            shown |= {k: wandb.Histogram(v.detach().float().cpu().numpy()) for k, v in dict(histograms).items()}
            self.wandb.log(shown, step=step)

    def close(self):
        if self.active:
            self.board.close()
            if self.wandb is not None:
                self.wandb.finish()
            let_go(self.run_dir)


def read_metrics(run_dir):
    """metrics.jsonl as {name: (steps, values)}, for drawing."""
    series = {}
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if "step" in record and name != "step" and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return series
