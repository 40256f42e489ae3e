"""Where a run comes from, as its tags tell it: who, which command, which DVC experiment, which code."""

import getpass
import os
from pathlib import Path

from pipeline.core.git import run_git
from pipeline.core.paths import main_root

EXPERIMENT_TAG = "dvc.experiment"
COMMIT_TAG = "mlflow.source.git.commit"
DIRTY_TAG = "git.dirty"  # "false", or the names of what differs from the commit
REWRITTEN = ("dvc.lock", "reports")  # in git, and written by the pipeline itself
CODE = ("heba/", "pipeline/")  # whose files count before git knows them
SHOWN = 5  # names of changed files


def tags() -> dict[str, str]:
    """The tags; those that nothing is known of are left out. MLflow's own have its names."""
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")
    stage = os.environ.get("DVC_STAGE", "")
    found = {
        "mlflow.user": _user(),
        "mlflow.source.name": f"dvc repro {stage}" if stage else "python -m pipeline",
        "mlflow.source.type": "LOCAL",
        COMMIT_TAG: commit,
        "mlflow.source.git.branch": _branch(commit),
        DIRTY_TAG: changed(commit) if commit else "",
        "dvc.stage": stage,
        EXPERIMENT_TAG: os.environ.get("DVC_EXP_NAME", ""),
    }
    return {key: value for key, value in found.items() if value}


def _branch(commit: str | None) -> str | None:
    """The branch; while an experiment runs, DVC has detached HEAD from it."""
    branch = _git("symbolic-ref", "--quiet", "--short", "HEAD", folder=main_root())
    if branch or not commit:
        return branch
    own = _git(
        "for-each-ref", "--points-at", commit, "--format=%(refname:short)", "refs/heads", folder=main_root()
    )
    names = (own or "").splitlines()
    return names[0] if len(names) == 1 else None


def changed(commit: str) -> str:
    """DIRTY_TAG of the tree that runs; "" where git cannot say."""
    tree = [".", *(f":(exclude){name}" for name in REWRITTEN)]
    files = _git("diff", "--name-only", commit, "--", *tree)
    new = _git("ls-files", "--others", "--exclude-standard", "--", *CODE)
    if files is None or new is None:
        return ""
    names = [*files.splitlines(), *new.splitlines()]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "false"


def _git(*arguments: str, folder: Path = Path()) -> str | None:
    """What git prints; None where it fails, or there is none."""
    done = run_git(*arguments, folder=folder)
    return done.stdout.strip() if done and done.returncode == 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a number without a name, in a container
        return str(os.getuid()) if hasattr(os, "getuid") else ""
