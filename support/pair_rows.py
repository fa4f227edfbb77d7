"""The rows that dpo.py trains on and measures with: from texts, or from sampled answers, to ids (support/pairs.py says
what a row is); the flags of them; which of them a step reads, and which a rank measures.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch

from data import DEFAULT_TASK, Judged, encode_answers, load_judged, load_pairs, load_problems, rows_at
from lora import lora_off
from support.checks import Count, Positive, Range
from support.content import records_of
from support.errors import ConfigError
from support.judged import one_by_one, prepare_judged, shift_answers
from support.pairs import add_reference, batch_of, chunks, pair_logprobs, row_of, sample_pairs, saved_pairs, sides_of
from support.questions import splits_with_room
from support.records import load_splits
from support.tasks import TASKS, has_verifier
from support.verified import PolicyConfig


@dataclass
class PairFlags(PolicyConfig):
    """Which pairs, and how many."""

    data: str = DEFAULT_TASK
    """A task (default: built-in problems), gsm8k (sampled pairs), ultrafeedback, hh, style, or a .jsonl of pairs; for
    kto also a .jsonl of single answers, {"prompt", "completion", "label": true or false}."""
    pairs: Literal["sampled", "offline"] | None = None
    """sampled (from the start model, judged by the verifier) or offline (of --data; of a task: corrupted solutions);
    default: sampled if --data has a verifier."""
    prompts: Count = 3000
    """Training prompts to sample answers for; with offline pairs, the largest number of pairs."""
    max_tokens: Count | None = None
    """Longest offline pair, its prompt and its longer answer, in tokens; longer ones are left out. Default: the model's
    context."""
    rollouts: Annotated[int, Range(int, 2)] = 8
    """Sampled answers per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    eval_problems: Count = 200
    """Validation problems (and their pairs) per evaluation."""
    test_problems: Count = 1000
    """Test problems (or pairs) of the evaluations before and after training."""

    def __post_init__(self):
        super().__post_init__()
        if self.pairs is None:
            self.pairs = "sampled" if has_verifier(self.data) else "offline"
        if self.pairs == "sampled" and self.max_tokens is not None:
            raise ConfigError("--max_tokens is for --pairs offline; the length of sampled answers is --max_new_tokens")
        if self.pairs == "offline" and (self.rollouts, self.temperature) != (PairFlags.rollouts, PairFlags.temperature):
            raise ConfigError("--rollouts and --temperature are for --pairs sampled: leave them out")

    @property
    def sizes(self):
        """{split: the most problems or pairs of it}."""
        return {"train": self.prompts, "valid": self.eval_problems, "test": self.test_problems}


def pairs_of_run(policy, tokenizer, config, variant, dist, autocast):
    """-> the pairs of each split, ids, those of its first part if the run is resumed; the problems of each split, for
    greedy accuracy, or None; {name: what was read for them}. The policy is still the start model, but for adapters."""
    context = policy.config.context
    problems = load_verified(config, tokenizer, context, dist)
    texts = load_texts(config, variant.unpaired)
    cut = texts and len(texts["train"]) in (config.prompts, 2 * config.prompts)  # kto makes two answers of a pair
    if cut and config.data not in TASKS and dist.is_main:
        print(f"of {config.data} the first {config.prompts:,} training records are read, no more: --prompts")
    pairs = saved_pairs(config)
    if pairs is None:
        with lora_off(policy):
            pairs = make_pairs(policy, tokenizer, problems, texts, config, variant, dist, autocast)
    records = {split: [read[split] for read in (problems, texts) if read] for split in config.sizes}
    return pairs, problems, records_of(config.data, records)


def load_verified(config, tokenizer, context, dist):
    """{split: problems that fit the context with their answers}; None if the data has no verifier."""
    if not has_verifier(config.data):
        return None
    load = partial(load_problems, config.data, levels=tuple(config.levels), skip_bad=config.skip_bad)
    return splits_with_room(load, config.sizes, config, tokenizer, context, dist)


def load_texts(config, unpaired):
    """{split: offline pairs, or judged answers}, as text; {} if the pairs are sampled."""
    if config.pairs == "sampled":
        return {}
    load = partial(load_judged if unpaired else load_pairs, config.data, levels=tuple(config.levels))
    return {split: load(split, n, seed=config.seed, skip_bad=config.skip_bad) for split, n in config.sizes.items()}


def make_pairs(policy, tokenizer, problems, texts, config, variant, dist, autocast):
    """{"train", "valid", "test"}: rows of ids, with their log π_ref if the variant uses it. The policy is still the
    start model: it answers the problems, and it is the reference. texts: of `load_texts`; variant: a row of
    dpo.VARIANTS."""
    policy.eval()
    context, pad = policy.config.context, tokenizer.endoftext_id
    if texts:
        pairs = encode_splits(partial(encode_pair, tokenizer), texts, config, context, dist)
    else:
        sample, rule = partial(sample_pairs, policy, tokenizer), one_by_one if variant.unpaired else pair_up
        pairs = sample_splits(sample, rule, problems, config, dist, autocast)
    if variant.unpaired:
        pairs = prepare_judged(pairs, context, config, dist)
    if variant.uses_reference:
        pairs = {split: add_reference(policy, of_split, pad, dist, autocast) for split, of_split in pairs.items()}
    return pairs


