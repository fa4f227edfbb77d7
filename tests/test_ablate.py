"""ablate.py: the intervals by hand, every experiment's flags, a small experiment from first run to picture."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future
from dataclasses import asdict, replace
from importlib import import_module

import pytest
import torch
from conftest import ROOT, assert_one_line_error, script

import ablate
import pretrain
import sft
from support import ablation_runs, probes, repeated, workers
from support.ablation_report import CURVES, HEADINGS, mean_curves, seeds_on
from support.cli import parse_config
from support.code_used import code_used, files_that_differ
from support.errors import ConfigError
from support.experiments import Experiment
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig


def test_the_interval_by_hand():
    # 1, 2, 6: mean 3, s² = (4 + 1 + 9) / 2 = 7, half = 4.303 · √(7/3)
    interval = ablate.student_interval([1.0, 2.0, 6.0])
    assert interval.mean == 3.0
    assert interval.half == pytest.approx(4.303 * math.sqrt(7 / 3), rel=1e-4)
    assert interval.p == pytest.approx(0.188, abs=5e-4)  # t = 3 / √(7/3) = 1.964 with 2 degrees
    assert not interval.significant
    assert math.isnan(ablate.student_interval([1.0]).half)
    for bad in (math.nan, math.inf):
        assert all(map(math.isnan, ablate.student_interval([1.0, bad, 2.0])))
    paired = ablate.paired_difference([1.5, 2.51, 3.49], [1.0, 2.0, 3.0])
    assert paired[:2] == pytest.approx((0.5, 4.303 * 0.01 / math.sqrt(3)), rel=1e-4)
    assert paired.significant
    assert ablate.student_interval([2.0, 2.0]) == (2.0, 0.0, 0.0)  # no spread at all
    assert ablate.student_interval([0.0, 0.0]) == (0.0, 0.0, 1.0)
    assert ablate.paired_difference([1.0, 2.0, 3.0], [1.5, 2.51, 3.49]).mean == -paired.mean
    assert ablate.Interval(-1.0, 0.5, 0.049).significant
    assert not ablate.Interval(-1.0, 0.5, 0.05).significant
    assert not ablate.Interval(0.5, math.nan).significant


@pytest.mark.parametrize(
    ("degrees", "quantiles"),  # of 0.8, 0.95, 0.975 and 0.995, from a printed table
    [
        (1, (1.376, 6.314, 12.706, 63.657)),
        (2, (1.061, 2.920, 4.303, 9.925)),
        (3, (0.978, 2.353, 3.182, 5.841)),
        (4, (0.941, 2.132, 2.776, 4.604)),
        (7, (0.896, 1.895, 2.365, 3.499)),
        (30, (0.854, 1.697, 2.042, 2.750)),
    ],
)
def test_students_law_is_that_of_the_tables(degrees, quantiles):
    for q, t in zip((0.8, 0.95, 0.975, 0.995), quantiles, strict=True):
        assert ablate.student_t(q, degrees) == pytest.approx(t, abs=6e-4)
        assert ablate.student_p(ablate.student_t(q, degrees), degrees) == pytest.approx(2 * (1 - q), abs=1e-12)
    assert ablate.student_p(0.0, degrees) == 1


def test_holms_correction_by_hand():
    assert ablate.holm([0.01, 0.04, 0.03, 0.005]) == [0.03, 0.06, 0.06, 0.02]  # Holm 1979: 4, 3, 2 and 1 times
    assert ablate.holm([0.02, math.nan, 0.5])[::2] == [0.04, 0.5]  # what has no p is no comparison
    assert math.isnan(ablate.holm([0.02, math.nan])[1])
    assert ablate.holm([0.9, 0.8]) == [1.0, 1.0]
    assert ablate.holm([0.3]) == [0.3]
    # Of ten comparisons without a difference, at most one table in twenty calls any significant.
    torch.manual_seed(0)
    tables = torch.rand(2000, 10, dtype=torch.float64).tolist()
    assert sum(min(ablate.holm(ps)) < 0.05 for ps in tables) / 2000 == pytest.approx(0.05, abs=0.015)
    # Nor of the nine others, where the tenth difference is real.
    assert sum(min(ablate.holm([1e-6, *ps[1:]])[1:]) < 0.05 for ps in tables) / 2000 == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (3, 9), (5, 1), (5, 4), (5, 9)])
def test_the_smallest_difference_is_seen_in_four_of_five_experiments(n, m):
    """Of m comparisons at Holm's first step: p below 0.05 / m."""
    torch.manual_seed(0)
    s = 2.0
    spread = ablate.Interval(0.0, ablate.student_t(0.975, n - 1) * s / math.sqrt(n))
    x = torch.randn(200_000, n, dtype=torch.float64) * s + ablate.smallest_difference([spread], n, m)
    t = x.mean(1) / (x.std(1) / math.sqrt(n))
    assert (t > ablate.student_t(1 - 0.025 / m, n - 1)).double().mean().item() == pytest.approx(0.8, abs=0.005)


