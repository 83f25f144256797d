"""What a walk over an encoder's sub-blocks needs of the encoder itself, and how the conditioning is read from a walk.

A `Tracer` holds a hollow fork of the encoder, in which every sub-block is skipped. Running the encoder's own forward on
it costs next to nothing and gives what a walk (measure/walk.py) needs: the embedded prompts, the arguments (masks,
position biases, rotary tables) of every attention call, and, with the walk's states put in behind the blocks, the
conditioning, made by the encoder's own code (final norm, layer choice, pooling, masking).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .row import Call, Placeholder, Row
from .tree import fork, replace

Reading = list[tuple[torch.Tensor, torch.Tensor | None]]
"""What a denoiser reads of an encoder: tensors `[batch, tokens, width]`, each with the mask `[batch, tokens]` of the
tokens that count, or None where all do."""


def without_gradient(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A hook before a hollow block: what it is given is read where it was put, and what it hands on is not. Newer
    ComfyUIs write into it, which a gradient does not bear."""
    if not torch.is_grad_enabled():
        return None

    def plain(value):
        return value.detach().clone() if isinstance(value, torch.Tensor) and value.requires_grad else value

    return tuple(map(plain, args)), {key: plain(value) for key, value in kwargs.items()}


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
    """The hollow fork of one encoder. root: what `run` functions are given; row: of the encoder at `prefix` below it.
    boundaries: behind how many blocks the conditioning reads the stream; None until known (see `know_boundaries`)."""

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
            block.register_forward_pre_hook(without_gradient, with_kwargs=True)
            block.register_forward_hook(lambda module, args, out, behind=i + 1: self._put(behind, out))
        self.boundaries: tuple[int, ...] | None = None

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

    def read_stacked(self, trace: Trace, states: Sequence[dict[int, torch.Tensor]]) -> list[Reading]:
        """What `read` gives for each of these states, by one run of the encoder's code on all of them."""
        times, prompts = len(states), trace.x.shape[0]
        joined = {behind: torch.cat([s[behind] for s in states]) for behind in states[0]}
        parts = []
        for t, mask in self._read(trace, joined, times):
            masks = [None] * times if mask is None else mask.split(prompts)
            parts.append(list(zip(t.split(prompts), masks, strict=True)))
        return [list(part) for part in zip(*parts, strict=True)]

    def know_boundaries(self, trace: Trace) -> tuple[int, ...]:
        """Behind how many blocks the conditioning reads the stream; found once, on the first trace."""
        if self.boundaries is None:
            self.boundaries = self.find_boundaries(trace)
        return self.boundaries

    def find_boundaries(self, trace: Trace) -> tuple[int, ...]:
        """Behind how many blocks the conditioning reads the stream: found by poisoning one place after the other."""
        places = range(1, self.row.blocks + 1)
        poison = torch.full_like(trace.x, float("nan"))

        def is_read(behind: int) -> bool:
            # The hollow encoder hands the poison on unchanged, so the next block's place is where it ends.
            states = {behind: poison, **({behind + 1: trace.x} if behind + 1 in places else {})}
            return any(bool(t.isnan().any()) for t, _ in self.read(trace, states))

        return tuple(behind for behind in places if is_read(behind))
