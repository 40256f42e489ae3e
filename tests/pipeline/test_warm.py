"""Stages in forks of one warm process: the same as by themselves, and as easy to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.runner.warm import SERVER, stage_server
from tests.pipeline.repository import ROOT, wait_for, working_in

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
