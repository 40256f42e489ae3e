"""The MLflow store, and the hash by which it knows an adapter."""

import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from heba.files import temporary_name
from pipeline.core.paths import main_root

SHA_TAG, INPUTS_TAG = "heba.adapter_sha256", "heba.inputs_sha256"
PATIENCE = 20.0  # seconds for another process to give a lock back
ADDRESSES = {  # where MLflow keeps absolute addresses of artifacts: columns by table
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


def store_uri() -> str:
    """MLFLOW_TRACKING_URI if set, else one SQLite file in the main repository's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_own_store()}"


def _own_store() -> Path:
    return main_root() / "mlflow.db"


def artifacts_of(experiment: str) -> str:
    """The address of an experiment's artifacts in the repository's own store."""
    return (main_root() / "mlartifacts" / experiment).as_uri()


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
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        said = (without_password(str(error)).splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(
            f"MLflow's store {shown_uri()}: {said}; `python -m pipeline doctor` examines it, "
            "MLFLOW_TRACKING_URI names it"
        ) from None


def has_store() -> bool:
    """Whether there is a store already; `client` makes one."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or _own_store().exists()


@contextmanager
def store_lock() -> Iterator[None]:
    """Serialises access to the store; ValueError when another process keeps the lock."""
    lock = FileLock(main_root() / ".heba-mlflow.lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{lock.lock_file}: another process has held this lock for {PATIENCE:.0f} s; end that process"
        ) from None
    try:
        yield
    finally:
        lock.release()


def client() -> Any:
    """A client of the store; ValueError when it does not answer. Several processes that create the SQLite store at
    the same time fail in MLflow's migration, so the first use is under a lock."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with answering(), nullcontext() if store_uri().startswith("http") else store_lock():
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            if _own_store().exists():
                _follow_move()
            else:
                _make_own_store()
        store = MlflowClient(tracking_uri=store_uri())
        store.search_experiments(max_results=1)
    return store


def _make_own_store() -> None:
    """Make the repository's own store beside its place: one whose migration was killed can never be used."""
    from mlflow.tracking import MlflowClient

    folder = temporary_name(_own_store())
    folder.mkdir()
    try:
        MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments(max_results=1)
        os.replace(folder / "mlflow.db", _own_store())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _follow_move() -> None:
    """Let the repository's own store name artifacts of this repository. MLflow keeps absolute addresses: in a
    copied or moved repository it would go on writing to where the store was made.

    It also finds a damaged store at once, at which MLflow tries for minutes.
    """
    with closing(sqlite3.connect(_own_store(), timeout=PATIENCE / 2)) as database, database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return
        experiments = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
        roots = {place.removesuffix(name) for name, place in experiments if place.endswith(f"/mlartifacts/{name}")}
        here = f"{artifacts_of('')}/"
        for there in roots - {here}:
            for table, column in ((table, column) for table, columns in ADDRESSES.items() for column in columns):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there), there),
                )
            logging.getLogger("heba").warning(
                "%s was made elsewhere: its artifacts at %s are now those at %s", _own_store(), there, here
            )
