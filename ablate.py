"""Controlled experiments: change one factor, hold the rest, repeat with several seeds; one table and one picture.

One training run is one draw from a distribution: another seed gives other initial weights, another order of the data,
another result. Two variants with one run each may differ by their seeds alone. So every variant runs with the same n
seeds, and an interval is reported (arXiv:2304.01315 on why few seeds mislead). Of n numbers, one per seed:

    mean ± half     half = t(0.975, n − 1) · s / √n          s: the standard deviation over the seeds, with n − 1
    difference      the same of the n *paired* differences a_i − b_i, i the seed

The interval covers the true mean in 95 % of such experiments if the seeds' results are roughly normal. t is Student's
quantile, 4.30 for three seeds and not the normal law's 1.96, because s is itself estimated from few numbers. The same
seed gives both variants the same start and the same data order: what the pair shares cancels, which two separate
intervals would hide (`demo`). A difference is *significant at 95 %* if its interval leaves out 0.

An experiment is a row of EXPERIMENTS: a question, what is held, and its variants. A variant is a stage and the flags
that differ, so every run can be repeated by hand with the stage's own script (or `measure`: a start as it is, without
training). In pseudo-code, as in `main`:

    todo        = (variant, seed) without a result made by these settings                           1. what is missing
    results     = {(variant, seed): {metric: number}}      each the stage's main, then the probe    2. run
    means       = {variant: {metric: student_interval(its n numbers)}}                              3. compare
    differences = {(a, b): {metric: paired_difference(n numbers of a, n of b)}}
    results/NAME.md and results/NAME.png                                                            4. report

Without a name it works the example and lists the experiments. The defaults run seeds 0, 1 and 2, two runs at a time,
each in a process of its own, and only what is missing. Off by default: --quick, a smoke run; --again, which repeats
runs whose settings have changed.

Traps:

* With three seeds only large effects are significant. "Not significant" does not mean "equal": look at the interval.
* Each interval is for its difference alone. Of twenty differences that are all 0, one is expected to be significant.
* The interval is of the seeds' spread, not of the test problems', which stay the same.
* Choosing a variant by the test split would flatter it. No experiment does: losses are those of the validation split,
  accuracies those of the held-out test problems, seen once.

A run ends in runs/ablate/NAME/VARIANT-seedS/result.json, with the commit and all settings, defaults included. While the
settings stay the same it is not repeated. An interrupted run starts over; one that diverged has that as its result.

Run it:
    python ablate.py                         # the example by hand, and the list of experiments
    python ablate.py norm-kind               # results/norm-kind.md and .png
    python ablate.py ladder --quick true     # a smoke run: few steps, nothing is written to results/
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import dpo
import gdpo
import grpo
import ppo
import pretrain
import sft
from support import probes
from support.ablation_report import draw, page, seeds_on, side_by_side, write_page
from support.checkpoints import open_checkpoint
from support.checks import Count, Seed, check
from support.cli import run_script
from support.content import content_of_data
from support.copy_lines import MOST_DOTS, copy_file
from support.errors import ConfigError, DivergedError
from support.log import commit, read_metrics
from support.runs import RUNS

# ---------------------------------------------------------------------------------------------------------------
# The statistics.

# t(0.975, n − 1) by n; above 10 the one of 10, which is slightly too wide.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Interval(NamedTuple):
    """mean ± half."""

    mean: float
    half: float  # NaN if there is none

    @property
    def significant(self):
        """Whether it leaves out 0."""
        return abs(self.mean) > self.half


def student_interval(values):
    """Student's 95 % interval for the mean of n numbers. One number has no spread and so no interval; if one of them is
    not finite (a run that diverged), there is no mean either."""
    n = len(values)
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan)
    half = T_975[min(n, 10)] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(statistics.mean(values), half)


def paired_difference(a, b):
    """a, b: n numbers each, in the order of the seeds -> the interval of a − b."""
    return student_interval([x - y for x, y in zip(a, b, strict=True)])


def means_of(experiment, results, seeds):
    """{(variant, seed): figures} -> {variant: {metric: the interval of its mean}}."""
    values = {v: by_seed(results, v, seeds, experiment.columns) for v in experiment.variants}
    return {v: {metric: student_interval(x) for metric, x in of_metric.items()} for v, of_metric in values.items()}


def differences_of(experiment, results, seeds):
    """{(variant, seed): figures} -> {(a, b): {metric: the interval of a − b}} of the variants that are compared."""
    values = {v: by_seed(results, v, seeds, experiment.columns) for v in experiment.variants}
    return {
        (a, b): {metric: paired_difference(values[a][metric], values[b][metric]) for metric in experiment.columns}
        for a, b in experiment.compared()
    }


def by_seed(results, variant, seeds, metrics):
    """{metric: its values, one per seed}, NaN where there is none."""
    return {metric: [results[variant, seed].get(metric, math.nan) for seed in seeds] for metric in metrics}


def mean_curves(logs, variants, seeds, metric):
    """{(variant, seed): its metrics.jsonl} -> {variant: (steps, intervals)} of a metric, for the variants that log
    it."""
    curves = {}
    for variant in variants:
        runs = [logs[variant, seed][metric] for seed in seeds if metric in logs[variant, seed]]
        steps, values = side_by_side(runs)  # (points,), (seeds, points)
        if len(steps):
            curves[variant] = steps.tolist(), [student_interval(point) for point in values.T.tolist()]
    return curves


def demo():
    """Three seeds of two variants: b is above a by about the same in each, which only pairing shows."""
    a, b = [1.0, 2.0, 3.0], [1.5, 2.51, 3.49]
    of_a, of_b, of_difference = student_interval(a), student_interval(b), paired_difference(b, a)
    assert abs(of_a.half - 4.303 * 1 / 3**0.5) < 1e-9  # the deviations are −1, 0, 1, so s = 1
    assert of_a.mean + of_a.half > of_b.mean  # b's mean lies inside a's interval
    assert of_difference.significant
    assert abs(of_difference.half - 4.303 * 0.01 / 3**0.5) < 1e-9  # the deviations are 0, 0.01, −0.01
    assert not paired_difference([2.51, 3.49, 1.5], a).significant  # the same numbers, but not paired by seed
    print(
        f"""seed       0      1      2     mean ± half, half = 4.303 s / √3
