"""The paper's theory in code: constants, bounds and distances against what they are defined as."""

import numpy as np
import pytest
import small
import torch
from scipy import stats

from benchmarks import bound
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import assignment
from skrr_engine.encoder.trace import Tracer

REMOVED = [{3: None}, {2: None, 5: 3}, {0: None, 1: 3, 4: 2, 7: None}]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def lemma_of(name: str) -> bound.Lemma:
    module = small.build(name)
    (ids,) = small.prompts([6])
    return bound.Lemma(families.find(module), Tracer(module, families.find(module)).trace(small.batch(name, ids).run))


def test_slope_is_the_largest_singular_value():
    """Of a linear map, of each prompt alone; and never above it for an attention."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 8, generator=draw)
    x = torch.randn(3, 5, 8, generator=draw)
    scale = torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
    found = bound.slope(lambda x: scale * (x @ weight.T), x, steps=60)
    expected = torch.linalg.svdvals(weight.double())[0] * scale.flatten().double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    lemma = lemma_of("llama")
    f = bound.inner(lemma.row, 2, lemma.trace)
    one = lemma.dense[2][:1]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.func.jacrev(f)(one).reshape(one.numel(), one.numel())
    expected = float(torch.linalg.svdvals(jacobian.double())[0])
    assert 0.9 * expected < float(bound.slope(f, one, steps=20)[0]) < 1.001 * expected


@pytest.mark.parametrize("name", ["t5", "llama", "gemma3"])
def test_the_bound_holds_and_streams_are_the_encoders_own(name):
    """For every assignment; and the distance is that of the encoder's own stream, pruned by the walk."""
    lemma = lemma_of(name)
    for short in REMOVED:
        removed = assignment(short, {i: j for i, j in short.items() if j is not None})
        found = lemma.distances(removed)
        assert (found.secant >= found.true * (1 - 1e-6)).all() and (found.true > 0).all()
        assert found.local.isfinite().all() and (found.local > 0).all()
        x = lemma.trace.x
        for place, sub_block in enumerate(lemma.row.sub_blocks):
            call = lemma.trace.calls[place]
            x = removed[place].apply(x, lemma.row, place, call) if place in removed else sub_block.apply(x, call)
        torch.testing.assert_close(found.true, bound.length(x - lemma.dense[-1]), rtol=1e-4, atol=1e-6)
    nothing = lemma.distances({})
    assert float(nothing.true.max()) == float(nothing.secant.max()) == float(nothing.local.max()) == 0


def test_the_last_sub_blocks_bound_is_exact():
    """Nothing comes behind it to multiply what a skip or a re-use moves."""
    lemma = lemma_of("llama")
    last = len(lemma.row) - 1
    for reuse in ({}, {last: last - 2}):
        found = lemma.distances(assignment([last], reuse))
        for one in (found.secant, found.local, lemma.moved(last, reuse.get(last))):
            torch.testing.assert_close(found.true, one, rtol=1e-4, atol=1e-6)


def test_relative_distance():
    """Zero to itself; of twice the same parameters 1 or a half; of unlike ones the square root of two, about."""
    module = small.build("llama")
    row = families.find(module)
    assert bound.relative_distance(row, 2, 2) == 0
    own, other = bound.theta(row, 2), bound.theta(row, 4)
    assert own.keys() == other.keys() and len(own) == 5
    flat = [torch.cat([t.flatten() for t in part.values()]).double() for part in (own, other)]
    expected = float((flat[0] - flat[1]).norm() / flat[0].norm())
    assert bound.relative_distance(row, 2, 4) == pytest.approx(expected)
    for key, tensor in own.items():
        other[key].copy_(2 * tensor)
    assert bound.relative_distance(row, 2, 4) == pytest.approx(1)
    assert bound.relative_distance(row, 4, 2) == pytest.approx(0.5)


def test_ranks():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 6, 40), draw.normal(size=40)
    assert bound.rank_correlation(a, a + 0.3 * b) == pytest.approx(stats.spearmanr(a, a + 0.3 * b).statistic)
    assert np.isnan(bound.rank_correlation([1, 1], [1, 2]))
    accepted = b > 0.2
    test = stats.mannwhitneyu(a[accepted], a[~accepted]).statistic / (accepted.sum() * (~accepted).sum())
    assert bound.told_apart(a, accepted) == pytest.approx(1 - test)
    assert np.isnan(bound.told_apart([1, 2], [True, True]))
