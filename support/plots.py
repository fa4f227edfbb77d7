"""Pictures of a run, drawn from recorded numbers. (ablation_report.py draws the experiments with many runs.)

    draw_curves(run_dir, title, panels)       curves.png, all stages: any metrics of metrics.jsonl
    draw_attention(run_dir, maps, tokens)     attention.png, pretraining: attention weights, query by key
    draw_experts(run_dir)                     experts.png, mixture of experts: the load of each expert

No model is run here. A stage with a picture of its own draws it with `pyplot`.
"""

import math
from pathlib import Path

import numpy as np

from support.attention_maps import attention_entropy
from support.files import as_bytes, may_fail, replacing
from support.log import read_metrics


def draw_curves(run_dir, title, panels):
    """Draw curves.png, by step, from metrics.jsonl. panels: [(heading, {metric: label}, y-axis label, {label: level of
    a dashed line}), …]. A metric with more than 60 points is drawn faintly, with its running mean on top, and without
    its `spikes`; a panel is left out if the run has logged none of its metrics."""
    plt = pyplot()
    series = read_metrics(run_dir)
    panels = [panel for panel in panels if panel[1].keys() & series.keys()] or panels[:1]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.3 * columns, 3.1 * rows), squeeze=False)
    for axis, (heading, metrics, ylabel, lines) in zip(axes.flat, panels, strict=False):
        highest = None
        for i, (name, label) in enumerate(metrics.items()):
            steps, values = series.get(name, ([], []))
            if len(values) > 60:
                values, highest = spikes(values)
                label += f" (up to {highest:.3g})" if highest else ""
                axis.plot(steps, values, color=f"C{i}", alpha=0.2, linewidth=0.8)
                axis.plot(steps, smooth(values, len(values) // 40), color=f"C{i}", label=label)
            else:
                axis.plot(steps, values, color=f"C{i}", marker="o", markersize=3, label=label)
        for label, level in lines.items():
            axis.axhline(level, color="0.4", linestyle="--", linewidth=1, label=label)
        axis.set(title=heading, xlabel="step", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        drawn = [y for line in axis.lines for y in line.get_ydata()]
        if heading == "loss" and drawn and 0 < 5 * min(drawn) < max(drawn):
            axis.set_yscale("log")  # otherwise the first steps would flatten the rest
            axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        if len(metrics) + len(lines) > 1 or highest:
            bottom = axis.get_ylim()[0]
            axis.margins(y=0.25)  # room for the legend at the top
            axis.set_ylim(bottom=bottom)
            axis.legend(fontsize=8, framealpha=0.5, loc="upper center", ncols=2)  # translucent, so it hides no point
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    give_title(figure, title)
    figure.tight_layout()
    save_picture(figure, Path(run_dir) / "curves.png", dpi=130)


def spikes(values):
    """-> the values, those above five times their 95th percentile lowered to that, and the highest, or None if none is
    above: one sampled KL of 70 among 0.1s would flatten the curve."""
    ceiling, highest = 5 * float(np.nanpercentile(values, 95)), max(values)
    if not 0 < ceiling < highest:
        return values, None
    return [min(value, ceiling) for value in values], highest


def draw_attention(run_dir, maps, tokens):
    """Draw attention.png: a row per block, a column per head, up to 6 x 6. maps: the weights (H, T, T) of each block;
    tokens: the T texts at the axes. Each map's title shows its mean entropy; e to that power is about the number of
    tokens that a query attends to."""
    plt = pyplot()
    rows, columns = min(6, len(maps)), min(6, len(maps[0]))
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.0 * rows + 0.9), squeeze=False)
    labels = [token.replace("\n", "\\n") for token in tokens]
    for layer in range(rows):
        entropies = attention_entropy(maps[layer]).mean(-1).tolist()  # (H, T, T) -> H
        for head in range(columns):
            axis = axes[layer, head]
            axis.imshow(maps[layer][head].cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
            axis.set_title(f"{layer + 1}.{head + 1}: {entropies[head]:.2f} nats", fontsize=7)
            axis.set(xticks=[], yticks=[])
        axes[layer, 0].set_yticks(range(len(labels)), labels, fontsize=4, parse_math=False)  # a token may be "$$"
    for axis in axes[-1]:
        axis.set_xticks(range(len(labels)), labels, fontsize=4, rotation=90, parse_math=False)
    figure.suptitle("attention weights, block.head: query (row) to key (column)", fontsize=9)
    figure.tight_layout()
    save_picture(figure, Path(run_dir) / "attention.png", dpi=150)


def draw_experts(run_dir):
    """Draw experts.png: the least and the most loaded expert by step, and every expert's load at the last validation,
    from the metrics that `support.expert_load.load_record` logs. Draws nothing if no validation was logged."""
    plt = pyplot()
    series = read_metrics(run_dir)
    last = {tuple(map(int, k.split("/")[1:])): v[1][-1] for k, v in series.items() if k.startswith("load/")}
    if not last:
        return
    load = np.zeros(np.array(list(last)).max(0) + 1)  # (layers, E)
    for (layer, expert), value in last.items():
        load[layer, expert] = value
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, label in (("load_max", "most loaded expert"), ("load_min", "least loaded")):
        left.plot(*series[name], marker="o", markersize=3, label=label)
    for level, label in ((0.5, "half the even share, and twice"), (1, None), (2, None)):
        left.axhline(level, color="0.4", linestyle="-" if level == 1 else "--", linewidth=1, label=label)
    left.set(title="load of an expert", xlabel="step", ylabel="multiples of the even share", ylim=(0, None))
    left.legend(fontsize=8)
    image = right.imshow(load, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
    right.set(title=f"at step {series['load_min'][0][-1]}", xlabel="expert", ylabel="mixture layer")
    if load.shape[1] <= 16:
        right.set(xticks=range(load.shape[1]), yticks=range(load.shape[0]))
    figure.colorbar(image, ax=right, label="multiples of the even share")
    figure.tight_layout()
    save_picture(figure, Path(run_dir) / "experts.png", dpi=130)


def give_title(figure, title):
    """A title that may hold a path: a $ is no formula, and bytes that are no text are shown as escapes."""
    figure.suptitle(as_bytes(title).decode(), parse_math=False)


def save_picture(figure, path, dpi):
    """Write a run's picture and close it. On a full disk the picture before it is kept, and a line printed."""
    with may_fail(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    pyplot().close(figure)


def pyplot():
    """matplotlib.pyplot for files, without a screen. Imported here because it is slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def smooth(values, width):
    """Centred running mean, shorter at the ends."""
    values = np.asarray(values, dtype=float)
    return [values[max(0, i - width) : i + width + 1].mean() for i in range(len(values))]
