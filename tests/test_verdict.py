"""support/verdict.py: a diagnosis for each reason why nothing can be learned, and none where something can."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data import Problem
from generate import Rollout
from grpo import Config, accuracy_reward
from support.devices import Dist
from support.rewards import format_reward
from support.verdict import FirstLook, look_first, verdict

# 48 groups of 8 answers that all earn the same, of a start that was trained to chat.
SILENT = FirstLook(48, 48, 384, truncated=10, right=0, readable=330, formatted=300, same_text=0, chat=True)


@pytest.mark.parametrize(
    ("changes", "why", "change"),
    [
        ({}, "every answer is wrong, though some can be read", "easier questions"),
        ({"formatted": 0}, "every answer is wrong, though some can be read", "easier questions"),
        ({"right": 384, "formatted": 384}, "every answer is right already", "harder questions"),
        (
            {"truncated": 384, "formatted": 0},
            "100% of the answers are cut off at --max_new_tokens 64",
            "raise --max_new",
        ),
        (
            {"truncated": 384, "formatted": 0, "chat": False},
            "100% of the answers never end: --init seems a base",
            "sft.py",
        ),
        (
            {"formatted": 0, "readable": 0},
            "no answer is well formed: none ends with one line `#### number`",
            "--instruction",
        ),
        (
            {"formatted": 0, "readable": 0, "chat": False},
            "no answer is well formed, and --init seems a base model",
            "sft.py",
        ),
        ({"same_text": 48, "formatted": 0}, "all the same text", "raise --temperature"),
        ({"right": 192, "formatted": 192}, "the answers of each group all earn the same", "tells answers apart"),
        (
            {"right": None, "readable": None, "formatted": None},
            "the answers of each group all earn the same",
            "tells answers apart",
        ),
    ],
)
def test_each_diagnosis(changes, why, change):
    lines = verdict(replace(SILENT, **changes), 64).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("nothing can be learned: ")
    assert why in lines[0]
    assert lines[1].startswith("what to change: ")
    assert change in lines[1]
    assert max(map(len, lines)) < 200
    assert verdict(replace(SILENT, silent=47, **changes), 64) is None


def test_masked_answers_are_named():
    all_cut = replace(SILENT, truncated=384)
    assert "--mask_truncated gives them no gradient" in verdict(all_cut, 64, masked=True)
    assert "mask_truncated" not in verdict(all_cut, 64)


def test_the_figures_in_one_line():
    look = replace(SILENT, silent=12, right=192)
    assert look.line() == (
        "first look: 48 questions x 8 answers, 50% right, 86% readable, 78% well formed, 3% cut off; 25% of the groups "
        "have no signal; the start was trained to chat"
    )
    other = replace(look, right=None, readable=None, formatted=None, chat=False).line()
    assert "right" not in other
    assert "was not trained to chat" in other


def test_what_the_verifier_can_read_is_counted(capsys):
    texts = [r"so it is \boxed{4}", "#### 5", "#### 4 pears", r"\boxed{4} #### 5"]  # right, wrong, right, two answers
    problem = Problem("2 + 2?", "#### 4", "4")
    batch = SimpleNamespace(problems=[problem], texts=texts, ended=torch.ones(1, 4, dtype=torch.bool), rewards={})
    ids = torch.zeros(4, 9, dtype=torch.long)
    batch.rollout = Rollout(ids, torch.ones(4, 9, dtype=torch.bool), torch.zeros(4, 9))
    config = Config(prompts=1, minibatches=1, rollouts=4, steps=1)
    functions = {"correct": accuracy_reward, "format": format_reward}

    class Sample:
        tokenizer = None

        def __call__(self, step, slots):
            return batch

    dist = Dist(0, 1, torch.device("cpu"))
    look_first(Sample(), [0], lambda _: torch.tensor([True]), functions, {"correct": 1.0}, ".", config, dist)
    assert "1 questions x 4 answers, 50% right, 75% readable, 25% well formed, 0% cut off" in capsys.readouterr().out
