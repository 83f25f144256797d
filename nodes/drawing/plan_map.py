"""What the plan map in the browser draws: plain values, one dictionary for each text encoder.

name, family, blocks, width: of the encoder. order: its removed sub-blocks in the order of removal (`2 * block` is a
block's attention, `2 * block + 1` its feed-forward); costs: the discrepancy after each of these steps, None where
that was not measured. reuse: removed sub-block -> the kept one at its place; standins: removed sub-block -> rank of
the small map that repairs its place, standins_sha256: of their file, or None; unread: sub-blocks that are gone
because no conditioning reads them. sparsity: the fraction of the parameters that is gone by order; discrepancy: with
all of order gone and the re-uses in place, or None. total, counts: parameters of the encoder and of each sub-block;
dense, now, bytes: likewise in bytes, before and after. These five are None where only a plan is known, not the
encoder.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...skrr_engine.plan.model import EncoderPlan, Level, Plan
    from ..host.clip.views import Pruned, Shape

MAP, PLAN, BASE = "skrr_map", "skrr_plan", "skrr_base"
"""Names in a node's `ui` output, and of the properties that the browser keeps them in."""


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
    return {
        "name": name,
        "family": entry.family,
        "blocks": entry.blocks,
        "width": entry.width,
        "order": list(entry.order[: level.skipped]),
        "costs": costs(entry, level.skipped),
        "reuse": {str(i): j for i, j in level.reuse.items()},
        "standins": {str(i): rank for i, rank in level.standins.ranks.items()} if level.standins else {},
        "standins_sha256": level.standins.sha256 if level.standins else None,
        "unread": [],
        "sparsity": level.sparsity,
        "discrepancy": level.discrepancy,
        **dict.fromkeys(("total", "counts", "dense", "now", "bytes")),
    }


def of_plan(plan: "Plan", sparsity: float) -> list[dict]:
    """The encoders of a plan, each at the level that a run would choose for a sparsity. Raises PlanError."""
    return [of_level(name, entry, entry.choose(sparsity)) for name, entry in plan.encoders.items()]


def of_encoder(name: str, shape: "Shape", pruned: "Pruned | None") -> dict:
    """An encoder of a CLIP; pruned: what is left out of it."""
    removed = pruned.removed if pruned else {}
    by_plan = pruned is not None and pruned.level is not None
    level = of_level(name, pruned.plan, pruned.level) if by_plan else {}
    order = level.get("order", [])
    return {
        "order": [],
        "costs": [],
        "reuse": {},
        "discrepancy": None,
        **level,
        "name": name,
        "family": shape.family,
        "blocks": shape.blocks,
        "width": shape.width,
        "standins": {str(place): standin.rank for place, standin in pruned.standins.items()} if pruned else {},
        "standins_sha256": level["standins_sha256"] if by_plan and pruned.standins else None,
        "unread": sorted(set(removed) - set(order)),
        "sparsity": round(shape.sparsity(order), 6),
        "total": shape.total,
        "counts": list(shape.parameter_counts),
        "dense": shape.total_bytes,
        "now": shape.total_bytes - shape.bytes_of(removed) + (pruned.standin_bytes if pruned else 0),
        "bytes": list(shape.sub_block_bytes),
    }


def of_clip(clip) -> list[dict]:
    """Every text encoder of a CLIP, the largest first."""
    from ..host.clip.views import pruning, views

    known = pruning(clip)
    maps = [of_encoder(view.name, view.shape, known.get(view.name)) for view in views(clip).values()]
    return sorted(maps, key=lambda m: -m["dense"])


def plan_of(pruned: Mapping[str, "Pruned"]) -> "Plan | None":
    """The plan that stands for what a CLIP leaves out by plans; None where it leaves out nothing so."""
    from ...skrr_engine.plan.model import Plan, Provenance

    entries = {name: entry.plan for name, entry in pruned.items() if entry.plan is not None and entry.level is not None}
    return Plan(encoders=entries, provenance=Provenance(source="manual")) if entries else None


def shown(clip, hidden, plan: "Plan | None" = None, before: Sequence[dict] | None = None) -> dict:
    """A node's `ui` output: the map of its CLIP and the plan as text, which the workflow that is being run keeps, too.

    plan: by default the one that the CLIP's own pruning stands for; before: the map that an editor started from.
    """
    from ..host.clip.views import pruning
    from ..host.talk import remember

    plan = plan or plan_of(pruning(clip))
    found = {MAP: of_clip(clip), PLAN: [plan.to_json()] if plan else [], **({BASE: before} if before else {})}
    remember(hidden, {MAP: found[MAP], PLAN: plan.to_json()} if plan else {MAP: found[MAP]})
    return found
