"""`python -m pipeline ablate`: one setting at a time is changed, as a DVC experiment, on chosen data sets.

What the experiments gave is read from MLflow into ablation.csv, which is in git; the stage `report`, which must
not depend on a store, renders it. Runs are found by the params that they carry, not by the experiment's name: DVC
takes a training that was done before from its cache, and then no run has that name.
"""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.core.params import Params, ParamsError
from pipeline.core.paths import new_file
from pipeline.report.ablation import BASELINE, COLUMNS
from pipeline.runner import processes
from pipeline.tracking import log as tracking
from pipeline.tracking.store import client, shown_uri

PROTOCOL = "base_to_novel"
SHOWN = 3  # trainings that a message names


@dataclass(frozen=True)
class Setting:
    """A row of the ablation table.

    Attributes:
        name: its DVC experiment is ablate-<name>. label: for the table.
        change: the params that differ, by their dotted names.
    """

    name: str
    label: str
    change: dict[str, Any]


def _each(name: str, label: str, key: str, values: Iterable[Any]) -> list[Setting]:
    return [Setting(f"{name}-{value}", f"{label}: {value}", {key: value}) for value in values]


SETTINGS = {
    "init": _each("init", "Initialisation", "adapter.init", ("kaiming", "zero")),
    "visual_block": _each("visual_block", "Visual block", "adapter.visual_block", ("conv", "linear")),
    "text_block": _each("text_block", "Text block", "adapter.text_block", ("linear", "conv1d")),
    "ratio": _each("ratio", "Ratio", "adapter.ratio", (1, 2, 4, 8)),
    "expansion": [
        Setting(
            "expansion-2", "Inverted bottleneck: twice the width", {"adapter.ratio": 1, "adapter.expansion": 2}
        )
    ],
    "slow_fast": [Setting("slow_fast-off", "Slow-fast: off", {"adapter.slow_ratio": 1.0})],
    "label_smoothing": _each("label_smoothing", "Label smoothing", "train.label_smoothing", (0.0, 0.1)),
    "negatives": [
        Setting("negatives-all", "Negatives: all classes", {"train.neg_ratio": 0}),
        *_each("negatives", "Negatives per class", "train.neg_ratio", (1, 5)),
    ],
    "gradient_scale": [
        Setting("gradient_scale-on", "Gradient scale: on", {"adapter.gradient_scale": True}),
        Setting("gradient_scale-off", "Gradient scale: off", {"adapter.gradient_scale": False}),
    ],
    "towers": _each("towers", "Adapted towers", "adapter.towers", ("both", "image", "text")),
}


def settings(params: Params, only: list[str]) -> list[Setting]:
    """The rows: params.yaml as it stands, then what differs from it, of the ablations in `only` or of all."""
    unknown = [name for name in only if name not in SETTINGS]
    if unknown:
        raise ParamsError(f"--only: there is no ablation {', '.join(unknown)}; known are {', '.join(SETTINGS)}")
    own = tracking.flat_params(params.model_dump())
    rows = [row for name in only or SETTINGS for row in SETTINGS[name]]
    differing = [row for row in rows if any(own[key] != str(value) for key, value in row.change.items())]
    return [Setting("baseline", BASELINE, {}), *differing]


def chosen(params: Params, datasets: list[str]) -> list[str]:
    """`datasets`, or all of params.yaml's."""
    if not params.seeds:
        raise ParamsError("seeds: empty, and ablations train and evaluate base_to_novel")
    unknown = [name for name in datasets if name not in params.datasets]
    if unknown:
        known = ", ".join(params.datasets)
        raise ParamsError(f"--datasets: {', '.join(unknown)} not in params.yaml, which has {known}")
    return datasets or params.datasets


def command(params: Params, row: Setting, datasets: list[str]) -> list[str]:
    """The arguments of `dvc` that queue a row: base_to_novel alone, on `datasets` alone."""
    source = params.transfer.source
    change = row.change | {
        "datasets": datasets,
        "transfer.source": source if source in datasets else datasets[0],
        "transfer.targets": [],
        "transfer.variants": [],
        "transfer.seeds": [],
        "few_shot.datasets": [],
        "few_shot.seeds": [],
    }
    # Own data is left out by deletion, since own={} would be merged with what there is.
    overrides = [*(f"{key}={_hydra(value)}" for key, value in change.items()), "~own", "+own={}"]
    return ["exp", "run", "--queue", "-n", experiment(row), *(p for o in overrides for p in ("-S", o))]


