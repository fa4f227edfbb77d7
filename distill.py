"""On-policy distillation: the student answers, and at every token a teacher says how likely it finds each next one.

GRPO's verifier gives one number for a whole answer. A teacher gives a distribution over the vocabulary at every token:
no reward, no group, no luck needed. The student meets its own mistakes, and learns what the teacher would do after
them, which no text of the teacher shows.

At one place of a text, π is the student's and p the teacher's distribution of the next token (no gradient in p):

    β = 0     D = KL(p ‖ π) = Σ_v p(v) log(p(v) / π(v))       forward: say all that the teacher might say
    β = 1     D = KL(π ‖ p) = Σ_v π(v) log(π(v) / p(v))       reverse: say nothing that the teacher would not
    between   D = β KL(p ‖ M) + (1 − β) KL(π ‖ M)             generalised JSD, M = β p + (1 − β) π
                                                              (GKD, arXiv:2306.13649, Eq. 1; the ends as in TRL)
    L = Σ_t m_t D_t / n                                       m_t = 1 on the answers' tokens, n their number

Whose texts? The student's for a share λ of the questions (--on_policy; GKD draws it for each batch, here it is even),
the teacher's for the others. There is no gradient through the sampling: what a token does to later ones is left out.

--loss sample needs of both models only the probability of the token y_t that stands in the text, all that some teachers
give. Which divergence it estimates depends on who wrote the text (sg: no gradient):

    y ~ π     the weight of ∇log π(y_t) is A_t = r_t = sg[log p(y_t) − log π(y_t)]: a policy gradient with a reward per
              token. E[−r_t ∇log π(y_t)] = ∇KL(π ‖ p) at this place. No group, no mean, no std
    y ~ p     A_t = 1: SFT on the teacher's texts (arXiv:1606.07947). E[−∇log π(y_t)] = ∇KL(p ‖ π)

With --gamma 1, A_t = r_t + r_{t+1} + …: the gradient of the whole text's KL, with more noise.

One step, for N = --prompts questions with R = --rollouts answers each, b answers in a piece (main has the same parts):

    texts = writers(step)                                 N·R answers, λ of them the student's         1. write
    n     = tokens of all answers                         of all ranks, before the cut into pieces
    for piece in pieces_of(texts):                                                                     2. compare
        z   = shared_answer_logits(student)               at each token of the answers    (b, T, V)
        z_p = shared_answer_logits(teacher)               the same ids, no gradient       (b, T, V)
        loss = Σ m D(softmax z_p, softmax z) / n          by sample: −Σ m A log π(y) / n
        backward
    clip the gradient's norm, optimizer step                                                           3. update
    log; every so often answer validation questions, keep the best checkpoint                          4. look

The defaults compare whole distributions by the forward KL, on the student's texts alone, 200 steps of 96 answers. The
teacher is the built-in start taken through grpo.py, the student a model of half its width, pretrained and fine-tuned
alike; both are made once, under runs/start. Off: the teacher's texts, --loss sample, self-distillation, LoRA.

Self-distillation: --teacher self is the student as it is now, with more to read. --teacher_sees example puts a worked
example (another training problem, solved) before the question; solution this problem's own (arXiv:2601.19897). What the
student knows with it, it learns to know without. A teacher that stays as it began: the same path as --init.

Traps:
  * The jump at the ends. D goes to 0 as β does, like β KL(p ‖ π), and likewise at 1 (`demo`): β = 0.01 has nearly the
    gradient of β = 0, at a hundredth of its size. SGD and a clip of the norm notice, Adam and Muon hardly.
  * The KL on the student's texts is another number than on the teacher's. Compare `kl` within a run; between runs
    compare the KL to the teacher in the report, which is always on the student's texts.
  * A multiplies ∇log π(y); it is not the loss. The gradient of log π(y) − log p(y) itself is 0 in the mean (`demo`).
  * What the student never says, the reverse KL does not teach: its gradient in z_v is π(v) (log(π(v) / p(v)) − D), that
    of the forward KL π(v) − p(v) (at temperature 1).
  * The teacher reads the ids that the student wrote, never the text encoded again: both need the same tokenizer.

Run it:
    python distill.py --demo                                        two tokens by hand: values, gradients, the jump
    python distill.py                                               from nothing, minutes on two CPU cores
    python distill.py --on_policy 0.5 --beta 0.5                    GKD
    python distill.py --loss sample                                 a reward per token
    python distill.py --on_policy 0 --loss sample                   SFT on the teacher's answers
    python distill.py --teacher self --teacher_sees solution --init runs/sft
    torchrun --nproc_per_node 2 distill.py --data gsm8k --init runs/sft --teacher runs/grpo --max_new_tokens 200
"""

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import task_of
from evaluate import kl_estimate
from grpo import grpo_loss
from lora import add_lora
from optim import lr_at, make_optimizers, optimizer_step
from ppo import gae
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count, Fraction, Positive
from support.cli import run_script
from support.content import records_of, weights_of
from support.devices import precision, setup
from support.distill_report import add_up, measure_both, measure_student, report, step_record
from support.held_out import add_figures
from support.lora_files import LoraState
from support.recorder import Recorder, RecordFlags
from support.runs import Run
from support.shared_prompt import shared_answer_logits, shared_answer_logprobs
from support.taught import Writers, pieces_of
from support.teachers import check_teaching, load_taught, open_teacher, student_start, teacher_start
from support.verified import VerifiedConfig, measure_valid
from transformer import masked_mean

