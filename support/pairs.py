"""Preference data as ids: sampling it, scoring it under the reference, batching it, saving it with the run.

A pair is {"prompt", "chosen", "rejected"}: lists of ids, an answer with its end token if it ended. A judged answer, for
kto, is {"prompt", "answer", "good"}; its "other" is an answer to another prompt. After `add_reference` there is also
the reference's log-probability of each answer: "ref_chosen", "ref_rejected", "ref_answer", "ref_other".
"""

import io
import math
import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import encode_prompt
from evaluate import is_correct
from generate import generate
from support.errors import CheckpointError
from support.files import must_write, write_whole
from support.runs import load_saved, run_path
from support.shared_prompt import PackedAnswers, pack, shared_answer_logprobs


@dataclass
class PairBatch:
    """b pairs, or b judged answers, on the device."""

    packed: PackedAnswers  # b prompts with two answers each, the chosen one first; or with one
    lengths: dict  # {"chosen_lengths", "rejected_lengths"} or {"answer_lengths"}: (b,) tokens
    ref_logps: tuple  # log π_ref of the chosen and of the rejected answers, or of the answers: (b,) each, or None
    desirable: torch.Tensor | None  # (b,) bool: which judged answers are good; None of pairs

    def count(self, metric):
        """How many rows a metric is the mean of: ending in _chosen or _rejected, those with such an answer."""
        good, rows = self.desirable, len(self.packed.tokens)
        kind = metric.rpartition("_")[2]
        if good is None or kind not in ("chosen", "rejected"):
            return rows
        return int(good.sum()) if kind == "chosen" else rows - int(good.sum())


class Means:
    """The means of a loss's metrics over micro-batches and ranks."""

    def __init__(self):
        self.sums = {}  # {metric: (sum, number of rows)}

    def add(self, metrics, batch, weight=1):
        """weight 0: the names alone, because all ranks must sum the same ones."""
        for name, value in metrics.items():
            count, (total, rows) = weight * batch.count(name), self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value * count if count else total, rows + count)

    def over_ranks(self, dist):
        """{metric: mean}, the same on every rank, without those that no row has."""
        totals = iter(dist.sum(*(number for both in self.sums.values() for number in both)))
        return {name: total / rows for name, total, rows in zip(self.sums, totals, totals, strict=True) if rows}


def to_floats(metrics):
    """{metric: tensor} -> {metric: float}, in one transfer from the device."""
    return dict(zip(metrics, torch.stack([m.detach().float() for m in metrics.values()]).tolist(), strict=True))


def sides_of(row):
    """The names of the answers that a loss compares."""
    return ("answer",) if "answer" in row else ("chosen", "rejected")


def batch_of(pairs, pad, device, sides=None):
    """b pairs or judged answers -> PairBatch. sides: the names of the answers in it."""
    sides = sides or sides_of(pairs[0])
    packed = pack([p["prompt"] for p in pairs], [[p[side] for side in sides] for p in pairs], pad).to(device)
    lengths = packed.lengths.view(-1, len(sides)).unbind(1)
    lengths = {f"{side}_lengths": n for side, n in zip(sides, lengths, strict=True)}
    ref_logps = (None,) * len(sides)
    if f"ref_{sides[0]}" in pairs[0]:
        ref_logps = torch.tensor([[p[f"ref_{side}"] for side in sides] for p in pairs], device=device).unbind(1)
    desirable = torch.tensor([p["good"] for p in pairs], device=device) if "good" in pairs[0] else None
    return PairBatch(packed, lengths, ref_logps, desirable)


def chunks(rows, sides=None, most=64, tokens=2**15):
    """Rows in parts for passes without gradient, in their order: at most `most` rows each, and at most `tokens` tokens
    when each answer stands beside its prompt, both padded to the longest. A single row may have more. Rows that are
    sorted by length make fewer parts."""
    cut, prompt, answer = [], 0, 0
    for row in rows:
        names = sides or sides_of(row)
        prompt = max(prompt, len(row["prompt"]))
        answer = max(answer, *(len(row[side]) for side in names))
        if not cut or len(cut[-1]) == most or (len(cut[-1]) + 1) * len(names) * (prompt + answer) > tokens:
            prompt, answer = len(row["prompt"]), max(len(row[side]) for side in names)
            cut.append([])
        cut[-1].append(row)
    return cut


def pair_logprobs(model, packed):
    """log π of the chosen and of the rejected answers, summed over their tokens: (b,), (b,). Of judged answers: (b,)
    alone, in a tuple."""
    logprobs = shared_answer_logprobs(model, packed).sum(1)  # (answers,)
    return logprobs.view(len(packed.tokens), -1).unbind(1)


