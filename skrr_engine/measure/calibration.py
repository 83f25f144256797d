"""The prompts that an encoder is measured and fitted on, as batches of one length."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..encoder.trace import Run


@dataclass(frozen=True)
class Batch:
    """Prompts of one length. run: the encoder's forward on them; prompts: how many; split: makes two batches of it,
    where that is possible (used where a device runs out of memory)."""

    run: Run
    prompts: int
    split: Callable[[], tuple["Batch", "Batch"]] | None = None

    def halves(self) -> Sequence["Batch"]:
        return [self] if self.split is None or self.prompts < 2 else self.split()

FIRST_LOOK, GROWTH = 8, 1.5
"""Prompts that a race measures before its first look, and by how much their number grows from look to look."""


def chunks(order: Sequence[int], sizes: Sequence[int]):
    """The batches of each look: FIRST_LOOK prompts at first, then GROWTH times as many in all from look to look."""
    chunk: list[int] = []
    count, wanted = 0, float(FIRST_LOOK)
    for batch in order:
        chunk.append(batch)
        count += sizes[batch]
        if count >= wanted:
            yield chunk
            chunk, wanted = [], count * GROWTH
    if chunk:
        yield chunk


def grouped(kinds: Sequence, size: Callable[[object], int], race: bool = False) -> Iterator[list[int]]:
    """Positions of prompts of one kind (of one length), which can run together; the lowest kind first.

    kinds: of each prompt; size: how many of a kind may run together. race: in the order of a race instead. The prompts
    of each look are then drawn by lot (the same on every run) from all that are left, whatever their kind, and those of
    one kind in one look run together: were the first batch all of one length, a race would take the candidates that
    short captions like for the best.
    """
    order = list(range(len(kinds)))
    if race:
        random.Random(0).shuffle(order)
    for chunk in chunks(order, [1] * len(order)) if race else [order]:
        alike: dict[object, list[int]] = {}
        for position in chunk:
            alike.setdefault(kinds[position], []).append(position)
        for kind, group in sorted(alike.items()):
            step = max(1, size(kind))
            yield from (group[i : i + step] for i in range(0, len(group), step))
