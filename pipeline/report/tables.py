"""The comparison tables as numeric pandas frames, in percent. Each is a pivot of one long table.

The harmonic mean H of a data set is the one of its base and novel accuracy averaged over seeds; H of an
average is the one of the averaged base and novel, as in the papers. std is the sample standard deviation
over seeds; a method whose results do not depend on the seed has none. The average of a method that lacks a data
set is NaN, and so is its std where a data set lacks a seed.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from heba import methods
from heba.data.datasets import TABLE, order, title
from heba.evaluation.metrics import harmonic_mean
from heba.evaluation.record import Record
from pipeline.core.trainings import can, tests

LONG = ("protocol", "dataset", "method", "seed", "shots", "group", "accuracy", "n")
GROUPS = ("base", "novel", "h")
GAP = "–"  # of a method that cannot do a protocol; what is merely not there yet is empty
PUBLISHED = Path(__file__).with_name("published.yaml")


def benchmarks(table: pd.DataFrame) -> list[str]:
    """The rows of a table over which its average is: not those of own data."""
    return [str(dataset) for dataset in table.index if dataset in TABLE]


def own_data(table: pd.DataFrame) -> list[str]:
    """The rows of own data in a table."""
    return [str(dataset) for dataset in table.index if dataset not in TABLE and dataset != "average"]


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


def harmonic_means(base: "pd.Series[float]", novel: "pd.Series[float]") -> list[float]:
    return [harmonic_mean(b, n) for b, n in zip(base, novel, strict=True)]


def with_h(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """`frame`, whose columns are (method, group), with H of each method that has base and novel."""
    for name in names:
        if (name, "base") in frame and (name, "novel") in frame:
            frame[name, "h"] = harmonic_means(frame[name, "base"], frame[name, "novel"])
    return frame


def by_seed(part: pd.DataFrame, columns: str | list[str]) -> pd.DataFrame:
    """Accuracy by data set and seed (the index), and by `columns`."""
    return part.pivot_table(index=["dataset", "seed"], columns=columns, values="accuracy")


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of `by_seed`, averaged over seeds, in the papers' order."""
    found = frame.groupby("dataset").mean()
    return found.loc[sorted(found.index, key=order)]


