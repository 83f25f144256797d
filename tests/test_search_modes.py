"""The search: the exact mode gives the naive loop's plan, whatever the encoder; memory, interruption and resuming."""

import dataclasses
import functools
import math
import weakref

import pytest
import reference
import small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skrr_engine import memory as budget
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, assignment
from skrr_engine.encoder.rewire import rewire, undo
from skrr_engine.encoder.row import EncoderError
from skrr_engine.encoder.trace import Tracer
from skrr_engine.errors import SearchError
from skrr_engine.measure.calibration import Batch, Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.walk import Walk
from skrr_engine.memory import Store, batch_tokens, free_memory, nbytes, retried
from skrr_engine.search import baselines, naive, repair, skip, widths
from skrr_engine.search.resume import State, StateError, fingerprint
from skrr_engine.search.run import search
from skrr_engine.search.settings import Settings
from skrr_engine.standins import fit as standin
from skrr_engine.standins.widths import SHARES

ACCEPTED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FEW = settings(max_examples=6, deadline=None, suppress_health_check=ACCEPTED)
ENCODERS = ["t5", "clip", "llama"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def without(module, row, indices):
    """Make sub-blocks do nothing: candidates that skip them tie."""
    for index in indices:
        for tensor in row.sub_blocks[index % len(row)].tensors().values():
            tensor.data.zero_()


def double(row, pairs):
    """Make sub-blocks copies of the next one of their type."""
    for index in pairs:
        index %= len(row) - 2
        source = list(row.sub_blocks[index + 2].tensors().values())
        for tensor, other in zip(row.sub_blocks[index].tensors().values(), source, strict=False):
            if tensor.shape == other.shape:
                tensor.data.copy_(other)


def printed(name, module, row, batches, null, target, width):
    """The plan of the printed algorithms by whole passes: `(order, D, re-use, D with it)`."""
    runs = [small.forward(name, ids) for ids in batches]
    run_null = small.forward(name, [null])
    discrepancy = reference.naive_discrepancy(
        module, small.family_of(name), lambda: [run(module) for run in runs], lambda: run_null(module)
    )
    order, d = naive.skip(discrepancy, row.parameter_counts, row.total, target, width)
    return order, d, *naive.reuse(discrepancy, order, len(row))


@pytest.mark.parametrize("name", ENCODERS)
@FEW
@given(data=st.data())
def test_exact_is_the_naive_loop(name, data):
    layers, seed = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 10**6))
    module = small.build(name, layers, seed)
    row = families.find(module)
    without(module, row, data.draw(st.lists(st.integers(0, 20), max_size=3), "zeroed"))
    double(row, data.draw(st.lists(st.integers(0, 20), max_size=2), "doubled"))
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(2, 12)), min_size=1, max_size=5), "shapes")
    batches = [[ids for (ids,) in small.prompts([length] * n, seed + i)] for i, (n, length) in enumerate(shapes)]
    width = data.draw(st.integers(1, 4), "k")
    target = data.draw(st.sampled_from([0.1, 0.3, 0.4]), "target")
    meter = small.meter(name, module, batches, [2], limit=data.draw(st.sampled_from([0, 2, 5])))
    plan = search(meter, Settings(target, (), width, True, 0.0))
    order, d, reuse, d_reuse = printed(name, module, row, batches, [2], target, width)
    level = plan.levels[-1]
    assert list(plan.order) == order
    assert level.reuse == reuse
    assert level.discrepancy == pytest.approx(d_reuse, rel=1e-5, abs=1e-12)
    assert level.discrepancy == meter.measure([assignment(order, reuse)])[0].total, "not bit for bit"
    steps = [meter.measure([assignment(order[: n + 1])])[0].total for n in range(len(order))]
    assert plan.extensions == {"search": {"mode": "exact", "steps": pytest.approx(steps, rel=1e-5)}}


