"""The policy gradients of grpo.ALGORITHMS: each row's loss and gradient against a plain float64 loop written from its
paper, the special cases that can be worked by hand, and how a run takes, checks, prints and uses its choices."""

import math
from dataclasses import replace
from itertools import product
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import metrics
from test_grpo import EVERYTHING, SMALL, assert_same_gradient, config, here, letter, spied, start  # noqa: F401

import gdpo
import grpo
from grpo import ALGORITHMS, Config, group_advantages, grpo_loss, sapo_surrogate
from support import rollouts
from support.errors import ConfigError
from support.family import NO_CLIP, FamilyFlags, as_flags, loss_options

NAMES = list(ALGORITHMS)
CHOICES = ("clip_low", "clip_high", "loss_type", "ratio", "surrogate")


def options(name):
    return {key: ALGORITHMS[name][key] for key in CHOICES}


# ------------------------------------------------------------------------------------------------ against loops


def advantages_by_loop(name, rewards, lengths):
    """N lists of R rewards and token counts -> N lists of R advantages, in Python's floats."""
    advantages = []
    for group in rewards:
        R, mean = len(group), sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (R - 1))
        if name == "reinforce":
            advantages.append(list(group))
        elif name == "rloo":
            advantages.append([r - (sum(group) - r) / (R - 1) for r in group])
        elif name == "maxrl":
            advantages.append([(r - mean) / mean if mean else 0.0 for r in group])
        elif name in ("dr_grpo", "reinforce++-baseline"):
            advantages.append([r - mean for r in group])
        else:
            advantages.append([(r - mean) / (std + 1e-4) for r in group])
    if name == "reinforce++-baseline":  # OpenRLHF, experience_maker.py: over all tokens, the population's variance
        tokens = [a for row, sizes in zip(advantages, lengths, strict=True) for a, n in zip(row, sizes, strict=True)
                  for _ in range(n)]  # fmt: skip
        mean = sum(tokens) / len(tokens)
        variance = sum((a - mean) ** 2 for a in tokens) / len(tokens)
        advantages = [[(a - mean) / math.sqrt(max(variance, 1e-8)) for a in row] for row in advantages]
    return advantages


def loss_by_loop(name, new, old, ref, A, mask, longest):
    """Each paper's loss, one token after another. A: a list of B numbers."""
    n, n_tokens, total = len(A), int(mask.sum()), 0.0
    for i, a in enumerate(A):
        real = [t for t in range(mask.shape[1]) if mask[i, t]]
        rho = {t: torch.exp(new[i, t] - old[i, t]) for t in real}
        together = math.prod(rho.values())
        for t in real:
            if name == "reinforce":
                cost = -a * new[i, t] / (n * longest)
            elif name == "rloo":  # a cost of the answer, not of a token
                cost = -torch.minimum(together * a, together.clamp(0.8, 1.2) * a) / n / len(real)
            elif name == "gspo":
                root = together ** (1 / len(real))
                cost = -torch.minimum(root * a, root.clamp(1 - 3e-4, 1 + 4e-4) * a) / n / len(real)
            elif name == "cispo":
                cost = -min(rho[t].item(), 5.0) * a * new[i, t] / n_tokens
            elif name == "sapo":
                tau = 1.0 if a > 0 else 1.05
                cost = -4 / tau * a / (1 + torch.exp(-tau * (rho[t] - 1))) / n / len(real)
            else:
                high = 1.28 if name == "dapo" else 1.2
                cost = -torch.minimum(rho[t] * a, rho[t].clamp(0.8, high) * a)
                apart = ref[i, t] - new[i, t]
                if name == "grpo":
                    cost = (cost + 0.3 * rho[t] * (torch.exp(apart) - apart - 1)) / n / len(real)
                if name == "reinforce++-baseline":
                    cost = (cost + 0.3 * apart**2 / 2) / n_tokens
                if name == "dapo":
                    cost = cost / n_tokens
                if name in ("dr_grpo", "maxrl"):
                    cost = cost / (n * longest)
            total = total + cost
    return total


