"""What we must know of DVC's inside: its files, its messages, its graph and its cache.

DVC promises none of this. tests/pipeline/test_dvc_inside.py holds each of it against the DVC that is installed.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

from pipeline.core.paths import new_file, remove_left, temporary_name

LOCK, RWLOCK, LOCKED = "dvc.lock", "rwlock", "lock"
TMP = Path(".dvc", "tmp")  # where the rwlock lies, and what git need not see
MEND = "python -m pipeline mend"  # repairs both
WAIT = "--wait-for-lock"
SINGLE = ("repro", "--single-item")  # a stage, or several one after the other, without what they depend on
SAID = re.compile(r"(?:Running stage|Stage) '([^']+)'(:| is cached| didn't change)")
FATE = {":": None, " is cached": "from the cache", " didn't change": "unchanged"}
FAILED = re.compile(r"failed to reproduce '([^']+)'")
BUSY = ("acquire lock", "is busy")  # the repository, or a file that a stage reads or writes


# What DVC says.


def told(line: str) -> tuple[str, str | None] | None:
    """The stage that a line of `dvc repro` is about, and how it has ended; None for one that begins now."""
    said = SAID.match(line)
    return (said[1], FATE[said[2]]) if said else None


def failed_stages(output: str) -> list[str]:
    """The stages that `dvc repro` names as failed."""
    return FAILED.findall(output)


def is_busy(message: str) -> bool:
    """Whether DVC gave up because another DVC process works there."""
    return any(words in message for words in BUSY)


def remedy(message: str) -> str:
    """The remedy for what DVC says of its files."""
    if is_busy(message):
        return "wait for the end of the other DVC process"
    return f"`{MEND}`" if LOCK in message or "RWLock-file" in message else "see `dvc status`"


# Its repository: the graph and the cache.


@contextmanager
def repository(root: Path) -> Iterator[Any]:
    """DVC's Repo at `root`; ValueError, with what to do, when DVC cannot read it."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            yield repo
    except DvcException as error:
        raise ValueError(f"DVC: {error}; {remedy(str(error))}") from None


class Plan(NamedTuple):
    """`needs`: the stages to run, each with those of them that it depends on itself; `order`: all stages, in the
    order of `dvc repro`; `gpu`: the stages that read the param `device`."""

    needs: dict[str, set[str]]
    order: list[str]
    gpu: set[str]


def make_plan(root: Path) -> Plan:
    """What changed and all that depends on it."""
    import networkx as nx
    from dvc.dependency import ParamsDependency
    from dvc.repo.reproduce import plan_repro

    parse_once()
    with repository(root) as repo:
        order = [stage.addressing for stage in plan_repro(repo.index.graph)]
        gpu = {
            stage.addressing
            for stage in repo.index.stages
            for dep in stage.deps
            if isinstance(dep, ParamsDependency) and "device" in dep.params
        }
        graph = nx.relabel_nodes(repo.index.graph, lambda stage: stage.addressing)  # edges to dependencies
        changed = set(repo.status()) & set(graph)
        stages = changed.union(*(nx.ancestors(graph, stage) for stage in changed))
        return Plan({stage: set(graph.successors(stage)) & stages for stage in stages}, order, gpu)


def graph(root: Path) -> Any:
    """All stages, as a graph of networkx with an edge from each to what it depends on itself."""
    import networkx as nx

    with repository(root) as repo:
        return nx.relabel_nodes(repo.index.graph, lambda stage: stage.addressing)


def cache_folder(repo: Any) -> Path:
    """DVC's cache, to which the outs are links."""
    return Path(repo.cache.local.path)


def cache_links(repo: Any) -> tuple[list[str], list[str]]:
    """The kinds of link that are configured for outs, in DVC's order, and all that work from the cache to here."""
    from dvc_objects.fs.generic import test_links

    cache = repo.cache.local
    kinds = ["reflink", "hardlink", "symlink"]
    return cache.cache_types, test_links(
        kinds, cache.fs, cache.path, repo.fs, str(Path(repo.root_dir) / TMP / LOCK)
    )


def cached_objects(cache: Path) -> dict[Path, str]:
    """The files of the cache, with the md5 that each should have."""
    return {path: path.parent.name + path.name.split(".")[0] for path in sorted(cache.glob("??/*"))}


def locked_files(root: Path, cache: Path) -> dict[Path, str]:
    """The files of the outs, with their md5 as dvc.lock has it; a folder's are in a listing in the cache."""
    found = {}
    for out in (out for stage in locked_stages(root).values() for out in stage.get("outs", [])):
        path, md5 = root / out["path"], out["md5"]
        if not md5.endswith(".dir"):
            found[path] = md5
            continue
        listing = cache / md5[:2] / md5[2:]
        if listing.exists():
            found |= {path / file["relpath"]: file["md5"] for file in json.loads(listing.read_bytes())}
    return found


