"""Archives to folders of regular files.

A stranger packed the archive, so we trust nothing in it: only contents and names are taken. The
extraction of tarfile and zipfile, which follows links and sets modes and times, is not used. No data set of the
catalogue has links, or anything else that is no file or folder.
"""

import errno
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}  # not the file's
# Pictures hardly compress, and tar's headers hardly add to them; the rest is for lists and labels.
MOST_TIMES, MOST_MORE = 2, 100_000_000
# What stands before a member to describe it; tarfile reads it into memory as a whole.
DESCRIBING = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
LARGEST_DESCRIPTION = 1 << 16  # bytes
REPACK = "pack the archive again without it"


class ArchiveError(ValueError):
    """An archive that is damaged, or has a member that does not belong in a data set."""


def most_bytes(size: int) -> int:
    """The most bytes that `size` bytes of a data set's archive may turn out to be."""
    return MOST_TIMES * size + MOST_MORE


def unpack(archive: Path, folder: Path, inner: str | None = None) -> None:
    """Unpack the regular files of a tar (of any compression) or zip archive into `folder`, in which only this
    module has written; with `inner`, then unpack the archive of that name in it, and remove it.

    Raises ArchiveError, naming the member, for what lies outside of `folder`, is neither file nor folder, has no
    name in UTF-8, or makes the whole larger than `most_bytes`, and for damage; OSError when the disk does not take
    what comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming_damage(archive):
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            with archive.open("rb") as stream:
                unpack_tar(stream, archive.stat().st_size, folder, archive)
    if inner:
        found = sorted(folder.rglob(inner))
        if found:
            unpack(found[0], found[0].parent)
            found[0].unlink()


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip archive, or a tar whose first member can be read."""
    if zipfile.is_zipfile(path):
        return True
    try:
        with naming_damage(path), path.open("rb") as stream, _open_tar(stream):
            return True
    except ArchiveError:
        return False


@contextmanager
def naming_damage(archive: Path) -> Iterator[None]:
    """Turn whatever the readers of archives raise in the block into an ArchiveError that names `archive`."""
    try:
        yield
    except ArchiveError:
        raise
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise ArchiveError(
            f"{archive}: the name {error.object!r} in it is not in UTF-8; rename that file, or {REPACK}"
        ) from None
    except Exception as error:
        # On damage they raise nearly anything: TarError, BadZipFile, zlib.error, EOFError, RuntimeError,
        # TypeError, OverflowError and more.
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise ArchiveError(f"{archive}: not a whole archive: {error}") from None


class _Header(tarfile.TarInfo):
    """A header of a tar, refused before what follows it is read into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > LARGEST_DESCRIPTION and header.type in DESCRIBING):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _open_tar(stream: IO[bytes]) -> tarfile.TarFile:
    # As a stream, which can never go back in a tar that leads in circles.
    return tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header)


def members_of_tar(stream: IO[bytes], size: int, archive: Path) -> Iterator[tuple[PurePosixPath, int, IO[bytes]]]:
    """The path, size in bytes and content of each file of the tar in `stream`, which has `size` bytes itself; to
    be read in this order. Raises as `unpack` within `naming_damage`."""
    with _open_tar(stream) as tar:
        for member in tqdm(tar, desc=f"unpack {archive.name}", unit="file", delay=2, mininterval=1):
            if member.offset_data + member.size > most_bytes(size):
                raise _too_large(archive, member.name, size)
            if _is_of_macos(member.name) or member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise _no_file(archive, member.name)
            content = tar.extractfile(member)
            assert content is not None  # it is a file's
            yield _inside(archive, member.name), member.size, content


def unpack_tar(stream: IO[bytes], size: int, folder: Path, archive: Path) -> None:
    """Unpack the tar of `size` bytes in `stream` into `folder`; `archive` is its name in messages. Raises as
    `unpack` within `naming_damage`."""
    for path, _, content in members_of_tar(stream, size, archive):
        _write(archive, folder, path, content)


def _unpack_zip(archive: Path, folder: Path) -> None:
    size, total = archive.stat().st_size, 0
    with zipfile.ZipFile(archive) as file:
        members = [m for m in file.infolist() if not (_is_of_macos(m.filename) or m.is_dir())]
        for member in members:
            total += member.file_size
            if total > most_bytes(size):
                raise _too_large(archive, member.filename, size)
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: not packed on Unix
                raise _no_file(archive, member.filename)
        for member in tqdm(members, desc=f"unpack {archive.name}", unit="file", delay=2, mininterval=1):
            with file.open(member) as content:
                _write(archive, folder, _inside(archive, member.filename), content)


def _write(archive: Path, folder: Path, path: PurePosixPath, content: IO[bytes]) -> None:
    target = folder / path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("wb")
    except (OSError, ValueError) as error:  # too long, a zero in it, or a file and a folder of one name
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise ArchiveError(f"{archive}: the member {str(path)!r} cannot be written: {error}; {REPACK}") from None
    with out:
        shutil.copyfileobj(content, out)


def _inside(archive: Path, name: str) -> PurePosixPath:
    """The path of a member, below whatever folder it is unpacked into."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in str(path).split("/")[0]:
        raise ArchiveError(f"{archive}: the member {name!r} lies outside of the archive; {REPACK}")
    name.encode()  # UnicodeError
    return path


def _no_file(archive: Path, name: str) -> ArchiveError:
    return ArchiveError(
        f"{archive}: the member {name!r} is a link, a device or the like; data sets have files and folders only. "
        "Pack the archive again with what a link points to in its place"
    )


def _too_large(archive: Path, name: str, size: int) -> ArchiveError:
    return ArchiveError(
        f"{archive}: with the member {name!r} it unpacks to more than {most_bytes(size) / 1e6:.0f} MB, from "
        f"{size / 1e6:.1f} MB; pictures hardly compress, so it is not a data set's. Should that member be of no "
        f"use, {REPACK}"
    )


def _is_of_macos(name: str) -> bool:
    """A file's attributes that macOS packs beside it, under the file's name or suffix: no image."""
    path = PurePosixPath(name)
    return "__MACOSX" in path.parts or path.name.startswith("._")