# ---------------------------------------------------------------------------------------------------------------
# The divergences.


def kl(log_p, log_q):
    """KL(p ‖ q) over the last dimension, from log-probabilities (…, V) -> (…)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


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
    the logits of both. n_tokens: of the whole optimizer step, over pieces and ranks; default: of this piece. What
    stands outside the mask is anything at all. Metrics: "loss", and means over this piece's tokens: "kl", the reverse
    one, and "forward_kl".
    """
    real, n = mask.bool(), n_tokens or mask.sum().clamp(min=1)
    logits = [student_logits[real], teacher_logits.detach()[real]]  # (tokens that count, V) each
    precise = [x.to(torch.promote_types(x.dtype, torch.float32)) / temperature for x in logits]
    log_student, log_teacher = (F.log_softmax(x, dim=-1) for x in precise)
    loss = divergence(log_student, log_teacher, beta).sum() / n
    with torch.no_grad():
        both = kl(log_student, log_teacher).sum(), kl(log_teacher, log_student).sum()
        values = torch.stack([loss, *(x / real.sum().clamp(min=1) for x in both)]).tolist()
    return loss, dict(zip(("loss", "kl", "forward_kl"), values, strict=True))


def token_advantages(logprobs, teacher_logprobs, mask, gamma=0.0):
    """log π and log p of the student's own tokens, (B, T) each -> A (B, T), without a gradient, 0 outside the mask:
    A_t = Σ_{s ≥ t} γ^(s − t) r_s, so with gamma 0 this token's r_t alone."""
    rewards = torch.where(mask.bool(), teacher_logprobs - logprobs, 0.0).detach()
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]  # with V = 0 and λ = 1: that sum


