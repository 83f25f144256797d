"""The engine's search gives the plan of the naive loop, on every family and on SmolLM2's first removals."""

import math

import pytest
import reference
import small
import torch

from skrr_engine.encoder import families
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.plan.text import PlanError
from skrr_engine.search import naive, reuse, skip
from skrr_engine.search.run import measure_level, search
from skrr_engine.search.settings import Settings


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def project(x: torch.Tensor) -> torch.Tensor:
    """A fixed projection to 20 features."""
    return x @ torch.linspace(-1, 1, x.shape[-1] * 20).reshape(x.shape[-1], 20).sin()


def by_passes(name, module, prompts, null, projection=None):
    runs = [small.forward(name, ids) for ids in prompts]
    empty = small.forward(name, [null])
    run_all = lambda: [features for run in runs for features in run(module)]  # noqa: E731
    return reference.naive_discrepancy(module, small.family_of(name), run_all, lambda: empty(module)[0], projection)


@pytest.mark.parametrize("projection", [None, project])
@pytest.mark.parametrize("name", ["t5", "umt5", "clip", "llama", "gemma3"])
def test_same_plan_as_the_naive_loop(name, projection):
    module = small.build(name, layers=5, seed=3)
    prompts = small.prompts([5, 9, 7, 7, 12], seed=1)
    null = [7, 2] if name == "clip" else [1]
    meter = small.meter(name, module, prompts, null, projection)
    row = meter.tracer.row
    plan = search(meter, Settings(0.4, (0.15,), 3))
    discrepancy = by_passes(name, module, prompts, null, projection)
    order, _ = naive.skip(discrepancy, list(row.parameter_counts), row.total, 0.4, 3)
    assert list(plan.order) == order
    assert row.sparsity(order) >= 0.4 > row.sparsity(order[:-1])
    assert len(plan.levels) == 2 and plan.levels[0].sparsity >= 0.15
    for level in plan.levels:
        reuse, score = naive.reuse(discrepancy, order[: level.skipped], len(row))
        assert level.reuse == reuse
        assert level.discrepancy == pytest.approx(score, rel=1e-5)
        assert level.sparsity == pytest.approx(row.sparsity(order[: level.skipped]), abs=1e-6)
        assert measure_level(meter, plan, level).total == pytest.approx(level.discrepancy, rel=1e-5)


def test_reuse_is_found_where_it_helps():
    module = small.build("llama", layers=4)
    third, second = module.layers[2], module.layers[1]
    third.load_state_dict(second.state_dict())  # block 2 is a copy of block 1: one can stand in for the other
    meter = small.meter("llama", module, small.prompts([6, 8]), [1])
    plan = search(meter, Settings(0.2, (), 2))
    level = plan.levels[-1]
    plain = search(meter, Settings(0.2, (), 2, reuse=False)).levels[-1]
    assert plain.reuse == {} and level.discrepancy <= plain.discrepancy


def test_smollm2_first_removals(smollm2_folder):
    """On the first blocks of a trained encoder."""
    from skrr_engine.files.folder import load

    encoder = load(smollm2_folder)
    module = encoder.module
    del module.layers[8:]
    tracer = Tracer(module, families.find(module))
    prompts = ["a red cube", "two dogs under a table"]
    batches, null = encoder.batches(prompts), encoder.batch([encoder.tokenize("")])
    meter = Meter(Calibration(module, tracer, batches, null))
    plan = search(meter, Settings(0.06, (), 2))
    run = lambda: [tokens for batch in batches for tokens in batch.run(module)[0][0]]  # noqa: E731
    discrepancy = reference.naive_discrepancy(module, "llama", run, lambda: null.run(module)[0][0][0])
    row = tracer.row
    order, _ = naive.skip(discrepancy, list(row.parameter_counts), row.total, 0.06, 2)
    assert list(plan.order) == order and len(order) >= 2
    assert plan.levels[-1].reuse == naive.reuse(discrepancy, order, len(row))[0]


def test_equal_sets_are_one_candidate():
    beam = [skip.SkipList((4, 1), 0.1), skip.SkipList((4, 3), 0.2), skip.SkipList((1, 3), 0.3)]
    orders = skip.expand(beam, 6)
    sets = [frozenset(order) for order in orders]
    assert len(sets) == len(set(sets))
    assert (4, 1, 3) in orders and (4, 3, 1) not in orders and (1, 3, 4) not in orders, "the best path's order is kept"


def test_ties_go_to_the_lower_sub_block():
    module = small.build("llama", layers=4)
    for index in (1, 2):
        module.layers[index].mlp.down_proj.weight.zero_()  # sub-blocks 3 and 5 do nothing at all
    meter = small.meter("llama", module, small.prompts([6]), [1])
    plan = search(meter, Settings(0.2, (), 3, reuse=False, delta=0.0))
    assert plan.order[:2] == (3, 5) and plan.levels[0].discrepancy == 0.0
    raced = search(meter, Settings(0.2, (), 3, reuse=False))  # its sums are zero but for rounding
    assert raced.order[:2] == (3, 5) and measure_level(meter, raced, raced.levels[0]).total == 0.0


