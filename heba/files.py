"""Files and folders that appear whole or not at all.

What is written has a name beside its place, `.<name>.<process id>.tmp`, until it is complete. A process that is
killed leaves it; the next one that writes there removes it.
"""

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary file name beside `path` that is renamed to it when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir(parents=True)
        yield new
        # Moved aside, not removed: that takes no time in which a kill would leave neither.
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A temporary name beside `path`; files of such names that killed processes left are removed."""
    remove_left(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_left(path: Path) -> None:
    """Remove temporary files beside `path` (see `temporary_name`) whose processes were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = left.name.rsplit(".", 2)[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
