"""The family of policy gradients that grpo.py computes: the rows of its table, and the choices of a run, which are
taken from a row, checked together, and shown as flags.

Papers (arXiv): rloo 2402.14740, with the ratio and the KL of TRL's RLOOTrainer; dr_grpo 2503.20783; dapo 2503.14476;
gspo 2507.18071; cispo 2506.13585, its cap of 5 from 2510.13786; sapo 2511.20347; maxrl 2602.02710; reinforce++
2501.03262. DAPO's dynamic sampling and its penalty for length are flags of their own: --refill 3 --overlong 16. GRPO as
in its paper, but for the learned reward there: --beta 0.04 --kl_unbiased false --skip_zero_variance false --minibatches
1 --rollouts 64. DAPO's paper divides by the tokens of one group; here, as in TRL and verl, it is by the minibatch's.

What others do differently: TRL's default is --loss_type dapo, and it leaves a NaN reward out (here it is an error);
verl's default is a mean over the batch's tokens, its epsilon under the std 1e-6, its CISPO clips at 1 ± 0.2; it bounds
log ρ to ±20 and, where A < 0, the loss at 3 |A| (dual clip, arXiv:1912.09729).
"""

from dataclasses import dataclass
from typing import Literal

from support.checks import Amount
from support.errors import ConfigError

