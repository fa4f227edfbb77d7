"""What grpo.py (and with it gdpo.py) and agent.py do before their first step and do not teach.

start                = open_start(config, REWARDS)           the device, the checkpoint and its reference, the problems,
                                                             the rewards
run, look, recorder  = begin_run(start, sample, signal_of)   the first look, the run directory, what is measured before
                                                             training
refresh_copies(start, rollout_policy, step)                  in grpo.py before each step's rollouts
Between the first two a chapter makes its adapters and what samples.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from optim import make_optimizers
from pretrain import shard
from support.checkpoints import open_checkpoint
from support.checks import Count, Positive, Whole
from support.content import code_of, records_of, weights_of
from support.devices import Dist, precision, setup
from support.grpo_report import Look
from support.lora_files import LoraState
from support.off_policy import SamplerFlags, check_sampler
from support.questions import open_problems
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

    temperature: Positive = 1.0
    """Sampling temperature, also used for the log-probabilities in the loss."""
    skip_zero_variance: bool = True
    """Leave out groups whose advantages are all 0, and their KL; false: they pay the KL, which takes longer."""
    if_hopeless: Literal["warn", "stop"] = "warn"
    """What to do if the first rollouts show nothing to learn: go on after saying so, or stop with exit status 2."""
    fsdp: bool = False
    """With torchrun: shard weights, gradients and optimizer state over the ranks, for a model too large for one GPU."""
    sample_every: Count = 100
    """Steps between printed rollouts."""
    refill: Whole = 0
    """Dynamic sampling: how many times groups without a signal are replaced by fresh questions."""
    mask_truncated: bool = False
    """Answers that were cut off get no gradient; they count in a mean over answers, not in one over tokens."""
    refresh_reference: Whole = 0
    """Every so many steps the policy becomes the reference of the KL; 0: that is --init throughout."""

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
    reference: torch.nn.Module  # a frozen copy of it, or with adapters the policy itself
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
    advice = ", or give another --reward, --correct_weight 0 and --format_weight 0"
    context, checked = policy.config.context, config.correct_weight != 0
    problems = open_problems(config, tokenizer, context, dist, checked, advice)
    reads |= records_of(config.data, problems)
    # With adapters the reference is the policy without them: no second model in memory.
    adapters_off = config.lora.rank and not config.refresh_reference
    reference = policy if adapters_off else copy.deepcopy(policy).requires_grad_(False).eval()
    for model in (policy, reference) if config.fsdp else ():
        shard(model, dist, autocast)  # as in pretrain.py
    device, judged = (dist, n, slots, autocast, scaler), (rewards, functions, reward_weights)
    return Start(config, began, *device, *judged, init, path, policy, reference, tokenizer, reads, problems)


def signals(config, reward_weights, advantages_of, paid_rewards):
    """-> signal_of(batch): (n,) bool, which of this rank's groups have an A ≠ 0, before its scale, and a token that
    counts."""

    def signal_of(batch):
        A, _ = advantages_of(paid_rewards(batch, reward_weights, config), reward_weights, config)  # (n, R)
        unequal = A.ne(0).any(1)  # (n,)
        return unequal & batch.ended.any(1) if config.mask_truncated else unequal

    return signal_of


def refresh_copies(start, rollout_policy, step):
    """Before a step's rollouts: every --refresh_reference steps the reference becomes the policy; a `RolloutPolicy`
    that is a copy takes over the policy's weights."""
    every = start.config.refresh_reference
    if every and step and step % every == 0:
        start.reference.load_state_dict(start.policy.state_dict())
    rollout_policy.refresh(start.policy)


def begin_run(start, sample, signal_of, rollout_policy=None, reads=None):
    """-> Run, Look, Recorder. sample: a `Sampler`; signal_of(batch): (n,) bool, which groups have a signal;
    rollout_policy: a `RolloutPolicy`; reads: of this chapter, beside what `start` has read."""
    c, dist, policy, problems = start.config, start.dist, start.policy, start.problems
    if not c.resume:
        look_first(sample, start.slots, signal_of, start.functions, start.reward_weights, start.path, c, dist)
    optimizers = make_optimizers(policy, c.optimizer, c.lr, c.weight_decay, betas=(0.9, 0.999))
    parts = {"lora": LoraState(policy, start.init)}  # what a checkpoint has beside the weights
    parts |= {"reference": start.reference} if c.refresh_reference else {}
    parts |= {"sampler": rollout_policy} if c.stale else {}
    reads = start.reads | (reads or {})
    state = {"best": -1.0, "before": None, "start": {}, "parts": parts, "reads": reads, "began": start.began}
    run = Run(c, dist, policy, start.tokenizer, optimizers, start.scaler, **state)
    began_from = start.init, sample.respond, start.reference
    look = Look(run, problems, start.functions, start.reward_weights, *began_from)
    look.before()
    seen = {"valid": problems["valid"], "sample": sample, "judge": lambda some: judge_batch(start.built_in, some, c)}
    return run, look, Recorder(run, start.autocast, reference=start.reference, temperature=c.temperature, **seen)
