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


def narrow_plan(folder) -> "test_files.Plan":
    """A plan of this file's encoder with narrowed places and its companion file in `folder`."""
    from skrr_engine.files import companion
    from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance, Units

    counts = (HEADS, max(FFN, 32))
    left = {0: 1, 3: counts[1] // 2, 7: 8, 8: 1, 11: 0}
    units = Units(sha256="0" * 64, attention=counts[0], feed_forward=counts[1])
    entry = EncoderPlan(
        family="t5", blocks=24, width=test_files.WIDTH, order=tuple((i, n) if n else i for i, n in left.items()),
        units=units, levels=(Level(skipped=5, reuse={}, sparsity=0.01),),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    orders = {i: torch.randperm(counts[i % 2], generator=generator) for i, n in left.items() if n}
    plan = Plan(encoders={"t5xxl": entry}, provenance=Provenance(source="test"))
    plan, data = companion.encoded(plan, {}, {"t5xxl": orders})
    companion.write(folder / "mine.standins.safetensors", data)
    return plan


def test_narrowed(comfy, host, loader, monkeypatch, tmp_path):
    """Load CLIP (Skrr) = Load Skrr Plan behind the pack's own loader = the dense one with the other units' columns
    zero; a LoRA is cut with the units; bytes are counted."""
    import nodes
    from test_comfy import lora_for, with_lora

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "CLIPLoaderGGUF", loader)
    monkeypatch.setattr(host("nodes.host.plans.folder"), "folders", lambda: [tmp_path])
    plan = narrow_plan(tmp_path)
    views, derive = host("nodes.host.clip.views"), host("nodes.host.clip.derive").derive
    loaded = host("nodes.host.files.load").load(["t5.gguf"], "mochi", choice(host, plan))
    dense = loader().load_clip("t5.gguf", "mochi")[0]
    before = encode(dense)
    chosen, view = choice(host, plan), views.views(dense)["t5xxl"]
    pruned, _ = chosen.pruned("t5xxl", view, chosen.plan.encoder("t5xxl"))
    derived = derive(dense, {"t5xxl": pruned})
    units_of = host("skrr_engine.encoder.units").units_of

    def by_hand(clip) -> torch.Tensor:
        handles = []
        for place, action in pruned.removed.items():
            own = units_of(view.row, place)
            kept = action.units if action.units is not None else torch.empty(0, dtype=torch.int64)
            mask = torch.zeros(own.count)
            mask[kept] = 1
            mask = mask.repeat_interleave(own.inner // own.count)
            handles.append(own.out.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,)))
        try:
            return encode(clip)
        finally:
            for handle in handles:
                handle.remove()

    found = encode(loaded)
    for _ in range(2):
        assert torch.equal(found, encode(derived)) and not torch.equal(found, before)
        assert torch.equal(encode(dense), before)
    torch.testing.assert_close(found, by_hand(dense), rtol=1e-3, atol=1e-4)
    held = sum(t.nbytes for t in derived.cond_stage_model.state_dict().values())
    assert derived.patcher.model_size() == held == loaded.patcher.model_size() < dense.patcher.model_size()
    lora = lora_for(comfy, dense, "block.1.layer.1.DenseReluDense.wi_0")
    behind = with_lora(comfy, derived, lora)
    assert not torch.equal(encode(behind), found)
    path = "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wi_0"
    layer, cut = behind.patcher._own[path], host("nodes.host.clip.cut")
    up, down = (next(t for key, t in lora.items() if f"lora_{kind}" in key) for kind in ("up", "down"))
    wanted = cut.gguf_dense(layer.skrr_pristine["weight"]) + (up @ down)[pruned.removed[3].units]
    torch.testing.assert_close(layer.weight.float(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(encode(derived), found) and torch.equal(encode(dense), before)


def test_columns_at_8_bits_anew_or_whole(comfy, host):
    """The less of the two in bytes; rows stay as they are; numbers are those of the file, rounded once more."""
    import gguf
    import gguf_stand_in

    cut, kinds = host("nodes.host.clip.cut"), gguf.GGMLQuantizationType
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def held(kind):
        raw = torch.from_numpy(gguf.quants.quantize(dense.numpy(), kind))
        return gguf_stand_in.Quantised(raw, kind, dense.shape)

    index = torch.arange(0, 128, 2)
    rows = cut.cut_weight(held(kinds.Q4_0), index[:32], 0)
    assert rows.tensor_type == kinds.Q4_0 and tuple(rows.tensor_shape) == (32, 128)
    assert torch.equal(cut.gguf_dense(rows), cut.gguf_dense(held(kinds.Q4_0))[index[:32]])
    columns = cut.cut_weight(held(kinds.Q8_0), index, 1)
    assert columns.tensor_type == kinds.Q8_0 and columns.as_subclass(torch.Tensor).nbytes == 64 * 2 * 34
    torch.testing.assert_close(cut.gguf_dense(columns), cut.gguf_dense(held(kinds.Q8_0))[:, index], atol=0.03, rtol=0)
    assert cut.cut_weight(held(kinds.Q8_0), index[:33], 1) is None, "no whole blocks"
    assert cut.cut_weight(held(kinds.Q4_0), torch.arange(96), 1) is None, "8 bits of 96 are more than 4 of 128"
    assert cut.cut_weight(held(kinds.Q4_0), index[:32], 1).tensor_type == kinds.Q8_0
