"""What a PPO step logs and shows, and what its run prints and draws at the end."""

import time
from dataclasses import dataclass

import torch

from evaluate import evaluate, kl_estimate
from lora import merged
from support.answers import verifiable
from support.devices import in_float64
from support.held_out import accuracies, add_figures, before_and_after, logged, metric_panels, not_measured
from support.plots import draw_curves


@dataclass
class Tokens:
    """What was known of each token before the update, (n·R, T) each."""

    mask: torch.Tensor
    logprobs: torch.Tensor  # log π_old
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    targets: torch.Tensor  # of the values
    rewards: torch.Tensor
    advantages: torch.Tensor  # before they are whitened

    def sums(self):
        """Over this rank's tokens."""
        mask, logprobs, ref = self.mask, self.logprobs, self.ref_logprobs
        error, goal = (in_float64(x * mask) for x in (self.targets - self.values, self.targets))
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


def tally(sums, metrics, share):
    """Add a piece's metrics to the `sums` of its minibatch, in place. share: of the minibatch's tokens, those of the
    piece. A loss is a sum over tokens already, the others are means."""
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value * (1 if name.endswith("_loss") else share)


class Look:
    """What a run shows beside its steps: before(); of each step begin_step(), sampled(), minibatch() and updated() of
    its minibatches, at_step(); after()."""

    def __init__(self, run, problems):
        self.run, self.problems = run, problems
        self.checked = verifiable(problems["valid"])  # else there are no answers to check, and the latest is the best
        self.shown = {}
        self.began = self.rollout_done = 0.0  # of the step
        self.minibatches = []  # its figures of each

    def begin_step(self):
        self.began, self.minibatches = time.perf_counter(), []

    def sampled(self):
        """The step's answers are there, and judged."""
        self.rollout_done = time.perf_counter()

    def minibatch(self, sums, lr):
        """What `tally` has added up -> {metric: over the minibatch's tokens on all ranks}. DivergedError on a loss that
        is not finite: that is a failure, not an overflow that the scaler skips."""
        figures = dict(zip(sums, self.run.dist.sum(*sums.values()), strict=True))
        losses = {name: figures[name] for name in ("policy_loss", "value_loss")}
        self.run.check_finite(lr, advice="try a smaller --lr, or --dtype fp32", **losses)
        self.minibatches.append(figures)
        return figures

    def updated(self, norm, value_norm):
        """The latest minibatch was an optimizer step; --stop_kl did not drop it."""
        self.minibatches[-1] |= {"grad_norm": norm, "grad_norm_value": value_norm}

    def measure(self, split):
        """The figures of greedy answers to the problems of a split."""
        run = self.run
        with merged(run.model):
            answering = run.tokenizer, self.problems[split], run.config.max_new_tokens, run.dist
            result = evaluate(run.model, *answering, dtype=run.config.dtype)
        return {name: value for name, value in result.items() if name != "answers"}

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
        self.shown = state.start
        if run.dist.is_main:
            measured, n_prompts = "accuracy" not in not_measured(self.problems["test"]), len(self.problems["train"])
            print(
                f"{run.model.num_params():,} parameters from {init}, rewards from {judge}; "
                f"{n_prompts:,} training prompts"
                + (f"; test accuracy before: {state.before['accuracy']:.1%}" if measured else "")
            )

    def record(self, batch, judged, final, tokens, beta):
        """Of a step: means over all ranks' answers or tokens. As in `at_step`."""
        totals = {name: judged[name].sum() for name in ("correct", "score", "paid")}
        # paid less the KL penalty: before the baseline
        totals["reward"] = tokens.rewards.sum() + (judged["paid"] - final).sum()
        totals["missing_end"] = batch.ended.logical_not().sum()
        totals["checked"] = batch.ended.shape[1] * sum(bool(problem.answer) for problem in batch.problems)
        config = self.run.config
        return step_record(totals | tokens.sums(), config.prompts * config.rollouts, beta, self.run.dist)

    def at_step(self, batch, judged, final, tokens, beta, lr):
        """Log the step; every so often answer validation problems, and show rollouts.

        judged: {"correct", "score", "paid"}, (n, R) each, as final; beta: the weight of the KL penalty in the rewards.
        The figures of the update are means over the minibatches, the one that --stop_kl dropped too; `updates` and the
        gradient norms are of those that were an optimizer step.
        """
        run, step = self.run, self.run.done
        record = self.record(batch, judged, final, tokens, beta) | means(self.minibatches)
        record["updates"] = sum("grad_norm" in figures for figures in self.minibatches)
        record |= {"lr": lr, "seconds_rollout": self.rollout_done - self.began}
        record["steps_per_second"] = 1 / (time.perf_counter() - self.began)
        if not record["updates"]:
            kl, limit = self.minibatches[0]["approx_kl3"], f"--stop_kl {run.config.stop_kl:g}"
            run.say(
                f"step {step + 1} trained nothing: before any update the KL to the sampling policy is {kl:.3g} nats "
                f"per token, above {limit}, as sampler and loss round differently: try --dtype fp32"
            )
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
            report(run.config, run, after, not_measured(self.problems["test"]))
        return {"before": run.state.before, "after": after, "seconds": run.seconds, "path": str(run.path / "last")}


