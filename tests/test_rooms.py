"""Which folder may import which. A file's folder is its room."""

import ast
import re
from pathlib import Path

import networkx
import pytest

from heba import methods

ROOT = Path(__file__).parents[1]
FILES = sorted(path for name in ("heba", "pipeline") for path in (ROOT / name).rglob("*.py"))

# A room sees itself and these. `heba` and `pipeline` are the files that lie in no folder of theirs.
HEBA = {"heba", "heba/clip", "heba/data", "heba/fit", "heba/methods", "heba/evaluation", "heba/sources"}
SEES = {
    "heba/clip": set(),
    "heba/fit": {"heba/clip", "heba/data"},
    "heba/data": {"heba/clip"},
    "heba/evaluation": {"heba/data"},
    "heba/sources": {"heba/clip", "heba/data"},
    "heba/embedded": {"heba/clip", "heba/data"},
    "heba/methods": {"heba/clip", "heba/data", "heba/fit"},
    "heba": {"heba/clip", "heba/data", "heba/fit", "heba/methods", "heba/evaluation", "heba/sources"},
    "pipeline/core": HEBA,
    "pipeline/tracking": HEBA | {"pipeline/core"},
    "pipeline/stages": HEBA | {"heba/embedded", "pipeline/core", "pipeline/tracking"},
    "pipeline/report": {"heba", "heba/data", "heba/methods", "heba/evaluation", "pipeline/core"},
    "pipeline/runner": {"heba", "pipeline/core"},
    "pipeline/commands": HEBA
    | {f"pipeline/{room}" for room in ("core", "tracking", "stages", "report", "runner")},
    "pipeline": {"pipeline/runner", "pipeline/commands"},
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """The modules of this project that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name in MODULES)


def room_of(path):
    """The folder below heba/ or pipeline/ that a file lies in."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in FILES} <= set(SEES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_rooms_that_its_own_room_sees(path):
    room = room_of(path)
    seen = {room_of(MODULES[name]): name for name in imports(path)}
    assert not {other: name for other, name in seen.items() if other not in SEES[room] | {room}}


def test_no_method_imports_another():
    for path in (ROOT / "heba" / "methods").glob("*/*.py"):
        other = [n for n in imports(path) if n.startswith("heba.methods.") and n.split(".")[2] != path.parent.name]
        assert not other, f"{path}: {other}"


def circles(edges):
    graph = networkx.DiGraph(edges)
    return [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]


def test_no_circle_of_rooms_or_files():
    assert circles([(room, other) for room, others in SEES.items() for other in others]) == []
    assert circles([(module_of(path), name) for path in FILES for name in imports(path)]) == []
    assert circles([("a", "b"), ("b", "c"), ("c", "a")]) == [["a", "b", "c"]]


def test_the_library_knows_neither_dvc_nor_mlflow():
    for path in FILES:
        if path.is_relative_to(ROOT / "heba"):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {n.split(".")[0] for n in names} & {"dvc", "mlflow", "ray", "typer"}, path


# Where a method is named outside its own folder, or its name means something else.
NAMED = {
    ("heba/__init__.py", "zero_shot"),  # the function heba.zero_shot
    ("pipeline/__main__.py", "heba"),  # the package
    ("heba/sources/catalog.py", "coop"),  # CoOp's split files, and so is the kind of own data
    ("pipeline/core/params.py", "coop"),
    ("pipeline/commands/photos/run.py", "coop"),
    ("heba/predict.py", "zero_shot"),  # PLAIN, the method of that function
    ("heba/adaptation.py", "heba"),  # the default
    ("pipeline/commands/use.py", "heba"),
    ("pipeline/commands/common.py", "heba"),  # the command
    ("heba/export.py", "heba"),  # the package
}


def named(source):
    """The methods that strings of a module name, alone or at the beginning of a column. The logger "heba"
    is no method."""
    tree = ast.parse(source)
    loggers = [
        argument
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger"
        for argument in node.args
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in loggers:
            yield from (name for name in methods.names() if re.fullmatch(rf"{name}(_\w*)?", node.value))


def test_no_code_but_its_own_names_a_method():
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in FILES
        for name in named(path.read_text(encoding="utf-8"))
        if not path.is_relative_to(ROOT / "heba" / "methods" / name)
    }
    assert found == NAMED
    assert list(named('logging.getLogger("heba")\nx = {"heba": "heba_h", f"zero_shot_{g}": "hebal"}')) == [
        "heba",
        "heba",
        "zero_shot",
    ]
