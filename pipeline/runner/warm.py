"""Stages without their start-up: a process has imported torch, open_clip and MLflow, and the stages' commands
run in forks of it.

On the embedded suite, imports are more than half of a stage's time. `python -m pipeline repro` has such a server,
and under plain `dvc` a stage starts one (lifetime.py). What computes waits for a server that is still importing.
What is quicker without it, such as a download, then runs by itself, as all does where there is no server.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pipeline.runner import lifetime

SERVER = "HEBA_STAGE_SERVER"  # in the environment: the server's socket, or OFF
OFF = "off"
COMPUTES = ("backbone", "precompute", "train", "evaluate", "evaluate-transfer")  # the commands that import torch
STARTS = ("check-params", *COMPUTES)  # after check-params, others come
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


def stage_server(root: Path) -> dict[str, str]:
    """Start a server for the stages of the repository at `root`, which ends with this process; returns what their
    environment must have for it.

    Linux only: elsewhere, libraries break in a fork of their process.
    """
    if sys.platform != "linux":
        return {}
    address = lifetime.server_of(lifetime.this_process(), str(root), start=True)
    return {SERVER: address} if address else {}


def run_in_server() -> int | None:
    """Run this process's command in a fork of the server; its exit code, or None when there is no server."""
    command = sys.argv[1] if sys.argv[1:] else ""
    address = os.environ.get(SERVER)
    if address is None and sys.platform == "linux" and "DVC_STAGE" in os.environ:
        process = lifetime.dvc_process()
        address = process and lifetime.server_of(process, os.getcwd(), start=command in STARTS)
    connection = _connect(address, wait=command in COMPUTES) if address else None
    if not connection:
        return None
    request = json.dumps([sys.argv, os.getcwd(), os.environ | {SERVER: address}]).encode()
    stage = 0

    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(stage, number)

    try:
        socket.send_fds(connection, [len(request).to_bytes(LENGTH, "big")], [0, 1, 2])
        connection.sendall(request)
        stage = int.from_bytes(_receive(connection, LENGTH), "big")
        if not stage:  # the server has gone; nothing has begun
            return None
        signal.signal(signal.SIGINT, forward)
        signal.signal(signal.SIGTERM, forward)
    except KeyboardInterrupt:  # while the server imports, or before it is forwarded: the stage ends with us
        return 130
    except ConnectionError:
        return None
    code = _receive(connection, CODE)
    if not code:
        print("error: the stage's process was killed", file=sys.stderr)
        return 1
    return code[0]


def _connect(address: str, wait: bool) -> socket.socket | None:
    """A connection to the server; with `wait`, also to one that imports, which will answer."""
    # Its name may change in between.
    for name in (address, address + lifetime.STARTING, address) if wait else (address,):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(name)
            return connection
        except OSError:  # none, or one that has gone
            connection.close()
    return None


def _receive(connection: socket.socket, n: int) -> bytes:
    """`n` bytes, or none when the other side has gone."""
    received = b""
    while len(received) < n:
        try:
            part = connection.recv(n - len(received))
        except ConnectionResetError:
            return b""
        if not part:
            return b""
        received += part
    return received


def serve(address: str, listener: int, process: lifetime.Process, main: Callable[[], None]) -> None:
    """Run `main` with the arguments of each command that comes to the socket `listener`, in a fork, until
    `process` has ended."""
    end = lifetime.end_of(process)
    lifetime.remove_left()
    try:
        _serve(address, socket.socket(fileno=listener), end, main)
    finally:
        lifetime.remove_left()


def _serve(address: str, listener: socket.socket, end: int, main: Callable[[], None]) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would start a thread, which no fork has
    for library in LIBRARIES:
        importlib.import_module(library)
        if select.select([end], [], [], 0)[0]:
            return
    gc.collect()
    gc.freeze()  # what the forks' collections need not look at, and so not copy
    signal.signal(signal.SIGCHLD, _wait_for_ended)
    os.rename(address + lifetime.STARTING, address)
    while True:
        if end in select.select([listener.fileno(), end], [], [])[0]:
            return
        connection, _ = listener.accept()
        with suppress(OSError):  # no memory for another process: the stage runs by itself
            if os.fork() == 0:
                listener.close()
                code = 1
                try:
                    code = _run_stage(connection, main)
                    connection.sendall(code.to_bytes(CODE, "big"))
                finally:
                    os._exit(code)
        connection.close()


def _wait_for_ended(number: int, frame: FrameType | None) -> None:
    """Leave no zombies."""
    with suppress(ChildProcessError):  # there are no more
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _run_stage(connection: socket.socket, main: Callable[[], None]) -> int:
    """In the fork: take over the command's arguments, folder, environment and files, and run it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(connection, LENGTH, 3)
    argv, folder, environment = json.loads(_receive(connection, int.from_bytes(head, "big")))
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
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
