"""The walk: many candidates through one pass over an encoder's sub-blocks, states shared and kept."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch

from ..encoder.actions import KEEP, Action, Assignment
from ..encoder.row import Call
from ..encoder.trace import Reading, Trace, Tracer
from ..memory import Store, out_of_memory
from .sums import double

MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a module raises on a batch that it does not expect; a host's interruption is none of them."""


def attempt(act: Callable):
    """What `act` returns; None where it can't be done. Running out of memory is no answer to that, nor is being
    interrupted (ComfyUI asks for that before every operation, and tells of it once)."""
    try:
        return act()
    except MISFITS as error:
        if out_of_memory(error):
            raise
        return None


def agree(found: Sequence[torch.Tensor] | None, expected: Sequence[torch.Tensor]) -> bool:
    """Whether these are the same tensors, but for rounding (of half precision, too)."""
    if found is None or [t.shape for t in found] != [t.shape for t in expected]:
        return False
    pairs = [(double(f).nan_to_num(), double(e).nan_to_num()) for f, e in zip(found, expected, strict=True)]
    return all(float((f - e).norm()) <= 0.02 * float(e.norm()) for f, e in pairs)


def parted(members: Sequence[int], index: int, candidates: Sequence[Assignment]) -> dict[Action, tuple[int, ...]]:
    """Candidates by what they do at a sub-block."""
    groups: dict[Action, list[int]] = {}
    for member in members:
        groups.setdefault(candidates[member].get(index, KEEP), []).append(member)
    return {action: tuple(group) for action, group in groups.items()}


def forwards(length: int, candidates: Sequence[Assignment]) -> int:
    """How many sub-block forwards a walk over a row of `length` sub-blocks takes for these candidates."""
    streams: list[tuple[int, ...]] = [tuple(range(len(candidates)))] if candidates else []
    total = 0
    for index in range(length):
        groups = [parted(members, index, candidates) for members in streams]
        streams = [members for group in groups for members in group.values()]
        total += sum(action.through(index) is not None for group in groups for action in group)
    return total


@dataclass(frozen=True)
class Stream:
    """A residual stream that some candidates share so far; taps: its states at the boundaries already passed."""

    x: torch.Tensor
    members: tuple[int, ...]
    taps: dict[int, torch.Tensor]


STRIDE = 4
"""Every how many sub-blocks a walk leaves the states that later ones are sure to start from."""


class Prefix:
    """What candidates remove before a sub-block: those that remove the same share their state there. Equal ones are
    one object (see `of`), so that nothing but its address is hashed where it is looked for. fitted: its actions that
    were fitted."""

    _known: ClassVar[WeakValueDictionary] = WeakValueDictionary()

    def __init__(self, parent: "Prefix | None" = None, action: Action = KEEP):
        fitted = frozenset() if parent is None else parent.fitted
        self.parent, self.fitted = parent, fitted | {action} if action.fitted else fitted

    def of(self, index: int, action: Action) -> "Prefix":
        """The one that also does `action` at `index`, behind all that this one removes."""
        key = self, index, action
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Prefix(self, action)
        return found


NOTHING = Prefix()


def prefixes(candidate: Assignment, length: int) -> list[Prefix]:
    """What a candidate removes before each of `length` sub-blocks."""
    found, prefix = [], NOTHING
    for index in range(length):
        found.append(prefix)
        if index in candidate:
            prefix = prefix.of(index, candidate[index])
    return found


class Place(NamedTuple):
    """Where a `Shelf` holds a state: of which trace, whether of a stacked walk, in front of which sub-block, and what
    is removed before."""

    tag: object
    stacked: bool
    index: int
    prefix: Prefix

    @property
    def fitted(self) -> frozenset[Action]:
        """The fitted actions that made its state."""
        return self.prefix.fitted


