"""An encoder's entry in a plan, made of what a search has found: the one place where entries and levels are built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..encoder.row import Row
from ..encoder.standin import StandIn
from ..plan.model import EncoderPlan, Level

EXTENSION = "search"
"""In an encoder's `extensions`: how its plan was searched."""


@dataclass(frozen=True)
class Found:
    """What a search has found: the encoder's entry, and the stand-ins of each of its levels (by their length)."""

    entry: EncoderPlan
    standins: Mapping[int, Mapping[int, StandIn]] = field(default_factory=dict)


def level_of(
    row: Row, order: Sequence[int], discrepancy: float | None, reuse: Mapping[int, int] | None = None
) -> Level:
    """The level that removes all of `order`. discrepancy: its D, None where that is not known or not finite."""
    sparsity = round(row.sparsity(order), 6)
    return Level(skipped=len(order), reuse=dict(reuse or {}), sparsity=sparsity, discrepancy=discrepancy)


def entry_of(row: Row, levels: Sequence[Level], order: Sequence[int], told: Mapping) -> EncoderPlan:
    """The entry with these levels, weakest first. order: of removal, cut behind the last level; told: what the plan
    says of its search."""
    return EncoderPlan(
        family=row.family,
        blocks=row.blocks,
        width=row.width,
        order=tuple(order[: levels[-1].skipped]),
        levels=tuple(levels),
        extensions={EXTENSION: dict(told)},
    )


def steps_of(trail: Sequence[float]) -> dict:
    """What a plan says of each step of its order: the discrepancies after it, without re-use, where they are known."""
    return {"steps": [float(f"{d:.6g}") for d in trail]} if trail else {}
