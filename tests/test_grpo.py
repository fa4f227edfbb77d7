"""grpo.py: rewards, advantages and loss against plain loops, its estimators against exact expectations, the invariances
of a step (micro-batches, ranks, resuming), and runs whose reward must rise."""

import contextlib
import copy
import itertools
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    assert_rate_clip_decay,
    assert_refused,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    assert_the_start_is_kept,
    flags_of,
    metrics,
    script,
    weights,
)

import data
import grpo
from data import Problem, load_problems
from evaluate import METRICS
from generate import Rollout
from grpo import Config, group_advantages, grpo_loss, less_baseline
from lora import LoraConfig
from support import devices, grpo_report, held_out, off_policy, policy_run, ppo_report, questions, rollouts
from support.checkpoints import open_checkpoint
from support.cli import run_script
from support.errors import ConfigError, DivergedError
from support.off_policy import rounded
from support.rewards import load_reward, reward_functions, score
from support.rollouts import Batch
from transformer import Transformer, TransformerConfig, token_logprobs

SMALL = dict(init="start", steps=3, prompts=4, rollouts=4, max_new_tokens=6, warmup=1, eval_every=2, eval_problems=3)
SMALL |= dict(test_problems=4, pass_problems=2, pass_samples=2, sample_every=2, micro_batch=16, lr=1e-3, device="cpu")
SMALL |= dict(format_weight=0.5, optimizer="adamw", minibatches=1, beta=0.0)


def config(**changes):
    return Config(**(SMALL | changes))


# ------------------------------------------------------------------------------------------------ rewards

SEVEN = Problem("q", "3 + 4 = 7\n#### 7", "7", 1, "x")


@pytest.mark.parametrize(
    ("text", "ended", "expected"),  # correct, format, brevity
    [
        ("3 + 4 = 7\n#### 7", True, (1, 1, 1)),
        ("3 + 4 = 7\n#### 7", False, (1, 0, 1)),  # cut off: it never stopped
        ("3 + 4 = 8\n#### 8", True, (0, 1, 1)),
        ("#### 5\n#### 7", True, (0, 0, 1)),  # two answers, one of them right: neither counts
        ("#### 7\n#### 7", True, (1, 0, 1)),
        ("the answer is 7", True, (0, 0, 1)),
        ("the answer to this is 7", True, (0, 0, 0)),
        ("#### 7 apples", True, (1, 0, 1)),
        ("#### 1,2", True, (0, 0, 1)),  # looks like a number, and the verifier reads none
        ("#### ٧", True, (0, 0, 1)),
        ("#### 7.5", True, (0, 1, 1)),
        ("", True, (0, 0, 1)),
    ],
)
def test_rewards(text, ended, expected):
    got = score(grpo.REWARDS, [text, "x" * 99], [SEVEN, SEVEN], [ended, True])
    assert tuple(values[0].item() for values in got.values()) == expected
    assert list(got) == ["correct", "format", "brevity"]
    assert all(values[1] == 0 for values in got.values())


OWN = """
def letters(texts, problems, ended):
    assert len(texts) == len(problems) == len(ended)
    return [float("e" in text) for text in texts]
def vowels(texts, problems, ended): return [float("a" in text) for text in texts]
def short(texts, problems, ended): return [1.0]
def scalar(texts, problems, ended): return 1.0
def nan(texts, problems, ended): return [0.0] * (len(texts) - 1) + [float("nan")]
def raises(texts, problems, ended): return [1 / 0 for _ in texts]
def words(texts, problems, ended): return ["good" for _ in texts]
def correct(texts, problems, ended): return [1.0 for _ in texts]
kl = correct
number = 3
"""


@pytest.fixture
def own(scratch, monkeypatch):
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])  # load_reward adds the current directory, here for this test alone
    (scratch / "own.py").write_text(OWN, encoding="utf-8")


def test_a_reward_of_your_own(own):
    name, function = load_reward("own:letters")
    assert score({name: function}, ["e", "a"], [SEVEN] * 2, [True] * 2)["letters"].tolist() == [1.0, 0.0]
    judge = torch.nn.Linear(1, 1)  # a classifier's answer comes with a graph, which is not to go into the loss
    assert not score({"own": lambda t, p, e: judge(torch.ones(2, 1))[:, 0]}, ["e", "a"], [SEVEN] * 2, [True] * 2)[
        "own"
    ].requires_grad
    functions, weights = reward_functions(
        config(reward="own:letters", reward_weight=0.7, correct_weight=0.0), grpo.REWARDS
    )
    assert weights == {"format": 0.5, "letters": 0.7}
    assert list(functions) == ["correct", "format", "brevity", "letters"]
    with pytest.raises(ConfigError, match="--reward_weight has no use without --reward: leave it out"):
        reward_functions(config(reward_weight=0.7), grpo.REWARDS)


def test_a_reward_may_use_others_of_its_own_when_it_is_called(scratch, monkeypatch):
    (scratch / "neighbour.py").write_text("def ones(n): return [1.0] * n", encoding="utf-8")
    (scratch / "late.py").write_text(
        "import sys\nsys.path.append('/mine')\n"
        "def reward(texts, problems, ended):\n    from neighbour import ones\n    return ones(len(texts))\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(scratch))])
    for name in ("late", "neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    name, function = load_reward("late:reward")
    assert score({name: function}, ["a", "b"], [SEVEN] * 2, [True] * 2)["reward"].tolist() == [1.0, 1.0]
    assert "/mine" in sys.path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", r"'short' returned shape \(1,\) for 3 completions"),
        ("scalar", r"'scalar' returned shape \(\)"),
        ("nan", "'nan' is nan for the completion 'c'"),
        ("raises", "'raises' raised ZeroDivisionError: division by zero"),
        ("words", "'words' raised"),
    ],
)
def test_a_broken_reward_is_named(own, name, words, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")  # whose errors `run` does not print
    _, function = load_reward(f"own:{name}")
    with pytest.raises(ConfigError, match=words) as error:
        score({name: function}, ["a", "b", "c"], [SEVEN] * 3, [True] * 3)
    assert "\n" not in str(error.value)
    assert str(error.value) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothing:f", "ModuleNotFoundError"),
        ("own:f", "AttributeError"),
        ("own", "--reward own: AttributeError"),
        ("own:number", "not a function"),
        ("own:correct", "correct is taken"),
        ("own:kl", "kl is taken"),
    ],
)
def test_a_reward_that_is_not_there(own, path, words):
    with pytest.raises(ConfigError, match=words):
        load_reward(path, taken={*grpo.REWARDS, "kl"})


