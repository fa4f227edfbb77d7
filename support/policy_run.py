"""What grpo.py (and with it gdpo.py) and agent.py do before their first step and do not teach.

start                = open_start(config, REWARDS)         the device, the checkpoint, the problems, the rewards
run, look, recorder  = begin_run(start, sample, reference, signal_of)      the first look, the run directory, what is
                                                                           measured before training
Between the two a chapter makes its reference, its adapters and what samples.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from optim import make_optimizers
from support.checkpoints import open_checkpoint
from support.checks import Count
from support.content import code_of, records_of, weights_of
from support.devices import Dist, precision, setup
from support.grpo_report import Look
from support.lora_files import LoraState
from support.off_policy import SamplerFlags, check_sampler
from support.questions import load_question_splits
from support.recorder import Recorder, RecordFlags
from support.rewards import RewardFlags, judge_batch, reward_functions
from support.runs import Run
from support.sft_start import sft_start
from support.sharding import refuse_fsdp
from support.verdict import look_first
from support.verified import VerifiedConfig


@dataclass
class PolicyRunConfig(SamplerFlags, RewardFlags, RecordFlags, VerifiedConfig):
    """The flags of a policy that is trained with verifiable rewards, whatever the objective."""

    if_hopeless: Literal["warn", "stop"] = "warn"
    """What to do if the first rollouts show nothing to learn: go on after saying so, or stop with exit status 2."""
    fsdp: bool = False
    """With torchrun: shard weights, gradients and optimizer state over the ranks, for a model too large for one GPU."""
    sample_every: Count = 100
    """Steps between printed rollouts."""

    def __post_init__(self):
        super().__post_init__()
        check_sampler(self)


@dataclass
class Start:
    """What a run has before its first step."""

    config: PolicyRunConfig
    began: float  # time.perf_counter()
    dist: Dist
    n: int  # this rank asks n of a step's N questions,
    slots: list  # and these are the places of the n among the N
    autocast: object
    scaler: object
    built_in: dict  # {name: function}: the chapter's rewards
    functions: dict  # the same with --reward: all that are measured
    reward_weights: dict  # {name: weight} of those that are paid
    init: str | Path  # the checkpoint,
    path: Path  # where it lies,
    policy: torch.nn.Module  # what is in it
    tokenizer: object
    reads: dict  # {name: what the run reads}: a resumed run must read the same
    problems: dict  # {"train", "valid", "test"}


def open_start(config, rewards, make_start=sft_start, says=""):
    """-> Start. rewards {name: function}: the chapter's REWARDS. make_start(config, dist) -> the path of a checkpoint,
    where --init names none. says: a line that is printed first."""
    began, dist = time.perf_counter(), setup(config.device)
    if says and dist.is_main:
        print(says)
    n = dist.per_rank("prompts", config.prompts)
    slots = list(range(dist.rank * n, (dist.rank + 1) * n))
    autocast, scaler = precision(config.dtype, dist)
    refuse_fsdp(config, dist, scaler)
    functions, reward_weights = reward_functions(config, rewards)
    init = config.init or make_start(config, dist)
    policy, tokenizer, path = open_checkpoint(init, "cpu" if config.fsdp else dist.device)
    reads = weights_of(init, policy) | code_of(config.reward, functions)
    problems = load_question_splits(config, tokenizer, policy.config.context, dist)
    reads |= records_of(config.data, problems)
    device, judged = (dist, n, slots, autocast, scaler), (rewards, functions, reward_weights)
    return Start(config, began, *device, *judged, init, path, policy, tokenizer, reads, problems)


def begin_run(start, sample, reference, signal_of, parts=None, reads=None):
    """-> Run, Look, Recorder. sample: a `Sampler`; signal_of(batch): (n,) bool, which groups have an advantage. parts,
    reads: of this chapter, beside the adapters and what `start` has read."""
    c, dist, policy, problems = start.config, start.dist, start.policy, start.problems
    if not c.resume:
        look_first(sample, start.slots, signal_of, start.functions, start.reward_weights, start.path, c, dist)
    optimizers = make_optimizers(policy, c.optimizer, c.lr, c.weight_decay, betas=(0.9, 0.999))
    parts, reads = {"lora": LoraState(policy, start.init)} | (parts or {}), start.reads | (reads or {})
    state = {"best": -1.0, "before": None, "start": {}, "parts": parts, "reads": reads, "began": start.began}
    run = Run(c, dist, policy, start.tokenizer, optimizers, start.scaler, **state)
    look = Look(run, problems, start.functions, start.reward_weights, start.init, sample.respond)
    look.before()
    seen = {"valid": problems["valid"], "sample": sample, "judge": lambda some: judge_batch(start.built_in, some, c)}
    return run, look, Recorder(run, start.autocast, reference=reference, temperature=c.temperature, **seen)
