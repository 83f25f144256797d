"""Files with packed weights: pruned, written whole or not at all, read back to the bit, checked; the command line."""

import json
import os
import struct
import weakref

import pytest
import safetensors.torch
import small
import torch
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor
from test_packed import bits, sparse

from skrr_engine.cli import main
from skrr_engine.errors import SkrrError
from skrr_engine.files.encoder_file import Checkpoint
from skrr_engine.files.pruned import verify
from skrr_engine.files.sparse import RECORD, write_sparse
from skrr_engine.files.sparsify import Files, by_magnitude
from skrr_engine.weights.packed import PARTS
from skrr_engine.weights.tensor import PackedWeight, smaller

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small CLIP's file of 16 bit."""
    path = tmp_path_factory.mktemp("encoder") / "clip_l.safetensors"
    state = {key: tensor.half().contiguous() for key, tensor in small.build("clip").state_dict().items()}
    safetensors.torch.save_file(state, path, {"format": "pt"})
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def denoiser(dtype=torch.float16) -> dict[str, torch.Tensor]:
    """Tensors named as a U-Net's are."""
    made = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(64, 4, 3, 3),
        "model.diffusion_model.input_blocks.0.0.bias": torch.randn(64),
        "model.diffusion_model.label_emb.0.0.weight": torch.randn(64, 128),
        "model.diffusion_model.norm.weight": torch.randn(64),
        "first_stage_model.decoder.conv_in.weight": torch.randn(64, 64, 3, 3),
        "model.diffusion_model.token_embedding.weight": torch.randn(64, 64),
    }
    return {key: tensor.to(dtype) for key, tensor in made.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_what_was_pruned(tmp_path, dtype):
    before = denoiser(dtype)
    safetensors.torch.save_file(before, tmp_path / "in.safetensors", {"format": "pt", "made": "here"})
    assert run("sparsify", "--encoder", tmp_path / "in.safetensors", "--sparsity", 0.5, "--out",
               tmp_path / "out.safetensors") == 0  # fmt: skip
    found = verify(tmp_path / "out.safetensors")
    names = {key for key in before if key.endswith(("0.0.weight", "0.weight"))}
    assert found.packed == names and found.entries.keys() == before.keys() and found.metadata["made"] == "here"
    for key, tensor in before.items():
        now = found.tensor(key)
        if key not in names:
            assert torch.equal(bits(now), bits(tensor)), key
            continue
        assert isinstance(now, PackedWeight) and now.shape == tensor.shape == found.stored(key).shape
        dense, left = now.dense(), now.packed.values
        assert len(left) == tensor.numel() // 2 and torch.equal(dense[dense != 0], tensor[dense != 0])
        assert tensor[dense == 0].float().abs().max() <= left.float().abs().min()
    assert (found.sparse.kind, found.sparse.method) == ("checkpoint", "magnitude")


def test_the_library_reads_a_file(tmp_path, encoder):
    """By the names of its modules, through its own loader."""
    assert run("sparsify", "--encoder", encoder, "--sparsity", 0.6, "--out", tmp_path / "x.safetensors") == 0
    found = Checkpoint(tmp_path / "x.safetensors")
    theirs = dict(BitmaskCompressor().decompress(str(tmp_path / "x.safetensors")))
    assert found.packed and theirs.keys() == found.entries.keys()
    for key, tensor in theirs.items():
        own = found.tensor(key)
        own = own.dense() if isinstance(own, PackedWeight) else own
        assert torch.equal(bits(tensor), bits(own)), key


def test_a_file_that_the_library_wrote(tmp_path, capsys):
    state = {"a.weight": sparse(8, 24, dtype=torch.float16), "conv.weight": sparse(4, 3, 3, 3), "b.bias": sparse(5)}
    packed = BitmaskCompressor().compress({k: t for k, t in state.items() if k != "b.bias"})
    safetensors.torch.save_file({**packed, "b.bias": state["b.bias"]}, tmp_path / "x.safetensors")
    found = Checkpoint(tmp_path / "x.safetensors")
    assert found.packed == {"a.weight", "conv.weight"} and found.sparse is None
    for key, tensor in state.items():
        own = found.tensor(key)
        assert torch.equal(own.dense() if key in found.packed else own, tensor)
    assert run("verify", tmp_path / "x.safetensors") == 0
    assert "another program" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["wanda", "owl", "sparsegpt"])
