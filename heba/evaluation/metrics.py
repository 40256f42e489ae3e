"""Metrics that need no torch."""

import math


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n), 0 when both are 0, and NaN when one is; any unit, the same for both."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of the accuracy of `right` of `n` images, both ends in percent; z = 1.96 makes it one of
    95 %. E. B. Wilson, "Probable inference", JASA 22 (1927)."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} images cannot be right")
    share = right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)
