"""How sure an accuracy is, and whether two methods can be told apart. All in shares, 0 to 1, at the level ALPHA.

C. Nadeau and Y. Bengio, "Inference for the generalization error", Machine Learning 52 (2003).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from heba.evaluation.metrics import wilson
from pipeline.report.statistics import ALPHA, RESAMPLES, holm

FEWEST_RUNS = 3  # of fewer splits or samples, the spread says too little
AT_ONCE = 100  # flips of all signs


def same_test(shares: Sequence[float], n: int) -> tuple[float, float]:
    """The interval of the mean accuracy of several few-shot samples on the same `n` test images: Wilson's, with as
    many images as have the variance of both, images and samples, that the mean has."""
    share, k = float(np.mean(shares)), len(shares)
    of_images = share * (1 - share) / n
    of_samples = float(np.var(shares, ddof=1)) / k if k > 1 else 0.0
    return wilson(share, share * (1 - share) / (of_images + of_samples) if of_images else n)


def resampled(shares: Sequence[float], test_ratio: float, n: int) -> tuple[float, float]:
    """The interval of the mean accuracy over splits of the same images: Nadeau and Bengio's corrected resampled t,
    whose variance is (1 / splits + test_ratio) s^2, where `test_ratio` is the number of tested images per other
    image. Where Wilson's, of all `n` different test images, is wider, as where all splits agree, it is that, and
    with fewer than FEWEST_RUNS splits too."""
    share, k = float(np.mean(shares)), len(shares)
    low, high = wilson(share, n)
    if k < FEWEST_RUNS:
        return low, high
    error = math.sqrt((1 / k + test_ratio) * float(np.var(shares, ddof=1)))
    half = float(stats.t.ppf(1 - ALPHA / 2, k - 1)) * error
    if 2 * half > high - low:
        return max(0.0, share - half), min(1.0, share + half)
    return low, high


def images_differ(differences: Sequence[float]) -> float:
    """The two-sided p that test images favour neither of two methods. `differences`: of an image, the share of its
    tests that one method got right, less that of the other.

    McNemar's exact test where an image was tested once; else the randomisation test, which flips signs.
    """
    values = np.asarray(differences, float)
    values = values[values != 0]
    if not len(values):
        return 1.0
    if set(np.abs(values)) == {1.0}:
        return float(stats.binomtest(int((values > 0).sum()), len(values)).pvalue)
    draws, as_far = np.random.default_rng(0), 0
    for _ in range(0, RESAMPLES, AT_ONCE):
        signs = draws.choice([-1.0, 1.0], size=(AT_ONCE, len(values)))
        as_far += int((np.abs(signs @ values) >= abs(values.sum()) - 1e-9).sum())
    return (1 + as_far) / (1 + RESAMPLES)


class Advice(NamedTuple):
    """The method to take, those that cannot be told apart from the most accurate one, and why."""

    method: str
    alike: list[str]
    text: str


def advise(
    shares: Mapping[str, float],
    ps: Mapping[str, float],
    titles: Mapping[str, str],
    seconds: Mapping[str, float | None],
    n: int,
) -> Advice:
    """Which method to take: of those that cannot be told apart from the most accurate one, the simplest.

    Args:
        shares: by method, its accuracy; the simplest method first.
        ps: of each but the most accurate one, the p of its difference to that; corrected for their number here.
        titles: names for people. seconds: of a training, where known. n: different test images.
    """
    best = max(shares, key=lambda name: shares[name])
    others = [name for name in shares if name != best]
    corrected = dict(zip(others, holm([ps[name] for name in others]), strict=True))
    alike = [name for name in others if corrected[name] >= ALPHA]
    on = f"{n} test image{'s' if n > 1 else ''}"
    measured = f"{100 * shares[best]:.1f} % on {on}"
    if not others:
        return Advice(best, [], f"Only {titles[best]} ran: {measured}.")
    if not alike:
        second = max(others, key=lambda name: shares[name])
        above = 100 * (shares[best] - shares[second])
        return Advice(
            best,
            [],
            f"Take {titles[best]}: {measured}, {above:.1f} points above {titles[second]}, the next "
            f"({_p(corrected[second])}).",
        )
    method = next(name for name in shares if name in alike or name == best)
    listed = _listed([titles[name] for name in shares if name in alike or name == best])
    apart = f"{listed} can't be told apart with these {on} ({_p(min(corrected[name] for name in alike))})"
    if method == best:
        return Advice(
            best, alike, f"Take {titles[best]}: {measured}, the highest, and the simplest of its like: {apart}."
        )
    more = 100 * (shares[best] - shares[method])
    faster = ""
    if seconds.get(method) is not None and seconds.get(best) is not None:
        faster = f"; it trains in {_seconds(seconds[method])}, {titles[best]} in {_seconds(seconds[best])}"
    return Advice(
        method,
        alike,
        f"Take {titles[method]}: {apart}, and it is the simplest of them{faster}. {titles[best]} measured "
        f"{more:.1f} points more, which more test images may confirm or not.",
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
