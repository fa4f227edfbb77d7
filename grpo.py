"""GRPO: reinforcement learning from verifiable rewards, without a value network (DeepSeekMath, arXiv:2402.03300).

Ask a question, let the policy answer it R times, check each answer. An answer that is better than its siblings becomes
more likely, token by token; one that is worse becomes less likely.

The policy gradient. For a question q, an answer y = y_1 … y_T of the policy π, and its reward r(y):

    J  = E[r(y)]                                            y ~ π(· | q)
    ∇J = E[r(y) ∇log π(y)]                                  because ∇π = π ∇log π
       = E[Σ_t (r(y) − c) ∇log π(y_t | q, y_<t)]            for any baseline c that does not see y: E[∇log π(y)] = 0

GRPO makes three choices:

    baseline c             the mean of the group, so no value network: A_i = (r_i − mean(r)) / (std(r) + 1e-4). The mean
                           holds r_i too, which shortens the gradient by (R − 1) / R; the std is a heuristic
    several updates        weigh a token by the ratio ρ_t = π(y_t) / π_old(y_t), as π_old sampled it, and stop at PPO's
    from one batch         clip: min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i)                                 (its Eq. 3)
    distance to the start  a penalty β ρ_t k3_t, with k3 = x − 1 − log x and x = π_ref(y_t) / π(y_t): its gradient is
                           β ρ_t log(π / π_ref) ∇log π, in expectation that of β KL(π ‖ π_ref)   (Eq. 4, and ρ_t added)

One step, here for one process and the defaults; `main` has the same five parts. A *batch* is a step's N·R answers, a
*minibatch* the whole groups of one *update* (optimizer step), a *piece* what fits into one forward pass.

    batch   = roll_out(step)                         N·R answers: ids, mask, log π_old   (N·R, T)         1. ask
              and judges them:                       the rewards that have a weight      (N, R, 2)        2. judge
    A       = group_advantages(rewards · weights)    mean 0 in each group                (N, R)           3. compare
    ref     = reference_logprobs(batch)              log π_ref, no gradient              (N·R, T)         4. update
    for minibatch in minibatches_of(batch):          groups without a signal left out
        logprobs = shared_answer_logprobs(pieces)    log π; ρ = 1 in the first minibatch (b, T)
        loss     = Σ_i,t v_t (−min(ρ A, clip(ρ) A) + β ρ k3)      v_t = 1 / (answers of the minibatch · |y_i|)
        backward, clip the gradient's norm, optimizer step
    log; every so often answer validation questions                                                       5. look

The defaults run all five parts: 12 questions × 8 answers, two minibatches, ε = 0.2, β = 0.3, a reward of 1 if the
answer is right and 0.1 if it is well formed. A group whose answers all earn the same has A = 0; it is left out, its KL
too, and its answers and tokens still count in v_t (--skip_zero_variance). Off: asymmetric clips, sequence-level ratios,
length penalties, dynamic sampling, a moving reference, LoRA. Dropout is always off.

What to watch. Not the loss: the advantages of a group sum to 0, so in the first minibatch its policy term is 0 (with
the default weights v_t), and the gradient is not. Watch each reward, the validation accuracy, the KL, the clip
fraction, the length, and the share of groups without a signal. And `story_kept`, which the evaluation measures: whether
an answer still speaks of the question's names and things. What is not rewarded is lost: with --beta 0
the accuracy ends as high, and Anna's pears turn into eggs (results/grpo_word.md).

What changes the gradient of a token:

    --minibatches, --inner_epochs     more updates per batch: ρ moves away from 1, more tokens are clipped and have the
                       KL's gradient alone. One of each: ρ = 1, no clip acts, REINFORCE with a group baseline
    --clip_low, --clip_high           where tokens of A < 0 and of A > 0 are stopped; a higher clip_high lets unlikely
                       tokens grow further (DAPO)
    --loss_type        the weight v_t, for the KL as well, and what goes with it (`OBJECTIVES`):
        grpo           1 / (answers · |y_i|): a mean per answer; a long wrong one is punished less per token
        dapo           1 / tokens of the minibatch: every token counts the same (arXiv:2503.14476; ε_high = 0.28)
        dr_grpo        1 / (answers · longest possible): a constant, and no std (arXiv:2503.20783)
    --scale            group: A is divided by its group's std, so a very easy or very hard question, and one where only
                       the format differs, push as hard as others; batch: one std for all; none: the difference itself
    --ratio sequence   one ρ_i = exp(mean_t log ρ_t) for all tokens of y_i: the clip keeps or drops whole answers, and
                       one odd token no longer decides (GSPO, arXiv:2507.18071; its clips are near 4e-4). The KL term
                       keeps each token's own ρ_t
    --beta             the KL's part of the gradient. --kl_unbiased false: β (1 − x), at most β however unlikely the
                       start finds the token; that is the paper's. --kl k2: β log(π / π_ref) without ρ.
                       --kl_in reward: no term of its own; each answer's KL is taken off its advantage instead
    --mask_truncated   answers that were cut off count in the group's mean, but their tokens get no gradient
    --overlong n       a reward from 0 down to −1 over the last n tokens before the limit (DAPO)
    --refill n         replace groups without a signal by fresh ones, up to n times (DAPO's dynamic sampling)
    --refresh_reference n             every n steps the policy becomes the reference
    --temperature      of the sampling and of log π in the loss alike

Three traps. The sampler uses temperature alone (no top-k, no top-p), as the loss scores the distribution that was
sampled, or ρ would not be 1 on fresh answers. In bf16 sampler and loss round differently and ρ is only near 1: GSPO's
narrow clips want --dtype fp32. Answers and tokens are counted over the whole minibatch and all ranks before it is cut
into pieces, or the gradient would depend on the cut.

A prompt is computed once for its group, in training as in sampling: its answers read its keys and values
(support/shared_prompt.py, the fast form of transformer.answer_logprobs).

What others do differently: TRL's default is --loss_type dapo, and it leaves a NaN reward out (here it is an error);
verl's default is a mean over the batch's tokens, its epsilon under the std 1e-6, it bounds log ρ to ±20 and, where
A < 0, the loss at 3 |A| (dual clip, arXiv:1912.09729).

Rewards are named functions with weights (`REWARDS`); `--reward module:function` adds your own. At the end a table
compares before and after: greedy accuracy, and pass@k of sampled answers, which tells sharpening (pass@1 rises to what
pass@k was) from new ability (pass@k rises too). Without --init the script makes its own start on the built-in problems,
a short pretraining and SFT, kept under runs/start and reused.

Run it:
    python grpo.py --demo                                            four answers of two tokens, by hand
    python grpo.py --steps 500                                       from nothing, minutes on two CPU cores
    python grpo.py --data gsm8k --init runs/sft --max_new_tokens 200
    torchrun --nproc_per_node 8 grpo.py --init runs/sft --prompts 128
"""

