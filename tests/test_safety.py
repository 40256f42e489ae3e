"""What must not occur in the code, by its syntax tree."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for name in ("heba", "pipeline", "benchmarks", "tests") for p in (ROOT / name).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
YAML_LOADERS = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def name_of(node):
    """ "a.b.c" of an expression of names and attributes."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def true(call, keyword):
    return constant(call, keyword) is True


def constant(call, keyword):
    """The value of a keyword argument where it is a constant."""
    values = [k.value.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)]
    return values[0] if values else None


def problems(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [f"imports {m}" for m in modules if m.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "yaml", "os"):
            # By their full names they are found below.
            found += [f"imports {a.name} by itself" for a in node.names if a.name in YAML_LOADERS | {"system"}]
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.append("binds to all interfaces")
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        if name == "torch.load" and not true(node, "weights_only"):
            found.append("torch.load without weights_only=True")
        if name.endswith(".load_checkpoint") and not true(node, "weights_only"):
            found.append(f"{name} without weights_only=True")
        if name.startswith("yaml.") and name.split(".")[1] in YAML_LOADERS:
            found.append(f"{name} in place of yaml.safe_load")
        if true(node, "allow_pickle") or name.endswith("read_pickle"):
            found.append(f"{name} unpickles")
        if true(node, "shell") or name in ("os.system", "os.popen", "subprocess.getoutput", "eval", "exec"):
            found.append(f"{name} runs what a string says")
        extracts = name.endswith(".extractall") or (name.endswith(".extract") and "tar" in name)
        if extracts and constant(node, "filter") != "data":
            found.append(f"{name} without the filter data")
        if name == "shutil.unpack_archive":
            found.append(f"{name} has no filter")
        if any(isinstance(a, ast.Tuple) and a.elts and getattr(a.elts[0], "value", None) == "" for a in node.args):
            found.append(f"{name} binds to all interfaces")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "open_clip.load_checkpoint(m, f)",
        "yaml.load(t, Loader=yaml.Loader)",
        "np.load(f, allow_pickle=True)",
        "pd.read_pickle(f)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
        "serve(host='0.0.0.0')",
        "tar.extractall(p)",
        "tarfile.open(p).extractall(d)",
        "shutil.unpack_archive(p, d)",
        "from torch import load",
        "from yaml import load",
        "HTTPServer(('', 0), handler)",
        "subprocess.getoutput(c)",
    ],
)
def test_the_check_finds(source):
    assert problems(source)


def test_nothing_of_it_occurs():
    found = {
        path.relative_to(ROOT).as_posix(): problems(path.read_text(encoding="utf-8"))
        for path in FILES
        if path != Path(__file__)
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_every_server_that_is_named_binds_to_loopback():
    """In the Makefile and in the documentation."""
    pages = [ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    commands = [
        line
        for page in pages
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        if re.search(r"\bmlflow (ui|server|models serve)\b.* -", line)
    ]
    assert len(commands) > 3
    for line in commands:
        host = re.search(r"(?:--host|-h) ([\w.:]+)", line)
        assert host, line
        assert host[1] in ("127.0.0.1", "localhost"), line