def test_a_reward_that_exits_does_not_end_the_run(scratch, monkeypatch):
    """A script without `if __name__ == "__main__"`; a function that calls exit."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (scratch / "leaves.py").write_text("raise SystemExit(0)\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--reward leaves:f: SystemExit"):
        load_reward("leaves:f")
    with pytest.raises(ConfigError, match="reward 'exit' raised SystemExit"):
        score({"exit": lambda *_: sys.exit()}, ["a"], [SEVEN], [True])


# ------------------------------------------------------------------------------------------------ advantages


def test_a_baseline_by_hand():
    rewards = torch.tensor([[2.0, 0.0, 1.0], [0.1, 0.1, 0.1], [4.0, 0.0, 0.5]], dtype=torch.float64)
    assert less_baseline(rewards[:1]).tolist() == [[1.0, -1.0, 0.0]]
    assert less_baseline(rewards, "none") is rewards
    others = [[r - (sum(row) - r) / 2 for r in row] for row in rewards.tolist()]  # less the mean of the other two
    torch.testing.assert_close(less_baseline(rewards, "leave_one_out"), torch.tensor(others, dtype=torch.float64))
    for baseline in ("mean", "leave_one_out"):
        assert (less_baseline(rewards, baseline)[1] == 0).all()  # 0.1 is no float: no rounding leaks
        assert less_baseline(rewards[:, :1], baseline).tolist() == [[0.0]] * 3
    with pytest.raises(ConfigError, match="--baseline 'median' is not known"):
        less_baseline(rewards, "median")


def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 6.0]])
    s = math.sqrt(1 / 3)  # of (1, 0, 0, 1), ddof 1
    a = 0.5 / (s + 1e-4)
    assert group_advantages(r)[0].tolist() == pytest.approx([a, -a, -a, a])
    assert group_advantages(r)[1].tolist() == pytest.approx([-1 / 2.0001] * 3 + [3 / 2.0001])
    of_others = group_advantages(r, "group", "leave_one_out")  # R / (R − 1) times as far off, over the rewards' std
    assert of_others[0].tolist() == pytest.approx([4 / 3 * x for x in (a, -a, -a, a)])
    assert group_advantages(r, "none").tolist() == [[0.5, -0.5, -0.5, 0.5], [-1, -1, -1, 3]]
    everyone = r.flatten().tolist()
    mean = sum(everyone) / 8
    std = math.sqrt(sum((x - mean) ** 2 for x in everyone) / 7)
    assert group_advantages(r, "batch")[1, 3].item() == pytest.approx(3 / (std + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_value_is_exactly_zero(scale):
    r = torch.full((3, 7), 0.1)  # 0.1 is no float: the mean's rounding must not leak
    r[2, 0] = 1.1
    got = group_advantages(r, scale)
    assert (got[:2] == 0).all()
    assert got[2].abs().min() > 0
    assert torch.equal(group_advantages(torch.tensor([[3.0], [5.0]]), scale), torch.zeros(2, 1))


def test_advantages_ignore_shift_and_scale():
    torch.manual_seed(0)
    r = torch.randn(4, 6)
    torch.testing.assert_close(group_advantages(3 * r + 7), group_advantages(r), atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ loss


def batch(B=5, T=7):
    torch.manual_seed(0)
    new = (-torch.rand(B, T, dtype=torch.float64) * 2).requires_grad_()
    old, ref = new.detach() + 0.4 * torch.randn(B, T), new.detach() + 0.4 * torch.randn(B, T)
    mask = torch.arange(T) < torch.tensor([[7], [3], [1], [5], [4]])[:B]
    A = torch.tensor([-0.8, 0.6, 1.1, 0.5, -1.7], dtype=torch.float64)[:B]  # both sides of the clip act
    return new, old, ref, A, mask


def by_loop(new, old, ref, A, mask, beta, low, high, loss_type, ratio, max_length):
    """The formulas of TRL 1.16, GRPOTrainer._compute_loss, with one optimizer step per batch, as plain loops."""
    B, tokens, total = len(mask), int(mask.sum()), 0.0
    for i in range(B):
        real = [t for t in range(mask.shape[1]) if mask[i, t]]
        log_ratio = {t: new[i, t] - old[i, t] for t in real}
        if ratio == "sequence":
            mean = sum(log_ratio.values()) / max(1, len(real))
            log_ratio = dict.fromkeys(real, mean)
        row = 0.0
        for t in real:
            coef_1 = torch.exp(log_ratio[t])
            coef_2 = min(max(coef_1, torch.tensor(1 - low)), torch.tensor(1 + high))
            d = ref[i, t] - new[i, t]
            row = row - min(coef_1 * A[i], coef_2 * A[i]) + beta * (torch.exp(d) - d - 1)
        divide = {"grpo": max(1, len(real)) * B, "dapo": tokens, "dr_grpo": B * max_length}
        total = total + row / divide[loss_type]
    return total


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_against_a_loop(loss_type, ratio, beta):
    new, old, ref, A, mask = batch()
    mask[3] = False  # a completion that is masked out still counts in the denominators
    loss, figures = grpo_loss(new, old, A, mask, ref, beta, 0.2, 0.28, loss_type, ratio=ratio, max_length=9)
    expected = by_loop(new, old, ref, A, mask, beta, 0.2, 0.28, loss_type, ratio, 9)
    torch.testing.assert_close(loss, expected)
    assert figures["loss"] == pytest.approx(loss.item())
    (ours,) = torch.autograd.grad(loss, new)
    (theirs,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(ours, theirs)
    assert (ours[~mask] == 0).all()
    assert (ours[mask] != 0).any()
    d = (ref - new)[mask]
    assert figures["kl"] == pytest.approx((d.exp() - d - 1).mean().item())
    log_rho = (new - old).detach() * mask
    if ratio == "sequence":
        log_rho = (log_rho.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask)
    rho, up = log_rho.exp()[mask], (A > 0)[:, None].expand_as(mask)[mask]
    stopped = up & (rho > 1.28), ~up & (rho < 0.8)
    assert all(side.any() for side in stopped)
    logged = {"clip_fraction": sum(stopped).double().mean().item(), "ratio_max": rho.max().item()}
    logged |= {"ratio_spread": (rho - 1).abs().mean().item()}
    assert {name: figures[name] for name in logged} == pytest.approx(logged)


@pytest.mark.parametrize("kl", ["k1", "k2"])
def test_the_logged_kl_is_k3_whatever_is_paid(kl):
    new, old, ref, A, mask = batch()
    figures = grpo_loss(new, old, A, mask, ref, 0.3, kl=kl, kl_unbiased=kl == "k1")[1]
    d = (ref - new)[mask]
    assert figures["kl"] == pytest.approx((d.exp() - d - 1).mean().item())


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
    loss, figures = grpo_loss(new, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1))
    assert loss.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.item() == pytest.approx(-A * ratio if moves else 0.0)
    assert figures["clip_fraction"] == (not moves)


@pytest.mark.parametrize(("A", "ratio", "moves"), [(1.0, 1.25, True), (1.0, 1.3, False), (-1.0, 0.85, False)])
def test_the_clip_can_be_wider_upwards(A, ratio, moves):
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss, _ = grpo_loss(new, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1), clip_low=0.1, clip_high=0.28)
    assert (torch.autograd.grad(loss, new)[0].item() != 0) == moves


def test_advantages_may_be_of_each_token():
    new, old, ref, A, mask = batch()

    def by(advantages):
        new.grad = None
        loss, metrics = grpo_loss(new, old, advantages, mask, ref, beta=0.3)
        loss.backward()
        return loss.detach(), new.grad, metrics

    for same in (A[:, None], A[:, None].expand_as(mask)):
        torch.testing.assert_close(by(same), by(A))
    per_token = torch.randn(mask.shape, dtype=torch.float64)
    each = [by(torch.where(torch.arange(7) == t, per_token, 0.0)) for t in range(7)]
    without = by(torch.zeros(5, dtype=torch.float64))
    total = sum(loss - without[0] for loss, *_ in each) + without[0]
    torch.testing.assert_close(by(per_token)[0], total)
    of_one = [by(per_token[:, t]) for t in range(7)]  # as if all of an answer's tokens had that of token t
    gradient = torch.stack([grad[:, t] for t, (_, grad, _) in enumerate(of_one)], 1)
    torch.testing.assert_close(by(per_token)[1], gradient)


def test_the_ratio_has_its_gradient_from_the_new_log_probabilities_alone():
    new, _, _, A, mask = batch()
    gradients = []
    for old in (new, new.detach()):
        new.grad = None
        grpo_loss(new, old, A, mask)[0].backward()
        gradients.append(new.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.01


def test_a_sequence_is_clipped_as_a_whole():
    old = torch.zeros(2, 4)
    new = torch.tensor([[2.0, 0.1, 0.1, 0.1], [0.1, 0.0, 0.1, 0.0]], requires_grad=True)  # mean log ratio 0.575, 0.05
    ones = torch.ones(2, 4)
    loss, figures = grpo_loss(new, old, torch.ones(2), ones, ratio="sequence")
    (gradient,) = torch.autograd.grad(loss, new)
    assert (gradient[0] == 0).all()
    torch.testing.assert_close(gradient[1], torch.full((4,), -math.exp(0.05) / 8))
    assert figures["clip_fraction"] == 0.5
    by_token = torch.autograd.grad(grpo_loss(new, old, torch.ones(2), ones)[0], new)[0]
    assert by_token[0].ne(0).tolist() == [False, True, True, True]


def policies():
    torch.manual_seed(1)
    theta = torch.randn(5, dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    return theta, theta.log_softmax(0), ref


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_unbiased_kl_has_the_gradient_of_the_kl(kind, ratio):
    """Completions of two tokens, drawn from an older policy, the second whatever the first: Σ π_old · loss, exactly."""
    theta, log_p, ref = policies()
    older = (theta.detach() + torch.randn(5, dtype=torch.float64)).log_softmax(0)
    forward = (log_p.exp() * (log_p - ref)).sum()
    (expected,) = torch.autograd.grad(forward, theta, retain_graph=True)
    ones, total = torch.ones(1, 2), 0.0
    for both in itertools.product(range(5), repeat=2):
        new, old, reference = (x[list(both)].view(1, 2) for x in (log_p, older, ref))
        options = dict(kl=kind, kl_unbiased=True, ratio=ratio)
        loss, _ = grpo_loss(new, old, torch.zeros(1), ones, reference, 0.7, **options)  # advantage 0: the KL alone
        total = total + old.sum().exp() * loss
    torch.testing.assert_close(total, 0.7 * forward)
    torch.testing.assert_close(torch.autograd.grad(total, theta)[0], 0.7 * expected)


def test_what_stands_outside_the_mask_cannot_matter():
    new, old, ref, A, mask = batch()
    options = dict(ratio="sequence")
    loss, _ = grpo_loss(new, old, A, mask, ref, 0.3, **options)
    for junk in (-1e9, float("inf"), float("nan")):
        wild = [x.masked_fill(~mask, junk) for x in (old, ref)]
        again, _ = grpo_loss(new, wild[0], A, mask, wild[1], 0.3, **options)
        torch.testing.assert_close(again, loss)
        assert torch.autograd.grad(again, new)[0].isfinite().all()


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_log_probabilities_in_bf16_are_computed_in_fp32(loss_type):
    """As in float64 on the same numbers: lengths and token counts above 256 too, which bf16 has not."""
    torch.manual_seed(0)
    new, old, ref = (-1 - torch.rand(3, 3, 301)).bfloat16().unbind()
    A, mask = torch.tensor([1.0, -2.0, 0.5]), torch.arange(301) < torch.tensor([[301], [259], [7]])
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, *others = (t.to(dtype) for t in (new, old, A, ref))
        loss, figures = grpo_loss(x.requires_grad_(), *others[:2], mask, others[2], 0.3, loss_type=loss_type)
        results.append([loss, torch.autograd.grad(loss, x)[0], figures])
    (loss, gradient, figures), (exact, by_float64, expected) = results
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    torch.testing.assert_close(gradient, by_float64.bfloat16(), atol=1e-9, rtol=2**-8)  # to its last bit
    assert figures == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("sign", "value"), [(1.0, 1.2), (-1.0, math.exp(80))])
def test_a_product_of_ratios_never_overflows(sign, value):
    """log ρ is 110 in all: the clip stops the answer if A > 0. The other answer's gradient is what it is alone."""
    new = torch.tensor([[60.0, 50.0], [0.1, 0.0]], requires_grad=True)
    loss, figures = grpo_loss(new, torch.zeros(2, 2), torch.tensor([sign, 1.0]), torch.ones(2, 2), ratio="product")
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx(-(sign * value + math.exp(0.1)) / 2, rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [-math.exp(0.1) / 4 * 2] * 2]))
    assert figures["ratio_max"] == pytest.approx(math.exp(80), rel=1e-4)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_any_cut_gives_the_same_gradient(loss_type):
    new, old, ref, A, mask = batch()
    step = dict(n_answers=5, n_tokens=int(mask.sum()), max_length=7, ratio="sequence")
    (whole,) = torch.autograd.grad(grpo_loss(new, old, A, mask, ref, 0.3, loss_type=loss_type, **step)[0], new)
    parts = 0.0
    for rows in ([0, 3], [1], [2, 4]):
        T = int(mask[rows].sum(1).max())
        cut = [x[rows, :T] for x in (new, old)], [x[rows, :T] for x in (mask, ref)]
        parts = parts + grpo_loss(*cut[0], A[rows], *cut[1], 0.3, loss_type=loss_type, **step)[0]
    torch.testing.assert_close(torch.autograd.grad(parts, new)[0], whole)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    """A random model of the problems' tokens."""
    path = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    shape = dict(context=160, n_layer=1, n_head=2, n_kv_head=1, width=16)
    Transformer(TransformerConfig(tokenizer.vocab_size, **shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def letter(which):
    return lambda texts, problems, ended: [float(which in text) for text in texts]


@pytest.fixture
def here(scratch, start, monkeypatch):
    """A directory with a start, few problems, no pictures, and rewards that a random model earns half of the time."""
    (scratch / "start").symlink_to(start)
    few = {split: load_problems("word", split, 60) for split in ("train", "valid", "test")}
    monkeypatch.setattr(questions, "load_problems", lambda name, split, n, *more: few[split][:n])
    monkeypatch.setattr(grpo_report, "draw_curves", lambda *_: None)
    monkeypatch.setitem(grpo.REWARDS, "correct", letter("e"))
    monkeypatch.setitem(grpo.REWARDS, "format", letter("a"))
    return scratch


@pytest.fixture
def spied(monkeypatch):
    """What a run did: {"batches": [Batch, …], "gradients": [{name: gradient}, …]}, one gradient an optimizer step."""
    seen = {"batches": [], "gradients": []}
    judge_batch, optimizer_step = grpo.judge_batch, grpo.optimizer_step

    def see_batch(functions, batch, config):
        judge_batch(functions, batch, config)
        seen["batches"].append(batch)

    def see_gradient(raw, *args):
        seen["gradients"].append({name: p.grad.clone() for name, p in raw.named_parameters() if p.grad is not None})
        return optimizer_step(raw, *args)

    for module in (grpo, rollouts):  # of a step, and of a refill
        monkeypatch.setattr(module, "judge_batch", see_batch)
    monkeypatch.setattr(grpo, "optimizer_step", see_gradient)
    return seen


def assert_same_gradient(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_first_step_is_reinforce_with_a_group_baseline(here, spied, loss_type):
    scale = "none" if loss_type == "dr_grpo" else "group"
    grpo.main(config(steps=1, loss_type=loss_type, scale=scale, temperature=0.8, micro_batch=8))
    (rolled,) = spied["batches"]
    raw, total = Transformer.from_pretrained("start").eval(), 0.0
    reward = rolled.rewards["correct"] + 0.5 * rolled.rewards["format"]
    for g in range(4):
        for r in range(4):
            row = 4 * g + r
            baseline = reward[g].mean()
            A = (reward[g, r] - baseline) / (1 if loss_type == "dr_grpo" else reward[g].std() + 1e-4)
            n = int(rolled.rollout.mask[row].sum())
            tokens = torch.tensor([rolled.prompts[g] + rolled.rollout.ids[row, :n].tolist()])  # alone, not packed
            logprobs = token_logprobs(raw, tokens, 0.8)[0, -n:]
            divide = {"grpo": 16 * n, "dapo": int(rolled.rollout.mask.sum()), "dr_grpo": 16 * 6}
            total = total - A * logprobs.sum() / divide[loss_type]
    total.backward()
    expected = {name: p.grad for name, p in raw.named_parameters()}
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    assert_same_gradient(spied["gradients"][0], expected)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_micro_batches_change_nothing(here, spied, loss_type):
    for size in (64, 3):
        grpo.main(config(steps=1, name=f"n{size}", micro_batch=size, loss_type=loss_type, beta=0.1, inner_epochs=2))
    assert len(spied["gradients"]) == 4
    for one, other in zip(spied["gradients"][:2], spied["gradients"][2:], strict=True):
        assert_same_gradient(one, other)
    assert metrics("runs/n64", "ratio_spread")[1] > 1e-5  # of the second update; in the first it is 0
    for name in ("kl", "clip_fraction", "ratio_spread", "ratio_max", "loss"):
        values = [metrics(f"runs/n{size}", name)[1] for size in (64, 3)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-6), name


def test_first_ratio_is_one_and_later_ones_are_not(here, spied):
    grpo.main(config(name="a"))
    assert all(r == pytest.approx(1.0, abs=1e-4) for r in metrics("runs/a", "ratio_max").values())
    assert len(spied["gradients"]) == 3
    grpo.main(config(name="b", lr=1e-2, steps=1, inner_epochs=3, minibatches=2))
    assert max(metrics("runs/b", "ratio_max").values()) > 1.01
    assert len(spied["gradients"]) == 3 + 6


def test_the_defaults_run_the_algorithm(here, spied):
    """Without a flag the ratio leaves 1, the clip acts, and the KL costs."""
    defaults = {
        name: getattr(Config(), name) for name in ("minibatches", "inner_epochs", "beta", "clip_low", "clip_high")
    }
    grpo.main(config(lr=3e-2, warmup=0, steps=2, prompts=6, **defaults))
    assert len(spied["gradients"]) > 2
    assert min(metrics("runs/grpo", "ratio_spread").values()) > 0.01
    assert max(metrics("runs/grpo", "clip_fraction").values()) > 0
    assert metrics("runs/grpo", "kl")[2] > 0
    grpo.main(config(lr=3e-2, warmup=0, steps=2, prompts=6, name="free", **(defaults | {"beta": 0.0})))
    pulled, free = (
        spied["gradients"][: len(spied["gradients"]) // 2],
        spied["gradients"][len(spied["gradients"]) // 2 :],
    )
    assert any((pulled[-1][name] - free[-1][name]).norm() > 1e-3 * free[-1][name].norm() for name in free[-1])


@pytest.mark.parametrize(("beta", "loss_type"), [(0.0, "grpo"), (3.0, "grpo"), (3.0, "dapo")])
def test_groups_without_a_signal_pay_the_kl_only_when_asked(here, spied, monkeypatch, beta, loss_type):
    """Their answers and tokens count either way."""

    def long_questions(texts, problems, ended):  # the same for a whole group, unless its prompt is a long one
        return [float("e" in t) * (len(p.question) > 80) for t, p in zip(texts, problems, strict=True)]

    monkeypatch.setitem(grpo.REWARDS, "correct", long_questions)
    for skip in (True, False):
        flags = dict(steps=1, inner_epochs=2, prompts=8, lr=1e-2, warmup=0, beta=beta, format_weight=0.0)
        grpo.main(config(name=f"skip_{skip}", skip_zero_variance=skip, loss_type=loss_type, **flags))
    assert 0 < metrics("runs/skip_True", "zero_variance")[1] < 1
    left_out, paid = spied["gradients"][:2], spied["gradients"][2:]
    assert_same_gradient(left_out[0], paid[0])  # at the reference itself the KL has no gradient
    apart = max(((left_out[1][name] - paid[1][name]).norm() / paid[1][name].norm()).item() for name in paid[1])
    assert apart > 0.01 if beta else apart < 1e-4


def test_the_unbiased_kl_reaches_the_loss(here, spied):
    """At the reference itself both KLs have no gradient; after a step they have different ones."""
    for unbiased in (False, True):
        grpo.main(config(steps=1, beta=3.0, inner_epochs=2, lr=1e-2, kl_unbiased=unbiased))
    plain, corrected = spied["gradients"][:2], spied["gradients"][2:]
    assert_same_gradient(plain[0], corrected[0])
    assert any((plain[1][name] - corrected[1][name]).norm() > 0.05 * plain[1][name].norm() for name in plain[1])


@pytest.mark.parametrize(
    ("flags", "unbiased"),
    [
        ({}, True),
        ({"kl": "k1"}, True),
        ({"kl": "k2"}, False),
        ({"kl_in": "reward"}, False),
        ({"kl_unbiased": False}, False),
    ],
)
def test_the_kl_has_the_right_gradient_by_default(flags, unbiased):
    """Times ρ where that is the gradient of KL(π ‖ π_ref): k2 has it already, and in the reward nothing is derived."""
    assert Config(**flags).kl_unbiased is unbiased


def test_minibatches_share_out_the_groups(here, spied):
    grpo.main(config(steps=1, minibatches=2, loss_type="dr_grpo", lr=1e-30, warmup=0))  # it stands still
    grpo.main(config(steps=1, name="whole", loss_type="dr_grpo"))
    *halves, whole = spied["gradients"]
    mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}
    assert_same_gradient(mean, whole)


def test_truncated_completions_push_nothing_if_masked(here, spied):
    options = dict(steps=1, max_new_tokens=6, loss_type="dapo", beta=0.1)
    grpo.main(config(**options, mask_truncated=True, refill=2, skip_zero_variance=False))
    assert [len(rolled.problems) for rolled in spied["batches"]] == [4, 4, 4]  # no group has a gradient
    assert not any(rolled.ended.any() for rolled in spied["batches"])  # a random model does not stop in 6 of 400 tokens
    assert spied["gradients"] == []  # not even a step on a gradient of 0
    assert metrics("runs/grpo", "truncated")[1] == metrics("runs/grpo", "zero_variance")[1] == 1.0
    grpo.main(config(**options))
    assert max(g.abs().max() for g in spied["gradients"][0].values()) > 0


def test_only_answers_that_were_cut_off_are_masked(here, spied, monkeypatch):
    """They still count among the answers, but not among the tokens, and have length 0."""
    ended, seen, lengths = torch.arange(16).view(4, 4) % 5 > 1, [], []

    def some_end(self, *args, ask=grpo.Sampler.__call__):
        rolled = ask(self, *args)
        rolled.ended = ended.clone()
        return rolled

    def compare(rewards, weights, config, n=None):
        lengths.append(n)
        return grpo.advantages_of(rewards, weights, config, n)

    monkeypatch.setattr(grpo.Sampler, "__call__", some_end)
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a, **k: seen.append((a[3], k)) or grpo_loss(*a, **k))
    options = dict(loss_type="dapo", beta=0.1, skip_zero_variance=False, record_groups=0, watch=0)
    grpo.main(config(steps=1, mask_truncated=True, **options), compare)
    expected = spied["batches"][0].rollout.mask.sum(1).view(4, 4) * ended
    ((mask, counts),) = seen
    assert sorted(mask.any(1).view(4, 4).tolist()) == sorted(ended.tolist())  # a piece has its groups in another order
    assert (counts["n_answers"], counts["n_tokens"]) == (16, expected.sum())
    assert torch.equal(lengths[-1], expected)


def test_overlong_answers_are_punished_softly(here, spied):
    grpo.main(config(steps=1, overlong=4))
    (rolled,) = spied["batches"]
    lengths = rolled.rollout.mask.sum(1).view(4, 4)
    expected = -((lengths - 2).clamp(min=0) / 4)  # 0 up to 2 of 6 tokens, −1 at 6
    torch.testing.assert_close(rolled.rewards["overlong"], expected)
    assert metrics("runs/grpo", "reward")[1] == pytest.approx(
        (rolled.rewards["correct"] + 0.5 * rolled.rewards["format"] + expected).mean().item()
    )


def test_refilled_groups_are_fresh_bounded_and_trained(here, spied, monkeypatch):
    def first_letter(texts, problems, ended):  # the same for a whole group, unless its prompt is a long one
        return [float("e" in t) * (len(p.question) > 80) for t, p in zip(texts, problems, strict=True)]

    monkeypatch.setitem(grpo.REWARDS, "correct", first_letter)
    trained = []  # how many answers each forward pass has
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a, **k: trained.append(len(a[2])) or grpo_loss(*a, **k))
    grpo.main(config(steps=1, prompts=8, rollouts=8, refill=3, format_weight=0.0, record_groups=0))
    first, *others = spied["batches"]
    assert 1 <= len(others) <= 3
    sizes = [len(b.problems) for b in others]
    assert sizes == sorted(sizes, reverse=True)  # only what is still without signal is drawn again
    assert metrics("runs/grpo", "zero_variance")[1] == sizes[0] / 8  # of the policy, not of the refilled batch
    alive = first.rewards["correct"].std(1) > 0  # `first` was filled up in place
    assert alive.sum() > 8 - sizes[0]
    assert all(len(first.problems[g].question) > 80 for g in alive.nonzero().squeeze(1).tolist())
    assert sum(trained) == 8 * alive.sum()  # a fresh group is trained too


def test_a_refilled_group_is_sampled_with_other_numbers(here, monkeypatch):
    """Those of the first attempt gave a group without a signal: with them a fresh question would do so more often."""
    drawn, generate = [], rollouts.generate
    monkeypatch.setattr(rollouts, "generate", lambda *a, **k: drawn.append(k["uniforms"]) or generate(*a, **k))
    policy, tokenizer, _ = open_checkpoint("start")
    problems = load_problems("word", "train", 8)
    sample = rollouts.Sampler(policy, tokenizer, problems, config(), contextlib.nullcontext)
    for step, attempt in ((0, 0), (0, 1), (0, 2), (1, 0)):
        sample(step, [0, 1], attempt)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_a_batch_takes_over_a_group_whole(here, spied):
    grpo.main(config(steps=1, name="a"))
    grpo.main(config(steps=1, name="b", seed=1, max_new_tokens=9))
    old, new = spied["batches"]
    before = copy.deepcopy(old)
    old.put([2], Batch(
        new.problems[1:2], new.prompts[1:2],
        Rollout(new.rollout.ids[4:8], new.rollout.mask[4:8], new.rollout.logprobs[4:8]),
        new.texts[4:8], new.ended[1:2], {k: v[1:2] for k, v in new.rewards.items()},
    ))  # fmt: skip
    assert old.texts == before.texts[:8] + new.texts[4:8] + before.texts[12:]
    assert old.prompts[2] == new.prompts[1]
    assert torch.equal(old.rollout.ids[8:12], new.rollout.ids[4:8])
    assert torch.equal(old.rollout.logprobs[:8, :6], before.rollout.logprobs[:8])
    assert not old.rollout.mask[:8, 6:].any()
    assert torch.equal(old.rewards["correct"][2], new.rewards["correct"][1])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_in_the_reward_lowers_what_went_far(here, monkeypatch, kind):
    """Where every rollout earns the same, what is left is −β times the KL less its mean, not divided by any std."""
    seen, kls = [], []

    def reference_logprobs(reference, raw, pieces, batch, *more, true=grpo.reference_logprobs):
        ref = true(reference, raw, pieces, batch, *more)
        apart = batch.rollout.logprobs - ref
        of_tokens = apart if kind == "k1" else (-apart).exp() - 1 + apart
        kls.append((of_tokens * batch.rollout.mask).sum(1).view(-1, 4))
        return ref

    def grpo_loss(logprobs, old, advantages, *more, true=grpo.grpo_loss, **options):
        seen.extend(advantages.tolist() if len(kls) == 2 else [])
        return true(logprobs, old, advantages, *more, **options)

    monkeypatch.setattr(rollouts, "reference_logprobs", reference_logprobs)
    monkeypatch.setattr(grpo, "grpo_loss", grpo_loss)
    pull = [1.0]  # the first step moves the policy away from the reference; in the second nothing is earned

    def estimate(rewards, weights, config, lengths=None):
        assert list(weights) == ["correct", "format"]
        advantages = torch.randn(rewards.shape[:2], generator=torch.Generator().manual_seed(0))
        return advantages * pull[0], {}

    def step_over(*args, true=grpo.optimizer_step, **options):
        pull[0] = 0.0
        return true(*args, **options)

    monkeypatch.setattr(grpo, "optimizer_step", step_over)
    grpo.main(config(steps=2, beta=0.2, kl=kind, kl_in="reward", lr=1e-2, record_groups=0), estimate)
    assert kls[0].abs().max() < 1e-4 < kls[1].abs().max()
    expected = -0.2 * (kls[1] - kls[1].mean(1, keepdim=True))
    torch.testing.assert_close(torch.tensor(sorted(seen)), expected.flatten().sort().values, atol=1e-6, rtol=1e-5)


def test_the_start_is_the_best_until_something_beats_it(here):
    grpo.main(config(steps=2, lr=0.0))
    assert_same_weights("start", "runs/grpo/best")


@pytest.mark.parametrize("answered", [0, 1, 60])  # of three: one does not speak for them. All: being right is not paid
def test_without_answers_the_best_is_what_earns_the_most(here, monkeypatch, answered):
    few = load_problems("word", "train", 60)
    few[answered:] = [replace(p, answer="") for p in few[answered:]]
    monkeypatch.setattr(
        questions, "load_problems", lambda name, split, n, levels, skip_bad: few[:n] if skip_bad else []
    )
    paid = iter([1.0, 3.0, 2.0])  # the greedy answers of the start, and of steps 2 and 3

    def reward(texts, problems, ended):
        return [next(paid)] * 3 if len(texts) == 3 else letter("a")(texts, problems, ended)

    monkeypatch.setitem(grpo.REWARDS, "format", reward)
    grpo.main(config(data="few.jsonl", correct_weight=0.0, overlong=3, skip_bad=True))
    assert metrics("runs/grpo", "valid_reward") == {0: -0.5, 2: 0.5, 3: 0.0}  # half of it, less 1: they are cut off
    best, last, start = (weights(path) for path in ("runs/grpo/best", "runs/grpo/last", "start"))
    for other in (start, last):
        assert any((best[name] != other[name]).any() for name in best)


def test_problems_without_an_answer_are_refused(here, monkeypatch):
    monkeypatch.setattr(questions, "load_problems", data.load_problems)
    lines = [json.dumps({"instruction": f"Say {i}.", "output": "Something."}) for i in range(80)]
    (here / "talk.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"of talk\.jsonl have no answer after ####"):
        grpo.main(config(data="talk.jsonl", max_new_tokens=4))


def test_the_reference_moves_when_asked(here):
    options = dict(steps=4, beta=1e-6, lr=1e-2, eval_every=9)
    grpo.main(config(name="kept", **options))
    grpo.main(config(name="moved", refresh_reference=2, **options))
    kept, moved = metrics("runs/kept", "kl"), metrics("runs/moved", "kl")
    assert kept[2] > 1e-5
    assert moved[3] == pytest.approx(0.0, abs=1e-6) != kept[3]  # at the start of step 3 they are one
    assert moved[4] > 1e-5


EVERYTHING = dict(beta=0.05, minibatches=2, inner_epochs=2, refill=1, refresh_reference=2, mask_truncated=True)
EVERYTHING |= dict(max_new_tokens=12, overlong=3, scale="batch", lr=1e-2, optimizer="muon")
STALE = dict(stale=2, sampler_dtype="int8", old_logprobs="trainer", correction="mask", correction_level="geometric")


WHITENED = {"algorithm": "reinforce++-baseline", "beta": 0.05, "minibatches": 2, "refill": 1, "max_new_tokens": 40}
AS_RLOO = {"algorithm": "rloo", "beta": 0.05, "minibatches": 2, "lr": 1e-2}
OLD_INT8 = STALE | {"lr": 3e-2}
WITH_LORA = {"lora": LoraConfig(2), "beta": 0.05, "lr": 1e-2}


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(grpo)
    grpo.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2))
    assert_rate_clip_decay(seen, "linear", 0.0, betas=(0.9, 0.999))


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, WITH_LORA, WHITENED, AS_RLOO, {"algorithm": "cispo"}, OLD_INT8, OLD_INT8 | WITH_LORA]
)
def test_resumed_equals_uninterrupted_bit_for_bit(here, options):
    options = dict(steps=4, eval_every=2) | options
    names = ("reward", "loss", "kl", "accuracy", "zero_variance")
    whole, parts = assert_resumed_equals_whole(grpo, config, 3, names, **options)
    assert max(metrics("runs/whole", "grad_norm").values()) > 0
    assert {k: whole[k] for k in ("before", "after", "kl")} == {k: parts[k] for k in ("before", "after", "kl")}


