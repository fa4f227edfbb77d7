"""evaluate.py: every figure by hand or against an enumeration, what two ranks find, the tables, and the script."""

import copy
import itertools
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate as evaluation
from data import Problem, encode_prompt, load_problems
from evaluate import (
    METRICS,
    Metric,
    batches,
    before_and_after,
    compare,
    evaluate,
    evaluate_samples,
    kl_estimate,
    logged,
    majority,
    mcnemar,
    metric_panels,
    metric_rows,
    paired_interval,
    pass_at_k,
    sampled_kl,
    token_f1,
    wilson,
)
from generate import Rollout
from lora import LoraConfig, add_lora
from support import devices
from support.tables import markdown_table, text_table
from tokenizer_bpe import BPETokenizer
from transformer import Transformer, TransformerConfig, token_logprobs


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([p.question + p.solution for p in load_problems("word", "train", 200)], 400)


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(tokenizer.vocab_size, context=160, n_layer=1, n_head=2, n_kv_head=1, width=16))


class Rank(devices.Dist):
    """One of several ranks, alone: its sums are its own share."""

    def sum(self, *values):
        return [float(v) for v in values]


def test_token_f1_by_hand():
    assert token_f1("The cat sat.", "a cat sat") == 1
    assert token_f1("cat cat dog", "cat bird") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert token_f1("cat", "dog") == 0
    assert token_f1("", "") == 1
    assert token_f1("", "dog") == token_f1("dog", "the") == 0


@pytest.mark.parametrize("correct", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(correct):
    samples = [i < correct for i in range(5)]
    for k in range(1, 6):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


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


def test_two_ranks_find_the_figures_of_one(tokenizer):
    problems, policy = load_problems("word", "test", 7, (1, 2, 3)), tiny(tokenizer)
    whole = evaluate(policy, tokenizer, problems, 8, devices.setup("cpu"))
    parts = [evaluate(policy, tokenizer, problems, 8, Rank(r, 2, torch.device("cpu")), batch=2) for r in (0, 1)]
    for name in METRICS:
        assert sum(part[name] for part in parts) == pytest.approx(whole[name]), name
    assert sorted(s.text for part in parts for s in part["samples"]) == sorted(s.text for s in whole["samples"])


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
    mean = sum(len(s.text) for s in result["samples"]) / 3
    assert result["letters"] == pytest.approx(mean)
    assert logged(result) == {"accuracy": result["accuracy"], "letters": result["letters"]}
    assert ("letters", {"letters": "validation"}, "per answer", {}) in metric_panels()
    assert ["letters", f"{mean:.2f}"] in metric_rows([result])


def test_what_is_logged_and_drawn():
    result = dict.fromkeys(METRICS, 0.5)
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
    before_and_after(after, before, 300, 90.0)
    assert "WARNING: the policy ended worse than it began" in capsys.readouterr().out
    old = {name: value for name, value in before.items() if name not in ("verdicts", "truncated")}
    before_and_after(old, after, 300, 90.0)  # a run that an older version began
    out = capsys.readouterr().out
    assert "cut off" not in out
    assert out.splitlines()[-1] == "4 problems, +50.0 points in 300 steps, 1.5 minutes"
    before_and_after({}, {}, 2, 60.0, [["loss", "0.693", "0.5"]])  # pairs of texts that no verifier reads
    assert capsys.readouterr().out.splitlines()[-2:] == ["loss            0.693    0.5", "2 steps, 1.0 minutes"]


def test_tables_of_cells():
    rows = [["", "a", "bbb"], ["long label", "1.0%", "2"]]
    assert text_table(rows).splitlines() == ["               a  bbb", "long label  1.0%    2"]
    assert markdown_table(rows).splitlines() == ["|  | a | bbb |", "|---|---:|---:|", "| long label | 1.0% | 2 |"]


def test_a_problem_is_sampled_alike_in_any_batch_and_on_any_rank(tokenizer, monkeypatch):
    problems, policy, seen, sample = load_problems("word", "test", 5), tiny(tokenizer), [], evaluation.generate

    def keep(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        seen.extend(zip(args[1], batches(rollout.texts(tokenizer), 3), strict=True))
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
    seen, sample = [], evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: seen.append(sample(*a, **k)) or seen[-1])
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
