"""The texts of a distillation step: who wrote each, what student and teacher read before it, and its micro-batches."""

from dataclasses import dataclass

import torch

from data import encode_prompt
from support.rollouts import Sampler
from support.shared_prompt import PackedAnswers, pack


@dataclass
class Texts:
    """One rank's part of a step: n questions, R answers each."""

    prompts: list  # n lists of ids, as the student sees the question
    teacher_prompts: list  # n lists of ids, as the teacher does
    answers: list  # n lists of R lists of ids
    by_student: list  # n bool: who wrote the answers

    @property
    def n_tokens(self):
        return sum(len(ids) for group in self.answers for ids in group)


@dataclass
class Piece:
    """A micro-batch of b answers of at most T tokens, as each of the two reads it."""

    packed: PackedAnswers
    teacher_packed: PackedAnswers
    mask: torch.Tensor  # (b, T) bool: the answers' tokens
    by_student: torch.Tensor  # (b,) bool


def written_by_student(place, share):
    """Whether the student answers this one of a run's questions: evenly spread, `share` of them."""
    return int((place + 1) * share + 1e-9) > int(place * share + 1e-9)


class Writers:
    """writers(step, slots) -> Texts: the answers to this rank's questions, by the student for a share of them, by the
    teacher for the others; a function of (seed, step), as `support.rollouts.Sampler`."""

    def __init__(self, policy, teacher, tokenizer, problems, teacher_problems, config, autocast):
        """teacher_problems: the same problems as the teacher sees them, in the same order."""
        self.tokenizer, self.config, self.seen_alike = tokenizer, config, teacher_problems is problems
        self.student = Sampler(policy, tokenizer, problems, config, autocast)
        self.teacher = Sampler(teacher, tokenizer, teacher_problems, config, autocast)

    def __call__(self, step, slots):
        first = step * self.config.prompts
        by_student = [written_by_student(first + slot, self.config.on_policy) for slot in slots]
        answers = {}  # of each slot
        for sample, is_student in ((self.student, True), (self.teacher, False)):
            own = [slot for slot, student in zip(slots, by_student, strict=True) if student == is_student]
            if own:
                answers |= zip(own, sample(step, own).answers, strict=True)
        asked, shown = self.student.asked(step), self.teacher.asked(step)  # the same, as the teacher sees them
        prompts = teacher_prompts = [encode_prompt(self.tokenizer, asked[slot]) for slot in slots]
        if not self.seen_alike:
            teacher_prompts = [encode_prompt(self.tokenizer, shown[slot]) for slot in slots]
        return Texts(prompts, teacher_prompts, [answers[slot] for slot in slots], by_student)


def pieces_of(texts, micro_batch, pad, device):
    """Micro-batches of whole groups -> [Piece]."""
    n, R = len(texts.prompts), len(texts.answers[0])
    size, pieces = max(1, micro_batch // R), []
    groups = sorted(range(n), key=lambda g: len(texts.prompts[g]))  # prompts of like length waste no padding
    for i in range(0, n, size):
        some = groups[i : i + size]
        answers = [texts.answers[g] for g in some]
        packed = teacher_packed = pack([texts.prompts[g] for g in some], answers, pad).to(device)
        if texts.teacher_prompts is not texts.prompts:
            teacher_packed = pack([texts.teacher_prompts[g] for g in some], answers, pad).to(device)
        T = packed.parts[-1].tokens.shape[1]  # the last part has the longest answers
        mask = torch.arange(T, device=device) < packed.lengths[:, None]  # (b, T)
        by_student = torch.tensor([texts.by_student[g] for g in some for _ in range(R)], device=device)
        pieces.append(Piece(packed, teacher_packed, mask, by_student))
    return pieces
