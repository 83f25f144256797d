"""What could be added to widths after the allocation: other moves at single places, D measured with the whole
assignment in place. benchmarks/widths.py measures what these are worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from skrr_engine.encoder import families
from skrr_engine.encoder import units as unit_level
from skrr_engine.encoder.actions import KEEP, SKIP, Action, Assignment
from skrr_engine.encoder.standin import StandIn, standin_of
from skrr_engine.search.allocate import Table
from skrr_engine.search.widths import Search
from skrr_engine.standins.fit import Fitting, Streams, fit_here
from skrr_engine.standins.widths import Survey, fits, units_at

WIDE = 64
"""The rank that a place may have instead of the others'."""


@dataclass(frozen=True, eq=False)
class Again(Action):
    """What is left of another place's sub-block is run once more at this place, and a stand-in adds what it can of the
    rest. source: that place; kept: its units that stay, None where it is whole."""

    source: int
    kept: torch.Tensor | None
    standin: StandIn | None = None

    word = "re-used"
    fitted = True

    @property
    def open(self) -> bool:
        return self.standin is None

    @property
    def nbytes(self) -> int:
        return self.standin.nbytes if self.standin else 0

    def apply(self, x, row, place, call):
        if self.kept is None:
            done = row.sub_blocks[self.source].apply(x, call)
        else:
            done = unit_level.masked(row, self.source, self.kept, x, call)
        return self.completed(x, done)

    def completed(self, x, done):
        return done if self.standin is None else self.standin.apply(x) + (done - x)

    def repaired(self, standin: StandIn) -> Again:
        return replace(self, standin=standin)


@dataclass(frozen=True)
class Move:
    """Something else at one place. kind: what; freed: bytes that it frees, negative where it takes some; lost: by how
    much D rises with it, all other places as they are."""

    place: int
    kind: str
    action: Action
    freed: float
    lost: float


def with_moves(base: Assignment, moves: Sequence[Move]) -> dict[int, Action]:
    """An assignment after these moves."""
    made = {**base, **{move.place: move.action for move in moves}}
    return {place: action for place, action in made.items() if action != KEEP}


def moves(run: Search, table: Table, base: Assignment) -> list[Move]:
    """All moves from an assignment, stand-ins fitted on the stream that it leaves: one width more ("wider") or less
    ("narrower"), a stand-in of a rank of WIDE ("rank"), and where nothing is left, the nearest place of this kind with
    something left run again ("again"; "again, bare" without a stand-in)."""
    streams = Streams(run.fitted, lambda: None)
    found = []
    for place in range(run.length):
        found += [Move(place, *move, 0.0) for move in alternatives(run, table, base, streams)]
        streams.go_on(base.get(place, KEEP))
    start, *after = run.meter.measure([base, *(with_moves(base, [move]) for move in found)], stack=True)
    return [replace(move, lost=d.total - start.total) for move, d in zip(found, after, strict=True)]


def alternatives(
    run: Search, table: Table, base: Assignment, streams: Streams
) -> Iterator[tuple[str, Action, float]]:  # fmt: skip
    """Kind, action and bytes freed of every move at the place where the streams are."""
    place, count = len(streams.passed), run.counts[len(streams.passed)]
    order = torch.tensor(table.curves[place].order)
    rungs = sorted({count, *(n for n, _ in table.curves[place].points)})
    now = units_left(base, place, count)
    at, size = rungs.index(now), run.cost(place, now)

    def fitted(width: int, fitting: Fitting = run.fitting) -> Action:
        if width == count:
            return KEEP
        return fits(streams, Survey(streams, units_at(streams)), order, [width], fitting)[0]

    for kind, number in (("wider", at + 1), ("narrower", at - 1)):
        if 0 <= number < len(rungs):
            yield kind, fitted(rungs[number]), size - run.cost(place, rungs[number])
    if now < count:
        wide = fitted(now, replace(run.fitting, rank=WIDE))
        yield "rank", wide, 4 * run.row.width * (run.fitting.rank - WIDE)
    if not now:
        alike = [p for p in range(place % 2, run.length, 2) if units_left(base, p, run.counts[p])]
        sides = (max((p for p in alike if p < place), default=None), min((p for p in alike if p > place), default=None))
        for source in (p for p in sides if p is not None):
            bare = Again(source, base[source].units if source in base else None)
            yield "again, bare", bare, float(base[place].nbytes)
            yield "again", bare.repaired(fit_here(streams, norm_of(run), run.fitting, bare, False).standin), 0.0


def units_left(base: Assignment, place: int, count: int) -> int:
    """How many units a place has left."""
    if place not in base:
        return count
    return 0 if base[place].units is None else len(base[place].units)


def norm_of(run: Search) -> str:
    """The kind of norm of an encoder's stand-ins."""
    return families.by_name(run.row.family).norm


def trades(found: Sequence[Move], kinds: Sequence[str]) -> list[list[Move]]:
    """Trades that should lower D and take no bytes, best first: a move, and those narrower places that pay for it. Each
    place is moved once at most. kinds: of the moves that may be paid for."""
    wanted = sorted((m for m in found if m.kind in kinds and m.lost < 0), key=lambda m: m.lost / max(-m.freed, 1.0))
    payers = sorted((m for m in found if m.kind == "narrower"), key=lambda m: m.lost / m.freed)
    moved: set[int] = set()
    spare, made = 0.0, []
    for move in wanted:
        if move.place in moved:
            continue
        trade, left = [move], spare + move.freed
        for payer in payers:
            if left >= 0:
                break
            if payer.place not in moved and payer.place != move.place:
                trade.append(payer)
                left += payer.freed
        if left >= 0 and sum(m.lost for m in trade) < 0:
            made.append(trade)
            moved |= {m.place for m in trade}
            spare = left
    return made


def traded(run: Search, base: Assignment, found: Sequence[Move], kinds: Sequence[str]) -> list[Move]:
    """The moves of the first so many trades that give the lowest D together, measured; none where all of them raise
    it."""
    made = trades(found, kinds)
    sets = [[m for trade in made[:n] for m in trade] for n in range(len(made) + 1)]
    after = run.meter.measure([with_moves(base, chosen) for chosen in sets], stack=True)
    return min(zip(after, sets, strict=True), key=lambda pair: pair[0].total)[1]


def filled_again(run: Search, assigned: Assignment) -> dict[int, Action]:
    """All stand-ins of an assignment fitted anew, in order, each of the rank that it has."""
    streams = Streams(run.fitted, lambda: None)
    found: dict[int, Action] = {}
    for place in range(max(assigned) + 1):
        action = assigned.get(place, KEEP)
        if action == KEEP:
            streams.pass_by(True)
        else:
            old = standin_of(action)
            bare = SKIP if old is action else replace(action, standin=None)
            if old is not None:
                made = fit_here(streams, norm_of(run), replace(run.fitting, rank=old.rank), bare, False)
                bare = bare.repaired(made.standin)
            else:
                streams.pass_by(False)
            found[place] = action = bare
        streams.go_on(action)
    return found


def counts_of(found: Sequence[Move]) -> Mapping[str, int]:
    """Kind -> how many moves are of it."""
    return {kind: sum(m.kind == kind for m in found) for kind in sorted({m.kind for m in found})}
