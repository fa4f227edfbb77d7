"""GRPO and its family: reinforcement learning without a value network (arXiv:2402.03300), from verifiable rewards.

Ask a question, let the policy answer it R times, check each answer. An answer that is better than its siblings becomes
more likely, token by token; one that is worse becomes less likely.

The policy gradient. For a question q, an answer y = y_1 … y_|y| of the policy π, and its reward r(y):

    J  = E[r(y)]                                            y ~ π(· | q)
    ∇J = E[r(y) ∇log π(y)]                                  because ∇π = π ∇log π
       = E[Σ_t (r(y) − c) ∇log π(y_t | q, y_<t)]            for any baseline c that does not see y: E[∇log π(y)] = 0

That is REINFORCE (Williams, 1992). Every later method keeps this sum and makes four choices differently. GRPO's:

    baseline, scale   What is r compared with, in which unit? With the mean of its group, the R answers to one question:
                      no value network is needed. The advantage of answer i is A_i = (r_i − mean(r)) / (std(r) + 1e-4),
                      the std with R − 1 (both as in TRL).
    ratio             How can one batch of answers serve several optimizer steps? Each token is weighed by its ratio
                      ρ_t = π(y_t) / π_old(y_t), where π_old is the policy that sampled it. Exact would be the product
                      of an answer's ratios (--ratio product): ρ_t leaves out those of the answer's other tokens.
    surrogate         What is climbed in J's place, and how far? min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i): PPO's clip.
    loss_type         What does a token weigh? v_it = 1 / (B |y_i|): a mean over an answer's tokens, then over the B
                      answers of an optimizer step.

Minus β times a penalty for moving away from the reference π_ref, the policy before training, an optimizer step climbs

    U = Σ_it v_it [min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i) − β ρ_t k3_t]     (Eq. 3, which has k3 without ρ)
        k3 = x − 1 − log x,  x = π_ref(y_t) / π(y_t)                           (Eq. 4)

k3 estimates KL(π ‖ π_ref) from the one token that was sampled. The gradient of ρ k3 is, on average over y_t ~ π_old,
that of this KL too (arXiv:2512.02556, §3.1). The gradient of k3 alone is that of KL(π_ref ‖ π), while ρ is near 1.

As ∇ρ_t = ρ_t ∇log π(y_t), a token that is not clipped gets v_it ρ_t A_i ∇log π(y_t). Where ρ = 1 that is REINFORCE, but
for three things. The mean has r_i in it, which scales the expected gradient by (R − 1) / R, no more. The division by
the std is a heuristic: a group that differs only in format pushes as hard as one with right and wrong answers. And
REINFORCE weighs every token by 1 / B (in the table: 1 / (BL), L a constant), v_it by 1 / (B |y_i|), which climbs
E[(r − c) / |y|] instead of J: a token of a long wrong answer is punished less, one of a long right one rewarded less.

One step, for N questions, in `main`'s five parts (plainly: grpo_plain.py). The N·R answers, of up to T tokens each, are
a *batch*; the B answers of some of its groups a *minibatch*, for one optimizer step, an *update*; b answers of that a
*piece*, for one forward and backward pass. The mask is 1 on what was sampled, the token that ends an answer too.

    batch   = sample(step)                           ids, mask, log π_old                (N·R, T) each    1. ask
    rewards = paid_rewards(batch)                    right? well formed? or M others     (N, R, M)        2. judge
    A       = group_advantages(rewards · weights)    the M added up; group mean 0        (N, R)           3. compare
    minibatches = minibatches_of(batch, A)           groups with A = 0 left out                           4. update
    ref     = reference_logprobs(minibatches)        log π_ref, no gradient              (N·R, T)
    for minibatch in minibatches:
        for piece in minibatch:
            logprobs = shared_answer_logprobs(model, piece)    log π                     (b, T)
            loss     = −U of these answers                     ρ = 1 in the first minibatch
            backward: the pieces' gradients add up
        clip the gradient's norm, optimizer step
    log; every so often answer validation questions                                                       5. look

The family. --algorithm NAME takes a row of this table (in code, with the papers: support/family.py), and each choice is
a flag of its own; the functions below say what it does.

    algorithm             baseline       scale   ratio     surrogate       loss_type  KL          a token gets
    reinforce             none           none    -         reinforce       dr_grpo    -           A / (BL)
    rloo                  leave_one_out  none    product   clip 0.2 0.2    grpo       0.05 reward Πρ A / B, or 0
    grpo                  mean           group   token     clip 0.2 0.2    grpo       0.3         ρ_t A / (B|y|), or 0
    dr_grpo               mean           none    token     clip 0.2 0.2    dr_grpo    -           ρ_t A / (BL), or 0
    dapo                  mean           group   token     clip 0.2 0.28   dapo       -           ρ_t A / tokens, or 0
    gspo                  mean           group   sequence  clip 3e-4 4e-4  grpo       -           s A / (B|y|), or 0
    cispo                 mean           group   token     cispo 1 4       dapo       -           min(ρ_t, 5) A / tokens
    sapo                  mean           group   token     sapo            grpo       -           ρ_t f'(ρ_t) A / (B|y|)
    maxrl                 mean           mean    token     clip 0.2 0.2    dr_grpo    -           ρ_t A / (BL), or 0
    reinforce++-baseline  mean           tokens  token     clip 0.2 0.2    dapo       0.3 k2      ρ_t A / tokens, or 0

After a clip stand ε below and above. Under KL stands β, the weight of ρ k3 in the loss, or with "k2" of (log x)² / 2.
"reward": the loss has no KL; β times an answer's Σ_t −log x, less its baseline in the group, comes off the advantage.
The last column is the factor of ∇log π(y_t), the KL's aside; "or 0" is where the clip acts. L is --max_new_tokens,
*tokens* the number of the minibatch's, Πρ the product of an answer's ratios (its |y| tokens have it in common: the mean
over them is Πρ A), s its |y|-th root, f' the slope of a soft clip.

The defaults run all five parts: 12 questions × 8 answers, two minibatches, ε = 0.2, β = 0.3; to be right earns 1, to be
well formed 0.1. A group without a signal, whose A are all 0, is left out and pays no KL (--skip_zero_variance), but
v_it counts its answers and tokens too. So the more groups are all right, the weaker the KL; the logged `kl` is of the
rest. Off: a penalty for length (--overlong); fresh questions for groups without a signal (--refill); no gradient for
answers that were cut off (--mask_truncated); a moving reference (--refresh_reference); a sampler that is a rounded or
older copy of the policy (support/off_policy.py); LoRA.

What to watch. Not the loss: the advantages of a group sum to 0, so in the first minibatch GRPO's policy term is 0, and
its gradient is not. Watch each reward, the validation accuracy, the KL, the clip fraction, the length, the share of
groups without a signal, and `story_kept` (evaluate.py), whether an answer still speaks of the question's names and
things: what is not rewarded may degrade; in each row without a KL it did on some seed (results/policy-gradients.md).
The validation accuracy chooses best/; the table at the end is of last/. If pass@1 rises towards the start's pass@k and
pass@k stays, the policy only says at once what it could say in k tries. New ability would be problems that the start
never solves (arXiv:2504.13837): 16 samples cannot show that.

Traps. The sampler uses temperature alone (no top-k, no top-p), as the loss scores the distribution that was sampled, or
ρ would not be 1 on fresh answers. With one update per batch (--minibatches 1) and a sampler that is the policy ρ = 1,
no clip acts, and all surrogates have the same gradient. In bf16 ρ is only near 1, as sampler and loss round
differently: GSPO's clips are so narrow that they act on that, and want --dtype fp32. Answers and tokens are counted
over the whole minibatch and all ranks before it is cut into pieces, or the gradient would depend on the cut.

Run it (without --init a short pretraining and SFT on the built-in problems make a start, kept in runs/start):
    python grpo.py --demo                                            four answers of two tokens, by hand; the family
    python grpo.py                                                   from nothing, minutes on two CPU cores
    python grpo.py --data gsm8k --init runs/sft --max_new_tokens 200
    torchrun --nproc_per_node 8 grpo.py --init runs/sft --prompts 128
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from evaluate import is_correct, kl_estimate
from lora import add_lora
from optim import lr_at, optimizer_step
from support.answers import extract_answer  # noqa: F401  what the usual verifier reads, offered here
from support.checks import Amount, Count, choice
from support.cli import run_script
from support.errors import ConfigError
from support.family import ALGORITHMS, FamilyFlags, as_flags, divide_by_mean, loss_options, whiten_over_tokens
from support.grpo_report import rollout_sums, step_record, tally
from support.off_policy import RolloutPolicy, off_policy
from support.policy_run import PolicyRunConfig, begin_run, open_start, refresh_copies, signals
from support.rewards import brevity_reward, format_reward, judge_batch, paid_rewards, reward_sums
from support.rollouts import Sampler, answers_kl, groups_in_turn, minibatches_of, reference_logprobs, refill
from support.sharding import accumulating, averaging
from support.shared_prompt import shared_answer_logprobs
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# Rewards: functions of (texts, problems, ended), three lists of one length, that return a number for each text. ended:
# it stopped by itself, instead of being cut off. Format and brevity: support/rewards.py. Your own: --reward own:f.


def accuracy_reward(texts, problems, ended):
    """1 if the verifier of the problem's task finds the right answer; the usual one reads the number after ####. An
    answer that was cut off counts too, as in every evaluation."""
    return [float(is_correct(text, problem)) for text, problem in zip(texts, problems, strict=True)]


REWARDS = {"correct": accuracy_reward, "format": format_reward, "brevity": brevity_reward}


# ---------------------------------------------------------------------------------------------------------------
# The objective, as pure functions.


def less_baseline(rewards, baseline="mean"):
    """rewards (N, R) -> (N, R), less a baseline of each question's own answers. mean: their mean (GRPO); leave_one_out:
    the others' mean (RLOO, arXiv:2402.14740), R / (R − 1) times as far off; none. With a baseline, answers that all
    earn the same, or one alone, get exactly 0. ConfigError on an unknown name."""
    if baseline == "none":
        return rewards
    if baseline not in ("mean", "leave_one_out"):
        raise ConfigError(f"--baseline {baseline!r} is not known; use mean, leave_one_out or none")
    R = rewards.shape[1]
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out" and R > 1:
        centred = centred * R / (R - 1)
    same = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (N, 1), exactly, not up to the mean's rounding
    return centred.masked_fill(same, 0.0)


def group_advantages(rewards, scale="group", baseline="mean", lengths=None):
    """rewards (N, R) -> advantages (N, R): the rewards less their baseline (`less_baseline`), divided by a scale:

        group   the group's std (ddof 1, + 1e-4): every group pushes as hard, however easy or hard it is
        batch   the std of all rewards of the batch (the same)
        none    1: the difference itself
        mean    the group's mean reward: the rarer a right answer, the more it counts (MaxRL, support/family.py)
        tokens  the std over the batch's tokens, each with its answer's value, after their mean is taken off too
                (REINFORCE++): a group of equal rewards has an A ≠ 0, unless all are equal. lengths (N, R): their tokens

    With a baseline and any scale but tokens, a group whose rewards are all equal gives exactly 0, and so does a group
    of one: never NaN. ConfigError on an unknown name, and on a reward below 0 with "mean".
    """
    centred = less_baseline(rewards, baseline)  # (N, R)
    if scale == "none":
        return centred
    if scale in ("group", "batch"):
        if rewards.shape[1] == 1:
            return centred  # 0 if there is a baseline; the std of one reward is NaN
        std = rewards.std(dim=1, keepdim=True) if scale == "group" else rewards.std()  # (N, 1) or ()
        return centred / (std + 1e-4)
    if scale == "mean":
        return divide_by_mean(centred, rewards)
    if scale == "tokens":
        return whiten_over_tokens(centred, rewards, lengths)
    raise ConfigError(f"--scale {scale!r} is not known; use group, batch, none, mean or tokens")


# Below, b answers of up to T tokens: a piece of the B answers of a minibatch.
# A ratio: log ρ_t (b, T), which is 0 on padding, and |y| (b, 1) -> ρ (b, T)
#     token       each token's own
#     product     Πρ for all of an answer's tokens: exact, and soon far from 1. Clamped, as exp would overflow, and the
#                 backward of the clip's minimum would multiply inf by 0
#     sequence    (Πρ)^(1/|y|): the clip keeps or drops whole answers, and one odd token does not decide
RATIOS = {
    "token": lambda log_ratio, length: log_ratio.exp(),
    "product": lambda log_ratio, length: log_ratio.sum(1, keepdim=True).clamp(max=80).exp().expand_as(log_ratio),
    "sequence": lambda log_ratio, length: (log_ratio.sum(1, keepdim=True) / length).exp().expand_as(log_ratio),
}

# v_it (b, T), which the KL has too, from mask (b, T), |y| (b, 1), the numbers of answers B and of tokens in the
# minibatch, and L, the longest possible answer. In "dapo" and "dr_grpo" all tokens of a minibatch count the same.
LOSS_TYPES = {
    "grpo": lambda mask, length, B, tokens, L: mask / length / B,
    "dapo": lambda mask, length, B, tokens, L: mask / tokens,
    "dr_grpo": lambda mask, length, B, tokens, L: mask / (B * L),
}


# A surrogate: ρ (b, T), A (b, 1) or (b, T), log π (b, T) and clips -> the objective of each token (b, T), to be
# maximised, and where a limit was at work, (b, T) bool: the clip fraction.
def clip_surrogate(rho, A, logprobs, clip_low, clip_high):
    """PPO (1707.06347, Eq. 7): min(ρ A, clip(ρ) A), the lower of the two, for either sign of A. No gradient where
    ρ > 1 + clip_high and A > 0, or ρ < 1 − clip_low and A < 0. A higher clip_high lets unlikely tokens grow further."""
    plain, clipped = rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A
    return torch.minimum(plain, clipped), clipped < plain


def cispo_surrogate(rho, A, logprobs, clip_low, clip_high):
    """CISPO: REINFORCE with the weight sg[clip(ρ)] (sg: no gradient). A token that is clipped still has a gradient."""
    weight = rho.clamp(1 - clip_low, 1 + clip_high).detach()
    return weight * A * logprobs, weight != rho


def sapo_surrogate(rho, A, logprobs, clip_low=None, clip_high=None, tau=1.0, tau_negative=1.05):
    """SAPO: f(ρ) A with f = (4 / τ) σ(τ (ρ − 1)), a soft clip. The gradient is ρ f' A ∇log π with the slope
    f' = 1 / cosh²(τ (ρ − 1) / 2). ρ f' is 1 at ρ = 1, at most 1.57, near ρ = 2, below 1 again from ρ = 3.5 (τ = 1)."""
    tau_of_A = torch.full_like(A, tau_negative).masked_fill(A > 0, tau)  # as A
    return 4 / tau_of_A * torch.sigmoid(tau_of_A * (rho - 1)) * A, torch.zeros_like(rho, dtype=torch.bool)


def reinforce_surrogate(rho, A, logprobs, clip_low=None, clip_high=None):
    """REINFORCE: A log π. No ratio, no limit: as if every update were the first."""
    return A * logprobs, torch.zeros_like(rho, dtype=torch.bool)


SURROGATES = {"clip": clip_surrogate, "cispo": cispo_surrogate, "sapo": sapo_surrogate}
SURROGATES |= {"reinforce": reinforce_surrogate}


def grpo_loss(
    logprobs, old_logprobs, advantages, mask, ref_logprobs=None,
    beta=0.0, clip_low=0.2, clip_high=0.2, loss_type="grpo", *, ratio="token", surrogate="clip", kl="k3",
    kl_unbiased=False, sampler_weights=None, n_answers=None, n_tokens=None, max_length=None,
):  # fmt: skip
    """Log-probabilities and mask (b, T), advantages (b,), or (b, T) for each token its own -> (loss (), metrics).

    n_answers, n_tokens: B and *tokens*, of the whole minibatch, over pieces and ranks; default: of these b answers.
    max_length: dr_grpo's constant L, default T. sampler_weights (b, T) multiply the surrogate, not the KL: see
    support/off_policy.py. The other defaults are the paper's form without a KL; a run's are those of its --algorithm.
    Metrics: the loss; ratio_max, the largest ρ; the others are means over these answers' tokens. "kl" is always k3
    without ρ: the tokens are π_old's, so it is an estimate only while ρ is near 1.
    Computed in fp32, or in float64 if the log-probabilities are. ConfigError on an unknown name.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)  # a sum of ones in bf16 stops at 256
    logprobs, mask = logprobs.to(dtype), mask.to(dtype)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (b, 1)
    B, tokens, L = n_answers or len(mask), n_tokens or mask.sum().clamp(min=1), max_length or mask.shape[1]
    v = choice("loss_type", loss_type, LOSS_TYPES)(mask, length, B, tokens, L)  # (b, T)

    # Padding may hold any value; exp could overflow, and inf · 0 = NaN, so zero it first.
    logprobs = torch.where(mask > 0, logprobs, 0.0)
    log_ratio = logprobs - torch.where(mask > 0, old_logprobs.detach(), 0.0)  # (b, T)
    rho = choice("ratio", ratio, RATIOS)(log_ratio, length)  # (b, T)
    A = advantages.reshape(len(mask), -1)  # (b, 1) or (b, T)
    objective, limited = choice("surrogate", surrogate, SURROGATES)(rho, A, logprobs, clip_low, clip_high)  # (b, T)
    cost = -objective if sampler_weights is None else -objective * sampler_weights
    if ref_logprobs is not None:
        ref_logprobs = torch.where(mask > 0, ref_logprobs, 0.0)
        if beta:
            # ∇(ρ k3) = ρ log(π / π_ref) ∇log π: over y_t ~ π_old that of this token's KL(π ‖ π_ref) after its prefix
            # (evaluate.kl_estimate). What y_t does to the KL of later tokens is not in it; --kl_in reward counts it.
            distance = kl_estimate(logprobs, ref_logprobs, kl)  # (b, T)
            token_rho = log_ratio.exp()  # (b, T) each token's own, whatever the --ratio
            cost = cost + beta * (token_rho * distance if kl_unbiased else distance)
    loss = (cost * v).sum()

    metrics = {
        "clip_fraction": masked_mean(limited.float(), mask),
        "ratio_spread": masked_mean((rho - 1).abs(), mask),  # 0 on fresh rollouts
        "ratio_max": rho.masked_fill(mask == 0, 0.0).max(),
    }
    if ref_logprobs is not None:
        metrics["kl"] = masked_mean(kl_estimate(logprobs.detach(), ref_logprobs, "k3"), mask)
    metrics["loss"] = loss
    values = torch.stack([m.detach() for m in metrics.values()]).tolist()  # one wait for the device, not one for each
    return loss, dict(zip(metrics, values, strict=True))


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

    rho = torch.tensor([[1.30, 1.05], [1.10, 0.70], [0.75, 1.10], [1.15, 0.95]])  # after an optimizer step
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
    print("autograd gives the same; clip fraction 3 / 8")

    ref = old - 0.1  # π_ref finds each of these tokens less likely: x = π_ref / π = e^−0.1 = 0.905
    for name, slope, form in (("ρ k3", 0.1, "log(π / π_ref)"), ("k3", 1 - math.exp(-0.1), "(1 − x)")):
        logprobs = old.clone().requires_grad_()
        loss, metrics = grpo_loss(logprobs, old, torch.zeros(4), mask, ref, beta=0.3, kl_unbiased=name == "ρ k3")
        loss.backward()
        assert torch.allclose(logprobs.grad, 0.3 * slope * mask / 8)
        print(f"KL penalty {name:4s}      value {metrics['kl']:.4f}, gradient β {form} / 8 = {0.3 * slope / 8:.5f}")

    # The family, second minibatch. The second answer has one token here. (tests/test_family.py: each row by a loop.)
    mask[1, 1], lengths = 0.0, torch.tensor([[2.0, 1.0, 2.0, 2.0]])  # (N, R)
    print("the family (L = 2)      A of each answer             what each token gets, answer by answer, times 100")
    for name, row in ALGORITHMS.items():
        A = group_advantages(rewards, row["scale"], row["baseline"], lengths)[0]  # (R,)
        logprobs = (old + rho.log()).requires_grad_()
        options = {key: row[key] for key in ("clip_low", "clip_high", "loss_type", "ratio", "surrogate")}
        grpo_loss(logprobs, old, A, mask, **options)[0].backward()
        gets = 0.0 - 100 * logprobs.grad  # (R, T); 0.0 − 0.0 is 0.0, but −0.0 would print a sign
        shown = [f"{g:6.1f}" if m else " " * 6 for g, m in zip(gets.flatten(), mask.flatten(), strict=True)]
        print(f"{name:<22}", *(f"{a:6.2f}" for a in A), "  ", *shown)


