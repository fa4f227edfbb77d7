"""GRPO: reinforcement learning with verifiable rewards, no value network (DeepSeekMath, arXiv:2402.03300).

From the policy gradient over PPO to GRPO, for a prompt q and a completion y = y_1 … y_T of the policy:

    ∇J   = E_π [ Σ_t A_t ∇log π(y_t | q, y_<t) ]                       A_t may have any baseline that does not see y_t
    J(θ) = E_old [ Σ_t ρ_t A_t ],   ρ_t = π_θ(y_t) / π_old(y_t)        samples of an older policy; ∇ρ = ρ ∇log π
    PPO  = E_old [ Σ_t min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t) ]

PPO's clip takes the gradient away from a token that has already moved far enough in the direction A asks for, and
from no other. Its A_t comes from a learned value V(q, y_<t). With one reward r at the end, γ = λ = 1, that is
A_t = r − V. GRPO asks the policy itself for V: answer the same prompt R times and take the mean. (The mean holds r_i
too, which only scales A_i: r_i − mean = (R − 1)/R · (r_i − mean of the others).)

    A_i  = (r_i − mean(r_1 … r_R)) / (std(r_1 … r_R) + 1e-4)           one number per completion, all its tokens
    loss = Σ_i,t w_t [ −min(ρ_t A_i, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_i) + β KL_t ]                           Eq. 3

On the first optimizer step after a rollout ρ = 1: the gradient is REINFORCE with the group's mean as baseline. The
*value* of the loss hovers near zero and means little, because the advantages of a group sum to zero. Watch the
reward, the held-out accuracy, the KL and the length. What each option changes in that gradient:

    --loss_type        w_t, the weight of a token:
        grpo           1 / (completions · |y_i|): a mean per completion; long wrong ones are punished less per token
        dapo           1 / tokens of the step: every token counts the same (arXiv:2503.14476; ε_high = 0.28)
        dr_grpo        1 / (completions · longest): a constant, and no std: unbiased (arXiv:2503.20783)
    --scale            group: easy and hard prompts, whose std is small, push as hard as the others; batch: one
                       std for all keeps the prompts' proportions; none: the plain reward difference
    --clip_high        above --clip_low it lets unlikely tokens grow further before the clip stops them (DAPO)
    --ratio sequence   ρ_i = exp(mean_t log ρ_t) for all tokens of y_i: clipping keeps or drops whole completions, and
                       one odd token no longer decides (GSPO, arXiv:2507.18071; its clips are near 4e-4)
    --kl, --kl_in, --kl_unbiased      how, and where, distance to the reference costs: see `kl_estimate`
    --entropy_bonus    adds c ∇H(π(· | q, y_<t)), which flattens the distribution at each token: see `grpo_loss`
    --mask_truncated   cut-off completions still count in the group's mean, but push no token: being cut off is not
                       the same as being wrong
    --overlong n       soft punishment instead: from 0 to −1 over the last n tokens before the limit (DAPO)
    --refill n         prompts whose R rewards are all equal have A = 0 and teach nothing; replace them by fresh ones,
                       up to n times (DAPO's dynamic sampling): more of the gradient comes from the border of what the
                       policy can do, for more rollouts
    --inner_epochs, --minibatches     more optimizer steps per rollout; from the second on ρ ≠ 1 and the clip works
    --refresh_reference n             the KL is measured from where the policy was up to n steps ago, so it slows
                       the policy down without tying it to its start

Groups without signal are skipped before the forward pass, which saves their time; the normalisers still count them, so
the gradient is the same up to rounding. (With a KL or an entropy term they are computed.)

A prompt is computed once for its group, in training as in sampling: its completions read its keys and values (`pack`).
The old log-probabilities are the ones the sampler returned, so no second forward pass is needed; the sampler uses
temperature alone, and the loss scores at that same temperature. Dropout stays off throughout, or ρ would not be 1. In
bf16 the sampler and the loss round differently and ρ is only near 1 (`ratio_max` is logged): GSPO's narrow clips want
--dtype fp32.

What others do differently: TRL's defaults are --loss_type dapo and --kl_unbiased true, and it leaves a NaN reward out
(here it is an error); verl's default is a mean over the batch's tokens, its epsilon under the std 1e-6, it bounds log ρ
to ±20 and, where A < 0, the loss at 3 |A| (dual clip, arXiv:1912.09729).

Rewards are named functions with weights (see `REWARDS`); `--reward module:function` adds your own. At the end a table
compares before and after: greedy accuracy, and pass@k of sampled answers, which tells sharpening (pass@1 rises to
what pass@k was) from new ability (pass@k rises too).

Without --init the script makes its own start on the built-in problems: a short pretraining and SFT, kept under
runs/start and reused. With --data gsm8k give it a checkpoint: --init runs/sft.

Run it:
    python grpo.py --steps 500
    python grpo.py --data gsm8k --init runs/sft --prompts 32 --rollouts 8 --max_new_tokens 200
    torchrun --nproc_per_node 8 grpo.py --init runs/sft --prompts 128
"""

