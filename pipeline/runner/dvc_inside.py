"""What we must know of DVC's inside: its messages, its graph, its cache and dvc.lock. dvc_locks.py has its locks,
dvc_files.py how it writes files.

DVC promises none of this. tests/pipeline/test_dvc_inside.py holds each of it against the DVC that is installed.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.core.paths import new_file
from pipeline.runner.dvc_files import HEAD, LOCK, TMP, entries, parse_once
from pipeline.runner.dvc_locks import MEND

WAIT = "--wait-for-lock"
SAID = re.compile(r"(?:Running stage|Stage) '([^']+)'(:| is cached| didn't change)")
FATE = {":": None, " is cached": "from the cache", " didn't change": "unchanged"}
FAILED = re.compile(r"failed to reproduce '([^']+)'")
BUSY = ("acquire lock", "is busy")  # the repository, or a file that a stage reads or writes


# What DVC says.


def stage_of_line(line: str) -> tuple[str, str | None] | None:
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
