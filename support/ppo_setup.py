"""What a PPO run needs before its first step and ppo.py does not teach: the flags of its sizes, which settings go
together, the reward model if none was given, the models, the problems."""

import copy
from dataclasses import asdict, dataclass
from functools import partial

import reward_model
from data import DEFAULT_TASK, load_problems
from lora import add_lora
from reward_model import RewardModel, open_reward_model
from support.checkpoints import open_checkpoint
from support.checks import Count, Positive
from support.errors import ConfigError
from support.questions import splits_with_room
from support.runs import make_start_once, start_name
from support.verified import PolicyConfig


@dataclass
class SizeFlags(PolicyConfig):
    """How many answers, at a time and in all."""

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


def check_settings(config):
    """ConfigError on settings of ppo.Config that do not go together."""
    c = config
    if c.baseline != "none" and c.rollouts < 2:
        raise ConfigError(f"--baseline {c.baseline} needs --rollouts of at least 2: there is no other answer")
    if c.kl_target is not None and c.kl_beta == 0:
        raise ConfigError("--kl_beta 0 stays 0, as --kl_target multiplies it; start from more")
    least = 0.2 * c.prompts * c.rollouts  # one step multiplies β by at least 1 − 0.2 N·R / horizon
    if c.kl_target is not None and not c.kl_horizon > least:
        bound = f"above {least:g}, or one step can end the KL penalty"
        raise ConfigError(f"--kl_horizon is {c.kl_horizon}; it must be {bound}")
    if c.prompts < c.minibatches:
        raise ConfigError(f"--prompts {c.prompts} cannot be cut into {c.minibatches} minibatches")
    if c.init is not None and c.reward_model is None:
        train = f"python reward_model.py --init {c.init}"
        raise ConfigError(f"--init needs a reward model of the same tokenizer: {train}, then --reward_model RUN")


def reward_start(config, init, dist):
    """A reward model for a run that was given none; made once, under runs/start, and reused -> its path."""
    settings = {"init": init, "levels": config.levels, "seed": config.seed}
    settings |= {"device": config.device, "dtype": config.dtype}
    if config.data != DEFAULT_TASK:
        settings["data"] = config.data
    name = start_name(config.data, config.seed, "reward")
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


def open_problems(config, tokenizer, context, dist):
    """{"train", "valid", "test"}: problems whose prompts leave room for an answer. ConfigError if a split has none."""
    load = partial(load_problems, config.data, levels=tuple(config.levels), skip_bad=config.skip_bad)
    sizes = {"train": None, "valid": config.eval_problems, "test": config.test_problems}
    return splits_with_room(load, sizes, config, tokenizer, context, dist)
