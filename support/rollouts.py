"""A step's rollouts: sampled by groups, and cut into minibatches and micro-batches for the update.

`Sampler` lets a policy answer a step's prompts R times; what it samples depends on (seed, step) alone, so two ranks
sample what one would, and a resumed run what an uninterrupted one would. `cut` packs groups of answers for one forward
pass each (support/shared_prompt.py), so that a prompt is computed once for all of its answers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from data import encode_prompt, rows_at
from evaluate import kl_estimate
from generate import Rollout, generate
from lora import lora_off, merged
from support.rewards import judge_batch
from support.sharding import whole
from support.shared_prompt import PackedAnswers, pack, shared_answer_logprobs


@dataclass
class Batch:
    """One rank's groups of a step: n prompts, R answers each; row g·R + r is answer r to prompt g."""

    problems: list  # n
    prompts: list  # n lists of ids
    rollout: Rollout  # n·R rows
    texts: list  # n·R strings
    ended: torch.Tensor  # (n, R) bool: stopped by itself
    rewards: dict = field(default_factory=dict)  # {name: (n, R)}

    @property
    def answers(self):
        """n lists of R lists of ids."""
        R, rows = self.ended.shape[1], self.rollout.rows
        return [rows[g * R : g * R + R] for g in range(len(self.prompts))]

    def counted(self, mask_truncated):
        """(n·R, T) bool: the tokens that count in the loss. mask_truncated: none of an answer that was cut off, whose
        reward counts all the same."""
        mask = self.rollout.mask
        return mask & self.ended.flatten()[:, None].to(mask.device) if mask_truncated else mask

    def put(self, groups, new):
        """Replace these groups by those of the batch `new`, in place."""
        R = self.ended.shape[1]
        rows = [g * R + r for g in groups for r in range(R)]
        for name in ("ids", "mask", "logprobs"):
            old, fresh = getattr(self.rollout, name), getattr(new.rollout, name)  # (n·R, T) of one T and of another
            T = max(old.shape[1], fresh.shape[1])
            old = F.pad(old, (0, T - old.shape[1]))
            old[rows] = F.pad(fresh, (0, T - fresh.shape[1]))
            setattr(self.rollout, name, old)
        for i, g in enumerate(groups):
            self.problems[g], self.prompts[g] = new.problems[i], new.prompts[i]
            self.texts[g * R : g * R + R] = new.texts[i * R : i * R + R]
            self.ended[g] = new.ended[i]
            for name, values in self.rewards.items():
                values[g] = new.rewards[name][i]


@dataclass
class Sampler:
    """sample(step, slots) -> Batch: the answers to the prompts in `slots` (0 … prompts − 1) of a step.

    A step has a list of `prompts` prompts and a table of uniforms, both made from (seed, step, attempt) alone; slot s
    takes number s of each. Attempts after the first draw from an order of their own.
    """

    policy: torch.nn.Module
    tokenizer: object
    problems: list
    config: object  # prompts, rollouts, max_new_tokens, temperature, seed
    autocast: object
    stop_ids: tuple | None = None  # an answer with one of these at its end counts as ended; default: the tokenizer's
    respond: object = None  # what answers the prompts, with the arguments of `generate`, which is the default

    def asked(self, step, attempt=0):
        """The problems of a step, N in the order of the slots."""
        c = self.config
        return [self.problems[i] for i in rows_at(len(self.problems), step, c.prompts, c.seed + 7_919 * attempt)]

    def __call__(self, step, slots, attempt=0):
        c, R, asked = self.config, self.config.rollouts, self.asked(step, attempt)
        chosen = [asked[slot] for slot in slots]
        # 2**20 and not more: of a seed torch reads the low 32 bits alone
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step + 2**20 * attempt)
        uniforms = torch.rand(c.prompts, R, c.max_new_tokens, generator=generator)[slots].flatten(0, 1)  # (n·R, L)
        prompts = [encode_prompt(self.tokenizer, p) for p in chosen]
        sampling = {"temperature": c.temperature, "stop_ids": self.tokenizer.stop_ids, "uniforms": uniforms}
        with self.autocast(), merged(self.policy):
            rollout = (self.respond or generate)(self.policy, prompts, c.max_new_tokens, n=R, **sampling)
        ended = rollout.ended(self.stop_ids or self.tokenizer.stop_ids).cpu().view(-1, R)
        return Batch(chosen, prompts, rollout, rollout.texts(self.tokenizer), ended)


