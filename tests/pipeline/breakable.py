"""A repository with two small data sets and all protocols, which tests share (`conftest.finished`) or copy."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
from contextlib import contextmanager

import yaml

from tests.pipeline.repository import ROOT, copy_code, environment, initialise

TRAIN, TRAINED = "train@dtd-heba", "out/train/dtd/heba/base_to_novel-2-1"
ONE = ("--dataset", "dtd", "--method", "heba", "--protocol", "base_to_novel")  # `train` makes TRAINED alone


def read_params(folder=ROOT):
    return yaml.safe_load((folder / "params.yaml").read_text())


def write_params(folder, params):
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@contextmanager
def changed_params(folder):
    """params.yaml of `folder`, to be changed in place."""
    params = read_params(folder)
    yield params
    write_params(folder, params)


def small_params():
    """imagenet and dtd, one seed, all protocols, trainings that take seconds."""
    params = read_params()
    params |= {"datasets": ["imagenet", "dtd"], "methods": ["zero_shot", "heba"], "seeds": [1], "shots": 2}
    params["heba"] |= {"epochs": 25, "batch_size": 4}
    params["heba"]["overrides"]["cross_dataset"] |= {"epochs": 1}
    params["few_shot"] |= {"datasets": ["dtd"], "seeds": [1], "shots": [1]}
    params["transfer"] |= {"source": "imagenet", "targets": ["dtd"], "variants": ["imagenet_a"], "seeds": [1]}
    return params


def alone(params, name="dtd"):
    """`params`, for one data set and base_to_novel alone."""
    params |= {"datasets": [name]}
    params["few_shot"] |= {"seeds": [], "datasets": []}
    params["transfer"] |= {"source": name, "targets": [], "variants": [], "protocols": []}
    return params


def make(folder, params):
    """A repository in `folder`; nothing has run yet."""
    copy_code(folder)
    write_params(folder, params)
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
            if listing.suffix == ".dir" and listing.exists():  # a folder outside of the cache has none
                hashes += [file["md5"] for file in json.loads(listing.read_bytes())]
            for md5 in hashes:
                (cache / md5[:2] / md5[2:]).unlink(missing_ok=True)
            path = folder / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    return folder


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


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
    # Not read-only: where a writer was killed, SQLite rolls back what it left.
    with sqlite3.connect(f"file:{store}?mode=rw", uri=True) as database:
        return [status for (status,) in database.execute("select status from runs order by start_time")]