def stds(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.groupby("dataset").std(ddof=1)


def averages_by_seed(frame: pd.DataFrame, averaged: list[str]) -> pd.DataFrame:
    """The average over the data sets `averaged` of each seed; NaN unless every data set has every seed."""
    part = frame.loc[frame.index.get_level_values("dataset").isin(averaged)]
    found = part.groupby("seed").mean()
    complete = part.groupby("seed").count().eq(len(averaged)).all()
    found.loc[:, ~complete] = float("nan")
    return found


def base_to_novel_table(data: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Rows: data sets and, of the benchmarks, `average`. Columns: <method>_{base,novel,h} of the methods `names`,
    <method>_{base,novel,h}_std (NaN with one seed), difference_{base,novel,h} of the last method to the first
    where there are several, and seeds, the fewest of a method."""
    frame = by_seed(data[data["protocol"] == "base_to_novel"], ["method", "group"])
    table, spread = means(frame), stds(with_h(frame.copy(), names))
    averaged = benchmarks(table)
    if averaged:
        table.loc["average"] = table.loc[averaged].mean(skipna=False)
        spread.loc["average"] = with_h(averages_by_seed(frame, averaged), names).std(ddof=1)
    table = with_h(table, names)
    seeds = fewest(frame)
    found = pd.DataFrame(index=table.index)
    for name in names:
        for group in GROUPS:
            found[f"{name}_{group}"] = column(table, name, group)
    for name in filter(draws, names):
        for group in GROUPS:
            found[f"{name}_{group}_std"] = column(spread, name, group)
    for group in GROUPS if len(names) > 1 else ():
        found[f"difference_{group}"] = found[f"{names[-1]}_{group}"] - found[f"{names[0]}_{group}"]
    found["seeds"] = seeds.reindex(found.index)
    if averaged:
        found.loc["average", "seeds"] = seeds[averaged].mean()
    if (found["seeds"] % 1 == 0).all():
        found["seeds"] = found["seeds"].astype(int)
    return found.rename_axis("dataset")


def fewest(frame: pd.DataFrame) -> "pd.Series[float]":
    """By data set, the seeds of the column of `by_seed` that has the fewest there."""
    return frame.groupby("dataset").count().min(axis=1).astype(float)


def column(frame: pd.DataFrame, *key: Any) -> "pd.Series[float]":
    """A column of `frame`, NaN where it has none, as for a method that cannot do a protocol."""
    name = key if len(key) > 1 else key[0]
    return frame[name] if name in frame else pd.Series(float("nan"), index=frame.index)


def transfer_table(data: pd.DataFrame, protocol: str, names: list[str]) -> pd.DataFrame:
    """Rows: target data sets and `average`. Columns: <method>, <method>_std, difference of the last method of
    `names` to the first where there are several, seeds, the fewest of a method."""
    frame = by_seed(data[data["protocol"] == protocol], "method")
    table, spread = means(frame), stds(frame)
    averaged = [str(dataset) for dataset in table.index]
    table.loc["average"] = table.mean(skipna=False)
    spread.loc["average"] = averages_by_seed(frame, averaged).std(ddof=1)
    found = pd.DataFrame(index=table.index)
    for name in names:
        found[name] = column(table, name)
        if draws(name):
            found[f"{name}_std"] = column(spread, name)
    if len(names) > 1:
        found["difference"] = found[names[-1]] - found[names[0]]
    seeds = fewest(frame)
    found["seeds"] = seeds.reindex(found.index)
    found.loc["average", "seeds"] = seeds.mean()
    return found.rename_axis("dataset")


def few_shot_table(data: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Rows: data sets and, of the benchmarks, `average`. Columns: <method>_<k> and <method>_<k>_std for every
    number of shots k, or <method> alone where there are no draws; seeds, the fewest of a method and k."""
    part = data[data["protocol"] == "few_shot"]
    frame = by_seed(part, ["method", "shots"])
    table, spread = means(frame), stds(frame)
    averaged = benchmarks(table)
    if averaged:
        table.loc["average"] = table.loc[averaged].mean(skipna=False)
        spread.loc["average"] = averages_by_seed(frame, averaged).std(ddof=1)
    shots = sorted(set(part["shots"]))
    found = pd.DataFrame(index=table.index)
    for name in names:
        if not draws(name):
            found[name] = pd.concat([column(table, name, k) for k in shots], axis=1).mean(axis=1)
            continue
        for k in shots:
            found[f"{name}_{k}"], found[f"{name}_{k}_std"] = column(table, name, k), column(spread, name, k)
    seeds = fewest(frame)
    found["seeds"] = seeds.reindex(found.index)
    if averaged:
        found.loc["average", "seeds"] = seeds[averaged].mean()
    return found.rename_axis("dataset")


def shots_of(table: pd.DataFrame, name: str) -> list[int]:
    """The numbers of shots of a method in a few_shot table."""
    found = [c.removeprefix(f"{name}_") for c in table.columns if c.startswith(f"{name}_")]
    return [int(k) for k in found if k.isdecimal()]


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


def row_title(dataset: str, table: pd.DataFrame, embedded: bool) -> str:
    """Display name of a row; an average says over how many data sets."""
    if dataset == "average":
        return f"Average of {len(benchmarks(table))}" + (" benchmarks" if own_data(table) else "")
    return title(dataset) + ("*" if embedded and dataset in TABLE else "")


def number(mean: float, std: float | None = None, sign: bool = False) -> str:
    """ "61.20", "61.20 ± 0.50" or "+3.10"."""
    if pd.isna(mean):
        return ""
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return text if std is None or pd.isna(std) else f"{text} ± {std:.2f}"


def published_rows(protocol: str, columns: list[str]) -> list[dict[str, Any]]:
    """Published figures of `protocol`, one row per method and data set, with their source."""
    entries = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return [
        {
            "Data set": "Average" if e["dataset"] == "average" else title(e["dataset"]),
            "Method": f"{e['method']} (published)",
        }
        | {
            c: number(e["values"][k]) if k in e["values"] else ""
            for c, k in zip(columns, ("base", "novel", "hm"), strict=False)
        }
        | {"Source": e["source"]}
        if protocol == "base_to_novel"
        else {
            "Data set": "Average" if e["dataset"] == "average" else title(e["dataset"]),
            "Method": f"{e['method']} (published)",
            "Accuracy": number(e["values"]["accuracy"]),
            "Source": e["source"],
        }
        for e in entries
        if e["protocol"] == protocol
    ]


def cell(protocol: str, names: list[str], row: "pd.Series[float]", key: str, group: str = "all") -> str:
    """What a table shows of `key` in a row, of the methods `names`: of one, or the difference of two."""
    if not all(able(name, protocol, group) for name in names):
        return GAP
    return number(row[key], row.get(f"{key}_std"), sign=key.startswith("difference"))


def display_base_to_novel(table: pd.DataFrame, names: list[str], embedded: bool) -> pd.DataFrame:
    """The table as text."""
    heads = {"base": "Base", "novel": "Novel", "h": "H"}
    rows = []
    for dataset, row in table.iterrows():
        cells = {"Data set": row_title(str(dataset), table, embedded)}
        for name in names:
            for g, head in heads.items():
                cells[f"{method_title(name)} {head}"] = cell("base_to_novel", [name], row, f"{name}_{g}", g)
        for g, head in heads.items() if len(names) > 1 else ():
            cells[f"Δ {head}"] = cell("base_to_novel", [names[0], names[-1]], row, f"difference_{g}", g)
        rows.append(cells)
    return pd.DataFrame(rows)


def display_transfer(table: pd.DataFrame, protocol: str, names: list[str], embedded: bool) -> pd.DataFrame:
    """The table as text."""
    return pd.DataFrame(
        {"Data set": row_title(str(dataset), table, embedded)}
        | {method_title(name): cell(protocol, [name], row, name) for name in names}
        | ({"Δ": cell(protocol, [names[0], names[-1]], row, "difference")} if len(names) > 1 else {})
        for dataset, row in table.iterrows()
    )


def display_few_shot(table: pd.DataFrame, names: list[str], embedded: bool) -> pd.DataFrame:
    """The table as text."""
    return pd.DataFrame(
        {"Data set": row_title(str(dataset), table, embedded)}
        | {
            f"{method_title(name)}, {k} shots" if k else method_title(name): cell(
                "few_shot", [name], row, f"{name}_{k}" if k else name
            )
            for name in names
            for k in shots_of(table, name) or [0]
        }
        for dataset, row in table.iterrows()
    )