def trusts(repo: Any, path: Path, md5: str) -> bool:
    """Whether DVC takes `path` for what has the hash `md5`, for it has not changed since DVC looked."""
    from dvc.fs import localfs

    _, known = repo.state.get(str(path), localfs)
    return known is not None and known.value == md5


class Files(NamedTuple):
    """What a stage reads and writes, as dvc.yaml has it: deps with params.yaml, and outs in DVC's order."""

    deps: list[str]
    outs: list[str]


def entry_of(root: Path, stage: str) -> str:
    """The entry in dvc.lock of a stage whose outs are there, as text; DVC takes them into its cache.

    To be called while `locked`.
    """
    from dvc.lock import LockNoop
    from dvc.stage.serialize import to_lockfile
    from dvc.utils.serialize import dumps_yaml

    with repository(root) as repo:
        repo.lock = LockNoop()
        repo.lock.lock()
        (known,) = repo.stage.collect(stage)
        known.save()
        known.commit()
        return dumps_yaml({"stages": to_lockfile(known)}).removeprefix("stages:\n")


def files_of(root: Path, stage: str) -> Files:
    """Those of a stage; none of one that dvc.yaml does not have."""
    with repository(root) as repo:
        for known in repo.index.stages:
            if known.addressing == stage:
                return Files([dep.fs_path for dep in known.deps], sorted(out.def_path for out in known.outs))
    return Files([], [])


# dvc.lock.


def is_lock(data: Any) -> bool:
    """Whether DVC can read this as the content of dvc.lock."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

    return _fits(data, COMPILED_LOCKFILE_SCHEMA) and bool(data.get("stages"))


def is_entry(data: Any) -> bool:
    """Whether DVC can read this as the entry of a stage, {stage: ...}."""
    from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA

    return isinstance(data, dict) and all(_fits(value, COMPILED_LOCK_FILE_STAGE_SCHEMA) for value in data.values())


def _fits(data: Any, schema: Any) -> bool:
    from voluptuous import Invalid

    try:
        schema(data)
    except Invalid:
        return False
    return isinstance(data, dict)


def locked_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The stages in dvc.lock; ValueError when it is damaged."""
    path = root / LOCK
    if not path.is_file():
        return {}
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        if not isinstance(stages, dict):
            raise TypeError("stages is not a mapping")
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        raise ValueError(f"{path} is damaged; `{MEND}` repairs it") from None
    return stages


def move_to_end(root: Path, stages: list[str]) -> None:
    """Let dvc.lock end with these of its stages, in this order."""
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    path = root / LOCK
    text = path.read_text(encoding="utf-8")
    if plain := entries(text):
        moved = {stage: plain.pop(stage) for stage in stages}
        text = HEAD + "".join((plain | moved).values())
    else:
        data = parse_yaml_for_update(text, str(path))
        for stage in stages:
            data["stages"].move_to_end(stage)
        text = dumps_yaml(data)
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")


# Its locks: one on the repository, and the rwlock, where its processes say what they read and write while a stage
# runs.


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


# How it writes both. It truncates them and writes them anew: a process that is killed in between, with its node or
# at ctrl-C, would leave half a file, and no DVC process would run any more.


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
    for path in (root / LOCK, root / TMP / LOCK, rwlock(root)):
        remove_left(path)


# How it keeps up with a long dvc.lock. At the end of every stage it parses the whole of it and writes it anew, in
# pure Python, and it parses it again for every stage that a command names.

HEAD = "schema: '2.0'\nstages:\n"
# Left to DVC: a line that belongs to no stage, a comment, a key of over 128 characters, an anchor, alias or tag.
ODD = re.compile(r"^ ?\S|(?:^|\s)#|^ *\? |[:-] [&*!]", re.MULTILINE)


def entries(text: str) -> dict[str, str] | None:
    """The text of dvc.lock by stage; None where it has not the plain form in which DVC writes it."""
    from dvc.utils.serialize import ParseError, parse_yaml

    head, *blocks = re.split(r"^(?=  \S)", text, flags=re.MULTILINE)
    keys = [block.partition("\n")[0] for block in blocks]
    if head != HEAD or not text.endswith("\n") or ODD.search(text, len(HEAD)):
        return None
    try:
        names = parse_yaml("\n".join(keys), LOCK)
    except ParseError:
        return None
    plain = isinstance(names, dict) and len(names) == len(blocks) and not any(names.values())
    return dict(zip(names, blocks, strict=True)) if plain else None


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
