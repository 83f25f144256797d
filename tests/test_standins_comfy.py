"""Linear stand-ins in the real ComfyUI: derived CLIPs, files of every precision, sizes, LoRAs, what is said."""

import pytest
import torch
from test_comfy import encode as encode_text
from test_comfy import host, lora_for, lora_keys, same, with_lora  # noqa: F401 - host is a fixture
from test_files import (  # noqa: F401 - fixtures
    FILES,
    WIDTH,
    choice,
    dense,
    encode,
    files,
    plan_for,
    small_heads,
    text_encoders,
)

from skrr_engine.encoder.standin import StandIn
from skrr_engine.files import companion as standin_file
from skrr_engine.files.encoder_file import Checkpoint
from skrr_engine.files.pruned import verify

PLACES = {"t5xxl": (0, 3, 7), "clip_l": (1, 2)}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def random_standin(host, norm: str, width: int, rank: int = 4, seed: int = 0):  # noqa: F811
    """In the pack's own class, which is another than the tests' import of it."""
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, width), (width, rank)))
    own = StandIn if host is None else host("skrr_engine.encoder.standin").StandIn
    return own(norm, down.half(), up.half(), torch.randn(width, generator=generator) * 0.1)


def pruned_with(host, clip, name: str, places, reuse=None):  # noqa: F811
    """`Pruned` of an encoder whose places are all repaired."""
    plan, encoders = host("skrr_engine.plan.model"), host("nodes.host.clip.views")
    row = encoders.views(clip)[name].row
    level = plan.Level(skipped=len(places), sparsity=0.1, reuse=reuse or {})
    entry = plan.EncoderPlan(
        family=row.family, blocks=row.blocks, width=row.width, order=tuple(places), levels=(level,)
    )
    norm = "layer" if row.family == "clip" else "rms"
    found = {i: random_standin(host, norm, row.width, seed=i) for i in places}
    return encoders.Pruned(entry, level, fitted=host("skrr_engine.files.companion").Fitted(found))


@pytest.mark.parametrize("name", PLACES)
def test_derived_clip(comfy, builders, host, name):  # noqa: F811
    """Each repaired place does what the definition says, in ComfyUI's own forward; the CLIP that came in stays."""
    clip = builders.build_kind("flux")
    before, keys = encode_text(clip), list(clip.get_sd())
    pruned = pruned_with(host, clip, name, PLACES[name])
    derived = host("nodes.host.clip.derive").derive(clip, {name: pruned})
    found = encode_text(derived)
    row = host("nodes.host.clip.views").views(clip)[name].row
    handles = []
    for i, standin in pruned.standins.items():
        (*_, body) = row.sub_blocks[i].parts.values()
        handles += override(body, standin, row.family, row.sub_blocks[i])
    wanted = encode_text(clip)
    for handle in handles:
        handle.remove()
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5)
    assert not same(found, before)
    assert same(encode_text(clip), before) and list(clip.get_sd()) == keys
    assert same(encode_text(derived), found)


def override(body, standin, family: str, sub_block):
    """Hooks that put `norm(x) down up + bias` in place of what a sub-block adds to the stream."""
    seen = {}
    if family == "t5":

        def after(module, args, out):
            x = seen["x"]
            repaired = standin.apply(x)
            return (repaired, *out[1:]) if isinstance(out, tuple) else repaired

        return [
            body.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].clone())),
            body.register_forward_hook(after),
        ]
    norm = sub_block.norm

    def branch(module, args, kwargs, out):
        return standin.apply(seen["x"]) - seen["x"]

    return [
        norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].clone())),
        body.register_forward_hook(branch, with_kwargs=True),
    ]


def test_sizes_and_where_they_go(comfy, builders, host, monkeypatch):  # noqa: F811
    clip = builders.flux()
    pruned = pruned_with(host, clip, "t5xxl", PLACES["t5xxl"])
    derived = host("nodes.host.clip.derive").derive(clip, {"t5xxl": pruned})
    row = host("nodes.host.clip.views").views(clip)["t5xxl"].row
    gone = sum(t.nbytes for i in pruned.removed for t in row.sub_blocks[i].tensors().values())
    assert pruned.standin_bytes == 3 * (2 * 2 * 4 + 4) * 64
    assert derived.patcher.model_size() == clip.patcher.model_size() - gone + pruned.standin_bytes
    encode_text(derived)
    assert derived.patcher.loaded_size() == derived.patcher.model_size()
    planted = [m for m in derived.cond_stage_model.modules() if type(m).__name__ == "StandInModule"]
    assert len(planted) == 3 and not any(type(m).__name__ == "StandInModule" for m in clip.cond_stage_model.modules())
    planted = [layer for standin in planted for layer in standin.children()]
    moved = []
    for standin in planted:
        monkeypatch.setattr(standin, "to", lambda device, standin=standin: moved.append((standin, device)))
    derived.patcher.detach()
    assert [device for _, device in moved] == [derived.patcher.offload_device] * 6, "offloaded with the encoder"
    moved.clear()
    encode_text(derived)
    assert {device for _, device in moved} == {derived.patcher.load_device}, "loaded with the encoder"


