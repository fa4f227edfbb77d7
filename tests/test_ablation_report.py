"""support/ablation_report.py: what the page and the picture of an experiment show, by hand."""

import json
import math
from dataclasses import replace

import pytest

import ablate
from ablate import Interval, paired_difference, student_interval
from support import ablation_report
from support.ablation_report import plus_minus, side_by_side, signed
from support.experiments import Experiment
from support.log import read_metrics

EXPERIMENT = Experiment(
    "Is wider better?", "the rest", {"narrow": (), "wide": ()}, ("valid_loss", "parameters"), ("loss",)
)


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """The variants of these tests are names alone."""
    monkeypatch.setattr(Experiment, "unit", "token")
    monkeypatch.setattr(Experiment, "text", None)


def fake(experiment, values):
    return {
        (variant, seed): {"valid_loss": x, "parameters": 10}
        for variant, row in zip(experiment.variants, values, strict=True)
        for seed, x in enumerate(row)
    }


def page(experiment, results, where="here, commit abc"):
    means, differences = (f(experiment, results, [0, 1, 2]) for f in (ablate.intervals_of, ablate.differences_of))
    return ablation_report.page(experiment, results, means, differences, [0, 1, 2], "x", where, "width.png")


def test_numbers_and_intervals_in_words():
    assert plus_minus(student_interval([1.0, 2.0, 6.0])) == "3.000 ± 6.572"
    assert plus_minus(student_interval([0.25])) == "0.2500"  # one seed has no interval
    assert plus_minus(student_interval([1.0, math.nan, 2.0])) == "–"
    assert plus_minus(Interval(54.66, 0.0)) == "54.7"
    assert plus_minus(Interval(4.66, 2.345), "accuracy") == "4.7 ± 2.3"  # in %

    def difference(a, b):
        return signed(paired_difference(a, b), student_interval(a).mean or student_interval(b).mean)

    assert difference([1.5, 2.51, 3.49], [1.0, 2.0, 3.0]) == "**+0.500 [+0.475, +0.525]**"
    assert difference([2.0, 1.0, 4.0], [1.0, 2.0, 3.0]) == "+0.333 [-2.535, +3.202]"
    assert difference([4096.0] * 2, [4000.0] * 2) == "+96"
    assert difference([0.0] * 3, [0.82, 0.81, 0.83]) == "**-0.8200 [-0.8448, -0.7952]**"  # not "-1"
    assert difference([1.0, math.nan], [1.0, 2.0]) == "–"


def test_the_figures_of_a_page_and_which_comparisons_were_corrected():
    results = {("narrow", 0): {"valid_loss": 1.5, "text": "a"}, ("wide", 0): {"diverged": "at step 1"}}
    figures = json.loads(ablation_report.figures_of_page(results, {}, {"narrow": "1a"}))
    assert figures == {
        "tuned": {},
        "made": {"narrow": "1a"},
        "runs": [["narrow", 0, {"valid_loss": 1.5}], ["wide", 0, {"diverged": True}]],
    }
    three = replace(EXPERIMENT, variants=EXPERIMENT.variants | {"huge": ("pretrain", {})})
    text = page(three, fake(three, [[1, 2, 3], [1.5, 2.51, 3.49], [2, 3, 4]]))
    assert "Holm's correction over the 2 comparisons of a column" in text
    text = page(three, fake(three, [[1, 2, 3], [1.5, 2.51, 3.49], [2, math.nan, 4]]))
    assert "Holm's correction over the up to 2 comparisons of a column" in text


