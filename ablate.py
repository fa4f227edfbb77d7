"""Controlled experiments: change one factor, hold the rest, several seeds, one table and one picture.

    python ablate.py --list
    python ablate.py norm-kind               # results/norm-kind.md and .png
    python ablate.py ladder --quick          # a smoke run: few steps, nothing is written to results/

An experiment is a row of EXPERIMENTS: a question, what is held, and its variants. A variant is a stage (pretrain, sft,
dpo, ppo, grpo, gdpo) with the flags that differ, so every run here can be repeated by hand with the stage's own
script. Each run ends in runs/ablate/NAME/VARIANT-seedS/result.json, beside the commit and all settings, defaults
included. One that is there, made by the same settings, is not made again: a broken-off experiment makes the missing
runs, and a run that was broken off starts anew. A run that diverged has that as its result.

What the table says, with n seeds (arXiv:2304.01315 on why few seeds mislead):

    mean ± half    half = t(0.975, n − 1) · s / √n, Student's interval for the mean of the seeds
    difference     the same on the n *paired* differences to the first variant: the same seed gives both the same
                   start and the same data order, so what they share cancels

Two variants are called different only if the interval of the difference leaves out 0. With three seeds t is 4.30, so
only large effects can be told apart. Each interval is for its difference alone, without a correction for how many there
are, and for the spread of the seeds, not of the test problems, which stay the same. No experiment looks at a test
split to choose anything: the losses are those of the validation split, the accuracies of the held-out test problems,
seen once.

Runs stand side by side, each with its share of the cores (--jobs). Letters: n seeds, s standard deviation.
"""

import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from attention import attention_entropy, attention_weights
from data import DEFAULT_TASK, encode_prompt, find, load_problems, load_text
from evaluate import evaluate, evaluate_samples, sampled_kl
from generate import generate
from grpo import tidy
from sft import sft_start
from support.checkpoints import open_checkpoint
from support.cli import run
from support.devices import auto_dtype, setup
from support.errors import ConfigError, DataError, DivergedError
from support.log import commit, read_metrics
from support.plots import pyplot
from support.runs import RUNS
from transformer import Transformer, TransformerConfig

# Student's quantiles by n; above 10 that of 10, which is slightly too wide.
T_975 = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass
class Experiment:
    """One question. `variants`: {label: [(stage, {flag: value}), …]}; a later stage of a variant starts from the one
    before it. `columns`: {metric: heading}; `draw`: {metric: y-axis label} of the curves in the picture."""

    question: str
    held: str
    variants: dict
    columns: dict
    draw: dict
    quick: dict = field(default_factory=lambda: {"steps": 4})
    bars: tuple = ()  # columns that are drawn beside the first
    dashed: str = ""  # variants with this in their name are drawn dashed: some lie on their twins
    front: tuple = ()  # two columns to draw against each other, a point per run
    against: str | None = None  # the variant that the others are compared with; default the first
    pairs: tuple = ()  # or else which are compared with which: (variant, the one it is compared with)
    measure: str | None = None  # name of a function of this file: (folder, figures, settings) -> more figures


# ---------------------------------------------------------------------------------------------------------------
# What is measured beyond what the stages report.