def test_a_sharded_run_in_bf16_ends_with_its_table(here, own):
    """FSDP gathers bf16 weights there, and the report's KL meets them too."""
    flags = SMALL | dict(steps=1, name="sharded", fsdp=True, dtype="bf16", beta=0.05)
    process = script("grpo.py", *flags_of(flags), cwd=here, processes=2)
    assert process.returncode == 0, process.stderr
    assert "KL to the start" in process.stdout


STALE_BY_TOKEN = STALE | {"stale": 1, "correction_level": "token", "correction_bound": 1.1}


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("grpo", {}),
        ("rloo", {}),
        ("reinforce++-baseline", {}),
        ("grpo", STALE_BY_TOKEN),
        ("grpo", {"fsdp": True, "micro_batch": 5, "minibatches": 1, "refill": 0, "kl": "k3", "kl_in": "loss"}),
    ],
)
def test_two_processes_equal_one(here, own, scaled, monkeypatch, algorithm, more):
    known = [p for split in ("train", "valid", "test") for p in load_problems("word", split, 60)]
    (here / "p.jsonl").write_text(
        "".join(json.dumps({"question": p.question, "answer": "None to check."}) + "\n" for p in known),
        encoding="utf-8",
    )
    flags = SMALL | EVERYTHING | dict(data="p.jsonl", steps=2, rollouts=5, refill=2, kl="k1", kl_in="reward")
    flags |= dict(correct_weight=0.0, format_weight=0.0, reward="own:letters", name="two")
    flags |= dict(refresh_reference=0, mask_truncated=False) | more
    if algorithm != "grpo":
        flags |= dict(algorithm=algorithm, max_new_tokens=40, lr=1e-4)  # a product of ratios is soon clipped
        flags = {k: v for k, v in flags.items() if k not in ("scale", "kl", "kl_in")}  # as the row has them
    process = script("grpo.py", *flags_of(flags), cwd=here, processes=2)
    assert process.returncode == 0, process.stderr
    assert "KL to the start" in process.stdout
    assert (here / "runs/two/curves.png").stat().st_size > 0
    monkeypatch.setattr(questions, "load_problems", load_problems)
    scaled("support.policy_run")  # in one process; it changes nothing
    grpo.main(Config(**(flags | {"name": "one", "fsdp": False})))
    names = ("reward", "grad_norm", "kl", "length", "zero_variance", "valid_reward", "entropy", "loss")
    off_policy = "stale" in more
    weights_differ = ("sampler_kl", "sampler_weight", "sampler_limited", "sampler_ratio_max") if off_policy else ()
    assert_same_metrics("runs/one", "runs/two", names + weights_differ, rel=1e-3, abs=1e-6)
    assert min(metrics("runs/one", "grad_norm").values()) > 0
    if off_policy:
        assert 0 < metrics("runs/one", "sampler_limited")[2] < 1
    elif "fsdp" in more:  # one silent group: a rank has one piece in a minibatch, the other two
        assert 1 / 4 in metrics("runs/one", "zero_variance").values()
    else:
        assert max(metrics("runs/one", "zero_variance").values()) > 0  # so there was something to refill
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-3, rtol=1e-3)


