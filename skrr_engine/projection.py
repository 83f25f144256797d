"""A denoiser's own text projection, found by its tensors' names and rebuilt from them.

One row of `LAYOUTS` per kind: which tensors it has, and what is done with them in turn.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .errors import SkrrError, first_line

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""Where a denoiser's tensors stand in the files that artists have."""


class ProjectionError(SkrrError):
    """A denoiser whose text projection can't be had; one line that says why and what to do."""


@dataclass(frozen=True)
class Layout:
    """One kind of projection. denoiser: whose; name: the module; stages: `("linear", key)`, `("rms", key, epsilon)` or
    `("gelu",)` in turn, a leading "?" marking a stage that may be missing."""

    denoiser: str
    name: str
    stages: tuple[tuple, ...]

    def required(self) -> list[str]:
        return [f"{s[1]}.weight" for s in self.stages if len(s) > 1 and not s[0].startswith("?")]


LAYOUTS = (
    Layout(
        "pixart",
        "y_embedder.y_proj",
        (("linear", "y_embedder.y_proj.fc1"), ("gelu",), ("linear", "y_embedder.y_proj.fc2")),
    ),
    Layout("sd3", "context_embedder", (("linear", "context_embedder"),)),
    Layout("flux", "txt_in", (("?rms", "txt_norm", 1e-6), ("linear", "txt_in"))),
    Layout("wan", "text_embedding", (("linear", "text_embedding.0"), ("gelu",), ("linear", "text_embedding.2"))),
    Layout("lumina2", "cap_embedder", (("rms", "cap_embedder.0", 1e-5), ("linear", "cap_embedder.1"))),
)


class TextProjection:
    """`[batch, tokens, width] -> [batch, tokens, features]` in float32. denoiser, name: for a plan's provenance;
    width: that it takes."""

    def __init__(self, layout: Layout, tensors: dict[str, torch.Tensor]):
        self.denoiser, self.name, self.tensors = layout.denoiser, layout.name, tensors
        self.stages = [(s[0].lstrip("?"), *s[1:]) for s in layout.stages if len(s) < 2 or f"{s[1]}.weight" in tensors]
        self.width = tensors[f"{self.stages[0][1]}.weight"].shape[-1]

    def columns(self, start: int, width: int) -> "TextProjection":
        """For an encoder whose embeddings fill only some columns of what a single linear layer takes (SD3's CLIP)."""
        if len(self.stages) != 1:
            return self
        key = f"{self.stages[0][1]}.weight"
        part = object.__new__(TextProjection)
        part.__dict__.update(self.__dict__)
        part.tensors = {**self.tensors, key: self.tensors[key][:, start : start + width]}
        part.width = width
        return part

    def to(self, device) -> "TextProjection":
        """Move the tensors; returns itself."""
        self.tensors = {key: t.to(device) for key, t in self.tensors.items()}
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        for kind, *arguments in self.stages:
            if kind == "gelu":
                x = F.gelu(x, approximate="tanh")
            elif kind == "linear":
                x = F.linear(x, self.tensors[f"{arguments[0]}.weight"], self.tensors.get(f"{arguments[0]}.bias"))
            else:
                x = F.rms_norm(x, (x.shape[-1],), self.tensors[f"{arguments[0]}.weight"], arguments[1])
        return x


def find(keys: Iterable[str]) -> tuple[Layout, str] | None:
    """The layout that a denoiser's tensor names fit, and the prefix that they stand under."""
    names = set(keys)
    for prefix in PREFIXES:
        for layout in LAYOUTS:
            if all(prefix + key in names for key in layout.required()):
                return layout, prefix
    return None


def build(layout: Layout, fetch: Callable[[str], torch.Tensor | None]) -> TextProjection:
    """Rebuild a projection. fetch: tensor of a name below the denoiser, as floating point, or None."""
    keys = [f"{s[1]}.{part}" for s in layout.stages if len(s) > 1 for part in ("weight", "bias")]
    found = {key: fetch(key) for key in keys}
    tensors = {key: t.detach().float() for key, t in found.items() if t is not None}
    for stage in layout.stages:
        key = f"{stage[1]}.weight" if stage[0] == "linear" else None
        if key and tensors[key].ndim != 2:
            raise ProjectionError(f"{key} has shape {list(tensors[key].shape)}, not that of a linear layer")
    return TextProjection(layout, tensors)


def from_file(path: str | Path) -> TextProjection:
    """Read the projection from a denoiser's safetensors file: only the tensors that it needs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            found = find(names)
            if found is None:
                kinds = ", ".join(layout.name for layout in LAYOUTS)
                raise ProjectionError(
                    f"{path}: no text projection in this file (looked for {kinds}): give the denoiser's file"
                )
            layout, prefix = found

            def fetch(key: str) -> torch.Tensor | None:
                if prefix + key not in names:
                    return None
                return dequantised(prefix + key, file.get_tensor, names, str(path))

            return build(layout, fetch)
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
    return tensor.float() * get(scale).float() if scale else tensor.float()
