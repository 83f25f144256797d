"""CLIP objects as encoders: which text encoders a CLIP holds, and each one as a row of sub-blocks."""

from dataclasses import dataclass

import comfy.model_management
import comfy.sd1_clip
from torch import nn

from ...skrr_engine import families
from ...skrr_engine.row import EncoderError, Row

TRANSFORMER = "transformer."
"""Where the architecture stands below ComfyUI's SDClipModel."""


@dataclass(frozen=True)
class View:
    """One text encoder of a CLIP. name: its attribute (`t5xxl`, `clip_l`, ...), which plans use; path: below the
    CLIP's cond_stage_model; row: of its architecture, at `path + ".transformer"`."""

    name: str
    path: str
    row: Row

    @property
    def prefix(self) -> str:
        """What stands before the row's paths, below cond_stage_model."""
        return f"{self.path}.{TRANSFORMER}"


def dense_model(clip) -> nn.Module:
    """The CLIP's cond_stage_model with all its sub-blocks, also where the CLIP is one that we pruned."""
    return clip.patcher.model if pruning(clip) else clip.cond_stage_model


def pruning(clip) -> dict:
    """Encoder name -> what a CLIP of ours has pruned there (see apply.Pruned); empty for any other CLIP."""
    return getattr(clip.patcher, "skrr_pruned", {})


def views(clip) -> dict[str, View]:
    """The CLIP's text encoders that Skrr knows, by name. Raises EncoderError where there is none."""
    found, problem = {}, None
    for path, module in dense_model(clip).named_modules():
        if not isinstance(module, comfy.sd1_clip.SDClipModel):
            continue
        name = path.rpartition(".")[2]
        try:
            found[name] = View(name, path, families.find(module.transformer))
        except EncoderError as error:
            problem = problem or error
    if not found:
        raise problem or EncoderError("this CLIP holds no text encoder that Skrr knows: connect another CLIP")
    return found


def choose(clip, name: str = "auto") -> View:
    """The encoder of that name; for `auto` the one with the most parameters."""
    found = views(clip)
    if name in ("", "auto"):
        return max(found.values(), key=lambda view: view.row.total)
    if name not in found:
        raise EncoderError(f'this CLIP has no encoder "{name[:40]}": choose auto or one of {", ".join(found)}')
    return found[name]


def size(module: nn.Module) -> int:
    """Bytes of a module's weights, as ComfyUI counts them."""
    return comfy.model_management.module_size(module)
