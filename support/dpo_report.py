"""What a DPO run prints and draws at the end."""

from evaluate import before_and_after, metric_panels, wilson
from support.plots import draw_curves


def report(config, before, after, n, seconds):
    """The table at the end. n: the number of test pairs."""
    pair_accuracy = after["pairs"]["accuracy"]
    low, high = wilson(pair_accuracy * n, n)
    rows = [["pairs ordered rightly", "–", f"{pair_accuracy:.1%} [{low:.1%}, {high:.1%}]"]]
    labels = {"loss": "loss on pairs", "logp_chosen": "log π(chosen)", "logp_rejected": "log π(rejected)"}
    for name, label in labels.items():
        rows.append([label, *(f"{figures['pairs'][name]:.3f}" for figures in (before, after))])
    before_and_after(before, after, config.steps, seconds, rows)
    if after["pairs"]["logp_chosen"] < before["pairs"]["logp_chosen"]:
        despite = f", in spite of --nll {config.nll:g}" if config.nll else ""
        print(f"the chosen answers became less probable too{despite}: DPO fits the difference alone (see curves.png)")


def draw(config, run_path, variant, verified):
    """The curves. variant: a row of dpo.VARIANTS; verified: whether the answers were checked."""
    reward = f"β {'log π/π_ref' if variant.uses_reference else 'log π'}{' per token' if variant.per_token else ''}"
    rewards = {"valid_reward_chosen": "chosen", "valid_reward_rejected": "rejected"}
    logps = {"valid_logp_chosen": "chosen", "valid_logp_rejected": "rejected"}
    draw_curves(
        run_path,
        f"DPO ({config.variant}, {config.pairs} pairs) on {config.data}, seed {config.seed}",
        [
            *(metric_panels() if verified else ()),
            ("loss on pairs", {"loss": "train", "valid_loss": "validation"}, "loss", {}),
            ("pairs ordered rightly", {"pair_accuracy": "train", "valid_accuracy": "validation"}, "share", {}),
            ("implicit rewards, validation", rewards, reward, {}),
            ("log π of the answers, validation", logps, "nats", {}),
            ("KL to the start", {"kl": "sampled answers"}, "nats per token", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
