"""What a stage's command costs by itself, and in a fork of a process that has imported all (runner/warm.py).

CPU seconds, which hold where others load the machine, with those of what the command starts to log to MLflow;
DVC's are not in it. Run it where `dvc repro` has run; it works in a copy of the outs, with its own MLflow store.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import psutil
import typer

from pipeline.runner.warm import OFF, SERVER, stage_server

STARTS = {
    "Python": "pass",
    "our command line": "import pipeline.commands.cli",
    "torch": "import torch",
    "open_clip, with torch, torchvision and torch._dynamo": "import open_clip",
    "MLflow with its store": "import mlflow.pyfunc, mlflow.store.tracking.sqlalchemy_store",
}


def cpu_of(command: list[str], folder: Path, **env: str) -> float:
    """CPU seconds of a command and of what it waits for."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return spent() - before


def main(
    dataset: Annotated[str, typer.Option(help="A data set of params.yaml.")] = "dtd",
    method: Annotated[str, typer.Option(help="A method of params.yaml.")] = "heba",
) -> None:
    """Print CPU seconds of the imports, and of each stage by itself and in a fork."""
    root = Path.cwd()
    stages = {
        "split": (["split", "--dataset", dataset], f"split/{dataset}"),
        "precompute": (["precompute", "--dataset", dataset], f"precompute/{dataset}"),
        "train": (["train", "--dataset", dataset, "--method", method], f"train/{dataset}/{method}"),
        "evaluate": (["evaluate", "--dataset", dataset], f"evaluate/{dataset}"),
    }
    rows = []
    for what, code in STARTS.items():
        rows.append((f"start: {what}", f"{cpu_of([sys.executable, '-c', code], root):.1f}", ""))
    server = stage_server(root)
    while not os.path.exists(server[SERVER]):
        time.sleep(0.1)
    (process,) = (p for p in psutil.process_iter() if server[SERVER] in p.cmdline())
    rows.append(("start of the server, once", "", f"{sum(process.cpu_times()[:2]):.1f}"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copy("params.yaml", folder)
        shutil.copytree("out", folder / "out")
        (folder / "data").symlink_to(root / "data")
        here = {"DVC_ROOT": temporary, "PYTHONPATH": str(root)}
        for name, (arguments, out) in stages.items():
            command = [sys.executable, "-m", "pipeline", *arguments]
            shutil.rmtree(folder / "out" / out)
            alone = cpu_of(command, folder, **here, **{SERVER: OFF})
            shutil.rmtree(folder / "out" / out)
            before = sum(process.cpu_times()[:4])
            forked = cpu_of(command, folder, **here, **server)
            time.sleep(0.5)  # until the server has waited for its forks
            forked += sum(process.cpu_times()[:4]) - before
            rows.append((f"{name} {dataset}", f"{alone:.1f}", f"{forked:.1f}"))
    table = pd.DataFrame(rows, columns=["", "by itself, s", "in a fork, s"])
    print(table.to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
