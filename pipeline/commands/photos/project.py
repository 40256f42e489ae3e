"""The project that `compare` makes for a folder: a repository of git and DVC, with a copy of this code.

It is a copy and no link, so that the project can be run, committed and sent by itself: DVC hashes what it computes
with, its experiments work, and no change elsewhere changes it. The next `compare` brings the copy up to date.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

import heba
from heba.data.splits import write_split
from heba.data.strict_yaml import read_yaml
from pipeline.commands.photos.splits import Plan
from pipeline.commands.presets import FOLDER as PRESETS
from pipeline.core.git import run_git
from pipeline.core.params import PARAMS_FILE, ParamsError
from pipeline.core.paths import OUT, new_file
from pipeline.runner import processes

MARK = "compare.json"  # in a folder that `compare` made: which images it is about
DAG = Path(__file__).with_name("dag.yaml")
STAGES = (
    *("params", "backbone", "download-own", "split-own", "precompute-own", "views-own", "train-own"),
    "evaluate-own",
)
IGNORED = (
    *("__pycache__/", "/data/", "/out/", "/mlartifacts/", "/mlflow.db*", "/.heba/", "/.heba-mlflow.lock"),
    *("/report.html", "/best/"),
)
DVC_IGNORED = ("/data", "/mlartifacts", ".*.tmp", "__pycache__")
GIT_PATIENCE = 600.0  # seconds for git, which takes in the whole project
DVC_CONFIG = "[core]\n    analytics = false\n    autostage = false\n[cache]\n    type = hardlink,symlink\n"


def default_folder(images: Path) -> Path:
    """Where the project of a folder of images lies unless the user says: below the current folder."""
    return Path("compare") / (images.resolve().name or "images")


def make(folder: Path, images: Path) -> None:
    """Make the project's folder, or go on with one that an earlier call made of the same images.

    ValueError where it holds something else, or lies among the images.
    """
    mark = folder / MARK
    text = json.dumps({"images": str(images)}, ensure_ascii=False) + "\n"
    if folder.resolve().is_relative_to(images):
        raise ValueError(f"--out {folder} lies in the folder of the images; name another place")
    if mark.is_file():
        if mark.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{folder} compares the images of another folder, see {mark}; name another place with --out"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and no project of `compare`; name another place with --out")
    _write(mark, text)


def lay_out(folder: Path) -> None:
    """The code, the DAG of own data, git and DVC; what is there stays as it is."""
    for package in (Path(heba.__file__).parent, Path(__file__).parents[2]):
        mirror(package, folder / package.name)
    stages = yaml.safe_load(DAG.read_text(encoding="utf-8"))["stages"]
    _write(folder / "dvc.yaml", _dump({"stages": {name: stages[name] for name in STAGES}}))
    _write(folder / ".gitignore", "\n".join(IGNORED) + "\n")
    _write(folder / ".dvcignore", "\n".join(DVC_IGNORED) + "\n")
    if not (folder / ".git").is_dir():
        git(folder, "init", "-q")
    if not (folder / ".dvc").is_dir():
        done = processes.dvc(["init", "-q"], folder)
        if done.returncode:
            raise OSError(f"dvc init failed in {folder}:\n{done.stdout}{done.stderr}")
    _write(folder / ".dvc" / "config", DVC_CONFIG)


def mirror(source: Path, target: Path) -> None:
    """Make the files under `target` those under `source`; one that is the same is not written again."""
    files = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".tmp"
    }
    for file in sorted(files):
        content = (source / file).read_bytes()
        if not (target / file).is_file() or (target / file).read_bytes() != content:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            with new_file(target / file) as path:
                path.write_bytes(content)
    for path in [*target.rglob("*")]:
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(target) not in files:
            path.unlink()


def _write(path: Path, text: str) -> None:
    """Write `text`, unless it stands there."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _dump(raw: Any) -> str:
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=4096)


def write_splits(folder: Path, plan: Plan) -> dict[str, str]:
    """Write the splits; by name, their files relative to the project. A name has the hash of what is in the file,
    so that params.yaml, which names it, tells DVC of a change."""
    (folder / "splits").mkdir(exist_ok=True)
    files = {}
    for name, split in plan.splits.items():
        path = folder / "splits" / f"{name}.json"
        write_split(split, path)
        files[name] = f"splits/{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}.json"
        path.replace(folder / files[name])
    for path in (folder / "splits").iterdir():
        if path.relative_to(folder).as_posix() not in files.values():
            path.unlink()
    return files


def preset(suite: str) -> dict[str, Any]:
    """The params that a project begins with: the committed ones for the tiny CLIP, those of the papers for
    others."""
    name = "demo" if suite == "embedded" else "paper"
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def methods_done(folder: Path, raw: dict[str, Any]) -> list[str]:
    """The methods of an earlier call on the same data and backbone as `raw`, the last of which may not be done;
    none where these differ, or what all methods need is not there."""
    path = folder / PARAMS_FILE
    try:
        earlier = read_yaml(path) if path.is_file() else None
    except ValueError:  # damaged
        earlier = None
    if not isinstance(earlier, dict) or not isinstance(earlier.get("methods"), list):
        return []
    same = all(earlier.get(key) == raw[key] for key in ("suite", "own", "backbone", "few_shot"))
    there = all(
        (folder / OUT / kind / name).is_dir() for kind in ("split", "precompute-own") for name in raw["own"]
    )
    return list(earlier["methods"]) if same and there else []


def write_params(folder: Path, raw: dict[str, Any]) -> None:
    _write(folder / PARAMS_FILE, _dump(raw))


def git(folder: Path, *args: str) -> str:
    """What git prints; OSError when it fails or is not there."""
    if not shutil.which("git"):
        raise OSError("git is not there; install it: the project of `compare` is a repository")
    done = run_git(*args, folder=folder, patience=GIT_PATIENCE)
    if done is None:
        raise OSError(f"git {args[0]} in {folder} takes more than {GIT_PATIENCE:.0f} s")
    if done.returncode:
        raise OSError(f"git {args[0]} failed in {folder}:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout.strip()


def commit(folder: Path, message: str) -> str:
    """Commit what changed, if anything did; the commit that is then the last."""
    git(folder, "add", "-A")
    if git(folder, "status", "--porcelain"):
        who = ("-c", "user.name=compare", "-c", "user.email=compare@localhost", "-c", "commit.gpgsign=false")
        git(folder, *who, "commit", "-q", "--no-verify", "-m", message)
    return git(folder, "rev-parse", "--short", "HEAD")


def seconds_of(text: str) -> float:
    """90s, 10m or 2h in seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if not found:
        raise ParamsError(f"--budget {text}: write a number and s, m or h, such as 10m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
