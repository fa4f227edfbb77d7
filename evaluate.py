"""How to tell whether a model got better."""

import collections
import math
import re
from typing import NamedTuple

import torch

from data import Problem, encode_prompt
from generate import generate
from support.answers import extract_answer, same_answer
from support.errors import ConfigError


def wilson(successes, n, z=1.96):
    """95 % interval of a proportion (Wilson 1927): unlike p ± z·se it stays inside [0, 1] and is right near both."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_correct(text, problem):
    found = extract_answer(text)
    return found is not None and same_answer(found, problem.answer)


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


def pass_at_k(n, correct, k):
    """Chance that k of the n samples, drawn without replacement, hold a right one; unbiased (arXiv:2107.03374)."""
    return 1.0 if n - correct < k else 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers):
    """The most frequent answer, of several the one that came first; None, which is no answer, has no vote."""
    votes = collections.Counter(a for a in answers if a is not None)
    return votes.most_common(1)[0][0] if votes else None


def evaluate_samples(raw, tokenizer, problems, n, max_new_tokens, dist, temperature=1.0, seed=0, batch=32):
    """n sampled answers per problem: {"pass@1", "pass@2", …, "pass@n", "majority@n"}, k in powers of two.

    Chunks of problems are dealt out to the ranks and seeded one by one, so any number of ranks finds the same.
    """
    ks = sorted({1, n} | {2**i for i in range(1, 20) if 2**i < n})
    sums = [0.0] * (len(ks) + 1)
    for c in range(dist.rank, math.ceil(len(problems) / batch), dist.world):
        chunk = problems[c * batch : (c + 1) * batch]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + c)
        prompts = [encode_prompt(tokenizer, p) for p in chunk]
        stops = dict(stop_ids=tokenizer.stop_ids, generator=generator)
        texts = generate(raw, prompts, max_new_tokens, n, temperature, **stops).texts(tokenizer)
        for i, problem in enumerate(chunk):
            answers = [extract_answer(text) for text in texts[i * n : (i + 1) * n]]
            correct = sum(same_answer(a, problem.answer) for a in answers)
            for j, k in enumerate(ks):
                sums[j] += pass_at_k(n, correct, k)
            sums[-1] += same_answer(majority(answers), problem.answer)
    names = [f"pass@{k}" for k in ks] + [f"majority@{n}"]
    return {name: value / len(problems) for name, value in zip(names, dist.sum(*sums), strict=True)}


class Sample(NamedTuple):
    """A greedy answer to a problem."""

    problem: Problem
    text: str
    correct: bool
    length: int  # tokens
    ended: bool  # stopped by itself


def evaluate(raw, tokenizer, problems, max_new_tokens, dist, batch=256):
    """Greedy exact match. Problems are dealt out to the ranks; every rank returns the same figures, and its own
    samples: {"accuracy", "low", "high", "n", "correct", "f1", "length", "truncated", "by_level", "samples"}. f1 is that
    of the words with the reference solution's: the figure for free text, where no answer can be checked."""
    mine = problems[dist.rank :: dist.world]
    mine = sorted(mine, key=lambda p: len(p.question))  # rows of one length waste no padding
    samples = []
    for i in range(0, len(mine), batch):
        chunk = mine[i : i + batch]
        prompts = [encode_prompt(tokenizer, p) for p in chunk]
        rollout = generate(raw, prompts, max_new_tokens, temperature=0, stop_ids=tokenizer.stop_ids)
        texts, lengths = rollout.texts(tokenizer), rollout.mask.sum(1).tolist()
        rows = zip(chunk, texts, lengths, rollout.ended(tokenizer.stop_ids).tolist(), strict=True)
        samples += [Sample(p, text, is_correct(text, p), length, ended) for p, text, length, ended in rows]
    levels = sorted({p.level for p in problems})
    counts = [
        len(samples),
        sum(s.correct for s in samples),
        sum(s.length for s in samples),
        sum(not s.ended for s in samples),
        sum(token_f1(s.text, s.problem.solution) for s in samples),
    ]
    for level in levels:
        here = [s.correct for s in samples if s.problem.level == level]
        counts += [len(here), sum(here)]
    n, correct, tokens, truncated, f1, *rest = dist.sum(*counts)
    low, high = wilson(correct, n)
    by_level = {level: rest[2 * i + 1] / rest[2 * i] for i, level in enumerate(levels)}
    return {
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "n": int(n),
        "correct": int(correct),
        "f1": f1 / n,
        "length": tokens / n,
        "truncated": truncated / n,
        "by_level": by_level,
        "samples": samples,
    }


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
