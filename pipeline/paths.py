"""Where things are, also in DVC's temporary workspaces; outs that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT = Path("out")
TRANSFER_STAGES = {"cross_dataset": "evaluate-cross", "domain_generalization": "evaluate-domain"}


def train_folder(protocol: str, dataset: str, seed: int, shots: int) -> Path:
    """What a training writes; those of the transfer protocols are on the source, whatever the `dataset`."""
    if protocol in TRANSFER_STAGES:
        return OUT / "train-source" / str(seed)
    name = f"few_shot-{shots}-{seed}" if protocol == "few_shot" else f"{protocol}-{seed}"
    return OUT / "train" / dataset / name


def evaluate_path(protocol: str, dataset: str, seed: int, shots: int) -> Path:
    """The record of a training's evaluation on a data set."""
    if protocol in TRANSFER_STAGES:
        return OUT / TRANSFER_STAGES[protocol] / str(seed) / f"{dataset}.json"
    return OUT / "evaluate" / dataset / f"{train_folder(protocol, dataset, seed, shots).name}.json"


def mark_protocols(on: dict[str, bool]) -> None:
    """Write .protocols, the names of those that are on, into the folder of every evaluation stage.

    The report depends on all these folders, and DVC refuses a dependency that does not exist.
    """
    for stage in ("evaluate", *TRANSFER_STAGES.values()):
        names = [
            protocol for protocol in on if on[protocol] and TRANSFER_STAGES.get(protocol, "evaluate") == stage
        ]
        with new_file(OUT / stage / ".protocols") as path:
            path.write_text("".join(f"{name}\n" for name in names))


def main_root() -> Path:
    """The main repository's root. DVC names it in DVC_ROOT, in the workspaces of queued experiments too."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def data_folder(data_root: str, suite: str, dataset: str) -> Path:
    """Folder of a data set's images; `data_root` is resolved against the main repository."""
    return main_root() / data_root / suite / dataset


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that replaces it when the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary file name beside `path` that is renamed to it when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
