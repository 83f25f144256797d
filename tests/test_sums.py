"""Sums on devices without float64 are those of the CPU."""

import no_float64
import pytest
import small
import torch

from skrr_engine import baselines, families, standin
from skrr_engine.compare import difference
from skrr_engine.discrepancy import COSINE, Batch, Meter
from skrr_engine.rewire import assignment
from skrr_engine.standin import Fitting
from skrr_engine.sums import double, place
from skrr_engine.trace import Tracer


def batch(ids: list[list[int]]) -> Batch:
    """One that runs where the module is, and whose last token nobody reads."""

    def run(module, times=1):
        given = torch.tensor(ids * times).to(next(module.parameters()).device)
        mask = torch.ones_like(given)
        mask[:, -1] = 0
        return [(module(input_ids=given, attention_mask=torch.ones_like(given)).last_hidden_state, mask)]

    return Batch(run, len(ids))


def everything(module) -> list:
    """All kinds of sums that a search takes."""
    batches = [batch(ids) for ids in small.prompts([5, 7, 9, 6])]
    null, tracer = batch([[2, 2]]), Tracer(module, families.find(module))
    meter = Meter(module, tracer, batches, null, memory=2**24)
    candidates = [assignment([i, 3]) for i in (1, 2, 4, 5)]
    found = [meter.measure(candidates), meter.rank(candidates, 2), meter.rank(candidates, 2, 0.05), meter.null_norm()]
    found.append(Meter(module, tracer, batches, null, memory=2**24, criterion=COSINE).measure(candidates))
    standins, trials = standin.fit(meter, {3: None}, Fitting(rank=2, held_out=2), {1, 4})
    found += [meter.measure([assignment([3], standins=standins)]), [trials[i].harm for i in (1, 4)]]
    (dense,), (pruned,) = (batches[0].run(module) for _ in range(2))
    found += [baselines.block_influence(meter), difference("", [dense], [pruned]).cosine.tolist()]
    return found


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_a_device_without_float64_finds_what_the_cpu_finds(name):
    expected = everything(small.build(name, 3))
    module = no_float64.move(small.build(name, 3))
    with no_float64.Device():
        assert place(no_float64.DEVICE) == torch.device("cpu")
        with pytest.raises(TypeError, match="no float64"):
            next(module.parameters()).double()
        found = everything(module)
    place.cache_clear()
    assert found == expected


def test_sums_stay_where_float64_is():
    t = torch.rand(3)
    assert place(t.device) == t.device and double(t).equal(t.double())
