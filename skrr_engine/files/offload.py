"""Encoders larger than memory: sub-blocks' weights stay in their safetensors files and come in when they are used.

The walk is layer-major, so that a sub-block comes in once per batch of prompts for all candidates together.
"""

import json
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..disk.safetensors import Entry
from ..encoder.row import EncoderError, Row
from .layout import layout_of

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Files:
    """Tensors in safetensors files, read without mapping them: what is read counts, once, as what it is read into."""

    def __init__(self, paths: Iterable[Path]):
        self.tensors: dict[str, tuple[Path, int, torch.dtype, list[int]]] = {}
        for path in paths:
            try:
                with open(path, "rb") as file:
                    length = int.from_bytes(file.read(8), "little")
                    if length > path.stat().st_size:
                        raise ValueError
                    header = json.loads(file.read(length))
                for key, entry in header.items():
                    if key != "__metadata__":
                        start = 8 + length + entry["data_offsets"][0]
                        self.tensors[key] = path, start, DTYPES[entry["dtype"]], entry["shape"]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                raise EncoderError(f"{path}: can't be read as safetensors; get the file again") from None

    def elements(self) -> int:
        """Of all tensors that the encoder uses, together."""
        layout = layout_of({key: Entry("U8", tuple(shape)) for key, (_, _, _, shape) in self.tensors.items()})
        used = layout.entries if layout else self.tensors
        return sum(torch.Size(self.tensors[key][3]).numel() for key in used)

    def read(self, key: str) -> torch.Tensor:
        """A tensor on the CPU, in pages of its own, which go back to the system with it."""
        path, start, dtype, shape = self.tensors[key]
        elements = torch.Size(shape).numel()
        if not elements:
            return torch.empty(shape, dtype=dtype)
        pages = mmap.mmap(-1, elements * dtype.itemsize)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            read, view = 0, memoryview(pages)
            while read < len(view):
                count = file.readinto(view[read:])
                if not count:
                    raise EncoderError(f"{path}: ends too early; get the whole file")
                read += count
        return torch.frombuffer(pages, dtype=dtype).reshape(shape)


def weight_bytes(tensors: Iterable[torch.Tensor], itemsize: int) -> int:
    """Bytes of tensors once they are read: until then their own type is whatever the blank encoder was made in."""
    return sum(t.numel() for t in tensors) * itemsize


class Stream:
    """Brings sub-blocks' weights in when they are used, and lets go of those unused for longest.

    row: of an encoder whose sub-blocks' weights may be anything; read: state-dict key below the encoder -> its tensor,
    on the device and in the type wanted; capacity: bytes of weights held at once (at least one sub-block is); itemsize:
    bytes of an element of that type.
    """

    def __init__(self, row: Row, read: Callable[[str], torch.Tensor], capacity: int, itemsize: int):
        self.row, self.read, self.capacity, self.itemsize = row, read, capacity, itemsize
        self._held: OrderedDict[int, int] = OrderedDict()
        row.parameter_counts  # noqa: B018 -- counted while the shapes are all there
        for sub_block in row.sub_blocks:
            self._let_go(sub_block.index)
            for part in sub_block.parts.values():
                part.register_forward_pre_hook(lambda module, args, index=sub_block.index: self.bring(index))

    def bring(self, index: int) -> None:
        """Have a sub-block's weights in memory."""
        if index in self._held:
            self._held.move_to_end(index)
            return
        tensors = self.row.sub_blocks[index].tensors()
        size = weight_bytes(tensors.values(), self.itemsize)
        while self._held and sum(self._held.values()) + size > self.capacity:
            self._let_go(self._held.popitem(last=False)[0])
        for key, tensor in tensors.items():
            tensor.data = self.read(key)
        self._held[index] = size

    def _let_go(self, index: int) -> None:
        for tensor in self.row.sub_blocks[index].tensors().values():
            tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)  # the shape stays, without the bytes
