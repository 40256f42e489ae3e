"""Metrics that need no torch."""

import math


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n), 0 when both are 0, and NaN when one is; any unit, the same for both."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def wilson(share: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a `share`, 0 to 1, of `n` images; z = 1.96 makes it one of 95 %. `n` need not be whole:
    a number of images of equal worth. E. B. Wilson, "Probable inference", JASA 22 (1927)."""
    if not 0 <= share <= 1 or n <= 0:
        raise ValueError(f"a share of {share} of {n} images is not possible")
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
