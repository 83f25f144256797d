"""Which sub-blocks to skip where linear stand-ins take their places: greedy, candidates measured with their stand-ins.

The order that stand-ins make up for best is not the one that hurts least: a sub-block may matter and yet be nearly
linear. At each step one pass over the encoder fits the stand-ins of what is removed anew, and one for every sub-block
that is kept; the candidates whose stream is then nearest to the dense one are compared by their discrepancy, on prompts
that nothing was fitted on. Attention and feed-forward differ in size: of the best attention and the best feed-forward,
the one goes that adds less discrepancy per parameter. At the end, some of the removed sub-blocks are brought back, one
at a time, to see whether another of their kind can go instead at less cost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..encoder.actions import assignment
from ..encoder.standin import StandIn
from ..measure.calibration import Calibration
from ..measure.meter import Meter
from ..standins import fit as standin
from ..standins.fit import Fitting, Tried
from . import reuse, skip
from .entry import Found, entry_of, level_of, steps_of
from .progress import Clock, Progress, step_line
from .run import how
from .settings import Settings
from .skip import SkipList

ENOUGH = 1.05
"""A rank is enough where a higher one would not lower the discrepancy by more than this factor."""

SCREENED = 12
"""How many attentions, and how many feed-forwards, are measured at each step: those least harmed right behind them."""

Report = Callable[[Progress], None]


class Search:
    """A search under way.

    fitted: the prompts that stand-ins are fitted on; meter: of others, which candidates are measured on; both of
    one encoder. report: called before every sub-block's forward; what it raises ends the search.
    """

    def __init__(self, fitted: Calibration, meter: Meter, settings: Settings, fitting: Fitting, report: Report):
        self.fitted, self.meter, self.settings, self.fitting, self.report = fitted, meter, settings, fitting, report
        self.row = meter.row
        self.length = meter.readable()
        self.costs = self.row.parameter_counts[: self.length]
        self.clock = Clock()
        self.skips = SkipList((), 0.0)

    def run(self, skips: SkipList, save: Callable[[Sequence[SkipList]], None]) -> SkipList:
        """The order that reaches the target, from a saved one on. Raises SearchError where it can't be reached."""
        self.skips = skips
        skip.check_reach(self.costs, self.row.total, self.settings.sparsity)
        self.clock.resume(len(skips.order))
        while sum(self.costs[i] for i in self.skips.order) < self.settings.sparsity * self.row.total:
            self.skips = self.step()
            save([self.skips])
        for place in self.least_at_home(self.fitting.swaps):
            self.skips = self.exchanged(place) or self.skips
        return self.skips

    def least_at_home(self, count: int) -> list[int]:
        """The removed sub-blocks whose return would lower the discrepancy most, per parameter that it costs."""
        order = self.skips.order
        if not count or len(order) < 2:
            return []
        found, _ = standin.fit(self.fitted, assignment(order), self.fitting, tick=self.tick(0.0, 0.3))
        now = assignment(order, standins=found)
        without = [{i: action for i, action in now.items() if i != place} for place in order]
        current, *scores = self.meter.measure([now, *without], self.tick(0.3, 0.7))
        gain = {i: (current.total - score.total) / self.costs[i] for i, score in zip(order, scores, strict=True)}
        return sorted(order, key=lambda place: (-gain[place], place))[:count]

    def exchanged(self, place: int) -> SkipList | None:
        """The skips with another sub-block of the same kind removed instead of this one, where that lowers the
        discrepancy; None where it does not."""
        order = tuple(i for i in self.skips.order if i != place)
        kept = {i for i in range(place % 2, self.length, 2) if i not in order}
        found, tried = standin.fit(self.fitted, assignment(order), self.fitting, kept, self.tick(0.0, 0.4))
        now = assignment(order, standins=found)
        chosen = sorted({place, *self.by_harm(tried)[:SCREENED]})
        candidates = [{**now, i: tried[i].standin} for i in chosen]
        found_scores = self.meter.lowest(candidates, 1, self.settings.delta, tick=self.tick(0.4, 0.6))
        scores = dict(zip(chosen, found_scores, strict=True))
        best = skip.lowest(scores, self.settings.rounding, place)
        return None if best == place else SkipList((*order, best), scores[best])

    def step(self) -> SkipList:
        """One more removal."""
        self.clock.mark()
        order, trail = self.skips.order, self.skips.trail
        found, tried = standin.fit(
            self.fitted, assignment(order), self.fitting, set(range(self.length)) - set(order), self.tick(0.0, 0.3)
        )
        now = assignment(order, standins=found)
        current = self.meter.measure([now], self.tick(0.3, 0.05))[0].total if order else 0.0
        if not current < math.inf:
            raise skip.SearchError(skip.NOT_FINITE)
        if trail:  # the stand-ins of the last step's removal are fitted only now
            trail = (*trail[:-1], current)
        by_harm = self.by_harm(tried)
        kinds = [sorted([i for i in by_harm if i % 2 == kind][:SCREENED]) for kind in (0, 1)]
        scores = {}
        for number, places in enumerate(places for places in kinds if places):
            tick = self.tick(0.35 + 0.3 * number, 0.3)
            candidates = [{**now, i: tried[i].standin} for i in places]
            found_scores = self.meter.lowest(candidates, 1, self.settings.delta, tick=tick)
            found_scores = dict(zip(places, found_scores, strict=True))
            place = skip.lowest(found_scores, self.settings.rounding)
            scores[place] = found_scores[place]
        if not min(scores.values()) < math.inf:
            raise skip.SearchError(skip.NOT_FINITE)
        place = min(scores, key=lambda i: ((scores[i] - current) / self.costs[i], i))
        known = len(trail) == len(order)
        return SkipList((*order, place), scores[place], (*trail, scores[place]) if known else ())

    def by_harm(self, tried: Mapping[int, Tried]) -> list[int]:
        """Places, the least harmed first. Processes fit on their own, and may round differently: they take each other's
        numbers, so that all of them go on with the same candidates."""
        places = sorted(tried)
        shared = self.meter.team.shared(places, lambda own: np.array([[tried[i].harm] for i in own]))
        harm = dict(zip(places, shared[:, 0].tolist(), strict=True))
        return sorted(places, key=lambda i: (harm[i], i))

    def tick(self, start: float, span: float) -> Callable[[float], None]:
        """For a part of a step that begins at share `start` of it and takes `span`."""
        skips = self.skips
        expected = max(self.steps(), len(skips.order) + 1)

        def tick(share: float) -> None:
            self.clock.worked = len(skips.order) + start + span * share
            left = expected - self.clock.worked
            self.report(
                Progress(
                    len(skips.order) + 1, expected, int((start + span * share) * self.length) + 1, self.length,
                    min(self.clock.worked / expected, 0.999), self.clock.left(left), step_line(skips, expected), skips,
                )
            )  # fmt: skip

        return tick

    def steps(self) -> int:
        """How many removals the target is likely to take."""
        gone, count = self.row.sparsity(self.skips.order), len(self.skips.order)
        mean = gone / count if count else sum(self.costs) / self.row.total / self.length
        return min(self.length, count + max(0, -int(-(self.settings.sparsity - gone) / mean // 1)))


def search(
    fitted: Calibration,
    meter: Meter,
    settings: Settings,
    fitting: Fitting,
    report: Report = lambda progress: None,
    save: Callable[[Sequence[SkipList]], None] = lambda beam: None,
    beam: Sequence[SkipList] = (),
) -> Found:
    """Search one encoder's plan with stand-ins. settings.beam is not used: the search is greedy. Re-use maps are for
    where the stand-ins' file is missing. save, beam: as for search.search. Raises SearchError.
    """
    run = Search(fitted, meter, settings, fitting, report)
    skips = run.run(beam[0] if beam else SkipList((), 0.0), save)
    told = {**how(settings), "rank": fitting.rank, **steps_of(skips.trail)}
    return best_rank(fitted, meter, skips.order, settings, fitting, told, run.tick(0, 1))


def best_rank(
    fitted: Calibration, meter: Meter, order: Sequence[int], settings: Settings, fitting: Fitting, told: dict,
    tick: Callable[[float], None] = lambda share: None,
) -> Found:  # fmt: skip
    """`levels_of` with the fitting's rank; where it has several to choose from, with the least of them whose strongest
    level is within ENOUGH of the best one's discrepancy."""
    if not fitting.ranks:
        return levels_of(fitted, meter, order, settings, fitting, told, tick)
    row = meter.row
    order = order[: skip.reaching(order, row.parameter_counts, row.total, settings.sparsity)]
    fits, found = {}, {}
    for rank in fitting.ranks:
        fits[rank], _ = standin.fit(fitted, assignment(order), replace(fitting, rank=rank), tick=tick)
        found[rank] = meter.measure([assignment(order, standins=fits[rank])], tick)[0].total
    rank = min(rank for rank, d in found.items() if d <= ENOUGH * min(found.values()))
    chosen = replace(fitting, rank=rank)
    return levels_of(fitted, meter, order, settings, chosen, told, tick, {len(order): fits[rank]})


def levels_of(
    fitted: Calibration, meter: Meter, order: Sequence[int], settings: Settings, fitting: Fitting, told: dict,
    tick: Callable[[float], None] = lambda share: None, fits: Mapping[int, dict[int, StandIn]] | None = None,
) -> Found:  # fmt: skip
    """Stand-ins for an order, however it was found: a level for each target. told: what the plan says of the search;
    fits: those already fitted, by the length of the prefix that they are for."""
    row, length = meter.row, meter.readable()
    ends = sorted({skip.reaching(order, row.parameter_counts, row.total, target) for target in settings.targets})
    levels, standins = [], dict(fits or {})
    for end in ends:
        if end not in standins:
            standins[end], _ = standin.fit(fitted, assignment(order[:end]), fitting, tick=tick)
        found = standins[end]
        (d,) = meter.measure([assignment(order[:end], standins=found)], tick)
        mapping = {}
        if settings.reuse:
            lowest = functools.partial(meter.lowest, delta=settings.reuse_delta(end), tick=tick)
            mapping, _ = reuse.search(lowest, order[:end], length, settings.rounding)
        levels.append(level_of(row, end, order[:end], d.finite, mapping))
    return Found(entry_of(row, levels, order, told), standins)
