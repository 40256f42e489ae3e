"""The comparison tables as numeric pandas frames, in percent, and how they are shown: a row per method.

The harmonic mean H of a data set is the one of its base and novel accuracy averaged over seeds; H of an
average is the one of the averaged base and novel, as in the papers. std is the sample standard deviation
over seeds; a method whose results do not depend on the seed has none. The average of a method that lacks a data
set is NaN, and so is its std where a data set lacks a seed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from heba import methods
from heba.data.datasets import TABLE, order, title
from heba.data.protocols import PROTOCOLS
from heba.evaluation.metrics import harmonic_mean
from heba.evaluation.record import Record
from pipeline.core.trainings import can, tests

LONG = ("protocol", "dataset", "method", "seed", "shots", "group", "accuracy", "n")
TIDY = ("dataset", "method", "shots", "group", "accuracy", "std", "seeds")
AVERAGE = "average"
HEADS = {"base": "Base", "novel": "Novel", "h": "H"}
GAP = "–"  # of a method that cannot do a protocol; what is merely not there yet is empty
Bold = Mapping[tuple[int, str], set[str]]  # by shots and group, the methods whose average is bold
PUBLISHED = Path(__file__).with_name("published.yaml")


class Block(NamedTuple):
    """A table as it is shown.

    Attributes:
        title: of it; empty where it is the only one.
        cells: text, a row per method (or setting), whose name is in the first column.
        ranks: of the same shape; 1 for the best of a column, 2 for the second, else 0.
    """

    title: str
    cells: pd.DataFrame
    ranks: pd.DataFrame


def long_table(records: list[Record]) -> pd.DataFrame:
    """One row per record and group of test classes: the columns LONG."""
    rows = [
        (r.protocol, r.dataset, r.method, r.seed, r.shots, name, group.accuracy, group.n)
        for r in records
        for name, group in r.groups.items()
    ]
    return pd.DataFrame(rows, columns=list(LONG))


def draws(method: str) -> bool:
    """Whether a method's results depend on the seed."""
    return methods.part(method, "settings").DRAWS


def method_title(method: str) -> str:
    return methods.part(method, "settings").TITLE


def able(method: str, protocol: str, group: str = "all") -> bool:
    """Whether a method can be tested on a group of a protocol; on h, where it can on base and on novel."""
    return all(can(method, protocol, g) for g in (("base", "novel") if group == "h" else (group,)))


def groups_of(protocol: str) -> list[str]:
    """The groups of a protocol's tables: of its test classes, and H where there are base and novel."""
    groups = list(PROTOCOLS[protocol].groups)
    return [*groups, "h"] if "novel" in groups else groups


def tidy_table(data: pd.DataFrame, protocol: str, names: list[str]) -> pd.DataFrame:
    """A row per data set, method, number of shots and group, with accuracy, std and seeds: the columns TIDY.

    The data sets are in the papers' order, own data after them, and last `average`, over the benchmarks there.

    Args:
        data: of `long_table`. names: of the methods, in the order of the tables.
    """
    part = data[data["protocol"] == protocol]
    datasets = sorted(set(part["dataset"]), key=order)
    averaged = [dataset for dataset in datasets if dataset in TABLE]
    rows: list[tuple[Any, ...]] = []
    for method in names:
        own = part[part["method"] == method]
        for shots, trained in own.groupby("shots"):
            # [data set and seed] x [group]
            frame = trained.pivot_table(index=["dataset", "seed"], columns="group", values="accuracy")
            seeds = sorted(set(part.loc[part["shots"] == shots, "seed"]))
            rows += _rows(frame, method, int(str(shots)), averaged, seeds, groups_of(protocol))
    found = pd.DataFrame(rows, columns=list(TIDY))
    place = {dataset: i for i, dataset in enumerate([*datasets, AVERAGE])}
    return found.sort_values("dataset", key=lambda column: column.map(place), kind="stable", ignore_index=True)


