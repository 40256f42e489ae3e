"""Tests over data sets. Each takes numbers alone and gives the same for the same numbers.

The samples are data sets, a number each: the few seeds of a data set share its test images and are no samples of
their own. J. Demsar, "Statistical comparisons of classifiers over multiple data sets", JMLR 7 (2006).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

ALPHA = 0.05
# With five, the smallest p of a signed-rank test is 2 / 2^5 = 0.06: no difference could ever be shown.
FEWEST = 6
RESAMPLES = 10_000


def wilcoxon(differences: Sequence[float]) -> float:
    """The two-sided p of Wilcoxon's signed-rank test: of the sums of signed ranks that all choices of signs give,
    the share that is as far from 0 as this one. Differences of 0 are left out; equal ones share their mean rank.

    The null distribution is exact with ties too, where scipy's is an approximation.
    """
    left = [d for d in differences if d != 0]
    # Twice the ranks are whole numbers, of which sums can be counted.
    ranks = np.rint(2 * stats.rankdata(np.abs(left))).astype(int)
    counts = np.ones(1)
    for rank in ranks:
        counts = np.pad(counts, (0, rank)) + np.pad(counts, (rank, 0))
    positive = int(ranks[np.array(left) > 0].sum()) if left else 0
    least = min(positive, int(ranks.sum()) - positive)
    return min(1.0, 2 * float(counts[: least + 1].sum() / counts.sum()))


def least_p(n: int) -> float:
    """The smallest p that `wilcoxon` can give on n data sets."""
    return min(1.0, 2 * 0.5**n)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of several p, which holds the chance of any wrong finding among them below its level."""
    corrected, largest = [0.0] * len(ps), 0.0
    for i, place in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, min(1.0, (len(ps) - i) * ps[place]))
        corrected[place] = largest
    return corrected


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean difference: percentiles of its values on data sets drawn with replacement."""
    values = np.asarray(differences, float)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
    return float(low), float(high)


class Friedman(NamedTuple):
    """Friedman's test of several methods on several data sets.

    Attributes:
        statistic, p: of its chi-squared form.
        critical: Nemenyi's critical difference of average ranks, at the level ALPHA.
    """

    statistic: float
    p: float
    critical: float


def friedman(scores: np.ndarray) -> Friedman:
    """Of scores [data sets, methods], at least three methods."""
    n, k = scores.shape
    alike_everywhere = bool((scores == scores[:, :1]).all())  # of which scipy makes 0 / 0
    statistic, p = (0.0, 1.0) if alike_everywhere else stats.friedmanchisquare(*scores.T)
    quantile = stats.studentized_range.ppf(1 - ALPHA, k, np.inf) / np.sqrt(2)
    return Friedman(float(statistic), float(p), float(quantile * np.sqrt(k * (k + 1) / (6 * n))))


def alike(ranks: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """First and last of each largest group of at least two methods whose average ranks, in rising order, are less
    than `critical` apart."""
    found: list[tuple[int, int]] = []
    for first, rank in enumerate(ranks):
        last = max(i for i, other in enumerate(ranks) if other - rank < critical or i == first)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found