def encode_pair(tokenizer, pair):
    """A `data.Pair` or `data.Judged`, text, as ids."""
    prompt, answers = encode_answers(tokenizer, pair)
    return row_of(prompt, *answers, *([pair.good] if isinstance(pair, Judged) else []))


def encode_splits(encode, texts, config, context, dist):
    """{split: texts} -> {split: rows of ids that fit the context}. encode: `encode_pair` with a tokenizer."""

    def load(split, n):
        return [encode(pair) for pair in texts[split]]

    def length(pair):
        return len(pair["prompt"]) + max(len(pair[side]) for side in sides_of(pair))

    longest = min(context, config.max_tokens or context)
    label = "answer" if isinstance(next(iter(texts.values()))[0], Judged) else "pair"
    return load_splits(load, config.sizes, length, longest, label, dist)


def pair_up(answers, rng, most=None):
    """Answers to one prompt, (ids, right, ended) each -> [(chosen, rejected), …]: right ones with wrong ones, drawn by
    rng, each in one pair, at most `most` pairs. A chosen answer must have ended by itself; repeats count once."""
    sides = {True: [], False: []}
    for ids, right, ended in answers:
        if ids not in sides[right] and (ended or not right):
            sides[right].append(ids)
    for side in sides.values():
        rng.shuffle(side)
    return list(zip(sides[True], sides[False], strict=False))[:most]


def sample_splits(sample, rule, problems, config, dist, autocast):
    """{split: problems} -> {split: pairs of sampled answers}, or judged answers. ConfigError if a split has none.
    sample: `sample_pairs` of a policy; rule: `pair_up` or `one_by_one`."""
    splits = {}
    for number, (split, asked) in enumerate(problems.items()):
        pick = rule if split == "train" else partial(rule, most=1)  # held-out pairs should be independent
        with autocast():
            seed = config.seed * 3 + number
            splits[split], right = sample(asked, config, dist, seed, pick)
        if not splits[split]:
            raise ConfigError(
                f"no {split} prompt got both a right and a wrong answer ({right:.1%} of all are right): give "
                "another --init, more --rollouts or more --prompts"
            )
        if dist.is_main:
            answers = f"{config.rollouts} answers to {len(asked):,} prompts, {right:.1%} right"
            kept = "judged ones" if rule is one_by_one else "pairs"
            print(f"{split}: {len(splits[split]):,} {kept} from {answers}")
    return splits


def next_pairs(pairs, step, config, dist, context):
    """This rank's share of the step's rows, sorted by the prompt's length: micro-batches need less padding. Judged
    answers have an "other", from the whole batch."""
    n = dist.per_rank("batch", config.batch)
    batch = [pairs[i] for i in rows_at(len(pairs), step, config.batch, config.seed)]
    batch = shift_answers(batch, context) if "answer" in batch[0] else batch
    return sorted(batch[dist.rank * n : (dist.rank + 1) * n], key=lambda pair: len(pair["prompt"]))


def held_out_share(pairs, dist):
    """This rank's rows, and their weight: a rank without any scores one with weight 0, because all ranks must sum the
    same names."""
    own = pairs[dist.rank :: dist.world]
    rows = sorted(own or pairs[:1], key=lambda row: len(row["prompt"]) + len(row[sides_of(row)[0]]))
    return rows, 1 if own else 0


@torch.no_grad()
def reference_point(policy, judged, pad, dist, autocast, start=None, weight=1):
    """KTO's z0 = max(0, the mean of log π(y'|x) − log π_ref(y'|x)) over the judged answers of all ranks. y', their
    "other", is another prompt's answer: that of the previous row in the batch. It is taken once, of the whole step: a
    z0 per micro-batch would change the objective; with one row y' = y, so z0 = max(0, u).

    start: π_ref (None: the policy without its adapters), not needed for held-out answers, which know "ref_other".
    weight: 0 on a rank without answers of its own."""
    policy.eval()
    start = start and start.to(dist.device)
    total = 0.0
    for rows in chunks(judged, ("other",)):
        batch = batch_of(rows, pad, dist.device, sides=("other",))
        (ref,) = batch.ref_logps  # (b,), or None
        with autocast():
            (logps,) = pair_logprobs(policy, batch.packed)  # (b,)
            if ref is None:
                with lora_off(policy):
                    (ref,) = pair_logprobs(start or policy, batch.packed)  # (b,)
        total += weight * (logps - ref).sum().item()
    total, n = dist.sum(total, weight * len(judged))
    return max(0.0, total / n)
