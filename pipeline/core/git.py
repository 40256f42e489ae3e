"""git, run with a time limit. Imports little, since every command and stage does."""

import subprocess
from pathlib import Path

PATIENCE = 10.0  # seconds


def run_git(
    *arguments: str, folder: Path = Path(), patience: float = PATIENCE
) -> subprocess.CompletedProcess[str] | None:
    """Run git in `folder`; None where git is not installed, or is not done in `patience` seconds."""
    # What only looks takes no lock, on which another git could fail.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        return subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=patience,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
