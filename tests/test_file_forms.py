"""Encoder files in the forms that artists have them: quantised, with more in them than an encoder uses, with less,
under other names, and such as are no single encoder."""

import json
import os
import re
from pathlib import Path

import pytest
import test_files
import torch
from safetensors.torch import load_file, save_file
from test_files import ORDER, choice, dense, encode, plan_for, scaled_fp8, t5xxl_tensors

from skrr_engine.encoder.row import EncoderError
from skrr_engine.files import folder as encoders
from skrr_engine.files.encoder_file import Checkpoint, CheckpointError
from skrr_engine.files.offload import Files
from skrr_engine.files.pruned import verify
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance

host, small_heads, inference = test_files.host, test_files.small_heads, test_files.inference
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
CLIP_ORDER = (3, 4, 8)
QUANTISED = ("int8_tensorwise", "nvfp4", "mxfp8")
LATER = pytest.mark.skipif("SKRR_COMFYUI" not in os.environ, reason="ComfyUI 0.3.75 knows no such files")


@pytest.fixture(scope="module")
def folder(comfy, tmp_path_factory) -> Path:
    """Where ComfyUI looks for text encoders first."""
    import folder_paths

    made = tmp_path_factory.mktemp("forms")
    folder_paths.add_model_folder_path("text_encoders", str(made), is_default=True)
    return made


@pytest.fixture
def write(folder):
    """`write(name, tensors)` puts a file there."""
    import folder_paths

    def put(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        save_file({k: t.contiguous().clone() for k, t in tensors.items()}, folder / name, {"format": "pt"})
        folder_paths.filename_list_cache.clear()
        return folder / name

    return put


@pytest.fixture
def small(small_heads, monkeypatch):
    """Have ComfyUI's CLIP and Llama classes take small sizes, too."""
    import comfy.sd

    llama = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"clip_l_model_config": SMALL, "clip_g_model_config": SMALL, "llama_model_config": llama}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), **sizes}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)


