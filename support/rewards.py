"""Reward functions by name, a user's own among them; what they pay, checked to be one finite number per text.

A reward is a function of (texts, problems, ended), three lists of one length, that returns a number for each text.
"""

import importlib
import os
import re
import sys
from dataclasses import dataclass

import torch

from support.answers import extract_answer
from support.checks import Whole
from support.errors import ConfigError
from support.nodes import first_on_node

ANSWER_LINE = re.compile(r"#### -?\$?[0-9,]*\.?[0-9]+")


def format_reward(texts, problems, ended):
    """1 if the text stops by itself, and its last line and no other is `#### number`, bare and readable."""
    last = [(text.strip().splitlines() or [""])[-1].strip() for text in texts]
    return [
        float(e and text.count("####") == 1 and bool(ANSWER_LINE.fullmatch(line)) and extract_answer(line) is not None)
        for text, line, e in zip(texts, last, ended, strict=True)
    ]


def brevity_reward(texts, problems, ended):
    """1 if the text is no longer than the problem's solution; if it calls tools (agent.py), than the solution with its
    calls, where they are known. An empty one is short, too: see gdpo.py --conditioned."""
    shown = [(p.calls or p.solution) if "<<" in text else p.solution for text, p in zip(texts, problems, strict=True)]
    return [float(len(text.strip()) <= len(known.strip())) for text, known in zip(texts, shown, strict=True)]


@dataclass
class RewardFlags:
    """What is paid for."""

    correct_weight: float = 1.0
    """Weight of the reward for a right answer; at 0 best/ is chosen by what the greedy answers earn."""
    format_weight: float = 0.1
    """Weight of the reward for the format, a last line `#### number`; 0 for answers of another form."""
    brevity_weight: float = 0.0
    """Weight of the reward for being no longer than the reference solution."""
    reward: str | None = None
    """Your own reward, module:function: called with (texts, problems, ended), returns one number per text."""
    reward_weight: float = 1.0
    """Weight of your own reward."""
    overlong: Whole = 0
    """Length penalty: a reward that falls from 0 to -1 over this many last tokens before max_new_tokens; 0: none."""


def load_reward(path, taken=()):
    """ "module:function" -> (the function's name, the function). The module is looked for beside the script and in the
    current directory. taken: names that are in use. Raises ConfigError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # permanently: the function may import modules when it is called
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # any error of the user's module; a script that exits
        raise ConfigError(f"--reward {path}: {type(error).__name__}: {error}") from None
    if not callable(function) or name in taken:
        raise ConfigError(f"--reward {path}: " + (f"{name} is taken" if callable(function) else "not a function"))
    return name, function


def score(functions, texts, problems, ended):
    """{name: function} -> {name: rewards (len(texts),)}. Raises ConfigError if a function does not return a finite
    number for each text."""

    def reward_error(message):
        if not first_on_node():  # run_script prints on rank 0 only, but this rank's texts failed
            print(f"error: {message}", file=sys.stderr, flush=True)
        return ConfigError(message)

    rewards = {}
    for name, function in functions.items():
        try:
            values = torch.as_tensor(function(texts, problems, ended), dtype=torch.float32).detach().cpu()
        except (Exception, SystemExit) as error:
            raise reward_error(f"reward {name!r} raised {type(error).__name__}: {error}") from None
        if values.shape != (len(texts),):
            raise reward_error(f"reward {name!r} returned shape {tuple(values.shape)} for {len(texts)} completions")
        if not values.isfinite().all():
            bad = int(values.isfinite().logical_not().nonzero()[0])
            raise reward_error(f"reward {name!r} is {values[bad].item()} for the completion {texts[bad]!r}")
        rewards[name] = values
    return rewards


def reward_functions(config, built_in):
    """built_in {name: function} and --reward -> {name: function}, {name: weight} of the rewards that count. Weight 0:
    measured, not rewarded."""
    if config.reward is None and config.reward_weight != RewardFlags.reward_weight:
        raise ConfigError("--reward_weight has no use without --reward: leave it out")
    functions = dict(built_in)
    weights = {name: getattr(config, f"{name}_weight") for name in built_in}
    if config.reward:
        name, function = load_reward(config.reward, taken={*built_in, "overlong", "kl"})
        functions[name], weights[name] = function, config.reward_weight
    if config.overlong:
        weights["overlong"] = 1.0
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ConfigError("every reward has weight 0: there is nothing to learn")
    return functions, weights


def paid_rewards(batch, reward_weights, config):
    """The rewards that have a weight, (n, R, M): what is paid for. In gdpo.py a reward may depend on another."""
    return torch.stack([batch.rewards[name] for name in reward_weights], dim=-1)


def reward_sums(rewards, reward_weights):
    """rewards (N, R, M), {name: weight} of the M -> (N, R)."""
    return sum(w * rewards[..., m] for m, w in enumerate(reward_weights.values()))


def judge(functions, texts, problems, ended, lengths, config):
    """The rewards of the completions, and --overlong: {name: (len(texts),)}. lengths: of all tokens that the limit
    counts, those of a tool too."""
    rewards = score(functions, texts, problems, ended)
    if config.overlong:
        over = torch.tensor(lengths) - (config.max_new_tokens - config.overlong)
        rewards["overlong"] = -(over / config.overlong).clamp(min=0.0)
    return rewards


def judge_batch(functions, batch, config):
    """Give a step's rollouts their rewards: {name: (n, R)} in batch.rewards."""
    n, R = batch.ended.shape
    problems = [p for p in batch.problems for _ in range(R)]
    ended, lengths = batch.ended.flatten().tolist(), [len(ids) for ids in batch.rollout.rows]  # n·R
    rewards = judge(functions, batch.texts, problems, ended, lengths, config)
    batch.rewards = {name: values.view(n, R) for name, values in rewards.items()}