def test_scores_that_differ_by_rounding_tie():
    orders = [(7,), (2,), (5,), (4,), (1,)]
    scores = [1.0, 1.0 + 1e-7, 1.0 + 2e-7, 1.1, math.inf]
    chosen = lambda rounding: [path.order[0] for path in skip.select(orders, scores, 4, (), rounding)]  # noqa: E731
    assert chosen(0.0) == [7, 2, 5, 4] and chosen(1e-5) == [2, 5, 7, 4]
    assert [path.order[0] for path in skip.select(orders, [math.inf] * 4 + [0.0], 3, (), 1e-5)] == [1]


def test_a_reuse_that_wins_by_rounding_alone_is_none():
    scores = {None: 1.0, 1: 1.0 - 1e-7, 5: 0.9}
    rank = lambda candidates, keep: [scores[c[3].target] for c in candidates]  # noqa: E731
    assert reuse.search(rank, (3,), 8, 1e-5)[0] == {3: 5}
    scores[5] = 1.5
    assert reuse.search(rank, (3,), 8, 1e-5)[0] == {} and reuse.search(rank, (3,), 8)[0] == {3: 1}


def test_resuming_gives_the_same_plan():
    module = small.build("t5", layers=4)
    meter = small.meter("t5", module, small.prompts([6, 9]), [1])
    beams, reports = [], []
    plan = search(meter, Settings(0.4, delta=0.0), reports.append, beams.append)
    assert search(meter, Settings(0.4, delta=0.0), beam=beams[1]) == plan
    assert search(meter, Settings(0.4, delta=0.0), beam=beams[-1]) == plan
    assert all(0 <= r.done <= 1 for r in reports) and reports[0].candidates == 8
    assert sorted({r.line for r in reports}) and "skipped block" in reports[-1].line or "re-use" in reports[-1].line


def test_progress_may_stop_the_search():
    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    module = small.build("t5", layers=4)
    meter = small.meter("t5", module, small.prompts([6]), [1])
    with pytest.raises(Stop):
        search(meter, Settings(0.4), stop)
    assert search(meter, Settings(0.4)).order


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"sparsity": 0.3, "levels": (0.4,)}, "above the target"),
        ({"beam": 0}, "1 to 64"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(skip.SearchError, match=message):
        Settings(**settings)


def test_target_out_of_reach():
    meter = small.meter("t5", small.build("t5"), small.prompts([6]), [1])
    with pytest.raises(skip.SearchError, match="can't be reached: the blocks hold"):
        search(meter, Settings(0.97))


def test_at_most_is_at_most():
    """A search removes a little more than it is asked for: its weakest level does not answer for that number."""
    module = small.build("t5", layers=5)
    meter = small.meter("t5", module, small.prompts([6]), [1])
    plan = search(meter, Settings(0.4, (0.2,), 1, reuse=False))
    low, high = plan.levels
    assert plan.choose(1.0) is high and plan.choose(high.sparsity) is high
    assert plan.choose(low.sparsity) is low and plan.choose((low.sparsity + high.sparsity) / 2) is low
    assert low.sparsity > 0.2
    with pytest.raises(PlanError, match=f"the smallest has {low.sparsity}, ask for that or more"):
        plan.choose(0.2)


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_the_time_left_is_about_right(delta, monkeypatch):
    """A forward takes a second here; from the middle to the last tenth, it is within a factor of three."""
    now, told = [0.0], []
    monkeypatch.setattr("skrr_engine.search.progress.time.monotonic", lambda: now[0])

    def report(progress):
        now[0] += 1
        told.append((now[0], progress.seconds_left, progress.done))

    meter = small.meter("llama", small.build("llama", 8), small.prompts([7, 9] * (12 if delta else 4)), [2])
    search(meter, Settings(0.4, (), 3, True, delta), report)
    total = now[0]
    assert told[0][1] is None and all(0 <= done <= 1 for *_, done in told)
    ratios = [left / (total - at) for at, left, _ in told if 0.5 * total < at < 0.9 * total]
    assert 1 / 3 < min(ratios) and max(ratios) < 3
    assert meter.spent > 0 and meter.prompts == (24 if delta else 8)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_search_stopped_behind_its_last_step_goes_on(reuse):
    module = small.build("t5", layers=4)
    settings, beams, reports = Settings(0.3, reuse=reuse, delta=0.0), [], []
    plan = search(small.meter("t5", module, small.prompts([6, 9]), [1]), settings, save=beams.append)
    meter = small.meter("t5", module, small.prompts([6, 9]), [1])
    assert search(meter, settings, reports.append, beam=beams[-1]) == plan
    assert reports and all(0 <= r.done <= 1 for r in reports)
