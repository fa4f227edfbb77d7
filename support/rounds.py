"""The rounds of rejection.py: what is logged of one, which are refused, and how one begins from the start model."""

import torch

from support.errors import ConfigError


def check_rounds(config):
    """ConfigError on settings that no round can follow."""
    c = config
    if c.steps % c.round_steps:
        raise ConfigError(f"--steps {c.steps} is no whole number of rounds of --round_steps {c.round_steps}")
    if c.max_per_problem and c.max_per_problem > c.rollouts:
        raise ConfigError(f"--max_per_problem {c.max_per_problem} is more than the --rollouts {c.rollouts}")


def round_figures(groups, k):
    """The answers of round k, N of (prompt, R of (ids, right, ended)) -> {"right": the share of the answers that are
    right and complete, "solved": the share of the problems that have one}. ConfigError if there is none."""
    usable = torch.tensor([[right and ended for _, right, ended in answers] for _, answers in groups])  # (N, R)
    if not usable.any():
        advice = "give another --init, more --prompts or --rollouts, or a larger --max_new_tokens"
        collapsed = "the policy has collapsed: best/ keeps the best one; try a smaller --lr or fewer --round_steps"
        raise ConfigError(
            f"none of {usable.numel():,} sampled answers{f' of round {k + 1}' if k else ''} is right and complete, so "
            f"there is nothing to fine-tune on: {collapsed if k else advice}"
        )
    return {"right": usable.double().mean().item(), "solved": usable.any(1).double().mean().item()}


def back_to_start(policy, start_weights, optimizers):
    """Copy the weights, in the order of policy.parameters(), into the policy; the optimizers forget."""
    for p, weights in zip(policy.parameters(), start_weights, strict=True):
        p.data.copy_(weights)
    for optimizer in optimizers:
        optimizer.state.clear()
