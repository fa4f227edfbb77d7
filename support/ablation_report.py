"""The page and the picture of a controlled experiment: results/NAME.md and results/NAME.png.

Only the layout is computed here. ablate.py hands over its measurements and statistics:

    results      {(variant, seed): {metric: number}}
    means        {variant: {metric: interval}}       an interval has .mean, .half and .p (NaN if there is none)
    differences  {(a, b): {metric: interval}}        of the variants a − b, paired by seed
    curves       {metric: {variant: (steps, intervals)}}

The variants keep the order and the colors of the experiment in the table, in every panel and among the curves.
"""

import json
import math
import os
import platform
import re
import statistics
from pathlib import Path

import torch

from support.copy_lines import DISTANCES, MOST_DOTS
from support.devices import auto_dtype, best_device
from support.files import must_write, replacing, to_json, with_nan, write_together
from support.plots import pyplot

# Column headings: figures of a finished run.
HEADINGS = {
    "valid_loss": "validation loss (nats per character)",
    "inside": "loss, first 128 characters",
    "outside": "loss, characters 129 to 256",
    "gradient_ratio": "gradient at block 1 / at the last, as built",
    "entropy": "attention entropy (nats)",
    "norm_median": "median norm",
    "norm_p99": "99th percentile",
    "clipped_share": "clipped (%)",
    "spikes": "spikes",
    "copied_inside": f"letters repeated, up to {MOST_DOTS} dots (%)",
    "copied_outside": f"beyond {MOST_DOTS} dots (%)",
    "load_min": "least loaded (x even share)",
    "load_max": "most loaded",
    "cache": "cache (numbers per token)",
    "parameters": "parameters",
    "accuracy": "accuracy (%)",
    "pass_at_8": "pass@8 (%)",
    "sampled": "one sample (%)",
    "length": "tokens",
    "story_kept": "story kept (%)",
    "more_steps": "three steps (%)",
    "larger_numbers": "numbers to 99 (%)",
    "new_words": "new words (%)",
    "by_hand": "50 by hand (%)",
    "kl": "KL to SFT (nats per token)",
    "teacher_kl": "KL to the teacher (nats per token)",
    "tokens": "student tokens (thousands)",  # of the probe `taught`
    "earned_correct": "right (%)",
    "earned_format": "well formed (%)",
    "earned_brevity": "brief (%)",
    "clipped": "tokens clipped (%)",
    "limited": "tokens truncated or masked (%)",
    "sampler_kl": "KL(sampler ‖ trainer) (nats per token)",
    "seconds": "seconds per step",  # of the probe `training`
    "collapsed": "groups collapsed (%)",
    "minutes": "minutes",
}

TIMES = ("minutes", "seconds")  # what another run of the same settings need not give again

# Labels of the logged curves; unit: a character or a token.
CURVES = {
    "loss": "training loss (nats per {unit})",
    "grad_norm": "gradient norm",
    "load_max": "fullest expert (x even share)",
    "accuracy": "share of validation problems solved",
    "reward_correct": "share of right rollouts",
    "reward_format": "share of well-formed rollouts",
    "reward_brevity": "share of brief rollouts",
    "collapsed_grpo": "share of groups that a sum collapses",  # in every run of gdpo.py, those of GDPO too
    "logp_chosen": "log π of chosen answers (nats)",
    "pair_accuracy": "share of pairs in order",
    "sampler_kl": "KL(sampler ‖ trainer) (nats per token)",
    "kl": "KL to the start (nats per token)",
}

# Figures that are a list, drawn as a curve: heading, label of the x-axis, of the y-axis.
PROFILES = {
    "stream_built": ("residual stream as built", "block", "root mean square"),
    "gradient_built": ("gradient as built", "block", "root mean square"),
    "stream_trained": ("residual stream as trained", "block", "root mean square"),
    "by_position": ("loss by position", "sixteenth of the window (dashed: the trained length)", "nats per character"),
    "copied": ("letters repeated", "dots between (dashed: the most in training)", "%"),
}

# ---------------------------------------------------------------------------------------------------------------
# The page.


