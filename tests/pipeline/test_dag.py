"""dvc.yaml against the code: a number that is out of date would look like any other."""

import ast
import re
from functools import cache

import pytest
import yaml

from heba import methods
from pipeline.commands import dag
from pipeline.core import code
from pipeline.stages.precompute import precompute_folder
from tests.test_rooms import MODULES, ROOT
from tests.test_rooms import imports as imported

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# What is imported and no number comes from.
LEFT_OUT = {
    "heba/__init__.py": "the names of the library",
    "heba/files.py": "appear whole or not at all",
    "heba/predict.py": "for those who use an adapter",
    "heba/methods/__init__.py": "finds a method by its name",
    "heba/fit/memory.py": "for speed",
    "heba/sources": "the manifests have the hashes of what came",
    "heba/embedded": "as the sources",
    "pipeline/stages/download.py": "as the sources",
    "pipeline/stages/own.py": "as the sources",
    "pipeline/core": "params are deps of their own; the rest says what runs and where it lies",
    "pipeline/tracking": "what MLflow is told",
}
# A stage reads the outs of another by the code of that one.
LEFT_OUT_BY_STAGE = {
    "split": {"heba/clip": "draws no images"},
    "views": {"pipeline/stages/split.py": "reads", "heba/methods": "tells whether one needs views"},
    "train": {
        "pipeline/stages/precompute.py": "reads",
        "pipeline/stages/split.py": "reads",
        "pipeline/stages/views.py": "reads",
    },
    "evaluate": {
        "pipeline/stages/precompute.py": "reads",
        "pipeline/stages/train.py": "shows progress",
    },
    "report": {
        "heba/clip": "checks params",
        "heba/data/prompts.py": "checks params",
        "heba/data/validation.py": "words of an error",
        "heba/fit": "costs",
    },
}
# Stages that write what came from elsewhere with its hash, or a mark.
NO_CODE = {"params", "backbone", "download", "protocols"}


@cache
def imports(path):
    return list(imported(path))


def kind(stage):
    return stage.split("-")[0]


COMPUTING = [stage for stage in STAGES if kind(stage) not in NO_CODE]


def command(stage):
    """The files that a stage's command imports, as its function in pipeline/commands/stages.py does."""
    name = STAGES[stage]["cmd"].split()[3].replace("-", "_")
    tree = ast.parse((ROOT / "pipeline" / "commands" / "stages.py").read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    modules = [f"{node.module}.{alias.name}" for node in nodes for alias in node.names]
    return [MODULES[module] for module in modules if module in MODULES]


def of_methods(stage, method):
    """The files of methods that a stage finds by name."""
    if kind(stage) == "report":
        return [ROOT / f"heba/methods/{name}/settings.py" for name in methods.names()]
    names = {"train": [method], "cost": [method], "evaluate": methods.names()}.get(kind(stage), [])
    return [ROOT / f"heba/methods/{name}/{part}.py" for name in names for part in ("settings", "method")]


def code_of(stage, method):
    """The code among a stage's deps."""
    deps = [dep.replace("${item.method}", method) for dep in STAGES[stage]["deps"]]
    return {dep for dep in deps if dep.startswith(("heba/", "pipeline/"))}


def covered(path, names):
    return any(path == ROOT / name or path.is_relative_to(ROOT / name) for name in names)


def missing(stage, method, listed):
    """What a stage's command imports and `listed` does not have."""
    left_out = LEFT_OUT | LEFT_OUT_BY_STAGE.get(kind(stage), {})
    found, left = set(), [*command(stage), *of_methods(stage, method)]
    while left:
        path = left.pop()
        if path not in found and not covered(path, left_out):
            found.add(path)
            left += [MODULES[name] for name in imports(path)]
    assert found
    return {path.relative_to(ROOT).as_posix() for path in found if not covered(path, listed)}


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("stage", COMPUTING)
def test_a_stage_depends_on_all_code_that_it_computes_with_and_on_no_other(stage, method):
    listed = code_of(stage, method)
    assert missing(stage, method, listed) == set()
    for dep in listed:
        assert missing(stage, method, listed - {dep}) or covered(ROOT / dep, LEFT_OUT), dep


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("stage", [stage for stage in STAGES if kind(stage) in ("views", "train", "evaluate")])
def test_the_code_in_the_hash_of_a_training_or_a_record_is_that_of_the_stage(stage, method):
    """By it trainings and records stay when their stage runs again."""
    listed = code_of(stage, method)
    if kind(stage) == "train":
        assert listed == {*code.TRAIN, code.of_method(method)}
    elif kind(stage) == "views":
        assert listed == {*code.VIEWS}
    else:
        assert listed == {*code.EVALUATE, "heba/methods"}
        assert (ROOT / code.of_method(method)).is_relative_to(ROOT / "heba/methods")


@pytest.mark.parametrize("stage", ["train", "train-own"])
def test_a_training_depends_on_no_other_method(stage):
    for method in methods.names():
        other = [ROOT / "heba" / "methods" / name for name in methods.names() if name != method]
        assert not [path for path in other if covered(path, code_of(stage, method))]
        assert [dep for dep in STAGES[stage]["params"] if "item" in dep] == ["${item.method}"]
        assert not set(methods.names()) & set(STAGES[stage]["params"])


def test_own_data_makes_no_evaluation_of_the_source_stale():
    """Those depend on all that is precomputed of the benchmarks, and own data lies elsewhere."""
    assert precompute_folder("dtd").is_relative_to("out/precompute")
    assert not precompute_folder("flowers").is_relative_to("out/precompute")
    outs = STAGES["evaluate-transfer"]["deps"]
    (own,) = STAGES["precompute-own"]["outs"]
    assert "out/precompute" in outs
    assert own == "out/precompute-own/${item.dataset}"
    assert not any(own.startswith(f"{dep}/") for dep in outs)


def test_the_chart_in_the_documentation_is_the_dag():
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    [chart] = re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    drawn = dag.mermaid(ROOT)
    assert chart == drawn
    assert "    train --> evaluate\n" in drawn
    assert "-own" not in drawn
