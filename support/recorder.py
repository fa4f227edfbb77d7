"""What a run records of its answers, token by token: runs/NAME/rollouts.jsonl.gz, which view.py makes a page of.

At step 1, every --record_every steps and at step --steps, rank 0 records some of the step's groups, with the numbers
that the loss used, and how the policy answers a few validation questions. Those are sampled with the same random
numbers at every recording, so what changes in their answers is the policy. What the policy thinks of a token is noted
before the step's update; log π and what the loss sees of a token as the update computes them, from its second minibatch
on after an optimizer step. Nothing in a record is trained on, and it touches no random generator: a run trains the same
without it.

    recorder = Recorder(run, autocast, …)             a tracker of the run's log, which has it write a step's record
    recorder.answers(batch, advantages, …)            GRPO, PPO and relatives, before the update; and in it:
    recorder.tokens(rows, loss_of, (logprobs, …), …)  what the loss sees of a piece's tokens; tokens(rows) after a call
                                                      of loss_of = recorder.noted(loss_of)
    recorder.examples(own, n)                         SFT
    recorder.pairs(own_pairs, z0)                     DPO and KTO
    recorder.texts(texts, n_tokens)                   distillation
    header, records = read_recording(run_dir)

A record is {"step", "vocab": {id: text}, "groups": [group, …]}, a group {"question", "answer" (the right one),
"watched", "answers": [answer, …]}, an answer {"ids", "label", "ended", "rewards": {name: number}, "advantage"} and
columns, lists with a number for each id, of which support/view_page.py says what they mean.
"""

import gzip
import math
import re
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from json import loads
from pathlib import Path
from types import SimpleNamespace

import torch

from data import conversation, encode_prompt
from evaluate import is_correct
from lora import lora_off
from support.checks import Count, Whole
from support.errors import DataError, TokenizerError
from support.files import append_whole, may_fail, must_write, to_json, write_whole
from support.pairs import batch_of, sides_of
from support.shared_prompt import pack, shared_answer_logits

FILE = "rollouts.jsonl.gz"
TOP = 3  # how many candidates for each token are recorded
LARGEST = 2**25  # numbers in the logits of one forward pass, 128 MiB in fp32


@dataclass
class RecordFlags:
    """What a run records for view.py."""

    record_groups: Whole = 3
    """How many groups (pairs, examples) of a step are recorded token by token, for view.py."""
    record_every: Count = 30
    """Steps between recordings; the first step and step --steps are recorded too."""
    watch: Whole = 2
    """How many validation questions are recorded too, each time with the same random numbers (under --fsdp none, as one
    rank cannot answer alone); with --record_groups 0 and --watch 0 nothing is recorded."""


