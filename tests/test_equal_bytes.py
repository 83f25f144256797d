"""The parts of benchmarks/equal_bytes.py that its table rests on."""

import pytest
import small
import torch

from benchmarks import equal_bytes
from benchmarks.equal_bytes import EMBEDDING, PRECISIONS, cast, front, kept_bytes, measure, quantised
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, Reuse
from skrr_engine.encoder.rewire import rewire, undo

BITS = {"bf16": 16, "fp8": 8, "fp8 scaled": 8, "Q8_0": 8.5, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5}
ERROR = {"bf16": 1e-5, "fp8": 2e-3, "fp8 scaled": 2e-3, "Q8_0": 1e-4, "Q5_0": 4e-3, "Q4_1": 0.01, "Q4_0": 0.015}


def size(precision: str, parameter: torch.Tensor) -> float:
    """Bytes of a matrix, counted by hand: block scales are in the bits, a tensor's own scale is one float32."""
    return parameter.numel() * BITS[precision] / 8 + (4 if precision == "fp8 scaled" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bytes_and_errors_of_a_weight(precision):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    back, found = PRECISIONS[precision](weight)
    assert found == size(precision, weight)
    assert 0 < float((back - weight).square().mean()) < ERROR[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kept_bytes_are_exact(precision):
    module = small.build("llama", 3)
    other = EMBEDDING.get(precision, precision)
    twin, sizes = quantised(module, PRECISIONS[precision], PRECISIONS[other])
    row = families.find(twin)
    whole = sum(
        4 * p.numel() if p.ndim < 2 else size(other if key == "embed_tokens.weight" else precision, p)
        for key, p in module.named_parameters()
    )
    assert kept_bytes(row, sizes, ()) == whole == sum(sizes.values())
    block = module.layers[1]
    gone = sum(size(precision, p) for p in block.mlp.parameters()) + 4 * block.post_attention_layernorm.weight.numel()
    assert kept_bytes(row, sizes, {3: SKIP}) == whole - gone
    assert not torch.equal(twin.layers[0].mlp.up_proj.weight, module.layers[0].mlp.up_proj.weight)


@torch.no_grad()
def test_discrepancy_is_against_the_dense_encoder(monkeypatch):
    monkeypatch.setitem(PRECISIONS, "float32", lambda weight: cast(torch.float32, False, weight))
    module = small.build("llama", 3)
    prompts, null = small.prompts([5, 7]), [1]
    batches = [small.batch("llama", ids) for ids in prompts]
    removals = [{}, {3: SKIP}, {2: Reuse(4)}]

    def points(precision):
        return measure(module, batches, small.batch("llama", [null]), precision, removals)

    dense = points("float32")
    assert dense[0].found.total == 0 == dense[0].sparsity
    assert dense[0].kept == sum(p.nbytes for p in module.parameters())
    for precision in ("float32", "Q4_0"):
        twin, _ = quantised(module, PRECISIONS[precision], PRECISIONS[EMBEDDING.get(precision, precision)])
        for removed, point in zip(removals, points(precision), strict=True):
            replaced = rewire(twin, families.find(twin), removed)
            errors = [
                (small.forward("llama", ids)(twin) - small.forward("llama", ids)(module)).double().square().flatten()
                for ids in (*prompts, [null])
            ]
            undo(twin, replaced)
            assert point.found.conditional == pytest.approx(float(torch.cat(errors[:-1]).mean()), rel=1e-4)
            assert point.found.null == pytest.approx(float(errors[-1].mean()), rel=1e-4)


def test_a_shifted_block_rounds_each_weight_in_its_place():
    weight = torch.zeros(1, 64)
    weight[0, 16:48] = torch.linspace(-1, 1, 32)  # one block of Q4_1, which begins 16 later
    back, _ = equal_bytes.gguf_blocks("Q4_1", 16, weight)
    assert torch.equal(back[0, :16], torch.zeros(16)) and torch.equal(back[0, 48:], torch.zeros(16))
    assert float((back - weight).abs().max()) < 1 / 15 + 1e-3


def test_front():
    assert front([(1, 5), (2, 4), (3, 4), (4, 1), (2, 6)]) == {0, 1, 3}
    assert front([(1, 1), (1, 1), (2, 1), (1, 2)]) == {0, 1}
    assert front([(1, 2)]) == {0}
