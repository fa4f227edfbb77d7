"""A reward model: which of two answers is better, learned from pairs (Bradley and Terry 1952; arXiv:2203.02155).

A decoder reads the prompt x and one answer y; a linear head turns the state at the answer's last token into one number,
the score r(x, y). In a pair, y_w was preferred to y_l. The Bradley-Terry model makes a probability of the scores, and
training makes the pairs as likely as it can:

    p(y_w beats y_l) = σ(r_w − r_l)                              σ(Δ) = 1 / (1 + e^−Δ)
    L                = −log σ(r_w − r_l)                         nats per pair; ln 2 where the scores are equal
    dL/dr_w          = −σ(r_l − r_w) = −dL/dr_l                  near 0 once a pair is clear

One step, for B pairs (main has the same four parts):

    1. batch     pairs = the next B of (x, y_w, y_l)             ids; epochs without replacement
    2. gradient  for each micro-batch of this rank's B / world:
                     packed   = pack(pairs)                      x is read once, by both answers         (2b, T)
                     states   = the decoder's, with --extra_layers new blocks on top                     (2b, T, C)
                     scores   = head(states at the last token)   in fp32                                 (2b,)
                     r_w, r_l = scores                                                                   (b,) each
                     loss     = Σ [−log σ(r_w − r_l − margin) + centre · (r_w + r_l)²] / B               ()
                     nll      = −Σ mean over y_w of log π(y_w) / B     from the same states              ()
                     backward(loss + sft_weight · nll)           gradients add up, over micro-batches and ranks
    3. update    clip ‖g‖; lr = lr_at(step); optimizer step
    4. look      log; every --eval_every steps rank the validation pairs, keep the best checkpoint

The defaults run 600 steps of 64 pairs with margin 0, centre 0.01, sft_weight 1 and two extra layers. The pairs are
corrupted solutions, and the SFT model's own samples, judged by the verifier. Off: --loss hinge (max(0, margin −
(r_w − r_l)), which stops at the margin), dropout, the bidirectional form (--backbone encoder), real pairs (--data).

Traps:
  * A score means nothing by itself: adding a constant to all leaves L as it is. centre (arXiv:2312.09244) pulls the
    scores towards 0, where PPO's values start.
  * A head on the last state learns slowly. To see that 5 + 3 = 9 is wrong, a model must know the sum and compare. The
    policy knows it (its log π ranks 96 % of such pairs correctly), but only in its last layer, where it predicts the
    next token; a head alone ranks 56 % after 100 steps. Hence the extra layers, which can compare, and the SFT loss
    of the chosen answers, which keeps what the decoder knows (arXiv:2406.10216).
  * PPO needs pairs of the policy's own samples: what a policy writes is wrong in other ways than a corrupted solution.
  * A reward model is a proxy. Best-of-n takes the answer with the highest score of n; where the truth falls while n
    grows, the proxy is over-optimised (arXiv:2210.10760; demo). The report shows this for n = 1 … 64, and beside it
    accuracy by kind of error, calibration, and what else moves the score: names, length, format.

The checkpoint is a directory that transformers opens as Qwen3ForSequenceClassification with one label.

Run it:
    python reward_model.py                                                  # makes its SFT start if there is none
    python reward_model.py --demo                                           # the loss, its gradient, best-of-n by hand
    python reward_model.py --data style                                     # real pairs, pretrains on their text
    torchrun --nproc_per_node 2 reward_model.py --init runs/sft --pairs sampled
"""

import contextlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import pretrain
from data import DEFAULT_TASK, TASKS, encode_group, load_pairs, load_problems, rows_at, task_of
from encoder import Encoder, is_encoder, open_encoder
from evaluate import wilson
from optim import lr_at, make_optimizers, optimizer_step
from sft import collate, sft_start
from support.checkpoints import open_checkpoint, resolve_checkpoint
from support.checks import Amount, Count, FractionBelow1, Whole
from support.cli import run_script
from support.content import records_of, weights_of
from support.devices import precision, setup
from support.errors import CheckpointError, ConfigError
from support.files import must_write, write_whole
from support.hf import load_decoder, open_safetensors, save_decoder
from support.logprobs import target_logprobs
from support.records import drop_too_long
from support.reward_report import consistency, length_figures, write_report
from support.reward_samples import (
    ids_of_answer,
    ids_of_prompt,
    keep_pairs,
    kept_pairs,
    make_pairs,
    probe_samples,
    score_groups,
    score_texts,
)
from support.runs import RUNS, Run, RunConfig, make_start_once, run_path, start_name
from support.shared_prompt import pack
from tokenizer_bpe import load_tokenizer
from transformer import Transformer, TransformerConfig

# ---------------------------------------------------------------------------------------------------------------
# The losses.


def bradley_terry_loss(chosen, rejected, margin=None, *, centre=0.0, n_pairs=None):
    """Scores (B,) each -> (loss, metrics): the mean of −log σ(chosen − rejected − margin).

    margin: None, a number or (B,). centre: weight of (chosen + rejected)², which is added to the loss but not to the
    metric "loss", so that runs compare. n_pairs: the pairs of the whole optimizer step; default: of this batch.
    """
    gap = chosen - rejected
    per_pair = -F.logsigmoid(gap if margin is None else gap - margin)
    return _reduce(per_pair, chosen, rejected, centre, n_pairs)


def hinge_loss(chosen, rejected, margin=1.0, *, centre=0.0, n_pairs=None):
    """The same with max(0, margin − (chosen − rejected)): no gradient from the margin on."""
    return _reduce((margin - (chosen - rejected)).clamp(min=0), chosen, rejected, centre, n_pairs)


@dataclass(frozen=True)
class Loss:
    """(chosen, rejected, margin, *, centre, n_pairs) -> (loss, metrics), its default margin, and its unit."""

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


def best_of_n(scores, correct, sizes):
    """scores, correct (N, M) -> for each n of sizes, the expected accuracy of the answer with the highest score of n.

    Over all choices of n of the M answers: the answer with k lower ones is the highest with probability
    C(k, n−1) / C(M, n).
    """
    M = scores.shape[1]
    ordered = np.take_along_axis(correct, scores.argsort(1, kind="stable"), 1)  # (N, M), worst score first
    return [float((ordered * [math.comb(k, n - 1) / math.comb(M, n) for k in range(M)]).sum(1).mean()) for n in sizes]


def calibration(gaps, bins=8):
    """Score differences (n,) -> [(mean predicted, share right, n), …] and the expected calibration error.

    σ(|Δ|) is the model's probability that the answer with the higher score is the better one. It is calibrated if it
    is right in that share of the pairs.
    """
    sure, right = 1 / (1 + np.exp(-np.abs(gaps))), (gaps > 0) + 0.5 * (gaps == 0)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    inside = [place == b for b in sorted(set(place.tolist()))]
    rows = [(float(sure[b].mean()), float(right[b].mean()), int(b.sum())) for b in inside]
    return rows, sum(n * abs(p - r) for p, r, n in rows) / len(gaps)