@pytest.mark.parametrize("name", ENCODERS)
def test_rank_is_measure_for_the_best(name):
    module = small.build(name, 5)
    batches = small.prompts([5, 7, 9, 12, 3] * 2)
    meter = small.meter(name, module, batches, [2])
    candidates = [assignment(order) for order in skip.expand([skip.SkipList((3,), 0.0), skip.SkipList((6,), 0.0)], 10)]
    full = [d.total for d in small.meter(name, module, batches, [2]).measure(candidates)]
    limit = sorted(full)[2]
    for _ in range(2):  # the second time, states and results are taken from the first
        assert meter.lowest(candidates, 3) == [d if d <= limit else math.inf for d in full]
    assert meter.share < 0.5


@pytest.mark.parametrize("name", ENCODERS)
def test_a_race_stacks_streams_and_leaves_exact_ones_alone(name):
    module = small.build(name, 5)
    batches = small.prompts([5, 7, 9, 12, 3] * 2)
    meter = small.meter(name, module, batches, [2])
    candidates = [assignment(order) for order in skip.expand([skip.SkipList((3,), 0.0), skip.SkipList((6,), 0.0)], 10)]
    full = [d.total for d in small.meter(name, module, batches, [2]).measure(candidates)]
    passed, applied = [], []
    for sub_block in meter.tracer.row.sub_blocks:
        sub_block.apply = lambda x, call, s=sub_block: (applied.append(1), type(s).apply(s, x, call))[1]
    raced = meter.lowest(candidates, 3, 0.05, tick=passed.append)
    assert 0 < len(applied) < len(passed) / 2, "nothing was stacked"
    best = sorted(range(len(full)), key=full.__getitem__)[:3]
    assert [raced[c] for c in best] == pytest.approx([full[c] for c in best], rel=1e-5)
    limit = full[best[-1]]
    assert meter.lowest(candidates, 3) == [d if d <= limit else math.inf for d in full], "a race left its rounding"
    assert [d.total for d in meter.measure(candidates)] == full


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_starts_from_the_states_of_the_one_before(name):
    """With i removed, a candidate j < i starts in front of i, where the step before has left its state."""
    module = small.build(name, 6)
    batches, found = small.prompts([5, 7, 9] * 3), {}
    for memory in (2**30, 0):
        tracer = Tracer(module, families.find(module))
        prompts = [small.batch(name, ids) for ids in batches]
        meter = Meter(Calibration(module, tracer, prompts, small.batch(name, [[2]]), memory))
        steps, passed = [], []
        for beam in skip.search(
            lambda c, keep, meter=meter, passed=passed: meter.lowest(c, keep, tick=passed.append),
            tracer.row.parameter_counts, tracer.row.total, 0.3, 1,
        ):  # fmt: skip
            steps.append((beam[0], len(passed)))
        found[memory] = steps
    assert [beam for beam, _ in found[2**30]] == [beam for beam, _ in found[0]], "held states changed the result"
    assert max(found[0][-1][0].order) > 3, "nothing stands in front of what was removed: the test shows nothing"
    assert found[2**30][-1][1] < 0.7 * found[0][-1][1]


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_racing_is_close_cheaper_and_says_so(name):
    module = small.build(name, 5)
    batches = [[p for (p,) in small.prompts([length] * 4, seed)] for seed, length in enumerate([4, 5, 6, 7] * 8)]
    plans = {}
    work = {}
    for delta in (0.0, 0.05):
        meter = small.meter(name, module, batches, [2])
        steps = []
        plans[delta] = search(
            meter, Settings(0.35, (), 2, True, delta), save=lambda beam, m=meter, s=steps: s.append(m.share)
        )
        work[delta] = sum(steps)
        again = search(small.meter(name, module, batches, [2]), Settings(0.35, (), 2, True, delta))
        same = again.order == plans[delta].order and again.levels[-1].reuse == plans[delta].levels[-1].reuse
        assert same and (delta or again == plans[delta]), "the same inputs gave another plan"
    assert plans[0.05].extensions["search"].items() >= {"mode": "racing", "delta": 0.05}.items()
    assert plans[0.05].levels[-1].discrepancy <= 1.05 * plans[0.0].levels[-1].discrepancy
    assert work[0.05] < work[0.0] < 0.9 * len(plans[0.0].order)


