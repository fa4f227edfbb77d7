"""evaluate.py: every figure by hand or against an enumeration, what two ranks find, the tables, and the script."""

import ast
import copy
import itertools
import json
import math
import os
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_refused, script
from hypothesis import given
from hypothesis import strategies as st

import distill
import dpo
import evaluate as evaluation
import grpo
import ppo
import rejection
from data import Problem, encode_prompt, load_problems
from evaluate import (
    METRICS,
    Config,
    Metric,
    compare,
    evaluate,
    evaluate_samples,
    kl_estimate,
    majority,
    mcnemar,
    paired_interval,
    pass_at_k,
    token_f1,
    wilson,
    words,
)
from generate import Rollout, generate
from lora import LoraConfig, add_lora
from support import devices, distill_report, dpo_report, grpo_report, held_out, ppo_report, rejection_report, sft_report
from support import sampled_kl as kl_module
from support.answers import measure_of, verifiable
from support.checkpoints import is_chat_model, open_checkpoint
from support.cli import run_script
from support.errors import CheckpointError, ConfigError, DataError
from support.held_out import before_and_after, logged, metric_panels
from support.sampled_kl import sampled_kl
from support.splits import split_of
from support.tables import file_name, markdown_table, metric_rows, show_results, text_table, write_tables
from tokenizer_bpe import ByteTokenizer
from transformer import Transformer, TransformerConfig, token_logprobs


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))


class Rank(devices.Dist):
    """One of several ranks, alone: its sums are its own share."""

    def sum(self, *values):
        return [float(v) for v in values]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_answers_are_given_in_the_precision_asked_for(tokenizer, dtype):
    seen = []

    def respond(*args, **kwargs):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return generate(*args, **kwargs)

    problems, dist = load_problems("word", "valid", 2), devices.setup("cpu")
    evaluate(tiny(tokenizer), tokenizer, problems, 2, dist, respond=respond, dtype=dtype)
    evaluate_samples(tiny(tokenizer), tokenizer, problems, 2, 2, dist, respond=respond, dtype=dtype)
    assert seen == 2 * [{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]]


def test_every_stage_says_in_which_precision_it_is_evaluated():
    """Without a word it is fp32, which only grpo_plain.py and the picture of support/front.py are in."""
    silent = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", None)
            if called in ("evaluate", "evaluate_samples"):
                source = ast.unparse(node)
                if "dtype" not in source and not ("**" in source and '"dtype": ' in text):
                    silent.append(path.name)
    assert set(silent) == {"grpo_plain.py", "front.py"}


def test_token_f1_by_hand():
    assert token_f1("The cat sat.", "a cat sat") == 1
    assert token_f1("cat cat dog", "cat bird") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert token_f1("cat", "dog") == 0
    assert token_f1("", "") == 1
    assert token_f1("", "dog") == token_f1("dog", "the") == 0


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("这是一件很好看的灰色衣服", "这是一件很好看的红色衣服。", "他昨天把车卖了，因为没有钱！"),
        ("私は灰色のドレスが好きです。", "私は紺色のドレスが好きです", "国境の長いトンネルを抜けた。"),
        ("วันนี้อากาศดีมากเราไปเดินเล่น", "วันนี้อากาศแย่มากเราไปเดินเล่น", "เขาขายรถเพราะไม่มีเงิน"),
        ("ມື້ນີ້ອາກາດດີຫຼາຍ", "ມື້ນີ້ອາກາດຮ້ອນຫຼາຍ", "ຂ້ອຍບໍ່ມີເງິນ"),
        ("ថ្ងៃនេះអាកាសធាតុល្អណាស់", "ថ្ងៃនេះអាកាសធាតុក្តៅណាស់", "ខ្ញុំគ្មានលុយទេ"),
        ("ဒီနေ့ရာသီဥတုကောင်းတယ်", "ဒီနေ့ရာသီဥတုပူတယ်", "ကျွန်တော်ပိုက်ဆံမရှိဘူး"),
    ],
)
def test_token_f1_in_scripts_without_spaces(text, near, far):
    assert token_f1(text, near) == pytest.approx(0.8, abs=0.12)
    assert token_f1(text, f"«{text}»！？၊") == 1
    assert token_f1(text, far) < 0.35


def test_the_words_of_mixed_text():
    assert words("用iPhone 15看Ｗｅｂ。") == ["用", "iphone", "15", "看", "ｗｅｂ"]
    assert words("衣服，コーヒー") == ["衣", "服", "衣服", "コ", "ー", "ヒ", "ー", "コー", "ーヒ", "ヒー"]
    assert words("มื่อ๒") == ["มื่", "อ", "๒", "มื่อ", "อ๒"]  # a sign stays with its letter
    assert words("हिन्दी में, 한국어 문장") == ["हिन्दी", "में", "한국어", "문장"]
    assert words("re\u0301sume\u0301 a\u0e31") == ["re\u0301sume\u0301", "a\u0e31"]


