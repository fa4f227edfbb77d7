"""What a group of answers is compared with, in one tensor: rewards (N, R) of R answers to each of N prompts -> (N, R).

less_baseline     less a mean of the prompt's own answers                grpo.py, ppo.py --baseline mean
win_rates         the chance to beat the prompt's other answers          ppo.py --baseline wins
"""

import torch

from support.errors import ConfigError


def less_baseline(rewards, baseline="mean"):
    """rewards (N, R) of R answers to each of N prompts -> (N, R), less a baseline that is the prompt's own.

    mean: the mean of the prompt's answers (GRPO); leave_one_out: that of its other answers (RLOO, arXiv:2402.14740),
    R / (R − 1) times the difference; none. With a baseline, answers that all earn the same, or one alone, get exactly
    0. ConfigError on an unknown name.
    """
    if baseline == "none":
        return rewards
    if baseline not in ("mean", "leave_one_out"):
        raise ConfigError(f"--baseline {baseline!r} is not known; use mean, leave_one_out or none")
    R = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out" and R > 1:
        centred = centred * R / (R - 1)
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # exactly, not up to the mean's rounding
    return centred.masked_fill(same, 0.0)


def win_rates(scores):
    """scores (N, R), R at least 2 -> (N, R), between −½ and ½: the mean of σ(s_i − s_j) over the prompt's other answers
    j, which is the chance to be better as the Bradley-Terry model has it, less one half."""
    beats = torch.sigmoid(scores[:, :, None] - scores[:, None])  # (N, R, R), ½ against itself
    return (beats - 0.5).sum(2) / (scores.shape[1] - 1)
