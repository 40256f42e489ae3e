"""Where a server of stages (warm.py) has its socket, and how long it lives.

It belongs to a process and ends with it: `python -m pipeline repro`, or a `dvc`, for which a stage starts it. Its
socket lies in <TMPDIR>/heba-<user>/<process>-<its start>-<hash of root and python>/, a folder of the user alone.
So no two users, processes or repositories share a server, and the copy that an experiment works in has its own.
"""

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from typing import NamedTuple

DVC = ("dvc", "pipeline.runner.safe_dvc")  # `dvc`, `python -m dvc`, and ours: the name of the program or module
SERVE = "serve-stages"  # the first argument of a server's process
STARTING = "-starting"  # ends the name of a server's socket until it is ready
LONGEST = 107  # bytes of a socket's path
BELOW = 64  # bytes of it, at most, that are below the folder of all servers


class Process(NamedTuple):
    """A process by its number and its start, in clock ticks since the system's; numbers are used again."""

    number: int
    start: int


def dvc_process() -> Process | None:
    """The nearest process above this one that runs DVC."""
    number = os.getppid()
    with suppress(OSError):  # one that has just ended, or is not ours to see
        while number:
            with open(f"/proc/{number}/cmdline", "rb") as file:
                words = [os.path.basename(word) for word in os.fsdecode(file.read()).split("\0")]
            parent, start, _ = _stat(number)
            if any(word in DVC for word in words):
                return Process(number, start)
            number = parent
    return None


def this_process() -> Process:
    return Process(os.getpid(), _stat(os.getpid())[1])


def _stat(number: int) -> tuple[int, int, bool]:
    """Of a process: its parent, its start, and whether it has ended but was not waited for."""
    with open(f"/proc/{number}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[1]), int(fields[19]), fields[0] in b"ZX"


def _lives(process: Process) -> bool:
    try:
        _, start, ended = _stat(process.number)
    except OSError:
        return False
    return start == process.start and not ended


def end_of(process: Process) -> int:
    """A file that can be read when `process` has ended. Raises ProcessLookupError when it has already."""
    file = os.pidfd_open(process.number)
    if not _lives(process):
        raise ProcessLookupError(f"process {process.number} has ended")
    return file


def remove_left() -> None:
    """Remove the folders of servers whose processes have ended."""
    base = _base()
    for name in os.listdir(base):
        number, start, _ = name.split("-")
        if not _lives(Process(int(number), int(start))):
            shutil.rmtree(f"{base}/{name}", ignore_errors=True)
    with suppress(OSError):  # there are others
        os.rmdir(base)


def _base() -> str:
    """The folder of all servers of this user. PermissionError when others may write to it."""
    temporary = os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(temporary)) > LONGEST - BELOW - len(f"/heba-{os.getuid()}"):
        temporary = "/tmp"
    base = f"{temporary}/heba-{os.getuid()}"
    with suppress(FileExistsError):
        os.mkdir(base, 0o700)
    found = os.lstat(base)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{base} is not a folder of yours alone; remove it, or set TMPDIR")
    return base


def server_of(process: Process, root: str, start: bool) -> str | None:
    """The socket of the server of `process` for the stages at `root`; None where there cannot be one.

    With `start`, the first to ask starts the server. What connects to the address with STARTING waits until it is
    ready.
    """
    try:
        what = hashlib.sha256(os.fsencode(f"{root}\0{sys.executable}")).hexdigest()[:16]
        folder = f"{_base()}/{process.number}-{process.start}-{what}"
        if start:
            _start(process, root, folder)
        return f"{folder}/stages"
    except OSError as error:  # a full disk, say
        print(f"warning: stages start by themselves: {error}", file=sys.stderr)
        return None


def _start(process: Process, root: str, folder: str) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:  # it was started before
        return
    address = f"{folder}/stages"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + STARTING)
        listener.listen()
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", SERVE, address, str(listener.fileno()), *map(str, process)],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # who reads what DVC prints waits for all that have its pipe
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # ctrl-C reaches a stage through its command, once
        )
