"""Tasks are rows of TASKS: a new one is a row and its generator, and every stage takes it by name."""

import ast
import json
import random
from dataclasses import replace

import pytest
from conftest import ROOT, metrics

import data
import distill
import dpo
import evaluate
import grpo
import ppo
import pretrain
import rejection
import reward_model
import sft
from data import TASKS, Problem, load_pairs, load_problems, load_text
from evaluate import evaluate_samples, is_correct
from support import devices, ppo_setup, reward_samples, teachers
from support.checkpoints import open_checkpoint
from support.errors import ConfigError, DataError
from support.reward_samples import judged_pairs
from support.splits import SPLITS, split_of
from support.tasks import Task


def backwards(split, n, levels, seed):
    """n words to be written backwards."""
    rng, words = random.Random(f"backwards/{seed}/{split}"), {}
    while len(words) < n:
        word = "".join(rng.choice("abcd") for _ in range(rng.randint(3, 8)))
        if split_of(word) == split:
            words[word] = (f"Backwards: {word}", f"It is: {word[::-1]}", word[::-1])
    return list(words.values())


SMALL = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "width": 16, "context": 64}
ROW = Task(
    problems=backwards,
    answer=lambda text: text.partition("It is: ")[2].strip() or None,
    same_answer=lambda a, b: a == b,
    pretrain={"steps": 2, "vocab_size": 290, "batch": 4, "micro_batch": 4, "model": SMALL},
    sft={"steps": 2, "batch": 4, "eval_every": 1, "eval_problems": 3, "test_problems": 3, "max_new_tokens": 8},
)
FEW = dict(eval_problems=3, test_problems=3, device="cpu", max_new_tokens=8, steps=2)


@pytest.fixture
def task(monkeypatch, scratch):
    monkeypatch.setitem(TASKS, "backwards", ROW)
    monkeypatch.setattr(data, "SIZES", {"train": 200, "valid": 20, "test": 20})
    return ROW


def test_a_task_of_its_own_is_taken_by_every_stage(task, scratch, monkeypatch):
    """By its name: the starts are made on its text and its problems, and its own verifier judges the answers."""
    started = []

    def watched(run):
        def main(config):
            assert config.data == "backwards"  # or a long run on the default task would begin
            started.append(config.name)
            return run(config)

        return main

    for stage in (pretrain, sft, reward_model):
        monkeypatch.setattr(stage, "main", watched(stage.main))
    sft.main(sft.Config(data="backwards", name="a", **FEW))
    start = "start/backwards-seed0-"
    assert started == ["a", f"{start}pretrain"]
    assert open_checkpoint(f"runs/{start}pretrain")[0].config.width == 16
    rl = FEW | dict(data="backwards", rollouts=8)
    grpo.main(grpo.Config(name="b", prompts=2, pass_problems=2, pass_samples=2, eval_every=2, **rl))
    assert started[2:] == [f"{start}sft"]  # its pretraining is at hand
    assert list(metrics("runs/b", "reward_correct")) == [1, 2]
    assert grpo.Config(data="backwards").micro_batch == task.micro_batch == 32

    # Every second answer counts as right and as ended: a model of two steps has none that is.
    lucky = replace(task, answer=str, same_answer=lambda a, b: a.endswith(b) or len(a) % 2 == 1)
    monkeypatch.setitem(TASKS, "backwards", lucky)
    monkeypatch.setattr(
        reward_samples,
        "judged_pairs",
        lambda problems, groups, most: judged_pairs(problems, [[(*r[:2], True) for r in g] for g in groups], most),
    )
    dpo.main(dpo.Config(name="c", batch=2, prompts=8, eval_every=2, **rl))
    rejection.main(rejection.Config(name="d", batch=2, round_steps=1, prompts=8, pass_problems=2, pass_samples=2, **rl))
    assert max(metrics("runs/d", "usable").values()) > 0
    for name, value in dict(steps=1, prompts=2, eval_problems=3, test_problems=3, pass_problems=2).items():
        monkeypatch.setitem(teachers.TEACHER, name, value)
    distill.main(distill.Config(name="e", prompts=2, pass_problems=2, pass_samples=2, eval_every=2, **rl))
    assert started[-2:] == [f"{start}student-pretrain", f"{start}student"]
    widths = [open_checkpoint(f"runs/{start}{name}")[0].config.width for name in ("student", "teacher")]
    assert widths == [8, 16]
    few = dict(prompts=8, eval_pairs=8, test_pairs=8, best_of=2, best_of_problems=2, batch=2)
    few |= dict(data="backwards", max_new_tokens=8, steps=2, device="cpu", rollouts=8)
    result = reward_model.main(reward_model.Config(name="start/backwards-seed0-reward", **few))
    assert set(result["by_kind"]) == {"all", "sampled"}  # no corrupted solutions, no renaming
    assert "best_of" in result
    assert "renamed_same_order" not in result
    monkeypatch.setattr(ppo_setup, "make_start_once", lambda name, what, stage, settings, dist: settings)
    assert ppo_setup.reward_start(ppo.Config(data="backwards"), "x", None)["data"] == "backwards"
    assert (
        json.loads((scratch / "runs/start/backwards-seed0-sft/finished").read_text(encoding="utf-8"))["data"]
        == "backwards"
    )