a       1.00   2.00   3.00     {of_a.mean:.2f} ± {of_a.half:.2f}
b       1.50   2.51   3.49     {of_b.mean:.2f} ± {of_b.half:.2f}    inside a's interval: b seems no better
b − a   0.50   0.51   0.49     {of_difference.mean:.2f} ± {of_difference.half:.2f}    significant: it leaves out 0
"""
    )


# ---------------------------------------------------------------------------------------------------------------
# The experiments.


@dataclass
class Experiment:
    """One question. `variants`: {label: (stage, {flag: value})}; `columns`: the metrics of the table; `curves`: the
    logged ones in the picture. Their labels are in support/ablation_report.py."""

    question: str
    held: str
    variants: dict
    columns: tuple
    curves: tuple
    probe: str | None = None  # the function of support/probes.py that measures more
    against: str | None = None  # the variant that the others are compared with; default: the first
    pairs: tuple = ()  # or, named one by one: (variant, the one it is compared with)
    bars: tuple = ()  # columns drawn beside the first
    dashed: str = ""  # variants with this in their name are drawn dashed, as some coincide with their twins
    front: tuple = ()  # two columns to draw against each other, a point per run

    def compared(self):
        """[(variant, the one it is compared with), …]"""
        first = self.against or next(iter(self.variants))
        return self.pairs or [(v, first) for v in self.variants if v != first]

    @property
    def unit(self):
        """Of a loss: the character models' tokens are characters."""
        return "character" if any(flags.get("tokenizer") == "char" for _, flags in self.variants.values()) else "token"