def experiment(row: Setting) -> str:
    """The name of a row's DVC experiment."""
    return f"ablate-{row.name}"


def _hydra(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def dvc(args: list[str]) -> str:
    """Run `dvc` and return what it prints; OSError with its message when it fails."""
    done = processes.dvc([processes.WAIT, *args], Path())
    if done.returncode:
        raise OSError(f"{shlex.join(['dvc', *args])} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout


def queue(params: Params, rows: list[Setting], datasets: list[str]) -> None:
    """Queue the experiments of `rows`, or none: DVC would refuse a name that an experiment has already."""
    names = [experiment(row) for row in rows]
    present = [name for name in dvc(["exp", "list", "--name-only"]).split() if name in names]
    if present:
        raise ParamsError(
            f"{', '.join(present)}: there are experiments of these names already; their runs stay in MLflow when "
            f"you remove them with `dvc exp remove {' '.join(present)}`"
        )
    for row in rows:
        args = command(params, row, datasets)
        print(shlex.join(["dvc", *args]), flush=True)
        dvc(args)


def wanted_params(params: Params, row: Setting, dataset: str, seed: int) -> dict[str, str]:
    """The params by which MLflow knows the training of a row, as strings: all but those of the machine."""
    config = params.model_dump(include={"shots", "suite", "backbone", "train"})
    config |= {"adapter": params.adapter.model_dump(exclude={"scale_novel"})}  # which evaluation alone reads
    config |= {"protocol": PROTOCOL, "dataset": dataset, "seed": seed}
    return tracking.flat_params(config) | {key: str(value) for key, value in row.change.items()}


def collect(
    params: Params, rows: list[Setting], datasets: list[str], queueing: str
) -> tuple[pd.DataFrame, list[str], list[str]]:
    """What MLflow has of the trainings of `rows`, on `datasets`, for the seeds of params.yaml.

    A training is evaluated when the last evaluation of its run used the novel scale of params.yaml. `queueing` is
    the command that queues `rows` on `datasets`, for a message.

    Returns: a line per evaluated training, from its newest finished run; the names of those that are trained but
    not evaluated; the labels of rows without any. ValueError when none is evaluated.
    """
    store = client()
    found_experiment = store.get_experiment_by_name(PROTOCOL)
    runs = []
    if found_experiment:
        query = f"attributes.status = 'FINISHED' and params.suite = '{params.suite}'"
        ids, newest_first = [found_experiment.experiment_id], ["attributes.start_time DESC"]
        runs = store.search_runs(ids, query, max_results=50000, order_by=newest_first)
    adapter = params.adapter
    evaluation = {"scale_novel": adapter.scale if adapter.scale_novel is None else adapter.scale_novel}.items()
    lines, unevaluated, absent = [], [], []
    for row in rows:
        trained = False
        for dataset, seed in product(datasets, params.seeds):
            wanted = wanted_params(params, row, dataset, seed).items()
            same = [run.data for run in runs if wanted <= run.data.params.items()]
            metrics = next((data.metrics for data in same if evaluation <= data.metrics.items()), None)
            if metrics is not None:
                values = (metrics["heba_base"], metrics["heba_novel"])
                lines.append((row.label, params.suite, dataset, seed, params.shots, *values))
            elif same:
                unevaluated.append(f"{row.label}, {dataset}, seed {seed}")
            trained |= bool(same)
        if not trained:
            absent.append(row.label)
    if not lines:
        raise ValueError(
            f"{shown_uri()} has no evaluated training of these settings; queue them with `{queueing}`, start them "
            "with `dvc queue start`" + (f"\n{unevaluated_text(unevaluated)}" if unevaluated else "")
        )
    return pd.DataFrame(lines, columns=list(COLUMNS)), unevaluated, absent


def unevaluated_text(names: list[str]) -> str:
    """One line that counts trainings that lack an evaluation and names the first ones."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"trained, but not evaluated at the novel scale of params.yaml, or at another one since: {len(names)} "
        f"({'; '.join(names[:SHOWN])}{more})"
    )


def write(lines: pd.DataFrame, path: Path) -> None:
    """Write what `collect` gives."""
    with new_file(path) as temporary:
        lines.to_csv(temporary, index=False, lineterminator="\n")
