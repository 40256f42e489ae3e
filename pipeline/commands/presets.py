"""Named params.yaml files. DVC cannot interpolate a preset's name into dvc.yaml, so a preset is written.

A preset is a file of the folder presets/, or `own`: params.yaml as it is, without the benchmarks. The entries of
`own` in params.yaml stay with each of them. Only the text of what changes is replaced; comments stay.
"""

import difflib
from pathlib import Path

import yaml

from heba.data.strict_yaml import read_yaml
from pipeline.core.params import PARAMS_FILE, ParamsError
from pipeline.core.paths import new_file

FOLDER = Path(__file__).parents[1] / "presets"
OWN = "own"
START = "demo"  # what `own` changes where there is no params.yaml
# What is empty where none of the benchmarks is to run.
OF_BENCHMARKS = (("datasets",), ("transfer", "protocols"), ("transfer", "variants"))


def write(name: str, target: Path = PARAMS_FILE) -> str:
    """Write the preset over `target`; returns the difference as a unified diff, or a line that there is none, and
    says so where entries of `own` were kept."""
    files = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if name not in [*files, OWN]:
        raise ParamsError(f"there is no preset {name!r}; known are {', '.join([*files, OWN])}")
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    entries = _entries(target) if old else {}
    if name == OWN:
        new = _without_benchmarks(old or files[START].read_text(encoding="utf-8"), list(entries))
    else:
        new = files[name].read_text(encoding="utf-8")
        if entries:
            start, end = _span(old, OWN)
            new = _replaced(new, old[start:end], OWN)
    more = f"\nkept in own: {', '.join(entries)}" if entries else ""
    if name == OWN and not entries:
        more = f"\n{target} has no entry in own yet, and without one nothing runs; docs/tutorial.md has an example"
    if new == old:
        return f"{target} is the preset {name} already{more}"
    with new_file(target) as temporary:
        temporary.write_text(new, encoding="utf-8")
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(target), f"preset {name}")
    return "".join(lines) + more


def _entries(path: Path) -> dict[str, object]:
    """The entries of `own` in a params.yaml."""
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ParamsError(f"{error}\nMend it, or move it away: a preset keeps its entries of own") from None
    own = raw.get(OWN) if isinstance(raw, dict) else None
    return {str(key): value for key, value in own.items()} if isinstance(own, dict) else {}


def _without_benchmarks(text: str, own: list[str]) -> str:
    """A params.yaml's `text` in which no benchmark runs; few_shot keeps its data sets that are in `own`."""
    start, end = _span(text, "few_shot", "datasets")
    listed = yaml.safe_load(text[start:end])["datasets"]
    if not isinstance(listed, list):
        raise ParamsError(f"{PARAMS_FILE}: few_shot.datasets: must be a list; restore it with `preset {START}`")
    kept = [name for name in listed if name in own]
    for keys in OF_BENCHMARKS:
        text = _replaced(text, f"{keys[-1]}: []", *keys)
    return _replaced(text, f"datasets: [{', '.join(kept)}]", "few_shot", "datasets")


def _replaced(text: str, new: str, *keys: str) -> str:
    """`text` with `new` in place of what lies under `keys`, from the last of these on."""
    start, end = _span(text, *keys)
    return text[:start] + new + text[end:]


def _span(text: str, *keys: str) -> tuple[int, int]:
    """Where the last of nested `keys` begins in YAML, and where its value ends, without the comments behind it."""
    node = yaml.compose(text, yaml.SafeLoader)
    found = None
    for key in keys:
        pairs = {pair[0].value: pair for pair in node.value} if isinstance(node, yaml.MappingNode) else {}
        if key not in pairs:
            raise ParamsError(f"{PARAMS_FILE}: {'.'.join(keys)}: missing; restore it with `preset {START}`")
        found, node = pairs[key]
    assert found is not None
    assert node is not None
    lines = text[: node.end_mark.index].rstrip().splitlines(True)
    while lines[-1].lstrip().startswith("#") or not lines[-1].strip():
        lines.pop()
    return found.start_mark.index, len("".join(lines).rstrip())
