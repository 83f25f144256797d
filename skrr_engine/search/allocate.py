"""A budget spent over many places at once: where a byte costs least discrepancy, it goes first.

Each place has a curve: its discrepancy, with only that place changed, against what it then weighs. Of its points only
those on the lower convex hull are of use. Going down all hulls in the order of discrepancy per byte gives one list of
steps, and any budget is a prefix of it: the best there is, as far as discrepancies of different places add up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Curve:
    """One place. order: numbers of all its units, those that stay longest first (empty where it can't be narrowed);
    points: (units that stay, discrepancy with only this place changed), infinite where that is not finite."""

    order: tuple[int, ...]
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Table:
    """What was measured so far: place -> its curve."""

    curves: Mapping[int, Curve] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.curves)


@dataclass(frozen=True)
class Step:
    """One step of an allocation. place; units: of it that stay from here on, 0 for none; discrepancy: of that place
    alone then; price: discrepancy for each byte that the step frees."""

    place: int
    units: int
    discrepancy: float
    price: float


Cost = Callable[[int, int], float]
"""(place, units that stay) -> bytes that the place takes then."""


def hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (bytes, discrepancy) on the lower convex hull, from the largest down to the smallest that
    is worth going to. The first point is where one stands."""
    rising = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    start = rising.index(0)
    chain = [0]
    for i in rising[start + 1 :]:
        if points[i][0] >= points[chain[-1]][0]:
            continue
        while len(chain) > 1 and slope(points[chain[-2]], points[chain[-1]]) >= slope(points[chain[-2]], points[i]):
            chain.pop()
        chain.append(i)
    return chain


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Discrepancy for each byte freed, from a to the smaller b."""
    return (b[1] - a[1]) / (a[0] - b[0])


def steps(curves: Mapping[int, Curve], counts: Mapping[int, int], cost: Cost) -> list[Step]:
    """The steps of all hulls, the cheapest first. counts: place -> how many units it has. A curve without a point for
    all of them has none to lose there."""
    found = []
    for place, curve in sorted(curves.items()):
        known = [(units, d) for units, d in curve.points if d < float("inf") and units < counts[place]]
        widths = [counts[place], *(units for units, _ in known)]
        whole = next((d for units, d in curve.points if units == counts[place]), 0.0)
        points = [(cost(place, units), d) for units, d in zip(widths, [whole, *(d for _, d in known)], strict=True)]
        chain = hull(points)
        for before, after in zip(chain, chain[1:], strict=False):
            price = slope(points[before], points[after])
            found.append(Step(place, widths[after], points[after][1], price))
    return sorted(found, key=lambda step: step.price)  # stable: within a place the hull's own order stays


def left(steps: Sequence[Step]) -> dict[int, int]:
    """Place -> units that stay after these steps."""
    return {step.place: step.units for step in steps}
