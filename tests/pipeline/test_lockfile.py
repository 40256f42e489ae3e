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


def test_a_cut_between_any_two_lines_and_a_missing_file_are_mended(run, monkeypatch):
    monkeypatch.chdir(run)
    path = run / "dvc.lock"
    whole = path.read_bytes()
    assert lockfile.damage(run) == lockfile.mend(run) == ""
    lines = whole.splitlines(keepends=True)
    for count in range(0, len(lines), 3):
        path.write_bytes(b"".join(lines[:count]))
        assert lockfile.damage(run), count
        assert lockfile.mend(run), count
        assert path.read_bytes() == whole, count
    path.unlink()
    assert lockfile.damage(run) == "dvc.lock is missing"
    assert lockfile.mend(run)
    before = starts(run)
    dvc(run, "repro")
    assert starts(run)[len(before) :] in ([], ["b"], ["c"])  # nobody knows when a file was removed
    path.write_bytes(whole)


def test_what_changed_after_the_kill_runs_again(tmp_path, monkeypatch):
    repo = made(tmp_path / "repo")
    monkeypatch.chdir(repo)
    dvc(repo, "repro", "b")
    for changed, stages in (("params.yaml", ["b", "c"]), ("b.txt", ["b", "c"]), (None, [])):
        dvc(repo, "repro", "b")
        whole = (repo / "dvc.lock").read_bytes()
        (repo / "dvc.lock").write_bytes(whole[: len(whole) - 30])
        if changed == "params.yaml":
            (repo / changed).write_text(f"seed: {len(starts(repo)) + 5}\n")
        elif changed:
            (repo / changed).chmod(0o644)
            (repo / changed).write_text("by hand")
        assert lockfile.mend(repo)
        before = starts(repo)
        dvc(repo, "repro")
        assert starts(repo)[len(before) :] == stages, changed


def test_what_git_has_is_whole(tmp_path, monkeypatch):
    """An old dvc.lock, checked out, ends early in comparison to the copy, and is nevertheless right."""
    repo = made(tmp_path / "repo")
    monkeypatch.chdir(repo)
    dvc(repo, "repro", "a")
    call(repo, "git", "add", "-A")
    call(repo, "git", "commit", "-qm", "a")
    dvc(repo, "repro")
    assert lockfile.damage(repo) == ""
    call(repo, "git", "checkout", "dvc.lock")
    assert lockfile.damage(repo) == lockfile.mend(repo) == ""
    whole = (repo / "dvc.lock").read_bytes()
    (repo / ".heba" / "dvc.lock").unlink()
    (repo / ".heba" / "stage.began").unlink()
    (repo / "dvc.lock").write_bytes(whole[:100])
    assert lockfile.mend(repo)
    assert (repo / "dvc.lock").read_bytes() == whole
