"""dvc.lock, cut where a killed DVC may cut it."""

import pytest

from pipeline.runner import lockfile
from tests.pipeline.repository import ROOT, call, initialise

# Stages that keep a copy as ours do. `c` has several outs; those that persist are not in DVC's run cache.
WORK = """
import pathlib, sys
from pipeline.runner import lockfile
with lockfile.kept():
    name, *ins = sys.argv[1:]
    with open("starts.txt", "a") as file:
        print(name, file=file)
    text = name + "".join(pathlib.Path(path).read_text() for path in ins)
    if name == "c":
        pathlib.Path("c").mkdir(exist_ok=True)
        pathlib.Path("c", "part").write_text(text)
    pathlib.Path(f"{name}.txt").write_text(text)
    sys.exit()
"""
STAGES = """
stages:
  a: {cmd: python work.py a, deps: [work.py], outs: [a.txt]}
  b: {cmd: python work.py b a.txt, deps: [a.txt], params: [seed], outs: [b.txt: {persist: true}]}
  c: {cmd: python work.py c b.txt, deps: [b.txt], outs: [c: {persist: true}, c.txt: {cache: false}]}
"""


def dvc(folder, *args):
    done = call(folder, "dvc", *args, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return done.stdout


def starts(folder):
    return (folder / "starts.txt").read_text().split()


def made(folder):
    folder.mkdir()
    (folder / "work.py").write_text(WORK)
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "params.yaml").write_text("seed: 1\n")
    (folder / ".gitignore").write_text("/.heba/\n")
    initialise(folder)
    return folder


@pytest.fixture(scope="module", params=["first", "again"])
def run(request, tmp_path_factory):
    """A repository in which all stages ran, or in which the one in the middle ran again and was the last."""
    folder = made(tmp_path_factory.mktemp("cut") / "repo")
    dvc(folder, "repro")
    if request.param == "again":
        (folder / "params.yaml").write_text("seed: 2\n")
        dvc(folder, "repro", "--single-item", "b")
    return folder


@pytest.mark.slow
def test_every_cut_is_named_and_mended_to_the_byte(run, monkeypatch):
    monkeypatch.chdir(run)
    path = run / "dvc.lock"
    whole = path.read_bytes()
    assert lockfile.damage(run) == lockfile.mend(run) == ""
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert lockfile.damage(run), whole[:length]
        assert lockfile.mend(run), length
        assert path.read_bytes() == whole, length
        assert lockfile.damage(run) == ""
    before = starts(run)
    dvc(run, "repro")
    assert starts(run) == before