def step():
    """Two groups of three answers of up to seven tokens: log-probabilities and mask (6, 7), rewards (2, 3)."""
    torch.manual_seed(3)
    new = (-torch.rand(6, 7, dtype=torch.float64) * 2).requires_grad_()
    old, ref = new.detach() + 0.3 * torch.randn(6, 7), new.detach() + 0.4 * torch.randn(6, 7)
    old[0, 1] -= 2.0  # a ratio above 5
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5], [4], [6]])
    return new, old, ref, torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.1, 1.0]], dtype=torch.float64), mask


def test_the_flags_name_what_the_tables_have():
    hints = get_type_hints(FamilyFlags)
    assert get_args(hints["algorithm"]) == tuple(ALGORITHMS)
    for name, table in (("ratio", grpo.RATIOS), ("surrogate", grpo.SURROGATES), ("loss_type", grpo.LOSS_TYPES)):
        [names] = [get_args(kind) for kind in get_args(hints[name]) if kind is not type(None)]
        assert set(names) == set(table)
    for row in ALGORITHMS.values():
        assert set(row) <= set(hints)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_against_a_loop(name):
    new, old, ref, rewards, mask = step()
    lengths = mask.sum(1).view(2, 3)
    settings = Config(algorithm=name, max_new_tokens=9)
    A = group_advantages(rewards, settings.scale, settings.baseline, lengths)
    expected = advantages_by_loop(name, rewards.tolist(), lengths.tolist())
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    loss, figures = grpo.grpo_loss(new, old, A.flatten(), mask, ref, **loss_options(settings))
    by_loop = loss_by_loop(name, new, old, ref, A.flatten().tolist(), mask, 9)
    torch.testing.assert_close(loss, by_loop)
    ours, theirs = torch.autograd.grad(loss, new)[0], torch.autograd.grad(by_loop, new)[0]
    torch.testing.assert_close(ours, theirs)
    assert (ours[~mask] == 0).all()
    assert (0 < figures["clip_fraction"] < 1) == (name not in ("reinforce", "sapo"))


def test_the_table_of_the_docstring():
    lines = grpo.__doc__[grpo.__doc__.index("    algorithm  ") :].split("\n\n")[0].splitlines()
    heads = [
        lines[0].index(word) for word in ("algorithm", "baseline", "scale", "ratio", "surrogate", "loss_type", "KL")
    ]
    heads.append(lines[0].index("a token gets"))
    cells = [[line[a:b].strip() for a, b in zip(heads, [*heads[1:], None], strict=True)] for line in lines[1:]]
    assert [name for name, *_ in cells] == NAMES
    for name, baseline, scale, ratio, surrogate, loss_type, kl, gets in cells:
        row = ALGORITHMS[name]
        kind, *clips = surrogate.split()
        words = kl.replace("-", "0").split()
        written = {"baseline": baseline, "scale": scale, "ratio": ratio.replace("-", "token"), "surrogate": kind}
        written |= dict(zip(("clip_low", "clip_high"), map(float, clips), strict=True) if clips else NO_CLIP)
        written |= {"loss_type": loss_type, "beta": float(words[0])}
        written |= {"kl_in": "reward" if "reward" in words else "loss", "kl": "k2" if "k2" in words else None}
        assert written == row, name
        end = {"grpo": "(B|y|)", "dapo": "tokens", "dr_grpo": "(BL)"}[loss_type] if ratio != "product" else "B"
        assert gets.removesuffix(", or 0").endswith(f"A / {end}")
        assert gets.endswith("or 0") == (kind == "clip")


