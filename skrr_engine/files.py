"""Files written whole or not at all, and hashed in pieces."""

import contextlib
import errno
import hashlib
import os
import uuid
from pathlib import Path
from typing import BinaryIO

CHUNK = 16 << 20
ABANDONED = 3600  # seconds without a write after which a partial file has no writer any more


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]):
    """A new binary file that takes the place of `path` when the block ends well, and is gone when it does not. What a
    killed process has left of the same file is removed. Raises OSError."""
    path = Path(path)
    # As long whatever the name is, known as this target's, and nobody else's.
    prefix = f".skrr-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"
    partial = path.with_name(f"{prefix}{uuid.uuid4().hex}.partial")
    try:
        file = partial.open("xb")
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist; make it first", str(path)) from None
    try:
        with file:
            remove_abandoned(path.parent, prefix, os.fstat(file.fileno()).st_mtime)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path, prefix: str, now: float) -> None:
    """Remove partial files that nobody has written to for an hour. now: by the clock of the folder's own file system,
    which may be another machine's."""
    with contextlib.suppress(OSError):
        for left in list(folder.glob(f"{prefix}*.partial")):
            with contextlib.suppress(OSError):  # one that is gone already, or can't go, does not hinder the write
                if left.lstat().st_mtime < now - ABANDONED:
                    left.unlink()


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
