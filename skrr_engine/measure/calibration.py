"""The prompts that an encoder is measured and fitted on, as batches of one length."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..encoder.trace import Run, Trace, Tracer
from ..memory import Store, free_memory


@dataclass(frozen=True)
class Batch:
    """Prompts of one length. run: the encoder's forward on them; prompts: how many; split: makes two batches of it,
    where that is possible (used where a device runs out of memory)."""

    run: Run
    prompts: int
    split: Callable[[], tuple["Batch", "Batch"]] | None = None

    def halves(self) -> Sequence["Batch"]:
        return [self] if self.split is None or self.prompts < 2 else self.split()


class Calibration:
    """The prompts that an encoder is measured or fitted on: embedded, traced, halved where a device runs out of memory.

    encoder: the dense encoder, as `Batch.run` takes it; never changed. tracer: of the encoder whose sub-blocks are left
    out: the same, or a twin of it in another precision. batches: of the prompts, in the order in which a race sees them
    (see `grouped`); null: of the empty prompt. memory: bytes that all work on these prompts may take beside the encoder
    (None: see memory.free_memory); what does not fit is computed again when it is needed.

    Batches are numbered, 0 is the null prompt's. Each may have come to consist of several pieces.
    """

    def __init__(
        self, encoder: nn.Module, tracer: Tracer, batches: Sequence[Batch], null: Batch, memory: int | None = None
    ):
        self.encoder, self.tracer = encoder, tracer
        self.memory = free_memory(next(encoder.parameters()).device) if memory is None else memory
        self.pieces = [[batch] for batch in (null, *batches)]
        self._traces = Store(self.memory // 8)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def held(self) -> int:
        """Bytes of the traces that are held."""
        return self._traces.used

    @property
    def device(self) -> torch.device:
        """Where it computes; the weights may lie elsewhere."""
        return self.trace(0).x.device

    def batches(self) -> tuple[list[Batch], Batch]:
        """The prompts' batches and the null prompt's, as they are split now."""
        null, *others = self.pieces
        return [piece for pieces in others for piece in pieces], null[0]

    def trace(self, batch: int, piece: int = 0) -> Trace:
        """A piece of a batch, embedded."""
        return self._traces.get((batch, piece), lambda: self.tracer.trace(self.pieces[batch][piece].run))

    def traces(self) -> Iterator[Trace]:
        """All prompts but the null prompt, embedded."""
        for batch in range(1, len(self.pieces)):
            for piece in range(len(self.pieces[batch])):
                yield self.trace(batch, piece)

    def tokens(self, batch: int) -> int:
        """Number of tokens that a sub-block's forward on this batch takes."""
        return sum(self.trace(batch, piece).x.shape[:2].numel() for piece in range(len(self.pieces[batch])))

    def readable(self) -> int:
        """How many sub-blocks stand before the last state that the conditioning reads; those behind change nothing."""
        return 2 * max(self.tracer.know_boundaries(self.trace(0)), default=0)

    def shrink(self, batches: Iterable[int] | None = None) -> bool:
        """After an out-of-memory error: hold half as much and halve some batches (all, where None); whether there is
        any sense in another try."""
        self._traces.clear()
        self._traces.capacity //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.memory //= 2
        smaller = self.memory > 2**20
        for batch in range(len(self.pieces)) if batches is None else batches:
            halves = [half for piece in self.pieces[batch] for half in piece.halves()]
            smaller = smaller or len(halves) > len(self.pieces[batch])
            self.pieces[batch] = halves
        return smaller


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
