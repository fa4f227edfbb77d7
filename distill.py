"""On-policy distillation: the student answers, and at every token a teacher gives its distribution of the next.

GRPO's verifier gives one number for a whole answer. A teacher gives a distribution over the vocabulary at every token:
no reward, no group, no luck needed. The student meets its own mistakes, and learns what the teacher would do after
them, which no text of the teacher shows.

At one place of a text, π is the student's distribution of the next token and z its logits (divided by --temperature);
p is the teacher's, which has no gradient. β (--beta, from 0 to 1) says which way round they are compared; it is not
the weight of a KL, as --beta is in dpo.py, ppo.py and grpo.py:

    β = 0     D = KL(p ‖ π) = Σ_v p(v) log(p(v) / π(v))       forward: say all that the teacher might say
              ∂D/∂z_v = π(v) − p(v)
    β = 1     D = KL(π ‖ p) = Σ_v π(v) log(π(v) / p(v))       reverse: say nothing that the teacher would not
              ∂D/∂z_v = π(v) (log(π(v) / p(v)) − D)
    between   D = β KL(p ‖ M) + (1 − β) KL(π ‖ M)             generalised Jensen-Shannon (GKD), M = β p + (1 − β) π
              ∂D/∂z_v = (1 − β) π(v) (log(π(v) / M(v)) − KL(π ‖ M))      (arXiv:2306.13649, Eq. 1; the ends as in TRL)
    L = Σ_t m_t D_t / n_tokens                                m_t = 1 on the answers' tokens, n_tokens their number in
                                                              the step (in the paper a mean per text, then over texts)

Whose texts? The student's for a share λ of a step's questions (--on_policy), the teacher's for the others; GKD draws
by λ who writes a whole batch. No gradient goes through the sampling: what a token does to later ones is left out.

--loss sample needs of the teacher only the probability of the token y_t that stands in the text (an API often gives no
more): L = −Σ_t m_t A_t log π(y_t) / n_tokens. Its value means nothing. Its mean gradient is that of a divergence, and
which one depends on who wrote the text:

    y ~ π     A_t = r_t = log p(y_t) − log π(y_t), without a gradient: a policy gradient with a reward per token.
              ∇KL(π ‖ p) = Σ_v ∇π(v) (log(π(v) / p(v)) + 1) = E[−r ∇log π(y)]       as ∇π = π ∇log π and Σ ∇π = 0
    y ~ p     A_t = 1: SFT on the teacher's texts (arXiv:1606.07947). ∇KL(p ‖ π) = E[−∇log π(y)]

With --gamma 1 the student's texts have A_t = r_t + r_{t+1} + …: the gradient of the whole text's KL, with more noise
(MiniLLM, arXiv:2306.08543, without its three refinements).

One step, for N = --prompts questions with R = --rollouts answers each, b answers in a piece (main has the same parts):

    texts    = writers(step)                              N·R answers, λ of them the student's         1. write
    n_tokens = tokens of all answers                      of all ranks, before the cut into pieces
    for piece in pieces_of(texts):                                                                     2. compare
        logits         = shared_answer_logits(student)    entry t predicts answer token t (b, T, V)
        teacher_logits = shared_answer_logits(teacher)    the same ids, no gradient       (b, T, V)
        loss           = distill_loss(logits, teacher_logits, mask, β, n_tokens)    with --loss sample: sampled_loss
        backward
    clip the gradient's norm, optimizer step                                                           3. update
    log; every so often answer validation questions, keep the best checkpoint                          4. look

The defaults compare whole distributions by the forward KL, on the student's texts alone: 200 steps of 96 answers. The
teacher is the built-in start taken through grpo.py, the student a model of half its width, pretrained and fine-tuned
alike; both are made once, under runs/start. Off: the teacher's texts, --loss sample, self-distillation, LoRA. In
results/distill.md neither the reverse KL, nor the teacher's texts, nor SFT on them differs significantly from the
defaults in accuracy, each at its best of four learning rates; --loss sample on the student's texts ends far lower.

Self-distillation (arXiv:2601.19897): --teacher self is the student as it is now, with a longer prompt. --teacher_sees
example puts another training problem, solved, before the question; solution puts this problem's own solution there. The
student learns to answer without it as it does with it. A teacher that does not move: --teacher with the path of --init.

Traps:
  * The jump at the ends. At β = 0 D is KL(p ‖ π), but at a small β about β KL(p ‖ π), and likewise at 1 (`demo`): the
    gradient at β = 0.01 points nearly where that at β = 0 does, and is a hundred times smaller. SGD steps a hundred
    times less, and the norm's clip no longer acts; Adam and Muon rescale the gradient and hardly notice.
  * The KL on the student's texts is another number than on the teacher's. `reverse_kl` is a mean over all texts,
    with --loss sample over the student's. To compare runs take the report's KL to the teacher, on the student's texts.
  * r is a weight, not a loss: log π(y) − log p(y), differentiated, has gradient 0 in the mean (`demo`).
  * What the student never says, the reverse KL does not teach: π(v) is a factor of its gradient in z_v.
  * The teacher reads the ids that the student wrote, never the text encoded again: both need the same tokenizer.

Run it:
    python distill.py --demo                                        two tokens by hand: values, gradients, the jump
    python distill.py                                               from nothing, minutes on two CPU cores
    python distill.py --on_policy 0.5 --beta 0.5                    GKD
    python distill.py --loss sample                                 a reward per token (Thinking Machines, 2025)
    python distill.py --on_policy 0 --loss sample                   SFT on the teacher's answers
    python distill.py --teacher self --teacher_sees solution --init runs/sft
    torchrun --nproc_per_node 2 distill.py --data gsm8k --init runs/sft --teacher runs/grpo --max_new_tokens 200
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from evaluate import kl_estimate
from optim import lr_at, optimizer_step
from support.checks import Amount, Count, Fraction, Positive
from support.cli import run_script
from support.distill_report import add_up, measure_student, report, step_record
from support.distill_run import begin_run, open_start
from support.recorder import RecordFlags
from support.sharding import averaging
from support.shared_prompt import shared_answer_logits, shared_answer_logprobs
from support.taught import Writers, pieces_of
from support.teachers import check_teaching
from support.verified import VerifiedConfig, look_at_step
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# The divergences.


def kl(log_a, log_b):
    """KL(a ‖ b) over the last dimension, from log-probabilities (…, V) -> (…)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def divergence(log_student, log_teacher, beta):
    """D of each token, from log-probabilities (…, V) -> (…)."""
    if beta == 0:
        return kl(log_teacher, log_student)
    if beta == 1:
        return kl(log_student, log_teacher)
    log_mixture = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))  # (…, V)
    return beta * kl(log_teacher, log_mixture) + (1 - beta) * kl(log_student, log_mixture)


