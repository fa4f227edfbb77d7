"""Judged answers, the rows of kto: {"prompt", "answer", "good"}, ids of one answer and whether it is good.

Of n_D good and n_U bad answers, choose the weights λ so that λ_D n_D / (λ_U n_U) is between 1 and 4/3. The good answers
may become less likely with the bad ones, and do, with --nll 5 too (results/dpo.md).

With nll 0, λ = 1 and answers of the start model (--pairs sampled, temperature 1), the first gradient is −β/2 times that
of the sampled accuracy: each answer gives ∓β/4 ∇log π_θ(y), and E[∇log π_θ(y)] = 0. Right answers that were cut off are
left out, so in a run it holds nearly.
"""

import random

from support.errors import ConfigError


def one_by_one(answers, rng, most=None):
    """Answers to one prompt, (ids, right, ended) each -> [(ids, right), …] in random order, at most `most`. A good
    answer must have ended by itself. Repeats stay: the more likely an answer, the more often it counts."""
    usable = [(ids, right) for ids, right, ended in answers if ended or not right]
    rng.shuffle(usable)
    return usable[:most]


def prepare_judged(splits, context, config, dist):
    """{split: judged answers} -> the same, the held-out ones with "other"; those of a step come from its own batch.
    Prints the two sides' balance. ConfigError if all training answers are good, or none is."""
    rows = splits["train"]
    good = sum(row["good"] for row in rows)
    if good in (0, len(rows)):
        kind, missing = ("good", "bad") if good else ("bad", "good")
        raise ConfigError(f"all {len(rows)} training answers are {kind}: --variant kto needs {missing} ones too")
    balance = config.weight_desirable * good / (config.weight_undesirable * (len(rows) - good))
    if dist.is_main:
        advice = (
            "" if 1 <= balance <= 4 / 3 else f"; --weight_desirable {config.weight_desirable / balance:.2g} makes it 1"
        )
        print(f"{good:,} of {len(rows):,} training answers are good: λ_D n_D / λ_U n_U is {balance:.2f}{advice}")
    held_out = {split: list(splits[split]) for split in ("valid", "test")}
    for rows in held_out.values():  # a file may hold the answers to a prompt one after another
        random.Random("judged").shuffle(rows)
    return splits | {split: shift_answers(rows, context) for split, rows in held_out.items()}


def shift_answers(rows, context):
    """Each judged answer with "other", the answer of the row before, cut where the context ends."""
    before = [rows[-1], *rows[:-1]]
    return [row | {"other": b["answer"][: context - len(row["prompt"])]} for row, b in zip(rows, before, strict=True)]
