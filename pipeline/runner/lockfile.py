"""dvc.lock when DVC was killed while it wrote it: what is missing, and how it comes back.

Plain DVC overwrites dvc.lock in place when a stage has ended. A kill in between leaves a beginning of the new
text, down to an empty file. When a stage starts, DVC waits for it and dvc.lock is whole: the stage keeps a copy
then. What that copy lacks is the entry of the stage that has ended since; DVC makes it again from what lies there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.git import run_git
from pipeline.core.paths import main_root, new_file
from pipeline.runner import dvc_inside, dvc_locks
from pipeline.runner.dvc_files import HEAD, LOCK, blocks

KEPT = Path(".heba", LOCK)  # the copy
BEGAN, ENDED = (
    Path(".heba", "stage.began"),
    Path(".heba", "stage.ended"),
)  # the last stage's name; with their times


@contextmanager
def kept() -> Iterator[None]:
    """In a stage that DVC runs: keep a copy of dvc.lock, and note that the stage began, and that it ended well.

    In the temporary workspaces of experiments nothing is kept: DVC gives one up whose run was killed.
    """
    stage, root = os.environ.get("DVC_STAGE"), main_root()
    if not stage or Path.cwd() != root:
        yield
        return
    with suppress(OSError):  # the stage can run without it, and says itself what is full or read-only
        _keep(root)
        _write(root / BEGAN, stage)
    try:
        yield
    except SystemExit as end:
        if not end.code:
            with suppress(OSError):
                _write(root / ENDED, stage)
        raise


def _keep(root: Path) -> None:
    text, copy = _read(root / LOCK), _read(root / KEPT)
    if not text or text == copy:
        return
    if text.startswith(HEAD) and _is_beginning(text, copy) and not _known_to_git(root):
        text = _text(_entries(copy) | _without_last(_entries(text)))  # cut, and nobody has mended it
    _write(root / KEPT, text)


def damage(root: Path) -> str:
    """What is wrong with dvc.lock at `root`, as a killed DVC leaves it; "" where nothing is."""
    text, before = _read(root / LOCK), _before(root)
    if not text.strip():
        if (root / LOCK).exists():
            return f"{LOCK} is empty"
        return f"{LOCK} is missing" if _entries(before) or _ended(root) else ""
    if not dvc_inside.is_lock(_parsed(text)):
        return f"{LOCK} cannot be read: DVC was killed while it wrote it, or somebody changed it"
    if not text.startswith(HEAD):  # DVC reads it, but somebody else has written it
        return ""
    lacks = _is_beginning(text, before) or _lacks_last(root, text) or _lacks_lines(root, text)
    if lacks and not _known_to_git(root):
        return f"{LOCK} ends too early: DVC was killed while it wrote it"
    return ""


def mend(root: Path) -> str:
    """Repair dvc.lock at `root`, and say what was wrong; "" where nothing is.

    Its entries are those that are whole in it, then those of the copy, or of git where there is none, and that of
    the stage that ended last, if nothing that it read or wrote has changed since. What else was done, DVC has in
    its run cache. ValueError while another DVC works here.
    """
    path = root / LOCK
    if not damage(root):
        return ""
    with dvc_locks.locked(root):
        found = damage(root)  # it may have been written just then
        if not found:
            return ""
        written = _written(path)
        known, before = _without_last(_entries(_read(path))), _entries(_before(root))
        entries = {name: text for name, text in (before | known).items() if dvc_inside.is_entry(_parsed(text))}
        _put(path, entries)
        ended = _ended(root)
        if ended and ended not in known and _unchanged(root, ended, written):
            _put(path, entries | {ended: dvc_inside.entry_of(root, ended)})
        return found


def _put(path: Path, entries: dict[str, str]) -> None:
    if entries:
        _write(path, _text(entries))
    else:
        path.unlink(missing_ok=True)


def _entries(text: str) -> dict[str, str]:
    """The entries of a dvc.lock by stage, each as text. A line at its end that is cut says nothing."""
    if not text.startswith(HEAD):
        return {}
    _, *stages = blocks(text[: text.rfind("\n") + 1])
    return {stage.partition("\n")[0].strip().removesuffix(":").strip("'\""): stage for stage in stages}


def _without_last(entries: dict[str, str]) -> dict[str, str]:
    """All but the last, which may lack lines."""
    return dict(list(entries.items())[:-1])


def _text(entries: dict[str, str]) -> str:
    return HEAD + "".join(entries.values())


def _parsed(text: str) -> Any:
    """None for what is no YAML."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)  # libyaml's, where it is there: 20 times quicker
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError):
        return None
    finally:
        loader.dispose()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