@given(st.text(st.characters(max_codepoint=0x24F, exclude_characters="İ")))  # in small letters it has a mark
def test_the_words_of_latin_script_are_runs_of_letters_and_digits(text):
    assert words(text) == [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


@pytest.mark.parametrize("correct", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(correct):
    samples = [i < correct for i in range(5)]
    for k in range(1, 6):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("correct", range(5))
def test_pass_at_k_needs_k_samples(correct):
    """Four samples do not say what five would hold: neither 1 (none of them right!) nor anything else."""
    assert pass_at_k(4, correct, 4) == (correct > 0)
    with pytest.raises(ValueError, match="pass@5 needs 5 samples of a problem or more, and there are 4"):
        pass_at_k(4, correct, 5)


def test_majority():
    assert majority(["3", None, "4", "4", None, None]) == "4"
    assert majority(["4", "3", "3", "4"]) == "4"  # a tie: the first
    assert majority([None, None]) is None


def test_wilson_against_published_values():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3: 81/263, 15/148, 0/20, 1/29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=6e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=6e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=6e-5)


# ------------------------------------------------------------------------------------------------ two models, paired


@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_is_the_share_of_coin_flips_at_least_as_uneven(only_first, only_second):
    n = only_first + only_second
    heads = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    uneven = sum(abs(k - (n - k)) >= abs(only_first - only_second) for k in heads)
    assert mcnemar(only_first, only_second) == uneven / len(heads)


def test_mcnemar_against_published_values():
    # Fagerland, Lydersen, Laake 2014, table V (airway hyper-responsiveness before and after a transplantation): 1 and 7
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == 2 / 64
    # the R package exact2x2: its vignette on exact McNemar tests, and its example, Agresti's table of a performance
    assert mcnemar(9, 2) == pytest.approx(0.06543, abs=5e-6)
    assert mcnemar(86, 150) == pytest.approx(3.716e-5, abs=5e-9)
    assert 0 < mcnemar(1500, 2500) < 1e-50  # far beyond what a float's 2**n could hold


def test_the_paired_interval_against_published_values():
    # Fagerland et al. 2014, table V: the Wald interval with Bonett-Price's Laplace adjustment, 1 and 7 of 21
    low, high = paired_interval(7, 1, 21)
    assert (low, high) == pytest.approx((-0.508, -0.013), abs=5e-4)
    assert paired_interval(1, 7, 21) == pytest.approx((-high, -low))
    low, high = paired_interval(0, 0, 1000)  # two models that never differ here may do so elsewhere
    assert low == -high
    assert 0.002 < high < 0.004
    assert paired_interval(0, 1, 1)[1] <= 1


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.05, 0.2), (0.02, 0.3), (0.3, 0.4)])
def test_the_paired_interval_holds_the_true_difference_19_times_in_20(p, q):
    """p, q: how often only the first, only the second is right. Every outcome of 60 problems, by its probability."""
    n, covered = 60, 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            low, high = paired_interval(b, c, n)
            if low <= q - p <= high:
                ways = math.comb(n, b) * math.comb(n - b, c)
                covered += ways * p**b * q**c * (1 - p - q) ** (n - b - c)
    assert 0.935 < covered < 0.98


def test_two_lists_of_verdicts():
    pair = compare([1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 0])
    assert (pair["only_first"], pair["only_second"]) == (1, 2)
    assert pair["difference"] == pytest.approx(1 / 6)
    assert (pair["low"], pair["high"]) == paired_interval(1, 2, 6)
    assert pair["p"] == mcnemar(1, 2) == 1


def test_pairing_sees_what_two_intervals_do_not():
    """Of 1000 problems 40 that one model alone solves, 10 the other: their Wilson intervals overlap, and yet."""
    first = [1.0] * 510 + [0.0] * 490
    second = [0.0] * 10 + [1.0] * 500 + [1.0] * 40 + [0.0] * 450
    pair = compare(first, second)
    assert wilson(sum(first), 1000)[1] > wilson(sum(second), 1000)[0]
    assert pair["low"] > 0
    assert pair["p"] < 1e-4


# ------------------------------------------------------------------------------------------------ a model's figures


def test_evaluate_counts(tokenizer, monkeypatch):
    text = [*tokenizer.encode("#### 12"), tokenizer.special_ids["<|im_end|>"]]

    def parrot(raw, prompts, max_new_tokens, **settings):  # always says the same
        ids = torch.tensor([text[:max_new_tokens]] * len(prompts))
        return Rollout(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))

    monkeypatch.setattr(evaluation, "generate", parrot)
    answers = [("12", 1, "#### 12"), ("12.0", 2, "no"), ("13", 2, "no"), ("1", 1, "12 no")]
    problems = [Problem("q?", solution, a, level, "x") for a, level, solution in answers]
    result = evaluate(None, tokenizer, problems, 20, devices.setup("cpu"))
    assert (result["correct"], result["n"], result["accuracy"]) == (2, 4, 0.5)
    assert result["f1"] == pytest.approx((1 + 0 + 0 + 2 / 3) / 4)
    assert result["length"] == len(text)
    assert result["truncated"] == 0
    assert result["by_level"] == {1: 0.5, 2: 0.5}
    assert evaluate(None, tokenizer, problems, len(text) - 1, devices.setup("cpu"))["truncated"] == 1


def test_evaluate_samples_counts(tokenizer, monkeypatch):
    scripts = {"A?": ["#### 1", "#### 2", "#### 2", "no"], "B?": ["#### 5", "no", "no", "#### 5"]}
    problems = [Problem("A?", "", "1", 1, "x"), Problem("B?", "", "5", 1, "x")]

    class Said:
        def __init__(self, prompts):
            self.prompts = prompts

        def texts(self, tokenizer):
            return [text for p in self.prompts for text in scripts["A?" if "A?" in tokenizer.decode(p) else "B?"]]

    monkeypatch.setattr(evaluation, "generate", lambda raw, prompts, *sizes, **more: Said(prompts))
    result = evaluate_samples(None, tokenizer, problems, 4, 8, devices.setup("cpu"), batch=1)
    assert result.pop("solved") == [1, 2]
    assert list(result) == ["pass@1", "pass@2", "pass@4", "majority@4"]
    assert list(result.values()) == pytest.approx([(1 / 4 + 2 / 4) / 2, (1 / 2 + 5 / 6) / 2, 1.0, 0.5])

    ranks = [Rank(r, 2, torch.device("cpu")) for r in (0, 1)]
    parts = [evaluate_samples(None, tokenizer, problems, 4, 8, rank, batch=1) for rank in ranks]
    for name, value in result.items():  # two ranks together find what one finds
        assert sum(part[name] for part in parts) == pytest.approx(value)


