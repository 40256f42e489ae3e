"""The leaderboards, one per protocol: averages over the benchmarks, places, and the comparison with one method, the
reference. A comparison is paired: on a data set, over the seeds that both methods have."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from heba import methods
from heba.data.datasets import TABLE, order
from heba.evaluation.metrics import harmonic_mean
from pipeline.report import statistics
from pipeline.report.statistics import ALPHA, FEWEST, RESAMPLES, Friedman
from pipeline.report.tables import AVERAGE, GAP, HEADS, Block, able, groups_of, method_title, number

COLUMNS = (
    *("protocol", "shots", "group", "method", "family", "accuracy", "std", "datasets", "seeds", "rank"),
    *("reference", "wins", "ties", "losses", "difference", "low", "high", "p", "p_holm", "bold", "parameters"),
)
Parameters = Mapping[tuple[str, str, str, int], int]  # trained ones, by protocol, data set, method and shots
Bold = Mapping[tuple[int, str], set[str]]  # by shots and group, the methods whose average is bold


class Board(NamedTuple):
    """The leaderboard of a protocol.

    Attributes:
        protocol, reference: what it is of, and the method that the others are compared with.
        rows: a row per number of shots, group and method that has all data sets: COLUMNS, where `bold` is whether no
            test tells the method from the best; NaN where there are too few data sets for a test.
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
    part = data[(data["protocol"] == protocol) & data["dataset"].isin(TABLE)]
    rows: list[dict[str, Any]] = []
    means, score = pd.DataFrame(), (0, "")
    for shots in sorted(set(averages["shots"])):
        # [data set and seed] x [group and method]
        frame = part[part["shots"] == shots].pivot_table(
            index=["dataset", "seed"], columns=["group", "method"], values="accuracy"
        )
        frame = frame.loc[sorted(frame.index, key=lambda key: order(key[0]))]
        for group in groups_of(protocol):
            found = averages[(averages["shots"] == shots) & (averages["group"] == group)].set_index("method")
            there = [name for name in names if name in found.index]
            if there:
                means, score = scores(frame, group, there), (shots, group)
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


def scores(frame: pd.DataFrame, group: str, names: list[str]) -> pd.DataFrame:
    """[data sets] x [methods], the means over the seeds that all methods `names` have on a data set; of `h`, the
    harmonic means of those."""
    groups = ("base", "novel") if group == "h" else (group,)
    own = frame[[(g, name) for g in groups for name in names]]
    means = own.dropna().groupby("dataset", sort=False).mean()
    if group != "h":
        return means[group]
    pairs = {name: zip(means["base"][name], means["novel"][name], strict=True) for name in names}
    return pd.DataFrame({name: [harmonic_mean(*pair) for pair in of] for name, of in pairs.items()}, means.index)


def _compared(
    frame: pd.DataFrame, group: str, names: list[str], reference: str, means: pd.DataFrame
) -> dict[str, dict[str, Any]]:
    """By method, its mean rank, whether it is bold, and the comparison with the reference where that is there."""

    def differences(other: str) -> dict[str, list[float]]:
        # Rounded, so that equal differences are equal.
        pairs = {name: scores(frame, group, [name, other]) for name in names if name != other}
        return {name: list((of[name] - of[other]).round(6)) for name, of in pairs.items()}

    ranks = means.round(2).rank(axis=1, ascending=False).mean()
    bold = best(means.mean(), differences(str(means.mean().idxmax())))
    found: dict[str, dict[str, Any]] = {n: {"rank": ranks[n], "bold": n in bold} for n in names}
    if reference not in names:
        return found
    against = differences(reference)
    for (name, p), corrected in zip(_tests(against).items(), _corrected(against), strict=True):
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