# ------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize("name", NAMES)
def test_what_a_token_gets_is_the_last_column_of_the_table(name):
    """The group of grpo.demo, second minibatch: four answers, the second of one token."""
    rho = torch.tensor([[1.30, 1.05], [1.10, 1.0], [0.75, 1.10], [1.15, 0.95]])  # (R, T)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    length, B, L, tokens = torch.tensor([[2.0], [1.0], [2.0], [2.0]]), 4, 2, 7
    row, rewards = ALGORITHMS[name], torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    A = group_advantages(rewards, row["scale"], row["baseline"], length.T).T  # (R, 1)
    whole = rho.prod(dim=1, keepdim=True)
    soft = rho / (torch.tensor([[1.0], [1.05], [1.05], [1.0]]) * (rho - 1) / 2).cosh() ** 2

    def clipped(ratio, low=0.2, high=0.2):
        return torch.where(((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low)), 0.0, ratio * A)

    gets = {
        "reinforce": A / (B * L),
        "rloo": clipped(whole) / B,
        "grpo": clipped(rho) / (B * length),
        "dr_grpo": clipped(rho) / (B * L),
        "dapo": clipped(rho, high=0.28) / tokens,
        "gspo": clipped(whole ** (1 / length), 3e-4, 4e-4) / (B * length),
        "cispo": rho.clamp(max=5) * A / tokens,
        "sapo": soft * A / (B * length),
        "maxrl": clipped(rho) / (B * L),
        "reinforce++-baseline": clipped(rho) / tokens,
    }
    new = (rho.log() - 0.7).requires_grad_()
    grpo_loss(new, torch.full((4, 2), -0.7), A[:, 0], mask, **options(name))[0].backward()
    torch.testing.assert_close(-new.grad, gets[name] * mask, atol=1e-6, rtol=1e-5)


def one(logprob, A, old=0.0, **choices):
    """Loss and gradient of one token's log-probability."""
    new = torch.tensor([[float(logprob)]], dtype=torch.float64, requires_grad=True)
    loss, figures = grpo_loss(new, torch.full((1, 1), old), torch.tensor([A]), torch.ones(1, 1), **choices)
    return loss.item(), torch.autograd.grad(loss, new)[0].item(), figures["clip_fraction"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rloo"])
def test_at_ratio_1_all_surrogates_have_the_gradient_of_reinforce(name):
    new, _, _, _, mask = step()
    A = torch.randn(6, dtype=torch.float64)
    loss, figures = grpo_loss(new, new.detach(), A, mask, **options(name))
    divided = {"grpo": 6 * mask.sum(1, keepdim=True), "dapo": mask.sum(), "dr_grpo": 6 * 7}[
        ALGORITHMS[name]["loss_type"]
    ]
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], -A[:, None] * mask / divided)
    assert figures["clip_fraction"] == 0


def test_rloo_pays_a_whole_answer_and_has_r_over_r_minus_1_times_the_gradient():
    new, _, _, rewards, mask = step()
    A, by_mean = group_advantages(rewards, "none", "leave_one_out"), group_advantages(rewards, "none")
    torch.testing.assert_close(A, by_mean * 3 / 2)
    loss, _ = grpo_loss(new, new.detach(), A.flatten(), mask, **options("rloo"))
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], -A.view(6, 1) * mask / 6)  # no division by |y|


@pytest.mark.parametrize("ratio", ["sequence", "product"])
def test_of_one_token_all_ratios_are_one(ratio):
    for A, logprob in product((1.0, -1.0), (0.5, 0.1, -0.1, -0.5)):
        assert one(logprob, A, ratio=ratio) == pytest.approx(one(logprob, A))


def test_the_product_is_the_sequence_ratio_to_the_power_of_the_length():
    new, old, _, _, mask = step()
    A = torch.ones(6, dtype=torch.float64)
    wide = dict(clip_low=1.0, clip_high=math.inf)
    root, whole = (
        grpo_loss(new[:1], old[:1], A[:1], mask[:1], ratio=kind, **wide)[0] for kind in ("sequence", "product")
    )
    assert whole.item() == pytest.approx(-(abs(root.item()) ** 7))


