"""How DVC writes and reads its files, and how it does so better in our processes.

DVC truncates dvc.lock and the rwlock and writes them anew: a process that is killed in between, with its node or
at ctrl-C, would leave half a file, and no DVC process would run any more. And a long dvc.lock is slow: at the end
of every stage DVC parses the whole of it and writes it anew, in pure Python, and it parses it again for every
stage of a command. tests/pipeline/test_dvc_inside.py holds what is assumed here against the DVC that is installed.
"""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from heba.files import remove_left, temporary_name

LOCK, RWLOCK = "dvc.lock", "rwlock"
TMP = Path(".dvc", "tmp")  # where the rwlock lies, and what git need not see
HEAD = "schema: '2.0'\nstages:\n"
# Left to DVC: a line that belongs to no stage, a comment, a key of over 128 characters, an anchor, alias or tag.
NOT_PLAIN = re.compile(r"^ ?\S|(?:^|\s)#|^ *\? |[:-] [&*!]", re.MULTILINE)


def replace_files_whole() -> None:
    """From now on, DVC in this process gives dvc.lock and the rwlock their new content when it is complete."""
    from dvc.fs import LocalFileSystem

    plain_open = LocalFileSystem.open

    @contextmanager
    def replaced(fs: Any, path: Path, mode: str, options: dict[str, Any]) -> Iterator[Any]:
        ignored = path.parent / TMP
        temporary = temporary_name((ignored if ignored.is_dir() else path.parent) / path.name)
        try:
            with plain_open(fs, str(temporary), mode, **options) as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def safe_open(self: Any, path: str, mode: str = "r", **options: Any) -> AbstractContextManager[Any]:
        if "w" in mode and os.path.basename(path) in (LOCK, RWLOCK):
            return replaced(self, Path(path), mode, options)
        return plain_open(self, path, mode, **options)

    LocalFileSystem.open = safe_open  # type: ignore[method-assign]


def remove_halves(root: Path) -> None:
    """Remove what killed processes have left of dvc.lock and the rwlock."""
    for path in (root / LOCK, root / TMP / LOCK, root / TMP / RWLOCK):
        remove_left(path)


def blocks(text: str) -> list[str]:
    """The beginning of a dvc.lock, before its first stage, and the text of each stage."""
    return re.split(r"^(?=  \S)", text, flags=re.MULTILINE)


def entries(text: str) -> dict[str, str] | None:
    """The text of dvc.lock by stage; None where it has not the plain form in which DVC writes it."""
    from dvc.utils.serialize import ParseError, parse_yaml

    head, *stages = blocks(text)
    keys = [stage.partition("\n")[0] for stage in stages]
    if head != HEAD or not text.endswith("\n") or NOT_PLAIN.search(text, len(HEAD)):
        return None
    try:
        names = parse_yaml("\n".join(keys), LOCK)
    except ParseError:
        return None
    plain = isinstance(names, dict) and len(names) == len(stages) and not any(names.values())
    return dict(zip(names, stages, strict=True)) if plain else None


def write_entries_alone() -> None:
    """From now on, DVC in this process puts the entry of a stage into the text of dvc.lock, to the same bytes."""
    from dvc import dvcfile
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml

    plain_dump = dvcfile.Lockfile.dump_stages

    def dump_stages(self: Any, stages: list[Any], **options: Any) -> None:
        path = Path(self.path)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        new = {name: entry for stage in stages for name, entry in to_lockfile(stage, **options).items()}
        before, after = entries(text), entries(dumps_yaml({"schema": "2.0", "stages": new}))
        if before is None or after is None:
            plain_dump(self, stages, **options)
            return
        if changed := not after.items() <= before.items():
            dvcfile.logger.info("Updating lock file '%s'", self.relpath)
        with self.repo.fs.open(self.path, "w+", encoding="utf-8") as file:
            file.write(HEAD + "".join((before | after).values()))
        if changed:
            self.repo.scm_context.track_file(self.relpath)

    dvcfile.Lockfile.dump_stages = dump_stages


@cache
def parse_once() -> None:
    """From now on, DVC in this process parses no text of YAML twice: dvc.lock, dvc.yaml and params.yaml."""
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    plain_parse = _yaml.parse_yaml

    @lru_cache(maxsize=16)
    def parsed(text: str, path: str) -> Any:
        return plain_parse(text, path)

    def parse_yaml(text: str, path: str, typ: str = "safe") -> Any:
        # A copy each time: its readers may change what they get.
        return deepcopy(parsed(text, path)) if typ == "safe" else plain_parse(text, path, typ)

    _yaml.parse_yaml = strictyaml.parse_yaml = parse_yaml
