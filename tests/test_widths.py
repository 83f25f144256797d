"""Widths: measurement, allocation and fit, against plain definitions on small encoders."""

import random

import numpy as np
import pytest
import small
import torch

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import KEEP, SKIP, Narrow
from skrr_engine.encoder.standin import NORMS, StandIn
from skrr_engine.encoder.trace import Tracer
from skrr_engine.encoder.units import activations, units_of
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.search import allocate, widths
from skrr_engine.search.allocate import Curve, Table
from skrr_engine.search.settings import Settings
from skrr_engine.standins import fit as standin
from skrr_engine.standins.fit import Fitting, Streams
from skrr_engine.standins.widths import Survey, fits, ladder, ranking, units_at

LENGTHS = [7, 9, 7, 12, 5, 9, 11, 8, 6, 10]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def calibrated(name: str, module, seed: int = 0) -> Calibration:
    batches = [small.batch(name, ids) for ids in small.prompts(LENGTHS, seed)]
    return Calibration(module, Tracer(module, families.find(module)), batches, small.batch(name, [[2]]))


@pytest.mark.parametrize("name", ["t5", "clip", "llama", "gemma3"])
def test_units_are_ranked_by_what_they_add(name):
    """Against the definition, token by token."""
    module = small.build(name)
    calibration = calibrated(name, module)
    streams = Streams(calibration, lambda: None)
    for place in range(4):
        own = units_at(streams)
        order = ranking(Survey(streams, own), 0.0)
        squares = 0
        for number, trace, pair in streams.here():
            if number:
                hidden, _ = activations(streams.row, place, pair.dense, trace.calls[place])
                weights = streams.weights(number, trace, pair.behind).double()
                squares = squares + (hidden.double().square() * weights.unsqueeze(-1)).sum(dim=(0, 1))
        scores = (squares * own.out.weight.double().square().sum(dim=0)).reshape(own.count, own.size).sum(dim=1)
        assert scores[order].tolist() == sorted(scores.tolist(), reverse=True)
        streams.go_on(KEEP)


@pytest.mark.parametrize("name", ["t5", "clip", "llama", "gemma3"])
def test_fits_at_several_widths_are_those_of_one_at_a_time(name):
    """All widths of a place in one pass, and each alone through the general fit."""
    module = small.build(name)
    calibration = calibrated(name, module)
    fitting = Fitting(rank=4, ridges=(0.03,))
    streams = Streams(calibration, lambda: None)
    for place in range(3):
        own = units_at(streams)
        survey = Survey(streams, own)
        order = ranking(survey, 0.1)
        tried = ladder(own)
        for count, action in zip(tried, fits(streams, survey, order, tried, fitting), strict=True):
            bare = Narrow(order[:count].sort().values) if count else SKIP
            alone, _ = standin.fit(calibration, {place: bare}, fitting)
            found = action.standin if count else action
            maps = [s.up.double() @ s.down.double() for s in (found, alone[place])]
            torch.testing.assert_close(*maps, rtol=2e-2, atol=2e-3)
            torch.testing.assert_close(found.bias, alone[place].bias, rtol=1e-3, atol=1e-3)
        streams.go_on(KEEP)


