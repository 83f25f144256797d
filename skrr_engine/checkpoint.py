"""Encoder files: which of a safetensors file's tensors belong to which sub-block, and pruned files written and checked.

Only headers are read to find out. A pruned file holds the kept tensors, bit for bit, under their own names, and in its
metadata what was left out, by which plan, of which file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import weakref
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from . import __version__, families, header, standin_file
from .errors import SkrrError, first_line
from .files import CHUNK, replacing, sha256_from
from .header import DTYPES, NAMES, Entry
from .plan import EncoderPlan, Plan, PlanError
from .repair import StandIn

PLAN, RECORD = "skrr_plan", "skrr"
"""Metadata of a pruned file: the plan's JSON, and JSON of its own (see `Record`)."""
STANDINS = "skrr_standins."
"""What the names of stand-ins in a pruned file begin with, and the name of the metadata that says their norms."""

MAX_RECORD = 4 << 20
MAX_BLOCKS = 1000

PARAMETERS = (".weight", ".bias")
"""What the names of parameters end with: a scale, a marker or a tokenizer is none."""
ALIAS = ("model.language_model.", "model.")
"""How encoders that also see name their text part, and how ComfyUI's text encoders do."""
CHECKPOINT = ("model.diffusion_model.", "first_stage_model.")
"""What names begin with in a whole checkpoint."""
CONNECTORS = tuple(f"model.diffusion_model.{kind}_embeddings_connector." for kind in ("audio", "video"))
BEHIND = ("text_embedding_projection.", *CONNECTORS)
"""What the names of layers behind LTX's text encoder begin with, which may lie in a checkpoint."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


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


class CheckpointError(SkrrError):
    """An encoder file that can't be used; one line that names the file and the remedy."""


@dataclass(frozen=True)
class Layout:
    """A file's encoder as a row of sub-blocks. keys: for each sub-block the tensors that go away with it, none where a
    file that others have shortened lacks it; entries: all of the encoder's tensors, those that a pruned file has left
    out included, but nothing that no text encoder uses (a decoder, a tower that sees, the embedding again); prefix:
    what stands before their names in this file; extras: what ComfyUI reads beside them (tokenizer, markers)."""

    family: str
    blocks: int
    width: int
    keys: tuple[tuple[str, ...], ...]
    entries: Mapping[str, Entry]
    prefix: str = ""
    extras: frozenset[str] = frozenset()

    @functools.cached_property
    def parameter_counts(self) -> tuple[int, ...]:
        """Weights of each sub-block."""
        return tuple(sum(self._parameters(key) for key in keys) for keys in self.keys)

    @functools.cached_property
    def sub_block_bytes(self) -> tuple[int, ...]:
        """Bytes of each sub-block."""
        return tuple(sum(self.entries[key].nbytes for key in keys) for keys in self.keys)

    @functools.cached_property
    def total(self) -> int:
        """Weights of the encoder, dense."""
        return sum(self._parameters(key) for key in self.entries)

    def _parameters(self, key: str) -> int:
        entry = self.entries[key]  # a weight of bytes without a type holds two in each (4 bits)
        return entry.count * (2 if entry.dtype == "U8" else 1) if key.endswith(PARAMETERS) else 0

    @functools.cached_property
    def total_bytes(self) -> int:
        """Bytes of the encoder, dense."""
        return sum(entry.nbytes for entry in self.entries.values())

    def sparsity(self, skipped) -> float:
        """Removed parameters over all encoder parameters."""
        return sum(self.parameter_counts[i] for i in skipped) / self.total

    @property
    def used(self) -> Set[str]:
        """Names of all tensors of the file that its encoder or its tokenizer is made of."""
        return self.entries.keys() | self.extras

    def name(self, key: str) -> str:
        """The name that ComfyUI's encoder has for a tensor of this file."""
        own = key.removeprefix(self.prefix)
        return ALIAS[1] + own.removeprefix(ALIAS[0]) if own.startswith(ALIAS[0]) else own

    def place(self, name: str) -> int | None:
        """The sub-block that a tensor goes away with, by its name in ComfyUI's encoder; also one that the file lacks (a
        scale, say)."""
        family = families.by_name(self.family)
        found = family.FILE_KEY.fullmatch(name)
        if found is None or int(found["block"]) >= self.blocks or _stays(family, found, self.entries):
            return None
        return 2 * int(found["block"]) + (found["feed_forward"] is not None)

    def dropped(self, skipped) -> set[str]:
        """Names of the tensors that go away with these sub-blocks."""
        return {key for index in skipped for key in self.keys[index]}

    def extended(self, blocks: int) -> "Layout":
        """This encoder as the one of so many blocks that it was before others cut off its last ones."""
        missing = max(0, blocks - self.blocks)
        return dataclasses.replace(self, blocks=self.blocks + missing, keys=self.keys + ((),) * (2 * missing))