def sampled_loss(logprobs, teacher_logprobs, mask, by_student, gamma=0.0, *, n_tokens=None):
    """log π and log p of the texts' tokens and the mask, (B, T) each; by_student (B,) bool -> (loss, metrics).

    grpo.py's loss, with an advantage for each token: A on the student's texts, 1 on the teacher's. Metrics: "loss",
    whose value means nothing, and what the sampled tokens say of the divergences (k3): "kl" on the student's texts,
    "forward_kl" on the teacher's, 0 where there are none.
    """
    mask = mask.bool()
    own = by_student[:, None] & mask  # (B, T) the student's tokens
    A = torch.where(own, token_advantages(logprobs, teacher_logprobs, mask, gamma), 1.0)  # (B, T)
    options = {"loss_type": "dapo", "surrogate": "reinforce", "n_tokens": n_tokens}  # a mean over tokens; no ratio
    loss, figures = grpo_loss(logprobs, logprobs.detach(), A, mask, **options)
    ours, theirs = (torch.where(mask, x.detach(), 0.0) for x in (logprobs, teacher_logprobs))
    reverse = masked_mean(kl_estimate(ours, theirs), own)
    forward = masked_mean(kl_estimate(theirs, ours), mask & ~own)
    return loss, {"loss": figures["loss"], "kl": reverse.item(), "forward_kl": forward.item()}


def demo():
    """Two tokens: the divergences, their gradients, the jump, the sampled token. Three: what the student never says."""

    def at(beta, student, teacher):
        """Two distributions -> D and its gradient in the student's logits (V,)."""
        logits = student.log()[None, None].requires_grad_()  # (1, 1, V)
        loss, _ = distill_loss(logits, teacher.log()[None, None], torch.ones(1, 1), beta)
        return loss.item(), torch.autograd.grad(loss, logits)[0][0, 0]

    pi, p = torch.tensor([[4 / 5, 1 / 5], [1 / 2, 1 / 2]], dtype=torch.float64)
    forward = (math.log(5 / 8) + math.log(5 / 2)) / 2  # Σ p log(p / π) = 0.2231
    reverse = (4 * math.log(8 / 5) + math.log(2 / 5)) / 5  # Σ π log(π / p) = 0.1927
    slope = 4 / 5 * (math.log(8 / 5) - reverse)  # of the reverse one in z_0: 0.2218
    assert math.isclose(at(0, pi, p)[0], forward)
    assert math.isclose(at(1, pi, p)[0], reverse)
    assert math.isclose(at(0, pi, p)[1][0], 4 / 5 - 1 / 2)
    assert math.isclose(at(1, pi, p)[1][0], slope)
    print("π = 4/5, 1/5, p = 1/2, 1/2         D       ∂D/∂z_0")
    names = {0: "KL(p ‖ π)", 0.01: "", 0.5: "", 0.99: "", 1: "KL(π ‖ p)"}
    by_hand = {0: "π − p = 4/5 − 1/2", 1: "π (log(π / p) − D) = 4/5 (0.4700 − 0.1927)"}
    for beta, name in names.items():
        value, gradient = at(beta, pi, p)
        print(f"  β = {beta:<4}   {name:<18}  {value:.4f}   {gradient[0]:+.4f}   {by_hand.get(beta, '')}".rstrip())
    tiny = 1e-6
    assert math.isclose(at(tiny, pi, p)[0] / tiny, forward, rel_tol=1e-5)
    assert math.isclose(at(1 - tiny, pi, p)[0] / tiny, reverse, rel_tol=1e-5)
    print("the jump: D goes to 0 at both ends, D / β to KL(p ‖ π), D / (1 − β) to KL(π ‖ p)")

    logits, means = pi.log().requires_grad_(), torch.zeros(3, dtype=torch.float64)
    for y in (0, 1):  # the sampled token; its probability times the gradient in z_0
        logprob = logits.log_softmax(0)[y].view(1, 1)
        given = logprob, p[y].log().view(1, 1), torch.ones(1, 1)
        losses = [sampled_loss(*given, torch.tensor([by_student]))[0] for by_student in (True, False)]
        losses.append(given[0] - given[1])
        slopes = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0][0] for loss in losses]
        means += torch.stack([pi[y] * slopes[0], p[y] * slopes[1], pi[y] * slopes[2]])
    torch.testing.assert_close(means, torch.tensor([slope, 4 / 5 - 1 / 2, 0.0], dtype=torch.float64))
    print(f"by the sampled token, mean: y ~ π {means[0]:+.4f}, as KL(π ‖ p) above; y ~ p {means[1]:+.4f}, as KL(p ‖ π)")
    print("  y ~ π, the gradient of log π(y) − log p(y) itself: 0")

    pi, p = torch.tensor([[0.989, 0.01, 0.001], [0.5, 0.1, 0.4]], dtype=torch.float64)
    pulls = [-at(beta, pi, p)[1][2].item() for beta in (0, 1)]
    assert math.isclose(pulls[0], 0.4 - 0.001)
    assert 0 < pulls[1] < 0.01
    print("π = 0.989, 0.01, 0.001, p = 0.5, 0.1, 0.4: the third token, which the student hardly ever says, is pulled")
    print(f"  up by {pulls[0]:.3f} by the forward KL, by {pulls[1]:.3f} by the reverse")


