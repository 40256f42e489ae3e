"""Metrics that need no torch."""


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n), 0 when both are 0, and NaN when one is; any unit, the same for both."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0
