"""A reward model: which of two answers is better, learned from pairs (Bradley and Terry 1952; arXiv:2203.02155).

A decoder reads the prompt x and one answer y; a linear head turns the state at the answer's last token into one number,
the score r(x, y). In a pair, y_w was preferred to y_l, by people or by a rule. The Bradley-Terry model makes a
probability of the scores, and training makes the pairs as likely as it can:

    p(y_w beats y_l) = e^r_w / (e^r_w + e^r_l) = σ(r_w − r_l)    σ(Δ) = 1 / (1 + e^−Δ)
    L                = −log σ(r_w − r_l)                         nats per pair; ln 2 where the scores are equal
    dL/dr_w          = −σ(r_l − r_w) = −dL/dr_l                  = −(1 − p): near 0 once p is near 1

One step, for the B pairs of all ranks; a rank takes its share, b pairs at a time. `judge` is the reward model itself,
`model` the same, perhaps wrapped in DDP:

    batch = the step's B of groups["train"]                ids: (x, [y_w, y_l]), each once per epoch        1. batch
    for each b of the rank's share:                                                                         2. gradient
        packed = judge.pack(the b pairs)                   x is computed once; both answers (≤ T tokens) read its keys,
                                                           each in a row of its own (unlike sft.py's --packing)
        scores, mean_logprobs = judge.read(model, packed, with_logprobs)                            (2b,), (b,)
            states   = the decoder's, with --extra_layers new blocks on top                         (2b, T, C)
            scores   = head(states at the last token)      in fp32                                  (2b,)
            mean_logprobs = log π(y_w|x) / |y_w|           π: softmax(states · embeddingᵀ)          (b,)
        r_w, r_l = scores.view(b, 2).unbind(1)             y_w and y_l take turns                   (b,) each
        loss = Σ [−log σ(r_w − r_l − margin) + centre · (r_w + r_l)²] / B                           ()
        nll_loss = −Σ mean_logprobs / B                                                             ()
        (loss + nll · nll_loss).backward()          gradients add up, over micro-batches and ranks
    clip the gradient's norm, optimizer step                                                                3. update
    log; every --eval_every steps rank the validation pairs, keep the best checkpoint                       4. look

The defaults run 600 steps of 64 pairs (Muon, lr 2e-3) with margin 0, centre 0.01, nll 1 and two extra layers. The pairs
are corrupted solutions, and the SFT model's own samples, judged by the verifier. Plain Bradley-Terry on the SFT model
is --centre 0 --nll 0 --extra_layers 0; with --optimizer adamw --lr 9e-6, for one epoch, it is InstructGPT's, whose
batch element is a prompt: all pairs of its K = 4 to 9 ranked answers, averaged. Off: --loss hinge (max(0, margin − (r_w
− r_l)), which stops at the margin), dropout, the bidirectional form (--backbone encoder), real pairs (--data).

Traps:
  * A score means nothing by itself: adding any c(x) to both answers of a prompt leaves L as it is. centre pulls each
    pair's mean score towards 0 (arXiv:2312.09244), for ppo.py --normalise false, which pays the scores as they are.
  * A head on the last state may come too late. To see that 5 + 3 = 9 is wrong, a model must know the sum and compare.
    The policy knows the sum, but as a prediction: before the 9 its last layer says 8, and none is left to compare the
    two. Hence the extra layers, and the SFT loss of the chosen answers, which is to keep what the decoder knows
    (arXiv:2406.10216). Neither was tested alone.
  * For PPO take pairs of the policy's own samples too (--pairs both, the default): what a policy writes is wrong in
    other ways than a corrupted solution.
  * A reward model is a proxy. Best-of-n takes the answer with the highest score of n; where the truth falls while n
    grows, the proxy is over-optimised (arXiv:2210.10760; demo). The report shows this for n = 1 … 64, and beside it
    accuracy by kind of error, calibration, and what else moves the score: names, length, format.

Run it:
    python reward_model.py                                                  # makes its SFT start if there is none
    python reward_model.py --demo                                           # the loss, its gradient, best-of-n by hand
    python reward_model.py --data style                                     # real pairs, pretrains on their text
    torchrun --nproc_per_node 2 reward_model.py --init runs/sft --pairs sampled
"""

