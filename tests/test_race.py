"""Ranking without measuring everything: exact at delta 0 whatever the contributions, seldom wrong when racing."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from skrr_engine.measure.calibration import FIRST_LOOK, grouped
from skrr_engine.measure.elimination import Board, lowest, t_margin

CONTRIBUTION = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0, 1.0000000000000002, 1e-16, 7.0])


def measured(null, values, sizes, keep, delta=0.0, below=math.inf, expected=None):
    """The ranking of candidates with these contributions, and how many of them were looked at."""
    null, values = np.array(null), np.array(values)
    weights = np.split(np.full(sum(sizes), 1 / sum(sizes)), np.cumsum(sizes)[:-1])
    board = Board(len(null), weights, expected)
    board.null[:] = null

    def evaluate(members, batches):
        for batch in batches:
            span = board.spans[batch]
            assert np.isnan(board.values[members, span]).all(), "measured twice"
            board.values[members, span] = values[members, span]

    return lowest(board, evaluate, keep, delta, below), int((~np.isnan(board.values)).sum())


@st.composite
def tables(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    candidates = draw(st.integers(1, 8))
    row = st.lists(CONTRIBUTION, min_size=sum(sizes), max_size=sum(sizes))
    values = draw(st.lists(row, min_size=candidates, max_size=candidates))
    null = draw(st.lists(CONTRIBUTION, min_size=candidates, max_size=candidates))
    return null, values, sizes


@settings(max_examples=300, deadline=None)
@given(tables(), st.integers(1, 4))
@example(([0.0, 0.0, 0.0], [[1.0], [1.0], [1.0]], [1]), 2)
def test_exact_finds_the_best_and_their_ties(table, keep):
    null, values, sizes = table
    found, _ = measured(null, values, sizes, keep)
    sums = [math.fsum(row) + n for row, n in zip(values, null, strict=True)]
    limit = sorted(sums)[min(keep, len(sums)) - 1]
    assert found == [s if s <= limit else math.inf for s in sums]


@settings(deadline=None)
@given(tables(), st.integers(1, 4), st.data())
def test_what_is_expected_of_prompts_changes_no_result(table, keep, data):
    null, values, sizes = table
    expected = np.array(data.draw(st.lists(st.floats(0, 1), min_size=sum(sizes), max_size=sum(sizes))))
    assert measured(null, values, sizes, keep, expected=expected)[0] == measured(null, values, sizes, keep)[0]


def test_batches_that_tell_most_are_measured_first():
    # 40 candidates 1 to 10 % behind the best one; a fifth of the prompts holds 98 % of every sum.
    shares = np.repeat([0.001, 0.001, 0.001, 0.001, 0.196], 5)
    values = np.outer(1 + 0.1 * np.linspace(0, 1, 41), shares)
    null, sizes = [0.0] * 41, [1] * 25
    found, looked = measured(null, values, sizes, 1)
    again, fewer = measured(null, values, sizes, 1, expected=shares)
    assert again == found and fewer < 0.75 * looked
    board = Board(41, [np.full(1, 1 / 25)] * 25)
    assert (board.shares() == board.expected).all(), "nothing complete tells nothing"
    board.values[3], board.null[3] = values[3], 0.0
    np.testing.assert_allclose(board.shares(), shares / shares.sum())


@given(tables(), st.sampled_from([0.05, 0.5, 2.0]))
def test_nothing_above_a_limit_is_returned(table, below):
    null, values, sizes = table
    found, _ = measured(null, values, sizes, 1, 0.0, below)
    sums = [math.fsum(row) + n for row, n in zip(values, null, strict=True)]
    best = min(min(sums), below)
    assert found == [s if s <= best else math.inf for s in sums]


def synthetic(seed, candidates=100, prompts=256):
    """Contributions as calibration gives them: prompts differ much, candidates differ alike on all of them."""
    draw = np.random.default_rng(seed)
    level = draw.gamma(4.0, 0.25, candidates) + 0.5
    hardness = draw.lognormal(0.0, 0.5, prompts)
    values = level[:, None] * hardness * draw.lognormal(0.0, 0.15, (candidates, prompts)) / prompts
    return 0.1 * level, values, [4] * (prompts // 4)


@pytest.mark.parametrize("delta, most, share", [(0.05, 0.25, 0.25), (0.0, 0.0, 0.8)])
def test_races_are_short_and_seldom_wrong(delta, most, share):
    wrong, looked = 0, 0
    for seed in range(12):
        null, values, sizes = synthetic(seed)
        found, count = measured(null, values, sizes, 3, delta)
        sums = values.sum(axis=1) + null
        kept = sorted(range(len(sums)), key=found.__getitem__)[:3]
        wrong += set(kept) != set(np.argsort(sums)[:3])
        looked += count
        assert all(found[c] < math.inf for c in kept), "fewer than asked for came through"
        assert sums[kept[0]] <= 1.02 * sums.min() and sums[kept].sum() <= 1.02 * np.sort(sums)[:3].sum()
    assert wrong <= most * 12
    assert looked < share * 12 * values.size


def test_equals_are_not_raced_against_each_other():
    values = np.tile(np.random.default_rng(0).random(64), (6, 1))
    found, _ = measured(np.zeros(6), values, [1] * 64, 2, 0.05)
    assert len({*found}) == 1 and found[0] < math.inf


@pytest.mark.parametrize("freedom", [3, 7, 20, 100])
@pytest.mark.parametrize("share", [0.05, 1e-3, 1e-6, 1e-90])
def test_t_margin(share, freedom):
    assert stats.t.sf(t_margin(share, freedom), freedom) == pytest.approx(share, rel=1e-6)
    assert 10 < t_margin(5e-324, freedom) < math.inf


@pytest.mark.parametrize("delta", [1e-16, 5e-324])
def test_hardly_any_risk_loses_nobody(delta):
    values = np.random.default_rng(0).random((5, 40))
    found, _ = measured(np.zeros(5), values, [1] * 40, 2, delta)
    sums = values.sum(axis=1)
    assert found == pytest.approx([s if s <= sorted(sums)[1] else math.inf for s in sums])


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(0, 5), st.booleans())
def test_groups_hold_everything_once_and_one_kind_each(kinds, size, race):
    groups = list(grouped(kinds, lambda kind: size, race))
    assert sorted(position for group in groups for position in group) == list(range(len(kinds)))
    assert all(len({kinds[i] for i in group}) == 1 and len(group) <= max(size, 1) for group in groups)
    assert groups == list(grouped(kinds, lambda kind: size, race)), "another order on another run"


def test_a_race_first_sees_prompts_of_all_kinds():
    """What is best on short prompts is not what is best on all: looking at one length after the other would lose it."""
    kinds = [4] * 40 + [5] * 40 + [6] * 40 + [7] * 40
    draw = np.random.default_rng(0)
    values = 1 + 0.01 * draw.standard_normal((20, 160))
    values[0] *= np.repeat([1.2, 0.9, 0.9, 0.9], 40)  # the best of all, though the worst on the short ones
    values /= values.shape[1]
    groups = list(grouped(kinds, lambda kind: 8, race=True))
    assert len({kinds[i] for group in groups[:4] for i in group}) > 1
    assert sum(map(len, groups[:4])) <= FIRST_LOOK

    def raced(groups):
        table = values[:, [i for group in groups for i in group]]
        return measured(np.zeros(20), table, [len(group) for group in groups], 1, 0.05)[0]

    assert raced(groups)[0] < math.inf
    assert raced(list(grouped(kinds, lambda kind: 8)))[0] == math.inf, "nothing is to be lost here: no test"


@settings(deadline=None)
@given(tables(), st.integers(1, 3), st.sampled_from([0.0, 0.05]), st.data())
def test_overflowing_candidates_are_never_among_the_best(table, keep, delta, data):
    """Infinite contributions, of any prompts or of the null prompt: the others are ordered as without them."""
    null, values, sizes = table
    ill = data.draw(st.sets(st.integers(0, len(null) - 1)))
    for c in ill:
        place = data.draw(st.integers(-1, sum(sizes) - 1))
        if place < 0:
            null[c] = math.inf
        else:
            values[c][place] = math.inf
    found, _ = measured(null, values, sizes, keep, delta)
    assert all(found[c] == math.inf for c in ill)
    well = [c for c in range(len(null)) if c not in ill]
    if not delta and len(well) >= keep:
        alone, _ = measured([null[c] for c in well], [values[c] for c in well], sizes, keep)
        assert [found[c] for c in well] == alone
    elif well:
        assert any(found[c] < math.inf for c in well)


def test_a_race_whose_winner_overflows_in_the_end_goes_on_with_those_that_fell_behind():
    values = np.full((4, 64), 1.0)
    values[1:] = np.random.default_rng(0).uniform(2, 3, (3, 64))
    values[0, -1] = math.inf  # by far the best until the last prompt is seen
    found, _ = measured([0.0] * 4, values.tolist(), [4] * 16, 1, 0.05)
    alone, _ = measured([0.0] * 3, values[1:].tolist(), [4] * 16, 1)
    assert found[0] == math.inf and found[1:] == alone and min(alone) < math.inf


def test_a_race_keeps_what_is_equal_but_for_rounding():
    draw = np.random.default_rng(0)
    values = np.outer(np.full(8, 1.0), draw.uniform(1, 2, 64)) * (1 + 1e-7 * draw.standard_normal((8, 64)))
    found, _ = measured([0.0] * 8, values.tolist(), [4] * 16, 2, 0.05)
    assert max(found) < math.inf, "of equals, rounding has chosen"