def _pretrain(**changes):
    """A small character model: 0.8 M parameters, 600 steps of 16 x 128 tokens."""
    flags = {"data": probes.corpus, "tokenizer": "char", "steps": 600, "batch": 16, "micro_batch": 16}
    flags |= {"optimizer": "adamw", "lr": 2e-3, "warmup": 50, "eval_every": 200, "save_every": 100_000}
    flags |= {k: changes.pop(k) for k in list(changes) if k in ("lr", "warmup", "clip", "data", "steps")}
    return "pretrain", flags | {"model": {"context": 128, "n_head": 4, "n_kv_head": 4, "width": 128} | changes}


def _grpo(stage="grpo", **flags):
    """One optimizer step per batch of rollouts and no KL penalty: only what the experiment varies is at work."""
    plain = {"prompts": 16, "minibatches": 1, "beta": 0.0, "lr": 3e-4}
    return stage, plain | {"steps": 150, "test_problems": 500, "eval_every": 50, "pass_problems": 50} | flags


def _dpo(**flags):
    return "dpo", {"steps": 150, "prompts": 1500, "eval_every": 50, "test_problems": 500} | flags


def _chars(size="4 layers, width 128", steps=600):
    return f"a character model of {size}, context 128; AdamW, {steps} steps of 16 windows, the data order"


_PROMPTS = (
    "the SFT checkpoint that the stage itself makes for the seed, 16 prompts x 8 rollouts and one optimizer step per "
    "batch, no KL penalty, lr 3e-4 (but for the variant's own settings), the prompts' order"
)
_POLICY = ("accuracy", "format", "length", "kl")

_GRPO = {
    "default": _grpo(),
    "4 rollouts x 32 prompts": _grpo(prompts=32, rollouts=4),
    "16 rollouts x 8 prompts": _grpo(prompts=8, rollouts=16),
    "no std": _grpo(scale="none"),
    "lr 1e-4": _grpo(lr=1e-4),
    "lr 1e-3": _grpo(lr=1e-3),
    "beta 0.05": _grpo(beta=0.05),
    "2 inner epochs": _grpo(inner_epochs=2),
    "clip higher": _grpo(clip_high=0.28, inner_epochs=2),
    "dapo": _grpo(loss_type="dapo"),
    "dr_grpo": _grpo(loss_type="dr_grpo"),
}

