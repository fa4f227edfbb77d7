"""PPO for language: a learned reward, a value for every token, a clip and a KL penalty (arXiv:1707.06347, 2203.02155).

A reward model says after the last token how good an answer is. Which tokens earned it? A value head guesses, before
every token, what is still to come. A token's advantage is its reward and the rise of the guess, and, discounted by λ,
the same of the tokens after it.

From the policy gradient on. π is the policy, π_old the policy when it sampled this batch, π_ref the frozen start. For
an answer y to a prompt x, a reward r_t at each token and the return G_t = r_t + r_{t+1} + …:

    ∇J  = E[Σ_t G_t ∇log π(y_t | x, y_<t)]                 a token is credited with its own and all later rewards
        = E[Σ_t (G_t − V_t) ∇log π(y_t | x, y_<t)]         for any V_t = V(x, y_<t), which does not see y_t
    r_t = −β (log π_old(y_t) − log π_ref(y_t)),  plus `final`, what the answer is worth, at the last token
    δ_t = r_t + γ V_{t+1} − V_t                            V is 0 after the last token
    A_t = δ_t + γλ A_{t+1}                                 GAE, arXiv:1506.02438, Eq. 16

The values are fitted to the targets A_t + V_t, the `returns`. With γ = λ = 1 these are G_t, and A_t = G_t − V_t:
unbiased and noisy; λ = 0 believes the next guess. Several updates from one batch need the ratio
ρ_t = π(y_t) / π_old(y_t), and an end to what it can gain: beyond 1 ± ε in the direction that A asks for, a token has no
policy gradient left.

    policy loss  −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)        arXiv:1707.06347, Eq. 7
    value loss   ½ max((V − returns)², (clip(V, V_old ± ε_v) − returns)²)       both a mean over a minibatch's tokens

One step, for N prompts (`main` has the same five parts). The N·R answers are a *batch*; whole prompts of it are a
*minibatch*, one optimizer step; what fits into one forward pass is a *piece*.

    answers  = sample(prompts, n=R)                    (N·R, T), with their log π_old                     1. ask
    scores   = reward_model(answers)                   (N, R)                                             2. judge
    paid     = scores, normalised if asked for, less a fine where the end is missing
    final    = paid less a baseline of the prompt's answers, win_rates(paid), or paid itself    (N, R)
    V_old, log π_ref = values_and_reference(answers)   (N·R, T) each, no gradient                         3. credit
    r        = −β (log π_old − log π_ref)              (N·R, T), plus final at the answers' last tokens
    A, returns = gae(r, V_old)                         (N·R, T) each; then A is whitened
    for each pass, for minibatch in answers:           an optimizer step each                             4. update
        logprobs, V = actor_critic(pieces)             (b, T), with gradient; ρ = 1 in the first minibatch
        loss = ppo_policy_loss(logprobs, log π_old, A, mask) + c · value_loss(V, V_old, returns, mask)
        backward; drop this minibatch and the rest of the step if KL(π_old ‖ π) is above stop_kl
        clip the policy's and the values' gradients, optimizer step
    log; every so often answer validation problems                                                        5. look

The defaults run the textbook form: 16 prompts × 8 answers, one pass of four minibatches, β = 0.05 (--kl_beta), γ = 1, λ
= 0.95 (--lam), ε = ε_v = 0.2 (--clip_ratio, --clip_value), c = 0.1 (--value_weight), normalised scores, no baseline but
the values (a head on the policy's trunk), whitened advantages, a fine of 1 where the end is missing, stop_kl = 0.1.
Off: --kl_target, --baseline mean or wins, a value network of its own, further passes, LoRA.

V_t is read at the token before y_t, where y_t is chosen: it must not know y_t. The advantages are whitened over all
tokens of the step and all ranks (`whiten` divides by n, torch.std by n − 1). The returns are taken before that: V is in
units of the reward. Dropout is always off, and the old log-probabilities are the sampler's own: on fresh answers ρ is 1
(in bf16 near 1, as sampler and loss round differently).

What keeps a run alive, each by a flag:

    --baseline         none: the values alone say what to expect. mean: less the mean of the prompt's answers (as GRPO,
                       without its division). wins: a reward model only compares answers to one prompt, and its level
                       differs between prompts. So an answer is worth its chance to beat the prompt's other answers,
                       less ½ (close to arXiv:2502.18770). V then predicts how far an answer will be from the others
    --normalise        scores brought to mean 0 and standard deviation 1 of all scores so far
    --missing_end      an answer without an end is fined, as the reward model has never seen one
    --stop_kl          the update ends when the policy is too far from π_old, in nats per token
    --kl_target        β ← β (1 + clip(KL / target − 1, ±0.2) · answers / horizon), KL to π_ref in nats per answer
                       (the code of arXiv:1909.08593; the paper has a constant 0.1 for the last factor)
    --value separate   values from a network of their own that starts from the reward model's trunk (as InstructGPT);
                       shared: from the policy's trunk, which is cheap, but the value loss pulls at the policy

The reward model is a proxy and PPO finds where it errs. So each step also logs `correct`, the verifier's judgement of
the same answers, which the training never sees: a score that rises while `correct` falls is over-optimisation.

Without --init and --reward_model the script makes both on the built-in problems, under runs/start, and reuses them.

Run it:
    python ppo.py --demo                               one answer of three tokens, by hand
    python ppo.py
    python ppo.py --init runs/sft --reward_model runs/reward_model --value separate --kl_target 3
    torchrun --nproc_per_node 2 ppo.py --init runs/sft --reward_model runs/reward_model
"""

