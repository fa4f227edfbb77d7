"""support/off_policy.py: importance weights against plain loops and exact expectations, rounding by hand, and which
weights a copy of the policy has."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from grpo import grpo_loss
from support import off_policy
from support.errors import ConfigError
from support.off_policy import RolloutPolicy, check_sampler, rounded, sampler_weights
from transformer import Transformer, TransformerConfig

CORRECTIONS, LEVELS = ("truncate", "mask", "keep"), ("token", "sequence", "geometric")


def batch(B=4, T=6):
    torch.manual_seed(0)
    sampler = -torch.rand(B, T, dtype=torch.float64) * 2
    mask = torch.arange(T) < torch.tensor([[6], [3], [1], [4]])[:B]
    return sampler + 0.5 * torch.randn(B, T, dtype=torch.float64), sampler, mask


def by_loop(old, sampler, mask, correction, level, C):
    weights = torch.zeros_like(old)
    for i in range(len(mask)):
        real = [t for t in range(mask.shape[1]) if mask[i, t]]
        k = {t: math.exp(old[i, t]) / math.exp(sampler[i, t]) for t in real}
        if level != "token":
            product = math.prod(k.values())
            k = dict.fromkeys(real, product ** (1 / len(real)) if level == "geometric" else product)
        for t in real:
            if correction == "truncate":
                weights[i, t] = min(k[t], C)
            elif 1 / C <= k[t] <= C:
                weights[i, t] = k[t] if correction == "mask" else 1.0
    return weights


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_weights_against_a_loop(correction, level):
    old, sampler, mask = batch()
    C = 1.3
    expected = by_loop(old, sampler, mask, correction, level, C)
    for junk in (0.0, float("inf"), float("nan")):  # outside the mask stands anything
        got, k = sampler_weights(old.masked_fill(~mask, junk), sampler, mask, correction, level, C)
        torch.testing.assert_close(got * mask, expected)
    if level == "token":
        assert 0 < (expected[mask] == 0).sum() < mask.sum() or correction == "truncate"
    torch.testing.assert_close(k[mask], by_loop(old, sampler, mask, "truncate", level, math.inf)[mask])


def test_weights_by_hand():
    """The sampler gave two tokens chances of 0.5 and 0.2, the trainer 0.25 and 0.6: k = 0.5 and 3, together 1.5."""
    old, sampler, mask = torch.tensor([[0.25, 0.6]]).log(), torch.tensor([[0.5, 0.2]]).log(), torch.ones(1, 2)

    def of(correction, level, C=2.0):
        return sampler_weights(old, sampler, mask, correction, level, C)[0][0].tolist()

    assert of("truncate", "token") == pytest.approx([0.5, 2.0])
    assert of("mask", "token", 2.5) == pytest.approx([0.5, 0.0])
    assert of("keep", "token", 2.5) == [1.0, 0.0]
    assert of("mask", "token", 1.9) == [0.0, 0.0]
    assert of("truncate", "sequence") == pytest.approx([1.5, 1.5])
    assert of("mask", "sequence", 1.4) == [0.0, 0.0]
    assert of("truncate", "geometric") == pytest.approx([1.5**0.5] * 2)


def test_an_unknown_name_is_refused():
    for unknown in ({"correction": "truncated"}, {"level": "answer"}):
        with pytest.raises(ConfigError, match="is not known"):
            sampler_weights(*batch(), **unknown)


def test_a_product_that_overflows_is_bounded_or_dropped():
    old, sampler, mask = torch.zeros(1, 50), torch.full((1, 50), -3.0), torch.ones(1, 50)
    assert (sampler_weights(old, sampler, mask, "truncate", "sequence", 2.0)[0] == 2.0).all()
    assert (sampler_weights(old, sampler, mask, "mask", "sequence", 2.0)[0] == 0.0).all()


def two_tokens():
    """Two policies over two tokens: the second token's chances depend on the first. [first, second given first]"""
    torch.manual_seed(1)
    logits = [torch.randn(3, 2, dtype=torch.float64) for _ in range(2)]
    return [x.log_softmax(-1) for x in logits]


def chances(policy, a, b):
    return torch.stack([policy[0, a], policy[1 + a, b]])[None]  # (1, 2)


def test_untruncated_weights_turn_one_expectation_into_the_other():
    """All four answers of two tokens, exactly: Σ μ(y) k f(y) = Σ π(y) f(y), with k of the whole answer. Token by token
    it holds for one token alone."""
    mu, pi = two_tokens()
    f = torch.tensor([[3.0, -1.0], [0.5, 7.0]], dtype=torch.float64)
    ours = truth = one = 0.0
    for a, b in itertools.product(range(2), repeat=2):
        sampled, own = chances(mu, a, b), chances(pi, a, b)
        weight, _ = sampler_weights(own, sampled, torch.ones(1, 2), "truncate", "sequence", math.inf)
        ours += sampled.sum().exp() * weight[0, 0] * f[a, b]
        truth += own.sum().exp() * f[a, b]
        by_token, _ = sampler_weights(own, sampled, torch.ones(1, 2), "truncate", "token", math.inf)
        one += sampled.sum().exp() * by_token[0, 0] * f[a, 0]  # of the first token alone
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(one, sum(pi[0, a].exp() * f[a, 0] for a in range(2)))