EXPERIMENTS = {
    "ladder": Experiment(
        "What does each stage add, from the same start, on the same held-out problems?",
        "the pretrained and the SFT checkpoint of a seed, the 1,000 test problems, greedy decoding",
        {
            "base": ("measure", {"start": "pretrain"}),
            "SFT": ("measure", {"start": "sft"}),  # from which all that follow start
            "PPO": ("ppo", {"steps": 80, "baseline": "wins", "normalise": False, "lam": 1.0, "minibatches": 1}),
            "DPO": ("dpo", {"steps": 80, "prompts": 1000}),
            "GRPO": _grpo(steps=80, test_problems=1000, pass_problems=20),
            "GDPO": _grpo("gdpo", steps=80, test_problems=1000, pass_problems=20, brevity_weight=0.2),
        },
        ("accuracy", "pass_at_8", "sampled", "format", "length", "kl", "minutes"),
        (),
        probe="held_out",
        bars=("sampled", "pass_at_8"),
        against="SFT",
    ),
    "norm-placement": Experiment(
        "Where should the norm stand: before a branch, after it, or both, with and without a warm-up?",
        _chars("12 layers, width 64", 400),
        {
            f"{placement}, {'warm-up' if warmup > 1 else 'no warm-up'}": _pretrain(
                norm_placement=placement, n_layer=12, width=64, warmup=warmup, steps=400
            )
            for warmup in (50, 1)
            for placement in ("pre", "post", "sandwich")
        },
        ("valid_loss", "gradient_ratio", "entropy"),
        ("loss", "grad_norm"),
        probe="layers",
        dashed="no warm-up",
        pairs=tuple((f"{p}, {w}", f"pre, {w}") for w in ("warm-up", "no warm-up") for p in ("post", "sandwich"))
        + tuple((f"{p}, no warm-up", f"{p}, warm-up") for p in ("pre", "post", "sandwich")),
    ),
    "norm-depth": Experiment(
        "How deep can a stack be with the norm after its branches, and before them?",
        _chars("6 to 48 layers, width 64", 200) + "; a warm-up of 50 steps",
        {
            f"{placement}, {depth} layers": _pretrain(norm_placement=placement, n_layer=depth, width=64, steps=200)
            for depth in (6, 12, 24, 48)
            for placement in ("pre", "post")
        },
        ("valid_loss", "gradient_ratio", "entropy"),
        ("loss", "grad_norm"),
        probe="layers",
        pairs=tuple((f"post, {depth} layers", f"pre, {depth} layers") for depth in (6, 12, 24, 48)),
    ),
    "norm-kind": Experiment(
        "Does it matter that RMSNorm leaves the mean in?",
        _chars(),
        {"LayerNorm": _pretrain(norm="layer"), "RMSNorm": _pretrain(norm="rms")},
        ("valid_loss", "minutes"),
        ("loss", "grad_norm"),
    ),
    "positions": Experiment(
        "What do positions buy inside the trained length, and beyond it?",
        _chars(),
        {kind: _pretrain(positions=kind) for kind in ("none", "learned", "sinusoidal", "rope")},
        ("valid_loss", "inside", "outside", "entropy"),
        ("loss",),
        probe="beyond",
    ),
    "copying": Experiment(
        "How far can a letter be carried, with each kind of positions, inside and beyond the distances of training?",
        "a character model of 2 layers, width 64, context 128; AdamW, 2,000 steps of 16 windows, the data order; lines "
        f"of a letter, 0 to {MOST_DOTS} dots, the same letter",
        {
            kind: _pretrain(positions=kind, data=copy_file, n_layer=2, width=64, lr=1e-3, steps=2000)
            for kind in ("none", "learned", "sinusoidal", "rope")
        },
        ("copied_inside", "copied_outside"),
        ("loss",),
        probe="copying",
    ),
    "grad-clip": Experiment(
        "What does clipping the gradient's norm change, at a good and at a high learning rate?",
        _chars(),
        {f"clip {clip or 'off'}, lr {lr:g}": _pretrain(clip=clip, lr=lr) for lr in (2e-3, 2e-2) for clip in (1.0, 0.0)},
        ("valid_loss", "norm_median", "norm_p99", "clipped_share", "spikes"),
        ("loss", "grad_norm"),
        probe="clipping",
        pairs=tuple((f"clip off, lr {lr:g}", f"clip 1.0, lr {lr:g}") for lr in (2e-3, 2e-2))
        + tuple((f"clip {clip}, lr 0.02", f"clip {clip}, lr 0.002") for clip in ("1.0", "off")),
    ),
    "ffn": Experiment(
        "GELU or SwiGLU, at equal parameters?",
        _chars() + "; inner width 512 for GELU's two matrices, 341 for SwiGLU's three",
        {
            "GELU": _pretrain(activation="gelu", ffn_width=512),
            "SwiGLU": _pretrain(activation="swiglu", ffn_width=341),
        },
        ("valid_loss", "minutes"),
        ("loss",),
    ),
    "kv-heads": Experiment(
        "What do shared key/value heads cost in loss, and save in the cache?",
        _chars(),
        {
            f"{name}, {g} of 4": _pretrain(n_kv_head=g)
            for name, g in (("multi-head", 4), ("grouped", 2), ("multi-query", 1))
        },
        ("valid_loss", "cache", "parameters"),
        ("loss",),
    ),
    "moe": Experiment(
        "Experts at equal active parameters: dense, and three ways to balance.",
        _chars() + "; 8 experts of inner width 160, 2 active, against a dense inner width of 320",
        {
            "dense": _pretrain(ffn_width=320),
            **{
                f"8 experts, {kind}": _pretrain(
                    n_expert=8, n_expert_active=2, ffn_width=320, expert_width=160, balancing=kind
                )
                for kind in ("aux", "bias", "none")
            },
        },
        ("valid_loss", "load_min", "load_max", "parameters"),
        ("loss", "load_max"),
        pairs=tuple((f"8 experts, {kind}", "dense") for kind in ("aux", "bias", "none"))
        + tuple((f"8 experts, {kind}", "8 experts, aux") for kind in ("bias", "none"))
        + (("8 experts, bias", "8 experts, none"),),
    ),
    "curriculum": Experiment(
        "Does the order of the demonstrations matter: shuffled, easy to hard, hard to easy?",
        "the pretrained checkpoint of a seed, 100 steps of SFT on levels 1 to 3",
        {
            order: ("sft", {"order": order, "steps": 100, "levels": [1, 2, 3], "test_problems": 500})
            for order in ("shuffled", "curriculum", "anti")
        },
        ("accuracy",),
        ("loss",),
    ),
    "sft-lr": Experiment(
        "Which learning rate does SFT want?",
        "the pretrained checkpoint of a seed, 60 steps of SFT with Muon",
        {f"lr {lr:g}": ("sft", {"lr": lr, "steps": 60, "test_problems": 500}) for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)},
        ("accuracy",),
        ("loss",),
    ),
    "grpo": Experiment(
        "Which of GRPO's settings matter, in 150 steps?",
        _PROMPTS,
        _GRPO,
        _POLICY,
        ("reward_correct", "kl"),
        pairs=tuple((v, "2 inner epochs" if v == "clip higher" else "default") for v in list(_GRPO)[1:]),
    ),
    "gdpo": Experiment(
        "Three rewards: GRPO on the answer alone, GRPO on the sum, GDPO, and brevity paid for right answers alone.",
        _PROMPTS,
        {
            "GRPO, answer alone": _grpo(format_weight=0.0),
            "GRPO, sum": _grpo("gdpo", combine="sum", format_weight=0.5, brevity_weight=0.5),
            "GDPO": _grpo("gdpo", format_weight=0.5, brevity_weight=0.5),
            "GDPO, brevity if right": _grpo("gdpo", format_weight=0.5, brevity_weight=0.5, conditioned=["brevity"]),
        },
        (*_POLICY, "earned_correct", "earned_format", "earned_brevity", "collapsed"),
        ("reward_correct", "reward_format", "reward_brevity", "collapsed_grpo"),
        front=("earned_brevity", "earned_correct"),
        probe="earned",
    ),
    "dpo": Experiment(
        "Beta and variant, offline against sampled pairs.",
        "the SFT checkpoint of a seed, 150 steps of 32 pairs, prompts and their order",
        {
            "sampled pairs": _dpo(),
            "without the NLL term": _dpo(nll=0.0),
            "beta 0.05": _dpo(beta=0.05),
            "beta 1": _dpo(beta=1.0),
            "ipo": _dpo(variant="ipo", beta=0.1),
            "hinge": _dpo(variant="hinge"),
            "simpo": _dpo(variant="simpo", beta=2.0, gamma=0.5),
            "corrupted solutions": _dpo(pairs="offline"),
        },
        ("accuracy", "length"),
        ("logp_chosen", "pair_accuracy", "kl"),
    ),
}