def distill_loss(student_logits, teacher_logits, mask, beta, *, temperature=1.0, n_tokens=None):
    """Logits (B, T, V), mask (B, T) -> (Σ mask · D / n_tokens, metrics). No gradient reaches the teacher.

    beta: 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher), between them the generalised JSD. temperature: divides
    the logits of both; without Hinton's factor, its square (arXiv:1503.02531). n_tokens: of the whole optimizer step,
    over pieces and ranks; default: of this piece. Values outside the mask are ignored, NaN too. Metrics: "loss", and
    means over this piece's tokens: "reverse_kl" and "forward_kl".
    """
    real = mask.bool()
    n_tokens = n_tokens or mask.sum().clamp(min=1)

    def logprobs_of(logits):
        """(B, T, V) -> (tokens that count, V), in fp32 at least."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return F.log_softmax(logits[real].to(dtype) / temperature, dim=-1)

    log_student, log_teacher = logprobs_of(student_logits), logprobs_of(teacher_logits.detach())
    loss = divergence(log_student, log_teacher, beta).sum() / n_tokens
    with torch.no_grad():
        kls = kl(log_student, log_teacher), kl(log_teacher, log_student)  # (tokens that count,) each
        values = torch.stack([loss, *(x.sum() / real.sum().clamp(min=1) for x in kls)]).tolist()
    return loss, dict(zip(("loss", "reverse_kl", "forward_kl"), values, strict=True))


def token_advantages(logprobs, teacher_logprobs, mask, gamma=0.0):
    """log π and log p of the student's own tokens, (B, T) each -> A (B, T), without a gradient, 0 outside the mask:
    A_t = Σ_{s ≥ t} γ^(s − t) r_s, so with gamma 0 this token's r_t alone."""
    rewards = torch.where(mask.bool(), teacher_logprobs - logprobs, 0.0).detach()
    advantages, later = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = later = rewards[:, t] + gamma * later  # (B,)
    return advantages


def sampled_loss(logprobs, teacher_logprobs, mask, by_student, gamma=0.0, *, n_tokens=None):
    """log π and log p of the texts' tokens and the mask, (B, T) each; by_student (B,) bool -> (loss, metrics).

    REINFORCE with an advantage for each token: A on the student's texts, 1 on the teacher's. Metrics: "loss", whose
    value means nothing, and what the sampled tokens say of the divergences (k3 of evaluate.kl_estimate): "reverse_kl"
    on the student's texts, "forward_kl" on the teacher's, 0 where there are none.
    """
    mask = mask.bool()
    of_student = by_student[:, None] & mask  # (B, T) its tokens
    A = torch.where(of_student, token_advantages(logprobs, teacher_logprobs, mask, gamma), 1.0)  # (B, T)
    loss = -torch.where(mask, A * logprobs, 0.0).sum() / (n_tokens or mask.sum().clamp(min=1))
    student, teacher = (torch.where(mask, x.detach(), 0.0) for x in (logprobs, teacher_logprobs))
    reverse = masked_mean(kl_estimate(student, teacher), of_student)
    forward = masked_mean(kl_estimate(teacher, student), mask & ~of_student)
    return loss, {"loss": loss.item(), "reverse_kl": reverse.item(), "forward_kl": forward.item()}


