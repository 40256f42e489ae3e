"""A model behind HTTP, as `mlflow models serve` runs it, and an MLflow server."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.pipeline.repository import environment, wait_for


class Server:
    """A running server of the process `pid`."""

    def __init__(self, address: str, pid: int) -> None:
        self.address, self.pid = address, pid

    def ask(self, images: list[Any], **params: Any) -> requests.Response:
        """The answer to a request with these texts in the column `image`."""
        body = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}, "params": params}
        return requests.post(f"{self.address}/invocations", json=body, timeout=120)

    def peak_memory(self) -> int:
        """Bytes that the largest of its processes has had at most."""
        processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        status = "".join(Path(f"/proc/{process.pid}/status").read_text() for process in processes)
        return max(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def free_port() -> int:
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server of the store in `folder`, which answers."""
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination": str(folder / "artifacts"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers() -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
        return False

    try:
        wait_for(answers, 600)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def serving(model: str, folder: Path, **env: str) -> Iterator[Server]:
    """`model`, a folder or a name of MLflow, served from `folder` on the loopback address."""
    port = free_port()
    options = f"--env-manager local --host 127.0.0.1 --port {port}".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, *options],
        cwd=folder,
        env=environment(**env),
        start_new_session=True,
    )
    server = Server(f"http://127.0.0.1:{port}", process.pid)

    def answers():
        assert process.poll() is None
        with suppress(requests.ConnectionError):
            return requests.get(f"{server.address}/ping", timeout=5).ok

    try:
        wait_for(answers)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
