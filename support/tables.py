"""Tables for the terminal and in Markdown; the rows and the files of an evaluation."""

import re
from pathlib import Path

from support.errors import ConfigError
from support.files import must_write, to_json, write_together


def text_table(rows):
    """Rows of cells, the heading first -> text: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def markdown_table(rows):
    """The same table in Markdown."""
    heading, *body = ("| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows)
    return "\n".join([heading, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def metric_rows(results, metrics, without=()):
    """Results of `evaluate`, and its METRICS -> rows [label, one cell per result]: every metric that all results have;
    the accuracy also with its interval and by level, and if it is of some problems alone, the measure of all."""
    rows, n_checked = [], len(results[0].get("verdicts", ()))
    mixed = 0 < n_checked < results[0].get("n", 0)
    for name, metric in metrics.items():
        if name in without or not all(name in result for result in results):
            continue
        rows.append([metric.label, *(format(result[name], metric.form) for result in results)])
        if name == "accuracy":
            rows[-1][0] += f", of {n_checked} with an answer" if mixed else ""
            rows.append(["  95 % interval", *(f"[{r['low']:.1%}, {r['high']:.1%}]" for r in results)])
            for level in results[0]["by_level"] if len(results[0]["by_level"]) > 1 else ():
                rows.append([f"  level {level}", *(f"{r['by_level'][level]:.1%}" for r in results)])
    if mixed:
        rows.append(["right, or token F1", *(f"{r['own_measure']:.1%}" for r in results)])
    return rows


def sample_rows(results, n_problems=0):
    """Results of `evaluate_samples` on so many problems -> rows [label, one cell per result]; the label says if only
    some of them have an answer to check."""
    names = [name for name in results[0] if name.startswith(("pass@", "majority@"))]
    n_checked = len(results[0].get("solved", ()))
    some = f", of {n_checked} with an answer" if n_checked < n_problems else ""
    return [[f"{name}, temperature 1{some}", *(f"{result[name]:.1%}" for result in results)] for name in names]


def gain_of(pair):
    """The result of `compare` for two models as text."""
    interval = f"[{pair['low'] * 100:+.1f}, {pair['high'] * 100:+.1f}]"
    return f"{pair['difference'] * 100:+.1f} points (95 % interval {interval}, McNemar's p = {pair['p']:.2g})"


def make_folder(folder):
    """Make the output folder, before the long evaluation. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made: {error.strerror}") from None


def write_tables(folder, rows, notes, record):
    """Write table.md, with the notes, and result.json into the folder -> their paths as text. Raises ConfigError."""
    table = "\n\n".join([markdown_table(rows), *notes]) + "\n"
    with must_write(folder):
        write_together({folder / "table.md": table, folder / "result.json": to_json(record) + "\n"})
    return f"{folder}/table.md, {folder}/result.json"


def show_results(folder, rows, notes, record):
    """Print and write the table of an evaluation, its notes, and one more for each of the record's "results" of which
    more than 2 % were cut off. rows: the first is [title, a name for each result]. Raises ConfigError."""
    notes = list(notes)
    for name, result in zip(rows[0][1:], record["results"], strict=True):
        if (share := result["truncated"]) > 0.02:
            notes.append(f"{share:.0%} of the answers of {name} were cut off: try a larger --max_new_tokens")
    print("\n".join([text_table(rows), *notes]))
    print(write_tables(folder, rows, notes, record))


def file_name(*names):
    """A file or folder name from the last parts of paths or other names: runs/sft, a/b/c.jsonl -> sft-b_c.jsonl"""
    ends = ["/".join(Path(name).parts[-2:]).removeprefix("runs/") for name in names]
    return "-".join("_".join(re.findall(r"[\w.]+", end)) for end in ends)
