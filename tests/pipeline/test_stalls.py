"""MLflow stores that hang, drip or lie: a stage bears each."""

import os
import socketserver
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
from filelock import FileLock

from pipeline import background, tracking
from tests.pipeline.repository import ROOT, wait_for, working_in
from tests.pipeline.test_tracking import CONFIG, RECORD, trained

PATIENCE = 3.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Faulty(socketserver.BaseRequestHandler):
    """Answers every request with the `fault` of its server."""

    def handle(self):
        with suppress(OSError):  # the other side has gone
            self.request.recv(65536)
            getattr(self, self.server.fault)(self.request.sendall)

    def silent(self, send):
        self.server.over.wait()

    def drip(self, send):
        send(HEAD + b"Content-Length: 100000\r\n\r\n")
        while not self.server.over.wait(0.2):
            send(b" ")

    def endless(self, send):
        send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        while not self.server.over.is_set():
            send(b"100000\r\n" + b" " * 0x100000 + b"\r\n")

    def error(self, send):
        send(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops")

    def html(self, send):
        send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\nConnection: close\r\n\r\n")
        send(b"<html></html>")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def faulty(fault):
    """The address of a server on the loopback address."""
    with Server(("127.0.0.1", 0), Faulty) as server:
        server.fault, server.over = fault, threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.over.set()
            server.shutdown()


@contextmanager
def broken_file(fault, root):
    """The repository's own store, with a fault."""
    path = root / "mlflow.db"
    with ExitStack() as until:
        if fault == "locked":
            database = until.enter_context(closing(sqlite3.connect(path)))
            database.execute("CREATE TABLE experiments (name, artifact_location)")
            database.execute("BEGIN EXCLUSIVE")
        elif fault == "garbage":
            path.write_bytes(b"no database" * 100)
        elif fault == "folder":
            path.mkdir()
        elif fault == "lock held":
            until.enter_context(FileLock(root / ".heba-mlflow.lock"))
        yield


@pytest.fixture(params=["silent", "drip", "endless", "error", "html", "locked", "lock held", "garbage", "folder"])
def store(request, tmp_path, monkeypatch):
    """A faulty store, and a `PATIENCE` that a test bears; gives the fault."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(background, "PATIENCE", PATIENCE)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    if hasattr(Faulty, request.param):
        with faulty(request.param) as uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            yield request.param
    else:
        with broken_file(request.param, tmp_path):
            yield request.param


def warnings(caplog):
    return [message for message in caplog.messages if "MLflow tracking failed" in message]


def test_a_store_with_a_fault_costs_a_training_its_patience_at_most(store, tmp_path, caplog):
    folder = trained(tmp_path)
    begin = time.monotonic()
    run = tracking.start_training(CONFIG)
    for epoch in range(500):
        run.epoch(RECORD | {"epoch": epoch})
    assert time.monotonic() - begin < PATIENCE
    begin = time.monotonic()
    run.finish(folder)
    assert time.monotonic() - begin < 2 * PATIENCE
    assert len(warnings(caplog)) == 1
    assert "`python -m pipeline track`" in warnings(caplog)[0]
    wait_for(lambda: working_in(tmp_path) == [os.getpid()])
