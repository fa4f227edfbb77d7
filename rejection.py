"""Rejection sampling: let the policy answer, keep what checks, fine-tune on it, repeat (STaR, RFT, ReST-EM).

The simplest alignment there is, and the baseline that the others must beat: sft.py's loss on the policy's own answers,
those that the verifier accepts. No advantage, no ratio, no clip, no second model.

A policy π solves a problem x with probability p(x) = Σ π(y | x) over the right, complete answers y. To be maximized:

    J(π) = Σ_x log p(x)  ≥  Σ_x Σ_y q(y | x) log(π(y | x) / q(y | x))     any q over the right answers (Jensen)

EM first picks the q that makes the two sides equal, then raises the right-hand side over π (ReST-EM, arXiv:2312.06585).
With exact steps J cannot fall; with samples and a few steps that holds only nearly. Round k, from the policy π_k and
its p_k, at --temperature 1:

    E-step   q(y | x) = π_k(y | x) / p_k(x)               sample R answers per problem from π_k; keep the K_x right ones
    M-step   π_{k+1} = argmax_π Σ_x E_q[log π(y | x)]     fine-tune on them: minimize
             L = −1/N Σ_x 1/K_x Σ_{y kept} Σ_t log π(y_t | x, y_<t)           (no term where K_x = 0)

An optimizer step takes B of the kept answers and divides not by N, but by their Σ w |y|, where w = 1/K_x. Their terms
of L keep the direction of their gradient, and a step is as long where few problems are solved as where all are.

At the first step of a round, where π = π_k (with --restart in the first round alone), −∇L is a policy gradient. As
∇p = Σ_right π(y) ∇log π(y), over right samples E[∇log π(y)] = ∇p / p, and one problem's expected step is:

    weight 1/K_x   P(K_x > 0) ∇p / p = ∇p (1 + (1 − p) + … + (1 − p)^(R−1))      MaxRL of order R (arXiv:2602.02710)
    weight 1/R     E[K_x / R] ∇p / p = ∇p                                        REINFORCE, reward 1 if right, else 0

The first, ∇log p for large R, is also what grpo.py --algorithm maxrl --baseline none --format_weight 0 computes (which
pays right answers that were cut off too); the second is --weigh answer, up to the divisor. Here both need
--distinct false and no --max_per_problem: EM counts an answer as often as it was sampled, so all right ones grow by the
same factor 1/p. By default each distinct right answer to a problem weighs the same, so a rare one, once sampled, grows
more.

The defaults run 8 rounds of 512 problems × 8 answers and 25 steps, each from where the last ended. One round, of
N = --prompts problems with R = --rollouts answers each (main has the same four parts):

    groups = judged_answers(sample, k)      N times R answers of π_k: ids, right?, ended?                    1. sample
    kept   = keep_round(groups)             (prompt, answer, w = 1/K_x): the K_x right, complete; no copies  2. keep
    --round_steps times, for the next B = --batch of kept:        reshuffled each epoch; B counts all ranks  3. tune
        n_tokens = Σ w |y|                  before the cut into ranks and micro-batches
        for micro in micro_batches(batch):  tokens, loss_mask: w on an answer's tokens, 0 on a prompt's (b, T) each
            logprobs = token_logprobs(model, tokens)                                                    (b, T − 1)
            loss     = sft_loss(logprobs, loss_mask[:, 1:], n_tokens)    −Σ loss_mask · logprobs / n_tokens   ()
            backward
        clip the gradient's norm, optimizer step
    log; every so often answer validation problems, keep the best checkpoint                                 4. look

Traps:
  * An answer that was cut off is never kept, whatever its number: the policy would learn not to stop.
  * The verifier reads the number alone. Where it is right, an answer with wrong steps or of another story is kept, and
    the next round samples what it taught (`story_kept`: the share of answers that keep to the story; samples.md).
  * At most the first step of a round is on-policy. Nothing corrects for older samples: no importance ratio, no clip.
  * It sharpens. The exact M-step of an unrestricted π moves the mass of the wrong answers to the right ones, in their
    proportions (`demo`); an unsolved problem adds nothing. pass@1 rises towards pass@k, which itself gains less.

The relatives:
    STaR      arXiv:2203.14465; --rollouts 1 --temperature 0 --restart true: greedy, so no EM; without its hints
    RFT       arXiv:2308.01825; --rollouts 64, --round_steps equal to --steps: one round. The paper samples 100 answers,
              keeps one of each list of equations, and adds the demonstrations
    ReST-EM   --rollouts 32 --max_per_problem 10 --weigh answer --restart true

Run it:
    python rejection.py --demo                                     # what is kept, and the identities, by hand
    python rejection.py                                            # from nothing, minutes on two CPU cores
    torchrun --nproc_per_node 2 rejection.py --data gsm8k --init runs/sft --max_new_tokens 200
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from data import rows_at
from optim import lr_at, optimizer_step
from sft import sft_loss
from support.checks import Count
from support.cli import run_script
from support.rejection_report import report
from support.rounds import back_to_start, begin_run, check_rounds, micro_batches, open_start, round_figures
from support.sharding import averaging
from support.verified import VerifiedConfig, judged_answers, look_at_step, measure_end, measure_start
from transformer import token_logprobs

# ---------------------------------------------------------------------------------------------------------------
# What is kept, and what it weighs.


def keep_right(answers, distinct=True, limit=None):
    """The answers to one problem, (ids, right, ended) each -> the ids of those that are kept, at most `limit`."""
    kept = []
    for ids, right, ended in answers:
        if right and ended and not (distinct and ids in kept):
            kept.append(ids)
    return kept[:limit]


def encode_kept(prompt, answer, weight):
    """-> ids, flags, as sft.encode_example with weights: `weight` on each token of the answer, 0.0 on the prompt's."""
    return prompt + answer, [0.0] * len(prompt) + [weight] * len(answer)


