"""Controlled experiments: change one factor, hold the rest, repeat with several seeds; one table and one picture.

One training run is one draw from a distribution: another seed gives other initial weights, another order of the data,
another result. Two variants with one run each may differ by their seeds alone. So every variant runs with the same n
seeds, and an interval is reported (arXiv:2304.01315 on why few seeds mislead). Of n numbers, one per seed:

    mean ± half     half = t(0.975, n − 1) · s / √n          s: the standard deviation over the seeds, with n − 1
    difference      the same of the n *paired* differences a_i − b_i, i the seed
    p               P(|T| > |mean| √n / s), T of Student's law with n − 1 degrees of freedom: how often two equal
                    variants would differ at least as much
    Holm            of m comparisons sorted by p, the k-th smallest becomes min(1, (m − k + 1) p), and none falls below
                    the one before it: so the chance of any false positive in a column is at most 5 %
    smallest        δ times the median of s / √n over the differences; T with a true mean of δ standard errors exceeds
    difference      t(0.975, n − 1) in 4 of 5 cases: what 4 in 5 such experiments would call significant (80 % power),
                    before Holm's correction; with 1 − 0.025 / m in the place of 0.975, at its strictest step

The interval covers the true mean in 95 % of such experiments if the seeds' results are roughly normal. t is Student's
quantile, 2.78 for five seeds, 4.30 for three, and not the normal law's 1.96, because s is itself estimated from few
numbers. The same seed gives both variants the same data order and, if all their matrices have the same shapes, the same
start. (One matrix more, or a larger one, moves every random number that is drawn after it.) What they share cancels in
a_i − b_i, but widens both of two separate intervals (`demo`). A difference is *significant* if its p, corrected over
the comparisons of its column, is below 0.05. With a single comparison that is an interval that leaves out 0.

An experiment is a row of EXPERIMENTS (support/experiments.py):

    "norm-kind": Experiment(
        "Does it matter that RMSNorm leaves the mean in?",                                  the question
        "a character model of 4 layers, …, 600 steps of 16 windows, the data order",        what is held
        {"LayerNorm": ("pretrain", {"model": {"norm": "layer", …}, …}), "RMSNorm": …},      the variants
        ("valid_loss", "minutes"),                                                          the columns of the table
        ("loss", "grad_norm"),                                                              the curves of the picture
    )

A variant is a stage and its flags, so a run can be repeated by hand with the stage's own script. Two stages have none:
`measure` tests a start, a checkpoint of runs/start that later stages begin from, and trains nothing; `student_grpo` is
grpo.py from distill.py's student. A probe, a function of support/probes.py, measures what a stage does not return. In
pseudo-code, as in `main`:

    tuned       = {variant: of a small grid, the value with the best validation accuracy in the     0. tune, if asked
                   second half of a short run with the first seed}
    runs        = {(variant, seed): (settings, folder)}                                             1. what is missing,
    run_missing(runs)                   each the stage's main, then the probe                       2. run
    results     = {(variant, seed): {metric: number}}
    means       = {variant: {metric: student_interval(its n numbers)}}                              3. compare
    differences = {(a, b): {metric: paired_difference(n numbers of a, n of b)}}, p by Holm
    least       = smallest_difference(the first metric's differences, n), before Holm and at its strictest step
    results/NAME.md, NAME.png, and NAME.json, the figures of every run                              4. report

Without a name it works the example and lists the experiments. The defaults run five seeds, in two worker processes, and
only what is missing. A run ends in runs/ablate/NAME/VARIANT-seedS/result.json, with all settings, the commit, the
machine and a digest of each file that its stage imports (support/code_used.py): a changed formula changes no flag. If
a saved run was made by other settings or other code, an error says so and nothing runs: --again true then repeats such
runs, --old_code true keeps those of other code. One that was interrupted starts over; to diverge is a result too.

Traps:

* With few seeds only large effects are significant. "Not significant" does not mean "equal": look at the interval.
* Each interval is for its difference alone: of twenty that are all 0, one is expected to leave out 0. The p are
  corrected for that; the intervals are not.
* The interval is of the seeds' spread, not of the test problems', which stay the same.
* Choose the number of seeds before you look. Whoever adds seeds until a difference is significant finds one: no p here
  is corrected for that.
* Choosing a variant by the test split would flatter it. Tuning uses the validation split; a page's accuracies are of
  the test problems, so do not pick the best setting from a page. A tuned value is chosen once, on one seed: the
  intervals do not contain the spread of that choice.

Run it:
    python ablate.py                         # the example by hand, and the list of experiments
    python ablate.py norm-kind               # results/norm-kind.md and .png
    python ablate.py ladder --quick true     # a smoke run: few steps, nothing is written to results/
    python ablate.py --verify true           # repeat one run of a page: do its figures come out again?
"""