def test_the_page_calls_significant_only_what_the_paired_difference_does():
    # Far apart seeds, but the difference is the same in each: pairing shows what two separate intervals would hide.
    paired = page(EXPERIMENT, fake(EXPERIMENT, [[1, 2, 3], [1.5, 2.51, 3.49]]))
    assert paired.startswith("# width: Is wider better?\n\nHeld: the rest.\nCommand: `x`. 3 seeds (0, 1, 2); ")
    assert "| wide | **+0.500 [+0.475, +0.525]** | +0.000 |" in paired
    assert "| narrow | 2.000 ± 2.484 | 10.000 |" in paired  # parameters do not differ, so they have no ±
    noisy = page(EXPERIMENT, fake(EXPERIMENT, [[1, 2, 3], [2, 1, 4]]))
    assert "| wide | +0.333 [-2.535, +3.202] |" in noisy
    zero = page(EXPERIMENT, fake(EXPERIMENT, [[0.82, 0.81, 0.83], [0, 0, 0]]))
    assert "| wide | **-0.8200 [-0.8448, -0.7952]** |" in zero  # with the decimals of the other, where a mean is 0
    # Named pairs instead of one baseline, in the direction that their names say.
    named = replace(EXPERIMENT, pairs=(("narrow", "wide"),))
    results = fake(EXPERIMENT, [[1, 2, 3], [1.5, 2.51, 3.49]])
    text = page(named, results)
    assert "| narrow against wide | **-0.500 [-0.525, -0.475]** | +0.000 |" in text
    assert not any(word in text for word in ("to *narrow*", "write"))
    results["wide", 0]["text"], results["wide", 1]["text"] = "a\nb", "another seed's"
    text = page(named, results)
    assert "seed 0:\n\n* wide: `` a / b ``\n\n!" in text


def test_a_run_that_diverged_stands_on_the_page(tmp_path):
    three = replace(EXPERIMENT, variants=dict.fromkeys(["narrow", "wide", "hot"], ()))
    results = fake(three, [[1, 2, 3], [2, 1, 4], [5, 6, 7]]) | {("hot", 0): {"diverged": "at step 3"}}
    text = page(three, results)
    assert "Diverged: hot, seed 0: at step 3" in text
    assert "| hot | – |" in text
    assert "commit abc." in text
    means = ablate.intervals_of(three, results, [0, 1, 2])
    differences = ablate.differences_of(three, results, [0, 1, 2])
    ablation_report.draw(three, results, means, differences, {"loss": {}}, [0, 1, 2], tmp_path / "width.png")
    assert (tmp_path / "width.png").stat().st_size > 5000


def test_the_gains_of_each_seed_are_drawn(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(ablation_report.pyplot(), "close", kept.append)
    three = replace(
        EXPERIMENT, variants=dict.fromkeys(["narrow", "wide", "noisy"], ()), curves=(), gains=("valid_loss",)
    )
    results = fake(three, [[1, 2, 3], [1.5, 2.51, 3.49], [3, 1, 2]])
    means, differences = (f(three, results, [0, 1, 2]) for f in (ablate.intervals_of, ablate.differences_of))
    ablation_report.draw(three, results, means, differences, {}, [0, 1, 2], tmp_path / "width.png")
    [axis] = kept[-1].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["wide", "noisy"]
    assert axis.get_xlabel() == "validation loss (nats per character), less that of narrow"
    points = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "o"]
    assert points == [pytest.approx([0.5, 0.51, 0.49]), pytest.approx([2, -1, -1])]
    marks = [line for line in axis.lines if line.get_markersize() == 14]
    assert [line.get_xdata().item() for line in marks] == pytest.approx([0.5, 0.0])
    assert [line.get_color() for line in marks] == ["black", "0.55"]  # the second is not significant


def test_many_comparisons_are_corrected_and_the_page_says_so():
    """Its p is 0.02: alone significant, not as one of three."""
    row = [[0.0, 0, 0], [1.0, 1.3, 0.7]]
    alone = page(EXPERIMENT, fake(EXPERIMENT, row))
    assert "bold: significant." in alone
    assert "| wide | **+1.000 [" in alone
    many = replace(EXPERIMENT, variants=dict.fromkeys(["narrow", "wide", "same", "noisy"], ()))
    text = page(many, fake(many, [*row, [0.1, -0.1, 0.05], [3.0, -2.0, 1.0]]))
    assert "significant, p < 0.05 after Holm's correction over the 3 comparisons of a column." in text
    assert "| wide | +1.000 [" in text


@pytest.mark.parametrize(
    ("least", "words"),
    [
        ([1.5, 1.5], ["of 1.500 in the first column would be seen in 4 of 5 such experiments (80 % power)."]),
        ([1.5, 2.5], ["in the first column, at the median spread of its differences, would", ", one of 2.500 at its"]),
    ],
)
def test_what_the_page_says_of_its_power(least, words):
    line, _ = ablation_report.power_lines(least, 5, "valid_loss")
    assert all(part in line for part in words)


