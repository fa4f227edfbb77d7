"""The two pictures at the top of README.md, drawn from a run of grpo.py and the runs that it began from:

    python -m support.front runs/grpo          writes results/pipeline.png and results/answers.gif; --out DIR elsewhere

pipeline.png: pretraining, SFT and GRPO, and what the model of each answers to the same validation problem, greedily.
Of all validation problems it is one that GRPO has put right, and of those the one whose answer changed least.
answers.gif: the answers to one watched question at some of the recorded steps; the question that gained most.

    stages, problem = stages_of(run_dir)                        what pipeline.png shows
    question, answer, frames, by_step = frames_of(run_dir)      what answers.gif shows
"""

import argparse
import json
import textwrap
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from data import encode_prompt, load_problems, task_of
from evaluate import evaluate, is_correct
from generate import generate
from support.checkpoints import open_checkpoint
from support.cli import run_script
from support.devices import setup
from support.errors import DataError
from support.files import must_write, replacing
from support.log import read_metrics
from support.plots import pyplot
from support.questions import instructed
from support.recorder import read_recording
from support.runs import RUNS, start_name
from support.sft_start import own_length
from support.tasks import skipping
from support.view_page import visible

FRAMES, ROWS = 8, 8  # of answers.gif: frames, and answers in each
SECONDS = 1.2  # of a frame; the last one stays for four times as long
INK, SOFT, LINE, CARD = "#1c2127", "#4c5763", "#b9c2cb", "#f2f5f8"
RIGHT, WRONG = "#0067ad", "#b84d00"  # blue and orange: apart for every kind of colour vision, dark enough to read
OTHERS = "ppo.py · dpo.py · gdpo.py · rejection.py · distill.py · agent.py"


class Stage(NamedTuple):
    title: str
    file: str
    learns: str
    text: str  # what its model answers
    verdict: bool | None  # None: it gives no answer
    number: str  # how good it is
    meaning: str  # of the number


class Frame(NamedTuple):
    step: int
    answers: list  # (text, whether it is right) each
    right: int  # how many are


# ---------------------------------------------------------------------------------------------------------------
# What the pictures show.


def recording_of(run_dir):
    """-> settings, records of a run of grpo.py. DataError if another stage made it, or if it recorded too little."""
    header, records = read_recording(run_dir)
    config = header["config"]
    if "algorithm" not in config or {"combine", "tools"} & config.keys():  # gdpo.py and agent.py have these too
        raise DataError(f"{run_dir} is no run of grpo.py: {visible(str(header.get('about')))}")
    watched = [[group for group in record["groups"] if group["watched"]] for record in records]
    if len(records) < 2 or not set.intersection(*({group["question"] for group in some} for some in watched)):
        raise DataError(f"{run_dir} has recorded no watched question at two steps: train with --watch 1 or more")
    if (step := records[-1]["step"]) < config["steps"]:
        raise DataError(f"{run_dir} has not ended: step {step} of {config['steps']} is the last that it recorded")
    if not all("correct" in answer["rewards"] for groups in watched for g in groups for answer in g["answers"]):
        raise DataError(f"{run_dir} does not say which answers are right: a watched question has no answer to check")
    return config, records


def read_run(run_dir, metric):
    """-> settings of a run, the values of a metric. DataError if metrics.jsonl does not have both."""
    path = Path(run_dir) / "metrics.jsonl"
    try:
        with open(path, encoding="utf-8") as lines:
            config = json.loads(next(lines))["config"]
        return config, read_metrics(run_dir)[metric][1]
    except (OSError, ValueError, KeyError, StopIteration):
        problem = f"no settings and {metric} in {path}"
        raise DataError(
            f"{problem}: give a run that began from runs of sft.py and pretrain.py, where it was trained"
        ) from None


def began_from(config, stage):
    """-> the run that a run with these settings began from, by default its own start, made by `stage`; and the
    checkpoint of it."""
    levels = () if stage == "pretrain" else (config["levels"],)
    if not (path := config.get("init")):
        if stage == "pretrain":
            others = skipping(config["data"], config.get("skip_bad"))
        else:
            others = own_length(config["data"], config["max_new_tokens"])
        path = RUNS / start_name(config["data"], config["seed"], stage, *levels, **others)
    path = Path(path)
    return path.parent if path.name in ("best", "last") else path, path


def shows_most(problem, first, last):
    """How well an answer before and one after show what was learned, the greater the better."""
    put_right = is_correct(last, problem) and not is_correct(first, problem)
    return put_right, SequenceMatcher(None, first, last, autojunk=False).ratio()