import json
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data import rows_at
from optim import lr_at, optimizer_step
from support.checkpoints import resolve_checkpoint
from support.checks import Amount, Count, FractionBelow1, Whole
from support.cli import run_script
from support.errors import CheckpointError
from support.hf import load_decoder, one_label, open_safetensors, save_decoder
from support.hf_bert import is_encoder
from support.logprobs import target_logprobs
from support.reward_encoder import RewardEncoder
from support.reward_report import ranked_rightly
from support.reward_samples import score_groups as score_groups  # offered here: ppo.py scores with it
from support.reward_setup import RewardPairFlags, begin_run, fill_in
from support.sharding import averaging
from support.shared_prompt import pack
from tokenizer_bpe import load_tokenizer
from transformer import Transformer

# ---------------------------------------------------------------------------------------------------------------
# The losses.


def bradley_terry_loss(chosen, rejected, margin=None, *, centre=0.0, n_pairs=None):
    """Scores (b,) each -> (loss, metrics): the mean of −log σ(chosen − rejected − margin).

    margin: by how much the chosen answer should win, None, a number or (b,). centre: weight of (chosen + rejected)²,
    which is added to the loss but not to the metric "loss", so that runs compare. n_pairs: the pairs of the whole
    optimizer step; default: of this batch.
    """
    gap = chosen - rejected
    per_pair = -F.logsigmoid(gap if margin is None else gap - margin)
    return with_metrics(per_pair, gap, chosen + rejected, centre, n_pairs)


def hinge_loss(chosen, rejected, margin=1.0, *, centre=0.0, n_pairs=None):
    """The same with max(0, margin − (chosen − rejected)): no gradient from the margin on."""
    gap = chosen - rejected
    return with_metrics((margin - gap).clamp(min=0), gap, chosen + rejected, centre, n_pairs)


LOSSES = {"bradley_terry": bradley_terry_loss, "hinge": hinge_loss}


def with_metrics(per_pair, gap, total, centre, n_pairs):
    """per_pair: the losses; gap, total: the scores' difference, chosen − rejected, and their sum, (b,) each. -> (loss,
    metrics): "gap" is the mean gap, "score" the mean score."""
    n = n_pairs or len(gap)
    loss = per_pair.sum() / n
    metrics = {"loss": loss.item(), "pair_accuracy": ranked_rightly(gap).mean().item()}
    if centre:
        loss = loss + centre * total.square().sum() / n
    return loss, metrics | {"gap": gap.mean().item(), "score": total.mean().item() / 2}


def best_of_n(scores, correct, sizes):
    """scores, correct (N, M), of M answers to each of N problems -> for each n of sizes, the expected accuracy of the
    answer with the highest score of n.

    Over all choices of n of the M answers: the answer with k lower ones is the highest with probability
    C(k, n−1) / C(M, n).
    """
    M = scores.shape[1]
    ordered = np.take_along_axis(correct, scores.argsort(1, kind="stable"), 1)  # (N, M), worst score first
    return [float((ordered * [math.comb(k, n - 1) / math.comb(M, n) for k in range(M)]).sum(1).mean()) for n in sizes]


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
    r = torch.tensor([3.0, 1.0], requires_grad=True)  # ahead by 2, more than the margin
    for name, centre, by_hand, slope in (
        ("3 and 1, hinge with margin 1", 0.0, 0.0, 0.0),
        ("… and centre 0.1 · (3 + 1)²", 0.1, 1.6, 0.8),  # 2 · 0.1 · (3 + 1) in both: down, together
    ):
        loss, _ = hinge_loss(r[:1], r[1:], margin=1.0, centre=centre)
        (gradient,) = torch.autograd.grad(loss, r)
        torch.testing.assert_close(loss.item(), by_hand, atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, torch.full((2,), slope))
        print(f"  {name:<34} loss {loss.item():.4f}    gradient {gradient[0]:+.2f} {gradient[1]:+.2f}")

    scores, correct = np.array([[0.1, 0.5, 0.7, 0.9]]), np.array([[0.0, 0.0, 1.0, 0.0]])
    by_score, by_truth = (best_of_n(proxy, correct, (1, 2, 3, 4)) for proxy in (scores, correct))
    assert np.allclose(by_score, [1 / 4, 2 / 6, 1 / 4, 0])  # of the 6 choices of two, 2 have the right one on top
    assert np.allclose(by_truth, [1 / 4, 3 / 6, 3 / 4, 1])  # 3 of the 6 have it
    print("best of n of four answers; the second-highest score is right, the highest wrong: a proxy over-optimised")
    print("  n                     1      2      3      4")
    print("  best by score    " + "".join(f"{x:>7.3f}" for x in by_score))
    print("  best by truth    " + "".join(f"{x:>7.3f}" for x in by_truth))


# ---------------------------------------------------------------------------------------------------------------
# The model.


