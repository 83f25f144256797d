"""An encoder's entry in a plan, made of what a search has found: the one place where entries and levels are built."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..encoder.row import Row
from ..encoder.standin import StandIn
from ..plan.model import EncoderPlan, Level, Units

EXTENSION = "search"
"""In an encoder's `extensions`: how its plan was searched."""


@dataclass(frozen=True)
class Found:
    """What a search has found: the encoder's entry, the stand-ins of each of its levels (by their length), and of each
    place that is narrowed at one of them all its units, those that stay longest first."""

    entry: EncoderPlan
    standins: Mapping[int, Mapping[int, StandIn]] = field(default_factory=dict)
    orders: Mapping[int, torch.Tensor] = field(default_factory=dict)


def level_of(
    row: Row,
    steps: int,
    places: Iterable[int],
    discrepancy: float | None,
    reuse: Mapping[int, int] | None = None,
) -> Level:
    """The level of so many steps. places: that they change, see Numbers.sparsity; discrepancy: its D, None where that
    is not known or not finite."""
    sparsity = round(row.sparsity(places), 6)
    return Level(skipped=steps, reuse=dict(reuse or {}), sparsity=sparsity, discrepancy=discrepancy)


def entry_of(
    row: Row,
    levels: Sequence[Level],
    order: Sequence[int | tuple[int, int]],
    told: Mapping,
    units: Units | None = None,
) -> EncoderPlan:
    """The entry with these levels, weakest first. order: its steps, cut behind the last level; told: what the plan says
    of its search; units: that the encoder has, where steps narrow."""
    return EncoderPlan(
        family=row.family,
        blocks=row.blocks,
        width=row.width,
        order=tuple(order[: levels[-1].skipped]),
        units=units,
        levels=tuple(levels),
        extensions={EXTENSION: dict(told)},
    )


def steps_of(trail: Sequence[float]) -> dict:
    """What a plan says of each step of its order: the discrepancies after it, without re-use, where they are known."""
    return {"steps": [float(f"{d:.6g}") for d in trail]} if trail else {}
