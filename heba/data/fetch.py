"""Files from the network or from where a user put them, used only after their checksum is right."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pooch
import requests
from tqdm import tqdm

from heba.data.catalog import File

ATTEMPTS = 4
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
CHUNK = 1 << 20


class FetchError(ValueError):
    """A file that can not be had, with everything that was tried."""


def checksum(path: Path, file: File) -> str | None:
    """None when `path` has all checksums that `file` names, else what is wrong."""
    digests: dict[str, Any] = {}
    if file.sha256:
        digests["sha256"] = hashlib.sha256()
    if file.md5:
        digests["md5"] = hashlib.md5(usedforsecurity=False)
    if file.git_sha1:
        # git names a file by the hash of its length and content.
        head = f"blob {path.stat().st_size}\0".encode()
        digests["git_sha1"] = hashlib.sha1(head, usedforsecurity=False)
    if digests:
        total = path.stat().st_size
        with path.open("rb") as stream, _bar(f"check {path.name}", total) as bar:
            while piece := stream.read(CHUNK):
                for digest in digests.values():
                    digest.update(piece)
                bar.update(len(piece))
    for name, digest in digests.items():
        if digest.hexdigest() != getattr(file, name):
            return f"its {name} is {digest.hexdigest()}, not {getattr(file, name)}"
    return None


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


def resuming_download(url: str, output_file: Any, partial: Path) -> None:
    """Download `url` to `output_file` by way of `partial`, which stays after an interruption and is gone on with
    the next time. Tries again after a broken connection or a server's error; raises OSError in the end."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        done = partial.stat().st_size if partial.exists() else 0
        try:
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                if response.status_code == 416:  # nothing is left, or the file has changed: the checksum tells
                    if f"bytes */{done}" == response.headers.get("Content-Range"):
                        break
                    partial.unlink()
                    continue
                if response.status_code >= 500 or response.status_code == 429:
                    raise requests.ConnectionError(f"the server answers {response.status_code} {response.reason}")
                response.raise_for_status()
                if response.status_code != 206:
                    done = 0
                length = response.headers.get("Content-Length")
                total = done + int(length) if length else None
                with partial.open("ab" if done else "wb") as out, _bar(partial.stem, total, done) as bar:
                    for piece in response.iter_content(CHUNK // 16):
                        out.write(piece)
                        bar.update(len(piece))
                if total is not None and partial.stat().st_size != total:
                    raise requests.ConnectionError(f"only {partial.stat().st_size} of {total} bytes came")
                break
        except requests.HTTPError:
            raise
        except requests.RequestException:
            if attempt == ATTEMPTS - 1:
                raise
    shutil.move(partial, output_file)


def download(file: File, url: str, folder: Path) -> Path:
    """Fetch `file` from `url` into `folder` and check it; raises OSError or ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    algorithm = "sha256" if file.sha256 else "md5"
    expected = getattr(file, algorithm)
    path = pooch.retrieve(
        url,
        known_hash=f"{algorithm}:{expected}" if expected else None,
        fname=file.file,
        path=folder,
        downloader=lambda u, out, _: resuming_download(u, out, folder / f"{file.file}.part"),
    )
    wrong = checksum(Path(path), file) if file.git_sha1 else None
    if wrong:
        os.unlink(path)
        raise ValueError(f"{file.file}: {wrong}")
    return Path(path)


def obtain(
    alternatives: list[list[File]],
    archives: Path,
    dataset: str,
    mirror: str | None = None,
    say: Callable[[str], object] = print,
) -> list[tuple[File, Path]]:
    """The files of the first alternative that can be had complete, each with its checked place.

    Files that the user put into `archives` or `archives`/<dataset> come first and need no network, then
    `mirror`/<dataset>, a URL or a folder, then the URLs. Raises FetchError with everything that was tried.
    """
    tried: list[str] = []
    verdicts: dict[tuple[Path, File], str | None] = {}

    def placed(file: File) -> Path | None:
        folders = [archives / dataset, archives]
        if mirror and "://" not in mirror:
            folders.append(Path(mirror) / dataset)
        for folder in folders:
            path = folder / file.file
            if path.is_file():
                if (path, file) not in verdicts:
                    verdicts[path, file] = checksum(path, file)
                if verdicts[path, file] is None:
                    return path
                problem = f"{path}: {verdicts[path, file]}"
                if problem not in tried:
                    tried.append(problem)
        return None

    for files in alternatives:
        found = [(file, path) for file in files if (path := placed(file))]
        if len(found) == len(files):
            return found
    pooch.get_logger().setLevel("WARNING")
    for files in alternatives:
        found = []
        for file in files:
            path = placed(file)
            urls = [f"{mirror.rstrip('/')}/{dataset}/{file.file}"] if mirror and "://" in mirror else []
            urls += [file.url] if file.url else []
            for url in urls if path is None else []:
                say(f"{dataset}: fetching {url}" + ("" if file.sha256 or file.md5 or file.git_sha1 else UNCHECKED))
                try:
                    path = download(file, url, archives / dataset)
                    break
                except (OSError, ValueError) as error:
                    # pooch names its temporary file, which tells a user nothing.
                    wrong = "hash of downloaded file" in str(error).lower()
                    tried.append(f"{url}: {'its checksum is not the published one' if wrong else error}")
                    say(f"{dataset}: {tried[-1]}")
            if path is None:
                break
            found.append((file, path))
        if len(found) == len(files):
            return found
    raise FetchError("\n".join(f"  {t}" for t in tried))


UNCHECKED = " (no checksum is published for it; its images are checked against the split instead)"