import contextlib
import copy
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from data import DEFAULT_TASK, TASKS, encode_prompt, load_problems, task_of
from evaluate import add_figures, evaluate, evaluate_samples, is_correct, kl_estimate, logged, sampled_kl, verifiable
from lora import LoraConfig, add_lora, lora_off, merged
from optim import lr_at, make_optimizers, optimizer_step
from ppo import less_baseline
from sft import sft_start
from support.answers import extract_answer
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Positive, Whole, listed
from support.cli import run_script
from support.content import code_of, records_of, weights_of
from support.devices import precision, setup
from support.errors import ConfigError
from support.grpo_report import report, rollout_sums, step_record
from support.lora_files import LoraState
from support.records import load_splits
from support.rewards import load_reward, score
from support.rollouts import Sampler, cut, minibatches_of, show_samples
from support.runs import Run, RunConfig
from support.shared_prompt import shared_answer_logprobs
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# Rewards: functions of (texts, problems, ended), three lists of one length, that return a number for each text.
# `ended`: the completion stopped by itself instead of being cut off.

ANSWER_LINE = re.compile(r"#### -?\$?[0-9,]*\.?[0-9]+")


def accuracy_reward(texts, problems, ended):
    """1 if the number after #### is the right one."""
    return [float(is_correct(text, problem)) for text, problem in zip(texts, problems, strict=True)]


def format_reward(texts, problems, ended):
    """1 if the text stops by itself, and its last line and no other is `#### number`, bare and readable."""
    last = [(text.strip().splitlines() or [""])[-1].strip() for text in texts]
    return [
        float(e and text.count("####") == 1 and bool(ANSWER_LINE.fullmatch(line)) and extract_answer(line) is not None)
        for text, line, e in zip(texts, last, ended, strict=True)
    ]


def brevity_reward(texts, problems, ended):
    """1 if the text is no longer than the problem's solution. An empty one is short, too: see gdpo.py --conditioned."""
    return [float(len(text.strip()) <= len(p.solution.strip())) for text, p in zip(texts, problems, strict=True)]


REWARDS = {"correct": accuracy_reward, "format": format_reward, "brevity": brevity_reward}


# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions.


def group_advantages(rewards, scale="group", baseline="mean"):
    """rewards (N, R) -> advantages (N, R): what each rollout earned above its group's baseline.

    scale: "group" divides by the group's standard deviation (ddof 1, + 1e-4), "batch" by that of all rewards,
    "none" by nothing. baseline: see `ppo.less_baseline`. With a baseline a group whose rewards are all equal gives
    exactly 0, and so does a group of one: never NaN.
    """
    centred = less_baseline(rewards, baseline)
    if scale == "none" or rewards.shape[1] == 1:
        return centred
    if scale not in ("group", "batch"):
        raise ConfigError(f"--scale {scale!r} is not known; use group, batch or none")
    std = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (std + 1e-4)


