"""Files written whole or not at all, under names of their own, and hashed in pieces."""

import contextlib
import errno
import hashlib
import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import SkrrError, first_line

CHUNK = 16 << 20
ABANDONED = 3600  # seconds without a write after which a partial file has no writer any more
PARTIAL = (".skrr-", ".partial")  # what the names of partial files begin and end with

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what only writing fails with
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space on that disk, or choose another place"),
    errno.EFBIG: "that disk takes no file so large; choose another place",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow writing there, or choose another place"),
}


class WriteError(OSError, SkrrError):
    """A file that can't be written; one line that names it, the cause and the remedy."""

    def __str__(self) -> str:
        remedy = REMEDIES.get(self.errno, "choose another place")
        return f"{self.filename}: cannot be written ({self.strerror}); {remedy}"

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str]) -> "WriteError":
        """The same error of a file that the user knows."""
        return cls(error.errno, error.strerror or first_line(error), str(path))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]):
    """Errors of the operating system become WriteErrors that name `path`; FileExistsError stays."""
    try:
        yield
    except (WriteError, FileExistsError):
        raise
    except OSError as error:
        raise WriteError.of(error, path) from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]):
    """A new binary file that takes the place of `path` when the block ends well, and is gone when it does not. What
    killed processes have left in the folder is removed. Raises WriteError, FileNotFoundError."""
    path = Path(path)
    partial = path.with_name(uuid.uuid4().hex.join(PARTIAL))
    try:
        file = partial.open("xb")
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist; make it first", str(path)) from None
    except OSError as error:
        raise WriteError.of(error, path) from None
    try:
        with file:
            remove_abandoned(path.parent, os.fstat(file.fileno()).st_mtime)
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            os.replace(partial, path)
    except OSError as error:
        # what the block reads has errors of its own
        if error.errno in FULL and not isinstance(error, WriteError):
            raise WriteError.of(error, path) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def unnamed(path: str | os.PathLike[str], kind: str = ""):
    """The path of a file in the making beside `path`, which gets a name (see `claim`) once it is whole; it is gone when
    the block ends without. kind: begins its name, where other than `remove_abandoned` is to clear it up."""
    partial = Path(path).with_name(f"{kind}{uuid.uuid4().hex}".join(PARTIAL))
    try:
        yield partial
    except WriteError as error:
        raise WriteError.of(error, path) from None
    finally:
        partial.unlink(missing_ok=True)


def claim(partial: Path, path: Path) -> None:
    """Give a whole file its name. Raises FileExistsError where that is taken: nothing is written over, whoever else
    claims names at the same moment; WriteError."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: exFAT, some network drives
        with writing(path):
            path.open("xb").close()
            try:
                os.replace(partial, path)
            except OSError:
                path.unlink(missing_ok=True)
                raise


def numbered(folder: Path, stem: str, ending: str) -> Iterator[Path]:
    """`stem`, `stem_2`, `stem_3`, ... in a folder."""
    yield folder / f"{stem}{ending}"
    for number in itertools.count(2):
        yield folder / f"{stem}_{number}{ending}"


def remove_abandoned(folder: Path, now: float) -> None:
    """Remove partial files that nobody has written to for an hour. now: by the clock of the folder's own file system,
    which may be another machine's."""
    for left in abandoned(folder, now):
        with contextlib.suppress(OSError):  # one that is gone already, or can't go, does not hinder the write
            left.unlink()


def abandoned(folder: Path, now: float, kind: str = "[0-9a-f]") -> list[Path]:
    """Partial files that nobody has written to for an hour. kind: see `unnamed`; by default those of none."""
    found = []
    with contextlib.suppress(OSError):
        for left in list(folder.glob(f"{kind}*".join(PARTIAL))):
            with contextlib.suppress(OSError):
                if left.lstat().st_mtime < now - ABANDONED:
                    found.append(left)
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return sha256_from(file)


def sha256_from(file: BinaryIO, start: int = 0) -> str:
    """SHA-256 of an opened file from byte `start` on, read in pieces."""
    digest = hashlib.sha256()
    file.seek(start)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
