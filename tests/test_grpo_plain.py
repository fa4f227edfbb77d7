"""grpo_plain.py: what it trains against what grpo.py trains, weight by weight."""

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line_error, metrics, script, weights

import grpo
import grpo_plain
from data import load_problems
from support import grpo_report, policy_run, questions
from support.checkpoints import open_checkpoint
from support.errors import ConfigError
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig

FEW = {split: load_problems("word", split, 60) for split in ("train", "valid", "test")}


@pytest.fixture
def here(scratch, monkeypatch):
    """A random model as the start, few problems and short answers, rewards that it earns now and then."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train([p.question + p.solution for p in FEW["train"]], 400)
    shape = dict(context=160, n_layer=2, n_head=2, n_kv_head=1, width=32)
    Transformer(TransformerConfig(tokenizer.vocab_size, **shape)).save_pretrained("start")
    tokenizer.save_pretrained("start")
    monkeypatch.setattr(questions, "load_problems", lambda name, split, n, *more: FEW[split][:n])
    monkeypatch.setattr(grpo_plain, "load_problems", lambda split, n=None: FEW[split][:n])
    monkeypatch.setattr(grpo_report, "draw_curves", lambda *_: None)
    for name, value in (("N", 7), ("R", 4), ("L", 8), ("MAX_NORM", 0.6)):
        monkeypatch.setattr(grpo_plain, name, value)

    def with_th(texts, problems, ended):
        return [float("th" in text) for text in texts]

    def with_a(texts, problems, ended):
        return [float("a" in text) for text in texts]

    monkeypatch.setitem(grpo.REWARDS, "correct", with_th)
    monkeypatch.setitem(grpo.REWARDS, "format", with_a)
    monkeypatch.setattr(grpo_plain, "is_correct", lambda text, problem: "th" in text)
    monkeypatch.setattr(grpo_plain, "format_reward", with_a)
    return scratch


@pytest.mark.parametrize(("optimizer", "lr", "atol"), [("muon", 0.1, 1e-3), ("sgd", 5.0, 1e-5)])
def test_it_ends_with_the_weights_of_grpo(here, monkeypatch, optimizer, lr, atol):
    """Five steps of two updates, in which the clip acts, π leaves π_ref, and some groups have no signal. Muon and Adam
    would not see a gradient of another length; SGD does."""
    if optimizer == "sgd":
        for module in (policy_run, grpo_plain):
            monkeypatch.setattr(
                module, "make_optimizers", lambda model, *_, **__: [torch.optim.SGD(model.parameters())]
            )
    same = dict(init="start", steps=5, lr=lr)
    small = dict(prompts=7, rollouts=4, max_new_tokens=8, clip=0.6, micro_batch=8, device="cpu", dtype="fp32")
    few = dict(eval_problems=3, test_problems=4, pass_problems=2, pass_samples=2)
    grpo.main(grpo.Config(**same, **small, **few))
    grpo_plain.main(grpo_plain.Config(**same))
    ours, plain, start = weights("runs/grpo/last"), weights("runs/grpo_plain/last"), weights("start")
    assert ours.keys() == plain.keys()
    for name in ours:
        assert (ours[name] - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(plain[name], ours[name], atol=atol, rtol=1e-4)
    for name in ("clip_fraction", "kl", "zero_variance"):
        assert max(list(metrics("runs/grpo", name).values())[1:]) > 0.01, name


def test_the_advantages_are_those_of_grpo():
    rewards = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1], [0.1], [1e-2], [1e-3], [0]]
    )
    rewards[4] = 0.3  # the mean of seven is not 0.3 in fp32
    ours = grpo_plain.group_advantages(rewards)
    torch.testing.assert_close(ours, grpo.group_advantages(rewards), atol=0, rtol=1e-6)
    assert not ours[4].any()


def test_the_checkpoint_opens(here):
    result = grpo_plain.main(grpo_plain.Config(init="start", steps=1))
    policy, tokenizer, _ = open_checkpoint(result["path"])
    assert policy.config.width == 32
    assert tokenizer.vocab_size == policy.config.vocab_size
    assert 0 <= result["before"] <= 1


def test_a_checkpoint_that_cannot_be_written_is_said(here, monkeypatch, capsys):
    monkeypatch.setattr(grpo_plain, "save", lambda *_, **__: False)  # a full disk
    with pytest.raises(ConfigError, match="runs/grpo_plain/last could not be written"):
        grpo_plain.main(grpo_plain.Config(init="start", steps=1))
    said = capsys.readouterr().out
    assert "test accuracy, greedy" in said
    assert "saved in" not in said


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(grpo_plain, "setup", lambda: SimpleNamespace(world=2))
    with pytest.raises(ConfigError, match=r"grpo_plain\.py runs in one process"):
        grpo_plain.main(grpo_plain.Config())


def test_bad_input(scratch):
    assert_one_line_error(script("grpo_plain.py", "--init", "nowhere", cwd=scratch), "nowhere")
    assert_one_line_error(script("grpo_plain.py", "--steps", "0", cwd=scratch), "--steps")
