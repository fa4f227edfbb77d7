"""gdpo.py: advantages against plain loops written from NVlabs/GDPO's two forms, what collapses, and a run."""

import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import metrics
from test_grpo import SMALL, here, letter, start  # noqa: F401

import gdpo
import grpo
from gdpo import collapse, condition, gdpo_advantages
from grpo import group_advantages
from support.errors import ConfigError
from support.grpo_report import distinct


def mean_std(values):
    """Mean, and standard deviation with ddof 1."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def by_loop(rewards, weights):
    """NVlabs/GDPO, trl-GDPO, grpo_trainer.py, `_generate_and_score_completions` (their lines 1222 to 1248), in float64:
    groups of R consecutive completions; epsilon 1e-4 and ddof 1 in both steps; the mean of the batch subtracted:
    it is 0 up to rounding, and without it a group without a signal gets exactly 0. Not here: they turn a NaN reward
    into 0, which gdpo.py refuses, and with a single reward they fall back to GRPO."""
    N, R, M = rewards.shape
    s = [[0.0] * R for _ in range(N)]
    for g in range(N):
        for k in range(M):
            mean, std = mean_std(rewards[g, :, k].tolist())
            for i in range(R):
                s[g][i] += weights[k] * (rewards[g, i, k].item() - mean) / (std + 1e-4)
    mean, std = mean_std([x for row in s for x in row])
    return torch.tensor([[(x - mean) / (std + 1e-4) for x in row] for row in s])


def some_rewards():
    torch.manual_seed(0)
    rewards = torch.rand(6, 5, 3).round(decimals=1)
    rewards[..., 1] = (rewards[..., 1] > 0.6).float()  # a reward of 0 and 1, equal in some groups
    rewards[0], rewards[1, :, 0] = 1.0, 0.3
    return rewards


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 0.1]])
def test_advantages_equal_the_authors(weights):
    rewards = some_rewards()
    got = gdpo_advantages(rewards, torch.tensor(weights))
    torch.testing.assert_close(got, by_loop(rewards.double(), weights), atol=1e-6, rtol=0, check_dtype=False)
    assert (got[0] == 0).all()  # exactly: no signal, not even rounding
    if weights == [1.0] * 3:
        assert torch.equal(gdpo_advantages(rewards), got)


def test_rewards_that_cancel_give_no_signal():
    """Exactly 0, or such a group would be trained on and pay the KL."""
    for R in range(2, 13):
        right = (torch.arange(R) < R / 3).float()
        rewards = torch.stack([torch.stack([right, 1 - right], 1), torch.stack([right, right], 1)])  # (2, R, 2)
        A = gdpo_advantages(rewards)
        assert A[0].tolist() == [0.0] * R
        assert A[1].ne(0).all()


def test_one_reward_is_grpo_up_to_one_factor():
    rewards = some_rewards()[..., :1]
    ours, theirs = gdpo_advantages(rewards), group_advantages(rewards[..., 0])
    torch.testing.assert_close(ours, theirs / (theirs.std() + 1e-4))


def test_the_table_of_the_docstring():
    rows = re.findall(r"^    (\(.*\))((?: +-?\d\.\d\d){8})$", gdpo.__doc__, flags=re.M)
    assert len(rows) == 4
    pairs = [[(int(a), int(b)) for a, b in re.findall(r"\((\d), (\d)\)", row)] for row, _ in rows]
    rewards = torch.tensor(pairs, dtype=torch.float32)  # (4, 4, 2)
    for row, grpo_row, gdpo_row in zip(rows, group_advantages(rewards.sum(2)), gdpo_advantages(rewards), strict=True):
        printed = [float(x) for x in row[1].split()]
        assert printed == pytest.approx([*grpo_row.tolist(), *gdpo_row.tolist()], abs=0.006)
    methods = {"grpo": group_advantages(rewards.sum(2)), "gdpo": gdpo_advantages(rewards)}
    figures = collapse(methods, rewards)
    assert figures == {
        "values_grpo": 7,  # 0.5, -1.5, 1.5, -0.5, 0, -1.22, 1.22
        "collapsed_grpo": 0.5,  # the first and the last group
        "values_gdpo": 10,
        "collapsed_gdpo": 0.25,  # the last
    }


def test_zero_nan_and_lone_rewards():
    assert (gdpo_advantages(torch.full((3, 4, 2), 0.1)) == 0).all()
    assert torch.equal(gdpo_advantages(torch.ones(1, 1, 2)), torch.zeros(1, 1))
    assert torch.equal(gdpo_advantages(torch.rand(3, 1, 2)), torch.zeros(3, 1))
    rewards = some_rewards()
    rewards[2, 1, 0] = math.nan
    with pytest.raises(ValueError, match="not a finite number"):
        gdpo_advantages(rewards)


def test_a_constant_reward_adds_nothing():
    rewards = some_rewards()
    more = torch.cat([rewards, torch.full((6, 5, 1), 0.7)], dim=2)
    assert torch.equal(gdpo_advantages(more), gdpo_advantages(rewards))


def test_a_conditioned_reward_counts_only_with_the_other():
    rewards = torch.tensor([[[1.0, 0.4], [0.0, 0.9], [0.5, 0.8]]])
    assert condition(rewards, 1, 0)[0, :, 1].tolist() == pytest.approx([0.4, 0.0, 0.0])
    assert condition(rewards, 1, 0)[0, :, 0].tolist() == [1.0, 0.0, 0.5]
    assert rewards[0, 1, 1] == pytest.approx(0.9)  # the given ones stay
    rewards[0, 0, 1] = -0.5  # 0 would be better
    with pytest.raises(ConfigError, match=r"reward is -0\.5: a wrong answer, which is paid 0, would escape it"):
        condition(rewards, 1, 0)


def test_what_is_logged_is_of_the_advantages_of_the_run():
    """With --combine sum at another --scale `grpo` is that scale's; without lengths, to find signals, nothing is."""
    rewards, weights = torch.zeros(2, 4, 2), {"correct": 1.0, "format": 0.9}
    rewards[0, 0, 0] = rewards[1, 0, 1] = 1.0  # one right answer; one well formed
    lengths = torch.full((2, 4), 5)
    for scale, n in (("group", 2), ("batch", 4), ("none", 4)):
        settings = config(init="start", combine="sum", scale=scale)
        advantages, figures = gdpo.gdpo_advantages_of(rewards, weights, settings, lengths)
        expected = group_advantages(rewards @ torch.tensor([1.0, 0.9]), scale)
        torch.testing.assert_close(advantages, expected)
        assert figures["values_grpo"] == n
    assert gdpo.gdpo_advantages_of(rewards, weights, settings)[1] == {}
    advantages, figures = gdpo.gdpo_advantages_of(rewards, weights, config(init="start"), lengths)
    assert torch.equal(advantages, gdpo_advantages(rewards, weights.values()))
    assert (figures["values_grpo"], figures["values_gdpo"]) == (2, 4)  # the weights are not normalised away


