"""`.gguf` files: loaded by ComfyUI-GGUF's own loader (here a stand-in, or the real pack where SKRR_GGUF names it), then
pruned. The files are real ones, in Q8_0."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import test_files
import torch
from test_files import FFN, HEADS, ORDER, choice, plan_for

host, encode = test_files.host, test_files.encode


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def loader(comfy, tmp_path_factory):
    """The loader node, with a T5-XXL of small sub-blocks as `t5.gguf` where it looks."""
    import folder_paths
    import gguf_stand_in

    folder = tmp_path_factory.mktemp("gguf")
    with torch.inference_mode():
        gguf_stand_in.write_gguf(folder / "t5.gguf", t5_tensors())
    folder_paths.folder_names_and_paths["clip_gguf"] = ([str(folder)], {".gguf"})
    folder_paths.add_model_folder_path("text_encoders", str(folder))
    folder_paths.filename_list_cache.clear()
    real = os.environ.get("SKRR_GGUF")
    if real is None:
        return gguf_stand_in.CLIPLoaderGGUF
    spec = importlib.util.spec_from_file_location(
        "real_gguf", Path(real) / "__init__.py", submodule_search_locations=[real]
    )
    pack = sys.modules["real_gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    folder_paths.folder_names_and_paths["clip_gguf"] = ([str(folder)], {".gguf"})
    return pack.NODE_CLASS_MAPPINGS["CLIPLoaderGGUF"]


def t5_tensors() -> dict[str, torch.Tensor]:
    """Widths of whole Q8_0 blocks (32) all over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_files, "FFN", 32 if FFN < 32 else FFN)
        tensors = test_files.t5xxl_tensors(torch.float32)
    inner = 32
    for key in list(tensors):
        if ".SelfAttention." in key and key[-8] in "qkvo":
            width = tensors[key].shape[0 if key[-8] == "o" else 1]
            shape = (width, inner) if key[-8] == "o" else (inner, width)
            tensors[key] = torch.randn(shape, generator=torch.Generator().manual_seed(len(key))) * shape[1] ** -0.5
    return tensors


@pytest.fixture(autouse=True)
def sizes(comfy, monkeypatch):
    """Of this file's encoder."""
    import comfy.sd

    numbers = {"d_model": test_files.WIDTH, "d_ff": max(FFN, 32), "d_kv": 16, "num_heads": HEADS, "vocab_size": 64}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), "t5xxl_model_config": numbers}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)


def test_needs_the_pack(comfy, host, loader, monkeypatch):
    import nodes

    monkeypatch.delitem(nodes.NODE_CLASS_MAPPINGS, "CLIPLoaderGGUF", raising=False)
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="need the pack ComfyUI-GGUF by city96: install it"):
        host("nodes.host.files.load").load(["t5.gguf"], "mochi", choice(host, plan_for()))


def test_loads_pruned_and_derives(comfy, host, loader, monkeypatch):
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "CLIPLoaderGGUF", loader)
    assert "t5.gguf" in host("nodes.host.versions").encoder_files()[0]
    pruned = host("nodes.host.files.load").load(["t5.gguf"], "mochi", choice(host, plan_for()))
    dense = loader().load_clip("t5.gguf", "mochi")[0]
    before = encode(dense)
    encoders, own = host("nodes.host.clip.views"), choice(host, plan_for()).plan.encoder("t5xxl")
    derived = host("nodes.host.clip.derive").derive(dense, {"t5xxl": encoders.Pruned(own, own.levels[-1])})
    for _ in range(2):
        found = encode(pruned)
        assert found.isfinite().all() and torch.equal(found, encode(derived)) and not torch.equal(found, before)
        assert torch.equal(encode(dense), before)
    row = encoders.views(dense)["t5xxl"].row
    assert pruned.patcher.model_size() < dense.patcher.model_size()
    assert row.parameter_counts[1] == 3 * max(FFN, 32) * test_files.WIDTH + test_files.WIDTH, "not the logical shapes"
    shape = encoders.views(dense)["t5xxl"].shape
    left = encoders.size(derived.cond_stage_model.t5xxl.transformer)
    assert shape.total_bytes - shape.bytes_of(ORDER) == left, "not the bytes that the weights take"
    gone = {key for i in ORDER for key in row.sub_blocks[i].tensors()}
    assert not gone & pruned.cond_stage_model.t5xxl.transformer.state_dict().keys()
    memory = host("nodes.host.clip.memory").encoders(pruned)[0]
    assert memory.precision == "Q8_0" and memory.saved > 0
    saving = host("nodes.host.files.save")
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="can't be saved from memory"):
        saving.save(derived, encoders.choose(derived), encoders.pruning(derived)["t5xxl"], "gguf")


def test_device(comfy, host, loader, monkeypatch):
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "CLIPLoaderGGUF", loader)
    elsewhere = torch.device("meta")
    monkeypatch.setattr(comfy.model_management, "text_encoder_device", lambda: elsewhere)
    load = host("nodes.host.files.load").load
    left = load(["t5.gguf"], "mochi", choice(host, None), trim=False)
    assert left.patcher.load_device == elsewhere
    clip = load(["t5.gguf"], "mochi", choice(host, plan_for()), device="cpu", trim=False)
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")
    assert encode(clip).isfinite().all()


class Newer:
    """A node of the same name without that method."""

    @classmethod
    def execute(cls, clip_name, type):
        raise AssertionError


class Other:
    """One whose method wants something else."""

    def load_clip(self, clip_path, dtype):
        raise AssertionError


@pytest.mark.parametrize("node", [Newer, Other])
def test_foreign_node_of_the_same_name(host, loader, monkeypatch, node):
    import nodes

    monkeypatch.setattr(node, "RELATIVE_PYTHON_MODULE", "custom_nodes.gguf-other", raising=False)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "CLIPLoaderGGUF", node)
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="gguf-other has a node under the name") as found:
        host("nodes.host.files.load").load(["t5.gguf"], "mochi", choice(host, plan_for()))
    assert "\n" not in str(found.value)