def test_loras(comfy, builders, host):  # noqa: F811
    """Keys of kept sub-blocks stay as they are, those of removed ones go; a LoRA works on both sides of the pruning."""
    clip = builders.flux()
    pruned = pruned_with(host, clip, "t5xxl", (2, 5))
    derive = host("nodes.host.clip.derive").derive
    derived = derive(clip, {"t5xxl": pruned})
    keys, left = lora_keys(clip, comfy), lora_keys(derived, comfy)
    assert all(left[k] == v for k, v in keys.items() if k in left)
    lost = {v for k, v in keys.items() if k not in left}
    row = host("nodes.host.clip.views").views(clip)["t5xxl"].row
    gone = {f"t5xxl.transformer.{key}" for i in (2, 5) for key in row.sub_blocks[i].tensors()}
    assert lost <= gone and any("block.1.layer.0" in k for k in lost)
    lora = lora_for(comfy, clip, "t5xxl.transformer.encoder.block.3.")
    plain = encode_text(derived)
    behind, before = with_lora(comfy, derived, lora), derive(with_lora(comfy, clip, lora), {"t5xxl": pruned})
    first = encode_text(behind)
    assert not same(first, plain)
    for _ in range(2):
        assert same(encode_text(before), first) and same(encode_text(derived), plain)


def repaired_plan(folder, places=(5, 46, 0)):
    """The files' plan with stand-ins for some places of its strongest level, beside it in `folder`."""
    standins = {i: random_standin(None, "rms", WIDTH, seed=i) for i in places}
    plan, data = standin_file.encoded(plan_for(), {"t5xxl": {8: standins}})
    folder.mkdir(parents=True, exist_ok=True)
    standin_file.write(folder / "mine.standins.safetensors", data)
    return plan, standins


@pytest.fixture
def plans(comfy, host, tmp_path, monkeypatch):  # noqa: F811
    """The folder of plans that the pack sees."""
    folder = tmp_path / "skrr_plans"
    monkeypatch.setattr(host("nodes.host.plans.folder"), "folders", lambda: [folder])
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_one_file_of_stand_ins_serves_every_precision(comfy, host, small_heads, text_encoders, files, plans, kind):  # noqa: F811
    """Loading pruned = pruning what was loaded = loading what was saved."""
    plan, standins = repaired_plan(plans)
    load = host("nodes.host.files.load").load
    loaded = load([f"{kind}.safetensors"], "mochi", choice(host, plan))
    whole = dense(comfy, files[kind])
    chosen = choice(host, plan)
    (view,) = host("nodes.host.clip.views").views(whole).values()
    pruned, lines = chosen.pruned("t5xxl", view, chosen.plan.encoder("t5xxl"))
    assert set(pruned.standins) == set(standins) and len(lines) == 1
    derived = host("nodes.host.clip.derive").derive(whole, {"t5xxl": pruned})
    found = encode(loaded)
    assert torch.equal(found, encode(derived)) and found.isfinite().all()
    assert loaded.patcher.model_size() == derived.patcher.model_size()
    bare = load([f"{kind}.safetensors"], "mochi", choice(host, plan_for()))
    assert not torch.equal(found, encode(bare))
    assert loaded.patcher.model_size() == bare.patcher.model_size() + pruned.standin_bytes

    saving, encoders = host("nodes.host.files.save"), host("nodes.host.clip.views")
    name, _ = saving.save(loaded, encoders.choose(loaded), encoders.pruning(loaded)["t5xxl"], f"repaired {kind}")
    text_encoders.filename_list_cache.clear()
    verify(files[kind].parent / name)
    plans.joinpath("mine.standins.safetensors").unlink()
    again = load([name], "mochi", choice(host, None))
    assert torch.equal(encode(again), found) and again.patcher.model_size() == loaded.patcher.model_size()
    assert Checkpoint(files[kind].parent / name).fitted.standins.keys() == standins.keys()


def test_without_the_file_it_skips_and_says_so(host, small_heads, text_encoders, files, plans):  # noqa: F811
    plan, _ = repaired_plan(plans)
    plans.joinpath("mine.standins.safetensors").unlink()
    load = host("nodes.host.files.load").load
    found = encode(load(["fp16.safetensors"], "mochi", choice(host, plan)))
    assert torch.equal(found, encode(load(["fp16.safetensors"], "mochi", choice(host, plan_for()))))
    (view,) = host("nodes.host.clip.views").views(load(["fp16.safetensors"], "mochi", choice(host, None))).values()
    own = choice(host, plan)
    pruned, lines = own.pruned("t5xxl", view, own.plan.encoder("t5xxl"))
    assert pruned.standins == {} and "stand-ins (*.standins.safetensors) is missing" in lines[1]


