"""GRPO on one page: what `python grpo.py --dtype fp32` computes, and nothing around it.

Ask N questions, let the policy π answer each R times, check the answers, compare each with its siblings, and make the
better ones more likely. r_i is the reward of answer i, y_it its token t, of |y_i|, π_old the policy that sampled it,
π_ref the policy before training, B the number of answers in an update:

    A_i  = (r_i − mean(r)) / (std(r) + 1e-4)            over the R answers of a group, the std with R − 1
    ρ_it = π(y_it) / π_old(y_it)                        1 in a batch's first update, near 1 in the second
    k3   = x − 1 − log x,  x = π_ref(y_it) / π(y_it)    how far from the start
    loss = −1/B Σ_i 1/|y_i| Σ_t [min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) − β ρ_it k3_it]

The clip: a token whose ρ has moved by more than ε in the direction of A_i gains nothing more. This is Eq. 3 and 4 of
arXiv:2402.03300 with two changes: ρ before k3 (grpo.py says why); and a group whose A are all 0 adds nothing, not even
its KL, though B counts it.

One process, fp32, no resuming, no log but what it prints; the policy ends in runs/grpo_plain/last. grpo.py can use
several processes and bf16 (its default where the hardware has it), resumes, keeps logs, reads a prompt once for its R
answers, and has the derivation and the rest of the family. In fp32 it computes the same from the same start:
tests/test_grpo_plain.py trains both and compares the weights. (A start that has to be made first, by pretraining and
SFT, is made in the hardware's default dtype, as by grpo.py without --dtype.) Try an idea in this file first.

Run it (without --init it makes its start, as grpo.py does, or takes the one that is there):
    python grpo_plain.py --demo                 a group of four answers, by hand
    python grpo_plain.py
    python grpo_plain.py --init runs/sft --steps 100
"""

import copy
from dataclasses import dataclass

import torch
from tqdm import trange

from data import encode_prompt, load_problems, rows_at
from evaluate import evaluate, is_correct
from generate import generate
from optim import lr_at, make_optimizers
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Seed, check
from support.cli import run_script
from support.devices import setup
from support.errors import ConfigError
from support.rewards import format_reward
from support.runs import RUNS, save
from support.sft_start import sft_start
from support.verified import PolicyConfig
from transformer import answer_logprobs

# Each is a flag of grpo.py, with the same default:
N, R, L = 12, 8, 64  # --prompts, questions a step; --rollouts, answers to each; --max_new_tokens of an answer
UPDATES = 2  # --minibatches, optimizer steps for each batch of answers; question g belongs to update g % UPDATES
EPSILON, BETA = 0.2, 0.3  # --clip_low and --clip_high of ρ; --beta of the KL
MAX_NORM = 1.0  # --clip: a longer gradient is scaled down to this norm


def group_advantages(rewards):
    """(N, R) -> (N, R). A group whose rewards are all equal gets exactly 0, not the rounding of its mean."""
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (N, 1)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).masked_fill(same, 0.0)


def grpo_loss(logprobs, old, A, mask, ref, B):
    """log π, log π_old, mask and log π_ref (b, T), the logs 0 on padding; A (b,) -> the loss, a scalar. b: how many
    answers are scored; B: how many the update has, left-out groups included."""
    rho, A = (logprobs - old).exp(), A[:, None]  # (b, T), (b, 1)
    gain = torch.minimum(rho * A, rho.clamp(1 - EPSILON, 1 + EPSILON) * A)
    k3 = (ref - logprobs).exp() - 1 - (ref - logprobs)  # (b, T); over y_t ~ π_old, ∇(ρ k3) has the mean ∇KL(π ‖ π_ref)
    per_answer = ((gain - BETA * rho * k3) * mask).sum(1) / mask.sum(1)  # (b,) a mean over its tokens
    return -per_answer.sum() / B


def demo():
    """Four answers of two tokens, right, wrong, wrong, right: −100 ∂loss/∂log π of each token."""
    A = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0]  # (R,)
    old = torch.tensor([[0.5, 0.8], [0.5, 0.9], [0.2, 0.9], [0.5, 0.8]]).log()
    rho = torch.tensor([[1.30, 1.05], [1.10, 0.70], [0.75, 1.10], [1.15, 0.95]])
    logprobs = (old + rho.log()).requires_grad_()
    grpo_loss(logprobs, old, A, torch.ones(4, 2), logprobs.detach(), B=4).backward()  # π_ref = π: no KL
    gets = 0.0 - 100 * logprobs.grad  # (R, T); 0.0 − 0.0 is 0.0, but −0.0 would print a sign
    print("answer   A      ρ of its tokens   −100 ∂loss/∂log π = 100 ρ A / (4 answers · 2 tokens), or 0 where clipped")
    for i, word in enumerate(("right", "wrong", "wrong", "right")):
        print(f"{word}   {A[i]:+.2f}   {rho[i, 0]:.2f}   {rho[i, 1]:.2f}      {gets[i, 0]:+7.2f} {gets[i, 1]:+7.2f}")
    expected = 100 * rho * A[:, None] / 8
    expected[0, 0] = expected[1, 1] = expected[2, 0] = 0  # ρ > 1 + ε and A > 0; ρ < 1 − ε and A < 0, twice
    assert torch.allclose(gets, expected, atol=1e-3)


