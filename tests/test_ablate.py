"""ablate.py: the intervals by hand, every experiment's flags, a small experiment from first run to picture."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_one_line_error, metrics, script

import ablate
from data import load_problems
from support.cli import parse_config
from support.errors import ConfigError
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig


def test_the_interval_by_hand():
    # 1, 2, 6: mean 3, s² = (4 + 1 + 9) / 2 = 7, half = 4.303 · √(7/3)
    mean, half = ablate.interval([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(4.303 * math.sqrt(7 / 3), abs=1e-9)
    assert ablate.plus_minus([1.0, 2.0, 6.0]) == "3.000 ± 6.573"
    assert ablate.plus_minus([0.25]) == "0.2500"  # one seed has no interval
    assert math.isnan(ablate.interval([1.0])[1])
    for bad in (math.nan, math.inf):
        assert all(map(math.isnan, ablate.interval([1.0, bad, 2.0])))
        assert ablate.plus_minus([1.0, bad, 2.0]) == "–"
    assert ablate.difference([1.5, 2.51, 3.49], [1.0, 2.0, 3.0]) == "**+0.500 [+0.475, +0.525]**"
    assert ablate.difference([2.0, 1.0, 4.0], [1.0, 2.0, 3.0]) == "+0.333 [-2.535, +3.202]"
    assert ablate.difference([4096.0] * 2, [4000.0] * 2) == "+96"
    assert ablate.difference([0.0] * 3, [0.82, 0.81, 0.83]) == "**-0.8200 [-0.8448, -0.7952]**"  # not "-1"
    assert ablate.difference([1.0, math.nan], [1.0, 2.0]) == "–"


def test_students_quantiles_cover_95_per_cent():
    """Of 40,000 samples of n normal numbers, the interval holds the true mean in 95 %; ± 0.4 % is four deviations."""
    torch.manual_seed(0)
    for n in (2, 3, 5, 10):
        x = torch.randn(40_000, n, dtype=torch.float64) + 7
        half = ablate.T_975[n] * x.std(1) / math.sqrt(n)
        assert ((x.mean(1) - 7).abs() < half).double().mean().item() == pytest.approx(0.95, abs=0.0044)


@pytest.mark.parametrize("name", ablate.EXPERIMENTS)
def test_every_variant_has_flags_that_its_stage_knows(name, scratch, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(scratch))
    experiment = ablate.EXPERIMENTS[name]
    for variant in experiment.variants:
        for quick in (False, True):
            settings = ablate.settings_of(name, experiment, variant, 3, quick)
            for stage, flags in settings["stages"]:
                config = ablate.build(stage, flags)
                assert config.seed == 3
                assert replace(config, name="copy").name == "copy"  # what is set may not refuse what it has become
                assert config.steps <= 4 or not quick
            assert json.loads(json.dumps(settings)) == settings  # comparable with what result.json holds


def test_a_commit_that_was_changed_is_marked(monkeypatch):
    for full, short in (("0123456789ab", "01234567"), ("0123456789ab+", "01234567+"), ("unknown", "unknown")):
        monkeypatch.setattr(ablate, "commit", lambda full=full: full)
        assert ablate.short_commit() == short


def small(**changes):
    model = {"context": 16, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "width": 16} | changes
    return [
        (
            "pretrain",
            {"data": "text.txt", "tokenizer": "char", "steps": 2, "batch": 2, "micro_batch": 2, "model": model},
        )
    ]


@pytest.fixture
def experiment(scratch, monkeypatch):
    (scratch / "text.txt").write_text("the cat sat on the mat. " * 100)
    columns = {"valid_loss": "validation loss (nats)", "parameters": "parameters"}
    variants = {"narrow": small(), "wide": small(width=32)}
    made = ablate.Experiment("Is wider better?", "the rest", variants, columns, {"loss": "training loss"})
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", made)
    return made


def test_a_run_writes_its_figures_and_a_repetition_gives_the_same(experiment, scratch):
    settings = ablate.settings_of("width", experiment, "narrow", 5, False)
    first = ablate.run_one(settings, "runs/ablate/a", 1)
    again = ablate.run_one(settings, "runs/ablate/b", 1)
    assert first["valid_loss"] == again["valid_loss"]
    assert (
        first["valid_loss"]
        != ablate.run_one(
            settings | {"stages": [["pretrain", settings["stages"][0][1] | {"seed": 6}]]}, "runs/ablate/c", 1
        )["valid_loss"]
    )
    assert json.loads((scratch / "runs/ablate/a/result.json").read_text())["settings"] == settings
    assert "validation loss" in (scratch / "runs/ablate/a/log.txt").read_text()


def test_the_stages_of_a_variant_have_runs_of_their_own(experiment, scratch):
    settings = ablate.settings_of("width", experiment, "narrow", 5, False)
    ablate.run_one(settings | {"stages": settings["stages"] * 2}, "runs/ablate/two", 1)
    runs = sorted(path.name for path in (scratch / "runs/ablate/two").iterdir() if path.is_dir())
    assert runs == ["run", "run1"]  # nothing was moved aside, so that a later stage can start from an earlier one's


def test_standing_measures_against_the_start_of_the_same_seed(scratch, monkeypatch):
    problems = load_problems("word", "test", 3, (1,))
    tokenizer = BPETokenizer.train([p.question + p.solution for p in problems] * 9, 300)
    torch.manual_seed(0)
    sizes = dict(context=160, n_layer=1, n_head=2, n_kv_head=1, width=16)
    Transformer(TransformerConfig(tokenizer.vocab_size, **sizes)).save_pretrained("start")
    tokenizer.save_pretrained("start")
    asked = []
    monkeypatch.setattr(ablate, "sft_start", lambda config, dist: asked.append(config) or "start")
    monkeypatch.setattr(ablate, "load_problems", lambda *args: problems)
    got = ablate.standing("runs/ablate/a", {"path": "start"}, {"seed": 7})
    assert [(config.seed, config.levels) for config in asked] == [(7, [1, 2])]
    assert got["kl"] == pytest.approx(0.0, abs=1e-6)
    assert got["length"] > 0 <= got["pass_at_8"] <= 100


def fake(experiment, values):
    return {
        (variant, seed): {"valid_loss": x, "parameters": 10}
        for variant, row in zip(experiment.variants, values, strict=True)
        for seed, x in enumerate(row)
    }


def test_what_was_earned_is_read_from_the_log(tmp_path):
    steps = [{"step": i, "collapsed_grpo": 0.5, "collapsed_gdpo": i / 100} for i in range(1, 26)]
    for i, step in enumerate(steps):
        step |= {"reward_correct": float(i >= 15), "reward_format": 1.0, "reward_brevity": 0.25}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [{"config": {}}, *steps]))
    got = ablate.earned(tmp_path, {}, {"stages": [["gdpo", {}]]})
    expected = {
        "earned_correct": 50,
        "earned_format": 100,
        "earned_brevity": 25,
        "collapsed": 13,
    }  # the last 20; all 25
    assert got == pytest.approx(expected)
    assert ablate.earned(tmp_path, {}, {"stages": [["gdpo", {"combine": "sum"}]]})["collapsed"] == pytest.approx(50)
    assert "collapsed" not in ablate.earned(tmp_path, {}, {"stages": [["grpo", {}]]})


def test_the_report_tells_apart_only_what_the_paired_interval_does(experiment, scratch):
    target = scratch / "width.md"
    # Far apart seeds, but the difference is the same in each: pairing shows what two separate intervals would hide.
    paired = ablate.report(
        "width", experiment, fake(experiment, [[1, 2, 3], [1.5, 2.51, 3.49]]), [0, 1, 2], "x", target
    )
    assert "| wide | **+0.500 [+0.475, +0.525]** | +0.000 |" in paired
    assert "| narrow | 2.000 ± 2.484 | 10.000 |" in paired  # parameters do not differ, so they have no ±
    noisy = ablate.report("width", experiment, fake(experiment, [[1, 2, 3], [2, 1, 4]]), [0, 1, 2], "x", target)
    assert "| wide | +0.333 [-2.535, +3.202] |" in noisy
    # Named pairs instead of one baseline, in the direction that their names say; a pair that was not run is left out.
    named = replace(experiment, pairs=(("narrow", "wide"), ("narrow", "huge")))
    results = fake(experiment, [[1, 2, 3], [1.5, 2.51, 3.49]])
    text = ablate.report("width", named, results, [0, 1, 2], "x", target)
    assert "| narrow against wide | **-0.500 [-0.525, -0.475]** | +0.000 |" in text
    assert not any(word in text for word in ("to *narrow*", "huge", "write"))
    results["wide", 0]["text"], results["wide", 1]["text"] = "a\nb", "another seed's"
    text = ablate.report("width", named, results, [0, 1, 2], "x", target)
    assert "seed 0:\n\n* wide: `` a / b ``\n\n!" in text


def test_the_report_says_that_many_comparisons_are_not_corrected(experiment, scratch):
    note = "leaves out 0. Not corrected for the number of comparisons: an interval that ends near 0 is a hint."
    for n, said in ((5, False), (6, True)):  # paired with the first: 4 and 5 intervals; parameters have none
        many = replace(experiment, variants=dict.fromkeys(map(str, range(n)), ()))
        results = fake(many, [[i, 2, 3 - i] for i in range(n)])
        text = ablate.report("width", many, results, [0, 1, 2], "x", scratch / "width.md")
        assert "leaves out 0." in text
        assert (note in text) is said
        assert ("Not corrected" in text) is said


def test_curves_are_labelled_by_the_unit_of_what_is_trained():
    for name, experiment in ablate.EXPERIMENTS.items():
        _, flags = next(iter(experiment.variants.values()))[0]
        unit = "nats per character" if flags.get("tokenizer") == "char" else "nats per token"
        assert unit in experiment.draw.get("loss", unit), name


def test_the_picture_marks_what_is_cut_what_is_hidden_and_what_was_trained(scratch, monkeypatch):
    kept = []
    monkeypatch.setattr(ablate.pyplot(), "close", kept.append)
    (scratch / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 9.0 - i}) + "\n" for i in (1, 2, 3)))

    def panels(*variants):
        made = ablate.Experiment(
            "?",
            "",
            dict.fromkeys(variants),
            {"accuracy": "accuracy (%)"},
            {"loss": "loss", "kl": "KL"},
            dashed="no warm-up",
        )
        results = {
            (v, s): {"accuracy": (8.6, 71.4, 72.2)[s] if v == "post" else 50 + s, "by_position": [2.0] * 16}
            for v in variants
            for s in range(3)
        }
        ablate.draw(made, results, dict.fromkeys(results, scratch), [0, 1, 2], scratch / "picture.png")
        return kept[-1].axes

    bars, curves, never, positions = panels("post", "post, no warm-up")[:4]
    assert not never.lines  # what no run has logged
    arrows = [(line.get_marker(), *line.get_ydata()) for line in bars.lines if line.get_marker() in ("<", ">")]
    assert arrows == [("<", 0), (">", 0)]  # 50.7 ± 90.7; not 51 ± 2.5
    assert bars.get_xlabel() == "accuracy (%)\nan arrow: the interval goes on"
    assert [line.get_linestyle() for line in curves.lines] == ["-", "--"]
    assert [line.get_linestyle() for line in positions.lines] == ["-", "--", "--"]
    assert list(positions.lines[-1].get_xdata()) == [8.5, 8.5]  # between the 8th and the 9th of 16
    assert len(curves.collections) == 2  # bands
    bars, curves, *_ = panels(*map(str, range(8)))
    assert bars.get_xlabel() == "accuracy (%)"
    assert not curves.collections
    assert len(curves.lines) == 8


def test_curves_of_seeds_that_lack_steps():
    """By step, not by place: the third KL of a run that has none at step 100 is that of step 150."""
    whole, holed = ([1, 50, 100, 150], [0.0, 1.0, 2.0, 3.0]), ([1, 50, 150, 150], [4.0, 5.0, 6.0, 7.0])
    steps, values = ablate.side_by_side([whole, holed])
    assert steps.tolist() == [1, 50, 150]
    assert values.tolist() == [[0, 1, 3], [4, 5, 7]]  # of a step logged twice, before and after a resume, the last
    assert [x.numel() for x in ablate.side_by_side([whole, ([2], [0.0])])] == [0, 0]
    assert [x.numel() for x in ablate.side_by_side([])] == [0, 0]
    many = list(range(100)), [float(i % 2) for i in range(100)]
    steps, values = ablate.side_by_side([many, many])
    assert steps.tolist() == [0.5 + 2 * i for i in range(50)]
    assert values.tolist() == [[0.5] * 50] * 2


def test_a_run_that_diverged_is_a_result(experiment, scratch):
    hot = [
        ("pretrain", experiment.variants["wide"][0][1] | {"lr": 1e30, "clip": 0.0, "steps": 5, "optimizer": "adamw"})
    ]
    experiment.variants["hot"] = hot
    settings = ablate.settings_of("width", experiment, "hot", 0, False)
    figures = ablate.run_one(settings, "runs/ablate/hot", 1)
    assert list(figures) == ["diverged"]
    saved = json.loads((scratch / "runs/ablate/hot/result.json").read_text())
    assert saved["figures"] == figures
    assert saved["configs"][0]["weight_decay"] == 0.1  # the defaults too
    results = fake(experiment, [[1, 2, 3], [2, 1, 4], [5, 6, 7]]) | {("hot", 0): figures}
    text = ablate.report("width", experiment, results, [0, 1, 2], "x", scratch / "width.md", ["abc", "abc"])
    assert "Diverged: hot, seed 0: at step" in text
    assert "| hot | – |" in text
    assert "commit abc." in text
    folders = {key: scratch / "runs/ablate/hot/run" for key in results}
    ablate.draw(experiment, results, folders, [0, 1, 2], scratch / "width.png")


def test_the_probes_on_a_small_model(scratch, monkeypatch):
    """What the architecture experiments measure, on an untrained model of theirs: shapes and ranges."""
    (scratch / "text.txt").write_text("the cat sat on the mat. " * 400)
    monkeypatch.setattr(ablate, "_corpus", lambda: "text.txt")
    for measure, positions in (("layers", "rope"), ("beyond", "rope"), ("beyond", "learned"), ("clipping", "rope")):
        [(stage, flags)] = small(positions=positions, n_layer=2, context=32)
        settings = {"stages": [[stage, flags | {"seed": 0}]], "seed": 0, "measure": measure}
        got = ablate.run_one(settings, f"runs/ablate/{measure}-{positions}", 1)
        if measure == "layers":
            assert len(got["stream_built"]) == len(got["gradient_trained"]) == 2
            assert got["gradient_ratio"] > 0
            assert 20 < len(got["text"]) <= 31
        elif measure == "beyond":
            assert math.isfinite(got["inside"])
            assert math.isnan(got["outside"]) == (positions == "learned")
            assert 0 < got["entropy"] < math.log(32)
            assert torch.tensor(got["attention"]).sum(-1).tolist() == pytest.approx([1.0] * 32, abs=1e-5)
        else:
            norms = list(metrics("runs/ablate/clipping-rope/run", "grad_norm").values())
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
    monkeypatch.setattr(ablate, "_text", lambda split: "x" * 650)
    monkeypatch.setattr(ablate, "_stretched", lambda raw, context: Counting(context))
    monkeypatch.setattr(ablate, "attention_of", lambda raw, rows: {"rows": tuple(rows.shape)})
    tokenizer = SimpleNamespace(encode=lambda text: list(range(len(text))))
    for positions in ("rope", "learned"):
        model = Counting(32, positions)
        monkeypatch.setattr(ablate, "open_checkpoint", lambda path, model=model: (model, tokenizer, None))
        got = ablate.beyond("", {"path": ""}, {})
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
    monkeypatch.setattr(ablate, "open_checkpoint", lambda path: (Doubling(config), tokenizer, None))
    monkeypatch.setattr(ablate, "Transformer", Doubling)
    monkeypatch.setattr(ablate, "generate", lambda *args, **kwargs: written)
    monkeypatch.setattr(ablate, "_text", lambda split: "x" * 2048)
    monkeypatch.setattr(ablate, "attention_of", lambda raw, rows: {"rows": tuple(rows.shape)})
    got = ablate.layers("", {"path": ""}, {"seed": 0})
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
    monkeypatch.setattr(ablate, "open_checkpoint", lambda path: (None, tokenizer, None))
    monkeypatch.setattr(ablate, "generate", say)
    got = ablate.copying("", {"path": ""}, {})
    assert got["copied"] == [100.0 * (d in known) for d in ablate.COPY_DISTANCES]
    inside = [d for d in ablate.COPY_DISTANCES if d <= 48]  # what it was trained on
    assert got["copied_inside"] == pytest.approx(100 * len(known & set(inside)) / 8)
    assert got["copied_outside"] == pytest.approx(100 * len(known - set(inside)) / 3)


def test_the_lines_to_copy():
    lines = [ablate._copy_line(i, 0, 48) for i in range(4000)]
    dots = sorted(len(re.fullmatch(r"([a-z])(\.*)\|\1", line)[2]) for line in lines)
    assert (dots[0], dots[-1]) == (0, 48)
    assert abs(dots[2000] - (50**0.5 - 1)) < 1.5  # dots + 1 is log-uniform over 1 to 50, cut to whole numbers
    assert len({line[0] for line in lines}) == 26
    assert {len(ablate._copy_line(i, 7, 7)) for i in range(50)} == {10}


def test_a_variant_may_be_the_sft_start_of_its_seed(scratch, monkeypatch):
    class Built(Exception):
        pass

    def main(config):
        raise Built(config.init, config.seed)

    stage = import_module("sft")
    monkeypatch.setattr(stage, "main", main)
    monkeypatch.setattr(ablate, "sft_start", lambda config, dist: f"runs/start/{config.seed}")
    settings = ablate.settings_of("ladder", ablate.EXPERIMENTS["ladder"], "SFT", 3, False)
    with pytest.raises(Built) as built:
        ablate._run(settings, "runs/ablate/x", 1)
    assert built.value.args == ("runs/start/3", 3)


class Here:
    """The pool's place, in this process: a spawned one would not know a test's experiment."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, call, *args):
        job = Future()
        try:
            job.set_result(call(*args))
        except BaseException as error:
            job.set_exception(error)
        return job