def test_report_and_map(comfy, host, small_heads, text_encoders, files, plans):  # noqa: F811
    plan, standins = repaired_plan(plans)
    loaded = host("nodes.host.files.load").load(["fp16.safetensors"], "mochi", choice(host, plan))
    memory, report = host("nodes.host.clip.memory"), host("nodes.drawing.report")
    (encoder,) = memory.encoders(loaded)
    layout = Checkpoint(files["fp16"]).layout
    (whole,) = memory.encoders(host("nodes.host.files.load").load(["fp16.safetensors"], "mochi", choice(host, None)))
    assert encoder.dense == whole.dense
    gone = sum(layout.sub_block_bytes[i] for i in plan.encoder("t5xxl").order)
    repairs = sum(s.nbytes for s in standins.values())
    assert encoder.now == whole.dense - gone + repairs
    text = report.as_text([encoder], {}, 0)
    assert "repaired by linear stand-ins: 3 (~), rank 4" in text and text.count("~") == 4
    assert report.as_image([encoder], {}).shape[0] == 1
    (drawn,) = host("nodes.host.maps").of_clip(loaded)
    assert drawn["standins"] == {str(i): 4 for i in standins} and drawn["now"] == encoder.now - (
        whole.dense - layout.total_bytes
    )
    level = plan.encoder("t5xxl").levels[-1]
    assert level.standins.nbytes(WIDTH) == repairs


def test_editing_one_encoder_keeps_the_stand_ins_of_the_others(comfy, builders, host):  # noqa: F811
    """What the editor sends names them by their file's hash; turning a repaired place into a skipped one does not."""
    plan, apply = host("skrr_engine.plan.model"), host("nodes.host.clip.derive")
    encoders = host("nodes.host.clip.views")
    clip = builders.flux()
    pruned = pruned_with(host, clip, "t5xxl", (2, 5))
    named = plan.StandIns(sha256="a" * 64, ranks={2: 4, 5: 4})
    level = pruned.level.model_copy(update={"standins": named})
    pruned = encoders.Pruned(pruned.plan.model_copy(update={"levels": (level,)}), level, fitted=pruned.fitted)
    derived = apply.derive(clip, {"t5xxl": pruned})
    (drawn,) = [m for m in host("nodes.host.maps").of_clip(derived) if m["name"] == "t5xxl"]
    assert drawn["standins_sha256"] == "a" * 64 and drawn["standins"] == {"2": 4, "5": 4}

    other = plan.EncoderPlan(
        family="clip", blocks=4, width=64, order=(1,), levels=(plan.Level(skipped=1, reuse={}, sparsity=0.1),)
    )
    edited = plan.Plan(encoders={"t5xxl": pruned.plan, "clip_l": other}, provenance=plan.Provenance(source="manual"))
    assert set(host("nodes.host.plans.match").replaced(derived, edited)) == {"clip_l"}
    bare = pruned.plan.model_copy(update={"levels": (level.model_copy(update={"standins": None}),)})
    without = plan.Plan(encoders={"t5xxl": bare}, provenance=edited.provenance)
    changed = host("nodes.host.plans.match").replaced(derived, without)
    assert dict(changed["t5xxl"].standins) == {}, "now only skipped"


def test_a_pruned_file_without_its_stand_ins_says_so(host, small_heads, text_encoders, files, plans, tmp_path):  # noqa: F811
    from skrr_engine.files.companion import StandInError
    from skrr_engine.files.pruned import write_pruned

    plan, standins = repaired_plan(plans)
    folder = files["fp16"].parent
    write_pruned(Checkpoint(files["fp16"]), folder / "without.safetensors", "t5xxl", plan, 8)
    text_encoders.filename_list_cache.clear()
    said = []
    loader = host("nodes.host.files.load")
    original, loader.say = loader.say, lambda text, node: said.append(text)
    try:
        loader.load(["without.safetensors"], "mochi", choice(host, None))
    finally:
        loader.say = original
    assert "was saved without the stand-ins that its plan names" in said[0]
    broken = {i: StandIn(s.norm, s.down * float("nan"), s.up, s.bias) for i, s in standins.items()}
    write_pruned(
        Checkpoint(files["fp16"]), tmp_path / "broken.safetensors", "t5xxl", plan, 8, fitted=standin_file.Fitted(broken)
    )
    with pytest.raises(StandInError, match="not finite"):
        verify(tmp_path / "broken.safetensors")


def test_library_never_writes_over_stand_ins(comfy, host, plans):  # noqa: F811
    """A plan was renamed, its stand-ins were not: they stay, and a change of files makes nodes run again."""
    library, folder_paths = host("nodes.host.plans.folder"), pytest.importorskip("folder_paths")
    plan = host("skrr_engine.plan.model").Plan.from_json(plan_for().to_json())
    folder_paths.folder_names_and_paths[library.FOLDER] = ([str(plans)], {".json"})
    plans.mkdir(exist_ok=True)
    before = library.standins_state()
    assert library.save(plan, "mine", b"first") == "mine.json"
    (plans / "mine.json").rename(plans / "good.json")
    assert library.save(plan, "mine", b"second") == "mine_2.json"
    assert (plans / "mine.standins.safetensors").read_bytes() == b"first"
    assert before != library.standins_state()