# ---------------------------------------------------------------------------------------------------------------
# One run: a variant with a seed.

STAGES = {
    "pretrain": (pretrain.Config, pretrain.main),
    "sft": (sft.Config, sft.main),
    "dpo": (dpo.Config, dpo.main),
    "ppo": (ppo.Config, ppo.main),
    "grpo": (grpo.Config, grpo.main),
    "gdpo": (gdpo.Config, gdpo.main),
    "measure": (probes.Start, probes.measure_start),
}
QUICK = {"steps": 4, "test_problems": 20, "eval_problems": 10}  # of a smoke run, if the stage has these settings


def build(stage, settings):
    """The Config of a stage; a nested dataclass comes as a dictionary."""
    cls, _ = STAGES[stage]
    nested = {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}
    return cls(**{k: nested[k](**v) if k in nested else v for k, v in settings.items()})


def settings_of(experiment, variant, seed, quick=False):
    """Everything that determines a run's outcome except the code, as JSON: equal settings are the same run. "reads" is
    the content of the data."""
    stage, flags = experiment.variants[variant]
    flags = {k: v() if callable(v) else v for k, v in flags.items()} | {"seed": seed}  # the corpus is looked up now
    if quick:
        flags |= {k: v for k, v in QUICK.items() if k in {f.name for f in fields(STAGES[stage][0])}}
    built = asdict(build(stage, flags))
    data = content_of_data(built["data"]) if "data" in built else None
    settings = {"stage": stage, "config": built, "probe": experiment.probe, "reads": data}
    return json.loads(json.dumps(settings))