def clip_surrogate(rho, A, logprobs, clip_low, clip_high):
    """PPO's limit on a token (Eq. 3): min(ρ A, clip(ρ) A), the pessimistic one of the two, for either sign of A.

    rho (B, T), A (B, 1) -> the objective of each token (B, T), to be maximised, and where the limit was at work,
    (B, T) bool: the clip fraction. logprobs (B, T): not needed here, but by surrogates with another gradient.
    """
    plain, clipped = rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A
    return torch.minimum(plain, clipped), clipped < plain


def per_completion(mask, n_completions, n_tokens, max_length):
    """GRPO: a mean over each completion's tokens, then over the completions. (B, T)"""
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / n_completions


def per_token(mask, n_completions, n_tokens, max_length):
    """DAPO: a mean over all tokens of the minibatch. (B, T)"""
    return mask / n_tokens


def by_a_constant(mask, n_completions, n_tokens, max_length):
    """Dr. GRPO: a sum over each completion's tokens, divided by the longest that there may be. (B, T)"""
    return mask / (n_completions * max_length)


@dataclass(frozen=True)
class Objective:
    """A policy objective: the weights of its tokens, the limit on a token, and its paper's defaults for --scale and
    --clip_high."""

    weights: Callable  # (mask, n_completions, n_tokens, max_length) -> the weight of each token (B, T)
    surrogate: Callable = clip_surrogate
    scale: str = "group"
    clip_high: float = 0.2


OBJECTIVES = {
    "grpo": Objective(per_completion),
    "dapo": Objective(per_token, clip_high=0.28),
    "dr_grpo": Objective(by_a_constant, scale="none"),
}


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
    n_completions=None,
    n_tokens=None,
    max_length=None,
):
    """Log-probabilities and mask (B, T), advantages (B,) -> (loss, metrics). loss_type: a row of OBJECTIVES.

    n_completions, n_tokens: of the whole minibatch, over pieces and ranks; default: of these B answers alone.
    max_length: dr_grpo's constant, default T. Metrics: the loss, and means over these answers' tokens, of ratio_max the
    maximum. The defaults here have no KL; those of a run are in Config.
    """
    if loss_type not in OBJECTIVES:
        raise ConfigError(f"--loss_type {loss_type!r} is not known; use {listed(OBJECTIVES)}")
    if ratio not in ("token", "sequence"):
        raise ConfigError(f"--ratio {ratio!r} is not known; use token or sequence")
    objective, mask = OBJECTIVES[loss_type], mask.to(logprobs.dtype)
    n_completions = n_completions or len(mask)
    n_tokens = n_tokens or mask.sum().clamp(min=1)
    weight = objective.weights(mask, n_completions, n_tokens, max_length or mask.shape[1])  # (B, T)

    # What stands outside the mask is anything at all, exp of it may be inf, and inf · 0 = NaN: zero it first.
    logprobs = torch.where(mask > 0, logprobs, 0.0)
    log_ratio = logprobs - torch.where(mask > 0, old_logprobs, 0.0)
    rho = log_ratio.exp()  # (B, T)
    if ratio == "sequence":
        rho = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp().expand_as(mask)
    gain, limited = objective.surrogate(rho, advantages[:, None], logprobs, clip_low, clip_high)  # (B, T) each
    cost = -gain
    spread = masked_mean((rho - 1).abs(), mask)  # 0 on fresh rollouts
    metrics = {"clip_fraction": masked_mean(limited.float(), mask), "ratio_spread": spread, "ratio_max": rho.max()}
    if ref_logprobs is not None:
        ref_logprobs = torch.where(mask > 0, ref_logprobs, 0.0)
        if beta:
            distance = kl_estimate(logprobs, ref_logprobs, kl)
            cost = cost + beta * (log_ratio.exp() * distance if kl_unbiased else distance)
        metrics["kl"] = masked_mean(kl_estimate(logprobs.detach(), ref_logprobs, "k3"), mask)
    loss = (cost * weight).sum()
    metrics["loss"] = loss
    values = torch.stack([v.detach() for v in metrics.values()]).tolist()  # one wait for the device, not one for each
    return loss, dict(zip(metrics, values, strict=True))


def reward_sums(rewards, weights):
    """rewards (N, R, M), {name: weight} of the M -> (N, R)."""
    return sum(w * rewards[..., m] for m, w in enumerate(weights.values()))


def summed_advantages(rewards, weights, scale="group"):
    """rewards (N, R, M) -> advantages (N, R): GRPO adds the rewards up, then compares."""
    return group_advantages(reward_sums(rewards, weights), scale)