# ---------------------------------------------------------------------------------------------------------------
# The stage.


@dataclass
class Config(RecordFlags, VerifiedConfig):
    """Train a student on a teacher's distributions, on its own texts or the teacher's (distillation)."""

    name: str = "distill"
    teacher: str | None = None
    """Checkpoint of the teacher, which has the student's tokenizer; self: the student as it is now; default: one that
    is trained once into runs/start."""
    teacher_sees: Literal["question", "example", "solution"] = "question"
    """What stands in the teacher's prompt: the question alone, a worked example before it, or its own solution."""
    instruction: str = ""
    """Text after each question that says how to answer, for models that were not fine-tuned on this data."""
    on_policy: Fraction = 1.0
    """The share of the questions that the student answers itself; the teacher answers the others."""
    loss: Literal["vocabulary", "sample"] = "vocabulary"
    """Compare whole distributions, or the probabilities of the token that stands there."""
    beta: Fraction | None = None
    """0 (the default): KL(teacher to student), 1: KL(student to teacher), between them the generalised JSD."""
    gamma: Fraction = 0.0
    """With --loss sample: how much a token's advantage counts those after it; 1: all of them."""
    prompts: Count = 96
    """Questions N per step, over all ranks."""
    rollouts: Count = 1
    """Answers R to each question."""
    temperature: Positive = 1.0
    """Sampling temperature, also of the distributions that are compared."""
    micro_batch: Count | None = None
    """Answers per forward pass of one rank, whole groups; default 128 for the built-in problems (short), else 32."""
    lr: Amount = 2e-3
    """Peak learning rate."""
    steps: Count = 200
    """Optimizer steps, each on fresh texts."""

    def __post_init__(self):
        super().__post_init__()
        check_teaching(self)
        if self.loss == "vocabulary" and self.beta is None:
            self.beta = 0.0
        if self.micro_batch is None:
            self.micro_batch = task_of(self.data).micro_batch


def compare(model, teacher, piece, config, n_tokens):
    """The loss of a piece, (), and its metrics."""
    packed, taught, temperature = piece.packed, piece.teacher_packed, config.temperature
    if config.loss == "sample":
        with torch.no_grad():
            of_teacher = shared_answer_logprobs(teacher, taught, temperature)  # (b, T)
        logprobs = shared_answer_logprobs(model, packed, temperature)  # (b, T)
        return sampled_loss(logprobs, of_teacher, piece.mask, piece.by_student, config.gamma, n_tokens=n_tokens)
    with torch.no_grad():
        of_teacher = shared_answer_logits(teacher, taught)  # (b, T, V or more)
    logits = shared_answer_logits(model, packed)  # (b, T, V)
    of_teacher = of_teacher[..., : logits.shape[-1]]  # published vocabularies are padded with ids that no text has
    return distill_loss(logits, of_teacher, piece.mask, config.beta, temperature=temperature, n_tokens=n_tokens)


