"""Which level of a plan answers for a size; for a sparsity, see plan.EncoderPlan.choose."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol

from .model import EncoderPlan, Level, Plan, Together
from .text import PlanError


class Sized(Protocol):
    """An encoder's numbers (see encoder.row.Numbers)."""

    total_bytes: int

    def bytes_of(self, places: Mapping[int, Fraction]) -> int: ...


def at_size(numbers: Sized, plan: EncoderPlan, limit: float) -> Level | None:
    """The weakest level with which an encoder of these numbers takes at most `limit` bytes; None where it does dense.

    Raises PlanError that names the smallest size where no level is strong enough.
    """
    if numbers.total_bytes <= limit:
        return None
    left = [size_at(numbers, plan, level) for level in plan.levels]
    for level, size in zip(plan.levels, left, strict=True):
        if size <= limit:
            return level
    raise PlanError(
        f"no level of this plan brings the encoder to {limit / 1e9:.2f} GB: the smallest size is"
        f" {min(left) / 1e9:.2f} GB; ask for that, or take a file of lower precision"
    )


def size_at(numbers: Sized, plan: EncoderPlan, level: Level) -> float:
    """Bytes of an encoder of these numbers at a level."""
    return numbers.total_bytes - numbers.bytes_of(plan.shares(level)) + level.standin_bytes(plan.width)


def at_size_together(numbers: Mapping[str, Sized], plan: Plan, limit: float) -> Together | None:
    """The weakest levels that belong together with which encoders of these numbers take at most `limit` bytes in all;
    None where they do dense. numbers: of every encoder of the CLIP, those of the plan by its names.

    Raises PlanError that names the smallest size where no levels are strong enough.
    """
    dense = sum(own.total_bytes for own in numbers.values())
    if dense <= limit:
        return None
    sizes = []
    for group in plan.together:
        left = dense
        for name, skipped in group.levels.items():
            entry = plan.encoder(name)
            left += size_at(numbers[name], entry, entry.level(skipped)) - numbers[name].total_bytes
        if left <= limit:
            return group
        sizes.append(left)
    raise PlanError(
        f"no levels of this plan bring all encoders together to {limit / 1e9:.2f} GB: the smallest size is"
        f" {min(sizes) / 1e9:.2f} GB; ask for that, or take files of lower precision"
    )
