"""Stages in forks of one warm process: the same as by themselves, and as easy to stop."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from pipeline.runner.warm import OFF, SERVER, stage_server
from tests.pipeline import small
from tests.pipeline.repository import ROOT, initialise, wait_for, working_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server of stages is for Linux only")


@pytest.fixture(scope="module")
def server():
    environment = stage_server(ROOT)
    wait_for(Path(environment[SERVER]).exists)
    return os.environ | environment


def command(*args, folder=ROOT, env=None):
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *args],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_output_errors_and_exit_code_are_those_of_the_command_by_itself(server, tmp_path):
    for args in (["--help"], ["split", "--dataset", "nix"], ["split"], ["preset", "demo"]):
        alone, forked = command(*args, env=dict(os.environ)), command(*args, env=server)
        assert (alone.returncode, alone.stdout, alone.stderr) == (
            forked.returncode,
            forked.stdout,
            forked.stderr,
        )
    assert "params.yaml is not here" in command("protocols", folder=tmp_path, env=server).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_signal_to_the_command_ends_its_fork(server, tmp_path, number, seconds):
    """A download that waits for a lock which this test holds: no stage runs on when its command has gone, be it
    as soon as the fork is there."""
    from filelock import FileLock

    folder = tmp_path / "data" / "embedded"
    folder.mkdir(parents=True)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    with FileLock(folder / ".dtd.lock"):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "download", "--dataset", "dtd"],
            cwd=tmp_path,
            env=server,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        forks = wait_for(lambda: [pid for pid in working_in(tmp_path) if pid != process.pid], 30)
        time.sleep(seconds)
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
        wait_for(lambda: not any(map(psutil.pid_exists, forks)), 30)


def test_without_a_server_the_command_runs_by_itself(tmp_path):
    done = command("protocols", folder=tmp_path, env=os.environ | {SERVER: str(tmp_path / "none")})
    assert done.returncode == 1
    assert "params.yaml is not here" in done.stderr


# Under plain `dvc`: a project with our server and with a command line that tells where it runs. What the server
# imports takes two seconds.
COMMANDS = """
import json, os, pathlib, sys, time

VERSION = 1

def main():
    stage, name, code = sys.argv[1:]
    print(name, "out", flush=True)
    print(name, "err", file=sys.stderr)
    parent = pathlib.Path(f"/proc/{os.getppid()}")
    about = {
        "stage": os.getpid(),
        "parent": os.getppid(),
        "server": "serve-stages" in (parent / "cmdline").read_text().split("\\0"),
        "root": os.readlink(parent / "cwd"),
        "version": VERSION,
        "address": os.environ.get("HEBA_STAGE_SERVER", ""),
    }
    about["files"] = [os.readlink(parent / "fd" / number) for number in "012"]
    try:
        pathlib.Path(os.environ.get("NOTES", "."), f"{name}.json").write_text(json.dumps(about))
        if os.path.exists("edit"):
            file = pathlib.Path(__file__)
            file.write_text(file.read_text().replace("VERSION = 1", "VERSION = 22"))
        while os.path.exists(f"hold-{name}"):
            time.sleep(0.05)
    except KeyboardInterrupt:
        print(name, "interrupted", flush=True)
        sys.exit(130)
    pathlib.Path(f"{name}.txt").write_text(name)
    sys.exit(int(code))
"""
DAG = """
stages:
  light: {cmd: python -m pipeline check-params light 0, outs: [light.txt]}
  first: {cmd: python -m pipeline backbone first 0, deps: [light.txt], outs: [first.txt]}
  second: {cmd: python -m pipeline train second 0, deps: [first.txt], outs: [second.txt]}
  third: {cmd: python -m pipeline split third 0, deps: [second.txt], outs: [third.txt]}
  fails: {cmd: python -m pipeline train fails 3, deps: [third.txt], outs: [fails.txt]}
