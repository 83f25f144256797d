"""Small denoisers of every kind as MODELs, seeded, through ComfyUI's own classes."""

import torch

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": (1, 2), "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 64,
    "use_temporal_attention": False, "legacy": False, "adm_in_channels": None,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2,
    "axes_dim": [4, 14, 14], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
PIXART = {
    "image_model": "pixart_alpha", "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 2,
    "num_heads": 2, "caption_channels": 64, "pe_interpolation": 1, "micro_condition": False,
}  # fmt: skip


def patcher(name: str, options: dict, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A MODEL of one of comfy.supported_models' kinds."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, name)({**options})
    config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    with torch.inference_mode(False):
        model = config.get_model({}, "")
        generator = torch.Generator().manual_seed(seed)
        for key, weight in sorted(model.diffusion_model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                values = 0.1 * noise + (1 if "norm" in key and key.endswith("weight") else 0)
            else:
                values = noise / max(1, weight.numel() // max(1, len(weight))) ** 0.5
            weight.data.copy_(values.to(weight.dtype))
            weight.requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


OPTIONS = {
    "unet": ("SD15", UNET),
    "sdxl": (
        "SDXL",
        {
            **UNET, "model_channels": 64, "adm_in_channels": 2816, "num_classes": "sequential",
            "use_linear_in_transformer": True,
        },
    ),
    "flux": ("Flux", FLUX),
    "pixart": ("PixArtAlpha", PIXART),
}  # fmt: skip
"""Kind -> its class in comfy.supported_models, and its sizes."""


def small(kind: str = "unet", dtype: torch.dtype = torch.float32, seed: int = 0):
    """A MODEL of a kind."""
    return patcher(*OPTIONS[kind], dtype, seed)


def recognised(monkeypatch, kind: str) -> None:
    """Have ComfyUI's loaders take a file for a small model of a kind: they tell kinds apart by sizes of real ones."""
    import comfy.model_detection
    import comfy.supported_models

    name, options = OPTIONS[kind]

    def find(state_dict, prefix, *args, **kwargs):
        return getattr(comfy.supported_models, name)({**options})

    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", find)


def noise_prediction(model, kind: str = "unet", seed: int = 0, load: bool = True) -> torch.Tensor:
    """What a MODEL predicts for a seeded latent and seeded prompts, as a sampler loads and asks it."""
    import comfy.model_management

    if load:
        comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(seed)
    side = 40 if kind == "pixart" else 8  # PixArt's position table takes no smaller one
    x = torch.randn(2, model.model.latent_format.latent_channels, side, side, generator=generator)
    context = torch.randn(2, 5, 64, generator=generator)
    extra = {"y": torch.randn(2, 2816 if kind == "sdxl" else 64, generator=generator)}
    extra |= {"guidance": torch.full((2,), 3.5)} if kind == "flux" else {}
    extra = extra if kind in ("sdxl", "flux") else {}
    return model.model.apply_model(x, torch.tensor([3.0, 0.5]), c_crossattn=context, **extra)
