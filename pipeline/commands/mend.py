"""`python -m pipeline mend`: remove what is damaged and what DVC would trust.

DVC trusts a write-protected object of its cache, and a file whose size and time have not changed. After damage by
a disk, or to an out that is linked to the cache, `dvc repro` and `dvc checkout` would bring the damage back. What
differs from dvc.lock in another way, such as an out that was just made, DVC sees by itself, and it stays.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.paths import OUT
from pipeline.runner.locks import alone, locked_stages, running_stages


def run(root: Path) -> list[Path]:
    """Remove what is damaged in the repository at `root` and return it; `dvc repro` makes it again.

    ValueError when a stage runs, whose outs are not in dvc.lock yet, or when DVC can not read the repository.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo, alone(root), repo.lock:
            if running := running_stages(root):
                raise ValueError(f"{'; '.join(running)}: runs here; wait for its end")
            cache = Path(repo.cache.local.path)
            expected = {path: path.parent.name + path.name.split(".")[0] for path in sorted(cache.glob("??/*"))}
            damaged = _differing(expected, "check DVC's cache")
            links = {_inode(path) for path in damaged}
            for path in damaged:
                path.unlink()
            outs = [path for path in (root / OUT).rglob("*") if _linked(path, links)]
            expected = _outs(root, cache)
            for path in outs:
                expected.pop(path, None)
            outs += [path for path in _differing(expected, "check outs") if _trusted(repo, path, expected[path])]
            for path in outs:
                path.unlink()
            return damaged + outs
    except DvcException as error:
        raise ValueError(f"DVC: {error}") from None


def _trusted(repo: Any, path: Path, md5: str) -> bool:
    """Whether DVC takes `path` for what has the hash `md5`, for it has not changed since DVC looked."""
    from dvc.fs import localfs

    _, known = repo.state.get(str(path), localfs)
    return known is not None and known.value == md5


def _outs(root: Path, cache: Path) -> dict[Path, str]:
    """The files of the cached outs, with their hashes as dvc.lock has them."""
    found = {}
    stages = locked_stages(root)
    for out in (out for stage in stages.values() for out in stage.get("outs", [])):
        path, md5 = root / out["path"], out["md5"]
        if not path.is_relative_to(root / OUT):
            continue
        if not md5.endswith(".dir"):
            found[path] = md5
            continue
        listing = cache / md5[:2] / md5[2:]
        if listing.exists():
            found |= {path / file["relpath"]: file["md5"] for file in json.loads(listing.read_bytes())}
    return found


def _differing(expected: dict[Path, str], title: str) -> list[Path]:
    """The files that are there, but have another hash."""
    files: Iterable[Path] = tqdm(expected, desc=title, delay=2, unit="file")
    return [path for path in files if path.is_file() and _md5(path) != expected[path]]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _linked(path: Path, inodes: set[tuple[int, int]]) -> bool:
    """Whether `path` is another name of one of `inodes`, or a symbolic link to what is no more."""
    return not path.exists() or (path.is_file() and _inode(path) in inodes)
