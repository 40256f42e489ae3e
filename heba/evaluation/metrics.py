"""Measures that need no torch."""


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n), and 0 when both are 0; any unit, the same for both."""
    return 2 * base * novel / (base + novel) if base + novel > 0 else 0.0