def test_distinct():
    assert distinct(torch.tensor([[1.0, 1.00001, 2.0], [3.0, 3.0, 3.0]])).tolist() == [2, 1]
    assert distinct(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])).tolist() == [2]


# ------------------------------------------------------------------------------------------------ runs


def config(**changes):
    return gdpo.Config(**(SMALL | dict(name="gdpo", steps=1, rollouts=6) | changes))


def test_the_kl_in_the_reward_is_less_its_mean_in_the_group(here, monkeypatch):  # noqa: F811
    """Every answer earns the same, so the KL is all that is left."""
    KL, used = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), []
    loss, answers_kl = grpo.grpo_loss, grpo.answers_kl
    monkeypatch.setitem(grpo.REWARDS, "correct", lambda texts, problems, ended: [1.0] * len(texts))
    monkeypatch.setattr(grpo, "answers_kl", lambda *a: (KL, answers_kl(*a)[1]))
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a, **k: used.append(a[2]) or loss(*a, **k))
    gdpo.main(config(beta=0.5, kl="k1", kl_in="reward", format_weight=0.0, record_groups=0))
    expected = -0.5 * (KL - KL.mean(1, keepdim=True))
    assert sorted(torch.cat(used).tolist()) == pytest.approx(sorted(expected.flatten().tolist()), abs=1e-6)


def test_a_run_uses_these_advantages(here, monkeypatch):  # noqa: F811
    monkeypatch.setitem(grpo.REWARDS, "brevity", letter("i"))
    seen, used, judge_batch, loss = [], [], grpo.judge_batch, grpo.grpo_loss

    def see(functions, batch, config):
        judge_batch(functions, batch, config)
        seen.append(batch)

    monkeypatch.setattr(grpo, "judge_batch", see)
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a, **k: (used.append(a[2]), loss(*a, **k))[1])
    for options in ({}, {"conditioned": ["brevity"]}, {"combine": "sum"}):
        settings = config(brevity_weight=0.3, max_new_tokens=20, micro_batch=6, record_groups=0, **options)
        used.clear()
        gdpo.main(settings)
        rewards = torch.stack([seen[-1].rewards[name] for name in ("correct", "format", "brevity")], dim=-1)
        if "conditioned" in options:
            rewards[..., 2] *= rewards[..., 0]
        paid = (rewards @ torch.tensor([1.0, 0.5, 0.3])).mean().item()
        assert metrics("runs/gdpo", "reward")[settings.steps] == pytest.approx(paid, abs=1e-6)
        expected = by_loop(rewards.double(), [1.0, 0.5, 0.3])
        if "combine" in options:
            expected = group_advantages(rewards @ torch.tensor([1.0, 0.5, 0.3]))
        expected = [row.tolist() for row in expected if row.abs().max() > 1e-6]
        assert len(expected) > 1
        got = sorted(row.tolist() for row in used)
        assert len(got) == len(expected)
        for a, b in zip(got, sorted(expected), strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        weights = {"correct": 1.0, "format": 0.5, "brevity": 0.3}
        by_sum = group_advantages(grpo.reward_sums(rewards, weights))
        by_gdpo = gdpo_advantages(rewards, weights.values())
        for name, value in collapse({"grpo": by_sum, "gdpo": by_gdpo}, rewards).items():
            assert metrics("runs/gdpo", name)[1] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"combine": "max"}, "max"),
        ({"algorithm": "foo"}, "--algorithm 'foo' is not known; use reinforce, rloo"),
        ({"scale": "batch"}, "normalises each reward by itself"),
        ({"scale": "group"}, "normalises each reward by itself"),  # GRPO's default has no meaning here either
        ({"conditioned": ["brevity"]}, "brevity"),  # it has no weight
        ({"conditioned": ["format"], "correct_weight": 0.0}, "correct"),
        ({"conditioned": ["correct"]}, "changes nothing"),
        ({"conditioned": ["overlong"], "overlong": 4}, "--conditioned overlong: a wrong answer"),
        ({"conditioned": ["format"], "format_weight": -0.5}, "escape this penalty"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ConfigError, match=words):
        config(init="start", **options)


def test_a_copy_of_settings_passes():
    for changes in ({}, {"combine": "sum"}, {"combine": "sum", "scale": "batch"}, {"loss_type": "dr_grpo"}):
        settings = config(init="start", **changes)
        assert replace(settings) == settings