def demo():
    """Two tokens: the divergences, their gradients, the jump, the sampled token."""

    def at(beta, student, teacher):
        """Two distributions -> D and its gradient in the student's logits (V,)."""
        logits = student.log()[None, None].requires_grad_()  # (1, 1, V)
        loss, _ = distill_loss(logits, teacher.log()[None, None], torch.ones(1, 1), beta)
        return loss.item(), torch.autograd.grad(loss, logits)[0][0, 0]

    pi, p = torch.tensor([[4 / 5, 1 / 5], [1 / 2, 1 / 2]], dtype=torch.float64)
    forward = (math.log(5 / 8) + math.log(5 / 2)) / 2  # Σ p log(p / π) = 0.2231
    reverse = (4 * math.log(8 / 5) + math.log(2 / 5)) / 5  # Σ π log(π / p) = 0.1927
    slope = 4 / 5 * (math.log(8 / 5) - reverse)  # of the reverse one in z_0: 0.2218
    to_M = (4 * math.log(16 / 13) + math.log(4 / 7)) / 5  # KL(π ‖ M) at β = 1/2, M = 13/20, 7/20: 0.0542
    assert math.isclose(at(0, pi, p)[0], forward)
    assert math.isclose(at(1, pi, p)[0], reverse)
    for beta, in_z in ((0, 4 / 5 - 1 / 2), (0.5, 2 / 5 * (math.log(16 / 13) - to_M)), (1, slope)):
        assert math.isclose(at(beta, pi, p)[1][0], in_z)
    print("π = 4/5, 1/5, p = 1/2, 1/2         D       ∂D/∂z_0")
    names = {0: "KL(p ‖ π)", 0.01: "", 0.5: "", 0.99: "", 1: "KL(π ‖ p)"}
    by_hand = {0: "π − p = 4/5 − 1/2", 0.5: "(1 − β) π (log(π / M) − KL(π ‖ M)) = 2/5 (0.2076 − 0.0542)"}
    by_hand[1] = "π (log(π / p) − D) = 4/5 (0.4700 − 0.1927)"
    for beta, name in names.items():
        value, gradient = at(beta, pi, p)
        print(f"  β = {beta:<4}   {name:<18}  {value:.4f}   {gradient[0]:+.4f}   {by_hand.get(beta, '')}".rstrip())
    assert math.isclose(at(1e-6, pi, p)[0] / 1e-6, forward, rel_tol=1e-5)
    assert math.isclose(at(1 - 1e-6, pi, p)[0] / 1e-6, reverse, rel_tol=1e-5)
    print("the jump: D goes to 0 at both ends, D / β to KL(p ‖ π), D / (1 − β) to KL(π ‖ p)")

    logits = pi.log().requires_grad_()
    means = {"y ~ π, A = r": 0.0, "y ~ p, A = 1": 0.0, "y ~ π, −r itself as the loss": 0.0}  # gradients in z_0
    for y in (0, 1):  # the sampled token
        logprob, teacher_logprob = logits.log_softmax(0)[y].view(1, 1), p[y].log().view(1, 1)
        by_student, by_teacher = (
            sampled_loss(logprob, teacher_logprob, torch.ones(1, 1), torch.tensor([who]))[0] for who in (True, False)
        )
        losses = ((pi[y], by_student), (p[y], by_teacher), (pi[y], (logprob - teacher_logprob).sum()))
        for name, (probability, loss) in zip(means, losses, strict=True):
            means[name] += (probability * torch.autograd.grad(loss, logits, retain_graph=True)[0][0]).item()
    print("by the sampled token, mean gradient in z_0:")
    exact = {"= ∂KL(π ‖ p) / ∂z_0": slope, "= ∂KL(p ‖ π) / ∂z_0": 4 / 5 - 1 / 2, "": 0.0}
    for (name, mean), (meaning, gradient) in zip(means.items(), exact.items(), strict=True):
        assert math.isclose(mean, gradient, abs_tol=1e-12)
        print(f"  {name:<29}{mean:+.4f}   {meaning}".rstrip())


# ---------------------------------------------------------------------------------------------------------------
# The stage. More flags: support/verified.py (--init, --max_new_tokens, --micro_batch), support/runs.py (--warmup, …).


