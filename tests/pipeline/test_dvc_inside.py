"""What pipeline/runner/dvc_{inside,locks,files}.py assume, against the real DVC: after an upgrade, this
says what broke."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest

from pipeline.runner import dvc_files, dvc_inside, dvc_locks
from tests.pipeline import small
from tests.pipeline.repository import ROOT, call, wait_for

CHECKED_WITH = "3.67.1"
WORK = """
import os, pathlib, sys, time
name, *ins = sys.argv[1:]
if os.path.exists(f"fail-{name}"):
    sys.exit("told to fail")
while os.path.exists(f"hold-{name}"):
    pathlib.Path(f"held-{name}").touch()
    time.sleep(0.05)
text = name + "".join(pathlib.Path(path).read_text() for path in ins)
if name == "last":
    pathlib.Path("last").mkdir()
    for part in "xy":
        pathlib.Path("last", part).write_text(part + text)
else:
    pathlib.Path(f"{name}.txt").write_text(text)
with open("environment.txt", "a") as file:
    print(os.environ["DVC_STAGE"], os.environ["DVC_ROOT"], file=file)
"""
STAGES = """
stages:
  last: {cmd: python work.py last m1.txt m2.txt, deps: [m1.txt, m2.txt], outs: [last]}
  middle:
    matrix: {n: [1, 2]}
    cmd: python work.py m${item.n} first.txt
    deps: [first.txt]
    params: [device]
    outs: ["m${item.n}.txt"]
  first: {cmd: python work.py first, deps: [work.py], outs: [first.txt]}
