"""MLflow: every training is a run. Tracking never fails a stage: it warns once, and
`python -m pipeline track` logs from the outs what is missing.

Lineage is by content: a run carries the sha256 of its adapter as a tag, and evaluation finds it by that.
"""

import hashlib
import json
import logging
import os
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.paths import TRANSFER_STAGES, main_root, train_folder

SHA_TAG = "heba.adapter_sha256"
ADAPTER_FILE = "adapter.safetensors"


def store_uri() -> str:
    """MLFLOW_TRACKING_URI if set, else one SQLite file in the main repository's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_root() / 'mlflow.db'}"


def client() -> Any:
    """A client of the store. Several processes that create the SQLite store at the same time fail in MLflow's
    migration, so the first use is under a lock."""
    # A server that is down must not hold up a training for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with FileLock(main_root() / ".heba-mlflow.lock"):
        store = MlflowClient(tracking_uri=store_uri())
        store.search_experiments(max_results=1)
    return store


def warn(error: BaseException) -> None:
    message = (str(error).splitlines() or [""])[0][:300]
    logging.getLogger("heba").warning(
        "MLflow tracking failed (%s: %s); results are complete, log them later with `python -m pipeline track`",
        type(error).__name__,
        message,
    )


def experiment_id(store: Any, name: str) -> str:
    with FileLock(main_root() / ".heba-mlflow.lock"):
        found = store.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return store.create_experiment(name)
        return store.create_experiment(name, artifact_location=(main_root() / "mlartifacts" / name).as_uri())


def adapter_sha256(folder: Path) -> str:
    """The content hash by which MLflow runs and evaluations know a training."""
    return hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()


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


def tags() -> dict[str, str]:
    """Where a run comes from: DVC stage and experiment, git commit."""
    found = {
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
    """One training's MLflow run; after the first failure of the store it does nothing more."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.store: Any = None
        self.run_id = ""
        self.previous = time.monotonic()
        self._attempt(lambda: self._create(config))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever the store does, the training goes on
            self.store = None
            warn(error)

    def _create(self, config: dict[str, Any]) -> None:
        store = client()
        experiment = experiment_id(store, config["protocol"])
        run = store.create_run(experiment, run_name=run_name(config), tags=tags())
        self.run_id = run.info.run_id
        self.store = store
        from mlflow.entities import Param

        store.log_batch(self.run_id, params=[Param(k, v) for k, v in flat_params(config).items()])

    def epoch(self, record: dict[str, float]) -> None:
        """Log an epoch's loss, learning rate and wall time in seconds."""
        now = time.monotonic()
        seconds, self.previous = now - self.previous, now
        if self.store is not None:
            self._attempt(lambda: log_epochs(self.store, self.run_id, [record | {"seconds": seconds}]))

    def finish(self, folder: Path) -> None:
        """Log the adapter and its hash, and close the run."""
        if self.store is None:
            return

        def close() -> None:
            log_outs(self.store, self.run_id, folder)
            self.store.set_terminated(self.run_id)

        self._attempt(close)

    def fail(self) -> None:
        """Close the run as failed."""
        if self.store is not None:
            self._attempt(lambda: self.store.set_terminated(self.run_id, "FAILED"))


def start_training(config: dict[str, Any]) -> TrainingRun:
    return TrainingRun(config)


def log_epochs(store: Any, run_id: str, records: list[dict[str, float]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    store.log_batch(
        run_id,
        metrics=[
            Metric(key, float(value), now, int(record["epoch"]))
            for record in records
            for key, value in record.items()
            if key != "epoch"
        ],
    )


def log_outs(store: Any, run_id: str, folder: Path) -> None:
    store.log_artifacts(run_id, str(folder), "adapter")
    store.set_tag(run_id, SHA_TAG, adapter_sha256(folder))


def share_adapter(store: Any, run_id: str, folder: Path) -> None:
    """Make the run's copy of an adapter a hard link to the out, which nobody changes in place: it takes no space.

    Only where both lie on one disk, and not when a training is logged, since DVC replaces its outs after that.
    """
    uri = urllib.parse.urlparse(store.get_run(run_id).info.artifact_uri)
    copy = Path(urllib.request.url2pathname(uri.path)) / "adapter" / ADAPTER_FILE
    if uri.scheme != "file" or not copy.exists():
        return
    link = copy.with_name(f".{ADAPTER_FILE}.{os.getpid()}.tmp")
    try:
        os.link(folder / ADAPTER_FILE, link)
        os.replace(link, copy)
    except OSError:  # another disk, or one without links: the copy stays
        link.unlink(missing_ok=True)


def find_or_create_run(store: Any, folder: Path) -> str:
    """The run of the training in `folder`, by the adapter's hash; made from the outs when there is none."""
    import pandas as pd
    from mlflow.entities import Param

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    experiment = experiment_id(store, config["protocol"])
    found = store.search_runs([experiment], f"tags.`{SHA_TAG}` = '{adapter_sha256(folder)}'", max_results=1)
    if found:
        return found[0].info.run_id
    run_id = store.create_run(experiment, run_name=run_name(config), tags=tags()).info.run_id
    store.log_batch(run_id, params=[Param(k, v) for k, v in flat_params(config).items()])
    history = pd.read_csv(folder / "history.csv").to_dict("records")
    log_epochs(store, run_id, [{str(k): v for k, v in record.items()} for record in history])
    log_outs(store, run_id, folder)
    store.set_terminated(run_id)
    return run_id


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
    return metrics


def log_evaluations(evaluations: list[tuple[dict[str, Any], Path]]) -> None:
    """Add evaluations, each with its training's folder, to the trainings' runs: metrics, the record, the confusion
    matrices as pictures."""
    try:
        store = client()
        for record, folder in evaluations:
            run_id = find_or_create_run(store, folder)
            share_adapter(store, run_id, folder)
            _log_evaluation(store, run_id, record)
    except Exception as error:  # whatever the store does, the stage is done
        warn(error)


def _log_evaluation(store: Any, run_id: str, record: dict[str, Any]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    store.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in evaluation_metrics(record).items()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{record['protocol']}-{record['dataset']}.json"
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
        for group, values in record["groups"].items():
            draw_confusion(values, path.with_name(f"confusion-{record['dataset']}-{group}.png"))
        store.log_artifacts(run_id, folder, "evaluation")


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


def track(out: Path) -> int:
    """Log every training and evaluation under `out` that the store lacks; returns how many evaluations
    were looked at. Unlike the stages, this raises when the store can not be reached."""
    store = client()
    folders = sorted(out.glob("train*/**/config.json"))
    for path in folders:
        find_or_create_run(store, path.parent)
    records = sorted(out.glob("evaluate*/*/*.json"))
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        folder = train_folder(record["protocol"], record["dataset"], record["seed"], record["shots"])
        run_id = find_or_create_run(store, folder)
        logged = store.get_run(run_id).data.metrics
        if any(logged.get(k) != v for k, v in evaluation_metrics(record).items()):
            _log_evaluation(store, run_id, record)
    return len(records)
