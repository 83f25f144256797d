"""The safetensors format: dtypes, headers and bytes of tensors."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch

from .atomic import CHUNK

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64,
    "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element, by the name that safetensors has for its type."""

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES = {name: getattr(torch, dtype) for name, dtype in _TORCH.items() if hasattr(torch, dtype)}
"""Those that the installed torch has an element of whole bytes for; others are read as bytes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000
MAX_BYTES = 1 << 48
MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. dtype: as safetensors names it; shape; kept: False where a pruned file has left it out.

    Raises ValueError for a type that there is not, and for a shape that no file can hold.
    """

    dtype: str
    shape: tuple[int, ...]
    kept: bool = True

    def __post_init__(self):
        if self.dtype not in BITS:
            raise ValueError(f'unknown type "{str(self.dtype)[:20]}"')
        if len(self.shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in self.shape):
            raise ValueError("a tensor of impossible shape")
        # Without the zeros: torch multiplies in 64 bits, one by one.
        if math.prod(n for n in self.shape if n) * BITS[self.dtype] > 8 * MAX_BYTES:
            raise ValueError("a tensor of impossible shape")
        if self.count * BITS[self.dtype] % 8:
            raise ValueError("a tensor that ends within a byte")

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return max(1, BITS[self.dtype] // 8)

    @property
    def nbytes(self) -> int:
        return self.count * BITS[self.dtype] // 8

    def stand_in(self) -> torch.Tensor:
        """A tensor of this dtype and shape that takes a few bytes, for code that looks at both."""
        return torch.zeros((), dtype=DTYPES.get(self.dtype, torch.uint8)).expand(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself. metadata: its texts; entries: its tensors, in the order of their bytes; starts: where
    each begins in the file; data: where the first does; text: the header's own bytes."""

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    starts: Mapping[str, int]
    data: int
    text: bytes


def read(file: BinaryIO, size: int) -> Header:
    """The header of an opened file of `size` bytes. Raises ValueError where the file is no whole safetensors file: its
    tensors must follow each other without gaps, and fill the file to its end."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError("its header is not whole")
    text = file.read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise ValueError("its header is not whole" if len(text) < length else "its header is no JSON object")
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    metadata = raw.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    # Tensors without bytes share their place with the next one: in the header's own order, as they were written.
    found = sorted(((*_span(value), key, value) for key, value in raw.items()), key=lambda item: item[:2])
    entries, starts, end = {}, {}, 0
    for first, last, key, value in found:
        entry = Entry(value["dtype"], tuple(value["shape"]))
        if first != end or last - first != entry.nbytes:
            raise ValueError(f'the place of "{key[:80]}" is wrong')
        entries[key], starts[key], end = entry, 8 + length + first, last
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes long, but its tensors end at {8 + length + end}")
    return Header(metadata, entries, starts, 8 + length, text)


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _span(value) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, behind the header."""
    if not isinstance(value, dict) or not value.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor is described wrongly in its header")
    span = value["data_offsets"]
    well = isinstance(value["shape"], list) and isinstance(value["dtype"], str) and isinstance(span, list)
    if not well or len(span) != 2 or not all(type(n) is int and n >= 0 for n in span):
        raise ValueError("a tensor is described wrongly in its header")
    return span[0], span[1]


def write(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """A header for these tensors, laid out one after the other."""
    header: dict = {"__metadata__": dict(metadata)}
    offset = 0
    for key, entry in entries.items():
        span = [offset, offset + entry.nbytes]
        header[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, in pieces."""
    flat = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    view = memoryview(flat.numpy())
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]
