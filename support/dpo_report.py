"""What a DPO run measures beside its loss, and what it prints and draws at the end."""

from evaluate import before_and_after, metric_panels, sampled_kl, wilson
from support.plots import draw_curves


def kl_to_start(policy, start, pairs, tokenizer, config, dist):
    """KL(π ‖ start model) in nats per token, of sampled answers to the prompts of 64 validation pairs."""
    prompts = [pair["prompt"] for pair in pairs["valid"][:64]]
    room = policy.config.context - max(map(len, prompts))
    reference = policy if start is None else start.to(dist.device)  # the policy: sampled_kl turns the adapters off
    kl = sampled_kl(policy, reference, tokenizer, prompts, min(config.max_new_tokens, room), dist, config.seed)
    if start is not None:
        start.cpu()
    return kl


# What a row is; what its accuracy is; the kinds of answer. With kto the second line.
WORDS = (
    ("pairs", "pairs ordered rightly", "chosen", "rejected"),
    ("answers", "answers on their side of z0", "good", "bad"),
)


def report(config, before, after, n, seconds):
    """The table at the end. n: the number of test pairs."""
    pair_accuracy = after["pairs"]["accuracy"]
    low, high = wilson(pair_accuracy * n, n)
    unit, accuracy, chosen, rejected = WORDS[config.variant == "kto"]
    rows = [[accuracy, "–", f"{pair_accuracy:.1%} [{low:.1%}, {high:.1%}]"]]
    labels = {"loss": f"loss on {unit}", "logp_chosen": f"log π({chosen})", "logp_rejected": f"log π({rejected})"}
    for name, label in labels.items():
        if name in before["pairs"]:  # the test answers of kto may all be bad
            rows.append([label, *(f"{figures['pairs'][name]:.3f}" for figures in (before, after))])
    before_and_after(before, after, config.steps, seconds, rows)
    name = "logp_chosen"
    if config.variant != "apo_down" and after["pairs"].get(name, 0.0) < before["pairs"].get(name, 0.0):
        despite = f", in spite of --nll {config.nll:g}" if config.nll else ""
        cause = "" if config.variant in ("apo_zero", "orpo", "kto") else ": DPO fits the difference alone"
        print(f"the {chosen} answers became less probable too{despite}{cause} (see curves.png)")


def draw(config, run_path, variant, verified):
    """The curves. variant: a row of dpo.VARIANTS; verified: whether the answers were checked."""
    reward = f"β {'log π/π_ref' if variant.uses_reference else 'log π'}{' per token' if variant.per_token else ''}"
    unit, accuracy, chosen, rejected = WORDS[variant.unpaired]
    rewards = {"valid_reward_chosen": chosen, "valid_reward_rejected": rejected}
    logps = {"valid_logp_chosen": chosen, "valid_logp_rejected": rejected}
    point = [("reference point z0", {"z0": "train", "valid_z0": "validation"}, "nats", {})] if variant.unpaired else []
    draw_curves(
        run_path,
        f"DPO ({config.variant}, {config.pairs} {unit}) on {config.data}, seed {config.seed}",
        [
            *(metric_panels() if verified else ()),
            (f"loss on {unit}", {"loss": "train", "valid_loss": "validation"}, "loss", {}),
            (accuracy, {"pair_accuracy": "train", "valid_accuracy": "validation"}, "share", {}),
            ("implicit rewards, validation", rewards, reward, {}),
            ("log π of the answers, validation", logps, "nats", {}),
            *point,
            ("KL to the start", {"kl": "sampled answers"}, "nats per token", {}),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
