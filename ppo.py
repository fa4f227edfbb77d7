"""PPO for language: a learned reward, a value for every token, a clip and a KL penalty (arXiv:1707.06347, 2203.02155).

A reward model says after the last token how good an answer is. Which tokens earned it? A value head guesses, before
every token, what is still to come. A token's δ is its reward plus the rise of the guess. Its advantage is its own δ,
plus λ times the next token's δ, plus λ² times the δ after that, and so on.

The policy gradient. π is the policy, π_old the policy when it sampled this batch, π_ref the frozen start. An answer
y ~ π(· | x) to a prompt x earns a reward r_t at each token, of which a KL penalty with the weight β is a part. The
return of token t is G_t = r_t + r_{t+1} + … (the discount γ is 1 in this sum):

    r_t = −β (log π(y_t) − log π_ref(y_t)),                and at the last token also `final`: what the answer is worth
    J   = E[Σ_t r_t] = E[final] − β KL(π ‖ π_ref)          the KL of whole answers; the J of dpo.py
    ∇J  = E[(Σ_s r_s) Σ_t ∇log π(y_t | x, y_<t)]           because ∇π = π ∇log π
        = E[Σ_t G_t ∇log π(y_t | x, y_<t)]                 a token is credited with its own and all later rewards
        = E[Σ_t (G_t − V_t) ∇log π(y_t | x, y_<t)]         for any V_t = V(x, y_<t), which does not see y_t
    δ_t = r_t + γ V_{t+1} − V_t                            V is 0 after the last token
    A_t = δ_t + γλ A_{t+1} = Σ_l (γλ)^l δ_{t+l}            GAE, arXiv:1506.02438, Eq. 16

After any prefix E[∇log π(y_t | x, y_<t)] = 0. So the gradient through r_t, −β ∇log π(y_t), has mean 0, and the code
takes r_t at π_old, as a number; earlier rewards drop out; and V_t changes no mean. The values are fitted to the targets
A_t + V_t. With γ = λ = 1 these are the returns G_t, and A_t = G_t − V_t, as the V in between cancel: unbiased and
noisy. With λ = 0, A_t = δ_t: quiet, and wrong by as much as V_{t+1} is.

Later updates from the same batch need two things. The ratio ρ_t = π(y_t) / π_old(y_t) corrects for y_t, but not for the
tokens before it, so π must stay near π_old; the clip removes the gain from going further. ρ_t A_t has the gradient
ρ_t A_t ∇log π(y_t): at ρ = 1 the one above, with A for G − V. Once ρ is beyond 1 ± ε in the direction that A asks for,
the clip sets the token's gradient to 0. A value may likewise gain no more once it is ε_v away from V_old, its value at
sampling.

    policy loss  −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)                             arXiv:1707.06347, Eq. 7
    value loss   ½ max((V − target)², (clip(V, V_old ± ε_v) − target)²)         from the code of OpenAI Baselines

Both are a mean over a minibatch's tokens. One step, for N prompts with R answers of at most T tokens each; `main` has
the same five parts. The N·R answers are a *batch*, the R answers to one prompt a *group*; an optimizer step takes all
answers to some of the prompts, a *minibatch*; a forward pass some of these, a *piece* of b answers. What an answer
earns has three names, *score*, *paid* and *final*; only *rewards* are per token:

    batch  = sample(step)                              (N·R, T): ids, mask, log π_old                     1. ask
    scores = score(batch)                              by the reward model                      (N, R)    2. judge
    moments.add(scores)                                mean and std of all scores so far
    paid   = scores, normalised by these (default), less missing_end where cut off              (N, R)
    final  = paid; --baseline mean: less the group's mean; wins: win_rates(paid)                (N, R)
    minibatches  = minibatches_of(batch)               cut here: the next two lines read its pieces       3. credit
    old_values   = values_at_sampling(actor_critic)    V, no gradient                           (N·R, T)
    ref_logprobs = reference_logprobs(reference)       log π_ref, no gradient                   (N·R, T)
    rewards = token_rewards(old_logprobs − ref_logprobs, final)        the r_t above            (N·R, T)
    advantages, targets = gae(rewards, old_values)                                              (N·R, T) each
    whitened = whiten(advantages)                      mean 0, std 1 over the step's tokens; for the policy loss alone
    for minibatch in minibatches, inner_epochs times:                                                     4. update
        for piece in minibatch:
            logprobs, values = model(piece)            (b, T), with gradient; ρ = 1 in the first minibatch
            loss = ppo_policy_loss(logprobs, old_logprobs, whitened) + c · value_loss(values, old_values, targets)
            backward: the pieces' gradients add up
        if KL(π_old ‖ π), nats per token, is above stop_kl: drop this minibatch and the rest of the step
        clip the policy's and the values' gradients, optimizer step
    β      = adapt_beta(β, KL(π_old ‖ π_ref))          nats per answer; off by default
    log; every so often answer validation problems                                                        5. look

The defaults run 250 steps of 16 prompts × 8 answers, one pass of four minibatches, AdamW at 5e-5 (the values' at 1e-3),
β = 0.05 (--beta); γ = 1, λ = 0.95 (--lam), ε = ε_v = 0.2 (--clip_ratio, --clip_value) and c = 0.1 (--value_weight), as
the code of arXiv:1909.08593; normalised scores, no baseline but the values (a head on the policy's trunk), whitened
advantages, missing_end = 1, as the reward model has never seen an answer that was cut off, and stop_kl = 0.1.
Off: --kl_target, --baseline mean or wins, a value network of its own, further passes, LoRA. Simplified: no entropy
bonus (Eq. 9 of PPO), no pretraining term (PPO-ptx, Eq. 2 of InstructGPT), and after a cut answer V is 0 too, as if it
had ended.

V_t is read at the token before y_t, where y_t is chosen: it must not know y_t. The targets are taken before the
whitening: V is in units of the reward. The old log-probabilities are the sampler's own: on fresh answers ρ is 1 (in
bf16 near 1, as sampler and loss round differently).

--value separate has a network of its own that starts from the reward model (as InstructGPT), but for its head; shared
reads the policy's trunk, which is cheap, but the value loss pulls at the policy. --baseline wins: a reward model only
compares answers to one prompt, and its level differs between prompts. So an answer is worth its chance to beat the
prompt's other answers, less ½ (close to arXiv:2502.18770), and this is what V predicts.

The reward model is a proxy and PPO finds where it errs. So each step also logs `correct`, the verifier's judgement of
the same answers. No gradient sees it; the validation accuracy only chooses best/, and the table at the end is of last/.
A score that rises while `correct` falls is over-optimisation.

Run it (without --init and --reward_model it makes both on the task of --data, under runs/start, and reuses them):
    python ppo.py --demo                               one answer of three tokens, by hand
    python ppo.py
    python ppo.py --data pairs.jsonl --init runs/sft --reward_model runs/reward_model
                                                       own pairs, if each also has its "instruction" and an "output"
    python ppo.py --value separate --prompts 512 --rollouts 1 --minibatches 8 --beta 0.02       as InstructGPT
    torchrun --nproc_per_node 2 ppo.py --init runs/sft --reward_model runs/reward_model
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evaluate import is_correct, kl_estimate
from optim import lr_at, make_optimizers, optimizer_steps
from reward_model import score_groups
from support.checks import Amount, Count, Fraction, Positive
from support.cli import run_script
from support.moments import RunningMoments
from support.ppo_report import Tokens, tally
from support.ppo_setup import SetupFlags, begin_run, open_start
from support.recorder import RecordFlags
from support.rollouts import Sampler, minibatches_of, reference_logprobs, shuffled_groups, values_at_sampling
from support.sharding import averaging
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions of b answers of up to T tokens, at the front of a row; the mask is True on them.
# Tensors are (b, T) unless said otherwise. `main` gives the two losses a piece, the other functions a whole batch.


def token_rewards(log_old_over_ref, final, lengths, beta):
    """log_old_over_ref (b, T): log π_old − log π_ref, 0 after the end. final (b,): what the whole answer is worth.
    lengths (b,), at least 1. -> (b, T)"""
    rewards = -beta * log_old_over_ref
    rewards[torch.arange(len(rewards), device=rewards.device), lengths - 1] += final
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Eq. 16 of arXiv:1506.02438 -> advantages (b, T), and the values' targets A_t + V_t (b, T): with λ = 1 the
    returns, discounted by γ. Both 0 outside the mask. rewards, values (b, T), any value outside the mask; values[:, t]
    is V before token t is known. mask (b, T): True at the front of a row only; credit would pass through a hole."""
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (b,) A_{t+1} and V_{t+1}, 0 after the last token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (b,)
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(x, mask, dist=None, eps=1e-8):
    """x (b, T) -> (x − mean) / std, over the n masked tokens (ddof 0), with `dist` those of all ranks; 0 outside."""
    x, mask = torch.where(mask.bool(), x, 0.0), mask.to(x.dtype)
    sums = [mask.sum(), (x * mask).sum()]
    n, total = dist.sum(*sums) if dist else sums
    mean = total / max(n, 1)
    squares = (((x - mean) * mask) ** 2).sum()
    (squares,) = dist.sum(squares) if dist else (squares,)
    return (x - mean) * mask / (squares / max(n, 1) + eps) ** 0.5


