"""`--version`, and the help of all commands."""

import subprocess
from importlib.metadata import version as installed

import pytest
from typer.testing import CliRunner

import heba
from pipeline.commands import cli, use, version

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


@APPS
def test_a_flag_has_no_type_in_the_help(app):
    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert len(names) > 2
    for name in names:
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert "--help " in shown.output
        assert "bool" not in shown.output
