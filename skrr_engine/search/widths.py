"""Narrowed sub-blocks under one budget: every place measured at every width once, then any size by allocation.

For each place and each width of a ladder the discrepancy is measured with only that place changed: its units ranked and
its stand-ins fitted on the dense stream, judged at the end on prompts that nothing was fitted on. One pass serves all
sizes (see allocate.py). What is asked for is then fitted once more, all places in order, each on the stream that those
before it have left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch

from ..encoder.actions import KEEP, Assignment, assignment
from ..encoder.row import describe
from ..errors import SearchError
from ..measure.calibration import Calibration
from ..measure.meter import Meter
from ..plan.model import Units as UnitCounts
from ..standins.fit import Fitting, Streams
from ..standins.tune import Kept
from ..standins.widths import SHARES, Survey, count_at, fits, ladder, ranking, units_at
from . import allocate
from .allocate import Curve, Step, Table
from .entry import Found, entry_of, level_of
from .progress import Clock, Progress
from .repair import fit_level, level_line, within
from .settings import Settings
from .skip import SkipList, check_reach

LEVELS = (0.25, 0.33, 0.42, 0.50, 0.60)
"""Sparsities that a plan is fitted for where nothing else is asked."""

BYTES = 2
"""Of a parameter, where bytes are weighed against stand-ins': what most files have, or twice that of 8 bits."""

MEASURING, BEFORE_TUNING = 0.9, 0.5
"""The share of all work that measuring places is; fitting levels comes after it, and tuning one takes long."""

Report = Callable[[Progress], None]


