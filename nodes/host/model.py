"""A denoiser's text projection out of a ComfyUI MODEL, LoRAs on it included, without loading the denoiser."""

import comfy.lora
import torch

from ...skrr_engine.measure.projection import RECIPES, ProjectionError, TextProjection, build, find
from .clip.views import View

CLIP_COLUMNS = {"clip_l": (0, 768), "clip_g": (768, 1280)}
"""SD3 joins CLIP-L's and CLIP-G's embeddings on the feature axis and pads them to T5's width."""


def from_model(model, view: View, width: int | None = None) -> TextProjection:
    """The projection of `model` (a MODEL) for one encoder. width: of the conditioning, where that is not the encoder's
    (Flux 2 joins three of its layers). Raises ProjectionError where it has none that Skrr knows, or one of another
    width."""
    width = view.shape.width if width is None else width
    denoiser = model.model.diffusion_model
    found = find(denoiser.state_dict().keys())
    kind = getattr(model.model.model_config, "unet_config", {}).get("image_model") or type(model.model).__name__
    if found is None:
        names = ", ".join(recipe.name for recipe in RECIPES)
        raise ProjectionError(
            f"no text projection that Skrr knows ({names}) in this model ({kind}): disconnect MODEL to search on the"
            " bare embeddings"
        )
    recipe, _ = found
    projection = build(recipe, lambda key: weight(model, denoiser, key))
    projection.denoiser = str(kind)[:100]
    if recipe.denoiser == "sd3" and view.name in CLIP_COLUMNS:
        projection = projection.columns(*CLIP_COLUMNS[view.name])
    if projection.width != width:
        raise ProjectionError(
            f"this model's text projection takes embeddings {projection.width} wide, but {view.name}'s are"
            f" {width} wide: connect the MODEL that this encoder belongs to, or none"
        )
    return projection


def weight(model, denoiser, key: str) -> torch.Tensor | None:
    """A tensor of the denoiser as floating point on the CPU, its LoRA patches applied; None where it has no such."""
    path, _, attribute = key.rpartition(".")
    try:
        module = denoiser.get_submodule(path)
    except AttributeError:
        return None
    full = f"diffusion_model.{key}"
    stored = model.backup[full].weight if full in model.backup else getattr(module, attribute, None)
    if stored is None:
        return None
    plain = dequantised(module, attribute, stored)
    patches = model.patches.get(full)
    return comfy.lora.calculate_weight(patches, plain.clone(), full) if patches else plain


def dequantised(module, attribute: str, stored: torch.Tensor) -> torch.Tensor:
    """A weight of any of the kinds that ComfyUI and ComfyUI-GGUF store, as float32 on the CPU."""
    if hasattr(stored, "tensor_type") and hasattr(module, "get_weight"):  # ComfyUI-GGUF
        return module.get_weight(stored.cpu(), torch.float32).float()
    if hasattr(stored, "dequantize") and type(stored) not in (torch.Tensor, torch.nn.Parameter):  # comfy_quant
        return stored.dequantize().float().cpu()
    plain = stored.detach().cpu().float()
    scale = getattr(module, "scale_weight", None) if attribute == "weight" else None  # scaled fp8
    return plain if scale is None else plain * scale.detach().cpu().float()
