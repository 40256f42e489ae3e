"""Archives to folders, refusing whatever would write outside of them."""

import errno
import lzma
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}  # not the file's

# A RuntimeError is zipfile's for a password and for a compression that it does not know, a TypeError gzip's for a
# header cut short, an OSError bz2's, and zipfile's where damage makes it seek to before the file's begin.
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    TypeError,
    OSError,
)


class ArchiveError(ValueError):
    """An archive that is damaged, or has a member that does not belong in a data set."""


def unpack(archive: Path, folder: Path, inner: str | None = None) -> None:
    """Unpack a tar (of any compression) or zip archive into `folder`; with `inner`, then unpack the archive of
    that name in it, and remove it. Raises ArchiveError, naming the member, for paths or links out of `folder`
    and for devices, and for damage; OSError when the disk does not take what comes."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            with archive.open("rb") as stream:
                unpack_tar(stream, folder, archive.name)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise ArchiveError(f"{archive}: not a whole archive: {error}") from None
    if inner:
        found = sorted(folder.rglob(inner))
        if found:
            unpack(found[0], found[0].parent)
            found[0].unlink()


def unpack_tar(stream: IO[bytes], folder: Path, title: str) -> None:
    """Unpack the tar in `stream` into `folder`, under the rules of Python's "data" filter (PEP 706)."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tqdm(tar, desc=f"unpack {title}", unit="file", delay=2, mininterval=1):
            if not _is_of_macos(member.name):
                tar.extract(member, folder, filter="data")


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in tqdm(file.infolist(), desc=f"unpack {archive.name}", unit="file", delay=2, mininterval=1):
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in str(path).split("/")[0]:
                raise ArchiveError(f"{archive}: the member {member.filename!r} lies outside of the archive")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ArchiveError(f"{archive}: the member {member.filename!r} is a link")
            if not _is_of_macos(member.filename):
                file.extract(member, folder)


def _is_of_macos(name: str) -> bool:
    """A file's attributes that macOS packs beside it, under the file's name or suffix: no image."""
    path = PurePosixPath(name)
    return "__MACOSX" in path.parts or path.name.startswith("._")
