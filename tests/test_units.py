"""Units: what a sub-block is made of, masked and cut, in every family, against narrowing by hand."""

import pytest
import reference
import small
import torch
from test_standins import noise
from torch import nn

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, Narrow, Reuse, assignment
from skrr_engine.encoder.rewire import rewire, undo
from skrr_engine.encoder.row import EncoderError
from skrr_engine.encoder.trace import Tracer
from skrr_engine.encoder.units import activations, out_weight, units_of
from skrr_engine.measure.walk import Walk
from skrr_engine.search import widths
from skrr_engine.search.settings import Settings
from skrr_engine.standins.fit import Fitting
from skrr_engine.standins.widths import count_at

IDS = [[5, 9, 33, 4, 60, 7, 8, 21, 99, 3, 2], [8, 7, 6, 5, 4, 3, 10, 11, 12, 13, 2]]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def some_units(row, place: int, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """About a share of a sub-block's units, drawn by lot."""
    count = units_of(row, place).count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + place))
    return order[: max(1, round(share * count))].sort().values


def zeroed(module: nn.Module, row, place: int, units: torch.Tensor) -> None:
    """Narrow by hand, in place: the out-projection's columns of all other units become zero."""
    own = units_of(row, place)
    gone = torch.ones(own.inner, dtype=torch.bool)
    size = own.inner // own.count
    for unit in units.tolist():
        gone[unit * size : (unit + 1) * size] = False
    own.out.weight[:, gone] = 0


@pytest.mark.parametrize("name", small.NARROWED)
def test_narrowed_equals_a_copy_narrowed_by_hand(name):
    """Walk, rewired encoder and hand-made copy, narrowed at block 0's attention, in the middle and at the end, with and
    without stand-ins, beside a skip and a re-use."""
    module, by_hand = small.build(name), small.build(name)
    row, theirs = families.find(module), families.find(by_hand)
    chosen = {place: some_units(row, place) for place in (0, 1, 6, 7)}
    removed = {place: Narrow(units) for place, units in chosen.items()}
    removed[1] = removed[1].repaired(noise(name, 3))
    removed[6] = removed[6].repaired(noise(name, 2, 1))
    removed |= {2: SKIP, 5: Reuse(3)}
    run = small.batch(name, IDS).run
    tracer = Tracer(module, row)
    trace = tracer.trace(run)
    ((_, walked),) = Walk(tracer)(trace, [removed])
    keys, before = list(module.state_dict()), run(module)[0][0]
    replaced = rewire(module, row, removed)
    rewired = run(module)[0][0]
    undo(module, replaced)
    torch.testing.assert_close(walked[0][0], rewired, rtol=1e-4, atol=1e-5)
    assert list(module.state_dict()) == keys and torch.equal(run(module)[0][0], before)

    for place, units in chosen.items():
        zeroed(by_hand, theirs, place, units)
    x = trace.x
    for i in range(len(row)):
        action = removed.get(i)
        if action is SKIP:
            continue
        added = 0
        if isinstance(action, Narrow) and action.standin is not None:
            added = action.standin.apply(x) - x
        x = theirs.sub_blocks[getattr(action, "target", None) or i].apply(x, trace.calls[i]) + added
    (expected,) = tracer.read(trace, {row.blocks: x})
    torch.testing.assert_close(rewired, expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rewired, before, atol=1e-2)


@pytest.mark.parametrize("name", small.NARROWED)
def test_what_is_left_is_counted(name):
    """Parameters and bytes of the rewired encoder are those that its numbers say; other weights are the same objects;
    names stay."""
    module = small.build(name)
    row = families.find(module)
    chosen = {place: some_units(row, place, 0.25) for place in (0, 1, 5)}
    shared = {id(p) for p in module.parameters()}
    names = dict(module.named_parameters())
    from fractions import Fraction

    shares = {place: Fraction(len(units), units_of(row, place).count) for place, units in chosen.items()}
    rewire(module, row, assignment(chosen, units=chosen))
    left = dict(module.named_parameters())
    assert set(left) == set(names)
    assert sum(p.numel() for p in left.values()) == row.total - round(row.sparsity(shares) * row.total)
    assert sum(t.nbytes for t in module.state_dict().values()) == row.total_bytes - row.bytes_of(shares)
    narrow = {key for key, p in left.items() if id(p) not in shared}
    assert narrow and all(left[key].numel() < names[key].numel() for key in narrow)
    assert all(left[key] is names[key] for key in left.keys() - narrow)


@pytest.mark.parametrize("name", small.NARROWED)
def test_all_units_are_the_whole_and_the_sum_of_units(name):
    """`finish` from what the out-projection takes is the sub-block itself; its effective weight is what is stored."""
    module = small.build(name)
    row = families.find(module)
    trace = Tracer(module, row).trace(small.batch(name, IDS).run)
    for place in range(len(row)):
        own = units_of(row, place)
        hidden, behind = activations(row, place, trace.x, trace.calls[place])
        finished = row.sub_blocks[place].finish(trace.x, own.out(hidden))
        torch.testing.assert_close(finished, behind)
        every = Narrow(torch.arange(own.count)).apply(trace.x, row, place, trace.calls[place])
        torch.testing.assert_close(every, behind)
        assert torch.equal(out_weight(own.out), own.out.weight)
        assert own.heads == (place % 2 == 0)


def test_a_mixture_of_experts_goes_or_stays_as_one():
    """GPT-OSS: heads are units, and their sinks stay behind; router and experts have none."""
    module = small.build("gpt_oss")
    row = families.find(module)
    assert [count_at(row, place) for place in (0, 1)] == [2, 1]
    with pytest.raises(EncoderError, match="block 0's feed-forward has no projections"):
        units_of(row, 1)
    removed = {0: Narrow(torch.tensor([1])), 3: SKIP, 5: Reuse(1)}
    run, tracer = small.batch("gpt_oss", IDS).run, Tracer(module, row)
    ((_, walked),) = Walk(tracer)(tracer.trace(run), [removed])
    replaced = rewire(module, row, removed)
    rewired = run(module)[0][0]
    undo(module, replaced)
    torch.testing.assert_close(walked[0][0], rewired, rtol=1e-4, atol=1e-5)
    by_hand = small.build("gpt_oss")
    zeroed(by_hand, families.find(by_hand), 0, torch.tensor([1]))
    with reference.skipping(by_hand, "gpt_oss", {3: None, 5: 1}):
        torch.testing.assert_close(run(by_hand)[0][0], rewired, rtol=1e-4, atol=1e-5)
    calibration = small.meter("gpt_oss", module, small.prompts([5, 7, 9, 6, 8]), [2]).calibration
    judge = small.meter("gpt_oss", module, small.prompts([6, 7], seed=3), [2])
    found = widths.search(calibration, judge, Settings(0.3), Fitting(rank=2))
    assert 0.2 < found.entry.levels[-1].sparsity <= 0.3
    assert all(step[0] % 2 == 0 for step in found.entry.order if isinstance(step, tuple))
