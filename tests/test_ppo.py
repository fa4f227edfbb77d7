"""ppo.py: GAE, losses and gradients against plain loops, what the values may know, and the guarantees of a run."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    assert_one_line_error,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    assert_the_start_is_kept,
    flags_of,
    metrics,
    script,
)

import optim
import ppo
from data import Problem, load_problems
from generate import Rollout, generate
from lora import LoraConfig
from ppo import (
    ActorCritic,
    Config,
    adapt_beta,
    gae,
    ppo_policy_loss,
    token_rewards,
    value_loss,
    whiten,
    win_rates,
)
from reward_model import RewardEncoder, RewardModel, score_groups
from support import devices, ppo_report, ppo_setup, questions
from support.checkpoints import open_checkpoint
from support.errors import ConfigError, DivergedError
from support.moments import RunningMoments
from support.rollouts import Batch, minibatches_of, shuffled_groups
from support.shared_prompt import pack
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig, token_logprobs

SMALL = dict(init="start", reward_model="judge", steps=3, prompts=6, rollouts=2, max_new_tokens=6, warmup=1)
SMALL |= dict(eval_every=2, eval_problems=3, test_problems=4, sample_every=2, micro_batch=64, lr=1e-3, device="cpu")
SMALL |= dict(optimizer="muon", minibatches=2, baseline="wins", normalise=False, lam=1.0)


def config(**changes):
    return Config(**(SMALL | changes))


def tiny(tokenizer, seed):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))


@pytest.fixture
def here(scratch, tokenizer):
    """A random policy and a random reward model: its scores are no use, but they differ and can be climbed."""
    tiny(tokenizer, 0).save_pretrained("start")
    judge = RewardModel.from_policy(tiny(tokenizer, 1))
    judge.pad_id = tokenizer.endoftext_id
    judge.save_pretrained("judge")
    for path in ("start", "judge"):
        tokenizer.save_pretrained(path)
    return scratch


def batch(B=5, T=7):
    torch.manual_seed(0)
    new = (-torch.rand(B, T, dtype=torch.float64) * 2).requires_grad_()
    old = new.detach() + 0.4 * torch.randn(B, T)
    mask = torch.arange(T) < torch.tensor([[7], [3], [1], [5], [4]])[:B]
    return new, old, torch.randn(B, T, dtype=torch.float64), mask


# ------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize(("dtype", "wanted"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_both_parts_step_in_the_precision_of_autocast(dtype, wanted, monkeypatch):
    seen, whole = [], optim.orthogonalise
    monkeypatch.setattr(optim, "orthogonalise", lambda m: seen.append(whole(m).dtype) or whole(m))
    autocast, scaler = devices.precision(dtype, devices.setup("cpu"))
    torch.manual_seed(0)
    parts = [[torch.nn.Parameter(torch.randn(4, 6))] for _ in range(2)]
    before = [parameters[0].detach().clone() for parameters in parts]
    for (p,) in parts:
        p.grad = torch.randn(4, 6)
    steps = [(p, [optim.Muon(p, 0.1)], rate) for p, rate in zip(parts, (0.1, 0.2), strict=True)]
    optim.optimizer_steps(steps, scaler, autocast, clip=1.0)
    assert seen == [wanted, wanted]
    lengths = [(p.detach() - old).norm().item() for (p,), old in zip(parts, before, strict=True)]
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=0.2)  # each at its own rate; U Vᵀ is as long as it is wide


def test_token_rewards_by_hand():
    log_ratio = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, 0.0]])
    got = token_rewards(log_ratio, torch.tensor([10.0, -4.0]), torch.tensor([3, 1]), 0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.05, 0.1, 9.8], [-4.3, 0.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_against_the_double_sum(gamma, lam):
    rewards, values, _, mask = batch()
    rewards, values = rewards.detach(), values.detach()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(mask.sum(1).tolist()):
        V = [*values[i, :n].tolist(), 0.0]  # nothing follows the last token
        delta = [rewards[i, t].item() + gamma * V[t + 1] - V[t] for t in range(n)]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        assert advantages[i, :n].tolist() == pytest.approx(expected)
        assert returns[i, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, V, strict=False)])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_lambda_0_is_the_td_error_and_lambda_1_the_return_minus_the_value():
    rewards, values, _, mask = (x.detach() for x in batch())
    td = gae(rewards, values, mask, 1.0, 0.0)[0][0]
    torch.testing.assert_close(td, rewards[0] + torch.cat([values[0, 1:], torch.zeros(1)]) - values[0])
    to_go = rewards[0].flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0)[0][0], to_go - values[0])


def test_what_stands_after_the_end_is_never_used():
    rewards, values, _, mask = (x.detach() for x in batch())
    for junk in (1e9, math.inf, -math.inf, math.nan):
        wild = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, -junk), mask)
        for a, b in zip(wild, gae(rewards, values, mask), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(whiten(rewards.masked_fill(~mask, junk), mask), whiten(rewards, mask))


def test_whitening_is_over_masked_tokens():
    x, _, _, mask = (y.detach() for y in batch())
    white = whiten(x, mask)
    kept = x[mask]
    torch.testing.assert_close(white[mask], (kept - kept.mean()) / kept.std(correction=0))
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(whiten(x.masked_fill(~mask, 7.0) * 3 + 2, mask), white)
    assert whiten(torch.ones(2, 3), torch.ones(2, 3)).abs().max() == 0  # no spread, no NaN
    torch.testing.assert_close(whiten(x, mask, devices.setup("cpu")), white)


# ------------------------------------------------------------------------------------------------ losses


def test_policy_loss_and_gradient_against_a_loop():
    new, old, A, mask = batch()
    loss, figures = ppo_policy_loss(new, old, A, mask, 0.2)
    total, clipped = 0.0, 0
    for i, t in mask.nonzero().tolist():
        ratio = torch.exp(new[i, t] - old[i, t])
        near = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
        total = total - min(ratio * A[i, t], near * A[i, t])
        clipped += bool(near * A[i, t] < ratio * A[i, t])
    expected = total / mask.sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    d = (new - old)[mask]
    assert 0 < clipped < mask.sum()
    assert figures["clip_fraction"] == pytest.approx(clipped / mask.sum().item())
    assert figures["approx_kl"] == pytest.approx((d**2).mean().item() / 2, rel=1e-5)
    assert figures["approx_kl3"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-5)
    assert figures["ratio"] == pytest.approx(d.exp().mean().item(), rel=1e-5)
    assert figures["ratio_spread"] == pytest.approx((d.exp() - 1).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("A", "ratio", "value", "moves"),
    [
        (1.0, 0.5, -0.5, True),
        (1.0, 1.1, -1.1, True),
        (1.0, 1.5, -1.2, False),  # far enough up already
        (-1.0, 0.5, 0.8, False),  # far enough down already
        (-1.0, 1.1, 1.1, True),
        (-1.0, 1.5, 1.5, True),
    ],
)
def test_the_six_rows_of_the_clip(A, ratio, value, moves):
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, figures = ppo_policy_loss(new, torch.zeros(1, 1), torch.tensor([[A]]), torch.ones(1, 1))
    assert loss.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.item() == pytest.approx(-A * ratio if moves else 0.0)
    assert figures["clip_fraction"] == (not moves)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_and_gradient_against_a_loop(clip):
    values, old, returns, mask = batch()
    loss, figures = value_loss(values, old, returns, mask, clip)
    total, clipped = 0.0, 0
    for i, t in mask.nonzero().tolist():
        plain = (values[i, t] - returns[i, t]) ** 2
        near = old[i, t] + min(max(values[i, t] - old[i, t], torch.tensor(-0.2)), torch.tensor(0.2))
        other = (near - returns[i, t]) ** 2
        total = total + 0.5 * (max(plain, other) if clip else plain)
        clipped += bool(clip and other > plain)
    expected = total / mask.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, values)[0] for x in (loss, expected)))
    assert figures["value_clip_fraction"] == pytest.approx(clipped / mask.sum().item())
    assert bool(clipped) == bool(clip)


def test_any_cut_gives_the_same_gradient():
    new, old, A, mask = batch()

    def both(rows, T=7, n=None):
        x = [y[rows, :T] for y in (new, old, A, mask)]
        return ppo_policy_loss(*x, n_tokens=n)[0] + 0.3 * value_loss(*x, n_tokens=n)[0]

    (whole,) = torch.autograd.grad(both([0, 1, 2, 3, 4]), new)
    n = int(mask.sum())
    parts = both([0, 3], n=n) + both([1], 3, n) + both([2, 4], 4, n)
    torch.testing.assert_close(torch.autograd.grad(parts, new)[0], whole)


def test_the_weight_of_the_kl_penalty_adapts():
    assert adapt_beta(0.1, 6.0, 6.0, 64, 1000) == 0.1
    assert adapt_beta(0.1, 600.0, 6.0, 64, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.064))
    assert adapt_beta(0.1, -3.0, 6.0, 64, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.064))
    assert adapt_beta(0.1, 6.6, 6.0, 64, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.064))


def test_running_moments_are_those_of_everything_seen():
    torch.manual_seed(0)
    batches, dist = [3 + 2 * torch.randn(n) for n in (4, 9, 1, 30)], devices.setup("cpu")
    moments = RunningMoments()
    for scores in batches:
        moments.add(scores, dist)
    everything = torch.cat(batches)
    assert moments.mean == pytest.approx(everything.mean().item(), rel=1e-5)
    assert moments.squares / moments.n == pytest.approx(everything.var(correction=0).item(), rel=1e-5)
    normal = moments.normalise(everything)
    assert normal.mean().item() == pytest.approx(0, abs=1e-5)
    assert normal.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    assert vars(again) == vars(moments)
    assert moments.state_dict() == [moments.n, moments.mean, moments.squares]  # as all versions keep them


def test_running_moments_add_up_over_ranks():
    own, other = torch.arange(5.0), 4 + 3 * torch.arange(5.0) ** 2
    both = torch.cat([own, other]).double()
    theirs = iter([(5, other.sum().item()), (((other.double() - both.mean()) ** 2).sum().item(),)])
    rank = SimpleNamespace(sum=lambda *values: [a + b for a, b in zip(values, next(theirs), strict=True)])
    moments = RunningMoments()
    moments.add(own, rank)
    assert (moments.n, moments.mean) == (10, pytest.approx(both.mean().item()))
    assert moments.squares / 10 == pytest.approx(both.var(correction=0).item())


# ------------------------------------------------------------------------------------------------ the model


def models(kind):
    torch.manual_seed(0)
    sizes = TransformerConfig(30, context=64, n_layer=2, n_head=2, n_kv_head=1, width=16)
    policy = Transformer(sizes)
    raw = ActorCritic(policy, RewardModel.from_policy(Transformer(sizes)) if kind == "separate" else None).eval()
    head = raw.head if kind == "shared" else raw.critic.head
    assert (head.weight == 0).all()
    torch.nn.init.normal_(head.weight)
    return raw, head


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_values_stand_in_front_of_the_token_that_they_judge(kind):
    raw, head = models(kind)
    prompts, answers = [[1, 2, 3], [4]], [[[5, 6, 7, 8], [9]], [[10, 11], [12, 13, 14]]]
    logprobs, values = raw(pack(prompts, answers, 0), 0.8)
    trunk = raw.policy if kind == "shared" else raw.critic
    for row, (prompt, answer) in enumerate((p, a) for p, group in zip(prompts, answers, strict=True) for a in group):
        n, tokens = len(answer), torch.tensor([prompt + answer])
        torch.testing.assert_close(logprobs[row, :n], token_logprobs(raw.policy, tokens, 0.8)[0, -n:])
        kept = {}
        hook = trunk.norm.register_forward_hook(lambda module, inputs, states, kept=kept: kept.update(x=states))
        trunk(tokens)
        hook.remove()
        expected = head(kept["x"])[0, len(prompt) - 1 : -1, 0]  # at the last prompt token, …, the last but one
        torch.testing.assert_close(values[row, :n], expected)
        assert (values[row, n:] == 0).all()
        assert (logprobs[row, n:] == 0).all()
    changed = [[[5, 6, 29, 8], [9]], answers[1]]
    other = raw(pack(prompts, changed, 0), 0.8)[1]
    assert torch.equal(other[0, :3], values[0, :3])  # V before the changed token does not know it
    assert (other[0, 3] - values[0, 3]).abs() > 1e-4


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_values_train_the_trunk_that_they_read(kind):
    """The gradient of V in every weight of the trunk, against each answer alone: with --value shared the policy's."""
    raw, head = models(kind)
    raw.double()
    trunk = raw.policy if kind == "shared" else raw.critic
    prompts, answers = [[1, 2, 3], [4]], [[[5, 6, 7, 8], [9]], [[10, 11], [12, 13, 14]]]
    up, alone = torch.randn(4, 4), 0.0
    _, values = raw(pack(prompts, answers, 0))  # (4, 8), 0 after an answer's end
    for row, (prompt, answer) in enumerate((p, a) for p, group in zip(prompts, answers, strict=True) for a in group):
        states = trunk.hidden(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        alone = alone + (head(states)[:, 0] * up[row, : len(answer)]).sum()
    weights = list(trunk.parameters())
    together = torch.autograd.grad((values[:, :4] * up).sum(), weights)
    for a, b in zip(together, torch.autograd.grad(alone, weights), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)
        assert b.abs().max() > 0


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_values_are_fp32_under_autocast(kind):
    """Of the same states, rounded to bf16 or not: the head itself is computed outside autocast."""
    raw, head = models(kind)
    packed = pack([[1, 2, 3], [4]], [[[5, 6, 7, 8], [9]], [[10, 11], [12, 13, 14]]], 0)
    read = []
    head.register_forward_hook(lambda module, inputs, output: read.append((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        _, values = raw(packed)
        alone = raw.values(packed)
    assert values.dtype == torch.float32
    assert torch.equal(alone, values)  # without log π, the same numbers
    assert (values != values.bfloat16().float()).any()
    for states, output in read:
        torch.testing.assert_close(output, states.float() @ head.weight.T + (0 if head.bias is None else head.bias))


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_first_ratio_is_one(kind):
    raw, _ = models(kind)
    rollout = generate(raw.policy, [[1, 2], [3, 4, 5]], 8, 3, 0.7, stop_ids=(7, 8, 9), generator=torch.Generator())
    answers = [ids[:n] for ids, n in zip(rollout.ids.tolist(), rollout.mask.sum(1).tolist(), strict=True)]
    logprobs, _ = raw(pack([[1, 2], [3, 4, 5]], [answers[:3], answers[3:]], 0), 0.7)
    torch.testing.assert_close(logprobs, rollout.logprobs * rollout.mask, atol=1e-5, rtol=1e-4)


def test_the_minibatches_of_two_ranks_are_those_of_one():
    """Drawn anew in each step, in micro-batches of whole groups; a rank without a group takes part at weight 0."""

    class Rank(devices.Dist):  # which stands for all of them
        def sum(self, *values):
            return list(map(float, values))

    def cut(step, share, rank=0, **changes):
        c, slots = config(**changes), list(range(rank * share, rank * share + share))
        prompts = [[1] * (3 + g) for g in range(share)]
        mask = torch.ones(2 * share, 3, dtype=torch.bool)
        ended = torch.ones(share, 2, dtype=torch.bool)
        batch = Batch(None, prompts, Rollout(mask.long(), mask, mask.float()), None, ended)
        groups, dist = shuffled_groups(step, slots, c), Rank(rank, 2, torch.device("cpu"))
        return minibatches_of(batch, groups, mask, c, 0, dist)

    def groups_of(minibatch, first=0):
        rows = [row for piece in minibatch.pieces for row in piece.rows if piece.mask.any()]
        assert rows[1::2] == [row + 1 for row in rows[::2]]  # both answers to a prompt
        return sorted(first + row // 2 for row in rows[::2])

    changes = dict(prompts=8, minibatches=3, micro_batch=4)
    whole = cut(5, 8, **changes)
    assert sorted(g for minibatch in whole for g in groups_of(minibatch)) == list(range(8))
    assert max(len(piece.rows) for minibatch in whole for piece in minibatch.pieces) == 4
    assert [minibatch.n_tokens for minibatch in whole] == [18, 18, 12]  # of 3 tokens an answer
    halves = [cut(5, 4, rank, **changes) for rank in (0, 1)]
    for m, minibatch in enumerate(whole):
        both = groups_of(halves[0][m]) + groups_of(halves[1][m], first=4)
        assert sorted(both) == groups_of(minibatch)
    assert [groups_of(m) for m in cut(6, 8, **changes)] != [groups_of(m) for m in whole]
    assert shuffled_groups(0, [0], config(prompts=2, minibatches=2)) in ([[0], []], [[], [0]])


def test_a_rank_without_a_group_takes_part_at_weight_0():
    class Rank(devices.Dist):
        def sum(self, *values):  # of another rank, which has one answer of 3 tokens
            return [a + b for a, b in zip(values, (1.0, 3.0, 1.0), strict=True)]

    mask = torch.ones(2, 3, dtype=torch.bool)
    batch = Batch(None, [[1, 2]], Rollout(mask.long(), mask, mask.float()), None, torch.ones(1, 2, dtype=torch.bool))
    full, empty = minibatches_of(batch, [[0], []], mask, Config(micro_batch=64), 0, Rank(0, 2, torch.device("cpu")))
    assert [piece.rows for piece in empty.pieces] == [piece.rows for piece in full.pieces] == [[0, 1]]
    assert full.pieces[0].mask.all()
    assert not empty.pieces[0].mask.any()
    assert (full.n_tokens, empty.n_tokens) == (9.0, 3.0)


def test_a_value_network_of_its_own_is_a_copy_of_the_reward_model_but_for_its_head(here):
    """And the reward model stays frozen, with the head that scores."""
    settings = config(value="separate")
    raw, _, judge, _ = ppo_setup.open_models(ActorCritic, settings, "start", "judge", devices.setup("cpu"))
    differ = {name for name, p in raw.critic.named_parameters() if not torch.equal(p, judge.get_parameter(name))}
    assert differ == {"head.weight"}
    assert not raw.critic.head.weight.any()
    assert all(p.requires_grad for p in raw.critic.parameters())
    assert not any(p.requires_grad for p in judge.parameters())


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_micro_batches_change_nothing(here, scaled, value):
    """Nor does a gradient scaler."""
    ppo.main(config(name="whole", value=value))
    scaled("support.ppo_setup")
    ppo.main(config(name="cut", micro_batch=3, value=value))
    names = ("score", "grad_norm", "grad_norm_value", "kl", "value_loss", "approx_kl3", "explained_variance")
    assert_same_metrics("runs/whole", "runs/cut", names, rel=2e-3, abs=1e-5)
    assert max(metrics("runs/whole", "grad_norm").values()) > 0
    assert_same_weights("runs/whole/last", "runs/cut/last", atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("more", [{"value": "shared"}, {"value": "separate"}, {"lora": LoraConfig(2), "lr": 1e-2}])
def test_resumed_equals_uninterrupted_bit_for_bit(here, more):
    changes = dict(**more, kl_target=0.5, kl_horizon=50.0, normalise=True, baseline="none", steps=4)
    names = ("score", "paid", "policy_loss", "value_loss", "beta", "accuracy", "correct")
    assert_resumed_equals_whole(ppo, config, 2, names, **changes)
    assert len(set(metrics("runs/whole", "beta").values())) > 1


def test_the_reward_model_that_a_run_makes_samples_answers_as_long_as_the_run(monkeypatch):
    monkeypatch.setattr(ppo_setup, "make_start_once", lambda name, why, stage, settings, dist: (name, settings))
    name, settings = ppo_setup.reward_start(Config(), "init", None)
    assert (name, "max_new_tokens" in settings) == ("start/word-seed0-reward", False)
    other, settings = ppo_setup.reward_start(Config(max_new_tokens=120), "init", None)
    assert settings["max_new_tokens"] == 120
    assert other != name


def test_a_step_by_plain_loops(here, monkeypatch, calls_of, tokenizer):
    """One step, from the sampled answers to the gradient of every weight and to the figures of the log: each answer
    alone, unpacked, GAE as its double sum. The reference is another model and the values are not 0."""
    seen, made, judged = {}, ppo_setup.open_models, calls_of(ppo, "is_correct")

    class Sampler(ppo.Sampler):
        def __call__(self, *args):
            seen["batch"] = super().__call__(*args)
            return seen["batch"]

    def open_models(*args):
        raw, reference, judge, tokenizer = made(*args)
        torch.manual_seed(3)
        for p in [*reference.parameters(), *raw.head.parameters()]:
            p.data += 0.2 * torch.randn_like(p)
        seen["models"] = raw, reference, judge
        return raw, reference, judge, tokenizer

    def step(parts, *_):
        seen["gradients"] = {n: p.grad.clone() for n, p in seen["models"][0].named_parameters() if p.grad is not None}
        return [0.0, 0.0]  # no weight moves

    monkeypatch.setattr(ppo_setup, "open_models", open_models)
    monkeypatch.setattr(ppo, "Sampler", Sampler)
    monkeypatch.setattr(ppo, "optimizer_steps", step)
    tau, gamma, lam, beta, fine = 0.8, 0.9, 0.7, 0.3, 0.25
    changes = dict(temperature=tau, gamma=gamma, lam=lam, beta=beta, missing_end=fine, value_weight=0.5)
    ppo.main(
        config(steps=1, minibatches=1, baseline="none", whiten=False, dtype="fp32", stop_kl=0.0, watch=0, **changes)
    )

    (raw, reference, judge), batch = seen["models"], seen["batch"]
    prompts, rollout, ended = batch.prompts, batch.rollout, batch.ended.flatten()
    lengths = rollout.mask.sum(1).tolist()
    assert [call.args for call in judged] == [(text, batch.problems[k // 2]) for k, text in enumerate(batch.texts)]
    N, K = sum(lengths), len(lengths)
    loss, paid, k1, k3, errors, goals, earned, surprise = 0.0, 0.0, 0.0, 0.0, [], [], 0.0, 0.0
    for k, n in enumerate(lengths):
        prompt, answer = prompts[k // 2], rollout.ids[k, :n].tolist()
        row = torch.tensor([prompt + answer])
        logp = token_logprobs(raw.policy, row, tau)[0, -n:]
        with torch.no_grad():
            log_ratio = logp.detach() - token_logprobs(reference, row, tau)[0, -n:]
        values = raw(pack([prompt], [[answer]], tokenizer.endoftext_id), tau)[1][0, :n]
        V = [*values.tolist(), 0.0]
        worth = score(judge, prompt, answer) - fine * (not ended[k])
        rewards = [-beta * x for x in log_ratio.tolist()]
        rewards[-1] += worth
        delta = [rewards[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        A = torch.tensor([sum((gamma * lam) ** (l - t) * delta[l] for l in range(t, n)) for t in range(n)])
        goal = A + values.detach()
        loss = loss - ((logp - logp.detach()).exp() * A).sum() / N
        loss = loss + 0.5 * 0.5 * ((values - goal) ** 2).sum() / N
        paid, earned = paid + worth, earned + sum(rewards)
        k1, k3 = k1 + log_ratio.sum().item(), k3 + ((-log_ratio).exp() - 1 + log_ratio).sum().item()
        surprise -= logp.sum().item()
        errors, goals = errors + (goal - values.detach()).tolist(), goals + goal.tolist()
    for p in raw.parameters():
        p.grad = None
    loss.backward()
    expected = {name: p.grad for name, p in raw.named_parameters() if p.grad is not None}
    assert expected.keys() == seen["gradients"].keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen["gradients"][name], gradient, atol=1e-5, rtol=1e-3)
    assert max(g.abs().max() for g in expected.values()) > 0.01
    figures = {"paid": paid / K, "reward": earned / K, "kl": k3 / N, "kl_per_answer": k1 / K}
    figures |= {"explained_variance": 1 - np.var(errors) / np.var(goals), "value": np.mean(goals) - np.mean(errors)}
    figures |= {"entropy": surprise / N, "length": N / K}
    for name, value in figures.items():
        assert metrics("runs/ppo", name)[1] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert figures["kl"] > 0.01
    assert abs(figures["explained_variance"]) > 0.01


def score(judge, prompt, answer):
    ((value,),) = score_groups(judge, [(prompt, [answer])], judge.pad_id, "cpu", contextlib.nullcontext)
    return value


def test_what_a_run_gives_its_two_losses(here, monkeypatch):
    """Whitened advantages, targets from those before, and to each loss its own clip."""
    seen, raw, clips, policy_loss, value_loss = [], [], [], ppo.ppo_policy_loss, ppo.value_loss

    def see(values, old_values, targets, mask, **options):
        raw.append((targets - old_values)[mask])
        clips.append(options["clip"])
        return value_loss(values, old_values, targets, mask, **options)

    monkeypatch.setattr(ppo, "value_loss", see)
    monkeypatch.setattr(
        ppo, "ppo_policy_loss", lambda *a, **k: seen.append((a[2][a[3]], k["clip"])) or policy_loss(*a, **k)
    )
    ppo.main(config(steps=1, minibatches=1, clip_ratio=0.1, clip_value=0.3, stop_kl=0.0, record_groups=0, watch=0))
    ((A, clip),) = seen
    assert (clip, clips) == (0.1, [0.3])
    assert A.mean().item() == pytest.approx(0, abs=1e-5)
    assert A.std(correction=0).item() == pytest.approx(1, rel=1e-3)
    (own,) = raw
    torch.testing.assert_close(A, (own - own.mean()) / own.std(correction=0), atol=1e-4, rtol=1e-4)
    assert own.std() < 0.6  # a win is worth less than ½


@pytest.mark.parametrize(("value", "share"), [("shared", 1.0), ("separate", 0.1)])
def test_the_policys_rate_falls_and_that_of_the_values_stays(here, monkeypatch, value, share):
    rates, clips, decays, betas, steps = [], set(), [], set(), ppo.optimizer_steps

    def step(parts, scaler, autocast, clip):
        rates.append([rate for *_, rate in parts])
        clips.add(clip)
        for _, optimizers, _ in parts:
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            decays.append({group["weight_decay"] for group in groups})
            betas.update(group["betas"] for group in groups if "betas" in group)  # Muon has none
        return steps(parts, scaler, autocast, clip)

    monkeypatch.setattr(ppo, "optimizer_steps", step)
    changes = dict(value_lr=0.01, warmup=2, clip=0.3, weight_decay=0.2)
    ppo.main(config(steps=4, minibatches=1, value=value, stop_kl=0.0, **changes))
    assert clips == {0.3}
    assert betas == {(0.9, 0.999)}
    assert decays == [{0.0, 0.2}, {0.0}] * 4  # of the policy, of the values
    policy, values = zip(*rates, strict=True)
    assert policy == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert values == pytest.approx([0.005 * share, *[0.01 * share] * 3])


def test_beta_adapts_to_the_kl_per_answer_of_the_log(here, calls_of):
    seen = calls_of(ppo, "adapt_beta")
    ppo.main(config(lr=1e-2, kl_target=0.5, kl_horizon=50.0))
    kl, beta = metrics("runs/ppo", "kl_per_answer"), metrics("runs/ppo", "beta")
    assert [call.args[1] for call in seen] == pytest.approx(list(kl.values()), rel=1e-4, abs=1e-6)
    assert abs(kl[3]) > 1e-3
    assert {call.args[2:] for call in seen} == {(0.5, 12, 50.0)}
    assert [beta[2], beta[3]] == pytest.approx([call.result for call in seen[:2]])


def test_a_run_stopped_before_its_first_step_keeps_where_it_began(here, monkeypatch):
    assert_the_start_is_kept(ppo, config, "runs/ppo", monkeypatch)


def test_a_resumed_run_goes_on_with_its_moments(here):
    ppo.main(config(steps=2, normalise=True, save_every=1))
    n, _, _ = torch.load("runs/ppo/last/trainer_state.pt", weights_only=True)["moments"]
    assert n == 2 * 6 * 2
    ppo.main(config(steps=4, normalise=True, save_every=1, eval_every=4, resume=True))
    assert torch.load("runs/ppo/last/trainer_state.pt", weights_only=True)["moments"][0] == 2 * n
    assert list(metrics("runs/ppo", "score")) == [1, 2, 3, 4]


def test_a_policy_may_not_write_what_the_reward_model_cannot_read(here, tokenizer):
    shape = dict(context=160, n_layer=1, n_head=2, n_kv_head=1, width=16)
    Transformer(TransformerConfig(tokenizer.vocab_size + 56, **shape)).save_pretrained("padded")
    tokenizer.save_pretrained("padded")
    with pytest.raises(ConfigError, match=r"padded may sample \d+ ids, the reward model judge knows"):
        ppo.main(config(init="padded"))


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_two_processes_equal_one(here, value):
    ppo.main(config(name="n1", value=value))
    two = script("ppo.py", *flags_of(SMALL | {"value": value, "name": "n2"}), cwd=here, processes=2)
    assert two.returncode == 0, two.stderr
    names = ("score", "reward", "grad_norm", "grad_norm_value", "kl", "value_loss", "explained_variance", "correct")
    assert_same_metrics("runs/n1", "runs/n2", names, rel=2e-3, abs=1e-5)
    assert_same_weights("runs/n1/last", "runs/n2/last", atol=2e-4, rtol=1e-3)


def test_lora_trains_the_adapters_alone(here):
    ppo.main(config(lora=LoraConfig(2, targets=["wq", "down"]), lr=0.1, dtype="fp32"))
    kl = metrics("runs/ppo", "kl")
    assert kl[1] == pytest.approx(0.0, abs=1e-6)
    assert kl[3] > 1e-5  # the reference is the model without its adapters
    a, b = Transformer.from_pretrained("start"), Transformer.from_pretrained("runs/ppo/last")
    moved = {
        name for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if (x != y).any()
    }
    assert moved == {"blocks.0.attn.wq.weight", "blocks.0.ffn.down.weight"}  # merged, in a plain checkpoint


def test_the_training_never_sees_the_truth(here, monkeypatch):
    ppo.main(config(name="a"))
    monkeypatch.setattr(ppo, "is_correct", lambda text, problem: True)
    ppo.main(config(name="b"))
    assert set(metrics("runs/b", "correct").values()) == {1.0}
    assert max(metrics("runs/a", "correct").values()) < 1
    assert_same_weights("runs/a/last", "runs/b/last")


def test_the_loss_keeps_float64():
    """A check of its gradient by differences needs that."""
    new, old, A, mask = batch()
    assert torch.autograd.gradcheck(lambda x: ppo.ppo_policy_loss(x, old, A, mask, clip=5.0)[0], new)


def test_right_is_a_share_of_what_can_be_checked():
    """Of three of four problems the answer is not known, and no answer to them is right."""
    seen = SimpleNamespace(run=SimpleNamespace(config=config(prompts=4, rollouts=2), dist=devices.setup("cpu")))
    problems = [Problem("q", "s", answer, 1, "x") for answer in ("1", "", "", "")]
    batch = SimpleNamespace(problems=problems, ended=torch.ones(4, 2, dtype=torch.bool))
    judged = {"correct": torch.tensor([[1.0, 0.0], *[[0.0, 0.0]] * 3]), "score": torch.zeros(4, 2)}
    sums = dict.fromkeys(("tokens", "kl", "kl3", "entropy", "value", "error", "error²", "goal", "goal²"), 1.0)
    tokens = SimpleNamespace(rewards=torch.zeros(8, 3), sums=lambda: sums)
    zeros = torch.zeros(4, 2)
    record = ppo_report.Look.record(seen, batch, judged | {"paid": zeros}, zeros, tokens, 0.1)
    assert record["correct"] == 1 / 2
    assert record["missing_end"] == 0


def test_a_score_for_a_letter_is_learned(here, tokenizer, monkeypatch):
    """Whatever the reward model likes: here, answers with many e's."""

    def letters(model, groups, *_):
        return [[tokenizer.decode(answer).count("e") / 3 for answer in answers] for _, answers in groups]

    monkeypatch.setattr(ppo, "score_groups", letters)
    settings = dict(steps=40, lr=2e-2, prompts=16, rollouts=4, beta=0.0, eval_every=40, test_problems=1, stop_kl=0.0)
    ppo.main(config(**settings))
    earned = list(metrics("runs/ppo", "score").values())
    assert sum(earned[-5:]) / 5 > sum(earned[:5]) / 5 + 0.2


def test_wins_by_hand():
    """Scores 2, 0 and 0: the first beats each of the others with probability σ(2), they each other with ½."""
    sigma = 1 / (1 + math.exp(-2))
    wins = win_rates(torch.tensor([[2.0, 0.0, 0.0], [5.0, 5.0, 5.0]]))
    expected = [[sigma - 0.5, (1 - sigma - 0.5) / 2, (1 - sigma - 0.5) / 2], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(wins, torch.tensor(expected))


def test_with_the_defaults_the_ratio_leaves_1_and_the_clip_acts(here):
    assert (Config().baseline, Config().normalise, Config(baseline="wins").normalise) == ("none", True, False)
    defaults = {name: getattr(Config(), name) for name in ("minibatches", "baseline", "normalise", "lam", "beta")}
    ppo.main(config(lr=3e-2, warmup=0, steps=2, **defaults))
    assert min(metrics("runs/ppo", "updates").values()) > 1
    assert min(metrics("runs/ppo", "ratio_spread").values()) > 0.01
    assert max(metrics("runs/ppo", "clip_fraction").values()) > 0


def test_what_a_whole_prompt_scores_is_no_reward(here, monkeypatch):
    """A number added to all answers of a prompt changes nothing with a baseline, and much without."""
    for baseline, same in (("wins", True), ("mean", True), ("none", False)):
        for name, offset in (("a", 0.0), ("b", 0.5)):

            def letters(model, groups, *_, offset=offset):
                return [[len(set(answer)) / 4 + offset * (len(prompt) % 3) for answer in a] for prompt, a in groups]

            monkeypatch.setattr(ppo, "score_groups", letters)
            ppo.main(config(name=baseline + name, baseline=baseline, normalise=False, whiten=False, steps=2))
        a, b = (torch.load(f"runs/{baseline}{x}/last/trainer_state.pt", weights_only=True)["value"] for x in "ab")
        near = all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
        assert near is same


@pytest.mark.parametrize("baseline", ["wins", "mean", "none"])
def test_the_kl_penalty_is_in_the_rewards(here, calls_of, baseline):
    """Nats per answer times the coefficient, and the score, which the baseline holds against the prompt's other answer:
    nothing else is paid."""
    scored, rewarded = calls_of(ppo, "score_groups"), calls_of(ppo, "token_rewards")
    ppo.main(config(beta=0.7, steps=3, missing_end=0.0, baseline=baseline, record_groups=0, watch=0))
    for scores, rewards in zip(scored, rewarded, strict=True):
        scores = torch.tensor(scores.result)  # (6, 2)
        gap = scores - scores.flip(1)
        final = {"wins": torch.sigmoid(gap) - 0.5, "mean": gap / 2, "none": scores}[baseline]
        torch.testing.assert_close(rewards.args[1].view(6, 2), final)
        assert gap.abs().max() > 0.01
    at = {name: metrics("runs/ppo", name) for name in ("reward", "paid", "kl_per_answer", "reward_kl")}
    for step in (1, 2, 3):  # reward is of the tokens' rewards
        assert at["reward"][step] == pytest.approx(at["paid"][step] - 0.7 * at["kl_per_answer"][step], abs=1e-5)
        assert at["reward"][step] == pytest.approx(at["paid"][step] + at["reward_kl"][step], abs=1e-5)
    assert abs(at["kl_per_answer"][1]) < 1e-4  # the policy is the reference still
    assert abs(at["kl_per_answer"][3]) > 1e-4


def test_a_sample_without_an_answer_to_check_has_no_verdict():
    said = []
    log = SimpleNamespace(samples=lambda step, text: said.append(text), show=lambda *_, **__: None)
    run = SimpleNamespace(done=0, say=lambda text: None, log=log)
    problems = [Problem("q", "s", answer, 1, "x") for answer in ("1", "")]
    rollout = SimpleNamespace(mask=torch.ones(2, 3, dtype=torch.bool))
    batch, zeros = SimpleNamespace(problems=problems, texts=["a", "b"], rollout=rollout), torch.zeros(2, 3)
    ppo_report.show_samples(run, batch, torch.tensor([[0.0], [1.0]]), torch.zeros(2), zeros, zeros)
    assert "[score 0.00, wrong] q (answer 1)\n" in said[0]
    assert "[score 1.00] q\n" in said[0]


def test_inner_epochs_stop_when_the_policy_has_moved(here):
    settings = dict(lr=3e-2, inner_epochs=4, steps=2)
    ppo.main(config(name="stops", stop_kl=0.01, **settings))
    ppo.main(config(name="never", stop_kl=0.0, **settings))
    assert set(metrics("runs/never", "updates").values()) == {8}
    assert 1 <= min(metrics("runs/stops", "updates").values()) < 8


def test_the_minibatch_that_stops_a_step_is_in_the_log(here, monkeypatch, capsys):
    """KLs of 0.02 and 0.3 with a limit of 0.1: one update, and a mean of 0.16 that says why. A step whose first
    minibatch is above the limit says that it trained nothing, and trains nothing."""
    loss, planted = ppo.ppo_policy_loss, iter([0.02, 0.3, 0.2, 0.02, 0.02])

    def with_kl(*args, **more):
        loss_, metrics_ = loss(*args, **more)
        return loss_, metrics_ | {"approx_kl3": next(planted)}

    monkeypatch.setattr(ppo, "ppo_policy_loss", with_kl)
    ppo.main(config(steps=3, stop_kl=0.1, record_groups=0, watch=0))  # a minibatch is one piece
    assert list(metrics("runs/ppo", "updates").values()) == [1, 0, 2]
    assert list(metrics("runs/ppo", "approx_kl3").values()) == pytest.approx([0.16, 0.2, 0.02])
    assert list(metrics("runs/ppo", "grad_norm")) == [1, 3]  # of updates alone
    assert list(metrics("runs/ppo", "value_loss")) == [1, 2, 3]
    text = capsys.readouterr()
    assert (text.out + text.err).count("trained nothing") == 1
    assert "step 2 trained nothing: before any update the KL to the sampling policy is 0.2 nats" in text.out + text.err


def test_a_step_that_its_first_minibatch_ends_moves_no_weight_and_leaves_no_gradient(here, monkeypatch):
    loss, ask, clean = ppo.ppo_policy_loss, ppo.Sampler.__call__, []

    def sample(self, *args):
        clean.append(all(p.grad is None or not p.grad.any() for p in self.policy.parameters()))
        return ask(self, *args)

    monkeypatch.setattr(
        ppo, "ppo_policy_loss", lambda *a, **b: (lambda x, m: (x, m | {"approx_kl3": 1.0}))(*loss(*a, **b))
    )
    monkeypatch.setattr(ppo.Sampler, "__call__", sample)
    ppo.main(config(steps=2, record_groups=0, watch=0))
    assert_same_weights("start", "runs/ppo/last")
    assert clean == [True, True]


def test_an_answer_without_an_end_is_fined(here):
    for name, fine in (("a", 0.0), ("b", 2.0)):
        ppo.main(config(name=name, missing_end=fine, steps=1))
    a, b = (metrics(f"runs/{name}", "paid")[1] for name in "ab")
    assert metrics("runs/a", "missing_end")[1] > 0
    assert a - b == pytest.approx(2 * metrics("runs/a", "missing_end")[1], abs=1e-5)
    assert metrics("runs/a", "score") == metrics("runs/b", "score")


def test_missing_end_is_subtracted_after_the_normalisation(here):
    ppo.main(config(steps=1, baseline="none", normalise=True, missing_end=2.0))
    score, paid, cut = (metrics("runs/ppo", name)[1] for name in ("score", "paid", "missing_end"))
    assert abs(score) > 1e-3
    assert cut > 0
    assert paid == pytest.approx(-2 * cut, abs=1e-5)  # the first step's normalised scores have mean 0


def test_an_answer_with_another_end_counts_as_cut_off(here, tokenizer, monkeypatch):
    def ends(policy, prompts, *sizes, **more):
        ids = torch.tensor([[5, tokenizer.endoftext_id], [5, tokenizer.im_end_id]] * len(prompts))
        return Rollout(ids, torch.ones_like(ids, dtype=torch.bool), torch.full(ids.shape, -1.0))

    monkeypatch.setattr("support.rollouts.generate", ends)
    ppo.main(config(steps=1, stop_kl=0.0, watch=0))
    assert metrics("runs/ppo", "missing_end")[1] == 0.5


def test_an_encoder_may_judge(here):
    RewardEncoder.from_policy(open_checkpoint("start")[0]).save_pretrained("judge")
    ppo.main(config(steps=1))
    with pytest.raises(ConfigError, match="separate"):
        ppo.main(config(steps=1, value="separate"))


def test_bad_input_is_one_line(here):
    other = BPETokenizer.train(["quite another text " * 9], 300)
    RewardModel.from_policy(tiny(other, 2)).save_pretrained("foreign")
    other.save_pretrained("foreign")
    for flags, words in [
        (["--init", "start"], ["reward_model"]),
        (["--init", "start", "--reward_model", "foreign"], ["tokenizer", "foreign"]),
        (["--init", "start", "--reward_model", "start"], ["no reward model"]),
    ]:
        assert_one_line_error(script("ppo.py", *flags, "--device", "cpu", cwd=here), *words)
    assert not (here / "runs").exists()


def test_the_reward_model_is_not_moved_aside(here):
    (here / "runs").mkdir()
    (here / "judge").rename("runs/judge")
    with pytest.raises(ConfigError, match="--reward_model runs/judge is the run that --name judge would move aside"):
        ppo.main(config(reward_model="runs/judge", name="judge"))
    assert (here / "runs/judge/config.json").exists()


def test_the_start_is_the_best_until_something_beats_it(here):
    ppo.main(config(steps=1, lr=0.0))
    assert_same_weights("start", "runs/ppo/best")


@pytest.mark.parametrize("answered", [0, 1])  # of three: one does not speak for them
def test_without_answers_the_best_is_the_latest(here, monkeypatch, answered):
    few = load_problems("word", "train", 60)
    few[answered:] = [replace(p, answer="") for p in few[answered:]]
    monkeypatch.setattr(
        questions, "load_problems", lambda name, split, n, levels, skip_bad: few[:n] if skip_bad else []
    )
    ppo.main(config(data="few.jsonl", skip_bad=True))
    assert_same_weights("runs/ppo/best", "runs/ppo/last")


def test_activations_that_overflow_fp16_stop_the_run(here):
    """They give no token."""
    raw, tokenizer, _ = open_checkpoint("start")
    with torch.no_grad():
        raw.blocks[0].ffn.down.weight.mul_(1e9)
    raw.save_pretrained("big")
    tokenizer.save_pretrained("big")
    with pytest.raises(DivergedError, match=r"logits are not finite: .*--dtype fp32"):
        ppo.main(config(init="big", dtype="fp16"))


def test_a_loss_that_is_not_finite_stops_the_run(here, monkeypatch):
    """A scaler forgives a gradient that is not finite, but no scale mends this loss."""
    loss = ppo.ppo_policy_loss
    monkeypatch.setattr(
        ppo, "ppo_policy_loss", lambda *args, **more: [loss(*args, **more)[0] * math.nan, {"policy_loss": math.nan}]
    )
    with pytest.raises(DivergedError, match=r"the policy loss is nan, .* at step 0"):
        ppo.main(config(dtype="fp16"))


def test_what_stands_outside_the_mask_does_not_matter():
    new, old, A, mask = batch()
    loss, figures = ppo_policy_loss(new, old, A, mask)
    for junk in (math.inf, -math.inf, math.nan):
        dirty = [torch.where(mask, x, junk) for x in (old, A)]
        again, same = ppo_policy_loss(new, *dirty, mask)
        assert (again.item(), same) == (loss.item(), figures)
        (gradient,) = torch.autograd.grad(again, new)
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()
        values, old_values, returns = (x.detach().clone() for x in (new, old, A))
        dirty = [torch.where(mask, x, junk).requires_grad_() for x in (values, old_values, returns)]
        loss_v, _ = value_loss(*dirty, mask)
        assert loss_v.item() == value_loss(values, old_values, returns, mask)[0].item()
        (gradient,) = torch.autograd.grad(loss_v, dirty[0])
        assert gradient.isfinite().all()
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": "none"}, "--value 'none' is not known"),
        ({"baseline": "all"}, "--baseline 'all' is not known"),
        ({"rollouts": 1}, "--baseline wins needs --rollouts of at least 2"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"temperature": math.nan}, "--temperature is nan"),
        (
            {"kl_target": 0.5, "kl_horizon": 0.2 * 4 * 4, "prompts": 4, "rollouts": 4},
            "--kl_horizon is 3.2; it must be above 3.2",
        ),
        ({"kl_horizon": 50.0}, "--kl_horizon has no use without --kl_target"),
        ({"lam": 1.5}, "--lam is 1.5"),
        ({"kl_target": 0.0}, "--kl_target is 0.0"),
        ({"kl_target": 3.0, "beta": 0.0}, "--beta 0 stays 0"),
        ({"minibatches": 7}, "--prompts 6 cannot be cut into 7 minibatches"),
        ({"value_lr": -1.0}, "--value_lr is -1.0"),
        ({"stop_kl": -1.0}, "--stop_kl is -1.0"),
        ({"clip_ratio": -0.1}, "--clip_ratio is -0.1"),
        ({"clip_ratio": 0.0}, "--clip_ratio is 0.0"),  # it would freeze nearly all tokens from the second minibatch on
    ],
)
def test_settings_that_cannot_be_used(changes, words):
    with pytest.raises(ConfigError, match=words):
        config(**changes)