import contextlib
import copy
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import reward_model
from data import DEFAULT_TASK, load_problems
from evaluate import is_correct, kl_estimate
from lora import add_lora, lora_off
from optim import lr_at, make_optimizers, optimizer_steps
from reward_model import RewardModel, open_reward_model, score_groups
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Fraction, Positive, Whole
from support.cli import run_script
from support.content import records_of, weights_of
from support.devices import precision, setup
from support.errors import ConfigError
from support.lora_files import LoraState
from support.moments import RunningMoments
from support.ppo_report import Look, Tokens
from support.questions import splits_with_room
from support.recorder import Recorder, RecordFlags
from support.rollouts import Sampler, minibatches_of, shuffled_groups
from support.runs import Run, make_start_once, start_name
from support.sft_start import sft_start
from support.shared_prompt import shared_answer_logprobs
from support.verified import PolicyConfig
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions. All tensors (B, T); mask is True on an answer's tokens, which stand at the front.


def token_rewards(log_ratio, final, lengths, beta):
    """log_ratio (B, T): log π_old − log π_ref, 0 after the end. final (B,): what the whole answer is worth. lengths
    (B,). -> (B, T)"""
    rewards = -beta * log_ratio
    rewards[torch.arange(len(rewards), device=rewards.device), lengths - 1] += final
    return rewards