import math
import statistics
import sys
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.ablation_report import machine, mean_curves, seeds_on, write_report
from support.ablation_runs import (
    TRIAL,
    TRIAL_OF_PAIRS,
    code_of_run,
    curves_of,
    digest_of,
    flags_of_stage,
    folder_name,
    read_result,
    run_one,
    settings_of,
    validation_score,
)
from support.checks import Count, Seed, check
from support.cli import run_script
from support.code_used import files_that_differ
from support.errors import FOR_THE_USER, ConfigError
from support.experiments import EXPERIMENTS, refuse_unknown
from support.files import must_write
from support.locks import lock_run, unlock_run
from support.repeated import draw_run, print_differences
from support.runs import RUNS
from support.students_law import detectable, student_p, student_t
from support.workers import run_all, threads_each

# ---------------------------------------------------------------------------------------------------------------
# The statistics.


class Interval(NamedTuple):
    """mean ± half; p: two-sided, of the mean against 0, used for differences alone, once `differences_of` has corrected
    it. NaN: none."""

    mean: float
    half: float
    p: float = math.nan

    @property
    def significant(self):
        return self.p < 0.05


def student_interval(values):
    """Student's 95 % interval for the mean of n numbers. One number has no spread and so no interval; if one of them is
    not finite (a run that diverged), there is no mean either: without that run the variant would look better."""
    n = len(values)
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan)
    mean = statistics.mean(values)
    if n == 1:
        return Interval(mean, math.nan)
    error = statistics.stdev(values) / math.sqrt(n)
    p = student_p(abs(mean) / error, n - 1) if error else float(mean == 0)
    return Interval(mean, student_t(0.975, n - 1) * error, p)


def paired_difference(a, b):
    """a, b: n numbers each, in the order of the seeds -> the interval of a − b."""
    return student_interval([x - y for x, y in zip(a, b, strict=True)])