@dataclass(frozen=True)
class Record:
    """What a pruned file says of itself. encoder: name in the plan; skipped: length of the level's prefix; unread:
    further sub-blocks left out because no conditioning reads them; source: `{"name", "sha256"}` of the dense file;
    data_sha256: over the tensors' bytes in file order; dropped: name -> (dtype, shape) of what was left out; blocks: of
    the encoder before others shortened the dense file, 0 where they did not; header_sha256: over what the header
    says (see `_header_sha256`), None in files of before."""

    encoder: str
    plan: EncoderPlan | None
    skipped: int
    unread: tuple[int, ...]
    source: Mapping[str, str]
    data_sha256: str
    dropped: Mapping[str, Entry]
    blocks: int = 0
    header_sha256: str | None = None


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was opened: by this it is known again. modified: in nanoseconds; header_sha256: of the
    header's bytes."""

    path: str
    size: int
    modified: int
    header_sha256: str


class Checkpoint:
    """A safetensors file of one text encoder, opened once: header and tensors are read through one handle, so that a
    file which takes its place meanwhile is never mixed in. Tensors are read when asked for.

    Raises CheckpointError where the file is no whole safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
            weakref.finalize(self, self._file.close)
            status = os.fstat(self._file.fileno())
            found = header.read(self._file, status.st_size)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path.name}: not a whole safetensors file ({first_line(error)}); get or convert it again"
            ) from None
        digest = hashlib.sha256(found.text).hexdigest()
        self.stamp = Stamp(str(self.path), status.st_size, status.st_mtime_ns, digest)
        self._header, self.metadata = found, dict(found.metadata)
        entries = dict(found.entries)
        self._standins = {key for key in entries if key.startswith(STANDINS)}
        entries = {key: entry for key, entry in entries.items() if key not in self._standins}
        self.record = self._read_record(entries)
        left_out = self.record.dropped if self.record else {}
        both = next((key for key in left_out if key in entries), None)
        if both is not None:
            raise self._damaged(f'"{both[:80]}" is said to be left out, but is there')
        self.entries = {**entries, **left_out}
        if self.record and self.record.header_sha256 not in (None, _header_sha256(found.entries, self.metadata)):
            raise self._damaged("its header is not what was written")
        places = range(2 * self.known_layout.blocks) if self.known_layout else ()
        if self.record and self.known_layout and not set(self.record.unread) <= set(places):
            raise self._damaged("unread names a sub-block that there is not")

    def _damaged(self, what: str) -> CheckpointError:
        where = f"{self.path.name}: its Skrr metadata is damaged"
        return CheckpointError(f"{where} ({what}); save it again from the dense file")

    def _read_record(self, entries: Mapping[str, Entry]) -> Record | None:
        if RECORD not in self.metadata:
            return None
        text = self.metadata[RECORD]
        try:
            if len(text) > MAX_RECORD:
                raise ValueError(f"longer than {MAX_RECORD} characters")
            raw = json.loads(text)
            dropped = {str(k): Entry(d, tuple(shape), False) for k, (d, shape) in raw["dropped"].items()}
            plan = (
                Plan.from_json(self.metadata[PLAN], self.path.name).encoder(raw["encoder"]) if raw["skipped"] else None
            )
            if plan is not None:
                plan.level(raw["skipped"])
            unread = tuple(raw["unread"])
            if not all(type(i) is int for i in unread) or len(set(unread)) < len(unread):
                raise ValueError("unread is no list of different numbers")
            digest = raw.get("header_sha256")
            source = {key: str(raw["source"][key])[:200] for key in ("name", "sha256")}
            blocks = int(raw.get("blocks", 0))
            if not 0 <= blocks <= MAX_BLOCKS:
                raise ValueError(f"an encoder of {blocks} blocks")
            return Record(
                str(raw["encoder"]), plan, int(raw["skipped"]), unread, source, str(raw["data_sha256"]), dropped,
                blocks, None if digest is None else str(digest),
            )  # fmt: skip
        except (PlanError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise self._damaged(first_line(error)) from None

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file, read now, in memory of its own. Of a type that torch lacks: its bytes."""
        entry = self._header.entries[key]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        try:
            self._file.seek(self._header.starts[key])
            view, got = memoryview(raw.numpy()), 0
            while got < entry.nbytes and (count := self._file.readinto(view[got:])):
                got += count
        except OSError as error:
            raise CheckpointError(
                f"{self.path.name}: can't be read any more ({first_line(error)}); see that its drive is connected, and"
                " run the workflow again"
            ) from None
        if got < entry.nbytes:
            raise CheckpointError(f"{self.path.name}: was cut while it was read; get the file again")
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape) if entry.dtype in DTYPES else raw

    def start(self, key: str) -> int:
        """Where a tensor begins in the file."""
        return self._header.starts[key]

    def data_sha256(self) -> str:
        """Of the bytes of all tensors."""
        return sha256_from(self._file, self._header.data)

    def check_unchanged(self) -> None:
        """Raises CheckpointError where the file has changed since it was opened, or is gone."""
        opened, now = os.fstat(self._file.fileno()), None
        with contextlib.suppress(OSError):
            now = self.path.stat()
        if now is None:
            raise CheckpointError(f"{self.path.name}: is gone; put it back, and run the workflow again")
        same = os.path.samestat(opened, now)
        if not same or (now.st_size, now.st_mtime_ns) != (self.stamp.size, self.stamp.modified):
            raise CheckpointError(f"{self.path.name}: was changed while it was read; run the workflow again")

    @classmethod
    def again(cls, stamp: Stamp) -> "Checkpoint":
        """The file that was opened before, opened once more. Raises CheckpointError where it is another one now."""
        name = os.path.basename(stamp.path)
        if not os.path.isfile(stamp.path):
            raise CheckpointError(f"{name}: is gone since it was loaded; put it back, and run the workflow again")
        found = cls(stamp.path)
        if found.stamp != stamp:
            raise CheckpointError(
                f"{name}: was changed since it was loaded, and is not what is on the canvas; run the workflow again"
            )
        return found

    @functools.cached_property
    def standins(self) -> dict[int, StandIn]:
        """The stand-ins in a pruned file, by the places that they repair. Raises StandInError."""
        record = self.record
        level = record.plan.level(record.skipped) if record and record.plan else None
        if level is None or level.standins is None or not self._standins:
            return {}

        def fetch(key: str) -> torch.Tensor | None:
            return self.tensor(STANDINS + key) if STANDINS + key in self._standins else None

        layout, norms = self.layout, self.metadata.get(STANDINS, "")
        record.plan.check(layout.family, layout.blocks, layout.width, record.encoder)
        return standin_file.checked(fetch, norms, self.path.name, record.encoder, record.plan, level)

    def sha256(self) -> str:
        """Of the whole file."""
        return sha256_from(self._file)

    @functools.cached_property
    def _layouts(self) -> list[Layout]:
        return layouts_of(self.entries)

    @functools.cached_property
    def known_layout(self) -> Layout | None:
        """The encoder in this file, None where it is none that Skrr knows."""
        found = self._layouts
        return found[0].extended(self.record.blocks if self.record else 0) if len(found) == 1 else None

    @functools.cached_property
    def problem(self) -> str | None:
        """What makes this file something else than one whole encoder, and what to do, in a line; None where it is one,
        or of an architecture that Skrr does not know."""
        shard, found = SHARD.search(self.path.name), self._layouts
        if shard and int(shard[2]) > 1:
            what = (
                f"part {int(shard[1])} of {int(shard[2])} of an encoder in several files, which ComfyUI does not load:"
                " get the encoder as one file"
            )
        elif self._is_checkpoint:
            what = "a whole checkpoint: load it with Load Checkpoint and put Load Skrr Plan behind it"
        elif len(found) > 1:
            names = ", ".join(f"{layout.family} under {layout.prefix or 'no prefix'}" for layout in found)
            what = f"holds {len(found)} text encoders ({names}): get each as a file of its own"
        elif not found and (self.record or any(_matches(family, self.entries) for family in families.FAMILIES)):
            what = "parts of this text encoder are missing; get the file again"
        else:
            return None
        return f"{self.path.name}: {what}"

    @property
    def _is_checkpoint(self) -> bool:
        """Whether this is a whole checkpoint, but for one that holds what ComfyUI puts behind LTX's text encoder."""
        return self._is_whole and (bool(self._layouts) or not any(key.startswith(BEHIND[0]) for key in self.entries))

    @functools.cached_property
    def _is_whole(self) -> bool:
        return any(key.startswith(CHECKPOINT) for key in self.entries)

    @property
    def used(self) -> Set[str]:
        """Names of the tensors that ComfyUI makes a text encoder of: all, where Skrr does not know the architecture."""
        if self.known_layout is not None:
            return self.known_layout.used
        return {key for key in self.entries if key.startswith(BEHIND)} if self._is_whole else self.entries.keys()

    @property
    def layout(self) -> Layout:
        """The encoder in this file. Raises CheckpointError where there is none that Skrr knows."""
        if self.problem is not None:
            raise CheckpointError(self.problem)
        if self.known_layout is not None:
            return self.known_layout
        names = ", ".join(f.NAME for f in families.FAMILIES)
        raise CheckpointError(
            f"{self.path.name}: no text encoder that Skrr knows ({names}; by ComfyUI's tensor names) in this file"
        )


