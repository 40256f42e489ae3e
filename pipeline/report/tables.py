"""The comparison tables as numeric pandas frames, in percent.

The harmonic mean H of a data set is the one of its base and novel accuracy averaged over seeds; H of an
average is the one of the averaged base and novel, as in the papers. std is the sample standard deviation
over seeds.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from heba.evaluation.metrics import harmonic_mean

Record = dict[str, Any]
TITLES = {
    "imagenet": "ImageNet",
    "caltech101": "Caltech101",
    "oxford_pets": "OxfordPets",
    "stanford_cars": "StanfordCars",
    "oxford_flowers": "Flowers102",
    "food101": "Food101",
    "fgvc_aircraft": "FGVCAircraft",
    "sun397": "SUN397",
    "dtd": "DTD",
    "eurosat": "EuroSAT",
    "ucf101": "UCF101",
    "imagenetv2": "ImageNetV2",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
}
# What a complete table of a protocol has; the transfer protocols' source is ImageNet in the papers.
COMPLETE = {
    "base_to_novel": list(TITLES)[:11],
    "cross_dataset": list(TITLES)[1:11],
    "domain_generalization": list(TITLES)[11:],
    "few_shot": list(TITLES)[:11],
}
METHODS = ("zero_shot", "heba")
GROUPS = {
    "base_to_novel": ("base", "novel"),
    "cross_dataset": ("all",),
    "domain_generalization": ("all",),
    "few_shot": ("all",),
}
PUBLISHED = Path(__file__).with_name("published.yaml")


def check_accuracy(record: Record, path: Path, keys: tuple[str, ...]) -> None:
    """ValueError unless the value under `keys` is a percentage; json reads NaN, and True is an int."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"{path}: key '{'.'.join(keys)}' must be a number from 0 to 100")


def title(dataset: str) -> str:
    """The display name: own data has none but its name."""
    return TITLES.get(dataset, dataset)


def order(dataset: str) -> tuple[int, str]:
    """Sort key of data sets: the papers' order, then own data by name."""
    return list(TITLES).index(dataset) if dataset in TITLES else len(TITLES), dataset


def benchmarks(table: pd.DataFrame) -> list[str]:
    """The rows of a table over which its average is: not those of own data."""
    return [str(dataset) for dataset in table.index if dataset in TITLES]


def own_data(table: pd.DataFrame) -> list[str]:
    """The rows of own data in a table."""
    return [str(dataset) for dataset in table.index if dataset not in TITLES and dataset != "average"]