def test_methods_that_look_at_prompts(tmp_path, encoder, tokenizer_folder, capsys, method):
    out = tmp_path / "x.safetensors"
    arguments = ["--encoder", encoder, "--method", method, "--sparsity", 0.5, "--out", out, "--count", 4]
    assert run("sparsify", *arguments, "--tokenizer", tokenizer_folder) == 0
    assert f"({method})" in capsys.readouterr().out
    found, before = verify(out), Checkpoint(encoder)
    weights = {key: found.tensor(key) for key in found.packed}
    gone = sum(w.numel() - len(w.packed.values) for w in weights.values()) / sum(w.numel() for w in weights.values())
    assert gone == pytest.approx(0.5, abs=0.02) and len(weights) >= 20
    changed = 0
    for key, weight in weights.items():
        dense, whole = weight.dense(), before.tensor(key)
        changed += int((dense[dense != 0] != whole[dense != 0]).sum())
    assert (changed > 0) == (method == "sparsegpt"), "only SparseGPT has values of its own"


def test_folders(tmp_path, encoder):
    (tmp_path / "folder").mkdir()
    state = safetensors.torch.load_file(encoder)
    middle = len(state) // 2
    for number, keys in enumerate((list(state)[:middle], list(state)[middle:])):
        safetensors.torch.save_file({k: state[k] for k in keys}, tmp_path / "folder" / f"model-{number}.safetensors")
    assert run("sparsify", "--encoder", tmp_path / "folder", "--out", tmp_path / "x.safetensors") == 0
    assert verify(tmp_path / "x.safetensors").entries.keys() == state.keys()


@pytest.mark.parametrize("pattern", ["*fc1*", "*layers.0.*"])
def test_what_is_excluded_stays_whole(tmp_path, encoder, pattern):
    arguments = ["--encoder", encoder, "--out", tmp_path / "x.safetensors", "--exclude", pattern]
    assert run("sparsify", *arguments) == 0
    found = Checkpoint(tmp_path / "x.safetensors")
    assert found.packed and not [key for key in found.packed if pattern.strip("*") in key]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--sparsity", "1"], "between 0 and 1"),
        (["--sparsity", "nan"], "between 0 and 1"),
        (["--exclude", "*"], "no weight in it may go"),
        (["--out", "no/such/x.safetensors"], "folder does not exist"),
    ],
)
def test_refused(tmp_path, encoder, capsys, arguments, says):
    assert run("sparsify", "--encoder", encoder, "--out", tmp_path / "x.safetensors", *arguments) == 1
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_never_over_its_input(tmp_path, encoder, capsys):
    before = encoder.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(encoder)
    for out in (encoder, tmp_path / "link.safetensors"):
        assert run("sparsify", "--encoder", encoder, "--out", out) == 1
        assert "source file" in capsys.readouterr().err and encoder.read_bytes() == before


def test_packed_files_are_no_source(tmp_path, encoder, capsys):
    assert run("sparsify", "--encoder", encoder, "--out", tmp_path / "x.safetensors") == 0
    assert run("sparsify", "--encoder", tmp_path / "x.safetensors", "--out", tmp_path / "y.safetensors") == 1
    assert "dense file" in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, "No space left on device"), SkrrError("stop")])
