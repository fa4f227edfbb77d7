"""support/probes.py: what is measured of a trained model, by hand on models whose figures are known."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics

import pretrain
import sft
from data import encode_prompt, load_problems
from support import probes
from support.checkpoints import open_checkpoint
from support.copy_lines import DISTANCES, copy_line
from support.devices import setup
from support.errors import ConfigError
from support.sampled_kl import sampled_kl
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig


def test_held_out_measures_against_the_start_of_the_same_seed(scratch, monkeypatch):
    problems = load_problems("word", "test", 3, (1,))
    tokenizer = BPETokenizer.train([p.question + p.solution for p in problems] * 9, 300)
    sizes = dict(context=160, n_layer=1, n_head=2, n_kv_head=1, width=16)
    for seed, name in enumerate(("start", "moved")):
        torch.manual_seed(seed)
        Transformer(TransformerConfig(tokenizer.vocab_size, **sizes)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    asked = []
    monkeypatch.setattr(probes, "sft_start", lambda config, dist: asked.append(config) or "start")
    monkeypatch.setattr(probes, "load_problems", lambda *args: problems)
    got = probes.held_out("runs/ablate/a", {"path": "moved"}, {"config": {"seed": 7}})
    assert [(config.seed, config.levels) for config in asked] == [(7, [1, 2])]
    models = [open_checkpoint(name)[0] for name in ("moved", "start")]
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    assert got["kl"] == sampled_kl(*models, tokenizer, prompts, probes.NEW_TOKENS, setup("cpu")) > 1e-4
    assert got["length"] > 0 <= got["pass_at_8"] <= 100


def test_what_carries_over_is_counted_by_kind(monkeypatch):
    """A policy that knows all answers but those of two kinds."""
    asked = []

    def evaluate(policy, tokenizer, problems, new_tokens, dist, dtype):
        asked.append(len(problems))
        return {"accuracy": 0.25 if len(problems) == 50 or problems[0].level == 3 else 1.0}

    monkeypatch.setattr(probes, "open_checkpoint", lambda *_: ("policy", "tokenizer", "path"))
    monkeypatch.setattr(probes, "held_out", lambda *_: {"kl": 0.5})
    monkeypatch.setattr(probes, "evaluate", evaluate)
    got = probes.carried_over("folder", {"path": "path"}, {})
    assert got == {"kl": 0.5, "more_steps": 25, "larger_numbers": 100, "new_words": 100, "by_hand": 25}
    assert asked == [500, 500, 500, 50]


def test_what_was_earned_is_read_from_the_log(tmp_path):
    steps = [{"step": i, "collapsed_grpo": 0.5, "collapsed_gdpo": i / 100} for i in range(1, 26)]
    for i, step in enumerate(steps):
        step |= {"reward_correct": float(i >= 15), "reward_format": 1.0, "reward_brevity": 0.25}
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(s) + "\n" for s in [{"config": {}}, *steps]), encoding="utf-8"
    )
    got = probes.earned(tmp_path, {}, {"stage": "gdpo", "config": {"combine": "gdpo"}})
    expected = {
        "earned_correct": 50,
        "earned_format": 100,
        "earned_brevity": 25,
        "collapsed": 13,
    }  # the last 20; all 25
    assert got == pytest.approx(expected)
    summed = probes.earned(tmp_path, {}, {"stage": "gdpo", "config": {"combine": "sum"}})
    assert summed["collapsed"] == pytest.approx(50)
    assert "collapsed" not in probes.earned(tmp_path, {}, {"stage": "grpo", "config": {}})


def test_what_a_sampler_did_is_read_from_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "held_out", lambda *_: {"kl": 0.5})
    steps = [{"step": i, "clip_fraction": 0.1 * i, "sampler_kl": 0.01, "steps_per_second": 4 / i} for i in (1, 2, 6)]
    lines = "".join(json.dumps(s) + "\n" for s in [{"config": {}}, *steps])
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    got = probes.training(tmp_path, {}, {})  # on policy nothing was limited
    assert got == pytest.approx({"kl": 0.5, "clipped": 30, "sampler_kl": 0.01, "seconds": 0.5})


def test_clipping_by_hand(tmp_path):
    """200 steps: norms 1 … 200, a quarter of them clipped, and three rises of the loss, of which two are spikes."""
    losses = [3.0] * 50 + [3.6] * 50 + [3.0] * 50 + [3.4] + [2.0] * 24 + [2.501] * 25
    figures = [{"grad_norm": 200.0 - i, "loss": x, "grad_clipped": float(i % 4 == 0)} for i, x in enumerate(losses)]
    lines = [{"step": i} | of_step for i, of_step in enumerate(figures, 1)]
    text = "".join(json.dumps(line) + "\n" for line in [{"config": {}}, *lines])
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    expected = {"norm_median": 101.0, "norm_p99": 198.0, "clipped_share": 25.0, "spikes": 2}
    assert probes.clipping(tmp_path, {}, {}) == expected


def test_the_probes_on_a_small_model(scratch, monkeypatch):
    """What the architecture experiments measure, on an untrained model of theirs: shapes and ranges."""
    (scratch / "text.txt").write_text("the cat sat on the mat. " * 400, encoding="utf-8")
    for probe, positions in (("layers", "rope"), ("beyond", "rope"), ("beyond", "learned"), ("clipping", "rope")):
        folder = f"runs/{probe}-{positions}"
        model = {"context": 32, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "width": 16, "positions": positions}
        sizes = {"steps": 2, "batch": 2, "micro_batch": 2, "model": TransformerConfig(**model)}
        figures = pretrain.main(pretrain.Config(data="text.txt", tokenizer="char", name=folder[5:], **sizes))
        got = getattr(probes, probe)(folder, figures, {"config": {"seed": 0, "data": "text.txt"}})
        if probe == "layers":
            assert len(got["stream_built"]) == len(got["gradient_trained"]) == 2
            assert got["gradient_ratio"] > 0
            assert 20 < len(got["text"]) <= 31
        elif probe == "beyond":
            assert math.isfinite(got["inside"])
            assert math.isnan(got["outside"]) == (positions == "learned")
            if positions == "rope":  # the stretched model has the same weights: within the context it is the same
                assert sum(got["by_position"][:8]) / 8 == pytest.approx(got["inside"], rel=1e-4)
            assert 0 < got["entropy"] < math.log(32)
            assert torch.tensor(got["attention"]).sum(-1).tolist() == pytest.approx([1.0] * 32, abs=1e-5)
        else:
            norms = list(metrics("runs/clipping-rope", "grad_norm").values())
            assert got["norm_median"] == sorted(norms)[1]
            assert got["clipped_share"] == 100 * sum(n > 1 for n in norms) / 2


class Counting(torch.nn.Module):
    """Predicts ids that count up: its loss at position t of a window is (t + 1) · |target − input|, on aligned targets
    t + 1. Not a Transformer, so that what is measured of it is known."""

    def __init__(self, context, positions="rope"):
        super().__init__()
        self.config = SimpleNamespace(context=context, positions=positions)

    def forward(self, ids, targets):
        step = torch.arange(1, ids.shape[1] + 1)
        return -(step * (targets - ids).abs()).double()  # (B, T)


def test_loss_by_position_by_hand(monkeypatch):
    monkeypatch.setattr(probes, "validation_text", lambda settings: "x" * 650)
    monkeypatch.setattr(probes, "stretched", lambda raw, context: Counting(context))
    monkeypatch.setattr(probes, "attention_figures", lambda raw, rows: {"rows": tuple(rows.shape)})
    tokenizer = SimpleNamespace(encode=lambda text: list(range(len(text))))
    for positions in ("rope", "learned"):
        model = Counting(32, positions)
        monkeypatch.setattr(probes, "open_checkpoint", lambda path, model=model: (model, tokenizer, None))
        got = probes.beyond("", {"path": ""}, {})
        assert got["inside"] == sum(range(1, 33)) / 32
        assert got["rows"] == (10, 32)  # 650 ids are ten windows of 65
        if positions == "learned":
            assert math.isnan(got["outside"])
            assert "by_position" not in got
        else:
            assert got["outside"] == sum(range(33, 65)) / 32
            assert got["by_position"] == [sum(range(4 * i + 1, 4 * i + 5)) / 4 for i in range(16)]


class Doubling(torch.nn.Module):
    """A stream that each block multiplies, 2 and 3 times, and whose mean is the log-probability."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Parameter(torch.ones(config.vocab_size, 4))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        for block, factor in zip(self.blocks, (2.0, 3.0), strict=True):
            block.weight.data = factor * torch.eye(4)

    def forward(self, ids, targets):
        assert torch.equal(ids[:, 1:], targets[:, :-1])  # targets are what comes next
        x = self.embedding[ids]  # (B, T, 4)
        for block in self.blocks:
            x = block(x)
        return x.sum(-1)  # (B, T)