class Search:
    """A measurement of all places under way, and what is made of it.

    fitted: the prompts that stand-ins are fitted on; meter: of others, which widths are judged on; both of one encoder.
    report: called before every sub-block's forward; what it raises ends the search. base: what is done to the encoder
    while one place after the other is tried (nothing, usually): curves are then around that, and hold the place whole,
    too. rungs: shares of a place's units that are tried.
    """

    rungs: ClassVar[tuple[float, ...]] = SHARES

    def __init__(
        self,
        fitted: Calibration,
        meter: Meter,
        settings: Settings,
        fitting: Fitting,
        report: Report = lambda progress: None,
        base: Assignment | None = None,
    ):
        self.fitted, self.meter, self.settings, self.fitting, self.report = fitted, meter, settings, fitting, report
        self.row, self.length, self.base = meter.row, meter.readable(), dict(base or {})
        self.clock, self.measuring = Clock(), BEFORE_TUNING if fitting.tuning else MEASURING
        self.line, self.place = "", 0
        self.counts = {place: count_at(self.row, place) for place in range(self.length)}

    def measure(self, save: Callable[[Table], None], table: Table = Table()) -> Table:  # noqa: B008 - frozen
        """Every place's curve, from a saved table on; saved after each."""
        check_reach(self.row.parameter_counts[: self.length], self.row.total, self.settings.sparsity)
        self.unit_counts(self.counts)  # refuses now what a plan could not hold in the end
        curves = dict(table.curves)
        missing = [place for place in range(self.length) if place not in curves]
        if not missing:
            return Table(curves)
        streams = Streams(self.fitted, lambda: self._tick(0.0))
        self.clock.resume(self._work(missing[0]))
        for place in range(missing[-1] + 1):
            self.clock.mark()
            self.place, self.line = place, f"place {place + 1} of {self.length}: {describe(place)} at several widths"
            if place in curves:
                streams.guarded(functools.partial(streams.pass_by, place not in self.base))
            else:
                curves[place] = self._curve(streams)
                save(Table(curves))
            streams.go_on(self.base.get(place, KEEP))
        return Table(curves)

    def _curve(self, streams: Streams) -> Curve:
        """Of the place where the streams are."""
        own = units_at(streams)
        order = torch.empty(0, dtype=torch.int64)
        surveys: list[Survey] = []

        def survey() -> Survey | None:  # anew after an out-of-memory error: batches have been halved
            return surveys.pop() if surveys else own and Survey(streams, own)

        def ranked() -> torch.Tensor:
            made = survey()
            found = ranking(made, self.fitting.null)
            surveys.append(made)
            return found

        if own is not None:
            order = streams.guarded(ranked)
            # Processes may round differently: all take the same.
            shared = self.meter.team.shared(range(own.count), lambda mine: order.double().numpy()[list(mine)][:, None])
            order = torch.from_numpy(np.ascontiguousarray(shared[:, 0])).long()
        widths = ladder(own, self.rungs) if own is not None else [0]
        actions = streams.guarded(lambda: fits(streams, survey(), order, widths, self.fitting))
        candidates = [{**self.base, self.place: action} for action in actions]
        if self.base:
            widths.append(self.counts[self.place])
            candidates.append({place: action for place, action in self.base.items() if place != self.place})
        found = self.meter.measure(candidates, lambda share: self._tick(share), stack=True)
        return Curve(tuple(order.tolist()), tuple(zip(widths, (d.total for d in found), strict=True)))

    def _work(self, places: int) -> float:
        """About how much of the whole work the first so many places take."""
        total = self.length * (self.length + 1) / 2
        return (total - (self.length - places) * (self.length - places + 1) / 2) / total

    def _tick(self, share: float) -> None:
        here, after = self._work(self.place), self._work(self.place + 1)
        # Places that were measured before are passed by: what is done stays done.
        self.clock.worked = max(self.clock.worked, here + share * (after - here))
        left = self.clock.left(1 - self.clock.worked)
        done = self.clock.worked * self.measuring
        self.report(Progress(self.place + 1, self.length, 0, 0, done, left, self.line, NONE))

    def cost(self, place: int, units: int) -> float:
        """Bytes that a place takes with so many of its units, and its stand-in; see BYTES."""
        if units == self.counts[place]:
            return BYTES * self.row.parameter_counts[place]
        kept = (
            self.row.parameter_counts[place]
            - self.row.unit_parameters[place] * (self.counts[place] - units) // self.counts[place]
        )
        return BYTES * kept * (units > 0) + 4 * self.row.width * (self.fitting.rank + 1)

    def steps(self, table: Table) -> list[Step]:
        """The steps of all places, the cheapest first."""
        return allocate.steps(table.curves, self.counts, self.cost)

    def reaching(self, steps: Sequence[Step], sparsity: float) -> int:
        """How many steps there are before one goes beyond a sparsity, at least one; or, where settings.at_least, as
        many as it takes to reach it."""
        gone = [self.row.sparsity(self.shares(steps[: count + 1])) for count in range(len(steps))]
        if self.settings.at_least:
            return next((count for count, share in enumerate(gone, 1) if share >= sparsity - 1e-9), len(steps))
        return within(gone, sparsity)

    def targets(self) -> list[float]:
        """The sparsities that levels are fitted for, rising: what was asked for, and what else can be reached."""
        reach = sum(self.row.parameter_counts[: self.length]) / self.row.total
        return sorted({*self.settings.targets, *(t for t in self.settings.further if t < reach)})

    def shares(self, steps: Sequence[Step]) -> dict:
        """Place -> share of its units that stays after these steps."""
        return shares_of(allocate.left(steps), self.counts)

    def bare(self, steps: Sequence[Step], table: Table) -> Assignment:
        """What is done to the encoder after these steps, without stand-ins."""
        left = allocate.left(steps)
        return assignment(left, units={place: units_kept(table, place, n) for place, n in left.items() if n})

    def found(
        self,
        table: Table,
        ends: Iterable[int] | None = None,
        asked: Iterable[int] | None = None,
        kept: Callable[[int], Kept] | None = None,
    ) -> Found:
        """The plan's entry: all steps to the largest target, and a fitted level for each target. ends: how many steps
        the levels have, instead; asked: how many those have that are tuned, where any are; kept: where the tuning of
        one with so many steps is kept while it lasts."""
        steps = self.steps(table)
        if ends is None:
            ends = {self.reaching(steps, target) for target in self.targets()}
        asked = {self.reaching(steps, target) for target in self.settings.targets} if asked is None else set(asked)
        ends = sorted(ends)
        levels, standins, clock = [], {}, Clock()
        for number, end in enumerate(ends):
            taken, fitting = steps[:end], self.fitting if end in asked else replace(self.fitting, tuning=0)
            places = len(allocate.left(taken))

            def tick(share: float, doing: str, number=number, places=places) -> None:
                self.line = level_line(number, len(ends), doing, places)
                clock.worked = (number + share) / len(ends)
                done = self.measuring + (1 - self.measuring) * clock.worked
                left = clock.left(1 - clock.worked)
                self.report(Progress(self.length, self.length, 0, 0, min(done, 0.999), left, self.line, NONE))

            standins[end], d = fit_level(
                self.fitted, self.meter, self.bare(taken, table), fitting, tick, kept and kept(end)
            )
            levels.append(level_of(self.row, end, self.shares(taken), d))
        for end in ends if kept else ():
            kept(end).forget()
        order = [(step.place, step.units) if step.units else step.place for step in steps[: ends[-1]]]
        narrowed = {step.place for step in steps[: ends[-1]] if step.units}
        orders = {place: torch.tensor(table.curves[place].order) for place in sorted(narrowed)}
        told = {
            "mode": "widths",
            "rank": self.fitting.rank,
            "tuning": self.fitting.tuning,
            "steps": [float(f"{step.discrepancy:.6g}") for step in steps[: ends[-1]]],
        }
        return Found(entry_of(self.row, levels, order, told, self.unit_counts(narrowed)), standins, orders)

    def unit_counts(self, narrowed) -> UnitCounts | None:
        """How many units the encoder's sub-blocks have; None where none is narrowed. Raises SearchError where they
        differ from block to block."""
        if not narrowed:
            return None
        kinds = [{self.counts[place] for place in range(kind, self.length, 2)} for kind in (0, 1)]
        if any(len(kind) != 1 for kind in kinds):
            raise SearchError("this encoder's blocks differ in their units: search with whole parts instead")
        return UnitCounts(sha256="0" * 64, attention=kinds[0].pop(), feed_forward=kinds[1].pop())


NONE = SkipList((), 0.0)


def units_kept(table: Table, place: int, units: int) -> torch.Tensor:
    """Numbers of the units that stay at a place, rising."""
    return torch.tensor(table.curves[place].order[:units]).sort().values


def shares_of(left: Mapping[int, int], counts: Mapping[int, int]) -> dict:
    """Place -> units that stay, as shares of all that it has."""
    return {place: Fraction(units, counts[place]) for place, units in left.items()}


def search(
    fitted: Calibration,
    meter: Meter,
    settings: Settings,
    fitting: Fitting,
    report: Report = lambda progress: None,
    save: Callable[[Table], None] = lambda table: None,
    table: Table = Table(),  # noqa: B008 - frozen
    kept: Callable[[int], Kept] | None = None,
) -> Found:
    """Search one encoder's plan with widths. save: called with the table after each place; table: a saved one, to go on
    from; kept: see Search.found. Raises SearchError."""
    run = Search(fitted, meter, settings, fitting, report)
    return run.found(run.measure(save, table), kept=kept)
