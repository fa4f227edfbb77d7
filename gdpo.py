"""GDPO: several rewards, each normalised in its own group (arXiv:2601.05242). Only its difference from grpo.py.

    GRPO:   r_i = Σ_k w_k r_ik          A_i = (r_i − mean_group r) / (std_group r + 1e-4)

    GDPO:   z_ik = (r_ik − mean_group r_k) / (std_group r_k + 1e-4)                 each reward by itself
            s_i  = Σ_k w_k z_ik
            A_i  = (s_i − mean_batch s) / (std_batch s + 1e-4)                      one scale for the whole batch

Why: a sum forgets what it was made of, and GRPO's std what it came to. Both collapse different rewards into one
advantage. Four groups of four completions in one batch, two rewards (right, tidy):

    rewards                                  GRPO                           GDPO
    (1, 0) (0, 1) (0, 1) (0, 0)          0.50  0.50  0.50 -1.50         0.51  0.29  0.29 -1.09
    (1, 0) (0, 0) (0, 0) (0, 0)          1.50 -0.50 -0.50 -0.50         1.20 -0.40 -0.40 -0.40
    (1, 1) (0, 0) (0, 0) (0, 0)          1.50 -0.50 -0.50 -0.50         2.39 -0.80 -0.80 -0.80
    (1, 0) (0, 1) (0, 0) (1, 1)          0.00  0.00 -1.22  1.22         0.00  0.00 -1.38  1.38

In the first, being right is rarer than being tidy, its std is smaller, and it counts for more. The second and third
differ in size, which GRPO divides away in each group and GDPO only over the batch. In the last GDPO collapses, too: two
rewards of equal weight and equal std are exchangeable; unequal weights part them, in both methods.

What it costs: a weight w_k now weighs standard deviations, not rewards, so a reward that hardly differs inside a group
counts as much as one that differs a lot. And one that is easy, or can be had without the task, is had first: an empty
answer is brief. Hence conditioned rewards (--conditioned): r_k counts only where the answer is right. Without it two
of six seeds came to stop after the first of two steps, brief, tidy and wrong; with it none did (results/gdpo.md).

Equal to the authors' TRL code (NVlabs/GDPO, trl-GDPO, `_generate_and_score_completions`): epsilon 1e-4 in both steps,
standard deviations with ddof 1, over the completions of the step on all ranks. (TRL itself has it since as
multi_objective_aggregation="normalize_then_sum".) mean_batch s is not subtracted here: it
is 0 already, as each group's z sums to zero, and subtracting its rounding error would give a group without any signal
an advantage of 1e-8 instead of 0. Two more differences: the authors turn a NaN reward into 0, here it is an error; and
for a single reward they fall back to GRPO, here it is GRPO with the batch step.

Their verl code differs: epsilon 1e-6 in the groups, no weights, and the last step whitens over *tokens*: every
completion counts |y_i| times in mean and variance, A = (s − mean) / √(var + 1e-8). The mean over tokens is not 0 where
length and reward go together, so even groups without signal are then pushed, all of their tokens the same way.

Run it:
    python gdpo.py --brevity_weight 0.5 --format_weight 0.5 --steps 500
    python gdpo.py --brevity_weight 0.5 --conditioned '[brevity]'        # brief counts only where right
    python gdpo.py --brevity_weight 0.5 --format_weight 0.5 --combine sum --name sum       # GRPO, same measurements
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

import grpo
from grpo import group_advantages, summed_advantages
from support.cli import run_script
from support.errors import ConfigError


def gdpo_advantages(rewards, weights=None):
    """rewards (N, R, M), weights (M,), default 1 -> advantages (N, R). Raises ValueError on a NaN.

    A reward that is the same for a whole group adds exactly 0 there.
    """
    if not rewards.isfinite().all():
        raise ValueError("a reward is not a finite number")
    M = rewards.shape[2]
    weights = [1.0] * M if weights is None else weights
    z = [group_advantages(rewards[..., k]) for k in range(M)]  # M of (N, R), each sums to 0 in each group
    s = sum(w * z_k for w, z_k in zip(weights, z, strict=True))  # (N, R)
    return s / (s.std() + 1e-4) if s.numel() > 1 else s


def condition(rewards, which, on, threshold=1.0):
    """rewards (N, R, M) -> the same, with reward `which` 0 where reward `on` is below the threshold (§3.2)."""
    rewards = rewards.clone()
    rewards[..., which] *= rewards[..., on] >= threshold
    return rewards


def distinct(values):
    """How many different entries each group has, up to rounding: (N, R) or (N, R, M) -> (N,)."""
    return torch.tensor([len(torch.unique(group.round(decimals=3), dim=0)) for group in values])


def collapse(rewards, weights):
    """{metric: number}: what each method keeps of the differences between completions, for the same rewards.

    values_…: distinct advantages in the batch. collapsed_…: share of groups in which completions that earned different
    rewards get one and the same advantage.
    """
    methods = {"grpo": summed_advantages(rewards, weights), "gdpo": gdpo_advantages(rewards, weights.values())}
    figures = {}
    for name, advantages in methods.items():
        lost = distinct(advantages) < distinct(rewards)  # (N,)
        figures[f"values_{name}"] = distinct(advantages.flatten()[None]).item()
        figures[f"collapsed_{name}"] = lost.float().mean().item()
    return figures


@dataclass
class Config(grpo.Config):
    """Train a policy with several verifiable rewards (GDPO)."""

    name: str = "gdpo"
    combine: Literal["gdpo", "sum"] = "gdpo"
    """gdpo, or sum: the advantages of GRPO, for comparison."""
    conditioned: list[str] = field(default_factory=list)
    """Rewards that count only where the answer is correct, such as '[brevity]'."""

    def __post_init__(self):
        if self.combine == "gdpo" and self.scale is not None:
            raise ConfigError("--scale has no meaning with --combine gdpo, which normalises each reward by itself")
        super().__post_init__()
        if self.combine == "gdpo":
            self.scale = None
        _, weights = grpo.reward_functions(self)
        for name in [*self.conditioned, *(["correct"] if self.conditioned else [])]:
            if name not in weights:
                raise ConfigError(f"--conditioned needs a weight for {name!r}; there are {', '.join(weights)}")


def advantages_of(rewards, weights, config):
    """What grpo.main asks instead of GRPO's sum: rewards (N, R, M), {name: weight} -> advantages (N, R), metrics."""
    if config.combine == "sum":
        advantages = summed_advantages(rewards, weights, config.scale)
    else:
        advantages = gdpo_advantages(rewards, weights.values())
    return advantages, collapse(rewards, weights)


def paid_rewards(batch, weights, config):
    """The rewards that have a weight, (n, R, M), those of --conditioned 0 where the answer is wrong."""
    rewards, names = grpo.paid_rewards(batch, weights, config), list(weights)
    for name in config.conditioned:
        rewards = condition(rewards, names.index(name), names.index("correct"))
    return rewards


def main(config):
    """Train; returns what grpo.main returns."""
    return grpo.main(config, advantages_of, paid_rewards)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
