"""One run of an experiment of ablate.py: a variant with a seed, from its settings to its figures, in a folder.

settings = settings_of(experiment, variant, seed)    what determines the outcome, as JSON: equal is the same run
made     = digest_of(settings)                       the same for all seeds of a variant
figures  = run_one(settings, folder, threads)        the stage's main, then the probe; folder/result.json
result   = read_result(folder)                       {"settings", "commit", "machine", "code", "starts",
                                                     "figures"}, or None
"""

import contextlib
import hashlib
import json
import math
import statistics
import time
import traceback
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import torch

import agent
import distill
import dpo
import gdpo
import grpo
import ppo
import pretrain
import rejection
import sft
from support import probes
from support.ablation_report import machine
from support.checkpoints import open_checkpoint
from support.code_used import ROOT, code_used
from support.content import content_of_data, sha256
from support.errors import FOR_THE_USER, ConfigError, DivergedError
from support.files import read_json, reason, to_json, with_nan, write_whole
from support.heap import return_freed_memory
from support.log import commit, read_metrics
from support.output import log_file
from support.runs import RUNS, STARTS, Run

STAGES = {
    "pretrain": (pretrain.Config, pretrain.main),
    "sft": (sft.Config, sft.main),
    "dpo": (dpo.Config, dpo.main),
    "ppo": (ppo.Config, ppo.main),
    "grpo": (grpo.Config, grpo.main),
    "gdpo": (gdpo.Config, gdpo.main),
    "rejection": (rejection.Config, rejection.main),
    "distill": (distill.Config, distill.main),
    "student_grpo": (grpo.Config, probes.grpo_of_student),
    "agent": (agent.Config, agent.main),
    "measure": (probes.Start, probes.measure_start),
}
code_used([*{part.__module__ for pair in STAGES.values() for part in pair}, "support.probes"])  # now, as imported
# Of a smoke run, and of a run for tuning, if the stage has these settings.
QUICK = {"steps": 4, "round_steps": 2, "test_problems": 20, "eval_problems": 10}
TRIAL = {"eval_every": 10, "test_problems": 1, "pass_problems": 1, "pass_samples": 1}
TRIAL_OF_PAIRS = TRIAL | {"test_problems": 50}  # one problem alone may give no pair


def config_of(stage, settings):
    """The Config of a stage; a nested dataclass comes as a dictionary."""
    cls, _ = STAGES[stage]
    nested = {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}
    return cls(**{k: nested[k](**v) if k in nested else v for k, v in settings.items()})


def flags_of_stage(stage, flags):
    """Those of the flags that a stage has."""
    return {k: v for k, v in flags.items() if k in {f.name for f in fields(STAGES[stage][0])}}


def settings_of(experiment, variant, seed, quick=False):
    """What determines a run's outcome, as JSON: equal settings are the same run. "reads" is the content of the data.
    Left out are the code (`code_of_run`), the number of threads, and the machine with the dtype that `auto` takes."""
    stage, flags = experiment.variants[variant]
    flags = {k: v() if callable(v) else v for k, v in flags.items()} | {"seed": seed}  # the corpus is looked up now
    if quick:
        flags |= flags_of_stage(stage, QUICK)
    built = asdict(config_of(stage, flags))
    data = content_of_data(built["data"]) if "data" in built else None
    settings = {"stage": stage, "config": built, "probe": experiment.probe, "reads": data}
    return json.loads(to_json(settings))


def digest_of(settings):
    """A short text that is the same for runs that differ in the seed alone."""
    config = {k: v for k, v in settings["config"].items() if k != "seed"}
    return hashlib.sha256(to_json(settings | {"config": config}, sort_keys=True).encode()).hexdigest()[:12]


def code_of_run(settings):
    """{file: digest} of what a run's figures depend on: the code of its stage, and of its probe if it has one, with the
    files that this reads. This file is not among them, as it imports every stage: after a change of `figures_of`
    delete the runs that it concerns."""
    (config, stage_main), probe = STAGES[settings["stage"]], settings["probe"]
    code = code_used([config.__module__, stage_main.__module__, *(["support.probes"] if probe else [])])
    return code | {str(path.relative_to(ROOT)): sha256(path)[:12] for path in probes.READS.get(probe, ())}


def run_one(settings, folder, threads):
    """Run a variant with a seed -> its figures, also written to folder/result.json; {"diverged": …} if it did. Called
    in a worker process."""
    torch.set_num_threads(threads)
    return_freed_memory()  # that of the run before
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # this run takes the place of what it tells of
    # Noted before the run: a file that is edited while it trains is not the code that this process has imported.
    made_by = {"commit": commit() or "unknown", "machine": machine(), "code": code_of_run(settings)}
    STARTS.clear()
    try:
        with log_file(folder / "log.txt") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                figures = figures_of(settings, folder)
            except Exception as error:
                if not isinstance(error, FOR_THE_USER):
                    traceback.print_exc()
                raise
    except DivergedError as error:
        figures = {"diverged": str(error)}
    Run.close_log()  # of this worker, which may wait for the other runs
    write_whole(
        folder / "result.json", to_json({"settings": settings, **made_by, "starts": STARTS, "figures": figures})
    )
    return figures


def curves_of(run_dir):
    """{name: (steps, values)}; of a start, which is only measured, {}."""
    return read_metrics(run_dir) if run_dir.exists() else {}


def figures_of(settings, folder):
    """{name: number or text, of a probe also a list}: the stage's held-out evaluation after training, accuracies in per
    cent; the last values of what is logged at validations only; size; minutes, with those of a start or a reward model
    that the stage trains for itself; and what the experiment's probe measures."""
    started = time.perf_counter()
    _, stage_main = STAGES[settings["stage"]]
    run_dir = folder / "run"
    name = str(run_dir.relative_to(RUNS))
    returned = stage_main(config_of(settings["stage"], settings["config"] | {"name": name}))
    returned = returned.get("after", {}) | returned
    figures = {k: v for k, v in returned.items() if isinstance(v, int | float | str)}
    figures |= {k: 100 * figures[k] for k in ("accuracy", "story_kept") if k in figures}
    figures["minutes"] = (time.perf_counter() - started) / 60
    logged = curves_of(run_dir)
    figures |= {k: logged[k][1][-1] for k in ("valid_loss", "load_min", "load_max") if k in logged}
    model, _, _ = open_checkpoint(figures["path"])
    c = model.config
    figures |= {"parameters": model.num_params(), "cache": 2 * c.n_layer * c.n_kv_head * c.head_dim}
    if settings["probe"]:
        figures |= getattr(probes, settings["probe"])(run_dir, figures, settings)
    return figures


def read_result(folder):
    """What run_one wrote to the folder, or None. ConfigError if the file is damaged."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = read_json(path)
        return result | {"figures": with_nan(result["figures"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({reason(error)}): delete it to make this run anew") from None


def folder_name(*parts):
    """The name of a folder."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in ".-" else "_" for c in "-".join(map(str, parts)))


def validation_score(folder):
    """The mean validation accuracy over the second half of a run, which is steadier than the last alone; −inf if it
    diverged. Of pretrain.py, which answers nothing, minus the loss."""
    if "diverged" in read_result(folder)["figures"]:
        return -math.inf
    logged = read_metrics(folder / "run")
    name, sign = ("accuracy", 1) if "accuracy" in logged else ("valid_loss", -1)
    steps, values = logged[name]
    return sign * statistics.mean(value for step, value in zip(steps, values, strict=True) if step > steps[-1] / 2)
