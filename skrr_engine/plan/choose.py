"""Which level of a plan answers for a size; for a sparsity, see plan.EncoderPlan.choose."""

from collections.abc import Sequence

from .model import EncoderPlan, Level
from .text import PlanError


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
