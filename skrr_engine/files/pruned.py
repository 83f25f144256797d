"""Pruned encoder files, written and checked."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch

from .. import __version__
from ..disk import safetensors as header
from ..disk.atomic import replacing
from ..disk.safetensors import NAMES, Entry, tensor_bytes
from ..plan.model import EncoderPlan, Level, Plan
from . import companion as standin_file
from .companion import Fitted
from .encoder_file import PLAN, RECORD, STANDINS, Checkpoint, CheckpointError, Record, _header_sha256, resealed
from .layout import Layout
from .narrow import Piece, check, narrowing
from .sparse import write_sparse


class Source(Protocol):
    """What a pruned file is written from: a Checkpoint, or an encoder in memory."""

    path: Path
    record: "Record | None"
    metadata: Mapping[str, str]
    entries: "Mapping[str, Entry]"
    layout: "Layout"
    packed: "Collection[str]"

    def tensor(self, key: str) -> torch.Tensor: ...
    def piece(self, key: str, piece: Piece) -> torch.Tensor: ...
    def sha256(self) -> str: ...
    def check_unchanged(self) -> None: ...


def write_pruned(
    source: "Source",
    out: str | os.PathLike[str],
    name: str,
    plan: Plan | None,
    skipped: int = 0,
    unread: Collection[int] = (),
    fitted: Fitted = Fitted(),  # noqa: B008 - frozen
    blocks: int = 0,
    spare: Collection[str] = (),
    refitted: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Write a copy of an encoder's file without what a plan's level skips; returns the bytes written.

    name: the plan's entry for this encoder; skipped: the level; unread: further sub-blocks to leave out; fitted: the
    level's stand-ins and units, to be written along; refitted: name -> tensor that takes the place of what is left of
    that one, of its shape and type; blocks: of the whole encoder, where others have shortened the file; spare: names of
    tensors that this encoder does not use. Streamed, one tensor in memory at a time; written whole or not at all.
    Without the units that the level needs, the encoder stays whole. Raises CheckpointError, PlanError, OSError.
    """
    if source.record is not None:
        raise CheckpointError(f"{source.path.name} is pruned already: start from {source.record.source['name']}")
    layout, gone, pieces = source.layout.extended(blocks), set(unread), {}
    if plan is not None:
        entry = plan.encoder(name)
        check(layout, entry, name)
        level = entry.level(skipped)
        gone = removed(entry, level, fitted, gone)
        pieces = narrowing(layout, entry, level, fitted.units).pieces
        pieces = {key: piece for key, piece in pieces.items() if key not in spare}
        wanted = level.standins.ranks.keys() if level.standins else set()
        if (fitted.standins or fitted.units) and fitted.standins.keys() != wanted:
            raise CheckpointError(f"{name}: stand-ins of other places than the level's: give all that its file holds")
    extra, more = {}, {}
    if fitted.standins or fitted.units:
        tensors, more[STANDINS] = standin_file.packed({name: {skipped: fitted.standins}}, {name: fitted.units})
        extra = {STANDINS + key: tensor for key, tensor in tensors.items()}
    left_out = layout.dropped(gone)
    own = dict(refitted or {})
    check_refitted(own, pieces, source.path.name)
    if Path(out).exists() and Path(out).samefile(source.path):
        raise CheckpointError(f"{out} is the source file: choose another name")
    record = {
        "format": "skrr-encoder",
        "version": 1,
        "created_with": f"skrr {__version__}",
        "encoder": name,
        "skipped": skipped if plan is not None else 0,
        "unread": sorted(int(i) for i in unread if i in gone),
        "source": {"name": source.path.name, "sha256": source.sha256()},
        "data_sha256": "0" * 64,
        **({"blocks": layout.blocks} if layout.blocks > source.layout.blocks else {}),
        "header_sha256": "0" * 64,
        "dropped": {key: [layout.entries[key].dtype, layout.entries[key].shape] for key in sorted(left_out)},
        **(
            {"narrowed": {key: [layout.entries[key].dtype, layout.entries[key].shape] for key in sorted(pieces)}}
            if pieces
            else {}
        ),
        **({"refitted": sorted(own)} if own else {}),
    }
    metadata = {**source.metadata, **more, RECORD: json.dumps(record, separators=(",", ":"))}
    if plan is not None:
        metadata[PLAN] = plan.to_json()
    # As safetensors' own writer has it, so that every tensor starts at a multiple of its element size.
    entries = {key: source.entries[key] for key in layout.used - set(spare)}
    entries |= {key: piece.entry for key, piece in pieces.items()}
    entries |= {key: Entry(NAMES[t.dtype], tuple(t.shape)) for key, t in extra.items()}
    kept = sorted(entries.keys() - left_out, key=lambda k: (-entries[k].itemsize, k))
    listed = {key: entries[key] for key in kept}

    def written_as(key: str) -> torch.Tensor:
        if key in extra or key in own:
            return extra[key] if key in extra else own[key]
        return source.piece(key, pieces[key]) if key in pieces else source.tensor(key)

    if source.packed:
        tensors = ((key, written_as(key)) for key in kept)
        return write_sparse(
            out, tensors, "text encoder", metadata=metadata, check=source.check_unchanged, seal=resealed
        )
    with replacing(out) as file:
        file.write(header.write(listed, metadata))
        digest = hashlib.sha256()
        for key in kept:
            for chunk in tensor_bytes(written_as(key)):
                digest.update(chunk)
                file.write(chunk)
        source.check_unchanged()
        written = file.tell()
        record["data_sha256"] = digest.hexdigest()
        record["header_sha256"] = _header_sha256(listed, {**metadata, RECORD: json.dumps(record)})
        metadata[RECORD] = json.dumps(record, separators=(",", ":"))
        file.seek(0)
        file.write(header.write(listed, metadata))  # as long as the first one
    return written


