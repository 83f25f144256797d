"""Ways to choose what is removed, to hold the paper's search against: its beam with and without merging equal sets, by
discrepancy or by what a parameter costs, on all candidates or the likeliest; random search; evolution.

All of them count what they measure. The engine's own searches (skrr_engine/search) do the first of these with a
fraction of the work, but not the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Measure = Callable[[list[tuple[int, ...]]], list[float]]
"""Discrepancies of lists of skipped sub-blocks."""


@dataclass(frozen=True)
class Found:
    """order: skipped sub-blocks, first to last (rising where the way has no order); trail: the discrepancy after each
    (only the last one's where there is no order); evaluations: sets that were measured."""

    order: tuple[int, ...]
    trail: tuple[float, ...]
    evaluations: int


class Counted:
    """Measures each set once, and counts them."""

    def __init__(self, measure: Measure):
        self.measure, self.known = measure, {}

    def __call__(self, orders: Sequence[tuple[int, ...]]) -> list[float]:
        new = list({frozenset(order): order for order in orders if frozenset(order) not in self.known}.values())
        self.known |= {frozenset(order): d for order, d in zip(new, self.measure(new) if new else (), strict=True)}
        return [self.known[frozenset(order)] for order in orders]

    def __len__(self) -> int:
        return len(self.known)


def beam(
    measure: Measure, costs: Sequence[int], target: float, width: int = 1, merged: bool = True, shortlist: int = 0,
    per_parameter: bool = False,
) -> Found:  # fmt: skip
    """Beam search over skip lists until the best one has removed `target` parameters.

    costs: parameters of each sub-block. merged: whether of lists of one set only the best is kept; without that, as
    the algorithm is printed, a beam can fill with permutations. shortlist: of a list, only so many candidates are
    measured, those that added least when they were last measured (0: all). per_parameter: the candidate goes that adds
    least discrepancy for each of its parameters, which compares the extensions of one list only: for a width of 1.
    """
    if per_parameter and width != 1:
        raise ValueError("lists of unlike sizes can't be compared by what a parameter costs: use a width of 1")
    counted, added = Counted(measure), dict.fromkeys(range(len(costs)), 0.0)
    lists: list[tuple[tuple[int, ...], tuple[float, ...]]] = [((), ())]
    while sum(costs[i] for i in lists[0][0]) < target:
        tried, sets = [], set()
        for order, trail in lists:
            likely = sorted(set(added) - set(order), key=lambda i: (price(added[i], i, costs, per_parameter), i))
            for i in likely[: shortlist if order and shortlist else None]:
                if not merged or frozenset((*order, i)) not in sets:  # else it is there, from a better list
                    tried.append((order, trail, i))
                    sets.add(frozenset((*order, i)))
        scores = counted([(*order, i) for order, _, i in tried])
        ranked = []
        for number, ((order, trail, i), score) in enumerate(zip(tried, scores, strict=True)):
            added[i] = score - (trail[-1] if trail else 0.0)
            score_by = price(added[i], i, costs, True) if per_parameter else score
            ranked.append((score_by, i, number, (*order, i), (*trail, score)))
        lists = [(order, trail) for *_, order, trail in sorted(ranked)[:width]]
    return Found(*lists[0], len(counted))


def price(added: float, index: int, costs: Sequence[int], per_parameter: bool) -> float:
    return added / costs[index] if per_parameter else added


def lot(chosen: Collection[int], costs: Sequence[int], target: float, draw: random.Random) -> tuple[int, ...]:
    """A set that has `chosen` in it as far as that is needed, and removes `target` parameters with none too many: more
    are drawn until it does, then those are put back, drawn too, without which it still would."""
    made = list(chosen)
    others = [i for i in range(len(costs)) if i not in made]
    draw.shuffle(others)
    while sum(costs[i] for i in made) < target:
        made.append(others.pop())
    for i in draw.sample(made, len(made)):
        if sum(costs[j] for j in made) - costs[i] >= target:
            made.remove(i)
    return tuple(sorted(made))


def random_search(measure: Measure, costs: Sequence[int], target: float, evaluations: int, seed: int = 0) -> Found:
    """The best of so many random sets."""
    draw, counted = random.Random(seed), Counted(measure)
    sets = different(lambda: lot((), costs, target, draw), evaluations, ())
    score, best = min(zip(counted(sets), sets, strict=True))
    return Found(best, (score,), len(counted))


def evolution(
    measure: Measure, costs: Sequence[int], target: float, evaluations: int, seed: int = 0, parents: int = 4,
    offspring: int = 16,
) -> Found:  # fmt: skip
    """Evolution in EvoPress's manner, with so many evaluations: from the best of as many random sets as offspring, each
    generation puts back one or two sub-blocks of a parent, drawn by lot, and draws others until the target is reached
    again; the best of parents and offspring are the next parents."""
    draw, counted = random.Random(seed), Counted(measure)

    def child() -> tuple[int, ...]:
        _, parent = draw.choice(alive)
        back = draw.sample(parent, min(len(parent), draw.choice((1, 2))))
        return lot([i for i in parent if i not in back], costs, target, draw)

    made = different(lambda: lot((), costs, target, draw), min(offspring, evaluations), ())
    alive = sorted(zip(counted(made), made, strict=True))[:parents]
    while len(counted) < evaluations:
        known = [tuple(sorted(one)) for one in counted.known]
        made = different(child, min(offspring, evaluations - len(counted)), known)
        if not made:
            break
        alive = sorted([*alive, *zip(counted(made), made, strict=True)])[:parents]
    score, best = alive[0]
    return Found(best, (score,), len(counted))


def different(make: Callable[[], tuple[int, ...]], count: int, known: Collection[tuple[int, ...]]) -> list:
    """So many different sets, none of the known ones; fewer where a hundred tries for each don't find them."""
    found: dict[tuple[int, ...], None] = {}
    known = set(known)
    for _ in range(100 * count):
        if len(found) == count:
            break
        one = make()
        if one not in known:
            found[one] = None
    return list(found)
