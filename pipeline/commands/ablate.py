"""`python -m pipeline ablate`: one setting at a time is changed, as a DVC experiment, on chosen data sets.

What the experiments gave is read from MLflow into ablation.csv, which is in git; the stage `report`, which must
not depend on a store, renders it. Runs are found by the params that they carry, not by the experiment's name: DVC
takes a training that was done before from its cache, and then no run has that name.
"""

import json
import shlex
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from heba import methods
from pipeline.core.params import Params, ParamsError, settings_of
from pipeline.core.paths import new_file
from pipeline.report.ablation import BASELINE, COLUMNS
from pipeline.runner import dvc_inside, processes
from pipeline.tracking import describe
from pipeline.tracking import log as tracking
from pipeline.tracking.store import client, shown_uri

PROTOCOL = "base_to_novel"
SHOWN = 3  # trainings that a message names


@dataclass(frozen=True)
class Row:
    """A row of the ablation table.

    Attributes:
        name: its DVC experiment is ablate-<name>. label: for the table.
        change: the params that differ, by their dotted names.
    """

    name: str
    label: str
    change: dict[str, Any]


def ablated_method(params: Params) -> str:
    """The first method of params.yaml that has ablations."""
    for method in params.methods:
        if methods.has_part(method, "ablations"):
            return method
    raise ParamsError(f"methods: none of {', '.join(params.methods)} has ablations")


def rows(params: Params, only: list[str]) -> list[Row]:
    """params.yaml as it stands, then what differs from it, of the ablations in `only` or of all."""
    method = ablated_method(params)
    known = methods.part(method, "ablations").ABLATIONS
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ParamsError(f"--only: there is no ablation {', '.join(unknown)}; known are {', '.join(known)}")
    own = settings_of(params, method, PROTOCOL).model_dump()
    changes = [change for name in only or known for change in known[name]]
    differing = [c for c in changes if any(own[key] != value for key, value in c.settings.items())]
    dotted = [{f"{method}.{key}": value for key, value in c.settings.items()} for c in differing]
    return [
        Row("baseline", BASELINE, {}),
        *(Row(c.name, c.label, change) for c, change in zip(differing, dotted, strict=True)),
    ]


def chosen(params: Params, datasets: list[str]) -> list[str]:
    """`datasets`, or all of params.yaml's."""
    if not params.seeds:
        raise ParamsError("seeds: empty, and ablations train and evaluate base_to_novel")
    unknown = [name for name in datasets if name not in params.datasets]
    if unknown:
        known = ", ".join(params.datasets)
        raise ParamsError(f"--datasets: {', '.join(unknown)} not in params.yaml, which has {known}")
    return datasets or params.datasets


def command(params: Params, row: Row, datasets: list[str]) -> list[str]:
    """The arguments of `dvc` that queue a row: base_to_novel alone, on `datasets` alone."""
    source = params.transfer.source
    change = row.change | {
        "methods": [ablated_method(params)],
        "datasets": datasets,
        "transfer.source": source if source in datasets else datasets[0],
        "transfer.targets": [],
        "transfer.variants": [],
        "transfer.protocols": [],
        "few_shot.datasets": [],
        "few_shot.seeds": [],
    }
    # Own data is left out by deletion, since own={} would be merged with what there is.
    overrides = [*(f"{key}={_hydra(value)}" for key, value in change.items()), "~own", "+own={}"]
    return ["exp", "run", "--queue", "-n", experiment(row), *(p for o in overrides for p in ("-S", o))]


def experiment(row: Row) -> str:
    """The name of a row's DVC experiment."""
    return f"ablate-{row.name}"


def _hydra(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def dvc(args: list[str]) -> str:
    """Run `dvc` and return what it prints; OSError with its message when it fails."""
    done = processes.dvc([dvc_inside.WAIT, *args], Path())
    if done.returncode:
        raise OSError(f"{shlex.join(['dvc', *args])} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout


def queue(params: Params, table: list[Row], datasets: list[str]) -> None:
    """Queue the experiments of `table`, or none: DVC would refuse a name that an experiment has already."""
    names = [experiment(row) for row in table]
    present = [name for name in dvc(["exp", "list", "--name-only"]).split() if name in names]
    if present:
        raise ParamsError(
            f"{', '.join(present)}: there are experiments of these names already; their runs stay in MLflow when "
            f"you remove them with `dvc exp remove {' '.join(present)}`"
        )
    for row in table:
        args = command(params, row, datasets)
        print(shlex.join(["dvc", *args]), flush=True)
        dvc(args)


def wanted_params(params: Params, row: Row, dataset: str, seed: int) -> dict[str, str]:
    """The params by which MLflow knows the training of a row, as strings: all but those of the machine."""
    method = ablated_method(params)
    settings = settings_of(params, method, PROTOCOL).model_dump(
        exclude=set(methods.part(method, "settings").EVALUATION)
    )
    config = params.model_dump(include={"shots", "suite", "backbone"})
    config |= {"method": method, "settings": settings, "protocol": PROTOCOL, "dataset": dataset, "seed": seed}
    return describe.flat_params(config) | {key: str(value) for key, value in row.change.items()}


def collect(
    params: Params, table: list[Row], datasets: list[str], queueing: str
) -> tuple[pd.DataFrame, list[str], list[str]]:
    """What MLflow has of the trainings of `table`, on `datasets`, for the seeds of params.yaml.

    A training is evaluated when the last evaluation of its run used the settings of params.yaml. `queueing` is the
    command that queues `table` on `datasets`, for a message.

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
    method = ablated_method(params)
    settings = settings_of(params, method, PROTOCOL).model_dump(
        include=set(methods.part(method, "settings").EVALUATION)
    )
    evaluation = (tracking.EVALUATION_TAG, tracking.evaluation_tag(settings))
    lines, unevaluated, absent = [], [], []
    for row in table:
        trained = False
        for dataset, seed in product(datasets, params.seeds):
            wanted = wanted_params(params, row, dataset, seed).items()
            same = [run.data for run in runs if wanted <= run.data.params.items()]
            metrics = next((data.metrics for data in same if evaluation in data.tags.items()), None)
            if metrics is not None:
                values = (metrics["base"], metrics["novel"])
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
        f"trained, but not evaluated with the settings of params.yaml, or with others since: {len(names)} "
        f"({'; '.join(names[:SHOWN])}{more})"
    )


def write(lines: pd.DataFrame, path: Path) -> None:
    """Write what `collect` gives."""
    with new_file(path) as temporary:
        lines.to_csv(temporary, index=False, lineterminator="\n")