def test_a_run_of_an_earlier_version_is_resumed_if_its_choices_are_the_same(here):
    grpo.main(config(steps=2))
    path = here / "runs/grpo/last/trainer_state.pt"
    state = torch.load(path, weights_only=True)
    for name in ("algorithm", "baseline", "surrogate"):  # which it did not have; its --loss_type dapo set the clip
        del state["config"][name]
    state["config"] |= {"loss_type": "dapo", "clip_high": 0.28}
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"clip_high 0\.28 -> 0\.2, loss_type 'dapo' -> 'grpo'"):
        grpo.main(config(steps=3, resume=True))
    grpo.main(config(steps=3, resume=True, algorithm="dapo"))


def test_a_run_from_a_start_that_has_another_name_now_is_not_resumed(here):
    """This version would make another one."""
    grpo.main(config(steps=2))
    path = here / "runs/grpo/last/trainer_state.pt"
    state = torch.load(path, weights_only=True)
    state["reads"]["the weights of runs/start/word-seed0-sft"] = state["reads"].pop("the weights of start")
    torch.save(state, path)
    with pytest.raises(ConfigError, match="but the weights of runs/start/word-seed0-sft changed since it began"):
        grpo.main(config(steps=3, resume=True))


def test_groups_without_signal_are_skipped_and_counted(here, spied, monkeypatch):
    monkeypatch.setitem(grpo.REWARDS, "correct", lambda texts, problems, ended: [1.0] * len(texts))
    grpo.main(config(format_weight=0.0, weight_decay=0.1))
    assert set(metrics("runs/grpo", "zero_variance").values()) == {1.0}
    assert set(metrics("runs/grpo", "grad_norm").values()) == {0.0}
    assert spied["gradients"] == []
    assert_same_weights("start", "runs/grpo/last")  # not even the decay moves it