def test_what_a_row_does_not_say_is_made_of_its_problems(task):
    problems = load_problems("backwards", "valid")
    assert len(problems) == 20
    assert problems[0].task == "backwards"
    assert load_text("backwards", "valid") == [f"{p.question}\n{p.solution}" for p in problems]
    assert not {p.question for s in SPLITS if s != "test" for p in load_problems("backwards", s)} & {
        p.question for p in load_problems("backwards", "test")
    }
    with pytest.raises(DataError, match="task backwards has no corrupted solutions"):
        load_pairs("backwards")
    with pytest.raises(DataError, match=", backwards, gsm8k"):
        load_problems("nothing")


def test_a_tasks_own_verifier_judges(task):
    problem = Problem("Backwards: abc", "It is: cba", "cba", task="backwards")
    assert is_correct("It is: cba", problem)
    assert not is_correct("#### cba", problem)
    assert not is_correct("It is: ", problem)
    numbers = Problem("1 + 1?", "#### 2", "2")
    assert is_correct("#### 2.0", numbers)
    assert not is_correct("It is: 2", numbers)


def test_sampled_answers_are_judged_by_their_task(task, monkeypatch):
    """pass@k and the majority too: two of four are right, and three agree."""
    texts = ["It is: cba", "It is: bca", "It is: cba", "It is: cba"]

    class Rollout:
        texts = staticmethod(lambda tokenizer: texts)

    class Tokenizer:
        stop_ids = ()

    monkeypatch.setattr(evaluate, "encode_prompt", lambda *_: [0])
    monkeypatch.setattr(evaluate, "generate", lambda *_, **__: Rollout)
    problem, dist = Problem("Backwards: abc", "It is: cba", "cba", task="backwards"), devices.setup("cpu")
    found = evaluate_samples(None, Tokenizer, [problem], 4, 8, dist)
    assert found == {"pass@1": 0.75, "pass@2": 1.0, "pass@4": 1.0, "majority@4": 1.0, "solved": [3]}


@pytest.mark.parametrize(
    ("changes", "gives"),
    [
        ({"answer": lambda text: None}, "None"),
        ({"same_answer": evaluate.same_answer}, "'"),
        ({"problems": None}, "'7'"),
    ],
)
def test_a_task_whose_own_solutions_fail_is_refused(task, monkeypatch, changes, gives):
    """It would show 0 % for ever. One line, which names the task and the problem."""
    if changes == {"problems": None}:
        changes = {"problems": lambda *_: [("1 + 1?", "#### 2", "2"), ("3 + 3?", "#### 7", "6")]}
        changes |= {"answer": evaluate.extract_answer, "same_answer": evaluate.same_answer}
    monkeypatch.setitem(TASKS, "backwards", replace(task, **changes))
    with pytest.raises(DataError, match=r"task backwards: its own solution of '[^']+' does not verify") as caught:
        load_problems("backwards")
    assert f"it gives {gives}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_without_problems_is_refused_and_a_generous_one_is_cut(task, monkeypatch):
    monkeypatch.setitem(TASKS, "backwards", replace(task, problems=lambda *_: []))
    with pytest.raises(DataError, match="task backwards has no problem in the split test"):
        load_problems("backwards", "test")
    monkeypatch.setitem(TASKS, "backwards", replace(task, problems=lambda s, n, *more: backwards(s, n + 5, *more)))
    assert len(load_problems("backwards", n=7)) == 7


def test_a_task_needs_no_init_and_a_file_does(task):
    for stage in (dpo, grpo, ppo):
        stage.Config(data="backwards")
        with pytest.raises(ConfigError, match="needs an SFT checkpoint to start from"):
            stage.Config(**({"data": "gsm8k"} if stage is not ppo else {"data": "x.jsonl"}))
    assert dpo.Config(data="backwards").pairs == "sampled"
    assert reward_model.Config(data="backwards").pairs == "sampled"
    assert reward_model.Config(data="backwards").kinds == []
    assert reward_model.Config().kinds == ["wrong_sum"] * 4 + ["skipped_step", "wrong_operator", "missing_answer"]
    with pytest.raises(ConfigError, match="--kinds has no use here: no pair is corrupted"):
        reward_model.Config(data="backwards", kinds=["wrong_sum"])


def test_levels_are_of_a_task_alone():
    """A file's problems have the levels that they have: there --levels would do nothing."""
    needs = {sft: {}, reward_model: {}, evaluate: {"checkpoint": "x"}, grpo: {"init": "x"}, dpo: {"init": "x"}}
    for stage, given in needs.items():
        assert stage.Config(data="gsm8k", **given).levels == [1, 2]
        with pytest.raises(ConfigError, match="--levels has no effect with --data gsm8k, which is no task: leave it"):
            stage.Config(data="gsm8k", levels=[3], **given)
        assert stage.Config(levels=[3], **given).levels == [3]


def test_what_is_generated_has_no_bad_records_to_skip():
    """As with --levels: a flag that would do nothing is refused."""
    needs = {pretrain: {}, sft: {}, reward_model: {}, evaluate: {"checkpoint": "x"}, grpo: {"init": "x"}}
    for stage, given in needs.items():
        with pytest.raises(ConfigError, match="--skip_bad has no effect with --data word, which is generated"):
            stage.Config(skip_bad=True, **given)
        assert stage.Config(data="own.csv", skip_bad=True, **given).skip_bad


def test_nothing_but_the_table_names_a_task():
    places = [
        f"{path.name}:{node.lineno}"
        for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in TASKS
    ]
    assert len(places) == len(TASKS), places  # each once
    assert all(place.startswith("tasks.py:") for place in places)