def advantages_of(rewards, weights, config):
    """The step from rewards to advantages, which gdpo.py replaces: -> advantages (N, R), {metric: number}."""
    return summed_advantages(rewards, weights, config.scale), {}


# ---------------------------------------------------------------------------------------------------------------
# By hand.


def demo():
    """One group of four answers of two tokens, from the rewards to the gradient of every token."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])  # (N, R) = (1, 4): right, wrong, wrong, right
    A = group_advantages(rewards)[0]  # (R,)
    mean, std = 0.5, (4 * 0.5**2 / 3) ** 0.5  # 0.5774, with R − 1
    assert torch.allclose(A, (rewards[0] - mean) / (std + 1e-4))
    print("2 + 3 = ?              four answers of two tokens, sampled by π_old; 1 is right")
    print("rewards               ", *(f"{r:11.0f}" for r in rewards[0]))
    print("advantages A          ", *(f"{a:+11.2f}" for a in A), f"   (r − {mean}) / {std:.4f}")

    old = torch.tensor([[0.5, 0.8], [0.5, 0.9], [0.2, 0.9], [0.5, 0.8]]).log()  # (R, T) log π_old(y_t)
    mask = torch.ones(4, 2)
    fresh = old.clone().requires_grad_()
    loss, _ = grpo_loss(fresh, old, A, mask)
    loss.backward()
    assert abs(loss.item()) < 1e-7  # the advantages sum to 0, and here all ratios are 1
    assert torch.allclose(fresh.grad, -A[:, None] * mask / 8)  # REINFORCE with a baseline
    print(f"first minibatch: ρ = 1, loss {abs(loss.item()):.4f}; ∂loss/∂log π(y_t) = −A / (4 answers · 2 tokens)")

    rho = torch.tensor([[1.30, 1.05], [0.90, 0.70], [0.75, 1.10], [1.15, 0.95]])  # after an optimizer step
    logprobs = (old + rho.log()).requires_grad_()
    loss, metrics = grpo_loss(logprobs, old, A, mask, clip_low=0.2, clip_high=0.2)
    loss.backward()
    # The clip stops a token that has moved by more than 0.2 in the direction that A asks for, and no other.
    stopped = ((A[:, None] > 0) & (rho > 1.2)) | ((A[:, None] < 0) & (rho < 0.8))  # (R, T)
    assert stopped.tolist() == [[True, False], [False, True], [True, False], [False, False]]
    by_hand = torch.where(stopped, 0.0, -rho * A[:, None]) / 8
    assert torch.allclose(logprobs.grad, by_hand, atol=1e-7)
    assert metrics["clip_fraction"] == 3 / 8
    print("second: ratios ρ      ", *(f"{a:5.2f} {b:5.2f}" for a, b in rho.tolist()))
    print("stopped by the clip   ", *(f"{'yes' if a else 'no':>5s} {'yes' if b else 'no':>5s}" for a, b in stopped))
    print("gradient by hand      ", *(f"{a:5.2f} {b:5.2f}" for a, b in by_hand.tolist()), "   −ρ A / 8, or 0")
    print(f"autograd differs by at most {(logprobs.grad - by_hand).abs().max():.0e}; clip fraction 3 / 8")

    ref = old - 0.1  # the start finds each of these tokens less likely, by a factor e^−0.1: x = π_ref / π = 0.905
    x = torch.tensor(-0.1).exp()
    for unbiased, by_hand in ((True, 0.3 * 0.1), (False, 0.3 * (1 - x.item()))):
        logprobs = old.clone().requires_grad_()
        loss, metrics = grpo_loss(logprobs, old, torch.zeros(4), mask, ref, beta=0.3, kl_unbiased=unbiased)
        loss.backward()
        assert torch.allclose(logprobs.grad, by_hand * mask / 8)
        form = "β log(π / π_ref) / 8" if unbiased else "β (1 − x) / 8       "
        name = "ρ k3" if unbiased else "k3  "
        print(f"KL penalty {name}      value {metrics['kl']:.4f}, gradient {form} = {by_hand / 8:.5f}")


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RunConfig):
    """Train a policy with verifiable rewards (GRPO)."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), gsm8k, or the path of a .jsonl of questions and answers."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    instruction: str = ""
    """Text after each question that says how to answer, for a model that was not fine-tuned on this data."""
    init: str | None = None
    """SFT checkpoint to start from, also the reference of the KL; default: one trained once into runs/start."""
    name: str = "grpo"
    steps: Count = 500
    """Batches of rollouts."""
    prompts: Count = 12
    """Questions N per step, over all ranks."""
    rollouts: Count = 8
    """Completions R per prompt."""
    max_new_tokens: Count = 64
    """Longest completion, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature, also used for the log-probabilities in the loss."""
    skip_zero_variance: bool = True
    """Leave out groups whose answers all earn the same, and their KL; false: they pay the KL, which takes longer."""
    refill: Whole = 0
    """Dynamic sampling: how many times groups without a signal are replaced by fresh questions."""
    correct_weight: float = 1.0
    """Weight of the reward for a right answer."""
    format_weight: float = 0.1
    """Weight of the reward for the format."""
    brevity_weight: float = 0.0
    """Weight of the reward for being no longer than the reference solution."""
    reward: str | None = None
    """Your own reward, module:function: called with (texts, problems, ended), returns one number per text."""
    reward_weight: float = 1.0
    """Weight of your own reward."""
    overlong: Whole = 0
    """Length penalty: a reward that falls from 0 to -1 over this many last tokens before max_new_tokens; 0: none."""
    mask_truncated: bool = False
    """Completions that were cut off get no gradient."""
    loss_type: Literal[tuple(OBJECTIVES)] = "grpo"
    """The objective: how a token is limited and weighed."""
    scale: Literal["group", "batch", "none"] | None = None
    """Advantages divided by the std of the group, of the batch, or none; default as the objective has it."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole sequence (GSPO)."""
    clip_low: Amount = 0.2
    """Lower clip range of the ratio."""
    clip_high: Amount | None = None
    """Upper clip range; default as the objective has it: above 0.2 for dapo."""
    beta: Amount = 0.3
    """Weight of the KL to the reference; at 0 the KL is measured now and then only."""
    kl: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL; default k3 in the loss (with --kl_unbiased) and k1 in the reward: both give the KL's
    gradient."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is subtracted: as a term of the loss, or from the reward."""
    kl_unbiased: bool | None = None
    """Multiply the KL in the loss by the importance ratio, so that its gradient is that of KL(policy, reference);
    default: true for k1 and k3 in the loss."""
    refresh_reference: Whole = 0
    """Every so many steps the policy becomes its own reference; 0 keeps the start."""
    inner_epochs: Count = 1
    """Passes over each batch of rollouts."""
    minibatches: Count = 2
    """Optimizer steps in a pass; from the second on ρ differs from 1."""
    micro_batch: Count | None = None
    """Completions per forward pass of one rank, in whole groups: never fewer than --rollouts. Default 128 for the
    built-in problems, whose rows are short, else 32."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters instead of all weights: --lora.rank 8."""
    lr: Amount = 1.5e-4
    """Peak learning rate; it falls linearly to 0 after the warm-up."""
    eval_problems: Count = 200
    """Validation problems per evaluation."""
    test_problems: Count = 1000
    """Test problems of the evaluations before and after training."""
    pass_problems: Count = 100
    """How many of the test problems are sampled for pass@k."""
    pass_samples: Count = 16
    """Samples per problem, and the largest k."""
    sample_every: Count = 100
    """Steps between printed rollouts."""

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch is None:
            self.micro_batch = task_of(self.data).micro_batch
        if self.rollouts < 2:
            raise ConfigError("--rollouts is 1: a group of one has no baseline, every advantage is 0; use 2 or more")
        if self.minibatches > self.prompts:
            raise ConfigError(f"--minibatches is {self.minibatches}, more than the {self.prompts} prompts of a step")
        if self.overlong > self.max_new_tokens:
            raise ConfigError(f"--overlong {self.overlong} is more than --max_new_tokens {self.max_new_tokens}")
        if self.kl is None:
            self.kl = "k3" if self.kl_in == "loss" else "k1"
        if self.kl_unbiased is None:
            self.kl_unbiased = self.kl_in == "loss" and self.kl != "k2"
        if self.kl_unbiased and self.kl_in == "reward":
            raise ConfigError("--kl_unbiased has no meaning with --kl_in reward, where the KL is not differentiated")
        if self.beta and (self.kl, self.kl_in, self.kl_unbiased) == ("k1", "loss", False):
            raise ConfigError(
                "--kl k1 in the loss has no gradient on average; use --kl_in reward, --kl_unbiased true, or k2 or k3"
            )
        if self.init is None and self.data not in TASKS:
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")
        objective = OBJECTIVES[self.loss_type]
        self.scale = objective.scale if self.scale is None else self.scale
        self.clip_high = objective.clip_high if self.clip_high is None else self.clip_high


