"""Which level of a plan answers what was asked for."""

from .plan import EncoderPlan, Level
from .row import Row


def at_sparsity(row: Row, plan: EncoderPlan, sparsity: float) -> Level:
    """The strongest level at or below a sparsity.

    A search stops at the first prefix that *reaches* its target, so a plan's weakest level lies a little above what it
    was searched for: it also answers for a sparsity that its last removal passes. Raises PlanError where even the
    weakest level removes more than asked for.
    """
    weakest = plan.levels[0]
    if plan.levels[0].sparsity > sparsity > row.sparsity(plan.order[: weakest.skipped - 1]):
        return weakest
    return plan.choose(sparsity)
