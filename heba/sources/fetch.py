"""Files from the network, or that the user has placed. None is used before it is checked.

On requests alone: pooch, which is built on it, neither resumes nor shows that it hashes a file of many gigabytes.
"""

import gzip
import hashlib
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import requests
import urllib3
from tqdm import tqdm

from heba.sources.catalog import File
from heba.sources.unpack import DISK_ERRORS, is_archive, most_bytes

ATTEMPTS = 4  # in a row without any progress
LONGEST_PAUSE = 60  # seconds, whatever a server asks for
CONNECT = 10  # seconds
WINDOW = 60  # seconds in which something must come, and at least RATE bytes a second
RATE = 10_000
CHUNK = 1 << 20
UNCHECKED = " (no checksum is published for it; its images are checked against the split instead)"


class FetchError(ValueError):
    """Files that cannot be obtained. `missing`: per alternative, the names of its missing files; none where
    they were there but unusable. The message lists everything that was tried."""

    def __init__(self, missing: list[list[str]], tried: list[str]) -> None:
        super().__init__("\n".join(f"  {t}" for t in tried))
        self.missing = missing


class Local(NamedTuple):
    """A file of the catalogue, checked, where it lies."""

    file: File
    path: Path
    sha256: str


def check(path: Path, file: File) -> tuple[str, str | None]:
    """The sha256 of `path`, and the problem with it, or None. It must match the checksums of `file`; without any,
    it must at least be an archive."""
    total = path.stat().st_size
    # git names a file by the hash of its length and content.
    digests: dict[str, Any] = {
        "sha256": hashlib.sha256(),
        "md5": hashlib.md5(usedforsecurity=False),
        "git_sha1": hashlib.sha1(f"blob {total}\0".encode(), usedforsecurity=False),
    }
    digests = {name: digest for name, digest in digests.items() if name == "sha256" or getattr(file, name)}
    with path.open("rb") as stream, _bar(f"check {file.file}", total) as bar:
        while piece := stream.read(CHUNK):
            for digest in digests.values():
                digest.update(piece)
            bar.update(len(piece))
    problem = None
    for name, digest in digests.items():
        expected = getattr(file, name)
        if expected and digest.hexdigest() != expected:
            problem = f"wrong checksum: its {name} is {digest.hexdigest()}, not {expected}"
    if not file.has_checksum and not is_archive(path):
        problem = "it is neither a tar nor a zip archive, or is cut off"
    return digests["sha256"].hexdigest(), problem


