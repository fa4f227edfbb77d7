"""The rounds of rejection.py: which are refused, and how one begins anew from the start model."""

from support.errors import ConfigError


def check_rounds(config):
    """ConfigError on settings that no round can follow."""
    c = config
    if c.steps % c.round_steps:
        raise ConfigError(f"--steps {c.steps} is no whole number of rounds of --round_steps {c.round_steps}")
    if c.max_per_problem and c.max_per_problem > c.rollouts:
        raise ConfigError(f"--max_per_problem {c.max_per_problem} is more than the --rollouts {c.rollouts}")


def refuse_unsolved(usable):
    """ConfigError if no answer can be fine-tuned on. usable (N, R): right and complete."""
    if not usable.any():
        raise ConfigError(
            f"none of {usable.numel():,} sampled answers is right and complete, so there is nothing to fine-tune "
            "on: give another --init, more --prompts or --rollouts, or a larger --max_new_tokens"
        )


def back_to_start(policy, start_weights, optimizers):
    """Copy the weights, in the order of policy.parameters(), into the policy; the optimizers forget."""
    for p, weights in zip(policy.parameters(), start_weights, strict=True):
        p.data.copy_(weights)
    for optimizer in optimizers:
        optimizer.state.clear()
