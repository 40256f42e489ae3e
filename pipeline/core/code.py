"""The code that each stage computes with, as dvc.yaml lists it among the deps, and its hash.

A stage that covers several trainings keeps those whose inputs are unchanged. The code is one of these inputs.
"""

import hashlib
from functools import cache
from pathlib import Path

import heba

ROOT = Path(heba.__file__).parents[1]
MODEL = ("heba/clip", "heba/data", "pipeline/stages/backbone.py")
TRAIN = (*MODEL, "heba/artifact.py", "heba/fit", "pipeline/stages/train.py")
VIEWS = (*MODEL, "pipeline/stages/views.py")
EVALUATE = (*MODEL, "heba/artifact.py", "heba/evaluation", "heba/fit", "pipeline/stages/evaluate.py")


def of_method(method: str) -> str:
    return f"heba/methods/{method}"


@cache
def sha256(*paths: str) -> str:
    """The hash of the Python files under `paths`, files or folders of this code, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        file = ROOT / path
        for module in [file] if file.is_file() else sorted(file.rglob("*.py")):
            content = hashlib.sha256(module.read_bytes()).hexdigest()
            digest.update(f"{module.relative_to(ROOT).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
