"""`python -m pipeline mend`: repair dvc.lock, and remove what is damaged and what DVC would trust.

dvc.lock and the rwlock are cut when DVC is killed while it writes them (pipeline/runner/lockfile.py).

DVC trusts a write-protected object of its cache, and a file whose size and time have not changed. After damage by
a disk, or to an out that is linked to the cache, `dvc repro` and `dvc checkout` would bring the damage back. What
differs from dvc.lock in another way, such as an out that was just made, DVC sees by itself, and it stays.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from pipeline.core.paths import OUT
from pipeline.runner import dvc_inside, dvc_locks
from pipeline.runner.locks import alone


def run(root: Path) -> list[Path]:
    """Remove what is damaged in the repository at `root` and return it; `dvc repro` makes it again.

    ValueError when a stage runs, whose outs are not in dvc.lock yet, or when DVC cannot read the repository.
    """
    with alone(root), dvc_inside.repository(root) as repo, repo.lock:
        if running := dvc_locks.running_stages(root):
            raise ValueError(f"{'; '.join(running)}: runs here; wait for its end")
        cache = dvc_inside.cache_folder(repo)
        damaged = _differing(dvc_inside.cached_objects(cache), "check DVC's cache")
        links = {_inode(path) for path in damaged}
        for path in damaged:
            path.unlink()
        outs = [path for path in (root / OUT).rglob("*") if _linked(path, links)]
        locked = dvc_inside.locked_files(root, cache)
        left = {path for path in locked if path.is_relative_to(root / OUT)}.difference(outs)
        expected = {path: locked[path] for path in sorted(left)}
        differing = _differing(expected, "check outs")
        outs += [path for path in differing if dvc_inside.trusts(repo, path, expected[path])]
        for path in outs:
            path.unlink()
        return damaged + outs


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