@pytest.mark.parametrize(
    ("A", "ratio", "weight"),  # of −A ∇log π, two-sided between 0.8 and 1.5
    [(1.0, 2.0, 1.5), (-1.0, 2.0, 1.5), (1.0, 0.5, 0.8), (-1.0, 0.5, 0.8), (1.0, 1.1, 1.1), (-1.0, 0.9, 0.9)],
)
def test_cispo_bounds_the_weight_and_drops_no_token(A, ratio, weight):
    _, gradient, clipped = one(math.log(ratio), A, clip_low=0.2, clip_high=0.5, surrogate="cispo")
    assert gradient == pytest.approx(-A * weight)
    assert clipped == (weight != ratio)
    if A > 0 and ratio > 1.5:
        assert one(math.log(ratio), A, clip_high=0.5)[1] == 0  # where PPO's token is stopped
    assert one(-7.0, A, **options("cispo"))[1] == pytest.approx(-A * math.exp(-7.0))  # the row has no floor


def test_sapo_by_hand():
    for A, tau in ((1.0, 1.0), (-2.0, 1.05)):
        loss, gradient, clipped = one(0.0, A, **options("sapo"))
        assert (loss, gradient, clipped) == pytest.approx((-2 * A / tau, -A, 0))  # at ρ = 1: 2A/τ, weight 1
        for ratio in (0.3, 0.9, 1.4, 3.0):
            slope = one(math.log(ratio), A, **options("sapo"))[1]
            assert slope == pytest.approx(-A * ratio / math.cosh(tau * (ratio - 1) / 2) ** 2)
    weight = [(-one(math.log(rho), 1.0, **options("sapo"))[1], rho) for rho in torch.arange(0.01, 6, 0.01).tolist()]
    peak, at = max(weight)
    assert (peak, at) == pytest.approx((1.575, 2.06), abs=0.005)
    assert max(rho for w, rho in weight if w > 1) == pytest.approx(3.47, abs=0.01)


def test_sapo_between_no_limit_and_a_hard_one():
    """τ → 0: the weight ρ of an unclipped ratio. τ → ∞: only ρ = 1 has a gradient."""
    rho = torch.tensor([[0.2, 0.9, 1.0, 1.1, 4.0]], dtype=torch.float64, requires_grad=True)
    for A in (torch.ones(1, 1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)):
        gain, _ = sapo_surrogate(rho, A, None, tau=1e-4, tau_negative=1e-4)
        torch.testing.assert_close(torch.autograd.grad(gain.sum(), rho)[0], A.expand(1, 5), atol=1e-6, rtol=0)
        gain, _ = sapo_surrogate(rho, A, None, tau=1e4, tau_negative=1e4)
        assert torch.autograd.grad(gain.sum(), rho)[0].tolist() == [[0.0, 0.0, A.item(), 0.0, 0.0]]


def test_maxrl_is_the_mean_score_of_the_right_answers_less_that_of_all():
    new, _, _, _, mask = step()
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    A = group_advantages(rewards, "mean")
    assert A.flatten().tolist() == pytest.approx([0.5, -1.0, 0.5, 0.0, 0.0, 0.0])
    loss, _ = grpo_loss(new, new.detach(), A.flatten(), mask, **options("maxrl"), max_length=9)
    scores = mask.double()  # ∇log π(y_t) of each token: S_i in the space of the log-probabilities
    by_hand = torch.zeros(6, 7, dtype=torch.float64)
    for i in range(3):
        by_hand[i] = (rewards[0, i] / 2 - 1 / 3) * scores[i]  # Σ r_i S_i / K − Σ S_i / R, K = 2 right ones
    gradient = torch.autograd.grad(loss, new)[0]
    torch.testing.assert_close(-gradient * 6 * 9 / 3, by_hand)
    assert group_advantages(torch.tensor([[1.0, 0.0]]), "mean").tolist() == [[1.0, -1.0]]  # R = 2: RLOO
    assert group_advantages(torch.tensor([[1.0, 0.0]]), "none", "leave_one_out").tolist() == [[1.0, -1.0]]
    assert group_advantages(torch.tensor([[1.0], [0.0]]), "mean").tolist() == [[0.0], [0.0]]  # R = 1
    with pytest.raises(ConfigError, match=r"-0\.5"):
        group_advantages(torch.tensor([[1.0, -0.5]]), "mean")