def test_stream_and_gradient_by_hand(monkeypatch):
    config = TransformerConfig(vocab_size=9, context=16)
    tokenizer = SimpleNamespace(encode=lambda text: [1] * len(text))
    written = SimpleNamespace(texts=lambda tokenizer: ["said"])
    monkeypatch.setattr(probes, "open_checkpoint", lambda path: (Doubling(config), tokenizer, None))
    monkeypatch.setattr(probes, "Transformer", Doubling)
    monkeypatch.setattr(probes, "generate", lambda *args, **kwargs: written)
    monkeypatch.setattr(probes, "validation_text", lambda settings: "x" * 2048)
    monkeypatch.setattr(probes, "attention_figures", lambda raw, rows: {"rows": tuple(rows.shape)})
    got = probes.layers("", {"path": ""}, {"config": {"seed": 0}})
    for name in ("built", "trained"):
        assert got[f"stream_{name}"] == pytest.approx([2.0, 6.0])
        last = 1 / (4 * 15)  # of the mean over 4 rows of 15 tokens; the first block's is three times it
        assert got[f"gradient_{name}"] == pytest.approx([3 * last, last])
    assert got["gradient_ratio"] == pytest.approx(3.0)
    assert (got["text"], got["rows"]) == ("said", (32, 64))


