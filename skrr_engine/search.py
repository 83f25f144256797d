"""From a meter to an encoder's entry in a plan: skip, then re-use for each level, with progress and resuming."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import reuse, skip
from .discrepancy import Discrepancy, Meter
from .plan import EncoderPlan, Level
from .race import ROUNDING
from .rewire import assignment
from .row import Row, describe
from .skip import Path

EXTENSION = "search"
"""In an encoder's `extensions`: how its plan was searched."""


@dataclass(frozen=True)
class Settings:
    """What a search is asked for. sparsity: target, as a fraction of all encoder parameters; levels: further
    sparsities to give re-use maps for; beam: width k; reuse: whether algorithm 2 runs; delta: about how likely a step
    may lose one of its best candidates (race.py), and how likely a level's re-use map has a mistake; 0 for the exact
    search."""

    sparsity: float = 0.42
    levels: tuple[float, ...] = ()
    beam: int = 3
    reuse: bool = True
    delta: float = 0.05

    def __post_init__(self):
        for value in (self.sparsity, *self.levels):
            if not 0 < value < 1:
                raise skip.SearchError(
                    f"a sparsity of {value} makes no sense: give a fraction between 0 and 1, like 0.42"
                )
        if max(self.levels, default=0) > self.sparsity:
            raise skip.SearchError(
                f"level {max(self.levels)} is above the target sparsity {self.sparsity}: raise the target or drop it"
            )
        if not 1 <= self.beam <= 64:
            raise skip.SearchError(f"a beam of {self.beam} makes no sense: use 1 to 64 (the paper uses 3)")
        if not 0 <= self.delta < 0.5:
            raise skip.SearchError(f"a delta of {self.delta} makes no sense: use 0 (exact) to 0.5, like 0.05")

    def reuse_delta(self, skipped: int) -> float:
        """How likely each of a level's re-uses may be a mistake. They are few candidates each, but unlike a beam's list
        nothing makes up for a wrong one."""
        return self.delta / max(1, skipped)

    @property
    def rounding(self) -> float:
        """How far apart equal discrepancies may be, beside them."""
        return ROUNDING if self.delta else 0.0


@dataclass(frozen=True)
class Progress:
    """Where a search stands. done: 0 to 1; seconds_left: an estimate, None while there is nothing to estimate from;
    candidate, candidates: within this step; line: for people; path: the best list so far."""

    step: int
    steps: int
    candidate: int
    candidates: int
    done: float
    seconds_left: float | None
    line: str
    path: Path


class Clock:
    """Turns work done, and work that is expected, into a time left, at the pace of the last two steps."""

    def __init__(self):
        self.worked = 0.0
        self._marks = [(time.monotonic(), 0.0)] * 2

    def mark(self) -> None:
        """A step begins."""
        self._marks = [self._marks[1], (time.monotonic(), self.worked)]

    def resume(self, worked: float) -> None:
        """So much was done before, at a pace that is not known."""
        self.worked, self._marks = worked, [(time.monotonic(), worked)] * 2

    def left(self, remaining: float) -> float | None:
        """Seconds for the remaining work; None in the first second, and while less than a hundredth of it is done: the
        first batch, the null prompt alone, takes longer for each token than others."""
        since, worked = self._marks[0]
        elapsed, done = time.monotonic() - since, self.worked - worked
        return elapsed / done * remaining if done > 0.01 * remaining and elapsed > 1 else None


def step_work(length: int, removed: int, beam: int) -> float:
    """About how many sub-block forwards a step takes with `removed` of `length` sub-blocks gone: each list is walked
    once, and each of its candidates from its own place on."""
    kept = length - removed
    return (beam if removed else 1) * kept * (kept + 1) / 2


def reuse_work(length: int, skipped: int) -> float:
    """The same for the re-use maps of a level: two candidates for each skipped sub-block."""
    return 2 * skipped * (length - skipped) * 0.75


