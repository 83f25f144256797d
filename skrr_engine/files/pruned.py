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
from ..encoder.standin import StandIn
from ..plan.model import Plan
from . import companion as standin_file
from .encoder_file import PLAN, RECORD, STANDINS, Checkpoint, CheckpointError, Record, _header_sha256
from .layout import Layout


class Source(Protocol):
    """What a pruned file is written from: a Checkpoint, or an encoder in memory."""

    path: Path
    record: "Record | None"
    metadata: Mapping[str, str]
    entries: "Mapping[str, Entry]"
    layout: "Layout"

    def tensor(self, key: str) -> torch.Tensor: ...
    def sha256(self) -> str: ...
    def check_unchanged(self) -> None: ...


def write_pruned(
    source: "Source",
    out: str | os.PathLike[str],
    name: str,
    plan: Plan | None,
    skipped: int = 0,
    unread: Collection[int] = (),
    standins: Mapping[int, StandIn] | None = None,
    blocks: int = 0,
    spare: Collection[str] = (),
) -> int:
    """Write a copy of an encoder's file without what a plan's level skips; returns the bytes written.

    name: the plan's entry for this encoder; skipped: the level; unread: further sub-blocks to leave out; standins: the
    level's, to be written along; blocks: of the whole encoder, where others have shortened the file; spare: names of
    tensors that this encoder does not use. Streamed, one tensor in memory at a time; written whole or not at all.
    Raises CheckpointError, PlanError, OSError.
    """
    if source.record is not None:
        raise CheckpointError(f"{source.path.name} is pruned already: start from {source.record.source['name']}")
    layout, gone = source.layout.extended(blocks), set(unread)
    if plan is not None:
        entry = plan.encoder(name)
        entry.check(layout.family, layout.blocks, layout.width, name)
        level = entry.level(skipped)
        gone |= set(entry.order[:skipped])
        gone -= set(level.reuse.values())
    extra, more = {}, {}
    if standins:
        tensors, more[STANDINS] = standin_file.packed({name: {skipped: standins}})
        extra = {STANDINS + key: tensor for key, tensor in tensors.items()}
    left_out = layout.dropped(gone)
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
    }
    metadata = {**source.metadata, **more, RECORD: json.dumps(record, separators=(",", ":"))}
    if plan is not None:
        metadata[PLAN] = plan.to_json()
    # As safetensors' own writer has it, so that every tensor starts at a multiple of its element size.
    entries = {key: source.entries[key] for key in layout.used - set(spare)}
    entries |= {key: Entry(NAMES[t.dtype], tuple(t.shape)) for key, t in extra.items()}
    kept = sorted(entries.keys() - left_out, key=lambda k: (-entries[k].itemsize, k))
    listed = {key: entries[key] for key in kept}
    with replacing(out) as file:
        file.write(header.write(listed, metadata))
        digest = hashlib.sha256()
        for key in kept:
            for chunk in tensor_bytes(extra[key] if key in extra else source.tensor(key)):
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


def verify(path: str | os.PathLike[str]) -> Checkpoint:
    """Check a pruned file: its metadata, that exactly the right tensors are left out, and every byte of the others.

    What its header says is compared with its hash already when it is opened; files of before have none
    (`record.header_sha256` is None). Returns it opened. Raises CheckpointError.
    """
    found = Checkpoint(path)
    record = found.record
    if record is None:
        raise CheckpointError(f"{found.path.name}: not a file that Skrr has pruned; nothing to verify")
    layout = found.layout
    gone = set(record.unread)
    if record.plan is not None:
        record.plan.check(layout.family, layout.blocks, layout.width, record.encoder)
        level = record.plan.level(record.skipped)
        gone |= set(record.plan.order[: record.skipped])
        gone -= set(level.reuse.values())
    wrong = layout.dropped(gone) ^ set(record.dropped)
    if wrong:
        raise CheckpointError(f"{found.path.name}: {min(wrong)[:80]} does not agree with its plan; save it again")
    _ = found.standins  # raises where they are not what the plan names
    if found.data_sha256() != record.data_sha256:
        raise CheckpointError(f"{found.path.name}: its tensors are not what was written; get the file again")
    return found