def row_of(prompt, answer, other):
    """other: the ids of the rejected answer, or whether a single answer is good."""
    names = ("answer", "good") if isinstance(other, bool) else ("chosen", "rejected")
    return {"prompt": prompt, **dict(zip(names, (answer, other), strict=True))}


@torch.no_grad()
def sample_pairs(policy, tokenizer, problems, config, dist, seed, pair_up):
    """Sample `config.rollouts` answers to each problem, judge them with the verifier, and call pair_up([(ids, right,
    ended), …], rng) on the answers to each prompt; it returns a list of (chosen, rejected), for kto of (answer, good).

    The prompts are split into chunks with a seed each, so any number of ranks finds the same pairs. -> pairs (the same
    list on every rank), the share of right answers.
    """
    R, T, stop_ids = config.rollouts, config.max_new_tokens, tokenizer.stop_ids
    numbered = list(enumerate(problems[i : i + 64] for i in range(0, len(problems), 64)))

    def work(own_chunks):
        """For each chunk (number, problems): its pairs, and the number of right answers."""
        for c, chunk in tqdm(own_chunks, desc="sampling pairs", unit="chunk", leave=False, disable=not dist.is_main):
            rng, generator = random.Random(f"pairs/{seed}/{c}"), torch.Generator().manual_seed(seed * 1_000_003 + c)
            prompts = [encode_prompt(tokenizer, problem) for problem in chunk]  # n
            sampling = {"stop_ids": stop_ids, "uniforms": torch.rand(len(chunk) * R, T, generator=generator)}
            rollout = generate(policy, prompts, T, R, config.temperature, **sampling)  # n·R answers
            lengths = rollout.mask.sum(1).tolist()
            answers = [ids[:length] for ids, length in zip(rollout.ids.tolist(), lengths, strict=True)]
            verdicts = [is_correct(text, chunk[i // R]) for i, text in enumerate(rollout.texts(tokenizer))]
            judged = list(zip(answers, verdicts, rollout.ended(stop_ids).tolist(), strict=True))
            pairs = [(i, pair) for i in range(len(chunk)) for pair in pair_up(judged[i * R : (i + 1) * R], rng)]
            yield [row_of(prompts[i], *pair) for i, pair in pairs], sum(verdicts)

    sampled = dist.split_work(numbered, work)
    return [pair for pairs, _ in sampled for pair in pairs], sum(right for _, right in sampled) / (len(problems) * R)


@torch.no_grad()
def add_reference(reference, pairs, pad, dist, autocast):
    """The pairs with the reference's log π of both answers, "ref_chosen" and "ref_rejected"; judged answers with
    "ref_answer", and "ref_other" if they have an "other". The ranks split the work."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["prompt"]))  # similar lengths need little padding
    sides = sides_of(pairs[0]) + (("other",) if "other" in pairs[0] else ())

    def work(own_batches):
        for rows in tqdm(own_batches, desc="the reference reads", unit="chunk", leave=False, disable=not dist.is_main):
            packed = batch_of(rows, pad, dist.device, sides).packed
            with autocast():
                logprobs = torch.stack(pair_logprobs(reference, packed), dim=1)  # (b, sides)
            yield logprobs.tolist()

    scored = dist.split_work(chunks([pairs[i] for i in order], sides), work)
    logprobs = dict(zip(order, (row for chunk in scored for row in chunk), strict=True))  # {index of the pair: log π}
    names = [f"ref_{side}" for side in sides]
    return [p | dict(zip(names, logprobs[i], strict=True)) for i, p in enumerate(pairs)]


def saved_pairs(config):
    """The saved pairs of the run that --resume continues, or None."""
    path = run_path(config) / "pairs.pt"
    if not (config.resume and path.is_file()):
        return None
    pairs = load_saved(path)
    for split, of_split in pairs.items():
        for i, pair in enumerate(of_split):
            if not all(math.isfinite(value) for name, value in pair.items() if name.startswith("ref_")):
                raise CheckpointError(f"{path} is corrupt: the reference's log π of {split} pair {i + 1} is not finite")
    return pairs


def save_pairs(run, pairs):
    """Save the pairs, once, in the run directory: a resumed run reads them instead of sampling new ones."""
    path = run.path / "pairs.pt"
    if run.dist.is_main and not path.is_file():
        content = io.BytesIO()
        torch.save(pairs, content)
        with must_write(path):
            write_whole(path, content.getvalue())
