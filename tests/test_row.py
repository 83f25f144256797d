"""The engine's walk equals the encoder's own forward, dense and pruned, on every family; rewiring leaves no trace."""

import gc
import itertools
import weakref

import pytest
import reference
import small
import torch

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, Reuse, assignment
from skrr_engine.encoder.rewire import rewire, undo
from skrr_engine.encoder.row import Call, EncoderError
from skrr_engine.encoder.standin import StandIn
from skrr_engine.encoder.trace import Trace, Tracer
from skrr_engine.encoder.tree import fork
from skrr_engine.measure.walk import Shelf, Walk, forwards, prefixes
from skrr_engine.memory import Store

REMOVALS = [
    {},
    {0: None},
    {1: None},
    {0: None, 5: None, 6: None},
    {0: 2, 3: 1, 7: None},
    {2: 0, 4: 0, 5: 7},
    {0: 6, 2: 6, 4: 6, 1: 7},
    {i: None for i in range(8)},
]
IDS = [[5, 9, 33, 4, 60, 7, 8, 21, 99, 3, 2], [8, 7, 6, 5, 4, 3, 10, 11, 12, 13, 2]]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("removed", REMOVALS, ids=str)
@pytest.mark.parametrize("name", small.BUILDERS)
def test_walk_equals_forward(name, removed):
    module = small.build(name)
    row = families.find(module)
    run = small.batch(name, IDS).run
    tracer = Tracer(module, row)
    ((_, walked),) = Walk(tracer)(tracer.trace(run), [small.actions(removed)])
    replaced = rewire(module, row, small.actions(removed))
    rewired = run(module)
    undo(module, replaced)
    with reference.skipping(module, small.family_of(name), removed):
        skipped = run(module)
    assert torch.equal(walked[0][0], rewired[0][0]), "the walk differs from the rewired encoder's own forward"
    torch.testing.assert_close(rewired[0][0], skipped[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", small.BUILDERS)
def test_undo_and_counts(name):
    module = small.build(name)
    row = families.find(module)
    run = small.forward(name, IDS)
    before, keys = run(module), list(module.state_dict())
    removed = {0: None, 3: 5, 6: None}
    replaced = rewire(module, row, small.actions(removed))
    left = sum(p.numel() for p in module.parameters())
    assert left == row.total - sum(row.parameter_counts[i] for i in removed), "bytes are not counted exactly once"
    gone = {key for i in removed for key in row.sub_blocks[i].tensors()}
    assert set(module.state_dict()) == set(keys) - gone
    undo(module, replaced)
    assert torch.equal(run(module), before) and list(module.state_dict()) == keys
    assert row.sparsity([]) == 0 and 0 < row.sparsity(range(8)) < 1
    assert row.family == small.family_of(name) and row.width == 32 and row.blocks == 4


def test_t5_keeps_its_position_bias():
    module = small.build("t5")
    row = families.find(module)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bias not in row.sub_blocks[0].tensors()
    rewire(module, row, {0: SKIP})
    assert bias in module.state_dict()
    assert "layer.0.SelfAttention.relative_attention_bias.weight" in "".join(
        families.find(small.build("umt5")).sub_blocks[2].tensors()
    )


@pytest.mark.parametrize("name", small.BUILDERS)
def test_fork_leaves_the_encoder_alone(name):
    module = small.build(name)
    row = families.find(module)
    run = small.forward(name, IDS)
    before = run(module)
    tree = fork(module, [path for s in row.sub_blocks for path in s.parts])
    rewire(tree, row, {1: SKIP, 4: Reuse(2)})
    assert torch.equal(run(module), before)
    assert not torch.equal(run(tree), before)
    assert {id(p) for p in tree.parameters()} < {id(p) for p in module.parameters()}, "weights were copied"


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5])
def test_walk_shares_prefixes_within_any_limit(limit):
    module = small.build("t5")
    row = families.find(module)
    run = small.batch("t5", IDS).run
    tracer = Tracer(module, row)
    candidates = CANDIDATES[:-1]
    steps = []
    found = dict(Walk(tracer)(tracer.trace(run), candidates, limit, lambda: steps.append(1)))
    assert sorted(found) == list(range(len(candidates)))
    assert len(steps) == forwards(8, candidates) < sum(8 - list(c.values()).count(SKIP) for c in candidates)
    for i, candidate in enumerate(candidates):
        ((_, alone),) = Walk(tracer)(tracer.trace(run), [candidate])
        assert torch.equal(found[i][0][0], alone[0][0])


CANDIDATES = [{}, *({i: None} for i in range(8)), {3: 1}, {3: 1, 6: None}, {6: None, 0: None}, {2: 0, 4: 0, 5: 7}]
CANDIDATES = [small.actions(candidate) for candidate in CANDIDATES]