def keep_round(groups, distinct=True, limit=None, weigh="problem"):
    """N pairs: prompt ids, R answers (ids, right, ended) -> [(prompt, answer, weight), …]."""
    kept, of_prompt = [], {}  # of_prompt: {its ids: (prompt, all of its answers)}
    for prompt, answers in groups:  # a round may ask a problem twice: where N is above their number, or an epoch ends
        of_prompt.setdefault(tuple(prompt), (prompt, []))[1].extend(answers)
    for prompt, answers in of_prompt.values():
        kept_here = keep_right(answers, distinct, limit)
        kept += [(prompt, ids, 1 / len(kept_here) if weigh == "problem" else 1.0) for ids in kept_here]
    return kept


def demo():
    """What is kept of two problems' answers (id 1 ends one); a step on each possible group; what the M-step leaves."""
    easy = [([5, 5, 1], True, True), ([5, 5, 1], True, True), ([6, 1], True, True), ([7, 7, 7], True, False)]  # cut off
    hard = [([8, 1], False, True), ([9, 1], True, True), ([8, 8, 1], False, True), ([4, 1], False, True)]
    kept = keep_round([([2], easy), ([3], hard)])
    assert kept == [([2], [5, 5, 1], 1 / 2), ([2], [6, 1], 1 / 2), ([3], [9, 1], 1.0)]
    assert encode_kept(*kept[1]) == ([2, 6, 1], [0, 1 / 2, 1 / 2])
    print("prompt 2: three right answers, two of them equal, and one cut off; prompt 3: one right, three wrong. Kept:")
    print("".join(f"  prompt {prompt[0]}, answer {answer}, weight {w:g}\n" for prompt, answer, w in kept))

    pi, right = torch.tensor([1 / 2, 3 / 8, 1 / 8], dtype=torch.float64), torch.tensor([0.0, 1.0, 1.0])
    logits = pi.log().requires_grad_()  # (3,) π = softmax(logits): three answers of one token, the last two right
    p = (pi * right).sum().item()  # 1/2
    grad_p = pi * (right - p)  # (3,) ∂p/∂z_v of the logits z, as ∂π_u/∂z_v = π_u (1[u = v] − π_v)
    assert grad_p.tolist() == [-1 / 4, 3 / 16, 1 / 16]
    print("π = 1/2 (wrong), 3/8, 1/8 (right), p = 1/2, ∇log p = 2 ∇p. The mean of −∇L over all groups of R answers:")
    for R, weight in itertools.product((2, 4), ("1/K", "1/R")):
        mean = torch.zeros(3, dtype=torch.float64)  # of −∇L
        for group in itertools.product(range(3), repeat=R):  # 3^R groups
            answers = [y for y in group if right[y]]  # K of them
            w = 1 / max(1, len(answers)) if weight == "1/K" else 1 / R
            mask = torch.full((len(answers), 1), w)  # (K, 1) tokens
            logprobs = logits.log_softmax(0)[answers, None]  # (K, 1)
            loss, _ = sft_loss(logprobs, mask, n_tokens=1)  # divided by N = 1 problem, as L
            mean -= pi[list(group)].prod() * torch.autograd.grad(loss, logits)[0]
        factor = (1 - (1 - p) ** R) / p if weight == "1/K" else 1.0  # P(K > 0) / p, E[K / R] / p
        torch.testing.assert_close(mean, factor * grad_p)
        print(f"  R = {R}, weight {weight}   {factor:.3f} ∇p = {', '.join(f'{g:+.4f}' for g in mean)}")
    q = pi * right / p
    (gradient,) = torch.autograd.grad((q * logits.log_softmax(0)).sum(), logits)  # of E_q[log π]
    torch.testing.assert_close(gradient, q - pi)  # 0 where π = q: the M-step's best π
    assert q.tolist() == [0, 3 / 4, 1 / 4]
    before, after = (torch.special.entr(probs).sum().item() for probs in (pi, q))
    print(f"the exact M-step: π = 0, 3/4, 1/4, the right ones still 3 to 1; entropy {before:.2f} -> {after:.2f} nats")