def _rows(
    frame: pd.DataFrame, method: str, shots: int, averaged: list[str], seeds: list[int], groups: list[str]
) -> list[tuple[Any, ...]]:
    """The rows of `tidy_table` of a method and number of shots."""
    means, spread = frame.groupby("dataset").mean(), with_h(frame).groupby("dataset").std(ddof=1)
    counts = frame.groupby("dataset").count().min(axis=1)
    if averaged:
        means.loc[AVERAGE] = means.reindex(averaged).mean(skipna=False)
        wanted = pd.MultiIndex.from_product([averaged, seeds], names=["dataset", "seed"])
        by_seed = frame.reindex(wanted).groupby("seed").mean(skipna=False)
        spread.loc[AVERAGE] = with_h(by_seed).std(ddof=1, skipna=False)
        counts[AVERAGE] = counts.reindex(averaged).fillna(0).min()
    means = with_h(means)
    if not draws(method):
        spread = spread * float("nan")
    return [
        (name, method, shots, group, means[group][name], spread[group][name], int(counts[name]))
        for name in map(str, means.index)
        for group in groups
        if group in means
    ]


def with_h(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame`, whose columns are groups, with H where it has base and novel."""
    if not {"base", "novel"} <= set(frame):
        return frame
    return frame.assign(h=[harmonic_mean(b, n) for b, n in zip(frame["base"], frame["novel"], strict=True)])


def benchmarks(table: pd.DataFrame) -> list[str]:
    """The data sets of a tidy table over which its average is: not own data."""
    return [dataset for dataset in dict.fromkeys(table["dataset"]) if dataset in TABLE]


def own_data(table: pd.DataFrame) -> list[str]:
    """The own data of a tidy table."""
    return [d for d in dict.fromkeys(table["dataset"]) if d not in TABLE and d != AVERAGE]


def incomplete(data: pd.DataFrame, protocol: str, names: list[str]) -> dict[str, list[str]]:
    """By data set of a protocol's table, those of the methods `names` that have fewer seeds there, for some number
    of shots, than the fullest has; of those that can do the protocol."""
    part = data[data["protocol"] == protocol]
    counts = part.groupby(["dataset", "shots", "method"])["seed"].nunique()
    found: dict[str, list[str]] = {}
    for dataset in sorted(set(part["dataset"]), key=order):
        for name in (n for n in names if tests(n, protocol)):
            if any(counts.get((dataset, k, name), 0) < counts.max() for k in set(part["shots"])):
                found.setdefault(dataset, []).append(name)
    return found


# How they are shown.


def dataset_title(dataset: str, table: pd.DataFrame, embedded: bool) -> str:
    """Display name of a data set; an average says over how many."""
    if dataset == AVERAGE:
        return f"Average of {len(benchmarks(table))}" + (" benchmarks" if own_data(table) else "")
    return title(dataset) + ("*" if embedded and dataset in TABLE else "")


def number(mean: float, std: float | None = None, sign: bool = False) -> str:
    """ "61.20", "61.20 ± 0.50" or "+3.10"."""
    if pd.isna(mean):
        return ""
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return text if std is None or pd.isna(std) else f"{text} ± {std:.2f}"


Column = tuple[str, str, int, str]  # head, data set, shots and group


def block(
    title: str,
    table: pd.DataFrame,
    protocol: str,
    names: list[str],
    columns: list[Column],
    published: list[Any],
    bold: Bold | None = None,
) -> Block:
    """The methods `names` over some `columns` of a tidy table, and then rows of `published` figures. Averages are
    bold where `bold` says so, if it is given."""
    values = {
        (dataset, method, shots, group): (accuracy, std)
        for dataset, method, shots, group, accuracy, std, _ in table.itertuples(index=False)
    }
    rows, numbers = [], []
    for name in names:
        found = [values.get((d, name, k, g), (float("nan"), float("nan"))) for _, d, k, g in columns]
        shown = [
            number(*pair) if able(name, protocol, c[3]) else GAP for pair, c in zip(found, columns, strict=True)
        ]
        rows.append([method_title(name), *shown])
        numbers.append([float("nan"), *(round(mean, 2) for mean, _ in found)])
    marks = [_ranks(list(column)) for column in zip(*numbers, strict=True)]
    for i, (_, dataset, shots, group) in enumerate(columns, start=1):
        if bold is not None and dataset == AVERAGE:
            marks[i] = [int(name in bold.get((shots, group), set())) for name in names]
    ranks = [*zip(*marks, strict=True)]
    for method, figures in published:
        cells = [number(figures[d, g]) if (d, g) in figures else "" for _, d, _, g in columns]
        if any(cells):
            rows.append([f"{method} (published)", *cells])
            ranks.append((0,) * (len(columns) + 1))
    heads = ["Method", *(head for head, *_ in columns)]
    return Block(title, pd.DataFrame(rows, columns=heads), pd.DataFrame(ranks, columns=heads))


def _ranks(values: list[float]) -> list[int]:
    """1 for the highest of at least two values, and 2 for the next lower ones, as they are printed."""
    there = sorted({value for value in values if not pd.isna(value)}, reverse=True)
    if len([value for value in values if not pd.isna(value)]) < 2:
        return [0] * len(values)
    return [there.index(value) + 1 if value in there[:2] else 0 for value in values]


def blocks(
    table: pd.DataFrame,
    protocol: str,
    names: list[str],
    embedded: bool,
    published: bool,
    bold: Bold | None = None,
) -> list[Block]:
    """The tables of a protocol, as the papers print them: where a data set has several columns, a table per data
    set, the average first; else a table with a column per data set."""
    figures = published_figures(protocol) if published else []
    datasets, shots = list(dict.fromkeys(table["dataset"])), sorted(set(table["shots"]))
    titles = {dataset: dataset_title(dataset, table, embedded) for dataset in datasets}
    if PROTOCOLS[protocol].transfer:
        columns = [(titles[d], d, shots[0], "all") for d in datasets]
        return [block("", table, protocol, names, columns, figures, bold)]
    datasets = sorted(datasets, key=lambda dataset: dataset != AVERAGE)
    if protocol == "few_shot":
        heads = [(f"{k} shot{'s' if k > 1 else ''}", k, "all") for k in shots]
    else:
        heads = [(HEADS[group], shots[0], group) for group in groups_of(protocol)]
    return [
        block(titles[d], table, protocol, names, [(head, d, k, g) for head, k, g in heads], figures, bold)
        for d in datasets
    ]


OVERVIEW = {"cross_dataset": "Cross-data-set", "domain_generalization": "Domain"}


def overview(
    tidied: dict[str, pd.DataFrame], names: list[str], bold: Mapping[str, Bold]
) -> tuple[pd.DataFrame, Block]:
    """The averages of all protocols: rows methods; as numbers, and as they are shown.

    Args:
        tidied: by protocol, its `tidy_table`; without those that have no results.
        bold: by protocol, which averages are bold.
    """
    parts, shown = [], []
    for protocol, table in tidied.items():
        averages = table[table["dataset"] == AVERAGE]
        if averages.empty:
            continue
        columns = []
        for shots in sorted(set(averages["shots"])):
            for group in groups_of(protocol):
                few = f"{shots} shot{'s' if shots > 1 else ''}"
                head = OVERVIEW.get(protocol) or (few if protocol == "few_shot" else HEADS[group])
                columns.append((head, AVERAGE, shots, group))
        found = averages.pivot_table(index="method", columns=["shots", "group"], values="accuracy", dropna=False)
        found = found.reindex(index=names, columns=[(k, g) for _, _, k, g in columns])
        found.columns = pd.Index([_key(protocol, k, g) for _, _, k, g in columns])
        parts.append(found)
        shown.append(block("", averages, protocol, names, columns, [], bold.get(protocol)))
    if not shown:
        return pd.DataFrame(), Block("", pd.DataFrame(), pd.DataFrame())
    cells = pd.concat([shown[0].cells, *(b.cells.iloc[:, 1:] for b in shown[1:])], axis=1)
    ranks = pd.concat([shown[0].ranks, *(b.ranks.iloc[:, 1:] for b in shown[1:])], axis=1)
    return pd.concat(parts, axis=1).rename_axis("method"), Block("", cells, ranks)


def _key(protocol: str, shots: int, group: str) -> str:
    """The name of a column of the overview in CSV."""
    if protocol == "few_shot":
        return f"few_shot_{shots}"
    return protocol if group == "all" else f"{protocol}_{group}"


def published_figures(protocol: str) -> list[tuple[str, dict[tuple[str, str], float]]]:
    """By method, published figures of `protocol` by data set and group."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for entry in _published(protocol):
        for key, value in entry["values"].items():
            group = {"hm": "h", "accuracy": "all"}.get(key, key)
            found.setdefault(entry["method"], {})[entry["dataset"], group] = value
    return list(found.items())


def published_sources(protocol: str) -> list[str]:
    """Where the published figures of `protocol` were read, a line for each source."""
    found: dict[str, list[str]] = {}
    for entry in _published(protocol):
        found.setdefault(entry["source"], []).append(entry["method"])
    return [f"Published ({', '.join(dict.fromkeys(names))}): {source}." for source, names in found.items()]


def _published(protocol: str) -> list[dict[str, Any]]:
    entries = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return [entry for entry in entries if entry["protocol"] == protocol]
