"""MLflow: every training is a run. Tracking never fails a stage: it warns once, and
`python -m pipeline track` logs from the outs what is missing.

Lineage is by content: a run carries the sha256 of its adapter as a tag, and evaluation finds it by that.
"""

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.core.paths import TRANSFER_STAGES, main_root, train_folder
from pipeline.tracking import background, runs
from pipeline.tracking.background import Background
from pipeline.tracking.models import log_model, share_adapter
from pipeline.tracking.store import SHA_TAG, adapter_sha256, client, experiment_id

INPUTS_TAG = "heba.inputs_sha256"
REMEDY = "train again, or restore its folder with `dvc checkout --force FOLDER`"  # of heba.methods.heba.model, which imports torch


def run_name(config: dict[str, Any]) -> str:
    return f"{config['dataset']}-{config['shots']}shot-seed{config['seed']}"


def flat_params(config: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": str(v) for k, v in value.items()}
        elif key != "class_names":
            flat[key] = str(value)
    return flat


def tags(config: dict[str, Any]) -> dict[str, str]:
    """Where a run comes from: its inputs' hash, DVC stage and experiment, git commit."""
    found = {
        INPUTS_TAG: config["inputs_sha256"],
        "dvc.stage": os.environ.get("DVC_STAGE", ""),
        "dvc.experiment": os.environ.get("DVC_EXP_NAME", ""),
        "mlflow.source.git.commit": os.environ.get("DVC_EXP_BASELINE_REV", ""),
    }
    if not found["mlflow.source.git.commit"]:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=main_root(), capture_output=True, text=True, check=False
        )
        found["mlflow.source.git.commit"] = git.stdout.strip()
    return {k: v for k, v in found.items() if v}


class TrainingRun:
    """One training's MLflow run, which a process beside the training logs."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.previous = time.monotonic()
        self.log = Background()
        self.log.send("begin", {"config": config, "time": time.time()})

    def epoch(self, record: dict[str, float]) -> None:
        """Log an epoch's loss, learning rate and wall time in seconds."""
        now = time.monotonic()
        seconds, self.previous = now - self.previous, now
        self.log.send("epoch", record | {"seconds": seconds, "time": time.time()})

    def finish(self, folder: Path) -> None:
        """Log the adapter and its hash, and close the run. Waits for it."""
        self.log.send("outs", str(folder.resolve()))
        self.log.finish()

    def fail(self) -> None:
        """Close the run as failed, if the store lets. Waits for it."""
        self.log.send("fail", None)
        self.log.finish()


def start_training(config: dict[str, Any]) -> TrainingRun:
    return TrainingRun(config)


class Logger:
    """What the process beside a stage does. Each call takes the list of what a stage has sent."""

    def __init__(self) -> None:
        self.run: runs.OpenRun | None = None

    @cached_property
    def store(self) -> Any:
        store = client()
        runs.close_abandoned(store)
        return store

    def begin(self, trainings: list[dict[str, Any]]) -> None:
        for training in trainings:
            self.run = begin_run(self.store, training["config"], training["time"])

    def epochs(self, records: list[dict[str, float]]) -> None:
        if self.run:
            log_epochs(self.store, self.run.id, records)

    def outs(self, folders: list[str]) -> None:
        for folder in folders:
            if self.run:
                log_outs(self.store, self.run.id, Path(folder))
                self.run.end()

    def fail(self, _: list[None]) -> None:
        self.close_failed()

    def close_failed(self) -> None:
        if self.run:
            self.run.end("FAILED")

    def evaluations(self, evaluations: list[dict[str, Any]]) -> None:
        for evaluation in evaluations:
            trained = Path(evaluation["trained"])
            run_id = find_or_create_run(self.store, trained)
            share_adapter(self.store, run_id, trained)
            _log_evaluation(self.store, run_id, evaluation["metrics"], evaluation["files"])


def serve() -> None:
    """Log what the stage that has started this process sends."""
    logger = Logger()
    calls: dict[str, Callable[[list[Any]], None]] = {
        "begin": logger.begin,
        "epoch": logger.epochs,
        "outs": logger.outs,
        "fail": logger.fail,
        "evaluation": logger.evaluations,
    }
    background.serve(calls, logger.close_failed)


def begin_run(store: Any, config: dict[str, Any], start: float | None = None) -> runs.OpenRun:
    """Open the run of a training that began at `start` (see `runs.begin`), and log its parameters."""
    from mlflow.entities import Param

    run = runs.begin(store, experiment_id(store, config["protocol"]), run_name(config), tags(config), start)
    store.log_batch(run.id, params=[Param(k, v) for k, v in flat_params(config).items()])
    return run


def log_epochs(store: Any, run_id: str, records: list[dict[str, float]]) -> None:
    """Log epochs; `time` in a record is when it ended, in seconds since 1970."""
    from mlflow.entities import Metric

    now = time.time()
    store.log_batch(
        run_id,
        metrics=[
            Metric(key, float(value), int(record.get("time", now) * 1000), int(record["epoch"]))
            for record in records
            for key, value in record.items()
            if key not in ("epoch", "time")
        ],
    )


