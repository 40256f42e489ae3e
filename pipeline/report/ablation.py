"""The ablation table from ablation.csv, which `python -m pipeline ablate --table` fills from MLflow."""

from pathlib import Path

import pandas as pd

from heba.data.datasets import order, title
from heba.evaluation.metrics import harmonic_mean
from pipeline.report.tables import Block, number

FILE = Path("ablation.csv")
BASELINE = "Baseline"
# A line per setting, data set and seed; accuracies in percent.
COLUMNS = ("setting", "suite", "dataset", "seed", "shots", "base", "novel")
NOTE = (
    "The baseline, and one setting of it changed at a time. Base and Novel are means over data sets of means over "
    "seeds, H is their harmonic mean; Δ is the difference to the baseline on the trainings that both have."
)


def read(path: Path, suite: str) -> pd.DataFrame:
    """The lines of `suite`; ValueError names what is wrong with the file and the remedy."""
    remedy = (
        "`git checkout ablation.csv` brings the last one back, `python -m pipeline ablate --table` makes a new one"
    )
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None
    if tuple(frame.columns) != COLUMNS:
        raise ValueError(f"{path}: has the columns {', '.join(frame.columns)}; {remedy}")
    return frame[frame["suite"] == suite]


def ablation_table(lines: pd.DataFrame) -> pd.DataFrame:
    """Rows: settings. Columns: base, novel, h, difference_{base,novel,h} to the baseline (NaN where they share no
    training), datasets, trainings."""
    rows = {}
    baseline = lines[lines["setting"] == BASELINE]
    for setting, part in lines.groupby("setting", sort=False):
        both = part.merge(baseline, on=["dataset", "seed"], suffixes=("", "_baseline"))
        row, own, other = _means(part), _means(both), _means(both, "_baseline")
        row |= {f"difference_{key}": own[key] - other[key] for key in own}
        rows[setting] = row | {"datasets": part["dataset"].nunique(), "trainings": len(part)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("setting")


def _means(lines: pd.DataFrame, suffix: str = "") -> dict[str, float]:
    base, novel = (lines.groupby("dataset")[f"{g}{suffix}"].mean().mean() for g in ("base", "novel"))
    h = harmonic_mean(base, novel) if len(lines) else float("nan")
    return {"base": base, "novel": novel, "h": h}


def display_ablation(table: pd.DataFrame) -> Block:
    """The table as it is shown."""
    names = {"base": "Base", "novel": "Novel", "h": "H"}
    cells = pd.DataFrame(
        {"Setting": setting}
        | {name: number(row[key]) for key, name in names.items()}
        | {
            f"Δ {name}": number(row[f"difference_{key}"], sign=True) if setting != BASELINE else ""
            for key, name in names.items()
        }
        | {"Data sets": f"{row['datasets']:.0f}", "Trainings": f"{row['trainings']:.0f}"}
        for setting, row in table.iterrows()
    )
    return Block("", cells, pd.DataFrame(0, index=cells.index, columns=cells.columns))


def notes(lines: pd.DataFrame) -> list[str]:
    """Sentences under the table."""
    datasets = ", ".join(map(title, sorted(set(lines["dataset"]), key=order)))
    shots = ", ".join(str(k) for k in sorted(set(lines["shots"])))
    return [NOTE, f"Data sets: {datasets}; {shots} shots per class."]
