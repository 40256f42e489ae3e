"""MLflow: every training is a run. Tracking never fails a stage: it warns once, and
`python -m pipeline track` logs from the outs what is missing.

Lineage is by content: a run has the hashes of its adapter and of its inputs as tags, and is found by these. A
training that was cut off and goes on, under whatever name of a DVC experiment, goes on with its run.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from heba import artifact, methods
from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Group, Record, read_record, write_record
from pipeline.core.paths import main_root
from pipeline.core.trainings import Evaluation, Training
from pipeline.tracking import background, describe, origin, runs, summary
from pipeline.tracking.background import Background
from pipeline.tracking.describe import Result
from pipeline.tracking.experiments import dress_all, experiment_id
from pipeline.tracking.inputs import log_dataset
from pipeline.tracking.machine import Monitors
from pipeline.tracking.models import find_run, log_model, share_adapter
from pipeline.tracking.store import INPUTS_TAG, SHA_TAG, client

EVALUATION_TAG = "heba.evaluation"
DEVICE_TAG = "heba.device"
NOTE_TAG = "mlflow.note.content"
SECONDS = "training_seconds"  # a metric: of a whole training; those of an epoch are `seconds`


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
        """Wait until all is logged, `background.PATIENCE` at most. A training without `outs` has failed, or was
        stopped: the caller is in a `finally`."""
        if self.log:
            if isinstance(sys.exception(), KeyboardInterrupt):
                self.log.send("stopped", None)
            self.log.finish()

    def _send(self, name: str, argument: Any) -> None:
        if self.log:
            self.log.send(name, argument)


class Logger:
    """The process beside a stage. Each method takes the list of messages that the stage sent."""

    def __init__(self) -> None:
        self.run: runs.OpenRun | None = None
        self.logged = -1  # the last epoch that the run has already
        self.monitors = Monitors()

    @cached_property
    def store(self) -> Any:
        store = client()
        runs.close_abandoned(store)
        return store

    def begin(self, trainings: list[dict[str, Any]]) -> None:
        for training in trainings:
            self.monitors.begin()
            with one_at_a_time():
                self.run, self.logged = begin_run(self.store, training["config"], training["time"])
            self.store.set_tag(self.run.id, DEVICE_TAG, training["device"])

    def epochs(self, records: list[dict[str, float]]) -> None:
        if self.run:
            log_epochs(self.store, self.run.id, records, self.logged)
            self.monitors.log(self.store, self.run.id, int(records[-1]["epoch"]))

    def outs(self, trained: list[dict[str, Any]]) -> None:
        for training in trained:
            if self.run:
                with one_at_a_time():
                    self._end(self.run, Path(training["folder"]), training["seconds"])
                self.run = None

    def _end(self, run: runs.OpenRun, folder: Path, seconds: float) -> None:
        """Log the outs of a training and end its run, or remove it: the same inputs may have given the same bytes
        before, in a DVC that was killed then, say."""
        if find_run(self.store, folder):
            run.remove()
            return
        if self.logged < 0:  # else the seconds are of its last part
            self.store.log_metric(run.id, SECONDS, seconds)
        log_outs(self.store, run.id, folder)
        run.end()

    def stopped(self, nothing: list[None]) -> None:
        """Ctrl-C was pressed."""
        self.close("KILLED")

    def close(self, status: str = "FAILED") -> None:
        """A run that is still open has failed."""
        if self.run:
            self.run.end(status)
            self.run = None

    def evaluations(self, evaluations: list[dict[str, Any]]) -> None:
        for evaluation in evaluations:
            trained = Path(evaluation["trained"])
            run_id = find_or_create_run(self.store, trained)
            share_adapter(self.store, run_id, trained)
            _log_evaluation(self.store, run_id, evaluation)

    def reports(self, folders: list[str]) -> None:
        with one_at_a_time():
            summary.bring_up_to_date(self.store, Path(folders[-1]))


def serve() -> None:
    """Log what the stage that has started this process sends."""
    logger = Logger()
    calls: dict[str, Callable[[list[Any]], None]] = {
        "begin": logger.begin,
        "epoch": logger.epochs,
        "outs": logger.outs,
        "stopped": logger.stopped,
        "evaluation": logger.evaluations,
        "report": logger.reports,
    }
    background.serve(calls, logger.close)


def one_at_a_time() -> FileLock:
    """The lock under which a run is looked for and made: two processes may ask for the same one."""
    return FileLock(main_root() / ".heba" / "track.lock")


def begin_run(store: Any, config: dict[str, Any], start: float | None = None) -> tuple[runs.OpenRun, int]:
    """Open the run of a training that began at `start` (see `runs.begin`), or the one of the same inputs that was
    cut off, and log its parameters. Returns it, and the last epoch that it has; -1: none."""
    from mlflow.entities import Param

    experiment, origins = experiment_id(store, config["protocol"]), origin.tags()
    before = runs.cut_off(store, experiment, INPUTS_TAG, config["inputs_sha256"])
    tags = describe.tags(config) | origins | {NOTE_TAG: describe.note(config)}
    name, again = describe.run_name(config, origins), before.info.run_id if before else None
    run = runs.begin(store, experiment, name, tags, start, again)
    there = before.data.params if before else {}  # which MLflow lets nobody change
    new = [Param(k, v) for k, v in describe.flat_params(config).items() if k not in there]
    store.log_batch(run.id, params=new)
    log_dataset(store, run.id, config["dataset"], "train")
    steps = [metric.step for metric in store.get_metric_history(run.id, "lr")] if again else []
    return run, max(steps, default=-1)


def log_epochs(store: Any, run_id: str, records: list[dict[str, float]], logged: int = -1) -> None:
    """Log the epochs after `logged`; `time` in a record is when it ended, in seconds since 1970."""
    from mlflow.entities import Metric

    now = time.time()
    store.log_batch(
        run_id,
        metrics=[
            Metric(key, float(value), int(record.get("time", now) * 1000), int(record["epoch"]))
            for record in records
            for key, value in record.items()
            if key not in ("epoch", "time") and record["epoch"] > logged
        ],
    )


def log_outs(store: Any, run_id: str, folder: Path) -> None:
    """Log the adapter as a model of the run, its hash, and what was chosen on validation images."""
    from mlflow.entities import RunTag

    config = artifact.read_config(folder)
    log_model(store, run_id, folder, describe.name(config.model_dump()))
    chosen = [RunTag(f"chosen.{key}", str(value)) for key, value in config.chosen.items()]
    store.log_batch(run_id, tags=[*chosen, RunTag(SHA_TAG, artifact.sha256(folder))])


def find_or_create_run(store: Any, folder: Path) -> str:
    """The run of the training in `folder`, made from the outs if need be."""
    with one_at_a_time():
        found = find_run(store, folder)
        if found:
            return found.info.run_id
        history = artifact.read_history(folder)
        run, logged = begin_run(store, artifact.read_config(folder).model_dump())
        log_epochs(store, run.id, history, logged)
        log_outs(store, run.id, folder)
        run.end()
        return run.id


def evaluation_tag(settings: dict[str, Any]) -> str:
    """The settings of an evaluation, as the run's tag EVALUATION_TAG has them. An evaluation with others replaces
    the metrics of the one before, of the same training."""
    return json.dumps(settings, sort_keys=True)


def training_of(record: Record) -> Training:
    """The training that a record is about."""
    trained_as = PROTOCOLS[record.protocol].trained_as
    return Training(trained_as, record.source or record.dataset, record.method, record.shots, record.seed)


def path_of(record: Record) -> Path:
    """Where a record lies."""
    return Evaluation(record.protocol, record.dataset, training_of(record)).path


def _message(record: Record, results: list[Result], files: Path) -> dict[str, Any]:
    """What `Logger.evaluations` takes; `results` are all of the training's evaluations."""
    write_evaluation(record, files)
    trained = training_of(record).folder
    return {
        "trained": str(trained.resolve()),
        "dataset": record.dataset,
        "files": str(files),
        "metrics": describe.metrics(results),
        "tags": {
            EVALUATION_TAG: evaluation_tag(record.settings),
            NOTE_TAG: describe.note(artifact.read_config(trained).model_dump(), results),
        },
    }