def test_lora_trains_the_adapters_alone(here, spied):
    grpo.main(config(lora=LoraConfig(2, targets=["wq", "down"]), beta=0.1, lr=0.1, steps=2, dtype="fp32"))
    assert {name.rpartition(".")[2] for name in spied["gradients"][0]} == {"lora_A", "lora_B"}
    assert metrics("runs/grpo", "kl")[1] == pytest.approx(0.0, abs=1e-6)
    assert metrics("runs/grpo", "kl")[2] > 1e-6  # the reference is the model without its adapters
    a, b = Transformer.from_pretrained("start"), Transformer.from_pretrained("runs/grpo/last")
    moved = {
        name for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True) if (x != y).any()
    }
    assert moved == {"blocks.0.attn.wq.weight", "blocks.0.ffn.down.weight"}  # merged, in a plain checkpoint


@pytest.mark.parametrize(("rank", "refresh"), [(0, 0), (0, 1), (2, 1)])
def test_the_kl_to_the_start(here, monkeypatch, rank, refresh):
    """Of the trained policy to --init, wherever the reference has moved; only then is --init opened again, which a run
    of other settings may have moved; with LoRA without a second model."""
    opened, opens = open_checkpoint, []
    for module in (policy_run, grpo_report):
        monkeypatch.setattr(module, "open_checkpoint", lambda *args: opens.append(args) or opened(*args))
    asked, measure = [], grpo_report.sampled_kl
    monkeypatch.setattr(grpo_report, "sampled_kl", lambda *args, **more: asked.append(args) or measure(*args, **more))
    result = grpo.main(config(lora=LoraConfig(rank), refresh_reference=refresh, lr=0.1, steps=2, dtype="fp32"))
    assert len(opens) == (2 if refresh and not rank else 1)
    policy, origin, *_ = asked[0]
    if rank:
        assert origin is policy
    else:
        start = open_checkpoint("start")[0].state_dict()
        assert all(torch.equal(x, start[name]) for name, x in origin.state_dict().items())
    assert result["kl"] > 1e-6