# ---------------------------------------------------------------------------------------------------------------
# The steps of the loop.


def judge(functions, texts, problems, ended, lengths, config):
    """The rewards of the completions, and --overlong: {name: (len(texts),)}."""
    rewards = score(functions, texts, problems, ended)
    if config.overlong:
        over = torch.tensor(lengths) - (config.max_new_tokens - config.overlong)
        rewards["overlong"] = -(over / config.overlong).clamp(min=0.0)
    return rewards


def roll_out(sample, step, slots, attempt, functions, config):
    """Ask the questions in `slots` of a step, let the policy answer each R times, judge -> Batch with its rewards."""
    batch = sample(step, slots, attempt)
    problems = [p for p in batch.problems for _ in range(config.rollouts)]
    ended, lengths = batch.ended.flatten().tolist(), batch.rollout.mask.sum(1).tolist()  # n·R
    rewards = judge(functions, batch.texts, problems, ended, lengths, config)
    batch.rewards = {name: values.view(-1, config.rollouts) for name, values in rewards.items()}  # (n, R)
    return batch


@torch.no_grad()
def reference_logprobs(reference, policy, pieces, batch, config, autocast):
    """log π_ref of the pieces' completions, at their rows of a (n·R, T) tensor that is 0 elsewhere.

    With LoRA the reference is the policy itself without its adapters (but for --refresh_reference).
    """
    out = torch.zeros_like(batch.rollout.logprobs)
    with lora_off(policy), autocast():
        for piece in pieces:
            T = piece.mask.shape[1]
            logprobs = shared_answer_logprobs(reference, piece.packed, config.temperature)
            out[piece.rows, :T] = logprobs[:, :T].float()
    return out