def test_each_problem_by_its_own_measure(tokenizer, monkeypatch, capsys):
    """Of four problems two have an answer; the accuracy is theirs, the F1 and the own measure are of all."""
    said = [*tokenizer.encode("#### 12"), tokenizer.special_ids["<|im_end|>"]]

    def parrot(raw, prompts, max_new_tokens, n=1, *temperature, **settings):
        ids = torch.tensor([said] * len(prompts) * n)
        return Rollout(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape))

    monkeypatch.setattr(evaluation, "generate", parrot)
    rows = [("no 12", "", 3), ("#### 12", "12", 1), ("12 #### 13", "13", 1), ("12", "", 2)]
    problems = [Problem("q?", solution, answer, level, "x") for solution, answer, level in rows]
    dist = devices.setup("cpu")
    result = evaluate(None, tokenizer, problems, 20, dist)
    assert (result["n"], result["correct"], result["accuracy"], result["verdicts"]) == (4, 1, 0.5, [1.0, 0.0])
    assert (result["low"], result["high"], result["by_level"]) == (*wilson(1, 2), {1: 0.5})
    assert result["f1"] == pytest.approx((2 / 3 + 1 + 2 / 3 + 1) / 4)
    assert result["own_measure"] == pytest.approx((2 / 3 + 1 + 0 + 1) / 4)
    parts = [evaluate(None, tokenizer, problems, 20, Rank(r, 2, torch.device("cpu"))) for r in (0, 1)]
    for name in ("accuracy", "f1", "own_measure"):
        assert sum(part[name] for part in parts) == pytest.approx(result[name])
    sampled = evaluate_samples(None, tokenizer, problems, 2, 20, dist)
    assert (sampled["solved"], sampled["pass@1"], sampled["majority@2"]) == ([2, 0], 0.5, 0.5)

    answered, free = problems[1:3], [problems[0], problems[3]]
    assert [measure_of(some) for some in (problems, answered, free)] == ["own_measure", "accuracy", "f1"]
    assert [verifiable(some) for some in (problems, problems[:3], problems[:2] + free, free)] == [
        True,
        True,
        False,
        False,
    ]
    for some in (answered, free):
        result = evaluate(None, tokenizer, some, 20, dist)
        assert result["own_measure"] == result[measure_of(some)]
    assert (result["accuracy"], result["verdicts"]) == (0.0, [0.0, 0.0])  # nothing can be right
    assert evaluate_samples(None, tokenizer, free, 2, 20, dist)["solved"] == [0, 0]
    rows = dict(metric_rows([evaluate(None, tokenizer, problems, 20, dist)], METRICS))
    assert rows["accuracy, greedy, of 2 with an answer"] == "50.0%"
    assert rows["right, or token F1"] == "66.7%"
    assert "right, or token F1" not in dict(metric_rows([evaluate(None, tokenizer, answered, 20, dist)], METRICS))
    before_and_after(*[evaluate(None, tokenizer, problems, 20, dist)] * 2, 3, 60.0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 problems, +0.0 points")


def test_two_ranks_find_the_figures_of_one(tokenizer):
    problems, policy = load_problems("word", "test", 7, (1, 2, 3)), tiny(tokenizer)
    whole = evaluate(policy, tokenizer, problems, 8, devices.setup("cpu"))
    parts = [evaluate(policy, tokenizer, problems, 8, Rank(r, 2, torch.device("cpu")), batch=2) for r in (0, 1)]
    for name in METRICS:
        assert sum(part[name] for part in parts) == pytest.approx(whole[name]), name
    assert sorted(s.text for part in parts for s in part["answers"]) == sorted(s.text for s in whole["answers"])


def test_the_verdicts_stand_in_the_order_of_the_problems(tokenizer, monkeypatch):
    def first_number(policy, prompts, max_new_tokens, **settings):  # answers with the first number of the question
        answers = [tokenizer.decode(prompt).split("user\n")[1].split()[0] for prompt in prompts]
        rows = [tokenizer.encode(f"#### {answer}") for answer in answers]
        ids = torch.tensor([row + [0] * (max_new_tokens - len(row)) for row in rows])
        mask = torch.tensor([[t < len(row) for t in range(max_new_tokens)] for row in rows])
        return Rollout(ids, mask, torch.zeros(ids.shape))

    monkeypatch.setattr(evaluation, "generate", first_number)
    questions = ["3 apples, and many more words", "4", "5 pears and more", "6 or 7"]
    problems = [Problem(q, "", answer, 1, "x") for q, answer in zip(questions, "3056", strict=True)]
    result = evaluate(None, tokenizer, problems, 20, devices.setup("cpu"), batch=3)
    assert result["verdicts"] == [1.0, 0.0, 1.0, 1.0]
    assert result["correct"] == 3


def test_a_new_metric_is_a_row(tokenizer, monkeypatch):
    """Evaluated, logged, tabled and drawn under its name, without a word elsewhere."""
    monkeypatch.setitem(METRICS, "letters", Metric(lambda s: len(s.text), "letters", "per answer", ".2f"))
    problems, policy = load_problems("word", "test", 3), tiny(tokenizer)
    result = evaluate(policy, tokenizer, problems, 8, devices.setup("cpu"))
    mean = sum(len(s.text) for s in result["answers"]) / 3
    assert result["letters"] == pytest.approx(mean)
    assert logged(result).items() >= {"accuracy": result["accuracy"], "letters": result["letters"]}.items()
    assert ("letters", {"letters": "validation"}, "per answer", {}) in metric_panels()
    assert ["letters", f"{mean:.2f}"] in metric_rows([result], METRICS)


def test_a_metric_of_some_problems(tokenizer, monkeypatch):
    """Its mean is over the problems that have it; where none has, there is no such figure."""
    problems = [Problem(f"{i} + 1?", "", "1", 1, "x", task="word" if i < 2 else "") for i in range(5)]
    row = Metric(lambda s: len(s.problem.question), "marks", "", of_problem=lambda p: p.task == "word")
    monkeypatch.setitem(METRICS, "marks", row)
    policy = tiny(tokenizer)
    result = evaluate(policy, tokenizer, problems, 4, devices.setup("cpu"))
    assert result["marks"] == 6.0
    assert "story_kept" in result
    result = evaluate(policy, tokenizer, problems[2:], 4, devices.setup("cpu"))
    assert not {"marks", "story_kept"} & result.keys()
    assert not {"marks", "story_kept"} & logged(result).keys()
    assert "accuracy" in logged(result)


def test_the_story_that_is_kept(tokenizer, monkeypatch):
    """What evaluate reports as story_kept, of answers that are the solutions, and of the next problem's."""
    problems = load_problems("word", "test", 40)

    def answers(turn):
        def generate(policy, prompts, max_new_tokens, **settings):
            asked = [tokenizer.decode(prompt).split("user\n")[1] for prompt in prompts]
            which = [next(i for i, p in enumerate(problems) if p.question in text) for text in asked]
            rows = [tokenizer.encode(problems[(i + turn) % 40].solution) for i in which]
            ids = torch.tensor([row + [0] * (max_new_tokens - len(row)) for row in rows])
            mask = torch.tensor([[t < len(row) for t in range(max_new_tokens)] for row in rows])
            return Rollout(ids, mask, torch.zeros(ids.shape))

        monkeypatch.setattr(evaluation, "generate", generate)
        return evaluate(None, tokenizer, problems, 400, devices.setup("cpu"))

    own = answers(0)
    assert (own["accuracy"], own["story_kept"]) == (1.0, 1.0)
    assert answers(1)["story_kept"] < 0.2


def test_what_is_logged_and_drawn(monkeypatch):
    known = {name: METRICS[name] for name in ("accuracy", "f1", "length", "truncated")}
    monkeypatch.setattr(evaluation, "METRICS", known)
    monkeypatch.setattr(held_out, "METRICS", known)
    result = dict.fromkeys(known, 0.5)
    assert logged(result) == {"accuracy": 0.5}
    assert logged(result, "f1", "length") == {"accuracy": 0.5, "f1": 0.5, "length": 0.5}
    assert [list(metrics) for _, metrics, *_ in metric_panels("f1")] == [["accuracy"], ["f1"]]
    assert [list(metrics) for _, metrics, *_ in metric_panels("f1", without=("accuracy",))] == [["f1"]]


def figures(verdicts, **more):
    n, correct = len(verdicts), sum(verdicts)
    low, high = wilson(correct, n)
    by_level = {1: verdicts[0], 2: sum(verdicts[1:]) / (n - 1)}
    known = dict(accuracy=correct / n, low=low, high=high, n=n, correct=correct, by_level=by_level, verdicts=verdicts)
    return known | dict(f1=0.5, length=30.25, truncated=0.125) | more


def test_the_table_of_before_and_after(capsys):
    before, after = figures([0.0, 0.0, 1.0, 0.0]), figures([1.0, 0.0, 1.0, 1.0], length=20.0)
    before_and_after(before, after, 300, 90.0, [["pass@4", "50.0%", "75.0%"]], ["a note"])
    out = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()}
    assert rows["held-out test"] == ["before", "after"]
    assert rows["accuracy, greedy"] == ["25.0%", "75.0%"]
    assert rows["level 1"] == ["0.0%", "100.0%"]
    assert rows["level 2"] == ["33.3%", "66.7%"]
    assert rows["answer length"] == ["30.2", "20.0"]
    assert rows["cut off"] == ["12.5%", "12.5%"]
    assert rows["pass@4"] == ["50.0%", "75.0%"]
    *_, note, last = out.splitlines()
    low, high = (100 * x for x in paired_interval(0, 2, 4))
    assert note == "a note"
    assert last == (
        f"4 problems, +50.0 points (95 % interval [{low:+.1f}, {high:+.1f}], McNemar's p = 0.5) in 300 steps, "
        "1.5 minutes"
    )
    before_and_after({}, {}, 2, 60.0, [["loss", "0.693", "0.5"]])  # pairs of texts that no verifier reads
    assert capsys.readouterr().out.splitlines()[-2:] == ["loss            0.693    0.5", "2 steps, 1.0 minutes"]


