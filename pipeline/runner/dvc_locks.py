"""DVC's locks: one on the repository, and the rwlock, in which its processes say what they read and write while a
stage runs. tests/pipeline/test_dvc_inside.py holds what is assumed here against the DVC that is installed.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.paths import new_file
from pipeline.runner.dvc_files import RWLOCK, TMP

LOCKED = "lock"
MEND = "python -m pipeline mend"  # repairs dvc.lock and the rwlock
SINGLE = ("repro", "--single-item")  # a stage, or several one after the other, without what they depend on


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock on the repository, which DVC holds whenever no command of a stage runs.

    DVC waits 3 seconds for it, and so do we; ValueError then.
    """
    from dvc.lock import LockError

    try:
        with _lock(root, LOCKED, wait=False):
            yield
    except LockError:
        raise ValueError("DVC works in this repository; wait for its end") from None


def _lock(root: Path, name: str, wait: bool) -> AbstractContextManager[Any]:
    from dvc.config import Config
    from dvc.lock import make_lock

    folder = root / TMP
    folder.mkdir(exist_ok=True)
    hardlink = Config(str(root / ".dvc"))["core"].get("hardlink_lock", False)
    return make_lock(str(folder / name), tmp_dir=str(folder), hardlink_lock=hardlink, wait=wait)


def rwlock(root: Path) -> Path:
    return root / TMP / RWLOCK


def lives(pid: int) -> bool:
    """Whether a process runs. One that was killed stays in the list, as a zombie, until its parent looks."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holders(text: str) -> list[dict[str, Any]]:
    lock = json.loads(text)
    return [*lock.get("write", {}).values(), *(by for all_ in lock.get("read", {}).values() for by in all_)]


def running_stages(root: Path) -> list[str]:
    """The commands of DVC that run stages now, on this machine; ValueError when their record is damaged."""
    path = rwlock(root)
    if not path.is_file():
        return []
    try:
        return sorted({by["cmd"] for by in _holders(path.read_text(encoding="utf-8")) if lives(by["pid"])})
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged; `{MEND}` removes it") from None


def release(root: Path, stages: list[str]) -> None:
    """Remove from DVC's rwlock the entries of a killed process that ran these stages.

    DVC does so itself where the process ran on the same machine: it looks whether the process lives. On another
    machine it would look at an unrelated process of the same number.
    """
    ending = " ".join([*SINGLE, *stages])
    path = rwlock(root)
    if path.is_file() and ending in path.read_text(encoding="utf-8"):
        _release(root, lambda by: by["cmd"].endswith(ending))


def release_dead(root: Path) -> None:
    """Remove from DVC's rwlock the entries of processes that have ended.

    DVC waits for a zombie, and keeps what a dead process has read until another one wants to write there: by then,
    a process of the same number may live.
    """
    path = rwlock(root)
    if path.is_file() and any(_is_dead(by) for by in _holders(path.read_text(encoding="utf-8"))):
        _release(root, _is_dead)


def _is_dead(holder: dict[str, Any]) -> bool:
    return not lives(holder["pid"])


def _release(root: Path, ended: Callable[[dict[str, Any]], bool]) -> None:
    from dvc.rwlock import RWLOCK_LOCK

    path = rwlock(root)
    with _lock(root, RWLOCK_LOCK, wait=True):
        lock = json.loads(path.read_text(encoding="utf-8"))
        lock["write"] = {p: by for p, by in lock.get("write", {}).items() if not ended(by)}
        read = {p: [by for by in all_ if not ended(by)] for p, all_ in lock.get("read", {}).items()}
        lock["read"] = {p: left for p, left in read.items() if left}
        with new_file(path) as file:
            file.write_text(json.dumps(lock), encoding="utf-8")


def rwlock_damage(root: Path) -> str:
    """What is wrong with the rwlock, as a killed DVC leaves it; "" where nothing is."""
    try:
        running_stages(root)
    except ValueError:
        return f"{rwlock(root)} cannot be read: DVC was killed while it wrote it"
    return ""


def mend_rwlock(root: Path) -> str:
    """Remove an rwlock that was cut when DVC was killed, and say so; "" where it is whole.

    ValueError while a process lives that it names, or another DVC works here.
    """
    found = rwlock_damage(root)
    if not found:
        return ""
    from dvc.rwlock import RWLOCK_LOCK

    path = rwlock(root)

    with locked(root), _lock(root, RWLOCK_LOCK, wait=True):
        named = re.findall(r'"pid": (\d+)[,}]', path.read_text(encoding="utf-8", errors="replace"))
        living = [pid for pid in sorted(set(named)) if lives(int(pid))]
        if living:
            raise ValueError(f"process {', '.join(living)} runs stages here; wait for its end")
        path.unlink()
    return found
