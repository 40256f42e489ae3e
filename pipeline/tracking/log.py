"""MLflow: every training is a run. Tracking never fails a stage: it warns once, and
`python -m pipeline track` logs from the outs what is missing.

Lineage is by content: a run has the hashes of its adapter and of its inputs as tags, and is found by these.
"""

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from heba import artifact, methods
from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Group, Record, read_record, write_record
from pipeline.core.paths import main_root
from pipeline.core.trainings import Training
from pipeline.tracking import background, runs
from pipeline.tracking.background import Background
from pipeline.tracking.models import find_run, log_model, share_adapter
from pipeline.tracking.store import INPUTS_TAG, SHA_TAG, client, experiment_id

EVALUATION_TAG = "heba.evaluation"
DEVICE_TAG = "heba.device"
SECONDS = "training_seconds"  # a metric: of a whole training; those of an epoch are `seconds`


def run_name(config: dict[str, Any]) -> str:
    return f"{config['dataset']}-{config['method']}-{config['shots']}shot-seed{config['seed']}"


def flat_params(config: dict[str, Any]) -> dict[str, str]:
    """A config's values as MLflow's params; settings by the name of their method, as in params.yaml."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            section = config["method"] if key == "settings" else key
            flat |= {f"{section}.{k}": str(v) for k, v in value.items()}
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


class StageLog:
    """The MLflow runs of a stage's trainings, logged by one process beside it, which starts with the first."""

    def __init__(self) -> None:
        self.began = self.previous = time.monotonic()
        self.log: Background | None = None

    def begin(self, config: artifact.Config, device: str) -> None:
        """Open the run of a training on `device`."""
        self.began = self.previous = time.monotonic()
        self.log = self.log or Background()
        told = {"config": config.model_dump(exclude={"class_names"}), "device": device, "time": time.time()}
        self.log.send("begin", told)

    def epoch(self, record: dict[str, float]) -> None:
        """Log an epoch's loss, learning rate and wall time in seconds."""
        now = time.monotonic()
        seconds, self.previous = now - self.previous, now
        self._send("epoch", record | {"seconds": seconds, "time": time.time()})

    def outs(self, folder: Path) -> None:
        """Log the adapter, its hash and the seconds that the training took, and close the run."""
        seconds = time.monotonic() - self.began
        self._send("outs", {"folder": str(folder.resolve()), "seconds": seconds})

    def finish(self) -> None:
        """Wait until all is logged, `background.PATIENCE` at most. A training without `outs` has failed."""
        if self.log:
            self.log.finish()

    def _send(self, name: str, argument: Any) -> None:
        if self.log:
            self.log.send(name, argument)


class Logger:
    """The process beside a stage. Each method takes the list of messages that the stage sent."""

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
            self.store.set_tag(self.run.id, DEVICE_TAG, training["device"])

    def epochs(self, records: list[dict[str, float]]) -> None:
        if self.run:
            log_epochs(self.store, self.run.id, records)

    def outs(self, trained: list[dict[str, Any]]) -> None:
        for training in trained:
            if self.run:
                self.store.log_metric(self.run.id, SECONDS, training["seconds"])
                log_outs(self.store, self.run.id, Path(training["folder"]))
                self.run.end()
                self.run = None

    def close(self) -> None:
        """A run that is still open has failed."""
        if self.run:
            self.run.end("FAILED")
            self.run = None

    def evaluations(self, evaluations: list[dict[str, Any]]) -> None:
        for evaluation in evaluations:
            trained = Path(evaluation["trained"])
            run_id = find_or_create_run(self.store, trained)
            share_adapter(self.store, run_id, trained)
            _log_evaluation(self.store, run_id, evaluation)


def serve() -> None:
    """Log what the stage that has started this process sends."""
    logger = Logger()
    calls: dict[str, Callable[[list[Any]], None]] = {
        "begin": logger.begin,
        "epoch": logger.epochs,
        "outs": logger.outs,
        "evaluation": logger.evaluations,
    }
    background.serve(calls, logger.close)


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
    """Log the adapter as a model of the run, its hash, and what was chosen on validation images."""
    from mlflow.entities import Param

    log_model(store, run_id, folder)
    chosen = artifact.read_config(folder).chosen
    store.log_batch(run_id, params=[Param(f"chosen.{key}", str(value)) for key, value in chosen.items()])
    store.set_tag(run_id, SHA_TAG, artifact.sha256(folder))