def _known_to_git(root: Path) -> bool:
    """Whether dvc.lock is one of git's: then it was checked out, and is whole."""
    hashed = run_git("hash-object", LOCK, folder=root)
    name = hashed.stdout.strip() if hashed else ""
    there = run_git("cat-file", "-e", name, folder=root) if name else None
    return there is not None and there.returncode == 0


def _before(root: Path) -> str:
    """The dvc.lock of the time when the last stage began, or git's."""
    if copy := _read(root / KEPT):
        return copy
    shown = run_git("show", f"HEAD:./{LOCK}", folder=root)
    return shown.stdout if shown else ""


def _is_beginning(text: str, before: str) -> bool:
    """Whether `text` is cut in a line, or has the first stages of `before` and no more."""
    stages, known = list(_entries(text)), list(_entries(before))
    return not text.endswith("\n") or (len(stages) < len(known) and stages == known[: len(stages)])


def _lacks_last(root: Path, text: str) -> bool:
    """Whether the stage that ended last is not in `text`, which was written after that."""
    ended = _ended(root)
    return bool(ended) and ended not in _entries(text) and _written(root / LOCK) >= _written(root / ENDED)


def _lacks_lines(root: Path, text: str) -> bool:
    """Whether the last entry, cut between two lines, has less than DVC writes."""
    if not text.endswith("\n"):
        return True
    entries = _entries(text)
    if not entries:
        return True
    stage = list(entries)[-1]
    outs = _parsed(entries[stage])[stage].get("outs", [])
    if outs and not ("size" in outs[-1] and ("nfiles" in outs[-1] or not outs[-1]["md5"].endswith(".dir"))):
        return True
    try:
        wanted = dvc_inside.files_of(root, stage).outs
    except ValueError:  # dvc.yaml or params.yaml cannot be read
        return False
    return len(outs) < len(wanted) and [out["path"] for out in outs] == wanted[: len(outs)]


def _written(path: Path) -> int:
    """In nanoseconds; 0 where there is no such file."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _ended(root: Path) -> str:
    """The stage that began last, if it ended well."""
    began, ended = _read(root / BEGAN), _read(root / ENDED)
    if began and began == ended and _written(root / BEGAN) <= _written(root / ENDED):
        return ended
    return ""


def _unchanged(root: Path, stage: str, written: int) -> bool:
    """Whether `stage` ended before dvc.lock was `written`, what it read has not changed since it began, and what
    it wrote not since DVC looked at that."""
    if written < _written(root / ENDED):
        return False
    try:
        files = dvc_inside.files_of(root, stage)
        read = max(_changed(root / path) for path in ("dvc.yaml", *files.deps))
        wrote = max(_changed(root / path) for path in files.outs)
    except (ValueError, OSError):
        return False
    return read <= _written(root / BEGAN) and wrote <= written


def _changed(path: Path) -> int:
    """When a file, or anything in a folder, changed last, in nanoseconds. Python's cache changes folders of code.

    OSError when there is no such file.
    """
    times = [] if path.is_dir() else [path.stat().st_ctime_ns]
    for folder, folders, names in os.walk(path):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
        else:
            times.append(os.stat(folder).st_ctime_ns)
        times += [os.lstat(Path(folder, name)).st_ctime_ns for name in names]
    return max(times, default=0)