@pytest.mark.parametrize("baseline", ["mean", "none"])
def test_the_expected_gradient_of_maxrl_is_a_cut_series_of_log_p(baseline):
    """Answers right with probability p, all groups of R enumerated: ∇p Σ_k (1 − p)^(k−1) up to k = R − 1; up to R if
    the mean is not taken off."""
    R, logit = 4, torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(logit)
    total = 0.0
    for group in product((1.0, 0.0), repeat=R):
        chance = math.prod(p.item() if r else 1 - p.item() for r in group)
        A = group_advantages(torch.tensor([group], dtype=torch.float64), "mean", baseline)[0]
        logprobs = torch.stack([p.log() if r else (1 - p).log() for r in group])
        total = total + chance * (A * logprobs).mean()
    terms = R if baseline == "none" else R - 1
    series = sum((1 - p.item()) ** k for k in range(terms))
    slope = (p * (1 - p)).item()
    assert torch.autograd.grad(total, logit)[0].item() == pytest.approx(slope * series)


def test_whitening_over_tokens_by_hand():
    """algorithms2.md: rewards (1, 0) of lengths (1, 3), (1, 1) of lengths (2, 2)."""
    rewards, lengths = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1, 3], [2, 2]])
    A = group_advantages(rewards, "tokens", lengths=lengths)
    assert A.flatten().tolist() == pytest.approx([1.890, -1.134, 0.378, 0.378], abs=5e-4)
    assert (A * lengths).sum().item() == pytest.approx(0, abs=1e-6)
    assert ((A**2 * lengths).sum() / 8).item() == pytest.approx(1)
    for baseline in ("mean", "leave_one_out", "none"):  # exactly 0, though 1.1 is no float
        assert (group_advantages(torch.full((3, 7), 1.1), "tokens", baseline, torch.arange(21).view(3, 7)) == 0).all()
    assert group_advantages(rewards, "tokens", lengths=torch.zeros(2, 2)).isfinite().all()  # all of them masked out
    with pytest.raises(ConfigError, match="lengths"):
        group_advantages(rewards, "tokens")


