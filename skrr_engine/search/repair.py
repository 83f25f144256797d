"""Stand-ins for a plan that is there already: no search, one pass over the prompts for each level.

A plan with widths can be fitted at any further size, too: its steps are those that a budget takes in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..encoder.actions import Assignment, assignment
from ..encoder.row import describe
from ..encoder.standin import StandIn, standin_of
from ..encoder.units import units_of
from ..errors import SearchError
from ..measure.calibration import Calibration
from ..measure.meter import Meter
from ..plan.model import EncoderPlan
from ..standins import fit as standin
from ..standins.fit import Fitting
from ..standins.tune import Kept, TuningError, tuned
from .entry import Found, level_of
from .progress import Clock, Progress
from .skip import NOT_FINITE, SkipList

Report = Callable[[Progress], None]


def repair(
    fitted: Calibration,
    meter: Meter,
    entry: EncoderPlan,
    orders: Mapping[int, torch.Tensor],
    fitting: Fitting,
    targets: Sequence[float] = (),
    report: Report = lambda progress: None,
) -> Found:
    """The entry with stand-ins at all its levels, fitted anew, and at further sparsities.

    fitted: the prompts that they are fitted on; meter: of others, for the discrepancies. orders: place -> its units,
    those that stay longest first, for an entry that narrows. targets: sparsities to have levels for, too: each is the
    longest prefix of the entry's order at or below it. report: called before every sub-block's forward; what it raises
    ends the work. Raises SearchError.
    """
    row = meter.row
    for place, units in (step for step in entry.order if isinstance(step, tuple)):
        if place not in orders:
            raise SearchError(f"the units of {describe(place)} are missing, so the plan can't be fitted: get its file")
        if len(orders[place]) != units_of(row, place).count or units >= len(orders[place]):
            raise SearchError(
                f"{describe(place)} has other units than the plan says: take a plan made for this encoder"
            )
    known = {level.skipped: level for level in entry.levels}
    ends = sorted({*known, *(reaching(row, entry, target) for target in targets)})
    clock, levels, standins = Clock(), [], {}
    for number, end in enumerate(ends):
        left = entry.left(end)

        def tick(share: float, doing: str, number=number, left=left) -> None:
            clock.worked = (number + share) / len(ends)
            left_over, done = clock.left(1 - clock.worked), min(clock.worked, 0.999)
            line = level_line(number, len(ends), doing, len(left))
            report(Progress(number + 1, len(ends), 0, 0, done, left_over, line, SkipList((), 0.0)))

        bare = assignment(left, units={place: orders[place][:n] for place, n in left.items() if n})
        standins[end], discrepancy = fit_level(fitted, meter, bare, fitting, tick)
        fresh = level_of(row, end, entry.shares(end), discrepancy)
        changed = {"discrepancy": discrepancy, "standins": None, "sparsity": fresh.sparsity}
        levels.append(known.get(end, fresh).model_copy(update=changed))
    told = {**entry.extensions, "repaired": {"rank": fitting.rank, "tuning": fitting.tuning}}
    made = entry.model_copy(update={"levels": tuple(levels), "extensions": told})
    return Found(made, standins, dict(orders))


def reaching(row, entry: EncoderPlan, sparsity: float) -> int:
    """Length of the longest prefix of an entry's order at or below a sparsity; at least one. Raises SearchError where
    all of it stays far below."""
    gone = [row.sparsity(entry.shares(end)) for end in range(1, len(entry.order) + 1)]
    if gone[-1] < sparsity - 0.02:
        raise SearchError(
            f"this plan's order ends at a sparsity of {gone[-1]:.1%}: ask for at most that, or search for more"
        )
    return within(gone, sparsity)


def within(gone: Sequence[float], sparsity: float) -> int:
    """How many steps stay at or below a sparsity; at least one. gone: the sparsity after each."""
    return max(1, sum(share <= sparsity + 1e-9 for share in gone))


def filled(
    fitted: Calibration, bare: Assignment, fitting: Fitting, tick: Callable[[float], None] = lambda share: None
) -> Assignment:
    """An assignment with stand-ins at all its places, each fitted on the stream that those before it leave."""
    found, _ = standin.fit(fitted, bare, fitting, tick=tick)
    return {place: action.repaired(found[place]) for place, action in bare.items()}


Tick = Callable[[float, str], None]
"""Called with the share of a level's work that is done, and what is done now."""


def level_line(number: int, levels: int, doing: str, places: int) -> str:
    """Of the number-th level, from 0, for people: "level 1 of 5: fitting 12 places"."""
    return f"level {number + 1} of {levels}: {doing} {places} places"


def fit_level(
    fitted: Calibration, meter: Meter, bare: Assignment, fitting: Fitting, tick: Tick, kept: Kept | None = None
) -> tuple[dict[int, StandIn], float]:
    """The stand-ins of a level, and its discrepancy with them; tuned together, where that is asked for and makes it
    less on the meter's prompts. bare: what the level does without; kept: see `tuned`. Raises SearchError where the
    discrepancy is not finite."""
    fits = 0.2 if fitting.tuning else 0.9
    found = [filled(fitted, bare, fitting, lambda share: tick(fits * share, "fitting"))]
    doing = "fitting"
    if fitting.tuning:
        try:
            more = tuned(
                fitted,
                meter.projection,
                found[0],
                fitting.tuning,
                lambda share: tick(fits + 0.7 * share, "tuning"),
                kept,
            )
            found.append(more)
        except TuningError as error:  # after a search of hours, what is fitted is not lost
            doing = f"not tuned, as {error}:"
    measured = meter.measure(found, lambda share: tick(0.9 + 0.1 * share, doing))
    best = min((d for d in measured if d.finite is not None), key=lambda d: d.total, default=None)
    if best is None:
        raise SearchError(NOT_FINITE)
    removed = found[measured.index(best)]
    return {place: standin_of(action) for place, action in removed.items()}, best.finite
