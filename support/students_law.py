"""Student's law, for ablate.student_interval: its two-sided p and its quantiles, without SciPy."""

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