# ------------------------------------------------------------------------------------------------ the choices of a run


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_sets_what_is_not_given(name):
    settings = Config(algorithm=name)
    assert {key: getattr(settings, key) for key in ALGORITHMS[name] if key != "kl"} == {
        key: value for key, value in ALGORITHMS[name].items() if key != "kl"
    }
    assert settings.kl == {"rloo": "k1", "reinforce++-baseline": "k2"}.get(name, "k3")
    assert settings.kl_unbiased == (name not in ("rloo", "reinforce++-baseline"))
    assert replace(settings) == settings
    longer = Config(algorithm=name, beta=0.7, loss_type="dapo")
    assert (longer.beta, longer.loss_type, longer.scale) == (0.7, "dapo", settings.scale)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, dict(clip_low=0.2, clip_high=0.2)),
        ({"surrogate": "cispo"}, dict(clip_low=1.0, clip_high=4.0, scale="group", loss_type="grpo")),
        ({"surrogate": "cispo", "clip_high": 0.2}, dict(clip_low=1.0, clip_high=0.2)),
        ({"surrogate": "sapo"}, dict(clip_low=None, clip_high=None)),
        ({"algorithm": "cispo", "surrogate": "clip"}, dict(clip_low=0.2, clip_high=0.2, loss_type="dapo")),
        ({"algorithm": "gspo", "ratio": "token"}, dict(clip_low=3e-4, clip_high=4e-4)),
        ({"algorithm": "rloo", "kl_in": "loss"}, dict(kl="k3", kl_unbiased=True, beta=0.05)),
        ({"algorithm": "reinforce++-baseline", "kl_in": "reward"}, dict(kl="k1", kl_unbiased=False)),
        ({"algorithm": "reinforce", "rollouts": 1}, dict(baseline="none")),
        ({"algorithm": "maxrl", "baseline": "none"}, dict(scale="mean")),  # of order R
    ],
)
def test_what_goes_with_a_choice(flags, expected):
    settings = Config(**flags)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert replace(settings) == settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"algorithm": "gspo", "scale": "tokens"}, "--ratio sequence"),
        ({"algorithm": "reinforce++-baseline", "ratio": "product"}, "--scale tokens"),
        ({"baseline": "none"}, "--scale group"),
        ({"baseline": "none", "scale": "batch"}, "--scale batch"),
        ({"algorithm": "sapo", "clip_high": 0.3}, "no clip"),
        ({"algorithm": "reinforce", "clip_low": 0.0}, "no clip"),
        ({"surrogate": "reinforce", "clip_high": 0.2}, "no clip"),
        ({"algorithm": "reinforce", "ratio": "sequence"}, "no ratio, --ratio is sequence: add --ratio token"),
        ({"algorithm": "gspo", "surrogate": "reinforce"}, "add --ratio token"),
        ({"algorithm": "maxrl", "overlong": 4}, "--overlong"),
        ({"algorithm": "maxrl", "format_weight": -0.1}, "below 0"),
        ({"algorithm": "rloo", "rollouts": 1}, "--rollouts is 1"),
        ({"algorithm": "rloo", "kl_unbiased": True}, "--kl_in reward"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    with pytest.raises(ConfigError, match=words) as error:
        Config(**flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*NAMES, "loss_type alone"])
def test_gdpo_takes_from_a_row_what_it_does_not_replace(name):
    if name in ("grpo", "dapo", "gspo", "cispo", "sapo"):
        settings = gdpo.Config(algorithm=name)
        assert (settings.baseline, settings.scale) == (None, None)
        assert settings.surrogate == ALGORITHMS[name]["surrogate"]
        assert replace(settings) == settings
    elif name in ALGORITHMS:
        with pytest.raises(ConfigError, match="--combine sum"):
            gdpo.Config(algorithm=name)
        assert gdpo.Config(algorithm=name, combine="sum").scale == ALGORITHMS[name]["scale"]
    else:
        assert gdpo.Config(loss_type="dr_grpo").loss_type == "dr_grpo"


def test_the_choices_are_shown_as_flags(here, capsys):  # noqa: F811
    assert as_flags(Config()) == (
        "--algorithm grpo: --baseline mean --scale group --ratio token --surrogate clip --clip_low 0.2 --clip_high 0.2 "
        "--loss_type grpo --beta 0.3 --kl_in loss --kl k3 --kl_unbiased true"
    )
    assert as_flags(Config(algorithm="reinforce")) == (
        "--algorithm reinforce: --baseline none --scale none --surrogate reinforce --loss_type dr_grpo --beta 0"
    )
    assert "--baseline" not in as_flags(gdpo.Config())
    grpo.main(config(steps=1, algorithm="gspo"))
    assert "--ratio sequence --surrogate clip --clip_low 0.0003 --clip_high 0.0004" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", NAMES)
