"""Narrowed sub-blocks in the real ComfyUI: derived CLIPs, files of every precision, sizes, LoRAs, memory."""

import dataclasses
from fractions import Fraction

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
    small_heads,
    text_encoders,
)
from test_standins_comfy import random_standin

from skrr_engine.encoder.standin import StandIn
from skrr_engine.files import companion
from skrr_engine.files.pruned import verify
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance, Units

KINDS = {"flux": "t5xxl", "flux clip_l": "clip_l", "hunyuan_video": "llama"}
SHARES = {0: 0.5, 1: 0.25, 2: 0, 3: 0.75, 5: 0.5, 6: 0.5}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def narrowed(host, clip, name: str, shares=SHARES, seed: int = 0):  # noqa: F811
    """`Pruned` of an encoder with places narrowed to about these shares, and stand-ins at them."""
    plan, views = host("skrr_engine.plan.model"), host("nodes.host.clip.views")
    units_of = host("skrr_engine.encoder.units").units_of
    row = views.views(clip)[name].row
    counts = [units_of(row, kind).count for kind in (0, 1)]
    left = {i: min(int(share * counts[i % 2]), counts[i % 2] - 1) for i, share in shares.items()}
    order = tuple((i, n) if n else i for i, n in left.items())
    named = plan.StandIns(sha256="0" * 64, ranks={i: 4 for i in left if i % 3})
    level = plan.Level(skipped=len(order), sparsity=0.1, reuse={}, standins=named)
    units = plan.Units(sha256="0" * 64, attention=counts[0], feed_forward=counts[1])
    entry = plan.EncoderPlan(
        family=row.family, blocks=row.blocks, width=row.width, order=order, units=units, levels=(level,)
    )
    generator = torch.Generator().manual_seed(seed)
    orders = {i: torch.randperm(counts[i % 2], generator=generator) for i, n in left.items() if n}
    norm = "layer" if row.family == "clip" else "rms"
    standins = {i: random_standin(host, norm, row.width, seed=i) for i in left if i % 3}
    fitted = host("skrr_engine.files.companion").Fitted(standins, orders)
    return views.Pruned(entry, level, fitted=fitted)


def made(builders, kind: str):
    return builders.build_kind(kind.split()[0])


