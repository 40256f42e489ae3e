"""Repositories for tests, and what a user in the virtual environment does in them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def environment(**more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    return kept | {"PATH": path} | more


def call(folder, *command, **env):
    return subprocess.run(command, cwd=folder, env=environment(**env), capture_output=True, text=True, check=False)


def stage(folder, *args, **env):
    return call(folder, sys.executable, "-m", "pipeline", *args, **env)


def copy_code(folder):
    """The code and the DAG, without params.yaml."""
    folder.mkdir(exist_ok=True)
    for name in ("heba", "pipeline", "dvc.yaml", "ablation.csv", "timings.csv", ".gitignore", ".dvcignore"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def initialise(folder):
    """Make a repository of git and DVC of what lies in `folder`."""
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.email", "test@example.org"],
        ["git", "config", "user.name", "test"],
        ["dvc", "init", "-q"],
        ["dvc", "config", "core.analytics", "false"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "start"],
    ):
        done = call(folder, *command)
        assert done.returncode == 0, done.stderr


def wait_for(condition, seconds=120.0):
    """Look again until `condition` gives something, and return that."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.002)
    return found


NOTE = """
import atexit, os, sys
if sys.orig_argv[1:3] in (["-m", "dvc"], ["-m", "pipeline.runner.safe_dvc"]):
    path = f"{os.environ['NOTES']}/{os.getpid()}"
    atexit.register(lambda: open(f"{path}.ended", "w").close())
    with open(f"{path}.began", "w") as file:
        print(*sys.orig_argv, file=file)
"""


def noting(folder):
    """An environment in which each process of DVC that is started as a module notes in `folder` that it began, by
    its arguments, and that it ended, unless it was killed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(NOTE)
    return {"NOTES": str(folder), "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def noted(folder, *arguments):
    """Those DVCs that began with arguments that end with these: of each, whether it ended by itself."""
    began = [
        path for path in folder.glob("*.began") if path.read_text().split()[-len(arguments) :] == [*arguments]
    ]
    return [path.with_suffix(".ended").exists() for path in began]


def working_in(folder):
    """Processes whose working folder is `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found
