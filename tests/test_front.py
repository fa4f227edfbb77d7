"""support/front.py: what its pictures show, against the files of a run and a plain decoding; what they cannot be of."""

import json
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence  # matplotlib's own dependency

from data import encode_prompt, load_problems
from evaluate import GreedyAnswer
from support import front
from support.cli import run_script
from support.errors import DataError
from support.recorder import FILE, packed_line
from support.tasks import TASKS
from tokenizer_bpe import load_tokenizer
from transformer import Transformer, TransformerConfig

SETTINGS = {"init": "runs/sft", "data": "word", "levels": [1, 2], "seed": 0, "steps": 60, "eval_problems": 6}
SETTINGS |= {"max_new_tokens": 12, "algorithm": "grpo", "instruction": "", "correct_weight": 1.0, "skip_bad": False}
SHOWS_MOST = front.shows_most
VOCAB = {"0": "In all, 2 + 2 = ", "1": "4", "2": "5", "3": ".\n#### ", "4": "<|im_end|>", "5": "\u202e$x$\x07"}
RIGHT, WRONG, CUT = [0, 1, 3, 1, 4], [0, 2, 3, 2, 4], [5, 0, 1, 3] * 40
# Right answers of four to two watched questions, by step: the second gains more.
COUNTS = {1: (2, 0), 10: (1, 1), 20: (2, 3), 30: (3, 2), 40: (3, 3), 50: (2, 3), 60: (3, 4)}


def answers_of(right):
    ids = [RIGHT] * right + [WRONG, CUT, WRONG, CUT][: 4 - right]
    return [
        {"ids": row, "ended": row is not CUT, "rewards": {"format": 0.0, "correct": float(row is RIGHT)}} for row in ids
    ]


def record_of(step, counts):
    groups = [{"question": "Of the step?", "answer": "1", "watched": False, "answers": answers_of(4)}]
    groups += [
        {"question": f"{name}: 2 + 2?", "answer": "4", "watched": True, "answers": answers_of(right)}
        for name, right in zip(("First", "Second"), counts, strict=True)
    ]
    return {"step": step, "vocab": VOCAB, "groups": groups}


def write_recording(path, records, **changes):
    header = {"about": "Train a policy", "config": SETTINGS | changes}
    path.mkdir(parents=True, exist_ok=True)
    (path / FILE).write_bytes(b"".join(map(packed_line, [header, *records])))


def write_metrics(path, config, *records):
    lines = [{"config": config}, *records]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def runs(scratch, monkeypatch, tokenizer):
    """runs/grpo, and what it began from: runs/sft, and its own start of pretraining. The models are random: any answer
    is taken for one that was put right."""
    monkeypatch.setattr(front, "shows_most", lambda *asked: (True, SHOWS_MOST(*asked)[1]))
    layout = TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16)
    for seed, name in enumerate(("start/word-seed7-pretrain/best", "sft/best", "grpo/best", "grpo/last")):
        torch.manual_seed(seed)
        model = Transformer(layout)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.4 * torch.randn_like(p))
        model.save_pretrained(scratch / "runs" / name)
        tokenizer.save_pretrained(scratch / "runs" / name)
    start = scratch / "runs/start/word-seed7-pretrain"
    write_metrics(start, {"init": None}, {"step": 1, "valid_loss": 0.74}, {"step": 2, "valid_loss": 0.81})
    sft = {"init": None, "data": "word", "seed": 7}
    write_metrics(scratch / "runs/sft", sft, {"step": 5, "accuracy": 0.0}, {"step": 10, "accuracy": 0.5})
    accuracies = [{"step": 0, "accuracy": 0.501}, {"step": 30, "accuracy": 0.95}, {"step": 60, "accuracy": 0.9}]
    write_metrics(scratch / "runs/grpo", SETTINGS, *accuracies)
    write_recording(scratch / "runs/grpo", [record_of(step, counts) for step, counts in COUNTS.items()])
    return scratch / "runs"


def decoded(path, ids, n, stops):
    """The likeliest token, n times, in the plain form."""
    model, tokenizer, answer = Transformer.from_pretrained(path).eval(), load_tokenizer(path), []
    with torch.no_grad():
        while len(answer) < n and not (answer and answer[-1] in stops):
            answer.append(model(torch.tensor([ids + answer]))[0, -1].argmax().item())
    return tokenizer.decode_answer(answer)


def test_the_stages_are_asked_the_same_problem_and_have_the_figures_of_the_files(runs):
    stages, problem = front.stages_of("runs/grpo")
    assert problem in load_problems("word", "valid", 6)
    tokenizer = load_tokenizer(runs / "sft/best")
    prompts = [tokenizer.encode(problem.question), *[encode_prompt(tokenizer, problem)] * 2]
    paths = ("start/word-seed7-pretrain/best", "sft/best", "grpo/last")
    stops = [(tokenizer.endoftext_id,), tokenizer.stop_ids, tokenizer.stop_ids]
    for stage, path, prompt, stop in zip(stages, paths, prompts, stops, strict=True):
        assert stage.text == decoded(runs / path, prompt, 12, stop)
    assert len({stage.text for stage in stages}) == 3
    assert [stage.number for stage in stages] == ["0.74", "50.1%", "90.0%"]
    assert [(stage.title, stage.file) for stage in stages[1:]] == [("SFT", "sft.py"), ("GRPO", "grpo.py")]


