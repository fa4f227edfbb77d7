"""GDPO: several rewards, each compared within its own group (arXiv:2601.05242). Only its difference from grpo.py.

An answer earns M rewards (right, well formed, brief …) with weights w_k. r_ik is reward k of answer i in a group of R:

    GRPO    r_i  = Σ_k w_k r_ik                                           add up, then compare
            A_i  = (r_i − mean_group r) / (std_group r + 1e-4)

    GDPO    z_ik = (r_ik − mean_group r_k) / (std_group r_k + 1e-4)       compare each reward by itself,
            s_i  = Σ_k w_k z_ik                                           then add up;
            A_i  = s_i / (std_batch s + 1e-4)                             one scale for the whole batch

One step is grpo.main's, with another `paid_rewards` in "judge" and another "compare":

    batch   = sample(step)                              N·R answers                                          1. ask
    rewards = conditioned_rewards(batch)                (N, R, M); --conditioned: 0 in wrong answers         2. judge
    A       = gdpo_advantages(rewards, w):              of all ranks' groups at once                         3. compare
      z_k   = group_advantages(rewards[..., k])         M of (N, R), mean 0 in each group
      s     = Σ_k w_k z_k                               (N, R), mean 0 in each group, so in the batch
      A     = s / (s.std() + 1e-4)                      (N, R); std over all groups of the step
    for minibatch in minibatches: grpo_loss(…, A, …)    A_i weighs every token of answer i, as in GRPO       4. update
    log; every so often answer validation questions                                                          5. look

Why: in a sum (1, 0) and (0, 1) are the same number; and, divided by its group's std, the only winner of a group gets as
much for one reward as for two. (Neither GRPO nor GDPO keeps the scale of a single reward: each divides it away.)

Four groups of four answers in one batch, two rewards of weight 1 (right, tidy); `demo` computes them again:

    rewards                                  GRPO                           GDPO
    (1, 0) (0, 1) (0, 1) (0, 0)          0.50  0.50  0.50 -1.50         0.51  0.29  0.29 -1.09
    (1, 0) (0, 0) (0, 0) (0, 0)          1.50 -0.50 -0.50 -0.50         1.20 -0.40 -0.40 -0.40
    (1, 1) (0, 0) (0, 0) (0, 0)          1.50 -0.50 -0.50 -0.50         2.39 -0.80 -0.80 -0.80
    (1, 0) (0, 1) (0, 0) (1, 1)          0.00  0.00 -1.22  1.22         0.00  0.00 -1.38  1.38

First group: right is rarer than tidy, its std is smaller, so it counts for more. Second and third: one answer earns one
reward or both; GRPO divides that away in each group, GDPO has one scale for the batch. Fourth: GDPO, too, gives (1, 0)
and (0, 1) the same, as the two rewards have equal weights and equal stds; other weights separate them, in both methods.

The defaults run GDPO on grpo.py's two rewards (right 1, format 0.1), all else as in grpo.py. --algorithm: grpo, dapo,
gspo, cispo or sapo, which have GRPO's baseline and scale. Off by default: the reward for brevity, --conditioned.

Traps:
* A weight w_k now multiplies z_k, a reward in units of its group's std: a reward that hardly differs within a group
  counts as much as one that differs a lot.
* The batch's std counts groups without a signal. With one reward that differs in a share p of all groups it is about
  √(p (1 − 1/R)): at p = 1/4 the advantages are about twice GRPO's, and a KL penalty weighs half as much beside them.
* An easy reward is won first, even without solving the task: an empty answer is brief. --conditioned '[brevity]' pays
  brevity only where the answer is right (§3.2). In results/gdpo.md (no KL penalty) format and brevity in a sum cost 4.3
  points of accuracy. The condition by itself gains 3.5 points [-2.7, 9.8], not significant.
* --conditioned pays 0 in a wrong answer. For a penalty 0 is the best there is: a reward below 0 is refused.

The log has, of both methods, how many different advantages a batch gets (`values_…`) and the share of groups in which
answers with different rewards get the same one (`collapsed_…`). The authors' verl code (NVlabs/GDPO) is another method:
its last step whitens over *tokens*.

Run it:
    python gdpo.py --demo                                                # the table by hand, and what a condition does
    python gdpo.py --brevity_weight 0.5 --format_weight 0.5
    python gdpo.py --brevity_weight 0.5 --conditioned '[brevity]'        # brevity counts only in right answers
    python gdpo.py --brevity_weight 0.5 --format_weight 0.5 --combine sum --name sum       # GRPO, same measurements
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

import grpo
from grpo import group_advantages, reward_sums
from support.checks import check
from support.cli import run_script
from support.errors import ConfigError
from support.family import check_conditioned, refuse_replaced
from support.grpo_report import collapse
from support.rewards import reward_functions


def gdpo_advantages(rewards, weights=None):
    """rewards (N, R, M), weights (M,), default 1 -> advantages (N, R). ValueError on a reward that is not finite.

    Both stds have ddof 1. A reward that is the same for a whole group adds exactly 0 there.
    """
    if not rewards.isfinite().all():
        raise ValueError("a reward is not a finite number")
    M = rewards.shape[2]
    weights = [1.0] * M if weights is None else weights
    z = [group_advantages(rewards[..., k]) for k in range(M)]  # M of (N, R), mean 0 in each group
    s = sum(w * z_k for w, z_k in zip(weights, z, strict=True))  # (N, R)
    s = s.masked_fill(s.abs() < 1e-6 * sum(abs(w) for w in weights), 0.0)  # where opposite z's cancel: exactly 0
    return s / (s.std() + 1e-4) if s.numel() > 1 else s  # (N, R)


def condition(rewards, k, needed):
    """rewards (N, R, M) -> a copy in which reward k is 0 wherever reward `needed` is below the threshold 1 (§3.2).
    k, needed: which of the M. ConfigError if reward k is a penalty, below 0 anywhere."""
    if (lowest := rewards[..., k].min()) < 0:
        raise ConfigError(f"a --conditioned reward is {lowest:g}: a wrong answer, which is paid 0, would escape it")
    rewards = rewards.clone()
    rewards[..., k] *= rewards[..., needed] >= 1
    return rewards


def demo():
    """The docstring's table, its first group by hand, and what a condition does."""

    def numbers(values):
        return " ".join(f"{v:5.2f}" for v in values)

    def same(values, by_hand):
        torch.testing.assert_close(values, torch.tensor(by_hand), atol=0.006, rtol=0)

    groups = [  # (right, tidy) of four answers each
        [(1.0, 0.0), (0.0, 1.0), (0.0, 1.0), (0.0, 0.0)],
        [(1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)],
        [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)],
        [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)],
    ]
    rewards = torch.tensor(groups)  # (N, R, M) = (4, 4, 2)
    by_grpo, by_gdpo = group_advantages(rewards.sum(2)), gdpo_advantages(rewards)  # (4, 4) each
    same(by_grpo, [[0.5, 0.5, 0.5, -1.5], [1.5, -0.5, -0.5, -0.5], [1.5, -0.5, -0.5, -0.5], [0, 0, -1.22, 1.22]])
    same(by_gdpo, [[0.51, 0.29, 0.29, -1.09], [1.2, -0.4, -0.4, -0.4], [2.39, -0.8, -0.8, -0.8], [0, 0, -1.38, 1.38]])
    print("(right, tidy)                 GRPO                       GDPO")
    for group, row_grpo, row_gdpo in zip(groups, by_grpo, by_gdpo, strict=True):
        print(*(f"({a:.0f}, {b:.0f})" for a, b in group), "", numbers(row_grpo), "  ", numbers(row_gdpo))

    right, tidy = group_advantages(rewards[..., 0])[0], group_advantages(rewards[..., 1])[0]  # (4,) each
    same(right, [1.5, -0.5, -0.5, -0.5])  # 1 0 0 0: mean 1/4, std 1/2
    same(tidy, [-0.87, 0.87, 0.87, -0.87])  # 0 1 1 0: mean 1/2, std 1/√3
    same(by_gdpo[0], ((right + tidy) / 1.253).tolist())  # 1.253: the std of all 16 sums, √((2.54 + 3 + 12 + 6) / 15)
    print(f"first group: z of right {numbers(right)}, of tidy {numbers(tidy)}; sum / 1.253, the std of all 16 sums")

    alone = torch.zeros(4, 4, 1)
    alone[0, 0] = 1.0  # one right answer among 16: the std of all sums is √(3 / 15) = 0.447
    same(gdpo_advantages(alone)[0], [3.35, -1.12, -1.12, -1.12])
    of_16 = numbers(gdpo_advantages(alone)[0])
    print(f"one right answer in four groups, (1) (0) (0) (0): {of_16}; GRPO: {numbers(right)}")

    rewards = torch.tensor([[(1.0, 0.0), (0.0, 1.0), (0.0, 1.0), (1.0, 1.0)]])  # (right, brief), (1, 4, 2)
    free, paid_if_right = gdpo_advantages(rewards)[0], gdpo_advantages(condition(rewards, k=1, needed=0))[0]
    same(free, [-0.69, -0.4, -0.4, 1.49])  # z of brief, 0 1 1 1, is −1.5 0.5 0.5 0.5
    same(paid_if_right, [0.21, -0.77, -0.77, 1.33])  # 0 0 0 1: −0.5 −0.5 −0.5 1.5
    print(
        f"""
(right, brief)                        (1, 0) (0, 1) (0, 1) (1, 1)
GDPO                                  {numbers(free)}    right but long is worse than wrong but brief
--conditioned '[brevity]'             {numbers(paid_if_right)}    right comes first, then brief"""
    )