def less_baseline(rewards, baseline="mean"):
    """rewards (N, R) of R answers to each of N prompts -> (N, R), less a baseline that is the prompt's own.

    mean: the mean of the prompt's answers (GRPO, which uses this too); leave_one_out: that of its other answers (RLOO,
    arXiv:2402.14740), R / (R − 1) times the difference; none. With a baseline, answers that all earn the same, or one
    alone, get exactly 0.
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
    """scores (N, R) of R answers to each of N prompts -> (N, R), between −½ and ½: the mean of σ(s_i − s_j) over the
    prompt's other answers j, which is the chance to be better as the Bradley-Terry model has it, less one half."""
    beats = torch.sigmoid(scores[:, :, None] - scores[:, None])  # (N, R, R), ½ against itself
    return (beats - 0.5).sum(2) / (scores.shape[1] - 1)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Eq. 16 of arXiv:1506.02438 -> advantages, and the values' targets ("returns": they are the returns if γ = λ = 1),
    both 0 outside the mask. values[:, t] is V before token t is known."""
    mask = mask.to(values.dtype)
    advantages = torch.zeros_like(values)  # (B, T)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (B,) A_{t+1} and V_{t+1}, 0 after the last token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
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
    """Eq. 7 of arXiv:1707.06347, to be minimised -> (loss, metrics). n_tokens: of the whole optimizer step, over
    pieces and ranks; default: of this piece. Metrics are means over this piece's tokens."""
    # What stands outside the mask is anything at all, exp of it may be inf, and inf · 0 = NaN: zero it first.
    real = mask.bool()
    logprobs, old_logprobs, advantages = (torch.where(real, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    ratio = (logprobs - old_logprobs).float().exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    per_token = -torch.minimum(plain, clipped)  # the pessimistic one of the two, for either sign of A
    loss = (per_token * mask).sum() / (n_tokens or mask.sum().clamp(min=1))
    with torch.no_grad():
        metrics = {
            "policy_loss": loss,
            "clip_fraction": masked_mean((clipped < plain).float(), mask),
            "approx_kl": masked_mean(kl_estimate(old_logprobs, logprobs, "k2"), mask),  # two estimates of KL(π_old ‖ π)
            "approx_kl3": masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask),  # that of stop_kl
            "ratio": masked_mean(ratio, mask),
            "ratio_spread": masked_mean((ratio - 1).abs(), mask),  # 0 on fresh rollouts
        }
        values = torch.stack([v.float() for v in metrics.values()]).tolist()  # one wait for the device, not six
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
    """The next weight of the KL penalty: more if the KL (nats per answer) of n answers is above its target."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + error * n / horizon)


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
        """packed (support/shared_prompt.py): prompts stored once, each with its R answers -> log-probabilities and
        values, (b, T) each, 0 after an answer's end. It is computed in parts of like length and put back in order; a
        critic's score is read at every token. Output t is that of the position before token t."""
        options = {"temperature": temperature, "with_states": True}
        outputs = list(packed.outputs(self.policy, lambda part: options | {"targets": part.targets}))
        logprobs = [logp for logp, _ in outputs]  # of each part (b, T)
        if self.critic is None:
            values = [self.head(states).squeeze(-1) for _, states in outputs]  # states (b, T, C)
        else:
            values = [scores.squeeze(-1) for scores in packed.outputs(self.critic)]
        return packed.in_order(logprobs), packed.in_order(values).float()


# ---------------------------------------------------------------------------------------------------------------
# By hand.


def demo():
    """One answer of three tokens, from its score to the advantages and the losses."""
    mask = torch.ones(1, 3, dtype=torch.bool)  # (B, T) = (1, 3)
    log_ratio = torch.tensor([[0.2, -0.1, 0.0]])  # log π_old − log π_ref of each token
    rewards = token_rewards(log_ratio, torch.tensor([1.0]), mask.sum(1), beta=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.1, 0.05, 1.0]]))  # −β log ratio; the score 1 at the last token
    values = torch.tensor([[0.4, 0.6, 0.9]])
    print("an answer of three tokens, score 1, β = 0.5")

    def show(label, row, note=""):
        print(f"{label:26s}" + "".join(f"{x:+8.3f}" for x in row) + f"   {note}")

    show("log π_old − log π_ref", log_ratio[0])
    show("reward r", rewards[0], "the KL penalty, and the score at the end")
    show("value V", values[0], "the guess before each token")
    delta = [-0.1 + 0.6 - 0.4, 0.05 + 0.9 - 0.6, 1.0 + 0.0 - 0.9]  # r_t + V_{t+1} − V_t, γ = 1
    show("δ = r + V' − V", delta, "by how much reward and guess rise")
    for lam in (1.0, 0.5, 0.0):
        A, G = gae(rewards, values, mask, gamma=1.0, lam=lam)
        third = delta[2]
        second = delta[1] + lam * third
        first = delta[0] + lam * second
        assert torch.allclose(A, torch.tensor([[first, second, third]]))
        assert torch.allclose(G, A + values)
        show(f"A, λ = {lam:g}", A[0], {1.0: "all later rewards less V", 0.0: "δ itself"}.get(lam, ""))
    A, G = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(G, rewards.flip(1).cumsum(1).flip(1))  # with λ = 1 the targets are the returns

    ratio = torch.tensor([[1.3, 0.7, 1.1]])  # after an optimizer step
    logprobs = ratio.log().requires_grad_()
    loss, metrics = ppo_policy_loss(logprobs, torch.zeros(1, 3), A, mask, clip=0.2)
    loss.backward()
    by_hand = torch.tensor([[0.0, -0.7 * 0.45, -1.1 * 0.1]]) / 3  # A > 0: only above 1.2 is a token stopped
    assert torch.allclose(logprobs.grad, by_hand, atol=1e-6)
    assert math.isclose(metrics["clip_fraction"], 1 / 3, rel_tol=1e-6)
    show("ratio ρ", ratio[0], "the first is beyond 1 + ε = 1.2 and A > 0: no gradient")
    show("∂loss/∂log π", by_hand[0], "−ρ A / 3, or 0 where the clip stops")

    v = torch.tensor([[0.9, 0.6, 0.9]], requires_grad=True)  # the first has moved by 0.5, towards its target 0.95
    loss, _ = value_loss(v, values, G, mask, clip=0.2)
    loss.backward()
    squares = [max((0.9 - 0.95) ** 2, (0.6 - 0.95) ** 2), (0.6 - 1.05) ** 2, (0.9 - 1.0) ** 2]
    assert math.isclose(loss.item(), sum(squares) / 6, rel_tol=1e-5)
    assert v.grad[0, 0] == 0  # it moved further than ε_v at once: the clipped square is the larger, and it is constant
    show("value target G", G[0], f"value loss {loss.item():.4f}; no gradient at the first, which moved beyond ε_v")

    scores = torch.tensor([[2.0, 2.0, 0.0]])  # of three answers to one prompt
    show("scores of 3 answers", scores[0])
    show("  chance to win, less ½", win_rates(scores)[0], "--baseline wins")
    assert torch.allclose(win_rates(scores)[0, 0], (torch.tensor(2.0).sigmoid() - 0.5) / 2)
    show("  less the mean", less_baseline(scores)[0], "--baseline mean")


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RecordFlags, PolicyConfig):
    """Train a policy against a reward model (PPO)."""

    reward_model: str | None = None
    """Reward model with the same tokenizer; default: one trained once into runs/start."""
    value: Literal["shared", "separate"] = "shared"
    """Trunk of the value network: shared with the policy, or separate (starts from the reward model's trunk)."""
    name: str = "ppo"
    steps: Count = 250
    """Batches of rollouts."""
    prompts: Count = 16
    """Prompts N per step, over all ranks."""
    rollouts: Count = 8
    """Answers R per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature, also used for the log-probabilities in the loss."""
    kl_beta: Amount = 0.05
    """Weight of the KL penalty in the rewards; with --kl_target its first value."""
    kl_target: Positive | None = None
    """Adapt the weight of the KL penalty so that the KL stays near this many nats per answer."""
    kl_horizon: Positive = 5000.0
    """Number of answers over which the weight adapts."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's λ: below 1 the first tokens of an answer learn less from its score and more from the values."""
    clip_ratio: Amount = 0.2
    """Clip ε of the ratio: beyond 1 ± ε a token gains nothing more."""
    clip_value: Amount = 0.2
    """Clip of the value: how far it may move from its value at sampling and still lower the loss; 0: no clip."""
    value_weight: Amount = 0.1
    """Weight of the value loss."""
    baseline: Literal["wins", "mean", "none"] = "none"
    """What a score is compared with: wins (its probability of beating the prompt's other answers; bounded), mean (the
    mean score of the prompt's answers) or none (the values alone)."""
    whiten: bool = True
    """Normalise the advantages of a step to mean 0 and standard deviation 1."""
    normalise: bool | None = None
    """Normalise the scores by the mean and standard deviation of all scores so far; default: true, but false with
    --baseline wins, whose σ needs the reward model's own scale. The penalty for a missing end is subtracted after."""
    missing_end: Amount = 1.0
    """Penalty for an answer that was cut off, in units of the (normalised) score."""
    inner_epochs: Count = 1
    """Passes over each batch of rollouts."""
    minibatches: Count = 4
    """Optimizer steps in a pass; from the second on ρ differs from 1."""
    stop_kl: Amount = 0.1
    """End the step's updates when the KL to the policy that sampled (k3) exceeds this many nats per token; 0: never."""
    micro_batch: Count = 64
    """Completions per forward pass of one rank, in whole groups: never fewer than --rollouts."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the policy: adamw, or muon for the matrices of the blocks, with about six times the learning
    rate."""
    lr: Amount = 5e-5
    """Peak learning rate of the policy; it falls linearly to 0 after the warm-up."""
    value_lr: Amount = 1e-3
    """Learning rate of the value head after the warm-up, then constant; a separate network uses a tenth of it."""
    warmup: Whole = 5
    clip: Amount = 1.0
    """Clip the gradient norm to this, for policy and values separately; 0 turns clipping off."""
    eval_every: Count = 25
    eval_problems: Count = 200
    """Validation problems per evaluation."""
    test_problems: Count = 1000
    """Test problems of the evaluations before and after training."""
    sample_every: Count = 50
    """Steps between printed rollouts."""
    save_every: Count = 50

    def __post_init__(self):
        super().__post_init__()
        if self.normalise is None:
            self.normalise = self.baseline != "wins"
        if self.baseline != "none" and self.rollouts < 2:
            raise ConfigError(f"--baseline {self.baseline} needs --rollouts of at least 2: there is no other answer")
        if self.kl_target is not None and self.kl_beta == 0:
            raise ConfigError("--kl_beta 0 stays 0, as --kl_target multiplies it; start from more")
        least = 0.2 * self.prompts * self.rollouts  # one step multiplies β by at least 1 − 0.2 N·R / horizon
        if self.kl_target is not None and not self.kl_horizon > least:
            bound = f"above {least:g}, or one step can end the KL penalty"
            raise ConfigError(f"--kl_horizon is {self.kl_horizon}; it must be {bound}")
        if self.prompts < self.minibatches:
            raise ConfigError(f"--prompts {self.prompts} cannot be cut into {self.minibatches} minibatches")
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
    return make_start_once(name, "no --reward_model given: training one", reward_model, settings, dist)


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
    actor_critic = ActorCritic(policy, critic).to(dist.device)
    if config.lora.rank:
        add_lora(policy, **asdict(config.lora), seed=config.seed)
    actor_critic.eval()  # throughout: with dropout the ratio on fresh rollouts would not be 1
    if config.lora.rank:
        return actor_critic, policy, judge.requires_grad_(False).eval(), tokenizer
    reference, _, _ = open_checkpoint(init, dist.device)
    return actor_critic, reference.requires_grad_(False).eval(), judge.requires_grad_(False).eval(), tokenizer


