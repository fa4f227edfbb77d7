"""The first rollouts, judged before training: is there anything to learn from them, and if not, what has to change?

A group whose answers all earn the same teaches nothing. If that is every group, a run ends where it began, and says
nothing about it: here it says so first, in two lines, why and what to do.
"""

import math
from dataclasses import dataclass

from data import task_of
from support.checkpoints import is_chat_model
from support.errors import ConfigError
from support.rewards import judge_batch

QUESTIONS = 48  # enough that none of them has a signal only if hardly any has: below 6 %, at 95 %


@dataclass
class FirstLook:
    """What was counted in the first groups."""

    groups: int
    silent: int  # groups that give no gradient
    answers: int
    truncated: int  # answers that were cut off
    right: int | None  # answers; None if being right is not rewarded
    readable: int | None  # answers in which the verifier finds a number or what else it looks for; None likewise
    formatted: int | None  # well-formed answers; None if neither that nor being right is rewarded
    same_text: int  # groups whose answers are all the same text
    chat: bool  # the checkpoint was trained to chat, so it can end a turn

    def line(self):
        """The figures, in one line."""
        shares = {
            "right": self.right,
            "readable": self.readable,
            "well formed": self.formatted,
            "cut off": self.truncated,
        }
        shares = [f"{n / self.answers:.0%} {name}" for name, n in shares.items() if n is not None]
        chat = "the start was trained to chat" if self.chat else "the start was not trained to chat"
        return (
            f"first look: {self.groups} questions x {self.answers // self.groups} answers, {', '.join(shares)}; "
            f"{self.silent / self.groups:.0%} of the groups have no signal; {chat}"
        )


def verdict(look, max_new_tokens, masked=False):
    """-> None if there is something to learn, else two lines: why not, and what to change. masked: answers that are cut
    off get no gradient (--mask_truncated)."""
    if look.silent < look.groups:
        return None
    sft = "fine-tune it first (sft.py), or start from an instruction-tuned checkpoint"
    cut_off, n = look.truncated / look.answers, look.answers
    if cut_off >= 0.9 and not look.chat:
        why = f"{cut_off:.0%} of the answers never end: --init seems a base model, nothing says that it ends a turn"
        change = f"{sft}; or raise --max_new_tokens ({max_new_tokens})"
    elif cut_off >= 0.9:
        why = f"{cut_off:.0%} of the answers are cut off at --max_new_tokens {max_new_tokens}"
        why += ", and --mask_truncated gives them no gradient" if masked else ""
        change = "raise --max_new_tokens, or ask for shorter answers with --instruction"
    elif look.same_text == look.groups:
        why = "the answers to a question are all the same text: the start is certain of each token"
        change = "raise --temperature, or take an earlier checkpoint"
    elif look.right == n:
        why = "every answer is right already: no answer is better than another"
        change = "give harder questions (--levels, --data), or another reward"
    elif look.formatted == 0 and not look.readable and not look.chat:
        why = "no answer is well formed, and --init seems a base model, which was not trained to answer"
        change = f"{sft}; or say how to answer with --instruction"
    elif look.formatted == 0 and not look.readable:
        why = "no answer is well formed: none ends with one line `#### number`, where the number is read"
        change = "say so with --instruction, or fine-tune on such answers first (sft.py)"
    elif look.right == 0:
        why = "every answer is wrong, though some can be read: the questions are too hard for this start"
        change = "give easier questions (--levels, --data), a better start, or more --rollouts"
    else:
        why = "the answers of each group all earn the same"
        change = "raise --rollouts or --temperature, or give a reward that tells answers apart"
    return f"nothing can be learned: {why}\nwhat to change: {change}"


def look_first(sample, slots, signal_of, functions, weights, init, config, dist):
    """Answer the questions of the first steps as the start does, print what there is to learn, and if nothing is, why.
    ConfigError then with --if_hopeless stop. The run's own random numbers stay as they are."""
    c, counts = config, [0.0] * 8
    for step in range(min(math.ceil(QUESTIONS / c.prompts), c.steps)):
        batch = sample(step, slots)
        judge_batch(functions, batch, c)
        useful = signal_of(batch)  # (n,)
        texts = [set(batch.texts[i : i + c.rollouts]) for i in range(0, len(batch.texts), c.rollouts)]
        right, formatted = ((batch.rewards[name] > 0).sum() for name in ("correct", "format"))
        problems = [p for p in batch.problems for _ in range(c.rollouts)]
        readable = sum(task_of(p.task).answer(text) is not None for p, text in zip(problems, batch.texts, strict=True))
        here = [len(useful), (~useful).sum(), batch.ended.numel(), (~batch.ended).sum(), right, readable, formatted]
        alike = sum(len(t) == 1 for t in texts) if c.rollouts > 1 else 0
        counts = [a + float(b) for a, b in zip(counts, [*here, alike], strict=True)]
    groups, silent, answers, truncated, right, readable, formatted, same_text = map(int, dist.sum(*counts))
    right, readable = (right, readable) if "correct" in weights else (None, None)
    formatted = formatted if {"correct", "format"} & weights.keys() else None
    chat = is_chat_model(init, sample.tokenizer)
    look = FirstLook(groups, silent, answers, truncated, right, readable, formatted, same_text, chat)
    text = verdict(look, c.max_new_tokens, c.mask_truncated)
    if dist.is_main:
        print(look.line() + (f"\n{text}" if text else ""))
    if text and c.if_hopeless == "stop":
        raise ConfigError("stopped before the first step, as nothing can be learned; --if_hopeless warn goes on")
