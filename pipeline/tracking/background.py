"""A process beside a stage that talks to MLflow.

A store may hang, drip, or answer without an end. The stage waits for none of it: it sends lines of JSON, each a
call's name and argument, and the process does them in order. At its end the stage gives the process `PATIENCE`
seconds for what is left, and then kills it.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import groupby
from types import FrameType
from typing import Any

import psutil

from pipeline.tracking.store import shown_uri, without_password

PATIENCE = 30.0  # seconds: that a stage waits at its end, and that a call may take
MEMORY = 2**30  # bytes that the process may take for a call
END = "end"  # the name of the last message
NOTED = 2.0  # seconds after which the wait is told


def error_text(error: BaseException) -> str:
    """An error's type and first line."""
    message = (without_password(str(error)).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {message}"


def warn(reason: str) -> None:
    """Say that tracking has failed, and what to do."""
    logging.getLogger("heba").warning(
        "MLflow tracking failed (%s); results are complete, log them later with `python -m pipeline track`", reason
    )


class Background:
    """The process, as the stage sees it. After the first failure it warns once and does nothing more."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        try:
            # A session of its own: MLflow leaves its transaction open when ctrl-C interrupts one.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "log"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            assert self.process.stdin is not None
            os.set_blocking(self.process.stdin.fileno(), False)
        except OSError as error:
            warn(error_text(error))

    def send(self, name: str, argument: Any) -> None:
        """Have the call `name` done with `argument`, which must fit JSON and 4 kB. Never waits."""
        process = self.process
        if process is None or process.stdin is None:
            return
        line = json.dumps([name, argument]).encode() + b"\n"
        try:
            if process.stdin.write(line) != len(line):  # the pipe is full
                self.process = None
                process.kill()
                warn("the process for it does not read what it should log")
        except OSError:  # it has ended, and has said why
            self._ended(process)

    def finish(self) -> None:
        """Wait until all calls are done, `PATIENCE` seconds at most. A first ctrl-C does not end the wait."""
        process, until = self.process, time.monotonic() + PATIENCE
        try:
            self._wait(until)
        except KeyboardInterrupt:
            self._wait(until)
            raise
        finally:
            if process and process.poll() is None:
                process.kill()
            self.process = None

    def _wait(self, until: float) -> None:
        self.send(END, None)
        process = self.process
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(NOTED, max(until - time.monotonic(), 0)))
        if process.poll() is None:
            print(f"waiting for MLflow, {PATIENCE:.0f} s at most", file=sys.stderr)
        try:
            process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            warn(f"{shown_uri()} was not done in {PATIENCE:.0f} s")
        else:
            self._ended(process)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """Warn if the process did not end well."""
        self.process = None
        assert process.stdout is not None
        reason = process.stdout.read().decode(errors="replace").strip()
        code = process.wait()
        if reason or code:
            warn(reason or f"the process for it ended with exit code {code}")


class Stopped(BaseException):
    """A call takes too long or too much memory. Not an Exception: MLflow would catch it and try again."""


def serve(calls: dict[str, Callable[[list[Any]], None]], close: Callable[[], None]) -> None:
    """The process: do the `calls` that standard input names until it ends.

    Waiting messages of one name become one call with a list of arguments, so that a slow store keeps up.
    The last call is `close`, at the end and after the first failure. After a failure comes SystemExit, with the
    reason on standard output.
    """
    messages: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    with redirect_stdout(sys.stderr):  # what MLflow prints is no reason
        try:
            for name, arguments in _taken(messages):
                with limits():
                    calls[name](arguments)
            with limits():
                close()
        except Stopped as error:
            _say(str(error))
            sys.exit(1)
        except Exception as error:  # whatever the store does
            _say(error_text(error))
            with suppress(Exception, Stopped), limits():
                close()
            sys.exit(1)


def _read(messages: queue.SimpleQueue[tuple[str, Any]]) -> None:
    # Without a buffer, whose lock would be this thread's when the process ends.
    with suppress(ValueError), open(0, "rb", buffering=0, closefd=False) as lines:  # ValueError: half a line
        for line in lines:
            name, argument = json.loads(line)
            messages.put((name, argument))
    os._exit(1)  # the stage was killed; the next one closes its run


def _taken(messages: queue.SimpleQueue[tuple[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """The messages in order, neighbours of the same name together, until the last one."""
    while True:
        waiting = [messages.get()]
        while not messages.empty():
            waiting.append(messages.get())
        for name, group in groupby(waiting, key=lambda message: message[0]):
            if name == END:
                return
            yield name, [argument for _, argument in group]


@contextmanager
def limits() -> Iterator[None]:
    """Stopped, with the reason, when the block takes longer than `PATIENCE` or more memory than `MEMORY`.

    A timeout of MLflow's own is for one read: a server that drips never comes to it.
    """
    process, until = psutil.Process(), time.monotonic() + PATIENCE
    most = process.memory_info().rss + MEMORY

    def look(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > until:
            raise Stopped(f"{shown_uri()} gave no answer in {PATIENCE:.0f} s")
        if process.memory_info().rss > most:
            raise Stopped(f"an answer of {shown_uri()} takes more than {MEMORY >> 30} GiB of memory")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _say(reason: str) -> None:
    os.write(1, reason.encode(errors="replace") + b"\n")