def padded(name, ids, pads):
    """A run on prompts of one length, of which the last `pads[i]` tokens are padding that attention must not see."""
    mask = torch.tensor([[1] * (len(row) - n) + [0] * n for row, n in zip(ids, pads, strict=True)])
    options = small.options_of(name)
    ids = torch.tensor(ids)

    def run(module, times=1):
        many = mask.repeat(times, 1)
        return [(module(input_ids=ids.repeat(times, 1), attention_mask=many, **options).last_hidden_state, many)]

    return run


@pytest.mark.parametrize("prompts, tokens", [(1, 5), (2, 11), (3, 3), (4, 8)])
@pytest.mark.parametrize("name", small.BUILDERS)
def test_stacked_streams_are_those_of_each_alone(name, prompts, tokens):
    """Batches of one, of several, of as many prompts as tokens and as heads; each prompt with padding of its own."""
    module = small.build(name)
    tracer = Tracer(module, families.find(module))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (prompts, tokens), generator=draw).tolist()
    trace = tracer.trace(padded(name, ids, [i % tokens for i in range(prompts)]))
    alone = dict(Walk(tracer)(trace, CANDIDATES))
    for stack in (5 * prompts * tokens, 10**6):
        steps, applied = [], []
        for sub_block in tracer.row.sub_blocks:
            sub_block.apply = lambda x, call, s=sub_block, n=applied: (n.append(1), type(s).apply(s, x, call))[1]
        found = dict(Walk(tracer)(trace, CANDIDATES, 0, lambda steps=steps: steps.append(1), stack=stack))
        for sub_block in tracer.row.sub_blocks:
            del sub_block.apply
        assert len(steps) == forwards(8, CANDIDATES) and len(applied) < len(steps) / 2, "nothing was stacked"
        for i in range(len(CANDIDATES)):
            for (t, mask), (wanted, wanted_mask) in zip(found[i], alone[i], strict=True):
                torch.testing.assert_close(t, wanted, rtol=1e-5, atol=1e-5)
                assert torch.equal(mask, wanted_mask)


@pytest.mark.parametrize("limit", [2, 5])
def test_stacked_streams_wait_and_start_late_as_others_do(limit):
    module = small.build("llama")
    tracer = Tracer(module, families.find(module))
    trace = tracer.trace(small.batch("llama", IDS).run)
    alone = dict(Walk(tracer)(trace, CANDIDATES))
    store, places = Store(10**9), set()
    for found in range(3):  # the first leaves its states, the others start from them
        shelf = Shelf(store, "trace", 99, {3, 6}, places, stacked=True)
        steps = []
        for i, reading in Walk(tracer)(trace, CANDIDATES, limit, lambda steps=steps: steps.append(1), shelf, 60):
            torch.testing.assert_close(reading[0][0], alone[i][0][0], rtol=1e-5, atol=1e-5)
        assert len(steps) < forwards(8, CANDIDATES) if found else len(steps) == forwards(8, CANDIDATES)
    exact = Shelf(store, "trace", 99, {3, 6}, places)
    for i, reading in Walk(tracer)(trace, CANDIDATES, limit, shelf=exact):
        assert torch.equal(reading[0][0], alone[i][0][0]), "an exact walk took a stacked one's states"


def test_prefixes_are_one_object_where_candidates_remove_the_same_before():
    torch.manual_seed(0)
    standin = StandIn("rms", torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(2))
    actions = [SKIP, Reuse(2), Reuse(4), standin]
    drawn = [{int(i): actions[i % 4] for i in torch.randperm(8)[:4]} for _ in range(30)]
    found = [prefixes(candidate, 8) for candidate in drawn]
    for (one, a), (two, b) in itertools.product(zip(drawn, found, strict=True), repeat=2):
        for index in range(8):
            before = [{i: action for i, action in c.items() if i < index} for c in (one, two)]
            assert (a[index] is b[index]) == (before[0] == before[1])
            assert a[index].fitted == {action for action in before[0].values() if action is standin}
    standin = weakref.ref(standin)
    del actions, drawn, found, one, two, a, b, before
    gc.collect()
    assert standin() is None, "stand-ins that no state holds any more must go"


def test_a_small_error_beside_a_large_stream_is_seen():
    """T5's residual stream has channels of hundreds, which the norms keep out of attention."""
    module = small.build("t5")
    module.shared.weight[:, 0] = 3000
    for block in module.encoder.block:
        block.layer[0].layer_norm.weight[0] = 0
    tracer = Tracer(module, families.find(module))
    trace = tracer.trace(padded("t5", IDS, [0, 6]))
    walk = Walk(tracer)
    assert tracer.boundaries is None and dict(walk(trace, CANDIDATES, stack=10**6))
    assert list(walk._stackable.values()) == [(True, True)]
    wrong = lambda self, prompts, times: Call(kwargs={"position_bias": torch.zeros(1, 4, 11, 11)})  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "stacked", wrong)
        assert Walk(tracer).can_stack(trace) == (False, True)


