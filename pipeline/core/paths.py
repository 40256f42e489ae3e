"""Paths, in DVC's temporary workspaces too, and outs that appear whole or not at all."""

import errno
import glob
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
OUT = Path("out")


def mark_params() -> None:
    """Write the file that says that params.yaml was checked; the first stages depend on it.

    Its content never changes, so other changes of params.yaml do not run these stages again.
    """
    with new_file(OUT / "params.txt") as path:
        path.write_text("params.yaml was checked\n", encoding="utf-8")


def main_root() -> Path:
    """The main repository's root. DVC names it in DVC_ROOT, in the workspaces of queued experiments too."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def data_folder(data_root: str, suite: str, dataset: str) -> Path:
    """Folder of a data set's images; `data_root` is resolved against the main repository."""
    return main_root() / data_root / suite / dataset


def manifest_path(dataset: str) -> Path:
    """What the stage `download` writes about a data set's images."""
    return OUT / "download" / f"{dataset}.json"


def remove_left(path: Path) -> None:
    """Remove temporary files beside `path` (see `temporary_name`) whose processes were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = left.name.rsplit(".", 2)[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            _remove(left)


def keep_only(folder: Path, wanted: Collection[Path]) -> None:
    """Remove what lies under `folder`, but for `wanted` and what living processes write (`temporary_name`)."""
    for path in sorted(folder.iterdir()):
        if path in wanted:
            continue
        if path.name.startswith(".") and path.suffix == ".tmp":
            remove_left(path.with_name(path.name[1:].rsplit(".", 2)[0]))
        elif any(kept.is_relative_to(path) for kept in wanted):
            keep_only(path, wanted)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A temporary name beside `path`; files of such names that killed processes left are removed."""
    remove_left(path)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that replaces it when the block ends without an exception."""
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary file name beside `path` that is renamed to it when the block ends well."""
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder, met while writing `path`, into a message with the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the number in its text only.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in DISK_FULL:
            remedy = "make room"
        elif number in READ_ONLY and _beside(path, getattr(error, "filename", None)):
            remedy = "make that folder writable"
        else:
            raise
        raise OSError(
            f"{path.absolute()} cannot be written ({os.strerror(number)}); {remedy} and run the same again: "
            "what was done before is kept"
        ) from None


def _beside(path: Path, file: str | None) -> bool:
    return file is None or Path(file).absolute().is_relative_to(path.parent.absolute())


@contextmanager
def reading(path: Path, stage: str) -> Iterator[None]:
    """Turn a missing or damaged out, met while reading `path`, into a message that names its stage."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; make it with `dvc repro {stage}`") from None
    except (OSError, ValueError, LookupError, TypeError, EOFError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, LookupError) else " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is damaged ({reason}); remove what is damaged with `python -m pipeline mend`, then make it "
            f"again with `dvc repro {stage}`"
        ) from None
