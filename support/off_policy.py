"""A sampler that differs from the policy, as in every fast system: the copy that rolls out, and what corrects for it.

A fast system samples with a copy μ of the policy. Its weights are rounded to bf16 or int8, and older than the policy by
the time its answers are trained on: a mean over its answers is one over μ, not over the policy π_old of this step.
Importance weights turn one into the other, for any function f of an answer. (In grpo.py's docstring μ and π_old are one
and the same, called π_old.)

    E_μ[k f(y)] = E_π_old[f(y)]        k = π_old(y) / μ(y), of a whole answer, or of a token after a given prefix
    k_t = sg[π_old(y_t) / μ(y_t)]      of each token: cheap and steady; biased, as it forgets how the prefix was reached
    k_i = sg[Π_t k_t]                  of the whole answer: unbiased, and its spread grows with the length
    g_i = (Π_t k_t)^(1/|y|)            its geometric mean: no product that runs away, and biased

    truncate    min(k, C)                       TIS (Yao et al., 2025, "Your efficient RL framework secretly brings you
                                                off-policy RL training")
    mask        k inside [1/C, C], 0 outside    MIS, IcePop (arXiv:2510.18855); such a token counts in v_it (grpo.py)

The weights multiply the surrogate, not the KL.

The trap. What does the ratio ρ divide by? With log-probabilities that the trainer computes itself (--old_logprobs
trainer) ρ = π / π_old measures the updates of this batch alone, and k is missing: weigh. With those that the sampler
gave back (--old_logprobs sampler, the default) ρ = π / μ holds k already: a weight would count it twice. So then
--correction truncate is refused, and --correction mask only drops: 1 inside [1/C, C], 0 outside (`keep` in the code).
"""

import copy
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from evaluate import kl_estimate
from support.checks import Range, Whole, choice
from support.errors import ConfigError
from support.rollouts import cut, piece_logprobs


def sampler_weights(old_logprobs, sampler_logprobs, mask, correction="truncate", level="token", bound=2.0):
    """log π_old, log μ and mask (B, T) -> the weight of each token (B, T), and k = π_old / μ (B, T); no gradient.

    correction: "truncate" is min(k, bound); "mask" k, and 0 outside [1 / bound, bound]; "keep" 1, and 0 outside.
    level: k of each token, of the "sequence" (the product over an answer), or its "geometric" mean. ConfigError on an
    unknown name.
    """
    log_k = torch.where(mask > 0, old_logprobs - sampler_logprobs, 0.0).detach()  # (B, T)
    whole, length = (x.sum(dim=1, keepdim=True) for x in (log_k, mask))  # (B, 1) each
    levels = {"token": log_k, "sequence": whole, "geometric": whole / length.clamp(min=1)}
    k = choice("correction_level", level, levels).exp().expand(mask.shape)  # (B, T)
    inside, one = (k >= 1 / bound) & (k <= bound), torch.ones_like(k)
    weights = {
        "none": one,
        "truncate": k.clamp(max=bound),
        "mask": torch.where(inside, k, 0.0),  # not k · inside: inf · 0 is NaN
        "keep": torch.where(inside, one, 0.0),
    }
    return choice("correction", correction, weights), k


def rounded(weight, dtype):
    """A weight as the sampler has it, in its own dtype again. "int8": symmetric, with 127 steps from 0 to the largest
    number of each output channel (row) of a matrix; vectors (norms, biases) stay. "bf16": 8 significant bits, of all.
    """
    if dtype == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    if dtype == "same" or weight.ndim < 2:
        return weight
    step = weight.abs().amax(dim=-1, keepdim=True) / 127  # (…, out, 1)
    step = step.masked_fill(step == 0, 1.0)
    return (weight / step).round() * step