def load_record(path: Path, own: Collection[str] = ()) -> Record:
    """Read an evaluation record; ValueError names the file and the key that is wrong. `own`: names of own data."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: must be a JSON object")
    for key in ("protocol", "suite", "backbone", "dataset", "seed", "shots", "groups"):
        if key not in record:
            raise ValueError(f"{path}: key {key!r} is missing; evaluate this data set again")
    if record["dataset"] not in [*TITLES, *own]:
        raise ValueError(f"{path}: key 'dataset': unknown data set {record['dataset']!r}")
    if record["protocol"] not in [*GROUPS]:
        raise ValueError(f"{path}: key 'protocol': unknown protocol {record['protocol']!r}")
    for group in GROUPS[record["protocol"]]:
        for method in METHODS:
            check_accuracy(record, path, ("groups", group, method, "accuracy"))
    return record


def sorted_records(records: list[Record]) -> list[Record]:
    """By protocol, data set, shots and seed."""
    return sorted(records, key=lambda r: (r["protocol"], order(r["dataset"]), r["shots"], r["seed"]))


def accuracies(records: list[Record], protocol: str) -> pd.DataFrame:
    """One row per record of `protocol`: dataset, shots, seed and an accuracy column `<method>_<group>` each."""
    rows = [
        {"dataset": r["dataset"], "shots": r["shots"], "seed": r["seed"]}
        | {f"{m}_{g}": v[m]["accuracy"] for g, v in r["groups"].items() for m in METHODS}
        for r in records
        if r["protocol"] == protocol
    ]
    return pd.DataFrame(rows)


def base_to_novel_table(records: list[Record]) -> pd.DataFrame:
    """Rows: data sets and `average`, which there is when there are benchmarks. Columns: <method>_{base,novel,h},
    heba_{base,novel,h}_std, difference_{base,novel,h}, seeds. std is NaN with one seed."""
    data = accuracies(records, "base_to_novel")
    rows: dict[str, dict[str, float]] = {}
    for dataset in sorted(data["dataset"].unique(), key=order):
        part = data[data["dataset"] == dataset]
        row = {f"{m}_{g}": part[f"{m}_{g}"].mean() for m in METHODS for g in ("base", "novel")}
        h = [harmonic_mean(b, n) for b, n in zip(part["heba_base"], part["heba_novel"], strict=True)]
        row |= {f"heba_{g}_std": part[f"heba_{g}"].std(ddof=1) for g in ("base", "novel")}
        row["heba_h_std"] = pd.Series(h).std(ddof=1)
        row["seeds"] = len(part)
        rows[dataset] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    averaged = benchmarks(table)
    if averaged:
        average = table.loc[averaged].mean()
        # Averages are over data sets; their spread is that of the per-seed averages.
        data = data[data["dataset"].isin(averaged)]
        by_seed = data.groupby("seed").mean(numeric_only=True)
        if len(averaged) * len(by_seed) == len(data):
            seeds = zip(by_seed["heba_base"], by_seed["heba_novel"], strict=True)
            for g in ("base", "novel"):
                average[f"heba_{g}_std"] = by_seed[f"heba_{g}"].std(ddof=1)
            average["heba_h_std"] = pd.Series([harmonic_mean(b, n) for b, n in seeds]).std(ddof=1)
        else:
            average[[f"heba_{g}_std" for g in ("base", "novel", "h")]] = float("nan")
        table.loc["average"] = average
    for m in METHODS:
        table[f"{m}_h"] = [
            harmonic_mean(b, n) for b, n in zip(table[f"{m}_base"], table[f"{m}_novel"], strict=True)
        ]
    for g in ("base", "novel", "h"):
        table[f"difference_{g}"] = table[f"heba_{g}"] - table[f"zero_shot_{g}"]
    columns = [f"{m}_{g}" for m in METHODS for g in ("base", "novel", "h")]
    columns += [f"heba_{g}_std" for g in ("base", "novel", "h")]
    columns += [f"difference_{g}" for g in ("base", "novel", "h")] + ["seeds"]
    return table[columns].rename_axis("dataset")


def transfer_table(records: list[Record], protocol: str) -> pd.DataFrame:
    """Rows: target data sets and `average`. Columns: zero_shot, heba, heba_std, difference, seeds."""
    data = accuracies(records, protocol)
    groups = data.groupby("dataset")
    table = pd.DataFrame(
        {
            "zero_shot": groups["zero_shot_all"].mean(),
            "heba": groups["heba_all"].mean(),
            "heba_std": groups["heba_all"].std(ddof=1),
            "seeds": groups.size().astype(float),
        }
    )
    table = table.loc[sorted(table.index, key=order)]
    table.loc["average"] = table.mean()
    table.loc["average", "heba_std"] = (
        data.groupby("seed")["heba_all"].mean().std(ddof=1)
        if len(groups) * data["seed"].nunique() == len(data)
        else float("nan")
    )
    table["difference"] = table["heba"] - table["zero_shot"]
    return table[["zero_shot", "heba", "heba_std", "difference", "seeds"]].rename_axis("dataset")


def few_shot_table(records: list[Record]) -> pd.DataFrame:
    """Rows: data sets and, of the benchmarks, `average`. Columns: zero_shot, heba_<k> and heba_<k>_std for every
    number of shots k, and seeds, the fewest over k. The average of a k that a data set lacks is NaN."""
    data = accuracies(records, "few_shot")
    means = data.pivot_table(index="dataset", columns="shots", values="heba_all", aggfunc="mean")
    stds = data.pivot_table(index="dataset", columns="shots", values="heba_all", aggfunc=_std, dropna=False)
    counts = data.pivot_table(index="dataset", columns="shots", values="heba_all", aggfunc="size", fill_value=0)
    table = pd.DataFrame({"zero_shot": data.groupby("dataset")["zero_shot_all"].mean()})
    for k in means.columns:
        table[f"heba_{k}"], table[f"heba_{k}_std"] = means[k], stds[k]
    table["seeds"] = counts.min(axis=1).astype(float)
    table = table.loc[sorted(table.index, key=order)]
    averaged = benchmarks(table)
    if not averaged:
        return table.rename_axis("dataset")
    average = table.loc[averaged].mean(skipna=False)
    data = data[data["dataset"].isin(averaged)]
    for k in means.columns:
        part = data[data["shots"] == k]
        complete = len(part) == len(averaged) * part["seed"].nunique()
        average[f"heba_{k}_std"] = _std(part.groupby("seed")["heba_all"].mean()) if complete else float("nan")
    table.loc["average"] = average
    return table.rename_axis("dataset")


def _std(values: "pd.Series[float]") -> float:
    return float(values.std(ddof=1))


def shots_of(table: pd.DataFrame) -> list[int]:
    """The numbers of shots of a few_shot table."""
    return [int(c.split("_")[1]) for c in table.columns if c.startswith("heba_") and not c.endswith("_std")]


def incomplete(table: pd.DataFrame) -> list[str]:
    """Data sets of a table that have fewer seeds than the fullest one."""
    seeds = table["seeds"].drop("average", errors="ignore")
    return list(seeds.index[seeds < seeds.max()])


def row_title(dataset: str, table: pd.DataFrame, embedded: bool) -> str:
    """Display name of a row; an average says over how many data sets."""
    if dataset == "average":
        return f"Average of {len(benchmarks(table))}" + (" benchmarks" if own_data(table) else "")
    return title(dataset) + ("*" if embedded and dataset in TITLES else "")


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
            "Data set": "Average" if e["dataset"] == "average" else TITLES[e["dataset"]],
            "Method": f"{e['method']} (published)",
        }
        | {
            c: number(e["values"][k]) if k in e["values"] else ""
            for c, k in zip(columns, ("base", "novel", "hm"), strict=False)
        }
        | {"Source": e["source"]}
        if protocol == "base_to_novel"
        else {
            "Data set": "Average" if e["dataset"] == "average" else TITLES[e["dataset"]],
            "Method": f"{e['method']} (published)",
            "Accuracy": number(e["values"]["accuracy"]),
            "Source": e["source"],
        }
        for e in entries
        if e["protocol"] == protocol
    ]


def display_base_to_novel(table: pd.DataFrame, embedded: bool) -> pd.DataFrame:
    """The table as text."""
    rows = []
    for dataset, row in table.iterrows():
        cells = {"Data set": row_title(str(dataset), table, embedded)}
        for g, name in (("base", "Base"), ("novel", "Novel"), ("h", "H")):
            cells[f"CLIP {name}"] = number(row[f"zero_shot_{g}"])
        for g, name in (("base", "Base"), ("novel", "Novel"), ("h", "H")):
            cells[f"HeBA {name}"] = number(row[f"heba_{g}"], row[f"heba_{g}_std"])
        for g, name in (("base", "Base"), ("novel", "Novel"), ("h", "H")):
            cells[f"Δ {name}"] = number(row[f"difference_{g}"], sign=True)
        rows.append(cells)
    return pd.DataFrame(rows)


def display_transfer(table: pd.DataFrame, embedded: bool) -> pd.DataFrame:
    """The table as text."""
    return pd.DataFrame(
        {
            "Data set": row_title(str(dataset), table, embedded),
            "CLIP": number(row["zero_shot"]),
            "HeBA": number(row["heba"], row["heba_std"]),
            "Δ": number(row["difference"], sign=True),
        }
        for dataset, row in table.iterrows()
    )


def display_few_shot(table: pd.DataFrame, embedded: bool) -> pd.DataFrame:
    """The table as text."""
    return pd.DataFrame(
        {"Data set": row_title(str(dataset), table, embedded), "CLIP": number(row["zero_shot"])}
        | {f"HeBA, {k} shots": number(row[f"heba_{k}"], row[f"heba_{k}_std"]) for k in shots_of(table)}
        for dataset, row in table.iterrows()
    )
