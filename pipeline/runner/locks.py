"""Who may touch the repository: one `python -m pipeline repro` at a time; and the order in dvc.lock."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.core.paths import new_file
from pipeline.runner import gitlock, lifetime, lockfile
from pipeline.runner.dvc_files import remove_halves
from pipeline.runner.dvc_inside import locked_stages, move_to_end
from pipeline.runner.dvc_locks import mend_rwlock, release_dead
from pipeline.runner.processes import wait_for_dying


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """ValueError while `python -m pipeline repro` works at `root`: two would run the same stages.

    What killed processes have left is removed, and what they have cut of DVC's files is mended.
    """
    path = root / ".heba" / "repro.lock"
    path.parent.mkdir(exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            wait_for_dying(root)
            remove_halves(root)
            with suppress(OSError):
                lifetime.remove_left()
            for mended in (mend_rwlock(root), lockfile.mend(root), gitlock.mend(root)):
                if mended:
                    print(f"mended: {mended}", file=sys.stderr)
            release_dead(root)
            yield
    except Timeout:
        raise ValueError("another `python -m pipeline repro` runs in this repository; wait for its end") from None


@contextmanager
def ordered_lock(root: Path, order: list[str]) -> Iterator[None]:
    """Sort the entries that the block adds to dvc.lock into `order`, that of `dvc repro`.

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
        new = [stage for stage in locked_stages(root) if stage not in before]
        right = [stage for stage in order if stage in new]
        if new != right:
            move_to_end(root, right)
    noted.unlink()