"""


def project(folder):
    """The project, in which nothing has run."""
    for name in ("__init__.py", "__main__.py", "runner/__init__.py", "runner/warm.py", "runner/lifetime.py"):
        path = folder / "pipeline" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "pipeline" / name, path)
    warm = folder / "pipeline" / "runner" / "warm.py"
    text, n = re.subn(r"(?s)^LIBRARIES = \(.*?\n\)", 'LIBRARIES = ("slow",)', warm.read_text(), flags=re.MULTILINE)
    assert n == 1
    warm.write_text(text)
    (folder / "pipeline" / "commands").mkdir()
    (folder / "pipeline" / "commands" / "cli.py").write_text(COMMANDS)
    (folder / "slow.py").write_text("import time\ntime.sleep(2)\n")
    (folder / "dvc.yaml").write_text(DAG)
    (folder / ".gitignore").write_text("__pycache__\n*.json\nhold-*\nedit\n")
    initialise(folder)
    return folder


def repro(folder, *arguments, **env):
    """`dvc repro`, started; its output comes through a pipe."""
    return subprocess.Popen(
        ["dvc", *(arguments or ["repro", "third"])],
        cwd=folder,
        env=small.environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def told(folder, name):
    """What a stage told of itself, as soon as it has."""

    def read():
        path = folder / f"{name}.json"
        return path.exists() and path.read_text()

    return json.loads(wait_for(read, 60))


def has_ended(about):
    """The server of the stage that told this ends within seconds, with its folder."""
    wait_for(lambda: not psutil.pid_exists(about["parent"]), 30)
    assert not Path(about["address"]).parent.exists()


@pytest.fixture
def temporary():
    """A folder for temporary files whose name is short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def test_the_stages_of_a_dvc_run_in_forks_of_one_server_which_ends_with_it(tmp_path, temporary):
    repo = project(tmp_path / "a repo")
    output, _ = (process := repro(repo, TMPDIR=str(temporary))).communicate(timeout=120)
    assert process.returncode == 0, output
    light, *others = (told(repo, name) for name in ("light", "first", "second", "third"))
    assert not light["server"]  # it does not wait
    assert len({about["parent"] for about in others}) == 1
    for about in others:
        assert about["server"]
        assert about["root"] == str(repo)
        assert about["files"] == [os.devnull] * 3  # none that a reader of DVC's output waits for
    assert Path(others[0]["address"]).is_relative_to(temporary)
    has_ended(others[0])
    assert list(temporary.iterdir()) == []
    lines = output.splitlines()
    for name in ("light", "first", "second", "third"):
        began = next(i for i, line in enumerate(lines) if line.startswith("> ") and name in line)
        assert lines[began + 1 : began + 3] == [f"{name} out", f"{name} err"]


def test_a_server_has_the_code_that_is_on_disk(tmp_path):
    """The stage `first` edits the code."""
    repo = project(tmp_path / "repo")
    (repo / "edit").touch()
    output, _ = repro(repo, "repro", "second").communicate(timeout=120)
    assert [told(repo, name)["version"] for name in ("light", "second")] == [1, 22], output
    assert told(repo, "second")["server"]


def test_each_repository_and_each_experiment_has_a_server_of_its_own(tmp_path):
    repos = [project(tmp_path / name) for name in ("one", "two")]
    for process in [repro(repo, "repro", "second") for repo in repos]:
        process.communicate(timeout=120)
    one, two = (told(repo, "second") for repo in repos)
    assert one["server"]
    assert two["server"]
    assert one["parent"] != two["parent"]
    assert [one["root"], two["root"]] == [str(repo) for repo in repos]
    done = repro(project(tmp_path / "three"), "exp", "run", "--temp", "second", NOTES=str(tmp_path))
    output, _ = done.communicate(timeout=120)
    apart = told(tmp_path, "second")
    assert apart["server"]
    assert "exps" in Path(apart["root"]).parts, output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_when_its_dvc_is_killed_and_the_stage_goes_on_as_by_itself(tmp_path, number):
    repo = project(tmp_path / "repo")
    (repo / "hold-second").touch()
    process = repro(repo)
    about = told(repo, "second")
    assert about["server"]
    process.send_signal(number)
    process.wait(timeout=30)
    has_ended(about)
    assert psutil.pid_exists(about["stage"])
    (repo / "hold-second").unlink()
    wait_for((repo / "second.txt").exists, 30)


def test_ctrl_c_interrupts_a_stage_in_a_server_once(tmp_path):
    repo = project(tmp_path / "repo")
    (repo / "hold-second").touch()
    process = repro(repo)
    about = told(repo, "second")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert output.count("second interrupted") == 1
    assert "failed to run: python -m pipeline train second 0" in output
    assert "Traceback" not in output
    assert not psutil.pid_exists(about["stage"])
    has_ended(about)


def test_ctrl_c_while_a_stage_waits_for_the_server(tmp_path, temporary):
    repo = project(tmp_path / "repo")
    (repo / "slow.py").write_text("import time\nopen('importing', 'w').close()\ntime.sleep(10)\n")
    process = repro(repo, TMPDIR=str(temporary))
    wait_for((repo / "importing").exists, 60)
    wait_for((repo / "light.txt").exists, 60)
    wait_for(lambda: any("backbone" in p.cmdline() for p in psutil.Process(process.pid).children(True)), 60)
    time.sleep(0.5)  # until it waits
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in output
    assert not (repo / "first.json").exists()
    wait_for(lambda: list(temporary.iterdir()) == [], 30)


def test_a_stages_exit_code_is_its_own_and_it_runs_once(tmp_path):
    repo = project(tmp_path / "repo")
    process = repro(repo, "repro", "fails")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "exited with 3" in output
    assert output.count("fails out") == 1
    assert told(repo, "fails")["server"]


def test_no_server_where_it_is_turned_off_or_its_folder_is_not_ours(tmp_path, temporary):
    repo = project(tmp_path / "repo")
    output, _ = repro(repo, "repro", "first", **{SERVER: OFF}).communicate(timeout=120)
    assert not told(repo, "first")["server"]
    others = temporary / f"heba-{os.getuid()}"
    others.mkdir()
    others.chmod(0o777)
    output, _ = repro(repo, "repro", "-f", "first", TMPDIR=str(temporary)).communicate(timeout=120)
    assert not told(repo, "first")["server"]
    assert f"stages start by themselves: {others} is not a folder of yours alone" in output