def noise(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def clip_tensors(blocks: int) -> dict[str, torch.Tensor]:
    """CLIP-L (12 blocks) or CLIP-G (32), narrow."""
    embeddings, width, ffn = "text_model.embeddings.", SMALL["hidden_size"], SMALL["intermediate_size"]
    shapes = {f"{embeddings}token_embedding.weight": (49408, width), "text_projection.weight": (width, width)}
    shapes[f"{embeddings}position_embedding.weight"] = (77, width)
    norms = ["text_model.final_layer_norm"]
    for block in range(blocks):
        layer = f"text_model.encoder.layers.{block}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        shapes |= {f"{layer}self_attn.{n}_proj.{k}": (width, width)[: 1 + (k == "weight")]
                   for n in ("q", "k", "v", "out") for k in ("weight", "bias")}  # fmt: skip
        shapes |= {f"{layer}mlp.fc1.weight": (ffn, width), f"{layer}mlp.fc1.bias": (ffn,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, ffn), f"{layer}mlp.fc2.bias": (width,)}
    found = {key: noise(shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
    found |= {f"{norm}.weight": torch.ones(width) for norm in norms}
    return found | {f"{norm}.bias": torch.zeros(width) for norm in norms}


def clip_plan(name: str, blocks: int = 12, order=CLIP_ORDER) -> Plan:
    level = Level(skipped=len(order), reuse={}, sparsity=0.1)
    entry = EncoderPlan(family="clip", blocks=blocks, width=SMALL["hidden_size"], order=order, levels=(level,))
    return Plan(encoders={name: entry}, provenance=Provenance(source="test"))


def quantised(form: str) -> dict[str, torch.Tensor]:
    """T5-XXL with all weights quantised that this form can hold, as ComfyUI itself quantises them."""
    if form == "scaled_fp8":
        return scaled_fp8(t5xxl_tensors(torch.float16))
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    found = {}
    for key, tensor in t5xxl_tensors(torch.bfloat16).items():
        fits = tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and tensor.shape[0] % 16 == 0
        if fits and re.search(r"\.(q|k|v|wi_\d)\.weight$", key):
            made = QuantizedTensor.from_float(tensor.contiguous(), QUANT_ALGOS[form]["comfy_tensor_layout"])
            found |= {name: part.detach() for name, part in made.state_dict(key).items()}
            marker = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
            found[key.removesuffix("weight") + "comfy_quant"] = marker
        else:
            found[key] = tensor
    return found


def shape_of(host, clip, name: str = "t5xxl"):
    return host("nodes.host.clip.views").views(clip)[name].shape


@pytest.mark.parametrize("form", ["scaled_fp8", *(pytest.param(form, marks=LATER) for form in QUANTISED)])
def test_size_of_quantised_files(comfy, host, small_heads, write, form):
    """A size is met, told as it is, and the same level is chosen for a file and for what was loaded from it."""
    path = write(f"{form}.safetensors", quantised(form))
    whole, entry = dense(comfy, path), choice(host, plan_for()).plan.encoder("t5xxl")
    in_memory, encoders = shape_of(host, whole), host("nodes.host.clip.views")
    real = encoders.size(whole.cond_stage_model.t5xxl.transformer)
    derive = host("nodes.host.clip.derive").derive
    layout = Checkpoint(path).layout  # 0.3.75 counts scales as parameters
    assert layout.parameter_counts == pytest.approx(in_memory.parameter_counts, rel=1e-3)
    assert layout.total == pytest.approx(in_memory.total, rel=1e-3)
    left = {None: real}
    for level in entry.levels:
        derived = derive(whole, {"t5xxl": encoders.Pruned(entry, level)})
        left[level.skipped] = encoders.size(derived.cond_stage_model.t5xxl.transformer)
    assert left[2] > left[8] > 0.5 * real
    for skipped, size in left.items():
        asked = choice(host, plan_for(), 1.0, size * 1.0005 / 1e9)
        found, line = asked.level("t5xxl", in_memory, entry)
        assert (found and found.skipped) == skipped, line
        clip = host("nodes.host.files.load").load([path.name], "mochi", asked, trim=False)
        pruned = encoders.pruning(clip)["t5xxl"]
        assert (pruned.level and pruned.level.skipped) == skipped
        told = host("nodes.host.maps").of_clip(clip)[0]
        assert told["now"] == pytest.approx(size, rel=1e-3) and told["dense"] == pytest.approx(real, rel=1e-3)
        assert told["total"] == in_memory.total and told["counts"] == list(in_memory.parameter_counts)
        assert encode(clip).isfinite().all()


def test_t5_with_its_decoder_and_its_embedding_twice(comfy, host, small_heads, write):
    tensors = t5xxl_tensors(torch.float16)
    more = {"encoder.embed_tokens.weight": tensors["shared.weight"], "lm_head.weight": tensors["shared.weight"]}
    more |= {k.replace("encoder.", "decoder.", 1): t for k, t in tensors.items() if k.startswith("encoder.block.1")}
    plain, full = write("plain.safetensors", tensors), write("full.safetensors", {**tensors, **more})
    one, two = Checkpoint(plain).layout, Checkpoint(full).layout
    assert (one.total, one.total_bytes) == (two.total, two.total_bytes) and one.sparsity(ORDER) == two.sparsity(ORDER)
    load, saving, encoders = (host(f"nodes.host.{name}") for name in ("files.load", "files.save", "clip.views"))
    clip = load.load([full.name], "mochi", choice(host, plan_for()))
    assert torch.equal(encode(clip), encode(load.load([plain.name], "mochi", choice(host, plan_for()))))
    assert shape_of(host, clip).total_bytes == shape_of(host, dense(comfy, full)).total_bytes
    memory = host("nodes.host.clip.memory").encoders(clip)[0]
    assert memory.now == host("nodes.host.maps").of_clip(clip)[0]["now"] + 4, "logit_scale stands beside the encoder"
    name, _ = saving.save(clip, encoders.choose(clip), encoders.pruning(clip)["t5xxl"], "of full")
    assert load_file(full.parent / name).keys() == tensors.keys() - one.dropped(ORDER)
    assert torch.equal(encode(load.load([name], "mochi", choice(host, None))), encode(clip))


def test_clip_with_its_vision_tower_in_fp32(comfy, host, small, write):
    import comfy.sd

    tower = {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": torch.randn(512, 128) for i in range(3)}
    tower["visual_projection.weight"] = torch.randn(64, 128)
    tensors = clip_tensors(12)
    path = write("clip_l.safetensors", {**tensors, **tower})
    clip = host("nodes.host.files.load").load([path.name], "stable_diffusion", choice(host, clip_plan("clip_l")))
    whole = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    found, real = shape_of(host, clip, "clip_l"), shape_of(host, whole, "clip_l")
    assert found == real and real.total_bytes < 0.6 * sum(t.nbytes for t in tensors.values()), "it is fp16 in memory"
    report = host("nodes.host.clip.memory").encoders
    assert report(clip)[0].dense == report(whole)[0].dense
    saving, encoders = host("nodes.host.files.save"), host("nodes.host.clip.views")
    name, _ = saving.save(clip, encoders.choose(clip), encoders.pruning(clip)["clip_l"], "text only")
    kept = load_file(path.parent / name)
    assert kept.keys() == tensors.keys() - Checkpoint(path).layout.dropped(CLIP_ORDER)
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)


@pytest.mark.parametrize("trim", [True, False])
def test_shortened_file(comfy, host, small, write, trim):
    """SDXL reads 11 of CLIP-L's 12 blocks: a file of 11 loads and is saved, and is refused where all count."""
    whole, cut = clip_tensors(12), clip_tensors(11)
    names = ["g.safetensors", "whole.safetensors", "cut.safetensors"]
    g, whole, cut = map(write, names, (clip_tensors(32), whole, {k: whole[k] for k in cut}))
    load, encoders = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    tokens = load([whole.name, g.name], "sdxl", choice(host, None)).tokenize("a red cube")

    def conditioning(clip):
        return clip.encode_from_tokens(tokens, return_pooled=True)

    chosen = choice(host, clip_plan("clip_l", order=(3, 22, 8)))
    plain, short = (load([p.name, g.name], "sdxl", chosen, trim=trim) for p in (whole, cut))
    wanted, found = conditioning(plain), conditioning(short)
    assert all(map(torch.equal, wanted, found)) and found[0].isfinite().all()
    assert not torch.equal(found[0], conditioning(load([cut.name, g.name], "sdxl", choice(host, None)))[0])
    shape, pruned = shape_of(host, short, "clip_l"), encoders.pruning(short)["clip_l"]
    assert shape.blocks == 12 and shape.sub_block_bytes[-2:] == (0, 0) and pruned.removed.keys() == {3, 8, 22, 23}
    assert shape.total_bytes == sum(t.nbytes for t in load_file(cut).values()) // 2
    view = encoders.views(short)["clip_l"]
    name, _ = host("nodes.host.files.save").save(short, view, pruned, "of cut")
    assert verify(cut.parent / name).layout.blocks == 12
    again = load([name, g.name], "sdxl", choice(host, None), trim=trim)
    assert all(map(torch.equal, conditioning(again), found))
    error = host("skrr_engine.files.encoder_file").CheckpointError
    for file in (cut.name, name):
        with pytest.raises(error, match=f"{file}: holds 11 of the 12 blocks of clip_l, but type stable_diffusion"):
            load([file], "stable_diffusion", choice(host, None), trim=trim)


@pytest.mark.parametrize("form", ["fp16", "scaled_fp8"])
def test_names_as_in_a_checkpoint(host, small_heads, write, form):
    tensors = test_files.FILES[form]()
    prefix = "text_encoders.t5xxl.transformer."
    plain = write(f"plain_{form}.safetensors", tensors)
    path = write(f"prefixed_{form}.safetensors", {prefix + k: t for k, t in tensors.items()})
    load, encoders = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    clip = load([path.name], "mochi", choice(host, plan_for()))
    assert torch.equal(encode(clip), encode(load([plain.name], "mochi", choice(host, plan_for()))))
    name, _ = host("nodes.host.files.save").save(clip, encoders.choose(clip), encoders.pruning(clip)["t5xxl"], "of it")
    assert all(key.startswith(prefix) for key in load_file(path.parent / name))
    assert torch.equal(encode(load([name], "mochi", choice(host, None))), encode(clip))


def test_mapped_files(comfy, host, small, write, monkeypatch):
    """Where ComfyUI maps files, the kept tensors are handed over with those that it has, by the names that it gave."""
    import comfy.utils

    tensors = {f"text_encoders.t5xxl.transformer.{k}": t for k, t in quantised("scaled_fp8").items()}
    paths = [write("mapped.safetensors", tensors), write("clip_l.safetensors", clip_tensors(12))]
    load, tokens = host("nodes.host.files.load").load, [[(t % 60, 1.0) for t in range(77)]]
    found = []
    for mapped in (None, comfy.utils.load_torch_file):
        if mapped:
            monkeypatch.setattr(host("nodes.host.versions"), "mapped_state_dict", mapped)
        clip = load([path.name for path in paths], "flux", choice(host, plan_for()))
        found.append(clip.encode_from_tokens({"t5xxl": tokens, "l": tokens}, return_pooled=True))
    assert all(map(torch.equal, *found)) and found[0][0].isfinite().all()


def test_files_that_are_no_single_encoder(host, write):
    t5 = {k: torch.zeros([min(n, 4) for n in t.shape]) for k, t in t5xxl_tensors(torch.float16).items()}
    clip = {k: torch.zeros([min(n, 4) for n in t.shape]) for k, t in clip_tensors(2).items()}
    both = {f"t5xxl.{k}": t for k, t in t5.items()} | {f"clip_l.{k}": t for k, t in clip.items()}
    checkpoint = {"model.diffusion_model.x.weight": torch.zeros(2)}
    cases = {
        "model-00001-of-00002": (t5, "part 1 of 2 of an encoder in several files"),
        "both": (both, "holds 2 text encoders .t5 under t5xxl., clip under clip_l..: get each"),
        "all": ({**checkpoint, **{f"cond_stage_model.{k}": t for k, t in clip.items()}}, "a whole checkpoint: load it"),
        "unet": (checkpoint, "a whole checkpoint: load it with Load Checkpoint and put Load Skrr Plan behind it"),
        "gap": ({k: t for k, t in t5.items() if ".block.3." not in k}, "parts of this text encoder are missing"),
    }
    error = host("skrr_engine.files.encoder_file").CheckpointError
    for name, (tensors, message) in cases.items():
        path = write(f"{name}.safetensors", tensors)
        with pytest.raises(error, match=f"{name}.safetensors: {message}") as found:
            host("nodes.host.files.encoder_file").EncoderFile.open(str(path))
        assert "\n" not in str(found.value)
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: "):
            _ = Checkpoint(path).layout
    # What ComfyUI puts behind LTX-2's text encoder is taken from a checkpoint, of which nothing else is read.
    behind = {"text_embedding_projection.weight": torch.zeros(2, 2)}
    behind["model.diffusion_model.audio_embeddings_connector.learnable_registers"] = torch.zeros(2)
    path = write("ltx.safetensors", {**checkpoint, **behind})
    assert host("nodes.host.files.encoder_file").EncoderFile.open(str(path)).hollow().keys() == behind.keys()


def test_command_line(write):
    """A search needs no memory for what no encoder uses, and says what is no single encoder."""
    t5 = {k: torch.zeros([min(n, 4) for n in t.shape]) for k, t in t5xxl_tensors(torch.float16).items()}
    more = {"decoder.embed_tokens.weight": torch.zeros(64, 4), "encoder.embed_tokens.weight": t5["shared.weight"]}
    path = write("with_decoder.safetensors", {**t5, **more})
    assert Files([path]).elements() == Files([write("encoder.safetensors", t5)]).elements() > 0
    both = {f"t5xxl.{k}": t for k, t in t5.items()} | {"clip_l.text_model.final_layer_norm.weight": torch.zeros(4)}
    for name, tensors, message in [
        ("both", both, "holds 2 text encoders: give a file of one"),
        ("model-00002-of-00003", t5, "part 2 of 3 of an encoder: give its whole folder"),
    ]:
        with pytest.raises(EncoderError, match=f"{name}.safetensors: {message}"):
            encoders.load(str(write(f"{name}.safetensors", tensors)))


@pytest.mark.parametrize(
    ("names", "family"),
    [
        ("model.layers.{}.{}", "llama"),
        ("model.language_model.layers.{}.{}", "llama"),
        ("language_model.model.layers.{}.{}", "llama"),
        ("qwen3_4b.transformer.model.layers.{}.{}", "llama"),
        ("layers.{}.{}", None),
    ],
)
def test_names_of_language_models(write, names, family):
    """The tensors get the names of ComfyUI's encoder; blocks that hold more are another architecture."""
    parts = ("input_layernorm", "self_attn.q_proj", "post_attention_layernorm", "mlp.up_proj")
    parts = tuple(f"{part}.weight" for part in parts)
    tensors = {names.format(block, part): torch.zeros(4) for block in range(3) for part in parts}
    tower = {"model.visual.blocks.0.norm.weight": torch.zeros(4), "vision_tower.a.weight": torch.zeros(4)}
    found = Checkpoint(write("names.safetensors", {**tensors, **tower}))
    assert found.problem is None and (found.known_layout and found.known_layout.family) == family
    if family is not None:
        wanted = {f"model.layers.{block}.{part}" for block in range(3) for part in parts}
        assert {found.layout.name(key) for key in found.layout.used} - {*tower} == wanted
        assert "vision_tower.a.weight" not in found.layout.used
    more = {**tensors, names.format(1, "linear_attn.A_log"): torch.zeros(4)}
    found = Checkpoint(write("more.safetensors", more))
    assert found.known_layout is None and found.problem is None


def llama_tensors() -> dict[str, torch.Tensor]:
    """Llama 3 with 8B parameters by its names and 32 blocks, narrow, its writing head included."""
    shapes = {"model.embed_tokens.weight": (128256, 64), "lm_head.weight": (128256, 64)}
    for block in range(32):
        layer = f"model.layers.{block}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (512 if n == "q" else 256, 64) for n in "qkv"}
        shapes[f"{layer}self_attn.o_proj.weight"] = (64, 512)
        shapes |= {f"{layer}mlp.{n}_proj.weight": (96, 64) for n in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (64, 96)
    found = {key: noise(shape, seed).half() for seed, (key, shape) in enumerate(shapes.items())}
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(32) for n in ("input", "post_attention")]
    return found | {norm: torch.ones(64).half() for norm in [*norms, "model.norm.weight"]}


def test_four_files(host, small, write):
    """HiDream's encoders; Llama's writing head is no part of this one, and is not saved with it."""
    made = {"l": clip_tensors(12), "g": clip_tensors(32), "t5": t5xxl_tensors(torch.float16), "llama": llama_tensors()}
    paths = {name: write(f"{name}.safetensors", tensors) for name, tensors in made.items()}
    load, encoders = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    node = host("nodes.load_clip").SkrrQuadrupleCLIPLoader
    inputs = [entry.id for entry in node.define_schema().inputs]
    assert inputs[:5] == ["clip_name1", "clip_name2", "clip_name3", "clip_name4", "plan"]
    clip = load([path.name for path in paths.values()], "sd3", choice(host, plan_for()), trim=False)
    assert encoders.views(clip).keys() == {"clip_l", "clip_g", "t5xxl", "llama"}
    assert [name for name, pruned in encoders.pruning(clip).items() if pruned.removed] == ["t5xxl"]
    view = encoders.views(clip)["llama"]
    pruned = encoders.Pruned(unread=(62, 63), shape=view.shape, file=encoders.pruning(clip)["llama"].file)
    name, _ = host("nodes.host.files.save").save(clip, view, pruned, "llama")
    dropped = Checkpoint(paths["llama"]).layout.dropped((62, 63))
    assert load_file(paths["llama"].parent / name).keys() == made["llama"].keys() - dropped - {"lm_head.weight"}


def test_checkpoints_are_offered_for_ltx(host, folder, monkeypatch, tmp_path):
    """Where ComfyUI has its own loader for LTX-2, the second of two files may be a checkpoint, as there."""
    import folder_paths
    import nodes

    name = "ltx-2.safetensors"
    (tmp_path / name).write_bytes(b"")
    folder_paths.add_model_folder_path("checkpoints", str(tmp_path))
    folder_paths.filename_list_cache.clear()
    features = host("nodes.host.versions")
    monkeypatch.delitem(nodes.NODE_CLASS_MAPPINGS, "LTXAVTextEncoderLoader", raising=False)
    assert name not in features.encoder_files(2)[1] and features.encoder_path(name) is None
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "LTXAVTextEncoderLoader", object)
    first, second = features.encoder_files(2)
    assert name not in first and second[: len(first)] == first and name in second
    assert features.encoder_path(name) == str(tmp_path / name)
    assert not any(name in names for count in (1, 3, 4) for names in features.encoder_files(count))


QWEN3VL = {**SMALL, "num_key_value_heads": 2}
QWEN3VL_VISION = {"hidden_size": 64, "intermediate_size": 96, "depth": 2}


@pytest.fixture
def small_qwen3vl(comfy, monkeypatch):
    """Have ComfyUI's Qwen3-VL classes take small sizes; returns such an encoder's tensors by its files' names."""
    import comfy.sd
    from comfy.text_encoders import qwen3vl

    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_8b", {**QWEN3VL_VISION, "deepstack_visual_indexes": [0, 1]})
    sizes = {f"{name}_model_config": QWEN3VL for name in ("qwen3vl_8b", "qwen3_8b")}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), **sizes}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)
    made = qwen3vl._make_qwen3vl_model("qwen3vl_8b")(dict(QWEN3VL), torch.float16, "meta", comfy.ops.manual_cast)
    state = {}
    for seed, (key, tensor) in enumerate(made.state_dict().items()):
        name = f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)
        norm = "norm" in key and tensor.ndim == 1
        state[name] = (torch.ones(tensor.shape) if norm else noise(tensor.shape, seed)).half()
    return state