def test_little_memory_same_plan():
    module = small.build("t5", 4)
    batches = [small.batch("t5", ids) for ids in small.prompts([5, 7, 9, 12] * 3)]
    tracer, null = Tracer(module, families.find(module)), small.batch("t5", [[2]])
    plans = [
        search(Meter(Calibration(module, tracer, batches, null, memory)), Settings(0.3, (0.1,), 3, True, 0.0))
        for memory in (2**30, 200_000, 1)
    ]
    assert plans[0] == plans[1] == plans[2]


def test_stores_stay_within_their_share():
    store = Store(1000)
    for i in range(5):
        store.put(i, torch.zeros(100))
    assert store.used == 800 and 0 in store and 4 not in store, "values in use must not push each other out"
    store.turn()
    store.get(0)
    store.turn()
    store.turn()
    store.put("new", torch.zeros(200))
    assert "new" in store and store.used <= 1000
    store.clear()
    assert store.used == 0 and "new" not in store
    tensor = torch.zeros(10)
    assert nbytes({"a": [tensor, (tensor,)], "b": None}) == 40
    assert 0 < free_memory() < 2**50
    assert batch_tokens(2**33, 4096) == 512 and batch_tokens(2**33, 4096, "cuda") == 2048
    assert batch_tokens(2**26, 4096) == 64 and batch_tokens(1, 4096) == 1


def test_out_of_memory_halves_the_batch():
    module = small.build("llama", 3)
    ids = [[5, 6, 7, 8], [9, 10, 11, 12], [3, 4, 5, 6], [7, 7, 7, 7]]
    refused = []

    def batch(ids):
        inner, half = small.batch("llama", ids), len(ids) // 2

        def run(encoder):
            if len(ids) > 1:
                refused.append(len(ids))
                raise torch.OutOfMemoryError("as CUDA says it")
            return inner.run(encoder)

        return Batch(run, len(ids), lambda: (batch(ids[:half]), batch(ids[half:])))

    roomy = small.meter("llama", module, [ids], [2])
    scarce = Meter(Calibration(module, roomy.tracer, [batch(ids)], small.batch("llama", [[2]])))
    wanted = search(roomy, Settings(0.3, (), 2, True, 0.0))
    found = search(scarce, Settings(0.3, (), 2, True, 0.0))
    assert found.order == wanted.order and found.levels[-1].reuse == wanted.levels[-1].reuse
    assert found.levels[-1].discrepancy == pytest.approx(wanted.levels[-1].discrepancy, rel=1e-5)
    assert refused[0] == 4 and set(refused[1:]) == {2}
    with pytest.raises(torch.OutOfMemoryError):  # nothing left to halve
        Meter(Calibration(module, roomy.tracer, [Batch(batch(ids).run, 4)], small.batch("llama", [[2]])))


def test_out_of_memory_halves_the_stack():
    """A device on which so many tokens don't pass a sub-block together."""
    module = small.build("t5", 4)
    batches = small.prompts([5, 7, 9, 12] * 3)
    roomy, scarce = (small.meter("t5", module, batches, [2]) for _ in range(2))
    refused = []

    def apply(sub_block, x, call):
        if x.shape[:2].numel() > 40:
            refused.append(1)
            raise torch.OutOfMemoryError("as CUDA says it")
        return type(sub_block).apply(sub_block, x, call)

    for sub_block in scarce.tracer.row.sub_blocks:
        sub_block.apply = functools.partial(apply, sub_block)
    wanted, found = (search(meter, Settings(0.3, (), 2)) for meter in (roomy, scarce))
    assert found.order == wanted.order and found.levels[-1].reuse == wanted.levels[-1].reuse
    assert 0 < len(refused) < 6, "a stack that does not fit is tried again and again"


