"""Text encoders with packed weights in files: every form of weights, with and without a plan, in ComfyUI's loader."""

import pytest
import torch
from safetensors.torch import load_file
from test_files import choice, dense, encode, files, host, plan_for, small_heads, text_encoders  # noqa: F401 - fixtures
from test_saving import shelf  # noqa: F401 - a fixture
from torch import nn

from skrr_engine.cli import main
from skrr_engine.disk.safetensors import tensor_bytes
from skrr_engine.files.encoder_file import Checkpoint
from skrr_engine.files.pruned import verify
from skrr_engine.weights.tensor import PackedWeight


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def tensor(host):  # noqa: F811
    return host("skrr_engine.weights.tensor")


@pytest.fixture
def sparse(host):  # noqa: F811
    """`sparse(clip, sparsity)`: a CLIP of our own."""

    def make(clip, share=0.5):
        return host("nodes.host.sparse.derive").sparse(None, clip, ("magnitude", "magnitude"), (0.0, share), [], [])[1]

    return make


def masked(clip, tensor):  # noqa: F811
    """A CLIP of our own, dense again, in place."""
    for layer in clip.cond_stage_model.modules():
        if isinstance(getattr(layer, "weight", None), tensor.PackedWeight):
            layer.weight = nn.Parameter(layer.weight.dense(), requires_grad=False)
    return clip


def unpacked(path) -> dict[str, bytes]:
    """The bytes of a file's tensors, dense."""
    found = Checkpoint(path)
    tensors = {key: found.tensor(key) for key, entry in found.entries.items() if entry.kept}
    dense_ones = {k: t.dense() if isinstance(t, PackedWeight) else t for k, t in tensors.items()}
    return {key: b"".join(tensor_bytes(t)) for key, t in dense_ones.items()}


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "fp8", "scaled_fp8"])
def test_files_of_the_command_line(comfy, host, tensor, shelf, small_heads, files, kind, tmp_path):  # noqa: F811
    """Each form of weights, packed, gives what its masked dense file gives, and takes less memory."""
    out = shelf["text_encoders"]
    out.mkdir(exist_ok=True)
    arguments = ["sparsify", "--encoder", files[kind], "--sparsity", 0.5, "--out", out / "x.safetensors"]
    assert main([str(argument) for argument in arguments]) == 0
    verify(out / "x.safetensors")
    from safetensors.torch import save_file

    found = Checkpoint(out / "x.safetensors")
    state = {key: found.tensor(key) for key in found.entries}
    state = {k: t.dense() if isinstance(t, PackedWeight) else t for k, t in state.items()}
    assert state.keys() == load_file(files[kind]).keys() and len(found.packed) > 50
    save_file(state, tmp_path / "masked.safetensors", {"format": "pt"})
    whole = dense(comfy, tmp_path / "masked.safetensors")
    loaded = host("nodes.host.files.load").load(["x.safetensors"], "mochi", choice(host, None))
    assert torch.equal(encode(loaded), encode(whole)) and encode(whole).isfinite().all()
    weights = tensor.packed_weights(loaded.cond_stage_model)
    assert len(weights) == len(found.packed)
    saved = sum(weight.dense_nbytes - weight.nbytes for weight in weights.values())
    assert loaded.patcher.model_size() == whole.patcher.model_size() - saved
    assert loaded.patcher.loaded_size() == loaded.patcher.model_size()


def test_a_plan_and_zeros(comfy, host, tensor, sparse, shelf, small_heads, files):  # noqa: F811
    """Parts go first, weights of what is kept then; saved, checked and loaded, by both loaders."""
    plan = choice(host, plan_for()).plan.encoder("t5xxl")
    encoders = host("nodes.host.clip.views")
    entry = encoders.Pruned(plan, plan.levels[-1])
    derived = host("nodes.host.clip.derive").derive(dense(comfy, files["fp16"]), {"t5xxl": entry})
    before = encode(derived)
    small = sparse(derived)
    wanted = encode(masked(sparse(derived), tensor))
    assert torch.equal(encode(small), wanted) and not torch.equal(wanted, before)
    assert torch.equal(encode(derived), before)
    name, size = host("nodes.host.sparse.save").save(None, small, None, "x")
    path = shelf["text_encoders"] / "x.safetensors"
    assert name == "text_encoders/x.safetensors" and path.stat().st_size == size
    found = verify(path)
    assert found.record.plan is not None and found.record.dropped and found.packed
    loaded = host("nodes.host.files.load").load(["x.safetensors"], "mochi", choice(host, None))
    assert torch.equal(encode(loaded), wanted)
    assert loaded.patcher.model_size() == small.patcher.model_size()
    with pytest.raises(ValueError, match="loaded without its removed parts"):
        host("nodes.host.clip.derive").derive(loaded, {"t5xxl": entry})


def test_zeros_in_a_pruned_file(host, shelf, small_heads, files, tensor):  # noqa: F811
    """The command line on a file that a plan has pruned: still that file, its hashes its own."""
    own = host("skrr_engine.files.pruned")
    plan = host("skrr_engine.plan.model").Plan.from_json(plan_for().to_json())
    folder = shelf["text_encoders"]
    folder.mkdir(exist_ok=True)
    source = host("skrr_engine.files.encoder_file").Checkpoint(files["fp16"])
    own.write_pruned(source, folder / "pruned.safetensors", "t5xxl", plan, plan.encoder("t5xxl").levels[-1].skipped)
    arguments = ["sparsify", "--encoder", folder / "pruned.safetensors", "--out", folder / "x.safetensors"]
    assert main([str(argument) for argument in arguments]) == 0
    found = verify(folder / "x.safetensors")
    assert found.record.dropped == verify(folder / "pruned.safetensors").record.dropped and found.packed
    loaded = host("nodes.host.files.load").load(["x.safetensors"], "mochi", choice(host, None))
    assert encode(loaded).isfinite().all() and tensor.packed_weights(loaded.cond_stage_model)


def test_save_and_load_again(comfy, host, tensor, sparse, shelf, small_heads, files):  # noqa: F811
    """What is loaded, saved again and loaded is the same; and Load Sparse takes it."""
    small = sparse(dense(comfy, files["fp16"]))
    wanted = encode(small)
    save, load = host("nodes.host.sparse.save").save, host("nodes.host.sparse.load").load
    name, _ = save(None, small, None, "x")
    _, loaded, _ = load(name, "mochi")
    assert torch.equal(encode(loaded), wanted)
    assert torch.equal(encode(small), wanted), "what was saved stays usable"
    again = load(save(None, sparse(loaded, 0.6), None, "y")[0], "mochi")[1]
    assert not torch.equal(encode(again), wanted)
    assert again.patcher.model_size() < loaded.patcher.model_size()
