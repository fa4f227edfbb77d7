"""How to tell whether a model got better: the verifier, pass@k, intervals, paired tests; a script for any checkpoint.

A model answers N held-out problems, and the verifier compares what stands after #### with the answer.

    accuracy      the share of right greedy answers (temperature 0): for a model that must answer once
    pass@k        1 − C(n − c, k) / C(n, k), averaged over the problems: c of a problem's n samples are right; the
                  chance that k of them hold a right one (arXiv:2107.03374, Eq. 1). 1 − (1 − c/n)^k would be biased
    majority@n    whether the most frequent of n answers is right (self-consistency, arXiv:2203.11171)
    token F1      word overlap with the reference: for free text, where no answer can be checked
    own measure   where only some problems have an answer to check: right or wrong for those, token F1 for the rest
    story kept    the share of answers that still speak of the question's names and things, in words of the task's
                  language: a reward for the number alone does not ask for it

How sure is an accuracy p̂ of N problems? Wilson's interval holds every p from which p̂ is no further than z = 1.96
standard deviations, |p̂ − p| ≤ z √(p (1 − p) / N). Solved for p:

    (p̂ + z²/2N ± z √(p̂ (1 − p̂) / N + z²/4N²)) / (1 + z²/N)        N = 1000: ± 3.1 points or less, N = 100: ± 9.6

Is B better than A? Ask both the same problems, and look at the m on which they differ: *lost* are those that A alone
solves, *gained* those that B alone does, m = lost + gained. That their two intervals overlap does not make A and B
equal: problems that are easy or hard for both move the two accuracies alike, and not their difference.

    McNemar       p = 2 Σ_{i ≤ min(lost, gained)} C(m, i) / 2^m, at most 1: how often m coins are at least as uneven
    the gain      d = (gained − lost) / N, a mean of 1, −1 and 0, has the variance (p_gained + p_lost − d²) / N, where
                  p_gained = gained / N and p_lost = lost / N. The interval is d ± z √variance, all of it computed with
                  gained + 1, lost + 1 and N + 2: its centre is nearer 0 than the gain, and m = 0 has a width too

Wilson's interval and these two are for verdicts of 0 or 1, so pass@k and token F1 have no interval here.

In short:

    texts    = generate(policy, prompts, temperature=0)                 N
    verdicts = is_correct(text, problem) of each                        N times 0 or 1
    accuracy = mean(verdicts);  wilson(sum(verdicts), N)                and the mean of each of METRICS
    B vs A   = compare(verdicts of A, verdicts of B)                    gain, interval, p
    pass@k   = mean(pass_at_k(n, c, k) of each problem)                 c = Σ is_correct of its n samples

Traps:
  * Greedy accuracy and pass@k answer different questions. RL makes likely what a sample would sometimes hit: pass@1
    rises, while pass@k for a large k may fall (arXiv:2504.13837). The temperature is 1; pass@k's paper tunes it for k.
  * What was chosen on a split looks too good on it. Choose checkpoint, learning rate and prompt on `valid`; look at
    `test` once. And of twenty comparisons of equal models about one is significant at 95 % by chance.
  * An answer that was cut off usually lacks its #### and is wrong; one cut after or inside its number may even count
    as right. Read `cut off` before the accuracy, and a dozen answers before either.
  * These intervals are over problems. Another seed of the training is another model: ablate.py pairs over seeds.
  * A checkpoint of agent.py answers here without its tools. Its run's own table has them.

Also here, for every stage: METRICS, the figures that are measured, logged and drawn; and `kl_estimate`.

Run it:
    python evaluate.py --demo                                        # by hand, on numbers small enough for a pencil
    python evaluate.py --checkpoint runs/sft --samples 8
    python evaluate.py --checkpoint runs/grpo --against runs/sft     # on the same problems
    python evaluate.py --checkpoint downloads/SmolLM2-135M-Instruct.Q4_1.gguf --data gsm8k --max_new_tokens 256
"""

import collections
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch

from data import Problem, encode_prompt, task_of
from generate import generate
from support.answers import checkable, extract_answer, is_checkable, measure_of, same_answer  # noqa: F401  verifier
from support.cli import run_script
from support.devices import precision, setup
from support.errors import ConfigError
from support.evaluate_script import Config, open_all, write_report
from support.log import commit
from support.means import means_of, means_of_levels
from support.output import batches
from support.tables import gain_of
from support.words import words

