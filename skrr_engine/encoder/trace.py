"""The engine's own walk over an encoder's sub-blocks, and how the encoder reads its conditioning from it.

A `Tracer` holds a hollow fork of the encoder, in which every sub-block is skipped. Running the encoder's own forward on
it costs next to nothing and gives what the walk needs: the embedded prompts, the arguments (masks, position biases,
rotary tables) of every attention call, and, with the walk's states put in behind the blocks, the conditioning, made by
the encoder's own code (final norm, layer choice, pooling, masking).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..measure.walk import Place, Shelf, Stream, agree, attempt, parted
from .actions import Assignment
from .rewire import fork, replace
from .row import Call, Placeholder, Row
from .standin import StandIn

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