import contextlib
import copy
import importlib
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import encode_prompt, load_problems, rows_at
from evaluate import (
    before_and_after,
    evaluate,
    is_correct,
    kl_estimate,
    logged,
    metric_panels,
    pass_at_k,
    sampled_kl,
)
from generate import Rollout, generate
from lora import LoraConfig, add_lora, lora_off, merged
from optim import lr_at, make_optimizers, optimizer_step
from sft import sft_start
from support.answers import extract_answer
from support.checkpoints import open_checkpoint
from support.cli import check_positive, check_rates, run
from support.devices import precision, setup
from support.errors import ConfigError, DivergedError
from support.log import Log
from support.lora_files import load_lora_state, lora_state
from support.plots import draw_curves
from support.records import fitting
from support.runs import Interrupt, load_state, open_run, save, stopped
from support.shared_prompt import answer_logprobs, moved, pack
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# Rewards: functions of (texts, problems, ended), three lists of one length, that return a number for each text.
# `ended`: the completion stopped by itself instead of being cut off.

ANSWER_LINE = re.compile(r"#### -?\$?[0-9,]*\.?[0-9]+")


def correct(texts, problems, ended):
    """1 if the number behind #### is the right one."""
    return [float(is_correct(text, problem)) for text, problem in zip(texts, problems, strict=True)]


def tidy(texts, problems, ended):
    """1 if the text stops by itself, and its last line and no other is `#### number`, bare and readable."""
    last = [(text.strip().splitlines() or [""])[-1].strip() for text in texts]
    return [
        float(e and text.count("####") == 1 and bool(ANSWER_LINE.fullmatch(line)) and extract_answer(line) is not None)
        for text, line, e in zip(texts, last, ended, strict=True)
    ]


def brevity(texts, problems, ended):
    """1 if the text is no longer than the reference solution. An empty one is short, too: see gdpo.py --conditioned."""
    return [float(len(text.strip()) <= len(p.solution)) for text, p in zip(texts, problems, strict=True)]


def integer(texts, problems, ended):
    """1 if an answer is given and it is a whole number, right or wrong."""
    return [float("." not in (extract_answer(text) or ".")) for text in texts]


REWARDS = {"correct": correct, "format": tidy, "brevity": brevity, "integer": integer}


