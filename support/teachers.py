"""Whose word distill.py takes: the teacher, what it sees, and the two models that are made where none is given.

teacher_start, student_start     made once, under runs/start, and reused: the SFT start of the other stages taken
                                 through grpo.py; a model of half its width, pretrained and fine-tuned as it was
open_teacher                     a frozen model with the student's tokenizer and vocabulary
load_taught                      the problems, as the student and as the teacher sees them
"""

from dataclasses import replace

import torch
from torch import nn

import grpo
import pretrain
import sft
from data import TASKS, encode_prompt, task_of
from support.checkpoints import open_checkpoint
from support.errors import ConfigError
from support.questions import open_problems
from support.records import drop_too_long
from support.runs import make_start_once, run_path, start_name
from support.sft_start import SFT_START, own_length, sft_start
from transformer import TransformerConfig

TEACHER = {"test_problems": 500, "pass_problems": 20, "pass_samples": 4}  # of grpo.py, beside its defaults


def check_teaching(config):
    """ConfigError on settings that do not go together, or that leave nothing to learn."""
    c = config
    if c.teacher is None and c.data not in TASKS:
        raise ConfigError(f"--data {c.data} needs a teacher: --teacher CHECKPOINT, or self with a longer prompt")
    if c.teacher == "self" and c.teacher_sees == "question":
        raise ConfigError(
            "--teacher self sees what the student sees and so agrees with it: add --teacher_sees example or solution"
        )
    if c.loss == "sample" and c.beta is not None:
        raise ConfigError("--beta has no meaning with --loss sample, where the text's author decides: leave it out")
    if c.loss == "vocabulary" and c.gamma:
        raise ConfigError("--gamma has no meaning with --loss vocabulary: use --loss sample, or leave it out")
    if c.on_policy == 0 and c.gamma:
        raise ConfigError("--gamma has no meaning with --on_policy 0, where no text is the student's: leave it out")


def check_shared_by(world):
    """ConfigError if so many processes cannot make the teacher that a run without --teacher needs."""
    if grpo.Config.prompts % world:
        problem = f"{world} processes cannot share the {grpo.Config.prompts} questions of a step of GRPO"
        raise ConfigError(f"no --teacher given, and {problem}: give one; a run of one process leaves one in runs/start")


def shared_settings(config):
    """What a start takes from the run that needs it."""
    return {"data": config.data, "seed": config.seed, "device": config.device, "dtype": config.dtype}


def teacher_start(config, dist):
    """-> the run directory of the teacher; its SFT start is made first."""
    settings = shared_settings(config) | TEACHER | {"levels": config.levels, "init": sft_start(config, dist)}
    longest = task_of(config.data).sft.get("max_new_tokens")  # of an answer, where a task has a limit of its own
    longer = own_length(config.data, config.max_new_tokens)
    settings |= ({"max_new_tokens": longest} if longest else {}) | longer
    name = start_name(config.data, config.seed, "teacher", config.levels, **longer)
    why = "no --teacher given: training one with GRPO"
    return make_start_once(name, why, grpo, settings, dist)


def student_start(config, dist):
    """-> the run directory of the student, which is a pretraining and an SFT."""
    run_path(config)  # raises on a bad --name or --resume before a start is made
    task, why = task_of(config.data), "no --init given: {} a student of half the teacher's width"
    layout = TransformerConfig(**task.pretrain.get("model", {}))
    half = {"model": replace(layout, width=layout.width // 2)}
    name = start_name(config.data, config.seed, "student-pretrain")
    settings = task.pretrain | shared_settings(config) | half
    base = make_start_once(name, why.format("pretraining"), pretrain, settings, dist)
    longer = own_length(config.data, config.max_new_tokens)
    settings = SFT_START | task.sft | shared_settings(config) | {"levels": config.levels, "init": base} | longer
    name = start_name(config.data, config.seed, "student", config.levels, **longer)
    return make_start_once(name, why.format("fine-tuning"), sft, settings, dist)


def open_teacher(path, init, student, tokenizer, sees, device):
    """-> the frozen model. ConfigError if it reads other ids than the student (opened from `init`) writes, or if it has
    the student's weights and `sees` what the student sees."""
    teacher, other, _ = open_checkpoint(path, device)
    if other.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"the teacher {path} has another tokenizer than {init}: it would read the student's ids as other text; "
            "take two models of one family, or fine-tune on the teacher's texts (sft.py)"
        )
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours > theirs:  # a teacher's may be larger: published ones are padded, to what no text contains
        raise ConfigError(f"{init} may sample {ours} ids, the teacher {path} knows {theirs}: take one padded as far")
    cut_vocabulary(teacher, ours)
    if sees == "question" and same_weights(student, teacher):
        raise ConfigError(
            f"the teacher {path} has the weights of {init} and sees what it sees, so there is nothing to learn: give "
            "another --teacher, or --teacher_sees example or solution"
        )
    return teacher.requires_grad_(False).eval()


def cut_vocabulary(model, size):
    """Leave, in place, the first `size` ids of a model's vocabulary: it gives the others no probability, neither where
    it samples nor where it is compared."""
    if size == model.config.vocab_size:
        return
    model.config = replace(model.config, vocab_size=size)
    model.embed = nn.Embedding.from_pretrained(model.embed.weight[:size].detach().clone())
    if model.head is not None:
        model.head.weight = nn.Parameter(model.head.weight[:size].detach().clone())
        model.head.out_features = size


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(weights, b[name]) for name, weights in a.items())


def with_context(problems, sees, examples):
    """Problems -> the same as the teacher sees them: after a worked example, one of `examples`, or after the problem's
    own solution; "question": as they are. A system turn stays the first."""
    if sees == "question":
        return problems

    def example_for(i, problem):  # the next with another question: a file may hold a question twice
        following = (examples[(i + k) % len(examples)] for k in range(1, len(examples) + 1))
        return next(example for example in following if example.question != problem.question)

    shown = problems if sees == "solution" else [example_for(i, p) for i, p in enumerate(problems)]
    turns = [(("user", p.question), ("assistant", p.solution)) for p in shown]
    n_system = [sum(role == "system" for role, _ in p.history[:1]) for p in problems]  # 0 or 1
    return [
        replace(p, history=(*p.history[:n], *turn, *p.history[n:]))
        for p, turn, n in zip(problems, turns, n_system, strict=True)
    ]


def load_taught(config, tokenizer, context, teacher_context, dist):
    """-> {"train", "valid", "test"}: problems with --instruction, which leave room for an answer in both contexts; the
    same as the teacher sees them. ConfigError as `open_problems`, or if none has room."""
    problems, taught = open_problems(config, tokenizer, context, dist, checked=True), {}
    examples = problems["train"]
    if config.teacher_sees == "example" and len({p.question for p in examples}) < 2:
        raise ConfigError(
            "--teacher_sees example needs two training problems: the only one would show its own solution"
        )
    for split, some in problems.items():
        pairs = list(zip(some, with_context(some, config.teacher_sees, examples), strict=True))
        for i, size, label in ((0, context, f"{split} prompt"), (1, teacher_context, f"teacher's {split} prompt")):
            lengths = [len(encode_prompt(tokenizer, pair[i])) for pair in pairs]
            pairs = drop_too_long(pairs, lengths, size - config.max_new_tokens, label, dist)
        problems[split], taught[split] = (list(view) for view in zip(*pairs, strict=True))
    return problems, problems if config.teacher_sees == "question" else taught