REPORTS = {grpo: grpo_report, ppo: ppo_report, rejection: rejection_report, dpo: dpo_report, distill: distill_report}


@pytest.mark.parametrize("stage", REPORTS, ids=lambda stage: stage.__name__)
def test_a_gain_below_0_is_said_of_the_checkpoint_that_was_tested(stage, monkeypatch, capsys):
    """GRPO and PPO test last/, the others best/."""
    before, after = (figures([a, 0.0]) | {"solved": [0], "pairs": {"pair_accuracy": 0.5, "loss": 0.7}} for a in (1, 0))
    config = stage.Config(init="start", **({"reward_model": "judge"} if stage is ppo else {}))
    monkeypatch.setattr(REPORTS[stage], "draw_curves", lambda *_: None)
    run = SimpleNamespace(path="run", config=config, seconds=60.0, state=SimpleNamespace(before=before))
    end = {"before": before, "after": after, "kl": 0.1, "seconds": 60.0, "path": "run/best", "tokens": 9}
    end |= {"teacher": before, "teacher_kl": 0.1, "teacher_kl_before": 0.1, "closed": 0.5}
    arguments = {grpo: (run, after, 0.1, {}, {}), ppo: (config, run, after), dpo: (config, before, after, 2, 60.0)}
    REPORTS[stage].report(*arguments.get(stage, (config, "run", end)))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    if stage in (grpo, ppo):
        assert said == "WARNING: the policy ended worse than it began; best/ holds the best on the validation split"
    else:
        assert said == "WARNING: best/, chosen on the validation split, is worse than the start on the test split"