def test_a_reward_for_a_letter_is_learned(here):
    grpo.main(config(steps=40, lr=1e-2, prompts=8, rollouts=8, format_weight=0.0, eval_every=40, test_problems=1))
    earned = list(metrics("runs/grpo", "reward_correct").values())
    assert sum(earned[-5:]) / 5 > sum(earned[:5]) / 5 + 0.25


def test_a_collapsing_policy_is_reported(here, monkeypatch, capsys):
    figures, asked = iter([0.9, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2]), []  # test, validation, and so on

    def fake(*_, **__):
        a = next(figures)
        asked.append(a)
        verdicts = [k < 10 * a for k in range(10)]
        return dict.fromkeys(METRICS, a) | {"low": a, "high": a, "n": 4, "by_level": {1: a}, "verdicts": verdicts}

    monkeypatch.setattr(questions, "evaluate", fake)
    grpo.main(config(eval_every=1))
    out = capsys.readouterr()
    assert "validation accuracy fell from 50.0% to 20.0%: the policy is collapsing" in out.out + out.err
    assert out.out.count("collapsing") + out.err.count("collapsing") == 1
    assert len(asked) == 6
    assert "ended worse than it began" in out.out


def test_a_run_stopped_before_its_first_step_keeps_where_it_began(here, monkeypatch):
    assert_the_start_is_kept(grpo, config, "runs/grpo", monkeypatch)


