"""Hugging Face's `rope_scaling` dict, read and checked for positional.py."""

import math

NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_scaling(scaling, context, theta=10000.0):
    """-> kind, factor s, trained length, θ. Raises ValueError, one line, on anything that would be guesswork."""
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict):
        raise ValueError(
            f"RoPE scaling is {scaling!r}; it must be a dict such as {{'rope_type': 'linear', 'factor': 4}}"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in NEEDS:
        raise ValueError(f"RoPE scaling {kind!r} is not known; choose one of {', '.join(NEEDS)}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("RoPE over a part of the head (partial_rotary_factor) is not supported")
    for key, value in scaling.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"RoPE scaling with a {key} of {value}; it must be a finite number")
    missing = [key for key in NEEDS[kind] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"RoPE scaling {kind!r} lacks {', '.join(missing)}")
    trained = context
    if kind in ("yarn", "llama3"):
        trained = scaling.get("original_max_position_embeddings") or context
    if trained is None and kind in ("dynamic", "yarn", "llama3"):
        raise ValueError(f"RoPE scaling {kind!r} needs the length that the model was trained with")
    factor = scaling.get("factor")
    if factor is None:  # DeepSeek's YaRN: the new length over the old one
        factor = (context or trained) / trained if kind == "yarn" else 1.0
    if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise ValueError(f"RoPE scaling by a factor of {factor!r}; it must be a number of at least 1")
    theta = scaling.get("rope_theta") or theta
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 0")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError("RoPE scaling 'llama3' needs low_freq_factor below high_freq_factor")
    return kind, factor, trained, theta


def given_attention_factor(scaling, s):
    """The factor of a YaRN dict that gives one, or None. DeepSeek's `mscale` and `mscale_all_dim` are its numerator and
    denominator."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    parts = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not all(parts):
        return None
    above, below = (0.1 * mscale * math.log(s) + 1 for mscale in parts)
    return above / below