# ---------------------------------------------------------------------------------------------------------------
# One answer.


def is_correct(text, problem):
    """The verifier of the problem's task; usually whether the number after #### is its answer (`extract_answer`)."""
    task = task_of(problem.task)
    answer = task.answer(text)
    return answer is not None and task.same_answer(answer, problem.answer)


def token_f1(text, reference):
    """2PR / (P + R) for precision P = shared / ours and recall R = shared / theirs, of words as bags. Without case,
    punctuation and articles; in scripts without spaces, of characters and pairs of them (see `support.words`)."""
    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


# ---------------------------------------------------------------------------------------------------------------
# Several answers to one problem.


def pass_at_k(n, correct, k):
    """Chance that k of the n samples, drawn without replacement, hold a right one. Unbiased, as any k of n independent
    samples are k independent samples (arXiv:2107.03374). ValueError if k > n: n samples do not tell."""
    if k > n:
        raise ValueError(f"pass@{k} needs {k} samples of a problem or more, and there are {n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)  # the first C is 0 where n − correct < k: any k hold one


def majority(answers):
    """The most frequent answer, of several the one that came first; None, which is no answer, has no vote. Answers are
    the same if their texts are: a task whose `same_answer` is looser than that splits its votes."""
    votes = collections.Counter(a for a in answers if a is not None)
    return votes.most_common(1)[0][0] if votes else None


# ---------------------------------------------------------------------------------------------------------------
# Many problems: how sure is a proportion, and how sure a difference?


def wilson(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): inside [0, 1], and far better near both ends than p ± z·se."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)  # against rounding


def mcnemar(lost, gained):
    """Exact two-sided p-value of two models' accuracies on the same problems (McNemar 1947, in its binomial form).

    lost, gained: how many problems A alone gets right, and B alone. If the two are equally good, each of these m
    problems falls to either side like a coin: p = P(a split at least as uneven).
    """
    m = lost + gained
    ways = sum(math.comb(m, i) for i in range(min(lost, gained) + 1))
    return min(1.0, 2 * ways / 2**m)  # whole numbers: no rounding before the /


def paired_interval(lost, gained, N, z=1.96):
    """95 % interval of accuracy(B) − accuracy(A) on the same N problems: Wald's with a Laplace adjustment (Bonett and
    Price 2012, J. Educ. Behav. Stat. 37, 479; see also Fagerland et al. 2014, Stat. Med. 33, 2850)."""
    p_lost, p_gained = (lost + 1) / (N + 2), (gained + 1) / (N + 2)
    d = p_gained - p_lost
    half = z * math.sqrt((p_lost + p_gained - d**2) / (N + 2))
    return max(-1.0, d - half), min(1.0, d + half)


def compare(first, second):
    """Two lists of verdicts on the same N problems, of A and of B -> {"difference": of the accuracies, "low", "high",
    "p", and how many problems A alone ("only_first") and B alone ("only_second") gets right}."""
    lost = sum(a > b for a, b in zip(first, second, strict=True))
    gained = sum(b > a for a, b in zip(first, second, strict=True))
    low, high = paired_interval(lost, gained, len(first))
    figures = {"difference": (gained - lost) / len(first), "low": low, "high": high, "p": mcnemar(lost, gained)}
    return figures | {"only_first": lost, "only_second": gained}


# ---------------------------------------------------------------------------------------------------------------
# A model.


class GreedyAnswer(NamedTuple):
    """A greedy answer to a problem."""

    problem: Problem
    text: str
    correct: bool
    length: int  # tokens
    ended: bool  # stopped by itself
    written: int = 0  # further tokens, of tools


def keeps_story(answer):
    """Whether the answer tells the question's story: its names, its things, words of the task's language."""
    question, solution = answer.problem.question, answer.problem.solution
    return task_of(answer.problem.task).keeps_story(question, solution, answer.text)


class Metric(NamedTuple):
    """A figure that every stage measures: its mean over the held-out problems, in the log, the table and the curves."""

    of: Callable[[GreedyAnswer], float]
    label: str  # in tables, and over the curve
    unit: str  # beside the curve
    form: str = ".1%"
    in_every_log: bool = True  # else in that of a stage that asks for it; the table has it all the same
    of_problem: Callable[[Problem], bool] = lambda problem: True  # whether a problem has this figure


# A new metric needs a row here and no more: each stage evaluates, logs, tables and draws it under its name. No stage's
# log may have this name already.
METRICS = {
    "accuracy": Metric(lambda a: a.correct, "accuracy, greedy", "share correct"),
    "story_kept": Metric(
        keeps_story,
        "story kept, greedy",
        "share of answers",
        of_problem=lambda problem: task_of(problem.task).keeps_story is not None,
    ),
    "f1": Metric(lambda a: token_f1(a.text, a.problem.solution), "token F1, greedy", "F1", in_every_log=False),
    "length": Metric(lambda a: a.length, "answer length", "tokens", ".1f", in_every_log=False),
    "truncated": Metric(lambda a: not a.ended, "cut off", "share of answers", in_every_log=False),
}


def own_measure(answer):
    """Whether the answer is right where it can be checked, else its token F1."""
    return answer.correct if answer.problem.answer else token_f1(answer.text, answer.problem.solution)


def evaluate(policy, tokenizer, problems, max_new_tokens, dist, batch=256, progress=None, respond=None, dtype="fp32"):
    """Greedy answers to N problems, dealt out to the ranks -> the same on every rank, but for `answers`:

        accuracy, correct         the share and the number of right answers, of the problems with an answer to check
        low, high                 the accuracy's 95 % interval
        by_level                  {level: accuracy}
        verdicts                  1.0 or 0.0 for each of these problems, in their order
        each other of METRICS     its mean over the problems that have this figure; left out if none has
        own_measure, n            the mean over all N problems; N
        answers                   this rank's, those to short questions first: a list of GreedyAnswer

    progress: the name of a bar. respond: what answers the prompts, with the arguments of `generate`, which is the
    default; agent.py has one with tools. dtype: the precision of the answers, as --dtype.
    """
    N, respond = len(problems), respond or generate
    autocast, _ = precision(dtype, dist)
    own = sorted(range(dist.rank, N, dist.world), key=lambda i: len(problems[i].question))  # this rank's, by length
    answers, verdicts = [], [0.0] * N
    for chunk in batches(own, batch, progress, dist):
        prompts = [encode_prompt(tokenizer, problems[i]) for i in chunk]
        with autocast():
            rollout = respond(policy, prompts, max_new_tokens, temperature=0, stop_ids=tokenizer.stop_ids)
        texts, lengths, ended = rollout.texts(tokenizer), rollout.mask.sum(1), rollout.ended(tokenizer.stop_ids)
        all_tokens = map(len, rollout.rows)  # a tool's tokens too; lengths counts the policy's own
        for i, text, length, end, size in zip(chunk, texts, lengths.tolist(), ended.tolist(), all_tokens, strict=True):
            verdicts[i] = is_correct(text, problems[i])
            answers.append(GreedyAnswer(problems[i], text, verdicts[i], length, end, size - length))
    verdicts = dist.sum(*verdicts)  # (N,) each was 0 on every rank but one
    verdicts = list(itertools.compress(verdicts, is_checkable(problems)))  # of the checkable ones alone
    correct, n_checked = int(sum(verdicts)), len(verdicts)
    low, high = wilson(correct, n_checked)
    means = means_of(METRICS, answers, problems, dist) | {"accuracy": correct / n_checked}  # of the checkable alone
    by_level = means_of_levels(verdicts, checkable(problems))
    (measured,) = dist.sum(sum(map(own_measure, answers)))
    figures = {"low": low, "high": high, "n": N, "correct": correct, "by_level": by_level, "own_measure": measured / N}
    return means | figures | {"verdicts": verdicts, "answers": answers}


def evaluate_samples(
    policy, tokenizer, problems, n, max_new_tokens, dist, seed=0, batch=32, progress=None, respond=None, dtype="fp32"
):
    """n answers, sampled at temperature 1, to each of the N problems that are `checkable` -> {"pass@1", "pass@2", …,
    "pass@n", "majority@n"}, k in powers of two, and "solved", how many of each problem's answers are right. The other
    arguments as in `evaluate`. A problem has the same random numbers on whichever rank and in whichever batch it is
    answered.
    """
    problems, respond = checkable(problems), respond or generate
    autocast, _ = precision(dtype, dist)
    uniforms = torch.rand(len(problems), n, max_new_tokens, generator=torch.Generator().manual_seed(seed))  # (N, n, T)
    own = sorted(range(dist.rank, len(problems), dist.world), key=lambda i: len(problems[i].question))
    solved, voted = [0] * len(problems), 0
    for chunk in batches(own, batch, progress, dist):
        prompts = [encode_prompt(tokenizer, problems[i]) for i in chunk]
        sampling = {"stop_ids": tokenizer.stop_ids, "uniforms": uniforms[chunk].flatten(0, 1)}  # (b·n, T)
        with autocast():
            texts = respond(policy, prompts, max_new_tokens, n, **sampling).texts(tokenizer)
        for row, i in enumerate(chunk):
            task, answers = task_of(problems[i].task), texts[row * n : (row + 1) * n]
            solved[i] = sum(is_correct(text, problems[i]) for text in answers)
            most = majority(map(task.answer, answers))
            voted += most is not None and task.same_answer(most, problems[i].answer)
    *solved, voted = map(int, dist.sum(*solved, voted))
    ks = sorted({1, n} | {2**i for i in range(1, 20) if 2**i < n})
    figures = {f"pass@{k}": sum(pass_at_k(n, correct, k) for correct in solved) / len(problems) for k in ks}
    return figures | {f"majority@{n}": voted / len(problems), "solved": solved}


def kl_estimate(logprobs, ref_logprobs, kind="k3"):
    """What a sampled token says of KL(π ‖ π_ref), elementwise (J. Schulman, "Approximating KL divergence", 2020).

    With x = π_ref(y) / π(y), y ~ π:  estimate            its gradient     that gradient's mean over y ~ π
        k1 = −log x                   unbiased, any sign  ∇log π           0: in the loss it is noise
        k2 = (log x)² / 2             biased, ≥ 0         −log x · ∇log π  ∇KL(π ‖ π_ref)
        k3 = x − 1 − log x            unbiased, ≥ 0       (1 − x) ∇log π   ∇KL(π_ref ‖ π), close to k2's near π_ref

    by ∇log x = −∇log π, E[∇log π] = Σ ∇π = 0 and E[x ∇log π] = Σ π_ref ∇log π = −∇KL(π_ref ‖ π). So k1 belongs in the
    reward, where the policy gradient makes ∇KL(π ‖ π_ref) of it. In the loss k2 has that gradient. So have ρ k1 and
    ρ k3 with the ratio ρ = π / π_old (π_old: the policy that sampled y, a constant), which is 1 on fresh samples, with
    the gradient ∇log π. GRPO's paper has k3 without ρ (grpo.py).
    """
    log_x = ref_logprobs - logprobs
    log_x = log_x.to(torch.promote_types(log_x.dtype, torch.float32))  # in bf16 k3 would be wrong, and below 0
    if kind == "k1":
        return -log_x
    if kind == "k2":
        return log_x.square() / 2
    if kind == "k3":
        return log_x.exp() - 1 - log_x
    raise ConfigError(f"--kl {kind!r} is not known; use k1, k2 or k3")


# ---------------------------------------------------------------------------------------------------------------
# By hand.


def demo():
    """The figures above on numbers small enough to check with a pencil."""
    problem = Problem("2 + 3?", "2 + 3 = 5\n#### 5", "5", 1, "demo")
    texts = ["2 + 3 = 5\n#### 5", "#### 5.0", "#### 6", "the answer is 5"]
    verdicts = [is_correct(text, problem) for text in texts]
    assert verdicts == [True, True, False, False]
    assert majority([extract_answer(text) for text in texts]) == "5"  # 5.0 is 5: two votes
    print(f"2 + 3?           {dict(zip(texts, verdicts, strict=True))}, by majority 5")

    f1 = token_f1("The cat sat down.", "a cat sat")  # without articles
    assert math.isclose(f1, 2 / (3 / 2 + 2 / 2))  # the harmonic mean of 2/3 and 2/2
    print(f"token F1         'The cat sat down.' for 'a cat sat': 2 of 3 words, 2 of 2 words, {f1:.1f}")

    hits = [any(pair) for pair in itertools.combinations(verdicts, 2)]  # the 6 pairs of 4 samples
    assert pass_at_k(4, 2, 2) == sum(hits) / len(hits) == 5 / 6
    print(f"of 4 samples     pass@1 {pass_at_k(4, 2, 1):.3f}; pass@2 {pass_at_k(4, 2, 2):.3f}: 5 of the 6 pairs hit")

    low, high = wilson(6, 8)
    for p in (low, high):  # either end is 1.96 of its own standard deviations from what was seen
        assert math.isclose(abs(6 / 8 - p), 1.96 * math.sqrt(p * (1 - p) / 8))
    print(f"6 of 8 right     {6 / 8:.1%}, 95 % interval [{low:.1%}, {high:.1%}]")

    first, second = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    pair = compare(first, second)
    assert (pair["only_first"], pair["p"]) == (0, 2 / 2**6)  # six coins that all fall to one side, or to the other
    assert math.isclose(pair["low"] + pair["high"], 2 * (6 + 1 - (0 + 1)) / (10 + 2))  # the centre is 50, not 60
    assert pair["low"] > 0  # significant, though the intervals of the two overlap:
    assert wilson(sum(first), 10)[1] > wilson(sum(second), 10)[0]
    print(f"2, then 8 of 10  6 problems gained, none lost: {gain_of(pair)}")

    z, ref = torch.zeros(2, requires_grad=True), torch.tensor([0.25, 0.75])  # logits of π, π_ref: of two tokens
    log_pi, pi = z.log_softmax(0), torch.tensor([0.5, 0.5])
    exact = (pi * (pi / ref).log()).sum()
    k1, k3 = (kl_estimate(log_pi, ref.log(), kind) for kind in ("k1", "k3"))
    for estimate, by_hand in ((k1, 0 * pi), (k3, pi - ref)):  # the gradients; π − π_ref is that of KL(π_ref ‖ π)
        assert torch.isclose((pi * estimate).sum(), exact)
        gradient = torch.autograd.grad((pi * estimate).sum(), z, retain_graph=True)[0]
        assert torch.allclose(gradient, by_hand, atol=1e-6)
    samples = f"k1 {k1[0]:.3f} or {k1[1]:.3f}, k3 {k3[0]:.3f} or {k3[1]:.3f}"
    print(f"KL(½ ½ ‖ ¼ ¾)    {exact:.4f}; a sample says {samples}: both right on average, k3 never below 0")


# ---------------------------------------------------------------------------------------------------------------
# The script. Its flags: support/evaluate_script.py.


def main(config):
    """Measure, print, write; returns what result.json holds."""
    dist = setup(config.device)
    problems, models, folder = open_all(config, dist)  # the problems that fit every model
    results, T, n = [], config.max_new_tokens, config.samples
    for name, policy, tokenizer in models:
        policy.to(dist.device)
        result = evaluate(policy, tokenizer, problems, T, dist, batch=64, progress=name, dtype=config.dtype)
        if n:
            sampling = {"seed": config.seed, "batch": max(1, 64 // n), "progress": f"{name}, {n} samples each"}
            result |= evaluate_samples(policy, tokenizer, problems, n, T, dist, **sampling, dtype=config.dtype)
        policy.to("cpu")
        results.append({key: value for key, value in result.items() if key != "answers"})

    record = {"settings": asdict(config), "commit": commit(), "results": results}
    checked = measure_of(problems) != "f1"  # else free text: token F1 alone says something
    if config.against and checked:  # A is `against`, B the checkpoint: the gain is B's over A
        record["pair"] = compare(results[1]["verdicts"], results[0]["verdicts"])
    if dist.is_main:
        write_report(config, folder, record, METRICS, checked)
    return record


if __name__ == "__main__":
    hint = "to measure a checkpoint: python evaluate.py --checkpoint DIR (see --help)"
    run_script(main, Config, __doc__, demo, without_flags=hint)
