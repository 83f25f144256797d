"""A denoiser's text projection out of a ComfyUI MODEL, LoRAs on it included, without loading the denoiser."""

from collections.abc import Sequence

import comfy.lora
import torch

from ...skrr_engine.measure.projection import (
    RECIPES,
    VECTORS,
    ProjectionError,
    Projections,
    Recipe,
    TextProjection,
    UnknownError,
    build,
    find,
    looked_for,
)
from .clip.views import View

Projection = TextProjection | Projections


def from_model(model, view: View, width: int | None = None, hidden: bool = True, pooled: bool = False) -> Projection:
    """The projection of `model` (a MODEL) for one encoder. width: of the conditioning, where that is not the encoder's
    (Flux 2 joins three of its layers). hidden, pooled: what the conditioning reads of it. Raises UnknownError where the
    model has none that Skrr knows for what is read, ProjectionError where it has one of another width."""
    width = view.shape.width if width is None else width
    parts = []
    if hidden:
        tokens = _built(model, view, RECIPES, width)
        if tokens is None:
            raise UnknownError(
                f"no text projection that Skrr knows in this model ({kind_of(model)}; looked for {looked_for()})"
            )
        if tokens.width != width:
            raise ProjectionError(
                f"this model's text projection takes embeddings {tokens.width} wide, but {view.name}'s are"
                f" {width} wide: connect the MODEL that this encoder belongs to, or none"
            )
        parts.append(tokens)
    if pooled:
        parts.append(_built(model, view, VECTORS))
    if all(part is None for part in parts):
        raise UnknownError(
            f"no input for pooled vectors that Skrr knows in this model ({kind_of(model)}; looked for"
            f" {looked_for(VECTORS)})"
        )
    return parts[0] if hidden and len(parts) == 1 else Projections(parts)


def kind_of(model) -> str:
    """What kind of denoiser a MODEL is, in ComfyUI's words."""
    return str(getattr(model.model.model_config, "unet_config", {}).get("image_model") or type(model.model).__name__)


def _built(model, view: View, recipes: Sequence[Recipe], width: int | None = None) -> TextProjection | None:
    """The projection that a recipe fits, None where none does. width: of embeddings that are read as they are, not
    joined with another encoder's."""
    denoiser = model.model.diffusion_model
    names = denoiser.state_dict().keys()
    found = find(names, recipes, view.name)
    if found is None:
        return None
    projection = build(found[0], lambda key: weight(model, denoiser, key), names)
    if projection.width != width:
        for encoder, first, count in found[0].columns:
            if encoder == view.name:
                projection = projection.columns(first, count)
    projection.denoiser = kind_of(model)[:100]
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
    if stored.is_meta:
        raise ProjectionError(
            f"{key} of this model is not in memory, so its text projection can't be read: disconnect what unloads it,"
            " or connect no MODEL"
        )
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