def less_the_kl(advantages, reference, policy, batch, config, autocast, pad):
    """--kl_in reward: A_i (n, R) -> A_i − β (KL_i − the mean KL of its group), KL_i of the whole answer; and log π_ref
    (n·R, T). It comes after the division by the std, which would blow it up where a group's
    rewards are nearly equal."""
    pieces = cut(batch, range(len(advantages)), batch.rollout.mask, config.micro_batch, pad)
    ref_logprobs = reference_logprobs(reference, policy, pieces, batch, config, autocast)
    kl_tokens = kl_estimate(batch.rollout.logprobs, ref_logprobs, config.kl) * batch.rollout.mask  # (n·R, T)
    batch.rewards["kl"] = kl_tokens.sum(1).view(advantages.shape).cpu()
    return advantages - config.beta * less_baseline(batch.rewards["kl"], "mean"), ref_logprobs


def load_questions(config, split, n):
    """At most n problems of a split, with --instruction. ConfigError if a right answer is paid for that is unknown."""
    problems = load_problems(config.data, split, n, tuple(config.levels), config.skip_bad)
    if config.instruction:
        problems = [replace(p, question=f"{p.question}\n{config.instruction}") for p in problems]
    if config.correct_weight and (unanswered := sum(not p.answer for p in problems)):
        raise ConfigError(
            f"{unanswered} of {len(problems)} {split} problems of {config.data} have no answer after ####, so no "
            "rollout can be right: leave them out, or give another --reward and --correct_weight 0"
        )
    return problems


def reward_functions(config):
    """-> {name: function}, {name: weight} of the rewards that count. Weight 0: measured, not rewarded."""
    functions = dict(REWARDS)
    weights = {name: getattr(config, f"{name}_weight") for name in REWARDS}
    if config.reward:
        name, function = load_reward(config.reward, taken={*REWARDS, "overlong", "kl"})
        functions[name], weights[name] = function, config.reward_weight
    if config.overlong:
        weights["overlong"] = 1.0
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ConfigError("every reward has weight 0: there is nothing to learn")
    return functions, weights


def paid_rewards(batch, weights, config):
    """The rewards that have a weight, (n, R, M): what is paid for, which gdpo.py may make depend on the answer."""
    return torch.stack([batch.rewards[name] for name in weights], dim=-1)


