"""An HTTP server with faults, for what is downloaded."""

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`. `faults` by path: "404"; "cut" (drops the connection in the middle, the first time), "whole"
    (cut, and knows no ranges), "slow" (drops every connection after a quarter of the file), "busy" (503 and a
    Retry-After of a second, the first time), "wrong" (other bytes), "html" (a web page)."""

    files: dict[str, bytes]
    faults: dict[str, str]
    requests: list[tuple[str, str | None]]
    url: str

    def do_GET(self):
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        first = name not in [n for n, _ in self.requests]
        self.requests.append((name, wanted))
        fault = self.faults.get(name)
        if fault == "404" or name not in self.files:
            self.send_error(404)
            return
        if fault == "busy" and first:
            self.send_response(503)
            self.send_header("Retry-After", "1")
            self.end_headers()
            return
        content = self.files[name]
        if fault == "wrong":
            content = b"x" * len(content)
        elif fault == "html":
            content = b"<html>Sign in</html>"
        start = 0
        if wanted and fault != "whole":
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault == "html":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        end = len(content)
        if fault in ("cut", "whole") and first:
            end = start + (end - start) // 2
        elif fault == "slow":
            end = start + len(content) // 4
        self.wfile.write(content[start:end])

    def do_HEAD(self):
        """What a Hugging Face hub says of a file."""
        content = self.files.get(self.path.lstrip("/"))
        self.send_response(404 if content is None else 200)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def serve() -> Iterator[type[Handler]]:
    """A running server: its `url`, `files` and `faults`, and the `requests` it had."""
    handler = type("Own", (Handler,), {"files": {}, "faults": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield handler
        running.shutdown()
