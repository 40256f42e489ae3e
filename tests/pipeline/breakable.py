"""A repository with one small data set, for tests that break things; its stages run in forks of a warm process."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import yaml

from pipeline.runner.warm import SERVER
from tests.pipeline.repository import ROOT, copy_code, environment, initialise, wait_for

TRAIN, TRAINED = "train@dtd-1", "out/train/dtd/base_to_novel-1"


def wait_for_server(server):
    if server:
        wait_for(Path(server[SERVER]).exists)


def make(folder, **changes):
    """A repository in `folder` for dtd, seed 1, base_to_novel; nothing has run yet."""
    copy_code(folder)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"datasets": ["dtd"], "seeds": [1], "shots": 2} | changes
    params["train"] |= {"epochs": 25, "batch_size": 4}
    params["few_shot"]["seeds"] = params["few_shot"]["datasets"] = []
    params["transfer"] |= {"source": params["datasets"][0], "targets": [], "variants": [], "seeds": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    initialise(folder)
    return folder


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
