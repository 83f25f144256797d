"""From a meter to an encoder's entry in a plan: skip, then re-use for each level, with progress and resuming."""

from collections.abc import Callable, Sequence

from ..encoder.actions import assignment
from ..encoder.row import Row
from ..measure.discrepancy import Discrepancy
from ..measure.meter import Meter
from ..plan.model import EncoderPlan, Level
from . import reuse, skip
from .entry import entry_of, level_of, steps_of
from .progress import Clock, Progress, Shares, reuse_work, step_line, step_work
from .settings import Settings
from .skip import SkipList


def search(
    meter: Meter,
    settings: Settings,
    report: Callable[[Progress], None] = lambda progress: None,
    save: Callable[[Sequence[SkipList]], None] = lambda beam: None,
    beam: Sequence[SkipList] = (),
) -> EncoderPlan:
    """Search one encoder's plan.

    report: called before every sub-block forward with where the search stands; what it raises ends the search. save:
    called with the beam after each step. beam: a saved one, to go on from. Raises SearchError where the target can't be
    reached.
    """
    return Search(meter, settings, report).run(save, beam)


class Search:
    """A search under way; see `search`. best: the best list so far."""

    def __init__(self, meter: Meter, settings: Settings, report: Callable[[Progress], None]):
        self.meter, self.settings, self.report, self.row = meter, settings, report, meter.row
        self.length = meter.readable()  # what nothing reads needs no search, and no place in a plan
        self.costs = self.row.parameter_counts[: self.length]
        self.clock = Clock()
        self.shares = Shares(settings, meter, step_work(self.length, 0, settings.beam))
        self.best = SkipList((), 0.0)

    def run(self, save: Callable[[Sequence[SkipList]], None], beam: Sequence[SkipList]) -> EncoderPlan:
        settings, costs, total = self.settings, self.costs, self.row.total
        self.best = beam[0] if beam else self.best
        for step in skip.search(
            self._rank_step, costs, total, settings.sparsity, settings.beam, beam, settings.rounding
        ):
            self.best = step[0]
            save(step)
        order = self.best.order
        ends = sorted({skip.reaching(order, costs, total, target) for target in settings.targets})
        # Without re-uses, what a step found is only looked up; after resuming it is measured once.
        work = [self.shares.of_reuse(reuse_work(self.length, e)) if settings.reuse else self.length - e for e in ends]
        levels = [self._level(order[:end], work[n], sum(work[n + 1 :])) for n, end in enumerate(ends)]
        return entry_of(self.row, levels, order, {**how(settings), **steps_of(self.best.trail[: ends[-1]])})

    def _steps(self) -> int:
        """How many removals the target is likely to take."""
        order = self.best.order
        removed = self.row.sparsity(order)
        mean = max(removed / len(order) if order else sum(self.costs) / self.row.total / self.length, 1e-9)
        missing = max(self.settings.sparsity - removed, 0.0)
        return min(self.length, len(order) + max(0, -int(-missing / mean // 1)))

    def _remaining(self) -> float:
        """Work left once the step under way has ended as it began."""
        settings, steps = self.settings, self._steps()
        left = self.shares.of(
            sum(step_work(self.length, step, settings.beam) for step in range(len(self.best.order), steps))
        )
        if settings.reuse:
            ends = [int(steps * target / settings.sparsity) for target in settings.targets]
            left += self.shares.of_reuse(sum(reuse_work(self.length, end) for end in ends))
        return left

    def _ticking(self, line: str, candidates: int, ahead: float, expected: float) -> Callable[[float], None]:
        """A tick for `Meter.lowest`: it is expected to take so many sub-block forwards, and `ahead` come after it."""
        before, meter, clock = self.clock.worked, self.meter, self.clock

        def tick(share: float) -> None:
            clock.worked = before + meter.spent
            left = ahead + max(expected - meter.spent, 0.1 * meter.spent)  # some is left as long as it is not over
            done, step = clock.worked / max(clock.worked + left, 1e-9), len(self.best.order) + 1
            candidate = int(share * candidates) + 1
            self.report(
                Progress(step, max(self._steps(), step), candidate, candidates, done, clock.left(left), line, self.best)
            )

        return tick

    def _rank_step(self, candidates: list[dict], keep: int) -> list[float]:
        self.clock.mark()
        work = step_work(self.length, len(self.best.order), self.settings.beam)
        expected = self.shares.of(work)
        line = step_line(self.best, self._steps())
        tick = self._ticking(line, len(candidates), self._remaining() - expected, expected)
        found = self.meter.lowest(candidates, keep, self.settings.delta, tick=tick)
        self.shares.add(self.meter.spent, work)
        return found

    def _level(self, order: Sequence[int], work: float, ahead: float) -> Level:
        """The level of a skip list, with its re-use map (empty where none is asked for). work: the sub-block forwards
        that are expected of it; ahead: of what comes after it."""
        settings, calls = self.settings, 0
        expected = len(order) + 1 if settings.reuse else 1
        line = f"finding re-uses for {len(order)} skipped sub-blocks" if settings.reuse else "measuring the plan"

        def lowest(candidates: list[dict], keep: int) -> list[float]:
            nonlocal calls
            left = max(expected - calls - 1, 0) / expected * work + ahead
            tick = self._ticking(line, len(candidates), left, work / expected)
            calls += 1
            return self.meter.lowest(candidates, keep, settings.reuse_delta(len(order)), tick=tick)

        if settings.reuse:
            mapping, discrepancy = reuse.search(lowest, order, self.length, settings.rounding)
        else:
            mapping, (discrepancy,) = {}, lowest([assignment(order)], 1)
        return level_of(self.row, len(order), order, discrepancy, mapping)


def how(settings: Settings) -> dict:
    """What a plan says of the search that it comes from."""
    return {"mode": "racing", "delta": settings.delta} if settings.delta else {"mode": "exact"}


def unfinished(row: Row, skips: SkipList, settings: Settings, standins: bool = False) -> EncoderPlan:
    """The plan of a search that was stopped at `skips`: each step that it got to is a level, without re-use. standins:
    its discrepancies were measured with stand-ins, which this plan has not: it says none."""
    trail = skips.trail or (None,) * (len(skips.order) - 1) + (skips.discrepancy,)
    if standins:
        trail = (None,) * len(skips.order)
    levels = [level_of(row, n + 1, skips.order[: n + 1], d) for n, d in enumerate(trail)]
    told = {**how(settings), **({} if standins else steps_of(skips.trail)), "unfinished": True}
    return entry_of(row, levels, skips.order, told)


def measure_level(meter: Meter, plan: EncoderPlan, level: Level) -> Discrepancy:
    """The discrepancy of one level of a plan on a meter's prompts."""
    return meter.measure([assignment(plan.order[: level.skipped], level.reuse)])[0]
