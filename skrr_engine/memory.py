"""How much memory a search may take, and stores that stay within their share of it."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container's limits (version 2)."""


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that a search may take by default: a quarter of the RAM that is free now, nine tenths of the free VRAM."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    import psutil

    return min(psutil.virtual_memory().available, free_in_container()) // 4


def free_in_container() -> int:
    """Bytes that the container which this process may run in lets it still take; as good as no end where none does.
    What it holds of files counts as free: it goes when room is needed."""
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        files = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(files["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no container, or "max"
        return sys.maxsize


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device has run out of memory: CUDA has a class for it, its libraries, MPS and the
    CPU's allocator only a text."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    sayings = ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed")
    return any(saying in text for saying in sayings)


def retried(act: Callable[[], T], shrink: Callable[[], bool]) -> T:
    """What `act` returns; where the device runs out of memory, it is tried again for as long as `shrink` says that this
    makes sense. `shrink` is called when the failed try's tensors are gone: while an error is handled, its frames, and
    all that they hold, stay."""
    while True:
        try:
            return act()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            failed = error.with_traceback(None)
        if not shrink():
            raise failed


def batch_tokens(memory: int, width: int, device: torch.device | str = "cpu") -> int:
    """Tokens in a batch: as many as keep the device busy (races want small batches), fewer where a 64th of the memory
    holds fewer residual streams of this width."""
    busy = 2048 if torch.device(device).type == "cuda" else 512
    return max(1, min(busy, memory // 64 // (4 * width)))


def nbytes(value, seen: set[int] | None = None) -> int:
    """Bytes of the tensors in a value: a tensor, a container or a dataclass; what is held twice counts once."""
    seen = set() if seen is None else seen
    if torch.is_tensor(value):
        new = value.data_ptr() not in seen
        seen.add(value.data_ptr())
        return value.nbytes if new else 0
    if isinstance(value, dict):
        return sum(nbytes(part, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(nbytes(part, seen) for part in value)
    return nbytes(vars(value), seen) if is_dataclass(value) else 0


class Store:
    """Values that can be had again, held up to `capacity` bytes.

    Where there is no more room, values that were not used since the turn before the last one go, else the new one is
    not held: values in use would push each other out in turn, and none would ever be found.
    """

    def __init__(self, capacity: int):
        self.capacity, self.used, self._turn = capacity, 0, 0
        self._held: OrderedDict[Hashable, tuple[object, int, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def turn(self) -> None:
        """Another round of use begins."""
        self._turn += 1

    def get(self, key: Hashable, make: Callable[[], object] | None = None):
        """The value of a key; where it is not held, what `make` gives, held from now on if it fits."""
        if key not in self._held and make is not None:
            value = make()
            self.put(key, value)
            return value
        value, size, _ = self._held.pop(key)
        self._held[key] = value, size, self._turn
        return value

    def put(self, key: Hashable, value) -> None:
        """Hold a value if there is room, and none is held under this key."""
        if key in self._held:
            return
        size = nbytes(value)
        while self.used + size > self.capacity and self._held:
            oldest = next(iter(self._held))
            if self._held[oldest][2] >= self._turn - 1:
                return
            self.used -= self._held.pop(oldest)[1]
        if size <= self.capacity:
            self._held[key] = value, size, self._turn
            self.used += size

    def drop(self, chosen: Callable[[Hashable], bool]) -> None:
        """Let go of the values with such keys."""
        for key in [key for key in self._held if chosen(key)]:
            self.used -= self._held.pop(key)[1]

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self.used = 0