def write_report(target, experiment, results, means, differences, curves, seeds, command, where, tuned, least, made):
    """Write the page to target, which is also printed, the picture and the figures beside it, the picture first. See
    `page`, `draw` and `figures_of_page`. Raises ConfigError."""
    picture = target.with_suffix(".png")
    written = page(experiment, results, means, differences, seeds, command, where, picture.name, tuned, least)
    with must_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(experiment, results, means, differences, curves, seeds, picture)
        figures = figures_of_page(results, tuned, made)
        write_together({target: with_reading(written, target), target.with_suffix(".json"): figures})
    print(written)


def power_lines(least, n, first):
    """What n seeds can show. least: two of `ablate.smallest_difference`, for one comparison and for all; or None.
    first: the metric of the first column."""
    if not least or math.isnan(least[0]):
        return []
    spread, corrected = "", ""
    if least[1] > least[0]:  # several comparisons
        spread = ", at the median spread of its differences,"
        corrected = f" before the correction, one of {number(least[1], first)} at its strictest step"
    difference = f"a difference of {number(least[0], first)} in the first column{spread}"
    return [f"With {n} seeds {difference} would be seen in 4 of 5 such experiments (80 % power){corrected}.", ""]


def page(experiment, results, means, differences, seeds, command, where, picture, tuned=None, least=None):
    """-> the text of results/NAME.md. where: the machine and the commit of the runs; picture: the name of its file, in
    the page's folder; tuned: {variant: its value}; least: see `power_lines`."""
    name = Path(picture).stem
    held = experiment.held + (f"; text: {experiment.text}" if experiment.text else "")
    lines = [
        f"# {name}: {experiment.question}",
        "",
        f"Held: {held}.",
        f"Command: `{command}`. {len(seeds)} seeds ({', '.join(map(str, seeds))}); {where}.",
        "",
    ]
    columns = [m for m in experiment.columns if any(m in figures for figures in results.values())]
    lines += header(columns)
    for variant in means:
        lines.append(f"| {variant} | " + " | ".join(plus_minus(means[variant][m], m) for m in columns) + " |")
    lines += ["", "Mean of the seeds ± half of Student's 95 % interval.", ""]
    if tuned:
        score = "loss" if "pretrain" in {stage for stage, _ in experiment.variants.values()} else "accuracy"
        values = ", ".join(f"{variant} {value:g}" for variant, value in tuned.items())
        grid = ", ".join(f"{value:g}" for value in experiment.grid) + " times its own" * experiment.times_own
        lines += [
            f"--{experiment.tune}, chosen among {grid} by the validation {score} of seed {seeds[0]} over the second "
            f"half of {experiment.tune_steps} steps: {values}.",
            "",
        ]
    for (variant, seed), figures in results.items():
        if "diverged" in figures:
            lines += [f"Diverged: {variant}, seed {seed}: {figures['diverged']}", ""]
    if differences and len(seeds) > 1:
        columns = [m for m in columns if m not in TIMES]  # those depend on what else the machine does
        lines += [*difference_table(experiment, columns, means, differences), ""]
        lines += power_lines(least, len(seeds), experiment.columns[0])
    texts = {v: results[v, seeds[0]]["text"] for v in means if "text" in results[v, seeds[0]]}
    if texts:
        lines += [f"What they write after a line's end, at temperature 1, seed {seeds[0]}:", ""]
        lines += [f"* {variant}: `` {' / '.join(text.split(chr(10)))} ``" for variant, text in texts.items()] + [""]
    lines += [f"![{name}]({picture})", ""]
    return "\n".join(lines)


def header(columns):
    return ["| | " + " | ".join(HEADINGS[m] for m in columns) + " |", "|---|" + "---:|" * len(columns)]


def difference_table(experiment, columns, means, differences):
    """The lines of the table, under a heading; a row names both variants if the experiment names its pairs."""
    cells = {
        (a, b): [signed(intervals[m], means[a][m].mean or means[b][m].mean, m) for m in columns]
        for (a, b), intervals in differences.items()
    }
    base = "" if experiment.pairs else f" to *{next(b for _, b in differences)}*"
    heading = f"Paired differences{base}, with their 95 % intervals; bold: significant"
    if len(differences) > 1:
        up_to = "up to " * any(math.isnan(row[m].p) for row in differences.values() for m in columns)
        heading += f", p < 0.05 after Holm's correction over the {up_to}{len(differences)} comparisons of a column"
    heading += "."
    lines = [heading, "", *header(columns)]
    for (a, b), row in cells.items():
        lines.append(f"| {f'{a} against {b}' if experiment.pairs else a} | " + " | ".join(row) + " |")
    return lines