def find_or_create_run(store: Any, folder: Path) -> str:
    """The run of the training in `folder`, made from the outs if need be."""
    # Two evaluations of one training may run side by side, and each would make it.
    with FileLock(main_root() / ".heba" / "track.lock"):
        found = find_run(store, folder)
        if found:
            return found.info.run_id
        history = artifact.read_history(folder)
        run = begin_run(store, artifact.read_config(folder).model_dump())
        log_epochs(store, run.id, history)
        log_outs(store, run.id, folder)
        run.end()
        return run.id


def evaluation_metrics(record: Record) -> dict[str, float]:
    """The metrics of an evaluation, by their names in MLflow: base, novel and h; all; or the name of a data set
    that the model was not trained on."""
    return {record.dataset if record.source else name: value for name, value in record.accuracies().items()}


def evaluation_tag(settings: dict[str, Any]) -> str:
    """The settings of an evaluation, as the run's tag EVALUATION_TAG has them. An evaluation with others replaces
    the metrics of the one before, of the same training."""
    return json.dumps(settings, sort_keys=True)


def trained_folder(record: Record) -> Path:
    """The training that a record is about."""
    trained_as = PROTOCOLS[record.protocol].trained_as
    source = record.source or record.dataset
    return Training(trained_as, source, record.method, record.shots, record.seed).folder


def _message(record: Record, trained: Path, files: Path) -> dict[str, Any]:
    """What `Logger.evaluations` takes."""
    write_evaluation(record, files)
    return {
        "trained": str(trained.resolve()),
        "files": str(files),
        "metrics": evaluation_metrics(record),
        "tag": evaluation_tag(record.settings),
    }


def log_evaluations(records: list[Record]) -> None:
    """Add evaluations to the trainings' runs: metrics, the record, the confusion matrices as pictures."""
    log = Background()
    try:
        with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
            for number, record in enumerate(records):
                log.send("evaluation", _message(record, trained_folder(record), Path(temporary) / str(number)))
            log.finish()
    except Exception as error:  # a full disk, say; the stage is done
        background.warn(background.told(error))


def write_evaluation(record: Record, folder: Path) -> None:
    """Write what an evaluation's run shows, into the new folder `folder`."""
    folder.mkdir()
    write_record(record, folder / f"{record.protocol}-{record.dataset}.json")
    for name, group in record.groups.items():
        draw_confusion(record.method, group, folder / f"confusion-{record.dataset}-{name}.png")


def _log_evaluation(store: Any, run_id: str, evaluation: dict[str, Any]) -> None:
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, 0) for key, value in evaluation["metrics"].items()]
    store.log_batch(run_id, metrics=metrics, tags=[RunTag(EVALUATION_TAG, evaluation["tag"])])
    store.log_artifacts(run_id, evaluation["files"], "evaluation")


def draw_confusion(method: str, group: Group, path: Path) -> None:
    """The confusion matrix as a picture; class names only where they can be read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(group.confusion, cmap="Blues")
    names = group.class_names
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    title = f"{methods.part(method, 'settings').TITLE}, {group.accuracy:.1f} %"
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(shown)
    figure.savefig(path, dpi=100)


def track(out: Path) -> int:
    """Log every training and evaluation under `out` that the store lacks; returns how many evaluations are in it
    then. Unlike the stages, this raises ValueError when the store cannot be reached, and takes its time."""
    try:
        with background.limits():
            store = client()
            runs.close_abandoned(store)
    except background.Stopped as error:
        raise ValueError(f"MLflow's store {error}; `python -m pipeline doctor` examines it") from None
    for path in sorted(out.glob(f"train/*/*/[!.]*/{artifact.CONFIG_FILE}")):
        find_or_create_run(store, path.parent)
    tracked = 0
    for path in sorted(out.glob("evaluate*/**/[!.]*.json")):
        record = read_record(path)
        folder = trained_folder(record)
        if not folder.exists() or artifact.read_config(folder).inputs_sha256 != record.inputs_sha256:
            logging.getLogger("heba").warning("%s: left out, %s has another adapter now", path, folder)
            continue
        run_id = find_or_create_run(store, folder)
        data, metrics = store.get_run(run_id).data, evaluation_metrics(record)
        same = data.tags.get(EVALUATION_TAG) == evaluation_tag(record.settings)
        if not same or any(data.metrics.get(k) != v for k, v in metrics.items()):
            with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
                _log_evaluation(store, run_id, _message(record, folder, Path(temporary) / "evaluation"))
        tracked += 1
    return tracked
