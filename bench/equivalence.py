"""Whether two ways of training do the same, from a few paired runs: intervals and tests of a mean difference.

Student (1908): with d₁ … d_n paired differences, mean m and standard deviation s, (m − μ) / (s / √n) has the
t distribution with n − 1 degrees of freedom. Schuirmann's two one-sided tests (1987): at level α the means are
equivalent within ±δ when the interval of confidence 1 − 2α lies inside (−δ, δ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < |t|). Abramowitz & Stegun 26.7.3 and 26.7.4: finite sums for whole degrees of freedom."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2 == 0:
        term, total = 1.0, 1.0
        for k in range(1, degrees // 2):
            term *= cosine**2 * (2 * k - 1) / (2 * k)
            total += term
        return sine * total
    if degrees == 1:
        return 2 * angle / math.pi
    term, total = cosine, cosine
    for k in range(1, (degrees - 1) // 2):
        term *= cosine**2 * (2 * k) / (2 * k + 1)
        total += term
    return 2 / math.pi * (angle + sine * total)


def t_quantile(confidence: float, degrees: int) -> float:
    """t with P(|T| < t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return high


def paired_test(differences: Sequence[float], *, margin: float, level: float = 0.05) -> dict[str, Any]:
    """What n paired differences say about their mean.

    margin: δ of the equivalence test, in the differences' unit

    is_equivalent:  |mean| < δ is shown at `level`
    is_different:   mean ≠ 0 is shown at `level`; both may hold: a real difference too small to matter
    """
    if len(differences) < 2:
        return {"num_pairs": len(differences), "is_equivalent": None, "is_different": None}
    degrees = len(differences) - 1
    center, error = mean(differences), stdev(differences) / math.sqrt(len(differences))
    wide, narrow = (error * t_quantile(confidence, degrees) for confidence in (1 - level, 1 - 2 * level))
    return {
        "num_pairs": len(differences),
        "mean": center,
        "standard_error": error,
        "interval_95": [center - wide, center + wide],
        "interval_90": [center - narrow, center + narrow],
        "margin": margin,
        "p_equal": 1.0 if center == error == 0 else 1 - t_probability(center / error, degrees) if error else 0.0,
        "is_equivalent": -margin < center - narrow and center + narrow < margin,
        "is_different": not (center - wide <= 0 <= center + wide),
    }