def _bar(title: str, total: int | None, initial: int = 0) -> tqdm:
    return tqdm(
        desc=title,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        delay=2,
        mininterval=1,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def resuming_download(url: str, partial: Path, title: str, most: int) -> bool:
    """Download `url` to `partial`, going on where an interruption left it, with a progress bar named `title`.

    Tries again after a broken connection, a silence or a server's error, until ATTEMPTS in a row have brought next
    to nothing new. Returns whether the server says that it has compressed the bytes. Raises OSError when all
    attempts fail, and at once for a server slower than RATE; ValueError for a web page in place of a file, and for
    more than `most` bytes. What has come of a file stays.
    """
    failures, furthest, since = 0, _size(partial), time.monotonic()
    while True:
        try:
            return _transfer(url, partial, title, most)
        except requests.RequestException as error:
            status = 0 if error.response is None else error.response.status_code
            if 400 <= status < 500 and status not in (408, 429):
                raise
            gained, now = _size(partial) - furthest, time.monotonic()
            # Else a server that drops every connection after a few bytes would keep us for ever.
            failures = 0 if gained > 0 and gained >= RATE * (now - since) else failures + 1
            furthest, since = furthest + max(0, gained), now
            if failures == ATTEMPTS:
                raise
            asked = "" if error.response is None else error.response.headers.get("Retry-After", "")
            pause = min(int(asked), LONGEST_PAUSE) if asked.isdecimal() else 2 ** max(failures - 1, 0)
            logging.getLogger(__name__).warning("%s: %s; trying again in %d s", title, error, pause)
        time.sleep(pause)


def _transfer(url: str, partial: Path, title: str, most: int) -> bool:
    """One request for what is not in `partial` yet; raises requests.RequestException unless all of it comes."""
    # A thread reads, since no timeout of a socket ends the wait for a server that sends a byte now and then.
    arrived: queue.Queue[Any] = queue.Queue(maxsize=64)
    given_up = threading.Event()
    done = _size(partial)
    threading.Thread(target=_receive, args=(url, done, arrived, given_up), daemon=True).start()
    try:
        pieces = _paced(arrived)
        return _store(next(pieces), pieces, partial, title, most)
    finally:
        given_up.set()
        while not arrived.empty():  # which may be what the thread waits for
            arrived.get_nowait()


def _receive(url: str, done: int, arrived: queue.Queue[Any], given_up: threading.Event) -> None:
    """Put into `arrived` the response to a request for `url` from byte `done` on, then its bytes as they are sent,
    then None; or, last, what went wrong."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        # What reads lets go after whoever waits for it.
        with requests.get(url, headers=headers, stream=True, timeout=(CONNECT, 3 * WINDOW)) as response:
            arrived.put(response)
            while not given_up.is_set() and (piece := response.raw.read1(CHUNK, decode_content=False)):
                arrived.put(piece)
        arrived.put(None)
    except urllib3.exceptions.HTTPError as error:
        arrived.put(requests.ConnectionError(error))
    except Exception as error:  # raised by the one who waits
        arrived.put(error)


def _paced(arrived: queue.Queue[Any]) -> Iterator[Any]:
    """What `_receive` puts into `arrived`. Raises requests.ConnectionError when nothing comes for WINDOW seconds,
    and TimeoutError for fewer than RATE bytes a second."""
    since, came = time.monotonic(), 0
    while True:
        try:
            item = arrived.get(timeout=max(0.0, since + WINDOW - time.monotonic()))
        except queue.Empty:
            if not came:
                raise requests.ConnectionError(f"nothing came in {WINDOW} s") from None
            if came < RATE * WINDOW:
                raise TimeoutError(
                    f"too slow: {came} bytes came in {WINDOW} s, and {RATE} a second are the least"
                ) from None
            since, came = time.monotonic(), 0
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        if isinstance(item, bytes):
            came += len(item)
        yield item


def _store(response: requests.Response, pieces: Iterator[bytes], partial: Path, title: str, most: int) -> bool:
    """Write what `pieces` brings of the `response` to `partial`; see `resuming_download`."""
    done = _size(partial)
    if response.status_code == 416 and done:
        if response.headers.get("Content-Range") == f"bytes */{done}":
            return False
        partial.unlink()
        raise requests.ConnectionError("the file is not the one that a former run began with")
    response.raise_for_status()
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise ValueError("the server sent a web page in place of the file")
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise ValueError(f"the server sent it compressed by {encoding}, though asked not to")
    if response.status_code != 206:
        done = 0
    length = response.headers.get("Content-Length")
    total = done + int(length) if length else None
    with partial.open("ab" if done else "wb") as out, _bar(title, total, done) as bar:
        for piece in pieces:
            done += len(piece)
            if max(done, total or 0) > most:
                partial.unlink()
                raise ValueError(
                    f"the server sends more than {most / 1e6:.0f} MB; if that is right, correct its size in the "
                    "catalogue"
                )
            out.write(piece)
            bar.update(len(piece))
    if total is not None and done != total:
        raise requests.ConnectionError(f"only {done} of {total} bytes came")
    return encoding != "identity"


def _gunzip(path: Path, plain: Path, most: int) -> bool:
    """Decompress the gzip file `path` to `plain`. Returns False, and writes no file, when `path` is not gzip or
    holds more than `most` bytes."""
    done = 0
    try:
        with gzip.open(path) as stream, plain.open("wb") as out, _bar(f"decompress {path.name}", None) as bar:
            while piece := stream.read(CHUNK):
                done += len(piece)
                if done > most:
                    raise gzip.BadGzipFile("too large")
                out.write(piece)
                bar.update(len(piece))
    except (gzip.BadGzipFile, zlib.error, EOFError):
        plain.unlink()
        return False
    return True


def partial_path(folder: Path, file: File, url: str) -> Path:
    """The partial file of the download of `file` from `url`; another host may have other bytes of that name."""
    return folder / f"{file.file}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part"


def _partials(folder: Path, file: File) -> list[Path]:
    return list(folder.glob(f"{file.file}.????????.part"))


def download(file: File, url: str, folder: Path, say: Callable[[str], object]) -> Local:
    """Fetch `file` from `url` into `folder` and check it; raises OSError or ValueError.

    A file of that name in `folder`, which is there only when it is bad, may be the user's: it is renamed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = partial_path(folder, file, url)
    most = most_bytes(file.size)
    compressed = resuming_download(url, partial, file.file, most)
    sha256, problem = check(partial, file)
    if problem and compressed:
        # A server that says gzip may only mean what the file is, as with .tar.gz; this one has compressed it.
        plain = partial_path(folder, file, f"{url} decompressed")
        if _gunzip(partial, plain, most):
            os.replace(plain, partial)
            sha256, problem = check(partial, file)
    if problem:
        partial.unlink()
        raise ValueError(problem)
    path = folder / file.file
    if path.exists():
        aside = path.with_name(f"{path.name}.bad")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.bad")
        os.replace(path, aside)
        say(f"{path} was not the right file: it is kept as {aside.name}")
    os.replace(partial, path)
    for other in _partials(folder, file):
        other.unlink()
    return Local(file, path, sha256)


def _places(file: File, archives: Path, dataset: str, mirror: str | None) -> list[Path]:
    """The files of that name from the user, an earlier run or a mirror's folder."""
    folders = [archives / dataset, archives]
    if mirror and "://" not in mirror:
        folders.append(Path(mirror) / dataset)
    return [folder / file.file for folder in folders if (folder / file.file).is_file()]


def bytes_to_fetch(files: list[File], archives: Path, dataset: str, mirror: str | None) -> int:
    """Bytes of `files` that are neither placed nor fetched yet."""
    total = 0
    for file in files:
        if not _places(file, archives, dataset, mirror):
            total += max(0, file.size - max(map(_size, _partials(archives / dataset, file)), default=0))
    return total


@dataclass
class _Search:
    """Where the files of a data set are looked for, and what was found there so far.

    Attributes:
        archives, dataset, mirror, say: as in `obtain`.
        tried: what was wrong with each place. checked: sha256 and problem of each file that was looked at.
        fetched: the files that came from the network.
    """

    archives: Path
    dataset: str
    mirror: str | None
    say: Callable[[str], object]
    tried: list[str] = field(default_factory=list)
    checked: dict[tuple[Path, File], tuple[str, str | None]] = field(default_factory=dict)
    fetched: set[Path] = field(default_factory=set)

    def note(self, problem: str) -> None:
        if problem not in self.tried:
            self.tried.append(problem)
            self.say(f"{self.dataset}: {problem}")

    def placed(self, file: File) -> Local | None:
        """A file that needs no network."""
        for path in _places(file, self.archives, self.dataset, self.mirror):
            if (path, file) not in self.checked:
                self.checked[path, file] = check(path, file)
            sha256, problem = self.checked[path, file]
            if problem is None:
                return Local(file, path, sha256)
            self.note(f"{path}: {problem}")
        return None

    def fetch(self, file: File) -> Local | None:
        """A file from the network."""
        remote = self.mirror if self.mirror and "://" in self.mirror else None
        urls = [f"{remote.rstrip('/')}/{self.dataset}/{file.file}"] if remote else []
        urls += [url for url in (file.url, *file.mirrors) if url]
        for url in urls:
            self.say(f"{self.dataset}: fetching {url}" + ("" if file.has_checksum else UNCHECKED))
            try:
                local = download(file, url, self.archives / self.dataset, self.say)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise  # another place would not help
                self.note(f"{url}: {error}")
                continue
            self.fetched.add(local.path)
            self.checked[local.path, file] = (local.sha256, None)
            return local
        return None

    def all_of(self, files: list[File], online: bool) -> tuple[list[Local], list[str]]:
        """Those of `files` that can be had, and the names of the others."""
        found: list[Local] = []
        absent: list[str] = []
        for file in files:
            # Where one cannot be had the others are not fetched, but named if they are not there.
            local = self.placed(file) or (self.fetch(file) if online and not absent else None)
            if local:
                found.append(local)
            else:
                absent.append(file.file)
        return found, absent

    def refuse(self, files: list[Local], reason: ValueError) -> None:
        """Files whose content is not that of the data set; without a checksum only that tells."""
        self.note(f"{', '.join(file.file.file for file in files)}: {reason}")
        for file, path, sha256 in files:
            if path in self.fetched and not file.has_checksum:
                path.unlink()
            elif not file.has_checksum:
                self.checked[path, file] = (sha256, "its content is not that of the data set")


def obtain(
    alternatives: list[list[File]],
    archives: Path,
    dataset: str,
    mirror: str | None = None,
    say: Callable[[str], object] = print,
    use: Callable[[list[Local]], object] = lambda files: None,
) -> list[Local]:
    """The files of the first alternative that can be had complete and that `use` takes.

    Files that the user put into `archives` or `archives`/<dataset> come first and need no network, then
    `mirror`/<dataset>, a URL or a folder, then the URLs. When `use` raises ValueError, the next alternative is
    taken; what was fetched without a checksum to tell that it is right is deleted then, and fetched anew the next
    time. Raises FetchError with everything that was tried, and OSError when the disk does not take what comes.
    """
    search = _Search(archives, dataset, mirror, say)
    refused: list[list[Local]] = []
    missing: list[list[str]] = []
    for online in (False, True):
        for files in alternatives:
            found, absent = search.all_of(files, online)
            if absent and online:
                missing.append(absent)
            if absent or found in refused:
                continue
            try:
                use(found)
                return found
            except ValueError as error:
                refused.append(found)
                search.refuse(found, error)
    raise FetchError(missing, search.tried)
