"""PPO for language: a policy, a learned reward, a value for every token, and a leash (arXiv:1707.06347, 2203.02155).

A reward model says after the last token how good an answer was. Which tokens earned it? A value head guesses, at every
token, what the answer will get in the end; a token's advantage is by how much the guess rose.

    r_t = −β (log π_old(y_t) − log π_ref(y_t)),   plus the score at the end token     the leash is paid token by token
    δ_t = r_t + γ V_{t+1} − V_t,                  V behind the last token is 0
    A_t = δ_t + γλ A_{t+1}                        GAE, arXiv:1506.02438, Eq. 16; the returns are A + V
    policy  −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)    ρ_t = exp(log π_θ(y_t) − log π_old(y_t)); masked mean
    value   ½ max((V − R)², (clip(V, V_old ± ε_v) − R)²)
    β ← β (1 + clip(KL / target − 1, ±0.2) · n / horizon)     the adaptive leash, arXiv:1909.08593; KL per answer

V_t stands at the token before y_t, where y_t is chosen: it must not know y_t. λ = 1 is the return minus the guess
(unbiased, noisy), λ = 0 believes the next guess. A trap: the mean and the spread of the advantages (`whiten`) are those
of all tokens of the step on all ranks, and the returns are taken before whitening, or V would chase a moving target.

What keeps a run alive, each by a flag:

    --baseline wins    a reward model was only asked to compare answers to one prompt: its scores lie higher for some
                       prompts than for others, and far out they mean little. So an answer is worth the probability
                       that it beats the prompt's other answers (close to arXiv:2502.18770)
    --normalise        or: scores brought to mean 0 and standard deviation 1 of all scores seen so far
    --missing_end      an answer without an end is fined, as the reward model never saw one
    --stop_kl          the inner epochs end when the policy has moved too far from the one that sampled

Dropout is off for good, and the sampler's own log-probabilities are the old ones: on fresh rollouts ρ is 1 (in bf16
near 1: the sampler and the loss round differently).

Unlike other codes, the prompt's other answers are a baseline here before the values are, and `whiten` divides by n, not
n − 1.

The reward model is a proxy and PPO will find where it errs. So each step also logs `correct`, the verifier's judgement
of the same answers, of which the training sees nothing: a score that rises while `correct` falls is over-optimisation.

The value head shares the policy's trunk (`--value shared`: cheap, but its loss pulls at the policy), or is a network
of its own that starts from the reward model's trunk (`--value separate`: as InstructGPT).

Without --init and --reward_model the script makes both on the built-in problems, under runs/start, and reuses them.

Run it:
    python ppo.py
    python ppo.py --init runs/sft --reward_model runs/reward_model --value separate --kl_target 3
    torchrun --nproc_per_node 2 ppo.py --init runs/sft --reward_model runs/reward_model
"""

import contextlib
import copy
import math
import time
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import reward_model
from data import DEFAULT_TASK, TASKS, encode_prompt, load_problems, rows_at
from evaluate import before_and_after, evaluate, is_correct, kl_estimate, logged, metric_panels
from generate import generate
from lora import LoraConfig, add_lora, lora_off, merged
from optim import lr_at, make_optimizers
from reward_model import RewardModel, open_reward_model, score_groups
from sft import sft_start
from support.checkpoints import open_checkpoint
from support.cli import check_positive, check_rates, run
from support.devices import precision, setup
from support.errors import ConfigError, DivergedError
from support.log import Log
from support.lora_files import load_lora_state, lora_state
from support.plots import draw_curves
from support.records import fitting
from support.runs import Interrupt, load_state, made_once, open_run, save, start_name, stopped
from support.shared_prompt import pack, shared_answer_logprobs
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions. All tensors (B, T); mask is True on an answer's tokens, which stand at the front.


def token_rewards(log_ratio, final, lengths, beta):
    """log_ratio log π_old − log π_ref, 0 behind the end; final (B,) what the whole answer is worth; lengths (B,)."""
    rewards = -beta * log_ratio
    rewards[torch.arange(len(rewards), device=rewards.device), lengths - 1] += final
    return rewards


