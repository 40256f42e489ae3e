"""`--version`, and the help of all commands."""

import os
import subprocess
from importlib.metadata import version as installed

import pytest
from typer.testing import CliRunner

import heba
from pipeline.commands import cli, use, version
from pipeline.core.git import run_git

APPS = pytest.mark.parametrize("app", [cli.app, use.app], ids=["pipeline", "heba"])


@APPS
def test_the_versions_of_what_numbers_depend_on(app):
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    first, *others = shown.output.splitlines()
    assert first.startswith(f"heba {heba.__version__}")
    numbers = dict(line.split() for line in others)
    assert {numbers[name] == installed(name) for name in version.PACKAGES} == {True}


def test_the_commit_is_that_of_the_clone_itself(tmp_path):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=tmp_path, check=True)

    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert version.commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True)
    assert version.commit(tmp_path.resolve()) == f", commit {head[:12]}"
    assert version.commit(inside.resolve()) == ""  # installed in somebody's repository
    (tmp_path / "file").write_text("2")
    assert version.commit(tmp_path.resolve()) == f", commit {head[:12]}, changed since"


def test_git_that_is_not_there_or_too_slow_says_nothing(tmp_path, monkeypatch):
    assert run_git("--version").stdout.startswith("git version")
    assert run_git("nonsense").returncode == 1
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    assert run_git("--version", patience=0.1) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert run_git("--version") is None


@APPS
def test_a_flag_has_no_type_in_the_help(app):
    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert len(names) > 2
    for name in names:
        if name == "dvc":  # becomes DVC, whose help it is
            continue
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert "--help " in shown.output
        assert "bool" not in shown.output
