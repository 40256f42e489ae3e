"""`python -m pipeline doctor`: is everything here that a run needs? One row a check, failed ones with a remedy.

The checks are plain functions. They change nothing and look only as closely as a few seconds allow.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from threading import Timer
from typing import NamedTuple
from urllib.parse import unquote, urlparse

from pipeline.commands import links
from pipeline.core.git import run_git
from pipeline.core.params import LOST, PARAMS_FILE, Params, load_params, lost_folders, stage_of
from pipeline.core.paths import OUT, data_folder, main_root
from pipeline.core.trainings import trainings
from pipeline.runner import dvc_inside, dvc_locks, gitlock, lockfile, machine, processes

ROOT = Path(__file__).parents[2]
INSTALL = "pip install -c constraints.txt -e '.[pipeline]'"
POSTGRES = INSTALL.replace("pipeline", "postgres")
SHOWN = ("torch", "torchvision", "open_clip_torch", "dvc", "mlflow")
MOST_IMAGES = 50_000  # of a data set, to be counted here; the stages count them all
EMBEDDED_BYTES = 1_000_000_000  # data, outs and MLflow's store of the demo, which takes 0.82 GB
PATIENCE = 20.0  # seconds for a store or git to answer
DVC_PATIENCE = 180.0  # seconds for `dvc status`, which may have to hash much
SILENCE = 3.0  # seconds before a message says what is waited for


class Row(NamedTuple):
    """What a check found; `state` is ok, warn or fail, and all but ok have a remedy."""

    name: str
    state: str
    found: str
    remedy: str = ""


def packages(params: Params | None) -> Row:
    """Python and the packages of pyproject.toml, at the versions it asks for."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = ".".join(map(str, sys.version_info[:3]))
    wrong = []
    if python not in Requirement(f"python{project['requires-python']}").specifier:
        return Row("packages", "fail", f"Python {python}", f"install Python {project['requires-python']}")
    needed = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    for wanted in map(Requirement, needed):
        try:
            if (version := metadata.version(wanted.name)) not in wanted.specifier:
                wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
    if wrong:
        return Row("packages", "fail", "; ".join(wrong), INSTALL)
    first = shutil.which("python")
    if first is None or Path(first).parent.resolve() != Path(sys.executable).parent.resolve():
        found = f"`python` is {first or 'nowhere'}, and not {sys.executable}, which runs this"
        return Row("packages", "warn", found, "activate the environment: `dvc repro` runs stages with `python`")
    versions = [f"{name.removesuffix('_torch')} {metadata.version(name)}" for name in SHOWN]
    return Row("packages", "ok", ", ".join([f"Python {python}", *versions]))


def settings(params: Params | None) -> Row:
    """params.yaml can be read and is possible."""
    try:
        load_params()
    except ValueError as error:
        return Row("params.yaml", "fail", str(error), "mend it, or `python -m pipeline preset demo`")
    assert params is not None
    on = [
        name
        for name, listed in (
            ("base_to_novel", params.seeds),
            ("transfer", params.transfer.protocols),
            ("few_shot", params.few_shot.seeds),
        )
        if listed
    ]
    return Row("params.yaml", "ok", f"suite {params.suite}, {params.backbone.name}, {', '.join(on)}")


def gpu(params: Params | None) -> Row:
    """What nvidia-smi lists, and whether torch can use it."""
    import torch

    listed = machine.gpus()
    wanted = params.device if params else "auto"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        return Row("GPU", "ok", f"{count}: {names}" + (", not used: device is cpu" if wanted == "cpu" else ""))
    if listed and wanted != "cpu":
        found = f"nvidia-smi lists {len(listed)}, torch {torch.__version__} sees none"
        remedy = (
            "a driver as new as torch's CUDA, or a torch for your CUDA (pytorch.org); see CUDA_VISIBLE_DEVICES"
        )
        return Row("GPU", "fail", found, remedy)
    if wanted == "cuda":
        return Row("GPU", "fail", "none, but device is cuda", "set device: auto or cpu in params.yaml")
    found = f"none; {machine.cpus()} CPUs"
    if params and params.suite == "real":
        return Row(
            "GPU", "warn", found, "the real benchmarks take days on CPUs; `python -m pipeline cost` estimates"
        )
    return Row("GPU", "ok", found)


def disk(params: Params | None) -> Row:
    """Room for what params.yaml still lacks, where data, outs and DVC's cache lie."""
    assert params is not None, "params.yaml cannot be read"
    data = main_root() / params.data.root
    needs = _embedded_needs(params, data) if params.suite == "embedded" else _real_needs(params, data)
    found, short = [], []
    by_disk: dict[int, tuple[Path, float]] = {}
    for folder, needed in needs:
        while not folder.exists():
            folder = folder.parent
        path, total = by_disk.get(folder.stat().st_dev, (folder, 0.0))
        by_disk[folder.stat().st_dev] = path, total + needed
    for folder, needed in by_disk.values():
        free = shutil.disk_usage(folder).free
        found.append(f"{folder}: {needed / 1e9:.1f} GB still needed, {free / 1e9:.1f} GB free")
        if free < needed:
            short.append(str(folder))
    if short:
        remedy = (
            f"make room under {', '.join(short)}, or move data.root in params.yaml or `dvc cache dir` elsewhere"
        )
        return Row("disk", "fail", "; ".join(found), remedy)
    return Row("disk", "ok", "; ".join(found))


