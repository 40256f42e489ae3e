"""`python -m pipeline cost --measured`: the seconds that trainings took, from their MLflow runs into timings.csv.

The file is in git; the stage `report`, which must not depend on a store, shows it.
"""

from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from heba import artifact, methods
from pipeline.core.params import Params, settings_of
from pipeline.core.paths import new_file
from pipeline.core.trainings import Training, trainings
from pipeline.report.cost import COLUMNS, FILE
from pipeline.tracking.log import DEVICE_TAG, SECONDS
from pipeline.tracking.models import find_run
from pipeline.tracking.store import answering, client, shown_uri


def collect(params: Params) -> pd.DataFrame:
    """A line per device and method, over the trainings of params.yaml that are here and in MLflow: COLUMNS.

    ValueError when there is none.
    """
    found: dict[tuple[str, str], list[tuple[float, float | None]]] = defaultdict(list)
    with answering():
        store = client()
        for training in trainings(params):
            run = find_run(store, training.folder) if training.folder.is_dir() else None
            if run and SECONDS in run.data.metrics:
                key = run.data.tags[DEVICE_TAG], training.method
                found[key].append((run.data.metrics[SECONDS], step_seconds(store, run, params, training)))
    if not found:
        raise ValueError(f"{shown_uri()} has no training of params.yaml with its seconds; run `dvc repro` first")
    rows = []
    for (device, method), times in sorted(found.items(), key=lambda item: place(params, *item[0])):
        steps = [step for _, step in times if step is not None]
        seconds, step = mean(whole for whole, _ in times), 1e3 * median(steps) if steps else float("nan")
        about = (params.suite, params.backbone.name, device, method, len(times))
        rows.append((*about, round(seconds, 2), round(step, 2)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def place(params: Params, device: str, method: str) -> tuple[str, int]:
    """Sort key: by device, then in the order of the tables."""
    return device, params.methods.index(method)


def step_seconds(store: Any, run: Any, params: Params, training: Training) -> float | None:
    """The seconds of a step through the towers, by the median epoch but the first, in which all begins; None for
    a method on frozen features."""
    about = methods.part(training.method, "settings")
    settings = settings_of(params, training.method, training.protocol, training.dataset)
    n_classes = len(artifact.read_config(training.folder).class_names)
    work = about.work(settings, n_classes * training.shots, n_classes)
    epochs = [metric.value for metric in store.get_metric_history(run.info.run_id, "seconds")]
    if not (work.prompts or work.images) or len(epochs) < 2:
        return None
    return median(epochs[1:]) / (work.steps / len(epochs))


def write(lines: pd.DataFrame, path: Path = FILE) -> None:
    """Write what `collect` gives."""
    with new_file(path) as temporary:
        lines.to_csv(temporary, index=False, lineterminator="\n")