def test_an_interruption_leaves_nothing(tmp_path, end):
    (tmp_path / "x.safetensors").write_text("what was there")

    def tensors():
        yield "a.weight", smaller(sparse(8, 64))
        raise end

    with pytest.raises(type(end) if isinstance(end, BaseException) else end):
        write_sparse(tmp_path / "x.safetensors", tensors(), "diffusion model")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "what was there"


def test_a_source_that_changes_meanwhile(tmp_path, encoder):
    own = tmp_path / "in.safetensors"
    own.write_bytes(encoder.read_bytes())
    files = Files(own)

    def tensors():
        yield from by_magnitude(files, 0.5)
        os.utime(own, (1, 1))

    with pytest.raises(SkrrError, match="changed"):
        write_sparse(tmp_path / "x.safetensors", tensors(), files.kind, check=files.check_unchanged)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Also where there are many."""
    alive = []

    def tensors():
        for number in range(20):
            weight = smaller(sparse(16, 64, seed=number))
            alive.append(weakref.ref(weight))
            yield f"layer{number}.weight", weight
            del weight
            assert sum(ref() is not None for ref in alive) <= 2

    write_sparse(tmp_path / "x.safetensors", tensors(), "diffusion model")
    assert len(Checkpoint(tmp_path / "x.safetensors").packed) == 20


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file with packed weights, its bytes."""
    out = tmp_path_factory.mktemp("written") / "x.safetensors"
    tensors = {"a.weight": sparse(16, 64), "conv.weight": sparse(8, 4, 3, 3), "b.bias": sparse(5)}
    write_sparse(out, ((k, smaller(t) if k != "b.bias" else t) for k, t in tensors.items()), "diffusion model")
    return out.read_bytes()


def changed(data: bytes, change) -> bytes:
    """A file with another header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def record(**fields):
    def change(header):
        own = json.loads(header["__metadata__"][RECORD])
        header["__metadata__"][RECORD] = json.dumps({**own, **fields})

    return change


def renamed(old: str, new: str):
    return lambda header: header.__setitem__(new, header.pop(old))


@pytest.mark.parametrize(
    "change, says",
    [
        (record(kind="virus"), "damaged"),
        (record(shapes=[]), "damaged"),
        (record(shapes={"conv.weight": [8, -4, 3, 3]}), "damaged"),
        (record(shapes={"conv.weight": [8, 4, 3, 4]}), "size"),
        (record(sparsity={"x": "y"}), "damaged"),
        (record(method="other"), "header"),
        (lambda header: header["__metadata__"].__setitem__(RECORD, "[" * 100000), "damaged"),
        (renamed("a.row_offsets", "a.rows"), "without a.row_offsets"),
        (renamed("a.shape", "a.form"), "without a.shape"),
        (renamed("b.bias", "a.weight"), "twice"),
        (lambda header: header["a.shape"].__setitem__("dtype", "F64"), "no shape"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path, written, change, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(changed(written, change))
    with pytest.raises(SkrrError, match=says) as error:
        verify(path)
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


def test_every_byte_is_checked(tmp_path, written):
    path = tmp_path / "x.safetensors"
    path.write_bytes(written)
    verify(path)
    (length,) = struct.unpack("<Q", written[:8])
    for place in (8 + length, len(written) - 1, (8 + length + len(written)) // 2):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(SkrrError, match="x.safetensors|damaged"):
            verify(path)


def test_values_of_many_types_keep_their_places(tmp_path):
    """Every tensor begins at a multiple of its element's size, as safetensors' own readers want it."""
    tensors = {f"{dtype}.weight".replace("torch.", ""): smaller(sparse(13, 37, dtype=dtype)) for dtype in DTYPES}
    write_sparse(tmp_path / "x.safetensors", tensors.items(), "diffusion model")
    raw = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert len(raw) == 4 * len(PARTS)
    found = Checkpoint(tmp_path / "x.safetensors")
    for key, weight in tensors.items():
        assert torch.equal(bits(found.tensor(key).dense()), bits(weight.dense()))
