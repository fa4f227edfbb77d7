"""What ppo.py does before its first step and does not teach: flags, which settings go together, and

start               = open_start(ActorCritic, config)     the device, a reward model if none was given, the models, the
                                                          problems
run, look, recorder = begin_run(start, optimizers, …)     the run directory, what is measured before training
Between the two the chapter makes its optimizers and what samples and scores.
"""

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import reward_model
from data import DEFAULT_TASK
from lora import add_lora
from reward_model import RewardModel, open_reward_model
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Positive, Whole
from support.content import records_of, weights_of
from support.devices import Dist, precision, setup
from support.errors import ConfigError
from support.lora_files import LoraState
from support.ppo_report import Look
from support.questions import open_problems
from support.recorder import Recorder
from support.runs import Run, make_start_once, start_name
from support.sft_start import sft_start
from support.verified import PolicyConfig


@dataclass
class SetupFlags(PolicyConfig):
    """How many answers, at a time and in all; how often a run looks; an adaptive KL weight; the optimizer."""

    reward_model: str | None = None
    """Reward model with the same tokenizer; default: one trained once into runs/start."""
    prompts: Count = 16
    """Prompts N per step, over all ranks."""
    rollouts: Count = 8
    """Answers R per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature, also used for the log-probabilities in the loss."""
    micro_batch: Count = 64
    """Answers per forward pass of one rank, in whole groups: never fewer than --rollouts."""
    eval_problems: Count = 200
    """Validation problems per evaluation."""
    test_problems: Count = 1000
    """Test problems of the evaluations before and after training."""
    sample_every: Count = 50
    """Steps between printed rollouts."""
    eval_every: Count = 25
    save_every: Count = 50
    kl_target: Positive | None = None
    """Adapt the weight of the KL penalty so that the KL stays near this many nats per answer."""
    kl_horizon: Positive = 5000.0
    """After this many answers with a KL at least 20 % above its target, the weight is about 1.2 times as high."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: Amount = 0.0
    """Decoupled weight decay of the policy's matrices; the values have none."""
    warmup: Whole = 5

    def __post_init__(self):
        super().__post_init__()
        if self.normalise is None:  # a field of ppo.Config, as others that `check_settings` reads
            self.normalise = self.baseline != "wins"
        check_settings(self)


def check_settings(config):
    """ConfigError on settings of ppo.Config that do not go together."""
    c = config
    if c.baseline != "none" and c.rollouts < 2:
        raise ConfigError(f"--baseline {c.baseline} needs --rollouts of at least 2: there is no other answer")
    if c.kl_target is not None and c.beta == 0:
        raise ConfigError("--beta 0 stays 0, as --kl_target multiplies it; start from more")
    if c.kl_target is None and c.kl_horizon != type(c).kl_horizon:
        raise ConfigError("--kl_horizon has no use without --kl_target: leave it out")
    least = 0.2 * c.prompts * c.rollouts  # one step multiplies β by at least 1 − 0.2 N·R / horizon
    if c.kl_target is not None and not c.kl_horizon > least:
        bound = f"above {least:g}, or one step can end the KL penalty"
        raise ConfigError(f"--kl_horizon is {c.kl_horizon}; it must be {bound}")
    if c.prompts < c.minibatches:
        raise ConfigError(f"--prompts {c.prompts} cannot be cut into {c.minibatches} minibatches")
    if c.init is not None and c.reward_model is None:
        train = f"python reward_model.py --init {c.init}"
        raise ConfigError(f"--init needs a reward model of the same tokenizer: {train}, then --reward_model RUN")


@dataclass
class Start:
    """What a run has before its first step."""

    config: SetupFlags
    began: float  # time.perf_counter()
    dist: Dist
    n: int  # this rank asks n of a step's N prompts,
    slots: list  # and these are the places of the n among the N
    autocast: object
    scaler: object
    init: str | Path  # the checkpoint of the policy,
    judge_path: str | Path  # and of the reward model
    actor_critic: torch.nn.Module
    reference: torch.nn.Module
    judge: torch.nn.Module  # the reward model
    tokenizer: object
    problems: dict  # {"train", "valid", "test"}


