"""Encoder files: which of a safetensors file's tensors belong to which sub-block, and pruned files written and checked.

Only headers are read to find out. A pruned file holds the kept tensors, bit for bit, under their own names, and in its
metadata what was left out, by which plan, of which file.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import weakref
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..disk import safetensors as header
from ..disk.atomic import sha256_from
from ..disk.safetensors import DTYPES, Entry, tensor_bytes
from ..encoder import families
from ..errors import SkrrError, first_line
from ..plan.model import EncoderPlan, Plan
from ..plan.text import PlanError
from . import companion as standin_file
from . import sparse
from .companion import Fitted
from .layout import MARKER, MAX_BLOCKS, Layout, layouts_of, matching
from .narrow import Piece, check, narrowing

PLAN, RECORD = "skrr_plan", "skrr"
"""Metadata of a pruned file: the plan's JSON, and JSON of its own (see `Record`)."""
STANDINS = "skrr_standins."
"""What the names of stand-ins in a pruned file begin with, and the name of the metadata that says their norms."""

MAX_RECORD = 4 << 20
AT_ONCE = 4 << 20
"""Bytes that rows are taken from at a time: they stay in the processor's cache."""
GAP = 16 << 10
"""Bytes that are read and thrown away rather than jumped over: that takes as long."""
MARKERS = "_quantization_metadata"
"""Metadata in which a file may say what ComfyUI's markers do."""
MAX_MARKER = 4 << 10
PLAIN_INT8 = "int8_tensorwise"
CHECKPOINT = ("model.diffusion_model.", "first_stage_model.")
"""What names begin with in a whole checkpoint."""
CONNECTORS = tuple(f"model.diffusion_model.{kind}_embeddings_connector." for kind in ("audio", "video"))
BEHIND = ("text_embedding_projection.", *CONNECTORS)
"""What the names of layers behind LTX's text encoder begin with, which may lie in a checkpoint."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


class CheckpointError(SkrrError):
    """An encoder file that can't be used; one line that names the file and the remedy."""


