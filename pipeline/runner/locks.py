"""dvc.lock, and who may touch the repository: one `python -m pipeline repro` at a time, and DVC's own locks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from pipeline.core.paths import new_file, remove_left

LOCK_REMEDY = "`git checkout dvc.lock` brings the last one back"


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """ValueError while `python -m pipeline repro` works at `root`: two would run the same stages.

    What killed processes have left of dvc.lock and the rwlock is removed.
    """
    path = root / ".heba" / "repro.lock"
    path.parent.mkdir(exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            for name in ("dvc.lock", ".dvc/tmp/dvc.lock", ".dvc/tmp/rwlock"):
                remove_left(root / name)
            yield
    except Timeout:
        raise ValueError("another `python -m pipeline repro` runs in this repository; wait for its end") from None


def remedy(message: str, root: Path) -> str:
    """What to do about what DVC says of its files in the repository at `root`."""
    if "dvc.lock" in message:
        return LOCK_REMEDY
    return _rwlock_remedy(root) if "RWLock-file" in message else "see `dvc status`"


def locked_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The stages in dvc.lock; ValueError when it is damaged."""
    path = root / "dvc.lock"
    if not path.is_file():
        return {}
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        if not isinstance(stages, dict):
            raise TypeError("stages is no mapping")
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        raise ValueError(f"{path} is damaged; {LOCK_REMEDY}") from None
    return stages


@contextmanager
def ordered_lock(root: Path, order: list[str]) -> Iterator[None]:
    """Bring what comes into dvc.lock in the block into `order`, that of `dvc repro`.

    What a block that was broken off has brought counts too, be it by a kill: what was there before it is in a file
    until a block ends well.
    """
    noted = root / ".heba" / "locked.json"
    if not noted.exists():
        with new_file(noted) as file:
            file.write_text(json.dumps(list(locked_stages(root))), encoding="utf-8")
    before = json.loads(noted.read_text(encoding="utf-8"))
    try:
        yield
    finally:
        _sort(root, before, order)
    noted.unlink()


def _sort(root: Path, before: list[str], order: list[str]) -> None:
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    new = [stage for stage in locked_stages(root) if stage not in before]
    right = [stage for stage in order if stage in new]
    if new == right:
        return
    path = root / "dvc.lock"
    data = parse_yaml_for_update(path.read_text(encoding="utf-8"), str(path))
    for stage in right:
        data["stages"].move_to_end(stage)
    with new_file(path) as file:
        file.write_text(dumps_yaml(data), encoding="utf-8")


def _rwlock(root: Path) -> Path:
    """Where the processes of DVC say what they read and write, while a stage runs."""
    return root / ".dvc" / "tmp" / "rwlock"


def _rwlock_remedy(root: Path) -> str:
    return f"when no dvc process runs any more, remove {_rwlock(root)}"


def running_stages(root: Path) -> list[str]:
    """The commands of DVC that run stages now, on this machine; ValueError when their record is damaged."""
    path = _rwlock(root)
    if not path.is_file():
        return []
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        holders = [*lock.get("write", {}).values(), *(by for all_ in lock.get("read", {}).values() for by in all_)]
        return sorted({by["cmd"] for by in holders if psutil.pid_exists(by["pid"])})
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged; {_rwlock_remedy(root)}") from None


def release(root: Path, stages: list[str]) -> None:
    """Take out of DVC's rwlock what a process of these very stages left there when it was killed.

    DVC does so itself where the process ran on the same machine: it looks whether the process lives. On another
    machine it would look at an unrelated process of the same number.
    """
    from dvc.config import Config
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_LOCK

    path = _rwlock(root)
    ending = " ".join(["repro", "--single-item", *stages])
    if not path.is_file() or ending not in path.read_text(encoding="utf-8"):
        return
    hardlink = Config(str(root / ".dvc"))["core"].get("hardlink_lock", False)
    with make_lock(str(path.with_name(RWLOCK_LOCK)), tmp_dir=str(path.parent), hardlink_lock=hardlink, wait=True):
        lock = json.loads(path.read_text(encoding="utf-8"))
        lock["write"] = {p: by for p, by in lock.get("write", {}).items() if not by["cmd"].endswith(ending)}
        read = {
            p: [by for by in all_ if not by["cmd"].endswith(ending)] for p, all_ in lock.get("read", {}).items()
        }
        lock["read"] = {p: left for p, left in read.items() if left}
        with new_file(path) as file:
            file.write_text(json.dumps(lock), encoding="utf-8")