def layout_of(entries: Mapping[str, Entry]) -> Layout | None:
    """See tensors as the one encoder of a family that the engine knows, or None."""
    found = layouts_of(entries)
    return found[0] if len(found) == 1 else None


def layouts_of(entries: Mapping[str, Entry]) -> list[Layout]:
    """All encoders among these tensors that are whole and of a family that the engine knows."""
    found: dict[str, Layout] = {}
    for family in families.FAMILIES:
        for prefix, matches in _matches(family, entries).items():
            layout = None if prefix in found else _layout(family, prefix, matches, entries)
            if layout is not None:
                found[prefix] = layout
    return list(found.values())


def _matches(family, entries: Collection[str]) -> dict[str, dict[str, re.Match]]:
    """The tensors of blocks that a family may have, by what stands before their names; blocks that hold anything that
    the family's do not are another architecture's."""
    found: dict[str, dict[str, re.Match]] = {}
    for key in entries:
        if match := family.FILE_KEY.fullmatch(key):
            found.setdefault(match["prefix"], {})[key] = match
    return {prefix: own for prefix, own in found.items() if not any(match["other"] for match in own.values())}


def _layout(family, prefix: str, matches: Mapping[str, re.Match], entries: Mapping[str, Entry]) -> Layout | None:
    """See the tensors under a prefix as one family's encoder, or None."""
    ends = "." + family.FILE_WIDTH
    norms = [found for key, found in matches.items() if key.endswith(ends) and found["block"] == "0"]
    if len(norms) != 1 or len(entries[norms[0].string].shape) != 1:
        return None
    blocks = 1 + max(int(m["block"]) for m in matches.values())
    if blocks > len(matches):
        return None
    keys: list[list[str]] = [[] for _ in range(2 * blocks)]
    for key, found in matches.items():
        if not _stays(family, found, matches):
            keys[2 * int(found["block"]) + (found["feed_forward"] is not None)].append(key)
    if not all(keys):
        return None
    names = {key: key.removeprefix(prefix) for key in entries if key.startswith(prefix)}
    own = {
        key: entries[key]
        for key, name in names.items()
        if "." in name and not family.FILE_UNUSED.fullmatch(name) and not _again(name, names.values())
    }
    extras = frozenset(key for key in entries if "." not in names.get(key, key))
    return Layout(family.NAME, blocks, entries[norms[0].string].shape[0], tuple(map(tuple, keys)), own, prefix, extras)


def _again(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is the embedding once more, as T5 files often hold it."""
    return name == "encoder.embed_tokens.weight" and "shared.weight" in names


def _stays(family, found: re.Match, keys: Collection[str]) -> bool:
    """Whether a tensor within a sub-block belongs to the whole encoder all the same (T5's position bias)."""
    return hasattr(family, "stays") and family.stays(int(found["block"]), found["rest"], keys)


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


def _header_sha256(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what the header of a pruned file says: its tensors in their order, from which their places follow, and
    Skrr's own metadata. What others add to the metadata is theirs."""
    own = {key: metadata[key] for key in (PLAN, STANDINS) if key in metadata}
    record = {key: value for key, value in json.loads(metadata[RECORD]).items() if key != "header_sha256"}
    tensors = [(key, entry.dtype, entry.shape) for key, entry in entries.items()]
    return hashlib.sha256(json.dumps([tensors, own, record], sort_keys=True).encode()).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, in pieces."""
    flat = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    view = memoryview(flat.numpy())
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


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