@dataclass(frozen=True)
class Record:
    """What a pruned file says of itself. encoder: name in the plan; skipped: length of the level's prefix; unread:
    further sub-blocks left out because no conditioning reads them; source: `{"name", "sha256"}` of the dense file;
    data_sha256: over the tensors' bytes in file order; dropped: name -> (dtype, shape) of what was left out; blocks: of
    the encoder before others shortened the dense file, 0 where they did not; header_sha256: over what the header
    says (see `_header_sha256`), None in files of before; narrowed: name -> (dtype, shape) in the dense file of what was
    cut to some of its rows or columns; refitted: those of them whose numbers are not the dense file's."""

    encoder: str
    plan: EncoderPlan | None
    skipped: int
    unread: tuple[int, ...]
    source: Mapping[str, str]
    data_sha256: str
    dropped: Mapping[str, Entry]
    blocks: int = 0
    header_sha256: str | None = None
    narrowed: Mapping[str, Entry] = field(default_factory=dict)
    refitted: frozenset[str] = frozenset()


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
        self.sparse, self._packs = sparse.record_of(self.metadata, self.path.name), {}
        entries = self._unpacked(dict(found.entries))
        self._standins = {key for key in entries if key.startswith(STANDINS)}
        entries = {key: entry for key, entry in entries.items() if key not in self._standins}
        self.record = self._read_record(entries)
        left_out = self.record.dropped if self.record else {}
        both = next((key for key in left_out if key in entries), None)
        if both is not None:
            raise self._damaged(f'"{both[:80]}" is said to be left out, but is there')
        narrowed = self.record.narrowed if self.record else {}
        lost = next((key for key, dense in narrowed.items() if not _is_narrower(entries.get(key), dense)), None)
        if lost is not None:
            raise self._damaged(f'"{lost[:80]}" is said to be narrowed, but is not there, or not narrower')
        self.entries = {**entries, **left_out, **narrowed}
        if self.record and self.record.header_sha256 not in (None, _header_sha256(found.entries, self.metadata)):
            raise self._damaged("its header is not what was written")
        places = range(2 * self.known_layout.blocks) if self.known_layout else ()
        if self.record and self.known_layout and not set(self.record.unread) <= set(places):
            raise self._damaged("unread names a sub-block that there is not")

    def _unpacked(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Entries with the dense weights in place of the tensors that packed ones lie in."""
        self._packs, found = sparse.packs(entries, self._raw, self.sparse, self.path.name), {}
        if not self._packs:
            return entries
        parts = {part: name for name, pack in self._packs.items() for part in pack.keys}
        for key, entry in entries.items():
            name = parts.get(key, key)
            found[name] = self._packs[name].dense if name in self._packs else entry
        return found

    @property
    def packed(self) -> Set[str]:
        """Names of the weights whose zeros are not stored."""
        return self._packs.keys()

    def check_packed(self) -> None:
        """Read all packed weights, and see that they are what was written. Raises SkrrError."""
        if self.sparse is not None:
            sparse.verify_sparse(self._file, self._header, self.sparse, self.path.name)
        for key in self._packs:
            self.tensor(key)

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
            narrowed = {str(k): Entry(d, tuple(shape)) for k, (d, shape) in raw.get("narrowed", {}).items()}
            refitted = raw.get("refitted", [])
            if not isinstance(refitted, list) or not {str(key) for key in refitted} <= narrowed.keys():
                raise ValueError("refitted names what is not narrowed")
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
                blocks, None if digest is None else str(digest), narrowed, frozenset(map(str, refitted)),
            )  # fmt: skip
        except (PlanError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise self._damaged(first_line(error)) from None

    def stored(self, key: str) -> Entry:
        """A tensor as it lies in this file: of a narrowed one, what is left of it."""
        return self._packs[key].dense if key in self._packs else self._header.entries[key]

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file, read now, in memory of its own. Of a type that torch lacks: its bytes. A packed weight
        stays so. Raises PackedError where its parts do not agree."""
        return self._packs[key].read(self._raw) if key in self._packs else self._raw(key)

    def _raw(self, key: str) -> torch.Tensor:
        """A tensor as it lies in the file."""
        entry = self._header.entries[key]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._fill(raw, key, [(0, entry.nbytes)])
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape) if entry.dtype in DTYPES else raw

    def piece(self, key: str, piece: Piece) -> torch.Tensor:
        """What stays of a tensor. Of rows nothing else is read, but for what lies between near ones (see GAP)."""
        entry = self.stored(key)
        if piece.dimension or key in self._packs:
            return piece.cut(self.tensor(key))
        row = entry.nbytes // entry.shape[0]
        raw = torch.empty((len(piece.index), row), dtype=torch.uint8)
        between = torch.empty((max(1, AT_ONCE // max(1, row)), row), dtype=torch.uint8)
        _, sizes = (piece.index // len(between)).unique_consecutive(return_counts=True)
        for rows, target in zip(piece.index.split(sizes.tolist()), raw.split(sizes.tolist()), strict=True):
            starts, counts, places = near(rows, GAP // max(1, row))
            read, alone = int(counts.sum()), len(places) == int(counts.sum())
            spans = zip((starts * row).tolist(), (counts * row).tolist(), strict=True)
            self._fill(target if alone else between[:read], key, spans)
            if not alone:
                torch.index_select(between, 0, places, out=target)
        return raw.flatten().view(DTYPES[entry.dtype]).reshape(piece.entry.shape)

    def _fill(self, raw: torch.Tensor, key: str, spans: Iterable[tuple[int, int]]) -> None:
        """Fill bytes in memory with spans (start, length) of a tensor's bytes, one behind the other."""
        raw = raw.flatten()
        view, got, begin = memoryview(raw.numpy()), 0, self._header.starts[key]
        try:
            for start, length in spans:
                self._file.seek(begin + start)
                end = got + length
                while got < end and (count := self._file.readinto(view[got:end])):
                    got += count
                if got < end:
                    break
        except OSError as error:
            raise CheckpointError(
                f"{self.path.name}: can't be read any more ({first_line(error)}); see that its drive is connected, and"
                " run the workflow again"
            ) from None
        if got < len(raw):
            raise CheckpointError(f"{self.path.name}: was cut while it was read; get the file again")

    def start(self, key: str) -> int:
        """Where a tensor begins in the file."""
        return self._header.starts[self._packs[key].keys[0] if key in self._packs else key]

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
    def fitted(self) -> Fitted:
        """The stand-ins and units in a pruned file. Raises StandInError, PlanError; CheckpointError where the file's
        tensors are not what these units leave."""
        record, found = self.record, Fitted()
        level = record.plan.level(record.skipped) if record and record.plan else None
        if level is not None and self._standins:
            check(self.layout, record.plan, record.encoder)
            norms = self.metadata.get(STANDINS, "")
            found = standin_file.checked(self._fetch, norms, self.path.name, record.encoder, record.plan, level)
        if record is not None and (record.narrowed or found.units):
            pieces = narrowing(self.layout, record.plan, level, found.units).pieces if level is not None else {}
            odd = pieces.keys() ^ record.narrowed.keys()
            odd = odd or {key for key, piece in pieces.items() if self.stored(key) != piece.entry}
            if odd:
                raise CheckpointError(f"{self.path.name}: {min(odd)[:80]} does not agree with its plan; save it again")
        return found

    def _fetch(self, key: str) -> torch.Tensor | None:
        """A tensor of the stand-ins or units in a pruned file, None where that is missing, or too large to be one."""
        entry = self._header.entries.get(STANDINS + key)
        return None if entry is None or entry.nbytes > standin_file.MAX_BYTES else self.tensor(STANDINS + key)

    def sha256(self) -> str:
        """Of the whole file."""
        return sha256_from(self._file)

    @functools.cached_property
    def _layouts(self) -> list[Layout]:
        return layouts_of(self.entries, self._rotated)

    @functools.cached_property
    def _rotated(self) -> frozenset[str]:
        """See Layout: int8 of any kind but the plain one, by what ComfyUI's markers say of it ("convrot")."""
        says = {}
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            says = dict(json.loads(self.metadata.get(MARKERS, "{}"))["layers"])
        int8 = {key.removesuffix(".weight") for key, entry in self._header.entries.items() if entry.dtype == "I8"}
        for layer in int8:
            marker = self._header.entries.get(f"{layer}.{MARKER}")
            if marker is not None:
                says[layer] = None
                with contextlib.suppress(ValueError, RecursionError):
                    if marker.nbytes <= MAX_MARKER:
                        says[layer] = json.loads(b"".join(tensor_bytes(self.tensor(f"{layer}.{MARKER}"))))
        plain = {
            layer for layer, own in says.items()
            if isinstance(own, dict) and own.get("format") == PLAIN_INT8 and not own.get("convrot")
        }  # fmt: skip
        return frozenset(int8 & says.keys() - plain)

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
        elif not found and (self.record or any(matching(family, self.entries) for family in families.FAMILIES)):
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
        names = ", ".join(f.name for f in families.FAMILIES)
        raise CheckpointError(
            f"{self.path.name}: no text encoder that Skrr knows ({names}; by ComfyUI's tensor names) in this file"
        )


def near(index: torch.Tensor, gap: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rising numbers as runs over gaps of at most so many: the first of each run, how long it is with its gaps, and
    where each number stands among all runs, one behind the other."""
    far = torch.nn.functional.pad(index.diff() > gap + 1, (1, 0))
    starts = index[far | (torch.arange(len(index)) == 0)]
    ends = index[torch.nn.functional.pad(far[1:], (0, 1), value=True)]
    counts = ends - starts + 1
    run = far.cumsum(0)
    return starts, counts, index - starts[run] + (counts.cumsum(0) - counts)[run]


def _is_narrower(entry: Entry | None, dense: Entry) -> bool:
    """Whether a tensor in a file can be some of the rows or columns of a dense one."""
    if entry is None or entry.dtype != dense.dtype or len(entry.shape) != len(dense.shape):
        return False
    odd = [i for i, (own, whole) in enumerate(zip(entry.shape, dense.shape, strict=True)) if own != whole]
    return len(odd) == 1 and odd[0] < 2 and 0 < entry.shape[odd[0]] < dense.shape[odd[0]]


def resealed(entries: Mapping[str, Entry], metadata: Mapping[str, str], data_sha256: str) -> dict[str, str]:
    """The metadata of a pruned file whose tensors are stored otherwise now: the hashes in its record are theirs."""
    if RECORD not in metadata:
        return dict(metadata)
    record = {**json.loads(metadata[RECORD]), "data_sha256": data_sha256, "header_sha256": "0" * 64}
    found = {**metadata, RECORD: json.dumps(record, separators=(",", ":"))}
    record["header_sha256"] = _header_sha256(entries, found)
    return {**found, RECORD: json.dumps(record, separators=(",", ":"))}


def _header_sha256(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what the header of a pruned file says: its tensors in their order, from which their places follow, and
    Skrr's own metadata. What others add to the metadata is theirs."""
    own = {key: metadata[key] for key in (PLAN, STANDINS) if key in metadata}
    record = {key: value for key, value in json.loads(metadata[RECORD]).items() if key != "header_sha256"}
    tensors = [(key, entry.dtype, entry.shape) for key, entry in entries.items()]
    return hashlib.sha256(json.dumps([tensors, own, record], sort_keys=True).encode()).hexdigest()
