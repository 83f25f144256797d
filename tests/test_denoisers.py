"""What denoisers make of their prompts, rebuilt from their weights alone, equals what their own modules make of them.

In ComfyUI's own classes, small; those that ComfyUI 0.3.75 lacks are modules of the same names in a tree.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from test_comfy import host  # noqa: F401 - a fixture
from torch import nn

WIDTH = 48


def built(path: str, name: str, *args, **options) -> nn.Module:
    """One of ComfyUI's denoisers."""
    import comfy.ops

    made = getattr(importlib.import_module(f"comfy.ldm.{path}"), name)
    return made(*args, **options, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def tree(modules: dict[str, nn.Module]) -> nn.Module:
    """A module with others at these paths."""
    root = nn.Module()
    for path, module in modules.items():
        here, names = root, path.split(".")
        for name in names[:-1]:
            if not hasattr(here, name):
                here.add_module(name, nn.Module())
            here = getattr(here, name)
        here.add_module(names[-1], module)
    return root


def rms(width: int = WIDTH, epsilon: float = 1e-6) -> nn.Module:
    return nn.RMSNorm(width, eps=epsilon)


def two(first: str, second: str) -> nn.Module:
    return tree({first: nn.Linear(WIDTH, 24), second: nn.Linear(24, 20)})


def gelu(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def unet(context: int, **options) -> nn.Module:
    return built(
        "modules.diffusionmodules.openaimodel", "UNetModel", image_size=8, in_channels=4, model_channels=32,
        out_channels=4, num_res_blocks=1, channel_mult=(1, 2), num_heads=2, use_spatial_transformer=True,
        transformer_depth=[1, 1], transformer_depth_middle=1, transformer_depth_output=[1, 1, 1, 1],
        context_dim=context, **options,
    )  # fmt: skip


def hunyuan(byt5: bool = True) -> nn.Module:
    return built(
        "hunyuan_video.model", "HunyuanVideo", in_channels=4, out_channels=4, vec_in_dim=40, context_in_dim=WIDTH,
        hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=256,
        patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=False, byt5=byt5, meanflow=False,
        use_cond_type_embedding=False, vision_in_dim=None,
    )  # fmt: skip


def cosmos() -> nn.Module:
    return built(
        "cosmos.model", "GeneralDIT", 16, 16, 8, 4, 4, 2, 1, model_channels=32, num_blocks=2, num_heads=2,
        crossattn_emb_channels=WIDTH, pos_emb_cls="rope3d",
    )  # fmt: skip


def predict2() -> nn.Module:
    return built(
        "cosmos.predict2", "MiniTrainDIT", 16, 16, 8, 4, 4, 2, 1, model_channels=32, num_blocks=2, num_heads=2,
        crossattn_emb_channels=WIDTH, pos_emb_cls="rope3d",
    )  # fmt: skip


# name -> (the denoiser, what its own modules make of embeddings)
DENOISERS = {
    "pixart": (
        lambda: built("pixart.pixartms", "PixArtMS", hidden_size=32, depth=1, num_heads=2, caption_channels=WIDTH),
        lambda m, x: m.y_embedder.y_proj(x),
    ),
    "sd3": (
        lambda: built(
            "modules.diffusionmodules.mmdit", "MMDiT", input_size=None, depth=1, num_blocks=1, adm_in_channels=40,
            context_size=WIDTH, context_embedder_config={
                "target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64}},
        ),
        lambda m, x: m.context_embedder(x),
    ),
    "chroma": (
        lambda: built(
            "chroma.model", "Chroma", in_channels=4, out_channels=4, context_in_dim=WIDTH, hidden_size=32,
            mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=100, patch_size=2,
            qkv_bias=True, in_dim=8, out_dim=32, hidden_dim=16, n_layers=1,
        ),
        lambda m, x: m.txt_in(x),
    ),
    "hunyuan_video": (hunyuan, lambda m, x: m.txt_in.input_embedder(x)),
    "wan": (
        lambda: built("wan.model", "WanModel", dim=32, ffn_dim=32, num_heads=2, num_layers=1, text_dim=WIDTH),
        lambda m, x: m.text_embedding(x),
    ),
    "lumina2": (
        lambda: built(
            "lumina.model", "NextDiT", dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=WIDTH,
            axes_dims=(4, 6, 6), multiple_of=8,
        ),
        lambda m, x: m.cap_embedder(x),
    ),
    "omnigen2": (
        lambda: built(
            "omnigen.omnigen2", "OmniGen2Transformer2DModel", hidden_size=32, num_layers=1, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=2, text_feat_dim=WIDTH, axes_dim_rope=(4, 6, 6), multiple_of=8,
        ),
        lambda m, x: m.time_caption_embed.caption_embedder(x),
    ),
    "qwen_image": (
        lambda: built(
            "qwen_image.model", "QwenImageTransformer2DModel", num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        ),
        lambda m, x: m.txt_in(m.txt_norm(x)),
    ),
    "ltxv": (
        lambda: built(
            "lightricks.model", "LTXVModel", in_channels=8, cross_attention_dim=32, attention_head_dim=16,
            num_attention_heads=2, caption_channels=WIDTH, num_layers=1,
        ),
        lambda m, x: m.caption_projection(x),
    ),
    "hidream": (
        lambda: built(
            "hidream.model", "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, num_layers=1,
            num_single_layers=1, attention_head_dim=16, num_attention_heads=2, caption_channels=[WIDTH, 40],
            text_emb_dim=32, axes_dims_rope=(8, 8), max_resolution=(8, 8), llama_layers=[0, 1],
        ),
        lambda m, x: m.caption_projection[-1](x),
    ),
    "auraflow": (
        lambda: built("aura.mmdit", "MMDiT", dim=32, n_layers=1, n_double_layers=1, n_heads=2, global_conddim=32,
                      cond_seq_dim=WIDTH, max_seq=16),
        lambda m, x: m.cond_seq_linear(x),
    ),
    "mochi": (
        lambda: built(
            "genmo.joint_model.asymm_models_joint", "AsymmDiTJoint", hidden_size_x=32, hidden_size_y=32, depth=1,
            num_heads=2, use_t5=True, t5_feat_dim=WIDTH, t5_token_length=16,
            qk_norm=True,
            mlp_ratio_x=384.0,
        ),
        lambda m, x: m.t5_yproj(x),
    ),
    "hunyuan_dit": (
        lambda: built("hydit.models", "HunYuanDiT", input_size=(8, 8), hidden_size=32, depth=1, num_heads=2,
                      text_states_dim=32, text_states_dim_t5=WIDTH),
        lambda m, x: m.mlp_t5(x),
    ),
    # From here on: not in ComfyUI 0.3.75.
    "lens": (
        lambda: tree({"txt_norm": nn.ModuleList([rms(16, 1e-5) for _ in range(3)]), "txt_in": nn.Linear(WIDTH, 20)}),
        lambda m, x: m.txt_in(torch.cat([n(t) for n, t in zip(m.txt_norm, x.chunk(3, -1), strict=True)], -1)),
    ),
    "joyimage": (
        lambda: tree({"condition_embedder.text_embedder": two("linear_1", "linear_2")}),
        lambda m, x: (t := m.condition_embedder.text_embedder).linear_2(gelu(t.linear_1(x))),
    ),
    "ltxv2": (
        lambda: tree({"caption_projection.linear_1": nn.Linear(WIDTH, 20)}),
        lambda m, x: m.caption_projection.linear_1(
            nn.functional.rms_norm(x, x.shape[-1:], None, 1e-6) * (20 / WIDTH) ** 0.5
        ),
    ),
    "cogvideox": (
        lambda: tree({"patch_embed.text_proj": nn.Linear(WIDTH, 20)}), lambda m, x: m.patch_embed.text_proj(x)
    ),
    "kandinsky5": (
        lambda: tree({"text_embeddings.in_layer": nn.Linear(WIDTH, 20), "text_embeddings.norm": nn.LayerNorm(20)}),
        lambda m, x: m.text_embeddings.norm(m.text_embeddings.in_layer(x)),
    ),
    "ideogram4": (
        lambda: tree({"llm_cond_norm": rms(), "llm_cond_proj": nn.Linear(WIDTH, 20)}),
        lambda m, x: m.llm_cond_proj(m.llm_cond_norm(x)),
    ),
    "ernie": (lambda: tree({"text_proj": nn.Linear(WIDTH, 20, bias=False)}), lambda m, x: m.text_proj(x)),
    "minimax": (lambda: tree({"condition_proj": nn.Linear(WIDTH, 20)}), lambda m, x: m.condition_proj(x)),
}  # fmt: skip
ENCODERS = {"hidream": "t5xxl", "hunyuan_dit": "mt5xl"}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model_of(comfy):
    def made(denoiser: nn.Module, kind: str):
        """A MODEL with this denoiser, its weights seeded."""
        torch.manual_seed(0)
        for parameter in denoiser.parameters():
            parameter.data.normal_(std=0.3)
        holder = nn.Module()
        holder.diffusion_model = denoiser
        holder.model_config = SimpleNamespace(unet_config={"image_model": kind})
        return comfy.model_patcher.ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))

    return made


def view(name: str, width: int = WIDTH):
    return SimpleNamespace(name=name, shape=SimpleNamespace(width=width))


@pytest.mark.parametrize("kind", DENOISERS)
def test_text(kind, comfy, model_of, host):  # noqa: F811
    make, own = DENOISERS[kind]
    denoiser = make()
    model = model_of(denoiser, kind)
    projection = host("nodes.host.model").from_model(model, view(ENCODERS.get(kind, "t5xxl")))
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(projection(x), own(denoiser, x), rtol=1e-4, atol=1e-4)
    assert projection.width == WIDTH and projection.denoiser == kind


def keys_and_values(denoiser: nn.Module, ends: tuple[str, ...], within: str = "") -> list[torch.Tensor]:
    return [p for name, p in denoiser.named_parameters() if name.endswith(ends) and within in name]


@pytest.mark.parametrize(
    ("kind", "make", "ends", "within"),
    [
        ("unet", lambda: unet(WIDTH), ("attn2.to_k.weight", "attn2.to_v.weight"), ""),
        ("cosmos", cosmos, ("attn.to_k.0.weight", "attn.to_v.0.weight"), ".blocks.1."),
        ("cosmos_predict2", predict2, ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight"), ""),
    ],
)
def test_keys_and_values_of_all_cross_attentions(kind, make, ends, within, comfy, model_of, host):  # noqa: F811
    """The mean square of what the small matrix gives is that of all keys and values together."""
    denoiser = make()
    weights = keys_and_values(denoiser, ends, within)
    assert len(weights) >= 4 and {w.shape[1] for w in weights} == {WIDTH}
    model = model_of(denoiser, kind)
    projection = host("nodes.host.model").from_model(model, view("clip_h"))
    x = torch.randn(2, 5, WIDTH)
    every = torch.cat([x @ w.T for w in weights], dim=-1)
    found = projection(x)
    assert found.shape[-1] == WIDTH
    torch.testing.assert_close(found.square().mean(-1), every.square().mean(-1), rtol=1e-4, atol=1e-5)


def test_sdxl_reads_two_encoders_side_by_side(comfy, model_of, host):  # noqa: F811
    denoiser = unet(2048, num_classes="sequential", adm_in_channels=2816)
    model, find = model_of(denoiser, "sdxl"), host("nodes.host.model").from_model
    weights = keys_and_values(denoiser, ("attn2.to_k.weight", "attn2.to_v.weight"))
    for name, start, width in (("clip_l", 0, 768), ("clip_g", 768, 1280)):
        x = torch.randn(1, 3, width)
        every = torch.cat([x @ w[:, start : start + width].T for w in weights], dim=-1)
        found = find(model, view(name, width))(x)
        torch.testing.assert_close(
            found.square().mean(-1) * found.shape[-1] / 2048, every.square().mean(-1), rtol=1e-3, atol=1e-4
        )
    both = find(model, view("clip_g", 1280), pooled=True)
    hidden, pooled = torch.randn(1, 3, 1280), torch.randn(1, 1, 1280)
    features = host("skrr_engine.measure.discrepancy").features([(hidden, None), (pooled, None)], both)
    # The first 1280 of the vector are CLIP-G's pooled embedding; size and crop follow.
    own = nn.functional.linear(pooled, denoiser.label_emb[0][0].weight[:, :1280], denoiser.label_emb[0][0].bias)
    torch.testing.assert_close(features[1][0], own, rtol=1e-4, atol=1e-4)
    assert both.name == "attn2.to_k and to_v, label_emb" and len(both.tensors) >= 3


def test_pooled_vectors_go_through_their_own_input(comfy, model_of, host):  # noqa: F811
    find, features = host("nodes.host.model").from_model, host("skrr_engine.measure.discrepancy").features
    denoiser = hunyuan()
    model = model_of(denoiser, "hunyuan_video")
    pooled = torch.randn(2, 1, 40)
    projection = find(model, view("clip_l", 40), hidden=False, pooled=True)
    ((found, mask),) = features([(pooled, None)], projection)
    torch.testing.assert_close(found, denoiser.vector_in(pooled), rtol=1e-4, atol=1e-4)
    quoted = find(model, view("byt5_small", 1472))
    x = torch.randn(1, 4, 1472)
    torch.testing.assert_close(quoted(x), denoiser.byt5_in(x), rtol=1e-4, atol=1e-3)


def test_what_is_not_known(comfy, model_of, host):  # noqa: F811
    find, unknown = host("nodes.host.model").from_model, host("skrr_engine.measure.projection").UnknownError
    model = model_of(tree({"something": nn.Linear(4, 4)}), "newest")
    with pytest.raises(unknown, match=r"in this model \(newest; looked for y_embedder.y_proj, context_embedder"):
        find(model, view("t5xxl"))
    with pytest.raises(unknown, match="no input for pooled vectors .*vector_in"):
        find(model, view("clip_l"), hidden=False, pooled=True)
    hidream = model_of(DENOISERS["hidream"][0](), "hidream")
    with pytest.raises(unknown, match="looked for"):
        find(hidream, view("llama", 40))


def test_weights_that_are_not_in_memory(comfy, model_of, host):  # noqa: F811
    error = host("skrr_engine.measure.projection").ProjectionError
    model = model_of(tree({"txt_in": nn.Linear(WIDTH, 8)}), "flux")
    model.model.diffusion_model.to("meta")
    with pytest.raises(error, match="txt_in.weight of this model is not in memory"):
        host("nodes.host.model").from_model(model, view("t5xxl"))
