"""The leaderboards, one per protocol: averages over the benchmarks, ranks, and the comparison with one method, the
reference. It is paired: on a data set, over the seeds that both methods have.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from heba import methods
from heba.data.datasets import TABLE
from heba.evaluation.metrics import harmonic_mean
from pipeline.report import statistics
from pipeline.report.statistics import ALPHA, FEWEST, RESAMPLES, Friedman
from pipeline.report.tables import AVERAGE, GAP, HEADS, Block, Bold, able, groups_of, method_title, number

COLUMNS = (
    *("protocol", "shots", "group", "method", "family", "accuracy", "std", "datasets", "seeds", "rank"),
    *("reference", "wins", "ties", "losses", "difference", "low", "high", "p", "p_holm", "bold", "parameters"),
)
Parameters = Mapping[tuple[str, str, str, int], int]  # trained ones, by protocol, data set, method and shots


class Board(NamedTuple):
    """The leaderboard of a protocol.

    Attributes:
        protocol, reference: what it is of, and the method that the others are compared with.
        rows: a row per number of shots, group and method that has all data sets: COLUMNS, where `bold` says if the
            average is shown so (`best`); NaN where there are too few data sets for a test.
        score: the shots and the group that it is sorted by: H, or the accuracy with the most shots.
        scores: the accuracies behind that, [data sets] x [methods].
        friedman: the test of these; None where there are too few data sets or methods.
    """

    protocol: str
    reference: str
    rows: pd.DataFrame
    score: tuple[int, str]
    scores: pd.DataFrame
    friedman: Friedman | None

    def column(self, shots: int, group: str) -> pd.DataFrame:
        """The rows of a number of shots and a group, by method."""
        rows = self.rows
        return rows[(rows["shots"] == shots) & (rows["group"] == group)].set_index("method")

    def bold(self) -> Bold:
        keys = self.rows[["shots", "group"]].drop_duplicates().itertuples(index=False, name=None)
        return {key: {str(name) for name, row in self.column(*key).iterrows() if row["bold"]} for key in keys}

    def ranking(self) -> pd.DataFrame:
        """The rows of the score, by method, the best first."""
        return self.column(*self.score).sort_values("accuracy", ascending=False, kind="stable")


def leaderboard(
    data: pd.DataFrame,
    table: pd.DataFrame,
    protocol: str,
    names: list[str],
    reference: str,
    parameters: Parameters | None = None,
) -> Board | None:
    """The leaderboard of a protocol; None where no method has an average.

    Args:
        data: of `tables.long_table`. table: of `tables.tidy_table`. names: of the methods.
        parameters: numbers of trained parameters, of which the mean over data sets is shown.
    """
    averages = table[table["dataset"] == AVERAGE].dropna(subset="accuracy")
    benchmarks = table[table["dataset"].isin(TABLE)]
    part = data[(data["protocol"] == protocol) & data["dataset"].isin(TABLE)]
    rows: list[dict[str, Any]] = []
    means, score = pd.DataFrame(), (0, "")
    for shots in sorted(set(averages["shots"])):
        # [data set and seed] x [group and method]
        frame = part[part["shots"] == shots].pivot_table(
            index=["dataset", "seed"], columns=["group", "method"], values="accuracy"
        )
        for group in groups_of(protocol):
            found = averages[(averages["shots"] == shots) & (averages["group"] == group)].set_index("method")
            there = [name for name in names if name in found.index]
            if there:
                own = benchmarks[(benchmarks["shots"] == shots) & (benchmarks["group"] == group)]
                means = own.pivot_table(index="dataset", columns="method", values="accuracy", sort=False)[there]
                score = (shots, group)
                of_all = {"protocol": protocol, "shots": shots, "group": group, "datasets": len(means)}
                compared = _compared(frame, group, there, reference, means)
                rows += [
                    of_all | {"method": n} | dict(found.loc[n, ["accuracy", "std", "seeds"]]) | compared[n]
                    for n in there
                ]
    if not rows:
        return None
    for row in rows:
        row["family"] = methods.part(row["method"], "settings").FAMILY
        key = (row["method"], row["shots"])
        counts = [n for (p, _, *k), n in (parameters or {}).items() if p == protocol and tuple(k) == key]
        row["parameters"] = sum(counts) / len(counts) if counts else float("nan")
    enough = len(means) >= FEWEST and means.shape[1] > 2
    test = statistics.friedman(means.round(2).to_numpy()) if enough else None
    return Board(protocol, reference, pd.DataFrame(rows, columns=list(COLUMNS)), score, means, test)


def paired(frame: pd.DataFrame, group: str, one: str, other: str) -> list[float]:
    """The differences of two methods on the data sets, each of the means over the seeds that both have there; of
    `h`, of the harmonic means of those. Rounded, so that equal ones are equal."""
    groups = ("base", "novel") if group == "h" else (group,)
    means = frame[[(g, name) for name in (one, other) for g in groups]].dropna().groupby("dataset").mean()
    rows = means.to_numpy().reshape(len(means), 2, len(groups))
    found = [[harmonic_mean(*of) if group == "h" else of[0] for of in row] for row in rows]
    return [round(float(a - b), 6) for a, b in found]


def _compared(
    frame: pd.DataFrame, group: str, names: list[str], reference: str, means: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """By method, its mean rank, whether it is bold, and the comparison with the reference where there is one."""

    def differences(other: str) -> dict[str, list[float]]:
        found = {name: paired(frame, group, name, other) for name in names if name != other}
        return {name: of for name, of in found.items() if of}

    ranks = means.round(2).rank(axis=1, ascending=False).mean()
    bold = best(means.mean(), differences(str(means.mean().idxmax())))
    found: dict[str, dict[str, Any]] = {n: {"rank": ranks[n], "bold": n in bold} for n in names}
    if reference not in names:
        return found
    against = differences(reference)
    for (name, p), corrected in zip(tests(against).items(), holm(against), strict=True):
        shown = [round(d, 2) for d in against[name]]
        low, high = statistics.bootstrap(against[name]) if len(shown) >= FEWEST else (float("nan"),) * 2
        found[name] |= {
            "reference": reference,
            "wins": sum(d > 0 for d in shown),
            "ties": shown.count(0),
            "losses": sum(d < 0 for d in shown),
            "difference": sum(against[name]) / len(shown),
            "low": low,
            "high": high,
            "p": p,
            "p_holm": corrected,
        }
    return found


def tests(differences: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """By method, p of Wilcoxon's test; NaN where there are too few data sets."""
    return {n: statistics.wilcoxon(d) if len(d) >= FEWEST else float("nan") for n, d in differences.items()}


