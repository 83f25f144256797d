"""What can be done at a place of a row: one class for each, and one protocol for all of them.

Walk, fit, rewiring and accounting know only the protocol: a new kind of action is a new class, its fields in a plan
(plan.model.Level) and, where it holds tensors, in the companion file. Stand-ins are in standin.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .row import Call, Row

Layer = Callable[..., nn.Linear]
"""A class of linear layers, called as `torch.nn.Linear` is: ComfyUI's operations bring their own."""


class Action:
    """What is done at a place of the row. Immutable; two that are equal do the same, so that a walk shares states.

    word: what the place then is, for people. nbytes: that it adds to the encoder. fitted: whether it was fitted to
    streams, and so is equal to no other. target: the sub-block that stands in, None where none does.
    """

    word = ""
    nbytes = 0
    fitted = False
    target: int | None = None

    def through(self, place: int) -> int | None:
        """The sub-block whose own forward the stream takes at this place; None where it takes none."""
        return None

    def apply(self, x: torch.Tensor, row: Row, place: int, call: Call) -> torch.Tensor:
        """The stream `[batch, tokens, width]` behind the place, called as its attention was. Never writes into `x`."""
        through = self.through(place)
        return x if through is None else row.sub_blocks[through].apply(x, call)

    def placeholders(self, row: Row, place: int, linear: Layer) -> dict[str, nn.Module]:
        """Path below the encoder -> module that stands there instead of the place's own; none where that stays."""
        raise NotImplementedError


@dataclass(frozen=True)
class Keep(Action):
    """The sub-block stays."""

    word = "kept"

    def through(self, place: int) -> int:
        return place

    def placeholders(self, row: Row, place: int, linear: Layer) -> dict[str, nn.Module]:
        return {}


@dataclass(frozen=True)
class Skip(Action):
    """Nothing is done: the residual stream goes on unchanged."""

    word = "skipped"

    def placeholders(self, row: Row, place: int, linear: Layer) -> dict[str, nn.Module]:
        return row.sub_blocks[place].placeholders()


@dataclass(frozen=True)
class Reuse(Action):
    """Another, kept sub-block of the same type stands in: `x + F_j(norm_j(x))`. target: its number, j."""

    target: int

    word = "re-used"

    def through(self, place: int) -> int:
        return self.target

    def placeholders(self, row: Row, place: int, linear: Layer) -> dict[str, nn.Module]:
        return row.sub_blocks[place].placeholders(reused=row.sub_blocks[self.target])


KEEP, SKIP = Keep(), Skip()

Assignment = Mapping[int, Action]
"""Removed sub-block -> what is done at its place. All others are kept."""


def assignment(
    order: Iterable[int], reuse: Mapping[int, int] | None = None, standins: Mapping[int, Action] | None = None
) -> dict[int, Action]:
    """The assignment of a level: its skipped sub-blocks; some re-use another (place -> target) or have a stand-in."""
    actions = {**{place: Reuse(target) for place, target in (reuse or {}).items()}, **(standins or {})}
    return {place: actions.get(place, SKIP) for place in order}
