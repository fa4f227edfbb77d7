"""What distill.py does before its first step and does not teach.

start         = open_start(config)                     the device, student and teacher, the problems as each sees them
run, recorder = begin_run(start, writers, loss_of)     the run directory, what is measured before training
Between the two the chapter makes what writes its texts.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lora import add_lora
from optim import make_optimizers
from support.checkpoints import open_checkpoint
from support.content import records_of, weights_of
from support.devices import Dist, precision, setup
from support.distill_report import measure_both
from support.lora_files import LoraState
from support.recorder import Recorder
from support.runs import Run
from support.teachers import check_shared_by, load_taught, open_teacher, student_start, teacher_start
from support.verified import VerifiedConfig


@dataclass
class Start:
    """What a run has before its first step."""

    config: VerifiedConfig
    began: float  # time.perf_counter(), when both models were there
    dist: Dist
    slots: list  # which of a step's N questions this rank asks
    autocast: object
    scaler: object
    init: str | Path  # the checkpoint of the student
    policy: torch.nn.Module  # the student, with its adapters
    teacher: torch.nn.Module  # frozen; with --teacher self the student
    tokenizer: object
    problems: dict  # {"train", "valid", "test"}
    teacher_problems: dict  # the same, as the teacher sees them
    reads: dict  # {name: what the run reads}: a resumed run must read the same


def open_start(config):
    """-> Start."""
    dist = setup(config.device)
    n = dist.per_rank("prompts", config.prompts)
    slots = list(range(dist.rank * n, (dist.rank + 1) * n))
    autocast, scaler = precision(config.dtype, dist)
    if config.teacher is None:
        check_shared_by(dist.world)
    init = config.init or student_start(config, dist)
    teacher_path = config.teacher or teacher_start(config, dist)
    began = time.perf_counter()
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    reads = weights_of(init, policy)
    if config.teacher == "self":
        teacher = policy
    else:
        teacher = open_teacher(teacher_path, init, policy, tokenizer, config.teacher_sees, dist.device)
        reads |= weights_of(teacher_path, teacher)
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    policy.eval()  # throughout: no dropout
    contexts = policy.config.context, teacher.config.context
    problems, teacher_problems = load_taught(config, tokenizer, *contexts, dist)
    reads |= records_of(config.data, problems)
    device, models = (dist, slots, autocast, scaler), (init, policy, teacher, tokenizer)
    return Start(config, began, *device, *models, problems, teacher_problems, reads)


def begin_run(start, writers, loss_of):
    """-> Run, Recorder. writers: `support.taught.Writers`; loss_of: what is recorded of each token, see `Recorder`."""
    c, policy, teacher = start.config, start.policy, start.teacher
    optimizers = make_optimizers(policy, c.optimizer, c.lr, c.weight_decay)
    state = {"best": -1.0, "before": None, "start": {}, "teacher": None, "tokens": 0.0}
    state |= {"parts": {"lora": LoraState(policy, start.init)}, "reads": start.reads, "began": start.began}
    run = Run(c, start.dist, policy, start.tokenizer, optimizers, start.scaler, **state)
    seen = {"valid": start.problems["valid"], "taught": start.teacher_problems["valid"], "sample": writers.student}
    recorder = Recorder(run, start.autocast, reference=teacher, temperature=c.temperature, loss_of=loss_of, **seen)
    measure_both(run, start)  # the start is best/ until a step beats it
    return run, recorder
