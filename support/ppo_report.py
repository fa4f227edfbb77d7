"""What a PPO step logs and shows, and what its run prints and draws at the end."""

from dataclasses import dataclass

import torch

from evaluate import evaluate, kl_estimate
from lora import merged
from support.answers import verifiable
from support.devices import in_float64
from support.held_out import add_figures, before_and_after, logged, metric_panels
from support.plots import draw_curves


@dataclass
class Tokens:
    """What was known of each token before the update, (n·R, T) each."""

    mask: torch.Tensor
    logprobs: torch.Tensor  # log π_old
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    returns: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor  # before they are whitened

    def sums(self):
        """Over this rank's tokens."""
        mask, logprobs, ref = self.mask, self.logprobs, self.ref_logprobs
        error, goal = (in_float64(x * mask) for x in (self.returns - self.values, self.returns))
        return {
            "tokens": mask.sum(),
            "kl": (kl_estimate(logprobs, ref, "k1") * mask).sum(),
            "kl3": (kl_estimate(logprobs, ref, "k3") * mask).sum(),
            "entropy": -(logprobs * mask).sum(),  # E[−log π], by the samples
            "value": (self.values * mask).sum(),
            "error": error.sum(),
            "error²": (error**2).sum(),
            "goal": goal.sum(),
            "goal²": (goal**2).sum(),
        }


class Look:
    """What a run shows beside its steps: before(), then record() and at_step() of each, after(). judged: {"correct",
    "score", "paid", "final"}, (n, R) each."""

    def __init__(self, run, problems):
        self.run, self.problems = run, problems
        self.checked = verifiable(problems["valid"])  # else there are no answers to check, and the latest is the best
        self.shown = {}

    def measure(self, split):
        """The figures of greedy answers to the problems of a split."""
        run = self.run
        with merged(run.model):
            result = evaluate(run.model, run.tokenizer, self.problems[split], run.config.max_new_tokens, run.dist)
        return {name: value for name, value in result.items() if name != "samples"}

    def before(self, init, judge):
        """The test split, the validation split as step 0, and best/, unless an earlier part of the run has done it; and
        the line before the first step."""
        run, state = self.run, self.run.state
        if state.before is None:
            state.before = self.measure("test")
            state.start = logged(self.measure("valid"))
            state.best = state.start["accuracy"]
            run.save("best")  # until something beats it, the start is the best
        if run.first == 0:  # a run that was stopped before its first step has not kept it
            run.log(0, **state.start)
        self.shown = state.start or {"accuracy": state.best}  # older runs kept the accuracy alone
        if run.dist.is_main:
            accuracy, n_prompts = f"{state.before['accuracy']:.1%}", len(self.problems["train"])
            print(
                f"{run.model.num_params():,} parameters from {init}, rewards from {judge}; "
                f"{n_prompts:,} training prompts; test accuracy before: {accuracy}"
            )

    def record(self, batch, judged, tokens):
        """A step's record: means over all ranks' answers or tokens."""
        totals = {name: judged[name].sum() for name in ("correct", "score", "paid")}
        # paid less the KL penalty: before the baseline
        totals["reward"] = tokens.rewards.sum() + (judged["paid"] - judged["final"]).sum()
        totals["missing_end"] = batch.ended.logical_not().sum()
        config = self.run.config
        n_answers = config.prompts * config.rollouts
        return step_record(totals | tokens.sums(), n_answers, self.run.state.beta, self.run.dist)

    def at_step(self, record, batch, judged, tokens):
        """Log the step; every so often answer validation problems, and show rollouts."""
        run, step = self.run, self.run.done
        if run.due(run.config.eval_every):
            self.shown = logged(self.measure("valid"))
            add_figures(record, self.shown)
            run.keep_best(self.shown["accuracy"] if self.checked else step + 1)
        run.log(step + 1, **record)
        if run.dist.is_main and (step == 0 or (step + 1) % run.config.sample_every == 0):
            show_samples(run, batch, judged["score"], judged["correct"].flatten(), tokens.advantages, tokens.values)
        brief = {"score": f"{record['score']:.2f}", "kl": f"{record['kl']:.3f}"}
        brief |= {"correct": f"{record['correct']:.1%}", "accuracy": f"{self.shown['accuracy']:.1%}"}
        run.bar.set_postfix(brief, refresh=False)

    def after(self):
        """The test split again: {"before", "after", "seconds", "path"}."""
        run = self.run
        after = self.measure("test")
        if run.dist.is_main:
            report(run.config, run, after)
        return {"before": run.state.before, "after": after, "seconds": run.seconds, "path": str(run.path / "last")}