@pytest.mark.parametrize("delta", [0.0, 0.05])
def test_interruption_and_resuming_at_every_step(tmp_path, delta):
    module = small.build("clip", 4)
    batches = small.prompts([5, 7, 9, 12] * 3)
    chosen = Settings(0.35, (0.1,), 2, True, delta)

    def make():
        return small.meter("clip", module, batches, [2])

    wanted = search(make(), chosen)
    weights = [sub_block.tensors() for sub_block in families.find(module).sub_blocks]
    state = State(tmp_path / "state.json", fingerprint(weights, "facts"))

    class Interrupt(Exception):
        pass

    ticks, runs = 0, 0

    def report(progress):
        nonlocal ticks
        ticks += 1
        assert 0 <= progress.done <= 1 and 1 <= progress.candidate <= progress.candidates
        if ticks > 100 + 50 * runs:
            raise Interrupt

    while True:
        ticks, runs = 0, runs + 1
        try:
            found = search(make(), chosen, report, state.save, state.load(8))
            break
        except Interrupt:
            assert runs < 200
    assert runs > 2 and found.order == wanted.order
    assert [level.reuse for level in found.levels] == [level.reuse for level in wanted.levels]
    if delta:  # which streams are stacked, and so a sum's last bits, depends on what was kept of the steps before
        D = [level.discrepancy for level in wanted.levels]
        assert [level.discrepancy for level in found.levels] == pytest.approx(D, rel=1e-5)
    else:
        assert found == wanted
    state.forget()
    assert state.load(8) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no state of a search"),
        ("{}", "no state of a search"),
        ('{"key": "k", "beam": [{"order": [9], "discrepancy": 1}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [1, 1], "discrepancy": 1}]}', "no state of a search"),
        ('{"key": "k", "beam": []}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [Infinity], "discrepancy": 1}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [], "discrepancy": 1}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": "12", "discrepancy": 1}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [1], "discrepancy": -1}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [1], "discrepancy": NaN}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [1, 2], "discrepancy": 1, "trail": [-1, 1]}]}', "no state of a search"),
        ('{"key": "k", "beam": [{"order": [1, 2], "discrepancy": 1, "trail": [Infinity, 1]}]}', "no state of a search"),
        pytest.param("[" * 100_000, "no state of a search", id="deep"),
        ('{"key": "other", "beam": [{"order": [1], "discrepancy": 1}]}', "belongs to a search with another"),
    ],
)
def test_states_that_cannot_be_gone_on_with(tmp_path, text, message):
    (tmp_path / "s").write_text(text)
    with pytest.raises(StateError, match=message):
        State(tmp_path / "s", "k").load(8)


def test_fingerprint_tells_encoders_apart():
    rows = [families.find(small.build("t5", 3, seed)) for seed in (0, 0, 1)]
    weights = [[sub_block.tensors() for sub_block in row.sub_blocks] for row in rows]
    keys = [fingerprint("x", own) for own in weights]
    assert keys[0] == keys[1] != keys[2] and fingerprint("y", weights[0]) != keys[0]
    assert fingerprint("x", (own for own in weights[0])) == keys[0], "from a generator, too"


def overflowing():
    """A half-precision encoder, and prompts for which it is finite, of which some are not once a sub-block is gone:
    block 2's feed-forward takes back the huge numbers that block 1's writes into a channel."""
    for scale in range(20_000, 40_000, 1000):
        module = small.build("llama", 4).half()
        first, second = module.layers[1], module.layers[2]
        first.mlp.down_proj.weight.data[0].mul_(scale)
        for behind in (second, module.layers[3]):
            behind.mlp.load_state_dict(first.mlp.state_dict())
            behind.post_attention_layernorm.load_state_dict(first.post_attention_layernorm.state_dict())
        second.mlp.down_proj.weight.data[0].neg_()
        batches = small.prompts([5, 7, 9, 12])
        if all(small.forward("llama", ids)(module).isfinite().all() for ids in batches):
            found = small.meter("llama", module, batches, [2]).measure([{i: SKIP} for i in range(8)])
            if not all(math.isfinite(d.total) for d in found):
                return module, batches, [d.total for d in found]
    raise AssertionError("no scale overflows: the test shows nothing")