def means(of_minibatches):
    """[{metric: number}] -> {metric: its mean over those that have it}."""
    names = dict.fromkeys(name for figures in of_minibatches for name in figures)
    columns = {name: [figures[name] for figures in of_minibatches if name in figures] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def step_record(totals, n_answers, beta, dist):
    """Sums of each rank -> means over all ranks' answers or tokens, for the log."""
    totals = dict(zip(totals, dist.sum(*totals.values()), strict=True))
    n_tokens = totals["tokens"]
    per_answer = {name: total / n_answers for name, total in totals.items()}
    per_token = {name: total / n_tokens for name, total in totals.items()}
    # variances over the tokens: of what the values missed, and of what they were to guess
    missed, spread = (per_token[f"{x}²"] - per_token[x] ** 2 for x in ("error", "goal"))
    return {
        "correct": totals["correct"] / max(1, totals["checked"]),  # of those that have an answer to check
        **{name: per_answer[name] for name in ("score", "paid", "reward", "missing_end")},
        "reward_kl": -beta * totals["kl"] / n_answers,
        "kl": per_token["kl3"],
        "kl_per_answer": per_answer["kl"],  # what β is adapted to; may be negative by chance
        "beta": beta,
        "entropy": per_token["entropy"],
        "length": per_answer["tokens"],
        "value": per_token["value"],
        "explained_variance": 1 - missed / max(spread, 1e-12),
    }


def show_samples(run, batch, scores, right, advantages, values):
    """The rollouts of the highest and of the lowest score, with the verifier's judgement where there is an answer to
    check; and how scores (n, R), advantages and values (n·R, T) are distributed, for the trackers."""
    step, R = run.done + 1, scores.shape[1]
    lines = [f"step {step}"]
    for row in dict.fromkeys((scores.argmax().item(), scores.argmin().item())):
        problem, score = batch.problems[row // R], f"score {scores.flatten()[row]:.2f}"
        if problem.answer:
            verdict = "right" if right[row] else "wrong"
            lines.append(f"  [{score}, {verdict}] {problem.question} (answer {problem.answer})")
        else:
            lines.append(f"  [{score}] {problem.question}")
        lines.append(f"    {batch.texts[row]!r}")
    run.say("\n".join(lines))
    run.log.samples(step, "\n".join(lines))
    mask = batch.rollout.mask
    run.log.show(step, histograms={"scores": scores, "advantages": advantages[mask], "values": values[mask]})


def report(config, run, after, without=()):
    """The table of before and after, and the curves. without: `not_measured`."""
    before = run.state.before
    before_and_after(before, after, config.steps, run.seconds, without=without)
    right = ("right, and held out", {"correct": "rollouts", "accuracy": "validation"}, "share correct", {})
    draw_curves(
        run.path,
        f"PPO on {config.data}, seed {config.seed}{accuracies(before, after, without)}",
        [
            *([] if without else [right]),
            *metric_panels(without=("accuracy",)),
            ("the reward model", {"score": "score", "reward": "less missing_end, KL"}, "per answer", {}),
            ("entropy and KL", {"entropy": "entropy", "kl": "KL to the start"}, "nats per token", {}),
            ("value", {"explained_variance": "explained variance", "value_loss": "loss"}, "share; loss", {}),
            ("ratio ρ", {"ratio_spread": "mean |ρ − 1|", "clip_fraction": "share clipped"}, "", {}),
            ("completion length", {"length": "mean"}, "tokens", {}),
            ("gradient norm", {"grad_norm": "policy", "grad_norm_value": "value"}, "before clipping", {}),
        ],
    )
    print(f"{run.path}/last, {run.path}/best, {run.path}/curves.png, {run.path}/samples.md")
