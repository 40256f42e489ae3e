"""A DVC repository of eight stages that take moments, to run them in many ways."""

import subprocess
import sys

import yaml

from tests.pipeline import repository
from tests.pipeline.repository import ROOT, initialise

# A stage notes its start, waits, and writes what it read. It may be told to fail, or to wait for a file.
WORK = """
import os, pathlib, sys, time
name, seconds, *ins = sys.argv[1:]
noted = [os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NODE")]
with open("starts.txt", "a") as file:
    print(name, os.getpid(), *noted, file=file)
text = name + "".join(pathlib.Path(path).read_text() for path in ins)
time.sleep(float(seconds))
if os.path.exists(f"fail-{name}"):
    sys.exit("told to fail")
while os.path.exists(f"hold-{name}"):
    time.sleep(0.05)
pathlib.Path(f"{name}.txt").write_text(text)
"""
STAGES = """
stages:
  a: {cmd: python work.py a 0, outs: [a.txt]}
  b:
    matrix: {n: [1, 2, 3]}
    cmd: python work.py b${item.n} 0.3 a.txt
    deps: [a.txt]
    params: [device]
    outs: ["b${item.n}.txt"]
  c:
    matrix: {n: [1, 2, 3]}
    cmd: python work.py c${item.n} 0.1 b${item.n}.txt
    deps: ["b${item.n}.txt"]
    outs: ["c${item.n}.txt"]
  d: {cmd: python work.py d 0 c1.txt c2.txt c3.txt, deps: [c1.txt, c2.txt, c3.txt], outs: [d.txt]}
"""


def environment(**more):
    """That of a user who runs this checkout, in a process of its own and on all that is there."""
    env = repository.environment(PYTHONPATH=str(ROOT))
    return {k: v for k, v in env.items() if not k.startswith(("OMP_", "CUDA_", "RAY_", "HEBA_STAGE"))} | more


def make(folder, **params):
    """The repository, with params.yaml changed by `params`."""
    folder.mkdir()
    raw = yaml.safe_load((ROOT / "params.yaml").read_text()) | params
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    (folder / "work.py").write_text(WORK)
    (folder / "dvc.yaml").write_text(STAGES)
    initialise(folder)
    return folder


def reproduced(tmp_path_factory, name="sequential", **params):
    """The repository after a plain `dvc repro`."""
    folder = make(tmp_path_factory.mktemp(name) / "repo", **params)
    subprocess.run(["dvc", "repro", "-q"], cwd=folder, env=environment(), check=True)
    return folder


def outs(folder):
    """All that a run leaves: dvc.lock and the outs, as bytes."""
    return {
        path.name: path.read_bytes()
        for path in (folder / "dvc.lock", *folder.glob("?*.txt"))
        if path.name != "starts.txt"
    }


def starts(folder):
    """What each start of a stage noted: [name, process, GPU, threads, node]."""
    path = folder / "starts.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def stage(folder, *args, **env):
    command = [sys.executable, "-m", "pipeline", *args]
    return subprocess.run(command, cwd=folder, env=environment(**env), capture_output=True, text=True, check=False)


def repro(folder, *args, **env):
    return stage(folder, "repro", *args, **env)