"""
ORDER = ["first", "middle@1", "middle@2", "last"]


def dvc(folder, *args):
    return call(folder, sys.executable, "-m", "dvc", *args)


def told(done):
    return [said for line in done.stdout.splitlines() if (said := dvc_inside.stage_of_line(line))]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A repository after its first `dvc repro`, and what DVC printed."""
    folder = small.make(tmp_path_factory.mktemp("inside") / "repo")
    (folder / "work.py").write_text(WORK)
    (folder / "dvc.yaml").write_text(STAGES)
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def repo(reproduced, tmp_path, monkeypatch):
    """A copy of the repository, and this process works in it: DVC names stages as seen from there."""
    folder = shutil.copytree(reproduced[0], tmp_path / "repo", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def test_the_pinned_version_is_the_one_that_this_was_checked_with():
    pinned = re.search(r"^dvc==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned, "constraints.txt pins no dvc"
    assert pinned[1] == CHECKED_WITH, "run these tests with that DVC, mend what broke, and note it here"


def test_what_it_says_of_stages(reproduced, repo):
    assert told(reproduced[1]) == [(stage, None) for stage in ORDER]
    assert told(dvc(repo, "repro")) == [(stage, "unchanged") for stage in ORDER]
    (repo / "dvc.lock").unlink()
    assert told(dvc(repo, "repro")) == [(stage, "from the cache") for stage in ORDER]
    (repo / "fail-m2").touch()
    failed = dvc(repo, "repro", "--force", "--single-item", "middle@1", "middle@2", "last")
    assert failed.returncode != 0
    assert dvc_inside.failed_stages(failed.stdout + failed.stderr) == ["middle@2"]


def test_a_stage_is_told_its_name_and_the_root(reproduced):
    folder, _ = reproduced
    assert (folder / "environment.txt").read_text().splitlines() == [f"{stage} {folder}" for stage in ORDER]


def test_the_plan_has_what_changed_and_what_follows(repo):
    assert dvc_inside.make_plan(repo) == ({}, ORDER, {"middle@1", "middle@2"})
    (repo / "m2.txt").unlink()
    (repo / "m2.txt").write_text("changed")
    assert dvc_inside.make_plan(repo).needs == {"middle@2": set(), "last": {"middle@2"}}
    (repo / "dvc.lock").unlink()
    assert dvc_inside.make_plan(repo).needs == {
        "first": set(),
        "middle@1": {"first"},
        "middle@2": {"first"},
        "last": {"middle@1", "middle@2"},
    }


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_the_lock_file_and_the_cache_have_the_hashes_of_the_outs(repo):
    assert list(dvc_inside.locked_stages(repo)) == ORDER
    with dvc_inside.repository(repo) as opened:
        cache = dvc_inside.cache_folder(opened)
        outs = [repo / name for name in ("first.txt", "m1.txt", "m2.txt", "last/x", "last/y")]
        assert dvc_inside.locked_files(repo, cache) == {path: md5(path) for path in outs}
    objects = dvc_inside.cached_objects(cache)
    assert len(objects) == len(outs) + 1  # the folder's listing
    assert {path: md5(path) for path in objects} == objects


def test_it_trusts_a_file_that_has_not_changed(repo):
    assert dvc(repo, "status").returncode == 0  # it looks at the files of this copy
    path = repo / "first.txt"
    right = md5(path)
    with dvc_inside.repository(repo) as opened:
        assert dvc_inside.trusts(opened, path, right)
        assert not dvc_inside.trusts(opened, path, "0" * 32)
        path.unlink()
        path.write_text("something else")
        assert not dvc_inside.trusts(opened, path, right)


def test_moved_stages_leave_the_form_of_the_lock_file(repo):
    before = (repo / "dvc.lock").read_bytes()
    dvc_inside.move_to_end(repo, ["first"])
    assert list(dvc_inside.locked_stages(repo)) == [*ORDER[1:], "first"]
    assert told(dvc(repo, "repro")) == [(stage, "unchanged") for stage in ORDER]
    dvc_inside.move_to_end(repo, ORDER)
    assert (repo / "dvc.lock").read_bytes() == before


def test_the_rwlock_says_what_runs(repo):
    assert dvc_locks.running_stages(repo) == []
    (repo / "hold-m1").touch()
    run = subprocess.Popen(
        [sys.executable, "-m", "dvc", dvc_inside.WAIT, *dvc_locks.SINGLE, "--force", "middle@1"], cwd=repo
    )
    wait_for((repo / "held-m1").exists)
    (running,) = dvc_locks.running_stages(repo)
    assert running.endswith(" ".join([*dvc_locks.SINGLE, "--force", "middle@1"]))
    holders = json.loads(dvc_locks.rwlock(repo).read_text())
    assert list(holders["write"]) == [str(repo / "m1.txt")]
    assert {by["pid"] for by in holders["read"][str(repo / "first.txt")]} == {run.pid}

    busy = dvc(repo, *dvc_locks.SINGLE, "--force", "middle@1")
    assert busy.returncode != 0
    assert dvc_inside.is_busy(busy.stderr)
    dvc_locks.release(repo, ["--force", "middle@2"])
    assert json.loads(dvc_locks.rwlock(repo).read_text()) == holders
    dvc_locks.release(repo, ["--force", "middle@1"])
    assert not any(json.loads(dvc_locks.rwlock(repo).read_text()).values())
    (repo / "hold-m1").unlink()
    run.wait(timeout=60)


def test_a_lock_on_the_repository_is_seen_and_said(repo):
    with dvc_inside.repository(repo) as opened, opened.lock:
        busy = dvc(repo, "status")
    assert busy.returncode != 0
    assert dvc_inside.is_busy(busy.stderr)
    assert dvc_inside.remedy(busy.stderr) == "wait for the end of the other DVC process"
    assert dvc(repo, "status").returncode == 0


def test_the_messages_of_damaged_files_name_them(repo, tmp_path):
    dvc_locks.rwlock(repo).write_text('{"write": {')
    damaged = dvc(repo, "repro")
    assert damaged.returncode != 0
    assert dvc_inside.remedy(damaged.stderr) == "`python -m pipeline mend`"
    assert "rwlock cannot be read" in dvc_locks.mend_rwlock(repo)
    assert dvc_locks.mend_rwlock(repo) == ""
    (repo / "dvc.lock").write_text("half: [\n")
    with pytest.raises(ValueError, match=r"DVC: .*`python -m pipeline mend`"):
        dvc_inside.make_plan(repo)
    with pytest.raises(ValueError, match=r"dvc\.lock is damaged"):
        dvc_inside.locked_stages(repo)
    with pytest.raises(ValueError, match=r"DVC: .*not inside of a DVC repository"):
        dvc_inside.make_plan(tmp_path)


REPLACED = """
import os, runpy, sys

plain = os.replace

def noted(source, target, **options):
    with open(os.environ["REPLACED"], "a") as file:
        print(target, file=file)
    plain(source, target, **options)

os.replace = noted
sys.argv = ["dvc", "repro", "--force", "--single-item", "first"]
runpy.run_module("pipeline.runner.safe_dvc", run_name="__main__")
"""


def test_every_write_of_its_two_files_goes_through_our_open(repo, tmp_path):
    """The real writer's `open`: were it another one, nothing would replace these files."""
    noted = tmp_path / "replaced"
    files = [repo / "dvc.lock", dvc_locks.rwlock(repo)]
    before = [path.read_bytes() for path in files]
    kept = [tmp_path / f"kept-{path.name}" for path in files]
    for path, link in zip(files, kept, strict=True):
        link.hardlink_to(path)
    done = call(repo, sys.executable, "-c", REPLACED, REPLACED=str(noted), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert set(map(str, files)) <= set(noted.read_text().splitlines())
    assert [link.read_bytes() for link in kept] == before  # nothing was written in place
    assert not any(path.samefile(link) for path, link in zip(files, kept, strict=True))


LONG = "a long one of many words, " * 12
ODD_NAMES = [
    "it's", 'say "a"', "a: b", "a:b", "a #b", "a#b", "été ☃", "123", "1e3", "true", "null", "~", "2024-01-01",
    "- a", "? a", "&a", "*a", "!a", "{a}", "[a]", "a@b-1.5", " a ", "a\tb", "x" * 90, "x" * 129, "x " * 80,
]  # fmt: skip
ODD_VALUES = [
    "", " ", LONG, f"{LONG}: # {LONG}", "x" * 300, "two\nlines", f"{LONG}\n\n  {LONG}\n", "tab\t", "été ☃ 😀",
    "# a", "a # b", "a: b", "&a", "x - &a", "- a", "? a", "!a", "'", '"', "\\", "123", "true", "null", "...",
    "---", 0, -1, 1.5, 1e-5, 0.00075, 1e20, True, None, [], {}, [[1, [2]], {"a": [1]}],
    {"été": {"b: c": LONG}, 3: 4},
]  # fmt: skip


def edits(folder, name, value):
    """dvc.lock after each of some dumps by DVC's `Lockfile` as it is now: added, changed, unchanged, another."""
    from dvc.dvcfile import Lockfile
    from dvc.repo import Repo
    from dvc.stage import PipelineStage, create_stage

    found = []
    (folder / "odd.yaml").write_text(json.dumps({"a": value, "b": [value, "c"]}, ensure_ascii=False))
    with Repo(str(folder)) as opened:
        for name_, text, params in [
            (name, "true", []),
            (name, f"echo {value}", [{"odd.yaml": ["a"]}]),
            (name, f"echo {value}", [{"odd.yaml": ["a"]}]),
            ("middle@2", "true", [{"odd.yaml": ["b"]}]),
            ("last", "false", []),
            (name, ["true", str(value) or "-"], [{"odd.yaml": ["a", "b"]}]),
        ]:
            stage = create_stage(
                PipelineStage, repo=opened, path=str(folder / "dvc.yaml"), name=name_, cmd=text, params=params
            )
            stage.save_deps()
            Lockfile(opened, str(folder / "dvc.lock")).dump_stages([stage])
            found.append((folder / "dvc.lock").read_bytes())
    return found


@pytest.fixture
def plain_and_ours(repo, monkeypatch):
    """`edits` by DVC alone, then with our dump, from the same dvc.lock."""
    from dvc.dvcfile import Lockfile

    def both(name, value):
        before = (repo / "dvc.lock").read_bytes()
        plain = edits(repo, name, value)
        (repo / "dvc.lock").write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr(Lockfile, "dump_stages", Lockfile.dump_stages)
            dvc_files.write_entries_alone()
            return plain, edits(repo, name, value)

    return both


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_entry_put_into_the_text_gives_the_bytes_of_dvc_whatever_its_name(plain_and_ours, name):
    plain, ours = plain_and_ours(name, 1)
    assert ours == plain
    assert len(set(plain)) == 5


@pytest.mark.parametrize("value", ODD_VALUES)
def test_an_entry_put_into_the_text_gives_the_bytes_of_dvc_whatever_it_holds(plain_and_ours, value):
    plain, ours = plain_and_ours("odd", value)
    assert ours == plain


def test_a_number_that_dvc_damages_when_it_writes_other_stages_stays(plain_and_ours):
    plain, ours = plain_and_ours("odd", 7.437306552932001e-05)
    assert ours[:3] == plain[:3]
    assert b"7.437306552932000e-05" in plain[3]
    assert ours[3].count(b"a: 7.437306552932001e-05") == 1


def test_the_entries_of_the_committed_lock_file_are_those_that_dvc_writes():
    from dvc.utils.serialize import dumps_yaml, parse_yaml

    text = (ROOT / "dvc.lock").read_text()
    found = dvc_files.entries(text)
    assert "".join([dvc_files.HEAD, *found.values()]) == text
    for name, stage in parse_yaml(text, "dvc.lock")["stages"].items():
        assert dvc_files.entries(dumps_yaml({"schema": "2.0", "stages": {name: stage}})) == {name: found[name]}


@pytest.mark.parametrize(
    "odd",
    [
        "# of ours\n{}",
        "{}# of ours\n",
        "{}  odd: # of ours\n    cmd: a\n",
        "{}  odd: &a\n    cmd: a\n",
        "{}  odd: {{a: b}}\n",
        "{}  'odd: a\n",
        "{}  last:\n    cmd: a\n",
        "{}  odd:\n    cmd: a",
        "{}datasets:\n- name: a\n",
    ],
)
def test_a_lock_file_of_another_form_is_left_to_dvc(repo, odd):
    text = (repo / "dvc.lock").read_text()
    assert dvc_files.entries(text)
    assert dvc_files.entries(odd.format(text)) is None


def test_moved_stages_leave_comments_in_the_lock_file(repo):
    path = repo / "dvc.lock"
    path.write_text(path.read_text().replace("stages:", "# of ours\nstages:"))
    dvc_inside.move_to_end(repo, ["first"])
    assert list(dvc_inside.locked_stages(repo)) == [*ORDER[1:], "first"]
    assert "# of ours" in path.read_text()


def test_what_is_parsed_once_may_be_changed(repo, monkeypatch):
    from dvc.dvcfile import Lockfile
    from dvc.repo import Repo
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    for module in (_yaml, strictyaml):
        monkeypatch.setattr(module, "parse_yaml", module.parse_yaml)
    dvc_files.parse_once.__wrapped__()
    with Repo(str(repo)) as opened:
        lock = Lockfile(opened, str(repo / "dvc.lock"))
        first = lock.load()
        first["stages"].pop("first")
        assert list(lock.load()["stages"]) == ORDER
        dvc_inside.move_to_end(repo, ["first"])
        assert list(lock.load()["stages"]) == [*ORDER[1:], "first"]
