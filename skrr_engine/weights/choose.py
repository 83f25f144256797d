"""The lowest of many scores, to the very number of them, the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch


def spread(count: int, sizes: Sequence[int]) -> list[int]:
    """A count divided among parts by their sizes, to whole numbers that add up to it. count: at most all sizes."""
    total, ends, seen = max(sum(sizes), 1), [0], 0
    for size in sizes:
        seen += size
        ends.append(count * seen // total)
    return [after - before for before, after in zip(ends, ends[1:], strict=False)]


def lowest(look: Callable[[], Iterable[torch.Tensor]], count: int) -> Iterator[torch.Tensor]:
    """Masks of the `count` lowest of all scores together, bool, tensor by tensor.

    look: gives the scores (float32, >= 0), one tensor after the other; it is called three times, so that no more than
    one tensor need be held. Of equal scores at the threshold those go that lie evenly among them.
    """
    # Floats that are not negative are in the order of their bits: the threshold's are found half by half.
    high, left, _ = _nth((_bits(scores) >> 16 for scores in look()), count)
    halves = (bits[bits >> 16 == high] & 0xFFFF for bits in map(_bits, look()))
    low, left, ties = _nth(halves, left)
    threshold, seen = high << 16 | low, 0
    for scores in look():
        bits = _bits(scores)
        gone = bits < threshold
        tied = (bits == threshold).nonzero().flatten()
        number = torch.arange(seen, seen + len(tied), device=tied.device)
        gone[tied] = (number + 1) * left // ties > number * left // ties
        seen += len(tied)
        yield gone.reshape(scores.shape)


def _bits(scores: torch.Tensor) -> torch.Tensor:
    return scores.contiguous().view(torch.int32).flatten()


def _nth(halves: Iterable[torch.Tensor], count: int) -> tuple[int, int, int]:
    """The smallest number (of 16 bits) that `count` are at or below, how many of those equal to it are among them, and
    how many equal it."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for half in halves:
        counts += torch.bincount(half, minlength=1 << 16).cpu()
    ends = counts.cumsum(0)
    found = int(torch.searchsorted(ends, max(count, 1)))
    found = min(found, (1 << 16) - 1)
    return found, max(0, count - int(ends[found] - counts[found])), max(1, int(counts[found]))


def lowest_of_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the lowest scores in each row of a weight `[rows, ...]`: `count` in all, as many in each row, or one
    more. Of equal ones the first go."""
    flat = scores.reshape(len(scores), -1)
    counts = torch.tensor(spread(count, [flat.shape[1]] * len(flat)), device=flat.device)
    order = flat.argsort(dim=1, stable=True)
    first = torch.arange(flat.shape[1], device=flat.device) < counts.unsqueeze(1)
    return torch.empty_like(first).scatter_(1, order, first).reshape(scores.shape)