class RolloutPolicy:
    """The model that rolls out: the policy itself, or a copy that is `stale` steps older and rounded.

    refresh() before each step's rollouts. As a part of a Run it saves the weights of the last `stale` steps, in fp32,
    which a resumed run rolls out with next.
    """

    def __init__(self, policy, dtype="same", stale=0):
        """policy: as it begins, without adapters."""
        self.dtype, self.stale, self.past = dtype, stale, deque()  # past: {name: weight}, the oldest first
        self.differs = dtype != "same" or stale > 0
        self.model = copy.deepcopy(policy).requires_grad_(False).eval() if self.differs else policy
        self.parameters = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
        if self.differs:
            self.load(policy.state_dict())

    def load(self, weights):
        weights = {k: rounded(w, self.dtype) if k in self.parameters else w for k, w in weights.items()}
        self.model.load_state_dict(weights)

    def refresh(self, policy):
        """Take over the policy's weights of `stale` steps ago; before that many steps, those of the first step."""
        if not self.differs:
            return
        weights = policy.state_dict()
        if self.stale:
            self.past.append({name: w.detach().to("cpu", copy=True) for name, w in weights.items()})
            weights = self.past[0]
            if len(self.past) > self.stale:
                self.past.popleft()
        self.load(weights)

    def state_dict(self):
        return {"past": list(self.past)}

    def load_state_dict(self, state):
        self.past = deque(state["past"])


@dataclass
class SamplerFlags:
    """What rolls out, and what corrects for it."""

    sampler_dtype: Literal["same", "bf16", "int8"] = "same"
    """Roll out with the policy's weights rounded to this."""
    stale: Whole = 0
    """Roll out with the policy of this many steps ago."""
    old_logprobs: Literal["sampler", "trainer"] = "sampler"
    """Whose log-probabilities the ratio divides by: those sampled with, or the policy's own, scored once more."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Weigh tokens by k = policy / sampler. truncate: by k, at most the bound. mask: by 0 where k is outside 1 / bound
    ... bound, else by k, or by 1 with --old_logprobs sampler, whose ratio holds k."""
    correction_level: Literal["token", "sequence", "geometric"] | None = None
    """k of each token (default), the product over an answer, or its geometric mean."""
    correction_bound: Annotated[float, Range(float, 1)] | None = None
    """The bound; default 2."""


def check_sampler(config):
    """ConfigError on settings that do not go together."""
    c = config
    given = [name for name in ("correction_level", "correction_bound") if getattr(c, name) is not None]
    if c.correction == "none" and given:
        raise ConfigError(f"--{given[0]} has no meaning with --correction none; use truncate or mask")
    if c.correction == "truncate" and c.old_logprobs == "sampler":
        raise ConfigError(
            "--correction truncate weighs twice with --old_logprobs sampler, whose ratio holds the weight already; "
            "use --correction mask, or --old_logprobs trainer"
        )


@torch.no_grad()
def off_policy(batch, policy, config, autocast, pad, dist):
    """What the ratio divides by (n·R, T), the weights of the tokens (n·R, T), and {metric: number} over all ranks.

    If sampler and policy may differ, or --old_logprobs or --correction asks, the policy scores the answers once more,
    and batch.rollout.logprobs are its own from here on. If not, they stay as sampled, and all weights are 1.
    """
    c, sampled, mask = config, batch.rollout.logprobs, batch.rollout.mask  # (n·R, T) each
    if (c.sampler_dtype, c.stale, c.old_logprobs, c.correction) == ("same", 0, "sampler", "none"):
        return sampled, torch.ones_like(sampled), {}
    pieces = cut(batch, range(len(batch.prompts)), mask, c.micro_batch, pad)
    own = batch.rollout.logprobs = piece_logprobs(policy, pieces, batch, c.temperature, autocast)
    ratio_holds_k = c.old_logprobs == "sampler"
    correction = "keep" if ratio_holds_k and c.correction == "mask" else c.correction
    options = {"level": c.correction_level or "token", "bound": c.correction_bound or 2.0}
    weights, k = sampler_weights(own, sampled, mask, correction, **options)
    limited = weights != (k if correction in ("truncate", "mask") else 1.0)
    parts = {"sampler_weight": weights, "sampler_limited": limited, "sampler_kl": kl_estimate(sampled, own, "k3")}
    n, *sums = dist.sum(mask.sum(), *(x[mask].sum() for x in parts.values()))
    metrics = {name: total / n for name, total in zip(parts, sums, strict=True)}
    metrics["sampler_ratio_max"] = dist.gather(k[mask].max()[None]).max().item()
    return sampled if ratio_holds_k else own, weights, metrics