def main(config, advantages_of=advantages_of, paid_rewards=paid_rewards):
    """Train; returns {"before", "after"} (test figures), "kl", "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    n = dist.per_rank("prompts", config.prompts)  # this rank asks n of a step's N questions
    slots = list(range(dist.rank * n, (dist.rank + 1) * n))  # which of the N they are
    autocast, scaler = precision(config.dtype, dist)
    functions, weights = reward_functions(config)
    init = config.init or sft_start(config, dist)
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    # With adapters the reference is the policy without them: no second model in memory
    adapters_off = config.lora.rank and not config.refresh_reference
    reference = policy if adapters_off else copy.deepcopy(policy).requires_grad_(False).eval()
    add_lora(policy, **asdict(config.lora), seed=config.seed)
    room, pad = policy.config.context - config.max_new_tokens, tokenizer.endoftext_id
    sizes = {"train": None, "valid": config.eval_problems, "test": config.test_problems}
    load = partial(load_questions, config)
    problems = load_splits(load, sizes, lambda p: len(encode_prompt(tokenizer, p)), room, "prompt", dist)

    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    kept = {"lora": LoraState(policy, init)} | ({"reference": reference} if config.refresh_reference else {})
    reads = records_of(config.data, problems) | weights_of(init, policy) | code_of(config.reward, functions)
    state = {"best": -1.0, "before": None, "start": {}, "parts": kept, "began": began}
    run = Run(config, dist, policy, tokenizer, optimizers, scaler, reads=reads, **state)
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy
    policy.eval()  # throughout: with dropout the ratio on fresh rollouts would not be 1
    if run.state.before is None:
        run.state.before = test_figures(policy, tokenizer, problems, config, dist)
        run.state.start, run.state.best = validate(policy, tokenizer, problems, functions, weights, config, dist)
        run.save("best")  # until something beats it, the start is the best
    if run.first == 0:  # a run that was stopped before its first step has not kept it
        run.log(0, **run.state.start)
    if dist.is_main:
        print(
            f"{policy.num_params():,} parameters from {init}; {len(problems['train']):,} training prompts; "
            f"test accuracy before: {run.state.before['accuracy']:.1%}"
        )

    def advantages_within(batch):
        """(n, R), of this rank's groups by themselves."""
        return advantages_of(paid_rewards(batch, weights, config), weights, config)[0]

    sample = Sampler(policy, tokenizer, problems["train"], config, autocast, tokenizer.stop_ids)
    k = config.minibatches
    groups = [[g for g, slot in enumerate(slots) if slot % k == m] for m in range(k)]  # this rank's, of each minibatch
    loss_of = loss_with(config)
    extra, kl, warned, shown = {}, 0.0, False, run.state.start
    for step in run.steps():
        if config.refresh_reference and step and step % config.refresh_reference == 0:
            reference.load_state_dict(policy.state_dict())

        # 1. ask: the policy answers each question R times. 2. judge: {name: (n, R)} in batch.rewards
        started = time.perf_counter()
        batch = roll_out(sample, step, slots, 0, functions, config)
        has_signal = advantages_within(batch).ne(0).any(1)  # (n,)
        figures = rollout_sums(batch, paid_rewards(batch, weights, config), weights, has_signal)  # before any refill
        for attempt in range(1, config.refill + 1):
            if silent := has_signal.logical_not().nonzero().squeeze(1).tolist():
                batch.put(silent, roll_out(sample, step, [slots[g] for g in silent], attempt, functions, config))
                has_signal = advantages_within(batch).ne(0).any(1)
        sampled = time.perf_counter()

        # 3. compare within the group; over all ranks, because a std over the batch needs them all
        advantages, extra = advantages_of(dist.gather(paid_rewards(batch, weights, config)), weights, config)  # (N, R)
        advantages, ref_logprobs = advantages[slots], None  # (n, R)
        if config.beta and config.kl_in == "reward":
            advantages, ref_logprobs = less_the_kl(advantages, reference, policy, batch, config, autocast, pad)
        counted = batch.rollout.mask  # (n·R, T) the tokens that count in the loss
        if config.mask_truncated:
            counted = counted & batch.ended.flatten()[:, None].to(counted.device)

        # 4. update: an optimizer step for each minibatch, from the second on ρ ≠ 1; none where no group has a signal
        useful = advantages.ne(0).any(1) & counted.reshape(n, -1).any(1).cpu()  # (n,)
        if config.beta and config.kl_in == "loss" and not config.skip_zero_variance:
            useful = torch.ones(n, dtype=torch.bool)  # every group has a KL
        minibatches = minibatches_of(batch, groups, useful, counted, config.micro_batch, pad, dist)
        measured = config.beta or step == 0 or run.due(config.eval_every)  # the KL costs a forward pass
        if ref_logprobs is None and measured:
            pieces = [piece for minibatch in minibatches for piece in minibatch.pieces]
            ref_logprobs = reference_logprobs(reference, policy, pieces, batch, config, autocast)
        A = advantages.flatten().to(dist.device)  # (n·R,)
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        sums, norm, n_trained, n_updates = {"ratio_max": 0.0}, 0.0, 0, 0
        for minibatch in minibatches * config.inner_epochs:
            for piece in minibatch.pieces:
                rows, T, last = piece.rows, piece.mask.shape[1], piece is minibatch.pieces[-1]
                # DDP sums up the gradients over the ranks in the last backward alone, and divides by their number
                with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                    with autocast():
                        logprobs = shared_answer_logprobs(model, piece.packed, config.temperature)[:, :T]  # (b, T)
                    old = batch.rollout.logprobs[rows, :T]
                    ref = None if ref_logprobs is None else ref_logprobs[rows, :T]
                    counts = {"n_completions": minibatch.n_completions, "n_tokens": minibatch.n_tokens}
                    loss, metrics = loss_of(logprobs, old, A[rows], piece.mask, ref, **counts)
                    scaler.scale(loss * dist.world).backward()
                n_tokens = piece.mask.sum().item()
                n_trained += n_tokens
                sums["ratio_max"] = max(sums["ratio_max"], metrics.pop("ratio_max"))
                for name, value in metrics.items():  # the loss is a sum over pieces, the others means over tokens
                    sums[name] = sums.get(name, 0.0) + value * (1 if name == "loss" else n_tokens)
            norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)
            run.check_finite(lr, norm)
            n_updates += 1

        # 5. look
        record = step_record(figures, sums, n_trained, n_updates, config, dist) | extra
        # A NaN here is no overflow that the scaler skips. The entropy too, as a step without a signal has no loss.
        mend = "try a smaller --lr, or --dtype fp32"
        run.check_finite(lr, norm, mend, loss=record["loss"], entropy=record["entropy"])
        record |= {"grad_norm": norm, "lr": lr}
        record |= {"seconds_rollout": sampled - started, "steps_per_second": 1 / (time.perf_counter() - started)}
        if run.due(config.eval_every):
            shown, chosen_by = validate(policy, tokenizer, problems, functions, weights, config, dist)
            add_figures(record, shown)
            run.keep_best(chosen_by)
            if shown["accuracy"] < run.state.start["accuracy"] - 0.1 and not warned:
                warned = True
                run.say(
                    f"WARNING: validation accuracy fell from {run.state.start['accuracy']:.1%} to "
                    f"{shown['accuracy']:.1%}: the policy is collapsing. Try a smaller --lr than {config.lr:g}, or a "
                    "larger --beta; best/ keeps the best."
                )
        run.log(step + 1, **record)
        if dist.is_main and (step == 0 or (step + 1) % config.sample_every == 0):
            show_samples(run, batch, reward_sums(paid_rewards(batch, weights, config), weights))
        kl = record.get("kl", kl)
        brief = {"kl": f"{kl:.3f}", "length": f"{record['length']:.0f}"}
        brief |= {name: f"{value:.3f}" for name, value in shown.items()}
        run.bar.set_postfix(reward=f"{record['reward']:.2f}", **brief, refresh=False)
    run.close()

    # The test split, as before the first step. With LoRA the start is the policy: sampled_kl turns its adapters off.
    after = test_figures(policy, tokenizer, problems, config, dist)
    start = policy if config.lora.rank else open_checkpoint(init, dist.device)[0].eval()  # the reference may have moved
    prompts = [encode_prompt(tokenizer, p) for p in problems["test"][:200]]
    kl = sampled_kl(policy, start, tokenizer, prompts, config.max_new_tokens, dist, config.seed, config.micro_batch)
    if dist.is_main:
        report(config, run, after, kl, weights, extra)
    figures = {"before": run.state.before, "after": after, "kl": kl}
    return figures | {"seconds": run.seconds, "path": str(run.path / "last")}