def log_outs(store: Any, run_id: str, folder: Path) -> None:
    """Log the adapter as a model of the run, and its hash."""
    log_model(store, run_id, folder)
    store.set_tag(run_id, SHA_TAG, adapter_sha256(folder))


def _read_history(path: Path) -> list[dict[str, float]]:
    """The epochs of a training, as `log_epochs` takes them; ValueError when the file is damaged."""
    import pandas as pd

    try:
        records = pd.read_csv(path).astype(float).to_dict("records")
        if not records or "epoch" not in records[0]:
            raise ValueError("no epochs")
    except (OSError, ValueError):
        raise ValueError(f"{path} is damaged; {REMEDY}") from None
    return [{str(key): value for key, value in record.items()} for record in records]


def find_or_create_run(store: Any, folder: Path) -> str:
    """The run of the training in `folder`, by the hashes of adapter and inputs; made from the outs if need be.

    The adapter's alone is not enough: with few classes, for one, any `neg_ratio` gives the same.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        protocol, inputs = config["protocol"], config["inputs_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged; {REMEDY}") from None
    experiment = experiment_id(store, protocol)
    same = f"tags.`{SHA_TAG}` = '{adapter_sha256(folder)}' AND tags.`{INPUTS_TAG}` = '{inputs}'"
    # Two evaluations of one training may run side by side, and each would make it.
    with FileLock(main_root() / ".heba" / "track.lock"):
        found = store.search_runs([experiment], same, max_results=1)
        if found:
            return found[0].info.run_id
        history = _read_history(folder / "history.csv")
        run = begin_run(store, config)
        log_epochs(store, run.id, history)
        log_outs(store, run.id, folder)
        run.end()
        return run.id


def evaluation_metrics(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, by their names in MLflow."""
    prefix = f"{record['dataset']}_" if record["protocol"] in TRANSFER_STAGES else ""
    metrics = {
        f"{prefix}{method}_{group}": values[method]["accuracy"]
        for group, values in record["groups"].items()
        for method in ("zero_shot", "heba")
    }
    for method in ("zero_shot", "heba"):
        if f"{method}_harmonic_mean" in record:
            metrics[f"{method}_h"] = record[f"{method}_harmonic_mean"]
    # An evaluation at another scale replaces the metrics of the one before, of the same training.
    if record.get("scale_novel") is not None:
        metrics["scale_novel"] = record["scale_novel"]
    return metrics


def log_evaluations(evaluations: list[tuple[dict[str, Any], Path]]) -> None:
    """Add evaluations, each with its training's folder, to the trainings' runs: metrics, the record, the confusion
    matrices as pictures."""
    log = Background()
    try:
        with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
            for number, (record, trained) in enumerate(evaluations):
                files = Path(temporary) / str(number)
                write_evaluation(record, files)
                evaluation = {"trained": str(trained.resolve()), "files": str(files)}
                log.send("evaluation", evaluation | {"metrics": evaluation_metrics(record)})
            log.finish()
    except Exception as error:  # a full disk, say; the stage is done
        background.warn(background.told(error))


def write_evaluation(record: dict[str, Any], folder: Path) -> None:
    """Write what an evaluation's run shows, into the new folder `folder`."""
    folder.mkdir()
    path = folder / f"{record['protocol']}-{record['dataset']}.json"
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    for group, values in record["groups"].items():
        draw_confusion(values, path.with_name(f"confusion-{record['dataset']}-{group}.png"))


def _log_evaluation(store: Any, run_id: str, metrics: dict[str, float], files: str) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    store.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in metrics.items()])
    store.log_artifacts(run_id, files, "evaluation")


def draw_confusion(values: dict[str, Any], path: Path) -> None:
    """The confusion matrix of HeBA as a picture; class names only where they can be read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(values["heba"]["confusion"], cmap="Blues")
    names = values["classnames"]
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"HeBA, {values['heba']['accuracy']:.1f} %")
    figure.colorbar(shown)
    figure.savefig(path, dpi=100)


def track(out: Path, own: Collection[str]) -> int:
    """Log every training and evaluation under `out` that the store lacks; returns how many evaluations are in it
    then. `own`: names of own data. Unlike the stages, this raises when the store can not be reached."""
    from pipeline.report.tables import load_record

    store = client()
    runs.close_abandoned(store)
    for path in sorted(out.glob("train*/**/config.json")):
        find_or_create_run(store, path.parent)
    tracked = 0
    for path in sorted(out.glob("evaluate*/*/*.json")):
        record = load_record(path, own)
        folder = train_folder(record["protocol"], record["dataset"], record["seed"], record["shots"])
        if not folder.exists() or adapter_sha256(folder) != record.get("adapter_sha256"):
            logging.getLogger("heba").warning("%s: left out, %s has another adapter now", path, folder)
            continue
        run_id = find_or_create_run(store, folder)
        logged, metrics = store.get_run(run_id).data.metrics, evaluation_metrics(record)
        if any(logged.get(k) != v for k, v in metrics.items()):
            with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
                files = Path(temporary) / "evaluation"
                write_evaluation(record, files)
                _log_evaluation(store, run_id, metrics, str(files))
        tracked += 1
    return tracked