# ---------------------------------------------------------------------------------------------------------------
# The stage. More flags: support/verified.py (--prompts, N, --rollouts, R, --temperature), support/runs.py (--steps, …).


@dataclass
class Config(VerifiedConfig):
    """Fine-tune a policy on those of its own answers that are right, in rounds (rejection sampling)."""

    name: str = "rejection"
    round_steps: Count = 25
    """Optimizer steps of a round. The policy is sampled again before each round; --steps is the total over rounds."""
    max_per_problem: Count | None = None
    """Most answers that are kept of a problem; default: all."""
    distinct: bool = True
    """Keep one of the answers to a problem that have equal ids."""
    weigh: Literal["problem", "answer"] = "problem"
    """What weighs the same: every problem (each of its K answers 1/K), or every answer."""
    restart: bool = False
    """Fine-tune the start model in each round, with a schedule (and --warmup) of its own, instead of what the last
    round left: no drift adds up, but each round must relearn everything from the start model."""
    batch: Count = 64
    """Kept answers per optimizer step, over all ranks."""
    micro_batch: Count = 64
    """Answers per forward pass of one rank."""

    def __post_init__(self):
        super().__post_init__()
        check_rounds(self)


def main(config):
    """Train; returns {"before", "after"} (test figures), "kl", "path" and the wall time in seconds."""
    start = open_start(config)  # the device, the checkpoint, its problems, and what samples its answers
    dist, policy, problems = start.dist, start.policy, start.problems
    autocast, scaler = start.autocast, start.scaler
    start_weights = [p.detach().clone() for p in policy.parameters()] if config.restart else []

    def sample_and_keep(k):
        """Round k: {"kept": [(prompt, answer, weight), …]} and `round_figures`. ConfigError if nothing is kept."""
        groups = judged_answers(start.sample, k, config, dist)
        kept = keep_round(groups, config.distinct, config.max_per_problem, config.weigh)
        return {"kept": kept} | round_figures(groups, k)

    # The first round is sampled before the run opens its directory: if that fails, no earlier run is moved aside.
    first = None if config.resume else sample_and_keep(0)
    run = begin_run(start, sampled=first)  # run.state.sampled is saved with last/: a resumed run goes on with its round
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy

    measure_start(run, problems, start.init)  # the test split; and until something beats it, the start is best/
    for step in run.steps():
        k, s = divmod(step, config.round_steps)  # round k, its step s
        record = {}
        if s == 0:
            # 1. sample the round's answers, and 2. keep the right ones
            if k > 0:  # round 0 was sampled above
                run.state.sampled = sample_and_keep(k)
            if config.restart:
                back_to_start(policy, start_weights, run.optimizers)
            record = run.state.sampled | {"kept": len(run.state.sampled["kept"])}  # logged: how many
        kept = run.state.sampled["kept"]  # (prompt, answer, weight) each

        # 3. tune: sft.py's step on the next B of them; 7_919 * k, any large number, so that no two rounds shuffle alike
        batch = [encode_kept(*kept[i]) for i in rows_at(len(kept), s, config.batch, config.seed + 7_919 * k)]
        n_tokens = sum(sum(flags) for _, flags in batch)  # weighted, of all ranks and micro-batches
        micros, loss_sum = micro_batches(batch, start), 0.0  # this rank's
        for micro in micros:  # b answers each, as sft.collate pads them: tokens, loss_mask (b, T)
            loss_mask = micro.loss_mask[:, 1:]  # (b, T − 1): of the tokens that the log-probabilities belong to
            # The ranks average their gradients in the last backward alone; * world makes the average a sum
            with averaging(model, now=micro is micros[-1]):
                with autocast():
                    logprobs = token_logprobs(model, micro.tokens, counted=loss_mask > 0)  # (b, T − 1)
                loss, metrics = sft_loss(logprobs, loss_mask, n_tokens)  # ()
                scaler.scale(loss * dist.world).backward()
            loss_sum += metrics["loss"]
        (loss_sum,) = dist.sum(loss_sum)
        schedule = (s, config.round_steps) if config.restart else (step, config.steps)
        lr = lr_at(*schedule, config.lr, config.warmup)
        norm = optimizer_step(policy, run.optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, loss=loss_sum)

        # 4. look
        record |= {"loss": loss_sum, "lr": lr, "grad_norm": norm}
        look_at_step(run, problems, record, shown=("loss",), round=k + 1, kept=len(kept))
    run.close()

    figures = measure_end(run, problems, start.init)  # the test split again, of best/; how far that is from the start
    if dist.is_main:
        report(config, run.path, figures)
    return figures


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
