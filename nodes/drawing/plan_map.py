"""What the plan map in the browser draws: plain values, one dictionary for each text encoder.

name, family, blocks, width: of the encoder. order: its removed sub-blocks in the order of removal (`2 * block` is a
block's attention, `2 * block + 1` its feed-forward); costs: the discrepancy after each of these steps, None where
that was not measured. reuse: removed sub-block -> the kept one at its place; standins: removed sub-block -> rank of
the small map that repairs its place, standins_sha256: of their file, or None; unread: sub-blocks that are gone
because no conditioning reads them. sparsity: the fraction of the parameters that is gone by order; discrepancy: with
all of order gone and the re-uses in place, or None. widths: narrowed sub-block of order -> how many of its units stay;
units: how many there are, {sha256, attention, feed_forward}, None where nothing is narrowed; costs are then those of
each place alone. total, counts: parameters of the encoder and of each sub-block; dense, now, bytes: likewise in bytes,
before and after; unit_counts, unit_bytes: what of counts and bytes lies in units. These seven are None where only a
plan is known, not the encoder.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...skrr_engine.plan.model import EncoderPlan, Level, Plan


def costs(entry: "EncoderPlan", skipped: int) -> list[float | None]:
    """The discrepancy after each of the first steps of an order, None where the plan does not say it."""
    how = entry.extensions.get("search")
    steps = how.get("steps") if isinstance(how, dict) else None
    known = {level.skipped: level.discrepancy for level in entry.levels if not level.reuse}
    found = [known.get(n + 1) for n in range(skipped)]
    for n, value in enumerate(steps[:skipped] if isinstance(steps, list) else ()):
        # extensions are carried through unread by the plan's parser: anything may stand there
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            found[n] = value
    return found


def of_level(name: str, entry: "EncoderPlan", level: "Level") -> dict:
    """An encoder of which only the plan is known."""
    left = entry.left(level)
    steps = [step if isinstance(step, int) else step[0] for step in entry.order[: level.skipped]]
    after = dict(zip(steps, costs(entry, level.skipped), strict=True))
    return {
        "name": name,
        "family": entry.family,
        "blocks": entry.blocks,
        "width": entry.width,
        "order": list(left),
        "costs": [after[place] for place in left],
        "widths": {str(place): units for place, units in left.items() if units},
        "units": entry.units.model_dump() if entry.units else None,
        "reuse": {str(i): j for i, j in level.reuse.items()},
        "standins": {str(i): rank for i, rank in level.standins.ranks.items()} if level.standins else {},
        "standins_sha256": level.standins.sha256 if level.standins else None,
        "unread": [],
        "sparsity": level.sparsity,
        "discrepancy": level.discrepancy,
        **dict.fromkeys(("total", "counts", "dense", "now", "bytes", "unit_counts", "unit_bytes")),
    }


def of_plan(plan: "Plan", sparsity: float) -> list[dict]:
    """The encoders of a plan, each at the level that a run would choose for a sparsity. Raises PlanError."""
    return [of_level(name, entry, entry.choose(sparsity)) for name, entry in plan.encoders.items()]
