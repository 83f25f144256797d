"""Ways to choose what is removed, against the engine's searches and plain definitions."""

import itertools
import random

import pytest
import small
import torch

from benchmarks.reproduce import choices
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import assignment
from skrr_engine.search import naive

COSTS = [3, 9, 3, 9, 3, 9, 3, 9]


@pytest.fixture(scope="module")
def measure():
    """On a small trained-like encoder; every call is noted."""
    with torch.no_grad():
        module = small.build("llama")
        meter = small.meter("llama", module, small.prompts([5, 7]), [2])
        assert len(families.find(module)) == len(COSTS)
        return lambda orders: [d.total for d in meter.measure([assignment(order) for order in orders])]


def table(seed: int):
    """A discrepancy without any order in it: of each set, drawn by lot."""
    return lambda orders: [random.Random(f"{seed} {sorted(order)}").random() * len(order) for order in orders]


@pytest.mark.parametrize("width", [1, 3])
def test_beam_is_the_printed_one_with_merging(measure, width):
    found = choices.beam(measure, COSTS, 15, width)
    order, d = naive.skip(lambda removed: measure([tuple(removed)])[0], COSTS, sum(COSTS), 15 / sum(COSTS), width)
    assert list(found.order) == order and found.trail[-1] == pytest.approx(d)
    assert found.trail[:-1] == pytest.approx(measure([found.order[:n] for n in range(1, len(order))]))


def test_without_merging_permutations_fill_the_beam():
    """At a width of two the second place goes to the best set once more, in another order: then it is a beam of one. It
    must differ from the merged beam somewhere."""
    unlike = 0
    for seed in range(30):
        one, two, merged = (
            choices.beam(table(seed), COSTS, 24, width, merged)
            for width, merged in ((1, True), (2, False), (2, True))
        )  # fmt: skip
        assert len(set(two.order)) == len(two.order) and two.trail[-1] >= 0
        unlike += two.trail[-1] != merged.trail[-1]
        assert one.evaluations <= two.evaluations <= merged.evaluations
    assert unlike


def test_shortlist():
    """As long as all candidates it changes nothing; shorter, it measures fewer sets."""
    whole, same, short = (choices.beam(table(3), COSTS, 24, 1, shortlist=n) for n in (0, len(COSTS), 2))
    assert whole == same
    steps = len(short.order)
    assert short.evaluations == len(COSTS) + 2 * (steps - 1) < whole.evaluations


def test_per_parameter():
    """Each step takes what adds least for each of its parameters; lists of unlike sizes are refused."""
    d = table(5)
    found = choices.beam(d, COSTS, 24, per_parameter=True)
    for n in range(len(found.order)):
        before = found.order[:n]
        base = found.trail[n - 1] if n else 0.0
        added = {i: (d([(*before, i)])[0] - base) / COSTS[i] for i in range(len(COSTS)) if i not in before}
        assert min(added, key=lambda i: (added[i], i)) == found.order[n]
    assert found.order != choices.beam(d, COSTS, 24).order
    with pytest.raises(ValueError, match="width of 1"):
        choices.beam(d, COSTS, 24, 2, per_parameter=True)


def minimal(order) -> bool:
    gone = sum(COSTS[i] for i in order)
    return gone >= 24 and all(gone - COSTS[i] < 24 for i in order)


def test_random_sets_reach_the_target_with_none_too_many():
    draw = random.Random(0)
    sets = {choices.lot((), COSTS, 24, draw) for _ in range(300)}
    expected = {s for n in range(9) for s in itertools.combinations(range(8), n) if minimal(s)}
    assert sets == expected
    for _ in range(20):
        assert minimal(choices.lot((0, 1), COSTS, 24, draw))


@pytest.mark.parametrize("way", [choices.random_search, choices.evolution])
def test_equal_evaluations(way):
    """So many sets are measured, no set twice, and the best of them is returned; with enough it is the best of all."""
    calls: list = []

    def measure(orders):
        calls.extend(orders)
        return table(1)(orders)

    found = way(measure, COSTS, 24, 20, seed=2)
    assert len(calls) == len(set(calls)) == found.evaluations == 20
    assert found.trail == (min(table(1)(calls)),) and minimal(found.order)
    assert way(measure, COSTS, 24, 20, seed=2) == found != way(measure, COSTS, 24, 20, seed=3)
    every = [s for n in range(9) for s in itertools.combinations(range(8), n) if minimal(s)]
    assert way(table(1), COSTS, 24, 150).trail[0] == min(table(1)(every))


def test_evolution_descends():
    """On a landscape where every sub-block adds its own: nearer to the best than random search at equal evaluations."""
    worth = [random.Random(i).random() for i in range(40)]
    costs = [1, 3] * 20
    ways = (choices.random_search, choices.evolution)
    ends = [sum(w(lambda o: [sum(worth[i] for i in s) for s in o], costs, 30, 200, seed).trail[0] for seed in range(3))
            for w in ways]  # fmt: skip
    assert ends[1] < ends[0]