def demo():
    """The loss of one pair and its gradient by hand, and best-of-n where the score is a bad proxy."""
    ln3 = math.log(3)  # σ(ln 3) = 3/4
    print("one pair: scores of the chosen and the rejected answer, loss, its gradient in both (by hand = autograd's)")
    for name, (w, l), options, p, by_hand, slope in (
        ("ln 3 and 0: p = σ(ln 3) = 3/4", (ln3, 0), {}, 3 / 4, math.log(4 / 3), -1 / 4),
        ("both + 5: nothing changes", (ln3 + 5, 5), {}, 3 / 4, math.log(4 / 3), -1 / 4),
        ("0 and ln 3, the wrong way round", (0, ln3), {}, 1 / 4, math.log(4), -3 / 4),
        ("ln 3 and 0, margin ln 3", (ln3, 0), {"margin": ln3}, 1 / 2, math.log(2), -1 / 2),
    ):
        r_w, r_l = (torch.tensor([float(r)], requires_grad=True) for r in (w, l))
        loss, _ = bradley_terry_loss(r_w, r_l, **options)
        loss.backward()
        assert abs(loss.item() - by_hand) < 1e-6
        assert abs(by_hand + math.log(p)) < 1e-12
        assert abs(slope + 1 - p) < 1e-12  # −σ(−Δ) = −(1 − p)
        assert abs(r_w.grad.item() - slope) < 1e-6
        assert abs(r_l.grad.item() + slope) < 1e-6
        print(f"  {name:<34} loss {loss.item():.4f}    gradient {r_w.grad.item():+.2f} {r_l.grad.item():+.2f}")
    r = torch.tensor([3.0, 1.0], requires_grad=True)
    hinge, _ = hinge_loss(r[:1], r[1:], margin=1.0)  # ahead by 2: clear
    centred, _ = hinge_loss(r[:1], r[1:], margin=1.0, centre=0.1)
    (pull,) = torch.autograd.grad(centred, r)
    assert hinge.item() == 0
    assert abs(centred.item() - 0.1 * (3 + 1) ** 2) < 1e-6
    torch.testing.assert_close(pull, torch.tensor([0.8, 0.8]))  # 2 · 0.1 · (3 + 1) in both: down, together
    print(f"  3 and 1, hinge with margin 1       loss {hinge:.4f}    gradient +0.00 +0.00")
    print(f"  … and centre 0.1 · (3 + 1)²        loss {centred:.4f}    gradient {pull[0]:+.2f} {pull[1]:+.2f}")

    scores, correct = np.array([[0.1, 0.5, 0.7, 0.9]]), np.array([[0.0, 0.0, 1.0, 0.0]])
    by_score = best_of_n(scores, correct, (1, 2, 3, 4))
    assert np.allclose(by_score, [1 / 4, 2 / 6, 1 / 4, 0])  # of the 6 choices of two, 2 have the right one on top
    print("best of n of four answers, the third in score is right, the highest score is wrong: a proxy over-optimised")
    print("  n                     1      2      3      4")
    print("  best by score    " + "".join(f"{x:>7.3f}" for x in by_score))
    print("  best by truth    " + "".join(f"{x:>7.3f}" for x in (1 / 4, 2 / 4, 3 / 4, 1)))


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
        """(B, T) -> scores (B, T, 1). With targets also the language model's log π of them, (B, T), computed from the
        same states with the embedding matrix, and 0 where counted (B, T) is False."""
        states = self.hidden(tokens, positions, mask, cache, last_only)  # (B, T, C)
        with torch.autocast(states.device.type, enabled=False):  # in bf16 the scores of two similar answers would tie
            scores = self.head(states.to(self.head.weight.dtype))  # (B, T, 1)
        if targets is None:
            return scores
        return scores, target_logprobs(states, self.embed.weight, targets, counted=counted)

    @classmethod
    def from_policy(cls, policy, dropout=0.0, seed=0, extra=0):
        """The blocks of a language model, `extra` new ones on top that add nothing yet (with post-norm they normalise
        once more), and a new head. CheckpointError if the policy is of a subclass that computes something else."""
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
        """[(prompt ids, lists of answer ids), …] -> PackedAnswers on the device. Each answer gets one pad more: only
        tokens that predict another one are packed, and the last token, at which the score is read, must be."""
        answers = [[[*answer, pad] for answer in group] for _, group in groups]
        return pack([prompt for prompt, _ in groups], answers, pad).to(device)

    @staticmethod
    def read(model, packed, words=False):
        """-> the score of each answer, (k,). With `words`, where each of n groups has as many answers, also the mean
        log π over the tokens of each group's first answer, (n,). `model` may be wrapped in DDP."""
        n, k = len(packed.tokens), len(packed.lengths)

        def first_answers(part):  # without the pad that `pack` has added
            place = torch.arange(part.tokens.shape[1], device=part.rows.device)
            in_answer = place < packed.lengths[part.rows, None] - 1  # (b, T)
            first = part.rows % (k // n) == 0  # (b,)
            return {"targets": part.targets, "counted": in_answer & first[:, None]}  # (b, T) each

        scores, logprobs = [], []
        for part, out in zip(packed.parts, packed.outputs(model, first_answers if words else None), strict=True):
            end = packed.lengths[part.rows, None] - 1  # (b, 1) index of the last token
            if words:
                out, logs = out
                logprobs.append(logs.sum(1, keepdim=True) / end)  # (b, 1), 0 for all but the first answers
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
        model.pad_id = json.loads((path / "config.json").read_text(encoding="utf-8")).get("pad_token_id")
        return model


class RewardEncoder(Encoder):
    """The bidirectional form: nothing has to be predicted, so every token may see the whole answer. The score is a
    linear function of the mean of the states, (B, 1)."""

    pad_id = None

    def __init__(self, config):
        super().__init__(replace(config, n_class=1))
        for part in (self.transform, self.transform_norm):  # unused here, and DDP would wait for their gradients
            part.requires_grad_(False)
        self.token_bias.requires_grad_(False)

    @classmethod
    def from_policy(cls, policy, dropout=0.0, seed=0, extra=0):
        """From an encoder or a decoder."""
        return cls.from_trunk(policy, dropout, seed, n_class=1, n_layer=policy.config.n_layer + extra)

    @staticmethod
    def pack(groups, pad, device="cpu"):
        """-> tokens, real (k, T). No prompt is shared: its states depend on the answer after it."""
        texts = [[*prompt, *answer] for prompt, answers in groups for answer in answers]
        padded = collate([(ids, [True] * len(ids)) for ids in texts], pad).to(device)
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


# ---------------------------------------------------------------------------------------------------------------
# The settings.


@dataclass
class Config(RunConfig):
    """Train a reward model on pairs of answers. What every stage shares is in support/runs.py."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), ultrafeedback, hh, style, or the path of a .jsonl of prompt,
    chosen, rejected."""
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
    """SFT checkpoint to sample from; default: --init."""
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
    """Weight of the squared sum of a pair's scores, which pulls them towards 0."""
    sft_weight: float | None = None
    """Weight of the SFT loss per token on the chosen answers; default: 1, or 0 for an encoder, which has no such
    loss."""
    weight_decay: Amount = 0.01
    dropout: FractionBelow1 = 0.0
    """Dropout during training."""
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
            raise ConfigError("--sft_weight needs a decoder: an encoder sees the tokens that it would have to predict")
        if self.n_pairs is None and self.data in TASKS:
            self.n_pairs = 12_000


# ---------------------------------------------------------------------------------------------------------------
# Set-up, validation, the loop.


def text_start(config, dist):
    """A pretraining on the text of the training pairs, where real pairs come without --init; made once, and reused."""
    run_path(config)  # raises on a bad --name or --resume before a start is made
    name = start_name(config.data, config.seed, "pretrain")
    text = RUNS / f"{name}.txt"
    if dist.is_main:
        pairs = load_pairs(config.data, "train", None, skip_bad=config.skip_bad)
        with must_write(text):
            text.parent.mkdir(parents=True, exist_ok=True)
            write_whole(text, "\n\n".join(f"{p.prompt}\n{p.chosen}\n\n{p.rejected}" for p in pairs))
    if dist.world > 1:
        distributed.barrier()
    settings = {"data": str(text), "vocab_size": 2048, "model": TransformerConfig(context=512), "steps": 200}
    settings |= {"seed": config.seed, "device": config.device, "dtype": config.dtype}
    what = f"no --init given: pretraining a start on the text of the pairs of {config.data}"
    return make_start_once(name, what, pretrain, settings, dist)


def open_trunk(config, init, dist):
    """-> the model to train, the policy to sample from (None if there is none), their tokenizers."""
    path, policy, policy_tokenizer = resolve_checkpoint(init), None, None
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
        policy, policy_tokenizer, _ = open_checkpoint(config.sampler or path, dist.device)
    kind = RewardEncoder if config.backbone == "encoder" else RewardModel
    judge = kind.from_policy(trunk, config.dropout, config.seed, config.extra_layers).to(dist.device)
    judge.pad_id = tokenizer.endoftext_id
    return judge, policy, tokenizer, policy_tokenizer


def check_room(config, judge, policy, tokenizer, policy_tokenizer):
    """ConfigError, before the training, if the report on samples, after it, would not fit the context."""
    problems = load_problems(config.data, "test", max(200, config.best_of_problems), tuple(config.levels))
    answers = [max(config.max_new_tokens, len(ids_of_answer(tokenizer, p.solution))) for p in problems]
    scored = max(len(ids_of_prompt(tokenizer, p.question)) + n for p, n in zip(problems, answers, strict=True))
    sampled = max(len(ids_of_prompt(policy_tokenizer, p.question)) for p in problems) + config.max_new_tokens
    for n, room in ((scored, judge.config.context), (sampled, policy.config.context)):
        if n > room:
            raise ConfigError(
                f"prompts with their solutions or --max_new_tokens, {n} tokens together, do not fit the model's "
                f"context of {room}: use lower --levels, or skip the report on samples with "
                "--best_of_problems 0"
            )


def fitting_groups(pairs, tokenizer, context, dist):
    """{split: [Pair]} -> the pairs that fit the context, and their ids (see `encode_group`), {split: list} each."""
    kept, groups = {}, {}
    for split in pairs:
        if not pairs[split]:
            raise ConfigError(
                f"no {split} problem got both a right and a wrong answer that ended: use another --init, more "
                "--samples, or --pairs both"
            )
        both = [(pair, encode_group(tokenizer, pair)) for pair in pairs[split]]
        lengths = [len(prompt) + max(map(len, answers)) for _, (prompt, answers) in both]
        both = drop_too_long(both, lengths, context, f"{split} pair", dist)
        kept[split], groups[split] = map(list, zip(*both, strict=True))
    return kept, groups


def rank_pairs(model, groups, pairs, pad, dist, autocast):
    """-> scores of (chosen, rejected) as an array (n, 2), and {kind: (accuracy, low, high, n)}, "all" among them."""
    scores = np.array(
        dist.split_work(groups, lambda own: score_groups(model, own, pad, dist.device, autocast))
    )  # (n, 2)
    right = (scores[:, 0] > scores[:, 1]) + 0.5 * (scores[:, 0] == scores[:, 1])  # a tie is half right, as by chance
    by_kind = {}
    for kind in ["all", *sorted({pair.kind for pair in pairs})]:
        chosen = np.array([kind in ("all", pair.kind) for pair in pairs])
        n, hits = int(chosen.sum()), float(right[chosen].sum())  # plain numbers: they are saved
        by_kind[kind] = (hits / n, *wilson(hits, n), n)
    return scores, by_kind


def main(config):
    """Train; returns {"accuracy", "low", "high", "by_kind", "path"} on the test split, and the report's figures."""
    dist = setup(config.device)
    share = dist.per_rank("batch", config.batch)  # B / world: the pairs of a step on this rank
    autocast, scaler = precision(config.dtype, dist)
    run_path(config)  # raises on a bad --name or --resume before anything is made or sampled,
    pairs = None
    if config.data not in TASKS:  # and so does this on a bad name, or a split without pairs
        pairs = make_pairs(config, None, None, dist, autocast)
    init = config.init or (sft_start if config.data in TASKS else text_start)(config, dist)
    judge, policy, tokenizer, policy_tokenizer = open_trunk(config, init, dist)
    pad, probed = tokenizer.endoftext_id, config.data in TASKS and config.best_of_problems and policy is not None
    if probed:
        check_room(config, judge, policy, tokenizer, policy_tokenizer)
    if pairs is None:  # a resumed run reads the pairs of its first part: sampled again, they could be others
        pairs = kept_pairs(config) or make_pairs(config, policy, policy_tokenizer, dist, autocast)
    fitted, groups = fitting_groups(pairs, tokenizer, judge.config.context, dist)

    optimizers = make_optimizers(judge, config.optimizer, config.lr, config.weight_decay)
    torch.manual_seed(config.seed + 1000 * dist.rank)  # dropout differs between ranks
    reads = records_of(config.data, pairs) | weights_of(init, judge)
    if policy is not None:
        reads |= weights_of(config.sampler or init, policy)
    run = Run(config, dist, judge, tokenizer, optimizers, scaler, best=-1.0, reads=reads)
    if config.data in TASKS and config.pairs != "corrupted":
        keep_pairs(run, pairs)
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
        # 1. the batch: B pairs, of which this rank takes its share
        started = time.perf_counter()
        batch = [groups["train"][i] for i in rows_at(len(groups["train"]), step, config.batch, config.seed)]
        own = batch[dist.rank * share : (dist.rank + 1) * share]
        own.sort(key=lambda group: len(group[0]))  # prompts of like lengths waste no padding

        # 2. the gradient: parts of it add up, over micro-batches and ranks
        model.train()
        sums = {}
        for i in range(0, share, config.micro_batch):
            micro = own[i : i + config.micro_batch]
            # DDP averages the gradients of the ranks in the last backward pass alone; * world makes the average a sum.
            last = i + config.micro_batch >= share
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                nll = torch.zeros((), device=dist.device)
                packed = judge.pack(micro, pad, dist.device)
                with autocast():
                    if config.sft_weight:
                        scores, logprobs = judge.read(model, packed, words=True)  # (2b,), (b,)
                        nll = -logprobs.sum() / config.batch  # of the chosen answers, a mean per token of each
                    else:
                        scores = judge.read(model, packed)
                r_w, r_l = scores.view(-1, 2).unbind(1)  # (b,) each
                loss, metrics = objective.of(r_w, r_l, config.margin, centre=config.centre, n_pairs=config.batch)
                metrics["nll_loss"] = nll.item()
                scaler.scale((loss + config.sft_weight * nll) * dist.world).backward()
            for name, value in metrics.items():  # a loss is already a part of the sum, the others are means
                weight = 1 if name.endswith("loss") else len(micro) / config.batch
                sums[name] = sums.get(name, 0.0) + value * weight
        sums = dict(zip(sums, dist.sum(*sums.values()), strict=True))

        # 3. the update: clip, then a step of the optimizers
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(judge, optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, loss=sums["loss"], nll_loss=sums["nll_loss"])

        # 4. look: log, and every so often rank the validation pairs, keep the best checkpoint
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
        sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= config.best_of]
        samples = (policy, policy_tokenizer, tokenizer, config, sizes)
        scores, correct, figures = probe_samples(judge, *samples, dist, autocast)
        accuracies = best_of_n(scores, correct, sizes)
        report |= {"best_of": {str(n): x for n, x in zip(sizes, accuracies, strict=True)}} | figures
    if dist.is_main:
        equal_loss = objective.of(torch.zeros(1), torch.zeros(1), config.margin)[1]["loss"]
        write_report(config, run.path, len(pairs["test"]), report, judge.num_params(), objective.unit, equal_loss)
        print(f"{path}, {run.path}/curves.png, {run.path}/report.png, {run.path}/report.json")
    accuracy, low, high, _ = by_kind["all"]
    return {"accuracy": accuracy, "low": low, "high": high, "path": str(path)} | report


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