def holm(differences: Mapping[str, Sequence[float]]) -> list[float]:
    """The corrected p of the methods that have one, in their order; NaN for the others."""
    ps = tests(differences)
    corrected = iter(statistics.holm([p for p in ps.values() if not pd.isna(p)]))
    return [p if pd.isna(p) else next(corrected) for p in ps.values()]


def best(means: "pd.Series[float]", differences: Mapping[str, Sequence[float]]) -> set[str]:
    """The best method and those that the test does not tell from it, whose `differences` to it are given; none
    where it tells nobody from it, for a difference within the noise is not bold."""
    told = {n for n, p in zip(differences, holm(differences), strict=True) if p < ALPHA}
    return {str(name) for name in means.index} - told if told else set()


# How it is shown.


def blocks(board: Board, names: list[str]) -> list[Block]:
    """The leaderboard, sorted by its score, and the comparison with the reference."""
    listed = [str(name) for name in board.ranking().index]
    listed += [name for name in names if name not in listed]
    compared = board.ranking().dropna(subset="difference")
    return [_averages(board, listed), *([_against(board, compared)] if len(compared) else [])]


def _averages(board: Board, listed: list[str]) -> Block:
    bold = board.bold()
    columns = {key: board.column(*key).reindex(listed).to_dict("index") for key in bold}
    ranking = board.ranking().reindex(listed).to_dict("index")
    counts = board.rows.groupby("method")["parameters"].last()  # with the most shots
    counted = counts.notna().any()
    cells, ranks = [], []
    for name in listed:
        row = {"Method": method_title(name), "Family": methods.part(name, "settings").FAMILY}
        for key, of in columns.items():
            value = number(of[name]["accuracy"], of[name]["std"])
            row[_head(board, *key)] = value if able(name, board.protocol, key[1]) else GAP
        own = ranking[name]
        row["Rank"] = number(own["rank"])
        row["W/T/L"] = "" if pd.isna(own["wins"]) else f"{own['wins']:.0f}/{own['ties']:.0f}/{own['losses']:.0f}"
        if counted:
            trained = counts.get(name, float("nan"))
            row["Trained"] = "" if pd.isna(trained) else f"{trained:,.0f}"
        cells.append(row)
        marks = [int(name in bold[key]) for key in columns]
        ranks.append([0, 0, *marks, *[0] * (len(row) - 2 - len(marks))])
    frame = pd.DataFrame(cells)
    return Block("Leaderboard", frame, pd.DataFrame(ranks, columns=frame.columns))


