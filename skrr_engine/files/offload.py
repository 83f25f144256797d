"""Encoders larger than memory: sub-blocks' weights stay in their safetensors files and come in when they are used.

The walk is layer-major, so that a sub-block comes in once per batch of prompts for all candidates together.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..disk import safetensors
from ..disk.safetensors import Entry
from ..encoder.row import EncoderError, Row
from .layout import layout_of


class Files:
    """Tensors in safetensors files, read without mapping them: what is read counts, once, as what it is read into."""

    def __init__(self, paths: Iterable[Path]):
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, tuple[Path, int]] = {}
        for path in paths:
            try:
                with open(path, "rb") as file:
                    header = safetensors.read(file, path.stat().st_size)
            except ValueError as error:
                raise EncoderError(f"{path}: can't be read as safetensors ({error}); get the file again") from None
            self.entries |= header.entries
            self._starts |= {key: (path, start) for key, start in header.starts.items()}

    def elements(self) -> int:
        """Of all tensors that the encoder uses, together."""
        layout = layout_of(self.entries)
        return sum(entry.count for entry in (layout.entries if layout else self.entries).values())

    def read(self, key: str) -> torch.Tensor:
        """A tensor on the CPU, in pages of its own, which go back to the system with it."""
        entry, (path, start) = self.entries[key], self._starts[key]
        if entry.dtype not in safetensors.DTYPES:
            raise EncoderError(f"{path}: {key} is of type {entry.dtype}, which is not read here; get another file")
        dtype = safetensors.DTYPES[entry.dtype]
        if not entry.count:
            return torch.empty(entry.shape, dtype=dtype)
        pages = mmap.mmap(-1, entry.nbytes)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            read, view = 0, memoryview(pages)
            while read < len(view):
                count = file.readinto(view[read:])
                if not count:
                    raise EncoderError(f"{path}: ends too early; get the whole file")
                read += count
        return torch.frombuffer(pages, dtype=dtype).reshape(entry.shape)


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