def test_an_overflow_is_no_small_discrepancy():
    module, batches, found = overflowing()
    row = families.find(module)
    for i, d in enumerate(found):
        replaced = rewire(module, row, {i: SKIP})
        whole = all(bool(small.forward("llama", ids)(module).isfinite().all()) for ids in [*batches, [[2]]])
        undo(module, replaced)
        assert math.isfinite(d) == whole
    for delta in (0.0, 0.05):
        plan = search(small.meter("llama", module, batches, [2]), Settings(0.3, (), 3, True, delta))
        assert found[plan.order[0]] == min(found) and plan.levels[-1].discrepancy < math.inf


def test_what_overflows_itself_is_refused():
    module = small.build("llama", 4).half()
    module.layers[1].mlp.down_proj.weight.data[0].mul_(1e5)
    with pytest.raises(EncoderError, match="not finite in this precision.*bfloat16"):
        small.meter("llama", module, small.prompts([5]), [2]).measure([{}])


def test_a_search_with_nothing_left_to_remove_says_so():
    meter = small.meter("llama", small.build("llama", 4), small.prompts([5]), [2])
    meter.lowest = lambda candidates, *args, **kwargs: [math.inf] * len(candidates)
    with pytest.raises(skip.SearchError, match="overflows in this precision.*bfloat16"):
        search(meter, Settings(0.3))


def test_an_encoder_that_does_more_than_was_seen_is_refused():
    module = small.build("t5", 4)
    module.encoder.block[2].register_forward_hook(lambda block, args, out: (out[0] * 1.5, *out[1:]))
    with pytest.raises(EncoderError, match="do not give what it gives itself"):
        small.meter("t5", module, small.prompts([5]), [2])


def test_the_dense_pass_can_be_stopped():
    """Making a meter runs nothing but the null prompt; the dense conditioning comes with the first step, and ticks."""
    module = small.build("t5", 4)
    passed = []
    module.encoder.block[0].layer[1].register_forward_pre_hook(lambda block, args: passed.append(len(args[0])))
    meter = small.meter("t5", module, small.prompts([6] * 5), [2])
    assert len(passed) <= 2, "more than the null prompt, by the encoder and by the walk"
    ticks = []
    meter.measure([{}], ticks.append)
    assert len(ticks) == 8 + 5 * 16 and ticks == sorted(ticks) and ticks[-1] < 1


def test_exact_searches_go_by_what_prompts_told():
    """The order of the batches comes from the step before; a search without it gets the same, for more work."""
    module = small.build("t5", 8)
    batches = [[p for (p,) in small.prompts([length] * 2, length)] for length in range(3, 15)]
    candidates = [assignment(order) for order in skip.expand([skip.SkipList((i,), 0.0) for i in (3, 9, 12)], 16)]
    told, untold = (small.meter("t5", module, batches, [2]) for _ in range(2))
    for meter in (told, untold):
        meter.lowest([assignment((i,)) for i in range(16)], 3)
        meter._known.clear()
        meter._states.clear()
    assert told._expected is not None and told._expected.sum() == pytest.approx(1)
    untold._expected = None
    assert told.lowest(candidates, 3) == untold.lowest(candidates, 3)
    assert told.share < untold.share


@pytest.mark.parametrize("limit", [2, 5])
def test_no_more_streams_go_on_together_than_the_limit(limit, monkeypatch):
    module = small.build("llama", 8)
    together, advance = [], Walk._advance

    def counting(self, streams, *args):
        together.append(len(streams))
        return advance(self, streams, *args)

    monkeypatch.setattr(Walk, "_advance", counting)
    found = []
    for bound in (0, limit):
        meter = small.meter("llama", module, small.prompts([7] * 3), [2], limit=bound)
        steps = skip.search(meter.lowest, meter.tracer.row.parameter_counts, meter.tracer.row.total, 0.3, 3)
        found.append([beam for beam in steps])
        assert bound == 0 or max(together) <= bound
        assert bound > 0 or max(together) > 5, "nothing that a limit would hold back: the test shows nothing"
        together.clear()
    assert found[0] == found[1]


