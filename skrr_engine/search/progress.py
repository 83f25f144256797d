"""Where a search stands, and how long it still takes."""

import time
from collections import deque
from dataclasses import dataclass

from ..encoder.row import describe
from ..measure.meter import Meter
from .settings import Settings
from .skip import SkipList


@dataclass(frozen=True)
class Progress:
    """Where a search stands. done: 0 to 1; seconds_left: an estimate, None while there is nothing to estimate from;
    candidate, candidates: within this step, 0 where there are none; line: for people; skips: the best list so far."""

    step: int
    steps: int
    candidate: int
    candidates: int
    done: float
    seconds_left: float | None
    line: str
    skips: SkipList


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


def step_line(skips: SkipList, steps: int) -> str:
    """ "step 7 of 20: skipped block 11's attention, D 0.013"."""
    if not skips.order:
        return f"step 0 of {steps}: measuring every sub-block"
    return f"step {len(skips.order)} of {steps}: skipped {describe(skips.order[-1])}, D {skips.discrepancy:.4g}"
