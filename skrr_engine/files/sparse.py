"""Files with packed weights: written in one pass, one tensor in memory at a time, and what they say of themselves."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .. import __version__
from ..disk import safetensors as header
from ..disk.atomic import CHUNK, replacing, sha256_from, writing
from ..disk.safetensors import NAMES, Entry, tensor_bytes
from ..errors import SkrrError, first_line, printable
from ..weights.packed import PARTS, checked
from ..weights.tensor import PackedWeight

RECORD = "skrr_sparse"
"""Metadata of a file with packed weights, JSON; see SparseRecord."""
KINDS = ("text encoder", "diffusion model", "checkpoint")
MAX_RECORD = 4 << 20
WEIGHT = ".weight"


class SparseError(SkrrError):
    """A file with packed weights that can't be read or written; one line that names it and the remedy."""


@dataclass(frozen=True)
class SparseRecord:
    """What such a file says of itself. kind: one of KINDS; method, sparsity: how it was pruned, where that is known;
    shapes: name -> shape, of packed weights that are no matrices; data_sha256: over the tensors' bytes in file order;
    header_sha256: over what the header says (see `header_sha256`). Files of other writers have none."""

    kind: str
    method: str
    sparsity: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]
    data_sha256: str
    header_sha256: str


def record_of(metadata: Mapping[str, str], file: str) -> SparseRecord | None:
    """The record in a file's metadata, None where there is none. file: its name. Raises SparseError."""
    if RECORD not in metadata:
        return None
    try:
        if len(metadata[RECORD]) > MAX_RECORD:
            raise ValueError(f"longer than {MAX_RECORD} characters")
        raw = json.loads(metadata[RECORD])
        if raw["kind"] not in KINDS:
            raise ValueError("no kind that there is")
        shapes = {str(k): Entry("U8", tuple(shape)).shape for k, shape in raw["shapes"].items()}
        sparsity = {str(k)[:100]: float(share) for k, share in raw["sparsity"].items()}
        texts = (str(raw[key])[:100] for key in ("data_sha256", "header_sha256"))
        return SparseRecord(raw["kind"], str(raw["method"])[:100], sparsity, shapes, *texts)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = printable(first_line(error))
        raise SparseError(f"{file}: {RECORD} in its metadata is damaged ({what}); save it again") from None


@dataclass(frozen=True)
class Pack:
    """A packed weight in a file. name: its module's; keys: of its tensors, in the order of PARTS; dense: the weight."""

    name: str
    keys: tuple[str, ...]
    dense: Entry

    def read(self, tensor: Callable[[str], torch.Tensor]) -> PackedWeight:
        """The weight. tensor: reads one of the file's. Raises PackedError."""
        parts = {part: tensor(key) for part, key in zip(PARTS, self.keys, strict=True)}
        return PackedWeight.of(checked(self.name, parts, self.dense.shape))


def packs(
    entries: Mapping[str, Entry], tensor: Callable[[str], torch.Tensor], record: SparseRecord | None, file: str
) -> dict[str, Pack]:
    """Name of a weight -> where it lies, of all packed ones in a file. tensor: reads one of its tensors, of which only
    the shapes are read. Raises SparseError where a part is missing or there is no such weight."""
    found = {}
    for key, bits in entries.items():
        module, _, part = key.rpartition(".")
        if part != "bitmask" or f"{module}.compressed" not in entries:
            continue
        keys, name = tuple(f"{module}.{part}" for part in PARTS), module + WEIGHT
        lost = next((part for part in keys if part not in entries), None)
        if lost is not None or name in entries:
            what = f"without {lost[-80:]}" if lost else f"{name[-80:]} is there twice"
            raise SparseError(f"{file}: a packed weight {printable(what)}; get the file again")
        shape = entries[keys[2]]
        if shape.dtype != "I64" or len(shape.shape) != 1 or not 1 <= shape.count <= 8 or not bits.shape:
            raise SparseError(f"{file}: {printable(keys[2][-80:])} is no shape; get the file again")
        own = tuple(tensor(keys[2]).tolist())
        try:
            dense = Entry(entries[keys[0]].dtype, record.shapes.get(name, own) if record else own)
            if dense.count != Entry("U8", own).count:
                raise ValueError("two shapes that are not of one size")
        except ValueError as error:
            raise SparseError(f"{file}: {printable(name[-80:])}: {error}; get the file again") from None
        found[name] = Pack(module, keys, dense)
    return found