def number(x, metric=""):
    """A number with just enough digits to compare it; of a column in % one after the point, or two."""
    if math.isnan(x):
        return "–"
    if x and HEADINGS.get(metric, "").endswith("(%)"):
        return f"{x:.1f}" if abs(x) >= 1 else f"{x:.2f}"
    if abs(x) > 100:
        return f"{x:,.0f}"
    if x == 0:
        return "0"
    return f"{x:.1f}" if abs(x) >= 20 else f"{x:.3f}" if abs(x) >= 1 else f"{x:.4f}"


def plus_minus(interval, metric=""):
    """A mean ± half its interval, with the same number of decimals."""
    text = number(interval.mean, metric)
    decimals = len(text.partition(".")[2])
    return f"{text} ± {interval.half:,.{decimals}f}" if interval.half > 0 else text


def signed(difference, of, metric=""):
    """A difference and its interval, with the decimals that the table gives a number of the size `of`; bold if it is
    significant."""
    mean, half, _ = difference
    if math.isnan(half):
        return "–"
    decimals = len(number(of, metric).partition(".")[2])
    if half == 0:
        return f"{mean:+,.{decimals}f}"
    text = f"{mean:+,.{decimals}f} [{mean - half:+,.{decimals}f}, {mean + half:+,.{decimals}f}]"
    return f"**{text}**" if difference.significant else text