# The table in grpo.py's docstring: name -> its choices. A row says where it differs from GRPO. kl None: k3 in the loss,
# k1 in the reward.
GRPO = {"baseline": "mean", "scale": "group", "ratio": "token", "surrogate": "clip", "clip_low": 0.2, "clip_high": 0.2}
GRPO |= {"loss_type": "grpo", "beta": 0.3, "kl_in": "loss", "kl": None}
REINFORCE = {"baseline": "none", "scale": "none", "surrogate": "reinforce", "loss_type": "dr_grpo"}
RLOO = {"baseline": "leave_one_out", "scale": "none", "ratio": "product", "beta": 0.05, "kl_in": "reward"}
CISPO = {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "loss_type": "dapo"}
NO_CLIP, NO_KL = {"clip_low": None, "clip_high": None}, {"beta": 0.0}
ALGORITHMS = {
    "reinforce": GRPO | REINFORCE | NO_CLIP | NO_KL,
    "rloo": GRPO | RLOO,
    "grpo": GRPO,
    "dr_grpo": GRPO | NO_KL | {"scale": "none", "loss_type": "dr_grpo"},
    "dapo": GRPO | NO_KL | {"clip_high": 0.28, "loss_type": "dapo"},
    "gspo": GRPO | NO_KL | {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": GRPO | NO_KL | CISPO,
    "sapo": GRPO | NO_KL | NO_CLIP | {"surrogate": "sapo"},
    "maxrl": GRPO | NO_KL | {"scale": "mean", "loss_type": "dr_grpo"},
    "reinforce++-baseline": GRPO | {"scale": "tokens", "loss_type": "dapo", "kl": "k2"},
}
CLIPS = ("clip_low", "clip_high")


@dataclass
class FamilyFlags:
    """The columns of the family's table; the other flags that `check_choices` reads are those of grpo.Config."""

    algorithm: Literal[tuple(ALGORITHMS)] = "grpo"
    """Sets all of the following that are not given, from --baseline to --kl_in; but another --surrogate has clips of
    its own, and another --kl_in its own --kl."""
    baseline: Literal["mean", "leave_one_out", "none"] | None = None
    """What a reward is compared with: the mean of its group, of the others in it, or nothing."""
    scale: Literal["group", "batch", "none", "mean", "tokens"] | None = None
    """Unit of the advantages: a group's std, the batch's, 1, a group's mean reward, or whitened over the tokens."""
    ratio: Literal["token", "product", "sequence"] | None = None
    """Importance ratio: each token's own, the product over the answer, or its geometric mean."""
    surrogate: Literal["clip", "cispo", "sapo", "reinforce"] | None = None
    """How far a token may go in the updates of one batch."""
    clip_low: Amount | None = None
    """Lower clip range of the ratio."""
    clip_high: Amount | None = None
    """Upper clip range of the ratio."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] | None = None
    """A token's weight: a mean per answer, a mean over all tokens, or a constant."""
    beta: Amount | None = None
    """Weight of the KL to the reference; at 0 it is measured now and then only, and the other --kl flags do nothing."""
    kl: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL; default k3 in the loss (each token's KL), k1 in the reward (the whole answer's)."""
    kl_in: Literal["loss", "reward"] | None = None
    """Where the KL is paid: as a term of the loss, or off the advantages, less its baseline in the group."""
    kl_unbiased: bool | None = None
    """Multiply the KL in the loss by the token's ratio (arXiv:2512.02556, §3.1); default for k1 and k3, which then have
    the KL's gradient."""

    def __post_init__(self):
        super().__post_init__()
        fill_in(self)
        check_choices(self)


def fill_in(config):
    """Set, in place, what was not given to what the algorithm's row has, and the KL's kind to the one whose gradient is
    the KL's. ConfigError if something was given that the surrogate has not."""
    row, clips = ALGORITHMS[config.algorithm], [getattr(config, name) for name in CLIPS]
    surrogate = config.surrogate or row["surrogate"]
    if surrogate != row["surrogate"]:  # the row's clips belong to its own surrogate: take those of a row with this one
        row = row | {name: ALGORITHMS["grpo" if surrogate == "clip" else surrogate][name] for name in CLIPS}
    if surrogate in ("sapo", "reinforce") and clips != [None, None]:
        raise ConfigError(f"--surrogate {surrogate} has no clip: leave --clip_low and --clip_high out")
    if config.kl_in not in (None, row["kl_in"]):  # the row's estimate belongs to its own place: the default then
        row = row | {"kl": None}
    for name, value in row.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.kl is None:
        config.kl = "k3" if config.kl_in == "loss" else "k1"
    if config.kl_unbiased is None:
        config.kl_unbiased = config.kl_in == "loss" and config.kl != "k2"


def check_choices(config):
    """ConfigError if choices do not go together."""
    c = config
    if c.rollouts < 2 and c.baseline != "none":
        raise ConfigError("--rollouts is 1: a group of one has no baseline, every advantage is 0; use 2 or more")
    if c.baseline == "none" and c.scale in ("group", "batch"):
        raise ConfigError(
            f"--baseline none with --scale {c.scale} divides a reward by a std that is 0 where all are equal; use "
            "--scale none, mean or tokens, or another --baseline"
        )
    if c.surrogate == "reinforce" and c.ratio != "token":
        raise ConfigError(f"--surrogate reinforce has no ratio, --ratio is {c.ratio}: add --ratio token")
    if c.scale == "tokens" and c.ratio != "token":
        raise ConfigError(
            f"--scale tokens whitens over tokens, but --ratio {c.ratio} weighs whole answers: use --scale batch"
        )
    weights = [c.correct_weight, c.format_weight, c.brevity_weight, *([c.reward_weight] if c.reward else [])]
    if c.scale == "mean" and (c.overlong or min(weights) < 0):
        raise ConfigError("--scale mean divides by a mean reward: no --overlong and no weight below 0 with it")
    if c.minibatches > c.prompts:
        raise ConfigError(f"--minibatches is {c.minibatches}, more than the {c.prompts} prompts of a step")
    if c.overlong > c.max_new_tokens:
        raise ConfigError(f"--overlong {c.overlong} is more than --max_new_tokens {c.max_new_tokens}")
    if c.kl_unbiased and c.kl_in == "reward":
        raise ConfigError("--kl_unbiased has no meaning with --kl_in reward, where the KL is not differentiated")
    if c.beta and (c.kl, c.kl_in, c.kl_unbiased) == ("k1", "loss", False):
        raise ConfigError(
            "--kl k1 in the loss has no gradient on average; use --kl_in reward, --kl_unbiased true, or k2 or k3"
        )


def loss_options(config):
    """The arguments of grpo.grpo_loss that a run's settings fix."""
    names = ("clip_low", "clip_high", "loss_type", "ratio", "surrogate", "kl", "kl_unbiased")
    options = {name: getattr(config, name) for name in names} | {"max_length": config.max_new_tokens}
    return options | {"beta": config.beta if config.kl_in == "loss" else 0.0}


def divide_by_mean(centred, rewards):
    """centred and rewards (N, R) -> (N, R): `centred` divided by the group's mean reward, 0 where all earn 0 (MaxRL,
    --scale mean). If an answer is right with probability p and then earns 1, else 0, the expected gradient is
    ∇p Σ_k (1 − p)^(k−1), k from 1 to R − 1 (without a baseline to R): the first terms of ∇log p = ∇p / p. ConfigError
    on a reward below 0."""
    if (rewards < 0).any():
        raise ConfigError(f"--scale mean divides by a group's mean reward, and a reward is {rewards.min():g}")
    mean = rewards.mean(dim=1, keepdim=True)  # (N, 1)
    return centred / mean.masked_fill(mean == 0, 1.0)  # 0 / 1 where nobody was right


def whiten_over_tokens(centred, rewards, lengths):
    """(N, R) each: mean 0 and variance 1 over the tokens of the batch, each of which has its answer's value."""
    if lengths is None:
        raise ConfigError("--scale tokens needs the lengths of the answers")
    share = lengths.to(rewards) / lengths.sum().clamp(min=1)  # (N, R) of the tokens; sums to 1
    centred = centred - (share * centred).sum()
    std = (share * centred.square()).sum().clamp(min=1e-8).sqrt()  # ()
    all_equal = (rewards == rewards[0, 0]).all()
    return (centred / std).masked_fill(all_equal, 0.0)  # exactly 0, not the mean's rounding


def refuse_replaced(config):
    """ConfigError on a baseline or scale, given or of the algorithm's row, that gdpo.py's comparison would replace."""
    for name in ("baseline", "scale"):
        if getattr(config, name) is not None:
            raise ConfigError(f"--{name} has no meaning with --combine gdpo, which normalises each reward by itself")
        if ALGORITHMS[config.algorithm][name] != GRPO[name]:
            raise ConfigError(
                f"--algorithm {config.algorithm} has a {name} of its own, which --combine gdpo would replace: use "
                "--combine sum, or only what you want of it (--ratio, --surrogate, --loss_type)"
            )


def check_conditioned(names, weights):
    """ConfigError if gdpo.py cannot pay these rewards in right answers alone. weights {name: weight}: those that
    count."""
    for name in [*names, "correct"] if names else []:
        if name not in weights:
            raise ConfigError(f"--conditioned needs a weight for {name!r}; there are {', '.join(weights)}")
    if "correct" in names:
        raise ConfigError("--conditioned correct changes nothing: name the rewards that only a right answer is to get")
    for name in names:
        if name == "overlong" or weights[name] < 0:
            raise ConfigError(f"--conditioned {name}: a wrong answer, which is paid 0, would escape this penalty")


def as_flags(config):
    """The line that says which member of the family runs."""
    unused = ("ratio",) if config.surrogate == "reinforce" else ()
    unused += () if config.beta else ("kl_in", "kl", "kl_unbiased")
    values = {name: getattr(config, name) for name in (*GRPO, "kl_unbiased") if name not in unused}
    words = {name: f"{v:g}" if isinstance(v, float) else str(v).lower() for name, v in values.items() if v is not None}
    return f"--algorithm {config.algorithm}: " + " ".join(f"--{name} {word}" for name, word in words.items())
