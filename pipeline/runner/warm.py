"""Stages without their start-up: `python -m pipeline repro` keeps one process that has imported torch, open_clip
and MLflow, and the stages' commands run in forks of it.

On the embedded suite, imports are more than half of a stage's time. A stage that finds no server starts by itself.
"""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SERVER = "HEBA_STAGE_SERVER"  # in the environment: the server's socket
SERVE = "serve-stages"  # the first argument of the server's process
CODE = 1  # bytes of an exit code on the socket
LENGTH = 8  # bytes of a length or process id
LIBRARIES = (
    "torch._dynamo",  # which torch's optimisers import
    "open_clip",
    "safetensors.torch",
    "mlflow.pyfunc",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "pandas",
    "matplotlib.figure",
    "pydantic",
    "typer",
)


@contextmanager
def stage_server(root: Path) -> Iterator[dict[str, str]]:
    """Start a server for the stages of the repository at `root`; gives what their environment must have for it.

    Linux only: elsewhere, libraries break in a fork of their process.
    """
    if sys.platform != "linux":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="heba-") as folder:
        address = str(Path(folder) / "stages")
        command = [sys.executable, "-m", "pipeline", SERVE, address]
        # A session of its own: ctrl-C reaches a stage through its command, once.
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield {SERVER: address}
        finally:
            process.terminate()  # it may still be importing
            process.wait()


def run_in_server() -> int | None:
    """Run this process's command in a fork of the server; its exit code, or None when there is no server."""
    address = os.environ.get(SERVER)
    if not address:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:  # not ready yet, or gone
        return None
    request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [len(request).to_bytes(LENGTH, "big")], [0, 1, 2])
    connection.sendall(request)
    stage = int.from_bytes(_receive(connection, LENGTH), "big")

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(stage, number)

    if stage:
        signal.signal(signal.SIGINT, forward)
        signal.signal(signal.SIGTERM, forward)
    code = _receive(connection, CODE)
    if not code:
        print("error: the stage's process was killed", file=sys.stderr)
        return 1
    return code[0]


def _receive(connection: socket.socket, n: int) -> bytes:
    """`n` bytes, or none when the other side has gone."""
    received = b""
    while len(received) < n:
        part = connection.recv(n - len(received))
        if not part:
            return b""
        received += part
    return received


def serve(address: str, main: Callable[[], None]) -> None:
    """Run `main` with the arguments of each command that comes to `address`, in a fork, until standard input ends,
    which is when the process that started this one has ended."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would start a thread, which no fork has
    for library in LIBRARIES:
        importlib.import_module(library)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaves no zombies
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            code = 1
            try:
                code = _run_stage(connection, main)
                connection.sendall(code.to_bytes(CODE, "big"))
            finally:
                os._exit(code)
        connection.close()


def _run_stage(connection: socket.socket, main: Callable[[], None]) -> int:
    """In the fork: take over the command's arguments, folder, environment and files, and run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(connection, LENGTH, 3)
    argv, folder, environment = json.loads(_receive(connection, int.from_bytes(head, "big")))
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))  # OpenMP has read the server's environment
    connection.sendall(os.getpid().to_bytes(LENGTH, "big"))
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    return _exit_code(main)


def _end_with(connection: socket.socket) -> None:
    """Kill this process when its command, which waits at the other side, was killed."""
    with suppress(ConnectionResetError):  # it was killed before it read anything
        connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _exit_code(command: Callable[[], None]) -> int:
    try:
        command()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