def test_the_picture_marks_what_is_cut_what_is_hidden_and_what_was_trained(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(ablation_report.pyplot(), "close", kept.append)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 9.0 - i}) + "\n" for i in (1, 2, 3)), encoding="utf-8"
    )

    def panels(*variants):
        experiment = Experiment("?", "", dict.fromkeys(variants), ("accuracy",), ("loss", "kl"), dashed="no warm-up")
        results = {
            (v, s): {
                "accuracy": (8.6, 71.4, 72.2)[s] if v == "post" else 50 + s,
                "by_position": [2] * 16,  # whole numbers have a mean too
            }
            for v in variants
            for s in range(3)
        }
        logs = dict.fromkeys(results, read_metrics(tmp_path))
        curves = {
            metric: ablation_report.mean_curves(logs, variants, [0, 1, 2], metric, student_interval)
            for metric in experiment.curves
        }
        means = ablate.intervals_of(experiment, results, [0, 1, 2])
        ablation_report.draw(experiment, results, means, {}, curves, [0, 1, 2], tmp_path / "picture.png")
        return kept[-1].axes

    bars, curves, never, positions = panels("post", "post, no warm-up")[:4]
    assert not never.lines  # what no run has logged
    arrows = [(line.get_marker(), *line.get_ydata()) for line in bars.lines if line.get_marker() in ("<", ">")]
    assert arrows == [("<", 0), (">", 0)]  # 50.7 ± 90.7; not 51 ± 2.5
    assert bars.get_xlabel() == "accuracy (%)\nan arrow: the interval goes on"
    assert [line.get_linestyle() for line in curves.lines] == ["-", "--"]
    assert curves.get_ylabel() == "training loss (nats per token)"
    assert [line.get_linestyle() for line in positions.lines] == ["-", "--", "--"]
    assert list(positions.lines[-1].get_xdata()) == [8.5, 8.5]  # between the 8th and the 9th of 16
    assert len(curves.collections) == 2  # bands
    bars, curves, *_ = panels(*map(str, range(8)))
    assert bars.get_xlabel() == "accuracy (%)"
    assert not curves.collections
    assert len(curves.lines) == 8


@pytest.mark.parametrize(("worst", "scale"), [(90.0, "linear"), (1e5, "log")])
def test_a_curve_that_dwarfs_the_others_makes_the_axis_logarithmic(worst, scale):
    _, axis = ablation_report.pyplot().subplots()
    curves = {name: ([1, 2], [Interval(x, x), Interval(2 * x, x)]) for name, x in (("a", 0.1), ("b", worst))}
    looks = {name: {"color": color} for name, color in (("a", "C0"), ("b", "C1"))}
    ablation_report.draw_curves(axis, "KL", curves, looks, crowd=False)
    assert axis.get_yscale() == scale
    assert axis.get_ylim()[0] == (0.1 if scale == "log" else 0)


def test_curves_of_seeds_that_lack_steps():
    """By step, not by place: the third KL of a run that has none at step 100 is that of step 150."""
    whole, holed = ([1, 50, 100, 150], [0.0, 1.0, 2.0, 3.0]), ([1, 50, 150, 150], [4.0, 5.0, 6.0, 7.0])
    steps, values = side_by_side([whole, holed])
    assert steps.tolist() == [1, 50, 150]
    assert values.tolist() == [[0, 1, 3], [4, 5, 7]]  # of a step logged twice, before and after a resume, the last
    assert [x.numel() for x in side_by_side([whole, ([2], [0.0])])] == [0, 0]
    assert [x.numel() for x in side_by_side([])] == [0, 0]
    many = list(range(100)), [float(i % 2) for i in range(100)]
    steps, values = side_by_side([many, many])
    assert steps.tolist() == [0.5 + 2 * i for i in range(50)]
    assert values.tolist() == [[0.5] * 50] * 2
    assert side_by_side([(list(range(99)), [0.0] * 99)])[0][-1] == 97.5  # of steps 97 and 98: the end is drawn too
