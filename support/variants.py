"""Which settings and arguments a variant of dpo.py takes. variants: dpo.VARIANTS."""

from dataclasses import dataclass
from typing import Annotated

from support.checks import Amount, Positive, Range, listed
from support.errors import ConfigError
from support.tasks import has_verifier


@dataclass
class VariantFlags:
    """The settings of single variants; with the others they are refused."""

    label_smoothing: Annotated[float, Range(float, 0, 0.5)] = 0.0
    """Assumed share of pairs with the wrong label (cDPO)."""
    gamma: Amount = 0.0
    """The offset that h should exceed with --variant simpo."""
    weight_desirable: Positive = 1.0
    """Weight of the good answers with --variant kto."""
    weight_undesirable: Positive = 1.0
    """Weight of the bad ones."""


def check_settings(variants, variant, names):
    """Raise ConfigError on a setting that the variant does not take."""
    for name in names:
        if name not in variants[variant].settings:
            takers = [known for known, kind in variants.items() if name in kind.settings]
            raise ConfigError(f"--{name} has no meaning with --variant {variant}, only with {listed(takers)}")


def check_loss(variants, variant, settings, refs, lengths, nll):
    """ConfigError on arguments of dpo_loss that do not belong together. refs, lengths: of the chosen and the rejected
    answers, or None."""
    if variant not in variants:
        raise ConfigError(f"--variant {variant!r} is not known; use {listed(variants)}")
    known = sorted({name for kind in variants.values() for name in kind.settings})
    if unknown := sorted(settings.keys() - set(known)):
        raise ConfigError(f"{unknown[0]!r} is no argument of dpo_loss and no variant's setting: {listed(known)}")
    check_settings(variants, variant, [name for name, value in settings.items() if value])
    if variants[variant].unpaired:
        raise ConfigError(f"{variant} judges single answers, not pairs: use {variant}_loss")
    if variants[variant].uses_reference and any(x is None for x in refs):
        raise ConfigError(f"the variant {variant} needs the reference's log-probabilities, ref_chosen and ref_rejected")
    if variants[variant].per_token and any(x is None for x in lengths):
        raise ConfigError(f"the variant {variant} needs the answers' lengths")
    if nll and lengths[0] is None:
        raise ConfigError("nll is a mean per token: it needs the answers' lengths")


def check_config(variants, config):
    """ConfigError on flags of dpo.py that do not belong together."""
    if config.pairs == "sampled" and not has_verifier(config.data):
        raise ConfigError(f"--pairs sampled needs a verifier, which {config.data} has not; use --pairs offline")
    of_variants = sorted({name for kind in variants.values() for name in kind.settings})
    changed = [name for name in of_variants if getattr(config, name) != getattr(type(config), name)]
    check_settings(variants, config.variant, changed)
    if variants[config.variant].unpaired and config.batch < 2:
        raise ConfigError(f"--batch is 1; --variant {config.variant} needs 2: z0 takes the answers of other rows")
