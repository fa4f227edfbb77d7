"""What a GRPO step logs, and what its run measures, prints and draws before, between and after its steps."""

import time
from contextlib import nullcontext

import torch

from data import encode_prompt
from support.checkpoints import open_checkpoint
from support.devices import precision
from support.held_out import accuracies, add_figures, before_and_after, metric_panels, not_measured
from support.plots import draw_curves
from support.questions import measure_test, validate
from support.rollouts import show_samples
from support.sampled_kl import sampled_kl
from support.sharding import whole
from support.tables import sample_rows

SAMPLER = {
    "sampler_kl": "KL(sampler ‖ trainer)",
    "sampler_limited": "share truncated or masked",
}  # of a step's rollouts


def rollout_sums(batch, paid, weights, has_signal):
    """Sums over this rank's answers, before any refill: {metric: number}. `step_record` divides each by the number of
    answers. paid (n, R, M): of `paid_rewards`; has_signal (n,) bool: groups with an advantage that is not 0."""
    mask, logprobs = batch.rollout.mask, batch.rollout.logprobs  # (n·R, T)
    return {
        "reward": sum(w * paid[..., m].sum() for m, w in enumerate(weights.values())),
        **{f"reward_{name}": values.sum() for name, values in batch.rewards.items()},
        "truncated": batch.ended.logical_not().sum(),
        "zero_variance": has_signal.logical_not().sum(),
        "length": mask.sum(),
        "entropy": -(logprobs * mask).sum(),  # E[−log π], by the samples
    }


def tally(sums, metrics, n_tokens):
    """Add a piece's metrics to `sums`, in place: the loss is a sum over pieces, the others means over its tokens."""
    sums["n_trained"] = sums.get("n_trained", 0) + n_tokens
    sums["ratio_max"] = max(sums.get("ratio_max", 0.0), metrics.pop("ratio_max"))
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value * (1 if name == "loss" else n_tokens)


def step_record(figures, sums, n_updates, config, dist):
    """The record of a step, means over all ranks; of ratio_max the largest. figures: what `rollout_sums` counted; sums:
    over the tokens trained on."""
    means = [name for name in ("kl", "clip_fraction", "ratio_spread") if name in sums]
    values = [*figures.values(), *(sums[k] for k in means), sums.get("n_trained", 0), sums.get("loss", 0.0)]
    *values, n_trained, loss = dist.sum(*values)
    total = dict(zip([*figures, *means], values, strict=True))
    record = {name: total[name] / (config.prompts * config.rollouts) for name in figures}
    record["entropy"] = total["entropy"] / total["length"]  # per token, not per completion
    record["zero_variance"] = total["zero_variance"] / config.prompts
    if n_trained:
        record |= {name: total[name] / n_trained for name in means}
        record["ratio_max"] = dist.gather(torch.tensor([sums["ratio_max"]])).max().item()
    return record | {"loss": loss / max(1, n_updates)}


def distinct(values):
    """The number of different entries in each group, to 3 decimals: (N, R) or (N, R, M) -> (N,)."""
    return torch.tensor([len(torch.unique(group.round(decimals=3), dim=0)) for group in values])


def collapse(methods, rewards):
    """{method: its advantages (N, R)}, of the same rewards (N, R, M) -> {metric: number}: how much each method keeps of
    the differences between answers. values_…: distinct advantages in the batch. collapsed_…: the share of groups in
    which answers with different rewards get the same advantage."""
    figures = {}
    for name, advantages in methods.items():
        lost = distinct(advantages) < distinct(rewards)  # (N,)
        figures[f"values_{name}"] = distinct(advantages.flatten()[None]).item()
        figures[f"collapsed_{name}"] = lost.float().mean().item()
    return figures


