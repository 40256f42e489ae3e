"""The index.lock that a killed DVC leaves to git."""

import subprocess

import pytest
from filelock import FileLock

from pipeline.runner import gitlock
from pipeline.runner.locks import alone


@pytest.fixture
def repo(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_what_a_killed_process_left_is_named_and_removed(repo):
    lock = repo / ".git" / "index.lock"
    assert gitlock.damage(repo) == gitlock.mend(repo) == ""
    lock.touch()
    assert subprocess.run(["git", "add", "-A"], cwd=repo, capture_output=True, check=False).returncode
    assert gitlock.damage(repo) == ".git/index.lock was left by a process that was killed"
    with alone(repo):  # as `python -m pipeline repro` and `mend` begin
        assert not lock.exists()
    assert subprocess.run(["git", "add", "-A"], cwd=repo, check=True).returncode == 0


def test_the_lock_of_a_living_git_stays(repo):
    lock = repo / ".git" / "index.lock"
    lock.touch()
    with subprocess.Popen(["git", "cat-file", "--batch"], cwd=repo, stdin=subprocess.PIPE) as git:
        assert gitlock.damage(repo) == gitlock.mend(repo) == ""
        assert lock.exists()
        git.stdin.close()
    assert gitlock.mend(repo)
    assert not lock.exists()


def test_a_worktree_has_its_own_and_a_plain_folder_none(repo, tmp_path_factory):
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"]
    subprocess.run(["git", *commit], cwd=repo, check=True)
    tree = tmp_path_factory.mktemp("trees") / "tree"
    subprocess.run(["git", "worktree", "add", "-q", str(tree)], cwd=repo, check=True)
    (repo / ".git" / "worktrees" / "tree" / "index.lock").touch()
    assert gitlock.damage(repo) == ""
    assert gitlock.mend(tree).endswith("index.lock was left by a process that was killed")
    assert gitlock.damage(tree) == ""
    plain = tmp_path_factory.mktemp("plain")
    assert gitlock.damage(plain) == gitlock.mend(plain) == ""


def test_nothing_is_removed_while_another_repro_works(repo):
    lock = repo / ".git" / "index.lock"
    lock.touch()
    (repo / ".heba").mkdir()
    with (
        FileLock(repo / ".heba" / "repro.lock"),
        pytest.raises(ValueError, match="another"),
        alone(repo),
    ):
        pass
    assert lock.exists()
