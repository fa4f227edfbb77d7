"""Student's law, for ablate.py: its two-sided p, its quantiles, and what is significant with a power, without SciPy."""

import math


def student_p(t, degrees):
    """P(|T| > t) of Student's law (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4: finite sums, exact)."""
    angle = math.atan(t / math.sqrt(degrees))
    term, total = (1.0, 1.0) if degrees % 2 == 0 else (math.cos(angle), math.cos(angle) * (degrees > 1))
    for k in range(2 + degrees % 2, degrees - 1, 2):  # cos^k, each times (k − 1) / k of the one before
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return 1 - (inside if degrees % 2 == 0 else 2 / math.pi * (angle + inside))


def student_t(q, degrees):
    """The q-quantile, q >= 0.5: the t with P(T > t) = 1 − q. 12.706 for 0.975 and one degree, 1.96 for very many."""
    low, high = 0.0, math.pi / 2  # angles; t = √degrees tan(angle)
    for _ in range(60):
        middle = (low + high) / 2
        inside = student_p(math.sqrt(degrees) * math.tan(middle), degrees) > 2 * (1 - q)
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def detectable(t, degrees):
    """The δ with P((Z + δ) / C > t) = 0.8, Z standard normal, C = √(χ²/ν): the noncentral law, which T follows where
    the true mean is δ standard errors. The mean of P(Z > t C − δ) over the density of C is taken as a sum. δ is 3.761
    for 5 numbers and t = 2.776."""
    step = (8 + math.sqrt(degrees)) / 4000  # of χ, whose density is 2^(1 − ν/2) / Γ(ν/2) · χ^(ν − 1) exp(−χ²/2)
    chis = [step * (i + 0.5) for i in range(4000)]
    log_constant = (1 - degrees / 2) * math.log(2) - math.lgamma(degrees / 2) + math.log(step)
    weights = [math.exp(log_constant + (degrees - 1) * math.log(chi) - chi * chi / 2) for chi in chis]
    low, high = 0.0, 2 * t + 10
    for _ in range(40):
        middle = (low + high) / 2
        tails = (math.erfc((t * chi / math.sqrt(degrees) - middle) / math.sqrt(2)) / 2 for chi in chis)
        seen = sum(w * tail for w, tail in zip(weights, tails, strict=True))
        low, high = (middle, high) if seen < 0.8 else (low, middle)
    return low