def test_one_seed_shows_no_difference():
    assert math.isnan(ablate.smallest_difference([ablate.Interval(1.0, 1.0)], 1))
    assert math.isnan(ablate.smallest_difference([ablate.Interval(1.0, math.nan)], 3))


def test_the_smallest_difference_is_at_the_median_spread():
    def least(*halves):
        return ablate.smallest_difference([ablate.Interval(0.0, half) for half in halves], 3)

    assert least(1.0, 2.0, 9.0) == least(2.0)
    assert least(0.0, 2.0, math.nan) == least(2.0)  # without a spread, or of a run that diverged


def test_what_is_compared_with_what():
    results = {(v, s): {"a": i + s, "b": 1.0} for i, v in enumerate("xyz") for s in (0, 1)} | {("z", 1): {"b": 1.0}}
    plain = Experiment("?", "", dict.fromkeys("xyz"), ("a", "b"), ())
    means = ablate.intervals_of(plain, results, [0, 1])
    assert means["x"]["a"].mean == 0.5
    assert math.isnan(means["z"]["a"].mean)  # one of its seeds has no such figure
    differences = ablate.differences_of(plain, results, [0, 1])
    assert list(differences) == [("y", "x"), ("z", "x")]
    assert differences["y", "x"] == {"a": (1.0, 0.0, 0.0), "b": (0.0, 0.0, 1.0)}
    against, pairs = replace(plain, against="y"), replace(plain, pairs=(("z", "y"),))
    assert list(ablate.differences_of(against, results, [0, 1])) == [("x", "y"), ("z", "y")]
    assert list(ablate.differences_of(pairs, results, [0, 1])) == [("z", "y")]


def test_a_curve_is_the_mean_of_the_seeds_at_the_steps_that_all_have():
    logs = {("x", 0): {"kl": ([1, 2, 3], [1.0, 2.0, 3.0])}, ("x", 1): {"kl": ([1, 3], [3.0, 5.0])}, ("y", 0): {}}
    logs["y", 1] = {"loss": ([1], [0.0])}
    assert list(mean_curves(logs, "xy", [0, 1], "kl", ablate.student_interval)) == ["x"]
    steps, intervals = mean_curves(logs, "xy", [0, 1], "kl", ablate.student_interval)["x"]
    assert steps == [1, 3]
    assert [interval.mean for interval in intervals] == [2.0, 4.0]
    assert [interval.half for interval in intervals] == pytest.approx([12.706] * 2, rel=1e-4)  # s = √2, n = 2
    assert math.isnan(mean_curves(logs, "xy", [0], "kl", ablate.student_interval)["x"][1][0].half)
    logs["x", 1] = {}  # this seed diverged at once: a mean of the others would flatter
    assert mean_curves(logs, "xy", [0, 1], "kl", ablate.student_interval) == {}


def test_the_worked_example_holds(capsys):
    ablate.demo()
    assert "0.50 ± 0.02" in capsys.readouterr().out


def test_students_quantiles_cover_95_per_cent():
    """Of 40,000 samples of n normal numbers, the interval holds the true mean in 95 %; ± 0.4 % is four deviations."""
    torch.manual_seed(0)
    for n in (2, 3, 5, 10):
        x = torch.randn(40_000, n, dtype=torch.float64) + 7
        half = ablate.student_t(0.975, n - 1) * x.std(1) / math.sqrt(n)
        assert ((x.mean(1) - 7).abs() < half).double().mean().item() == pytest.approx(0.95, abs=0.0044)


@pytest.mark.parametrize("name", ablate.EXPERIMENTS)
def test_every_variant_has_flags_that_its_stage_knows(name, scratch, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(scratch))
    experiment = ablate.EXPERIMENTS[name]
    assert experiment.probe is None or callable(getattr(probes, experiment.probe))
    assert {*experiment.columns, *experiment.bars, *experiment.front} <= HEADINGS.keys()
    assert {*experiment.curves} <= CURVES.keys()
    assert {variant for pair in experiment.compared() for variant in pair} <= experiment.variants.keys()
    for variant in experiment.variants:
        for quick in (False, True):
            settings = ablate.settings_of(experiment, variant, 3, quick)
            config = ablation_runs.config_of(settings["stage"], settings["config"])
            assert config.seed == 3
            assert settings["stage"] == "measure" or config.steps <= 4 or not quick
            assert settings["config"].get("test_problems", 20) == 20 or not quick
            assert config.name == ablation_runs.STAGES[settings["stage"]][0]().name
            assert (
                json.loads(json.dumps(asdict(config))) == settings["config"]
            )  # comparable with what result.json holds