def open_start(kind, config):
    """-> Start. kind: ppo.ActorCritic."""
    began, dist = time.perf_counter(), setup(config.device)
    n = dist.per_rank("prompts", config.prompts)
    slots = list(range(dist.rank * n, (dist.rank + 1) * n))
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or sft_start(config, dist)
    judge_path = config.reward_model or reward_start(config, init, dist)
    actor_critic, reference, judge, tokenizer = open_models(kind, config, init, judge_path, dist)
    context = min(actor_critic.policy.config.context, judge.config.context)
    problems = open_problems(config, tokenizer, context, dist, checked=False)
    device, models = (dist, n, slots, autocast, scaler), (actor_critic, reference, judge, tokenizer)
    return Start(config, began, *device, init, judge_path, *models, problems)


def begin_run(start, optimizers, parts, sample, score):
    """-> Run, Look, Recorder. parts: what a checkpoint has beside the policy's weights and its adapters; sample: a
    `Sampler`; score(batch) -> (n, R), by the reward model."""
    c, policy = start.config, start.actor_critic.policy
    parts = {"lora": LoraState(policy, start.init)} | parts
    reads = records_of(c.data, start.problems) | weights_of(start.init, policy)
    reads |= weights_of(start.judge_path, start.judge)
    state = {"best": -1.0, "before": None, "start": {}, "beta": c.beta, "parts": parts, "began": start.began}
    run = Run(c, start.dist, policy, start.tokenizer, optimizers, start.scaler, reads=reads, **state)
    look = Look(run, start.problems)
    look.before(start.init, start.judge_path)  # the test split; and until something beats it, the start is best/
    seen = {"valid": start.problems["valid"], "sample": sample, "score": score, "temperature": c.temperature}
    return run, look, Recorder(run, start.autocast, reference=start.reference, **seen)


def reward_start(config, init, dist):
    """A reward model for a run that was given none; made once, under runs/start, and reused -> its path."""
    settings = {"init": init, "levels": config.levels, "seed": config.seed}
    settings |= {"device": config.device, "dtype": config.dtype}
    if config.data != DEFAULT_TASK:
        settings["data"] = config.data
    longer = {"max_new_tokens": config.max_new_tokens} if config.max_new_tokens != type(config).max_new_tokens else {}
    settings |= longer  # it judges answers as long as those that it is trained on
    name = start_name(config.data, config.seed, "reward", config.levels, **longer)
    return make_start_once(name, "no --reward_model given: training one", reward_model, settings, dist)


def open_models(kind, config, init, judge_path, dist):
    """-> the policy with its values, of `kind` (ppo.ActorCritic); the frozen reference; the frozen reward model; the
    tokenizer. With LoRA the reference is the policy itself, to be used without its adapters: no second model in memory.
    ConfigError if the policy and the reward model do not fit together."""
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    judge, other, path = open_reward_model(judge_path, dist.device)
    if other.fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"the reward model {path} has another tokenizer than {init}: it would misread every answer")
    if policy.config.vocab_size > judge.config.vocab_size:
        sizes = f"{init} may sample {policy.config.vocab_size} ids, the reward model {path} knows"
        raise ConfigError(f"{sizes} {judge.config.vocab_size}: take one whose embedding is padded as far")
    critic = None
    if config.value == "separate":
        if not isinstance(judge, RewardModel):
            raise ConfigError(f"--value separate needs a decoder as reward model, {path} is an encoder; use shared")
        critic = copy.deepcopy(judge)
    actor_critic = kind(policy, critic).to(dist.device)
    if config.lora.rank:
        add_lora(policy, **asdict(config.lora), seed=config.seed)
        reference = policy
    else:
        reference = open_checkpoint(init, dist.device)[0].requires_grad_(False).eval()
    return actor_critic, reference, judge.requires_grad_(False).eval(), tokenizer
