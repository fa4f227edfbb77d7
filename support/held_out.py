"""What a training stage logs, draws and prints of held-out problems: evaluate.METRICS in its log, curves and table."""

from evaluate import METRICS, compare
from support.answers import measure_of
from support.errors import ConfigError
from support.tables import gain_of, metric_rows, text_table

LAST_IS_WORSE = "WARNING: the policy ended worse than it began; best/ holds the best on the validation split"
BEST_IS_WORSE = "WARNING: best/, chosen on the validation split, is worse than the start on the test split"


def selected(also, without):
    """The metrics that all stages log, and those that a stage asks for."""
    return {k: m for k, m in METRICS.items() if (m.in_every_log or k in also) and k not in without}


def logged(result, *also):
    """A result of `evaluate` -> {metric: value} for metrics.jsonl."""
    return {name: result[name] for name in selected(also, ()) if name in result}


def add_figures(record, figures):
    """Put a stage's held-out figures into the record of a step. ConfigError on a name that the record has already."""
    if clash := record.keys() & figures.keys():
        raise ConfigError(f"{min(clash)!r} of evaluate.METRICS is a figure that this stage logs already: rename it")
    record |= figures


def metric_panels(*also, without=()):
    """A panel of curves.png for each of them (see `support.plots.draw_curves`)."""
    return [(m.label, {name: "validation"}, m.unit, {}) for name, m in selected(also, without).items()]


def not_measured(problems):
    """The metrics that mean nothing of these problems: of free text no answer can be checked, all would be wrong."""
    return ("accuracy",) if measure_of(problems) == "f1" else ()


def accuracies(before, after, without=()):
    """For the title of a picture: ": accuracy 50.0% → 60.0%"; nothing if it is not measured."""
    return "" if "accuracy" in without else f": accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}"


def before_and_after(before, after, steps, seconds, rows=(), notes=(), warning=LAST_IS_WORSE, without=()):
    """Print the table at the end of a stage: results of `evaluate` on the test split, but for some metrics, the stage's
    own rows, [label, before, after], its notes, and what was gained; if that is below 0 the warning, whose words depend
    on whether `after` is of last/ or of best/."""
    measured = metric_rows([before, after], METRICS, without)
    print("\n" + text_table([["held-out test", "before", "after"], *measured, *rows]))
    for note in notes:
        print(note)
    gain, spent = 0.0, f"{steps} steps, {seconds / 60:.1f} minutes"
    if "accuracy" in after and "accuracy" not in without:
        gain = after["accuracy"] - before["accuracy"]
        points = gain_of(compare(before["verdicts"], after["verdicts"]))
        spent = f"{len(after['verdicts'])} problems, {points} in {spent}"
    print(spent)
    if gain < 0:
        print(warning)
