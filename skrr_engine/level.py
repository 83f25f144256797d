"""Which level of a plan answers what was asked for: a sparsity, or a size."""

from collections.abc import Sequence
from typing import Protocol

from .plan import EncoderPlan, Level, PlanError


class Sized(Protocol):
    """An encoder's numbers: a row.Row, a checkpoint.Layout, ..."""

    def sparsity(self, skipped: Sequence[int]) -> float: ...


def at_sparsity(row: Sized, plan: EncoderPlan, sparsity: float) -> Level:
    """The strongest level at or below a sparsity.

    A search stops at the first prefix that *reaches* its target, so a plan's weakest level lies a little above what it
    was searched for: it also answers for a sparsity that its last removal passes. Raises PlanError where even the
    weakest level removes more than asked for.
    """
    weakest = plan.levels[0]
    if weakest.sparsity > sparsity > row.sparsity(plan.order[: weakest.skipped - 1]):
        return weakest
    return plan.choose(sparsity)


def at_size(sub_block_bytes: Sequence[int], dense_bytes: int, plan: EncoderPlan, limit: float) -> Level | None:
    """The weakest level with which an encoder of `dense_bytes` takes at most `limit` bytes; None where it does dense.

    Raises PlanError that names the smallest size where no level is strong enough.
    """
    if dense_bytes <= limit:
        return None
    left = [
        dense_bytes - sum(sub_block_bytes[i] for i in plan.order[: level.skipped]) + level.standin_bytes(plan.width)
        for level in plan.levels
    ]
    for level, size in zip(plan.levels, left, strict=True):
        if size <= limit:
            return level
    raise PlanError(
        f"no level of this plan brings the encoder to {limit / 1e9:.2f} GB: the smallest size is"
        f" {min(left) / 1e9:.2f} GB; ask for that, or take a file of lower precision"
    )