def _embedded_needs(params: Params, data: Path) -> list[tuple[Path, float]]:
    left = [name for name in params.datasets if not (OUT / "evaluate" / name).exists()]
    return [(data, EMBEDDED_BYTES * len(left) / max(1, len(params.datasets)))]


def _real_needs(params: Params, data: Path) -> list[tuple[Path, float]]:
    """Bytes by folder: what is not here of archives with their images, of packed images, and of adapters."""
    from heba.clip.architecture import read_architecture
    from pipeline.commands.cost import adapter_bytes
    from pipeline.stages.download import bytes_needed, catalog_entry, mirror_of

    side = read_architecture(params.backbone.name, main_root())["vision_cfg"].get("image_size", 224)

    fetched = packed = 0
    for name in _datasets(params):
        entry = catalog_entry(params, name)
        if not data_folder(params.data.root, params.suite, name).exists():
            fetched += bytes_needed(name, entry, data / "archives", mirror_of(params))
        if not (OUT / "precompute" / name).exists():
            packed += entry.counts.test * 3 * side**2
    adapters = 0
    sizes: dict[tuple[str, str], int] = {}
    for training in trainings(params):
        if not training.folder.exists():
            key = (training.method, training.protocol)
            if key not in sizes:
                sizes[key] = adapter_bytes(params, training)
            adapters += sizes[key]
    with dvc_inside.repository(main_root()) as repo:
        cache = dvc_inside.cache_folder(repo)
    return [(data, fetched), (cache, packed + adapters)]


def _datasets(params: Params) -> list[str]:
    """Those of the suite, without own data."""
    return list(dict.fromkeys([*params.datasets, *params.transfer.variants]))


def data(params: Params | None) -> Row:
    """Every data set that was downloaded is there and whole, and so are the folders of own data."""
    from pipeline.stages.download import manifest_path, read_manifest, verified_folder

    assert params is not None, "params.yaml cannot be read"
    if lost := lost_folders(params):
        return Row("data", "fail", "; ".join(lost), LOST)
    whole, absent, broken, problems = [], [], [], []
    for name in [*_datasets(params), *params.own]:
        if not manifest_path(name).is_file():
            absent.append(name)
            continue
        try:
            manifest = read_manifest(name)
            if manifest.get("suite") != ("own" if name in params.own else params.suite):
                absent.append(name)
                continue
            if name not in params.own:  # whose images lie where they are; the stages look at them
                verified_folder(params, name, images=manifest["images"] <= MOST_IMAGES)
            whole.append(name)
        except ValueError as error:
            broken.append(name)
            problems.append(str(error).partition(";")[0])
    if broken:
        stages = [stage_of("download", name) for name in broken]
        remedy = f"dvc repro --force --single-item {' '.join(stages)}"
        return Row("data", "fail", "; ".join(problems), remedy)
    if absent:
        found = f"{len(whole)} data sets whole, {len(absent)} not fetched yet: {_some(absent)}"
        return Row("data", "warn", found, "python -m pipeline repro fetches them")
    return Row("data", "ok", f"{len(whole)} data sets present and whole")


def store(params: Params | None) -> Row:
    """MLflow's store answers."""
    from pipeline.tracking.store import shown_uri, store_uri, without_password

    uri = store_uri()
    parts = urlparse(uri)
    name = shown_uri()
    remedy = "start it (docs/parallel.md), or unset MLFLOW_TRACKING_URI; trainings run without, `track` logs later"
    try:
        if parts.scheme in ("http", "https"):
            import requests

            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=PATIENCE / 2)
            answer.raise_for_status()
        elif parts.scheme == "sqlite":
            path = Path(unquote(parts.path[1:])).absolute()
            remedy = "move it away; `python -m pipeline track` makes a new one and logs what is in out/"
            if not path.exists():
                if os.access(path.parent, os.W_OK):
                    return Row("MLflow", "ok", f"{name}, made by the first training")
                return Row("MLflow", "fail", f"{path.parent} cannot be written to", f"chmod u+w {path.parent}")
            # Not read-only: where a training was killed, SQLite rolls back what it left.
            with sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=PATIENCE / 2) as connection:
                connection.execute("SELECT count(*) FROM experiments")
        else:
            _ask_database(uri)
    except ModuleNotFoundError as error:
        return Row("MLflow", "fail", f"{name}: the package {error.name} is missing", POSTGRES)
    except Exception as error:  # whatever a driver raises, the store cannot be used
        return Row("MLflow", "fail", f"{name}: {_first_line(without_password(str(error)))}", remedy)
    return Row("MLflow", "ok", name)