@dataclass
class Config(grpo.Config):
    """Train a policy with several verifiable rewards (GDPO)."""

    name: str = "gdpo"
    combine: Literal["gdpo", "sum"] = "gdpo"
    """gdpo; or sum: GRPO's advantages, for comparison."""
    conditioned: list[str] = field(default_factory=list)
    """Rewards that count only where the answer is correct, such as '[brevity]'."""

    def __post_init__(self):
        check(self)
        if self.combine == "gdpo":
            refuse_replaced(self)  # before the algorithm's row fills them in
        super().__post_init__()
        if self.combine == "gdpo":
            self.baseline = self.scale = None  # gdpo_advantages has its own; for --kl_in reward grpo.main takes mean
        check_conditioned(self.conditioned, reward_functions(self, grpo.REWARDS)[1])


def gdpo_advantages_of(rewards, reward_weights, config, lengths=None):
    """Replaces grpo.advantages_of: rewards (N, R, M), {name: weight} -> advantages (N, R), {metric: number}."""
    by_gdpo = gdpo_advantages(rewards, reward_weights.values())  # (N, R)
    if config.combine == "sum":
        by_sum, _ = grpo.advantages_of(rewards, reward_weights, config, lengths)  # (N, R)
    else:
        by_sum = group_advantages(reward_sums(rewards, reward_weights))  # (N, R), for the log alone
    figures = {}
    if lengths is not None:  # None: grpo.main asks only which groups have a signal
        figures = collapse({"grpo": by_sum, "gdpo": by_gdpo}, rewards)
    return by_sum if config.combine == "sum" else by_gdpo, figures


def conditioned_rewards(batch, reward_weights, config):
    """Replaces grpo.paid_rewards: (n, R, M) of this rank's n questions, those of --conditioned 0 in wrong answers."""
    rewards, names = grpo.paid_rewards(batch, reward_weights, config), list(reward_weights)
    for name in config.conditioned:
        rewards = condition(rewards, names.index(name), names.index("correct"))
    return rewards


def main(config):
    """Train; returns what grpo.main returns."""
    return grpo.main(config, gdpo_advantages_of, conditioned_rewards)


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