def holm(ps):
    """Corrected p-values of m comparisons (Holm 1979), NaN where there is none: NaNs are not counted in m."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    corrected, floor = [math.nan] * len(ps), 0.0
    for k, i in enumerate(order):
        floor = corrected[i] = max(floor, min(1.0, (len(order) - k) * ps[i]))
    return corrected


def by_seed(experiment, results, seeds):
    """{(variant, seed): figures} -> {variant: {metric: its values, one per seed}}, NaN where there is none."""
    return {
        v: {metric: [results[v, seed].get(metric, math.nan) for seed in seeds] for metric in experiment.columns}
        for v in experiment.variants
    }


def intervals_of(experiment, results, seeds):
    """{(variant, seed): figures} -> {variant: {metric: the interval of its mean}}."""
    values = by_seed(experiment, results, seeds)
    return {v: {metric: student_interval(x) for metric, x in of_metric.items()} for v, of_metric in values.items()}


def differences_of(experiment, results, seeds):
    """{(variant, seed): figures} -> {(a, b): {metric: the interval of a − b}} of the variants that are compared; the p
    are corrected over the comparisons of a metric."""
    values = by_seed(experiment, results, seeds)
    differences = {pair: {} for pair in experiment.compared()}
    for metric in experiment.columns:
        intervals = [paired_difference(values[a][metric], values[b][metric]) for a, b in differences]
        for pair, interval, p in zip(differences, intervals, holm([x.p for x in intervals]), strict=True):
            differences[pair][metric] = interval._replace(p=p)
    return differences


def smallest_difference(intervals, n, comparisons=1):
    """The difference that 4 in 5 experiments with n seeds would show (80 % power), at the median spread of these
    differences; NaN for one seed. comparisons, m: 1, without Holm's correction; all of the column: what its first and
    strictest step asks for."""
    if n < 2:
        return math.nan
    errors = [x.half / student_t(0.975, n - 1) for x in intervals if x.half > 0]  # s / √n
    shift = detectable(student_t(1 - 0.025 / comparisons, n - 1), n - 1)  # in standard errors
    return shift * statistics.median(errors) if errors else math.nan


def demo():
    """Three seeds of two variants: b is above a by about the same in each, which only pairing shows."""
    a, b = [1.0, 2.0, 3.0], [1.5, 2.51, 3.49]
    of_a, of_b, of_difference = student_interval(a), student_interval(b), paired_difference(b, a)
    assert abs(of_a.half - 4.3027 * 1 / 3**0.5) < 1e-4  # the deviations are −1, 0, 1, so s = 1
    assert of_a.mean + of_a.half > of_b.mean  # b's mean lies inside a's interval
    assert of_difference.significant
    assert abs(of_difference.half - 4.3027 * 0.01 / 3**0.5) < 1e-6  # the deviations are 0, 0.01, −0.01
    corrected = holm([0.01, 0.04, 0.03])
    assert corrected == [0.03, 0.06, 0.06]  # 3 · 0.01, 2 · 0.03, and 0.04 not below that
    assert not paired_difference([2.51, 3.49, 1.5], a).significant  # the same numbers, but not paired by seed
    print(
        f"""seed       0      1      2     mean ± half, half = 4.303 s / √3
