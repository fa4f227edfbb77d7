"""What a fine-tuning run leaves to read: sampled answers, the table of the test split, the curves."""

from evaluate import METRICS, metric_panels, token_f1
from support.plots import draw_curves
from support.tables import metric_rows, sample_rows, text_table


def write_samples(log, step, samples):
    """Answers to validation problems, and whether they are right, to samples.md."""
    shown = []
    for s in samples:
        verdict = "right" if s.correct else f"wrong, the answer is {s.problem.answer}"
        verdict = verdict if s.problem.answer else f"token F1 {token_f1(s.text, s.problem.solution):.2f}"
        shown.append(f"**step {step}, {verdict}**\n\n> {s.problem.question}\n\n```\n{s.text}\n```")
    log.samples(step, "\n\n".join(shown))


def report(config, run_path, result, sampled, metrics, n_params, path):
    """Print the table of the test split, draw the curves. metrics: `measure_of` the validation split and of the test
    split."""
    hidden, hidden_in_test = (("accuracy",) if metric == "f1" else () for metric in metrics)
    both_kinds = [("right, or token F1", {"own_measure": "validation"}, "mean of problems", {})]
    draw_curves(
        run_path,
        f"SFT on {config.data}, seed {config.seed}, {n_params / 1e6:.1f} M parameters",
        [
            ("loss on the answers", {"loss": "train"}, "nats per token", {}),
            *metric_panels("f1", without=hidden),
            *(both_kinds if metrics[0] == "own_measure" else []),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    rows = [*metric_rows([result], METRICS, hidden_in_test), *sample_rows([sampled])]
    print(text_table([["held-out test", f"{result['n']} problems"], *rows]))
    print(f"{path}, {run_path}/curves.png")