def ppo_policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, *, n_tokens=None):
    """Eq. 7 of arXiv:1707.06347, to be minimised -> (loss (), metrics). n_tokens: of the whole optimizer step, over
    pieces and ranks; default: of this piece. Metrics: the loss; the others are means over this piece's tokens."""
    # Padding may hold any value; exp could overflow, and inf · 0 = NaN: zero it first.
    real = mask.bool()
    logprobs, old_logprobs, advantages = (torch.where(real, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    ratio = (logprobs - old_logprobs).to(dtype).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    per_token = -torch.minimum(plain, clipped)  # the pessimistic one of the two, for either sign of A
    loss = (per_token * mask).sum() / (n_tokens or mask.sum().clamp(min=1))
    with torch.no_grad():
        metrics = {
            "policy_loss": loss,
            # the share of tokens whose gradient the clip removes; CleanRL counts every |ρ − 1| > ε
            "clip_fraction": masked_mean((clipped < plain).float(), mask),
            # two estimates of KL(π_old ‖ π), of tokens sampled by π_old: k2 = ½ (log ρ)², k3 = ρ − 1 − log ρ
            "approx_kl": masked_mean(kl_estimate(old_logprobs, logprobs, "k2"), mask),
            "approx_kl3": masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask),  # that of stop_kl
            "ratio": masked_mean(ratio, mask),
            "ratio_spread": masked_mean((ratio - 1).abs(), mask),  # 0 on fresh rollouts
        }
        numbers = torch.stack([x.float() for x in metrics.values()]).tolist()  # one wait for the device, not six
    return loss, dict(zip(metrics, numbers, strict=True))


def value_loss(values, old_values, targets, mask, clip=0.2, *, n_tokens=None):
    """All (b, T) -> (loss (), metrics). clip: ε_v; None or 0: not clipped. Padding may hold any value."""
    values, old_values, targets = (torch.where(mask.bool(), x, 0.0) for x in (values, old_values, targets))
    squares = (values - targets) ** 2
    clipped_fraction = torch.zeros(())
    if clip:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        clipped_squares = (clipped - targets) ** 2
        clipped_fraction = masked_mean((clipped_squares > squares).float(), mask)
        squares = torch.maximum(squares, clipped_squares)  # the pessimistic one of the two
    loss = 0.5 * squares.sum() / (n_tokens or mask.sum().clamp(min=1))
    return loss, {"value_loss": loss.item(), "value_clip_fraction": clipped_fraction.item()}


def win_rates(paid):
    """paid (N, R), R at least 2 -> (N, R), between −½ and ½: the mean of σ(p_i − p_j) over the prompt's other answers
    j, which is the chance to be better as the Bradley-Terry model has it, less one half."""
    beats = torch.sigmoid(paid[:, :, None] - paid[:, None])  # (N, R, R), ½ against itself
    return (beats - 0.5).sum(2) / (paid.shape[1] - 1)


def adapt_beta(beta, kl, target, n, horizon):
    """The next β: more if the KL (nats per answer) of n answers is above its target. From arXiv:1909.08593, §2.2, and
    its code, which has n / horizon where the paper has 0.1."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + error * n / horizon)


# ---------------------------------------------------------------------------------------------------------------
# The model.


class ActorCritic(nn.Module):
    """A policy and its values. Both come from one forward, as DDP wants it."""

    def __init__(self, policy, critic=None):
        """critic: a RewardModel of its own, or None to read the values from the policy's last states."""
        super().__init__()
        self.policy, self.critic, self.head = policy, critic, None
        if critic is None:
            self.head = nn.Linear(policy.config.width, 1, bias=True)
            nn.init.zeros_(self.head.weight)  # V starts at 0, not at noise that the first advantages would carry
            nn.init.zeros_(self.head.bias)
        else:
            nn.init.zeros_(critic.head.weight)  # its scores are in other units than the targets

    def forward(self, packed, temperature=1.0):
        """packed (support/shared_prompt.py: each prompt once, with its R answers) -> log π and V, (b, T) each, 0 after
        an answer's end. Output t comes from the position before token t."""
        options = {"temperature": temperature, "with_states": True}
        outputs = packed.outputs(self.policy, lambda part: options | {"targets": part.targets})
        logprobs, states = zip(*outputs, strict=True)  # of each part, b' answers of like length: (b', T'), (b', T', C)
        return packed.in_order(logprobs), self.values(packed, states)

    def values(self, packed, states=None):
        """V alone, (b, T). states: the policy's, where they are known already."""
        if self.critic is not None:
            values = list(packed.outputs(self.critic))  # of each part (b', T', 1): the critic's score at every token
        else:
            states = list(packed.outputs(self.policy.hidden)) if states is None else states
            with torch.autocast(states[0].device.type, enabled=False):  # bf16 would round V_{t+1} − V_t away
                values = [self.head(x.to(self.head.weight.dtype)) for x in states]  # (b', T', 1)
        return packed.in_order([x.squeeze(-1) for x in values]).float()


# ---------------------------------------------------------------------------------------------------------------
# By hand.


def demo():
    """One answer of three tokens, from what it is worth to the advantages and the losses."""
    mask = torch.ones(1, 3, dtype=torch.bool)  # (b, T) = (1, 3)
    log_old_over_ref = torch.tensor([[0.2, -0.1, 0.0]])  # log π_old − log π_ref of each token
    rewards = token_rewards(log_old_over_ref, torch.tensor([1.0]), mask.sum(1), beta=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.1, 0.05, 1.0]]))  # −β log ratio; `final` = 1 at the last token
    values = torch.tensor([[0.4, 0.6, 1.2]])
    print("an answer of three tokens, final 1, β = 0.5")

    def show(label, row, note=""):
        print(f"{label:26s}" + "".join(f"{x:+8.3f}" for x in row) + f"   {note}")

    show("log π_old − log π_ref", log_old_over_ref[0])
    show("reward r", rewards[0], "the KL penalty, and `final` at the end")
    show("value V", values[0], "the guess before each token")
    delta = [-0.1 + 0.6 - 0.4, 0.05 + 1.2 - 0.6, 1.0 + 0.0 - 1.2]  # r_t + V_{t+1} − V_t, γ = 1
    show("δ = r + V' − V", delta, "its reward plus the rise of the guess")
    for lam in (0.0, 0.5, 1.0):
        A, targets = gae(rewards, values, mask, gamma=1.0, lam=lam)
        second = delta[1] + lam * delta[2]
        assert torch.allclose(A, torch.tensor([[delta[0] + lam * second, second, delta[2]]]))
        assert torch.allclose(targets, A + values)
        show(f"A, λ = {lam:g}", A[0], {1.0: "its own and all later rewards, less V", 0.0: "δ itself"}.get(lam, ""))
    assert torch.allclose(targets, rewards.flip(1).cumsum(1).flip(1))  # with λ = 1, the last, the targets are G

    ratio = torch.tensor([[1.3, 0.7, 1.3]])  # after an optimizer step
    logprobs = ratio.log().requires_grad_()
    loss, metrics = ppo_policy_loss(logprobs, torch.zeros(1, 3), A, mask, clip=0.2)
    loss.backward()
    by_hand = torch.tensor([[0.0, -0.7 * 0.45, 1.3 * 0.2]]) / 3  # A > 0 is stopped only above 1.2, A < 0 below 0.8
    assert torch.allclose(logprobs.grad, by_hand, atol=1e-6)
    assert math.isclose(metrics["clip_fraction"], 1 / 3, rel_tol=1e-6)
    show("ratio ρ", ratio[0], "first: beyond 1 + ε = 1.2, and A > 0: no gradient; third: A < 0")
    show("∂loss/∂log π", by_hand[0], "−ρ A / 3 with the A of λ = 1, or 0 where the clip stops")

    moved = torch.tensor([[0.9, 0.6, 1.2]], requires_grad=True)  # the first by 0.5, towards its target 0.95
    loss, _ = value_loss(moved, values, targets, mask, clip=0.2)
    loss.backward()
    squares = [max((0.9 - 0.95) ** 2, (0.6 - 0.95) ** 2), (0.6 - 1.05) ** 2, (1.2 - 1.0) ** 2]
    assert math.isclose(loss.item(), sum(squares) / 6, rel_tol=1e-5)
    assert moved.grad[0, 0] == 0  # it moved further than ε_v: the clipped square is the larger, and it is constant
    show("value target A + V", targets[0], "what V is fitted to; with λ = 1: the returns G")
    show("V after a step", moved.detach()[0], f"value loss {loss.item():.4f}; no gradient at the first: beyond V ± 0.2")


