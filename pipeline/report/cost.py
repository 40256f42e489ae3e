"""The table of what each method costs: trained parameters and the size of an adapter, as evaluated; operations, as
counted; seconds, as measured by MLflow and kept in timings.csv, which `python -m pipeline cost --measured` writes.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import pandas as pd

from heba.evaluation.cost import CLASSES, IMAGES, Cost
from heba.evaluation.record import Record
from pipeline.report.tables import Block, method_title

FILE = Path("timings.csv")
# A line per device and method; seconds of a training, on the average, and milliseconds of a step.
COLUMNS = ("suite", "backbone", "device", "method", "trainings", "seconds", "step_ms")
SHOWN = ("method", "trained_parameters", "adapter_bytes", "gflop_step", "gflop_image", "step_ms", "seconds")
NOTES = (
    "Trained parameters and the size of an adapter are means over the trainings that were evaluated.",
    f"GFLOP are counted for {CLASSES} classes of {IMAGES} images each: of a training step through the towers, "
    "which a method on frozen features does not have, and of a test image with the image tower.",
)


def read(path: Path, suite: str, backbone: str) -> pd.DataFrame:
    """The lines of timings.csv of `suite` and `backbone`; ValueError names what is wrong with the file."""
    remedy = "`git checkout timings.csv` brings it back, `python -m pipeline cost --measured` makes a new one"
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {remedy}") from None
    if tuple(frame.columns) != COLUMNS:
        raise ValueError(f"{path}: has the columns {', '.join(frame.columns)}; {remedy}")
    return frame[(frame["suite"] == suite) & (frame["backbone"] == backbone)]


def cost_table(
    records: list[Record], names: list[str], costs: Mapping[str, Cost], timings: pd.DataFrame | None
) -> pd.DataFrame:
    """A row per method of `names` that was evaluated, with the columns SHOWN; NaN for what is not known.

    Args:
        costs: by method. timings: of `read`, where a method's first line counts.
    """
    rows = []
    for name in names:
        own = [record for record in records if record.method == name]
        if not own or name not in costs:
            continue
        measured = pd.DataFrame() if timings is None else timings[timings["method"] == name]
        step, seconds = measured[["step_ms", "seconds"]].iloc[0] if len(measured) else (None, None)
        parameters = mean(record.trained_parameters for record in own)
        size = mean(record.adapter_bytes for record in own)
        operations = (costs[name].step / 1e9, costs[name].image / 1e9)
        rows.append((name, round(parameters), round(size), *operations, step, seconds))
    return pd.DataFrame(rows, columns=list(SHOWN))


def cost_block(table: pd.DataFrame, averages: pd.DataFrame) -> Block:
    """`cost_table` as it is shown, beside the `averages` of the overview; the columns that were measured are there
    where they have a number."""
    cells = {
        "Method": [method_title(name) for name in table["method"]],
        "Trained parameters": [f"{value:,}" for value in table["trained_parameters"]],
        "Adapter, MB": [_number(value / 1e6) for value in table["adapter_bytes"]],
        "GFLOP a step": [_number(value) if value else "–" for value in table["gflop_step"]],
        "GFLOP an image": [_number(value) for value in table["gflop_image"]],
    }
    for head, column in (("ms a step", "step_ms"), ("s a training", "seconds")):
        if table[column].notna().any():
            cells[head] = ["–" if pd.isna(value) else _number(value) for value in table[column]]
    frame = pd.DataFrame(cells)
    if len(averages):
        frame = frame.merge(averages, on="Method", how="left")
    return Block("", frame, frame.map(lambda _: 0))


def _number(value: float) -> str:
    """With three digits that count, down to 0.001."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 or not value else "<0.001"


def notes(timings: pd.DataFrame | None) -> list[str]:
    """Sentences for under the table."""
    devices = "" if timings is None else ", ".join(dict.fromkeys(timings["device"]))
    measured = (
        f"Seconds are those of MLflow's runs on {devices}: the mean training, and the median epoch by its steps."
        if devices
        else "Seconds are not measured yet: `python -m pipeline cost --measured` takes them from MLflow's runs."
    )
    return [*NOTES, measured]
