"""Sums on devices without float64 are those of the CPU, and a fit's sums take the memory that is set aside for them."""

import subprocess
import sys
from pathlib import Path

import no_float64
import pytest
import small
import torch

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, assignment
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure.calibration import Batch, Calibration
from skrr_engine.measure.compare import difference
from skrr_engine.measure.discrepancy import COSINE
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.sums import double, place
from skrr_engine.search import baselines
from skrr_engine.standins import fit as standin
from skrr_engine.standins.fit import Fitting

REPO = Path(__file__).resolve().parents[1]


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
    calibration = Calibration(module, tracer, batches, null, 2**24)
    meter = Meter(calibration)
    candidates = [assignment([i, 3]) for i in (1, 2, 4, 5)]
    found = [meter.measure(candidates), meter.lowest(candidates, 2), meter.lowest(candidates, 2, 0.05)]
    found.append(meter.null_norm())
    found.append(Meter(calibration, criterion=COSINE).measure(candidates))
    standins, trials = standin.fit(calibration, {3: SKIP}, Fitting(rank=2, held_out=2), {1, 4})
    found += [meter.measure([assignment([3], standins=standins)]), [trials[i].harm for i in (1, 4)]]
    (dense,), (pruned,) = (batches[0].run(module) for _ in range(2))
    found += [baselines.block_influence(meter), difference("", [dense], [pruned]).cosine.tolist()]
    return found


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_a_device_without_float64_finds_what_the_cpu_finds(name):
    expected = everything(small.build(name, 3))
    module = no_float64.move(small.build(name, 3))
    place.cache_clear()
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


PEAK = """
import torch
torch.set_num_threads(1)
from skrr_engine.standins.fit import Fitting, Gram, best_ridge, fit_bytes, solve
def fit(width):
    kept, held = (Gram.of(width, torch.device("cpu")) for _ in range(2))
    for gram in (kept, held):
        z, r = torch.rand(2, 64, width)
        gram.add(z, r, torch.ones(64))
    ridge = best_ridge(kept, held, Fitting())
    kept.join(held)
    del held
    kept.error(solve(kept, 16, ridge))
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
fit(64)
before = peak()
fit(1024)
print((peak() - before) / fit_bytes(1024))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux tells")
def test_a_fit_takes_what_is_reckoned_with():
    said = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=REPO)
    assert 0.5 < float(said.stdout) < 1.1
