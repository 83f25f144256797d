"""The engine's own walk over an encoder's sub-blocks, and how the encoder reads its conditioning from it.

A `Tracer` holds a hollow fork of the encoder, in which every sub-block is skipped. Running the encoder's own forward on
it costs next to nothing and gives what the walk needs: the embedded prompts, the arguments (masks, position biases,
rotary tables) of every attention call, and, with the walk's states put in behind the blocks, the conditioning, made by
the encoder's own code (final norm, layer choice, pooling, masking).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

from .budget import Store, out_of_memory
from .repair import StandIn
from .rewire import Action, Assignment, fork, replace
from .row import Call, Placeholder, Row
from .sums import double

Reading = list[tuple[torch.Tensor, torch.Tensor | None]]
"""What a denoiser reads of an encoder: tensors `[batch, tokens, width]`, each with the mask `[batch, tokens]` of the
tokens that count, or None where all do."""


class Run(Protocol):
    """Runs an encoder's own forward on one batch of prompts, all of one length, on the module tree it is given. times:
    on so many copies of the batch, one behind the other (one that takes no `times` is never asked for more)."""

    def __call__(self, module: nn.Module, times: int = 1) -> Reading: ...


@dataclass(frozen=True)
class Trace:
    """One batch seen by the encoder: x, the embedded prompts `[batch, tokens, width]`; calls, one per sub-block."""

    run: Run
    x: torch.Tensor
    calls: tuple[Call, ...]


class Tracer:
    """The walk over one encoder. `root`: what `run` functions are given; `row`: of the encoder at `prefix` below it."""

    def __init__(self, root: nn.Module, row: Row, prefix: str = ""):
        self.row = row
        paths = [prefix + path for s in row.sub_blocks for path in s.parts]
        self.hollow = fork(root, paths)
        self._attention: list[Placeholder] = []
        for sub_block in row.sub_blocks:
            for path, placeholder in sub_block.placeholders(None).items():
                replace(self.hollow, prefix + path, placeholder)
                if sub_block.is_attention and isinstance(placeholder, Placeholder):
                    placeholder.idle = True
                    self._attention.append(placeholder)
        self._states: dict[int, torch.Tensor] = {}
        for i, path in enumerate(row.block_paths):
            block = self.hollow.get_submodule(prefix + path)
            block.register_forward_hook(lambda module, args, out, behind=i + 1: self._put(behind, out))
        self.boundaries: tuple[int, ...] | None = None
        self._stackable: dict[torch.Size, tuple[bool, bool]] = {}

    def _put(self, behind: int, out):
        state = self._states.get(behind)
        if state is None:
            return None
        return (state, *out[1:]) if isinstance(out, tuple) else state

    def trace(self, run: Run) -> Trace:
        """Embed a batch and record how its attention modules are called."""
        seen: list[tuple[torch.Tensor, Call]] = []
        for placeholder in self._attention:
            placeholder.record = lambda x, call: seen.append((x.clone() if not seen else x, call))
            placeholder.idle = False
        try:
            run(self.hollow)
        finally:
            for placeholder in self._attention:
                placeholder.record = None
                placeholder.idle = True
        calls = tuple(call for _, call in seen for call in (call, Call()))
        return Trace(run, seen[0][0], calls)

    def read(self, trace: Trace, states: dict[int, torch.Tensor]) -> Reading:
        """The conditioning from states behind blocks (`{number of blocks passed: state}`), by the encoder's code."""
        return self._read(trace, {behind: state.clone() for behind, state in states.items()})

    def _read(self, trace: Trace, states: dict[int, torch.Tensor], times: int = 1) -> Reading:
        """The same, from states of so many copies of the batch, that the encoder's code may write into."""
        self._states = states
        try:
            return trace.run(self.hollow) if times == 1 else trace.run(self.hollow, times)
        finally:
            self._states = {}

    def _read_stacked(self, trace: Trace, states: Sequence[dict[int, torch.Tensor]]) -> list[Reading]:
        """What `read` gives for each of these states, by one run of the encoder's code on all of them."""
        times, prompts = len(states), trace.x.shape[0]
        joined = {behind: torch.cat([s[behind] for s in states]) for behind in states[0]}
        parts = []
        for t, mask in self._read(trace, joined, times):
            masks = [None] * times if mask is None else mask.split(prompts)
            parts.append(list(zip(t.split(prompts), masks, strict=True)))
        return [list(part) for part in zip(*parts, strict=True)]

    def find_boundaries(self, trace: Trace) -> tuple[int, ...]:
        """Behind how many blocks the conditioning reads the stream: found by poisoning one place after the other."""
        places = range(1, self.row.blocks + 1)
        poison = torch.full_like(trace.x, float("nan"))

        def is_read(behind: int) -> bool:
            # The hollow encoder hands the poison on unchanged, so the next block's place is where it ends.
            states = {behind: poison, **({behind + 1: trace.x} if behind + 1 in places else {})}
            return any(bool(t.isnan().any()) for t, _ in self.read(trace, states))

        return tuple(behind for behind in places if is_read(behind))

    def walk(
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
        if self.boundaries is None:
            self.boundaries = self.find_boundaries(trace)
        together = max(1, stack // trace.x.shape[:2].numel())
        passes, reads = self._can_stack(trace) if together > 1 else (False, False)
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
                readings = self._read_stacked(trace, taps) if reads else (self.read(trace, t) for t in taps)
                for stream, reading in zip(chunk, readings, strict=True):
                    for member in stream.members:
                        yield member, reading

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
        self, streams: Sequence["Stream"], index: int, trace: Trace, candidates: Sequence[Assignment], step,
        together: int,
    ) -> list["Stream"]:  # fmt: skip
        """The streams behind sub-block `index`, forked where their candidates treat that sub-block differently."""
        forks = [(s, *fork) for s in streams for fork in parted(s.members, index, candidates).items()]
        # (a sub-block, a dtype) -> the states that pass it, in the order of the forks. Dtypes may differ where one
        # sub-block hands on another than the rest (transformers' T5 in fp16).
        through: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        for stream, action, _ in forks:
            if isinstance(action, int):
                through.setdefault((action, stream.x.dtype), []).append(stream.x)
        call = trace.calls[index]
        passed = {key: self._pass(key[0], xs, trace, call, step, together) for key, xs in through.items()}
        behind = (index + 1) // 2 if index % 2 and (index + 1) // 2 in self.boundaries else None
        advanced = []
        for stream, action, members in forks:
            if isinstance(action, StandIn):
                x = action.apply(stream.x)
            else:
                x = stream.x if action is None else next(passed[action, stream.x.dtype])
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

    def _can_stack(self, trace: Trace) -> tuple[bool, bool]:
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
            states = [dict.fromkeys(self.boundaries, state) for state in (x, x.roll(1, -1))]
            alone = [t for state in states for t, _ in self.read(trace, state)]
            found = attempt(lambda: [t for reading in self._read_stacked(trace, states) for t, _ in reading])
            self._stackable[x.shape] = passes, agree(found, alone)
        return self._stackable[trace.x.shape]


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
    """Candidates by what they do at a sub-block: keep it (its own index), or an action in its place."""
    groups: dict[Action, list[int]] = {}
    for member in members:
        groups.setdefault(candidates[member].get(index, index), []).append(member)
    return {action: tuple(group) for action, group in groups.items()}


def forwards(length: int, candidates: Sequence[Assignment]) -> int:
    """How many sub-block forwards a walk over a row of `length` sub-blocks takes for these candidates."""
    streams: list[tuple[int, ...]] = [tuple(range(len(candidates)))] if candidates else []
    total = 0
    for index in range(length):
        groups = [parted(members, index, candidates) for members in streams]
        streams = [members for group in groups for members in group.values()]
        total += sum(isinstance(action, int) for group in groups for action in group)
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
    one object (see `of`), so that nothing but its address is hashed where it is looked for. repairs: its stand-ins."""

    _known: ClassVar[WeakValueDictionary] = WeakValueDictionary()

    def __init__(self, parent: "Prefix | None" = None, action: Action = None):
        repairs = frozenset() if parent is None else parent.repairs
        self.parent, self.repairs = parent, repairs | {action} if isinstance(action, StandIn) else repairs

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
    def repairs(self) -> frozenset[StandIn]:
        """The stand-ins that made its state."""
        return self.prefix.repairs


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
