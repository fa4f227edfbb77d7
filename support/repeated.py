"""A run of a page, drawn to be repeated, and its figures beside those of the repetition: for `ablate.py --verify`."""

import random

from support.ablation_report import TIMES, read_figures
from support.ablation_runs import digest_of, settings_of
from support.errors import ConfigError
from support.experiments import EXPERIMENTS
from support.files import to_json


def draw_run(results, name=None):
    """results: the folder of the pages; name: that of an experiment, or None for any -> (name, the experiment as it was
    tuned, variant, seed, figures). ConfigError if there is no such page, or no run to repeat on it, or if the settings
    or the text are no longer the page's."""
    pages = [path for path in sorted(results.glob(f"{name or '*'}.json")) if path.stem in EXPERIMENTS]
    if not pages:
        raise ConfigError(f"no page of {name or 'any experiment'} has its figures beside it in results/")
    path = random.choice(pages)
    saved, experiment = read_figures(path), EXPERIMENTS[path.stem]
    experiment = experiment.with_flags({v: {experiment.tune: x} for v, x in saved["tuned"].items()})
    runs = [run for run in saved["runs"] if "diverged" not in run[2]]
    if not runs:
        raise ConfigError(f"{path}: no run of the page has figures, all diverged")
    variant, seed, figures = random.choice(runs)
    if variant not in experiment.variants:
        raise ConfigError(f"{path}: the variant {variant!r} is no longer in the experiment; make the page again")
    made = saved.get("made", {}).get(variant)
    if not made:
        print(f"{path.name} does not say by which settings it was made: a difference may be of these")
    elif made != digest_of(settings_of(experiment, variant, seed)):
        raise ConfigError(f"{path}: {variant!r} has other settings now, or another text; make the page again")
    return path.stem, experiment, variant, seed, figures


def print_differences(saved, again):
    """Print the figures of both -> how many differ, the times aside."""
    differ = 0
    for name, value in saved.items():
        same = to_json(again.get(name)) == to_json(value)  # NaN is itself here
        differ += not same and name not in TIMES
        print(f"{name:<20} {value!s:>24} {again.get(name)!s:>24}{'' if same else '   differs'}")
    print(f"{differ} of {len(saved)} figures differ" + (", beside the times" if differ == 0 else ""))
    return differ
