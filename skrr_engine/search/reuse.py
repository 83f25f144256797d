"""Which kept sub-blocks stand in for skipped ones: paper, algorithm 2."""

from collections.abc import Sequence

from ..encoder.actions import SKIP, Reuse, assignment
from .skip import Lowest


def neighbours(index: int, skipped: frozenset[int], length: int) -> list[int]:
    """The nearest kept sub-blocks of the same type to the left and to the right of a skipped one, where there are."""
    left = next((i for i in range(index - 2, -1, -2) if i not in skipped), None)
    right = next((i for i in range(index + 2, length, 2) if i not in skipped), None)
    return [i for i in (left, right) if i is not None]


def search(lowest: Lowest, order: Sequence[int], length: int, rounding: float = 0.0) -> tuple[dict[int, int], float]:
    """The re-use map of one level and its discrepancy.

    order: the skipped sub-blocks in skip order; length: of the row. For each in turn, with the re-uses accepted so far
    in place, the better neighbour (of equals the left one) is accepted where it is lower than staying skipped.
    rounding: what is no further above the best, beside it, counts as equal.
    """
    skipped = frozenset(order)
    reuse: dict[int, int] = {}
    (current,) = lowest([assignment(order)], 1)
    for index in order:
        options = [SKIP, *map(Reuse, neighbours(index, skipped, length))]
        scores = lowest([{**assignment(order, reuse), index: option} for option in options], 1)
        best = next(i for i, score in enumerate(scores) if score <= min(scores) * (1 + rounding))
        if options[best] != SKIP:
            reuse[index], current = options[best].target, scores[best]
    return reuse, current
