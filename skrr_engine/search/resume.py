"""The state of a search in a file: written whole or not at all after each step, taken up again by the same search."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..disk.atomic import replacing
from ..errors import SkrrError
from .allocate import Curve, Table
from .skip import SkipList


class StateError(SkrrError):
    """A state that can't be gone on with; one line that says why and what to do."""


D = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Entry(BaseModel):
    """A list of a saved beam."""

    model_config = ConfigDict(strict=True)

    order: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    discrepancy: D
    trail: tuple[D, ...] = ()


class Measured(BaseModel):
    """A place of a saved table; see allocate.Curve."""

    model_config = ConfigDict(strict=True)

    order: tuple[Annotated[int, Field(ge=0)], ...]
    points: Annotated[
        tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]], ...], Field(min_length=1)
    ]


class Saved(BaseModel):
    """What a state's file holds, a beam or a table: untrusted, so each number is checked."""

    model_config = ConfigDict(strict=True)

    key: str
    beam: tuple[Entry, ...] = ()
    table: dict[str, Measured] = {}

    @property
    def curves(self) -> dict[int, Curve]:
        """Of the table. Raises ValueError."""
        found = {int(place): Curve(m.order, m.points) for place, m in self.table.items()}
        if any(sorted(curve.order) != list(range(len(curve.order))) for curve in found.values()):
            raise ValueError("each unit must be there once")
        return found


class State:
    """One search's state. path: its file, which need not exist yet; key: of the search (see `fingerprint`)."""

    def __init__(self, path: str | os.PathLike[str], key: str):
        self.path, self.key = Path(path), key

    def load(self, length: int) -> list[SkipList] | Table:
        """What is saved over `length` sub-blocks: a beam, empty where there is no file, or a table. Raises
        StateError."""
        try:
            saved = Saved.model_validate_json(self.path.read_bytes())
            if any(len({*p.order}) < len(p.order) or max(p.order) >= length for p in saved.beam):
                raise ValueError
            curves = saved.curves
            if max(curves, default=0) >= length or bool(curves) == bool(saved.beam):
                raise ValueError
        except FileNotFoundError:
            return []
        except (OSError, ValueError):
            raise StateError(f"{self.path}: no state of a search; remove it or name another file") from None
        if saved.key != self.key:
            raise StateError(
                f"{self.path}: belongs to a search with another encoder, other prompts or settings; remove it or name"
                " another file"
            )
        if curves:
            return Table(curves)
        return [SkipList(p.order, p.discrepancy, p.trail if len(p.trail) == len(p.order) else ()) for p in saved.beam]

    def save(self, found: Sequence[SkipList] | Table) -> None:
        """Replace the file by one with this beam or table; a crash at any moment leaves the old or the new one.
        Raises WriteError."""
        if isinstance(found, Table):
            held = {"table": {str(i): {"order": c.order, "points": c.points} for i, c in found.curves.items()}}
        else:
            held = {"beam": [{"order": p.order, "discrepancy": p.discrepancy, "trail": p.trail} for p in found]}
        with replacing(self.path) as file:
            file.write(json.dumps({"key": self.key, **held}).encode("ascii"))

    def forget(self) -> None:
        """The search has ended: its plan is written."""
        with contextlib.suppress(OSError):  # one that can't go does not spoil the plan
            self.path.unlink()


SAMPLE = 64
"""Bytes of each tensor that a fingerprint reads."""


def fingerprint(*facts) -> str:
    """SHA-256 over what decides the outcome of a search: numbers, texts, tensors (their kinds, shapes and first bytes),
    containers and generators of these."""
    digest = hashlib.sha256()
    feed(digest, facts)
    return digest.hexdigest()


def feed(digest, value) -> None:
    """Add a value to a digest; see `fingerprint`."""
    if torch.is_tensor(value):
        raw = getattr(value, "_qdata", value).detach()  # comfy_quant keeps its bytes there
        start, length = raw.storage_offset() * raw.element_size(), min(SAMPLE, raw.nbytes)
        sample = torch.empty(0, dtype=torch.uint8, device=raw.device)
        sample.set_(raw.untyped_storage(), start, (length,))
        digest.update(f"{raw.dtype}{list(value.shape)}".encode() + sample.cpu().numpy().tobytes())
    elif isinstance(value, dict):
        feed(digest, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, list | tuple | Iterator):
        digest.update(b"(")
        for part in value:
            feed(digest, part)
        digest.update(b")")
    elif hasattr(value, "weights"):  # ComfyUI's LoRA adapters
        feed(digest, [type(value).__name__, value.weights])
    else:
        plain = isinstance(value, str | int | float | None)
        digest.update((repr(value) if plain else type(value).__name__).encode() + b";")
