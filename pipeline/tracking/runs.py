"""Open MLflow runs. None of them stays RUNNING for ever.

A process holds a lock, a file under .heba/runs of the main repository, for as long as it has a run open. A file
whose lock nobody holds is of a process that was killed, or for which the store was down at the end; the next that
comes closes its run.
"""

import hashlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.core.paths import main_root
from pipeline.tracking.store import SHA_TAG, store_lock

LOCK_TAG = "heba.lock"  # of a run: the name of its file
CUT_OFF = ("KILLED", "FAILED")


@dataclass(frozen=True)
class OpenRun:
    """A run of `store` that this process has begun."""

    store: Any
    id: str
    lock: FileLock

    def end(self, status: str = "FINISHED") -> None:
        self.store.set_terminated(self.id, status)
        self.lock.release()
        Path(self.lock.lock_file).unlink(missing_ok=True)

    def remove(self) -> None:
        """End the run and put it into MLflow's bin."""
        self.end("KILLED")
        self.store.delete_run(self.id)


def cut_off(store: Any, experiment: str, tag: str, value: str) -> Any:
    """The newest run of an experiment that has this tag and was not finished, and that no process has open; or
    None."""
    found = store.search_runs([experiment], f"tags.`{tag}` = '{value}' AND attributes.status != 'FINISHED'")
    return next((run for run in found if run.info.status in CUT_OFF and SHA_TAG not in run.data.tags), None)


def begin(
    store: Any,
    experiment: str,
    name: str,
    tags: dict[str, str],
    start: float | None = None,
    again: str | None = None,
) -> OpenRun:
    """Create a run that began at `start`, in seconds since 1970, else now; or go on with the run `again`.

    The lock comes first, so that there is no moment at which a kill leaves a run without one.
    """
    from mlflow.entities import RunTag

    folder, prefix = _files()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{prefix}{uuid.uuid4().hex}.lock")
    with store_lock():
        lock.acquire()
    tags = tags | {LOCK_TAG: Path(lock.lock_file).stem}
    if again:
        store.log_batch(again, tags=[RunTag(key, value) for key, value in tags.items()])
        store.update_run(again, "RUNNING", name)
        return OpenRun(store, again, lock)
    began = None if start is None else int(start * 1000)
    run = store.create_run(experiment, began, tags, name)
    return OpenRun(store, run.info.run_id, lock)


def close_abandoned(store: Any) -> None:
    """Close the runs whose process has gone: as KILLED, or as FINISHED where only the closing was missing."""
    folder, prefix = _files()
    for path in sorted(folder.glob(f"{prefix}*.lock")):
        lock = FileLock(path, timeout=0)
        try:
            with store_lock():  # `begin` has it while a file is without its lock
                lock.acquire()
        except Timeout:
            continue
        try:
            experiments = [experiment.experiment_id for experiment in store.search_experiments()]
            own = f"tags.`{LOCK_TAG}` = '{path.stem}' AND attributes.status = 'RUNNING'"
            for run in store.search_runs(experiments, own):
                store.set_terminated(run.info.run_id, "FINISHED" if SHA_TAG in run.data.tags else "KILLED")
            path.unlink(missing_ok=True)
        finally:
            lock.release()


def _files() -> tuple[Path, str]:
    """The folder of the locks, and how the names of those of the current store begin."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")  # the repository's own store may move with it
    return main_root() / ".heba" / "runs", hashlib.sha256(uri.encode()).hexdigest()[:8] + "-"
