"""What dpo.py does before its first step and does not teach.

start               = open_start(config)                       the device, the checkpoint, its copy, the adapters
run, look, recorder = begin_run(start, pairs, problems, …)     the run directory, the test split before training
Between the two the chapter makes its pairs, which the start model answers.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora import add_lora
from optim import make_optimizers
from support.checkpoints import open_checkpoint
from support.content import weights_of
from support.devices import Dist, precision, setup
from support.dpo_report import Look
from support.lora_files import LoraState
from support.pair_rows import PairFlags
from support.pairs import save_pairs
from support.recorder import Recorder
from support.runs import Run
from support.sft_start import sft_start


@dataclass
class Start:
    """What a run has before its pairs."""

    config: PairFlags
    began: float  # time.perf_counter()
    dist: Dist
    autocast: object
    scaler: object
    init: str | Path  # the checkpoint,
    policy: torch.nn.Module  # what is in it, with the adapters of --lora.rank
    tokenizer: object
    reference: torch.nn.Module | None  # a frozen copy without, on the CPU while it is not needed; None with LoRA:
    # then z0 and the KL take the policy with its adapters off


def open_start(config):
    """-> Start."""
    began, dist = time.perf_counter(), setup(config.device)
    dist.per_rank("batch", config.batch)  # an error now, not after the pairs are sampled
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or sft_start(config, dist)
    policy, tokenizer, _ = open_checkpoint(init, dist.device, config.dropout)
    reference = None if config.lora.rank else copy.deepcopy(policy).requires_grad_(False).eval().cpu()
    add_lora(policy, **asdict(config.lora), seed=config.seed)
    return Start(config, began, dist, autocast, scaler, init, policy, tokenizer, reference)


def begin_run(start, pairs, problems, reads, variant, loss_of):
    """-> Run, Look, Recorder. pairs, problems, reads: of `pairs_of_run`, which comes first, as an error there must not
    move an earlier run of this name; variant: a row of dpo.VARIANTS; loss_of: dpo.py's."""
    c, dist, policy, autocast = start.config, start.dist, start.policy, start.autocast
    optimizers = make_optimizers(policy, c.optimizer, c.lr, c.weight_decay, betas=(0.9, 0.999))
    torch.manual_seed(c.seed + 1000 * dist.rank)  # dropout differs between ranks
    reads = reads | weights_of(start.init, policy)  # a resumed run must read the same
    state = {"parts": {"lora": LoraState(policy, start.init)}, "reads": reads, "began": start.began, "before": None}
    state |= {"best": math.inf, "lower_is_better": True}
    run = Run(c, dist, policy, start.tokenizer, optimizers, start.scaler, **state)
    save_pairs(run, pairs)
    look = Look(run, pairs, problems, start.reference, autocast, variant, loss_of)
    look.before(start.init)
    seen = {"valid": pairs["valid"], "reference": start.reference or policy, "loss_of": loss_of}
    return run, look, Recorder(run, autocast, **seen)