@pytest.mark.parametrize(("answer", "first", "part"), [("", "step 1: q\n", "["), ("1", "(answer 1)\n", "[correct 0  ")])
def test_a_sample_without_an_answer_to_check_is_not_called_wrong(answer, first, part):
    said = []
    log = SimpleNamespace(samples=lambda step, text: said.append(text), show=lambda *_, **__: None)
    run = SimpleNamespace(done=0, say=lambda text: None, log=log)
    rollout = SimpleNamespace(mask=torch.ones(2, 3, dtype=torch.bool), logprobs=torch.zeros(2, 3))
    rewards = {"correct": torch.zeros(1, 2), "mine": torch.tensor([[0.0, 0.5]])}
    batch = SimpleNamespace(problems=[Problem("q", "s", answer, 1, "x")], texts=["a", "b"], rollout=rollout)
    batch.rewards = rewards
    rollouts.show_samples(run, batch, rewards["mine"])
    assert first in said[0]
    assert f"  {part}mine 0.5  sum 0.50]  'b'" in said[0]


def test_samples_are_asked_for_where_an_answer_can_be_checked(monkeypatch):
    problems = [Problem("q", "s", answer, 1, "x") for answer in ("", "", "1", "2", "3")]
    asked = []
    monkeypatch.setattr(questions, "evaluate", lambda *a, **k: {})
    monkeypatch.setattr(questions, "evaluate_samples", lambda *a, **k: asked.extend(a[2]) or {})
    questions.measure_test(torch.nn.Linear(1, 1), None, {"test": problems}, config(pass_problems=2), None)
    assert [problem.answer for problem in asked] == ["1", "2"]


def test_free_text_has_no_share_of_right_answers(here, capsys, monkeypatch):
    """No answer can be checked, so all would count as wrong, with an interval."""
    free = [Problem("q", "some text", "", 1, "x")] * 3
    result = {"accuracy": 0.0, "low": 0.0, "high": 0.6, "n": 3, "f1": 0.4, "length": 3.0, "by_level": {1: 0.0}}
    result |= {"verdicts": [0.0] * 3, "pass@1": 0.0, "solved": [0, 0, 0]}
    run = SimpleNamespace(path=here, config=config(), seconds=90.0, state=SimpleNamespace(before=result))
    titles = []
    for module in (grpo_report, ppo_report):
        monkeypatch.setattr(module, "draw_curves", lambda *a: titles.append((a[1], str(a[2]))))
    without = held_out.not_measured(free)
    grpo_report.report(run, result, 0.1, {"correct": 1.0}, {}, without)
    ppo_report.report(config(), run, result, without)
    out = capsys.readouterr().out
    assert "F1" in out
    for word in ("accuracy", "interval", "pass@", "McNemar", "solved"):
        assert word not in out
        assert word not in str(titles)
    assert held_out.not_measured([*free, Problem("q", "s", "1", 1, "x")]) == ()


def test_the_table_tells_sharpened_from_new(here, capsys):
    result = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 4, "length": 3.0, "by_level": {1: 0.5}}
    result["verdicts"] = [True, True, False, False]
    before = result | {"pass@1": 0.4375, "pass@4": 0.75, "majority@4": 0.5, "solved": [0, 1, 4, 2]}
    after = result | {"pass@1": 0.6875, "pass@4": 0.75, "majority@4": 0.75, "solved": [3, 4, 4, 0]}
    of_run = {"path": here, "seconds": 90.0, "config": config(pass_samples=4)}
    run = SimpleNamespace(**of_run, state=SimpleNamespace(before=before))
    grpo_report.report(run, after, 0.1, {"correct": 1.0}, {})
    out = capsys.readouterr().out
    rows = {line.split(",")[0]: line.split()[-2:] for line in out.splitlines() if "@" in line and line.endswith("%")}
    assert rows == {"pass@1": ["43.8%", "68.8%"], "pass@4": ["75.0%", "75.0%"], "majority@4": ["50.0%", "75.0%"]}
    [kl] = [line.split() for line in out.splitlines() if line.startswith("KL to the start")]
    assert kl[-2:] == ["0.0000", "0.1000"]
    assert "1 were never solved before and are now, 1 the other way round" in out
    assert "1.5 minutes" in out


