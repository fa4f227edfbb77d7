"""What a distillation measures of student and teacher before and after, prints and draws."""

import math

from data import encode_prompt
from evaluate import METRICS, compare
from support.checkpoints import open_checkpoint
from support.held_out import BEST_IS_WORSE, metric_panels
from support.plots import draw_curves
from support.questions import measure_test
from support.sampled_kl import sampled_kl
from support.tables import gain_of, metric_rows, sample_rows, text_table
from support.verified import measure_end, measure_start


def add_up(sums, metrics, piece, config):
    """Add a piece's metrics to `sums`, {name: (sum, weight)}, in place. The loss is a sum over pieces; a KL is a mean
    over all tokens of a piece, or with --loss sample over those of one writer."""
    by_student = piece.mask & piece.by_student[:, None]
    counted = {"reverse_kl": by_student, "forward_kl": piece.mask & ~by_student} if config.loss == "sample" else {}
    for name, value in metrics.items():
        weight = counted.get(name, piece.mask).sum().item()
        total, n = sums.get(name, (0.0, 0))
        sums[name] = (total + value, 1) if name == "loss" else (total + value * weight, n + weight)


def step_record(sums, dist):
    """The sums of all ranks -> {metric: value}, without means over no token."""
    totals = dist.sum(*(x for pair in sums.values() for x in pair))
    pairs = dict(zip(sums, zip(totals[::2], totals[1::2], strict=True), strict=True))
    loss, _ = pairs.pop("loss")
    return {"loss": loss} | {name: total / n for name, (total, n) in pairs.items() if n}


def kl_to_teacher(student, teacher, start):
    """KL(student ‖ teacher) in nats per token, of one answer of the student to each of 200 test problems."""
    views = start.problems, start.teacher_problems
    prompts, ref_prompts = ([encode_prompt(start.tokenizer, p) for p in view["test"][:200]] for view in views)
    sizes = start.config.max_new_tokens, start.dist, start.config.seed
    return sampled_kl(student, teacher, start.tokenizer, prompts, *sizes, ref_prompts=ref_prompts)


def measure_both(run, start):
    """Before the first step: what `measure_start` does, and `run.state.teacher`: the teacher's test figures, and the
    student's "kl" to it. A resumed run knows them. start: `support.distill_run.Start`."""
    measure_start(run, start.problems, start.init)
    teacher = start.teacher
    if run.state.teacher is None:
        kl = kl_to_teacher(run.model, teacher, start)
        figures = measure_test(teacher, run.tokenizer, start.teacher_problems, run.config, run.dist)
        run.state.teacher = figures | {"kl": kl}
    if run.dist.is_main:
        print(f"the teacher: {teacher.num_params():,} parameters, test accuracy {run.state.teacher['accuracy']:.1%}")


def measure_student(run, start):
    """After the last step, of best/: what `measure_end` returns, and "teacher" (its test figures), "teacher_kl" and
    "teacher_kl_before" (nats per token), "closed" (the share of the accuracy that the student lacked) and "tokens", how
    many it was trained on."""
    figures = measure_end(run, start.problems, start.init)
    student, _, _ = open_checkpoint(run.path, run.dist.device)
    kl = kl_to_teacher(student, student if run.config.teacher == "self" else start.teacher, start)
    before, after, best = (f["accuracy"] for f in (figures["before"], figures["after"], run.state.teacher))
    closed = (after - before) / (best - before) if best > before else math.nan
    figures |= {"teacher": run.state.teacher, "teacher_kl": kl, "teacher_kl_before": run.state.teacher["kl"]}
    return figures | {"closed": closed, "tokens": int(run.state.tokens)}


def report(config, run_path, figures):
    """The table of before, after and the teacher, and the curves. figures: see `measure_student`."""
    before, after, teacher = figures["before"], figures["after"], figures["teacher"]
    rows = [["held-out test", "before", "after", "teacher"]]
    rows += [*metric_rows([before, after, teacher], METRICS), *sample_rows([before, after, teacher])]
    kls = [f"{figures[name]:.4f}" for name in ("teacher_kl_before", "teacher_kl")]
    rows.append(["KL to the teacher, nats per token", *kls, ""])
    print("\n" + text_table(rows))
    print(f"pass@k: {config.pass_samples} samples of each of {len(before['solved'])} problems")
    no_gap = math.isnan(figures["closed"])
    lacked = "from a teacher that is no better" if no_gap else f"{figures['closed']:.0%} of what it lacked"
    gain = gain_of(compare(before["verdicts"], after["verdicts"]))
    spent = f"{config.steps} steps, {figures['tokens']:,} tokens, {figures['seconds'] / 60:.1f} minutes"
    print(f"{len(after['verdicts'])} problems, {gain}, {lacked}, in {spent}")
    if after["accuracy"] < before["accuracy"]:
        print(BEST_IS_WORSE)
    level = {"the teacher, test": teacher["accuracy"]}
    panels = [(*panel[:3], level if "accuracy" in panel[1] else {}) for panel in metric_panels()]
    gained = f"accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}"
    draw_curves(
        run_path,
        f"distillation on {config.data}, seed {config.seed}: {gained}",
        [
            *panels,
            (
                "divergence on the training texts",
                {"reverse_kl": "KL(student ‖ teacher)", "forward_kl": "KL(teacher ‖ student)"},
                "nats per token",
                {},
            ),
            ("training answers", {"length": "mean length"}, "tokens", {}),
            ("loss", {"loss": "train"}, "", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    print(f"{figures['path']}, {run_path}/last, {run_path}/curves.png, {run_path}/samples.md")