def less_baseline(rewards, baseline="mean"):
    """rewards (N, R) of R answers to each of N prompts -> (N, R), less a baseline that is the prompt's own.

    mean: the mean of the prompt's answers (GRPO); leave_one_out: that of its other answers (RLOO, arXiv:2402.14740),
    which lies R / (R − 1) times as far away; none. Answers that all earn the same, or one alone, get exactly 0.
    """
    if baseline == "none":
        return rewards
    if baseline not in ("mean", "leave_one_out"):
        raise ConfigError(f"--baseline {baseline!r} is not known; use mean, leave_one_out or none")
    R = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out" and R > 1:
        centred = centred * R / (R - 1)
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # exactly, not up to the mean's rounding
    return centred.masked_fill(same, 0.0)


def win_rates(scores):
    """scores (N, R) of R answers to each of N prompts -> the probability that each is better than another one of its
    prompt, as the Bradley-Terry model of the scores has it, less one half: (N, R), between −½ and ½."""
    beats = torch.sigmoid(scores[:, :, None] - scores[:, None])  # (N, R, R), ½ against itself
    return (beats - 0.5).sum(2) / (scores.shape[1] - 1)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """-> advantages, returns, both 0 outside the mask. values[:, t] is V before token t is known."""
    mask = mask.to(values.dtype)
    advantages, carry = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = torch.zeros_like(carry)  # V_{t+1}, 0 behind the last token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carry = (delta + gamma * lam * carry) * mask[:, t]
        following = values[:, t] * mask[:, t]
        advantages[:, t] = carry
    return advantages, (advantages + values) * mask


def whiten(x, mask, dist=None, eps=1e-8):
    """(x − mean) / standard deviation over the masked tokens, of all ranks if `dist` is given; 0 outside."""
    mask = mask.to(x.dtype)
    sums = [mask.sum(), (x * mask).sum()]
    n, total = dist.sum(*sums) if dist else sums
    mean = total / max(n, 1)
    squares = (((x - mean) * mask) ** 2).sum()
    (squares,) = dist.sum(squares) if dist else (squares,)
    return (x - mean) * mask / (squares / max(n, 1) + eps) ** 0.5


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, *, n_tokens=None):
    """-> (loss, metrics). n_tokens: of the whole optimizer step, over micro-batches and ranks; default: of this batch.
    Metrics are means over this batch's tokens."""
    # What stands outside the mask is anything at all, exp of it may be inf, and inf · 0 = NaN: zero it first.
    real = mask.bool()
    log_ratio = torch.where(real, logprobs - torch.where(real, old_logprobs, 0.0), 0.0).float()
    advantages = torch.where(real, advantages, 0.0)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    per_token = -torch.minimum(plain, clipped)  # the pessimistic one of the two, for either sign of A
    loss = (per_token * mask).sum() / (n_tokens or mask.sum().clamp(min=1))
    with torch.no_grad():
        metrics = {
            "policy_loss": loss,
            "clip_fraction": masked_mean((clipped < plain).float(), mask),
            "approx_kl": masked_mean(0.5 * log_ratio**2, mask),
            "approx_kl3": masked_mean(ratio - 1 - log_ratio, mask),  # unbiased, and ≥ 0
            "ratio": masked_mean(ratio, mask),
        }
        values = torch.stack([v.float() for v in metrics.values()]).tolist()  # one wait for the device, not five
    return loss, dict(zip(metrics, values, strict=True))


def value_loss(values, old_values, returns, mask, clip=0.2, *, n_tokens=None):
    """-> (loss, metrics). clip None or 0: not clipped. What stands outside the mask is anything at all."""
    values, old_values, returns = (torch.where(mask.bool(), x, 0.0) for x in (values, old_values, returns))
    squares = (values - returns) ** 2
    clipped_fraction = torch.zeros(())
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        other = (near - returns) ** 2
        clipped_fraction = masked_mean((other > squares).float(), mask)
        squares = torch.maximum(squares, other)
    loss = 0.5 * torch.where(mask.bool(), squares, 0.0).sum() / (n_tokens or mask.sum().clamp(min=1))
    return loss, {"value_loss": loss.item(), "value_clip_fraction": clipped_fraction.item()}


