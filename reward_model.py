"""A reward model: which of two answers is better, learned from pairs (Bradley and Terry 1952; arXiv:2203.02155).

A decoder reads the prompt and one answer; a linear head turns the state at the answer's last token into one number,
the score r. The pair's better answer should score higher:

    p(y_w beats y_l) = σ(r_w − r_l)                              the Bradley-Terry model
    L = −log σ(r_w − r_l − margin)                               gradient −σ(−Δ): none left once a pair is clear
    hinge = max(0, margin − (r_w − r_l))                         stops exactly at the margin
    centring c · (r_w + r_l)²                                    arXiv:2312.09244: scores mean nothing absolutely, so
                                                                 adding a constant to all changes L by nothing at all;
                                                                 this pulls them to zero, which PPO's value head likes

Both answers of a pair follow the same prompt, so it is computed once, and both read its keys and values (`sft.pack`).

To see that 5 + 3 = 9 is wrong, a model must know the sum and compare. The policy does know it (its log π orders 96 %
of such pairs rightly), but only in its last layer, where it predicts the next token, and a head on the last token
learns to ask for it slowly: 56 % after 100 steps. Two things help, both on by default. `--extra_layers`: new blocks on
top of the policy's, which can compare what came with what was predicted. `--sft_weight`: the chosen answers' own loss,
read from the same states, keeps and improves what the trunk knows (arXiv:2406.10216).

Pairs: solutions against corrupted ones (one error of a known kind), the SFT model's own samples judged by the
verifier (a right and a wrong answer to one prompt), or real ones: ultrafeedback, style, any JSONL. PPO needs the
second kind: what a policy writes is wrong in other ways than what a program corrupts.

A reward model is a proxy. The report therefore shows where it can be trusted: accuracy by kind of error with
intervals, calibration, the scores themselves, whether new names or items change an order, whether two errors score
below one, what else moves the score (length, format), and best-of-n by the score against the truth for n = 1 … 64,
the cheapest way to see a proxy being over-optimised (arXiv:2210.10760).

The checkpoint is a directory that transformers opens as Qwen3ForSequenceClassification with one label.

Run it:
    python reward_model.py                                                  # makes its SFT start if there is none
    python reward_model.py --data style                                     # real pairs, pretrains on their text
    torchrun --nproc_per_node 2 reward_model.py --init runs/sft --pairs sampled
"""

import contextlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import pretrain
from data import DEFAULT_TASK, TASKS, Pair, encode_group, load_pairs, load_problems, rows_at, task_of
from encoder import Encoder, is_encoder, open_encoder
from evaluate import is_correct, wilson
from generate import generate
from optim import lr_at, make_optimizers, optimizer_step
from sft import collate, sft_start
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.checks import Amount, Count, FractionBelow1, Whole
from support.cli import run_script
from support.devices import precision, setup
from support.errors import CheckpointError, ConfigError
from support.hf import load_decoder, open_safetensors, save_decoder
from support.logprobs import target_logprobs
from support.records import drop_too_long
from support.reward_report import consistency, length_figures, sample_figures, write_report
from support.runs import RUNS, Run, RunConfig, make_start_once, run_path, start_name
from support.shared_prompt import pack
from tokenizer_bpe import load_tokenizer
from transformer import Transformer, TransformerConfig

# ---------------------------------------------------------------------------------------------------------------
# The objectives, as pure functions.


def bradley_terry_loss(chosen, rejected, margin=None, *, centre=0.0, n_pairs=None):
    """Scores (B,) each -> (loss, metrics): −log σ(chosen − rejected − margin), averaged.

    margin: None, a number or (B,). centre: weight of (chosen + rejected)², in the loss alone: the metric is what a
    validation measures, whatever the weight. n_pairs: of the whole optimizer step, over
    micro-batches and ranks; default: of this batch, which is then the step.
    """
    gap = chosen - rejected
    per_pair = -F.logsigmoid(gap if margin is None else gap - margin)
    return _reduce(per_pair, chosen, rejected, centre, n_pairs)


def hinge_loss(chosen, rejected, margin=1.0, *, centre=0.0, n_pairs=None):
    """The same with max(0, margin − (chosen − rejected))."""
    return _reduce((margin - (chosen - rejected)).clamp(min=0), chosen, rejected, centre, n_pairs)