def stages_of(run_dir):
    """-> [Stage, …] of pretraining, SFT and this run, and the problem that all are asked."""
    config, _ = recording_of(run_dir)
    _, accuracies = read_run(run_dir, "accuracy")  # the first is that of the start
    tuned, tuned_at = began_from(config, "sft")
    base, base_at = began_from(read_run(tuned, "accuracy")[0], "pretrain")
    _, losses = read_run(base, "valid_loss")
    loss = losses[-1] if base_at.name == "last" else min(losses)

    dist, T = setup("cpu"), config["max_new_tokens"]
    of_split = config["eval_problems"], tuple(config["levels"]), config["skip_bad"]
    problems = instructed(load_problems(config["data"], "valid", *of_split), config["instruction"])
    answers = []  # of both chat models, {question: text}
    for path in (tuned_at, Path(run_dir) / "last"):
        policy, tokenizer, _ = open_checkpoint(path)
        room = policy.config.context - T  # as in training
        problems = [p for p in problems if len(encode_prompt(tokenizer, p)) <= room]
        samples = evaluate(policy.eval(), tokenizer, problems, T, dist, progress=str(path))["answers"]
        answers.append({s.problem.question: s.text for s in samples})

    problem = max(problems, key=lambda p: shows_most(p, *(texts[p.question] for texts in answers)))
    if not shows_most(problem, *(texts[problem.question] for texts in answers))[0]:
        raise DataError(f"{run_dir} has put none of the {len(problems)} validation problems right: train for longer")
    policy, tokenizer, _ = open_checkpoint(base_at)
    ids, end = tokenizer.encode(problem.question), (tokenizer.endoftext_id,)  # it continues text: it knows no turns
    (continued,) = generate(policy.eval(), [ids], T, temperature=0, stop_ids=end).texts(tokenizer)

    def stage(title, file, learns, text, number, meaning):
        verdict = None if task_of(problem.task).answer(text) is None else is_correct(text, problem)
        return Stage(title, file, learns, text, verdict, number, meaning)

    name, of = config["algorithm"].replace("_", " ").upper(), f"of {len(problems)} validation problems right"
    return [
        stage("Pretraining", "pretrain.py", "to predict the next token", continued, f"{loss:.2f}",
              "nats per token, validation loss"),
        stage("SFT", "sft.py", "from worked solutions", answers[0][problem.question],
              f"{accuracies[0]:.1%}", of),
        stage(name, "grpo.py", "from its own answers, judged", answers[1][problem.question],
              f"{accuracies[-1]:.1%}", of),
    ], problem  # fmt: skip


def frames_of(run_dir):
    """-> question, its right answer, [Frame, …] of some steps, {step: how many answers were right} of all."""
    _, records = recording_of(run_dir)
    groups = [{group["question"]: group for group in record["groups"] if group["watched"]} for record in records]
    counts = [
        {question: sum(a["rewards"]["correct"] >= 1 for a in group["answers"]) for question, group in some.items()}
        for some in groups
    ]
    of_all = [question for question in groups[0] if all(question in some for some in groups)]
    chosen = max(of_all, key=lambda question: counts[-1][question] - counts[0][question])
    n = min(FRAMES, len(records))
    frames = []
    for i in (round(k * (len(records) - 1) / (n - 1)) for k in range(n)):
        group, vocab = groups[i][chosen], records[i]["vocab"]
        answers = []
        for answer in group["answers"]:
            ids = answer["ids"][:-1] if answer["ended"] else answer["ids"]  # the last one says that it ends
            text = "".join(vocab[str(token)] for token in ids)
            answers.append((text, answer["rewards"]["correct"] >= 1))
        frames.append(Frame(records[i]["step"], answers, counts[i][chosen]))
    by_step = {record["step"]: count[chosen] for record, count in zip(records, counts, strict=True)}
    return groups[0][chosen]["question"], groups[0][chosen]["answer"], frames, by_step


# ---------------------------------------------------------------------------------------------------------------
# The pictures: 830 points of a screen wide, each of them two pixels.


def canvas(height):
    """-> figure, its axis, write(x, y, text, …) from the top left, box(x, y, width, height, …); all in units of 1/100
    inch."""
    plt = pyplot()
    figure = plt.figure(figsize=(8.3, height / 100), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 830), ylim=(height, 0))
    axis.axis("off")

    def write(x, y, text, size=9.0, color=INK, **more):
        more = {"va": "top", "parse_math": False} | more
        return axis.text(x, y, visible(text).replace("⏎\n", "\n"), fontsize=size, color=color, **more)

    def box(x, y, width, tall, face=CARD, edge=LINE):
        shape = plt.matplotlib.patches.FancyBboxPatch(
            (x + 5, y + 5), width - 10, tall - 10, "round,pad=5,rounding_size=5", facecolor=face, edgecolor=edge
        )
        return axis.add_patch(shape)

    box(1, 1, 828, height - 2, "white")  # an edge of its own, on a dark page
    return figure, axis, write, box


def folded(text, width, lines):
    """Text in lines of at most `width` characters; what is more than so many lines becomes …"""
    parts = [textwrap.wrap(line, width) or [""] for line in visible(text).replace("⏎\n", "\n").strip("\n").split("\n")]
    rows = [row for part in parts for row in part]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: width - 1] + "…"]
    return "\n".join(rows)