def adapt_beta(beta, kl, target, n, horizon):
    """The leash's next coefficient: shorter if the KL (nats per answer) of n answers is above its target."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + error * n / horizon)


class RunningMoments:
    """Mean and standard deviation of all scores so far, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, n=0.0, mean=0.0, squares=0.0):
        self.n, self.mean, self.squares = n, mean, squares

    def add(self, scores, dist):
        n, total = dist.sum(scores.numel(), scores.sum().item())
        mean = total / n
        (squares,) = dist.sum(((scores.double() - mean) ** 2).sum().item())
        gap, both = mean - self.mean, self.n + n
        self.squares += squares + gap**2 * self.n * n / both
        self.mean += gap * n / both
        self.n = both

    def normalise(self, scores):
        return (scores - self.mean) / (math.sqrt(self.squares / max(self.n, 1)) + 1e-8)


# ---------------------------------------------------------------------------------------------------------------
# The model.


class ActorCritic(nn.Module):
    """A policy and its values. Both come from one forward, as DDP wants it."""

    def __init__(self, policy, critic=None):
        """critic: a RewardModel of its own, or None to read the values from the policy's last states."""
        super().__init__()
        self.policy, self.critic = policy, critic
        self.head = None
        if critic is None:
            self.head = nn.Linear(policy.config.width, 1, bias=True)
            nn.init.zeros_(self.head.weight)  # V starts at 0, not at noise that the first advantages would carry
            nn.init.zeros_(self.head.bias)
        else:
            nn.init.zeros_(critic.head.weight)

    def value_parameters(self):
        return list((self.critic or self.head).parameters())

    def forward(self, packed, temperature=1.0):
        """What `pack` made -> log-probabilities and values, (k, T) each, 0 after an answer's end."""
        logprobs, values = [], []
        options = {"temperature": temperature, "with_states": True}
        for found, states in packed.outputs(self.policy, lambda part: options | {"targets": part.targets}):
            logprobs.append(found)  # (b, T)
            if self.critic is None:
                values.append(self.head(states).squeeze(-1))  # (b, T)
        if self.critic is not None:
            values = [scores.squeeze(-1) for scores in packed.outputs(self.critic)]  # (b, T) each
        return packed.in_order(logprobs), packed.in_order(values).float()