def load_reward(path):
    """ "module:function" -> (its name, the function); modules are looked for beside the script and where one stands."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for good: the function may import others when it is called
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module trips over while it is imported
        raise ConfigError(f"--reward {path}: {type(error).__name__}: {error}") from None
    if not callable(function) or name in {*REWARDS, "overlong", "kl"}:
        raise ConfigError(f"--reward {path}: " + (f"{name} is taken" if callable(function) else "not a function"))
    return name, function


def score(functions, texts, problems, ended):
    """{name: function} -> {name: rewards (len(texts),)}. Raises ConfigError on what is no list of finite numbers."""

    def refused(what):
        if int(os.environ.get("LOCAL_RANK", 0)):  # `run` speaks for rank 0 alone, but these texts are this rank's own
            print(f"error: {what}", file=sys.stderr, flush=True)
        return ConfigError(what)

    rewards = {}
    for name, function in functions.items():
        try:
            values = torch.as_tensor(function(texts, problems, ended), dtype=torch.float32).detach().cpu()
        except Exception as error:
            raise refused(f"reward {name!r} raised {type(error).__name__}: {error}") from None
        if values.shape != (len(texts),):
            raise refused(f"reward {name!r} returned shape {tuple(values.shape)} for {len(texts)} completions")
        if not values.isfinite().all():
            bad = int(values.isfinite().logical_not().nonzero()[0])
            raise refused(f"reward {name!r} is {values[bad].item()} for the completion {texts[bad]!r}")
        rewards[name] = values
    return rewards


# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions.


def group_advantages(rewards, scale="group"):
    """rewards (N, R) -> advantages (N, R): what each rollout earned above its group's mean.

    scale: "group" divides by the group's standard deviation (ddof 1, + 1e-4), "batch" by that of all rewards,
    "none" by nothing. A group of one value, or of one rollout, gives exactly 0, never NaN.
    """
    R = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # exactly, not up to the mean's rounding
    centred = centred.masked_fill(same, 0.0)
    if scale == "none" or R == 1:
        return centred
    if scale not in ("group", "batch"):
        raise ConfigError(f"--scale {scale!r} is not known; use group, batch or none")
    std = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (std + 1e-4)


def token_weights(mask, loss_type, n_completions, n_tokens, max_length):
    """mask (B, T) -> the weight of each token in the loss (B, T): the whole difference between the loss types."""
    if loss_type == "grpo":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / n_completions
    if loss_type == "dapo":
        return mask / n_tokens
    if loss_type == "dr_grpo":
        return mask / (n_completions * max_length)
    raise ConfigError(f"--loss_type {loss_type!r} is not known; use grpo, dapo or dr_grpo")


def grpo_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    ref_logprobs=None,
    beta=0.0,
    clip_low=0.2,
    clip_high=0.2,
    loss_type="grpo",
    *,
    ratio="token",
    kl="k3",
    kl_unbiased=False,
    entropy_bonus=0.0,
    n_completions=None,
    n_tokens=None,
    max_length=None,
):
    """Log-probabilities and mask (B, T), advantages (B,) -> (loss, metrics).

    n_completions, n_tokens: of the whole optimizer step, over micro-batches and ranks; default: of this batch, which
    is then the step. max_length: dr_grpo's constant, default T. Metrics are means over this batch's tokens.

    The entropy bonus needs no distribution, only the sampled tokens: ½ (log π)² has the gradient log π ∇log π, whose
    mean over y ~ π is −∇H. (It is k2 with a uniform reference. As a value it is not the entropy.)
    """
    mask = mask.to(logprobs.dtype)
    n_completions = n_completions or len(mask)
    n_tokens = n_tokens or mask.sum().clamp(min=1)
    weight = token_weights(mask, loss_type, n_completions, n_tokens, max_length or mask.shape[1])  # (B, T)

    # What stands outside the mask is anything at all, exp of it may be inf, and inf · 0 = NaN: zero it first.
    logprobs = torch.where(mask > 0, logprobs, 0.0)
    log_ratio = logprobs - torch.where(mask > 0, old_logprobs, 0.0)
    if ratio not in ("token", "sequence"):
        raise ConfigError(f"--ratio {ratio!r} is not known; use token or sequence")
    rho = log_ratio.exp()  # (B, T)
    if ratio == "sequence":
        rho = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp().expand_as(mask)
    A = advantages[:, None]  # (B, 1)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(rho * A, clipped * A)  # the pessimistic one of the two, for either sign of A
    metrics = {"clip_fraction": masked_mean((clipped * A < rho * A).float(), mask), "ratio_max": rho.max()}
    if ref_logprobs is not None:
        ref_logprobs = torch.where(mask > 0, ref_logprobs, 0.0)
        if beta:
            cost = kl_estimate(logprobs, ref_logprobs, kl)
            per_token = per_token + beta * (log_ratio.exp() * cost if kl_unbiased else cost)
        metrics["kl"] = masked_mean(kl_estimate(logprobs.detach(), ref_logprobs, "k3"), mask)
    if entropy_bonus:
        per_token = per_token + entropy_bonus * logprobs.square() / 2
    loss = (per_token * weight).sum()
    metrics["loss"] = loss
    values = torch.stack([v.detach() for v in metrics.values()]).tolist()  # one wait for the device, not one for each
    return loss, dict(zip(metrics, values, strict=True))


def summed_advantages(rewards, weights, scale="group"):
    """rewards (N, R, M), {name: weight} of the M -> advantages (N, R): GRPO adds the rewards up, then compares."""
    total = sum(w * rewards[..., m] for m, w in enumerate(weights.values()))  # (N, R)
    return group_advantages(total, scale)


def estimate(rewards, weights, config):
    """The step from rewards to advantages, which gdpo.py replaces: -> advantages (N, R), {metric: number}."""
    return summed_advantages(rewards, weights, config.scale), {}


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Train a policy with verifiable rewards (GRPO)."""

    data: str = "word"
    """word (built-in problems), gsm8k, or the path of a .jsonl of questions and answers."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Levels of the built-in problems: 1 to 3 steps."""
    instruction: str = ""
    """Put behind each question: how to answer, for a model that was not fine-tuned on this data."""
    init: str | None = None
    """SFT checkpoint to start from, also the reference of the KL; default: made once under runs/start."""
    name: str = "grpo"
    """Run directory below runs/."""
    steps: int = 500
    """Rollout batches."""
    prompts: int = 16
    """Prompts N per step, over all ranks."""
    rollouts: int = 8
    """Completions R per prompt."""
    max_new_tokens: int = 64
    """Longest completion."""
    temperature: float = 1.0
    """Of the sampling, and of the log-probabilities in the loss."""
    refill: int = 0
    """Dynamic sampling: how many times groups of one reward are replaced by fresh prompts."""
    correct_weight: float = 1.0
    """Weight of the reward for a right answer."""
    format_weight: float = 0.1
    """Weight of the reward for the format."""
    brevity_weight: float = 0.0
    """Weight of the reward for being no longer than the reference solution."""
    integer_weight: float = 0.0
    """Weight of the reward for an answer that is a whole number."""
    reward: str | None = None
    """Your own, module:function: called with (texts, problems, ended), returns a number for each text."""
    reward_weight: float = 1.0
    """Weight of your own reward."""
    overlong: int = 0
    """Reward from 0 down to -1 over the last so many tokens before max_new_tokens."""
    mask_truncated: bool = False
    """Completions that were cut off push no token."""
    loss_type: str = "grpo"
    """grpo, dapo or dr_grpo: how a token is weighted."""
    scale: str | None = None
    """Advantages divided by the std of the group, of the batch, or none; default group, none for dr_grpo."""
    ratio: str = "token"
    """Importance ratio of each token, or of the whole sequence (GSPO)."""
    clip_low: float = 0.2
    """Lower clip range of the ratio."""
    clip_high: float | None = None
    """Upper clip range; default 0.2, 0.28 for dapo."""
    beta: float = 0.0
    """Weight of the KL to the reference; at 0 the KL is measured now and then only."""
    kl: str = "k3"
    """Estimator of the KL: k1, k2 or k3."""
    kl_in: str = "loss"
    """Where the KL costs: loss or reward."""
    kl_unbiased: bool = False
    """Multiply the KL in the loss by the importance ratio: then its gradient is that of KL(policy, reference)."""
    refresh_reference: int = 0
    """Every so many steps the policy becomes its own reference; 0 keeps the start."""
    entropy_bonus: float = 0.0
    """Weight of the entropy's gradient."""
    inner_epochs: int = 1
    """Passes over each batch of rollouts."""
    minibatches: int = 1
    """Optimizer steps in a pass."""
    micro_batch: int | None = None
    """Completions per forward pass of one rank, in whole groups: never fewer than --rollouts. Default 128 for the
    built-in problems, whose rows are short, else 32."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters instead of all weights: --lora.rank 8."""
    optimizer: str = "muon"
    """adamw, or muon for the matrices of the blocks; adamw wants about a sixth of the learning rate."""
    lr: float = 3e-4
    """Learning rate after the warm-up; it falls in a line to 0 from there."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: int = 50
    """Steps between evaluations on the validation split."""
    eval_problems: int = 200
    """Validation problems per evaluation."""
    test_problems: int = 1000
    """Held-out problems of the evaluation before and after."""
    pass_problems: int = 100
    """Of them, how many are sampled for pass@k."""
    pass_samples: int = 16
    """Samples of each, and the largest k."""
    sample_every: int = 100
    """Steps between printed rollouts."""
    save_every: int = 100
    """Steps between checkpoints of last/."""
    seed: int = 0
    """Of the prompt order and the sampling (and of the start, where one is made)."""
    resume: bool = False
    """Continue runs/NAME/last as if it had never stopped."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, fp32, bf16 or fp16; auto is bf16 where the machine is built for it (most GPUs, CPUs with AMX)."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""

    def __post_init__(self):
        if self.micro_batch is None:
            self.micro_batch = 128 if self.data == "word" else 32
        check_positive(self, "steps", "prompts", "rollouts", "max_new_tokens", "inner_epochs", "micro_batch")
        check_positive(self, "minibatches", "eval_every", "eval_problems", "test_problems", "sample_every")
        check_positive(self, "save_every", "pass_problems", "pass_samples")
        check_rates(self)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature is {self.temperature}; a policy gradient needs sampling, above 0")
        if self.rollouts < 2:
            raise ConfigError("--rollouts is 1: a group of one has no baseline, every advantage is 0; use 2 or more")
        if self.minibatches > self.prompts:
            raise ConfigError(f"--minibatches is {self.minibatches}, more than the {self.prompts} prompts of a step")
        for name in ("refill", "overlong", "refresh_reference", "beta", "entropy_bonus", "clip_low", "clip_high"):
            if not (getattr(self, name) or 0) >= 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        if self.overlong > self.max_new_tokens:
            raise ConfigError(f"--overlong {self.overlong} is more than --max_new_tokens {self.max_new_tokens}")
        if self.kl_in not in ("loss", "reward"):
            raise ConfigError(f"--kl_in {self.kl_in!r} is not known; use loss or reward")
        if self.kl_unbiased and self.kl_in == "reward":
            raise ConfigError("--kl_unbiased has no meaning with --kl_in reward, where the KL is not differentiated")
        if self.beta and (self.kl, self.kl_in, self.kl_unbiased) == ("k1", "loss", False):
            raise ConfigError(
                "--kl k1 in the loss has no gradient on average; use --kl_in reward, --kl_unbiased true, or k2 or k3"
            )
        if self.init is None and self.data != "word":
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")
        if self.scale is None:
            self.scale = "none" if self.loss_type == "dr_grpo" else "group"
        if self.clip_high is None:
            self.clip_high = 0.28 if self.loss_type == "dapo" else 0.2
        # Ask the functions themselves whether they know the names, now rather than after the set-up.
        group_advantages(torch.zeros(1, 2), self.scale)
        zeros = torch.zeros(3, 1, 1)
        grpo_loss(*zeros[:2], zeros[0, 0], zeros[0] == 0, zeros[2], 1.0, 0.2, 0.2, self.loss_type,
                  ratio=self.ratio, kl=self.kl)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Rollouts: sampled, rewarded, and packed for training.


