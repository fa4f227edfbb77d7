"""How to tell whether a model got better."""

import collections
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import Problem, encode_prompt, task_of
from generate import generate
from lora import lora_off
from support.answers import extract_answer, same_answer  # noqa: F401  the usual verifier, offered here
from support.errors import ConfigError
from support.shared_prompt import pack, shared_answer_logprobs
from support.tables import text_table

# ---------------------------------------------------------------------------------------------------------------
# One answer.


def is_correct(text, problem):
    """The verifier of the problem's task; the usual one is whether the number after #### is the problem's answer (see
    `extract_answer`)."""
    task = task_of(problem.task)
    answer = task.answer(text)
    return answer is not None and task.same_answer(answer, problem.answer)


def words(text):
    """Lower case, without punctuation and articles, much as SQuAD compares answers (arXiv:1606.05250)."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def token_f1(text, reference):
    """Harmonic mean of precision and recall of the words, as bags: 1 if the same, 0 if none is shared."""
    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


# ---------------------------------------------------------------------------------------------------------------
# Several answers to one problem.


def pass_at_k(n, correct, k):
    """Chance that k of the n samples, drawn without replacement, hold a right one; unbiased (arXiv:2107.03374)."""
    return 1.0 if n - correct < k else 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers):
    """The most frequent answer, of several the one that came first; None, which is no answer, has no vote."""
    votes = collections.Counter(a for a in answers if a is not None)
    return votes.most_common(1)[0][0] if votes else None


# ---------------------------------------------------------------------------------------------------------------
# Many problems: how sure is a proportion, and how sure a difference?


def wilson(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): unlike p ± z·se it stays inside [0, 1] and is right near both."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first, only_second):
    """Exact two-sided p-value of two models' accuracies on the same problems (McNemar 1947, in its binomial form).

    only_first, only_second: how many problems the one alone gets right, and the other alone. Those on which they agree
    say nothing about which is better. If neither were, each of the n others would fall to either side like a coin:
    p = P(a split at least as uneven) = 2 Σ_{i ≤ min} C(n, i) / 2^n, at most 1.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)  # whole numbers: no rounding before the /


def paired_interval(only_first, only_second, n, z=1.96):
    """95 % interval of accuracy(second) − accuracy(first) on the same n problems: Wald's with a Laplace adjustment
    (Bonett and Price 2012, J. Educ. Behav. Stat. 37, 479; recommended by Fagerland et al. 2014, Stat. Med. 33, 2850).

    One pair is added to each kind of disagreement, so that the interval has a width even where the two never differ.
    """
    p, q = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = z * math.sqrt((p + q - (q - p) ** 2) / (n + 2))
    return max(-1.0, q - p - half), min(1.0, q - p + half)


def compare(first, second):
    """Two lists of verdicts on the same problems -> {"difference": of the accuracies, "low", "high", "p", and how often
    "only_first" and "only_second" is right}."""
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    low, high = paired_interval(only_first, only_second, len(first))
    counts = {"only_first": only_first, "only_second": only_second}
    difference = (only_second - only_first) / len(first)
    return {"difference": difference, "low": low, "high": high, "p": mcnemar(only_first, only_second)} | counts


# ---------------------------------------------------------------------------------------------------------------
# A model.


class Sample(NamedTuple):
    """A greedy answer to a problem."""

    problem: Problem
    text: str
    correct: bool
    length: int  # tokens
    ended: bool  # stopped by itself


class Metric(NamedTuple):
    """A figure that every stage measures: its mean over the held-out problems, in the log, the table and the curves."""

    of: Callable[[Sample], float]
    label: str  # in tables, and over the curve
    unit: str  # beside the curve
    form: str = ".1%"
    logged: bool = True  # by every stage; else by those that ask for it, and the table has it all the same


# A new metric is a row here, and no more: evaluated, logged, tabled and drawn by each stage under its name, which must
# be none that a stage's log has already.
METRICS = {
    "accuracy": Metric(lambda s: s.correct, "accuracy, greedy", "share correct"),
    "f1": Metric(lambda s: token_f1(s.text, s.problem.solution), "token F1, greedy", "F1", logged=False),
    "length": Metric(lambda s: s.length, "answer length", "tokens", ".1f", logged=False),
    "truncated": Metric(lambda s: not s.ended, "cut off", "share of answers", logged=False),
}