@torch.no_grad()
def values_and_reference(actor_critic, reference, pieces, batch, config, autocast):
    """Before the update: V and log π_ref of every token of the pieces' answers, each (n·R, T) and 0 elsewhere."""
    values, ref_logprobs = torch.zeros_like(batch.rollout.logprobs), torch.zeros_like(batch.rollout.logprobs)
    with autocast():
        for piece in pieces:
            T = piece.mask.shape[1]
            values[piece.rows, :T] = actor_critic(piece.packed, config.temperature)[1][:, :T]
            with lora_off(reference):
                logprobs = shared_answer_logprobs(reference, piece.packed, config.temperature)
            ref_logprobs[piece.rows, :T] = logprobs[:, :T].float()
    return values, ref_logprobs


def main(config):
    """Train; returns {"before", "after"} (test figures), "path" and the wall time in seconds."""
    began = time.perf_counter()
    dist = setup(config.device)
    n, R = dist.per_rank("prompts", config.prompts), config.rollouts  # this rank asks n of a step's N prompts
    slots = list(range(dist.rank * n, (dist.rank + 1) * n))  # which of the N they are
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or sft_start(config, dist)
    judge_path = config.reward_model or reward_start(config, init, dist)
    actor_critic, reference, judge, tokenizer = open_models(config, init, judge_path, dist)
    policy, pad = actor_critic.policy, tokenizer.endoftext_id
    context = min(policy.config.context, judge.config.context)
    sizes = {"train": None, "valid": config.eval_problems, "test": config.test_problems}
    load = partial(load_problems, config.data, levels=tuple(config.levels), skip_bad=config.skip_bad)
    problems = splits_with_room(load, sizes, config, tokenizer, context, dist)

    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    value_parameters = actor_critic.value_parameters()
    value_optimizer = torch.optim.AdamW(value_parameters, betas=(0.9, 0.999), weight_decay=0.0)  # lr: in part 4
    moments = RunningMoments()
    value_model = actor_critic.critic or actor_critic.head
    saved = {"lora": LoraState(policy, init), "value": value_model, "moments": moments}  # beside the policy's weights
    reads = records_of(config.data, problems) | weights_of(init, policy) | weights_of(judge_path, judge)
    state = {"best": -1.0, "before": None, "start": {}, "beta": config.kl_beta, "parts": saved, "began": began}
    run = Run(config, dist, policy, tokenizer, [*optimizers, value_optimizer], scaler, reads=reads, **state)
    model = DistributedDataParallel(actor_critic, broadcast_buffers=False) if dist.world > 1 else actor_critic
    look = Look(run, problems)
    look.before(init, judge_path)  # the test split; and until something beats it, the start is best/

    # An answer that stops in another way counts as cut off: the reward model has seen no other end than im_end.
    sample = Sampler(policy, tokenizer, problems["train"], config, autocast, stop_ids=(tokenizer.im_end_id,))

    def score(batch):
        """What the reward model gives each answer, (n, R)."""
        answers = list(zip(batch.prompts, batch.answers, strict=True))  # n pairs of a prompt and its R answers
        return torch.tensor(score_groups(judge, answers, pad, dist.device, autocast))

    seen = {"valid": problems["valid"], "sample": sample, "score": score, "temperature": config.temperature}
    recorder = Recorder(run, autocast, reference=reference, **seen)  # for view.py
    for step in run.steps():
        # 1. ask: the policy answers each prompt R times
        started = time.perf_counter()
        batch = sample(step, slots)
        old_logprobs, mask = batch.rollout.logprobs, batch.rollout.mask  # (n·R, T)

        # 2. judge: the reward model's scores, and what an answer is worth
        scores = score(batch)  # (n, R)
        moments.add(scores, dist)
        paid = (moments.normalise(scores) if config.normalise else scores) - config.missing_end * ~batch.ended  # (n, R)
        final = win_rates(paid) if config.baseline == "wins" else less_baseline(paid, config.baseline)  # (n, R)
        right = [is_correct(text, batch.problems[k // R]) for k, text in enumerate(batch.texts)]  # logged, never paid
        sampled = time.perf_counter()

        # 3. credit: values, rewards with the KL penalty, and from both the advantages
        groups = shuffled_groups(step, slots, config)  # of each minibatch
        minibatches = minibatches_of(batch, groups, None, mask, config.micro_batch, pad, dist)  # None: all groups
        pieces = [piece for minibatch in minibatches for piece in minibatch.pieces]
        old_values, ref_logprobs = values_and_reference(actor_critic, reference, pieces, batch, config, autocast)
        log_ratio = kl_estimate(old_logprobs, ref_logprobs, "k1") * mask  # (n·R, T) log π_old − log π_ref
        rewards = token_rewards(log_ratio, final.flatten().to(dist.device), mask.sum(1), run.state.beta)  # (n·R, T)
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)  # (n·R, T) each
        A = whiten(advantages, mask, dist) if config.whiten else advantages

        judged = {"correct": torch.tensor(right).float().view(n, R), "score": scores, "paid": paid}  # (n, R) each
        recorder.answers(batch, final, judged, ref=ref_logprobs, value=old_values, target=returns, reward=rewards, A=A)

        # 4. update: an optimizer step for each minibatch, from the second on ρ ≠ 1
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        value_lr = config.value_lr * (0.1 if config.value == "separate" else 1.0)
        value_lr = lr_at(step, config.steps, value_lr, config.warmup, schedule="wsd", decay=0)  # constant after that
        trained = [(list(policy.parameters()), optimizers, lr), (value_parameters, [value_optimizer], value_lr)]
        sums, updates = {}, 0
        for minibatch in minibatches * config.inner_epochs:
            n_tokens, figures = minibatch.n_tokens, {}
            for piece in minibatch.pieces:
                T, last = piece.mask.shape[1], piece is minibatch.pieces[-1]
                at = piece.rows, slice(T)  # this piece's part of what is (n·R, longest): (b, T)
                # DDP sums up the gradients over the ranks in the last backward alone, and divides by their number
                with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                    with autocast():
                        logprobs, values = (x[:, :T] for x in model(piece.packed, config.temperature))  # (b, T) each
                    inputs = logprobs, old_logprobs[at], A[at], piece.mask
                    options = {"clip": config.clip_ratio, "n_tokens": n_tokens}
                    loss, metrics = ppo_policy_loss(*inputs, **options)
                    recorder.tokens(piece.rows, ppo_policy_loss, inputs, options, clips=("clip",))
                    loss_v, metrics_v = value_loss(
                        values, old_values[at], returns[at], piece.mask, config.clip_value, n_tokens=n_tokens
                    )
                    scaler.scale((loss + config.value_weight * loss_v) * dist.world).backward()
                share_of_tokens = piece.mask.sum().item() / n_tokens
                for name, value in (metrics | metrics_v).items():  # a loss is a sum already, the others are means
                    weight = 1 if name.endswith("_loss") else share_of_tokens
                    figures[name] = figures.get(name, 0.0) + value * weight
            figures = dict(zip(figures, dist.sum(*figures.values()), strict=True))
            losses = {name: figures[name] for name in ("policy_loss", "value_loss")}
            run.check_finite(lr, advice="try a smaller --lr, or --dtype fp32", **losses)  # which no scaler mends
            if config.stop_kl and figures["approx_kl3"] > config.stop_kl:
                for optimizer in run.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                break
            norm, value_norm = optimizer_steps(trained, scaler, autocast, config.clip)  # each clipped by itself
            run.check_finite(lr, math.hypot(norm, value_norm))
            figures |= {"grad_norm": norm, "grad_norm_value": value_norm}
            sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
            updates += 1

        # 5. look
        judged = judged | {"final": final}
        tokens = Tokens(mask, old_logprobs, ref_logprobs, old_values, returns, rewards, advantages)
        figures = {name: value / max(updates, 1) for name, value in sums.items()} | {"updates": updates, "lr": lr}
        figures |= {"seconds_rollout": sampled - started, "steps_per_second": 1 / (time.perf_counter() - started)}
        record = look.record(batch, judged, tokens) | figures
        if config.kl_target is not None:
            kl, n_answers = record["kl_per_answer"], config.prompts * R
            run.state.beta = adapt_beta(run.state.beta, kl, config.kl_target, n_answers, config.kl_horizon)
        look.at_step(record, batch, judged, tokens)
    run.close()
    return look.after()


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