def refill(batch, sample, step, slots, functions, signal_of, policy, config):
    """Dynamic sampling (DAPO, arXiv:2503.14476): groups without a signal are replaced in place by the answers to fresh
    questions, up to --refill times. signal_of(batch): (n,) bool. All ranks must call it."""
    for attempt in range(1, config.refill + 1):
        silent = signal_of(batch).logical_not().nonzero().squeeze(1).tolist()
        with whole(policy):  # under FSDP: all weights on every rank, also on one that needs no more answers
            if silent:
                fresh = sample(step, [slots[g] for g in silent], attempt)
                judge_batch(functions, fresh, config)
                batch.put(silent, fresh)


@dataclass
class Piece:
    """A micro-batch of b answers, ready for every inner epoch."""

    rows: list  # b, which rows of the batch
    packed: PackedAnswers
    mask: torch.Tensor  # (b, T) True on the tokens that count; T: the longest answer's length


@dataclass
class Minibatch:
    """What one optimizer step sees. The counts are those of all ranks, before the cut, skipped groups too: how it is
    cut into pieces never changes the gradient."""

    pieces: list  # this rank's
    n_answers: float
    n_tokens: float

    @property
    def counts(self):
        return {"n_answers": self.n_answers, "n_tokens": self.n_tokens}


