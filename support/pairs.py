"""Preference pairs as ids: sampling them, scoring them under the reference, batching them, saving them with the run.

A pair is {"prompt", "chosen", "rejected"}: lists of ids, an answer with its end token if it ended. After
`add_reference` it also has "ref_chosen" and "ref_rejected", the reference's log-probabilities of the two answers.
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
from support.runs import run_path
from support.shared_prompt import PackedAnswers, pack, shared_answer_logprobs


@dataclass
class PairBatch:
    """b pairs on the device."""

    packed: PackedAnswers  # b prompts with two answers each, the chosen one first
    lengths: dict  # {"chosen_lengths", "rejected_lengths"}: (b,) tokens
    ref_logps: tuple  # log π_ref of the chosen and of the rejected answers, (b,) each; None without a reference


def batch_of(pairs, pad, device):
    """b pairs -> PairBatch."""
    packed = pack([p["prompt"] for p in pairs], [[p["chosen"], p["rejected"]] for p in pairs], pad).to(device)
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), packed.lengths.view(-1, 2).unbind(1), strict=True))
    ref_logps = (None, None)
    if "ref_chosen" in pairs[0]:
        both = torch.tensor([[p["ref_chosen"], p["ref_rejected"]] for p in pairs], device=device)  # (b, 2)
        ref_logps = both.unbind(1)
    return PairBatch(packed, lengths, ref_logps)


def pair_logprobs(model, packed):
    """log π of the chosen and of the rejected answers, summed over their tokens: (b,), (b,)."""
    return shared_answer_logprobs(model, packed).sum(1).view(-1, 2).unbind(1)


@torch.no_grad()
def sample_pairs(policy, tokenizer, problems, config, dist, seed, pair_up):
    """Sample `config.rollouts` answers to each problem, judge them with the verifier, and call pair_up([(ids, right,
    ended), …], rng) on the answers to each prompt; it returns a list of (chosen, rejected).

    The prompts are split into chunks with a seed each, so any number of ranks finds the same pairs. -> pairs (the same
    list on every rank), the share of right answers.
    """
    R, T, stop_ids = config.rollouts, config.max_new_tokens, tokenizer.stop_ids
    chunks = list(enumerate(problems[i : i + 64] for i in range(0, len(problems), 64)))

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
            yield [{"prompt": prompts[i], "chosen": y_w, "rejected": y_l} for i, (y_w, y_l) in pairs], sum(verdicts)

    sampled = dist.split_work(chunks, work)
    return [pair for pairs, _ in sampled for pair in pairs], sum(right for _, right in sampled) / (len(problems) * R)


@torch.no_grad()
def add_reference(reference, pairs, pad, dist, autocast, size=64):
    """The pairs with the reference's log π of both answers, "ref_chosen" and "ref_rejected"; the ranks split the
    work."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["prompt"]))  # similar lengths need little padding

    def work(own_batches):
        for indices in own_batches:
            packed = batch_of([pairs[i] for i in indices], pad, dist.device).packed
            with autocast():
                logprobs = torch.stack(pair_logprobs(reference, packed), dim=1)  # (b, 2)
            yield logprobs.tolist()

    chunks = dist.split_work([order[i : i + size] for i in range(0, len(order), size)], work)
    logprobs = dict(
        zip(order, (two for chunk in chunks for two in chunk), strict=True)
    )  # {index of the pair: two log π}
    return [p | dict(zip(("ref_chosen", "ref_rejected"), logprobs[i], strict=True)) for i, p in enumerate(pairs)]


def kept_pairs(config):
    """The saved pairs of the run that --resume continues, or None."""
    path = run_path(config) / "pairs.pt"
    if not (config.resume and path.is_file()):
        return None
    try:
        pairs = torch.load(path, weights_only=True)
    except Exception as error:  # torch passes on any error of the unpickler
        raise CheckpointError(f"{path} is corrupt: {str(error).splitlines()[0]}") from None
    for split, of_split in pairs.items():
        for i, pair in enumerate(of_split):
            if not all(math.isfinite(pair.get(name, 0.0)) for name in ("ref_chosen", "ref_rejected")):
                raise CheckpointError(f"{path} is corrupt: the reference's log π of {split} pair {i + 1} is not finite")
    return pairs


def keep_pairs(run, pairs):
    """Save the pairs, once, in the run directory: a resumed run reads them instead of sampling new ones."""
    path = run.path / "pairs.pt"
    if run.dist.is_main and not path.is_file():
        content = io.BytesIO()
        torch.save(pairs, content)
        with must_write(path):
            write_whole(path, content.getvalue())
