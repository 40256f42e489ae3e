"""The MLflow store, and the hash by which it knows an adapter."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.paths import main_root

SHA_TAG = "heba.adapter_sha256"
ADAPTER_FILE = "adapter.safetensors"  # of heba.model, which imports torch


def store_uri() -> str:
    """MLFLOW_TRACKING_URI if set, else one SQLite file in the main repository's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_root() / 'mlflow.db'}"


def without_password(text: str) -> str:
    """`text`, with user and password taken out of the addresses in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def shown_uri() -> str:
    """The store's address for people."""
    return without_password(store_uri())


@contextmanager
def answering() -> Iterator[None]:
    """ValueError, with the store's address and what to do, when the store fails in the block."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        said = (without_password(str(error)).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"MLflow's store {shown_uri()}: {said}; `python -m pipeline doctor` examines it, "
            "MLFLOW_TRACKING_URI names it"
        ) from None


def has_store() -> bool:
    """Whether there is a store already; `client` makes one."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (main_root() / "mlflow.db").exists()


def store_lock() -> FileLock:
    """For what processes must not do at the same time in the store."""
    return FileLock(main_root() / ".heba-mlflow.lock")


def client() -> Any:
    """A client of the store; ValueError when it does not answer. Several processes that create the SQLite store at
    the same time fail in MLflow's migration, so the first use is under a lock."""
    # A server that is down must not hold up a training for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with store_lock(), answering():
        store = MlflowClient(tracking_uri=store_uri())
        store.search_experiments(max_results=1)
    return store


def experiment_id(store: Any, name: str) -> str:
    with store_lock():
        found = store.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        if os.environ.get("MLFLOW_TRACKING_URI"):
            from mlflow.exceptions import MlflowException

            try:
                return store.create_experiment(name)
            except MlflowException:
                # A writer on another machine, whom the lock does not hold, may have made it just now.
                found = store.get_experiment_by_name(name)
                if found is None:
                    raise
                return found.experiment_id
        return store.create_experiment(name, artifact_location=(main_root() / "mlartifacts" / name).as_uri())


def adapter_sha256(folder: Path) -> str:
    """The content hash by which MLflow runs and evaluations know a training."""
    return hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()