def layers(folder, figures, settings):
    """Root mean square of the residual stream and of the gradient, by layer, on one batch, as built and as trained; and
    what the trained model writes.

    The gradient of a layer is that of the output of block l. A placement that lets it shrink with depth trains the
    first layers slowly; one that lets the stream grow makes the late layers' branches small beside it.
    """
    trained, tokenizer, _ = open_checkpoint(figures["path"])
    torch.manual_seed(settings["seed"])
    more = {}
    for name, raw in (("built", Transformer(trained.config)), ("trained", trained)):
        seen = []

        def keep(block, inputs, output, seen=seen):
            output.retain_grad()
            seen.append(output)

        hooks = [block.register_forward_hook(keep) for block in raw.blocks]
        tokens = torch.randint(raw.config.vocab_size, (4, min(64, raw.config.context)))
        raw(tokens[:, :-1], targets=tokens[:, 1:]).mean().neg().backward()
        for hook in hooks:
            hook.remove()
        more[f"stream_{name}"] = [x.detach().square().mean().sqrt().item() for x in seen]
        more[f"gradient_{name}"] = [x.grad.square().mean().sqrt().item() for x in seen]
    more["gradient_ratio"] = more["gradient_built"][0] / more["gradient_built"][-1]
    generator = torch.Generator().manual_seed(settings["seed"])
    start, length = tokenizer.encode("\n"), min(100, trained.config.context - 1)
    more["text"] = generate(trained, [start], length, generator=generator).texts(tokenizer)[0]
    ids = torch.tensor(tokenizer.encode("".join(_text("valid"))[: 32 * 64]))
    return more | attention_of(trained, ids[: len(ids) // 32 * 32].view(32, -1))


def attention_of(raw, rows):
    """rows (B, T) -> the attention's mean entropy in nats, and the mean map of all blocks and heads over the first 32
    tokens, for a picture."""
    weights = torch.stack(attention_weights(raw, rows))  # (blocks, B, H, T, T)
    return {
        "entropy": attention_entropy(weights).mean().item(),
        "attention": weights[..., :32, :32].mean((0, 1, 2)).tolist(),
    }


def clipping(folder, figures, settings):
    """From the log: how gradient norms are distributed, how often they were cut, and loss spikes."""
    series = read_metrics(folder)
    norms, losses = sorted(series["grad_norm"][1]), series["loss"][1]
    spikes = sum(b > a + 0.5 for a, b in pairwise(losses))
    return {
        "norm_median": norms[len(norms) // 2],
        "norm_p99": norms[int(0.99 * (len(norms) - 1))],
        "clipped_share": 100 * statistics.mean(series["clipped"][1]),
        "spikes": spikes,
    }


def start_of(settings):
    """The SFT checkpoint of a run's seed, from which DPO and all RL start."""
    return sft_start(import_module("grpo").Config(seed=settings["seed"]), setup("auto"))


def standing(folder, figures, settings):
    """A policy on 200 of the held-out problems: pass@8 at temperature 1, the share of tidy answers and their length
    (greedy), and the KL to the SFT checkpoint of the seed, per token of its own samples."""
    problems, dist = load_problems(DEFAULT_TASK, "test", 200, (1, 2)), setup("auto")
    raw, tokenizer, _ = open_checkpoint(figures["path"], dist.device)
    start = open_checkpoint(start_of(settings), dist.device)[0]
    greedy = evaluate(raw, tokenizer, problems, 64, dist)
    texts, ended = zip(*((s.text, s.ended) for s in greedy["samples"]), strict=True)
    several = evaluate_samples(raw, tokenizer, problems, 8, 64, dist)
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    return {
        "pass_at_8": 100 * several["pass@8"],
        "sampled": 100 * several["pass@1"],
        "format": 100 * statistics.mean(tidy(texts, problems, ended)),
        "length": greedy["length"],
        "kl": sampled_kl(raw, start, tokenizer, prompts, 64, dist),
    }


def earned(folder, figures, settings):
    """From the log: the share of rollouts that earned each reward in the last 20 steps, and the share of groups, over
    all steps, in which different rewards got one advantage (see gdpo.collapse)."""
    series, (stage, flags) = read_metrics(folder), settings["stages"][-1]
    more = {
        f"earned_{name}": 100 * statistics.mean(series[f"reward_{name}"][1][-20:])
        for name in ("correct", "format", "brevity")
    }
    if stage == "gdpo":
        method = "grpo" if flags.get("combine") == "sum" else "gdpo"
        more["collapsed"] = 100 * statistics.mean(series[f"collapsed_{method}"][1])
    return more


@torch.no_grad()
def beyond(folder, figures, settings):
    """Loss by position on windows of twice the trained length, where the model can read them at all."""
    raw, tokenizer, _ = open_checkpoint(figures["path"])
    context = raw.config.context
    text = "".join(_text("valid"))[: 64 * 8 * context]
    ids = torch.tensor(tokenizer.encode(text))
    rows = ids[: len(ids) // (2 * context + 1) * (2 * context + 1)].view(-1, 2 * context + 1)[:64]
    inside = -raw(rows[:, :context], targets=rows[:, 1 : context + 1]).mean().item()
    more = {"inside": inside, "outside": math.nan} | attention_of(raw, rows[:16, :context])
    if raw.config.positions != "learned":  # its table ends where training did
        longer = _stretched(raw, 2 * context)
        loss = -longer(rows[:, :-1], targets=rows[:, 1:])  # (rows, 2·context)
        more["outside"] = loss[:, context:].mean().item()
        more["by_position"] = loss.mean(0).view(16, -1).mean(1).tolist()
    return more


def _stretched(raw, context):
    """The same weights with a longer table of angles."""
    config = TransformerConfig(
        **{f.name: getattr(raw.config, f.name) for f in fields(raw.config)} | {"context": context}
    )
    model = Transformer(config)
    model.load_state_dict(raw.state_dict())
    return model.eval()


@torch.no_grad()
def copying(folder, figures, settings):
    """Share of letters repeated rightly, by their distance, inside and beyond the distances of training."""
    raw, tokenizer, _ = open_checkpoint(figures["path"])
    shares = []
    for distance in COPY_DISTANCES:
        lines = [_copy_line(10_000_000 + i, distance, distance) for i in range(100)]
        texts = generate(raw, [tokenizer.encode("\n" + line[:-1]) for line in lines], 1, temperature=0).texts(tokenizer)
        shares.append(100 * statistics.mean(t == line[-1] for t, line in zip(texts, lines, strict=True)))
    inside = [s for d, s in zip(COPY_DISTANCES, shares, strict=True) if d <= COPY_TRAINED]
    return {
        "copied": shares,
        "copied_inside": statistics.mean(inside),
        "copied_outside": statistics.mean(shares[len(inside) :]),
    }


COPY_TRAINED, COPY_DISTANCES = 48, [0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96]


def _copy_line(index, least, most):
    """`k·······|k`: a random letter, least to most dots (log-uniformly, or the far ones would hardly be learnt), the
    same letter."""
    generator = torch.Generator().manual_seed(index)
    letter = chr(97 + torch.randint(26, (1,), generator=generator).item())
    dots = least - 1 + int((most - least + 2) ** torch.rand(1, generator=generator).item())
    return letter + "." * dots + "|" + letter


def _copy_file():
    """The text for the copying probe; written each time, in a second, so that it is never that of other code."""
    path = RUNS / "ablate" / "copy.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(_copy_line(i, 0, COPY_TRAINED) for i in range(20_000)) + "\n"
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(text)
    partial.replace(path)
    return str(path)


# ---------------------------------------------------------------------------------------------------------------
# The experiments.


def _corpus():
    """Tiny Shakespeare where it is at hand, the built-in stories otherwise."""
    try:
        find("tinyshakespeare")
        return "tinyshakespeare"
    except DataError:
        return DEFAULT_TASK


def _text(split):
    return load_text(_corpus(), split)


def _pretrain(**model):
    """A small character model: 0.8 M parameters, 600 steps of 16 x 128 tokens."""
    flags = {"data": "CORPUS", "tokenizer": "char", "steps": 600, "batch": 16, "micro_batch": 16, "optimizer": "adamw"}
    flags |= {"lr": 2e-3, "warmup": 50, "eval_every": 200, "save_every": 100_000}
    flags |= {k: model.pop(k) for k in list(model) if k in ("lr", "warmup", "clip", "data", "steps", "optimizer")}
    return [("pretrain", flags | {"model": {"context": 128, "n_head": 4, "n_kv_head": 4, "width": 128} | model})]


def _chars(size="4 layers, width 128", steps=600):
    return f"a character model of {size}, context 128; AdamW, {steps} steps of 16 windows, the data order"


_LOSS = {"valid_loss": "validation loss (nats per character)"}
_LAYERS = {"gradient_ratio": "gradient at block 1 / at the last, as built", "entropy": "attention entropy (nats)"}
_TASK = (
    "the SFT checkpoint that the stage itself makes for the seed, 16 prompts x 8 rollouts a step, the prompts' order"
)
_CURVE = {"loss": "training loss (nats per character)"}  # of these models a token is a character
_CURVE_SFT = {"loss": "training loss (nats per token)"}
_RL = {"accuracy": "accuracy (%)", "format": "format (%)", "length": "tokens", "kl": "KL to SFT (nats per token)"}


def _grpo(stage="grpo", **flags):
    return [(stage, {"steps": 150, "test_problems": 500, "eval_every": 50, "pass_problems": 50} | flags)]


def _dpo(**flags):
    return [("dpo", {"steps": 150, "prompts": 1500, "eval_every": 50, "test_problems": 500} | flags)]


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
            "base": [("sft", {"steps": 1, "lr": 1e-30})],  # a step so small that no weight moves
            "SFT": [("sft", {"steps": 1, "lr": 1e-30, "init": "START"})],  # the start of all that follow
            "PPO": [("ppo", {"steps": 80})],
            "DPO": [("dpo", {"steps": 80, "prompts": 1000})],
            "GRPO": [("grpo", {"steps": 80, "pass_problems": 20})],
            "GDPO": [("gdpo", {"steps": 80, "pass_problems": 20, "brevity_weight": 0.2})],
        },
        {"accuracy": "accuracy (%)", "pass_at_8": "pass@8 (%)", "sampled": "one sample (%)"}
        | _RL
        | {"minutes": "minutes"},
        {},
        {"steps": 2, "test_problems": 20, "eval_problems": 10},
        measure="standing",
        bars=("sampled", "pass_at_8"),
        against="SFT",
    ),
    "norm-placement": Experiment(
        "Where should the norm stand: before a branch, behind it, or both, with and without a warm-up?",
        _chars("12 layers, width 64", 400),
        {
            f"{placement}, {'warm-up' if warmup > 1 else 'no warm-up'}": _pretrain(
                norm_placement=placement, n_layer=12, width=64, warmup=warmup, steps=400
            )
            for warmup in (50, 1)
            for placement in ("pre", "post", "sandwich")
        },
        _LOSS | _LAYERS,
        _CURVE | {"grad_norm": "gradient norm"},
        measure="layers",
        dashed="no warm-up",
        pairs=tuple((f"{p}, {w}", f"pre, {w}") for w in ("warm-up", "no warm-up") for p in ("post", "sandwich"))
        + tuple((f"{p}, no warm-up", f"{p}, warm-up") for p in ("pre", "post", "sandwich")),
    ),
    "norm-depth": Experiment(
        "How deep can a stack be with the norm behind its branches, and before them?",
        _chars("6 to 48 layers, width 64", 200) + "; a warm-up of 50 steps",
        {
            f"{placement}, {depth} layers": _pretrain(norm_placement=placement, n_layer=depth, width=64, steps=200)
            for depth in (6, 12, 24, 48)
            for placement in ("pre", "post")
        },
        _LOSS | _LAYERS,
        _CURVE | {"grad_norm": "gradient norm"},
        measure="layers",
        pairs=tuple((f"post, {depth} layers", f"pre, {depth} layers") for depth in (6, 12, 24, 48)),
    ),
    "norm-kind": Experiment(
        "Does it matter that RMSNorm leaves the mean in?",
        _chars(),
        {"LayerNorm": _pretrain(norm="layer"), "RMSNorm": _pretrain(norm="rms")},
        _LOSS | {"minutes": "minutes"},
        _CURVE | {"grad_norm": "gradient norm"},
    ),
    "positions": Experiment(
        "What do positions buy inside the trained length, and beyond it?",
        _chars(),
        {kind: _pretrain(positions=kind) for kind in ("none", "learned", "sinusoidal", "rope")},
        _LOSS
        | {"inside": "loss, first 128 characters", "outside": "loss, characters 129 to 256"}
        | {"entropy": "attention entropy (nats)"},
        _CURVE,
        measure="beyond",
    ),
    "copying": Experiment(
        "How far can a letter be carried, with each kind of positions, inside and beyond the distances of training?",
        "a character model of 2 layers, width 64, context 128; AdamW, 2,000 steps of 16 windows, the data order; lines "
        f"of a letter, 0 to {COPY_TRAINED} dots, the same letter",
        {
            kind: _pretrain(positions=kind, data="COPY", n_layer=2, width=64, lr=1e-3, steps=2000)
            for kind in ("none", "learned", "sinusoidal", "rope")
        },
        {
            "copied_inside": f"letters repeated, up to {COPY_TRAINED} dots (%)",
            "copied_outside": f"beyond {COPY_TRAINED} dots (%)",
        },
        _CURVE,
        measure="copying",
    ),
    "grad-clip": Experiment(
        "What does clipping the gradient's norm change, at a good and at a high learning rate?",
        _chars(),
        {f"clip {clip or 'off'}, lr {lr:g}": _pretrain(clip=clip, lr=lr) for lr in (2e-3, 2e-2) for clip in (1.0, 0.0)},
        _LOSS
        | {
            "norm_median": "median norm",
            "norm_p99": "99th percentile",
            "clipped_share": "clipped (%)",
            "spikes": "spikes",
        },
        _CURVE | {"grad_norm": "gradient norm"},
        measure="clipping",
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
        _LOSS | {"minutes": "minutes"},
        _CURVE,
    ),
    "kv-heads": Experiment(
        "What do shared key/value heads cost in loss, and save in the cache?",
        _chars(),
        {
            f"{name}, {g} of 4": _pretrain(n_kv_head=g)
            for name, g in (("multi-head", 4), ("grouped", 2), ("multi-query", 1))
        },
        _LOSS | {"cache": "cache (numbers per token)", "parameters": "parameters"},
        _CURVE,
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
        _LOSS | {"load_min": "least loaded (x even share)", "load_max": "most loaded", "parameters": "parameters"},
        _CURVE | {"load_max": "fullest expert (x even share)"},
        pairs=tuple((f"8 experts, {kind}", "dense") for kind in ("aux", "bias", "none"))
        + tuple((f"8 experts, {kind}", "8 experts, aux") for kind in ("bias", "none"))
        + (("8 experts, bias", "8 experts, none"),),
    ),
    "curriculum": Experiment(
        "Does the order of the demonstrations matter: shuffled, easy to hard, hard to easy?",
        "the pretrained checkpoint of a seed, 100 steps of SFT on levels 1 to 3",
        {
            order: [("sft", {"order": order, "steps": 100, "levels": [1, 2, 3], "test_problems": 500})]
            for order in ("shuffled", "curriculum", "anti")
        },
        {"accuracy": "accuracy (%)"},
        _CURVE_SFT,
    ),
    "sft-lr": Experiment(
        "Which learning rate does SFT want?",
        "the pretrained checkpoint of a seed, 60 steps of SFT with Muon",
        {
            f"lr {lr:g}": [("sft", {"lr": lr, "steps": 60, "test_problems": 500})]
            for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
        },
        {"accuracy": "accuracy (%)"},
        _CURVE_SFT,
    ),
    "grpo": Experiment(
        "Which of GRPO's settings matter, in 150 steps?",
        _TASK,
        _GRPO,
        _RL,
        {"reward_correct": "share of right rollouts", "kl": "KL to the start (nats per token)"},
        pairs=tuple((v, "2 inner epochs" if v == "clip higher" else "default") for v in list(_GRPO)[1:]),
    ),
    "gdpo": Experiment(
        "Three rewards: GRPO on the answer alone, GRPO on the sum, GDPO, and brevity paid for right answers alone.",
        _TASK,
        {
            "GRPO, answer alone": _grpo(format_weight=0.0),
            "GRPO, sum": _grpo("gdpo", combine="sum", format_weight=0.5, brevity_weight=0.5),
            "GDPO": _grpo("gdpo", format_weight=0.5, brevity_weight=0.5),
            "GDPO, brevity if right": _grpo("gdpo", format_weight=0.5, brevity_weight=0.5, conditioned=["brevity"]),
        },
        _RL
        | {"earned_correct": "right (%)", "earned_format": "tidy (%)", "earned_brevity": "brief (%)"}
        | {"collapsed": "groups collapsed (%)"},
        {
            "reward_correct": "share of right rollouts",
            "reward_format": "share of tidy rollouts",
            "reward_brevity": "share of brief rollouts",
            "collapsed_grpo": "share of groups collapsed",
        },
        front=("earned_brevity", "earned_correct"),
        measure="earned",
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
        {"accuracy": "accuracy (%)", "length": "tokens"},
        {
            "logp_chosen": "log π of chosen answers (nats)",
            "pair_accuracy": "share of pairs in order",
            "kl": "KL to the start (nats per token)",
        },
    ),
}


# ---------------------------------------------------------------------------------------------------------------
# Running.


def settings_of(name, experiment, variant, seed, quick):
    """The stages of a run and their flags, as JSON; `configs_of` has the defaults too."""
    stages = []
    for stage, flags in experiment.variants[variant]:
        flags = dict(flags) | {"seed": seed} | (experiment.quick if quick else {})
        if flags.get("data") in ("CORPUS", "COPY"):
            flags["data"] = {"CORPUS": _corpus(), "COPY": _copy_file()}[flags["data"]]
        known = {f.name for f in fields(import_module(stage).Config)}
        if unknown := set(flags) - known - (set(experiment.quick) if quick else set()):
            raise ConfigError(f"experiment {name}, variant {variant}: {stage}.py has no {', '.join(sorted(unknown))}")
        stages.append([stage, {k: v for k, v in flags.items() if k in known}])
    return {"stages": stages, "seed": seed, "measure": experiment.measure}


def build(stage, flags):
    """The Config of a stage; a nested dataclass comes as the dictionary of its changes."""
    cls = import_module(stage).Config
    nested = {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}
    return cls(**{k: nested[k](**v) if k in nested else v for k, v in flags.items()})


def configs_of(settings):
    """Everything that decides a run's outcome, but the code, as JSON: two runs with the same are the same run."""
    return json.loads(json.dumps([asdict(build(stage, flags)) for stage, flags in settings["stages"]]))


STOPPED = []  # in the process of a run: whether it was stopped


def short_commit():
    """Eight digits, and "+" where files differ from the commit."""
    full = commit()
    return full[:8] + "+" * full.endswith("+")


def run_one(settings, folder, threads):
    """Run a variant with a seed; its figures, also written to folder/result.json, {"diverged": …} if it did. Runs in a
    process of its own, which does no other once it was stopped: the pool hands out one more than it has processes."""
    if STOPPED:
        raise KeyboardInterrupt
    try:
        figures = _run(settings, folder, threads)
    except DivergedError as error:
        figures = {"diverged": str(error)}
    except (KeyboardInterrupt, SystemExit):
        STOPPED.append(True)
        raise
    folder = Path(folder)
    made = {"settings": settings, "configs": configs_of(settings), "commit": short_commit(), "figures": figures}
    (folder / "result.tmp").write_text(json.dumps(made))
    (folder / "result.tmp").replace(folder / "result.json")
    return figures


def _run(settings, folder, threads):
    torch.set_num_threads(threads)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        started, last = time.perf_counter(), None
        for number, (stage, flags) in enumerate(settings["stages"], start=1):
            ending = "" if number == len(settings["stages"]) else f"{number}"
            name = str((folder / f"run{ending}").relative_to(RUNS))
            init = start_of(settings) if flags.get("init") == "START" else flags.get("init")
            config = build(stage, flags | {"name": name, "init": last or init})
            figures = import_module(stage).main(config)
            last = figures["path"]
        figures = flatten(figures) | {"minutes": (time.perf_counter() - started) / 60}
        figures |= ends(RUNS / name)
        raw = open_checkpoint(figures["path"])[0]
        c = raw.config
        figures |= {"parameters": raw.num_params(), "cache": 2 * c.n_layer * c.n_kv_head * c.head_dim}
        if settings["measure"]:
            figures |= globals()[settings["measure"]](RUNS / name, figures, settings)
    return figures


def flatten(figures):
    """What a stage returns -> {metric: number}: the held-out evaluation after training, accuracies in per cent."""
    after = figures.get("after", figures)
    flat = {k: v for k, v in after.items() if isinstance(v, int | float | str)}
    flat |= {k: v for k, v in figures.items() if isinstance(v, int | float | str)}
    for name in ("accuracy", "format", "pass_at_8"):
        if name in flat:
            flat[name] *= 100
    return flat


def ends(folder):
    """The last value of what is logged at validations only."""
    series = read_metrics(folder)
    return {k: series[k][1][-1] for k in ("valid_loss", "load_min", "load_max") if k in series}


def interval(values):
    """n numbers -> their mean, half the width of Student's 95 % interval; nan if one of them is no finite number."""
    n = len(values)
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    half = T_975[min(n, 10)] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), half