def _ask_database(uri: str) -> None:
    import sqlalchemy

    options = {"connect_timeout": int(PATIENCE / 2)} if uri.startswith("postgres") else {}
    engine = sqlalchemy.create_engine(uri, connect_args=options)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT 1"))


def git(params: Params | None) -> Row:
    """A commit that names what runs."""
    if not shutil.which("git"):
        return Row("git", "fail", "git is not installed", "install git")
    printed = []
    for arguments in (["log", "-1", "--format=%h"], ["status", "--porcelain"]):
        done = run_git(*arguments, folder=main_root(), patience=PATIENCE)
        if done is None:
            return Row("git", "warn", f"git {arguments[0]} takes more than {PATIENCE:.0f} s", "git status")
        if done.returncode:
            said = _first_line(done.stderr)
            if "dubious ownership" in said:
                return Row("git", "fail", said, f"git config --global --add safe.directory {main_root()}")
            return Row("git", "fail", said, "git init && git add -A && git commit -m start")
        printed.append(done.stdout)
    commit, changed = printed[0].strip(), [line[3:] for line in printed[1].splitlines()]
    if changed:
        found = f"commit {commit}, and {len(changed)} changed: {_some(changed)}"
        return Row("git", "warn", found, "git commit, so that the commit in MLflow names what ran")
    return Row("git", "ok", f"commit {commit}, nothing changed")


def dvc(params: Params | None) -> Row:
    """DVC can read the repository, nobody holds its lock, and what is to run."""
    root = main_root()
    if not (root / ".dvc").is_dir():
        return Row("DVC", "fail", f"{root} is no DVC repository", "run from the repository's root, or `dvc init`")
    if damage := lockfile.damage(root) or dvc_locks.rwlock_damage(root) or gitlock.damage(root):
        return Row("DVC", "fail", damage, f"{dvc_locks.MEND}, and then the same command again")
    waits = f"waiting for `dvc status`, {DVC_PATIENCE:.0f} s at most; ctrl-C stops it"
    message = Timer(SILENCE, lambda: print(waits, file=sys.stderr))
    message.start()
    try:
        done = processes.dvc(["status", "--json"], root, DVC_PATIENCE)
    except subprocess.TimeoutExpired:
        return Row("DVC", "warn", f"dvc status takes more than {DVC_PATIENCE:.0f} s", "dvc status")
    finally:
        message.cancel()
    if done.returncode:
        said = _first_line(done.stderr.replace("ERROR: ", ""))
        state = "warn" if dvc_inside.is_busy(said) else "fail"
        return Row("DVC", state, said, dvc_inside.remedy(said))
    changed = json.loads(done.stdout)
    if changed:
        found = f"{len(changed)} stages changed: {_some(list(changed))}"
        return Row("DVC", "warn", found, "python -m pipeline repro")
    return Row("DVC", "ok", "everything is up to date")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(said: object) -> str:
    return (str(said).strip().splitlines() or ["no message"])[0][:300]


def cache(params: Params | None) -> Row:
    """Outs are links to DVC's cache."""
    return Row("cache", *links.examine(main_root()))


CHECKS: list[Callable[[Params | None], Row]] = [packages, settings, gpu, disk, cache, data, store, git]


def examine() -> list[Row]:
    """The rows of all checks, which run side by side; one that breaks down is a failed row."""
    root = main_root()
    if not any((root / file).exists() for file in (PARAMS_FILE, "dvc.yaml")):
        found = f"{root} is not the repository: it has neither params.yaml nor dvc.yaml"
        return [Row("folder", "fail", found, "cd to the folder that you cloned")]
    try:
        params = load_params()
    except ValueError:
        params = None

    def one(check: Callable[[Params | None], Row]) -> Row:
        try:
            return check(params)
        except ModuleNotFoundError as error:
            return Row(check.__name__, "fail", f"the package {error.name} is missing", INSTALL)
        except Exception as error:  # a doctor who breaks down helps nobody
            return Row(
                check.__name__, "fail", f"not examined: {_first_line(error)}", "mend what the other rows name"
            )

    with ThreadPoolExecutor(len(CHECKS)) as pool:
        rows = pool.map(one, CHECKS)
        last = one(dvc)  # in this thread, which ctrl-C interrupts
        return [*rows, last]


def show(rows: list[Row]) -> None:
    """Print the rows as a table as wide as the terminal; in a file each row on a line of its own."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for row in rows:
            print(f"{row.state:4}  {row.name}: {row.found}" + (f"  ->  {row.remedy}" if row.remedy else ""))
        return
    table = Table()
    for column in ("", "Check", "Found", "Remedy"):
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for row in rows:
        table.add_row(Text(row.state, styles[row.state]), row.name, Text(row.found), Text(row.remedy))
    console.print(table)