def test_tables_of_cells():
    rows = [["of", "a", "bbb"], ["long label", "1.0%", "2"]]
    assert text_table(rows).splitlines() == ["of             a  bbb", "long label  1.0%    2"]
    assert markdown_table(rows).splitlines() == ["| of | a | bbb |", "|---|---:|---:|", "| long label | 1.0% | 2 |"]


def test_a_problem_is_sampled_alike_in_any_batch_and_on_any_rank(tokenizer, monkeypatch):
    problems, policy, seen, sample = load_problems("word", "test", 5), tiny(tokenizer), [], evaluation.generate

    def keep(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        seen.extend(zip(map(tuple, args[1]), zip(*[iter(rollout.texts(tokenizer))] * 3, strict=True), strict=True))
        return rollout

    monkeypatch.setattr(evaluation, "generate", keep)
    runs = []
    for batch, ranks in ((5, 1), (2, 1), (2, 2)):
        for rank in range(ranks):
            evaluate_samples(policy, tokenizer, problems, 3, 8, Rank(rank, ranks, torch.device("cpu")), batch=batch)
        runs.append(sorted(seen))
        seen.clear()
    assert runs[0] == runs[1] == runs[2]
    assert len({text for _, texts in runs[0] for text in texts}) > 5


# ------------------------------------------------------------------------------------------------ KL


def test_kl_estimators_against_exact_sums():
    torch.manual_seed(1)
    theta = torch.randn(5, dtype=torch.float64).requires_grad_()
    log_p, ref = theta.log_softmax(0), torch.randn(5, dtype=torch.float64).log_softmax(0)
    p = log_p.exp().detach()
    forward = (log_p.exp() * (log_p - ref)).sum()  # KL(π ‖ π_ref)
    backward = (ref.exp() * (ref - log_p)).sum()
    gradients = {"k1": torch.zeros(5, dtype=torch.float64)}
    gradients["k2"], gradients["k3"] = (
        torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (forward, backward)
    )
    for kind, expected in gradients.items():
        estimate = kl_estimate(log_p, ref, kind)  # of each of the five actions
        assert ((p * estimate).sum().item() == pytest.approx(forward.item())) == (kind != "k2")
        assert (estimate.min() >= 0) == (kind != "k1")
        (got,) = torch.autograd.grad((p * estimate).sum(), theta, retain_graph=True)
        torch.testing.assert_close(got, expected)
    in_reward = (p * kl_estimate(log_p, ref, "k1").detach() * log_p).sum()  # Σ π · cost · log π: the policy gradient
    torch.testing.assert_close(torch.autograd.grad(in_reward, theta)[0], gradients["k2"])


def test_what_others_wrote_does_not_count_in_the_sampled_kl_however_unlikely(tokenizer, monkeypatch):
    policy, dist = tiny(tokenizer), devices.setup("cpu")
    ids, own = torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, True]])
    rollout = Rollout(ids, own, torch.zeros(1, 3), ~own)
    scores = iter([[[-1.0, 0.0, -1.0] + 5 * [0.0]], [[-2.0, -1000.0, -1.0] + 5 * [0.0]]])  # of π_ref, of π
    monkeypatch.setattr(kl_module, "shared_answer_logprobs", lambda *_: torch.tensor(next(scores)))
    kl = sampled_kl(policy, policy, tokenizer, [[1, 2]], 3, dist, respond=lambda *a, **k: rollout)
    assert kl == pytest.approx((math.e - 1 - 1) / 2)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_sampled_kl_by_hand(tokenizer, monkeypatch, rank):
    """Of a policy to its reference, on its own samples, in batches; with LoRA without a second model."""
    policy, dist = tiny(tokenizer), devices.setup("cpu")
    start = copy.deepcopy(policy)
    add_lora(policy, **asdict(LoraConfig(rank)))
    prompts = [encode_prompt(tokenizer, p) for p in load_problems("word", "valid", 5)]
    reference = policy if rank else start
    assert sampled_kl(policy, reference, tokenizer, prompts, 8, dist) == pytest.approx(0, abs=1e-6)
    torch.manual_seed(2)
    for name, p in policy.named_parameters():
        if not rank or "lora_B" in name:
            p.data += 0.3 * torch.randn_like(p)
    seen, sample = [], kl_module.generate
    monkeypatch.setattr(kl_module, "generate", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1])
    got, total, n = sampled_kl(policy, reference, tokenizer, prompts, 8, dist, seed=3, batch=2), 0.0, 0
    assert len(seen) == 3
    answers = [ids[real].tolist() for rollout in seen for ids, real in zip(rollout.ids, rollout.mask, strict=True)]
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([prompt + answer])
        log_r = (token_logprobs(start, row) - token_logprobs(policy, row))[0, -len(answer) :]
        total, n = total + (log_r.exp() - 1 - log_r).sum().item(), n + len(answer)
    assert got == pytest.approx(total / n, rel=1e-4)
    assert got > 1e-3
    if not rank:
        assert abs(got - sampled_kl(start, policy, tokenizer, prompts, 8, dist, seed=3)) > 1e-3
    whole = sampled_kl(policy, reference, tokenizer, prompts, 8, dist, seed=3)
    assert whole == pytest.approx(got, rel=1e-5)  # a prompt's answer is the same in any batch