def number(x):
    """Enough digits to tell, no more."""
    if math.isnan(x):
        return "–"
    if abs(x) > 100:
        return f"{x:,.0f}"
    if x == 0:
        return "0"
    return f"{x:.1f}" if abs(x) >= 20 else f"{x:.3f}" if abs(x) >= 1 else f"{x:.4f}"


def plus_minus(values):
    """Both with as many decimals."""
    (mean, half), text = interval(values), number(interval(values)[0])
    decimals = len(text.partition(".")[2])
    return text if math.isnan(mean) or math.isnan(half) or half == 0 else f"{text} ± {half:,.{decimals}f}"


def difference(a, b):
    """Paired values of two variants -> mean [interval], with as many decimals as the table gives a (or b, where a is
    0); bold if told apart."""
    mean, half = interval([x - y for x, y in zip(a, b, strict=True)])
    if math.isnan(half):
        return "–"
    decimals = len(number(interval(a)[0] or interval(b)[0]).partition(".")[2])
    if half == 0:
        return f"{mean:+,.{decimals}f}"
    text = f"{mean:+,.{decimals}f} [{mean - half:+,.{decimals}f}, {mean + half:+,.{decimals}f}]"
    return f"**{text}**" if abs(mean) > half else text


def report(name, experiment, results, seeds, command, target, commits=()):
    """results {(variant, seed): figures} -> the text of results/NAME.md; the picture lies beside it. commits: those of
    the runs."""
    variants = list(experiment.variants)
    corpus = [flags["data"] for stages in experiment.variants.values() for _, flags in stages if "data" in flags]
    held = experiment.held + (f"; text: {_corpus()}" if "CORPUS" in corpus else "")
    lines = [f"# {name}: {experiment.question}", "", f"Held: {held}."]
    where = f"{machine()}, commit {', '.join(sorted(set(commits))) or 'unknown'}"
    lines += [f"Command: `{command}`. {len(seeds)} seeds ({', '.join(map(str, seeds))}); {where}.", ""]
    columns = {k: v for k, v in experiment.columns.items() if any(k in figures for figures in results.values())}

    def values(variant, metric):
        return [results[variant, s].get(metric, math.nan) for s in seeds]

    lines += ["| | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for variant in variants:
        lines.append(f"| {variant} | " + " | ".join(plus_minus(values(variant, m)) for m in columns) + " |")
    lines += ["", "Mean of the seeds ± half of Student's 95 % interval.", ""]
    for (variant, seed), figures in results.items():
        if "diverged" in figures:
            lines += [f"Diverged: {variant}, seed {seed}: {figures['diverged']}", ""]
    first = experiment.against if experiment.against in variants else variants[0]
    pairs = experiment.pairs or [(v, first) for v in variants if v != first]
    pairs = [(a, b) for a, b in pairs if a in variants and b in variants]
    columns = {k: v for k, v in columns.items() if k != "minutes"}
    if pairs and len(seeds) > 1:
        base = "" if experiment.pairs else f" to *{first}*"
        head = f"Paired differences{base}, with their 95 % intervals; bold: the interval leaves out 0."
        rows = [[difference(values(a, m), values(b, m)) for m in columns] for a, b in pairs]
        if sum("[" in cell for cells in rows for cell in cells) >= 5:
            head += " Not corrected for the number of comparisons: an interval that ends near 0 is a hint."
        lines += [head, "", "| | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
        for (a, b), cells in zip(pairs, rows, strict=True):
            lines.append(f"| {f'{a} against {b}' if experiment.pairs else a} | " + " | ".join(cells) + " |")
        lines.append("")
    texts = {v: results[v, seeds[0]]["text"] for v in variants if "text" in results[v, seeds[0]]}
    if texts:
        lines += [f"What they write after a line's end, at temperature 1, seed {seeds[0]}:", ""]
        lines += [f"* {variant}: `` {' / '.join(text.split(chr(10)))} ``" for variant, text in texts.items()] + [""]
    lines += [f"![{name}]({target.stem}.png)", ""]
    return "\n".join(lines)


def machine():
    """Cores, processor, torch and precision, for the record."""
    info = Path("/proc/cpuinfo")
    model = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    cpu = model[0] if model else platform.processor() or "unknown processor"
    kind = auto_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{os.cpu_count()} cores, {cpu}, torch {torch.__version__}, {kind}"


def side_by_side(runs):
    """runs: (steps, values) of each seed -> steps (points,), values (seeds, points): at most 80, each the mean of
    neighbours, at the steps that all have. GRPO, say, logs no KL where no group has anything to teach."""
    values = [dict(zip(*run, strict=True)) for run in runs]  # {step: value}
    steps = sorted(set.intersection(*map(set, values))) if values else []
    rows = torch.tensor([steps, *([run[step] for step in steps] for run in values)], dtype=torch.double)
    if steps:
        width = max(1, len(steps) // 40)
        rows = rows.unfold(1, width, width).mean(2)
    return rows[0], rows[1:]


def draw(experiment, results, folders, seeds, target):
    """One panel for the table's first metric, one for each logged curve: means over the seeds, bands of ± half (of 8
    variants or more the bands would hide the curves)."""
    plt = pyplot()
    variants = list(experiment.variants)
    crowd = len(variants) >= 8
    colors = plt.get_cmap("tab20" if len(variants) > 10 else "tab10").colors
    dashes = ["--" if experiment.dashed and experiment.dashed in v else "-" for v in variants]
    metrics = [next(iter(experiment.columns)), *experiment.bars]
    extra = ["stream_built", "gradient_built", "stream_trained", "by_position", "copied"]
    extra = [k for k in extra if any(k in figures for figures in results.values())]
    maps = [v for v in variants if "attention" in results[v, seeds[0]]] if len(variants) <= 6 else []
    panels = len(metrics) + len(experiment.draw) + len(extra) + bool(experiment.front) + len(maps)
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, (4.6 if crowd else 3.4) * rows), squeeze=False)
    others = list(axes.flat)[len(metrics) :]
    for bars, metric in zip(axes.flat, metrics, strict=False):
        found = [interval([results[variant, s].get(metric, math.nan) for s in seeds]) for variant in variants]
        for i, (mean, half) in enumerate(found):
            bars.errorbar(mean, i, xerr=None if math.isnan(half) else half, fmt="o", color=colors[i], capsize=4)
        bars.set(yticks=range(len(variants)), yticklabels=variants, xlabel=experiment.columns[metric])
        bars.set_title("at the end, mean and 95 % interval of the seeds", fontsize=10)
        if "(%)" in experiment.columns[metric]:  # an interval of few seeds may leave what is possible
            left, right = bars.get_xlim()
            left, right = bars.set_xlim(max(left, -3), min(right, 103))
            for i, (mean, half) in enumerate(found):
                for edge, marker, cut in ((left, "<", mean - half < left), (right, ">", mean + half > right)):
                    if cut:
                        bars.plot(edge, i, marker, color=colors[i], clip_on=False)
                        bars.set_xlabel(f"{experiment.columns[metric]}\nan arrow: the interval goes on")
        bars.invert_yaxis()
        bars.grid(alpha=0.25)
    for axis, (name, label) in zip(others, experiment.draw.items(), strict=False):
        for i, variant in enumerate(variants):
            runs = [read_metrics(folders[variant, s]).get(name) for s in seeds]
            runs = [r for r in runs if r]
            steps, stack = side_by_side(runs)
            if not len(steps):
                continue
            mean = stack.mean(0)
            axis.plot(steps, mean, dashes[i], color=colors[i], label=variant)
            if len(runs) > 1 and not crowd:
                half = T_975[min(len(runs), 10)] * stack.std(0) / math.sqrt(len(runs))
                axis.fill_between(steps, mean - half, mean + half, color=colors[i], alpha=0.15, linewidth=0)
        if axis.lines and min(line.get_ydata().min() for line in axis.lines) >= 0 > axis.get_ylim()[0]:
            axis.set_ylim(bottom=0)  # a band of few seeds may leave what is possible
        if label.startswith("share"):
            axis.set_ylim(top=min(1.02, axis.get_ylim()[1]))
        axis.set(title="mean of the seeds" if crowd else label, xlabel="step", ylabel=label)
        axis.grid(alpha=0.25)
    titles = {
        "stream_built": ("residual stream as built", "block", "root mean square"),
        "gradient_built": ("gradient as built", "block", "root mean square"),
        "stream_trained": ("residual stream as trained", "block", "root mean square"),
        "by_position": (
            "loss by position",
            "sixteenth of the window (dashed: the trained length)",
            "nats per character",
        ),
        "copied": ("letters repeated", "dots between (dashed: the most in training)", "%"),
    }
    for axis, name in zip(others[len(experiment.draw) :], extra, strict=False):
        for i, variant in enumerate(variants):
            rows_ = [results[variant, s][name] for s in seeds if name in results[variant, s]]
            if rows_:
                mean = torch.tensor(rows_).mean(0).tolist()
                x = COPY_DISTANCES if name == "copied" else range(1, len(mean) + 1)
                axis.plot(x, mean, dashes[i], marker="o", markersize=3, color=colors[i], label=variant)
        title, xlabel, ylabel = titles[name]
        axis.set_title(f"{title}, mean of the seeds", fontsize=10)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        if "dashed" in xlabel:
            axis.axvline(COPY_TRAINED if name == "copied" else 8.5, color="0.4", linestyle="--", linewidth=1)
        if "built" in name or "stream" in name:
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
    if experiment.front:
        axis, (x, y) = others[len(experiment.draw) + len(extra)], experiment.front
        for i, variant in enumerate(variants):
            points = [(results[variant, s].get(x, math.nan), results[variant, s].get(y, math.nan)) for s in seeds]
            axis.plot(*zip(*points, strict=True), "o", color=colors[i], label=variant)
        axis.set(xlabel=experiment.columns[x], ylabel=experiment.columns[y], title="at the end, a point per seed")
        axis.grid(alpha=0.25)
    for axis, variant in zip(others[panels - len(metrics) - len(maps) :], maps, strict=False):
        axis.imshow(results[variant, seeds[0]]["attention"], vmin=0, vmax=0.5, cmap="Blues")
        axis.set_title(f"attention, {variant}: mean of all heads", fontsize=10)
        axis.set(xlabel="key (character)", ylabel="query")
    for axis in others[panels - len(metrics) :]:
        axis.axis("off")
    handles = next((a.get_legend_handles_labels() for a in others if a.get_legend_handles_labels()[0]), ([], []))
    if handles[0]:
        figure.legend(*handles, loc="lower center", ncols=min(4, len(variants)), fontsize=9)
    below = 0.1 + 0.25 * math.ceil(len(variants) / 4) if handles[0] else 0.0  # inches for the legend
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    figure.savefig(target, dpi=120)
    plt.close(figure)


@dataclass
class Config:
    """Run a controlled experiment, or list them."""

    experiment: str | None = None
    """Its name; see --list."""
    quick: bool = False
    """A smoke run of a few steps and one seed (but the start that later stages share is made in full, in runs/start);
    results/ is left alone."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run of each variant per seed."""
    variants: list[str] = field(default_factory=list)
    """Run only these of its variants, such as '["pre, 6 layers", "post, 6 layers"]'; default all."""
    again: bool = False
    """Make runs anew that are there, but were made by other settings (other defaults, another text)."""
    jobs: int = 2
    """Runs side by side; the cores are shared out."""
    list: bool = False
    """Print the experiments and their questions."""

    def __post_init__(self):
        if self.experiment not in EXPERIMENTS and not (self.list and self.experiment is None):
            known = ", ".join(EXPERIMENTS)
            what = "name an experiment" if self.experiment is None else f"{self.experiment!r} is not an experiment"
            raise ConfigError(f"{what}; they are: {known}")
        if unknown := set(self.variants) - set(EXPERIMENTS[self.experiment].variants if self.experiment else ()):
            raise ConfigError(f"--variants: {self.experiment} has no {', '.join(sorted(unknown))}; see --list")
        if self.jobs < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("--jobs must be at least 1, and --seeds a list of different numbers")


def left_out(target, name, variants, seeds):
    """What the page at `target` has and a run of these variants and seeds would not."""
    text = target.read_text() if target.exists() else ""
    found = re.search(r" seeds \(([\d, ]+)\)", text)
    lost = [v for v in EXPERIMENTS[name].variants if f"\n| {v} |" in text and v not in variants]
    return lost + [f"seed {s}" for s in (found[1].split(", ") if found else []) if int(s) not in seeds]


def pass_on(number, _):
    """Ctrl-C reaches the runs by itself, in the terminal; SIGTERM reaches this process alone."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    raise KeyboardInterrupt


def main(config):
    """Run what is missing, then write results/NAME.md and .png; returns {(variant, seed): figures}."""
    if config.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<16}{experiment.question}\n{'':<16}{', '.join(experiment.variants)}")
        return None
    name, experiment = config.experiment, EXPERIMENTS[config.experiment]
    if config.variants:
        experiment = replace(experiment, variants={k: experiment.variants[k] for k in config.variants})
    seeds = config.seeds[:1] if config.quick else config.seeds
    top = RUNS / "ablate" / (f"{name}-quick" if config.quick else name)
    target = (top if config.quick else Path(__file__).parent / "results") / f"{name}.md"
    if lost := [] if config.quick else left_out(target, config.experiment, experiment.variants, seeds):
        raise ConfigError(
            f"{target} also has {', '.join(lost)}, which this run leaves out: move it aside, or run them too"
        )
    threads = max(1, (os.cpu_count() or 1) // config.jobs)
    todo, results, folders, commits, stale = [], {}, {}, [], []
    for variant in experiment.variants:
        for seed in seeds:  # the inner loop: neighbours share no start, for which one would have to wait
            settings = settings_of(name, experiment, variant, seed, config.quick)
            label = "".join(c if c.isalnum() or c in ".-" else "_" for c in variant)
            folder = top / f"{label}-seed{seed}"
            folders[variant, seed] = folder / "run"
            found = folder / "result.json"
            saved = json.loads(found.read_text()) if found.exists() else {}
            same = saved.get("settings") == json.loads(json.dumps(settings))
            if same and ("configs" not in saved or saved["configs"] == configs_of(settings)):
                results[variant, seed] = saved["figures"]
                commits.append(saved.get("commit", "unknown"))
            else:
                stale += [folder] * bool(saved)
                todo.append((variant, seed, settings, str(folder)))
    if stale and not (config.again or config.quick):
        raise ConfigError(
            f"{len(stale)} of the runs were made by other settings or on another text, {stale[0]} first; "
            "--again true makes them anew"
        )
    # What only looks at a start goes last: before, it would wait for the run that is making the start.
    todo.sort(key=lambda run: any(flags.get("init") == "START" for _, flags in run[2]["stages"]))
    failed = []
    bar = tqdm(total=len(experiment.variants) * len(seeds), initial=len(results), unit="run", desc=name)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, pass_on)
    with ProcessPoolExecutor(config.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            jobs = {pool.submit(run_one, *what, threads): (v, s, what[1]) for v, s, *what in todo}
            for job in as_completed(jobs):
                variant, seed, folder = jobs[job]
                try:
                    results[variant, seed] = job.result()
                    commits.append(short_commit())
                except (Exception, SystemExit) as error:
                    failed.append(f"{variant}, seed {seed}: {error} (see {folder}/log.txt)")
                bar.update()
        except KeyboardInterrupt:  # each run has got it too and has stopped; what was waiting is not begun
            pool.shutdown(cancel_futures=True)
            bar.close()
            print("stopped; the same command makes the runs that are missing")
            raise SystemExit(130) from None
    bar.close()
    if failed:
        raise ConfigError(f"{len(failed)} of the runs failed, the others are kept: " + "; ".join(failed))
    target.parent.mkdir(parents=True, exist_ok=True)
    command = f"python ablate.py {name}" + (" --quick" if config.quick else "")
    command += f" --variants '{json.dumps(config.variants, ensure_ascii=False)}'" if config.variants else ""
    command += f" --seeds '{seeds}'" if seeds != [0, 1, 2] and not config.quick else ""
    results = {key: results[key] for key in folders}  # in the order of the table
    text = report(name, experiment, results, seeds, command, target, commits)
    kept = target.read_text().split("\n## Reading\n", 1)[1:] if target.exists() else []  # a person's words survive
    target.write_text(text + "".join("\n## Reading\n" + words for words in kept))
    draw(experiment, results, folders, seeds, target.with_suffix(".png"))
    print(text)
    return results


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--experiment")
    for flag in ("--list", "--quick"):  # as switches, as well as with a value
        at = sys.argv.index(flag) if flag in sys.argv else 0
        if at and (at + 1 == len(sys.argv) or sys.argv[at + 1].startswith("-")):
            sys.argv[at] = f"{flag}=true"
    run(main, Config, __doc__)