# ---------------------------------------------------------------------------------------------------------------
# The stage. More flags: support/verified.py (--rollouts, R, and --max_new_tokens, L), support/family.py (the columns of
# the table, with β, ε), support/rewards.py (what is paid), support/off_policy.py (what samples), support/policy_run.py.


@dataclass
class Config(FamilyFlags, PolicyRunConfig):
    """Train a policy with verifiable rewards (GRPO)."""

    name: str = "grpo"
    steps: Count = 500
    """Batches of answers."""
    prompts: Count = 12
    """Questions N per step, over all ranks."""
    inner_epochs: Count = 1
    """Passes over each batch of rollouts."""
    minibatches: Count = 2
    """Optimizer steps in a pass; from the second on ρ differs from 1."""
    lr: Amount = 1.5e-4
    """Peak learning rate, for Muon, the default; AdamW wants a lower one. It falls linearly to 0 after the warm-up."""


def advantages_of(rewards, reward_weights, config, lengths=None):
    """rewards (N, R, M) -> advantages (N, R), {metric: number}: add the M up by their weights, then compare. gdpo.py
    gives `main` another such function. lengths (N, R): the tokens of each answer that count; None where `signals` only
    asks which groups have a signal: then there is no scale, as --scale tokens gives equal rewards an A ≠ 0 too."""
    scale = "none" if lengths is None else config.scale
    return group_advantages(reward_sums(rewards, reward_weights), scale, config.baseline, lengths), {}