def removed(entry: EncoderPlan, level: Level, fitted: Fitted, unread: Collection[int]) -> set[int]:
    """The sub-blocks that are wholly gone at a level; of its own none where the units that it needs are missing. Unread
    ones that it narrows, or that others re-use, stay."""
    left = entry.left(level) if entry.narrowed(level).keys() <= fitted.units.keys() else {}
    gone = {place for place, units in left.items() if not units}
    return (gone | set(unread)) - set(level.reuse.values()) - (left.keys() - gone)


def check_refitted(own: Mapping[str, torch.Tensor], pieces: Mapping[str, Piece], source: str) -> None:
    """Raises CheckpointError where a refitted tensor is not of the shape and type of what it takes the place of."""
    for key, tensor in own.items():
        kind = NAMES.get(tensor.dtype), tuple(tensor.shape)
        if key not in pieces or kind != (pieces[key].entry.dtype, pieces[key].entry.shape):
            raise CheckpointError(f"{source}: {key[:80]} can't be refitted; save it without refit")


def verify(path: str | os.PathLike[str]) -> Checkpoint:
    """Check a pruned file: its metadata, that exactly the right tensors are left out, and every byte of the others; and
    one with packed weights, whose parts must agree, too.

    What its header says is compared with its hash already when it is opened; files of before have none
    (`record.header_sha256` is None). Returns it opened. Raises SkrrError.
    """
    found = Checkpoint(path)
    found.check_packed()
    record = found.record
    if record is None and found.packed:
        return found
    if record is None:
        raise CheckpointError(f"{found.path.name}: not a file that Skrr has pruned; nothing to verify")
    layout, gone = found.layout, set(record.unread)
    fitted = found.fitted  # raises where it is not what the plan names, or not what the tensors are
    if record.plan is not None:
        check(layout, record.plan, record.encoder)
        gone = removed(record.plan, record.plan.level(record.skipped), fitted, gone)
    if not gone.issuperset(record.unread):
        raise CheckpointError(f"{found.path.name}: unread names a sub-block that is there; save it again")
    wrong = layout.dropped(gone) ^ set(record.dropped)
    if wrong:
        raise CheckpointError(f"{found.path.name}: {min(wrong)[:80]} does not agree with its plan; save it again")
    if found.data_sha256() != record.data_sha256:
        raise CheckpointError(f"{found.path.name}: its tensors are not what was written; get the file again")
    return found