def test_what_only_looks_at_a_start_goes_last(scratch, monkeypatch):
    order = []

    def not_run(settings, *args):
        order.append(settings["stages"][0][1].get("init"))
        raise RuntimeError("not run")

    monkeypatch.setattr(ablate, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablate, "run_one", not_run)
    with pytest.raises(ConfigError, match="6 of the runs failed"):
        ablate.main(ablate.Config(experiment="ladder", quick=True, seeds=[0]))
    assert order == [None] * 5 + ["START"]


def test_the_whole_experiment_resumes_and_keeps_a_persons_words(experiment, scratch, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "ProcessPoolExecutor", Here)
    config = ablate.Config(experiment="width", quick=True, seeds=[0])
    experiment.quick = {"steps": 1}
    results = ablate.main(config)
    assert set(results) == {("narrow", 0), ("wide", 0)}
    target = scratch / "runs/ablate/width-quick/width.md"
    assert (target.with_suffix(".png")).stat().st_size > 5000
    target.write_text(target.read_text() + "\n## Reading\nWider is dearer.\n")
    made = {p: p.stat().st_mtime_ns for p in scratch.rglob("result.json")}
    assert len(made) == 2
    assert ablate.main(config) == results  # nothing is run again
    assert {p: p.stat().st_mtime_ns for p in scratch.rglob("result.json")} == made
    assert target.read_text().endswith("## Reading\nWider is dearer.\n")
    stale = min(made)  # the same flags, but a default was another when it was made
    saved = json.loads(stale.read_text())
    saved["configs"][0]["clip"] = 9.0
    stale.write_text(json.dumps(saved))
    assert {k: v["valid_loss"] for k, v in ablate.main(config).items()} == {
        k: v["valid_loss"] for k, v in results.items()
    }
    assert json.loads(stale.read_text())["configs"][0]["clip"] == 1.0
    results = ablate.main(config)
    only = ablate.main(ablate.Config(experiment="width", quick=True, seeds=[0], variants=["wide"]))
    assert only == {("wide", 0): results["wide", 0]}
    assert "| narrow |" not in target.read_text()
    assert ablate.left_out(target, "width", ["wide"], [0]) == []
    assert ablate.left_out(target, "width", ["narrow"], [0]) == ["wide"]
    assert ablate.left_out(target, "width", ["wide", "narrow"], [1, 2]) == ["seed 0"]
    assert ablate.left_out(scratch / "none.md", "width", [], []) == []
    with pytest.raises(ConfigError, match="width has no tall"):
        ablate.Config(experiment="width", variants=["tall"])
    monkeypatch.setattr(ablate, "RUNS", scratch / "runs")
    for folder in (scratch / "runs/ablate").glob("width-quick/*"):
        if folder.is_dir():
            shutil.copytree(folder, scratch / "runs/ablate/width" / folder.name)
    changed = ablate.Config(experiment="width", seeds=[0])
    with pytest.raises(
        ConfigError, match=r"2 of the runs were made by other settings .*narrow-seed0 first; --again true"
    ):
        ablate.main(changed)  # the quick runs had fewer steps
    experiment.variants["narrow"] = small(width=16, n_head=3)  # 16 is no multiple of 3
    with pytest.raises(ConfigError, match=r"1 of the runs failed, the others are kept: narrow, seed 0: width 16"):
        ablate.main(config)