@pytest.mark.parametrize("known", [{0, 1, 2, 4, 8, 16}, {48}, {64}])
def test_copying_by_hand(monkeypatch, known):
    """A model that repeats the letter at some distances and says "?" at the others."""

    def say(raw, prompts, n, temperature):
        assert (n, temperature) == (1, 0)
        lines = [re.fullmatch(r"\n([a-z])(\.*)\|", prompt) for prompt in prompts]
        texts = [line[1] if len(line[2]) in known else "?" for line in lines]
        return SimpleNamespace(texts=lambda tokenizer: texts)

    tokenizer = SimpleNamespace(encode=lambda text: text)
    monkeypatch.setattr(probes, "open_checkpoint", lambda path: (None, tokenizer, None))
    monkeypatch.setattr(probes, "generate", say)
    got = probes.copying("", {"path": ""}, {})
    assert got["copied"] == [100.0 * (d in known) for d in DISTANCES]
    inside = [d for d in DISTANCES if d <= 48]  # what it was trained on
    assert got["copied_inside"] == pytest.approx(100 * len(known & set(inside)) / 8)
    assert got["copied_outside"] == pytest.approx(100 * len(known - set(inside)) / 3)


def test_the_lines_to_copy():
    lines = [copy_line(i, 0, 48) for i in range(4000)]
    dots = sorted(len(re.fullmatch(r"([a-z])(\.*)\|\1", line)[2]) for line in lines)
    assert (dots[0], dots[-1]) == (0, 48)
    assert abs(dots[2000] - (50**0.5 - 1)) < 1.5  # dots + 1 is log-uniform over 1 to 50, cut to whole numbers
    assert len({line[0] for line in lines}) == 26
    assert {len(copy_line(i, 7, 7)) for i in range(50)} == {10}


