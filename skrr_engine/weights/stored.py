"""A module's weight as it lies in memory: numbers of a type that has zeros, and the scale that they are multiplied by.

fp32, fp16, bf16 and fp8 have no scale. Scaled fp8 has one beside the weight (`scale_weight`) or inside it (ComfyUI's
QuantizedTensor: `_qdata`, and `_layout_params` or `_params`). Types of blocks (GGUF, fp4, int8) are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import SkrrError, printable
from .packed import INTEGERS

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True)
class Stored:
    """data: the numbers, of one of FLOATS; scale: one float32 number, or one for each row, None for 1."""

    data: torch.Tensor
    scale: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """The weight as it acts, float32."""
        found = self.data.float()
        return found if self.scale is None else found * self.scale.to(found.device)

    def zeroed(self, gone: torch.Tensor) -> torch.Tensor:
        """A copy of the numbers, exactly zero where `gone` is true and to the bit what they were elsewhere."""
        made = self.data.detach().clone()
        bits = made.view(INTEGERS[made.itemsize])
        bits.masked_fill_(gone.to(made.device), 0)  # fp8 has no masked_fill; all of its types have zero as no bits
        return made

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Other values, float32, as numbers of the same type and scale; what is too large becomes its largest."""
        if self.scale is not None:
            values = values / self.scale.to(values.device)
        most = torch.finfo(self.data.dtype).max
        return values.clamp(-most, most).to(self.data.dtype)


def stored(name: str, module: nn.Module) -> Stored:
    """A module's weight. name: for errors. Raises SkrrError where single weights can't be zero, or are no numbers."""
    weight = module.weight
    data = getattr(weight, "_qdata", weight).detach()
    params = getattr(weight, "_layout_params", None) or getattr(weight, "_params", None)
    inside = params.get("scale") if isinstance(params, dict) else getattr(params, "scale", None)
    scale = inside if inside is not None else getattr(module, "scale_weight", None)
    one_each = scale is None or scale.numel() == 1 or tuple(scale.shape) == (data.shape[0], *[1] * (data.ndim - 1))
    if data.dtype not in FLOATS or not one_each:
        kind = getattr(getattr(weight, "tensor_type", None), "name", None) or str(data.dtype).removeprefix("torch.")
        raise SkrrError(
            f"{printable(name)}: its weights lie in blocks or whole numbers ({printable(str(kind))}), among which none"
            " can be left out; take a file in fp32, fp16, bf16 or fp8"
        )
    if scale is not None:
        scale = scale.detach().float().reshape([-1] + [1] * (data.ndim - 1))
    return Stored(data, scale)