class Shares:
    """What share of `step_work` steps take: the rest is saved by dropping candidates early and by states that are held.

    It is a guess at first (SmolLM2, docs/search.md: 0.4 exact, racing 0.16 with 64 prompts and 0.10 with 256), and what
    the last two steps took from then on. work: of the first step.
    """

    REUSE = 1.7
    """By how much more re-uses take, beside `reuse_work`: few of them are dropped early."""

    def __init__(self, settings: Settings, meter: Meter, work: float):
        guess = 0.08 + 5 / meter.prompts if settings.delta else 0.4
        self._steps = deque([(min(guess, 0.5) / meter.team.size * work, work)], maxlen=2)

    def add(self, spent: float, work: float) -> None:
        """A step is done. spent: sub-block forwards; work: its `step_work`."""
        self._steps.append((spent, work))

    def of(self, work: float) -> float:
        """Sub-block forwards to expect of so much work."""
        return sum(spent for spent, _ in self._steps) / sum(work for _, work in self._steps) * work

    def of_reuse(self, work: float) -> float:
        return min(self.of(work) * self.REUSE, work)


def search(
    meter: Meter,
    settings: Settings,
    report: Callable[[Progress], None] = lambda progress: None,
    save: Callable[[Sequence[Path]], None] = lambda beam: None,
    beam: Sequence[Path] = (),
) -> EncoderPlan:
    """Search one encoder's plan.

    report: called before every sub-block forward with where the search stands; what it raises ends the search. save:
    called with the beam after each step. beam: a saved one, to go on from. Raises SearchError where the target can't be
    reached.
    """
    row = meter.tracer.row
    total, length = row.total, meter.readable()  # what nothing reads needs no search, and no place in a plan
    costs = row.parameter_counts[:length]
    clock, shares = Clock(), Shares(settings, meter, step_work(length, 0, settings.beam))
    best = beam[0] if beam else Path((), 0.0)
    targets = sorted({*settings.levels, settings.sparsity})

    def steps_expected(path: Path) -> int:
        removed = row.sparsity(path.order)
        mean = max(removed / len(path.order) if path.order else sum(costs) / total / length, 1e-9)
        missing = max(settings.sparsity - removed, 0.0)
        return min(length, len(path.order) + max(0, -int(-missing / mean // 1)))

    def remaining(path: Path) -> float:
        """Work left once `path` has been found."""
        steps = range(len(path.order), steps_expected(path))
        left = shares.of(sum(step_work(length, step, settings.beam) for step in steps))
        if settings.reuse:
            ends = [int(steps_expected(path) * t / settings.sparsity) for t in targets]
            left += shares.of_reuse(sum(reuse_work(length, end) for end in ends))
        return left

    def ticking(line: str, candidates: int, ahead: float, expected: float):
        """A tick for `Meter.rank`: it is expected to take so many sub-block forwards, and `ahead` come after it."""
        before = clock.worked

        def tick(share: float) -> None:
            clock.worked = before + meter.spent
            left = ahead + max(expected - meter.spent, 0.1 * meter.spent)  # some is left as long as it is not over
            done = clock.worked / max(clock.worked + left, 1e-9)
            report(
                Progress(
                    len(best.order) + 1, max(steps_expected(best), len(best.order) + 1),
                    int(share * candidates) + 1, candidates, done, clock.left(left), line, best,
                )
            )  # fmt: skip

        return tick

    def rank_step(candidates: list[dict], keep: int) -> list[float]:
        clock.mark()
        work = step_work(length, len(best.order), settings.beam)
        expected = shares.of(work)
        tick = ticking(step_line(best, steps_expected(best)), len(candidates), remaining(best) - expected, expected)
        found = meter.rank(candidates, keep, settings.delta, tick=tick)
        shares.add(meter.spent, work)
        return found

    for step in skip.search(rank_step, costs, total, settings.sparsity, settings.beam, beam, settings.rounding):
        best = step[0]
        save(step)

    levels = []
    ends = sorted({skip.reaching(best.order, costs, total, target) for target in targets})
    order = best.order[: ends[-1]]
    for number, end in enumerate(ends):
        # Without re-uses, what a step found is only looked up; after resuming it is measured once.
        work, *others = [
            shares.of_reuse(reuse_work(length, e)) if settings.reuse else length - e for e in ends[number:]
        ]
        levels.append(find_level(meter, order[:end], settings, ticking, work, sum(others)))
    return EncoderPlan(
        family=row.family, blocks=row.blocks, width=row.width, order=order, levels=tuple(levels),
        extensions={EXTENSION: {**how(settings), **steps_of(best.trail[: len(order)])}},
    )  # fmt: skip


def how(settings: Settings) -> dict:
    """What a plan says of the search that it comes from."""
    return {"mode": "racing", "delta": settings.delta} if settings.delta else {"mode": "exact"}


def steps_of(trail: Sequence[float]) -> dict:
    """What a plan says of each step of its order: the discrepancies after it, without re-use, where they are known."""
    return {"steps": [float(f"{d:.6g}") for d in trail]} if trail else {}


def unfinished(row: Row, path: Path, settings: Settings, repaired: bool = False) -> EncoderPlan:
    """The plan of a search that was stopped at `path`: each step that it got to is a level, without re-use. repaired:
    its discrepancies were measured with stand-ins, which this plan has not: it says none."""
    trail = path.trail or (None,) * (len(path.order) - 1) + (path.discrepancy,)
    if repaired:
        trail = (None,) * len(path.order)
    levels = [
        Level(skipped=n + 1, reuse={}, sparsity=round(row.sparsity(path.order[: n + 1]), 6), discrepancy=d)
        for n, d in enumerate(trail)
    ]
    return EncoderPlan(
        family=row.family, blocks=row.blocks, width=row.width, order=path.order, levels=tuple(levels),
        extensions={EXTENSION: {**how(settings), **({} if repaired else steps_of(path.trail)), "unfinished": True}},
    )  # fmt: skip


def step_line(path: Path, steps: int) -> str:
    """ "step 7 of 20: skipped block 11's attention, D 0.013"."""
    if not path.order:
        return f"step 0 of {steps}: measuring every sub-block"
    return f"step {len(path.order)} of {steps}: skipped {describe(path.order[-1])}, D {path.discrepancy:.4g}"


def find_level(meter: Meter, order: Sequence[int], settings: Settings, ticking, work: float, ahead: float) -> Level:
    """The level of a skip list: its re-use map (empty where none is asked for), sparsity and discrepancy. work: the
    sub-block forwards that are expected of it; ahead: of what comes after it."""
    row = meter.tracer.row
    length = meter.readable()
    calls = 0
    expected = len(order) + 1 if settings.reuse else 1
    line = f"finding re-uses for {len(order)} skipped sub-blocks" if settings.reuse else "measuring the plan"

    def rank(candidates: list[dict], keep: int) -> list[float]:
        nonlocal calls
        left = max(expected - calls - 1, 0) / expected * work + ahead
        tick = ticking(line, len(candidates), left, work / expected)
        calls += 1
        return meter.rank(candidates, keep, settings.reuse_delta(len(order)), tick=tick)

    if settings.reuse:
        mapping, discrepancy = reuse.search(rank, order, length, settings.rounding)
    else:
        mapping, (discrepancy,) = {}, rank([assignment(order)], 1)
    return Level(skipped=len(order), reuse=mapping, sparsity=round(row.sparsity(order), 6), discrepancy=discrepancy)


def measure_level(meter: Meter, plan: EncoderPlan, level: Level) -> Discrepancy:
    """The discrepancy of one level of a plan on a meter's prompts."""
    return meter.measure([assignment(plan.order[: level.skipped], level.reuse)])[0]