def batches(items, size):
    """In pieces of at most `size`."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def evaluate(policy, tokenizer, problems, max_new_tokens, dist, batch=256, progress=None):
    """Greedy answers. Problems are dealt out to the ranks; every rank returns the same figures, and its own samples:
    the mean of each of METRICS; "n", "correct", "low", "high": how many, how many right, and the accuracy's interval;
    "by_level": {level: accuracy}; "verdicts": 1.0 or 0.0 for each problem; "samples". progress: the name of a bar.
    """
    mine = range(dist.rank, len(problems), dist.world)
    mine = sorted(mine, key=lambda i: len(problems[i].question))  # rows of one length waste no padding
    samples, verdicts = [], [0.0] * len(problems)
    for chunk in tqdm(batches(mine, batch), desc=progress, leave=False, disable=progress is None or not dist.is_main):
        prompts = [encode_prompt(tokenizer, problems[i]) for i in chunk]
        rollout = generate(policy, prompts, max_new_tokens, temperature=0, stop_ids=tokenizer.stop_ids)
        texts, lengths, ended = rollout.texts(tokenizer), rollout.mask.sum(1), rollout.ended(tokenizer.stop_ids)
        for i, text, length, end in zip(chunk, texts, lengths.tolist(), ended.tolist(), strict=True):
            verdicts[i] = is_correct(text, problems[i])
            samples.append(Sample(problems[i], text, verdicts[i], length, end))
    n, verdicts = len(problems), dist.sum(*verdicts)
    totals = dist.sum(*(sum(map(metric.of, samples)) for metric in METRICS.values()))
    by_level = {}
    for level in sorted({p.level for p in problems}):
        of_level = [verdict for verdict, p in zip(verdicts, problems, strict=True) if p.level == level]
        by_level[level] = sum(of_level) / len(of_level)
    correct = int(sum(verdicts))
    low, high = wilson(correct, n)
    means = {name: total / n for name, total in zip(METRICS, totals, strict=True)}
    figures = {"low": low, "high": high, "n": n, "correct": correct, "by_level": by_level}
    return means | figures | {"verdicts": verdicts, "samples": samples}


def evaluate_samples(
    policy, tokenizer, problems, n, max_new_tokens, dist, temperature=1.0, seed=0, batch=32, progress=None
):
    """n sampled answers per problem: {"pass@1", "pass@2", …, "pass@n", "majority@n"}, k in powers of two, and "solved",
    how many of each problem's answers are right.

    A problem has the same random numbers on whichever rank and in whichever batch it is answered.
    """
    uniforms = torch.rand(len(problems), n, max_new_tokens, generator=torch.Generator().manual_seed(seed))
    mine = range(dist.rank, len(problems), dist.world)
    solved, voted = [0] * len(problems), 0
    for chunk in tqdm(batches(mine, batch), desc=progress, leave=False, disable=progress is None or not dist.is_main):
        prompts = [encode_prompt(tokenizer, problems[i]) for i in chunk]
        sampling = {"stop_ids": tokenizer.stop_ids, "uniforms": uniforms[chunk].flatten(0, 1)}  # (b·n, T)
        texts = generate(policy, prompts, max_new_tokens, n, temperature, **sampling).texts(tokenizer)
        for row, i in enumerate(chunk):
            task, said = task_of(problems[i].task), texts[row * n : (row + 1) * n]
            solved[i] = sum(is_correct(text, problems[i]) for text in said)
            most = majority(map(task.answer, said))
            voted += most is not None and task.same_answer(most, problems[i].answer)
    *solved, voted = map(int, dist.sum(*solved, voted))
    ks = sorted({1, n} | {2**i for i in range(1, 20) if 2**i < n})
    figures = {f"pass@{k}": sum(pass_at_k(n, correct, k) for correct in solved) / len(problems) for k in ks}
    return figures | {f"majority@{n}": voted / len(problems), "solved": solved}


def kl_estimate(logprobs, ref_logprobs, kind="k3"):
    """What a sampled token says of KL(π ‖ π_ref), elementwise (J. Schulman, "Approximating KL divergence", 2020).

    With r = π_ref(y) / π(y), y ~ π:      value                  gradient, in expectation over y ~ π
        k1 = −log r                       unbiased, any sign     0: E[∇log π] = 0, so never put it in the loss
        k2 = (log r)² / 2                 biased, ≥ 0            ∇KL(π ‖ π_ref)
        k3 = r − 1 − log r   (Eq. 4)      unbiased, ≥ 0          ∇KL(π_ref ‖ π), the same to first order near π_ref

    Times ρ_t = π / π_old, with its gradient (--kl_unbiased; DeepSeek-V3.2, arXiv:2512.02556, §3.1; TRL's default), the
    mean over y ~ π_old becomes that over y ~ π, gradient included: k1 and k3 then have ∇KL(π ‖ π_ref).
    In the reward (--kl_in reward) the estimate is a number and not differentiated: the policy gradient does that, and
    there k1 is the one whose gradient is ∇KL(π ‖ π_ref) of the whole completion. It is taken off the advantages, less
    its group's mean and behind any division by the std (verl and TRL's older trainers take it off the rewards).
    """
    log_r = ref_logprobs - logprobs
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r.square() / 2
    if kind == "k3":
        return log_r.exp() - 1 - log_r
    raise ConfigError(f"--kl {kind!r} is not known; use k1, k2 or k3")


@torch.no_grad()
def sampled_kl(policy, reference, tokenizer, prompts, max_new_tokens, dist, seed=0, batch=64):
    """KL(π ‖ π_ref) in nats per token: the mean of k3 over the tokens of one answer of the policy to each prompt (lists
    of ids). The reference may be the policy itself, then without its adapters.

    The prompts are dealt out to the ranks; a prompt has the same random numbers whichever rank answers it.
    """
    uniforms = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    mine, uniforms = prompts[dist.rank :: dist.world], uniforms[dist.rank :: dist.world]
    total, n_tokens = 0.0, 0
    for i in range(0, len(mine), batch):
        chunk, drawn = mine[i : i + batch], uniforms[i : i + batch]
        rollout = generate(policy, chunk, max_new_tokens, stop_ids=tokenizer.stop_ids, uniforms=drawn)
        answers = [[ids[real].tolist()] for ids, real in zip(rollout.ids, rollout.mask, strict=True)]
        packed = pack(chunk, answers, tokenizer.endoftext_id).to(dist.device)
        with lora_off(policy):
            ref_logprobs = shared_answer_logprobs(reference, packed)  # (b, T), 0 after an answer's end
        log_r = ref_logprobs - shared_answer_logprobs(policy, packed)
        total += (log_r.exp() - log_r - 1).sum().item()  # k3
        n_tokens += rollout.mask.sum().item()
    total, n_tokens = dist.sum(total, n_tokens)
    return total / n_tokens


# ---------------------------------------------------------------------------------------------------------------
# What a stage logs, draws and prints of it.


def selected(also, without):
    """The metrics that all stages log, and those that a stage asks for."""
    return {k: m for k, m in METRICS.items() if (m.logged or k in also) and k not in without}


def logged(result, *also):
    """A result of `evaluate` -> {metric: value} for metrics.jsonl."""
    return {name: result[name] for name in selected(also, ())}


def metric_panels(*also, without=()):
    """A panel of curves.png for each of them (see `support.plots.draw_curves`)."""
    return [(f"{m.label}", {name: "validation"}, m.unit, {}) for name, m in selected(also, without).items()]


def metric_rows(results, without=()):
    """Results of `evaluate` -> rows of a table, [label, a cell for each]: every metric that they all have, the accuracy
    with its interval and by level."""
    rows = []
    for name, metric in METRICS.items():
        if name in without or not all(name in result for result in results):
            continue
        rows.append([metric.label, *(format(result[name], metric.form) for result in results)])
        if name == "accuracy":
            rows.append(["  95 % interval", *(f"[{r['low']:.1%}, {r['high']:.1%}]" for r in results)])
            for level in results[0]["by_level"] if len(results[0]["by_level"]) > 1 else ():
                rows.append([f"  level {level}", *(f"{r['by_level'][level]:.1%}" for r in results)])
    return rows


def before_and_after(before, after, steps, seconds, rows=(), notes=()):
    """Print the table at the end of a stage: results of `evaluate` on the test split, the stage's own rows, [label,
    before, after], its notes, and what was gained."""
    print("\n" + text_table([["held-out test", "before", "after"], *metric_rows([before, after]), *rows]))
    for note in notes:
        print(note)
    gain, spent = 0.0, f"{steps} steps, {seconds / 60:.1f} minutes"
    if "accuracy" in after:
        gain = after["accuracy"] - before["accuracy"]
        said = f"{after['n']} problems, {gain * 100:+.1f} points"
        if "verdicts" in before:  # a run that an older version began has none
            pair = compare(before["verdicts"], after["verdicts"])
            interval = f"95 % interval [{pair['low'] * 100:+.1f}, {pair['high'] * 100:+.1f}]"
            said += f" ({interval}, McNemar's p = {pair['p']:.2g})"
        spent = f"{said} in {spent}"
    print(spent)
    if gain < 0:
        print("WARNING: the policy ended worse than it began; best/ holds the best on the validation split")