@dataclass
class Config:
    """Train a policy with GRPO, plainly."""

    init: str | None = None
    """SFT checkpoint to start from; default: one trained once into runs/start."""
    steps: Count = 500
    """Batches of answers."""
    lr: Amount = 1.5e-4
    """Peak learning rate; it falls linearly to 0 after ten steps of warm-up."""
    seed: Seed = 0

    def __post_init__(self):
        check(self)


def main(config):
    """Train; returns {"before", "after"}, the accuracy on the test split, and "path"."""
    dist = setup()  # the device, and how many processes there are
    if dist.world > 1:
        raise ConfigError("grpo_plain.py runs in one process: leave torchrun out, or use grpo.py")
    init = config.init or sft_start(PolicyConfig(name="grpo_plain", seed=config.seed), dist)  # the flags that it reads
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    policy.eval()  # without dropout, which would make ρ differ from 1 on fresh answers
    reference = copy.deepcopy(policy).requires_grad_(False)
    train = load_problems(split="train")
    valid = load_problems(split="valid", n=200)
    test = load_problems(split="test", n=1000)
    # Muon for the blocks' matrices, AdamW for the rest, both at the same rate (optim.py)
    optimizers = make_optimizers(policy, "muon", config.lr, weight_decay=0.0, betas=(0.9, 0.999))
    before = evaluate(policy, tokenizer, test, L, dist)["accuracy"]

    for step in (bar := trange(config.steps)):
        # 1. ask: every question R times, from the distribution that the loss scores
        problems = [train[i] for i in rows_at(len(train), step, N, config.seed)]  # N, none twice in an epoch
        prompts = [encode_prompt(tokenizer, problem) for problem in problems]  # N lists of ids
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)  # each step its own
        rollout = generate(policy, prompts, L, n=R, stop_ids=tokenizer.stop_ids, generator=generator)
        # N·R lists of ids, with the token that ends an answer, so |y| counts it; N·R bools
        answers, ended = rollout.rows, rollout.ended(tokenizer.stop_ids).tolist()

        # 2. judge: 1 if the number after #### is right, plus 0.1 if the answer ended by itself and its last line, and
        # no other, is `#### number`
        texts, asked = rollout.texts(tokenizer), [problem for problem in problems for _ in range(R)]  # N·R each
        right = torch.tensor([float(is_correct(text, problem)) for text, problem in zip(texts, asked, strict=True)])
        rewards = right + 0.1 * torch.tensor(format_reward(texts, asked, ended))  # (N·R,)

        # 3. compare
        A = group_advantages(rewards.view(N, R))  # (N, R)

        # 4. update: questions 0, 2, 4 …, then 1, 3, 5 …; a group whose A are all 0 is left out, its KL too
        lr = lr_at(step, config.steps, config.lr, warmup=10, floor=0.0, schedule="linear")
        for u in range(UPDATES):
            groups = [g for g in range(u, N, UPDATES) if A[g].any()]
            rows = [g * R + r for g in groups for r in range(R)]  # b of the N·R
            if not rows:  # no step: the optimizers' momentum would move the weights without a signal
                continue
            B = len(range(u, N, UPDATES)) * R  # the groups that are left out count too
            scored = [prompts[row // R] for row in rows], [answers[row] for row in rows]  # two lists of b lists of ids
            logprobs, mask = answer_logprobs(policy, *scored)  # (b, T) each, T the longest of these answers
            with torch.no_grad():
                ref, _ = answer_logprobs(reference, *scored)
            old = rollout.logprobs[rows, : mask.shape[1]]  # (b, T) as sampled, without the whole batch's padding
            loss = grpo_loss(logprobs, old, A.flatten()[rows].to(mask.device), mask, ref, B)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
            for optimizer in optimizers:
                for parameters in optimizer.param_groups:
                    parameters["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()

        # 5. look. The loss says nothing: where ρ = 1 its policy term is 0, as the A of a group sum to 0
        bar.set_postfix(right=f"{right.mean():.2f}", length=f"{sum(map(len, answers)) / len(answers):.0f}")
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            accuracy = evaluate(policy, tokenizer, valid, L, dist)["accuracy"]
            bar.write(f"step {step + 1}  right {right.mean():.1%} of the answers  validation accuracy {accuracy:.1%}")

    after = evaluate(policy, tokenizer, test, L, dist)["accuracy"]
    print(f"test accuracy, greedy, {len(test):,} problems: {before:.1%} before, {after:.1%} after")
    path = RUNS / "grpo_plain" / "last"  # an earlier one is overwritten
    if not save(path.parent, path.name, dist, policy, tokenizer, chat=True):
        raise ConfigError(f"{path} could not be written: make room and train again")
    print(f"saved in {path}")
    return {"before": before, "after": after, "path": str(path)}


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
