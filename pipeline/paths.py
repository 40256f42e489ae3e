"""Where things are, also in DVC's temporary workspaces; outs that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT = Path("out")
EVALUATION_STAGES = {
    "base_to_novel": "evaluate",
    "cross_dataset": "evaluate-cross",
    "domain_generalization": "evaluate-domain",
    "few_shot": "evaluate-few",
}


TRANSFER = ("cross_dataset", "domain_generalization")


def train_folder(protocol: str, dataset: str, seed: int, shots: int) -> Path:
    """What a training writes; those of the transfer protocols are on the source, whatever the `dataset`."""
    if protocol in TRANSFER:
        return OUT / "train-source" / str(seed)
    few = protocol == "few_shot"
    return OUT / "train-few" / f"{dataset}-{shots}-{seed}" if few else OUT / "train" / f"{dataset}-{seed}"


def evaluate_path(protocol: str, dataset: str, seed: int, shots: int) -> Path:
    """The record of an evaluation; those of the transfer protocols share a folder per seed."""
    folder = OUT / EVALUATION_STAGES[protocol]
    if protocol in TRANSFER:
        return folder / str(seed) / f"{dataset}.json"
    return folder / (f"{dataset}-{shots}-{seed}.json" if protocol == "few_shot" else f"{dataset}-{seed}.json")


def mark_protocols(on: dict[str, bool]) -> None:
    """Write out/<stage>/.protocol of every evaluation stage, "on" or "off".

    The report depends on all their folders, and DVC refuses a dependency that does not exist.
    """
    for protocol, stage in EVALUATION_STAGES.items():
        with new_file(OUT / stage / ".protocol") as path:
            path.write_text("on\n" if on[protocol] else "off\n")


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
