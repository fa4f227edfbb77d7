"""grpo.py: advantages and loss against plain loops, the invariances of a step, and a real run whose accuracy must
rise."""

import math

import pytest
import torch
from conftest import ROOT, assert_one_line_error, assert_same_weights, metrics, script

import grpo
import pretrain
from data import Problem, load_problems
from generate import ConfigError, generate
from grpo import Config, completion_logprobs, group_advantages, grpo_loss, pack, rewards
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig, token_logprobs

SMALL = dict(init="start", steps=3, prompts=4, rollouts=4, max_new_tokens=6, warmup=1, eval_every=2, eval_problems=3)
SMALL |= dict(test_problems=4, sample_every=2, micro_batch=16, lr=1e-3, device="cpu", format_weight=0.5)


def config(**changes):
    return Config(**(SMALL | changes))


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    ("text", "ended", "correct", "tidy"),
    [
        ("3 + 4 = 7\n#### 7", True, 1, 1),
        ("3 + 4 = 7\n#### 7", False, 1, 0),  # cut off: it never stopped
        ("3 + 4 = 8\n#### 8", True, 0, 1),
        ("#### 5\n#### 7", True, 0, 0),  # two answers, one of them right: neither counts
        ("#### 7\n#### 7", True, 1, 0),
        ("the answer is 7", True, 0, 0),
        ("#### 7 apples", True, 1, 0),
        ("", True, 0, 0),
    ],
)
def test_rewards(text, ended, correct, tidy):
    assert rewards(text, Problem("q", "", "7", 1, "x"), ended) == {"correct": correct, "format": tidy}


# ------------------------------------------------------------------------------------------------ advantages


def test_advantages_by_hand():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 6.0]])
    s = math.sqrt(1 / 3)  # of (1, 0, 0, 1), ddof 1
    expected = [[0.5 / (s + 1e-4), -0.5 / (s + 1e-4)] * 1, [-1 / 2.0001, 3 / 2.0001]]
    got = group_advantages(r)
    assert got[0].tolist() == pytest.approx([expected[0][0], expected[0][1], expected[0][1], expected[0][0]])
    assert got[1].tolist() == pytest.approx([expected[1][0]] * 3 + [expected[1][1]])
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
    return new, old, ref, torch.randn(B, dtype=torch.float64), mask