def test_a_run_uses_its_row(here, spied, monkeypatch, name):  # noqa: F811
    """What reaches the loss: this row's options, and the advantages of the whole batch, in two updates."""
    seen, kls = [], []

    def see(logprobs, old, advantages, mask, ref, *, true=grpo_loss, **options):
        seen.append((advantages, options))
        return true(logprobs, old, advantages, mask, ref, **options)

    def reference_logprobs(reference, policy, pieces, batch, *more, true=grpo.reference_logprobs):
        ref = true(reference, policy, pieces, batch, *more) - 0.1 * batch.rollout.ids.sum(1, keepdim=True) / 1000
        kls.append(((batch.rollout.logprobs - ref) * batch.rollout.mask).sum(1).view(4, 4))
        return ref

    monkeypatch.setattr(grpo, "grpo_loss", see)
    for module in (grpo, rollouts):  # for a KL in the loss, and for one in the reward
        monkeypatch.setattr(module, "reference_logprobs", reference_logprobs)
    flags = SMALL | dict(
        steps=1, algorithm=name, micro_batch=64, inner_epochs=2, max_new_tokens=9, beta=None, record_groups=0
    )
    grpo.main(Config(**flags))
    (batch,) = spied["batches"]
    rewards = (batch.rewards["correct"] + 0.5 * batch.rewards["format"]).double()
    if name == "rloo":
        rewards = rewards - 0.05 * kls[0]  # as TRL: off the reward, before the baseline
    lengths = batch.rollout.mask.sum(1).view(4, 4)
    expected = advantages_by_loop(name, rewards.tolist(), lengths.tolist())
    expected = [a for row in expected if any(abs(x) > 1e-9 for x in row) for a in row]
    row = ALGORITHMS[name]
    assert len(seen) == 2
    for advantages, given in seen:
        assert sorted(advantages.tolist()) == pytest.approx(sorted(expected), abs=1e-4)
        assert {key: given[key] for key in CHOICES} == options(name)
        assert given["beta"] == (row["beta"] if row["kl_in"] == "loss" else 0.0)
        assert given["max_length"] == 9


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_change_no_row(here, spied, name):  # noqa: F811
    for size in (64, 3):
        grpo.main(config(steps=1, name=f"n{size}", algorithm=name, micro_batch=size, inner_epochs=2, beta=None))
    assert len(spied["gradients"]) == 4
    assert_same_gradient(spied["gradients"][0], spied["gradients"][2])
    assert_same_gradient(spied["gradients"][1], spied["gradients"][3])  # where ρ ≠ 1


def test_whitening_trains_groups_that_all_earn_the_same(here, spied, monkeypatch):  # noqa: F811
    def long_questions(texts, problems, ended):  # the same for a whole group, unless its prompt is a long one
        return [float("e" in t) * (len(p.question) > 80) for t, p in zip(texts, problems, strict=True)]

    monkeypatch.setitem(grpo.REWARDS, "correct", long_questions)
    rows = []
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a, **k: (rows.append(len(a[2])), grpo_loss(*a, **k))[1])
    flags = dict(record_groups=0, steps=1, prompts=8, micro_batch=64, format_weight=0.0, max_new_tokens=40)
    grpo.main(config(algorithm="reinforce++-baseline", **flags))
    silent = metrics("runs/grpo", "zero_variance")[1]  # that their answers earn the same is logged all the same
    assert 0 < silent < 1
    assert rows == [8 * 4]
    grpo.main(config(algorithm="grpo", **flags))
    assert rows[1:] == [8 * 4 * (1 - silent)]
    grpo.main(config(algorithm="reinforce++-baseline", refill=1, **flags))
    assert len(spied["batches"]) == 4  # and --refill replaces them


def test_reinforce_needs_no_group(here, spied):  # noqa: F811
    grpo.main(config(steps=1, algorithm="reinforce", rollouts=1, prompts=8))
    assert max(g.abs().max() for g in spied["gradients"][0].values()) > 0


def test_a_negative_reward_of_your_own_is_refused_by_maxrl(here, monkeypatch):  # noqa: F811
    monkeypatch.setitem(grpo.REWARDS, "correct", lambda texts, problems, ended: [-1.0 - len(t) for t in texts])
    with pytest.raises(ConfigError, match="--scale mean divides by"):
        grpo.main(config(steps=1, algorithm="maxrl"))
    with pytest.raises(ConfigError, match="no weight below 0 with it"):  # before anything is measured
        config(algorithm="maxrl", reward="own:letters", reward_weight=-1.0)
