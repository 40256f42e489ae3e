"""The summary of a pipeline run: one MLflow run per report, in an experiment of its own.

It is known by the hash of evaluations.csv, which has every accuracy and the hashes of its training. The same
results are one summary, whichever experiment, `dvc repro` or `python -m pipeline track` comes to them.

A training may be part of many summaries: with other shots, few_shot's stay as they are. Its parent is the summary
of the report that was made last; trainings.csv, beside the report among the artifacts, lists all of a summary.

All is read from the report and the trainings' runs, and not from params.yaml, which may be another one by now.
"""

import csv
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.tracking import origin, runs
from pipeline.tracking.experiments import METRICS, NOTE_TAG, SUMMARY, VIEW_TAG, experiment_id, table, view
from pipeline.tracking.store import INPUTS_TAG, SHA_TAG

CONTENT_TAG = "heba.evaluations_sha256"
REPORT_TAG = "heba.report_sha256"
PARENT_TAG = "mlflow.parentRunId"
NUMBERS = ("metrics.json", "averages.json")  # the headline first
PARAMS_AT_ONCE, METRICS_AT_ONCE, RUNS_AT_ONCE = 100, 1000, 1000
MOST_NOTE = 7000  # characters; MLflow takes 8000
COLUMNS = 12  # metrics in the saved view
OWN = {"dataset", "method", "protocol", "seed", "shots"}  # params that tell trainings apart

Row = dict[str, str]


def bring_up_to_date(store: Any, reports: Path) -> str | None:
    """Make the summary of the report in the folder `reports`, or bring it up to date; returns the id of its run.

    None where the report has no evaluations. The caller holds `log.one_at_a_time`.
    """
    evaluations = reports / "evaluations.csv"
    rows = list(_rows(evaluations)) if evaluations.is_file() else []
    if not rows:
        return None
    content, experiment = hashlib.sha256(evaluations.read_bytes()).hexdigest(), experiment_id(store, SUMMARY)
    finished = f"tags.`{CONTENT_TAG}` = '{content}' AND attributes.status = 'FINISHED'"
    found = next(iter(store.search_runs([experiment], finished, max_results=1)), None)
    if found:
        _complete(store, found.info.run_id, reports, rows)
        return str(found.info.run_id)
    opened = _begin(store, experiment, content, rows)
    _complete(store, opened.id, reports, rows)
    opened.end()
    return opened.id


def _complete(store: Any, run_id: str, reports: Path, rows: list[Row]) -> None:
    """Log what a summary lacks: the same results may be shown in another way, and more trainings be in MLflow."""
    trainings, run = covered(store, rows), store.get_run(run_id)
    _log_params(store, run, params(rows, trainings))
    if run.data.tags.get(REPORT_TAG) != _sha256(reports):
        _log_report(store, run.info.experiment_id, run_id, reports)
    _log_trainings(store, run_id, trainings)


def _log_report(store: Any, experiment: str, run_id: str, reports: Path) -> None:
    """Log the report's headline numbers, and all of its files."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    found = [numbers(path) for path in map(reports.joinpath, NUMBERS) if path.is_file()]
    metrics = [Metric(name, value, now, 0) for few in found for name, value in few.items()]
    for first in range(0, len(metrics), METRICS_AT_ONCE):
        store.log_batch(run_id, metrics=metrics[first : first + METRICS_AT_ONCE])
    columns = [f"metrics.`{metric.key}`" for metric in metrics[:COLUMNS]]
    store.set_experiment_tag(experiment, VIEW_TAG, view([*columns, "params.`shots`", "params.`seeds`"]))
    store.log_artifacts(run_id, str(reports), "reports")
    told = {REPORT_TAG: _sha256(reports), NOTE_TAG: note(store, experiment, run_id, reports)}
    store.log_batch(run_id, tags=[RunTag(key, value) for key, value in told.items()])


def _rows(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _sha256(folder: Path) -> str:
    """The hash of all files under `folder`, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def _begin(store: Any, experiment: str, content: str, rows: list[Row]) -> runs.OpenRun:
    """Open the summary's run, or the one that was cut off."""
    tags = origin.tags()
    before = runs.cut_off(store, experiment, CONTENT_TAG, content)
    shots = "-".join(_distinct(rows, "shots", few_shot=False) or _distinct(rows, "shots", few_shot=True))
    what = tags.get(origin.EXPERIMENT_TAG) or tags.get("mlflow.source.git.branch") or "results"
    name, again = f"{what}-{shots}shot-{content[:6]}", before.info.run_id if before else None
    return runs.begin(store, experiment, name, tags | {CONTENT_TAG: content}, again=again)


