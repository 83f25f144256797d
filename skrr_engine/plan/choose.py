"""Which level of a plan answers for a size; for a sparsity, see plan.EncoderPlan.choose."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol

from .model import EncoderPlan, Level
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
    left = [
        numbers.total_bytes - numbers.bytes_of(plan.shares(level)) + level.standin_bytes(plan.width)
        for level in plan.levels
    ]
    for level, size in zip(plan.levels, left, strict=True):
        if size <= limit:
            return level
    raise PlanError(
        f"no level of this plan brings the encoder to {limit / 1e9:.2f} GB: the smallest size is"
        f" {min(left) / 1e9:.2f} GB; ask for that, or take a file of lower precision"
    )