def loss_with(config):
    """grpo_loss with what a run's settings fix."""
    names = ("clip_low", "clip_high", "loss_type", "ratio", "kl", "kl_unbiased")
    options = {name: getattr(config, name) for name in names} | {"max_length": config.max_new_tokens}
    return partial(grpo_loss, beta=config.beta if config.kl_in == "loss" else 0.0, **options)


def validate(policy, tokenizer, problems, functions, weights, config, dist):
    """-> what is logged of greedy answers, and by what best/ is chosen: the accuracy, or if most problems have none to
    check, what the greedy answers earn, {"valid_reward"} then too."""
    with merged(policy):
        result = evaluate(policy, tokenizer, problems["valid"], config.max_new_tokens, dist)
    record = logged(result)
    if verifiable(problems["valid"]):
        return record, result["accuracy"]
    rows = [(s.text, s.problem, s.ended, s.length) for s in result["samples"]]  # this rank's
    rewards = judge(functions, *(list(part) for part in zip(*rows, strict=True)), config) if rows else {}
    (total,) = dist.sum(sum(weights[name] * values.sum() for name, values in rewards.items() if name in weights))
    record["valid_reward"] = total / result["n"]
    return record, record["valid_reward"]


def test_figures(policy, tokenizer, problems, config, dist):
    """The test split: greedy accuracy, and how many of `pass_samples` samples of each problem are right ("solved")."""
    with merged(policy):
        result = evaluate(policy, tokenizer, problems["test"], config.max_new_tokens, dist)
        some, sizes = problems["test"][: config.pass_problems], (config.pass_samples, config.max_new_tokens)
        sampling = {"temperature": config.temperature, "seed": config.seed, "batch": config.prompts}
        sampled = evaluate_samples(policy, tokenizer, some, *sizes, dist, **sampling)
    figures = {name: value for name, value in result.items() if name != "samples"}
    return figures | {"solved": sampled["solved"]}


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
