"""`python -m pipeline.runner.safe_dvc ...`: DVC's command line, which replaces dvc.lock and its rwlock as a whole.

DVC itself truncates them and writes them anew. A process that is killed in between, with its node or at ctrl-C,
would leave half a file, and no DVC process would run any more.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from dvc.cli import main
from dvc.fs import LocalFileSystem

from pipeline.core.paths import temporary_name

plain_open = LocalFileSystem.open


def safe_open(self: Any, path: str, mode: str = "r", **options: Any) -> AbstractContextManager[Any]:
    """LocalFileSystem.open, but the two files get their new content when it is complete."""
    if "w" in mode and os.path.basename(path) in ("dvc.lock", "rwlock"):
        return _replaced(self, Path(path), mode, options)
    return plain_open(self, path, mode, **options)


@contextmanager
def _replaced(fs: Any, path: Path, mode: str, options: dict[str, Any]) -> Iterator[Any]:
    ignored = path.parent / ".dvc" / "tmp"
    temporary = temporary_name((ignored if ignored.is_dir() else path.parent) / path.name)
    try:
        with plain_open(fs, str(temporary), mode, **options) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    # In the background of a script ctrl-C is ignored, and what starts there inherits that; we interrupt DVC by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    LocalFileSystem.open = safe_open  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