@pytest.mark.parametrize("old_is", ["trainer", "sampler"])
def test_either_old_logprobs_give_the_on_policy_gradient(old_is):
    """One token, enumerated, C = ∞: E_μ[the gradient] is REINFORCE's under π. With the trainer's log-probabilities the
    weight does it, with the sampler's the ratio; weighing the latter too would not."""
    torch.manual_seed(2)
    theta = torch.randn(2, dtype=torch.float64).requires_grad_()
    log_pi, mu = theta.log_softmax(0), torch.tensor([0.2, 0.8], dtype=torch.float64).log()
    A, ones = torch.tensor([1.5, -0.5], dtype=torch.float64), torch.ones(1, 1)
    (expected,) = torch.autograd.grad((log_pi.exp() * A).sum(), theta, retain_graph=True)

    def gradient(twice):
        total = 0.0
        for y in range(2):
            new, sampled = log_pi[y].view(1, 1), mu[y].view(1, 1)
            old = new.detach() if old_is == "trainer" else sampled
            weights, _ = sampler_weights(new, sampled, ones, "truncate", "token", math.inf)
            weights = weights if old_is == "trainer" or twice else None
            loss, _ = grpo_loss(new, old, A[y : y + 1], ones, clip_low=1.0, clip_high=math.inf, sampler_weights=weights)
            total = total - mu[y].exp() * loss
        return torch.autograd.grad(total, theta, retain_graph=True)[0]

    torch.testing.assert_close(gradient(twice=False), expected)
    if old_is == "sampler":
        assert (gradient(twice=True) - expected).abs().max() > 0.05


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_weights_multiply_the_surrogate_and_nothing_else(loss_type):
    old, sampler, mask = batch()
    new, A = old.clone().requires_grad_(), torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    weights, _ = sampler_weights(old, sampler, mask, "mask", "token", 1.3)
    options = dict(loss_type=loss_type, max_length=9)
    loss, _ = grpo_loss(new, old, A, mask, sampler_weights=weights, **options)
    (gradient,) = torch.autograd.grad(loss, new)
    tokens, lengths = int(mask.sum()), mask.sum(1, keepdim=True)
    divide = {"grpo": lengths * 4, "dapo": tokens, "dr_grpo": 36}[loss_type]  # dropped tokens still count
    torch.testing.assert_close(gradient, -weights * A[:, None] * mask / divide)
    kl = [grpo_loss(new, old, A * 0, mask, sampler, 0.3, sampler_weights=w, **options)[0] for w in (weights, None)]
    assert torch.equal(*kl)
    assert kl[0] > 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_sampler_that_is_the_policy_changes_no_bit(correction, level):
    old, _, mask = batch()
    new = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    weights, k = sampler_weights(old, old, mask, correction, level, 2.0)
    assert (weights == 1).all()
    assert (k == 1).all()
    A = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    losses = [grpo_loss(new, old, A, mask, old - 0.1, 0.3, sampler_weights=w)[0] for w in (weights, None)]
    assert torch.equal(*losses)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in losses]
    assert torch.equal(*gradients)


# ------------------------------------------------------------------------------------------------ the copy


def test_rounding_by_hand():
    w = torch.tensor([[127.0, -63.4, 0.5, 0.4], [0.0, 0.0, 0.0, 0.0], [-0.0254, 0.01, 0.0002, 0.0]])
    expected = torch.tensor([[127.0, -63.0, 0.0, 0.0], [0.0] * 4, [-0.0254, 0.0002 * 50, 0.0002, 0.0]])
    torch.testing.assert_close(rounded(w, "int8"), expected)  # each row has a step of its own
    stack = torch.stack([w, 10 * w])  # experts
    torch.testing.assert_close(rounded(stack, "int8"), torch.stack([expected, 10 * expected]))
    vector = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-8 + 2**-20])
    assert torch.equal(rounded(vector, "int8"), vector)
    assert torch.equal(rounded(vector, "bf16"), torch.tensor([1.0, 1 + 2**-7, 1 + 2**-7]))  # 7 bits after the point
    assert torch.equal(rounded(w, "same"), w)
    assert rounded(w, "bf16").dtype == torch.float32


def model(seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(20, context=8, n_layer=1, n_head=2, n_kv_head=1, width=8))


def move(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p))


def states(policy):
    return {name: w.clone() for name, w in policy.state_dict().items()}