# ---------------------------------------------------------------------------------------------------------------
# The stage. More flags: support/ppo_setup.py (--prompts, N, --rollouts, R, --micro_batch, b; an adaptive β; the
# optimizer), support/verified.py.


@dataclass
class Config(RecordFlags, SetupFlags):
    """Train a policy against a reward model (PPO)."""

    value: Literal["shared", "separate"] = "shared"
    """Trunk of the value network: shared with the policy, or separate (starts from the reward model's trunk)."""
    name: str = "ppo"
    steps: Count = 250
    """Batches of answers; each gives --inner_epochs × --minibatches optimizer steps, fewer where --stop_kl stops."""
    beta: Amount = 0.05
    """Weight of the KL penalty in the rewards; with --kl_target its first value. Per answer: not to be compared with
    grpo.py's, which weighs a KL per token."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's λ: below 1 the first tokens of an answer learn less from its score and more from the values."""
    clip_ratio: Positive = 0.2
    """Clip ε of the ratio: beyond 1 ± ε a token gains nothing more."""
    clip_value: Amount = 0.2
    """Clip of the value: how far it may move from its value at sampling and still lower the loss; 0: no clip."""
    value_weight: Amount = 0.1
    """Weight c of the value loss; it matters where the trunk is shared. The head or the separate network has its own
    AdamW, which ignores a constant factor on its gradient, unless --clip bounds it."""
    baseline: Literal["wins", "mean", "none"] = "none"
    """What a score is compared with: wins (its probability of beating the prompt's other answers; bounded), mean (the
    mean score of the prompt's answers) or none (the values alone)."""
    whiten: bool = True
    """Normalise the advantages of a step to mean 0 and standard deviation 1."""
    normalise: bool | None = None
    """Normalise the scores by the mean and standard deviation of all scores so far; default: true, but false with
    --baseline wins, whose σ needs the reward model's own scale. --missing_end is subtracted after it."""
    missing_end: Amount = 1.0
    """What an answer that was cut off is paid less, in units of the (normalised) score."""
    inner_epochs: Count = 1
    """Passes over each batch of rollouts, with the same minibatches in the same order."""
    minibatches: Count = 4
    """Optimizer steps in a pass; from the second on ρ differs from 1."""
    stop_kl: Amount = 0.1
    """End the step's updates when the KL to the policy that sampled (k3) exceeds this many nats per token; 0: never."""
    lr: Amount = 5e-5
    """Peak learning rate of the policy; it falls linearly to 0 after the warm-up."""
    value_lr: Amount = 1e-3
    """Learning rate of the value head, constant after the warm-up; a separate network uses a tenth of it."""