def machine():
    """Cores, processor, torch and precision, for the record."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    cpu = models[0] if models else platform.processor() or "unknown processor"
    kind = auto_dtype(torch.device(best_device()))
    return f"{os.cpu_count()} cores, {cpu}, torch {torch.__version__}, {kind}"


def seeds_on(path):
    """The seeds of the page at that path; none if there is no page."""
    match = re.search(r" seeds \(([\d, ]+)\)", path.read_text(encoding="utf-8")) if path.exists() else None
    return [int(seed) for seed in match[1].split(", ")] if match else []


def with_reading(text, path):
    """The text of a page, with what a person wrote below "Reading" on the earlier one at that path."""
    kept = path.read_text(encoding="utf-8").split("\n## Reading\n", 1)[1:] if path.exists() else []
    return text + "".join("\n## Reading\n" + words for words in kept)


def figures_of_page(results, tuned, made):
    """The text of results/NAME.json. results: {(variant, seed): figures}, of which the numbers are kept, or "diverged";
    tuned: {variant: value}; made: {variant: `digest_of` its settings}."""
    runs = []
    for (variant, seed), figures in results.items():
        numbers = {k: v for k, v in figures.items() if isinstance(v, int | float)}
        runs.append([variant, seed, {"diverged": True} if "diverged" in figures else numbers])
    return to_json({"tuned": tuned, "made": made, "runs": runs})


def read_figures(path):
    """-> {"tuned": …, "made": …, "runs": [[variant, seed, {metric: number}], …]}, as `figures_of_page` writes it; the
    pages of before 2026-11-30 have no "made"."""
    return with_nan(json.loads(path.read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------------------
# The picture.


def draw(experiment, results, means, differences, curves, seeds, target):
    """The panels in their order: `gains`, or a point per variant for the table's first metric and for `bars`; the
    logged curves; profiles where a probe measured them; `front`; attention maps of the first seed."""
    plt = pyplot()
    crowd = len(means) >= 8
    colors = plt.get_cmap("tab20" if len(means) > 10 else "tab10").colors
    dashed = [bool(experiment.dashed) and experiment.dashed in variant for variant in means]
    looks = {v: {"color": colors[i], "linestyle": "--" if dashed[i] else "-"} for i, v in enumerate(means)}
    metrics = experiment.gains or [experiment.columns[0], *experiment.bars]
    profiles = [name for name in PROFILES if any(name in figures for figures in results.values())]
    maps = [v for v in means if "attention" in results[v, seeds[0]]] if len(means) <= 6 else []

    panels = len(metrics) + len(curves) + len(profiles) + bool(experiment.front) + len(maps)
    columns = 2 if panels == 4 else min(3, panels)
    rows = math.ceil(panels / columns)
    size = (4.6 * columns, (4.6 if crowd else 3.4) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    panel = iter(axes.flat)
    if experiment.gains:
        figure.suptitle("a point per seed, the mean and its 95 % interval; black: significant", fontsize=10)
    for metric in metrics:
        if experiment.gains:
            draw_gains(next(panel), metric, differences, results, seeds, looks)
        else:
            draw_means(next(panel), HEADINGS[metric], {v: means[v][metric][:2] for v in means}, looks)
    for metric, of_variants in curves.items():
        draw_curves(next(panel), CURVES[metric].format(unit=experiment.unit), of_variants, looks, crowd)
    for name in profiles:
        lists = {v: [results[v, s][name] for s in seeds if name in results[v, s]] for v in means}
        mean = {v: torch.tensor(x, dtype=torch.double).mean(0).tolist() for v, x in lists.items() if x}
        draw_profile(next(panel), name, mean, looks)
    if experiment.front:
        draw_front(next(panel), *experiment.front, results, seeds, looks)
    for variant in maps:
        axis = next(panel)
        axis.imshow(results[variant, seeds[0]]["attention"], vmin=0, vmax=0.5, cmap="Blues")
        axis.set_title(f"attention, {variant}: mean of all heads", fontsize=10)
        axis.set(xlabel="key (character)", ylabel="query")
    for axis in panel:  # places without a panel
        axis.axis("off")

    labelled = [axis.get_legend_handles_labels() for axis in axes.flat]
    handles, labels = next((x for x in labelled if x[0]), ([], []))
    if handles:
        figure.legend(handles, labels, loc="lower center", ncols=min(4, len(means)), fontsize=9)
    below = 0.1 + 0.25 * math.ceil(len(means) / 4) if handles else 0.0  # inches for the legend
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    with must_write(target), replacing(target) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def draw_means(axis, label, means, looks):
    """A row per variant: the mean and its interval; percentages are cut near 0 and 100."""
    for i, (variant, (mean, half)) in enumerate(means.items()):
        width = None if math.isnan(half) else half
        axis.errorbar(mean, i, xerr=width, fmt="o", color=looks[variant]["color"], capsize=4)
    axis.set(yticks=range(len(means)), yticklabels=list(means), xlabel=label)
    axis.locator_params(axis="x", nbins=6)  # more of three decimals would touch each other
    axis.set_title("at the end: mean, 95 % interval", fontsize=10)
    if "(%)" in label:  # an interval of few seeds may go beyond 0 or 100
        left, right = axis.get_xlim()
        left, right = axis.set_xlim(max(left, -3), min(right, 103))
        for i, (variant, (mean, half)) in enumerate(means.items()):
            for edge, marker, cut in ((left, "<", mean - half < left), (right, ">", mean + half > right)):
                if cut:
                    axis.plot(edge, i, marker, color=looks[variant]["color"], clip_on=False)
                    axis.set_xlabel(f"{label}\nan arrow: the interval goes on")
    axis.invert_yaxis()
    axis.grid(alpha=0.25)


def draw_gains(axis, metric, differences, results, seeds, looks):
    """A row per comparison a − b: a point per seed, the mean and its interval, black where it is significant."""
    for i, ((a, b), of_metric) in enumerate(differences.items()):
        gains = [results[a, seed].get(metric, math.nan) - results[b, seed].get(metric, math.nan) for seed in seeds]
        axis.plot(gains, [i] * len(gains), "o", color=looks[a]["color"], alpha=0.6)
        mean, half, _ = of_metric[metric]
        shade = "black" if of_metric[metric].significant else "0.55"
        axis.errorbar(mean, i, xerr=None if math.isnan(half) else half, fmt="|", markersize=14, color=shade, capsize=4)
    bases = dict.fromkeys(b for _, b in differences)
    names = [a if len(bases) == 1 else f"{a} − {b}" for a, b in differences]
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set(yticks=range(len(names)), yticklabels=names)
    label = HEADINGS[metric].replace("(%)", "(points)")
    axis.set_xlabel(f"{label}, less that of {next(iter(bases))}" if len(bases) == 1 else label)
    axis.invert_yaxis()
    axis.grid(alpha=0.25)


def draw_curves(axis, label, curves, looks, crowd):
    """A curve per variant with its interval as a band; no bands for many variants, where they would hide the curves.
    Where one curve is a thousand times as high as another, the axis is logarithmic and has no bands, which reach 0."""
    middles = [statistics.median(x.mean for x in intervals) for _, intervals in curves.values()]
    if middles and max(middles) > 1000 * min(middles) > 0:
        axis.set_yscale("log")
    bands = not crowd and axis.get_yscale() == "linear"
    banded = False
    for variant, (steps, intervals) in curves.items():
        axis.plot(steps, [x.mean for x in intervals], label=variant, **looks[variant])
        if bands and not math.isnan(intervals[0].half):
            low, high = [x.mean - x.half for x in intervals], [x.mean + x.half for x in intervals]
            axis.fill_between(steps, low, high, color=looks[variant]["color"], alpha=0.15, linewidth=0)
            banded = True
    if axis.get_yscale() == "log":
        axis.set_ylim(bottom=min(line.get_ydata().min() for line in axis.lines))
    elif axis.lines and min(line.get_ydata().min() for line in axis.lines) >= 0 > axis.get_ylim()[0]:
        axis.set_ylim(bottom=0)  # a band of few seeds may go below 0
    if label.startswith("share"):
        axis.set_ylim(top=min(1.02, axis.get_ylim()[1]))
    axis.set_title("mean of the seeds" + ", 95 % interval" * banded, fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel(label, fontsize=9)  # the longest is as long as a panel is high
    axis.grid(alpha=0.25)


def draw_profile(axis, name, profiles, looks):
    """A curve per variant over blocks, positions or distances: the mean of the seeds."""
    title, xlabel, ylabel = PROFILES[name]
    for variant, mean in profiles.items():
        x = DISTANCES if name == "copied" else range(1, len(mean) + 1)
        axis.plot(x, mean, marker="o", markersize=3, label=variant, **looks[variant])
    axis.set_title(f"{title}, mean of the seeds", fontsize=10)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if "dashed" in xlabel:
        axis.axvline(MOST_DOTS if name == "copied" else 8.5, color="0.4", linestyle="--", linewidth=1)
    if ylabel == "root mean square":
        axis.set_yscale("log")
    axis.grid(alpha=0.25)


def draw_front(axis, x, y, results, seeds, looks):
    """Two metrics against each other, a point per run."""
    for variant, look in looks.items():
        points = [(results[variant, s].get(x, math.nan), results[variant, s].get(y, math.nan)) for s in seeds]
        axis.plot(*zip(*points, strict=True), "o", color=look["color"], label=variant)
    axis.set(xlabel=HEADINGS[x], ylabel=HEADINGS[y], title="at the end, a point per seed")
    axis.grid(alpha=0.25)


def mean_curves(logs, variants, seeds, metric, interval):
    """{(variant, seed): its metrics.jsonl} -> {variant: (steps, intervals)} of a metric, for the variants that log
    it. interval: ablate.student_interval."""
    curves = {}
    for variant in variants:
        runs = [logs[variant, seed].get(metric, ([], [])) for seed in seeds]  # of all seeds, or of none
        steps, values = side_by_side(runs)  # (points,), (seeds, points)
        if len(steps):
            curves[variant] = steps.tolist(), [interval(point) for point in values.T.tolist()]
    return curves


def side_by_side(runs):
    """runs: (steps, values) of each seed -> steps (points,), values (seeds, points): at most 80, each the mean of
    neighbours, at the steps that all have: GRPO, for example, logs no KL at a step where no group has a signal."""
    values = [dict(zip(*run, strict=True)) for run in runs]  # {step: value}
    steps = sorted(set.intersection(*map(set, values))) if values else []
    table = torch.tensor([steps, *([run[step] for step in steps] for run in values)], dtype=torch.double)
    if steps:
        points = len(steps) // max(1, len(steps) // 40)
        parts = table.tensor_split(points, dim=1)  # all steps: the first parts may have one more than the others
        table = torch.stack([part.mean(1) for part in parts], dim=1)  # (1 + seeds, points)
    return table[0], table[1:]
