"""What a PPO step logs and shows, and what its run prints and draws at the end."""

from evaluate import before_and_after, kl_estimate, metric_panels
from support.devices import in_float64
from support.plots import draw_curves


def token_sums(logprobs, ref_logprobs, values, returns, mask):
    """Sums over this rank's tokens, of what was known before the update; all (n·R, T)."""
    error, goal = (in_float64(x * mask) for x in (returns - values, returns))
    return {
        "tokens": mask.sum(),
        "kl": (kl_estimate(logprobs, ref_logprobs, "k1") * mask).sum(),
        "kl3": (kl_estimate(logprobs, ref_logprobs, "k3") * mask).sum(),
        "entropy": -(logprobs * mask).sum(),  # E[−log π], by the samples
        "value": (values * mask).sum(),
        "error": error.sum(),
        "error²": (error**2).sum(),
        "goal": goal.sum(),
        "goal²": (goal**2).sum(),
    }


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