def test_bad_input(scratch):
    assert_one_line_error(script("ablate.py", "nonsense", cwd=scratch), "'nonsense' is not an experiment", "norm-kind")
    listed = script("ablate.py", "--list", cwd=scratch)
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ablate.EXPERIMENTS)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_one_of_its_stages_settings(recipe, scratch):
    stage = re.search(r"python (\w+)\.py", recipe.read_text(encoding="utf-8"))[1]
    config = parse_config(import_module(stage).Config, ["--config", str(recipe)])
    assert recipe.stem.startswith(config.name)  # its run directory says which recipe it was


@pytest.mark.parametrize("how", ["SIGTERM to one process, as a batch system", "Ctrl-C to all, as a terminal"])
def test_a_stop_stops_all(how, tmp_path):
    """The runs hold the pipe open as long as they live, which would be minutes."""
    environment = os.environ | {"ALIGN_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "ablate.py"), "norm-kind"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        running, end = [], time.monotonic() + 120
        while len(running) < 2 and time.monotonic() < end:
            time.sleep(0.2)
            running = list(tmp_path.glob("runs/ablate/norm-kind/*/run/metrics.jsonl"))
            running = [log for log in running if '"loss"' in log.read_text()]
        if "SIGTERM" in how:
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert said.endswith("stopped; the same command makes the runs that are missing\n")
    logs = [log.read_text() for log in tmp_path.glob("runs/ablate/norm-kind/*/log.txt")]
    assert ["saved; add --resume" in log for log in logs] == [True, True]  # and a third has not begun