def in_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The language model's projections in fp8, as ComfyUI marks them."""
    found = {}
    for key, tensor in tensors.items():
        if ".layers." in key and key.endswith("_proj.weight"):
            scale = tensor.abs().max().float() / 448
            found[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[key.removesuffix("weight") + "weight_scale"] = scale.reshape(())
            marker = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            found[key.removesuffix("weight") + "comfy_quant"] = marker
        else:
            found[key] = tensor
    return found


@LATER
@pytest.mark.parametrize(
    ("kind", "form"), [("ideogram4", "fp16"), ("ideogram4", "fp8"), ("boogu", "fp16"), ("flux2", "fp8")]
)
def test_qwen3vl(comfy, host, small_qwen3vl, write, monkeypatch, kind, form):
    """What is removed is not read, and what is left is saved and loads again; as ComfyUI itself loads the file."""
    import comfy.sd

    tensors = small_qwen3vl if form == "fp16" else in_fp8(small_qwen3vl)
    path = write(f"qwen3vl_{form}.safetensors", tensors)
    plain = {key.replace("model.language_model.", "model.", 1): t for key, t in tensors.items()}
    known = write(f"plain_{form}.safetensors", plain)
    whole = comfy.sd.load_clip([str(known)], clip_type=getattr(comfy.sd.CLIPType, kind.upper()))
    load, encoders, saving = (host(f"nodes.host.{name}") for name in ("files.load", "clip.views", "files.save"))
    (name,) = encoders.views(whole)
    level = Level(skipped=3, reuse={}, sparsity=0.1)
    entry = EncoderPlan(family="llama", blocks=36, width=64, order=(9, 20, 30), levels=(level,))
    plan = Plan(encoders={name: entry}, provenance=Provenance(source="test"))
    clip = load.load([path.name], kind, choice(host, plan))
    pruned = encoders.pruning(clip)[name]
    left_out = encoders.Pruned(pruned.plan, pruned.level, pruned.unread)
    derived = host("nodes.host.clip.derive").derive(whole, {name: left_out})
    tokens = clip.tokenize("a red cube")
    found = clip.encode_from_tokens(tokens)
    assert torch.equal(found, derived.encode_from_tokens(tokens)) and found.isfinite().all()
    assert shape_of(host, clip, name) == shape_of(host, whole, name)
    file = load.EncoderFile.open(str(path))
    assert not any(".layers." in key and file.tensors[key].nbytes > 1024 for key in file.hollow())
    saved, _ = saving.save(clip, encoders.choose(clip), pruned, f"of {kind}")
    kept = load_file(path.parent / saved).keys()
    dropped = Checkpoint(path).layout.dropped(pruned.removed)
    assert tensors.keys() - dropped - kept <= {"model.lm_head.weight"} and not kept & dropped
    with monkeypatch.context() as patch:
        patch.setattr(host("nodes.host.versions"), "mapped_state_dict", comfy.utils.load_torch_file)
        for file, chosen in ((saved, None), (path.name, plan)):
            again = load.load([file], kind, choice(host, chosen))
            assert torch.equal(again.encode_from_tokens(tokens), found)
    again = load.load([saved], kind, choice(host, None))
    assert torch.equal(again.encode_from_tokens(tokens), found)
    if form == "fp16":
        saved, _ = saving.save(derived, encoders.choose(derived), encoders.pruning(derived)[name], "from memory")
        assert torch.equal(load.load([saved], kind, choice(host, None)).encode_from_tokens(tokens), found)


def spiece_model() -> torch.Tensor:
    """A small SentencePiece model, as the files of Gemma hold theirs."""
    import io

    import sentencepiece

    made = io.BytesIO()
    words = iter(["a red cube", "two blue cats under a table", "a dog and a bird"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=made, vocab_size=26, minloglevel=2, pad_id=0, eos_id=1, bos_id=2, unk_id=3
    )
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


@LATER
def test_ltx_with_a_checkpoint(comfy, host, write, monkeypatch):
    """LTX-2's Gemma, and what stands behind it from a checkpoint, of which nothing else is read."""
    import comfy.sd
    from comfy.text_encoders import llama

    small = {**SMALL, "num_key_value_heads": 2}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), "_model_config": small}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)
    made = llama.Gemma3_12B(dict(small), torch.float16, "meta", comfy.ops.manual_cast).state_dict()
    gemma = {
        k: (torch.ones(t.shape) if t.ndim == 1 else noise(t.shape, n)).half()
        for n, (k, t) in enumerate(made.items())
        if k.startswith("model.")
    }
    gemma["spiece_model"] = spiece_model()
    behind = {"text_embedding_projection.aggregate_embed.weight": noise((3840, 64 * 49), 1).half()}
    paths = [write("gemma.safetensors", gemma)]
    paths.append(write("ltx.safetensors", {**behind, "model.diffusion_model.x.weight": torch.zeros(2)}))
    load, encoders = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    level = Level(skipped=2, reuse={}, sparsity=0.01)
    entry = EncoderPlan(family="gemma", blocks=48, width=64, order=(9, 40), levels=(level,))
    plan = Plan(encoders={"gemma3_12b": entry}, provenance=Provenance(source="test"))
    clip = load([path.name for path in paths], "ltxv", choice(host, plan), trim=False)
    whole = comfy.sd.load_clip([str(path) for path in paths], clip_type=comfy.sd.CLIPType.LTXV)
    pruned = encoders.pruning(clip)["gemma3_12b"]
    derived = host("nodes.host.clip.derive").derive(whole, {"gemma3_12b": encoders.Pruned(pruned.plan, pruned.level)})
    tokens = clip.tokenize("a red cube")
    found = clip.encode_from_tokens(tokens)
    assert torch.equal(found, derived.encode_from_tokens(tokens)) and found.isfinite().all()
    assert not torch.equal(found, whole.encode_from_tokens(tokens))
    assert shape_of(host, clip, "gemma3_12b") == shape_of(host, whole, "gemma3_12b")
    name, _ = host("nodes.host.files.save").save(clip, encoders.choose(clip), pruned, "gemma pruned")
    assert "spiece_model" in load_file(paths[0].parent / name)
    again = load([name, paths[1].name], "ltxv", choice(host, None), trim=False)
    assert torch.equal(again.encode_from_tokens(tokens), found)


def test_an_encoder_that_no_family_knows_loads_dense(comfy, host, small_heads, write, monkeypatch, caplog):
    path = write("unknown.safetensors", t5xxl_tensors(torch.float16))
    wanted = encode(dense(comfy, path))
    families = host("skrr_engine.encoder.families")
    monkeypatch.setattr(families, "FAMILIES", tuple(f for f in families.FAMILIES if f.name != "t5"))
    load = host("nodes.host.files.load").load
    caplog.set_level("INFO")
    assert torch.equal(encode(load([path.name], "mochi", choice(host, None))), wanted)
    assert "t5xxl: loaded whole, T5 is not a text encoder that Skrr knows" in caplog.text
    with pytest.raises(host("skrr_engine.encoder.row").EncoderError, match="not a text encoder that Skrr knows"):
        load([path.name], "mochi", choice(host, plan_for()))
