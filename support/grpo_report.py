"""What a GRPO step logs, and what its run prints and draws at the end."""

from evaluate import before_and_after, metric_panels, pass_at_k
from support.plots import draw_curves

SAMPLER = {
    "sampler_kl": "KL(sampler ‖ trainer)",
    "sampler_limited": "share truncated or masked",
}  # of a step's rollouts


def rollout_sums(batch, paid, weights, has_signal):
    """Sums over this rank's completions, of the policy as it is: {metric: number}; a further row is logged as a mean
    over the completions. paid (n, R, M): see `grpo.paid_rewards`; has_signal (n,) bool: groups whose rewards differ."""
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
    """The record of a step, means over all ranks, but ratio_max: this rank's. figures: what `rollout_sums` counted;
    sums: over the tokens trained on."""
    means = [name for name in ("kl", "clip_fraction", "ratio_spread") if name in sums]
    values = [*figures.values(), *(sums[k] for k in means), sums.get("n_trained", 0), sums.get("loss", 0.0)]
    *values, n_trained, loss = dist.sum(*values)
    total = dict(zip([*figures, *means], values, strict=True))
    record = {name: total[name] / (config.prompts * config.rollouts) for name in figures}
    record["entropy"] = total["entropy"] / total["length"]  # per token, not per completion
    record["zero_variance"] = total["zero_variance"] / config.prompts
    if n_trained:
        record |= {name: total[name] / n_trained for name in means} | {"ratio_max": sums["ratio_max"]}
    return record | {"loss": loss / max(1, n_updates)}


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


def report(config, run, after, kl, weights, extra):
    """The table of before and after, and the curves."""
    n, before = config.pass_samples, run.state.before
    rows = [["KL to the start, nats per token", f"{0:.4f}", f"{kl:.4f}"]]
    for k in sorted({1, round(n**0.5), n}):
        means = [sum(pass_at_k(n, c, k) for c in r["solved"]) / len(r["solved"]) for r in (before, after)]
        rows.append([f"pass@{k}", *(f"{mean:.1%}" for mean in means)])
    pairs = list(zip(before["solved"], after["solved"], strict=True))
    note = (
        f"pass@k: {n} samples of each of {len(pairs)} problems, of which "
        f"{sum(a > 0 and not b for b, a in pairs)} were never solved before and are now, "
        f"{sum(b > 0 and not a for b, a in pairs)} the other way round"
    )
    before_and_after(before, after, config.steps, run.seconds, rows, [note])
    drawn = {f"reward_{name}": name for name in weights}
    lost = {"zero_variance": "no signal"} | {name: name.replace("_", " by ") for name in extra if "collapsed" in name}
    draw_curves(
        run.path,
        f"{config.data}, seed {config.seed}: accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}",
        [
            *metric_panels(),
            ("rewards", drawn, "mean over rollouts", {}),
            ("entropy and KL", {"entropy": "entropy", "kl": "KL to the reference"}, "nats per token", {}),
            ("ratio ρ", {"ratio_spread": "mean |ρ − 1|", "clip_fraction": "share clipped"}, "", {}),
            ("completion length", {"length": "mean"}, "tokens", {}),
            ("sampler and trainer", SAMPLER, "", {}),
            ("groups without a signal", lost, "share of groups", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    print(f"{run.path}/last, {run.path}/best, {run.path}/curves.png, {run.path}/samples.md")