def test_t5_in_fp16_is_clamped_as_its_own_blocks_do():
    """transformers' T5 clamps infinities between its layers: what overflows there is no overflow."""
    module = small.build("t5", 4).half()
    module.encoder.block[1].layer[1].DenseReluDense.wo.weight.data[3].sign_().mul_(6e4)
    for block in module.encoder.block:
        block.layer[1].DenseReluDense.wo.half()
        for layer in block.layer:
            layer.layer_norm.weight.data[3] = 0
    row, ids = families.find(module), small.prompts([9])[0]
    tracer = Tracer(module, row)
    trace = tracer.trace(small.batch("t5", ids).run)
    x, infinite = trace.x, False
    for sub_block, call in zip(row.sub_blocks, trace.calls, strict=True):
        (body,) = sub_block.parts.values()
        raw = call.again(body, x.clone())[0] if sub_block.is_attention else body(x.clone())
        infinite = infinite or bool(raw.isinf().any())
        x = sub_block.apply(x, call)
    assert infinite, "nothing overflows: the test shows nothing"
    ((_, reading),) = Walk(tracer)(trace, [{}])
    assert torch.equal(reading[0][0], small.forward("t5", ids)(module)) and bool(reading[0][0].isfinite().all())
    assert search(small.meter("t5", module, [ids], [2]), Settings(0.2, (), 1)).order


def test_a_null_prompt_of_which_nothing_is_read():
    module = small.build("t5", 4)
    tracer = Tracer(module, families.find(module))
    null = small.batch("t5", [[2]])

    def unread(module, times=1):
        return [(t, torch.zeros(t.shape[:2])) for t, _ in null.run(module, times)]

    prompts = [small.batch("t5", ids) for ids in small.prompts([5, 7])]
    meter = Meter(Calibration(module, tracer, prompts, Batch(unread, 1)))
    found = meter.measure([{3: SKIP}])[0]
    assert found.null == 0.0 and 0 < found.conditional < math.inf and found.null_norm == 0.0
    standins, _ = standin.fit(meter.calibration, {3: SKIP}, standin.Fitting(3))  # nor does a fit fall over it
    assert meter.measure([standins])[0].total < found.total


def test_an_overflow_of_what_does_not_count_is_none():
    """FinerCut does not look at the null prompt."""
    module = small.build("t5", 2)
    tracer = Tracer(module, families.find(module))
    errors = baselines.ANGLE_OF_OUTPUT.errors

    def overflowing(dense, pruned):
        found = errors(dense, pruned)
        return [e + math.inf for e in found] if dense[0][0].shape[1] == 1 else found

    criterion = dataclasses.replace(baselines.ANGLE_OF_OUTPUT, errors=overflowing)
    batches = [small.batch("t5", ids) for ids in small.prompts([5, 7])]
    meter = Meter(Calibration(module, tracer, batches, small.batch("t5", [[2]])), criterion=criterion)
    (found,) = meter.measure([{1: SKIP}])
    assert found.null == 0.0 and meter.lowest([{1: SKIP}], 1) == [found.total] and found.total < math.inf


def test_what_is_held_already_pushes_nothing_out():
    store = Store(900)
    old, used = torch.zeros(100), torch.zeros(100)
    store.put("old", old)
    store.turn()
    store.turn()
    store.put("used", used)
    store.put("used", used)
    assert "old" in store and "used" in store and store.used == 800
    store.drop(lambda key: key == "old")
    assert "old" not in store and store.used == 400


