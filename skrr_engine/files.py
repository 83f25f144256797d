"""Files written whole or not at all, and hashed in pieces."""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

CHUNK = 16 << 20


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]):
    """A new binary file that takes the place of `path` when the block ends well, and is gone when it does not. Raises
    OSError."""
    path = Path(path)
    partial = path.with_name(f".skrr-{uuid.uuid4().hex}.partial")  # as long whatever the name is, and nobody else's
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path, start: int = 0) -> str:
    """SHA-256 of a file from byte `start` on, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