STOPPED = []  # in a worker process: not empty once it was stopped


def run_one(settings, folder, threads):
    """Run a variant with a seed -> its figures, also written to folder/result.json; {"diverged": …} if it did. Called
    in a worker process. One that was stopped refuses the next run: the pool queues one more than it has processes."""
    if STOPPED:
        raise KeyboardInterrupt
    torch.set_num_threads(threads)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            figures = figures_of(settings, folder)
    except DivergedError as error:
        figures = {"diverged": str(error)}
    except (KeyboardInterrupt, SystemExit):
        STOPPED.append(True)
        raise
    result = {"settings": settings, "commit": commit() or "unknown", "figures": figures}
    (folder / "result.tmp").write_text(json.dumps(result))
    (folder / "result.tmp").replace(folder / "result.json")
    return figures


def figures_of(settings, folder):
    """{metric: number}: the stage's held-out evaluation after training, accuracies in per cent; the last values of what
    is logged at validations only; size and time; and what the experiment's probe measures."""
    started = time.perf_counter()
    _, stage_main = STAGES[settings["stage"]]
    run_dir = folder / "run"
    name = str(run_dir.relative_to(RUNS))
    returned = stage_main(build(settings["stage"], settings["config"] | {"name": name}))
    figures = {k: v for k, v in (returned.get("after", {}) | returned).items() if isinstance(v, int | float | str)}
    figures |= {k: 100 * figures[k] for k in ("accuracy", "format", "pass_at_8") if k in figures}
    figures["minutes"] = (time.perf_counter() - started) / 60
    logged = read_metrics(run_dir) if run_dir.exists() else {}  # a start has none
    figures |= {k: logged[k][1][-1] for k in ("valid_loss", "load_min", "load_max") if k in logged}
    model, _, _ = open_checkpoint(figures["path"])
    c = model.config
    figures |= {"parameters": model.num_params(), "cache": 2 * c.n_layer * c.n_kv_head * c.head_dim}
    if settings["probe"]:
        figures |= getattr(probes, settings["probe"])(run_dir, figures, settings)
    return figures


# ---------------------------------------------------------------------------------------------------------------
# All of them.


@dataclass
class Config:
    """Run a controlled experiment; without a name, work the statistics by hand and list the experiments."""

    experiment: str | None = None
    """Its name."""
    quick: bool = False
    """A smoke run of a few steps and one seed; results/ is left alone. (The start that later stages share is trained in
    full, in runs/start.)"""
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    """One run of each variant per seed."""
    again: bool = False
    """Repeat runs whose results were made by other settings (other defaults, another text)."""
    jobs: Count = 2
    """Runs at a time; they share the cores."""

    def __post_init__(self):
        check(self)
        if self.experiment not in (None, *EXPERIMENTS):
            raise ConfigError(f"{self.experiment!r} is not an experiment; they are: {', '.join(EXPERIMENTS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {self.seeds}; it must be a list of different numbers")