def test_all_blocks_can_be_asked_for():
    """Where the share of all blocks, times the whole, is more than all blocks by a rounding."""
    total = next(b for b in range(7, 999) if 6 / b * b > 6)
    with pytest.raises(SearchError, match="can't be reached"):
        list(skip.search(lambda c, keep: [0.0] * len(c), [1] * 6, total, 6 / total, 1))


def test_a_container_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    whole = free_memory()
    for name, text in {"current": "700\n", "stat": "anon 600\ninactive_file 100\n", "max": "1500\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 900 // 4 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == pytest.approx(whole, rel=0.5)


def test_what_ran_out_of_memory_is_gone_before_it_is_made_smaller():
    """Else the device's memory could not be given back where it is short."""
    tried, shrunk = [], []

    def act():
        big = torch.zeros(3)
        tried.append(weakref.ref(big))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("out of memory")
        return "done"

    def shrink():
        shrunk.append(tried[-1]() is None)
        return len(shrunk) < 5

    assert retried(act, shrink) == "done" and shrunk == [True, True]
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        retried(act, lambda: False)


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_measurement_of_widths_may_be_stopped_at_any_place(name, memory):
    """Few sub-blocks are run between two looks at whether to stop, in measuring, fitting and repairing, whether streams
    are held or computed again; what is done only grows."""
    module = small.build(name, 4)
    row = families.find(module)
    told, since, most = [], [0], [0]

    def calibration(seed: int) -> Calibration:
        batches = [small.batch(name, ids) for ids in small.prompts([5, 7, 9, 12], seed)]
        return Calibration(module, Tracer(module, row), batches, small.batch(name, [[2]]), memory)

    def report(progress):
        told.append(progress.done)
        since[0] = 0

    def apply(sub_block, x, call):
        since[0] += 1
        most[0] = max(most[0], since[0])
        return type(sub_block).apply(sub_block, x, call)

    fitted, meter = calibration(0), Meter(calibration(1))
    meter.measure([{}])
    for one in (fitted.tracer.row, meter.row):
        for sub_block in one.sub_blocks:
            sub_block.apply = functools.partial(apply, sub_block)
    found = widths.search(fitted, meter, Settings(0.3), standin.Fitting(2), report)
    assert told == sorted(told) and 0 <= told[0] < 0.1 and 0.9 < told[-1] < 1 and len(told) > 100
    assert most[0] <= len(SHARES) + 2, "all widths of a place behind a fit of it, and no more"
    told.clear()
    repaired = repair.repair(fitted, meter, found.entry, found.orders, standin.Fitting(2), (), report)
    assert told == sorted(told) and 0.9 < told[-1] < 1 and most[0] <= len(SHARES) + 2
    assert repaired.entry.order == found.entry.order
    ended = []

    def stop(progress):
        ended.append(1)
        raise KeyboardInterrupt

    for act in (
        lambda: widths.search(fitted, meter, Settings(0.3), standin.Fitting(2), stop),
        lambda: repair.repair(fitted, meter, found.entry, found.orders, standin.Fitting(2), (), stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            act()
    assert len(ended) == 2


def test_a_table_that_is_whole_is_only_fitted():
    """Nothing is run for places that are known; another size comes from the same table."""
    module = small.build("llama", 4)
    batches = [small.batch("llama", ids) for ids in small.prompts([5, 7, 9, 12])]
    calibration = Calibration(module, Tracer(module, families.find(module)), batches, small.batch("llama", [[2]]))
    meter, saved = Meter(calibration), []
    widths.search(calibration, meter, Settings(0.2), standin.Fitting(2), save=saved.append)
    lines = []
    again = widths.search(
        calibration, meter, Settings(0.4), standin.Fitting(2), lambda p: lines.append(p.line), saved.append, saved[-1]
    )
    assert len(saved) == 8 and all(line.startswith("level") for line in lines) and lines
    fresh = widths.search(calibration, meter, Settings(0.4), standin.Fitting(2))
    assert again.entry == fresh.entry