@dataclass(frozen=True)
class Loss:
    """(chosen, rejected, margin, *, centre, n_pairs) -> (loss, metrics), the margin that it goes with, and its unit."""

    of: Callable
    margin: float = 0.0
    unit: str = "per pair"


LOSSES = {"bradley_terry": Loss(bradley_terry_loss, unit="nats per pair"), "hinge": Loss(hinge_loss, margin=1.0)}


def _reduce(per_pair, chosen, rejected, centre, n_pairs):
    n = n_pairs or len(chosen)
    loss = per_pair.sum() / n
    gap = (chosen - rejected).detach()
    metrics = {"loss": loss.item(), "accuracy": ((gap > 0) + 0.5 * (gap == 0)).mean().item()}
    if centre:
        loss = loss + centre * (chosen + rejected).square().sum() / n
    return loss, metrics | {"margin": gap.mean().item(), "score": (chosen + rejected).mean().item() / 2}


# ---------------------------------------------------------------------------------------------------------------
# The model.


SCORE = {"head.weight": "score.weight"}  # our name, and that in a file


class RewardModel(Transformer):
    """A decoder whose output matrix is one row: forward gives a score at every token, (B, T, 1)."""

    pad_id = None  # only to be written into config.json

    def __init__(self, config):
        super().__init__(replace(config, tie_embeddings=True))  # there is no output matrix to tie
        self.head = nn.Linear(self.config.width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(self.config.width))

    def forward(self, tokens, positions=None, mask=None, cache=None, *, last_only=False, targets=None, counted=None):
        """(B, T) -> scores (B, T, 1). With targets also the language model's log π of them, (B, T), 0 but where counted
        (B, T) is True: read from the same states by the matrix of the embedding."""
        states = self.hidden(tokens, positions, mask, cache, last_only)  # (B, T, C)
        with torch.autocast(states.device.type, enabled=False):  # in bf16 the scores of two like answers would tie
            scores = self.head(states.to(self.head.weight.dtype))  # (B, T, 1)
        if targets is None:
            return scores
        return scores, target_logprobs(states, self.embed.weight, targets, counted=counted)

    @classmethod
    def from_policy(cls, policy, dropout=0.0, seed=0, extra=0):
        """The trunk of a language model, `extra` new blocks on it that add nothing yet (with post-norm they normalise
        once more), and a new head. CheckpointError on a policy whose config says more than this class computes."""
        if type(policy.config) is not cls.config_class:
            raise CheckpointError(f"{cls.__name__} cannot be built on the policy's {type(policy.config).__name__}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(replace(policy.config, dropout=dropout, n_layer=policy.config.n_layer + extra))
        for name, parameter in model.blocks[policy.config.n_layer :].named_parameters():
            if name.endswith(("attn.wo.weight", "down.weight", "ffn.down")):
                nn.init.zeros_(parameter)
        state = {k: v for k, v in policy.state_dict().items() if not k.startswith("head.")}
        model.load_state_dict(model.state_dict() | state)
        return model

    @staticmethod
    def pack(groups, pad, device="cpu"):
        """[(prompt ids, lists of answer ids), …] -> PackedAnswers on the device, each answer with one token more: it
        packs what predicts an answer, and the last token, where the score stands, predicts nothing."""
        answers = [[[*answer, pad] for answer in group] for _, group in groups]
        return pack([prompt for prompt, _ in groups], answers, pad).to(device)

    @staticmethod
    def read(model, packed, words=False):
        """-> the score of each answer, (k,). With `words`, of groups of R answers each, also the mean log π of the
        tokens of each group's first answer, (n,). `model` may be wrapped in DDP."""
        n, k = len(packed.tokens), len(packed.lengths)

        def first_answers(part):  # of the last token, added in `pack`, no log π is asked for
            spoken = torch.arange(part.tokens.shape[1], device=part.rows.device) < packed.lengths[part.rows, None] - 1
            first = part.rows % (k // n) == 0  # (b,)
            return {"targets": part.targets, "counted": spoken & first[:, None]}  # (b, T) each

        scores, logprobs = [], []
        for part, out in zip(packed.parts, packed.outputs(model, first_answers if words else None), strict=True):
            end = packed.lengths[part.rows, None] - 1  # (b, 1) where the last tokens stand
            if words:
                out, logs = out
                logprobs.append(logs.sum(1, keepdim=True) / end)  # (b, 1), 0 where it is not the first
            scores.append(out.squeeze(-1).gather(1, end))  # (b, 1)
        scores = packed.in_order(scores).squeeze(1).float()  # (k,)
        return (scores, packed.in_order(logprobs).view(n, -1)[:, 0]) if words else scores

    def save_pretrained(self, path):
        """As transformers' …ForSequenceClassification with num_labels 1 saves it: the trunk, and `score.weight`."""

        def entries(config):
            kinds = [re.sub("ForCausalLM|LMHeadModel", "", kind) for kind in config.get("architectures", [])]
            more = {"architectures": [f"{kind}ForSequenceClassification" for kind in kinds]}
            more |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
            return more | {"pad_token_id": self.pad_id}  # transformers finds an answer's end by it

        save_decoder(self, path, SCORE, entries)

    @classmethod
    def from_pretrained(cls, path, dropout=0.0):
        """Raises CheckpointError, also if the directory holds a language model instead."""
        path = Path(path)
        if SCORE["head.weight"] not in open_safetensors(path)[0]:
            raise CheckpointError(f"{path} has no score head: it is no reward model; python reward_model.py makes one")
        model = load_decoder(cls, path, dropout=dropout, head=SCORE)
        model.pad_id = json.loads((path / "config.json").read_text()).get("pad_token_id")
        return model


class RewardEncoder(Encoder):
    """The bidirectional form: an answer may be read from both sides, as nobody has to predict it. The score is a linear
    function of the mean of the states, (B, 1)."""

    pad_id = None

    def __init__(self, config):
        super().__init__(replace(config, n_class=1))
        for part in (self.transform, self.transform_norm):  # masked-LM is over; DDP waits for whatever wants a gradient
            part.requires_grad_(False)
        self.token_bias.requires_grad_(False)

    @classmethod
    def from_policy(cls, policy, dropout=0.0, seed=0, extra=0):
        """From an encoder or a decoder."""
        return cls.from_trunk(policy, dropout, seed, n_class=1, n_layer=policy.config.n_layer + extra)

    @staticmethod
    def pack(groups, pad, device="cpu"):
        """-> tokens, real (k, T). Nothing can be shared: the prompt's states depend on the answer after it."""
        rows = [[*prompt, *answer] for prompt, answers in groups for answer in answers]
        padded = collate([(row, [True] * len(row)) for row in rows], pad).to(device)
        return padded.tokens, padded.mask

    @staticmethod
    def read(model, packed):
        """-> the score of each answer, (k,)."""
        return model(*packed).squeeze(1).float()


def open_reward_model(path, device="cpu", dropout=0.0):
    """-> (RewardModel or RewardEncoder, tokenizer, directory)."""
    path = resolve_checkpoint(path)
    kind = RewardEncoder if is_encoder(path) else RewardModel
    model = kind.from_pretrained(path, dropout)
    if kind is RewardEncoder and model.config.n_class != 1:
        raise CheckpointError(f"{path} is an encoder of {model.config.n_class} labels, no reward model")
    return model.to(device), load_tokenizer(path), path


@torch.no_grad()
def score_groups(model, groups, pad, device, autocast, tokens=16_384):
    """[(prompt ids, lists of answer ids), …] -> a list of scores for each group, whatever their lengths and numbers."""
    model.eval()
    pieces = [(g, k) for g, (_, answers) in enumerate(groups) for k in range(0, len(answers), 64)]
    pieces.sort(key=lambda piece: len(groups[piece[0]][0]))  # prompts of like length waste no padding
    row = {(g, k): (groups[g][0], groups[g][1][k : k + 64]) for g, k in pieces}
    size = {piece: len(prompt) + sum(map(len, answers)) for piece, (prompt, answers) in row.items()}
    found = [[0.0] * len(answers) for _, answers in groups]
    while pieces:
        batch, room = [pieces.pop()], tokens
        while pieces and (room := room - size[batch[-1]]) >= size[pieces[-1]]:
            batch.append(pieces.pop())
        with autocast():
            values = model.read(model, model.pack([row[piece] for piece in batch], pad, device)).tolist()
        for g, k in batch:
            n = len(row[g, k][1])
            found[g][k : k + n], values = values[:n], values[n:]
    return found


# ---------------------------------------------------------------------------------------------------------------
# Pairs.


def ids_of_prompt(tokenizer, prompt):
    """The ids of a question, up to where its answer begins."""
    return tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)[0]


def ids_of_answer(tokenizer, answer):
    """The ids of an answer and its end, as a policy would have sampled them."""
    return [*tokenizer.encode(answer), tokenizer.im_end_id]


def sample_answers(policy, tokenizer, problems, n, config, split, dist, autocast, batch=32):
    """n answers of the policy to each problem, at temperature 1: [[(text, right, ended, ids), …], …].

    What is sampled depends on seed, split and place in the list alone, not on how many ranks share the work.
    """
    chunks = [(i, problems[i : i + batch]) for i in range(0, len(problems), batch)]
    salt = ("train", "valid", "test").index(split)

    def work(mine):
        out = []
        for i, chunk in tqdm(
            mine, desc=f"sampling {split} answers", unit="batch", leave=False, disable=not dist.is_main
        ):
            generator = torch.Generator().manual_seed((config.seed * 3 + salt) * 1_000_003 + i)
            prompts = [ids_of_prompt(tokenizer, p.question) for p in chunk]
            how = {"stop_ids": tokenizer.stop_ids, "generator": generator}
            with autocast():
                rollout = generate(policy, prompts, config.max_new_tokens, n, **how)
            ended, lengths = rollout.ended(tokenizer.stop_ids).tolist(), rollout.mask.sum(1).tolist()
            ids = [row[:length] for row, length in zip(rollout.ids.tolist(), lengths, strict=True)]
            told = enumerate(zip(rollout.texts(tokenizer), ended, ids, strict=True))
            rows = [(text, is_correct(text, chunk[k // n]), end, i) for k, (text, end, i) in told]
            out.append([rows[k * n : k * n + n] for k in range(len(chunk))])
        return out

    return [group for chunk in dist.split_work(chunks, work) for group in chunk]


def judged_pairs(problems, groups, most):
    """Right answers against wrong ones to the same problem, at most `most` pairs of each; cut-off answers are left
    out, and so are repeats. [(text, right, ended), …] per problem -> [Pair]"""
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
            kinds = config.kinds if split == "train" else None  # all alike
            pairs[split] += load_pairs(config.data, split, n, levels, config.seed, kinds, config.skip_bad)
        if config.data in TASKS and config.pairs != "corrupted":
            problems = load_problems(config.data, split, config.sample_problems if split == "train" else n, levels)
            groups = sample_answers(policy, tokenizer, problems, config.samples, config, split, dist, autocast)
            groups = [[row[:3] for row in group] for group in groups]
            # one pair per held-out problem and source, as an interval takes them for independent; that of "all" does so
            # too, although with --pairs both a problem has a corrupted and a sampled one, and is a little too narrow
            pairs[split] += judged_pairs(problems, groups, config.samples if split == "train" else 1)
    return pairs


# ---------------------------------------------------------------------------------------------------------------
# The report: where the scores can be trusted.


def rank_pairs(model, groups, pairs, pad, dist, autocast):
    """-> scores of (chosen, rejected) as an array (n, 2), and {kind: (accuracy, low, high, n)}, "all" among them."""
    found = dist.split_work(groups, lambda mine: score_groups(model, mine, pad, dist.device, autocast))
    found = np.array(found)  # (n, 2)
    right = (found[:, 0] > found[:, 1]) + 0.5 * (found[:, 0] == found[:, 1])  # a tie is half right, as a coin would be
    by_kind = {}
    for kind in ["all", *sorted({pair.kind for pair in pairs})]:
        chosen = np.array([kind in ("all", pair.kind) for pair in pairs])
        n, hits = int(chosen.sum()), float(right[chosen].sum())  # plain numbers: `best` goes into trainer_state.pt
        by_kind[kind] = (hits / n, *wilson(hits, n), n)
    return found, by_kind


def score_fitting(model, groups, pad, dist, autocast):
    """As score_groups, spread over the ranks; NaN for a whole group if one of its answers does not fit the context."""
    context = model.config.context
    fits = [len(prompt) + max(map(len, answers)) <= context for prompt, answers in groups]
    kept = [group for group, fit in zip(groups, fits, strict=True) if fit]
    if len(kept) < len(groups) and dist.is_main:
        n = f"{len(groups) - len(kept)} of {len(groups)}"
        print(f"{n} prompts of the report are, with their answers, longer than {context} tokens: left out")
    found = iter(dist.split_work(kept, lambda mine: score_groups(model, mine, pad, dist.device, autocast)))
    return [next(found) if fit else [math.nan] * len(group[1]) for group, fit in zip(groups, fits, strict=True)]


def calibration(gaps, bins=8):
    """Score differences (n,) -> [(mean predicted, share right, n), …] and the expected calibration error.

    σ(|Δ|) is how sure the model is of the answer that it prefers; the share in which that is the chosen one should
    be the same.
    """
    sure, right = 1 / (1 + np.exp(-np.abs(gaps))), (gaps > 0) + 0.5 * (gaps == 0)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    inside = [place == b for b in sorted(set(place.tolist()))]
    rows = [(float(sure[b].mean()), float(right[b].mean()), int(b.sum())) for b in inside]
    return rows, sum(n * abs(p - r) for p, r, n in rows) / len(gaps)


def best_of_n(scores, correct, sizes):
    """scores, correct (N, M) -> the expected accuracy of the best of n by score, for each n, over all choices of n out
    of the M samples: sample of rank k from below is the best with probability C(k, n−1) / C(M, n), k from 0."""
    M = scores.shape[1]
    ordered = np.take_along_axis(correct, scores.argsort(1, kind="stable"), 1)  # (N, M), worst score first
    return [float((ordered * [math.comb(k, n - 1) / math.comb(M, n) for k in range(M)]).sum(1).mean()) for n in sizes]


def score_texts(model, tokenizer, groups, dist, autocast):
    """[(prompt, [answers]), …] in words -> lists of scores, NaN where they do not fit the context."""
    encoded = [(ids_of_prompt(tokenizer, p), [ids_of_answer(tokenizer, a) for a in answers]) for p, answers in groups]
    return score_fitting(model, encoded, tokenizer.endoftext_id, dist, autocast)


def probe_samples(model, policy, speaks, tokenizer, config, dist, autocast):
    """Best-of-n, what shapes the score, and ties, on samples of the policy for test problems."""
    problems = load_problems(config.data, "test", config.best_of_problems, tuple(config.levels))
    groups = sample_answers(policy, speaks, problems, config.best_of, config, "test", dist, autocast)
    # Scored as they were sampled, as PPO does: of broken bytes the text is longer than they were. To a tokenizer of its
    # own only the text can be shown, cut off where the context ends.
    known = speaks.fingerprint == tokenizer.fingerprint and policy.config.vocab_size <= model.config.vocab_size
    encoded, n_cut = [], 0
    for problem, group in zip(problems, groups, strict=True):
        prompt = ids_of_prompt(tokenizer, problem.question)
        answers = [ids if known else ids_of_answer(tokenizer, text) for text, _, _, ids in group]
        room = model.config.context - len(prompt)
        n_cut += sum(len(answer) > room for answer in answers)
        encoded.append((prompt, [answer[:room] for answer in answers]))
    if n_cut and dist.is_main:
        print(f"{n_cut} of {len(groups) * config.best_of} sampled answers are longer than the context: cut off")
    pad = tokenizer.endoftext_id
    scores = np.array(
        dist.split_work(encoded, lambda own: score_groups(model, own, pad, dist.device, autocast))
    )  # (N, M)
    correct = np.array([[right for _, right, *_ in group] for group in groups], dtype=float)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= config.best_of]
    figures = sample_figures(scores, groups, [answers for _, answers in encoded], sizes)
    return {"best_of": dict(zip(map(str, sizes), best_of_n(scores, correct, sizes), strict=True))} | figures


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RunConfig):
    """Train a reward model on pairs of answers."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), ultrafeedback, hh, style, or the path of a .jsonl of prompt,
    chosen, rejected."""
    skip_bad: bool = False
    """Skip and count records that cannot be used, instead of stopping at the first one."""
    pairs: Literal["corrupted", "sampled", "both"] | None = None
    """Pairs of a task: corrupted solutions, answers sampled from --init and judged by the verifier, or both; default:
    both, or sampled for a task without corruptions."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    n_pairs: Count | None = None
    """Largest number of training pairs; default: 12,000 corrupted ones, or all pairs of a file."""
    kinds: list[str] | None = None
    """Kinds of errors in the corrupted training pairs; a kind named twice occurs twice as often. Default: all kinds,
    and the task's first (a wrong sum, the hardest to see) four times as often. Test pairs have all kinds equally
    often."""
    sample_problems: Count = 3000
    """Training problems to sample pairs from."""
    samples: Count = 8
    """Answers sampled per problem."""
    max_new_tokens: Count = 64
    """Longest sampled answer, in tokens."""
    init: str | None = None
    """SFT checkpoint that the trunk starts from and that samples answers; default: one trained once into runs/start."""
    backbone: Literal["decoder", "encoder"] = "decoder"
    """decoder (score at the last token), or encoder (bidirectional; --init may be of either kind)."""
    extra_layers: Whole = 2
    """New blocks on top of those of --init."""
    sampler: str | None = None
    """SFT checkpoint whose samples are judged; default: --init."""
    name: str = "reward_model"
    steps: Count = 600
    batch: Count = 64
    """Pairs per optimizer step, over all ranks."""
    micro_batch: Count = 32
    """Pairs per forward pass of one rank; fewer means gradient accumulation and less memory."""
    loss: Literal[tuple(LOSSES)] = "bradley_terry"
    """bradley_terry or hinge."""
    margin: float | None = None
    """Margin by which the chosen answer should win; default: 0, or 1 for the hinge."""
    centre: float = 0.01
    """Weight of the squared sum of the two scores."""
    sft_weight: float | None = None
    """Weight of the SFT loss per token on the chosen answers; default: 1, or 0 for an encoder, which has no such
    loss."""
    weight_decay: Amount = 0.01
    dropout: FractionBelow1 = 0.0
    """Dropout while training."""
    eval_pairs: Count = 200
    """Validation pairs (and problems to sample from)."""
    test_pairs: Count = 500
    """Test pairs of the last evaluation."""
    best_of: Count = 64
    """Samples per problem of the best-of-n curve."""
    best_of_problems: Whole = 100
    """Problems in the report on samples (best of n, what the score depends on); 0 turns it off."""

    def __post_init__(self):
        super().__post_init__()
        corruptions = list(TASKS.get(self.data, TASKS[DEFAULT_TASK]).corruptions)
        if self.pairs is None:
            self.pairs = "both" if corruptions else "sampled"
        if self.kinds is None:
            self.kinds = corruptions[:1] * 3 + corruptions
        if unknown := set(self.kinds) - set(corruptions):
            raise ConfigError(f"--kinds holds {min(unknown)!r}; choose some of {', '.join(corruptions)}")
        if self.sampler is not None and self.data not in TASKS:
            raise ConfigError(f"--sampler has no use here: there is no verifier to judge answers to {self.data}")
        if self.margin is None:
            self.margin = LOSSES[self.loss].margin
        if self.sft_weight is None:
            self.sft_weight = 1.0 if self.backbone == "decoder" else 0.0
        if self.sft_weight and self.backbone == "encoder":
            raise ConfigError(
                "--sft_weight needs a decoder: an encoder has seen the word that it would have to predict"
            )
        if self.n_pairs is None and self.data in TASKS:
            self.n_pairs = 12_000


def text_start(config, dist):
    """A pretrained trunk for real pairs without --init, on the text of their training split; made once, and reused."""
    run_path(config)  # what is wrong with --name or --resume is said before a start is made
    name = start_name(config.data, config.seed, "pretrain")
    text = RUNS / f"{name}.txt"
    if dist.is_main and not (RUNS / name / "finished").exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        pairs = load_pairs(config.data, "train", None, skip_bad=config.skip_bad)
        text.write_text("\n\n".join(f"{p.prompt}\n{p.chosen}\n\n{p.rejected}" for p in pairs), encoding="utf-8")
    if dist.world > 1:
        distributed.barrier()
    settings = {"data": str(text), "vocab_size": 2048, "model": TransformerConfig(context=512), "steps": 200}
    settings |= {"seed": config.seed, "device": config.device, "dtype": config.dtype}
    what = f"no --init given: pretraining a start on the text of the pairs of {config.data}"
    return make_start_once(name, what, pretrain, settings, dist)


def open_trunk(config, init, dist):
    """-> the model to train, the policy whose samples are judged (None if there is none), and their tokenizers."""
    path, policy, speaks = resolve_checkpoint(init), None, None
    if is_encoder(path):
        if config.backbone == "decoder":
            raise ConfigError(f"{path} is an encoder: --backbone encoder")
        trunk, tokenizer, _ = open_encoder(path)
        if config.sampler is None and config.data in TASKS and config.pairs != "corrupted":
            raise ConfigError(f"{path} is an encoder and writes no answers: --sampler RUN, or --pairs corrupted")
    else:
        trunk, tokenizer, _ = open_checkpoint(path)
        if config.sft_weight and not trunk.config.tie_embeddings:
            raise ConfigError(f"{path} has an output matrix of its own, which a reward model drops: --sft_weight 0")
    if config.data in TASKS and (config.sampler is not None or not is_encoder(path)):
        policy, speaks, _ = open_checkpoint(config.sampler or path, dist.device)
    kind = RewardEncoder if config.backbone == "encoder" else RewardModel
    raw = kind.from_policy(trunk, config.dropout, config.seed, config.extra_layers).to(dist.device)
    raw.pad_id = tokenizer.endoftext_id
    return raw, policy, tokenizer, speaks


def check_room(config, judge, policy, tokenizer, speaks):
    """The report on samples is the last thing that is done, but whether it can be done is said now. ConfigError."""
    problems = load_problems(config.data, "test", max(200, config.best_of_problems), tuple(config.levels))
    answers = [max(config.max_new_tokens, len(ids_of_answer(tokenizer, p.solution))) for p in problems]
    scored = max(len(ids_of_prompt(tokenizer, p.question)) + n for p, n in zip(problems, answers, strict=True))
    written = max(len(ids_of_prompt(speaks, p.question)) for p in problems) + config.max_new_tokens
    for n, room in ((scored, judge.config.context), (written, policy.config.context)):
        if n > room:
            raise ConfigError(
                f"prompts with their solutions or --max_new_tokens, {n} tokens together, do not fit the model's "
                f"context of {room}: use lower --levels, or leave out the report on samples with "
                "--best_of_problems 0"
            )


def fitting_groups(pairs, tokenizer, context, dist):
    """{split: [Pair]} -> the pairs that fit the context, and their ids (see `encode_group`), {split: list} each."""
    kept, groups = {}, {}
    for split in pairs:
        if not pairs[split]:
            raise ConfigError(
                f"no {split} problem got both a right and a wrong answer that ended: give another --init, more "
                "--samples, or --pairs both"
            )
        both = [(pair, encode_group(tokenizer, pair)) for pair in pairs[split]]
        lengths = [len(prompt) + max(map(len, answers)) for _, (prompt, answers) in both]
        both = drop_too_long(both, lengths, context, f"{split} pair", dist)
        kept[split], groups[split] = map(list, zip(*both, strict=True))
    return kept, groups


def main(config):
    """Train; returns {"accuracy", "low", "high", "by_kind", "path"} on the test split, and the report's figures."""
    dist = setup(config.device)
    share = dist.per_rank("batch", config.batch)  # pairs of a step on this rank
    autocast, scaler = precision(config.dtype, dist)
    run_path(config)  # what is wrong with --name or --resume is said before anything is made or sampled,
    pairs = None
    if config.data not in TASKS:  # and so is a wrong name, or a split without a pair
        pairs = make_pairs(config, None, None, dist, autocast)
    init = config.init or (sft_start if config.data in TASKS else text_start)(config, dist)
    judge, policy, tokenizer, speaks = open_trunk(config, init, dist)
    pad, probed = tokenizer.endoftext_id, config.data in TASKS and config.best_of_problems and policy is not None
    if probed:
        check_room(config, judge, policy, tokenizer, speaks)
    file = RUNS / config.name / "pairs.json"  # sampled once in a run's life: a GPU may sample others the next time
    if config.resume and file.is_file():
        pairs = {split: [Pair(**pair) for pair in kept] for split, kept in json.loads(file.read_text()).items()}
    elif pairs is None:
        pairs = make_pairs(config, policy, speaks, dist, autocast)
    fitted, groups = fitting_groups(pairs, tokenizer, judge.config.context, dist)

    optimizers = make_optimizers(judge, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    run = Run(config, dist, judge, tokenizer, optimizers, scaler, best=-1.0)
    if dist.is_main and not config.resume and config.data in TASKS and config.pairs != "corrupted":
        Path(f"{file}.tmp").write_text(json.dumps({split: list(map(asdict, kept)) for split, kept in pairs.items()}))
        os.replace(f"{file}.tmp", file)
    pairs = fitted
    model = DistributedDataParallel(judge, broadcast_buffers=False) if dist.world > 1 else judge
    objective = LOSSES[config.loss]
    if dist.is_main:
        kinds = Counter(pair.kind for pair in pairs["train"])
        print(
            f"{judge.num_params():,} parameters from {init}; {len(pairs['train']):,} training pairs "
            f"({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())}), {config.steps} steps of {config.batch} = "
            f"{config.steps * config.batch / len(pairs['train']):.1f} epochs"
        )

    for step in run.steps():
        # ------------------------------------------------------------------ one optimizer step
        started = time.perf_counter()
        model.train()
        batch = [groups["train"][i] for i in rows_at(len(groups["train"]), step, config.batch, config.seed)]
        own = batch[dist.rank * share : (dist.rank + 1) * share]
        own.sort(key=lambda group: len(group[0]))  # prompts of like length waste no padding
        sums = {}
        for i in range(0, share, config.micro_batch):
            micro = own[i : i + config.micro_batch]
            last = i + config.micro_batch >= share
            # DDP sums up the gradients over the ranks in the last backward alone
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                nll = torch.zeros((), device=dist.device)
                packed = judge.pack(micro, pad, dist.device)
                with autocast():
                    if config.sft_weight:
                        scores, logprobs = judge.read(model, packed, words=True)  # (2b,), (b,)
                        nll = -logprobs.sum() / config.batch  # of the chosen answers, per token
                    else:
                        scores = judge.read(model, packed)
                chosen, rejected = scores.view(-1, 2).unbind(1)  # (b,) each
                loss, metrics = objective.of(
                    chosen, rejected, config.margin, centre=config.centre, n_pairs=config.batch
                )
                metrics["nll_loss"] = nll.item()
                scaler.scale((loss + config.sft_weight * nll) * dist.world).backward()  # DDP divides by world
            for name, value in metrics.items():  # a loss is a sum already, the others are means
                weight = 1 if name.endswith("loss") else len(micro) / config.batch
                sums[name] = sums.get(name, 0.0) + value * weight
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(judge, optimizers, scaler, autocast, lr, config.clip)
        sums = dict(zip(sums, dist.sum(*sums.values()), strict=True))
        run.check_finite(lr, norm, loss=sums["loss"], nll_loss=sums["nll_loss"])

        # ------------------------------------------------------------------ look
        speed = config.batch / (time.perf_counter() - started)
        record = sums | {"lr": lr, "grad_norm": norm, "pairs_per_second": speed}
        if run.due(config.eval_every):
            scores, by_kind = rank_pairs(judge, groups["valid"], pairs["valid"], pad, dist, autocast)
            record |= {f"valid_{kind}": row[0] for kind, row in by_kind.items()}
            record["valid_loss"] = objective.of(*torch.from_numpy(scores).unbind(1), config.margin)[1]["loss"]
            shown = ", ".join(f"{kind} {row[0]:.1%}" for kind, row in by_kind.items())
            run.say(f"step {step + 1}  loss {sums['loss']:.3f}  validation accuracy: {shown}")
            run.keep_best(by_kind["all"][0])
        run.log(step + 1, **record)
        run.bar.set_postfix(loss=f"{sums['loss']:.3f}", accuracy=f"{max(run.state.best, 0):.1%}")
    run.close()

    # The test split, once, with the checkpoint that the validation split chose.
    judge, tokenizer, path = open_reward_model(run.path, dist.device)
    scores, by_kind = rank_pairs(judge, groups["test"], pairs["test"], pad, dist, autocast)
    report = {"by_kind": by_kind, "scores": scores.tolist()}
    report["calibration"], report["calibration_error"] = calibration(scores[:, 0] - scores[:, 1])
    report |= length_figures(groups["test"], scores)
    if task_of(config.data).rename and task_of(config.data).corruptions:
        score = partial(score_texts, judge, tokenizer, dist=dist, autocast=autocast)
        report |= consistency(score, 200, config.seed, tuple(config.levels), config.data)
    if probed:
        report |= probe_samples(judge, policy, speaks, tokenizer, config, dist, autocast)
    if dist.is_main:
        coin = objective.of(torch.zeros(1), torch.zeros(1), config.margin)[1]["loss"]
        write_report(config, run.path, len(pairs["test"]), report, judge.num_params(), objective.unit, coin)
        print(f"{path}, {run.path}/curves.png, {run.path}/report.png, {run.path}/report.json")
    accuracy, low, high, _ = by_kind["all"]
    return {"accuracy": accuracy, "low": low, "high": high, "path": str(path)} | report


if __name__ == "__main__":
    run_script(main, Config, __doc__)