def test_the_sampled_kl_on_two_ranks(tokenizer, monkeypatch):
    """A prompt has the same random numbers on whichever rank; one of three ranks has nothing to do."""
    policy, other = tiny(tokenizer), tiny(tokenizer, seed=1)
    prompts = [encode_prompt(tokenizer, p) for p in load_problems("word", "valid", 2)]
    sums = []
    monkeypatch.setattr(Rank, "sum", lambda self, *values: sums.append(values) or [1.0, 1.0])
    for rank in (0, 1, 2):
        sampled_kl(policy, other, tokenizer, prompts, 8, Rank(rank, 3, torch.device("cpu")))
    whole = sampled_kl(policy, other, tokenizer, prompts, 8, devices.setup("cpu"))
    assert sums[2] == (0.0, 0)
    assert sum(s[0] for s in sums) / sum(s[1] for s in sums) == pytest.approx(whole, rel=1e-5)


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def here(scratch, tokenizer):
    """Two chat models, `one` with a context of 160 and `other` with 100, a base model, and 9 problems of two kinds."""
    for name, seed, context in (("one", 0, 160), ("other", 1, 100), ("base", 2, 160)):
        torch.manual_seed(seed)
        sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "width": 16}
        Transformer(TransformerConfig(tokenizer.vocab_size, context=context, **sizes)).save_pretrained(name)
        tokenizer.save_pretrained(name)
        stop = {"eos_token_id": [tokenizer.im_end_id] if name != "base" else [tokenizer.endoftext_id]}
        (scratch / name / "generation_config.json").write_text(json.dumps(stop), encoding="utf-8")
    sums = {f"{i} and 0?": str(i) for i in range(200)}
    kept = [{"question": q, "answer": a} for q, a in sums.items() if split_of(q) == "test"][:9]
    (scratch / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return scratch


def answers(rights, tokenizer, asked):
    """A `generate` that answers rightly where the model with this context knows the number: {context: numbers}."""

    def generate(policy, prompts, max_new_tokens, n=1, temperature=1.0, **settings):
        rows = []
        for prompt in prompts:
            asked.append(tokenizer.decode([i for i in prompt if i in tokenizer.text_ids]))
            number = asked[-1].removeprefix("user\n").split()[0]
            right = int(number) in rights[policy.config.context]
            rows += [tokenizer.encode(f"#### {number if right and r % 2 == 0 else 999}") for r in range(n)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
        return Rollout(ids, mask, torch.zeros(ids.shape))

    return generate


def test_two_checkpoints_on_the_same_problems(here, tokenizer, monkeypatch, capsys):
    numbers = [p.answer for p in load_problems("sums.jsonl", "test")]
    numbers = list(map(int, numbers))
    rights, asked = {160: numbers[:7], 100: [numbers[0], numbers[8]]}, []
    monkeypatch.setattr(evaluation, "generate", answers(rights, tokenizer, asked))
    flags = dict(data="sums.jsonl", samples=2, max_new_tokens=20, instruction="Say it.", device="cpu")
    record = evaluation.main(Config("one", against="other", **flags))
    assert all("0?\nSay it." in prompt for prompt in asked)
    assert record["results"][0]["verdicts"] == [1] * 7 + [0] * 2
    assert record["results"][1]["verdicts"] == [1] + [0] * 7 + [1]
    assert record["pair"] == compare(record["results"][1]["verdicts"], record["results"][0]["verdicts"])
    assert (record["pair"]["only_first"], record["pair"]["only_second"]) == (1, 6)
    out, folder = capsys.readouterr().out, here / "runs/evaluate/one-other-sums.jsonl-test"
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    table = (folder / "table.md").read_text(encoding="utf-8")
    for row in ("| accuracy, greedy | 77.8% | 22.2% |", "| pass@1, temperature 1 | 38.9% | 11.1% |"):
        assert row in table
    assert "| pass@2, temperature 1 | 77.8% | 22.2% |" in table  # all have an answer: no more is said
    low, high = (100 * x for x in paired_interval(1, 6, 9))
    said = f"one less other: +55.6 points (95 % interval [{low:+.1f}, {high:+.1f}], McNemar's p = 0.12); right alone 6"
    assert said in table
    assert said in out
    assert "many answers" not in out


def test_the_problems_fit_both_and_a_cut_is_told(here, capsys):
    long = {"question": "7 and 0?" + " and 0" * 30, "answer": "7"}
    with (here / "sums.jsonl").open("a", encoding="utf-8") as file:
        for i in range(50):  # some of them fall into the split
            file.write(json.dumps(long | {"question": f"{i} {long['question']}"}) + "\n")
    record = evaluation.main(Config("one", against="other", data="sums.jsonl", max_new_tokens=4, device="cpu"))
    assert [r["n"] for r in record["results"]] == [9, 9]
    out = capsys.readouterr().out
    assert "are longer than 96 tokens: left out" in out
    assert "100% of the answers of one were cut off: try a larger --max_new_tokens" in out


def test_numbers_and_free_text_in_one_file(here, tokenizer, monkeypatch, capsys):
    numbers = [int(p.answer) for p in load_problems("sums.jsonl", "test")]
    rights, asked = {160: numbers[:3], 100: []}, []
    monkeypatch.setattr(evaluation, "generate", answers(rights, tokenizer, asked))
    with (here / "sums.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"instruction": f"{i} and 0", "output": f"It is {i}"}) + "\n" for i in range(60))
        file.write('{"question": "cut')
    flags = dict(data="sums.jsonl", max_new_tokens=20, device="cpu", samples=2)
    with pytest.raises(DataError, match="line 70: not JSON"):
        evaluation.main(Config("one", **flags))
    record = evaluation.main(Config("one", against="other", skip_bad=True, **flags))
    first, out = record["results"][0], capsys.readouterr().out
    assert (first["verdicts"], first["accuracy"], first["solved"]) == ([1] * 3 + [0] * 6, 1 / 3, [1] * 3 + [0] * 6)
    labels = [line.split("  ")[0] for line in out.splitlines() if "@" in line]
    assert labels == [f"{name}, temperature 1, of 9 with an answer" for name in ("pass@1", "pass@2", "majority@2")]
    assert first["n"] > 12
    assert record["pair"]["difference"] == 1 / 3
    assert "accuracy, greedy, of 9 with an answer" in out
    assert "right, or token F1" in out


def test_free_text_has_an_f1_and_nothing_to_test(here, capsys):
    texts = [{"instruction": f"Say {i}.", "output": f"I say {i}"} for i in range(60)]
    (here / "chats.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    record = evaluation.main(Config("one", against="other", data="chats.jsonl", max_new_tokens=8, device="cpu"))
    out = capsys.readouterr().out
    assert "pair" not in record
    assert "token F1" in out
    assert "accuracy" not in out
    assert "McNemar" not in out


def test_two_processes_equal_one(here):
    flags = ["--checkpoint", "one", "--problems", 7, "--samples", 2, "--max_new_tokens", 8, "--device", "cpu"]
    done = script("evaluate.py", *flags, cwd=here, processes=2)
    assert done.returncode == 0, done.stderr
    both = json.loads((here / "runs/evaluate/one-word-test/result.json").read_text(encoding="utf-8"))
    record = evaluation.main(Config("one", problems=7, samples=2, max_new_tokens=8, device="cpu", out="alone"))
    assert both["results"] == json.loads(json.dumps(record["results"]))
    assert done.stdout.count("accuracy, greedy") == 1
    assert len(record["results"][0]["verdicts"]) == 7


@pytest.mark.parametrize(
    ("generation", "in_config"),
    [(None, 257), (None, [256, 257]), (None, 256), (None, None), ({}, 257), ({"eos_token_id": [257]}, 256)],
)
def test_a_chat_model_is_one_that_transformers_stops_at_the_end_of_a_turn(generation, in_config, scratch):
    from transformers import AutoModelForCausalLM

    tokenizer = ByteTokenizer(("<|endoftext|>", "<|im_end|>"))
    Transformer(TransformerConfig(258, context=8, n_layer=1, n_head=2, n_kv_head=1, width=16)).save_pretrained("it")
    config = json.loads((scratch / "it/config.json").read_text(encoding="utf-8")) | {"eos_token_id": in_config}
    (scratch / "it/config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (scratch / "it/generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    stop = AutoModelForCausalLM.from_pretrained("it").generation_config.eos_token_id
    assert is_chat_model(scratch / "it", tokenizer) == (257 in (stop if isinstance(stop, list) else [stop]))


@pytest.mark.parametrize("broken", ["[" * 100_000, "{", "[]"])
def test_a_broken_generation_config_makes_no_base_model(here, tokenizer, broken):
    (here / "one/generation_config.json").write_text(broken, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"^one/generation_config\.json cannot be read: ") as error:
        evaluation.main(Config("one", data="sums.jsonl", device="cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["directory", "gguf"])
def test_a_model_of_transformers(scratch, tokenizer, form):
    """What others wrote: a directory of transformers', or a GGUF file. The answers are those of transformers."""
    from test_gguf import WIDE, AutoModelForCausalLM, Qwen2Config, write_gguf

    torch.manual_seed(0)
    sizes = WIDE | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 200, "eos_token_id": 1}
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).eval()
    theirs.generation_config.eos_token_id = tokenizer.im_end_id
    if form == "gguf":
        path = scratch / "m.gguf"
        write_gguf(path, theirs, "qwen2", tokenizer=tokenizer)
    else:
        path = scratch / "theirs"
        theirs.save_pretrained(path)
        tokenizer.save_pretrained(path)
        theirs.generation_config.save_pretrained(path)
    opened, records = open_checkpoint(path)[1], []
    for question in [f"Say {i}." for i in range(60) if split_of(f"Say {i}.") == "test"][:4]:
        row = torch.tensor([encode_prompt(opened, Problem(question, "", "", 1, "x"))])
        prompt = row.shape[1]
        while row.shape[1] < prompt + 12 and row[0, -1] not in opened.stop_ids[:1]:
            with torch.no_grad():
                row = torch.cat([row, theirs(row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        text = opened.decode([i for i in row[0, prompt:].tolist() if i in opened.text_ids])
        records.append({"instruction": question, "output": text})
    (scratch / "theirs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    record = evaluation.main(Config(str(path), data="theirs.jsonl", max_new_tokens=12, device="cpu"))
    assert record["results"][0]["n"] == 4
    assert record["results"][0]["f1"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "base"], ["base is a base model", "sft.py"]),
        (["--checkpoint", "one", "--against", "base"], ["base is a base model"]),
        (["--checkpoint", "nowhere"], ["nowhere"]),
        (["--checkpoint", ""], ["holds no checkpoint"]),
        (["--checkpoint", "one", "--against", ""], ["holds no checkpoint"]),
        (["--checkpoint", "n" * 300], ["nnn: File name too long"]),
        (["--checkpoint", "one", "--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--checkpoint", "one", "--data", "n" * 300], ["nnn: File name too long"]),
        (["--checkpoint", "one", "--split", "dev"], ["dev", "valid"]),
        (["--checkpoint", "one", "--samples", "-1"], ["samples", "at least 0"]),
        (["--checkpoint", "one", "--problems", "0"], ["problems", "at least 1"]),
        (["--checkpoint", "one", "--max_new_tokens", "160"], ["no test prompt fits"]),
        (["--checkpoint", "one", "--data", "chats.jsonl", "--samples", "2"], ["--samples", "####"]),
        (["--checkpoint", "one", "--out", "sums.jsonl"], ["--out sums.jsonl cannot be made"]),
        (["--against", "one"], ["checkpoint"]),
    ],
)
def test_bad_input_is_one_line(here, monkeypatch, capsys, flags, words):
    texts = [{"instruction": f"Say {i}.", "output": f"I say {i}"} for i in range(60)]
    (here / "chats.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: pytest.fail("the long work had begun"))
    assert_refused(capsys, lambda: run_script(evaluation.main, Config), *words)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_kl_of_bf16_is_computed_in_fp32(kind):
    a = (-torch.rand(500, generator=torch.Generator().manual_seed(0))).bfloat16()
    b = (a.double() + 0.02 * torch.randn(500, generator=torch.Generator().manual_seed(1)).double()).bfloat16()
    got = kl_estimate(a, b, kind)
    torch.testing.assert_close(got.double(), kl_estimate(a.double(), b.double(), kind), atol=1e-6, rtol=1e-2)
    assert kind == "k1" or got.min() >= -1e-6


def test_without_arguments_it_works_by_hand(here):
    done = script("evaluate.py", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "6 problems gained, none lost: +60.0 points" in done.stdout
    assert "--checkpoint DIR" in done.stdout


def test_the_table_of_sft_says_which_problems_are_sampled(monkeypatch, capsys):
    """All of them, those with an answer, or none: of free text every answer would count as wrong."""
    monkeypatch.setattr(sft_report, "draw_curves", lambda *_: None)
    result = figures([1.0, 0.0, 0.0, 1.0]) | {"own_measure": 0.4}
    sampled, labels = {"pass@1": 0.5, "pass@2": 0.75, "solved": [1, 0, 2, 1]}, {}
    for metric, n in (("accuracy", 4), ("own_measure", 6), ("f1", 4)):
        sft_report.report(
            SimpleNamespace(data="x", seed=0),
            "runs/sft",
            result | {"n": n},
            sampled,
            (metric, metric),
            1000,
            "runs/sft/best",
        )
        labels[metric] = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "pass@" in line]
    assert labels == {
        "accuracy": ["pass@1, temperature 1", "pass@2, temperature 1"],
        "own_measure": ["pass@1, temperature 1, of 4 with an answer", "pass@2, temperature 1, of 4 with an answer"],
        "f1": [],
    }


def test_a_note_for_each_model_whose_answers_were_cut_off(tmp_path, capsys):
    """Two of one name have one each."""
    results = [{"truncated": share} for share in (0.5, 0.02, 0.25)]
    show_results(tmp_path, [["", "a", "b", "a"], ["x", "1", "2", "3"]], ["first"], {"results": results})
    cut = "of the answers of a were cut off: try a larger --max_new_tokens"
    assert capsys.readouterr().out.splitlines()[2:-1] == ["first", f"50% {cut}", f"25% {cut}"]
    assert f"first\n\n50% {cut}\n\n25% {cut}\n" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_names_of_folders():
    assert file_name("runs/sft", "a/b/c.jsonl", "test") == "sft-b_c.jsonl-test"
    assert file_name("Qwen/Qwen3-0.6B", "/x/y/last/") == "Qwen_Qwen3_0.6B-y_last"


def test_a_metric_cannot_take_the_name_of_a_stages_own_figure():
    record = {"loss": 1.0, "entropy": 2.0}
    held_out.add_figures(record, {"accuracy": 0.5})
    assert record == {"loss": 1.0, "entropy": 2.0, "accuracy": 0.5}
    with pytest.raises(ConfigError, match="'entropy' of evaluate"):
        held_out.add_figures(record, {"entropy": 777.0})
    assert record["entropy"] == 2.0


def test_tables_on_a_full_disk_and_numbers_that_are_not_finite(tmp_path, monkeypatch):
    rows = [["", "a"], ["accuracy", "1"]]
    write_tables(tmp_path, rows, [], {"results": [{"f1": math.nan}]})
    result = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(result, parse_constant=pytest.fail) == {"results": [{"f1": None}]}

    def full(*_):
        raise OSError(28, "No space left on device")

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        write_tables(tmp_path, rows, ["other"], {})
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    assert (tmp_path / "result.json").read_text(encoding="utf-8") == result
    assert len(list(tmp_path.iterdir())) == 2


def test_a_seed_without_samples_is_refused():
    with pytest.raises(ConfigError, match="--seed has no effect on greedy answers"):
        Config(checkpoint="x", seed=3)
    assert Config(checkpoint="x", seed=3, samples=2).seed == 3