a       1.00   2.00   3.00     {of_a.mean:.2f} ± {of_a.half:.2f}
b       1.50   2.51   3.49     {of_b.mean:.2f} ± {of_b.half:.2f}    inside a's interval: b seems no better
b − a   0.50   0.51   0.49     {of_difference.mean:.2f} ± {of_difference.half:.2f}    significant: it leaves out 0
three comparisons, p = 0.01, 0.04, 0.03; by Holm {", ".join(f"{p:.2f}" for p in corrected)}: one is significant
"""
    )


# ---------------------------------------------------------------------------------------------------------------
# All of them.

SEEDS = [0, 1, 2, 3, 4]


@dataclass
class Config:
    """Run a controlled experiment; without a name, work the statistics by hand and list the experiments."""

    experiment: str | None = None
    """Its name."""
    quick: bool = False
    """A smoke run of a few steps and one seed; results/ is left alone. (The start that later stages share is trained in
    full, in runs/start.)"""
    seeds: list[Seed] = field(default_factory=lambda: [*SEEDS])
    """One run of each variant per seed."""
    verify: bool = False
    """Repeat one run of a page, both drawn at random if no experiment is named, and compare its figures. They are the
    same on the same machine, with the same number of --jobs."""
    again: bool = False
    """Repeat runs whose results were made by other settings (other defaults, another text) or by other code. Starts in
    runs/start stay as they are: delete them to train them anew too."""
    old_code: bool = False
    """Keep runs that were made by other code; the page names its commits."""
    jobs: Count = 2
    """Runs at a time; they share the cores."""

    def __post_init__(self):
        check(self)
        if self.experiment not in (None, *EXPERIMENTS):
            raise ConfigError(f"{self.experiment!r} is not an experiment; they are: {', '.join(EXPERIMENTS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds is {self.seeds}; it must be a list of different numbers")
        off = {"quick": False, "again": False, "old_code": False, "seeds": SEEDS}
        given = [flag for flag, value in off.items() if getattr(self, flag) != value]
        if self.verify and given:
            raise ConfigError(f"--{given[0]} has no use with --verify, which repeats one run of a page: leave it out")
        if given and not (self.verify or self.experiment):
            raise ConfigError(f"--{given[0]} has no use without an experiment: python ablate.py NAME")


def refuse_stale(stale, made, runs, advice):
    """ConfigError if some of the runs cannot be taken as they are."""
    if stale:
        raise ConfigError(f"{len(stale)} of the runs were made {made}, {runs[stale[0]][1]} first; {advice}")


def run_missing(runs, config, name, varied):
    """runs: {(variant, value): (settings, folder)}; varied: what the values are of, "seed" or the flag that is tuned.
    Make the runs that have no result made by these settings and this code. ConfigError if one has a result made by
    others, unless --again or, for code, --old_code."""
    if len({folder for _, folder in runs.values()}) < len(runs):
        raise ConfigError(f"two variants of {name} would share a folder: let their names differ in letters or digits")
    saved = {key: result for key, (_, folder) in runs.items() if (result := read_result(folder))}
    other_settings = [key for key in saved if saved[key]["settings"] != runs[key][0]]
    changed = {key: files_that_differ(saved[key].get("code", {}), code_of_run(runs[key][0])) for key in saved}
    other_code = [key for key in saved if changed[key] and key not in other_settings and not config.old_code]
    if not (config.again or config.quick):
        refuse_stale(other_settings, "by other settings or on another text", runs, "--again true makes them anew")
        files = sorted(set().union(*(changed[key] for key in other_code)))
        some = f"by other code ({', '.join(files[:3])}{f' and {len(files) - 3} more files' if files[3:] else ''})"
        refuse_stale(other_code, some, runs, "--again true makes them anew, --old_code true keeps them")
    todo = {key: run for key, run in runs.items() if key not in saved or key in other_settings + other_code}
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", desc=name) as bar:
        arguments = {key: (*run, threads_each(config.jobs)) for key, run in todo.items()}
        errors = run_all(run_one, arguments, config.jobs, bar)
    if errors and all(isinstance(error, BrokenExecutor) for error in errors.values()):
        what = f"a worker process was killed (out of memory?), {len(errors)} runs are missing"
        raise ConfigError(f"{what}: the same command makes them; --jobs 1 needs less memory")
    if errors:
        said = {key: str(e) if isinstance(e, FOR_THE_USER) else f"{type(e).__name__}: {e}" for key, e in errors.items()}
        failed = [f"{v}, {varied} {x}: {line} (see {todo[v, x][1]}/log.txt)" for (v, x), line in said.items()]
        raise ConfigError(f"{len(failed)} of the runs failed, the others are kept: " + "; ".join(failed))


def trial(experiment, variant, value):
    """The experiment in which a variant has this value of the tuned flag, in short runs with next to no test."""
    stage, _ = experiment.variants[variant]
    short = TRIAL_OF_PAIRS if stage == "dpo" else TRIAL
    flags = flags_of_stage(stage, short | {"steps": experiment.tune_steps})
    return replace(experiment.with_flags({variant: flags | {experiment.tune: value}}), probe=None)


def tune(experiment, seed, top, config):
    """{variant: the value of experiment.tune, of its grid, that the validation split prefers on this seed}."""
    configs = {v: settings_of(experiment, v, seed)["config"] for v in experiment.variants}
    values = {  # a start that is only measured has no such flag
        v: [float(f"{x * c[experiment.tune]:.4g}") if experiment.times_own else x for x in experiment.grid]
        for v, c in configs.items()
        if c.get(experiment.tune) is not None or (experiment.tune in c and not experiment.times_own)
    }
    if not values:
        raise ConfigError(f"no variant of {config.experiment} has the flag that it tunes, {experiment.tune!r}")
    tuning = top / "tuning"
    runs = {
        (v, value): (settings_of(trial(experiment, v, value), v, seed), tuning / folder_name(v, value, f"seed{seed}"))
        for v in values
        for value in values[v]
    }
    run_missing(runs, config, f"{config.experiment}, tuning", experiment.tune)
    scores = {key: validation_score(folder) for key, (_, folder) in runs.items()}
    for v in values:
        if all(scores[v, x] == -math.inf for x in values[v]):
            raise ConfigError(f"{v} diverged with each {experiment.tune} of the grid: {values[v]}")
    return {v: max(values[v], key=lambda x: scores[v, x]) for v in values}


def verify(config):
    """Repeat a run of a page and print its figures beside the saved ones; exit status 1 if they differ in more than the
    times. ConfigError if there is no such page."""
    name, experiment, variant, seed, figures = draw_run(Path(__file__).parent / "results", config.experiment)
    print(f"{name}: {variant}, seed {seed}")
    folder = RUNS / "ablate" / "verify" / folder_name(name, variant, f"seed{seed}")
    repeated = run_one(settings_of(experiment, variant, seed), folder, threads_each(config.jobs))
    for start, made_at in read_result(folder)["starts"].items():
        print(f"{start}: made at {made_at}")
    if print_differences(figures, repeated):
        sys.exit(1)


def main(config):
    """Run what is missing, then write results/NAME.md, .png and .json -> {(variant, seed): figures}; None after
    --verify or without a name."""
    if config.verify:
        return verify(config)
    if config.experiment is None:
        demo()
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<16}{experiment.question}\n{'':<16}{', '.join(experiment.variants)}")
        return None
    name, experiment = config.experiment, EXPERIMENTS[config.experiment]
    refuse_unknown(name, experiment)
    seeds = config.seeds[:1] if config.quick else config.seeds
    top = RUNS / "ablate" / (f"{name}-quick" if config.quick else name)
    target = (top if config.quick else Path(__file__).parent / "results") / f"{name}.md"
    if not config.quick and (lost := [str(seed) for seed in seeds_on(target) if seed not in seeds]):
        raise ConfigError(f"{target} also has the seeds {', '.join(lost)}: move it aside, or run them too")

    with must_write(top):
        top.mkdir(parents=True, exist_ok=True)
        lock_run(top, "wait until it has ended")  # two would delete each other's results

    # 0. tune
    tuned = tune(experiment, seeds[0], top, config) if experiment.tune and not config.quick else {}
    experiment = experiment.with_flags({v: {experiment.tune: x} for v, x in tuned.items()})

    # 1. what is missing, and 2. run. Neighbours in the queue have different seeds, so that with as many seeds as jobs
    # none waits for another to train its start.
    runs = {
        (v, seed): (settings_of(experiment, v, seed, config.quick), top / folder_name(v, f"seed{seed}"))
        for v in experiment.variants
        for seed in seeds
    }
    run_missing(runs, config, name, "seed")

    # 3. compare
    saved = {key: read_result(folder) for key, (_, folder) in runs.items()}
    results = {key: result["figures"] for key, result in saved.items()}
    means = intervals_of(experiment, results, seeds)
    differences = differences_of(experiment, results, seeds)  # paired by seed, p corrected
    logs = {key: curves_of(folder / "run") for key, (_, folder) in runs.items()} if experiment.curves else {}
    curves = {m: mean_curves(logs, experiment.variants, seeds, m, student_interval) for m in experiment.curves}

    # 4. report
    command = f"python ablate.py {name}" + (" --quick true" if config.quick else "")
    command += f" --jobs {config.jobs}" if config.jobs != Config().jobs else ""
    command += f" --seeds '{seeds}'" if seeds != Config().seeds and not config.quick else ""
    commits = {result["commit"] for result in saved.values()}
    older = {commit for result in saved.values() for commit in result.get("starts", {}).values()} - commits
    commits |= {f"starts of {commit}" for commit in older}
    machines = {result.get("machine", machine()) for result in saved.values()}  # an older version did not note it
    where = f"{' and '.join(sorted(machines))}, commit {', '.join(sorted(commits))}"
    of_first = [row[experiment.columns[0]] for row in differences.values()]
    compared = sum(not math.isnan(x.p) for x in of_first)  # not with a run that diverged
    least = [smallest_difference(of_first, len(seeds), m) for m in (1, max(1, compared))]
    made = {v: digest_of(settings) for (v, _), (settings, _) in runs.items()}
    write_report(target, experiment, results, means, differences, curves, seeds, command, where, tuned, least, made)
    unlock_run(top)
    return results


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # the name alone: python ablate.py norm-kind
        sys.argv.insert(1, "--experiment")
    run_script(main, Config, __doc__, demo)