def test_a_question_can_carry_an_instruction(here, spied):
    grpo.main(config(steps=1, instruction="Answer!", max_new_tokens=4))
    assert all(p.question.endswith("?\nAnswer!") for p in spied["batches"][0].problems)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--init", "nowhere"], ["nowhere"]),
        (["--data", "gsm8k"], ["--init"]),
        (["--loss_type", "ppo"], ["ppo", "dapo"]),
        (["--algorithm", "ppo"], ["ppo", "cispo", "reinforce++-baseline"]),
        (["--surrogate", "hard"], ["hard", "sapo"]),
        (["--algorithm", "gspo", "--scale", "tokens"], ["--scale tokens", "--ratio sequence"]),
        (["--rollouts", "1"], ["rollouts"]),
        (["--temperature", "0"], ["temperature"]),
        (["--kl", "k4"], ["k4", "k3"]),
        (["--kl", "k1", "--kl_unbiased", "false", "--beta", "0.1"], ["k1", "--kl_in reward"]),
        (["--kl_unbiased", "true", "--kl_in", "reward"], ["kl_unbiased", "--kl_in reward"]),
        (["--kl_in", "advantage"], ["advantage", "reward"]),
        (["--ratio", "word"], ["word", "sequence"]),
        (["--scale", "all"], ["all", "batch"]),
        (["--minibatches", "99"], ["99"]),
        (["--overlong", "99"], ["99"]),
        (["--refill", "-1"], ["refill"]),
        (["--correct_weight", "0", "--format_weight", "0"], ["weight 0"]),
        (["--reward", "own:nowhere"], ["own:nowhere"]),
        (["--lora.rank", "2", "--lora.targets", "[nothing]", "--init", "start"], ["nothing"]),
    ],
)
def test_bad_input_is_one_line(here, own, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--init", "start", *flags, "--steps", "1"])
    if flags == ["--data", "gsm8k"]:
        monkeypatch.setattr(sys, "argv", ["grpo.py", *flags])
    assert_refused(capsys, lambda: run_script(grpo.main, Config), *words)
    assert not (here / "runs").exists()


@pytest.mark.parametrize("temperature", [-1.0, 0.0, math.nan, math.inf])
def test_a_temperature_must_be_a_number_above_0(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        config(temperature=temperature)


def test_a_gradient_that_is_not_finite_stops_in_any_minibatch(here, monkeypatch):
    norms = iter([math.nan, 1.0])
    monkeypatch.setattr(grpo, "optimizer_step", lambda *_: next(norms))
    with pytest.raises(ConfigError, match="the gradient norm is nan at step 0"):
        grpo.main(config(minibatches=2))


def test_activations_that_overflow_fp16_stop_the_run(here):
    """They give no token."""
    raw, tokenizer, _ = open_checkpoint("start")
    with torch.no_grad():
        raw.blocks[0].ffn.down.weight.mul_(1e9)
    raw.save_pretrained("big")
    tokenizer.save_pretrained("big")
    with pytest.raises(DivergedError, match=r"logits are not finite: .*--dtype fp32"):
        grpo.main(config(init="big", dtype="fp16"))


def test_a_loss_that_is_not_finite_stops_the_run(here, monkeypatch):
    """A scaler forgives a gradient that is not finite, but no scale mends this loss."""
    logprobs = grpo.shared_answer_logprobs
    monkeypatch.setattr(grpo, "shared_answer_logprobs", lambda *args: logprobs(*args) * math.nan)
    with pytest.raises(DivergedError, match=r"the loss is nan, .* at step 0"):
        grpo.main(config(dtype="fp16"))


def test_prompts_must_be_shared_evenly(here, monkeypatch):
    monkeypatch.setattr(policy_run, "setup", lambda _: devices.Dist(0, 3, torch.device("cpu")))
    with pytest.raises(ConfigError, match="cannot be shared"):
        grpo.main(config())


# ------------------------------------------------------------------------------------------------ the sampler's copy


@pytest.fixture
def samplers(monkeypatch):
    """What a run rolled out with and trained: [(the sampler's weights, the policy's), …], one pair a step."""
    seen = []

    class Spy(grpo.RolloutPolicy):
        def refresh(self, policy):
            super().refresh(policy)
            seen.append([{n: w.clone() for n, w in m.state_dict().items()} for m in (self.model, policy)])

    monkeypatch.setattr(grpo, "RolloutPolicy", Spy)
    return seen


OFF_POLICY = dict(old_logprobs="trainer", correction="truncate")


@pytest.mark.parametrize("lora", [0, 2])
def test_a_stale_run_rolls_out_with_the_weights_of_that_many_steps_ago(here, samplers, spied, lora):
    options = dict(steps=4, lr=1e-2, lora=LoraConfig(lora), dtype="fp32", **OFF_POLICY)
    grpo.main(config(stale=2, sampler_dtype="int8", **options))
    for step, (sampler, _) in enumerate(samplers):
        before = samplers[max(0, step - 2)][1]
        assert all(torch.equal(w, rounded(before[name], "int8")) for name, w in sampler.items())
    assert any((samplers[2][1][name] != samplers[3][1][name]).any() for name in samplers[0][1])
    kl = metrics("runs/grpo", "sampler_kl")
    assert 0 < kl[1] < 0.1 * kl[4]  # at first it is rounded alone
    last, start = copy.deepcopy(spied["batches"][-1]), open_checkpoint("start")[0]
    rows = [(last.prompts[g] + ids, len(ids)) for g, group in enumerate(last.answers) for ids in group]
    model = start.eval()
    model.load_state_dict(samplers[3][1])  # the trainer's own log-probabilities, each answer alone
    own = [token_logprobs(model, torch.tensor([ids]))[0, -n:] for ids, n in rows]
    torch.testing.assert_close(last.rollout.logprobs[last.rollout.mask], torch.cat(own).detach(), atol=1e-5, rtol=1e-4)


def test_a_sampler_that_is_the_policy_costs_and_changes_nothing(here, spied, monkeypatch):
    flags = dict(steps=2, lr=1e-2, minibatches=2, beta=0.1, temperature=0.7)
    scored = []
    monkeypatch.setattr(
        off_policy, "piece_logprobs", lambda *a, true=off_policy.piece_logprobs: scored.append(a) or true(*a)
    )
    grpo.main(config(name="plain", **flags))
    assert scored == []
    assert "sampler_kl" not in (here / "runs/plain/metrics.jsonl").read_text(encoding="utf-8")
    grpo.main(config(name="corrected", **flags, **OFF_POLICY))
    assert len(scored) == 2
    first, second = spied["gradients"][:4], spied["gradients"][4:]
    for a, b in zip(first, second, strict=True):
        assert_same_gradient(a, b)
    for name, value in (("sampler_weight", 1.0), ("sampler_ratio_max", 1.0), ("sampler_kl", 0.0)):
        assert metrics("runs/corrected", name)[2] == pytest.approx(value, abs=1e-4)
    assert metrics("runs/corrected", "sampler_limited")[2] == 0


@pytest.mark.parametrize("correction", ["none", "mask"])
def test_whose_old_logprobs_the_ratio_divides_by(here, correction):
    options = dict(steps=3, lr=3e-2, stale=2, warmup=0, correction=correction)
    options |= {"correction_bound": 1.1} if correction == "mask" else {}
    for old in ("sampler", "trainer"):
        grpo.main(config(name=old, old_logprobs=old, **options))
    assert metrics("runs/trainer", "ratio_max")[2] == pytest.approx(1.0, abs=1e-4)
    assert metrics("runs/sampler", "ratio_max")[2] > 1.1
    assert (metrics("runs/sampler", "sampler_weight")[2] < 1) == (correction == "mask")
    assert (metrics("runs/sampler", "sampler_limited")[2] > 0) == (correction == "mask")
    assert metrics("runs/sampler", "sampler_kl")[2] > 0.01
    if correction == "mask":  # 1 or 0 where the ratio holds the weight
        kept = {old: 1 - metrics(f"runs/{old}", "sampler_limited")[2] for old in ("sampler", "trainer")}
        assert metrics("runs/sampler", "sampler_weight")[2] == pytest.approx(kept["sampler"])
        assert metrics("runs/trainer", "sampler_weight")[2] != pytest.approx(kept["trainer"], abs=1e-5)


@pytest.mark.parametrize("old_logprobs", ["sampler", "trainer"])
def test_the_correction_reaches_the_loss(here, spied, old_logprobs):
    """Where every token is masked, only the KL has a gradient; at first, at the reference itself, not even that."""
    flags = dict(sampler_dtype="int8", correction="mask", correction_bound=1.0, beta=0.3, old_logprobs=old_logprobs)
    grpo.main(config(steps=2, lr=1e-2, **flags))
    assert metrics("runs/grpo", "sampler_limited")[1] > 0.98
    masked, _ = spied["gradients"]
    grpo.main(config(steps=1, lr=1e-2, **(flags | {"correction": "none", "correction_bound": None})))
    norms = [sum(g.square().sum() for g in gradient.values()).sqrt() for gradient in (masked, spied["gradients"][-1])]
    assert norms[0] < 0.1 * norms[1]


def test_the_first_look_changes_no_number(here, monkeypatch, capsys):
    grpo.main(config(name="looked", steps=2))
    assert "first look: 8 questions x 4 answers, " in capsys.readouterr().out  # no more than the run asks itself
    monkeypatch.setattr(policy_run, "look_first", lambda *_: None)
    grpo.main(config(name="blind", steps=2))
    assert_same_metrics("runs/looked", "runs/blind", ("reward", "loss", "grad_norm", "accuracy", "length"))
    assert_same_weights("runs/looked/last", "runs/blind/last")


def test_a_hopeless_start_is_named_and_stops_if_asked(here, monkeypatch, capsys):
    grpo.main(config(steps=1))
    monkeypatch.setitem(grpo.REWARDS, "correct", lambda texts, problems, ended: [0.0] * len(texts))
    monkeypatch.setitem(grpo.REWARDS, "format", lambda texts, problems, ended: [0.0] * len(texts))
    capsys.readouterr()
    with pytest.raises(ConfigError, match="--if_hopeless warn goes on") as error:
        grpo.main(config(steps=1, if_hopeless="stop"))
    assert "\n" not in str(error.value)
    *_, look, why, change = capsys.readouterr().out.splitlines()
    assert "100% of the groups have no signal; the start was not trained to chat" in look
    assert why.startswith("nothing can be learned: 100% of the answers never end: --init seems a base model")
    assert change.startswith("what to change: fine-tune it first (sft.py)")
    assert [p.name for p in (here / "runs").iterdir()] == ["grpo"]  # the earlier run is where it was
    grpo.main(config(steps=1))
    assert "nothing can be learned" in capsys.readouterr().out
    assert metrics("runs/grpo", "grad_norm")[1] == 0.0
