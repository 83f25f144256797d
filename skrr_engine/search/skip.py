"""Which sub-blocks to skip: beam search on the discrepancy (paper, algorithm 1), equal sets merged."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..encoder.actions import assignment
from ..errors import SearchError

Lowest = Callable[[list[dict], int], list[float]]
"""Discrepancies of the so many best of a list of assignments (see rewire.Assignment), infinity for the others."""


NOT_FINITE = "whatever is removed next overflows in this precision: load the encoder in bfloat16 or float32"


@dataclass(frozen=True)
class SkipList:
    """A skip list in the order of removal, with its discrepancy. trail: the discrepancies of its first sub-blocks, one
    more from entry to entry, up to its own; empty where they are not known."""

    order: tuple[int, ...]
    discrepancy: float
    trail: tuple[float, ...] = field(default=(), compare=False)


def expand(beam: Sequence[SkipList], length: int) -> list[tuple[int, ...]]:
    """Every list of the beam extended by every sub-block not yet in it; of equal sets, the one from the best list."""
    found: dict[frozenset[int], tuple[int, ...]] = {}
    for skips in beam:
        for index in range(length):
            if index not in skips.order:
                found.setdefault(frozenset((*skips.order, index)), (*skips.order, index))
    return list(found.values())


def select(
    orders: Sequence[tuple[int, ...]], scores: Sequence[float], width: int, beam: Sequence[SkipList] = (),
    rounding: float = 0.0,
) -> list[SkipList]:  # fmt: skip
    """The `width` best; of equals, the lower sub-block removed last wins, then the better parent (the earlier). beam:
    the parents, which hand down their trails. rounding: scores count as equal where the next one is no further away,
    beside the width-th best."""
    rising = sorted(range(len(orders)), key=scores.__getitem__)
    gap = rounding * max((scores[i] for i in rising[:width] if scores[i] < math.inf), default=0.0)
    place, places = 0, {}
    for before, i in zip([None, *rising], rising, strict=False):
        place += before is not None and scores[i] - scores[before] > gap
        places[i] = place
    best_first = sorted(rising, key=lambda i: (places[i], orders[i][-1], i))
    trails = {skips.order: skips.trail for skips in beam}

    def longer(order: tuple[int, ...], score: float) -> SkipList:
        trail = trails.get(order[:-1], ())
        return SkipList(order, score, (*trail, score) if len(trail) == len(order) - 1 else ())

    return [longer(orders[i], scores[i]) for i in best_first[:width] if scores[i] < math.inf]


def search(
    lowest: Lowest, costs: Sequence[int], total: int, target: float, width: int, beam: Sequence[SkipList] = (),
    rounding: float = 0.0,
) -> Iterator[list[SkipList]]:  # fmt: skip
    """Yield the beam after each step, until its best list reaches the target sparsity.

    lowest: see `Lowest`. costs: parameters of each sub-block; total: of the encoder; target: fraction of `total` to
    remove; width: of the beam (k); beam: where to go on from, as yielded before; rounding: see `select`. Raises
    SearchError where even removing everything would not reach the target, and where nothing more can be removed without
    an overflow.
    """
    check_reach(costs, total, target)
    beam = list(beam) or [SkipList((), 0.0)]
    while sum(costs[i] for i in beam[0].order) < target * total:
        orders = expand(beam, len(costs))
        beam = select(orders, lowest([assignment(order) for order in orders], width), width, beam, rounding)
        if not beam:
            raise SearchError(NOT_FINITE)
        yield beam


def check_reach(costs: Sequence[int], total: int, target: float) -> None:
    """Raises SearchError where even removing everything would not reach the target sparsity."""
    if target * total > sum(costs):
        raise SearchError(
            f"a sparsity of {target:.0%} can't be reached: the blocks hold {sum(costs) / total:.1%} of this encoder's"
            " parameters; ask for less"
        )


def lowest(scores: Mapping[int, float], rounding: float, before: int | None = None) -> int:
    """The place with the lowest score. Of those no further above it than `rounding` beside it, it is `before` if that
    is among them, else the first place."""
    limit = min(scores.values()) * (1 + rounding)
    return min((place for place, score in scores.items() if score <= limit), key=lambda place: (place != before, place))


def reaching(order: Sequence[int], costs: Sequence[int], total: int, target: float) -> int:
    """Length of the first prefix of `order` whose sparsity reaches `target` (all of it where none does)."""
    removed = 0
    for length, index in enumerate(order):
        if removed >= target * total:
            return length
        removed += costs[index]
    return len(order)
