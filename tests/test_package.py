"""What is installed: the packages that each part needs, the wheel, and the version."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image, ImageDraw

import heba
from heba import artifact
from heba.clip import backbone
from heba.clip.tiny import FOLDER as TINY
from heba.clip.tiny import load_tiny_clip
from heba.methods.heba.model import AdaptedCLIP
from pipeline.tracking.models import LIBRARIES
from tests.heba import artifacts
from tests.test_rooms import FILES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Of heba/, the rooms that only the pipeline uses.
FOR_THE_PIPELINE = [ROOT / "heba" / room for room in ("sources", "embedded")]
LIBRARY = [
    path
    for path in FILES
    if path.is_relative_to(ROOT / "heba") and not any(path.is_relative_to(room) for room in FOR_THE_PIPELINE)
]
CLASSES = ["striped", "dotted"]
NO_IMPORT = {"torchvision", "tabulate"}  # for open_clip, and for pandas


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements} - {"heba"}


def imported(paths):
    """The distributions whose packages these files import, wherever they do so."""
    ours = {"heba", "pipeline", *sys.stdlib_module_names}
    packages = metadata.packages_distributions()
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found.update(module.split(".")[0] for module in modules)
    # mlflow-skinny brings packages of mlflow.
    return {canonicalize_name(sorted(packages.get(name, [name]))[0]) for name in found - ours}


def test_every_import_is_of_a_package_that_is_asked_for():
    base = names(PROJECT["dependencies"])
    assert imported(LIBRARY) - names(EXTRAS["onnx"]) <= base
    asked = base | names(EXTRAS["pipeline"])
    assert imported(FILES) - names(EXTRAS["ray"]) - names(EXTRAS["onnx"]) <= asked
    assert asked - imported(FILES) == NO_IMPORT
    assert base & names(EXTRAS["pipeline"]) == set()


def test_the_other_extras_have_the_pipeline():
    alone = {"pipeline", "onnx", "docs"}
    assert all("heba[pipeline]" in EXTRAS[extra] for extra in EXTRAS if extra not in alone)


def test_a_served_model_asks_for_all_that_the_library_imports():
    assert imported(LIBRARY) - names(EXTRAS["onnx"]) <= set(map(canonicalize_name, LIBRARIES))


def test_the_version_is_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d\S*)", changes, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[0] == citation["version"] == heba.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source") / "heba", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("heba", "pipeline"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", out, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_has_all_files_of_the_packages(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "heba", "pipeline"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(wheel) as content:
        inside = {name for name in content.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {heba.__version__}\n" in content.read(about).decode()
    assert inside == {name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()}


def with_what_they_need(requirements):
    """The distributions of requirements, and of theirs in turn, by name."""
    found, left = {}, [Requirement(text) for text in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = metadata.distribution(name)
        left += map(Requirement, found[name].requires or [])
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel and links to the packages that it asks for, and to no others."""
    folder = tmp_path_factory.mktemp("installed")
    for distribution in with_what_they_need(PROJECT["dependencies"]).values():
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source = distribution.locate_file(name)
            if not name.endswith(".pth") and source.exists() and not (folder / name).exists():
                (folder / name).symlink_to(source)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder]
    subprocess.run([*command, wheel], check=True)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """`heba ...` with nothing but these packages, in an empty folder."""

    def run(*args, command=("heba",), **env):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HEBA_", "MLFLOW_", "DVC_"))}
        start = [installed / "bin" / "heba"] if command == ("heba",) else command
        return subprocess.run(
            [sys.executable, "-S", *start, *args],
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(installed)} | env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def stripes(tmp_path):
    image = Image.new("RGB", (64, 64), "white")
    for x in range(0, 64, 8):
        ImageDraw.Draw(image).rectangle((x, 0, x + 3, 63), fill="black")
    image.save(tmp_path / "stripes.png")
    return "stripes.png"


def check(printed, prediction):
    """What `heba ... --json` printed of one image is this prediction."""
    found = json.loads(printed)["classes"]
    assert [c["class"] for c in found] == prediction.classes
    assert [c["probability"] for c in found] == pytest.approx(prediction.probabilities, abs=1e-4)


def test_zero_shot_from_the_wheel_alone(run, stripes, installed, tmp_path):
    assert not any((installed / name).exists() for name in ("dvc", "mlflow", "pandas"))
    done = run("zero-shot", stripes, "--classes", ", ".join(CLASSES), "--backbone", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    check(done.stdout, *heba.zero_shot("tiny", "embedded", CLASSES).predict(tmp_path / stripes))
    assert list(tmp_path.iterdir()) == [tmp_path / stripes]


def test_an_adapter_from_the_wheel_alone(run, stripes, tmp_path):
    model = AdaptedCLIP(load_tiny_clip()[0], 1, 2, 0.3)
    weights = artifact.Backbone(
        name="tiny", pretrained="embedded", sha256=backbone.sha256(TINY / "model.safetensors")
    )
    artifacts.save(model, tmp_path / "adapter", backbone=weights)
    done = run("predict", stripes, "--adapter", "adapter", "--classes", ", ".join(CLASSES), "--json")
    assert done.returncode == 0, done.stderr
    check(done.stdout, *heba.load(tmp_path / "adapter", CLASSES).predict(tmp_path / stripes))
    told = run("info", "adapter")
    assert told.returncode == 0, told.stderr
    assert "tiny, embedded" in told.stdout
    missing = run("info", "0123456789abcdef", MLFLOW_TRACKING_URI="sqlite:///nothing.db")
    assert missing.returncode == 1
    assert missing.stderr == (
        "error: 0123456789abcdef: there is no such folder; for a run or a model of MLflow, "
        "pip install '.[pipeline]' in the repository\n"
    )


def test_the_pipeline_names_the_package_that_is_missing(run, tmp_path):
    preset = run("-m", "pipeline", "preset", "demo", command=())
    assert preset.returncode == 0, preset.stderr
    assert (tmp_path / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    done = run("-m", "pipeline", "cost", command=())
    assert done.returncode == 1
    assert done.stderr == (
        "error: the package pandas is missing; pip install -c constraints.txt -e '.[pipeline]'\n"
    )


def test_a_process_of_a_test_has_one_thread_of_torch():
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
