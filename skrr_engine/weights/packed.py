"""Weights whose zeros are not stored: the values that are left, and a bit for each place.

In files they have the layout of the `compressed-tensors` library's sparse bitmask (its versions up to 0.13 read it):
beside a module's other tensors `compressed` (the values, row by row), `bitmask` (`[rows, ceil(columns / 8)]`, lowest
bit first), `shape` and `row_offsets` (where each row's values begin). A weight of more than two dimensions is stored as
a matrix of its first dimension by all others: the library itself spends a byte on each three places of a 3x3 kernel.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import SkrrError, printable

PARTS = ("compressed", "bitmask", "shape", "row_offsets")
"""What the names of a packed weight's tensors end with, behind its module's; in place of `weight`."""

AT_ONCE = 1 << 14
"""Bytes of the mask that a CPU unpacks at a time: what comes of them stays in its cache."""

GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, it has them as the bits of the highest one."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types that values are moved in, by their bytes: torch has few operations for floats of 8 bits."""


class PackedError(SkrrError):
    """A packed weight that can't be used; one line that names it and the remedy."""


@dataclass(frozen=True)
class Packed:
    """A weight without its zeros. values: `[kept]`, in the order of the dense weight, row by row; mask: `[rows,
    ceil(columns / 8)]`, uint8, a bit for each place, 0 behind a row's last column; shape: of the dense weight."""

    values: torch.Tensor
    mask: torch.Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def count(self) -> int:
        """Places of the dense weight."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.count // max(1, self.mask.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.values.nbytes + self.mask.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that it would take dense."""
        return self.count * self.values.itemsize

    def to(self, device: torch.device | None = None, non_blocking: bool = False, copy: bool = False) -> "Packed":
        """The same on a device."""
        values, mask = (t.to(device=device, non_blocking=non_blocking, copy=copy) for t in (self.values, self.mask))
        return Packed(values, mask, self.shape)

    def unpack(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight, of its own type or another; it is moved to the device packed, and unpacked there."""
        own = self if device is None else self.to(torch.device(device))
        found = own._unpacked()
        return found if dtype is None else found.to(dtype)

    def _unpacked(self) -> torch.Tensor:
        """Each byte of the mask says where its eight places are among the values that begin with it."""
        device, rows = self.mask.device, self.mask.shape[0]
        spread, within, counts = _tables(device)
        mask = self.mask.flatten().int()
        begin = counts.index_select(0, mask).cumsum(0, dtype=torch.int32)
        begin -= counts.index_select(0, mask)
        values = self.values.view(INTEGERS[self.values.itemsize])
        values = torch.nn.functional.pad(values, (0, 8))  # zeros in the last byte look behind the last value
        found = torch.empty(8 * len(mask), dtype=values.dtype, device=device)
        step = AT_ONCE if device.type == "cpu" else max(1, len(mask))
        for start in range(0, len(mask), step):
            bits, part = mask[start : start + step], found[8 * start : 8 * (start + step)]
            offsets = within.index_select(0, bits).view(torch.uint8).view(-1, 8)
            places = (begin[start : start + step, None] + offsets).flatten()
            torch.index_select(values, 0, places, out=part)
            part.mul_(spread.index_select(0, bits).view(torch.int8))
        found = found.view(self.dtype)
        if 8 * self.mask.shape[1] != self.columns:
            found = found.view(INTEGERS[self.values.itemsize]).view(rows, -1)[:, : self.columns].contiguous()
            found = found.view(self.dtype)
        return found.view(self.shape)

    def row_counts(self) -> torch.Tensor:
        """Values in each row, `[rows]`, int64."""
        counts = _tables(self.mask.device)[2]
        return counts.index_select(0, self.mask.flatten().int()).view(self.mask.shape).sum(1)

    def stored(self) -> dict[str, torch.Tensor]:
        """Its tensors as files have them, by the ends of their names (see PARTS), on the CPU."""
        counts = self.row_counts()
        return {
            "compressed": self.values.cpu(),
            "bitmask": self.mask.cpu(),
            "shape": torch.tensor([self.mask.shape[0], self.columns]),
            "row_offsets": (counts.cumsum(0) - counts).cpu(),
        }


def pack(weight: torch.Tensor) -> Packed:
    """A weight without its zeros, on the CPU. weight: of at least one dimension, in any type that torch counts as
    floating point."""
    weight = weight.detach().cpu().contiguous()
    kept = nonzero(weight).view(max(1, weight.shape[0]) if weight.ndim > 1 else 1, -1)
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8)).view(torch.int64)
    bits = ((padded * GATHER) >> 56).to(torch.uint8)
    values = weight.view(INTEGERS[weight.itemsize]).flatten()[kept.flatten()].view(weight.dtype)
    return Packed(values, bits.contiguous(), tuple(weight.shape))


def nonzero(weight: torch.Tensor) -> torch.Tensor:
    """Where a weight is not zero; torch compares no floats of 8 bits on every device."""
    if weight.itemsize > 1:
        return weight != 0
    raw = weight.view(torch.uint8)
    return raw != 0 if "fnuz" in str(weight.dtype) else raw & 0x7F != 0  # there 0x80 is no zero


def pays(packed: Packed) -> bool:
    """Whether a weight takes fewer bytes in a file packed than dense."""
    return packed.nbytes + 8 * (packed.mask.shape[0] + 2) < packed.dense_nbytes


def checked(name: str, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...] | None = None) -> Packed:
    """A packed weight as a file has it. name: its module's; parts: its tensors by the ends of their names; shape: of
    the dense weight, where that is not a matrix. Raises PackedError where they do not agree."""

    def wrong(what: str) -> PackedError:
        return PackedError(f"{printable(name[:80])}: its packed weight is damaged ({what}); get the file again")

    if missing := [part for part in PARTS if part not in parts]:
        raise wrong(f"without {missing[0]}")
    values, mask, own, offsets = (parts[part] for part in PARTS)
    if values.ndim != 1 or not values.dtype.is_floating_point:
        raise wrong("its compressed values are no list of floating-point numbers")
    if own.dtype != torch.int64 or own.ndim != 1 or not 1 <= len(own) <= 8 or mask.dtype != torch.uint8:
        raise wrong("its shape or bitmask is of a wrong type")
    stored = tuple(own.tolist())
    if min(stored) < 1 or math.prod(stored) > 1 << 40:
        raise wrong("an impossible shape")
    if tuple(mask.shape) != (*stored[:-1], -(-stored[-1] // 8)):
        raise wrong("its bitmask is not of its shape")
    if shape is not None and math.prod(shape) != math.prod(stored):
        raise wrong("its shape is not that of its weight")
    found = Packed(values, mask.reshape(-1, mask.shape[-1]), stored if shape is None else tuple(shape))
    if stored[-1] % 8 and bool((found.mask[:, -1] >> stored[-1] % 8).any()):
        raise wrong("bits behind the end of a row")
    counts = found.row_counts()
    if int(counts.sum()) != len(values):
        raise wrong(f"{int(counts.sum())} bits for {len(values)} values")
    counts = counts.view(stored[:-1] or (1,))  # the library counts along the first dimension alone
    if offsets.dtype != torch.int64 or not torch.equal(offsets.flatten(), (counts.cumsum(0) - counts).flatten()):
        raise wrong("row_offsets do not agree with its bitmask")
    return found


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each byte of a mask: its bits as eight bytes of 0 or 1, how many of them are set before each of the eight,
    both in an int64, and how many are set at all, int32."""
    with torch.inference_mode(False):  # they are used in and outside of it
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        before = bits.cumsum(1) - bits
        spread, within = (t.to(torch.uint8).view(torch.int64).flatten().to(device) for t in (bits, before))
        return spread, within, bits.sum(1).to(torch.int32).to(device)