def log_evaluations(records: list[Record]) -> None:
    """Add evaluations to the trainings' runs: metrics, the record, the confusion matrices as pictures."""
    log = Background()
    try:
        known = {path_of(record): describe.result_of(record) for record in records}
        trained = {(training_of(record), record.inputs_sha256) for record in records}
        results = {(training, sha): describe.results_of(training, sha, known) for training, sha in trained}
        with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
            for number, record in enumerate(records):
                found = results[training_of(record), record.inputs_sha256]
                log.send("evaluation", _message(record, found, Path(temporary) / str(number)))
            log.finish()
    except Exception as error:  # a full disk, say; the stage is done
        background.warn(background.error_text(error))


def log_report(reports: Path) -> None:
    """Make the summary run of a report, or bring it up to date."""
    log = Background()
    log.send("report", str(reports.resolve()))
    log.finish()


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
    store.log_batch(run_id, metrics=metrics, tags=[RunTag(*tag) for tag in evaluation["tags"].items()])
    log_dataset(store, run_id, evaluation["dataset"], "test")
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


def track(out: Path, reports: Path = Path("reports")) -> int:
    """Log every training and evaluation under `out`, and the report, that the store lacks; returns how many
    evaluations are in it then. Unlike the stages, this raises ValueError when the store cannot be reached, and
    takes its time."""
    try:
        with background.limits():
            store = client()
            runs.close_abandoned(store)
            dress_all(store)
    except background.Stopped as error:
        raise ValueError(f"MLflow's store {error}; `python -m pipeline doctor` examines it") from None
    for path in sorted(out.glob(f"train/*/*/[!.]*/{artifact.CONFIG_FILE}")):
        find_or_create_run(store, path.parent)
    paths = sorted(out.glob("evaluate*/**/[!.]*.json"))
    known = {path: describe.result_of(read_record(path)) for path in paths}
    tracked = sum(_track_evaluation(store, path, known) for path in paths)
    with one_at_a_time():
        summary.bring_up_to_date(store, reports)
    return tracked


def _track_evaluation(store: Any, path: Path, known: Mapping[Path, Result]) -> bool:
    """Log the evaluation at `path` if the store lacks it; whether it is in it then."""
    record = read_record(path)
    training = training_of(record)
    folder = training.folder
    if not folder.exists() or artifact.read_config(folder).inputs_sha256 != record.inputs_sha256:
        logging.getLogger("heba").warning("%s: left out, %s has another adapter now", path, folder)
        return False
    run_id = find_or_create_run(store, folder)
    data, results = store.get_run(run_id).data, describe.results_of(training, record.inputs_sha256, known)
    same = data.tags.get(EVALUATION_TAG) == evaluation_tag(record.settings)
    if not same or any(data.metrics.get(k) != v for k, v in describe.metrics(results).items()):
        with tempfile.TemporaryDirectory(prefix="heba-") as temporary:
            _log_evaluation(store, run_id, _message(record, results, Path(temporary) / "evaluation"))
    return True
