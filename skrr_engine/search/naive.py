"""The paper's two algorithms as they are printed, to read with the paper: skip.py and reuse.py do the same, faster.

The tests hold the fast ones against these. discrepancy: assignment -> D, see measure/discrepancy.py; costs: parameters
of each sub-block; total: of the encoder.
"""

from collections.abc import Callable, Mapping, Sequence

from ..encoder.actions import Action, Reuse, assignment

Measure = Callable[[Mapping[int, Action]], float]


def skip(discrepancy: Measure, costs: Sequence[int], total: int, target: float, beam: int) -> tuple[list[int], float]:
    """Algorithm 1: the list of sub-blocks to skip that reaches the target sparsity, and its D."""
    lists: list[tuple[list[int], float]] = [([], 0.0)]
    while sum(costs[i] for i in lists[0][0]) < target * total:
        extended: dict[frozenset[int], tuple[float, int, int, list[int]]] = {}  # equal sets are merged
        for parent, (order, _) in enumerate(lists):
            for i in set(range(len(costs))) - set(order):
                longer = [*order, i]
                if frozenset(longer) not in extended:
                    extended[frozenset(longer)] = discrepancy(assignment(longer)), i, parent, longer
        lists = [(order, d) for d, _, _, order in sorted(extended.values())[:beam]]
    return lists[0]


def reuse(discrepancy: Measure, order: Sequence[int], length: int) -> tuple[dict[int, int], float]:
    """Algorithm 2: which kept sub-blocks stand in for the skipped ones of one level (place -> target), and its D.

    length: of the row.
    """
    actions = assignment(order)
    best = discrepancy(actions)
    for i in order:
        kept = [j for j in range(i % 2, length, 2) if j not in order]
        nearest = [max((j for j in kept if j < i), default=None), min((j for j in kept if j > i), default=None)]
        for target in (j for j in nearest if j is not None):
            tried = {**actions, i: Reuse(target)}
            if (d := discrepancy(tried)) < best:
                actions, best = tried, d
    return {i: action.target for i, action in actions.items() if action.target is not None}, best