def main(config):
    """Train; returns {"before", "after"} (test figures), "path" and the wall time in seconds."""
    start = open_start(ActorCritic, config)
    dist, autocast, scaler, R = start.dist, start.autocast, start.scaler, config.rollouts
    n, slots = start.n, start.slots  # this rank asks n of a step's N prompts; their numbers among the N
    actor_critic, reference = start.actor_critic, start.reference  # with LoRA π_ref is the policy, its adapters off
    policy, tokenizer, pad = actor_critic.policy, start.tokenizer, start.tokenizer.endoftext_id
    actor_critic.eval()  # throughout: with dropout the ratio on fresh rollouts would not be 1

    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay, betas=(0.9, 0.999))
    value_model = actor_critic.critic or actor_critic.head
    moments = RunningMoments()  # of the scores
    value_parameters = list(value_model.parameters())
    value_optimizer = torch.optim.AdamW(value_parameters, betas=(0.9, 0.999), weight_decay=0.0)  # lr: in part 4

    # An answer that stops in another way counts as cut off: the reward model has seen no other end than im_end.
    sample = Sampler(policy, tokenizer, start.problems["train"], config, autocast, stop_ids=(tokenizer.im_end_id,))

    def score(batch):
        """What the reward model gives each answer, (n, R) on the CPU."""
        answers = list(zip(batch.prompts, batch.answers, strict=True))  # n pairs of a prompt and its R answers
        return torch.tensor(score_groups(start.judge, answers, pad, dist.device, autocast))

    parts = {"value": value_model, "moments": moments}  # what a checkpoint has beside the policy
    # run: steps, checkpoints. look: logs and validates. recorder: for view.py. The last two do not change the training
    run, look, recorder = begin_run(start, [*optimizers, value_optimizer], parts, sample, score)
    model = DistributedDataParallel(actor_critic, broadcast_buffers=False) if dist.world > 1 else actor_critic
    policy_loss = recorder.noted(ppo_policy_loss)  # the same function; the recorder keeps what it is given

    for step in run.steps():
        # 1. ask: the policy answers each prompt R times
        look.begin_step()
        batch = sample(step, slots)
        old_logprobs, mask = batch.rollout.logprobs, batch.rollout.mask  # (n·R, T)

        # 2. judge: the reward model's scores, what is paid for them, and what an answer is worth; (n, R) each
        scores = score(batch)
        moments.add(scores, dist)
        paid = (moments.normalise(scores) if config.normalise else scores) - config.missing_end * ~batch.ended
        final = win_rates(paid) if config.baseline == "wins" else paid
        if config.baseline == "mean":
            final = paid - paid.mean(1, keepdim=True)
        right = [is_correct(text, batch.problems[k // R]) for k, text in enumerate(batch.texts)]  # logged, never paid
        judged = {"correct": torch.tensor(right).float().view(n, R), "score": scores, "paid": paid}  # for log and view
        look.sampled()

        # 3. credit: values, rewards with the KL penalty, and from both the advantages; (n·R, T) each
        groups = shuffled_groups(step, slots, config)  # drawn anew: which of this rank's n groups each minibatch has
        minibatches = minibatches_of(batch, groups, mask, config, pad, dist)
        pieces = [piece for minibatch in minibatches for piece in minibatch.pieces]
        old_values = values_at_sampling(actor_critic, pieces, batch, autocast)
        ref_logprobs = reference_logprobs(reference, policy, pieces, batch, config, autocast)
        beta, log_old_over_ref = run.state.beta, (old_logprobs - ref_logprobs) * mask  # (n·R, T)
        rewards = token_rewards(log_old_over_ref, final.flatten().to(dist.device), mask.sum(1), beta)
        advantages, targets = gae(rewards, old_values, mask, config.gamma, config.lam)
        whitened = whiten(advantages, mask, dist) if config.whiten else advantages  # for the policy loss alone
        shown = {"ref": ref_logprobs, "value": old_values, "target": targets, "reward": rewards, "A": whitened}
        recorder.answers(batch, final, judged, **shown)

        # 4. update: an optimizer step for each minibatch, from the second on ρ ≠ 1
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        value_lr = config.value_lr * (0.1 if config.value == "separate" else 1.0)
        value_lr = lr_at(step, config.steps, value_lr, config.warmup, schedule="wsd", decay=0)  # then constant
        # (parameters, their optimizers, their learning rate) of both parts, each clipped by itself
        trained = [(list(policy.parameters()), optimizers, lr), (value_parameters, [value_optimizer], value_lr)]
        for minibatch in minibatches * config.inner_epochs:
            sums, n_tokens = {}, minibatch.n_tokens
            for piece in minibatch.pieces:
                T = piece.mask.shape[1]
                here = piece.rows, slice(T)  # an index into (n·R, longest) -> (b, T)
                # DDP averages the gradients over the ranks in the last backward alone
                with averaging(model, piece is minibatch.pieces[-1]):
                    with autocast():  # (b, T) each, without the padding to a multiple of 8
                        logprobs, values = (x[:, :T] for x in model(piece.packed, config.temperature))
                    options = {"clip": config.clip_ratio, "n_tokens": n_tokens}
                    loss, metrics = policy_loss(logprobs, old_logprobs[here], whitened[here], piece.mask, **options)
                    options = {"clip": config.clip_value, "n_tokens": n_tokens}
                    loss_v, metrics_v = value_loss(values, old_values[here], targets[here], piece.mask, **options)
                    recorder.tokens(piece.rows, clips=("clip",))
                    # × world, because DDP averages over the ranks and n_tokens already counts them all
                    scaler.scale((loss + config.value_weight * loss_v) * dist.world).backward()
                tally(sums, metrics | metrics_v, piece.mask.sum().item() / n_tokens)
            figures = look.minibatch(sums, lr)  # over its tokens on all ranks; stops a run whose loss is NaN
            if config.stop_kl and figures["approx_kl3"] > config.stop_kl:
                actor_critic.zero_grad()
                break
            norm, value_norm = optimizer_steps(trained, scaler, autocast, config.clip)
            run.check_finite(lr, math.hypot(norm, value_norm))
            look.updated(norm, value_norm)
        if config.kl_target is not None:
            kl = dist.sum(log_old_over_ref.sum())[0] / (config.prompts * R)  # nats per answer
            run.state.beta = adapt_beta(beta, kl, config.kl_target, config.prompts * R, config.kl_horizon)

        # 5. look: log the step; every so often answer validation problems
        tokens = Tokens(mask, old_logprobs, ref_logprobs, old_values, targets, rewards, advantages)
        look.at_step(batch, judged, final, tokens, beta, lr)
    run.close()
    return look.after()


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
