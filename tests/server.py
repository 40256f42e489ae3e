"""An HTTP server with faults, for what is downloaded."""

import gzip
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`. `faults` by path: "404"; "cut" (drops the connection in the middle, the first time), "whole"
    (cut, and knows no ranges), "slow" (drops every connection after a quarter of the file), "busy" (503 and a
    Retry-After of a second, the first time), "wrong" (other bytes), "html" (a web page), "crumbs" (drops every
    connection after a byte), "gzip" (compresses it, whatever was asked), "labelled" (says so, and does not), "br"
    (says that it was compressed in another way), "endless" (never stops), "silent" (says nothing), "trickle" (a
    byte every fifth of a second), "trickled head" (the same before the content)."""

    files: dict[str, bytes]
    faults: dict[str, str]
    requests: list[tuple[str, str | None]]
    url: str
    over: threading.Event

    def trickle(self):
        self.close_connection = True
        while not self.over.wait(0.2):
            self.wfile.write(b"x")
            self.wfile.flush()

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
        elif fault == "gzip":
            content = gzip.compress(content)
        elif fault == "silent":
            self.over.wait()
            return
        elif fault == "trickled head":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
            self.trickle()
            return
        start = 0
        if wanted and fault != "whole":
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.send_response(206 if start else 200)
        if fault != "endless":
            self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault == "html":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if fault in ("gzip", "labelled", "br"):
            self.send_header("Content-Encoding", "br" if fault == "br" else "gzip")
        self.end_headers()
        end = len(content)
        if fault in ("cut", "whole") and first:
            end = start + (end - start) // 2
        elif fault == "slow":
            end = start + len(content) // 4
        elif fault == "crumbs":
            end = start + 1
        elif fault == "trickle":
            self.trickle()
            return
        self.wfile.write(content[start:end])
        while fault == "endless" and not self.over.is_set():
            self.wfile.write(content)

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
    handler = type("Own", (Handler,), {"files": {}, "faults": {}, "requests": [], "over": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_address[1]}"
        try:
            yield handler
        finally:
            handler.over.set()
            running.shutdown()
