"""Paths, in DVC's temporary workspaces too, and outs that appear whole or not at all."""

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from heba import files

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


def keep_only(folder: Path, wanted: Collection[Path]) -> None:
    """Remove what lies under `folder`, but for `wanted` and what living processes write (`heba.files`)."""
    for path in sorted(folder.iterdir()):
        if path in wanted:
            continue
        if path.name.startswith(".") and path.suffix == ".tmp":
            files.remove_left(path.with_name(path.name[1:].rsplit(".", 2)[0]))
        elif any(kept.is_relative_to(path) for kept in wanted):
            keep_only(path, wanted)
        else:
            files.remove(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`heba.files.new_folder`, with the messages of `writable`."""
    with writable(path), files.new_folder(path) as new:
        yield new


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """`heba.files.new_file`, with the messages of `writable`."""
    with writable(path), files.new_file(path) as new:
        yield new


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
