"""A Chromium without a window, driven through pipes by its DevTools protocol: messages of JSON that end in a zero.

Debian has it as the package chromium. Nothing else is needed, and nothing but the address given is reached.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # which root may not have; the pages are our own
    "--disable-gpu",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
]
PATIENCE = 120.0  # seconds for a page
TEXT = "document.body ? document.body.innerText : ''"


class Page:
    """A page that is open in the browser."""

    def __init__(self, send: int, receive: int) -> None:
        self.send, self.receive, self.number, self.rest, self.session = send, receive, 0, b"", ""
        self.frames: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol; RuntimeError when it fails or takes too long."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session or self.session:
            message["sessionId"] = session or self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.rest:
                if not select.select([self.receive], [], [], max(until - time.monotonic(), 0))[0]:
                    raise RuntimeError(f"{method}: no answer in {PATIENCE:.0f} s")
                read = os.read(self.receive, 1 << 20)
                if not read:
                    raise RuntimeError("Chromium has ended")
                self.rest += read
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def run(self, script: str, session: str | None = None) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", session, expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['result'].get('description')}")
        return result["result"].get("value")

    def open(self, address: str, width: int = 1400, height: int = 900) -> None:
        """Load an address in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url="about:blank")  # a change after # alone would load nothing
        self.call("Page.navigate", url=address)

    def text(self) -> str:
        """What a reader sees of the page, and of the documents that it shows in frames."""
        return "\n".join(str(self.run(TEXT, session)) for session in (self.session, *self._frames()))

    def _frames(self) -> list[str]:
        """Sessions of the frames that are in processes of their own, since their documents are not the page's."""
        targets = self.call("Target.getTargets")["targetInfos"]
        frames = [target["targetId"] for target in targets if target["type"] == "iframe"]
        for target in frames:
            if target not in self.frames:
                attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
                self.frames[target] = attached["sessionId"]
        return [self.frames[target] for target in frames]

    def wait_for(self, *wanted: str) -> str:
        """Wait until the page shows all of `wanted`; returns its text. AssertionError when it does not."""
        until = time.monotonic() + PATIENCE
        while not all(part in (text := self.text()) for part in wanted):
            missing = [part for part in wanted if part not in text]
            assert time.monotonic() < until, f"the page never showed {missing}:\n{text}"
            time.sleep(0.2)
        return text

    def click(self, text: str, what: str = "button, a, [role=button], [role=menuitem]") -> None:
        """Click on the innermost element with this text, of those that the selector `what` gives."""
        self.run(f"{self._found(text, what)}.click()")

    def follow(self, text: str) -> None:
        """Open the address of the link with this text, here and not in a window of its own."""
        self.open(self.run(f"{self._found(text, 'a')}.href"))

    def _found(self, text: str, what: str) -> str:
        """A JavaScript expression for an element, once it is there."""
        found = f"[...document.querySelectorAll({json.dumps(what)})]"
        chosen = f"{found}.findLast((e) => (e.innerText || '').trim() === {json.dumps(text)})"
        until = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({chosen})"):
            assert time.monotonic() < until, f"there is no {text} to click on:\n{self.text()}"
            time.sleep(0.2)
        return chosen

    def picture(self, path: Path) -> None:
        """Write what the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A page of a browser that keeps what it needs in `folder`."""
    assert CHROMIUM, "chromium is not installed"
    commands, answers = os.pipe(), os.pipe()

    def place() -> None:
        """It reads commands from 3 and writes answers to 4."""
        ours = [os.dup(commands[0]), os.dup(answers[1])]
        for end, number in zip(ours, (3, 4), strict=True):
            os.dup2(end, number)

    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}"],
        preexec_fn=place,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(commands[1], answers[0])
    finally:
        os.close(commands[1])
        os.close(answers[0])
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
