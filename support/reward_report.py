"""A reward model's report on where its scores can be trusted: figures, a table and two pictures.

Each function says what it measures and what a good model gets. Best-of-n is in reward_model.py.
"""

import contextlib
import math
import random
import re

import numpy as np

from data import DEFAULT_TASK, TASKS, load_pairs, load_problems
from evaluate import pass_at_k
from support.errors import DataError
from support.files import may_fail, to_json, write_whole
from support.plots import draw_curves, give_title, pyplot, save_picture


def ranked_rightly(gap):
    """Score differences, of the better answer less the worse one (n,) -> 1 where rightly ranked, ½ at a tie, else 0."""
    return (gap > 0) + 0.5 * (gap == 0)


def calibration(gaps, bins=8):
    """Score differences (n,) -> [(mean predicted, share right, n), …] and the expected calibration error.

    σ(|Δ|) is the model's probability that the answer with the higher score is the better one. It is calibrated if it
    is right in that share of the pairs. Of no meaning but for the Bradley-Terry loss without a margin.
    """
    sure, right = 1 / (1 + np.exp(-np.abs(gaps))), ranked_rightly(gaps)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    inside = [place == b for b in sorted(set(place.tolist()))]
    rows = [(float(sure[b].mean()), float(right[b].mean()), int(b.sum())) for b in inside]
    return rows, sum(n * abs(p - r) for p, r, n in rows) / len(gaps)


def consistency(score, n, seed, levels, data=DEFAULT_TASK):
    """Measure whether the scores are consistent; each figure of a perfect model is 1:

    renamed_same_order       share of pairs that keep their order under new names and items
    renamed_correlation      correlation of the scores before and after renaming
    right_above_one_error    share of problems where the right answer scores above one with one error
    one_error_above_two      share where one error scores above the same answer without its final answer

    score: [(prompt, [answers]), …] -> lists of scores; NaN if a text is too long, which leaves the pair out.
    -> {name: figure}, empty if everything is left out.
    """
    task, rng = TASKS[data], random.Random(f"consistency/{seed}")
    pairs, rename, kinds = load_pairs(data, "test", n, levels, seed), task.rename, list(task.corruptions)
    scores = np.array(score([(p.prompt, [p.chosen, p.rejected]) for p in pairs]))
    renamed = np.array(score([(rename(p.prompt), [rename(p.chosen), rename(p.rejected)]) for p in pairs]))
    scored = ~np.isnan(scores + renamed).any(1)
    scores, renamed, ladders = scores[scored], renamed[scored], []
    for problem in load_problems(data, "test", n, levels):
        if not (fitting := [kind for kind in kinds if problem.level >= task.corruptions[kind]][:2]):
            continue
        with contextlib.suppress(DataError):
            wrong = task.corrupt(problem, rng.choice(fitting), rng)
            worse = "\n".join(line for line in wrong.split("\n") if "####" not in line)
            ladders.append((problem.question, [problem.solution, wrong, worse]))
    ladder = np.array(score(ladders)).reshape(-1, 3)
    ladder = ladder[~np.isnan(ladder).any(1)]
    if not len(scores) or not len(ladder):
        return {}
    return {
        "renamed_same_order": float(((scores[:, 0] > scores[:, 1]) == (renamed[:, 0] > renamed[:, 1])).mean()),
        "renamed_correlation": float(np.corrcoef(scores.flatten(), renamed.flatten())[0, 1]),
        "right_above_one_error": float((ladder[:, 0] > ladder[:, 1]).mean()),
        "one_error_above_two": float((ladder[:, 1] > ladder[:, 2]).mean()),
    }


def shaping(scores, **features):
    """scores (N, M) of M answers to each of N prompts; features (N, M) each -> {name: correlation of the feature with
    the score, within a prompt}: what the score depends on among answers to the same question."""

    def centred(x):
        return (x - x.mean(1, keepdims=True)).flatten()

    y, correlations = centred(scores), {}
    for name, x in features.items():
        x = centred(np.asarray(x, dtype=float))
        norm = np.linalg.norm(x) * np.linalg.norm(y)
        correlations[name] = float(x @ y / norm) if norm > 0 else math.nan
    return correlations


def sample_figures(scores, correct, groups, answers, sizes):
    """Sampled answers to test problems: scores, correct (N, M), groups N x M of (text, right, …), answers N x M lists
    of ids -> the best possible best-of-n, what the score depends on within a prompt (`shaping`), and the spread of the
    scores among the right answers to a question, which should be 0, and among all answers."""
    M, n_right = scores.shape[1], correct.sum(1).astype(int).tolist()  # n_right: N
    length = [[len(ids) for ids in group] for group in answers]
    well_formed = [[bool(re.search(r"(^|\n)#### -?[0-9]+$", text.strip())) for text, *_ in group] for group in groups]
    right_spread = [
        scores[g][distinct].std()
        for g, group in enumerate(groups)
        if len(distinct := list({text: k for k, (text, right, *_) in enumerate(group) if right}.values())) > 1
    ]
    return {
        "best_possible": {str(n): float(np.mean([pass_at_k(M, c, n) for c in n_right])) for n in sizes},
        "shaping": shaping(scores, correct=correct, length=length, tidy=well_formed),
        "spread_of_right_answers": float(np.mean(right_spread)) if right_spread else math.nan,
        "spread_of_all_answers": float(scores.std(1).mean()),
    }


