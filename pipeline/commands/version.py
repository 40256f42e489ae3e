"""`--version` of both commands. Imports none of the packages that it tells the versions of."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

import heba
from pipeline.core.git import run_git

PACKAGES = ("torch", "open_clip_torch", "timm", "dvc", "mlflow")  # the last two where the pipeline is installed
ROOT = Path(heba.__file__).resolve().parents[1]


def text() -> str:
    """The version, the commit where this is a clone, and the versions of what numbers and runs depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    lines = [f"heba {heba.__version__}{commit()}", *(f"{name} {number}" for name, number in found.items())]
    return "\n".join(lines)


def commit(root: Path = ROOT) -> str:
    """ ", commit <twelve digits>" of the clone in `root`, and whether files of it were changed; else nothing."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root:  # installed, be it in an environment inside another repository
        return ""
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f", commit {_git(root, 'rev-parse', '--short=12', 'HEAD')}{', changed since' if changed else ''}"


def _git(root: Path, *command: str) -> str:
    done = run_git(*command, folder=root)
    return done.stdout.strip() if done and done.returncode == 0 else ""


def _show(wanted: bool) -> None:
    if wanted:
        print(text())
        raise typer.Exit


Option = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_show, help="Show versions and the commit, and exit.")
]
