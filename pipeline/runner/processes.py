"""Processes of DVC, with all that they start: how they begin, and how they end."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from pipeline.runner.dvc_inside import WAIT
from pipeline.runner.dvc_locks import SINGLE, release
from pipeline.runner.warm import OFF, SERVER

MODULE = "pipeline.runner.safe_dvc"
DVC = [sys.executable, "-m", MODULE]
# The shell ends at once; what it leaves in the background has process 1 for its parent.
GUARD = 'exec 3<&0; (cat <&3; kill -s KILL -- "-$1") &'
GRACE = 15.0  # seconds from an interrupt to a kill: a training closes its MLflow run in between
ENDING = 60.0  # seconds for a DVC that was interrupted to end
DYING = 20.0  # seconds for those whose `python -m pipeline repro` was killed


def environment() -> dict[str, str]:
    """Our environment, in which `python` is this one, whether the virtual environment is active or not."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return os.environ | {"PATH": path}


def dvc(args: list[str], root: Path, patience: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run `dvc ARGS` at `root`, in a session of its own; what it prints is in the result.

    At ctrl-C, and after `patience` seconds, it is interrupted and its end awaited; KeyboardInterrupt or
    subprocess.TimeoutExpired then. It is not killed: its locks would stay, and changes that it has stashed away.
    """
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
    # Not pipes: the workers of `dvc queue start` would keep them open until the last experiment is done.
    with tempfile.TemporaryFile("w+", **options) as output, tempfile.TemporaryFile("w+", **options) as errors:
        process = subprocess.Popen(
            [*DVC, *args],
            cwd=root,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(patience)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            _interrupt(process)
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(args, code, output.read(), errors.read())


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        print(f"warning: process {process.pid} of DVC has not ended yet; let it end first", file=sys.stderr)


def wait_for_dying(root: Path) -> None:
    """Wait for the DVCs at `root` that a killed `python -m pipeline repro` has left, DYING seconds at most.

    They are killed after it, and until then DVC calls busy what they hold.
    """
    left = [process for process in psutil.process_iter() if _is_ours(process, root)]
    psutil.wait_procs(left, DYING)


def _is_ours(process: psutil.Process, root: Path) -> bool:
    try:
        return MODULE in process.cmdline()[:3] and Path(process.cwd()) == root
    except psutil.Error:  # it has ended, or is another user's
        return False


class Child:
    """`dvc repro --single-item STAGES`, in a process group of its own, its output appended to `log`.

    The group does not outlive us, however we end: a guard waits on a pipe that only we hold, and kills the group
    when the pipe closes. Without it, a worker of Ray or a driver that gets SIGKILL would leave stages behind, and
    they would write where their retry writes. The guard is not our child, for Ray kills the children of a worker
    that ends, but not what those have started.
    """

    def __init__(self, root: Path, stages: list[str], log: Path, env: dict[str, str]) -> None:
        self.root, self.stages = root, stages
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*DVC, WAIT, *SINGLE, *stages],
                cwd=root,
                # Not a server of stages for this DVC alone, which soon ends.
                env={SERVER: OFF} | environment() | env | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        guard = subprocess.Popen(
            ["sh", "-c", GUARD, "sh", str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        guard.wait()
        assert guard.stdin is not None
        self.held = guard.stdin

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        code = self.process.poll()
        if code is not None and not self.held.closed:
            self._signal(signal.SIGKILL)  # what DVC may have left running
            self.held.close()
            if code:
                release(self.root, self.stages)
        return code

    def interrupt(self) -> None:
        """What ctrl-C does: the stage and DVC close their files and locks."""
        if self.poll() is None:
            self._signal(signal.SIGINT)

    def kill(self) -> None:
        """End the whole group at once."""
        if self.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.poll()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the group is gone
            os.killpg(self.process.pid, number)


class Job(Protocol):
    """A running job: a Child, or a task of an engine."""

    def poll(self) -> int | None: ...
    def interrupt(self) -> None: ...
    def kill(self) -> None: ...


def stop(jobs: Sequence[Job]) -> None:
    """Interrupt all, and kill what has not ended within GRACE seconds, or at once at a second ctrl-C."""
    try:
        for job in jobs:
            job.interrupt()
        until = time.monotonic() + GRACE
        while [job for job in jobs if job.poll() is None] and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        for job in jobs:
            job.kill()