def main(config):
    """Train; returns {"before", "after", "teacher"} (test figures), "teacher_kl" and "kl" (to the teacher and to the
    start), "closed", "tokens", "path", and the wall time in seconds, once both models are there."""
    dist = setup(config.device)
    n = dist.per_rank("prompts", config.prompts)  # this rank asks n of a step's N questions
    slots = list(range(dist.rank * n, (dist.rank + 1) * n))  # which of the N they are
    autocast, scaler = precision(config.dtype, dist)
    init = config.init or student_start(config, dist)
    teacher_path = config.teacher or teacher_start(config, dist)
    began = time.perf_counter()
    policy, tokenizer, _ = open_checkpoint(init, dist.device)
    reads = weights_of(init, policy)
    if config.teacher == "self":
        teacher = policy
    else:
        teacher = open_teacher(teacher_path, init, policy, tokenizer, dist.device)
        reads |= weights_of(teacher_path, teacher)
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    contexts = policy.config.context, teacher.config.context
    problems, taught = load_taught(config, tokenizer, *contexts, dist)  # as the student and as the teacher sees them
    writers = Writers(policy, teacher, tokenizer, problems["train"], taught["train"], config, autocast)

    optimizers = make_optimizers(policy, config.optimizer, config.lr, config.weight_decay)
    state = {"before": None, "start": {}, "teacher": None, "tokens": 0.0, "parts": {"lora": LoraState(policy, init)}}
    reads |= records_of(config.data, problems)
    run = Run(config, dist, policy, tokenizer, optimizers, scaler, best=-1.0, reads=reads, began=began, **state)
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy
    policy.eval()  # throughout: no dropout

    seen = {"valid": problems["valid"], "taught": taught["valid"], "sample": writers.student, "reference": teacher}
    seen |= {"loss_of": divergence if config.loss == "vocabulary" else sampled_loss, "temperature": config.temperature}
    recorder = Recorder(run, autocast, **seen)  # for view.py
    measure_both(run, teacher, problems, taught, init)  # the test split; the start is best/ until a step beats it
    for step in run.steps():
        # 1. write: the student answers the questions, or the teacher some of them; n·R answers, lists of ids
        texts = writers(step, slots)
        (n_tokens,) = dist.sum(texts.n_tokens)  # of all ranks, before the cut into pieces
        run.state.tokens += n_tokens
        recorder.texts(texts, n_tokens)

        # 2. compare: what student and teacher think at every token
        pieces, sums = pieces_of(texts, config.micro_batch, tokenizer.endoftext_id, dist.device), {}
        for piece in pieces:  # b answers each: packed ids for both models, mask (b, T), by_student (b,)
            # DDP averages the gradients of the ranks in the last backward alone; * world makes the average a sum.
            last = piece is pieces[-1]
            with contextlib.nullcontext() if last or dist.world == 1 else model.no_sync():
                with autocast():
                    loss, metrics = compare(model, teacher, piece, config, n_tokens)
                scaler.scale(loss * dist.world).backward()
            add_up(sums, metrics, piece, config)
        record = step_record(sums, dist)

        # 3. update
        lr = lr_at(step, config.steps, config.lr, config.warmup)
        norm = optimizer_step(policy, optimizers, scaler, autocast, lr, config.clip)
        run.check_finite(lr, norm, loss=record["loss"])

        # 4. look
        record |= {"lr": lr, "grad_norm": norm, "length": n_tokens / (config.prompts * config.rollouts)}
        if run.due(config.eval_every):
            add_figures(record, measure_valid(run, problems))
            run.keep_best(record["accuracy"])
        run.log(step + 1, **record)
        shown = {name: f"{record[name]:.3f}" for name in ("kl", "forward_kl") if name in record}
        run.bar.set_postfix(**shown, best=f"{run.state.best:.1%}")
    run.close()

    figures = measure_student(run, teacher, problems, taught, init)  # the test split again, with best/
    if dist.is_main:
        report(config, run.path, figures)
    return figures


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