def main(config, advantages_of=advantages_of, paid_rewards=paid_rewards):
    """Train; returns {"before", "after"} (test figures), "kl", "path" and the wall time in seconds."""
    start = open_start(config, REWARDS, says=as_flags(config))
    dist, autocast, scaler, pad = start.dist, start.autocast, start.scaler, start.tokenizer.endoftext_id
    policy, reference = start.policy, start.reference  # with LoRA π_ref is the policy itself, its adapters off
    n, slots = start.n, start.slots  # this rank asks n of a step's N questions; their numbers among the N
    functions, reward_weights = start.functions, start.reward_weights  # {name: function}; of the M paid, {name: weight}
    rollout_policy = RolloutPolicy(policy, config.sampler_dtype, config.stale)  # by default the policy itself
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    policy.eval()  # throughout: with dropout the ratio on fresh rollouts would not be 1

    sample = Sampler(rollout_policy.model, start.tokenizer, start.problems["train"], config, autocast)
    # signal_of(batch): (n,) bool, the groups with an A ≠ 0 before the scale. run: steps, optimizers, checkpoints. look:
    # logs and validates. recorder: for view.py. The last two train nothing
    signal_of = signals(config, reward_weights, advantages_of, paid_rewards)
    run, look, recorder = begin_run(start, sample, signal_of, rollout_policy)
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 and not config.fsdp else policy

    groups = groups_in_turn(slots, config.minibatches)  # of each minibatch: which of this rank's n groups are in it
    loss_of = recorder.noted(partial(grpo_loss, **loss_options(config)))  # the recorder keeps what it is given
    for step in run.steps():
        refresh_copies(start, rollout_policy, step)  # the reference and the sampler; by default nothing

        # 1. ask: the policy answers each question R times
        look.begin_step()
        batch = sample(step, slots)

        # 2. judge
        judge_batch(functions, batch, config)  # into batch.rewards, {name: (n, R)}
        paid = paid_rewards(batch, reward_weights, config)  # (n, R, M) those of the rewards that have a weight
        rollout_totals = rollout_sums(batch, paid, reward_weights, signal_of(batch))  # logged: before any refill
        if config.refill:
            refill(batch, sample, step, slots, functions, signal_of, policy, config)
            paid = paid_rewards(batch, reward_weights, config)  # (n, R, M)
        look.sampled()
        # What ρ divides by and a weight of each token, (n·R, T) each: by default log π as sampled, and 1. mismatch
        # {metric: number}: how far sampler and policy differ, by default {}
        old_logprobs, sampler_weights, mismatch = off_policy(batch, policy, config, autocast, pad, dist)

        # 3. compare within the group; all ranks' groups at once, as --scale batch and tokens and gdpo.py look beyond it
        counted = batch.counted(config.mask_truncated)  # (n·R, T) the tokens that count in the loss: by default all
        lengths = dist.gather(counted.sum(1).view(n, -1).cpu())  # (N, R)
        advantages, more_figures = advantages_of(dist.gather(paid), reward_weights, config, lengths)  # (N, R)
        advantages = advantages[slots]  # (n, R)
        ref_logprobs = None
        if config.beta and config.kl_in == "reward":
            # After the scale: before it, a small std would inflate the KL. gdpo.py has no --baseline: then the mean
            KL, ref_logprobs = answers_kl(reference, policy, batch, config, autocast, pad)  # (n, R), (n·R, T)
            advantages = advantages - config.beta * less_baseline(KL, config.baseline or "mean")  # (n, R)
        recorder.answers(batch, advantages)

        # 4. update: an optimizer step for each minibatch, from the second on ρ ≠ 1. Groups whose A are all 0 are left
        # out; a minibatch with no group left makes no step
        minibatches = minibatches_of(batch, groups, counted, config, pad, dist, advantages)
        if ref_logprobs is None and (config.beta or step == 0 or run.due(config.eval_every)):  # to pay or to log it
            pieces = [piece for minibatch in minibatches for piece in minibatch.pieces]
            ref_logprobs = reference_logprobs(reference, policy, pieces, batch, config, autocast)  # (n·R, T)
        A = advantages.flatten().to(dist.device)  # (n·R,)
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        update_sums, norm = {}, 0.0
        for minibatch in minibatches * config.inner_epochs:  # the list, so many times
            with accumulating(policy, autocast):  # FSDP: all weights on every rank, then average gradients
                for piece in minibatch.pieces:
                    rows, T = piece.rows, piece.mask.shape[1]  # its b rows of the batch, and its longest answer
                    # DDP averages the gradients over the ranks in the last backward alone
                    with averaging(model, piece is minibatch.pieces[-1] and not config.fsdp):
                        with autocast():  # (b, T), without the padding to a multiple of 8
                            logprobs = shared_answer_logprobs(model, piece.packed, config.temperature)[:, :T]
                        old = old_logprobs[rows, :T]  # (b, T)
                        ref = None if ref_logprobs is None else ref_logprobs[rows, :T]  # (b, T)
                        options = minibatch.counts | {"sampler_weights": sampler_weights[rows, :T]}  # B, *tokens*
                        loss, metrics = loss_of(logprobs, old, A[rows], piece.mask, ref, **options)  # A[rows] (b,)
                        recorder.tokens(rows)
                        # × world, because DDP averages over the ranks and v_it already counts them all
                        scaler.scale(loss * dist.world).backward()
                    tally(update_sums, metrics, piece.mask.sum().item())
            norm = optimizer_step(policy, run.optimizers, scaler, autocast, lr, config.clip)  # clips ‖g‖, not ρ
            run.check_finite(lr, norm)

        # 5. look: log the step; every so often answer validation questions
        record = step_record(rollout_totals, update_sums, len(minibatches) * config.inner_epochs, config, dist)
        look.at_step(record | more_figures | mismatch, batch, reward_sums(paid, reward_weights), norm, lr)
    run.close()
    return look.after()


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
