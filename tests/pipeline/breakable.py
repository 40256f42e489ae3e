"""A repository with one small data set, for tests that break things; its stages run in forks of a warm process."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import yaml

from pipeline.warm import SERVER

ROOT = Path(__file__).parents[2]
TRAIN, TRAINED = "train@dtd-1", "out/train/dtd/base_to_novel-1"


def environment(**more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    base = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    return base | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def wait_for(condition, seconds=120):
    """Look again until `condition` gives something, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)
    return found


def wait_for_server(server):
    if server:
        wait_for(Path(server[SERVER]).exists)


def make(folder, **changes):
    """A repository in `folder` for dtd, seed 1, base_to_novel; nothing has run yet."""
    folder.mkdir(exist_ok=True)
    for name in ("heba", "pipeline", "dvc.yaml", "ablation.csv", ".gitignore", ".dvcignore"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"datasets": ["dtd"], "seeds": [1], "shots": 2} | changes
    params["train"] |= {"epochs": 25, "batch_size": 4}
    params["few_shot"]["seeds"] = params["few_shot"]["datasets"] = []
    params["transfer"] |= {"source": params["datasets"][0], "targets": [], "variants": [], "seeds": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "core.analytics", "false"]):
        assert call(folder, *command).returncode == 0
    return folder


def call(folder, *command, **env):
    return subprocess.run(command, cwd=folder, env=environment(**env), capture_output=True, text=True, check=False)


def start(folder, *command, **env):
    """The command as a shell starts it, in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stage(folder, *args, **env):
    return call(folder, sys.executable, "-m", "pipeline", *args, **env)


def copy(repo, folder, but=()):
    """A copy of a repository that has run, without its MLflow store, and as if the stages `but` had never run."""
    shutil.copytree(
        repo, folder, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts", ".heba", "runs")
    )
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    cache = folder / ".dvc" / "cache" / "files" / "md5"
    for name in but:
        for out in lock["stages"].pop(name)["outs"]:
            listing = cache / out["md5"][:2] / out["md5"][2:]
            hashes = [out["md5"]]
            if out["md5"].endswith(".dir"):
                hashes += [file["md5"] for file in json.loads(listing.read_bytes())]
            for md5 in hashes:
                (cache / md5[:2] / md5[2:]).unlink(missing_ok=True)
            path = folder / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    return folder


def outs(repo):
    """The sha256 of every file that the stages write, and of dvc.lock's entries; nothing else may lie there."""
    files = [
        p for name in ("out", "reports", "data") for p in sorted((repo / name).rglob("*")) if p.suffix != ".lock"
    ]
    hashes = {
        p.relative_to(repo).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()
    }
    stages = yaml.safe_load((repo / "dvc.lock").read_text())["stages"]
    return hashes | {name: entry["outs"] for name, entry in stages.items()}


def left_over(repo):
    """Temporary files and folders outside of .dvc, which git would ignore."""
    return [p for p in repo.rglob(".*.tmp") if ".dvc" not in p.relative_to(repo).parts]


def runs(repo):
    """The status of every MLflow run, in the order in which they began."""
    store = repo / "mlflow.db"
    if not store.exists():
        return []
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as database:
        return [status for (status,) in database.execute("select status from runs order by start_time")]


def working_in(folder):
    """Processes whose working folder is `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.joinpath("cwd").readlink() == folder:
                found.append(entry.name)
        except OSError:
            continue
    return found
