"""Which of a CLIP's encoders each of a plan's entries is for."""

import dataclasses
from collections.abc import Mapping

from ....skrr_engine.files.companion import Fitted
from ....skrr_engine.plan.model import EncoderPlan, Level, Plan
from ....skrr_engine.plan.text import PlanError
from ..clip.views import Pruned, View, pruning, views


def match(known: Mapping[str, View], plan: Plan) -> dict[str, View]:
    """Which of a CLIP's encoders each of the plan's entries is for: entry's name -> view.

    By name; an entry that bears its family's name only (as the command line gives where it knows no better) goes to the
    only encoder of its shape. Entries for encoders that the CLIP does not hold are left out, but at least one must fit.
    Raises PlanError.
    """
    found = {}
    for name, entry in plan.encoders.items():
        shape = (entry.family, entry.blocks, entry.width)
        alike = [v for v in known.values() if (v.shape.family, v.shape.blocks, v.shape.width) == shape]
        if name in known:
            entry.check(known[name].shape.family, known[name].shape.blocks, known[name].shape.width, name)
            found[name] = known[name]
        elif name == entry.family and len(alike) == 1:
            found[name] = alike[0]
    if not found:
        wanted = ", ".join(f"{n} ({e.family}, {e.blocks} blocks, {e.width} wide)" for n, e in plan.encoders.items())
        shapes = [(v.name, v.shape) for v in known.values()]
        has = ", ".join(f"{name} ({s.family}, {s.blocks} blocks, {s.width} wide)" for name, s in shapes)
        raise PlanError(f"the plan is for {wanted}, but this CLIP holds {has}: choose a plan for one of these")
    return found


def replaced(clip, plan: Plan) -> dict[str, Pruned]:
    """What is left out of a CLIP's encoders when a plan's strongest levels take the place of what is left out by plan
    now; encoders that are so already are not named. Raises PlanError, and EncoderError for an encoder that was loaded
    without its removed parts."""
    known, now = views(clip), pruning(clip)
    wanted = {view.name: plan.encoder(name) for name, view in match(known, plan).items()}
    found = {}
    for name, view in known.items():
        before = now.get(name, Pruned())
        entry = wanted.get(name)
        level = entry and entry.levels[-1]
        if entry:
            exact = round(view.shape.sparsity(entry.shares(level)), 6)
            level = level.model_copy(update={"sparsity": exact})
            entry = entry.model_copy(update={"levels": (level,)})
        after = dataclasses.replace(before, plan=entry, level=level, fitted=still(before, entry, level))
        if told(after) != told(before):
            _ = view.row  # refuses an encoder that was loaded pruned
            found[name] = after
    return found


def told(pruned: Pruned) -> dict[int, tuple]:
    """What is done at each place, so that two can be compared."""
    standins, shares = pruned.standins, pruned.shares
    return {i: (a.word, a.target, shares[i], id(standins.get(i))) for i, a in pruned.removed.items()}


def still(before: Pruned, entry: EncoderPlan | None, level: Level | None) -> Fitted:
    """What of an encoder's stand-ins and units holds at an edited level, too: stand-ins where none was changed, units
    always. Raises PlanError where units are needed that are not there."""
    if level is None:
        return Fitted()
    lost = entry.narrowed(level).keys() - before.fitted.units.keys()
    if lost:
        raise PlanError(
            "the edited plan narrows parts whose units are not here: connect a CLIP with the plan that it was made from"
        )
    same = before.level and level.standins == before.level.standins
    return Fitted(before.fitted.standins if same else {}, before.fitted.units)