def test_a_student_is_measured_beside_its_teacher(scratch, monkeypatch):
    """The KL is that to the teacher of its seed; the tokens are those of all steps."""
    problems = load_problems("word", "test", 3, (1,))
    tokenizer = BPETokenizer.train([p.question + p.solution for p in problems] * 9, 300)
    sizes = dict(context=200, n_layer=1, n_head=2, n_kv_head=1, width=16)
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        Transformer(TransformerConfig(tokenizer.vocab_size, **sizes)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    monkeypatch.setattr(probes, "load_problems", lambda *_: problems)
    monkeypatch.setattr(probes, "NEW_TOKENS", 6)
    monkeypatch.setattr(probes, "teacher_start", lambda config, dist: "teacher")
    lines = [{"step": 1, "length": 2.5}, {"step": 2, "length": 3.0}]
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = {"config": {"seed": 0, "prompts": 4, "rollouts": 2}}
    figures = probes.taught(Path("run"), {"path": "student"}, settings)
    assert figures["tokens"] == 5.5 * 8 / 1000
    models = [open_checkpoint(name)[0] for name in ("student", "teacher")]
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    assert figures["teacher_kl"] == sampled_kl(*models, tokenizer, prompts, 6, setup("cpu")) > 0.001
    assert figures["pass_at_8"] == figures["sampled"] == 0
    alone = probes.taught(Path("run"), {"path": "teacher"}, {"config": {"seed": 0}})
    assert abs(alone["teacher_kl"]) < 1e-6
    assert "tokens" not in alone


def test_grpo_takes_the_student_of_the_seed(monkeypatch):
    monkeypatch.setattr(probes, "student_start", lambda config, dist: f"student{config.seed}")
    monkeypatch.setattr(probes.grpo, "main", lambda config: config)
    config = probes.grpo_of_student(probes.grpo.Config(seed=3, steps=7))
    assert (config.init, config.seed, config.steps) == ("student3", 3, 7)


@pytest.mark.parametrize("start", ["pretrain", "sft", "student", "teacher"])
def test_a_start_is_measured_and_not_trained(start, scratch, monkeypatch):
    problems = load_problems("word", "test", 5, (1, 2))
    tokenizer = BPETokenizer.train([p.question + p.solution for p in problems] * 9, 300)
    torch.manual_seed(0)
    sizes = dict(context=200, n_layer=1, n_head=2, n_kv_head=1, width=16)
    Transformer(TransformerConfig(tokenizer.vocab_size, **sizes)).save_pretrained("here")
    tokenizer.save_pretrained("here")
    asked = []
    for kind, maker in (("pretrain", "pretrained"), ("sft", "sft"), ("student", "student"), ("teacher", "teacher")):
        make = lambda config, dist, kind=kind: asked.append((kind, config.seed)) or "here"  # noqa: E731
        monkeypatch.setattr(probes, f"{maker}_start", make)
    monkeypatch.setattr(sft, "main", None)  # nothing is trained
    before = Path("here/model.safetensors").read_bytes()
    got = probes.measure_start(probes.Start(start=start, seed=3, test_problems=5))
    assert asked == [(start, 3)]
    assert got["path"] == "here"
    assert (got["n"], got["correct"], got["accuracy"]) == (5, 0, 0.0)
    assert got["low"] == 0.0 < got["high"]
    assert Path("here/model.safetensors").read_bytes() == before
    assert not Path("runs").exists()
    with pytest.raises(ConfigError, match="--test_problems is 0; it must be at least 1"):
        probes.Start(test_problems=0)
    with pytest.raises(ConfigError, match="--start 'grpo' is not known; use pretrain, sft, student, teacher or calls"):
        probes.Start(start="grpo")
