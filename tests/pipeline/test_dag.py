"""dvc.yaml against the code: a number that is out of date would look like any other."""

import ast

import pytest
import yaml

from tests.pipeline.repository import ROOT

# What a stage imports and no number comes from: hub.py fetches what out/backbone.json has the hash of, memory.py
# is for speed, and a training only writes a file by predict.py.
LEFT_OUT = {"heba/clip/hub.py", "heba/fit/memory.py", "heba/predict.py"}
MODULES = {
    "split": ["pipeline/stages/split.py"],
    "precompute": ["pipeline/stages/precompute.py", "pipeline/stages/backbone.py"],
    "train": ["pipeline/stages/train.py", "pipeline/stages/backbone.py"],
    "evaluate": ["pipeline/stages/evaluate.py", "pipeline/stages/backbone.py"],
}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def modules_of_heba(starts):
    """The files under heba/ that these files import, and those that they import in turn."""
    found, left = set(), [ROOT / start for start in starts]
    while left:
        for module in imports(left.pop()):
            name = f"{module.replace('.', '/')}.py"
            if name.startswith("heba/") and name not in found | LEFT_OUT and (ROOT / name).is_file():
                found.add(name)
                left.append(ROOT / name)
    return found


@pytest.mark.parametrize("name", [name for name in STAGES if name.split("-")[0] in MODULES])
def test_a_stage_depends_on_all_code_that_it_computes_with(name):
    starts = MODULES[name.split("-")[0]]
    wanted = modules_of_heba(starts) | {starts[0]}
    assert {dep for dep in STAGES[name]["deps"] if dep.endswith(".py")} == wanted