@dataclass
class Config(RecordFlags, VerifiedConfig):
    """Train a student on a teacher's distributions, on its own texts or the teacher's (distillation)."""

    name: str = "distill"
    teacher: str | None = None
    """Checkpoint of the teacher, which has the student's tokenizer; self: the student as it is now; default: one that
    is trained once into runs/start."""
    teacher_sees: Literal["question", "example", "solution"] = "question"
    """What stands in the teacher's prompt: the question alone, a worked example before it, or its solution."""
    on_policy: Fraction = 1.0
    """The share of the questions that the student answers itself; the teacher answers the others."""
    loss: Literal["vocabulary", "sample"] = "vocabulary"
    """Compare whole distributions, or the probabilities of the token that stands there."""
    beta: Fraction | None = None
    """0 (the default): KL(teacher ‖ student), 1: KL(student ‖ teacher), between them the generalised JSD."""
    gamma: Fraction = 0.0
    """With --loss sample: γ in A_t = Σ_{s ≥ t} γ^(s − t) r_s; 0: r_t alone, 1: all that follows counts in full."""
    prompts: Count = 96
    """Questions N per step, over all ranks."""
    rollouts: Count = 1
    """Answers R to each question."""
    temperature: Positive = 1.0
    """Sampling temperature, also of the distributions that are compared."""
    lr: Amount = 2e-3
    """Peak learning rate."""
    steps: Count = 200
    """Optimizer steps, each on fresh texts."""

    def __post_init__(self):
        super().__post_init__()
        check_teaching(self)
        if self.loss == "vocabulary" and self.beta is None:
            self.beta = 0.0


def piece_loss(model, teacher, piece, config, n_tokens):
    """The loss of a piece, (), and its metrics. Packed: b answers, and each prompt once (support/shared_prompt.py)."""
    mask, temperature = piece.mask, config.temperature
    if config.loss == "sample":
        logprobs = shared_answer_logprobs(model, piece.packed, temperature)  # (b, T)
        with torch.no_grad():
            teacher_logprobs = shared_answer_logprobs(teacher, piece.teacher_packed, temperature)  # (b, T)
        return sampled_loss(logprobs, teacher_logprobs, mask, piece.by_student, config.gamma, n_tokens=n_tokens)
    logits = shared_answer_logits(model, piece.packed)  # (b, T, V)
    with torch.no_grad():
        teacher_logits = shared_answer_logits(teacher, piece.teacher_packed)  # (b, T, V)
    return distill_loss(logits, teacher_logits, mask, config.beta, temperature=temperature, n_tokens=n_tokens)


def main(config):
    """Train; returns {"before", "after", "teacher"} (test figures), "teacher_kl" and "teacher_kl_before", "kl" (to
    the start), "closed" (the share of the gap to the teacher), "tokens", "path", and the wall time in seconds."""
    start = open_start(config)  # both models, one and the same with --teacher self; the problems as each sees them
    dist, autocast, scaler = start.dist, start.autocast, start.scaler
    policy, teacher = start.policy, start.teacher  # the policy is the student
    tokenizer, problems = start.tokenizer, start.problems
    train = problems["train"], start.teacher_problems["train"]  # as the student and as the teacher sees them
    writers = Writers(policy, teacher, tokenizer, *train, config, autocast)
    run, recorder = begin_run(start, writers, loss_of=divergence if config.loss == "vocabulary" else sampled_loss)
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy

    for step in run.steps():
        # 1. write: the student answers the questions, or the teacher some of them; n·R answers, lists of ids
        texts = writers(step, start.slots)  # slots: the places of this rank's n questions among the N
        (n_tokens,) = dist.sum(texts.n_tokens)  # of all ranks, before the cut into pieces
        run.state.tokens += n_tokens
        recorder.texts(texts, n_tokens)  # for view.py; it changes nothing in the training

        # 2. compare: what student and teacher think at every token
        pieces, sums = pieces_of(texts, config.micro_batch, tokenizer.endoftext_id, dist.device), {}
        for piece in pieces:  # b answers each: packed ids for both models, mask (b, T), by_student (b,)
            # The ranks average their gradients in the last backward alone; * world makes the average a sum
            with averaging(model, piece is pieces[-1]):
                with autocast():
                    loss, metrics = piece_loss(model, teacher, piece, config, n_tokens)
                scaler.scale(loss * dist.world).backward()
            add_up(sums, metrics, piece, config)
        record = step_record(sums, dist)

        # 3. update
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(policy, run.optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, loss=record["loss"])

        # 4. look
        record |= {"lr": lr, "grad_norm": norm, "length": n_tokens / (config.prompts * config.rollouts)}
        look_at_step(run, problems, record, shown=("reverse_kl", "forward_kl"))
    run.close()

    figures = measure_student(run, start)  # the test split again, with best/
    if dist.is_main:
        report(config, run.path, figures)
    return figures


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
