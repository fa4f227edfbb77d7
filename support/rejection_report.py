"""What a run of rejection sampling prints and draws at the end."""

from support.held_out import BEST_IS_WORSE, before_and_after, metric_panels
from support.plots import draw_curves
from support.tables import sample_rows


def report(config, run_path, figures):
    """The table of before and after, and the curves. figures: see `support.verified.measure_end`."""
    before, after = figures["before"], figures["after"]
    rows = [["KL to the start, nats per token", f"{0:.4f}", f"{figures['kl']:.4f}"], *sample_rows([before, after])]
    note = f"pass@k: {config.pass_samples} samples of each of {len(before['solved'])} problems"
    before_and_after(before, after, config.steps, figures["seconds"], rows, [note], BEST_IS_WORSE)
    gain = f"accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}"
    draw_curves(
        run_path,
        f"rejection sampling on {config.data}, seed {config.seed}: {gain}",
        [
            *metric_panels(),
            ("training answers", {"usable": "right", "problems_solved": "problems solved"}, "share", {}),
            ("answers kept", {"kept": "of a round"}, "answers", {}),
            ("loss on the kept answers", {"loss": "train"}, "nats per token", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    print(f"{figures['path']}, {run_path}/last, {run_path}/curves.png, {run_path}/samples.md")