def brute(curves, counts, cost, limit):
    """The least sum of discrepancies over all combinations of widths that take at most `limit` bytes."""
    best = [(0.0, 0.0)]
    for place, curve in curves.items():
        points = [(counts[place], 0.0), *curve.points]
        best = [(b + cost(place, n), d + e) for b, d in best for n, e in points]
    return min(d for b, d in best if b <= limit + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_best_there_is(seed):
    """At each of its own budgets, against every combination of widths; discrepancies that add up."""
    lot = random.Random(seed)
    counts = {place: 8 for place in range(4)}

    def cost(place, units):
        return units * (place % 2 * 2 + 1) + 0.25 * (units < 8)

    curves = {
        place: Curve(tuple(range(8)), tuple((n, lot.random() * (8 - n) ** lot.choice((1, 2))) for n in (6, 4, 2, 0)))
        for place in counts
    }
    steps = allocate.steps(curves, counts, cost)
    assert [s.price for s in steps] == sorted(s.price for s in steps)
    for end in range(1, len(steps) + 1):
        left = {**counts, **allocate.left(steps[:end])}
        spent = sum(cost(place, units) for place, units in left.items())
        now = {step.place: step.discrepancy for step in steps[:end]}
        assert sum(now.values()) == pytest.approx(brute(curves, counts, cost, spent))


def test_hull_leaves_out_what_is_worse():
    points = [(10, 0.0), (8, 5.0), (6, 1.0), (4, 1.6), (2, 9.0), (1, 4.0), (12, 3.0), (10, 1.0)]
    assert allocate.hull(points) == [0, 2, 3, 5]
    assert allocate.hull([(10, 0.0)]) == [0]


@pytest.fixture(scope="module", params=["t5", "llama", "gemma3"])
def searched(request):
    with torch.no_grad():
        name = request.param
        module = small.build(name)
        fitted, ranked = calibrated(name, module), calibrated(name, module, 1)
        settings = Settings(0.3, further=(0.2, 0.5, 0.9999))
        run = widths.Search(fitted, Meter(ranked), settings, Fitting(rank=4))
        saved = []
        table = run.measure(saved.append)
        return name, module, fitted, Meter(ranked), settings, table, saved, run.found(table)


def test_a_search_gives_levels_whose_discrepancies_are_theirs(searched):
    name, module, fitted, meter, settings, table, saved, found = searched
    row = families.find(module)
    entry = found.entry
    assert len(saved) == len(row) and set(table.curves) == set(range(len(row)))
    for level in entry.levels:
        left = {i: found.orders[i][:n] for i, n in entry.narrowed(level).items()}
        from skrr_engine.encoder.actions import assignment

        removed = assignment(entry.left(level), None, found.standins[level.skipped], left)
        (d,) = meter.measure([removed])
        assert d.total == pytest.approx(level.discrepancy, rel=1e-5)
        assert level.sparsity == pytest.approx(row.sparsity(entry.shares(level)), abs=1e-6)
    sparsities = [level.sparsity for level in entry.levels]
    assert sparsities == sorted(sparsities) and len(sparsities) >= 2


def test_a_search_goes_on_where_it_stopped(searched):
    """From every saved table, and from an interruption: the same table and entry."""
    name, module, fitted, meter, settings, table, saved, found = searched
    for half in (saved[0], saved[len(saved) // 2]):
        again = widths.Search(fitted, meter, settings, Fitting(rank=4)).measure(lambda table: None, half)
        assert again.curves.keys() == table.curves.keys()
        for place, curve in again.curves.items():
            assert curve.order == table.curves[place].order
            np.testing.assert_allclose([d for _, d in curve.points], [d for _, d in table.curves[place].points], 1e-4)


def test_state_holds_a_table(searched, tmp_path):
    from skrr_engine.search.resume import State, StateError

    *_, table, _, _ = searched
    state = State(tmp_path / "state.json", "key")
    state.save(table)
    assert state.load(len(table.curves)) == table
    with pytest.raises(StateError, match="no state of a search"):
        state.load(len(table.curves) - 1)
    broken = Table({0: Curve((0, 0, 1), ((1, 0.5),))})
    state.save(broken)
    with pytest.raises(StateError, match="no state of a search"):
        state.load(len(table.curves))


def test_narrow_units_follow_the_hand_made_norm():
    assert set(NORMS) == {"rms", "layer"} and StandIn.open is False and Narrow(torch.arange(2)).open
    assert units_of(families.find(small.build("llama")), 0).count == 2


@pytest.mark.parametrize("name", ["t5", "clip", "llama"])
def test_a_refitted_out_projection_comes_closer(name):
    """Two places narrowed: the stream behind each is nearer to the dense one than with stand-ins alone; nothing that is
    whole changes; walk and rewired encoder agree."""
    from skrr_engine.encoder.rewire import rewire, undo
    from skrr_engine.measure.walk import Walk
    from skrr_engine.standins.refit import refit

    module = small.build(name)
    calibration, meter = calibrated(name, module), Meter(calibrated(name, module))
    row, fitting = families.find(module), Fitting(rank=2, ridges=(0.003,))
    chosen = {1: torch.arange(0, 64, 2), 4: torch.tensor([0])}
    bare = {place: Narrow(units) for place, units in chosen.items()}
    found, _ = standin.fit(calibration, bare, fitting)
    plain = {place: action.repaired(found[place]) for place, action in bare.items()}
    better = refit(calibration, plain, fitting)
    assert better.keys() == bare.keys() and all(
        a.out.shape == (32, len(units_of(row, p).columns(a.units))) for p, a in better.items()
    )
    d_plain, d_better = meter.measure([plain, better])
    assert d_better.conditional < 0.95 * d_plain.conditional
    run = small.batch(name, [[5, 9, 33, 4], [8, 7, 6, 5]]).run
    tracer = Tracer(module, row)
    ((_, walked),) = Walk(tracer)(tracer.trace(run), [better])
    replaced = rewire(module, row, better)
    rewired = run(module)[0][0]
    undo(module, replaced)
    torch.testing.assert_close(walked[0][0], rewired, rtol=1e-4, atol=1e-5)
    whole = {1: Narrow(torch.arange(64))}
    (same,) = meter.measure([refit(calibration, whole, fitting)])
    assert same.total < 1e-6
