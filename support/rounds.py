"""What rejection.py needs beside what it teaches: what comes before its first step (`open_start`, `begin_run`); and of
its rounds, which settings are refused, what is logged of one, how one begins from the start model, its micro-batches.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora import add_lora
from optim import make_optimizers
from sft import collate
from support.checkpoints import open_checkpoint
from support.content import records_of, weights_of
from support.devices import Dist, precision, setup
from support.errors import ConfigError, DivergedError
from support.lora_files import LoraState
from support.questions import open_problems
from support.rollouts import Sampler
from support.runs import Run
from support.sft_start import sft_start
from support.verified import VerifiedConfig


@dataclass
class Start:
    """What a run has before its first step."""

    config: VerifiedConfig
    began: float  # time.perf_counter()
    dist: Dist
    per_rank: int  # answers of a step on this rank
    autocast: object
    scaler: object
    init: str | Path  # the checkpoint,
    policy: torch.nn.Module  # what is in it, with its adapters
    tokenizer: object
    problems: dict  # {"train", "valid", "test"}
    sample: Sampler  # of the training problems


def open_start(config):
    """-> Start."""
    began, dist = time.perf_counter(), setup(config.device)
    per_rank = dist.per_rank("batch", config.batch)
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or sft_start(config, dist)
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    policy.eval()  # throughout: the policy that is tuned is the one that was sampled
    problems = open_problems(config, tokenizer, policy.config.context, dist, checked=True)
    sample = Sampler(policy, tokenizer, problems["train"], config, autocast)
    return Start(config, began, dist, per_rank, autocast, scaler, init, policy, tokenizer, problems, sample)


def begin_run(start, **state):
    """-> Run, new or resumed, with its optimizers. state: what it keeps beside what `measure_start` needs."""
    c, policy = start.config, start.policy
    optimizers = make_optimizers(policy, c.optimizer, c.lr, c.weight_decay)
    reads = records_of(c.data, start.problems) | weights_of(start.init, policy)
    state |= {"best": -1.0, "before": None, "start": {}, "parts": {"lora": LoraState(policy, start.init)}}
    return Run(
        c, start.dist, policy, start.tokenizer, optimizers, start.scaler, reads=reads, began=start.began, **state
    )


def micro_batches(batch, start):
    """B examples, (ids, token_weights) each -> this rank's share in micro-batches, padded: [sft.MicroBatch, …]."""
    share, size = start.per_rank, start.config.micro_batch
    own = batch[start.dist.rank * share : (start.dist.rank + 1) * share]
    own.sort(key=lambda example: len(example[0]))  # answers of like length waste no padding
    parts = [own[i : i + size] for i in range(0, share, size)]
    return [collate(part, start.tokenizer.endoftext_id).to(start.dist.device) for part in parts]


def check_rounds(config):
    """ConfigError on settings that no round can follow."""
    c = config
    if c.steps % c.round_steps:
        raise ConfigError(f"--steps {c.steps} is no whole number of rounds of --round_steps {c.round_steps}")
    if c.max_per_problem and c.max_per_problem > c.rollouts:
        raise ConfigError(f"--max_per_problem {c.max_per_problem} is more than the --rollouts {c.rollouts}")


def round_figures(groups, k):
    """The answers of round k, N of (prompt, R of (ids, right, ended)) -> {"usable": the share of the answers that are
    right and complete, "problems_solved": the share of the problems that have one}. ConfigError if there is none; in a
    later round DivergedError, which an experiment takes as the run's result."""
    usable = torch.tensor([[right and ended for _, right, ended in answers] for _, answers in groups])  # (N, R)
    if not usable.any():
        advice = "give another --init, more --prompts or --rollouts, or a larger --max_new_tokens"
        collapsed = "the policy has collapsed: best/ keeps the best one; try a smaller --lr or fewer --round_steps"
        raise (DivergedError if k else ConfigError)(
            f"none of {usable.numel():,} sampled answers{f' of round {k + 1}' if k else ''} is right and complete, so "
            f"there is nothing to fine-tune on: {collapsed if k else advice}"
        )
    solved = {}  # a round may ask a problem twice
    for (prompt, _), right in zip(groups, usable.any(1).tolist(), strict=True):
        solved[tuple(prompt)] = solved.get(tuple(prompt), False) or right
    return {"usable": usable.double().mean().item(), "problems_solved": sum(solved.values()) / len(solved)}


def back_to_start(policy, start_weights, optimizers):
    """Copy the weights, in the order of policy.parameters(), into the policy; the optimizers forget."""
    for p, weights in zip(policy.parameters(), start_weights, strict=True):
        p.data.copy_(weights)
    for optimizer in optimizers:
        optimizer.state.clear()