def pass_on(number, _):
    """SIGTERM as Ctrl-C to the runs: a terminal sends Ctrl-C to all processes, but SIGTERM reaches this one alone."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    raise KeyboardInterrupt


def run_all(todo, jobs, bar):
    """{(variant, seed): (settings, folder)} -> the failures, a line each. Ctrl-C stops the runs, which save."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failed = []
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, pass_on)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            runs = {pool.submit(run_one, *arguments, threads): key for key, arguments in todo.items()}
            for job in as_completed(runs):
                variant, seed = runs[job]
                try:
                    job.result()
                except (Exception, SystemExit) as error:
                    failed.append(f"{variant}, seed {seed}: {error} (see {todo[variant, seed][1]}/log.txt)")
                bar.update()
        except KeyboardInterrupt:  # the runs got it too and have stopped; those in the queue do not start
            pool.shutdown(cancel_futures=True)
            bar.close()
            print("stopped; the same command makes the runs that are missing")
            raise SystemExit(130) from None
    return failed


def read_result(folder):
    """What run_one wrote to the folder, or None."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def main(config):
    """Run what is missing, then write results/NAME.md and .png; returns {(variant, seed): figures}."""
    if config.experiment is None:
        demo()
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<16}{experiment.question}\n{'':<16}{', '.join(experiment.variants)}")
        return None
    name, experiment = config.experiment, EXPERIMENTS[config.experiment]
    seeds = config.seeds[:1] if config.quick else config.seeds
    top = RUNS / "ablate" / (f"{name}-quick" if config.quick else name)
    target = (top if config.quick else Path(__file__).parent / "results") / f"{name}.md"
    if not config.quick and (lost := [str(seed) for seed in seeds_on(target) if seed not in seeds]):
        raise ConfigError(f"{target} also has the seeds {', '.join(lost)}: move it aside, or run them too")

    # 1. what is missing
    folders, todo, stale = {}, {}, []
    for variant in experiment.variants:
        for seed in seeds:  # the inner loop: neighbours have different starts, so none waits for another's
            label = "".join(c if c.isalnum() or c in ".-" else "_" for c in variant)
            folders[variant, seed] = folder = top / f"{label}-seed{seed}"
            settings, saved = settings_of(experiment, variant, seed, config.quick), read_result(folder)
            if saved is None or saved["settings"] != settings:
                todo[variant, seed] = settings, str(folder)
                stale += [folder] * (saved is not None)
    if stale and not (config.again or config.quick):
        raise ConfigError(
            f"{len(stale)} of the runs were made by other settings or on another text, {stale[0]} first; "
            "--again true makes them anew"
        )

    # 2. run
    with tqdm(total=len(folders), initial=len(folders) - len(todo), unit="run", desc=name) as bar:
        failed = run_all(todo, config.jobs, bar)
    if failed:
        raise ConfigError(f"{len(failed)} of the runs failed, the others are kept: " + "; ".join(failed))

    # 3. compare
    saved = {key: read_result(folder) for key, folder in folders.items()}
    results = {key: result["figures"] for key, result in saved.items()}
    means, differences = means_of(experiment, results, seeds), differences_of(experiment, results, seeds)
    logs = {key: read_metrics(folder / "run") for key, folder in folders.items()} if experiment.curves else {}
    curves = {metric: mean_curves(logs, experiment.variants, seeds, metric) for metric in experiment.curves}

    # 4. report
    command = f"python ablate.py {name}" + (" --quick true" if config.quick else "")
    command += f" --seeds '{seeds}'" if seeds != [0, 1, 2] and not config.quick else ""
    reads_corpus = any(flags.get("data") is probes.corpus for _, flags in experiment.variants.values())
    text = probes.corpus() if reads_corpus else None
    commits = {result["commit"] for result in saved.values()}
    picture = target.with_suffix(".png")
    written = page(experiment, results, means, differences, seeds, command, commits, picture.name, text)
    write_page(target, written)
    draw(experiment, results, means, curves, seeds, picture)
    print(written)
    return results


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--experiment")
    run_script(main, Config, __doc__, demo)