SCORE = {"head.weight": "score.weight"}  # our name, and that in a file


class RewardModel(Transformer):
    """A decoder whose output matrix is one row: forward gives a score at every token, (B, T, 1)."""

    pad_id = None  # only to be written into config.json

    def __init__(self, config):
        # Tied, so that no V × C output matrix is made; the head replaces it.
        super().__init__(replace(config, tie_embeddings=True))
        self.head = nn.Linear(self.config.width, 1, bias=False)
        # The states have mean square 1 or so, so scores start with a spread of about 1.
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
            # The last matrix of each residual branch: a new block adds 0. ffn.down is moe.py's, one tensor.
            if name.endswith(("attn.wo.weight", "down.weight", "ffn.down")):
                nn.init.zeros_(parameter)
        # Without the policy's output matrix, if it has one of its own: that is named head too.
        state = {k: v for k, v in policy.state_dict().items() if not k.startswith("head.")}
        model.load_state_dict(model.state_dict() | state)
        return model

    @staticmethod
    def pack(groups, pad, device="cpu"):
        """[(prompt ids, lists of answer ids), …] -> PackedAnswers on the device. Each answer gets one pad more:
        `shared_prompt.pack` leaves out an answer's last token, which predicts nothing; here the score is read at it."""
        answers = [[[*answer, pad] for answer in group] for _, group in groups]
        return pack([prompt for prompt, _ in groups], answers, pad).to(device)

    @staticmethod
    def read(model, packed, with_logprobs=False):
        """-> the score of each answer, (k,); in training k = 2b: y_w, y_l, y_w, y_l, … of n = b groups. with_logprobs:
        also (n,): the mean log π per token of each group's first answer, y_w; all groups must be of one size.

        `model` may be wrapped in DDP. It reads the answers in parts, of m each. The row of an answer y_0 y_1 y_2:

            token       the prompt's last   y_0   y_1   y_2     y_2 stands here because `pack` has added a pad
            log π of    y_0                 y_1   y_2   the pad: not counted
            score                                       here: entry |y| = 3
        """
        n, k = len(packed.tokens), len(packed.lengths)
        lengths = packed.lengths - 1  # (k,) without the pad that `RewardModel.pack` has added

        def first_answers(part):
            place = torch.arange(part.tokens.shape[1], device=part.rows.device)
            in_answer = place < lengths[part.rows, None]  # (m, T), False at the pad
            first = part.rows % (k // n) == 0  # (m,) True for the first answer of each group, the chosen one
            return {"targets": part.targets, "counted": in_answer & first[:, None]}  # (m, T) each

        scores, mean_logprobs = [], []
        options = first_answers if with_logprobs else None
        for part, out in zip(packed.parts, packed.outputs(model, options), strict=True):
            length = lengths[part.rows, None]  # (m, 1)
            score = out  # (m, T, 1)
            if with_logprobs:
                score, logs = out  # (m, T, 1), (m, T)
                mean_logprobs.append(logs.sum(1, keepdim=True) / length)  # (m, 1); 0 for all but the first answers
            scores.append(score.squeeze(-1).gather(1, length))  # (m, 1)
        scores = packed.in_order(scores).squeeze(1).float()  # (m, 1) of each part -> (k,)
        return (scores, packed.in_order(mean_logprobs).view(n, -1)[:, 0]) if with_logprobs else scores

    def save_pretrained(self, path):
        """As the layout's …ForSequenceClassification of transformers, with num_labels 1: the trunk, `score.weight`."""
        save_decoder(self, path, SCORE, partial(one_label, pad_id=self.pad_id))

    @classmethod
    def from_pretrained(cls, path, dropout=0.0):
        """Raises CheckpointError, also if the directory holds a language model instead."""
        path = Path(path)
        if SCORE["head.weight"] not in open_safetensors(path)[0]:
            raise CheckpointError(f"{path} has no score head: it is no reward model; python reward_model.py makes one")
        model = load_decoder(cls, path, dropout=dropout, head=SCORE)
        model.pad_id = json.loads((path / "config.json").read_text(encoding="utf-8")).get("pad_token_id")
        return model


def open_reward_model(path, device="cpu", dropout=0.0):
    """-> (RewardModel or RewardEncoder, tokenizer, directory)."""
    path = resolve_checkpoint(path)
    kind = RewardEncoder if is_encoder(path) else RewardModel
    model = kind.from_pretrained(path, dropout)
    if kind is RewardEncoder and model.config.n_class != 1:
        raise CheckpointError(f"{path} is an encoder of {model.config.n_class} labels, no reward model")
    return model.to(device), load_tokenizer(path), path


# ---------------------------------------------------------------------------------------------------------------
# The settings. More flags: support/reward_setup.py (which pairs), support/runs.py (every stage's).


@dataclass
class Config(RewardPairFlags):
    """Train a reward model on pairs of answers."""

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
    margin: Amount | None = None
    """Margin by which the chosen answer should win; default: 0, or 1 for the hinge."""
    centre: Amount = 0.01
    """Weight of the squared sum of a pair's scores, which pulls their mean towards 0."""
    nll: Amount | None = None
    """Weight of the SFT loss per token on the chosen answers; default: 1, or 0 for an encoder, which has no such
    loss."""
    weight_decay: Amount = 0.01
    dropout: FractionBelow1 = 0.0
    """Dropout during training."""
    eval_pairs: Count = 200
    """Validation pairs (and problems to sample from)."""
    test_pairs: Count = 500
    """Test pairs, ranked before and after training."""
    best_of: Count = 64
    """Samples per problem of the best-of-n curve."""
    best_of_problems: Whole = 100
    """Problems in the report on samples (best of n, what the score depends on); 0 turns it off."""

    def __post_init__(self):
        super().__post_init__()
        fill_in(self)


# ---------------------------------------------------------------------------------------------------------------
# The loop.


def main(config):
    """Train; returns {"accuracy", "low", "high", "by_kind", "path"} on the test split, and the report's figures."""
    kind = RewardEncoder if config.backbone == "encoder" else RewardModel
    loss_of = LOSSES[config.loss]
    # Samples and judges pairs, or reads them; puts the new head on the model from SFT; ranks the test pairs with it.
    # groups: {"train", "valid", "test"} of (x, [y_w, y_l]). The functions go in: support/ cannot import this file.
    run, look, groups, autocast = begin_run(config, kind, loss_of, open_reward_model, best_of_n)
    judge, dist, scaler, pad = run.model, run.dist, run.scaler, run.tokenizer.endoftext_id
    per_rank = dist.per_rank("batch", config.batch)  # B / ranks: the pairs of a step on this rank
    model = DistributedDataParallel(judge, broadcast_buffers=False) if dist.world > 1 else judge

    for step in run.steps():
        # 1. the batch: B pairs, of which this rank takes its share
        started = time.perf_counter()
        batch = [groups["train"][i] for i in rows_at(len(groups["train"]), step, config.batch, config.seed)]
        own = batch[dist.rank * per_rank : (dist.rank + 1) * per_rank]
        own.sort(key=lambda group: len(group[0]))  # prompts of like lengths waste no padding

        # 2. the gradient: parts of it add up, over micro-batches and ranks
        model.train()
        sums = {}
        for i in range(0, per_rank, config.micro_batch):
            micro = own[i : i + config.micro_batch]
            last = i + config.micro_batch >= per_rank
            with averaging(model, last):  # DDP averages over the ranks in the last backward alone; * world: a sum
                nll_loss = torch.zeros((), device=dist.device)
                packed = judge.pack(micro, pad, dist.device)
                with autocast():
                    if config.nll:
                        scores, mean_logprobs = judge.read(model, packed, with_logprobs=True)  # (2b,), (b,)
                        nll_loss = -mean_logprobs.sum() / config.batch  # of the chosen answers
                    else:
                        scores = judge.read(model, packed)
                r_w, r_l = scores.view(-1, 2).unbind(1)  # (b,) each; chosen first in each group
                loss, metrics = loss_of(r_w, r_l, config.margin, centre=config.centre, n_pairs=config.batch)
                metrics["nll_loss"] = nll_loss.item()
                scaler.scale((loss + config.nll * nll_loss) * dist.world).backward()
            for name, value in metrics.items():  # a loss is already a part of the sum, the others are means
                weight = 1 if name.endswith("loss") else len(micro) / config.batch
                sums[name] = sums.get(name, 0.0) + value * weight
        sums = dict(zip(sums, dist.sum(*sums.values()), strict=True))

        # 3. the update: clip, then a step of the optimizers
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(judge, run.optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, loss=sums["loss"], nll_loss=sums["nll_loss"])

        # 4. look: log, and every so often rank the validation pairs, keep the best checkpoint
        speed = config.batch / (time.perf_counter() - started)
        look.at_step(step, sums | {"lr": lr, "grad_norm": norm, "pairs_per_second": speed})
    run.close()
    return look.after()  # the test split again, with the checkpoint that the validation split chose


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