class Look:
    """What a run shows beside its steps: before(), at_step() each, after(). begin_step() and sampled(), where they are
    called, time a step. init: the checkpoint that it began from. respond: what answers the prompts, as in `Sampler`.
    reference: the model that the KL is paid to, at first that of `init`.
    """

    def __init__(self, run, problems, functions, reward_weights, init, respond, reference):
        self.run, self.problems, self.init, self.respond, self.reference = run, problems, init, respond, reference
        self.functions, self.reward_weights = functions, reward_weights
        self.record, self.kl, self.warned = {}, 0.0, False  # the last record, and the last KL that was measured
        self.began = self.answered = None  # time.perf_counter() of the current step

    def validate(self):
        """What is logged of greedy answers to the validation questions, and the number by which best/ is chosen."""
        run, rewards = self.run, (self.functions, self.reward_weights)
        return validate(run.model, run.tokenizer, self.problems, *rewards, run.config, run.dist, self.respond)

    def test(self):
        run = self.run
        return measure_test(run.model, run.tokenizer, self.problems, run.config, run.dist, self.respond)

    def before(self):
        """The test split, `run.state.before`; the validation split, `run.state.start`, logged as step 0; and best/, the
        start itself. A resumed run knows them."""
        run = self.run
        if run.state.before is None:
            run.state.before = self.test()
            run.state.start, run.state.best = self.validate()
            run.save("best")  # until something beats it, the start is the best
        if run.first == 0:  # a run that was stopped before its first step has not kept it
            run.log(0, **run.state.start)
        if run.dist.is_main:
            measured, n_prompts = "accuracy" not in not_measured(self.problems["test"]), len(self.problems["train"])
            print(
                f"{run.model.num_params():,} parameters from {self.init}; {n_prompts:,} training prompts"
                + (f"; test accuracy before: {run.state.before['accuracy']:.1%}" if measured else "")
            )
        self.shown = run.state.start

    def begin_step(self):
        self.began = time.perf_counter()

    def sampled(self):
        """The step's rollouts are there, and judged."""
        self.answered = time.perf_counter()

    def at_step(self, record, batch, total, norm, lr):
        """Log a step's record, with validation figures if they are due; every so often show samples. total (n, R): what
        the answers of the batch earned; norm: the gradient's, in the last minibatch. DivergedError on a NaN."""
        run, config = self.run, self.run.config
        step = run.done + 1
        # A NaN here is a failure, not a skipped fp16 overflow. A step without a signal has an entropy, but no loss.
        advice = "try a smaller --lr, or --dtype fp32"
        run.check_finite(lr, norm, advice, loss=record["loss"], entropy=record["entropy"])
        record = record | {"grad_norm": norm, "lr": lr}
        if self.began is not None:
            record["seconds_rollout"] = self.answered - self.began
            record["steps_per_second"] = 1 / (time.perf_counter() - self.began)
        if run.due(config.eval_every):
            self.shown, chosen_by = self.validate()
            add_figures(record, self.shown)
            run.keep_best(chosen_by)
            self.warned = self.warned or warn_of_collapse(run, self.shown["accuracy"])
        run.log(step, **record)
        if run.dist.is_main and (step == 1 or step % config.sample_every == 0):
            show_samples(run, batch, total)
        self.record, self.kl = record, record.get("kl", self.kl)
        brief = {"kl": f"{self.kl:.3f}", "length": f"{record['length']:.0f}"}
        brief |= {name: f"{value:.3f}" for name, value in self.shown.items()}
        run.bar.set_postfix(reward=f"{record['reward']:.2f}", **brief, refresh=False)

    def after(self):
        """The test split again, and the KL to the start: {"before", "after", "kl", "seconds", "path"}."""
        run, config, dist = self.run, self.run.config, self.run.dist
        after, policy = self.test(), run.model
        start = policy if config.lora.rank else self.reference  # the policy: sampled_kl turns its adapters off
        if config.refresh_reference and not config.lora.rank:  # the reference has moved
            start = open_checkpoint(self.init, dist.device)[0].eval()
        prompts = [encode_prompt(run.tokenizer, p) for p in self.problems["test"][:200]]
        sizes = config.max_new_tokens, dist, config.seed, config.micro_batch
        # FSDP gathers the blocks in the run's precision; any other run measures its KL in fp32.
        autocast = precision(config.dtype, dist)[0] if config.fsdp else nullcontext
        with whole(policy), whole(start), autocast():
            kl = sampled_kl(policy, start, run.tokenizer, prompts, *sizes, respond=self.respond)
        if dist.is_main:
            report(run, after, kl, self.reward_weights, self.record, not_measured(self.problems["test"]))
        results = {"before": run.state.before, "after": after, "kl": kl}
        return results | {"seconds": run.seconds, "path": str(run.path / "last")}


def warn_of_collapse(run, accuracy):
    """Whether the validation accuracy has fallen far below where it began, which is said."""
    began = run.state.start["accuracy"]
    if accuracy >= began - 0.1:
        return False
    run.say(
        f"WARNING: validation accuracy fell from {began:.1%} to {accuracy:.1%}: the policy is collapsing. Try a "
        f"smaller --lr than {run.config.lr:g}, or a larger --beta; best/ keeps the best."
    )
    return True


def report(run, after, kl, weights, record, without=()):
    """The table of before and after, and the curves. record: of the last step; without: `not_measured`."""
    config, before = run.config, run.state.before
    n, checked = config.pass_samples, "accuracy" not in without
    rows = [["KL to the start, nats per token", f"{0:.4f}", f"{kl:.4f}"]]
    rows += sample_rows([before, after]) if checked else []
    pairs = list(zip(before["solved"], after["solved"], strict=True))
    note = (
        f"pass@k: {n} samples of each of {len(pairs)} problems, of which "
        f"{sum(a > 0 and not b for b, a in pairs)} were never solved before and are now, "
        f"{sum(b > 0 and not a for b, a in pairs)} the other way round"
    )
    before_and_after(before, after, config.steps, run.seconds, rows, [note] * checked, without=without)
    drawn = {f"reward_{name}": name for name in weights}
    lost = {"zero_variance": "no signal"} | {name: name.replace("_", " by ") for name in record if "collapsed" in name}
    draw_curves(
        run.path,
        f"{config.data}, seed {config.seed}{accuracies(before, after, without)}",
        [
            *metric_panels(without=without),
            ("rewards", drawn, "mean over rollouts", {}),
            ("entropy and KL", {"entropy": "entropy", "kl": "KL to the reference"}, "nats per token", {}),
            ("ratio ρ", {"ratio_spread": "mean |ρ − 1|", "clip_fraction": "share clipped"}, "", {}),
            ("completion length", {"length": "mean"}, "tokens", {}),
            ("tool calls", {"calls": "calls", "call_errors": "answered by an error"}, "per rollout", {}),
            ("sampler and trainer", SAMPLER, "", {}),
            ("groups without a signal", lost, "share of groups", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    print(f"{run.path}/last, {run.path}/best, {run.path}/curves.png, {run.path}/samples.md")
