"""The parts of benchmarks/equal_bytes.py that its table rests on."""

import pytest
import small
import torch

from benchmarks.equal_bytes import PRECISIONS, front, kept_bytes, quantised, stored
from skrr_engine import families

BITS = {"bf16": 16, "fp8 scaled": 8, "Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_and_errors(precision):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    back, size = stored(weight, precision)
    assert size == weight.numel() * BITS[precision] / 8 + (4 if precision == "fp8 scaled" else 0)
    error = float((back - weight).square().mean() / weight.square().mean())
    assert 0 < error < {"bf16": 1e-5, "Q8_0": 1e-4, "fp8 scaled": 2e-3}.get(precision, 0.02)


def test_kept_bytes():
    module = small.build("llama", 3)
    twin, sizes = quantised(module, "Q4_0")
    row = families.find(twin)
    whole = sum(
        p.numel() * (4 if p.ndim < 2 else 8.5 / 8 if "embed" in name else 4.5 / 8)
        for name, p in module.named_parameters()
    )
    assert kept_bytes(row, sizes, {}) == whole == sum(sizes.values())
    gone = sum(p.numel() * 4.5 / 8 for p in module.layers[1].mlp.parameters()) + 4 * 32
    assert kept_bytes(row, sizes, {3: None}) == whole - gone
    assert not torch.equal(twin.layers[0].mlp.up_proj.weight, module.layers[0].mlp.up_proj.weight)


def test_front():
    assert front([(1, 5), (2, 4), (3, 4), (4, 1), (2, 6)]) == {0, 1, 3}