def test_a_later_attention_that_refuses_is_called_singly():
    module = small.build("t5")
    tracer = Tracer(module, families.find(module))
    trace = tracer.trace(small.batch("t5", IDS).run)
    wanted = dict(Walk(tracer)(trace, CANDIDATES))
    inner = tracer.row.sub_blocks[4].apply

    def refusing(x, call):
        assert len(x) == 2
        return inner(x, call)

    tracer.row.sub_blocks[4].apply = refusing
    for i, reading in Walk(tracer)(trace, CANDIDATES, stack=10**6):
        torch.testing.assert_close(reading[0][0], wanted[i][0][0], rtol=1e-5, atol=1e-5)


def test_streams_of_several_dtypes():
    """transformers' T5 in fp16 has feed-forwards that hand on float32."""
    module = small.build("t5").half()
    for block in module.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    tracer = Tracer(module, families.find(module))
    trace = tracer.trace(small.batch("t5", IDS).run)
    wanted = dict(Walk(tracer)(trace, CANDIDATES))
    for i, reading in Walk(tracer)(trace, CANDIDATES, stack=10**6):
        torch.testing.assert_close(reading[0][0], wanted[i][0][0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("takes_times", [True, False])
def test_picked_tokens_are_stacked_where_the_run_takes_copies(takes_times):
    """A wrapper that picks a token of each of its own prompts; a run that takes no copies is read singly."""
    module = small.build("t5")
    tracer = Tracer(module, families.find(module))

    def picking(module, times=1):
        hidden = module(input_ids=torch.tensor(IDS * times)).last_hidden_state
        return [(hidden[torch.arange(len(hidden)), torch.tensor([4, 7] * times)].unsqueeze(1), None)]

    trace = tracer.trace(picking if takes_times else lambda module: picking(module))
    walk = Walk(tracer)
    alone, found = dict(walk(trace, CANDIDATES)), dict(walk(trace, CANDIDATES, stack=10**6))
    assert list(walk._stackable.values()) == [(True, takes_times)]
    for i in range(len(CANDIDATES)):
        torch.testing.assert_close(found[i][0][0], alone[i][0][0], rtol=1e-5, atol=1e-5)


def test_attention_that_cannot_be_stacked_is_not():
    """One that takes its bias as `[batch * heads, tokens, tokens]`."""
    module = small.build("t5")
    tracer = Tracer(module, families.find(module))
    trace = tracer.trace(small.batch("t5", IDS).run)
    wanted = dict(Walk(tracer)(trace, CANDIDATES))

    def with_bias(call, change):
        return Call(call.args, {**call.kwargs, "position_bias": change(call.kwargs["position_bias"])}, call.hidden)

    for sub_block in tracer.row.sub_blocks[::2]:
        apply = sub_block.apply
        sub_block.apply = lambda x, call, a=apply: a(x, with_bias(call, lambda bias: bias.unflatten(0, (-1, 4))))
    calls = [with_bias(c, lambda b: b.expand(2, -1, -1, -1).flatten(0, 1)) if c.kwargs else c for c in trace.calls]
    walk = Walk(tracer)
    found = dict(walk(Trace(trace.run, trace.x, tuple(calls)), CANDIDATES, stack=10**6))
    assert list(walk._stackable.values()) == [(False, True)]
    for i in range(len(CANDIDATES)):
        torch.testing.assert_close(found[i][0][0], wanted[i][0][0], rtol=1e-5, atol=1e-5)


def test_finds_where_the_conditioning_is_read():
    module = small.build("llama")
    tracer = Tracer(module, families.find(module))
    last = tracer.trace(small.batch("llama", IDS).run)
    assert tracer.find_boundaries(last) == (4,)


def test_unknown_encoder():
    with pytest.raises(EncoderError, match="Linear is not a text encoder"):
        families.find(torch.nn.Linear(2, 2))


def test_assignment():
    assert assignment([4, 1], {1: 3}) == {4: SKIP, 1: Reuse(3)}


def test_a_block_with_a_tensor_of_its_own_is_refused():
    """Gemma 4's blocks multiply by a buffer of theirs, which no walk over sub-blocks knows of."""
    for name, list_of in (("t5", lambda e: e.encoder.block), ("clip", lambda e: e.text_model.encoder.layers),
                          ("llama", lambda e: e.layers), ("gemma3", lambda e: e.layers)):  # fmt: skip
        encoder = small.build(name)
        list_of(encoder)[1].register_buffer("layer_scalar", torch.ones(1))
        with pytest.raises(EncoderError, match="but block 1 has layer_scalar, which Skrr can't walk"):
            families.find(encoder)
        encoder = small.build(name)
        list_of(encoder)[2].adapter = torch.nn.Linear(2, 2)
        with pytest.raises(EncoderError, match="but block 2 has adapter, which Skrr can't walk"):
            families.find(encoder)


def test_no_family_can_be_half_filled():
    assert {family.name for family in families.FAMILIES} == {"t5", "clip", "llama", "gemma", "t5gemma", "gpt_oss"}
    for missing in ("norm", "file_key", "arguments"):
        facts = {key: value for key, value in vars(families.FAMILIES[0]).items() if key != missing}
        with pytest.raises(TypeError, match=missing):
            type(families.FAMILIES[0])(**facts)
