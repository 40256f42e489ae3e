"""git's index.lock, which stays when DVC is killed while it writes git's index. Then neither DVC nor git works:
"the index is locked".
"""

from pathlib import Path

import psutil

from pipeline.core.git import run_git


def damage(root: Path) -> str:
    """What stands in the way at `root`; "" where nothing does, or a living git or DVC may hold the lock."""
    path = _path(root)
    if path is None or not path.exists() or _works(root):
        return ""
    return f"{path.relative_to(root) if path.is_relative_to(root) else path} was left by a process that was killed"


def mend(root: Path) -> str:
    """Remove the lock at `root`, and say what was wrong; "" where nothing is."""
    path, found = _path(root), damage(root)
    if path is not None and found:
        path.unlink(missing_ok=True)
    return found


def _path(root: Path) -> Path | None:
    """Where git has it, which in a worktree is not below .git; None outside of a repository."""
    done = run_git("rev-parse", "--git-path", "index.lock", folder=root)
    return root / done.stdout.strip() if done and done.returncode == 0 else None


def _works(root: Path) -> bool:
    """Whether a git or a DVC works at `root` or below it."""
    for process in psutil.process_iter(["name", "cmdline", "cwd"]):
        about = process.info
        words = [about["name"] or "", *(Path(word).name for word in (about["cmdline"] or [])[:3])]
        if {"git", "dvc", "dvc.__main__"} & set(words) and Path(about["cwd"] or "/").is_relative_to(root):
            return True
    return False