def write_sparse(
    out: Path | str, tensors: Iterable[tuple[str, torch.Tensor]], kind: str, method: str = "",
    sparsity: Mapping[str, float] | None = None, metadata: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None, seal: Callable = lambda entries, metadata, digest: metadata,
) -> int:  # fmt: skip
    """Write tensors, packed weights among them, into a safetensors file; returns its bytes.

    tensors: (name, tensor), each once, and let go of when it is written; kind, method, sparsity: see SparseRecord;
    metadata: more of it; check: called when all are read, raises where their source has changed; seal: (tensors in
    their order, metadata, data_sha256) -> metadata of the same length. Written whole or not at all; until then what is
    there lies in unnamed files beside `out`. Raises SparseError, OSError.
    """
    out, entries, shapes = Path(out), {}, {}
    with contextlib.ExitStack() as stack:
        spools: dict[int, BinaryIO] = {}
        for name, tensor in tensors:
            for key, part in parts_of(name, tensor, shapes).items():
                if key in entries or part.dtype not in NAMES:
                    what = "stands twice" if key in entries else f"is of type {part.dtype}, which files have not"
                    raise SparseError(f"{printable(key[-80:])} {what}: it can't be saved packed; save it dense")
                entries[key] = Entry(NAMES[part.dtype], tuple(part.shape))
                size = entries[key].itemsize
                with writing(out):
                    if size not in spools:
                        spools[size] = stack.enter_context(tempfile.TemporaryFile(dir=out.parent))
                    for chunk in tensor_bytes(part):
                        spools[size].write(chunk)
        check()
        listed = {k: e for size in sorted(spools, reverse=True) for k, e in entries.items() if e.itemsize == size}
        record = {
            "format": "skrr-sparse", "version": 1, "created_with": f"skrr {__version__}", "kind": kind,
            "method": method, "sparsity": dict(sparsity or {}), "shapes": shapes, "data_sha256": "0" * 64,
            "header_sha256": "0" * 64,
        }  # fmt: skip
        text = {"format": "pt", **(metadata or {}), RECORD: json.dumps(record, separators=(",", ":"))}
        file = stack.enter_context(replacing(out))
        file.write(header.write(listed, text))
        digest = hashlib.sha256()
        for size in sorted(spools, reverse=True):
            spools[size].seek(0)
            while chunk := spools[size].read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
        written = file.tell()
        record["data_sha256"] = digest.hexdigest()
        record["header_sha256"] = header_sha256(listed, json.dumps(record))
        text = seal(listed, text, digest.hexdigest())
        text[RECORD] = json.dumps(record, separators=(",", ":"))
        file.seek(0)
        file.write(header.write(listed, text))  # as long as the first one
    return written


def parts_of(name: str, tensor: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Key -> tensor on the CPU, as a file has them; notes the shape of what is no matrix in `shapes`."""
    if isinstance(tensor, PackedWeight):
        own = tensor.pristine()
        if own.held.wrap is not None:
            raise SparseError(f"{printable(name[-80:])} is quantised in a way that can't be saved packed: sparsify its"
                              " file of 16 bit, or of plain or scaled fp8")  # fmt: skip
        if own.packed is not None and name.endswith(WEIGHT):
            if len(own.shape) != 2:
                shapes[name] = tuple(own.shape)
            return {f"{name.removesuffix(WEIGHT)}.{part}": t for part, t in own.packed.stored().items()}
        tensor = own.dense()
    if hasattr(tensor, "_qdata") or hasattr(tensor, "tensor_type"):
        raise SparseError(f"{printable(name[-80:])} is quantised in a way that can't be saved: take its file of 16 bit")
    return {name: tensor.detach().cpu()}


def header_sha256(entries: Mapping[str, Entry], record: str) -> str:
    """SHA-256 of a file's tensors in their order, from which their places follow, and of its record, JSON."""
    own = {key: value for key, value in json.loads(record).items() if key != "header_sha256"}
    tensors = [(key, entry.dtype, entry.shape) for key, entry in entries.items()]
    return hashlib.sha256(json.dumps([tensors, own], sort_keys=True).encode()).hexdigest()


def verify_sparse(file: BinaryIO, found: header.Header, record: SparseRecord, name: str) -> None:
    """Raises SparseError where a file's bytes, or what its header says, are not what was written."""
    if header_sha256(found.entries, found.metadata[RECORD]) != record.header_sha256:
        raise SparseError(f"{name}: its header is not what was written; get the file again")
    if sha256_from(file, found.data) != record.data_sha256:
        raise SparseError(f"{name}: its tensors are not what was written; get the file again")
