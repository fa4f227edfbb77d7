"""Answers for a reward model: sampled by a policy and judged by the verifier, made into pairs, scored."""

import json
import math
from dataclasses import asdict

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS, Pair, Problem, encode_answer, encode_answers, encode_prompt, load_pairs, load_problems
from evaluate import is_correct, wilson
from generate import generate
from support.errors import CheckpointError, ConfigError
from support.files import must_write, to_json, write_whole
from support.finite import diverged
from support.records import drop_too_long
from support.reward_report import ranked_rightly, sample_figures
from support.runs import run_path


def sample_answers(policy, tokenizer, problems, n, config, split, dist, autocast):
    """n answers of the policy to each problem, at temperature 1: [[(text, right, ended, ids), …], …].

    The samples depend on seed, split and place in the list, not on the number of ranks that share the work.
    """
    chunks = [(i, problems[i : i + 32]) for i in range(0, len(problems), 32)]
    salt = ("train", "valid", "test").index(split)

    def work(own):
        out = []
        for i, chunk in tqdm(
            own, desc=f"sampling {split} answers", unit="batch", leave=False, disable=not dist.is_main
        ):
            generator = torch.Generator().manual_seed((config.seed * 3 + salt) * 1_000_003 + i)
            prompts = [encode_prompt(tokenizer, p) for p in chunk]
            with autocast():
                rollout = generate(
                    policy, prompts, config.max_new_tokens, n, stop_ids=tokenizer.stop_ids, generator=generator
                )
            ended, lengths = rollout.ended(tokenizer.stop_ids).tolist(), rollout.mask.sum(1).tolist()
            ids = [row[:length] for row, length in zip(rollout.ids.tolist(), lengths, strict=True)]
            answers = [
                (text, is_correct(text, chunk[k // n]), end, answer)
                for k, (text, end, answer) in enumerate(zip(rollout.texts(tokenizer), ended, ids, strict=True))
            ]
            out.append([answers[k * n : k * n + n] for k in range(len(chunk))])
        return out

    return [group for chunk in dist.split_work(chunks, work) for group in chunk]


def judged_pairs(problems, groups, most):
    """Right answers against wrong ones to the same problem, at most `most` pairs per problem, without answers that
    were cut off and without repeats. [(text, right, ended), …] per problem -> [Pair]"""
    pairs = []
    for problem, group in zip(problems, groups, strict=True):
        whole = list(dict.fromkeys((text, right) for text, right, ended in group if ended and text.strip()))
        right, wrong = ([text for text, r in whole if r is which] for which in (True, False))
        pairs += [Pair(problem.question, a, b, "sampled") for a, b in list(zip(right, wrong, strict=False))[:most]]
    return pairs


def make_pairs(config, policy, tokenizer, dist, autocast):
    """{"train", "valid", "test": [Pair]} as --data and --pairs ask."""
    levels, pairs = tuple(config.levels), {}
    for split, n in (("train", config.n_pairs), ("valid", config.eval_pairs), ("test", config.test_pairs)):
        pairs[split] = []
        if config.data not in TASKS or config.pairs != "sampled":
            kinds = config.kinds if split == "train" else None  # all kinds equally often
            pairs[split] += load_pairs(config.data, split, n, levels, config.seed, kinds, config.skip_bad)
        if config.data in TASKS and config.pairs != "corrupted":
            problems = load_problems(config.data, split, config.prompts if split == "train" else n, levels)
            groups = sample_answers(policy, tokenizer, problems, config.rollouts, config, split, dist, autocast)
            groups = [[answer[:3] for answer in group] for group in groups]
            # One pair per held-out problem, because the intervals assume independent pairs. With --pairs both a problem
            # has a corrupted and a sampled pair, so the interval of "all" is a little too narrow.
            pairs[split] += judged_pairs(problems, groups, config.rollouts if split == "train" else 1)
    return pairs


def saved_pairs(config):
    """The pairs that the run which --resume continues has kept, {"train", "valid", "test": [Pair]}, or None."""
    path = run_path(config) / "pairs.json"
    if not (config.resume and path.is_file()):
        return None
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        return {split: [Pair(**pair) for pair in kept] for split, kept in pairs.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from None


def save_pairs(run, pairs):
    """Save the pairs in the directory of a new run."""
    path = run.path / "pairs.json"
    if run.dist.is_main and not run.config.resume:
        with must_write(path):
            write_whole(path, to_json({split: list(map(asdict, of_split)) for split, of_split in pairs.items()}))


def fitting_groups(pairs, tokenizer, longest, dist):
    """{split: [Pair]} -> the pairs of at most `longest` tokens, and their ids (see `encode_answers`), {split: list}
    each."""
    kept, groups = {}, {}
    for split in pairs:
        if not pairs[split]:
            raise ConfigError(
                f"no {split} problem got both a right and a wrong answer that ended: use another --init, more "
                "--rollouts, or --pairs both"
            )
        both = [(pair, encode_answers(tokenizer, pair)) for pair in pairs[split]]
        lengths = [len(prompt) + max(map(len, answers)) for _, (prompt, answers) in both]
        both = drop_too_long(both, lengths, longest, f"{split} pair", dist)
        kept[split], groups[split] = map(list, zip(*both, strict=True))
    return kept, groups


@torch.no_grad()
def score_groups(model, groups, pad, device, autocast, tokens=16_384, shown=False):
    """[(prompt ids, lists of answer ids), …] -> a list of scores for each group, of any lengths and numbers.
    shown: a bar on a terminal. DivergedError if one is not finite."""
    model.eval()
    pieces = [(g, k) for g, (_, answers) in enumerate(groups) for k in range(0, len(answers), 64)]
    pieces.sort(key=lambda piece: len(groups[piece[0]][0]))  # prompts of like length waste no padding
    group_of = {(g, k): (groups[g][0], groups[g][1][k : k + 64]) for g, k in pieces}
    size = {piece: len(prompt) + sum(map(len, answers)) for piece, (prompt, answers) in group_of.items()}
    scores = [[0.0] * len(answers) for _, answers in groups]
    bar = tqdm(total=len(pieces), desc="scoring", unit="group", leave=False, disable=None if shown else True)
    while pieces:
        batch, room = [pieces.pop()], tokens
        while pieces and (room := room - size[batch[-1]]) >= size[pieces[-1]]:
            batch.append(pieces.pop())
        with autocast():
            values = model.read(model, model.pack([group_of[piece] for piece in batch], pad, device)).tolist()
        if not all(map(math.isfinite, values)):
            raise diverged("scores")
        for g, k in batch:
            n = len(group_of[g, k][1])
            scores[g][k : k + n], values = values[:n], values[n:]
        bar.update(len(batch))
    bar.close()
    return scores


def score_by_all(model, groups, pad, dist, autocast):
    """As score_groups, shared among the ranks."""
    return dist.split_work(groups, lambda own: score_groups(model, own, pad, dist.device, autocast, shown=dist.is_main))


def rank_pairs(model, groups, pairs, pad, dist, autocast):
    """-> scores of (chosen, rejected) as an array (n, 2), and {kind: (accuracy, low, high, n)}, "all" among them."""
    scores = np.array(score_by_all(model, groups, pad, dist, autocast))  # (n, 2)
    right = ranked_rightly(scores[:, 0] - scores[:, 1])
    by_kind = {}
    for kind in ["all", *sorted({pair.kind for pair in pairs})]:
        chosen = np.array([kind in ("all", pair.kind) for pair in pairs])
        n, hits = int(chosen.sum()), float(right[chosen].sum())  # plain numbers: they are saved
        by_kind[kind] = (hits / n, *wilson(hits, n), n)
    return scores, by_kind


def score_fitting(model, groups, pad, dist, autocast):
    """As score_by_all; NaN for a whole group if one of its answers does not fit the context."""
    context = model.config.context
    fits = [len(prompt) + max(map(len, answers)) <= context for prompt, answers in groups]
    kept = [group for group, fit in zip(groups, fits, strict=True) if fit]
    if len(kept) < len(groups) and dist.is_main:
        n = f"{len(groups) - len(kept)} of {len(groups)}"
        print(f"{n} prompts of the report are, with their answers, longer than {context} tokens: left out")
    scores = iter(score_by_all(model, kept, pad, dist, autocast))
    return [next(scores) if fit else [math.nan] * len(group[1]) for group, fit in zip(groups, fits, strict=True)]


def score_texts(model, tokenizer, groups, dist, autocast):
    """[(prompt, [answers]), …] as text -> lists of scores, NaN where they do not fit the context."""
    encoded = [
        (encode_prompt(tokenizer, Problem(p, "", "")), [encode_answer(tokenizer, a) for a in answers])
        for p, answers in groups
    ]
    return score_fitting(model, encoded, tokenizer.endoftext_id, dist, autocast)


def probe_samples(model, policy, policy_tokenizer, tokenizer, config, sizes, dist, autocast):
    """M = --best_of samples of the policy for each of N test problems -> their scores (N, M), which are correct (N, M),
    and the figures of the report: what else moves the score, ties, the best possible of n for n in sizes."""
    problems = load_problems(config.data, "test", config.best_of_problems, tuple(config.levels))
    groups = sample_answers(policy, policy_tokenizer, problems, config.best_of, config, "test", dist, autocast)
    # The sampled ids are scored, as in PPO: the text of a broken byte would be longer. If the model has another
    # tokenizer than the policy, the text is encoded again, and cut off where the context ends.
    same_tokens = policy_tokenizer.fingerprint == tokenizer.fingerprint
    same_tokens = same_tokens and policy.config.vocab_size <= model.config.vocab_size
    encoded, n_cut = [], 0
    for problem, group in zip(problems, groups, strict=True):
        prompt = encode_prompt(tokenizer, problem)
        answers = [ids if same_tokens else encode_answer(tokenizer, text) for text, _, _, ids in group]
        room = model.config.context - len(prompt)
        n_cut += sum(len(answer) > room for answer in answers)
        encoded.append((prompt, [answer[:room] for answer in answers]))
    if n_cut and dist.is_main:
        print(f"{n_cut} of {len(groups) * config.best_of} sampled answers are longer than the context: cut off")
    scores = np.array(score_by_all(model, encoded, tokenizer.endoftext_id, dist, autocast))  # (N, M)
    correct = np.array([[right for _, right, *_ in group] for group in groups], dtype=float)
    return scores, correct, sample_figures(scores, correct, groups, [answers for _, answers in encoded], sizes)