class Recorder:
    """See above. At a step without a record, and on every rank but the first, its methods do nothing."""

    def __init__(self, run, autocast, *, valid=(), reference=None, temperature=1.0, sample=None, judge=None,
                 score=None, loss_of=None, taught=()):  # fmt: skip
        """valid: the validation problems (dpo.py: pairs). reference: the model of log π_ref; the policy itself: without
        its adapters. temperature: of the distributions in the loss. sample: the Sampler of the training answers.
        judge(batch) sets batch.rewards, default the verifier's; score(batch) -> (n, R), a reward model's. loss_of: of
        dpo.py its own; of distill.py `divergence` or `sampled_loss`. taught: of distill.py, `valid` as the teacher sees
        it; `reference` is the teacher then."""
        c = run.config
        self.run, self.config, self.autocast, self.path = run, c, autocast, run.path / FILE
        self.reference, self.temperature, self.loss_of = reference, temperature, loss_of
        self.judge, self.score, self.pad = judge or verdicts, score, run.tokenizer.endoftext_id
        self.record, self.rows = None, {}  # the current step's; row of the batch -> its answer in the record
        self.call = None  # of the loss: see `noted`
        self.wanted = run.dist.is_main and c.record_groups + c.watch > 0
        # Under FSDP a forward pass of one rank alone would wait for the others for ever.
        self.looks_inside = not hasattr(run.model, "reshard")
        self.watched, self.taught = (list(x[: c.watch]) if self.looks_inside else [] for x in (valid, taught))
        if sample is not None and self.watched:
            sizes = {name: getattr(c, name) for name in ("max_new_tokens", "temperature", "seed")}
            sizes |= {"rollouts": c.rollouts, "prompts": len(self.watched)}
            sample = replace(sample, policy=run.model, problems=self.watched, config=SimpleNamespace(**sizes))
        self.sample = sample
        if self.wanted:
            with must_write(self.path):
                start_file(self.path, run)
            run.log.trackers.append(self)

    # What support/log.py asks of a tracker.

    def numbers(self, step, figures):
        """The step is logged: its record is written."""
        if self.record and self.record["step"] == step:
            with may_fail(self.path):
                append_whole(self.path, packed_line(self.record))
        self.record, self.rows = None, {}

    def text(self, *_):
        """Samples of text are in the record."""

    show = flush = close = text

    # What a stage calls.

    def begin(self):
        """Whether the current step is recorded. If so, its record is begun."""
        step = self.run.done + 1
        if not self.wanted or not (step == 1 or self.run.due(self.config.record_every)):
            return False
        self.record, self.rows = {"step": step, "vocab": {}, "groups": []}, {}
        return True

    def answers(self, batch, advantages, rewards=None, **columns):
        """Some groups of a `support.rollouts.Batch`, before the update, and the watched questions. advantages (n, R),
        of ppo.py what an answer is worth (`final`); rewards {name: (n, R)}, default the batch's own; columns: of the
        batch's tokens, (n·R, T) each."""
        if not self.begin():
            return
        n, R = batch.ended.shape
        chosen = range(min(n, self.config.record_groups))
        groups = [self.add_group(batch, g, rewards or batch.rewards, advantages[g]) for g in chosen]
        self.rows = {g * R + r: answer for g in chosen for r, answer in enumerate(groups[g]["answers"])}
        for row, answer in self.rows.items():
            answer |= {name: numbers(x[row, : len(answer["ids"])]) for name, x in columns.items()}
        prompts = batch.prompts[: len(groups)]
        if self.watched:
            asked = self.ask()
            groups += [self.add_group(asked, g, asked.rewards, watched=True) for g in range(len(asked.prompts))]
            prompts = prompts + asked.prompts
        # The update is about to tell log π_ref of the groups with a gradient, and another forward pass costs time.
        told = [not g["watched"] and ("ref" in columns or self.learns(g)) for g in groups]
        for known in (True, False):
            some = [g for g, is_told in enumerate(told) if is_told == known]
            self.look_inside([groups[g] for g in some], [prompts[g] for g in some], refer=not known)

    def noted(self, loss_of):
        """The same function, whose latest call is what `tokens(rows)` records."""

        def noted(*tensors, **options):
            self.call = (loss_of, tensors, options) if self.rows else None
            return loss_of(*tensors, **options)

        return noted

    def tokens(self, rows, loss_of=None, tensors=(), options=None, clips=("clip_low", "clip_high")):
        """What the loss sees of a piece, at its rows of the batch. loss_of(*tensors, **options) -> (loss, metrics), of
        log π, log π_old, A, the mask and perhaps log π_ref, (b, T) or (b,) each; default: the latest call of `noted`.

        Recorded are these numbers and how far the loss pulls log π of each token up, −∂loss/∂log π: "gets" without the
        KL, "kl_gets" by the KL, and "clipped", where without these clips it would be another pull. Of several passes
        over a batch the last one counts.
        """
        here = [i for i, row in enumerate(rows) if row in self.rows]
        if not here:
            return
        if loss_of is None:
            (loss_of, tensors, options), self.call = self.call, None
        if not tensors[3].any():  # of a rank that has nothing to learn from in this minibatch: a group of weight 0
            return
        tensors = [None if x is None else x.detach()[here] for x in tensors]
        options = {name: x[here] if torch.is_tensor(x) else x for name, x in options.items()}
        gets = pull(loss_of, tensors[:4], options)
        unlimited = pull(loss_of, tensors[:4], options | dict.fromkeys(clips, math.inf))
        columns = {"logp": tensors[0], "old": tensors[1], "gets": gets, "clipped": (gets != unlimited).int()}
        if len(tensors) > 4 and tensors[4] is not None:
            columns |= {"ref": tensors[4], "kl_gets": pull(loss_of, tensors, options) - gets}
        for i, row in enumerate(rows[i] for i in here):
            answer = self.rows[row]
            answer |= {name: numbers(x[i, : len(answer["ids"])]) for name, x in columns.items()}
            if "tool" in answer:  # whoever did not write a token has no log π_old of it, unless the loss counts it
                known = zip(answer["old"], answer["tool"], tensors[3][i].tolist(), strict=False)
                answer["old"] = [old if own or not tool else None for old, tool, own in known]

    def examples(self, own, n):
        """Some of this rank's examples of an SFT step, (ids, flags) each, n the sum of the step's flags; and the
        solutions of the watched problems, as far as the context holds them."""
        if not self.begin():
            return
        chosen, room = [own[i] for i in spread(len(own), self.config.record_groups)], self.run.model.config.context
        watched = [self.run.tokenizer.encode_chat(conversation(problem)) for problem in self.watched]
        watched = [(ids[:room], flags[:room]) for ids, flags in watched]
        groups, prompts = [], []
        for k, (ids, flags) in enumerate([*chosen, *watched]):
            first = next((i for i, flag in enumerate(flags) if flag and i), len(ids) - 1)  # before it, all is masked
            group = self.new_group("", "", watched=k >= len(chosen))
            weights = [float(flag) for flag in flags]
            group["answers"] = [{"ids": ids[first:], "weight": weights[first:]}]
            if not group["watched"]:
                group["answers"][0]["gets"] = numbers(torch.tensor(weights[first:], dtype=torch.float64) / (n or 1))
            groups.append(group)
            prompts.append(ids[:first])
        self.look_inside(groups, prompts)
        for group, prompt in zip(groups, prompts, strict=True):  # the masked prompt is shown too
            (answer,) = group["answers"]
            blank = {name: [None] * len(prompt) for name in answer if name != "weight"}
            blank |= {"ids": prompt, "weight": [0.0] * len(prompt)}
            group["answers"] = [{name: blank[name] + column for name, column in answer.items()}]
            self.spell(prompt)

    def pairs(self, own_pairs, z0=None):
        """Some of this rank's pairs (or judged answers) of a DPO step, and the watched ones, with log π and log π_ref
        of each token. z0: of kto."""
        if not self.begin():
            return
        chosen = [own_pairs[i] for i in spread(len(own_pairs), self.config.record_groups)]
        rows = chosen + self.watched
        sides, question_of = sides_of(rows[0]), self.question_of
        for k, row in enumerate(rows):
            group = self.new_group(question_of(row["prompt"]), "", watched=k >= len(chosen))
            labels = ["good" if row["good"] else "bad"] if "good" in row else sides
            group["answers"] = [
                {"ids": row[side], "label": label, "ended": self.ends(row[side])}
                for side, label in zip(sides, labels, strict=True)
            ]
        groups = self.record["groups"]
        self.look_inside(groups, [row["prompt"] for row in rows])
        if not finite_answers(groups):  # nor is the loss, and the stage says so
            self.record = None
            return
        micro = batch_of(rows, self.pad, self.run.dist.device)
        sums = [torch.tensor([sum(g["answers"][i]["logp"]) for g in groups]) for i in range(len(sides))]  # (b,) each
        sums = [x.to(self.run.dist.device).requires_grad_() for x in sums]
        loss, _ = self.loss_of(self.config, sums, micro, z0, n_pairs=self.config.batch)
        for i, gradient in enumerate(torch.autograd.grad(loss, sums)):
            for group, slope in zip(groups, gradient.tolist(), strict=True):
                answer = group["answers"][i]
                answer["log_ratio"] = short(sum(answer["logp"]) - sum(answer["ref"]))
                if not group["watched"]:
                    answer["gets"] = [short(-slope)] * len(answer["ids"])
        for group in groups if len(sides) == 2 else ():
            u, v = (answer["log_ratio"] for answer in group["answers"])
            group["difference"] = short(u - v)  # dpo.py's margin, h, is β times this

    def texts(self, texts, n_tokens):
        """Some groups of a distillation step's `support.taught.Texts`, and answers to the watched questions, with what
        student and teacher think at each token. n_tokens: of the step."""
        if not self.begin():
            return
        chosen, question_of = spread(len(texts.prompts), self.config.record_groups), self.question_of
        prompts, taught = ([some[g] for g in chosen] for some in (texts.prompts, texts.teacher_prompts))
        by_student = [texts.by_student[g] for g in chosen]
        for g, student in zip(chosen, by_student, strict=True):
            group = self.new_group(question_of(texts.prompts[g]), "")
            label = "by the student" if student else "by the teacher"
            group["answers"] = [{"ids": ids, "label": label, "ended": self.ends(ids)} for ids in texts.answers[g]]
        if self.watched:
            asked = self.ask()
            for g, problem in enumerate(asked.problems):
                self.add_group(asked, g, asked.rewards, watched=True)
                place = next(i for i, other in enumerate(self.watched) if other is problem)
                prompts.append(asked.prompts[g])
                taught.append(encode_prompt(self.run.tokenizer, self.taught[place]))
        self.look_inside(self.record["groups"], prompts, taught)
        if self.config.loss == "sample" and finite_answers(self.record["groups"]):
            for group, student in zip(self.record["groups"], by_student, strict=False):  # the watched ones come last
                for answer in group["answers"]:
                    logp, ref = (torch.tensor(answer[name])[None] for name in ("logp", "ref"))  # (1, T)
                    own = torch.ones_like(logp), torch.tensor([student])
                    options = {"gamma": self.config.gamma, "n_tokens": n_tokens}
                    answer["gets"] = numbers(pull(self.loss_of, (logp, ref, *own), options)[0])

    # Parts of the above.

    def ask(self):
        """The answers to the watched questions, judged: a Batch. It is step 0 of the sampler at every recording."""
        asked = self.sample(0, range(len(self.watched)))
        self.judge(asked)
        if self.score:
            asked.rewards["score"] = self.score(asked)
        return asked

    def learns(self, group):
        """Whether the update computes log π_ref of a group of this batch: it has a gradient, and there is a KL."""
        counted = not getattr(self.config, "mask_truncated", False) or any(a["ended"] for a in group["answers"])
        return bool(getattr(self.config, "beta", None)) and counted and any(a["advantage"] for a in group["answers"])

    def question_of(self, prompt):
        """A prompt's ids as text, without the marks of the chat template; of a longer one with the speakers."""
        text = self.run.tokenizer.decode(prompt)
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.S)
        return "\n".join(f"{role}: {content}" if len(turns) > 1 else content for role, content in turns) or text

    def ends(self, ids):
        return ids[-1] in self.run.tokenizer.stop_ids

    def new_group(self, question, answer, watched=False):
        self.record["groups"].append({"question": question, "answer": answer, "watched": watched, "answers": []})
        return self.record["groups"][-1]

    def add_group(self, batch, g, rewards, advantages=None, watched=False):
        """Group g of a Batch. rewards {name: (n, R)}, of which "correct" is left out where the problem has no answer to
        check; advantages (R,)."""
        problem, R = batch.problems[g], batch.ended.shape[1]
        rewards = {name: values[g] for name, values in rewards.items() if name != "correct" or problem.answer}
        group = self.new_group(problem.question, problem.answer, watched)
        for r in range(R):
            answer = {"ids": batch.answers[g][r], "ended": bool(batch.ended[g, r])}
            answer["rewards"] = {name: short(values[r].item()) for name, values in rewards.items()}
            if getattr(batch.rollout, "written", None) is not None:  # agent.py's tools
                answer["tool"] = numbers(batch.rollout.written[g * R + r, : len(answer["ids"])].int())
            if advantages is not None:
                answer["advantage"] = short(advantages[r].item())
            group["answers"].append(answer)
        return group

    def spell(self, ids):
        """Put these ids into the record's vocabulary."""
        for token in ids:
            if token not in self.record["vocab"]:
                try:
                    text = self.run.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
                except TokenizerError:  # an embedding may be padded
                    text = f"<id {token}>"
                self.record["vocab"][token] = text

    @torch.no_grad()
    def look_inside(self, groups, prompts, taught=None, refer=True):
        """Add what the policy, before this step's update, thinks of each token: "logp", "entropy", "top" (TOP times id
        and probability), and with a reference, unless `refer` is false, "ref", its log π. taught: the prompts as a
        teacher reads them; then also "divergence", "kl", "forward_kl" and "ref_top"."""
        for answer in (answer for group in groups for answer in group["answers"]):
            self.spell(answer["ids"])
        if not self.looks_inside:
            return
        policy, V, device = self.run.model, self.run.model.config.vocab_size, self.run.dist.device
        training = policy.training
        policy.eval()
        for some in portions(groups, LARGEST // V):
            answers = [group_answers for _, group_answers in some]
            log_p = self.distributions(policy, [prompts[g] for g, _ in some], answers)  # (k, T, V)
            columns = {"entropy": -(log_p.exp() * log_p).sum(-1)}
            T = log_p.shape[1]
            ids = [a["ids"] + [0] * (T - len(a["ids"])) for group_answers in answers for a in group_answers]
            ids = torch.tensor(ids, device=device)[..., None]  # (k, T, 1)
            columns |= {"logp": log_p.gather(2, ids)[..., 0], "top": log_p.topk(min(TOP, V), dim=-1)}
            if self.reference is not None and refer:
                log_r = self.reference_distributions([(taught or prompts)[g] for g, _ in some], answers, taught)
                log_r = log_r[..., :V]  # a teacher's embedding may be padded further
                columns["ref"] = log_r.gather(2, ids)[..., 0]
                if taught is not None:
                    columns["kl"] = (log_p.exp() * (log_p - log_r)).sum(-1).clamp(min=0)  # rounding
                    columns["forward_kl"] = (log_r.exp() * (log_r - log_p)).sum(-1).clamp(min=0)
                    columns["ref_top"] = log_r.topk(min(TOP, V), dim=-1)
                    if self.config.loss == "vocabulary":
                        columns["divergence"] = self.loss_of(log_p, log_r, self.config.beta)
            self.fill([a for group_answers in answers for a in group_answers], columns)
        policy.train(training)

    def fill(self, answers, columns):
        """columns: {name: (k, T) of these k answers, or what topk returns}."""
        for name, x in columns.items():
            for k, answer in enumerate(answers):
                length = len(answer["ids"])
                if not name.endswith("top"):
                    answer[name] = numbers(x[k, :length])
                    continue
                ids, probs = x.indices[k, :length].tolist(), x.values[k, :length].exp().tolist()
                answer[name] = [
                    [y for i, p in zip(*both, strict=True) for y in (i, float(f"{p:.3g}"))]
                    for both in zip(ids, probs, strict=True)
                ]
                for row in ids:
                    self.spell(row)

    def distributions(self, model, prompts, answers):
        """log π at each token of the answers, one list to a prompt -> (k, T, V) in fp32."""
        packed = pack(prompts, [[a["ids"] for a in some] for some in answers], self.pad).to(self.run.dist.device)
        with self.autocast():
            logits = shared_answer_logits(model, packed)
        return (logits.float() / self.temperature).log_softmax(-1)

    def reference_distributions(self, prompts, answers, taught):
        reference, device = self.reference, self.run.dist.device
        home = next(reference.parameters()).device  # dpo.py keeps its start in the CPU's memory
        with nullcontext() if taught is not None else lora_off(self.run.model):  # a teacher keeps its adapters
            log_r = self.distributions(reference.to(device), prompts, answers)
        reference.to(home)
        return log_r


def verdicts(batch):
    """Set the rewards of a Batch to the verifier's: {"correct": (n, R)}."""
    R = batch.ended.shape[1]
    right = [float(is_correct(text, batch.problems[k // R])) for k, text in enumerate(batch.texts)]
    batch.rewards = {"correct": torch.tensor(right).view(-1, R)}


def pull(loss_of, tensors, options):
    """−∂loss/∂log π of each token, (b, T). tensors: log π, and what else the loss takes."""
    with torch.enable_grad():
        leaf = tensors[0].detach().clone().requires_grad_()
        loss, _ = loss_of(leaf, *tensors[1:], **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return 0.0 - gradient  # −gradient would turn 0 into −0


def spread(n, count):
    """At most `count` of 0 … n − 1, evenly spread."""
    count = min(n, count)
    return [(2 * i + 1) * n // (2 * count) for i in range(count)]


def portions(groups, room):
    """The groups' answers in portions of about `room` tokens, padding counted: [(index of the group, answers), …]."""
    portion, height, width = [], 0, 0
    for g, group in enumerate(groups):
        rest = group["answers"]
        while rest:
            longest = max(len(answer["ids"]) for answer in rest)
            taken = max(1, min(len(rest), room // longest))
            wider = max(width, longest)
            if portion and (height + taken) * wider > room:
                yield portion
                portion, height, wider = [], 0, longest
            portion.append((g, rest[:taken]))
            height, width, rest = height + taken, wider, rest[taken:]
    if portion:
        yield portion


def short(x):
    """Five digits, which a page can do with; None if it is not a number."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def finite_answers(groups):
    """Whether log π and log π_ref of all tokens of the answers are numbers."""
    answers = [answer for group in groups for answer in group["answers"]]
    return not any(None in answer.get("logp", []) + answer.get("ref", []) for answer in answers)


def numbers(x):
    """A tensor (T,) -> its numbers, short."""
    return x.tolist() if x.dtype in (torch.int32, torch.bool) else [short(value) for value in x.tolist()]


# ---------------------------------------------------------------------------------------------------------------
# The file: one gzip member per line of JSON, so that a line can be appended. The first line is the header.


def packed_line(x):
    return gzip.compress((to_json(x) + "\n").encode("ascii"), compresslevel=6, mtime=0)


def start_file(path, run):
    """A new file, or of a run that is resumed its file with the settings of now, without the records of later steps."""
    about = (type(run.config).__doc__ or "").partition("\n")[0].partition(". ")[0].rstrip(".")
    header = {"about": about, "config": asdict(run.config)}
    lines = list(lines_of(path)) if run.first and path.is_file() else []
    kept = [line for line in lines if "groups" in line and line["step"] <= run.first]
    write_whole(path, b"".join(map(packed_line, [header, *kept])))


def lines_of(path):
    """The lines of the file, each a dict, up to where it breaks off: a process may be killed while it writes."""
    rest = Path(path).read_bytes()
    while rest:
        reader = zlib.decompressobj(wbits=31)  # gzip
        try:
            line = loads(reader.decompress(rest))
        except (zlib.error, ValueError, RecursionError):
            return
        if not reader.eof or not isinstance(line, dict):
            return
        yield line
        rest = reader.unused_data


def read_recording(run_dir):
    """-> header, [record, …] in order of the steps. DataError if there is nothing to read."""
    path = Path(run_dir) / FILE
    if not Path(run_dir).is_dir():
        raise DataError(f"{run_dir} is no run directory")
    if not path.is_file():
        raise DataError(f"{run_dir} holds no {FILE}: grpo, gdpo, agent, ppo, dpo, sft and distill write one")
    lines = list(lines_of(path))
    if not lines or "about" not in lines[0] or not isinstance(lines[0].get("config"), dict):
        raise DataError(f"{path} cannot be read: it does not begin as a record does")
    return lines[0], [line for line in lines[1:] if line.keys() >= {"step", "vocab", "groups"}]