def test_curves_are_labelled_by_the_unit_of_what_is_trained():
    for name, experiment in ablate.EXPERIMENTS.items():
        _, flags = next(iter(experiment.variants.values()))
        assert experiment.unit == ("character" if flags.get("tokenizer") == "char" else "token"), name


def test_a_page_names_the_corpus_that_its_models_read():
    assert ablate.EXPERIMENTS["norm-kind"].text == probes.corpus()
    assert ablate.EXPERIMENTS["copying"].text is None  # a file that is made for it
    assert ablate.EXPERIMENTS["grpo"].text is None


def small(**changes):
    model = {"context": 16, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "width": 16} | changes
    sizes = {"steps": 2, "batch": 2, "micro_batch": 2, "model": model}
    return "pretrain", {"data": "text.txt", "tokenizer": "char"} | sizes


@pytest.fixture
def experiment(scratch, monkeypatch):
    (scratch / "text.txt").write_text("the cat sat on the mat. " * 100, encoding="utf-8")
    variants = {"narrow": small(), "wide": small(width=32)}
    width = Experiment("Is wider better?", "the rest", variants, ("valid_loss", "parameters"), ("loss",))
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", width)
    return width


def test_a_run_writes_its_figures_and_a_repetition_gives_the_same(experiment, scratch):
    settings = ablate.settings_of(experiment, "narrow", 5)
    first = ablate.run_one(settings, "runs/ablate/a", 1)
    again = ablate.run_one(settings, "runs/ablate/b", 1)
    other = ablate.run_one(ablate.settings_of(experiment, "narrow", 6), "runs/ablate/c", 1)
    assert first["valid_loss"] == again["valid_loss"] != other["valid_loss"]
    assert first["cache"] == 2 * 8  # a key and a value of one layer's one shared head
    assert json.loads((scratch / "runs/ablate/a/result.json").read_text(encoding="utf-8"))["settings"] == settings
    assert "validation loss" in (scratch / "runs/ablate/a/log.txt").read_text(encoding="utf-8")


def test_runs_share_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert [workers.threads_each(jobs) for jobs in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert workers.threads_each(2) == 32


def test_a_run_that_diverged_is_a_result(experiment, scratch):
    stage, flags = small(width=32)
    experiment.variants["hot"] = stage, flags | {"lr": 1e30, "clip": 0.0, "steps": 5, "optimizer": "adamw"}
    settings = ablate.settings_of(experiment, "hot", 0)
    figures = ablate.run_one(settings, "runs/ablate/hot", 1)
    assert list(figures) == ["diverged"]
    saved = json.loads((scratch / "runs/ablate/hot/result.json").read_text(encoding="utf-8"))
    assert saved["figures"] == figures
    assert saved["settings"]["config"]["weight_decay"] == 0.1  # the defaults too


def test_a_run_that_was_stopped_leaves_no_figures_of_the_one_before(experiment, scratch, monkeypatch):
    settings, folder = ablate.settings_of(experiment, "narrow", 0), scratch / "runs/ablate/a"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}", encoding="utf-8")

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation_runs, "figures_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        ablate.run_one(settings, folder, 1)
    assert not (folder / "result.json").exists()


def test_a_variant_may_be_a_start_that_is_measured_and_not_trained(scratch, monkeypatch):
    tokenizer = BPETokenizer.train(["the cat sat on the mat"], 300)
    sizes = dict(context=200, n_layer=1, n_head=2, n_kv_head=1, width=16)
    Transformer(TransformerConfig(tokenizer.vocab_size, **sizes)).save_pretrained("start")
    tokenizer.save_pretrained("start")
    asked = []
    monkeypatch.setattr(probes, "sft_start", lambda config, dist: asked.append(config.seed) or "start")
    monkeypatch.setattr(sft, "main", None)  # nothing is trained
    measured = []
    monkeypatch.setattr(probes, "carried_over", lambda *args: measured.append(args) or {"kl": 0.5})
    settings = ablate.settings_of(ablate.EXPERIMENTS["ladder"], "SFT", 3, quick=True)
    figures = ablate.run_one(settings, "runs/ablate/x", 1)
    assert asked == [3]
    assert figures.keys() >= {"accuracy", "f1", "kl", "minutes", "parameters"}
    assert (figures["n"], figures["kl"], figures["path"]) == (20, 0.5, "start")
    assert not (scratch / "runs/ablate/x/run").exists()
    [(folder, _, given)] = measured
    assert (str(folder), given) == ("runs/ablate/x/run", settings)
    told = {"accuracy": 0.25, "story_kept": 0.5, "path": "start"}
    monkeypatch.setitem(ablation_runs.STAGES, "measure", (probes.Start, lambda config: told))
    figures = ablate.run_one(settings, "runs/ablate/y", 1)
    assert (figures["accuracy"], figures["story_kept"]) == (25, 50)  # in per cent, as the headings of a page say