@dataclass
class Batch:
    """This rank's groups of a step: n prompts, R completions each; row g·R + r is rollout r of prompt g."""

    problems: list  # n
    prompts: list  # n lists of ids
    rollout: Rollout  # n·R rows
    texts: list  # n·R strings
    ended: torch.Tensor  # (n, R) bool: stopped by itself
    rewards: dict  # {name: (n, R)}


def earned(functions, texts, problems, ended, lengths, config):
    """What `score` says, and --overlong: {name: (len(texts),)}."""
    rewards = score(functions, texts, problems, ended)
    if config.overlong:
        over = torch.tensor(lengths) - (config.max_new_tokens - config.overlong)
        rewards["overlong"] = -(over / config.overlong).clamp(min=0.0)
    return rewards


def roll_out(step, attempt, slots, raw, tokenizer, problems, functions, config, autocast):
    """Sample and reward the groups in `slots` (0 … prompts − 1) of step `step`.

    The prompts of a step are one row of a table, its randomness is one table of uniforms, both made from (seed, step,
    attempt) alone; slots are rows of them. So two ranks sample what one would, and a resumed run what an uninterrupted
    one would. Attempts after the first draw from an order of their own.
    """
    R, N = config.rollouts, config.prompts
    order = rows_at(len(problems), step, N, config.seed + 7_919 * attempt)
    chosen = [problems[order[slot]] for slot in slots]
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 2**40 * attempt)
    uniforms = torch.rand(N, R, config.max_new_tokens, generator=generator)[slots].flatten(0, 1)  # (n·R, T)
    prompts = [encode_prompt(tokenizer, p) for p in chosen]
    stop = tokenizer.stop_ids
    with autocast(), merged(raw):
        rollout = generate(raw, prompts, config.max_new_tokens, R, config.temperature, stop_ids=stop, uniforms=uniforms)
    ended = rollout.ended(stop).cpu()  # (n·R,)
    texts = rollout.texts(tokenizer)
    lengths = rollout.mask.sum(1).tolist()
    rewards = earned(functions, texts, [p for p in chosen for _ in range(R)], ended.tolist(), lengths, config)
    rewards = {name: values.view(-1, R) for name, values in rewards.items()}
    return Batch(chosen, prompts, rollout, texts, ended.view(-1, R), rewards)