def length_figures(groups, scores):
    """How far length alone explains the preferences and the scores: the share of pairs whose longer answer is the
    chosen one, and the correlation between the differences in score and in length. scores (N, 2)."""
    lengths = np.array([[len(answer) for answer in answers] for _, answers in groups])
    longer, gap = lengths[:, 0] - lengths[:, 1], scores[:, 0] - scores[:, 1]
    both_vary = longer.std() > 0 and gap.std() > 0
    return {
        "longer_is_chosen": float(ranked_rightly(longer).mean()),
        "gap_length_correlation": float(np.corrcoef(longer, gap)[0, 1]) if both_vary else math.nan,
    }


def write_report(config, run_dir, n_pairs, report, n_params, equal_loss):
    """Write report.json, print the table, draw curves.png and report.png. equal_loss: the loss of equal scores."""
    path = run_dir / "report.json"
    with may_fail(path):
        write_whole(path, to_json(report, indent=1) + "\n")
    print(f"\n{'held-out pairs':<18}{'ranked rightly':>15}  {'95 % interval':<18}{'pairs':>6}")
    for kind, (accuracy, low, high, n) in ({"all, before": report["before"]} | report["by_kind"]).items():
        print(f"{kind:<18}{accuracy:>15.1%}  {f'[{low:.1%}, {high:.1%}]':<18}{n:>6}")
    r = report
    calibrated = f"calibration error {r['calibration_error']:.3f}; " if "calibration" in r else ""
    print(f"{calibrated}the longer answer is the chosen one in {r['longer_is_chosen']:.1%}")
    if "renamed_same_order" in report:
        print(
            f"new names and items: order kept in {r['renamed_same_order']:.1%}; right above one error "
            f"{r['right_above_one_error']:.1%}, one error above two {r['one_error_above_two']:.1%}"
        )
    if "best_of" in report:
        print(
            f"samples: spread among right answers {r['spread_of_right_answers']:.2f}, among all "
            f"{r['spread_of_all_answers']:.2f}"
        )
        print("correlation with the score: " + ", ".join(f"{k} {v:+.2f}" for k, v in r["shaping"].items()))
        print("best of n: " + ", ".join(f"{n} {v:.1%}" for n, v in r["best_of"].items()))
    kinds = {f"valid_{kind}": kind for kind in report["by_kind"]}
    unit = "nats per pair" if config.loss == "bradley_terry" else "per pair"
    draw_curves(
        run_dir,
        f"reward model on {config.data}, seed {config.seed}, {n_params / 1e6:.1f} M parameters",
        [
            ("loss", {"loss": "train", "valid_loss": "validation"}, unit, {"equal scores": equal_loss}),
            ("pairs ranked rightly", {"pair_accuracy": "train", **kinds}, "share", {}),
            ("scores", {"gap": "chosen − rejected", "score": "mean"}, "score", {}),
        ],
    )
    draw_report(config, run_dir, n_pairs, report)


def draw_report(config, run_dir, n_pairs, report):
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    axis, by_kind = axes[0, 0], report["by_kind"]
    values = np.array([row[:3] for row in by_kind.values()])  # (kinds, 3)
    error_bars = np.abs(values[:, 1:].T - values[:, 0])
    axis.errorbar(values[:, 0], list(by_kind), xerr=error_bars, fmt="o", capsize=3)
    axis.axvline(0.5, color="0.4", linestyle="--", linewidth=1)
    axis.set(title="held-out pairs ranked rightly, 95 % interval", xlabel="share")
    axis = axes[0, 1]
    scores = np.array(report["scores"])
    edges = np.histogram_bin_edges(scores, 40)
    for column, label in enumerate(("chosen", "rejected")):
        axis.hist(scores[:, column], edges, alpha=0.6, label=label)
    axis.set(title="scores", xlabel="score", ylabel="answers")
    axis.legend()
    axis = axes[1, 0]
    if "calibration" in report:
        predicted, right, n = zip(*report["calibration"], strict=True)
        axis.plot([0.5, 1], [0.5, 1], color="0.4", linestyle="--", linewidth=1)
        axis.scatter(predicted, right, s=np.clip(np.array(n), 10, 200))
        error = report["calibration_error"]
        axis.set(title=f"calibration, error {error:.3f}", xlabel="predicted", ylabel="share right")
    else:
        axis.axis("off")
    axis = axes[1, 1]
    if "best_of" in report:
        sizes = [int(n) for n in report["best_of"]]
        axis.plot(sizes, list(report["best_of"].values()), marker="o", label="best by the reward model")
        axis.plot(sizes, list(report["best_possible"].values()), marker=".", color="0.6", label="best by the truth")
        axis.set_xscale("log", base=2)
        axis.set(title="best of n", xlabel="n", ylabel="share correct", ylim=(0, 1.02))
        axis.legend(loc="lower center", fontsize=8)
    else:
        axis.axis("off")
    give_title(figure, f"reward model, seed {config.seed}: {n_pairs} held-out pairs of {config.data}")
    figure.tight_layout()
    save_picture(figure, run_dir / "report.png", dpi=130)