def _tests(differences: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """By method, p of Wilcoxon's test; NaN where there are too few data sets."""
    return {n: statistics.wilcoxon(d) if len(d) >= FEWEST else float("nan") for n, d in differences.items()}


def _corrected(differences: Mapping[str, Sequence[float]]) -> list[float]:
    """The corrected p of the methods that have one, in their order; NaN for the others."""
    ps = _tests(differences)
    corrected = iter(statistics.holm([p for p in ps.values() if not pd.isna(p)]))
    return [p if pd.isna(p) else next(corrected) for p in ps.values()]


def best(means: "pd.Series[float]", differences: Mapping[str, Sequence[float]]) -> set[str]:
    """The best method and those that no test tells from it, whose `differences` to it are given; none where the test
    tells nobody from it, for a difference within the noise is not bold."""
    told = {n for n, p in zip(differences, _corrected(differences), strict=True) if p < ALPHA}
    return {str(name) for name in means.index} - told if told else set()


# How it is shown.


def blocks(board: Board, names: list[str]) -> list[Block]:
    """The leaderboard, sorted by its score, and the comparison with the reference."""
    listed = [str(name) for name in board.ranking().index]
    listed += [name for name in names if name not in listed]
    return [_averages(board, listed), _against(board, [n for n in listed if n != board.reference])]


def _averages(board: Board, listed: list[str]) -> Block:
    columns, bold, ranking = list(board.bold()), board.bold(), board.ranking()
    counted = not board.rows["parameters"].isna().all()
    cells, ranks = [], []
    for name in listed:
        row = {"Method": method_title(name), "Family": methods.part(name, "settings").FAMILY}
        for key in columns:
            of = board.column(*key)
            value = number(of["accuracy"][name], of["std"][name]) if name in of.index else ""
            row[_head(board, *key)] = value if able(name, board.protocol, key[1]) else GAP
        of = ranking.loc[name] if name in ranking.index else None
        row["Rank"] = "" if of is None else f"{of['rank']:.2f}"
        there = of is not None and not pd.isna(of["wins"])
        row[_record(board)] = f"{of['wins']:.0f}/{of['ties']:.0f}/{of['losses']:.0f}" if there else ""
        if counted:
            trained = float("nan") if of is None else of["parameters"]
            row["Trained"] = "" if pd.isna(trained) else f"{trained:,.0f}"
        cells.append(row)
        marks = [int(name in bold[key]) for key in columns]
        ranks.append([0, 0, *marks, *[0] * (len(row) - 2 - len(marks))])
    frame = pd.DataFrame(cells)
    return Block("Leaderboard", frame, pd.DataFrame(ranks, columns=frame.columns))


def _against(board: Board, listed: list[str]) -> Block:
    ranking = board.ranking()
    rows = []
    for name in [name for name in listed if name in ranking.index]:
        of = ranking.loc[name]
        tested = not pd.isna(of["p"])
        rows.append(
            {
                "Method": method_title(name),
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


def _record(board: Board) -> str:
    return f"W/T/L against {method_title(board.reference)}"


def _score(board: Board) -> str:
    return "H" if board.score[1] == "h" else "accuracy"


def notes(board: Board) -> list[str]:
    """Sentences under the leaderboard: what its columns are, what the tests mean, and when they can say nothing."""
    n, k = board.scores.shape
    sets = f"{n} data set{'s' if n > 1 else ''}"
    reference = method_title(board.reference)
    what = _score(board) + (f" with {board.score[0]} shots" if board.protocol == "few_shot" else "")
    found = [
        f"Averages over {sets}; ± is the sample standard deviation over seeds. Rank, W/T/L and the tests are of "
        f"{what}. Rank: the mean of a method's places on the data sets, of {k} methods. W/T/L: on how many data sets "
        f"a method is above, level with (in two decimals) and below {reference}.",
        "Bold: the best average of a column, and all that a signed-rank test over data sets, with Holm's correction, "
        "does not tell from it, be they lower than one that it tells. Where it tells none, nothing is bold.",
    ]
    seeds = board.rows["seeds"].max()
    if seeds == 1:
        found.append(
            "One seed: how much a few-shot sample and a training vary is not measured; the tests know the spread over "
            "data sets alone."
        )
    elif seeds == 2:
        found.append("Two seeds: ± is a rough guess of their spread.")
    if n < FEWEST:
        return [*found, f"Too few data sets for a test: {n}; with fewer than {FEWEST} none can reach p < {ALPHA}."]
    found.append(
        "p: the chance of differences at least this one-sided if their signs were random (Wilcoxon's signed-rank test "
        "over data sets, exact). p (Holm) is corrected for the number of methods; below "
        f"{ALPHA} counts as a difference. 95 % interval: of the mean difference, from data sets drawn anew "
        f"{RESAMPLES:,} times; with 0 inside, the direction is open."
    )
    smallest = min(1.0, (k - 1) * statistics.least_p(n))
    if smallest >= ALPHA:
        found.append(
            f"With {sets} and {k - 1} comparisons p (Holm) can't fall below {smallest:.2f}: these tests can show "
            "nothing here."
        )
    return found + _friedman_note(board)


def _friedman_note(board: Board) -> list[str]:
    test = board.friedman
    if test is None:
        return ["Friedman's test needs three methods."]
    asked = f"Are all methods alike? Friedman's test: χ² = {test.statistic:.1f}, p = {test.p:.2g}"
    if test.p >= ALPHA:
        return [f"{asked}: they may be, and ranks tell none from another."]
    return [
        f"{asked}: they are not. Ranks less than {test.critical:.2f} apart (Nemenyi's critical difference at {ALPHA}) "
        "are not told apart."
    ]