def by_loop(new, old, ref, A, mask, beta, low, high, loss_type):
    total, tokens = 0.0, int(mask.sum())
    for i in range(len(mask)):
        row = 0.0
        for t in range(mask.shape[1]):
            if not mask[i, t]:
                continue
            ratio = torch.exp(new[i, t] - old[i, t])
            clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
            surrogate = min(ratio * A[i], clipped * A[i])
            d = ref[i, t] - new[i, t]
            row = row - surrogate + beta * (torch.exp(d) - d - 1)
        divide = {"grpo": int(mask[i].sum()) * len(mask), "dapo": tokens, "dr_grpo": len(mask) * mask.shape[1]}
        total = total + row / divide[loss_type]
    return total


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradient_against_a_loop(loss_type):
    new, old, ref, A, mask = batch()
    loss, figures = grpo_loss(new, old, A, mask, ref, 0.3, 0.2, 0.28, loss_type)
    expected = by_loop(new, old, ref, A, mask, 0.3, 0.2, 0.28, loss_type)
    torch.testing.assert_close(loss, expected)
    assert figures["loss"] == pytest.approx(loss.item())
    (ours,) = torch.autograd.grad(loss, new)
    (theirs,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(ours, theirs)
    assert (ours[~mask] == 0).all()
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


def test_on_policy_gradient_is_reinforce_with_a_baseline():
    new, _, _, A, mask = batch()
    loss, figures = grpo_loss(new, new.detach(), A, mask, loss_type="dapo")
    (ours,) = torch.autograd.grad(loss, new, retain_graph=True)
    reinforce = -(A[:, None] * new * mask).sum() / mask.sum()
    torch.testing.assert_close(ours, torch.autograd.grad(reinforce, new)[0])
    assert figures["ratio_max"] == 1.0


def test_what_stands_outside_the_mask_cannot_matter():
    new, old, ref, A, mask = batch()
    loss, _ = grpo_loss(new, old, A, mask, ref, 0.3)
    wild = old.masked_fill(~mask, -1e9)
    again, _ = grpo_loss(new, wild, A, mask, ref.masked_fill(~mask, 1e9), 0.3)
    torch.testing.assert_close(again, loss)
    assert torch.autograd.grad(again, new)[0].isfinite().all()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_any_cut_gives_the_same_gradient(loss_type):
    new, old, ref, A, mask = batch()
    step = dict(n_completions=5, n_tokens=int(mask.sum()), max_length=7)
    (whole,) = torch.autograd.grad(grpo_loss(new, old, A, mask, ref, 0.3, loss_type=loss_type)[0], new)
    parts = 0.0
    for rows in ([0, 3], [1], [2, 4]):
        T = int(mask[rows].sum(1).max())
        cut = [x[rows, :T] for x in (new, old)], [x[rows, :T] for x in (mask, ref)]
        parts = parts + grpo_loss(*cut[0], A[rows], *cut[1], 0.3, loss_type=loss_type, **step)[0]
    torch.testing.assert_close(torch.autograd.grad(parts, new)[0], whole)


def test_pack_scores_every_completion_as_if_it_stood_alone():
    torch.manual_seed(0)
    raw = Transformer(TransformerConfig(30, context=64, n_layer=2, n_head=2, n_kv_head=1, width=16)).eval()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    generator = torch.Generator().manual_seed(1)
    rollout = generate(raw, prompts, 9, n=4, stop_ids=tuple(range(22, 30)), generator=generator, temperature=0.8)
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    packed = pack(prompts, rollout, 4, pad=0)
    logprobs = completion_logprobs(raw, packed, 0.8)
    m = rollout.mask
    torch.testing.assert_close(logprobs[m], rollout.logprobs[m], atol=1e-4, rtol=1e-4)  # so the first ratio is 1
    up = torch.randn(logprobs.shape)
    together = torch.autograd.grad((logprobs * up * m).sum(), list(raw.parameters()))
    alone = 0.0
    for row in range(12):
        n = int(m[row].sum())
        tokens = torch.tensor([prompts[row // 4] + rollout.ids[row, :n].tolist()])
        alone = alone + (token_logprobs(raw, tokens, 0.8)[0, -n:] * up[row, :n]).sum()
    for a, b in zip(together, torch.autograd.grad(alone, list(raw.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def here(scratch, monkeypatch):
    """A random model whose problems have answers it can hit by chance: rewards then vary inside a group."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train([p.question + p.solution for p in load_problems("word", "train", 200)], 400)
    raw = Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))
    raw.save_pretrained("start")
    tokenizer.save_pretrained("start")
    return scratch


LETTERS = "def noisy(text, problem, ended):\n    return {'correct': float('e' in text), 'format': float('a' in text)}\n"


@pytest.fixture
def easy(monkeypatch):
    """A reward that a random model earns half of the time: letters in its text."""
    monkeypatch.setattr(
        grpo, "rewards", lambda text, p, ended: {"correct": float("e" in text), "format": float("a" in text)}
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_change_nothing(here, easy, loss_type):
    for name, size in (("whole", 64), ("cut", 3)):
        grpo.main(config(name=name, micro_batch=size, loss_type=loss_type))
    for name in ("reward", "grad_norm", "kl", "entropy", "length", "zero_variance"):
        a, b = metrics("runs/whole", name), metrics("runs/cut", name)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-3, abs=1e-6), name
    assert max(metrics("runs/whole", "grad_norm").values()) > 0
    assert_same_weights("runs/whole/last", "runs/cut/last", atol=1e-4, rtol=1e-3)


def test_first_ratio_is_one_and_later_ones_are_not(here, easy):
    grpo.main(config(inner_epochs=1, name="a"))
    grpo.main(config(inner_epochs=3, name="b", lr=1e-2))
    assert all(r == pytest.approx(1.0, abs=1e-4) for r in metrics("runs/a", "ratio_max").values())
    assert max(metrics("runs/b", "ratio_max").values()) > 1.01


def test_resumed_equals_uninterrupted_bit_for_bit(here, easy, monkeypatch):
    grpo.main(config(name="whole"))

    class StopAt2:
        def __init__(self, dist):
            self.asked = 0

        def __bool__(self):
            self.asked += 1
            return self.asked == 3

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "Interrupt", StopAt2)
        with pytest.raises(SystemExit):
            grpo.main(config(name="parts"))
    grpo.main(config(name="parts", resume=True))
    for name in ("reward", "loss", "kl", "accuracy"):
        assert metrics("runs/whole", name) == metrics("runs/parts", name), name
    assert_same_weights("runs/whole/last", "runs/parts/last")


def test_two_processes_equal_one(here):
    (here / "noisy.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport grpo\n{LETTERS}grpo.rewards = noisy\n"
        "from generate import run\nrun(grpo.main, grpo.Config)\n"
    )
    flags = [x for k, v in SMALL.items() for x in (f"--{k}", v)]
    runs = [script(here / "noisy.py", *flags, "--name", f"n{n}", cwd=here, processes=n) for n in (1, 2)]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    for name in ("reward", "grad_norm", "kl", "length", "zero_variance", "accuracy"):
        a, b = metrics("runs/n1", name), metrics("runs/n2", name)
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-3, abs=1e-6), name
    assert max(metrics("runs/n1", "grad_norm").values()) > 0
    assert_same_weights("runs/n1/last", "runs/n2/last", atol=1e-4, rtol=1e-3)


def test_groups_without_signal_are_skipped_and_counted(here, monkeypatch):
    monkeypatch.setattr(grpo, "rewards", lambda text, p, ended: {"correct": 1.0, "format": 0.0})
    grpo.main(config(beta=0.0, weight_decay=0.1))
    assert set(metrics("runs/grpo", "zero_variance").values()) == {1.0}
    assert set(metrics("runs/grpo", "grad_norm").values()) == {0.0}
    assert_same_weights("start", "runs/grpo/last")  # not even the decay moves it


def test_a_reward_for_a_letter_is_learned(here, easy):
    grpo.main(config(steps=40, lr=1e-2, prompts=8, rollouts=8, format_weight=0.0, eval_every=40, test_problems=1))
    earned = list(metrics("runs/grpo", "reward_correct").values())
    assert sum(earned[-5:]) / 5 > sum(earned[:5]) / 5 + 0.25


def test_a_collapsing_policy_is_reported(here, monkeypatch, capsys):
    figures = iter([0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2])

    def fake(*_):
        a = next(figures)
        return {"accuracy": a, "low": a, "high": a, "n": 4, "length": 3.0, "by_level": {1: a}, "samples": []}

    monkeypatch.setattr(grpo, "evaluate", fake)
    grpo.main(config())
    out = capsys.readouterr()
    assert "the policy is collapsing" in out.out + out.err
    assert "ended worse than it began" in out.out


def test_bad_input(here):
    for flags, words in [
        (["--init", "nowhere"], ["nowhere"]),
        (["--data", "gsm8k"], ["--init"]),
        (["--init", "start", "--loss_type", "ppo"], ["ppo", "dapo"]),
        (["--init", "start", "--rollouts", "1"], ["rollouts"]),
    ]:
        env_flags = [*flags, "--steps", "1"]
        assert_one_line_error(script("grpo.py", *env_flags, cwd=here), *words)
    assert not (here / "runs").exists()


def test_prompts_must_be_shared_evenly(here, monkeypatch):
    monkeypatch.setattr(grpo, "setup", lambda _: pretrain.Dist(0, 3, torch.device("cpu")))
    with pytest.raises(ConfigError, match="cannot be shared"):
        grpo.main(config())