def _against(board: Board, compared: pd.DataFrame) -> Block:
    rows = []
    for name, of in compared.to_dict("index").items():
        tested = not pd.isna(of["p"])
        rows.append(
            {
                "Method": method_title(str(name)),
                f"Δ {_score(board)}": number(of["difference"], sign=True),
                "95 % interval": f"{of['low']:+.2f} to {of['high']:+.2f}" if tested else "",
                "p": f"{of['p']:.3f}" if tested else "",
                "p (Holm)": f"{of['p_holm']:.3f}" if tested else "",
            }
        )
    frame = pd.DataFrame(rows)
    title = f"Against {method_title(board.reference)}"
    return Block(title, frame, pd.DataFrame(0, index=frame.index, columns=frame.columns))


def _head(board: Board, shots: int, group: str) -> str:
    if board.protocol == "few_shot":
        return f"{shots} shot{'s' if shots > 1 else ''}"
    return HEADS.get(group, "Accuracy")


def _score(board: Board) -> str:
    return "H" if board.score[1] == "h" else "accuracy"


def reading(reference: str) -> list[str]:
    """What the columns and the tests of all leaderboards mean, a sentence each."""
    other = method_title(reference)
    return [
        "Rank: the mean of a method's places on the data sets, 1 the best. W/T/L: on how many data sets it is "
        f"above, level with (in two decimals) and below {other}.",
        "Bold: the best average of a column, and all that a signed-rank test over data sets, with Holm's "
        "correction, does not tell from it. As the test looks at each data set, it may tell a method from the "
        "best and a lower one not. Where it tells none, nothing is bold.",
        f"Δ: the mean over data sets of the difference to {other}, on each over the seeds that both have. 95 % "
        f"interval: of this mean, from data sets drawn anew {RESAMPLES:,} times (bootstrap); with 0 inside, the "
        "direction is open.",
        "p: the chance of differences at least this one-sided if their signs were random (Wilcoxon's signed-rank "
        "test over data sets, exact). p (Holm) is corrected for the number of methods; below "
        f"{ALPHA} counts as a difference.",
        "Friedman's test: whether the ranks of all methods could be chance. Where it says no, two methods whose "
        "ranks are less than the critical difference apart (Nemenyi) still cannot be told apart.",
    ]


def notes(board: Board) -> list[str]:
    """What a leaderboard is of, what Friedman's test gave, and when the tests can say nothing."""
    n, k = board.scores.shape
    sets = f"{n} data set{'s' if n > 1 else ''}"
    what = _score(board) + (f" with {board.score[0]} shots" if board.protocol == "few_shot" else "")
    found = [f"Averages over {sets}. Rank, W/T/L and tests: of {what}, {k} method{'s' if k > 1 else ''}."]
    seeds = board.rows["seeds"].max()
    if seeds == 1:
        found.append(
            "One seed: how much few-shot samples and trainings vary is not measured; the tests know the spread "
            "over data sets alone."
        )
    elif seeds == 2:
        found.append("Two seeds: ± is a rough guess of their spread.")
    if n < FEWEST:
        return [*found, f"Too few data sets for a test: with fewer than {FEWEST} none can reach p < {ALPHA}."]
    smallest = min(1.0, (k - 1) * statistics.least_p(n))
    if smallest >= ALPHA:
        found.append(
            f"With {sets} and {k - 1} comparisons p (Holm) cannot fall below {smallest:.2f}: these tests can show "
            "nothing here."
        )
    return found + _friedman_note(board)


def _friedman_note(board: Board) -> list[str]:
    test = board.friedman
    if test is None:
        return ["Friedman's test needs three methods."]
    told = f"Friedman's test: χ² = {test.statistic:.1f}, p = {test.p:.2g}; "
    if test.p >= ALPHA:
        return [f"{told}the ranks may be chance and tell no method from another."]
    return [f"{told}critical difference of ranks: {test.critical:.2f}."]
