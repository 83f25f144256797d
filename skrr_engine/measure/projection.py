"""A denoiser's own text projection, found by its tensors' names and rebuilt from them.

One row of `RECIPES` per kind: which tensors it has, and what is done with them in turn.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import SkrrError, first_line

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""Where a denoiser's tensors stand in the files that artists have."""


class ProjectionError(SkrrError):
    """A denoiser whose text projection can't be had; one line that says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """One kind of projection. denoiser: whose; name: the module; stages: `("linear", key)`, `("rms", key, epsilon)` or
    `("gelu",)` in turn, a leading "?" marking a stage that may be missing; marks: other tensors of such a denoiser."""

    denoiser: str
    name: str
    stages: tuple[tuple, ...]
    marks: tuple[str, ...] = ()

    def required(self) -> list[str]:
        return [*self.marks, *(f"{s[1]}.weight" for s in self.stages if len(s) > 1 and not s[0].startswith("?"))]


RECIPES = (
    Recipe(
        "pixart",
        "y_embedder.y_proj",
        (("linear", "y_embedder.y_proj.fc1"), ("gelu",), ("linear", "y_embedder.y_proj.fc2")),
    ),
    Recipe("sd3", "context_embedder", (("linear", "context_embedder"),)),
    Recipe("chroma", "txt_in", (("linear", "txt_in"),), ("distilled_guidance_layer.norms.0.scale",)),
    Recipe("flux", "txt_in", (("?rms", "txt_norm", 1e-6), ("linear", "txt_in"))),
    Recipe("wan", "text_embedding", (("linear", "text_embedding.0"), ("gelu",), ("linear", "text_embedding.2"))),
    Recipe("lumina2", "cap_embedder", (("rms", "cap_embedder.0", 1e-5), ("linear", "cap_embedder.1"))),
)


class TextProjection(nn.Sequential):
    """`[batch, tokens, width] -> [batch, tokens, features]` in float32: a denoiser's own layers. recipe: which; layers:
    by the names that they have there, "" for those without weights. denoiser, name: for a plan's provenance; width:
    that it takes."""

    def __init__(self, recipe: Recipe, layers: Sequence[tuple[str, nn.Module]]):
        super().__init__(*(layer for _, layer in layers))
        self.requires_grad_(False)
        self.recipe, self.layers, self.denoiser, self.name = recipe, tuple(layers), recipe.denoiser, recipe.name
        self.width = next(layer.weight.shape[-1] for name, layer in layers if name)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the denoiser's names."""
        return {f"{name}.{key}": t for name, layer in self.layers for key, t in layer.state_dict().items()}

    def columns(self, start: int, width: int) -> "TextProjection":
        """For an encoder whose embeddings fill only some columns of what a single linear layer takes (SD3's CLIP)."""
        if len(self.layers) != 1:
            return self
        ((name, layer),) = self.layers
        return TextProjection(self.recipe, [(name, linear(layer.weight[:, start : start + width], layer.bias))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


def find(keys: Iterable[str]) -> tuple[Recipe, str] | None:
    """The recipe that a denoiser's tensor names fit, and the prefix that they stand under."""
    names = set(keys)
    for prefix in PREFIXES:
        for recipe in RECIPES:
            if all(prefix + key in names for key in recipe.required()):
                return recipe, prefix
    return None


def build(recipe: Recipe, fetch: Callable[[str], torch.Tensor | None]) -> TextProjection:
    """Rebuild a projection. fetch: tensor of a name below the denoiser, as floating point, or None. Raises
    ProjectionError where tensors do not fit together."""
    layers: list[tuple[str, nn.Module]] = []
    width = None  # of what comes out of the layers so far
    for kind, *rest in recipe.stages:
        if kind == "gelu":
            layers.append(("", nn.GELU(approximate="tanh")))
            continue
        name, *epsilon = rest
        weight, bias = (t if t is None else t.detach().float() for t in map(fetch, (f"{name}.weight", f"{name}.bias")))
        if weight is None:  # one that may be missing
            continue
        shape = list(weight.shape)
        if len(shape) != (2 if kind == "linear" else 1) or 0 in shape or shape[-1] != (width or shape[-1]):
            takes = "" if width is None else f" that takes {width} channels"
            raise ProjectionError(
                f"{name}.weight has shape {shape}, not that of a {KINDS[kind]} layer{takes}: get the denoiser again"
            )
        if kind == "linear" and bias is not None and list(bias.shape) != shape[:1]:
            raise ProjectionError(
                f"{name}.bias has shape {list(bias.shape)}, but {name}.weight {shape}: get the denoiser again"
            )
        layers.append((name, linear(weight, bias) if kind == "linear" else rms(weight, *epsilon)))
        width = shape[0]
    return TextProjection(recipe, layers)


KINDS = {"linear": "linear", "rms": "norm", "?rms": "norm"}


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
    return layer


def rms(weight: torch.Tensor, epsilon: float) -> nn.RMSNorm:
    """A root-mean-square norm with this weight."""
    layer = nn.RMSNorm(len(weight), eps=epsilon, device="meta")
    layer.load_state_dict({"weight": weight}, assign=True)
    return layer


def from_file(path: str | Path) -> TextProjection:
    """Read the projection from a denoiser's safetensors file: only the tensors that it needs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            found = find(names)
            if found is None:
                kinds = ", ".join(recipe.name for recipe in RECIPES)
                raise ProjectionError(
                    f"{path}: no text projection in this file (looked for {kinds}): give the denoiser's file"
                )
            recipe, prefix = found

            def fetch(key: str) -> torch.Tensor | None:
                if prefix + key not in names:
                    return None
                return dequantised(prefix + key, file.get_tensor, names, str(path))

            return build(recipe, fetch)
    except (SafetensorError, OSError) as error:
        raise ProjectionError(
            f"{path}: can't be read as safetensors ({first_line(error)}); give the denoiser's file"
        ) from None


def dequantised(key: str, get: Callable[[str], torch.Tensor], names, where: str) -> torch.Tensor:
    """A tensor as floating point: fp8 with its scale (`scale_weight`, `weight_scale`) multiplied in."""
    tensor = get(key)
    if not tensor.is_floating_point():
        raise ProjectionError(
            f"{where}: {key} is stored as {tensor.dtype}, which needs its loader; give an fp16 or fp8 file"
        )
    base = key.removesuffix(".weight")
    scale = next((s for s in (f"{base}.scale_weight", f"{base}.weight_scale") if key != base and s in names), None)
    if scale is None:
        return tensor.float()
    factor = get(scale).float()
    try:
        scaled = tensor.float() * factor
        fits = scaled.shape == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ProjectionError(f"{where}: {scale} does not fit {key}'s shape {list(tensor.shape)}; get the file again")
    return scaled