def test_no_experiment_trains_in_order_to_measure():
    for experiment in ablate.EXPERIMENTS.values():
        assert all(flags.get("lr", 1) > 1e-6 for _, flags in experiment.variants.values())


class Here:
    """The pool's place, in this process: a spawned one would not know a test's experiment."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def shutdown(self, **_):
        pass

    def submit(self, call, *args):
        job = Future()
        try:
            job.set_result(call(*args))
        except BaseException as error:
            job.set_exception(error)
        return job


def test_the_whole_experiment_resumes_and_keeps_a_persons_words(experiment, scratch, monkeypatch, capsys):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    config = ablate.Config(experiment="width", quick=True, seeds=[0])
    monkeypatch.setattr(ablation_runs, "QUICK", {"steps": 1})
    results = ablate.main(config)
    assert set(results) == {("narrow", 0), ("wide", 0)}
    target = scratch / "runs/ablate/width-quick/width.md"
    assert (target.with_suffix(".png")).stat().st_size > 5000
    target.write_text(target.read_text(encoding="utf-8") + "\n## Reading\nWider is dearer.\n", encoding="utf-8")
    written = {p: p.stat().st_mtime_ns for p in scratch.rglob("result.json")}
    assert len(written) == 2
    assert ablate.main(config) == results  # nothing is run again
    assert {p: p.stat().st_mtime_ns for p in scratch.rglob("result.json")} == written
    assert target.read_text(encoding="utf-8").endswith("## Reading\nWider is dearer.\n")
    moved = json.loads(min(written).read_text(encoding="utf-8"))
    min(written).write_text(json.dumps(moved | {"machine": "a moved disk"}), encoding="utf-8")
    ablate.main(config)
    assert f"; {' and '.join(sorted([moved['machine'], 'a moved disk']))}, commit" in target.read_text(encoding="utf-8")
    shutil.rmtree(scratch / "runs/ablate/width-quick/wide-seed0/run")  # a start that is only measured has no log
    assert ablate.main(config) == results
    stale = min(written)  # the same flags, but a default was another when it was made
    saved = json.loads(stale.read_text(encoding="utf-8"))
    saved["settings"]["config"]["clip"] = 9.0
    stale.write_text(json.dumps(saved), encoding="utf-8")
    assert {k: v["valid_loss"] for k, v in ablate.main(config).items()} == {
        k: v["valid_loss"] for k, v in results.items()
    }
    assert json.loads(stale.read_text(encoding="utf-8"))["settings"]["config"]["clip"] == 1.0
    assert seeds_on(target) == [0]
    assert seeds_on(scratch / "none.md") == []
    for module in (ablate, ablation_runs):
        monkeypatch.setattr(module, "RUNS", scratch / "runs")
    for folder in (scratch / "runs/ablate").glob("width-quick/*"):
        if folder.is_dir():
            shutil.copytree(folder, scratch / "runs/ablate/width" / folder.name)
    changed = ablate.Config(experiment="width", seeds=[0])
    with pytest.raises(
        ConfigError, match=r"2 of the runs were made by other settings .*narrow-seed0 first; --again true"
    ):
        ablate.main(changed)  # the quick runs had fewer steps
    stage, flags = small()
    experiment.variants["narrow"] = stage, flags | {"data": "gone.txt"}
    with pytest.raises(ConfigError, match=r"1 of the runs failed, the others are kept: narrow, seed 0: gone.txt"):
        ablate.main(config)


def test_a_run_of_other_code_is_neither_taken_in_silence_nor_lost(experiment, scratch, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablate, "__file__", str(scratch / "ablate.py"))
    (scratch / "results").mkdir()
    config = ablate.Config(experiment="width", seeds=[0])
    results = ablate.main(config)
    wide = next(scratch.rglob("width/wide-seed0/result.json"))
    saved = json.loads(wide.read_text(encoding="utf-8"))
    assert saved["code"]["transformer.py"] == code_used(["pretrain"])["transformer.py"]
    assert "agent.py" not in saved["code"]
    saved["code"]["optim.py"] = "another"
    wide.write_text(json.dumps(saved), encoding="utf-8")
    written = wide.stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"^1 of the runs were made by other code \(optim.py\), \S*wide-seed0 "):
        ablate.main(config)
    assert ablate.main(replace(config, old_code=True)) == results
    assert wide.stat().st_mtime_ns == written  # neither has run anything
    again = ablate.main(replace(config, again=True))
    assert wide.stat().st_mtime_ns > written
    assert again["wide", 0]["valid_loss"] == results["wide", 0]["valid_loss"]
    assert again["narrow", 0] == results["narrow", 0]  # its minutes too: it has not run
    assert ablate.main(config) == again

    def interrupted(config):
        (scratch / "runs" / config.name).mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setitem(workers.STATE, "stopped", False)  # and restored, for this process is no worker of its own
    monkeypatch.setitem(ablation_runs.STAGES, "pretrain", (pretrain.Config, interrupted))
    wide.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(SystemExit):
        ablate.main(replace(config, again=True))
    assert not wide.exists()  # its figures are not those of the run that has begun in their place
    assert next(scratch.rglob("width/narrow-seed0/result.json")).exists()


def test_a_run_of_a_page_is_repeated_and_compared(experiment, scratch, monkeypatch, capsys):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablate, "__file__", str(scratch / "ablate.py"))
    with pytest.raises(ConfigError, match=r"^no page of any experiment has its figures"):
        ablate.main(ablate.Config(verify=True))
    experiment.tune, experiment.grid, experiment.tune_steps = "lr", (1e-3, 1e-2), 2
    monkeypatch.setattr(ablate, "validation_score", lambda folder: float(folder.name.endswith("0.01-seed0")))
    ablate.main(ablate.Config(experiment="width", seeds=[0, 1]))
    assert "2 seeds (0, 1)" in (scratch / "results/width.md").read_text(encoding="utf-8")
    page = scratch / "results/width.json"
    saved = json.loads(page.read_text(encoding="utf-8"))
    assert saved["tuned"] == {"narrow": 1e-2, "wide": 1e-2}
    assert {(v, seed) for v, seed, _ in saved["runs"]} == {(v, seed) for v in ("narrow", "wide") for seed in (0, 1)}
    for _ in range(3):  # whichever is drawn; only with the tuned rate are they the same
        ablate.main(ablate.Config(verify=True))
    assert "0 of " in capsys.readouterr().out
    for _, _, figures in saved["runs"]:
        figures["minutes"] += 1  # another day
    page.write_text(json.dumps(saved), encoding="utf-8")
    ablate.main(ablate.Config(experiment="width", verify=True))
    for _, _, figures in saved["runs"]:
        figures["valid_loss"] += 1e-12
    page.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^1$"):
        ablate.main(ablate.Config(experiment="width", verify=True))
    assert "1 of " in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(repeated.random, "choice", lambda runs: drawn.append(runs) or runs[0])
    lost = ["narrow", 7, {"diverged": True}]
    page.write_text(json.dumps(saved | {"runs": [lost, *saved["runs"]]}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^1$"):
        ablate.main(ablate.Config(experiment="width", verify=True))
    assert drawn[-1] == saved["runs"]  # one that diverged has no figures to compare
    page.write_text(json.dumps(saved | {"runs": [lost]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="no run of the page has figures, all diverged"):
        ablate.main(ablate.Config(experiment="width", verify=True))
    capsys.readouterr()
    made = saved.pop("made")
    page.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^1$"):
        ablate.main(ablate.Config(experiment="width", verify=True))
    assert "width.json does not say by which settings it was made" in capsys.readouterr().out
    page.write_text(json.dumps(saved | {"made": made}), encoding="utf-8")
    experiment.variants["narrow"] = ("pretrain", experiment.variants["narrow"][1] | {"clip": 0.5})
    with pytest.raises(ConfigError, match=r"width\.json: 'narrow' has other settings now, or another text"):
        ablate.main(ablate.Config(experiment="width", verify=True))


def test_a_crash_of_a_run_leaves_its_traceback(experiment, scratch, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablation_runs, "figures_of", lambda *_: {}["accuracy"])
    with pytest.raises(ConfigError, match=r"narrow, seed 0: KeyError: 'accuracy' \(see .*narrow-seed0/log.txt\)"):
        ablate.main(ablate.Config(experiment="width", quick=True, seeds=[0]))
    assert "Traceback" in next(scratch.rglob("narrow-seed0/log.txt")).read_text(encoding="utf-8")


def test_a_run_depends_on_the_files_that_its_probe_reads(tmp_path, monkeypatch):
    settings = {"stage": "measure", "config": {}, "probe": "carried_over"}
    before = ablation_runs.code_of_run(settings)
    assert "tests/handwritten.jsonl" in before
    assert "tests/handwritten.jsonl" not in ablation_runs.code_of_run(settings | {"probe": None})
    monkeypatch.setattr(ablation_runs, "ROOT", tmp_path)
    (changed := tmp_path / "tests/handwritten.jsonl").parent.mkdir()
    changed.write_text(probes.BY_HAND.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setitem(probes.READS, "carried_over", (changed,))
    assert files_that_differ(before, ablation_runs.code_of_run(settings)) == ["tests/handwritten.jsonl"]


def test_figures_that_are_not_finite_and_a_full_disk(experiment, scratch, monkeypatch):
    """null in result.json is a dash on the page; a page that does not fit is one line, and the earlier one is kept."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablation_runs, "QUICK", {"steps": 1})
    monkeypatch.setattr(ablation_runs, "figures_of", lambda *_: {"valid_loss": math.nan, "text": "a", "minutes": 1.0})
    config = ablate.Config(experiment="width", quick=True, seeds=[0])
    monkeypatch.setattr(ablate, "EXPERIMENTS", {"width": replace(ablate.EXPERIMENTS["width"], curves=())})
    results = ablate.main(config)
    assert math.isnan(results["narrow", 0]["valid_loss"])
    folder = scratch / "runs/ablate/width-quick"
    saved = json.loads((folder / "narrow-seed0/result.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert saved["figures"] == {"valid_loss": None, "text": "a", "minutes": 1.0}
    before = (folder / "width.md").read_text(encoding="utf-8")
    assert "| narrow | –" in before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        ablate.main(config)
    assert (folder / "width.md").read_text(encoding="utf-8") == before
    assert not list(folder.glob("*.tmp*"))


def test_each_variant_gets_the_value_that_the_validation_split_prefers(experiment, scratch, monkeypatch):
    """On the first seed, in short runs of their own; then every seed has it."""
    made = {}

    def run_one(settings, folder, threads):
        config = settings["config"]
        made[str(folder)] = settings
        (scratch / folder / "run").mkdir(parents=True)
        result = {"settings": settings, "commit": "abc", "figures": {"valid_loss": config["lr"], "parameters": 1}}
        if config["lr"] == 3e-3 and config["model"]["width"] == 32:
            result["figures"] = {"diverged": "at step 1"}
        (scratch / folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        best = 1e-3 if config["model"]["width"] == 16 else 2e-3
        values = (0.0, 0.0, 0.9, 0.6) if config["lr"] == best else (1.0, 1.0, 0.1, 0.9)  # neither start nor end decides
        lines = [{"step": i + 1, "valid_loss": 1 - x, "loss": 1.0} for i, x in enumerate(values)]
        (scratch / folder / "run/metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablate, "run_one", run_one)
    monkeypatch.setattr(ablate, "__file__", str(scratch / "ablate.py"))
    tuned = replace(experiment, tune="lr", grid=(1e-3, 2e-3, 3e-3), tune_steps=7)
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", tuned)
    ablate.main(ablate.Config(experiment="width", seeds=[4, 5]))
    tuning = {folder for folder in made if "tuning" in folder}
    assert len(tuning) == 6
    assert {made[folder]["config"]["seed"] for folder in tuning} == {4}
    assert {made[folder]["config"]["steps"] for folder in tuning} == {7}
    chosen = {(s["config"]["model"]["width"], s["config"]["lr"]) for f, s in made.items() if f not in tuning}
    assert chosen == {(16, 1e-3), (32, 2e-3)}
    page = (scratch / "results/width.md").read_text(encoding="utf-8")
    assert "--lr, chosen among 0.001, 0.002, 0.003 by the validation loss of seed 4" in page


def test_the_score_of_a_trial(tmp_path):
    """Of the second half, the accuracy where there is one."""
    run = tmp_path / "run"
    run.mkdir()
    for name, score in (("accuracy", 0.5), ("valid_loss", -0.5)):
        lines = [json.dumps({"step": i + 1, name: x}) + "\n" for i, x in enumerate((9.0, 9.0, 0.4, 0.6))]
        (run / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        (tmp_path / "result.json").write_text('{"figures": {}}', encoding="utf-8")
        assert ablation_runs.validation_score(tmp_path) == pytest.approx(score)
    (tmp_path / "result.json").write_text('{"figures": {"diverged": "at step 1"}}', encoding="utf-8")
    assert ablation_runs.validation_score(tmp_path) == -math.inf


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_result_that_is_damaged_is_one_line(tmp_path, content):
    (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"result\.json cannot be read \(.+\): delete it to make this run anew"):
        ablation_runs.read_result(tmp_path)


def test_a_tuning_that_can_choose_nothing(experiment, monkeypatch, scratch):
    monkeypatch.setattr(ablate, "run_missing", lambda *_: None)
    monkeypatch.setattr(ablate, "validation_score", lambda _: -math.inf)
    for flag, words in (("rate", "no variant of width has the flag that it tunes, 'rate'"), ("lr", "narrow diverged")):
        monkeypatch.setitem(ablate.EXPERIMENTS, "width", replace(experiment, tune=flag, grid=(1e-3, 2e-3)))
        with pytest.raises(ConfigError, match=words):
            ablate.main(ablate.Config(experiment="width"))


@pytest.mark.parametrize(
    "changes",
    [{"columns": ("none",)}, {"curves": ("none",)}, {"pairs": (("narrow", "none"),)}, {"probe": "none"}],
    ids=str,
)
def test_a_row_that_names_what_is_not_there(experiment, monkeypatch, scratch, changes):
    monkeypatch.setattr(ablate, "run_missing", lambda *_: pytest.fail("it trains"))
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", replace(experiment, **changes))
    with pytest.raises(ConfigError, match=r"width names what is not there: none$"):
        ablate.main(ablate.Config(experiment="width"))


@pytest.mark.parametrize("place", ["bars", "gains"])
def test_what_is_drawn_is_a_column(experiment, monkeypatch, scratch, place):
    monkeypatch.setattr(ablate, "run_missing", lambda *_: pytest.fail("it trains"))
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", replace(experiment, **{place: ("minutes",)}))
    with pytest.raises(ConfigError, match=r"width names what is not there: minutes$"):
        ablate.main(ablate.Config(experiment="width"))


def test_variants_that_would_share_a_folder(experiment, monkeypatch, scratch):
    assert ablation_runs.folder_name("β 0.1", "seed0") == "__0.1-seed0"  # a run's --name is ASCII
    two = {"a < 1": experiment.variants["narrow"], "a > 1": experiment.variants["wide"]}
    monkeypatch.setattr(ablate, "run_all", lambda *_: pytest.fail("it trains"))
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", replace(experiment, variants=two))
    with pytest.raises(ConfigError, match="two variants of width would share a folder"):
        ablate.main(ablate.Config(experiment="width"))


def test_a_worker_that_is_killed_is_one_line(experiment, monkeypatch, scratch):
    monkeypatch.setattr(ablate, "run_all", lambda _, todo, *__: dict.fromkeys(todo, BrokenExecutor()))
    with pytest.raises(ConfigError, match=r"a worker process was killed \(out of memory\?\), 2 runs are missing"):
        ablate.main(ablate.Config(experiment="width", seeds=[0]))


def test_the_grid_may_multiply_what_a_variant_has_anyway(experiment, scratch, monkeypatch):
    tried = []

    def run_missing(runs, *_):
        tried.extend((variant, value, settings["config"]["lr"]) for (variant, value), (settings, _) in runs.items())
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "run_missing", run_missing)
    with_rates = experiment.with_flags({"narrow": {"lr": 0.3}, "wide": {"lr": 0.01}})
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", replace(with_rates, tune="lr", grid=(0.5, 3), times_own=True))
    with pytest.raises(KeyboardInterrupt):
        ablate.main(ablate.Config(experiment="width"))
    assert tried == [(v, lr, lr) for v, lr in (("narrow", 0.15), ("narrow", 0.9), ("wide", 0.005), ("wide", 0.03))]


def test_a_trial_has_a_small_test_and_only_flags_of_its_stage():
    experiment = ablate.EXPERIMENTS["ladder"]
    tried = {v: ablate.settings_of(ablate.trial(experiment, v, 0.25), v, 0)["config"] for v in ("GRPO", "DPO")}
    assert {v: c["lr"] for v, c in tried.items()} == {"GRPO": 0.25, "DPO": 0.25}
    assert {c["steps"] for c in tried.values()} == {experiment.tune_steps}
    assert tried["GRPO"]["test_problems"] == tried["GRPO"]["pass_samples"] == 1
    assert tried["DPO"]["test_problems"] == 50  # of one problem, `dpo.main` may find no pair
    assert "pass_samples" not in tried["DPO"]
    counted = [step for step in range(1, 101) if step % tried["GRPO"]["eval_every"] == 0 and step > 50]
    assert len(counted) == 5  # evaluations in the second half, over which `validation_score` takes the mean


def test_a_start_that_is_only_measured_is_not_tuned(experiment, scratch, monkeypatch):
    asked = []

    def run_missing(runs, *_):
        asked.append({variant for variant, _ in runs})
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "run_missing", run_missing)
    with_start = replace(experiment, variants=experiment.variants | {"start": ("measure", {})}, tune="lr", grid=(1e-3,))
    monkeypatch.setitem(ablate.EXPERIMENTS, "width", with_start)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(ablate.Config(experiment="width"))
    assert asked == [set(experiment.variants)]


def test_a_page_keeps_its_seeds(experiment, scratch, monkeypatch):
    """Six seeds are not overwritten by three."""
    monkeypatch.setattr(ablate, "__file__", str(scratch / "ablate.py"))
    (scratch / "results").mkdir()
    (scratch / "results/width.md").write_text("Command: `x`. 4 seeds (0, 1, 2, 7); 2 cores\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"width.md also has the seeds 2, 7: move it aside, or run them too"):
        ablate.main(ablate.Config(experiment="width", seeds=[0, 1]))


def test_two_at_once_would_delete_each_others_results(experiment, scratch, monkeypatch):
    monkeypatch.setattr(ablate, "run_all", lambda *_: pytest.fail("it runs beside the other"))
    top = scratch / "runs/ablate/width"
    top.mkdir(parents=True)
    other = os.open(top, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match=r"width is being written by another process; wait until it has ended"):
        ablate.main(ablate.Config(experiment="width", seeds=[0]))
    os.close(other)


def test_bad_input(scratch):
    assert_one_line_error(script("ablate.py", "nonsense", cwd=scratch), "'nonsense' is not an experiment", "norm-kind")
    for flags, words in (
        ({"jobs": 0}, "--jobs is 0; it must be at least 1"),
        ({"seeds": [-1]}, "--seeds is -1; it must be at least 0"),
        ({"seeds": []}, r"--seeds is \[\]; it must be a list of different numbers"),
        ({"seeds": [1, 1]}, r"--seeds is \[1, 1\]; it must be a list of different numbers"),
        ({"verify": True, "seeds": [7]}, "--seeds has no use with --verify"),
        ({"verify": True, "quick": True}, "--quick has no use with --verify"),
    ):
        with pytest.raises(ConfigError, match=words):
            ablate.Config(experiment="ladder", **flags)
    with pytest.raises(ConfigError, match=r"--quick has no use without an experiment: python ablate\.py NAME"):
        ablate.Config(quick=True)
    listed = script("ablate.py", cwd=scratch)
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ablate.EXPERIMENTS)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_one_of_its_stages_settings(recipe, scratch):
    stage = re.search(r"python (\w+)\.py", recipe.read_text(encoding="utf-8"))[1]
    config = parse_config(import_module(stage).Config, ["--config", str(recipe)])
    assert recipe.stem.startswith(config.name)  # its run directory says which recipe it was
    assert config.data == "gsm8k" or not recipe.stem.startswith("gsm8k")


def test_a_waiting_process_that_is_stopped_refuses_the_next_run(experiment, scratch, monkeypatch):
    """An exception while it waits could leave a lock of the pool taken, and the others waiting for ever."""
    monkeypatch.setattr(workers, "STATE", {"running": False, "stopped": False})
    workers.stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        workers.guarded(ablate.run_one, ablate.settings_of(experiment, "narrow", 0), "runs/refused", 1)
    assert not (scratch / "runs/refused").exists()
    monkeypatch.setattr(workers, "STATE", {"running": True, "stopped": False})
    with pytest.raises(KeyboardInterrupt):
        workers.stop(signal.SIGINT, None)


@pytest.mark.parametrize("stop", ["SIGTERM to one process, as a batch system", "Ctrl-C to all, as a terminal"])
def test_a_stop_stops_all(stop, tmp_path):
    """The runs hold the pipe open as long as they live, which would be minutes."""
    environment = os.environ | {"ALIGN_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "ablate.py"), "norm-kind"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        running, deadline = [], time.monotonic() + 400  # seconds; under high load the start takes minutes
        while len(running) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            running = list(tmp_path.glob("runs/ablate/norm-kind/*/run/metrics.jsonl"))
            running = [log for log in running if '"loss"' in log.read_text(encoding="utf-8")]
        if "SIGTERM" in stop:
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=240)[0].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert output.endswith("stopped; the same command makes the runs that are missing\n")
    logs = [log.read_text(encoding="utf-8") for log in tmp_path.glob("runs/ablate/norm-kind/*/log.txt")]
    assert ["saved; add --resume" in log for log in logs] == [True, True]  # and a third has not begun
