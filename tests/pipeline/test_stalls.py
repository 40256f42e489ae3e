"""MLflow stores that hang, drip or lie: a stage bears each."""

import os
import signal
import socketserver
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
import requests
from filelock import FileLock

from pipeline.tracking import background
from pipeline.tracking import log as tracking
from tests.pipeline.repository import ROOT, wait_for, working_in
from tests.pipeline.test_tracking import EPOCH, begun, evaluation, trained

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
    run = begun()
    for epoch in range(500):
        run.epoch(EPOCH | {"epoch": epoch})
    run.outs(folder)
    assert time.monotonic() - begin < PATIENCE
    begin = time.monotonic()
    run.finish()
    assert time.monotonic() - begin < 2 * PATIENCE
    assert len(warnings(caplog)) == 1
    assert "`python -m pipeline track`" in warnings(caplog)[0]
    wait_for(lambda: working_in(tmp_path) == [os.getpid()])


def test_an_answer_without_an_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(background, "MEMORY", 2**26)
    with faulty("endless") as uri, pytest.raises(background.Stopped, match="of memory"), background.limits():
        requests.get(uri, timeout=60)


def test_a_call_that_a_timeout_of_its_own_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(background, "PATIENCE", 1.0)
    with faulty("drip") as uri, pytest.raises(background.Stopped, match="gave no answer"), background.limits():
        requests.get(uri, timeout=5)


def test_a_process_that_does_not_read_holds_up_no_epoch(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run = begun()
    process = run.log.process
    process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    for epoch in range(5000):
        run.epoch(EPOCH | {"epoch": epoch})
    run.outs(tmp_path)
    run.finish()
    assert time.monotonic() - begin < background.PATIENCE / 2
    assert len(warnings(caplog)) == 1
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("fault", ["drip", "lock held"])
def test_an_evaluation_is_as_patient(fault, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(background, "PATIENCE", PATIENCE)
    trained(tmp_path)
    with ExitStack() as until:
        if fault == "drip":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", until.enter_context(faulty(fault)))
        else:
            until.enter_context(broken_file(fault, tmp_path))
        begin = time.monotonic()
        tracking.log_evaluations([evaluation()])
        assert time.monotonic() - begin < 3 * PATIENCE
    (warning,) = warnings(caplog)
    assert "was not done in 3 s" in warning


def test_late_tracking_says_that_a_store_hangs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(background, "PATIENCE", PATIENCE)
    with faulty("drip") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match=f"{uri} gave no answer in 3 s"):
            tracking.track(tmp_path)