def optimizer_steps(parts, optimizers, rates, scaler, autocast, clip):
    """One step of each part, the policy and the values, clipped on its own. optimizers: a list for each part. -> the
    norms before clipping; if one is not finite, all weights stay as they are."""
    norms = []
    for parameters, own, rate in zip(parts, optimizers, rates, strict=True):
        for optimizer in own:
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else math.inf).item())
    for optimizer in (o for own in optimizers for o in own):
        if all(map(math.isfinite, norms)):  # or neither part steps
            with autocast():
                scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return norms


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config:
    """Train a policy against a reward model (PPO)."""

    data: str = DEFAULT_TASK
    """word (built-in problems), gsm8k, or the path of a .jsonl of questions and answers."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Levels of the built-in problems: 1 to 3 steps."""
    init: str | None = None
    """SFT checkpoint to start from, also the reference of the KL; default: made once under runs/start."""
    reward_model: str | None = None
    """Reward model, of the same tokenizer; default: made once under runs/start."""
    value: str = "shared"
    """The values' trunk: shared with the policy, or separate (starts from the reward model)."""
    name: str = "ppo"
    """Run directory below runs/."""
    steps: int = 150
    """Rollout batches."""
    prompts: int = 16
    """Prompts N per step, over all ranks."""
    rollouts: int = 8
    """Completions R per prompt."""
    max_new_tokens: int = 64
    """Longest completion."""
    temperature: float = 1.0
    """Of the sampling, and of the log-probabilities in the loss."""
    kl_beta: float = 0.05
    """The leash: weight of the KL to the reference in the rewards; with --kl_target only where it starts."""
    kl_target: float | None = None
    """Adapt the leash so that the KL stays near this many nats per answer."""
    kl_horizon: float = 5000.0
    """Answers over which the leash adapts."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """GAE's λ: below 1 the first tokens of an answer hear less of its score while the values are still poor."""
    clip_ratio: float = 0.2
    """How far a ratio may pay."""
    clip_value: float = 0.2
    """How far a value may move from where it was while sampling, at a gain; 0: anywhere."""
    value_weight: float = 0.1
    """Of the value loss."""
    baseline: str = "wins"
    """What a score is compared with: wins (how probably it beats each of the prompt's other answers; bounded), mean
    (that of the prompt's answers) or none (the values must find out how a prompt's scores lie)."""
    whiten: bool = True
    """Bring the step's advantages to mean 0 and standard deviation 1."""
    normalise: bool = False
    """Bring the scores to mean 0 and standard deviation 1 of all scores so far."""
    missing_end: float = 1.0
    """Fine for an answer that was cut off, in units of the (normalised) score."""
    inner_epochs: int = 1
    """Passes over each batch of rollouts."""
    minibatches: int = 1
    """Optimizer steps in a pass."""
    stop_kl: float = 0.1
    """Leave the inner epochs when the policy is this far, in nats per token, from the one that sampled; 0: never."""
    micro_batch: int = 64
    """Completions per forward pass of one rank, in whole groups: never fewer than --rollouts."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters of the policy instead of all its weights: --lora.rank 8."""
    optimizer: str = "adamw"
    """Of the policy: adamw, or muon for the matrices of the blocks, which wants about six times the learning rate."""
    lr: float = 5e-5
    """Learning rate of the policy after the warm-up; it falls in a line to 0 from there."""
    value_lr: float = 1e-3
    """Learning rate of the value head after the warm-up; a separate network takes a tenth of it."""
    warmup: int = 5
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest gradient norm, of the policy's and the value's each; 0 turns clipping off."""
    eval_every: int = 25
    """Steps between evaluations on the validation split."""
    eval_problems: int = 200
    """Validation problems per evaluation."""
    test_problems: int = 1000
    """Held-out problems of the evaluation before and after."""
    sample_every: int = 50
    """Steps between printed rollouts."""
    save_every: int = 50
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
        check_positive(self, "steps", "prompts", "rollouts", "max_new_tokens", "inner_epochs", "minibatches")
        check_positive(self, "eval_every", "eval_problems", "test_problems", "sample_every", "save_every")
        check_positive(self, "micro_batch")
        check_rates(self)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature is {self.temperature}; a policy gradient needs sampling, above 0")
        if self.baseline not in ("wins", "mean", "none"):
            raise ConfigError(f"--baseline {self.baseline!r} is not known; use wins, mean or none")
        if self.baseline != "none" and self.rollouts < 2:
            raise ConfigError(f"--baseline {self.baseline} needs --rollouts of at least 2: there is no other answer")
        if self.value not in ("shared", "separate"):
            raise ConfigError(f"--value {self.value!r} is not known; use shared or separate")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ConfigError(f"--kl_target is {self.kl_target}; it must be above 0, or not given")
        if self.kl_target is not None and self.kl_beta == 0:
            raise ConfigError("--kl_beta 0 stays 0, as --kl_target multiplies it; start from more")
        least = 0.2 * self.prompts * self.rollouts
        if self.kl_target is not None and not self.kl_horizon > least:
            raise ConfigError(f"--kl_horizon is {self.kl_horizon}; above {least:g}, or one step can end the leash")
        if self.prompts < self.minibatches:
            raise ConfigError(f"--prompts {self.prompts} cannot be cut into {self.minibatches} minibatches")
        for name in ("value_lr", "stop_kl", "clip_ratio", "clip_value", "kl_beta", "value_weight"):
            if not (getattr(self, name) or 0) >= 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.init is None and self.data not in TASKS:
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")
        if self.init is not None and self.reward_model is None:
            train = f"python reward_model.py --init {self.init}"
            raise ConfigError(f"--init needs a reward model of the same tokenizer: {train}, then --reward_model RUN")


def reward_start(config, init, dist):
    """A reward model for a run that was given none; made once, under runs/start, and reused."""
    settings = {"init": init, "levels": config.levels, "seed": config.seed}
    settings |= {"device": config.device, "dtype": config.dtype}
    if config.data != DEFAULT_TASK:
        settings["data"] = config.data
    name = start_name(config.data, config.seed, "reward")
    return made_once(name, "no --reward_model given: training one", reward_model, settings, dist)


def open_models(config, init, path, dist):
    """-> the policy with its values, the frozen reference and reward model, the tokenizer. With LoRA the reference is
    the policy itself without its adapters: no second model in memory."""
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    judge, other, path = open_reward_model(path, dist.device)
    if other.fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"the reward model {path} has another tokenizer than {init}: it would misread every answer")
    if policy.config.vocab_size > judge.config.vocab_size:
        sizes = f"{init} may sample {policy.config.vocab_size} ids, the reward model {path} knows"
        raise ConfigError(f"{sizes} {judge.config.vocab_size}: take one whose embedding is padded as far")
    critic = None
    if config.value == "separate":
        if not isinstance(judge, RewardModel):
            raise ConfigError(f"--value separate needs a decoder as reward model, {path} is an encoder; use shared")
        critic = copy.deepcopy(judge)
    raw = ActorCritic(policy, critic).to(dist.device)
    raw.eval()  # for good: with dropout the ratio on fresh rollouts would not be 1
    if config.lora.rank:
        add_lora(policy, **asdict(config.lora), seed=config.seed)
        return raw, policy, judge.requires_grad_(False).eval(), tokenizer
    reference, _, _ = open_checkpoint(init, dist.device)
    return raw, reference.requires_grad_(False).eval(), judge.requires_grad_(False).eval(), tokenizer


@torch.no_grad()
def rollouts_at(step, policy, tokenizer, problems, config, dist, autocast):
    """Sample this rank's share of step `step`'s completions -> its problems, their prompts (n lists of ids), the
    Rollout of n·R rows, and which of them ended their turn. All of the step's randomness is one table of uniforms
    seeded by (seed, step), of which each rank takes its rows."""
    chosen = [problems[i] for i in rows_at(len(problems), step, config.prompts, config.seed)]
    share, R = config.prompts // dist.world, config.rollouts
    chosen = chosen[dist.rank * share : (dist.rank + 1) * share]
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    uniforms = torch.rand(config.prompts * R, config.max_new_tokens, generator=generator)
    uniforms = uniforms[dist.rank * share * R : (dist.rank + 1) * share * R]
    prompts = [encode_prompt(tokenizer, p) for p in chosen]
    with autocast(), merged(policy):
        rollout = generate(
            policy,
            prompts,
            config.max_new_tokens,
            n=R,
            temperature=config.temperature,
            stop_ids=tokenizer.stop_ids,
            uniforms=uniforms,
        )
    ended = rollout.ended((tokenizer.im_end_id,))  # (n·R,); the reward model has seen no other end
    return chosen, prompts, rollout, ended


def cut(step, config, dist, lengths):
    """The groups of each minibatch that are this rank's, in micro-batches: [([[group, …], …], True), …]. Which group
    falls into which minibatch depends on (seed, step) alone. A rank without any takes part with its first group, at
    weight 0: ([[0]], False)."""
    share, size = config.prompts // dist.world, max(1, config.micro_batch // config.rollouts)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    order = torch.randperm(config.prompts, generator=generator).tolist()
    out = []
    for m in range(config.minibatches):
        mine = [g - dist.rank * share for g in order[m :: config.minibatches] if g // share == dist.rank]
        mine.sort(key=lambda g: lengths[g])  # prompts of like length waste no padding
        out.append(([mine[i : i + size] for i in range(0, len(mine), size)] or [[0]], bool(mine)))
    return out


def main(config):
    """Train; returns {"before", "after"} (test figures), "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    if config.prompts % dist.world:
        raise ConfigError(f"--prompts {config.prompts} cannot be shared by {dist.world} processes evenly")
    autocast, scaler = precision(config.dtype, dist)
    problems = {
        "train": load_problems(config.data, "train", None, tuple(config.levels)),
        "valid": load_problems(config.data, "valid", config.eval_problems, tuple(config.levels)),
        "test": load_problems(config.data, "test", config.test_problems, tuple(config.levels)),
    }
    init = config.init or sft_start(config, dist)
    judge_path = config.reward_model or reward_start(config, init, dist)
    raw, reference, judge, tokenizer = open_models(config, init, judge_path, dist)
    policy, pad, R = raw.policy, tokenizer.endoftext_id, config.rollouts
    room = min(policy.config.context, judge.config.context) - config.max_new_tokens
    for split, found in problems.items():
        lengths = [len(encode_prompt(tokenizer, p)) for p in found]
        problems[split] = fitting(found, lengths, room, f"{split} prompt", dist)

    run_dir = open_run(config, dist)
    value_lr = config.value_lr * (0.1 if config.value == "separate" else 1.0)
    parts = [[p for p in policy.parameters() if p.requires_grad], raw.value_parameters()]
    own = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    optimizers = [*own, torch.optim.AdamW(parts[1], lr=value_lr, betas=(0.9, 0.999), weight_decay=0.0)]
    first, best, before, beta, moments = 0, -1.0, None, config.kl_beta, RunningMoments()
    if config.resume:
        state = load_state(run_dir, dist, policy, optimizers, scaler, config)
        first, best, before, beta = state["step"], state["best"], state["before"], state["beta"]
        start = state.get("start", {"accuracy": best})  # a run of an older version kept no more
        moments = RunningMoments(*state["moments"])
        began -= state["seconds"]
        if config.lora.rank:  # what the adapters correct are the weights of --init
            load_lora_state(policy, state["lora"], open_checkpoint(init)[0])
        (raw.critic or raw.head).load_state_dict(state["value"])
    model = DistributedDataParallel(raw, broadcast_buffers=False) if dist.world > 1 else raw
    log = Log(run_dir, config, dist, first)
    interrupt = Interrupt(dist)

    def held_out(split):
        with merged(policy):
            result = evaluate(policy, tokenizer, problems[split], config.max_new_tokens, dist)
        return {k: v for k, v in result.items() if k != "samples"}

    if before is None:
        before = held_out("test")
        start = logged(held_out("valid"))
        best = start["accuracy"]
        save(run_dir, "best", dist, policy, tokenizer, chat=True)  # until something beats it, the start is the best
    if first == 0:  # a run that was stopped before its first step has not kept it
        log(0, **start)
    start_accuracy = before["accuracy"]
    if dist.is_main:
        print(
            f"{raw.policy.num_params():,} parameters from {init}, rewards from {judge_path}; "
            f"{len(problems['train']):,} training prompts; test accuracy before: {start_accuracy:.1%}"
        )

    def checkpoint(name, step):
        state = None
        if name == "last":
            state = {"step": step, "best": best, "config": asdict(config), "scaler": scaler.state_dict()}
            state |= {"before": before, "start": start, "beta": beta}
            state |= {"optimizers": [o.state_dict() for o in optimizers]}
            state |= {"moments": [moments.n, moments.mean, moments.squares], "seconds": time.perf_counter() - began}
            state |= {"value": (raw.critic or raw.head).state_dict(), "lora": lora_state(policy)}
        return save(run_dir, name, dist, policy, tokenizer, chat=True, state=state)

    accuracy = best
    checked = any(p.answer for p in problems["valid"])  # else there is nothing to choose by: best/ is the latest
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=not dist.is_main, unit="step")
    for step in bar:
        # ------------------------------------------------------------------ once in a while
        if interrupt:
            written = checkpoint("last", step)
            bar.close()
            stopped(config.name, step, written, dist)
        if step != first and step % config.save_every == 0:
            checkpoint("last", step)

        # ------------------------------------------------------------------ roll out and score
        started = time.perf_counter()
        chosen, prompts, rollout, ended = rollouts_at(
            step, policy, tokenizer, problems["train"], config, dist, autocast
        )
        mask = rollout.mask  # (n·R, T)
        lengths = mask.sum(1)  # (n·R,)
        answers = [ids[:n] for ids, n in zip(rollout.ids.tolist(), lengths.tolist(), strict=True)]
        groups = [(prompt, answers[g * R : g * R + R]) for g, prompt in enumerate(prompts)]
        scores = torch.tensor(score_groups(judge, groups, pad, dist.device, autocast)).flatten().to(dist.device)
        moments.add(scores, dist)
        paid = (moments.normalise(scores) if config.normalise else scores) - config.missing_end * ~ended  # (n·R,)
        groups_paid = paid.view(-1, R)  # (n, R)
        final = win_rates(groups_paid) if config.baseline == "wins" else less_baseline(groups_paid, config.baseline)
        final = final.flatten()  # (n·R,)
        texts = rollout.texts(tokenizer)
        truth = [is_correct(text, chosen[k // R]) for k, text in enumerate(texts)]  # for the eyes, not for the loss
        sampled = time.perf_counter()

        # ------------------------------------------------------------------ values, reference, rewards, advantages
        minibatches = []  # (micro-batches, whether they count); a micro-batch: rows, packed, length of the longest
        values, ref_logprobs = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)  # (n·R, T)
        with torch.no_grad(), autocast():
            for pieces, real in cut(step, config, dist, list(map(len, prompts))):
                micro_batches = []
                for piece in pieces:
                    rows = torch.tensor([g * R + r for g in piece for r in range(R)], device=dist.device)
                    packed = pack([prompts[g] for g in piece], [groups[g][1] for g in piece], pad)
                    t, packed = packed.lengths.max().item(), packed.to(dist.device)
                    values[rows, :t] = raw(packed, config.temperature)[1][:, :t]
                    with lora_off(reference):
                        found = shared_answer_logprobs(reference, packed, config.temperature)
                    ref_logprobs[rows, :t] = found[:, :t].float()
                    micro_batches.append((rows, packed, t))
                minibatches.append((micro_batches, real))
        log_ratio = (rollout.logprobs - ref_logprobs) * mask
        rewards = token_rewards(log_ratio, final, lengths, beta)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        whitened = whiten(advantages, mask, dist) if config.whiten else advantages

        # ------------------------------------------------------------------ inner epochs: a step per minibatch
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        rate = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        tokens = [float(sum(mask[rows].sum() for rows, _, _ in some)) * real for some, real in minibatches]
        counts = dist.sum(*tokens)  # tokens of each minibatch, on all ranks, before it is cut
        sums, updates = {}, 0
        for (micro_batches, real), n in list(zip(minibatches, counts, strict=True)) * config.inner_epochs:
            found = {}
            for k, (rows, packed, t) in enumerate(micro_batches):
                here = mask[rows, :t] & real
                last = k == len(micro_batches) - 1
                with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                    with autocast():
                        logprobs, new_values = (x[:, :t] for x in model(packed, config.temperature))  # (b, t) each
                    old_logprobs, old_values = rollout.logprobs[rows, :t], values[rows, :t]
                    A, goal = whitened[rows, :t], returns[rows, :t]
                    loss, metrics = ppo_policy_loss(logprobs, old_logprobs, A, here, config.clip_ratio, n_tokens=n)
                    loss_v, more = value_loss(new_values, old_values, goal, here, config.clip_value, n_tokens=n)
                    loss = loss + config.value_weight * loss_v
                    scaler.scale(loss * dist.world).backward()  # DDP divides by world
                count = here.sum().item()
                for name, value in (metrics | more).items():  # a loss is a sum already, the others are means
                    found[name] = found.get(name, 0.0) + value * (1 if name.endswith("_loss") else count / n)
            found = dict(zip(found, dist.sum(*found.values()), strict=True))
            if not math.isfinite(found["policy_loss"] + found["value_loss"]):  # which no scaler mends
                said = f"the loss is {found['policy_loss']}, that of the values {found['value_loss']} at step {step}"
                raise DivergedError(f"{said} (learning rate {lr:.1e}); try a smaller --lr, or --dtype fp32")
            if config.stop_kl and found["approx_kl3"] > config.stop_kl:
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                break
            both = [optimizers[:-1], optimizers[-1:]]
            norms = optimizer_steps(parts, both, (lr, value_lr * rate), scaler, autocast, config.clip)
            if not all(map(math.isfinite, norms)) and not scaler.is_enabled():
                raise DivergedError(f"the gradient is {norms} at step {step}; try a smaller --lr than {config.lr:.1e}")
            found |= {"grad_norm": norms[0], "grad_norm_value": norms[1]}
            updates += 1
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value

        # ------------------------------------------------------------------ metrics: what matters first
        done = step + 1
        n_tokens, n_answers = sum(counts), config.prompts * R
        error, goal = ((x * mask).double() for x in (returns - values, returns))  # (n·R, T)
        total = {
            "correct": sum(truth),
            "score": scores.sum(),
            "paid": paid.sum(),
            "reward": rewards.sum() + (paid - final).sum(),  # as paid, before the baseline, less what the KL cost
            "kl": log_ratio.sum(),  # k1
            "kl3": (kl_estimate(rollout.logprobs, ref_logprobs, "k3") * mask).sum(),
            "entropy": -(rollout.logprobs * mask).sum(),
            "missing_end": (~ended).sum(),
            "value": (values * mask).sum(),
            "error": error.sum(),
            "error²": (error**2).sum(),
            "goal": goal.sum(),
            "goal²": (goal**2).sum(),
        }
        total = dict(zip(total, dist.sum(*total.values()), strict=True))
        # variances over the tokens: of what the values missed, and of what they were to guess
        missed, spread = (total[f"{x}²"] / n_tokens - (total[x] / n_tokens) ** 2 for x in ("error", "goal"))
        record = {
            "correct": total["correct"] / n_answers,
            "score": total["score"] / n_answers,
            "paid": total["paid"] / n_answers,  # the score, normalised if asked for, less the fines
            "reward": total["reward"] / n_answers,  # and less the KL
            "reward_kl": -beta * total["kl"] / n_answers,
            "missing_end": total["missing_end"] / n_answers,
            "kl": total["kl3"] / n_tokens,
            "kl_per_answer": total["kl"] / n_answers,  # what the leash is adapted to; may be negative by chance
            "kl_beta": beta,
            "entropy": total["entropy"] / n_tokens,
            "length": n_tokens / n_answers,
            "value": total["value"] / n_tokens,
            "explained_variance": 1 - missed / max(spread, 1e-12),
            **{name: v / max(updates, 1) for name, v in sums.items()},
            "updates": updates,
            "lr": lr,
            "seconds_rollout": sampled - started,
            "steps_per_second": 1 / (time.perf_counter() - started),
        }
        if config.kl_target is not None:
            beta = adapt_beta(beta, total["kl"] / n_answers, config.kl_target, n_answers, config.kl_horizon)
        if done % config.eval_every == 0 or done == config.steps:
            record |= logged(held_out("valid"))
            accuracy = record["accuracy"]
            if accuracy > best or not checked:
                best = accuracy
                checkpoint("best", done)
        log(done, **record)
        if dist.is_main and (done == 1 or done % config.sample_every == 0):
            show_samples(bar, log, done, texts, chosen, scores, truth, R)
            log.show(done, histograms={"scores": scores, "advantages": advantages[mask], "values": values[mask]})
        bar.set_postfix(
            score=f"{record['score']:.2f}",
            correct=f"{record['correct']:.1%}",
            accuracy=f"{accuracy:.1%}",
            kl=f"{record['kl']:.3f}",
            refresh=False,
        )
    checkpoint("last", config.steps)
    interrupt.release()
    log.close()
    return finish(config, dist, run_dir, before, held_out("test"), time.perf_counter() - began)


def show_samples(bar, log, step, texts, chosen, scores, truth, R):
    """The rollouts of the highest and of the lowest score, with the verifier's judgement."""
    lines = [f"step {step}"]
    for row in dict.fromkeys((scores.argmax().item(), scores.argmin().item())):
        problem, verdict = chosen[row // R], "right" if truth[row] else "wrong"
        lines.append(f"  [score {scores[row]:.2f}, {verdict}] {problem.question} (answer {problem.answer})")
        lines.append(f"    {texts[row]!r}")
    bar.write("\n".join(lines))
    log.samples(step, "\n".join(lines))


def finish(config, dist, run_dir, before, after, seconds):
    """The table and the curves."""
    if dist.is_main:
        before_and_after(before, after, config.steps, seconds)
        length = ("completion length", {"length": "mean"}, "tokens", {})
        clipped = ("clipped", {"clip_fraction": "ratios", "value_clip_fraction": "values"}, "share of tokens", {})
        draw_curves(  # with one step per batch of rollouts nothing is ever clipped
            run_dir,
            f"PPO on {config.data}, seed {config.seed}: accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}",
            [
                ("right, and held out", {"correct": "rollouts", "accuracy": "validation"}, "share correct", {}),
                *metric_panels(without=("accuracy",)),
                ("the reward model", {"score": "score", "reward": "less fines and KL"}, "per answer", {}),
                ("entropy and KL", {"entropy": "entropy", "kl": "KL to the start"}, "nats per token", {}),
                ("value", {"explained_variance": "explained variance", "value_loss": "loss"}, "share; loss", {}),
                clipped if config.inner_epochs * config.minibatches > 1 else length,
                ("gradient norm", {"grad_norm": "policy", "grad_norm_value": "value"}, "before clipping", {}),
            ],
        )
        print(f"{run_dir}/last, {run_dir}/best, {run_dir}/curves.png, {run_dir}/samples.md")
    return {"before": before, "after": after, "seconds": seconds, "path": str(run_dir / "last")}


if __name__ == "__main__":
    run(main, Config, __doc__)
