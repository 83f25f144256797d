"""The engine where encoders lie on a device that is not the CPU: nothing may be mixed."""

import pytest
import small
import torch
from second_device import NAME, SecondDevice

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import assignment
from skrr_engine.encoder.trace import Tracer
from skrr_engine.files.folder import Encoder
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.discrepancy import COSINE, Criterion
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.projection import RECIPES, build
from skrr_engine.search.run import search
from skrr_engine.search.settings import Settings
from skrr_engine.standins import fit as standin


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def everything(name: str, device: str) -> tuple:
    """A search, exact and racing, with a projection, and stand-ins for what it removes."""
    module = small.build(name, 4)
    stack = SecondDevice() if device == NAME else None
    if stack is not None:
        stack.__enter__()
        stack.take(module)
    try:
        encoder = Encoder("x", module, families.find(module), lambda prompt: [1])
        weights = {
            "fc1.weight": tensor(8, 32),
            "fc2.weight": tensor(8, 8),
            "fc1.bias": tensor(8),
            "fc2.bias": tensor(8),
        }
        projection = build(RECIPES[0], lambda key: weights[key.removeprefix("y_embedder.y_proj.")])
        if stack is not None:
            stack.take(projection)
        ids = [[3 + (7 * n + i * i) % 90 for i in range(8)] for n in range(9)]
        found = []
        for criterion, delta in ((Criterion(), 0.0), (COSINE, 0.05), (Criterion(), 0.05)):
            batches = [encoder.batch(ids[i : i + 3]) for i in (0, 3, 6)]
            prompts = Calibration(module, Tracer(module, encoder.row), batches, encoder.batch([[1]]), 1 << 26)
            meter = Meter(prompts, projection, criterion=criterion)
            entry = search(meter, Settings(sparsity=0.15, beam=1, delta=delta))
            found.append((entry.order, entry.levels[-1].reuse, round(entry.levels[-1].discrepancy, 3)))
        fits, _ = standin.fit(prompts, assignment(entry.order), standin.Fitting(rank=4, held_out=3))
        (repaired,) = meter.measure([assignment(entry.order, standins=fits)])
        assert all(str(t.device) == device for fit in fits.values() for t in (fit.down, fit.up, fit.bias))
        return (*found, round(repaired.total, 3), round(meter.null_norm(), 2))
    finally:
        if stack is not None:
            stack.close()


@pytest.mark.parametrize("name", ["t5", "clip", "llama"])
def test_as_on_the_cpu(name):
    assert everything(name, NAME) == everything(name, "cpu")


def test_what_is_mixed_fails():
    with SecondDevice() as device:
        layer = device.take(torch.nn.Linear(3, 2))
        there = torch.ones(4, 3, device=NAME)
        assert str(layer(there).device) == NAME and layer(there).cpu().shape == (4, 2)
        with pytest.raises(RuntimeError, match="one device"):
            layer(torch.ones(4, 3))
        with pytest.raises(RuntimeError, match="one device"):
            there + torch.ones(4, 3)
