"""An encoder seen as a row of sub-blocks, and the placeholders that can stand where a sub-block stood.

Numbering (paper, section 3): sub-block `2 * block` is a block's self-attention with its norm, `2 * block + 1` its
feed-forward with its norm. The row never owns the encoder: it holds the modules that it found in it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn

from ..errors import SkrrError


class EncoderError(SkrrError):
    """An encoder that the engine can't see as a row of sub-blocks; one line that says why."""


@dataclass(frozen=True)
class Call:
    """How the encoder called an attention module: every argument but the hidden state, so that it can be called again.

    `hidden` is the keyword that the hidden state came under, None where it was the first positional argument.
    """

    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    hidden: str | None = None

    @staticmethod
    def split(args: tuple, kwargs: dict) -> tuple[torch.Tensor, "Call"]:
        """The hidden state `[batch, tokens, width]` of a call, and the rest of it."""
        if args:
            return args[0], Call(args[1:], kwargs)
        rest = dict(kwargs)
        return rest.pop("hidden_states"), Call((), rest, "hidden_states")

    def again(self, module: nn.Module, x: torch.Tensor):
        """Call `module` as it was called, on another hidden state; returns what it returns."""
        if self.hidden is None:
            return module(x, *self.args, **self.kwargs)
        return module(*self.args, **{self.hidden: x}, **self.kwargs)

    def stacked(self, prompts: int, times: int) -> "Call":
        """The call for so many copies of the batch, one behind the other. Tensors whose first dimension is the batch's
        `prompts` are repeated; what holds for all of them (a batch of one, too) broadcasts as it is."""

        def repeat(value):
            if isinstance(value, torch.Tensor):
                alike = prompts == 1 or value.ndim < 2 or value.shape[0] != prompts
                return value if alike else value.repeat(times, *[1] * (value.ndim - 1))
            if isinstance(value, dict):
                return {key: repeat(part) for key, part in value.items()}
            return type(value)(map(repeat, value)) if type(value) in (tuple, list) else value

        return Call(repeat(self.args), repeat(self.kwargs), self.hidden)


class SubBlock:
    """One sub-block: attention or feed-forward with its norm(s), as it stands in the encoder.

    index: its number in the row. parts: module path below the encoder -> module that goes away with the sub-block.
    Families subclass it and say how it is called (`apply`) and what stands in its place (`placeholders`).
    """

    def __init__(self, index: int, parts: dict[str, nn.Module]):
        self.index = index
        self.parts = parts

    @property
    def is_attention(self) -> bool:
        return self.index % 2 == 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """State-dict key below the encoder -> tensor that goes away with this sub-block."""
        found = {}
        for path, part in self.parts.items():
            found.update(part.state_dict(prefix=f"{path}.", keep_vars=True))
        return found

    def parameter_count(self) -> int:
        """Weights that go away with this sub-block."""
        return sum(parameter_count(p) for part in self.parts.values() for p in part.parameters())

    def apply(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """`x + F(norm(x))`, with `[batch, tokens, width]` in and out; never writes into `x`."""
        raise NotImplementedError

    def finish(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The stream behind the sub-block, from the one before it and what its out-projection gives."""
        raise NotImplementedError

    def placeholders(
        self,
        reused: "SubBlock | None" = None,
        standin: nn.Module | None = None,
        left: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, nn.Module]:
        """Path -> module, for each path in `parts`: leaves the residual stream unchanged, or adds to it what a
        `reused`, kept sub-block (its norm and weights) makes of it, what a `standin` does (standin.py), or what is
        `left` of itself (path -> a narrower copy of that part, see units.cut). Only the last two have parameters."""
        raise NotImplementedError


class Placeholder(nn.Module):
    """Stands where a sub-block's body stood. Holds a re-used sub-block unregistered, so that none of its bytes counts
    twice; a stand-in, the only thing here with parameters, is registered. `record`, where set, receives `(x, call)` of
    every call (see trace.py)."""

    def __init__(self, reused: SubBlock | None = None, standin: nn.Module | None = None):
        super().__init__()
        self.__dict__["reused"] = reused
        self.standin = standin
        self.record = None
        self.idle = False  # True in a hollow encoder that is not recorded: what it hands on to attention is not used

    def extra_repr(self) -> str:
        if self.standin is not None:
            return ""  # it is shown itself
        return "skipped" if self.reused is None else f"re-uses sub-block {self.reused.index}"


def parameter_count(tensor: torch.Tensor) -> int:
    """Number of weights that a tensor stands for: quantised tensors (GGUF) report their logical shape."""
    return math.prod(tensor.shape)


@dataclass(frozen=True)
class Numbers:
    """An encoder's numbers, dense: the one holder of them, for encoders in memory and in files.

    family: name of the architecture; width: of the residual stream. total: parameters, the embedding included;
    parameter_counts: of each sub-block; total_bytes, sub_block_bytes: likewise in bytes. unit_parameters, unit_bytes:
    how many of these lie in units, alike in each, and go with them; the others stay for as long as one unit does.
    """

    family: str
    blocks: int
    width: int
    total: int
    parameter_counts: tuple[int, ...]
    total_bytes: int
    sub_block_bytes: tuple[int, ...]
    unit_parameters: tuple[int, ...]
    unit_bytes: tuple[int, ...]

    def sparsity(self, places: Iterable[int]) -> float:
        """Removed parameters over all encoder parameters. places: removed sub-blocks; or sub-block -> the share of its
        units that stays, 0 where it is removed."""
        return self._gone(places, self.parameter_counts, self.unit_parameters) / self.total

    def bytes_of(self, places: Iterable[int]) -> int:
        """Bytes that go with some sub-blocks, or with the units that they lose (see `sparsity`)."""
        return self._gone(places, self.sub_block_bytes, self.unit_bytes)

    @staticmethod
    def _gone(places: Iterable[int], whole: Sequence[int], units: Sequence[int]) -> int:
        kept = places if isinstance(places, Mapping) else {}
        shares = {place: kept.get(place, 0) for place in places}
        return sum(int(units[i] * (1 - Fraction(share))) if share else whole[i] for i, share in shares.items())


@dataclass(frozen=True)
class Row(Numbers):
    """A row of sub-blocks, with its numbers. sub_blocks: all 2 * blocks; block_paths: path of each block below the
    encoder."""

    sub_blocks: tuple[SubBlock, ...]
    block_paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sub_blocks)


def describe(index: int) -> str:
    """A sub-block in words: "block 11's attention"."""
    return f"block {index // 2}'s {'feed-forward' if index % 2 else 'attention'}"