def by_hand(host, clip, name: str, pruned):  # noqa: F811
    """What the dense CLIP gives with the out-projections' columns of all other units zero, and hooks that add stand-ins
    or leave sub-blocks out."""
    row = host("nodes.host.clip.views").views(clip)[name].row
    units_of = host("skrr_engine.encoder.units").units_of
    handles, kept = [], []
    for place, action in pruned.removed.items():
        standin = pruned.standins.get(place)
        own = units_of(row, place)
        weight = own.out.weight
        kept.append((weight, weight.clone()))
        mask = torch.zeros(own.count, dtype=torch.bool)
        if action.units is not None:
            mask[action.units] = True
        weight[:, ~mask.repeat_interleave(own.inner // own.count)] = 0
        bias = getattr(own.out, "bias", None)
        if bias is not None and action.units is None:
            kept.append((bias, bias.clone()))
            bias.zero_()
        if standin is None:
            continue
        seen = {}
        sub_block = row.sub_blocks[place]
        if row.family == "t5":
            (layer,) = sub_block.parts.values()

            def before(module, args, seen=seen):
                seen["x"] = args[0].clone()

            def after(module, args, out, seen=seen, standin=standin):
                added = standin.apply(seen["x"]) - seen["x"]
                return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        else:

            def before(module, args, seen=seen):
                seen["x"] = args[0].clone()

            def after(module, args, kwargs, out, seen=seen, standin=standin):
                added = standin.apply(seen["x"]) - seen["x"]
                return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

            handles += [
                sub_block.norm.register_forward_pre_hook(before),
                sub_block.body.register_forward_hook(after, with_kwargs=True),
            ]
    try:
        return encode_text(clip)
    finally:
        for handle in handles:
            handle.remove()
        for tensor, whole in kept:
            tensor.copy_(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_derived_clip_is_what_narrowing_by_hand_gives(comfy, builders, host, kind):  # noqa: F811
    """The CLIP that came in, its keys and its numbers stay."""
    clip, name = made(builders, kind), KINDS[kind]
    before, keys = encode_text(clip), list(clip.get_sd())
    pruned = narrowed(host, clip, name)
    derived = host("nodes.host.clip.derive").derive(clip, {name: pruned})
    found = encode_text(derived)
    for f, w in zip(found, by_hand(host, clip, name, pruned), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-5)
    assert not same(found, before)
    assert same(encode_text(clip), before) and list(clip.get_sd()) == keys
    assert same(encode_text(derived), found) and same(encode_text(clip), before)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted_as_they_are_held(comfy, builders, host, kind):  # noqa: F811
    clip, name = made(builders, kind), KINDS[kind]
    pruned = narrowed(host, clip, name)
    view = host("nodes.host.clip.views").views(clip)[name]
    derived = host("nodes.host.clip.derive").derive(clip, {name: pruned})
    gone = view.shape.bytes_of(pruned.shares) - pruned.standin_bytes
    assert derived.patcher.model_size() == clip.patcher.model_size() - gone
    held = sum(t.nbytes for t in derived.cond_stage_model.state_dict().values())
    assert held == derived.patcher.model_size() and gone > 0
    (encoder,) = [e for e in host("nodes.host.clip.memory").encoders(derived) if e.name == name]
    (drawn,) = [m for m in host("nodes.host.maps").of_clip(derived) if m["name"] == name]
    assert encoder.dense - encoder.now == gone == drawn["dense"] - drawn["now"]
    assert set(drawn["widths"]) == {str(i) for i, a in pruned.removed.items() if a.units is not None}
    text = host("nodes.drawing.report").as_text([encoder], {}, 0)
    count = sum(a.units is not None for a in pruned.removed.values())
    assert f"narrowed: {count} (0 to 9, tenths that stay)" in text
    assert host("nodes.drawing.report").as_image([encoder], {}).shape[0] == 1
    encode_text(derived)
    assert derived.patcher.loaded_size() == derived.patcher.model_size()


@pytest.mark.parametrize("place", ["block.0.layer.0.", "block.1.layer.1.", "block.3.layer.0.", "block.4."])
def test_loras_are_cut_with_the_units(comfy, builders, host, place):  # noqa: F811
    """A LoRA before or behind the pruning is the dense LoRA, narrowed; and goes again. Keys of narrowed parts stay."""
    clip, derive = builders.flux(), host("nodes.host.clip.derive").derive
    pruned = narrowed(host, clip, "t5xxl")
    derived = derive(clip, {"t5xxl": pruned})
    plain = encode_text(derived)
    keys, left = lora_keys(clip, comfy), lora_keys(derived, comfy)
    assert {v for k, v in keys.items() if k not in left} <= {
        f"t5xxl.transformer.{key}"
        for key in host("nodes.host.clip.views").views(clip)["t5xxl"].row.sub_blocks[2].tensors()
    }
    lora = lora_for(comfy, clip, f"t5xxl.transformer.encoder.{place}")
    behind, before = with_lora(comfy, derived, lora), derive(with_lora(comfy, clip, lora), {"t5xxl": pruned})
    first = encode_text(behind)
    assert not same(first, plain)
    for _ in range(2):
        assert same(encode_text(before), first) and same(encode_text(derived), plain)
        assert same(encode_text(behind), first)
    patched = with_lora(comfy, clip, lora)
    encode_text(patched)  # its weights are patched now
    late = derive(patched, {"t5xxl": pruned})
    assert same(encode_text(late), first), "cut from weights without the patches of the CLIP that is loaded"
    alone = derive(clip, {"t5xxl": pruned})
    assert same(encode_text(alone), plain)
    encode_text(patched)
    for f, w in zip(first, by_hand(host, patched, "t5xxl", pruned), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-3, atol=1e-4)


def test_little_memory(comfy, builders, host):  # noqa: F811
    """With no room on the device, all that is left is cast where it is used; partial loads count what they move."""
    clip = builders.flux()
    pruned = narrowed(host, clip, "t5xxl")
    derived = host("nodes.host.clip.derive").derive(clip, {"t5xxl": pruned})
    wanted = encode_text(derived)
    patcher = derived.patcher
    patcher.detach()
    own = sum(host("nodes.host.clip.views").size(layer) for layer in patcher._own.values())
    assert own > 0
    for budget, on in ((1, 0), (own // 2, None), (1 << 40, own)):
        placed = patcher._place_own(patcher.load_device, budget)
        assert placed <= budget and (on is None or placed == on)
        tokens = derived.tokenize("a red cube")
        assert derived.cond_stage_model.encode_token_weights(tokens) is not None
    assert same(encode_text(derived), wanted)


def narrowing_plan(folder, shares=SHARES):
    """A plan of the files' encoder with narrowed places, its companion beside it in `folder`."""
    from test_files import FFN, HEADS

    counts = (HEADS, FFN)
    left = {i: min(max(int(share * counts[i % 2]), share > 0), counts[i % 2] - 1) for i, share in shares.items()}
    order = tuple((i, n) if n else i for i, n in left.items())
    units = Units(sha256="0" * 64, attention=counts[0], feed_forward=counts[1])
    level = Level(skipped=len(order), reuse={}, sparsity=0.05)
    entry = EncoderPlan(family="t5", blocks=24, width=WIDTH, order=order, units=units, levels=(level,))
    plan = Plan(encoders={"t5xxl": entry}, provenance=Provenance(source="test"))
    generator = torch.Generator().manual_seed(0)
    orders = {i: torch.randperm(counts[i % 2], generator=generator) for i, n in left.items() if n}
    standins: dict[int, StandIn] = {i: random_standin(None, "rms", WIDTH, seed=i) for i in left if i % 3}
    plan, data = companion.encoded(plan, {"t5xxl": {len(order): standins}}, {"t5xxl": orders})
    folder.mkdir(parents=True, exist_ok=True)
    companion.write(folder / "mine.standins.safetensors", data)
    return plan


@pytest.fixture
def plans(comfy, host, tmp_path, monkeypatch):  # noqa: F811
    """The folder of plans that the pack sees."""
    folder = tmp_path / "skrr_plans"
    monkeypatch.setattr(host("nodes.host.plans.folder"), "folders", lambda: [folder])
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_load_derive_and_save_are_one(comfy, host, small_heads, text_encoders, files, plans, kind):  # noqa: F811
    """Bit for bit, on files of every precision; and so is what was saved, which verifies."""
    plan = narrowing_plan(plans)
    load, views = host("nodes.host.files.load").load, host("nodes.host.clip.views")
    loaded = load([f"{kind}.safetensors"], "mochi", choice(host, plan))
    whole = dense(comfy, files[kind])
    chosen = choice(host, plan)
    (view,) = views.views(whole).values()
    pruned, lines = chosen.pruned("t5xxl", view, chosen.plan.encoder("t5xxl"))
    assert len(lines) == 1 and "and narrows 5" in lines[0]
    derived = host("nodes.host.clip.derive").derive(whole, {"t5xxl": pruned})
    found = encode(loaded)
    assert torch.equal(found, encode(derived)) and found.isfinite().all()
    assert loaded.patcher.model_size() == derived.patcher.model_size() < whole.patcher.model_size()
    assert not torch.equal(found, encode(whole))

    name, _ = host("nodes.host.files.save").save(
        loaded, views.choose(loaded), views.pruning(loaded)["t5xxl"], f"narrow {kind}"
    )
    text_encoders.filename_list_cache.clear()
    checked = verify(files[kind].parent / name)
    assert checked.record.narrowed
    plans.joinpath("mine.standins.safetensors").unlink()
    again = load([name], "mochi", choice(host, None))
    assert torch.equal(encode(again), found) and again.patcher.model_size() == loaded.patcher.model_size()
    if kind in ("fp32", "fp16", "bf16"):
        from_memory, _ = host("nodes.host.files.save").save(
            derived, views.choose(derived), dataclasses.replace(pruned, file=None), f"memory {kind}"
        )
        text_encoders.filename_list_cache.clear()
        assert torch.equal(encode(load([from_memory], "mochi", choice(host, None))), found)


def test_lora_on_a_clip_that_was_loaded_narrow(comfy, host, small_heads, text_encoders, files, plans):  # noqa: F811
    """ComfyUI patches the narrow weights themselves: as the derived CLIP, and gone again with the LoRA."""
    plan = narrowing_plan(plans)
    loaded = host("nodes.host.files.load").load(["fp32.safetensors"], "mochi", choice(host, plan))
    whole = dense(comfy, files["fp32"])
    chosen = choice(host, plan)
    (view,) = host("nodes.host.clip.views").views(whole).values()
    pruned, _ = chosen.pruned("t5xxl", view, chosen.plan.encoder("t5xxl"))
    derived = host("nodes.host.clip.derive").derive(whole, {"t5xxl": pruned})
    for place in ("block.0.layer.0.", "block.0.layer.1.", "block.1.layer.1.", "block.9."):
        lora = lora_for(comfy, whole, f"t5xxl.transformer.encoder.{place}")
        plain = encode(loaded)
        first, other = encode(with_lora(comfy, loaded, lora)), encode(with_lora(comfy, derived, lora))
        torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(first, plain) and torch.equal(encode(loaded), plain)


def test_without_its_file_the_encoder_stays_whole(comfy, host, small_heads, text_encoders, files, plans):  # noqa: F811
    plan = narrowing_plan(plans)
    plans.joinpath("mine.standins.safetensors").unlink()
    load = host("nodes.host.files.load")
    said = []
    original, load.say = load.say, lambda text, node: said.append(text)
    try:
        loaded = load.load(["fp16.safetensors"], "mochi", choice(host, plan))
    finally:
        load.say = original
    assert "is missing, so the encoder stays whole: put the file beside the plan" in said[0]
    assert torch.equal(encode(loaded), encode(load.load(["fp16.safetensors"], "mochi", choice(host, None))))


def test_a_plan_of_other_units_is_refused(comfy, builders, host):  # noqa: F811
    """Before anything is changed."""
    clip = builders.flux()
    pruned = narrowed(host, clip, "t5xxl")
    units = pruned.plan.units.model_copy(update={"attention": 64, "feed_forward": 10240})
    entry = pruned.plan.model_copy(update={"units": units})
    plan = host("skrr_engine.plan.model").Plan(
        encoders={"t5xxl": entry}, provenance=host("skrr_engine.plan.model").Provenance(source="test")
    )
    view = host("nodes.host.clip.views").views(clip)["t5xxl"]
    with pytest.raises(host("skrr_engine.plan.text").PlanError, match="units") as caught:
        host("nodes.host.plans.inputs").Choice(plan, 1.0, 0.0).pruned("t5xxl", view, entry)
    assert "\n" not in str(caught.value)


def test_editing_keeps_the_widths_of_the_others(comfy, builders, host):  # noqa: F811
    """A narrowed place made whole again: the others keep their units, stand-ins go, as they were fitted together."""
    clip, match = builders.flux(), host("nodes.host.plans.match")
    plans_ = host("skrr_engine.plan.model")
    pruned = narrowed(host, clip, "t5xxl")
    derived = host("nodes.host.clip.derive").derive(clip, {"t5xxl": pruned})
    fewer = tuple(step for step in pruned.plan.order if not (isinstance(step, tuple) and step[0] == 1))
    level = pruned.level.model_copy(update={"skipped": len(fewer), "standins": None})
    entry = pruned.plan.model_copy(update={"order": fewer, "levels": (level,)})
    edited = plans_.Plan(encoders={"t5xxl": entry}, provenance=plans_.Provenance(source="manual"))
    after = match.replaced(derived, edited)["t5xxl"]
    assert 1 not in after.removed and after.shares[5] == pruned.shares[5] == Fraction(80, 160)
    assert torch.equal(after.removed[5].units, pruned.removed[5].units)
    same_again = plans_.Plan(encoders={"t5xxl": pruned.plan}, provenance=plans_.Provenance(source="manual"))
    assert match.replaced(derived, same_again) == {}


def test_a_refit_is_saved_and_comes_closer(comfy, builders, host, text_encoders):  # noqa: F811
    """Of the CLIP behind Load Skrr Plan, from memory: the saved file verifies and holds it, and with it the encoder is
    nearer to the dense one than with its own columns; where it can't be done, a line says why."""
    views, saving, refit = (host(f"nodes.host.{name}") for name in ("clip.views", "files.save", "files.refit"))
    clip = builders.flux()
    pruned = narrowed(host, clip, "t5xxl", {3: 0.5, 4: 0.5, 7: 0.25})
    view = views.views(clip)["t5xxl"]
    derive = host("nodes.host.clip.derive").derive
    derived = derive(clip, {"t5xxl": pruned})
    source = saving.source_of(derived, view, pruned)
    assert refit.why_not(derived, view, pruned, source.entries) is None
    better, own = refit.refitted(derived, view, pruned, source, None, prompts=32)
    assert len(own) == 3 and set(better.standins) == set(pruned.standins)
    import folder_paths

    name, size = saving.save(derived, view, better, "refitted", own)
    path = folder_paths.get_full_path("text_encoders", name)
    checked = verify(path)
    assert checked.record.refitted == set(own)
    assert all(torch.equal(checked.tensor(key), tensor) for key, tensor in own.items())
    assert saving.save(derived, view, pruned, "plain")[1] == pytest.approx(size, rel=0.01)

    def off(entry, tensors) -> float:
        made = derive(clip, {"t5xxl": entry})
        for key, tensor in tensors.items():
            made.cond_stage_model.get_parameter(f"t5xxl.transformer.{key}").copy_(tensor)
        return sum(float((a[0] - b[0]).square().mean()) for a, b in zip(encoded(made), wanted, strict=True))

    def encoded(made):
        return [made.encode_from_tokens(made.tokenize(text), return_pooled=True) for text in texts]

    texts = host("skrr_engine.measure.prompts").broad(32)[:8]
    wanted = encoded(clip)
    assert off(better, own) < 0.9 * off(better, {})
    lora = lora_for(comfy, clip, "t5xxl.transformer.encoder.block.4.")
    assert "take the LoRAs off" in refit.why_not(with_lora(comfy, derived, lora), view, pruned, source.entries)
    half = {key: dataclasses.replace(entry, dtype="F8_E4M3") for key, entry in source.entries.items()}
    assert "16 or 32 bit" in refit.why_not(derived, view, pruned, half)
    assert "put Load Skrr Plan behind" in refit.why_not(derived, dataclasses.replace(view, whole=None), pruned, {})
    assert refit.why_not(derived, view, views.Pruned(), {}) == ""