def cut(batch, groups, counted, micro_batch, pad):
    """Micro-batches of the given groups, whole groups each -> [Piece]. counted (n·R, T): the tokens that count."""
    R, answers = batch.ended.shape[1], batch.answers
    size = max(1, micro_batch // R)
    groups = sorted(groups, key=lambda g: len(batch.prompts[g]))  # prompts of like length waste no padding
    pieces = []
    for i in range(0, len(groups), size):
        some = groups[i : i + size]
        rows = [g * R + r for g in some for r in range(R)]
        packed = pack([batch.prompts[g] for g in some], [answers[g] for g in some], pad).to(counted.device)
        longest = max(len(answer) for g in some for answer in answers[g])
        pieces.append(Piece(rows, packed, counted[rows, :longest]))
    return pieces


def piece_logprobs(model, pieces, batch, temperature, autocast):
    """log π of the pieces' completions by this model, without a gradient, at their rows of a (n·R, T) tensor that is 0
    elsewhere."""
    out = torch.zeros_like(batch.rollout.logprobs)
    with torch.no_grad(), whole(model), autocast():
        for piece in pieces:
            T = piece.mask.shape[1]
            logprobs = shared_answer_logprobs(model, piece.packed, temperature)
            out[piece.rows, :T] = logprobs[:, :T].float()
    return out


def reference_logprobs(reference, policy, pieces, batch, config, autocast):
    """log π_ref of the pieces' answers, as `piece_logprobs`. With LoRA the reference is the policy itself without its
    adapters; with --refresh_reference too it is a copy."""
    with lora_off(policy):
        return piece_logprobs(reference, pieces, batch, config.temperature, autocast)


@torch.no_grad()
def values_at_sampling(actor_critic, pieces, batch, autocast):
    """V of every token of the pieces' answers, before the update: (n·R, T), 0 elsewhere. actor_critic: of ppo.py."""
    values = torch.zeros_like(batch.rollout.logprobs)
    with autocast():
        for piece in pieces:
            T = piece.mask.shape[1]
            values[piece.rows, :T] = actor_critic.values(piece.packed)[:, :T]
    return values


def answers_kl(reference, policy, batch, config, autocast, pad):
    """-> the estimate of KL(π ‖ π_ref) that each whole answer gives, (n, R), and log π_ref, (n·R, T). The first is also
    put into the batch's rewards, as "kl"."""
    pieces = cut(batch, range(len(batch.prompts)), batch.rollout.mask, config.micro_batch, pad)
    ref_logprobs = reference_logprobs(reference, policy, pieces, batch, config, autocast)
    kl_of_tokens = kl_estimate(batch.rollout.logprobs, ref_logprobs, config.kl) * batch.rollout.mask  # (n·R, T)
    batch.rewards["kl"] = kl_of_tokens.sum(1).view(batch.ended.shape).cpu()
    return batch.rewards["kl"], ref_logprobs


def groups_in_turn(slots, minibatches):
    """[[group, …] per minibatch], this rank's groups: the one in slot s is in minibatch s % minibatches."""
    return [[g for g, slot in enumerate(slots) if slot % minibatches == m] for m in range(minibatches)]


def shuffled_groups(step, slots, config):
    """A step's groups, dealt to its minibatches in an order that (seed, step) alone decides -> [[group, …] per
    minibatch], of each those that this rank has. slots: the places of this rank's prompts among all of the step."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    order = torch.randperm(config.prompts, generator=generator).tolist()
    parts = [order[m :: config.minibatches] for m in range(config.minibatches)]
    return [[slots.index(slot) for slot in part if slot in slots] for part in parts]


def minibatches_of(batch, parts, counted, config, pad, dist, advantages=None):
    """parts: for each minibatch the groups of it that this rank has -> [Minibatch]. counted (n·R, T): the tokens that
    count. advantages (n, R): groups that have no gradient are not computed; None: all are.

    A minibatch that has nothing to learn from on any rank is left out; a rank with nothing to learn from still takes
    part in the all-reduce, with a group of weight 0.
    """
    R, minibatches = batch.ended.shape[1], []
    trained = None if advantages is None else has_gradient(advantages, counted, config)
    for groups in parts:
        kept = [g for g in groups if trained is None or trained[g]]
        tokens = counted.reshape(len(batch.prompts), -1)[groups].sum().item()
        n_answers, n_tokens, n_kept = dist.sum(len(groups) * R, tokens, len(kept))
        if n_kept:
            mask = counted if kept else torch.zeros_like(counted)
            pieces = cut(batch, kept or [0], mask, config.micro_batch, pad)
            minibatches.append(Minibatch(pieces, n_answers, max(1.0, n_tokens)))
    return minibatches


def has_gradient(advantages, counted, config):
    """(n,) bool: the groups with an A ≠ 0 and a token that counts; with --skip_zero_variance false and a KL in the loss
    all groups with a token that counts."""
    has_tokens = counted.reshape(len(advantages), -1).any(1).cpu()
    if config.beta and config.kl_in == "loss" and not config.skip_zero_variance:
        return has_tokens
    return advantages.ne(0).any(1) & has_tokens


def show_samples(run, batch, total):
    """The best and the worst rollout of the group that differs most, with each part of its reward, but for "correct"
    where there is no answer to check; and how lengths, rewards and log-probabilities are distributed, for the trackers.
    total (n, R): what each earned in all."""
    step, R = run.done + 1, total.shape[1]
    g = (total.max(1).values - total.min(1).values).argmax().item()
    problem = batch.problems[g]
    lines = [f"step {step}: {problem.question}" + (f" (answer {problem.answer})" if problem.answer else "")]
    rewards = {name: values[g] for name, values in batch.rewards.items() if name != "correct" or problem.answer}
    for r in sorted({total[g].argmax().item(), total[g].argmin().item()}):
        parts = "  ".join(f"{name} {values[r]:.4g}" for name, values in rewards.items())
        lines.append(f"  [{parts}  sum {total[g, r]:.2f}]  {batch.texts[g * R + r]!r}")
    run.say("\n".join(lines))
    run.log.samples(step, "\n".join(lines))
    mask = batch.rollout.mask
    histograms = {"rewards": total, "lengths": mask.sum(1), "logprobs": batch.rollout.logprobs[mask]}
    run.log.show(step, histograms=histograms)