def put(batch, where, new):
    """Replace the groups `where` of the batch by those of `new`, in place."""
    R = batch.ended.shape[1]
    rows = [g * R + r for g in where for r in range(R)]
    for name in ("ids", "mask", "logprobs"):
        mine, theirs = getattr(batch.rollout, name), getattr(new.rollout, name)  # (n·R, T) of one T and of another
        T = max(mine.shape[1], theirs.shape[1])
        mine = F.pad(mine, (0, T - mine.shape[1]))
        mine[rows] = F.pad(theirs, (0, T - theirs.shape[1]))
        setattr(batch.rollout, name, mine)
    for i, g in enumerate(where):
        batch.problems[g], batch.prompts[g] = new.problems[i], new.prompts[i]
        batch.texts[g * R : g * R + R] = new.texts[i * R : i * R + R]
        batch.ended[g] = new.ended[i]
        for name, values in batch.rewards.items():
            values[g] = new.rewards[name][i]


@dataclass
class Piece:
    """A micro-batch of b completions, ready for every inner epoch."""

    rows: list  # b, which rows of the batch
    packed: tuple  # what `pack` made of them
    mask: torch.Tensor  # (b, T), T their longest


def cut(batch, groups, counted, config, device, pad):
    """Micro-batches of the given groups. counted (n·R, T): the tokens that count in the loss."""
    R, size = config.rollouts, max(1, config.micro_batch // config.rollouts)
    lengths, ids = batch.rollout.mask.sum(1).tolist(), batch.rollout.ids.tolist()
    answers = [[ids[g * R + r][: lengths[g * R + r]] for r in range(R)] for g in range(len(batch.prompts))]
    groups = sorted(groups, key=lambda g: len(batch.prompts[g]))  # wastes less padding
    pieces = []
    for i in range(0, len(groups), size):
        some = groups[i : i + size]
        rows = [g * R + r for g in some for r in range(R)]
        packed = pack([batch.prompts[g] for g in some], [answers[g] for g in some], pad)
        pieces.append(Piece(rows, moved(packed, device), counted[rows, : max(lengths[row] for row in rows)]))
    return pieces


def minibatches_of(batch, useful, counted, slots, config, dist, pad):
    """The step cut into --minibatches: -> [(pieces, completions, tokens)], one for each optimizer step.

    The counts are those of the whole minibatch, all ranks, skipped groups too: how it is cut into pieces never changes
    the gradient. A minibatch that has nothing to learn from on any rank is left out.
    """
    R, steps = config.rollouts, []
    for m in range(config.minibatches):
        mine = [g for g, slot in enumerate(slots) if slot % config.minibatches == m]  # the same cut for any world
        kept = [g for g in mine if useful[g]]
        tokens = counted.reshape(len(slots), -1)[mine].sum().item()
        n_completions, n_tokens, n_kept = dist.sum(len(mine) * R, tokens, len(kept))
        if n_kept:
            # A rank with nothing to learn from still takes part in the all-reduce, with a group of weight 0.
            mask = counted if kept else torch.zeros_like(counted)
            steps.append((cut(batch, kept or [0], mask, config, dist.device, pad), n_completions, max(1.0, n_tokens)))
    return steps


@torch.no_grad()
def reference_logprobs(reference, raw, pieces, batch, config, autocast):
    """log π_ref of the pieces' completions, at their rows of a (n·R, T) tensor that is 0 elsewhere.

    With LoRA the reference is the policy itself without its adapters: no second model in memory.
    """
    out = torch.zeros_like(batch.rollout.logprobs)
    with lora_off(raw), autocast():
        for piece in pieces:
            T = piece.mask.shape[1]
            out[piece.rows, :T] = answer_logprobs(reference, piece.packed, config.temperature)[:, :T].float()
    return out


def gather(values, dist):
    """(n, …) of each rank -> (N, …), in rank order, on the CPU."""
    if dist.world == 1:
        return values
    everywhere = [torch.empty_like(values).to(dist.device) for _ in range(dist.world)]
    torch.distributed.all_gather(everywhere, values.contiguous().to(dist.device))
    return torch.cat(everywhere).cpu()


# ---------------------------------------------------------------------------------------------------------------
# The loop.


def load_splits(config, tokenizer, context, dist):
    """{"train", "valid", "test"}: the problems whose prompts leave room for an answer."""
    sizes = {"train": None, "valid": config.eval_problems, "test": config.test_problems}
    problems = {}
    for split, n in sizes.items():
        found = load_problems(config.data, split, n, tuple(config.levels))
        if config.instruction:
            found = [replace(p, question=f"{p.question}\n{config.instruction}") for p in found]
        if config.correct_weight and (unanswered := sum(not p.answer for p in found)):
            raise ConfigError(
                f"{unanswered} of {len(found)} {split} problems of {config.data} have no answer after ####, so no "
                "rollout can be right: leave them out, or give another --reward and --correct_weight 0"
            )
        lengths = [len(encode_prompt(tokenizer, p)) for p in found]
        problems[split] = fitting(found, lengths, context - config.max_new_tokens, f"{split} prompt", dist)
    return problems


def reward_functions(config):
    """-> {name: function}, {name: weight} of the rewards that count. Weight 0: measured, not rewarded."""
    functions = dict(REWARDS)
    weights = {name: getattr(config, f"{name}_weight") for name in REWARDS}
    if config.reward:
        name, function = load_reward(config.reward)
        functions[name], weights[name] = function, config.reward_weight
    if config.overlong:
        weights["overlong"] = 1.0
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ConfigError("every reward has weight 0: there is nothing to learn")
    return functions, weights


def stacked(batch, weights, config):
    """The rewards that have a weight, (n, R, M): what is paid for, which gdpo.py may make depend on the answer."""
    return torch.stack([batch.rewards[name] for name in weights], dim=-1)


def main(config, estimate=estimate, stacked=stacked):
    """Train; returns {"before", "after"} (test accuracies), "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    if config.prompts % dist.world:
        raise ConfigError(f"--prompts {config.prompts} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    functions, weights = reward_functions(config)
    init = config.init or sft_start(config, dist)
    raw, tokenizer, _ = open_checkpoint(init, dist.device)
    shared = config.lora.rank and not config.refresh_reference  # then the reference is raw without its adapters
    reference = raw if shared else copy.deepcopy(raw).requires_grad_(False)
    add_lora(raw, **asdict(config.lora), seed=config.seed)
    problems = load_splits(config, tokenizer, raw.config.context, dist)

    run_dir = open_run(config, dist)
    optimizers = make_optimizers(raw, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    first, best, before, start = 0, -1.0, None, {}
    if config.resume:
        state = load_state(run_dir, dist, raw, optimizers, scaler, config)
        first, best, before, start = (state[name] for name in ("step", "best", "before", "start"))
        began -= state["seconds"]
        if config.lora.rank:  # what the adapters correct are the weights of --init
            load_lora_state(raw, state["lora"], open_checkpoint(init)[0])
        if state["reference"] is not None:
            reference.load_state_dict(state["reference"])
    model = DistributedDataParallel(raw, broadcast_buffers=False) if dist.world > 1 else raw
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)
    raw.eval()  # for good: with dropout the ratio on fresh rollouts would not be 1

    if before is None:
        before = held_out(raw, tokenizer, problems, config, dist)
        start, best = validate(raw, tokenizer, problems, functions, weights, config, dist)
        save(run_dir, "best", dist, raw, tokenizer, chat=True)  # until something beats it, the start is the best
    if first == 0:  # a run that was stopped before its first step has not kept it
        log(0, **start)
    if dist.is_main:
        print(
            f"{raw.num_params():,} parameters from {init}; {len(problems['train']):,} training prompts; "
            f"test accuracy before: {before['accuracy']:.1%}"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "config": asdict(config), "scaler": scaler.state_dict()}
            state |= {"before": before, "start": start, "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"seconds": time.perf_counter() - began, "lora": lora_state(raw)}
            state |= {"reference": reference.state_dict() if config.refresh_reference else None}
        return save(run_dir, name, dist, raw, tokenizer, chat=True, state=state)

    def alive(batch):
        """(n,): which groups have a signal."""
        return estimate(stacked(batch, weights, config), weights, config)[0].ne(0).any(1)

    sampler = (raw, tokenizer, problems["train"], functions, config, autocast)
    R, share = config.rollouts, config.prompts // dist.world
    slots = list(range(dist.rank * share, (dist.rank + 1) * share))  # this rank's groups among those of the step
    in_reward, in_loss = (config.beta > 0 and config.kl_in == where for where in ("reward", "loss"))
    options = {name: getattr(config, name) for name in ("clip_low", "clip_high", "loss_type", "ratio", "kl")}
    options |= {"beta": config.beta if in_loss else 0.0, "entropy_bonus": config.entropy_bonus}
    options |= {"kl_unbiased": config.kl_unbiased, "max_length": config.max_new_tokens}
    pad = tokenizer.endoftext_id
    kl, warned, extra, found = 0.0, False, {}, start
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)
        if config.refresh_reference and step and step % config.refresh_reference == 0:
            reference.load_state_dict(raw.state_dict())
        measure = step == 0 or (step + 1) % config.eval_every == 0  # the KL, which costs a forward pass

        # ------------------------------------------------------------------ roll out and reward
        started = time.perf_counter()
        batch = roll_out(step, 0, slots, *sampler)
        # before any refill, which would flatter the policy
        figures = tally(batch, stacked(batch, weights, config), weights, alive(batch))
        for attempt in range(1, config.refill + 1):
            dead = alive(batch).logical_not().nonzero().squeeze(1).tolist()
            if dead:
                put(batch, dead, roll_out(step, attempt, [slots[g] for g in dead], *sampler))
        sampled = time.perf_counter()

        # ------------------------------------------------------------------ advantages
        ref_logprobs = None
        # Over all ranks, because a std over the batch, in some of the estimates, needs them all.
        advantages, extra = estimate(gather(stacked(batch, weights, config), dist), weights, config)  # (N, R)
        advantages = advantages[slots]  # (n, R)
        if in_reward:  # the KL of the whole completion, at −β: behind the std, which would blow it up in even groups
            pieces = cut(batch, range(share), batch.rollout.mask, config, dist.device, pad)
            ref_logprobs = reference_logprobs(reference, raw, pieces, batch, config, autocast)
            kl_tokens = kl_estimate(batch.rollout.logprobs, ref_logprobs, config.kl) * batch.rollout.mask  # (n·R, T)
            cost = batch.rewards["kl"] = kl_tokens.sum(1).view(-1, R).cpu()
            advantages = advantages - config.beta * (cost - cost.mean(1, keepdim=True))
        counted = batch.rollout.mask  # (n·R, T) the tokens that count in the loss
        if config.mask_truncated:
            counted = counted & batch.ended.flatten()[:, None].to(counted.device)

        # ------------------------------------------------------------------ minibatches, one optimizer step each
        useful = advantages.ne(0).any(1) & counted.reshape(share, -1).any(1).cpu()
        if in_loss or config.entropy_bonus:  # then every group has something to say
            useful = torch.ones(share, dtype=torch.bool)
        A = advantages.flatten().to(dist.device)  # (n·R,)
        minibatches = minibatches_of(batch, useful, counted, slots, config, dist, pad)
        if ref_logprobs is None and (in_loss or measure):
            pieces = [piece for pieces, *_ in minibatches for piece in pieces]
            ref_logprobs = reference_logprobs(reference, raw, pieces, batch, config, autocast)

        # ------------------------------------------------------------------ inner epochs
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        sums, norm, trained, updates = {"ratio_max": 0.0}, 0.0, 0, 0
        for pieces, n_completions, n_tokens in minibatches * config.inner_epochs:
            for piece in pieces:
                last = piece is pieces[-1]
                # DDP sums up the gradients over the ranks in the last backward alone, and divides by their number
                with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                    rows, T = piece.rows, piece.mask.shape[1]
                    with autocast():
                        logprobs = answer_logprobs(model, piece.packed, config.temperature)[:, :T]  # (b, T)
                    old = batch.rollout.logprobs[rows, :T]
                    ref = None if ref_logprobs is None else ref_logprobs[rows, :T]
                    step_of = {"n_completions": n_completions, "n_tokens": n_tokens}
                    loss, metrics = grpo_loss(logprobs, old, A[rows], piece.mask, ref, **options, **step_of)
                    scaler.scale(loss * dist.world).backward()
                count = piece.mask.sum().item()
                trained += count
                sums["ratio_max"] = max(sums["ratio_max"], metrics.pop("ratio_max"))
                for name, value in metrics.items():  # the loss is a sum over pieces, the others means over tokens
                    sums[name] = sums.get(name, 0.0) + value * (1 if name == "loss" else count)
            norm = optimizer_step(raw, optimizers, scaler, autocast, lr, config.clip)
            if not math.isfinite(norm) and not scaler.is_enabled():  # a scaler meets inf, skips the step, goes lower
                where = f"at step {step} (learning rate {lr:.1e})"
                raise DivergedError(f"the gradient is {norm} {where}; try a smaller --lr")
            updates += 1

        # ------------------------------------------------------------------ metrics: what matters first
        done = step + 1
        record = summarise(figures, sums, trained, config, dist) | extra
        # No scaler mends these. The entropy, as a step without a signal has no loss.
        if not math.isfinite(record["loss"] + record["entropy"]):
            said = f"the loss is {record['loss']}, the entropy {record['entropy']} at step {step}"
            raise DivergedError(f"{said} (learning rate {lr:.1e}); try a smaller --lr, or --dtype fp32")
        record |= {"grad_norm": norm, "lr": lr, "loss": record.pop("loss") / max(1, updates)}
        record |= {"seconds_rollout": sampled - started, "steps_per_second": 1 / (time.perf_counter() - started)}
        if done % config.eval_every == 0 or done == config.steps:
            found, chosen_by = validate(raw, tokenizer, problems, functions, weights, config, dist)
            record |= found
            if chosen_by > best:
                best = chosen_by
                checkpoint("best", done)
            if found["accuracy"] < start["accuracy"] - 0.1 and not warned and dist.is_main:
                warned = True
                bar.write(
                    f"WARNING: validation accuracy fell from {start['accuracy']:.1%} to {found['accuracy']:.1%}: the "
                    f"policy is collapsing. Try a smaller --lr than {config.lr:.0e}, or a larger --beta; best/ keeps "
                    "the best."
                )
        log(done, **record)
        kl = record.get("kl", kl)
        if dist.is_main and (done == 1 or done % config.sample_every == 0):
            show_samples(bar, log, done, batch, stacked(batch, weights, config), weights)
        bar.set_postfix(
            reward=f"{record['reward']:.2f}",
            **{name: f"{value:.3f}" for name, value in found.items()},
            kl=f"{kl:.3f}",
            length=f"{record['length']:.0f}",
            refresh=False,
        )
    checkpoint("last", config.steps)
    interrupt.release()
    log.close()
    after = held_out(raw, tokenizer, problems, config, dist)
    # The reference may have moved on from the start; with LoRA the start is the policy without its adapters.
    origin = raw if config.lora.rank else open_checkpoint(init, dist.device)[0].eval()
    prompts = [encode_prompt(tokenizer, p) for p in problems["test"][:200]]
    kl = sampled_kl(raw, origin, tokenizer, prompts, config.max_new_tokens, dist, config.seed, config.micro_batch)
    seconds = time.perf_counter() - began
    if dist.is_main:
        report(config, run_dir, before, after, kl, seconds, weights, extra)
    return {"before": before, "after": after, "kl": kl, "seconds": seconds, "path": str(run_dir / "last")}


def tally(batch, paid, weights, alive):
    """Sums over this rank's completions, of the policy as it is: {metric: number}. paid (n, R, M): see `stacked`."""
    figures = {"reward": sum(w * paid[..., m].sum() for m, w in enumerate(weights.values()))}
    figures |= {f"reward_{name}": values.sum() for name, values in batch.rewards.items()}
    figures |= {"truncated": batch.ended.logical_not().sum(), "zero_variance": alive.logical_not().sum()}
    figures |= {"length": batch.rollout.mask.sum()}
    return figures | {"entropy": -(batch.rollout.logprobs * batch.rollout.mask).sum()}  # E[−log π], by the samples


def summarise(figures, sums, trained, config, dist):
    """The record of a step, means over all ranks, but ratio_max: this rank's. figures: what `tally` counted; sums: over
    the tokens trained on."""
    means = [name for name in ("kl", "clip_fraction") if name in sums]
    values = [*figures.values(), *(sums[k] for k in means), trained, sums.get("loss", 0.0)]
    *values, trained, loss = dist.sum(*values)
    total = dict(zip([*figures, *means], values, strict=True))
    n = config.prompts * config.rollouts
    record = {name: total[name] / n for name in figures}
    record["entropy"] = total["entropy"] / total["length"]  # per token, not per completion
    record["zero_variance"] = total["zero_variance"] / config.prompts
    if trained:
        record |= {name: total[name] / trained for name in means} | {"ratio_max": sums["ratio_max"]}
    return record | {"loss": loss}


def show_samples(bar, log, step, batch, paid, weights):
    """The best and the worst rollout of the group that differs most, with each part of its reward; and how lengths,
    rewards and log-probabilities are distributed, for the trackers."""
    total = sum(w * paid[..., m] for m, w in enumerate(weights.values()))  # (n, R)
    g = (total.max(1).values - total.min(1).values).argmax().item()
    lines = [f"step {step}: {batch.problems[g].question} (answer {batch.problems[g].answer})"]
    for r in sorted({total[g].argmax().item(), total[g].argmin().item()}):
        parts = "  ".join(f"{name} {values[g, r]:.4g}" for name, values in batch.rewards.items())
        lines.append(f"  [{parts}  sum {total[g, r]:.2f}]  {batch.texts[g * total.shape[1] + r]!r}")
    bar.write("\n".join(lines))
    log.samples(step, "\n".join(lines))
    mask = batch.rollout.mask
    log.show(step, histograms={"rewards": total, "lengths": mask.sum(1), "logprobs": batch.rollout.logprobs[mask]})


def validate(raw, tokenizer, problems, functions, weights, config, dist):
    """-> what is logged of greedy answers, and by what best/ is chosen: the accuracy, or if no problem has an answer to
    check, what the greedy answers earn, {"valid_reward"} then too."""
    with merged(raw):
        result = evaluate(raw, tokenizer, problems["valid"], config.max_new_tokens, dist)
    found = logged(result)
    if any(p.answer for p in problems["valid"]):
        return found, result["accuracy"]
    rows = [(s.text, s.problem, s.ended, s.length) for s in result["samples"]]  # this rank's
    rewards = earned(functions, *(list(part) for part in zip(*rows, strict=True)), config) if rows else {}
    (total,) = dist.sum(sum(weights[name] * values.sum() for name, values in rewards.items() if name in weights))
    found["valid_reward"] = total / result["n"]
    return found, found["valid_reward"]


def held_out(raw, tokenizer, problems, config, dist):
    """The test split: greedy accuracy, and how many of `pass_samples` samples of each problem are right ("solved")."""
    with merged(raw):
        result = evaluate(raw, tokenizer, problems["test"], config.max_new_tokens, dist)
    some = problems["test"][: config.pass_problems]
    n, T = config.pass_samples, config.max_new_tokens
    uniforms = torch.rand(len(some), n, T, generator=torch.Generator().manual_seed(config.seed))
    solved = [0] * len(some)
    mine = range(dist.rank, len(some), dist.world)
    for i in range(0, len(mine), config.prompts):
        chunk = list(mine[i : i + config.prompts])
        prompts = [encode_prompt(tokenizer, some[p]) for p in chunk]
        table = uniforms[chunk].flatten(0, 1)
        with merged(raw):
            rollout = generate(raw, prompts, T, n, config.temperature, stop_ids=tokenizer.stop_ids, uniforms=table)
        for row, text in enumerate(rollout.texts(tokenizer)):
            solved[chunk[row // n]] += is_correct(text, some[chunk[row // n]])
    kept = {name: value for name, value in result.items() if name != "samples"}
    return kept | {"solved": [int(c) for c in dist.sum(*solved)]}


def report(config, run_dir, before, after, kl, seconds, weights, extra):
    """The table of before and after, and the curves."""
    n = config.pass_samples
    rows = [["KL to the start, nats per token", f"{0:.4f}", f"{kl:.4f}"]]
    for k in sorted({1, round(n**0.5), n}):
        means = [sum(pass_at_k(n, c, k) for c in r["solved"]) / len(r["solved"]) for r in (before, after)]
        rows.append([f"pass@{k}", *(f"{mean:.1%}" for mean in means)])
    pairs = list(zip(before["solved"], after["solved"], strict=True))
    note = (
        f"pass@k: {n} samples of each of {len(pairs)} problems, of which "
        f"{sum(a > 0 and not b for b, a in pairs)} were never solved before and are now, "
        f"{sum(b > 0 and not a for b, a in pairs)} the other way round"
    )
    before_and_after(before, after, config.steps, seconds, rows, [note])
    drawn = {f"reward_{name}": name for name in weights}
    lost = {"zero_variance": "no signal"} | {name: name.replace("_", " by ") for name in extra if "collapsed" in name}
    draw_curves(
        run_dir,
        f"{config.data}, seed {config.seed}: accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}",
        [
            *metric_panels(),
            ("rewards", drawn, "mean over rollouts", {}),
            ("entropy and KL", {"entropy": "entropy", "kl": "KL to the reference"}, "nats per token", {}),
            ("completion length", {"length": "mean"}, "tokens", {}),
            ("groups without a signal", lost, "share of groups", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    print(f"{run_dir}/last, {run_dir}/best, {run_dir}/curves.png, {run_dir}/samples.md")


if __name__ == "__main__":
    run(main, Config, __doc__)
