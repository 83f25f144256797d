"""What can be done at a place of a row: one class for each, and one protocol for all of them.

Walk, fit, rewiring and accounting know only the protocol: a new kind of action is a new class, its fields in a plan
(plan.model.Level) and, where it holds tensors, in the companion file. Stand-ins are in standin.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import units as unit_level
from .units import Build

if TYPE_CHECKING:
    from .row import Call, Row
    from .standin import StandIn


class Action:
    """What is done at a place of the row. Immutable; two that are equal do the same, so that a walk shares states.

    word: what the place then is, for people. nbytes: that it adds to the encoder, what is left of the place's own
    weights not counted. fitted: whether it was fitted to streams, and so is equal to no other. target: the sub-block
    that stands in, None where none does. units: those of its own that stay, None where that is all or nothing. open:
    whether a stand-in can still be fitted to what it lacks.
    """

    word = ""
    nbytes = 0
    fitted = False
    target: int | None = None
    units: torch.Tensor | None = None
    open = False

    def through(self, place: int) -> int | None:
        """The sub-block whose own forward the stream takes at this place; None where it takes none."""
        return None

    def apply(self, x: torch.Tensor, row: Row, place: int, call: Call) -> torch.Tensor:
        """The stream `[batch, tokens, width]` behind the place, called as its attention was. Never writes into `x`."""
        through = self.through(place)
        return x if through is None else row.sub_blocks[through].apply(x, call)

    def completed(self, x: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        """The same, where what it does without its stand-in is known, `done`."""
        return done

    def placeholders(self, row: Row, place: int, build: Build) -> dict[str, nn.Module]:
        """Path below the encoder -> module that stands there instead of the place's own; none where that stays."""
        raise NotImplementedError

    def repaired(self, standin: StandIn) -> Action:
        """The same with a stand-in that was fitted to what it lacks."""
        raise NotImplementedError


@dataclass(frozen=True)
class Keep(Action):
    """The sub-block stays."""

    word = "kept"

    def through(self, place: int) -> int:
        return place

    def placeholders(self, row: Row, place: int, build: Build) -> dict[str, nn.Module]:
        return {}


@dataclass(frozen=True)
class Skip(Action):
    """Nothing is done: the residual stream goes on unchanged."""

    word = "skipped"
    open = True

    def placeholders(self, row: Row, place: int, build: Build) -> dict[str, nn.Module]:
        return row.sub_blocks[place].placeholders()

    def repaired(self, standin: StandIn) -> Action:
        return standin


@dataclass(frozen=True)
class Reuse(Action):
    """Another, kept sub-block of the same type stands in: `x + F_j(norm_j(x))`. target: its number, j."""

    target: int

    word = "re-used"

    def through(self, place: int) -> int:
        return self.target

    def placeholders(self, row: Row, place: int, build: Build) -> dict[str, nn.Module]:
        return row.sub_blocks[place].placeholders(reused=row.sub_blocks[self.target])


@dataclass(frozen=True, eq=False)
class Narrow(Action):
    """Some of the sub-block's own units stay, `x + F_U(norm(x))`, and a stand-in adds what it can of the others.

    units: numbers of those that stay, rising, int64. out: another out-projection for them, `[width, columns]`, None for
    what is left of its own. Two are equal only where they are the same object.
    """

    units: torch.Tensor
    standin: StandIn | None = None
    out: torch.Tensor | None = None

    word = "narrowed"
    fitted = True

    @property
    def open(self) -> bool:
        return self.standin is None

    @property
    def nbytes(self) -> int:
        return self.standin.nbytes if self.standin else 0

    def apply(self, x: torch.Tensor, row: Row, place: int, call: Call) -> torch.Tensor:
        if self.out is None:
            behind = unit_level.masked(row, place, self.units, x, call)
        else:
            behind = unit_level.refitted(row, place, self.units, self.out, x, call)
        return self.completed(x, behind)

    def completed(self, x: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        """The stream behind the place, where what its units alone make of `x` is known."""
        return done if self.standin is None else self.standin.apply(x) + (done - x)

    def placeholders(self, row: Row, place: int, build: Build) -> dict[str, nn.Module]:
        left = unit_level.cut(row, place, self.units, build, self.out)
        standin = self.standin and self.standin.module(build.linear)
        return row.sub_blocks[place].placeholders(standin=standin, left=left)

    def repaired(self, standin: StandIn) -> Action:
        return replace(self, standin=standin)


KEEP, SKIP = Keep(), Skip()

Assignment = Mapping[int, Action]
"""Removed or narrowed sub-block -> what is done at its place. All others are kept."""


def assignment(
    places: Iterable[int],
    reuse: Mapping[int, int] | None = None,
    standins: Mapping[int, StandIn] | None = None,
    units: Mapping[int, torch.Tensor] | None = None,
) -> dict[int, Action]:
    """The assignment of a level.

    places: its removed or narrowed sub-blocks. reuse: place -> the one that it re-uses; standins: place -> its
    stand-in; units: narrowed place -> the units that stay, in any order.
    """
    found: dict[int, Action] = {}
    for place in places:
        if units and place in units:
            found[place] = Narrow(units[place].long().sort().values)
        else:
            found[place] = Reuse(reuse[place]) if reuse and place in reuse else SKIP
        if standins and place in standins:
            found[place] = (found[place] if found[place].units is not None else SKIP).repaired(standins[place])
    return found