def numbers(path: Path) -> dict[str, float]:
    """The numbers of a file of metrics, by their names for DVC without the word average, such as
    base_to_novel.heba.h."""
    return dict(_flat(json.loads(path.read_text(encoding="utf-8")), []))


def _flat(value: Any, names: list[str]) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, names if key == "average" else [*names, key])
    else:
        yield ".".join(names), float(value)


def covered(store: Any, rows: Sequence[Row]) -> list[Any]:
    """The runs that MLflow has of the trainings that `rows` are about, of each the newest, in the order of the
    rows."""
    wanted = dict.fromkeys((row["adapter_sha256"], row["inputs_sha256"]) for row in rows)
    ids = [e.experiment_id for e in map(store.get_experiment_by_name, METRICS) if e is not None]
    found: dict[tuple[str, str], Any] = {}
    token = None
    while ids and len(found) < len(wanted):
        page = store.search_runs(ids, "attributes.status = 'FINISHED'", max_results=RUNS_AT_ONCE, page_token=token)
        for run in page:  # the newest first
            key = run.data.tags.get(SHA_TAG, ""), run.data.tags.get(INPUTS_TAG, "")
            if key in wanted:
                found.setdefault(key, run)
        token = page.token
        if not token:
            break
    return [found[key] for key in wanted if key in found]


def params(rows: Sequence[Row], trainings: Sequence[Any]) -> dict[str, str]:
    """What was compared, and the settings that the trainings had. One that differs among them, as in an override
    of a protocol, has all of its values."""
    found = {
        "methods": ", ".join(_distinct(rows, "method")),
        "datasets": ", ".join(_distinct(rows, "dataset")),
        "protocols": ", ".join(_distinct(rows, "protocol")),
    }
    for few_shot, prefix in ((False, ""), (True, "few_shot.")):
        for key, name in (("shots", "shots"), ("seed", "seeds")):
            values = _distinct(rows, key, few_shot)
            found |= {prefix + name: ", ".join(values)} if values else {}
    settings: dict[str, dict[str, None]] = {}
    for run in trainings:
        for key, value in run.data.params.items():
            if key not in OWN:
                settings.setdefault(key, {})[value] = None
    return found | {key: ", ".join(values) for key, values in settings.items()}


def _distinct(rows: Sequence[Row], key: str, few_shot: bool | None = None) -> list[str]:
    """The values of a column, in order; of the protocol few_shot alone, or without it."""
    chosen = [r[key] for r in rows if few_shot is None or (r["protocol"] == "few_shot") == few_shot]
    values = list(dict.fromkeys(chosen))
    return sorted(values, key=int) if key in ("shots", "seed") else values


def _log_params(store: Any, run: Any, found: dict[str, str]) -> None:
    """Log those that the run lacks: MLflow lets nobody change one."""
    from mlflow.entities import Param

    new = [Param(key, value) for key, value in found.items() if key not in run.data.params]
    for first in range(0, len(new), PARAMS_AT_ONCE):
        store.log_batch(run.info.run_id, params=new[first : first + PARAMS_AT_ONCE])


def _log_trainings(store: Any, run_id: str, trainings: Sequence[Any]) -> None:
    """List the trainings among the artifacts, and become their parent."""
    with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
        path = Path(temporary) / "trainings.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            columns = ["protocol", "dataset", "method", "shots", "seed"]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, "run_id", "run_name", "adapter_sha256", "inputs_sha256"])
            for run in trainings:
                told = [run.data.params.get(column, "") for column in columns]
                hashes = [run.data.tags[SHA_TAG], run.data.tags[INPUTS_TAG]]
                writer.writerow([*told, run.info.run_id, run.info.run_name, *hashes])
        store.log_artifact(run_id, str(path))
    for run in trainings:
        if run.data.tags.get(PARENT_TAG) != run_id:
            store.set_tag(run.info.run_id, PARENT_TAG, run_id)


def note(store: Any, experiment: str, run_id: str, reports: Path) -> str:
    """The description: links to report and trainings, and the report's first table with what stands around it."""
    first = (reports / "README.md").read_text(encoding="utf-8").partition("\n## ")[0].splitlines()[1:]
    table_first = sorted(first, key=lambda line: not line.startswith("|"))  # MLflow shows five lines
    links = [f"[the report](#/experiments/{experiment}/runs/{run_id}/artifacts/reports/index.html)"]
    for name in METRICS:
        found = store.get_experiment_by_name(name)
        if found is not None:
            address = table(found.experiment_id, searchFilter=f'tags."{PARENT_TAG}" = "{run_id}"')
            links.append(f"[trainings for {name}]({address})")
    return "\n".join([" · ".join(links), "", *table_first])[:MOST_NOTE]