def test_of_last_the_figures_and_the_answers_are_those_of_last(runs):
    Transformer.from_pretrained(runs / "grpo/best").save_pretrained(runs / "sft/last")
    load_tokenizer(runs / "sft/best").save_pretrained(runs / "sft/last")
    write_recording(runs / "grpo", [record_of(*row) for row in COUNTS.items()], init="runs/sft/last")
    base, sft = runs / "start/word-seed7-pretrain", {"data": "word", "seed": 7}
    Transformer.from_pretrained(runs / "grpo/best").save_pretrained(base / "last")
    load_tokenizer(base / "best").save_pretrained(base / "last")
    write_metrics(runs / "sft", sft | {"init": str(base / "last")}, {"step": 10, "accuracy": 0.5})
    stages, problem = front.stages_of("runs/grpo")
    tokenizer = load_tokenizer(runs / "sft/last")
    prompt = encode_prompt(tokenizer, problem)
    assert stages[1].text == decoded(runs / "sft/last", prompt, 12, tokenizer.stop_ids)
    assert stages[0].text == decoded(base / "last", tokenizer.encode(problem.question), 12, (tokenizer.endoftext_id,))
    assert stages[0].number == "0.81"


def test_only_problems_that_the_run_could_read_are_counted(runs):
    lines = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in range(400)]
    lines[5] = '{"question": "cut'
    for n in range(400):  # no room for an answer
        lines.append(json.dumps({"question": f"{n} + 1? " * 60, "answer": f"#### {n + 1}"}))
    (runs.parent / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = [record_of(*row) for row in COUNTS.items()]
    write_recording(runs / "grpo", records, data="own.jsonl", skip_bad=True, eval_problems=400)
    stages, _ = front.stages_of("runs/grpo")
    asked = load_problems("own.jsonl", "valid", 400, (1, 2), True)
    kept = [p for p in asked if len(p.question) < 20]
    assert 0 < len(kept) < len(asked)
    assert stages[1].meaning == f"of {len(kept)} validation problems right"


def test_the_problem_is_one_that_was_put_right_with_the_least_change(runs, monkeypatch):
    monkeypatch.setattr(front, "shows_most", SHOWS_MOST)
    problems = load_problems("word", "valid", 6)
    first = ["so 7\n#### 7"] * 6
    last = [f"{text}\n#### {p.answer}" for text, p in zip(("a b c d", "so 1", "so", "x"), problems, strict=False)]
    last += ["so 7\n#### 7"] * 2  # not changed at all, but not right
    first[2] = last[2]  # right before
    given = iter([first, last])
    monkeypatch.setattr(
        front,
        "evaluate",
        lambda *_, **__: {"answers": [GreedyAnswer(p, t, 0, 0, 1) for p, t in zip(problems, next(given), strict=True)]},
    )
    stages, problem = front.stages_of("runs/grpo")
    assert problem == problems[1]
    assert [stage.text for stage in stages[1:]] == [first[1], last[1]]
    assert [stage.verdict for stage in stages] == [None, False, True]
    given = iter([first, first])
    with pytest.raises(DataError, match="runs/grpo has put none of the 6 validation problems right: train for longer"):
        front.stages_of("runs/grpo")


def test_the_verdict_is_that_of_the_tasks_own_verifier(runs, monkeypatch):
    """Its answers need not stand after ####."""
    monkeypatch.setitem(TASKS, "word", replace(TASKS["word"], answer=lambda text: (text.split() or [None])[-1]))
    monkeypatch.setattr(front, "shows_most", SHOWS_MOST)
    problems = load_problems("word", "valid", 6)
    given = iter([["so -1"] * 6, [f"so {p.answer}" for p in problems]])
    monkeypatch.setattr(
        front,
        "evaluate",
        lambda *_, **__: {"answers": [GreedyAnswer(p, t, 0, 0, 1) for p, t in zip(problems, next(given), strict=True)]},
    )
    stages, _ = front.stages_of("runs/grpo")
    assert [stage.verdict for stage in stages[1:]] == [False, True]


def test_the_frames_are_those_of_the_question_that_gained_most(runs):
    question, answer, frames, by_step = front.frames_of("runs/grpo")
    assert (question, answer) == ("Second: 2 + 2?", "4")
    assert by_step == {step: counts[1] for step, counts in COUNTS.items()}
    assert [(frame.step, frame.right) for frame in frames] == list(by_step.items())
    assert frames[-1].answers == [("In all, 2 + 2 = 4.\n#### 4", True)] * 4
    assert frames[0].answers[0] == ("In all, 2 + 2 = 5.\n#### 5", False)
    assert frames[0].answers[1][0].count(VOCAB["5"]) == 40  # cut off: to its last token


def test_a_question_is_followed_by_its_text(scratch):
    """A run that is resumed with another --watch asks them in another order."""
    records = [record_of(step, counts) for step, counts in COUNTS.items()]
    for record in records[3:]:
        record["groups"][1:] = record["groups"][:0:-1]
    write_recording(scratch / "run", records)
    question, _, frames, by_step = front.frames_of("run")
    assert question == "Second: 2 + 2?"
    assert by_step == {step: counts[1] for step, counts in COUNTS.items()}
    assert [frame.right for frame in frames] == list(by_step.values())


def test_of_many_steps_eight_are_shown_the_first_and_the_last_among_them(scratch):
    steps = range(1, 61)
    write_recording(scratch / "run", [record_of(step, (0, step // 15)) for step in steps])
    _, _, frames, by_step = front.frames_of("run")
    shown = [frame.step for frame in frames]
    assert (shown[0], shown[-1], len(shown), len(by_step)) == (1, 60, 8, 60)
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1


def test_the_pictures(runs, capsys):
    counts = {step: COUNTS[step] for step in (1, 30, 60)}
    write_recording(runs / "grpo", [record_of(step, some) for step, some in counts.items()])
    front.main(front.parse(["runs/grpo"]))
    out = capsys.readouterr().out
    assert "results/pipeline.png: " in out
    assert "right of 4: 0 at step 1, 2 at step 30, 4 at step 60" in out
    picture = matplotlib.image.imread("results/pipeline.png")
    assert picture.shape[1] == 1660
    assert (picture[..., 3] == 1).all()  # its own white, on a dark page too
    file = runs.parent / "results/answers.gif"
    assert file.stat().st_size < 1e6
    tints = {True: (0xE3, 0xEF, 0xF8), False: (0xFB, 0xEA, 0xDE)}
    durations = []
    for frame, right in zip(ImageSequence.Iterator(Image.open(file)), (0, 2, 4), strict=True):
        durations.append(frame.info["duration"])
        column = np.asarray(frame.convert("RGB"))[:, 1600].astype(int)  # right of the texts
        rows = {is_right: (abs(column - tint).max(-1) < 6) for is_right, tint in tints.items()}
        bands = {is_right: np.diff(here.astype(int), prepend=0).clip(0).sum() for is_right, here in rows.items()}
        assert bands == {True: right, False: 4 - right}
    assert durations == [1200, 1200, 4800]


def test_a_text_is_drawn_as_text_and_in_its_room():
    assert front.folded("a $x$ b\n\u202e\x07", 10, 3) == "a $x$ b\n\\u202e\\x07"
    assert front.folded("one two three four", 9, 2) == "one two\nthree…"
    assert front.folded("word " * 100, 20, 3).split("\n") == [
        "word word word word",
        "word word word word",
        "word word word word…",
    ]
    assert front.folded("x" * 100, 20, 2).split("\n") == ["x" * 20, "x" * 19 + "…"]


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        run_script(front.main, None, parse=lambda: front.parse(flags))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().split("\n")[-1:]
    return line


def test_bad_input_is_one_line_and_writes_nothing(runs, capsys):
    assert "nowhere is no run directory" in refused(capsys, "nowhere")
    assert f"runs/sft holds no {FILE}" in refused(capsys, "runs/sft")
    records = [record_of(step, counts) for step, counts in COUNTS.items()]
    for name, change in {"gdpo": {"combine": "sum"}, "agent": {"tools": []}}.items():
        write_recording(runs / name, records, **change)
        assert f"runs/{name} is no run of grpo.py: Train a policy" in refused(capsys, f"runs/{name}")
    header = {"about": "Fine-tune", "config": {"steps": 60}}
    (runs / "sft" / FILE).write_bytes(b"".join(map(packed_line, [header, *records])))
    assert "runs/sft is no run of grpo.py: Fine-tune" in refused(capsys, "runs/sft")
    write_recording(runs / "short", records[:1])
    assert "no watched question at two steps" in refused(capsys, "runs/short")
    others = json.loads(json.dumps(records[-1]).replace("2 + 2?", "3 + 3?"))
    write_recording(runs / "others", [*records[:-1], others])
    assert "no watched question at two steps" in refused(capsys, "runs/others")
    write_recording(runs / "early", records[:3])
    assert "runs/early has not ended: step 20 of 60" in refused(capsys, "runs/early")
    unpaid = json.loads(json.dumps(records).replace('"correct"', '"other"'))
    write_recording(runs / "unpaid", unpaid)
    assert "does not say which answers are right" in refused(capsys, "runs/unpaid")
    (runs / "sft/metrics.jsonl").unlink()
    assert "no settings and accuracy in runs/sft/metrics.jsonl" in refused(capsys, "runs/grpo")
    write_metrics(runs / "sft", {"init": "elsewhere/best"}, {"step": 1, "accuracy": 0.5})
    assert "no settings and valid_loss in elsewhere/metrics.jsonl" in refused(capsys, "runs/grpo")
    assert not (runs.parent / "results").exists()
