"""From a meter to an encoder's entry in a plan: skip, then re-use for each level, with progress and resuming."""

from collections.abc import Callable, Sequence

from ..encoder.actions import assignment
from ..encoder.row import Row
from ..measure.discrepancy import Discrepancy
from ..measure.meter import Meter
from ..plan.model import EncoderPlan, Level
from . import reuse, skip
from .progress import Clock, Progress, Shares, reuse_work, step_line, step_work
from .settings import Settings
from .skip import Path

EXTENSION = "search"
"""In an encoder's `extensions`: how its plan was searched."""


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
    row = meter.row
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


def find_level(meter: Meter, order: Sequence[int], settings: Settings, ticking, work: float, ahead: float) -> Level:
    """The level of a skip list: its re-use map (empty where none is asked for), sparsity and discrepancy. work: the
    sub-block forwards that are expected of it; ahead: of what comes after it."""
    row = meter.row
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