def draw_pipeline(stages, problem, path):
    question = folded(f"{problem.question} (answer {problem.answer})", 118, 3)
    width, gap, top = 248, 25, 70 + 16 * (question.count("\n") + 1)
    figure, axis, write, box = canvas(top + 318)
    write(18, 16, "The same problem after each stage", 11, weight="bold")
    write(18, 43, question, 9.5)
    for k, stage in enumerate(stages):
        x = 18 + k * (width + gap)
        box(x, top, width, 268)
        write(x + 12, top + 13, f"{k + 1}  {stage.title}", 12, weight="bold")
        write(x + width - 12, top + 16, stage.file, 9, SOFT, family="monospace", ha="right")
        write(x + 12, top + 39, f"learns {stage.learns}", 9, SOFT)
        box(x + 10, top + 64, width - 20, 106, "white")
        write(x + 18, top + 72, folded(stage.text, 31, 6), 8.6, family="monospace", linespacing=1.35)
        verdict, color = {True: ("✓ right", RIGHT), False: ("✗ wrong", WRONG), None: ("– no answer", SOFT)}[
            stage.verdict
        ]
        write(x + 12, top + 179, verdict, 10.5, color, weight="bold")
        write(x + 12, top + 206, stage.number.replace("%", " %"), 17, weight="bold")
        write(x + 12, top + 243, stage.meaning, 9, SOFT)
        if k:
            arrow = dict(arrowstyle="-|>", color=SOFT, linewidth=2, mutation_scale=13, shrinkA=0, shrinkB=0)
            axis.annotate("", (x - 2, top + 134), (x - gap + 2, top + 134), arrowprops=arrow)
    write(18, top + 285, f"In the place of {stages[-1].title}, after SFT:", 9, SOFT)
    write(812, top + 285.5, OTHERS, 8.6, family="monospace", ha="right")
    save(figure, path)


def draw_answers(question, answer, frames, by_step, path):
    from matplotlib.animation import PillowWriter

    plt = pyplot()
    n, rows, last = len(frames[0].answers), min(ROWS, len(frames[0].answers)), max(by_step)
    question = folded(f"{question} (answer {answer})", 118, 3)
    top = 30 + 16 * (question.count("\n") + 1)
    height = top + 116 + 25 * rows
    figure, axis, write, box = canvas(height)
    write(18, 16, question, 9.5)
    writer = PillowWriter(fps=1 / SECONDS)
    bottom, left, right = height - 28, 190, 806
    write(18, bottom - 40, "right answers\nat each recorded step", 8.6, SOFT, linespacing=1.4)
    width = 0.7 * (right - left) / len(by_step)
    with must_write(path), replacing(path) as temporary, writer.saving(figure, temporary, dpi=200):
        for frame in frames:
            drawn = [write(18, top, f"step {frame.step} of {last}", 12, weight="bold")]
            drawn.append(write(200, top, f"{frame.right} of {n} right", 12, RIGHT, weight="bold"))
            for k, (text, is_right) in enumerate(frame.answers[:rows]):
                y, line = top + 28 + 25 * k, visible(text).replace("⏎\n", " ").strip()
                line = line if len(line) <= 104 else f"{line[:78]} … {line[-23:]}"
                color = RIGHT if is_right else WRONG
                drawn.append(box(18, y, 794, 22, "#e3eff8" if is_right else "#fbeade", "none"))
                drawn.append(write(25, y + 3.5, "✓" if is_right else "✗", 10, color, weight="bold"))
                drawn.append(write(46, y + 4.5, line, 8.5, family="monospace"))
            for i, (step, count) in enumerate(by_step.items()):
                x, here = left + i * (right - left) / len(by_step), step == frame.step
                bar = plt.Rectangle((x, bottom), width, -1 - 38 * count / n, color=RIGHT if here else LINE)
                drawn.append(axis.add_patch(bar))
                if step in (min(by_step), last) or here:
                    drawn.append(write(x + width / 2, bottom + 4, str(step), 8, INK if here else SOFT, ha="center"))
            for _ in range(4 if frame is frames[-1] else 1):
                writer.grab_frame()
            for thing in drawn:
                thing.remove()
    plt.close(figure)


def save(figure, path):
    with must_write(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=200)
    pyplot().close(figure)


def parse(args=None):
    parser = argparse.ArgumentParser(prog="python -m support.front", description=__doc__.partition("\n")[0].rstrip(":"))
    parser.add_argument("run", help="a run directory of grpo.py, such as runs/grpo")
    parser.add_argument("--out", default="results", help="where the pictures go; default: results")
    return parser.parse_args(args)


def main(config):
    out = Path(config.out)
    stages, problem = stages_of(config.run)
    shown = frames_of(config.run)
    with must_write(out):
        out.mkdir(parents=True, exist_ok=True)
    draw_pipeline(stages, problem, out / "pipeline.png")
    draw_answers(*shown, out / "answers.gif")
    question, answer, frames, _ = shown
    print(f"{out / 'pipeline.png'}: {problem.question} ({problem.answer})")
    for stage in stages:
        print(f"  {stage.title}, {stage.number} {stage.meaning}: {stage.text!r}")
    counts = ", ".join(f"{frame.right} at step {frame.step}" for frame in frames)
    print(f"{out / 'answers.gif'}: {question} ({answer})\n  right of {len(frames[0].answers)}: {counts}")


if __name__ == "__main__":
    run_script(main, None, parse=parse)