def step_record(totals, n_answers, beta, dist):
    """Sums of each rank -> means over all ranks' answers or tokens, for the log."""
    totals = dict(zip(totals, dist.sum(*totals.values()), strict=True))
    n_tokens = totals["tokens"]
    per_answer = {name: total / n_answers for name, total in totals.items()}
    per_token = {name: total / n_tokens for name, total in totals.items()}
    # variances over the tokens: of what the values missed, and of what they were to guess
    missed, spread = (per_token[f"{x}²"] - per_token[x] ** 2 for x in ("error", "goal"))
    return {
        **{name: per_answer[name] for name in ("correct", "score", "paid", "reward", "missing_end")},
        "reward_kl": -beta * totals["kl"] / n_answers,
        "kl": per_token["kl3"],
        "kl_per_answer": per_answer["kl"],  # what β is adapted to; may be negative by chance
        "kl_beta": beta,
        "entropy": per_token["entropy"],
        "length": per_answer["tokens"],
        "value": per_token["value"],
        "explained_variance": 1 - missed / max(spread, 1e-12),
    }


def show_samples(run, batch, scores, right, advantages, values):
    """The rollouts of the highest and of the lowest score, with the verifier's judgement; and how scores (n, R),
    advantages and values (n·R, T) are distributed, for the trackers."""
    step, R = run.done + 1, scores.shape[1]
    lines = [f"step {step}"]
    for row in dict.fromkeys((scores.argmax().item(), scores.argmin().item())):
        problem, verdict = batch.problems[row // R], "right" if right[row] else "wrong"
        lines.append(f"  [score {scores.flatten()[row]:.2f}, {verdict}] {problem.question} (answer {problem.answer})")
        lines.append(f"    {batch.texts[row]!r}")
    run.say("\n".join(lines))
    run.log.samples(step, "\n".join(lines))
    mask = batch.rollout.mask
    run.log.show(step, histograms={"scores": scores, "advantages": advantages[mask], "values": values[mask]})


def report(config, run, after):
    """The table of before and after, and the curves."""
    before = run.state.before
    before_and_after(before, after, config.steps, run.seconds)
    draw_curves(
        run.path,
        f"PPO on {config.data}, seed {config.seed}: accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}",
        [
            ("right, and held out", {"correct": "rollouts", "accuracy": "validation"}, "share correct", {}),
            *metric_panels(without=("accuracy",)),
            ("the reward model", {"score": "score", "reward": "less fines and KL"}, "per answer", {}),
            ("entropy and KL", {"entropy": "entropy", "kl": "KL to the start"}, "nats per token", {}),
            ("value", {"explained_variance": "explained variance", "value_loss": "loss"}, "share; loss", {}),
            ("ratio ρ", {"ratio_spread": "mean |ρ − 1|", "clip_fraction": "share clipped"}, "", {}),
            ("completion length", {"length": "mean"}, "tokens", {}),
            ("gradient norm", {"grad_norm": "policy", "grad_norm_value": "value"}, "before clipping", {}),
        ],
    )
    print(f"{run.path}/last, {run.path}/best, {run.path}/curves.png, {run.path}/samples.md")