def assert_equal(model, state):
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("stale", [0, 1, 2, 5])
def test_a_stale_copy_has_the_weights_of_that_many_steps_ago(stale):
    policy, seen = model(), []
    copy = RolloutPolicy(policy, "same", stale)
    assert (copy.model is policy) == (stale == 0)
    for step in range(8):
        seen.append(states(policy))
        copy.refresh(policy)
        assert_equal(copy.model, seen[max(0, step - stale)])
        if step == 4:  # saved, and resumed in another process
            saved, copy = copy.state_dict(), RolloutPolicy(model(9), "same", stale)
            assert len(saved["past"]) == stale
            copy.load_state_dict(saved)
            if not stale:
                copy.model = policy
        move(policy)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_rounded_copy_follows_the_policy(dtype):
    policy = model()
    copy = RolloutPolicy(policy, dtype, 0)
    for _ in range(2):
        copy.refresh(policy)
        assert_equal(copy.model, {name: rounded(w, dtype) for name, w in policy.state_dict().items()})
        assert any((w != copy.model.state_dict()[name]).any() for name, w in policy.state_dict().items())
        move(policy)


def test_the_bias_that_selects_experts_is_no_weight_to_round():
    sizes = dict(context=8, n_layer=1, n_head=2, n_kv_head=1, width=8, n_expert=3, balancing="bias")
    policy = Transformer(TransformerConfig(20, **sizes))
    policy.blocks[0].ffn.selection_bias.fill_(1 + 2**-10)  # in bf16 it would be 1
    copy = RolloutPolicy(policy, "bf16")
    copy.refresh(policy)
    assert torch.equal(copy.model.blocks[0].ffn.selection_bias, policy.blocks[0].ffn.selection_bias)


def test_the_figures_by_hand_over_all_ranks(monkeypatch):
    """Three tokens with k = 0.5, 3 and 1 here; the other rank has three of k = 1 and a largest k of 9."""
    sampled, own = torch.tensor([[0.5, 0.2], [0.3, 0.0]]).log(), torch.tensor([[0.25, 0.6], [0.3, 0.0]]).log()
    mask = torch.tensor([[True, True], [True, False]])
    monkeypatch.setattr(off_policy, "cut", lambda *_: [])
    monkeypatch.setattr(off_policy, "piece_logprobs", lambda *_: own)
    dist = SimpleNamespace(gather=lambda x: torch.cat([x, torch.full_like(x, 9.0)]))
    dist.sum = lambda *values: [float(a) + b for a, b in zip(values, (3, 3, 0, 0), strict=True)]
    c = settings(correction="truncate", old_logprobs="trainer", sampler_dtype="int8", stale=0, micro_batch=2)
    c.temperature = 1.0
    batch = SimpleNamespace(prompts=[0], rollout=SimpleNamespace(logprobs=sampled, mask=mask))
    old, weights, figures = off_policy.off_policy(batch, None, c, None, 0, dist)
    assert old is own is batch.rollout.logprobs
    assert weights[mask].tolist() == pytest.approx([0.5, 2.0, 1.0])
    kl = (0.5 - 1 - math.log(0.5)) + (3 - 1 - math.log(3))  # k3 with r = k
    expected = {"sampler_weight": 6.5 / 6, "sampler_limited": 1 / 6, "sampler_kl": kl / 6, "sampler_ratio_max": 9.0}
    assert figures == pytest.approx(expected)


@pytest.mark.parametrize(
    ("level", "bound", "weight"), [("sequence", 9.0, 1.5), ("geometric", 9.0, 1.5**0.5), ("sequence", 1.2, 1.2)]
)
def test_the_level_and_the_bound_of_a_run_reach_the_weights(monkeypatch, level, bound, weight):
    sampled, own = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.6]]).log()  # k = 0.5 and 3
    monkeypatch.setattr(off_policy, "cut", lambda *_: [])
    monkeypatch.setattr(off_policy, "piece_logprobs", lambda *_: own)
    dist = SimpleNamespace(gather=lambda x: x, sum=lambda *values: [float(v) for v in values])
    c = settings(correction="truncate", correction_level=level, correction_bound=bound, old_logprobs="trainer")
    c.sampler_dtype, c.stale, c.micro_batch, c.temperature = "int8", 0, 2, 1.0
    rollout = SimpleNamespace(logprobs=sampled, mask=torch.ones(1, 2, dtype=torch.bool))
    _, weights, _ = off_policy.off_policy(SimpleNamespace(prompts=[0], rollout=rollout), None, c, None, 0, dist)
    assert weights[0].tolist() == pytest.approx([weight] * 2)


def settings(**changes):
    plain = dict(correction="none", correction_level=None, correction_bound=None, old_logprobs="sampler")
    return SimpleNamespace(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(correction="truncate"), "--correction truncate weighs twice with --old_logprobs sampler"),
        (dict(correction_level="sequence"), "--correction_level has no meaning with --correction none"),
        (
            dict(correction_bound=3.0, old_logprobs="trainer"),
            "--correction_bound has no meaning with --correction none",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        check_sampler(settings(**changes))
    assert "\n" not in str(error.value)
    check_sampler(settings(correction="truncate", old_logprobs="trainer"))
    check_sampler(settings(correction="mask"))
