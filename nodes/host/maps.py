"""What a CLIP's pruning looks like on the map in the browser (see drawing/plan_map.py), and as a plan."""

from collections.abc import Mapping, Sequence

from ...skrr_engine.encoder.row import Numbers
from ...skrr_engine.plan.model import Plan, Provenance
from ..drawing.plan_map import of_level
from .clip.views import Pruned, pruning, seen
from .talk import remember

MAP, PLAN, BASE = "skrr_map", "skrr_plan", "skrr_base"
"""Names in a node's `ui` output, and of the properties that the browser keeps them in."""


def of_encoder(name: str, shape: Numbers, pruned: Pruned | None) -> dict:
    """An encoder of a CLIP; pruned: what is left out of it."""
    removed, shares = (pruned.removed, pruned.shares) if pruned else ({}, {})
    by_plan = pruned is not None and pruned.level is not None and bool(removed.keys() & pruned.plan.left(pruned.level))
    level = of_level(name, pruned.plan, pruned.level) if by_plan else {}
    order = level.get("order", [])
    return {
        "order": [],
        "costs": [],
        "widths": {},
        "units": None,
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
        "sparsity": round(shape.sparsity({place: shares.get(place, 0) for place in order}), 6),
        "total": shape.total,
        "counts": list(shape.parameter_counts),
        "dense": shape.total_bytes,
        "now": shape.total_bytes - shape.bytes_of(shares) + (pruned.standin_bytes if pruned else 0),
        "bytes": list(shape.sub_block_bytes),
        "unit_counts": list(shape.unit_parameters),
        "unit_bytes": list(shape.unit_bytes),
    }


def of_clip(clip) -> list[dict]:
    """Every text encoder of a CLIP, the largest first."""
    known = pruning(clip)
    maps = [of_encoder(view.name, view.shape, known.get(view.name)) for view in seen(clip)[0].values()]
    return sorted(maps, key=lambda m: -m["dense"])


def plan_of(pruned: Mapping[str, Pruned]) -> Plan | None:
    """The plan that stands for what a CLIP leaves out by plans; None where it leaves out nothing so."""
    entries = {name: entry.plan for name, entry in pruned.items() if entry.plan is not None and entry.level is not None}
    return Plan(encoders=entries, provenance=Provenance(source="manual")) if entries else None


def shown(clip, hidden, plan: Plan | None = None, before: Sequence[dict] | None = None) -> dict:
    """A node's `ui` output: the map of its CLIP and the plan as text, which the workflow that is being run keeps, too.

    plan: by default the one that the CLIP's own pruning stands for; before: the map that an editor started from.
    """
    plan = plan or plan_of(pruning(clip))
    found = {MAP: of_clip(clip), PLAN: [plan.to_json()] if plan else [], **({BASE: before} if before else {})}
    remember(hidden, {MAP: found[MAP], PLAN: plan.to_json()} if plan else {MAP: found[MAP]})
    return found
