"""Packed weights, unpacked to the bit; the library whose layout their files have is the oracle."""

import pytest
import torch
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor, BitmaskTensor
from hypothesis import given, settings
from hypothesis import strategies as st

from skrr_engine.weights.packed import PARTS, Packed, PackedError, checked, pack, pays

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(8, 16), (5, 13), (1, 1), (3, 64), (7, 3, 3, 3), (4, 6, 1, 1), (2, 3, 2, 3, 3), (16, 1)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def sparse(*shape: int, dtype=torch.float32, sparsity: float = 0.475, seed: int = 0) -> torch.Tensor:
    """Noise with exact zeros in it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    return noise.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacks_to_the_bit(shape, dtype):
    weight = sparse(*shape, dtype=dtype)
    packed = pack(weight)
    assert torch.equal(bits(packed.unpack()), bits(weight))
    assert packed.values.shape == (int((weight.float() != 0).sum()),)
    assert (packed.shape, packed.dtype, packed.unpack().shape) == (shape, dtype, shape)
    assert torch.equal(packed.unpack(dtype=torch.float64), weight.to(torch.float64))


@settings(max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=40), st.sampled_from(DTYPES))
def test_any_mask(rows, dtype):
    weight = (torch.tensor(rows).float() * torch.arange(1, 12)).to(dtype)
    assert torch.equal(bits(pack(weight).unpack()), bits(weight))


def test_masks_longer_than_what_is_unpacked_at_once(monkeypatch):
    monkeypatch.setattr("skrr_engine.weights.packed.AT_ONCE", 3)
    weight = sparse(20, 21, dtype=torch.float16)
    assert torch.equal(pack(weight).unpack(), weight)


def test_all_and_nothing():
    for weight in (torch.zeros(4, 9), torch.ones(4, 9), torch.full((4, 9), float("nan"))):
        assert torch.equal(bits(pack(weight).unpack()), bits(weight))


def test_bytes():
    """What the values and the bits of the places take, and no more."""
    weight = torch.ones(1000, 800)
    weight.view(-1)[: 475 * 800] = 0
    for dtype, share in ((torch.float16, 0.5875), (torch.float8_e4m3fn, 0.65)):
        packed = pack(weight.to(dtype))
        assert packed.nbytes == pytest.approx(share * packed.dense_nbytes) and pays(packed)
        stored = sum(tensor.nbytes for tensor in packed.stored().values())
        assert stored == packed.nbytes + 8 * 1002
    assert not pays(pack(sparse(100, 100, sparsity=0.03, dtype=torch.float16)))
    assert not pays(pack(sparse(1000, 4, dtype=torch.float16))), "rows cost bytes of their own"


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_library_reads_what_is_packed(shape, dtype):
    weight = sparse(*shape, dtype=dtype)
    parts = pack(weight).stored()
    matrix = weight.reshape(weight.shape[0], -1)
    found = BitmaskTensor(**parts).decompress()
    assert torch.equal(bits(found), bits(matrix))
    theirs = BitmaskCompressor().compress_weight("layer", matrix)
    for part, tensor in parts.items():
        assert torch.equal(bits(theirs[f"layer.{part}"]), bits(tensor)), part
        assert theirs[f"layer.{part}"].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_library_packs_is_read(shape, dtype):
    """Its weights of more than two dimensions have a bitmask of as many."""
    weight = sparse(*shape, dtype=dtype)
    theirs = BitmaskCompressor().compress_weight("layer", weight)
    found = checked("layer", {part: theirs[f"layer.{part}"] for part in PARTS})
    assert torch.equal(bits(found.unpack()), bits(weight)) and found.shape == shape


def damaged(part: str, change) -> dict:
    parts = pack(sparse(6, 13)).stored()
    return {**parts, part: change(parts[part])}


@pytest.mark.parametrize(
    "parts, says",
    [
        (damaged("shape", lambda t: t * 3), "bitmask is not of its shape"),
        (damaged("shape", lambda t: t * 0), "impossible shape"),
        (damaged("shape", lambda t: t - 1000), "impossible shape"),
        (damaged("shape", lambda t: t + (1 << 40)), "impossible shape"),
        (damaged("shape", lambda t: t.float()), "wrong type"),
        (damaged("compressed", lambda t: t[:-1]), "bits for"),
        (damaged("compressed", lambda t: t.int()), "floating-point"),
        (damaged("bitmask", lambda t: t.int()), "wrong type"),
        (damaged("bitmask", lambda t: t | 0x80), "behind the end"),
        (damaged("bitmask", lambda t: t.flip(0)), "row_offsets"),
        (damaged("row_offsets", lambda t: t + 1), "row_offsets"),
        (damaged("row_offsets", lambda t: t[:-1]), "row_offsets"),
    ],
)  # fmt: skip
def test_damaged(parts, says):
    with pytest.raises(PackedError, match=says) as error:
        checked("layer\n9", parts)
    assert "\n" not in str(error.value) and "get the file again" in str(error.value)


def test_parts_that_are_missing():
    parts = pack(sparse(6, 13)).stored()
    for part in PARTS:
        with pytest.raises(PackedError, match=f"without {part}"):
            checked("layer", {name: tensor for name, tensor in parts.items() if name != part})


def test_a_shape_of_more_dimensions():
    weight = sparse(4, 2, 3, 3)
    assert torch.equal(checked("conv", pack(weight).stored(), (4, 2, 3, 3)).unpack(), weight)
    with pytest.raises(PackedError, match="not that of its weight"):
        checked("conv", pack(weight).stored(), (4, 2, 3, 4))


def test_a_device_of_its_own():
    packed = pack(sparse(4, 9))
    moved = packed.to(torch.device("meta"))
    assert isinstance(moved, Packed) and moved.device.type == "meta" and packed.device.type == "cpu"
