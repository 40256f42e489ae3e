"""Named params.yaml files. DVC cannot interpolate a preset's name into dvc.yaml, so a preset is copied."""

import difflib
from pathlib import Path

from pipeline.core.params import PARAMS_FILE, ParamsError
from pipeline.core.paths import new_file

FOLDER = Path(__file__).parents[1] / "presets"


def write(name: str, target: Path = PARAMS_FILE) -> str:
    """Copy the preset over `target`; returns the difference as a unified diff, or a line that there is none."""
    path = FOLDER / f"{name}.yaml"
    known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    if name not in known:
        raise ParamsError(f"there is no preset {name!r}; known are {', '.join(known)}")
    new = path.read_text(encoding="utf-8")
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    if new == old:
        return f"{target} is the preset {name} already"
    with new_file(target) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(target), f"preset {name}"))