class Shelf:
    """States of one trace kept between walks. store: where; tag: the trace's name there; few: walks of at most so many
    candidates leave all their states, larger ones only those that several candidates share, and every state in front
    of a landmark; landmarks: sub-blocks that are likely to be removed next: what a candidate with j < i removed leaves
    in front of i is where the one with both removed starts; places: where anything may lie, kept by the caller from
    walk to walk; stacked: whether the walk stacks streams. What such a walk left is only for its like: all others stay
    exact to the last bit. prefixes: of each candidate, by its id, for callers that walk the same ones over many
    traces."""

    def __init__(
        self, store: Store, tag, few: int, landmarks: Collection[int], places: set[int], stacked: bool = False,
        prefixes: dict[int, list[Prefix]] | None = None,
    ):  # fmt: skip
        self.store, self.tag, self.few, self.landmarks, self.places = store, tag, few, landmarks, places
        self.stacked = stacked
        self._prefixes = {} if prefixes is None else prefixes

    def _of(self, candidate: Assignment, length: int) -> list[Prefix]:
        known = self._prefixes.get(id(candidate), ())
        if len(known) < length:
            known = self._prefixes[id(candidate)] = prefixes(candidate, length)
        return known

    def latest(self, candidate: Assignment, length: int) -> Place | None:
        """The last place at which this candidate's state is held; None where none is."""
        before = self._of(candidate, length)
        for index in sorted((index for index in self.places if index < length), reverse=True):
            for stacked in (False, True)[: 1 + self.stacked]:
                place = self.tag, stacked, index, before[index]
                if place in self.store:
                    return Place(*place)
        return None

    def leave(self, index: int, stream: Stream, candidates: Sequence[Assignment]) -> None:
        """Called with each stream in front of each sub-block: holds its state if it is likely to be of use."""
        sure = index % STRIDE == 0 and (len(stream.members) > 1 or len(candidates) <= self.few)
        if index and (sure or index in self.landmarks):
            prefix = self._of(candidates[stream.members[0]], index + 1)[index]
            self.store.put(Place(self.tag, self.stacked, index, prefix), (stream.x, stream.taps))
            self.places.add(index)


class Walk:
    """Walks candidates over the row of one encoder. tracer: of it."""

    def __init__(self, tracer: Tracer):
        self.tracer, self.row = tracer, tracer.row
        self._stackable: dict[torch.Size, tuple[bool, bool]] = {}

    def __call__(
        self,
        trace: Trace,
        candidates: Sequence[Assignment],
        limit: int = 0,
        step: Callable[[], None] | None = None,
        shelf: "Shelf | None" = None,
        stack: int = 0,
    ) -> Iterator[tuple[int, Reading]]:
        """Yield `(candidate's position, its conditioning)` for every candidate, in the order in which they finish.

        Candidates share every state up to their first difference: the row is walked once, and a state is forked where
        candidates part. limit: how many streams go on together (0: any number); where it is reached, those that most
        candidates share wait at their place while the others go to the end, and what starts later (from states that
        are held anyway) starts in a later round. step: called once for each stream before it passes a sub-block.
        shelf: states that earlier walks over this trace left, to start from. stack: streams may pass a sub-block
        together, so many tokens at most: far quicker where batches are small, but other sums, in the last bits, than
        those of each stream alone (0: never together).
        """
        self.tracer.know_boundaries(trace)
        together = max(1, stack // trace.x.shape[:2].numel())
        passes, reads = self.can_stack(trace) if together > 1 else (False, False)
        starts = self._starts(trace, candidates, shelf)
        room = max(2, limit) if limit else len(candidates) + 1  # one may fork
        waiting: list[tuple[int, list[Stream]]] = []
        while waiting or starts:
            index, streams = waiting.pop() if waiting else (min(starts), [])
            while index < len(self.row):
                arriving = starts.pop(index, [])
                fitting = max(0, room - 1 - len(streams))
                streams += arriving[:fitting]
                if arriving[fitting:]:
                    starts[index] = arriving[fitting:]
                if shelf is not None:
                    for stream in streams:
                        shelf.leave(index, stream, candidates)
                if len(streams) >= room:
                    streams.sort(key=lambda stream: len(stream.members))
                    waiting.append((index, streams[room - 1 :]))
                    streams = streams[: room - 1]
                streams = self._advance(streams, index, trace, candidates, step, together if passes else 1)
                index += 1
            while streams:
                chunk, streams = streams[:together], streams[together:]
                taps = [stream.taps for stream in chunk]
                read = self.tracer.read_stacked if reads else self._read_singly
                for stream, reading in zip(chunk, read(trace, taps), strict=True):
                    for member in stream.members:
                        yield member, reading

    def _read_singly(self, trace: Trace, states: Sequence[dict[int, torch.Tensor]]) -> Iterator[Reading]:
        return (self.tracer.read(trace, state) for state in states)

    def _starts(self, trace: Trace, candidates: Sequence[Assignment], shelf: "Shelf | None") -> dict[int, list]:
        """Sub-block index -> the streams that start before it: each candidate as late as the shelf allows."""
        groups: dict[Place | None, list[int]] = {}
        for member, candidate in enumerate(candidates):
            place = None if shelf is None else shelf.latest(candidate, len(self.row))
            groups.setdefault(place, []).append(member)
        starts: dict[int, list[Stream]] = {}
        for place, members in groups.items():
            index = 0 if place is None else place.index
            x, taps = (trace.x, {}) if place is None else shelf.store.get(place)
            starts.setdefault(index, []).append(Stream(x, tuple(members), taps))
        return starts

    def _advance(
        self, streams: Sequence[Stream], index: int, trace: Trace, candidates: Sequence[Assignment], step,
        together: int,
    ) -> list[Stream]:  # fmt: skip
        """The streams behind sub-block `index`, forked where their candidates treat that sub-block differently."""
        forks = [(s, *fork) for s in streams for fork in parted(s.members, index, candidates).items()]
        # (a sub-block, a dtype) -> the states that pass it, in the order of the forks. Dtypes may differ where one
        # sub-block hands on another than the rest (transformers' T5 in fp16).
        through: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        for stream, action, _ in forks:
            if (sub_block := action.through(index)) is not None:
                through.setdefault((sub_block, stream.x.dtype), []).append(stream.x)
        call = trace.calls[index]
        passed = {key: self._pass(key[0], xs, trace, call, step, together) for key, xs in through.items()}
        behind = (index + 1) // 2 if index % 2 and (index + 1) // 2 in self.tracer.boundaries else None
        advanced = []
        for stream, action, members in forks:
            if (sub_block := action.through(index)) is None:
                x = action.apply(stream.x, self.row, index, call)
            else:
                x = next(passed[sub_block, stream.x.dtype])
            advanced.append(Stream(x, members, stream.taps if behind is None else {**stream.taps, behind: x}))
        return advanced

    def _pass(
        self, sub_block: int, states: Sequence[torch.Tensor], trace: Trace, call: Call, step, together: int
    ) -> Iterator[torch.Tensor]:
        """The states behind a sub-block, in their order; `together` of them at a time are one batch."""
        apply, prompts = self.row.sub_blocks[sub_block].apply, trace.x.shape[0]
        for i in range(0, len(states), together):
            chunk = states[i : i + together]
            if step is not None:
                for _ in chunk:
                    step()
            stacked = None
            if len(chunk) > 1:
                stacked = attempt(lambda chunk=chunk: apply(torch.cat(chunk), call.stacked(prompts, len(chunk))))
            if stacked is None:
                yield from (apply(x, call) for x in chunk)
            else:  # as a view, each would hold all of them in memory
                yield from (x.clone() for x in stacked.split(prompts))

    def can_stack(self, trace: Trace) -> tuple[bool, bool]:
        """Whether the encoder's attention takes copies of this batch as one batch, and whether the conditioning can be
        read of them together: arguments and wrappers may have a batch size of their own. Tried once for each shape, on
        the first attention; one that then refuses is called singly."""
        if trace.x.shape not in self._stackable:
            attention, call, x = self.row.sub_blocks[0], trace.calls[0], trace.x
            # What attention adds is compared: beside the stream itself, which may be large, it would not be seen.
            added = attention.apply(x, call) - x
            both = torch.cat([x, x])
            found = attempt(lambda: [attention.apply(both, call.stacked(x.shape[0], 2)) - both])
            passes = agree(found, [torch.cat([added, added])])
            states = [dict.fromkeys(self.tracer.boundaries, state) for state in (x, x.roll(1, -1))]
            alone = [t for state in states for t, _ in self.tracer.read(trace, state)]
            found = attempt(lambda: [t for reading in self.tracer.read_stacked(trace, states) for t, _ in reading])
            self._stackable[x.shape] = passes, agree(found, alone)
        return self._stackable[trace.x.shape]
