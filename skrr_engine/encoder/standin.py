"""A linear stand-in: the small map that repairs the residual stream where a sub-block was removed.

At its place the stream becomes `x + norm(x) down up + bias`, with `down` `[width, rank]` and `up` `[rank, width]`. The
norm is of the kind that the family's own norms are, without weights: those are part of `down`. So a stand-in needs
nothing of the sub-block that it stands for, and one serves every precision of an encoder. standin.py fits them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-6
NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rms": lambda x: F.rms_norm(x, (x.shape[-1],), None, EPSILON),
    "layer": lambda x: F.layer_norm(x, (x.shape[-1],), None, None, EPSILON),
}
"""Kind of norm -> `[..., width]` to the same shape, each token's mean square (variance) brought to one."""


@dataclass(frozen=True, eq=False)
class StandIn:
    """One fitted map. norm: a key of NORMS; down `[rank, width]`, up `[width, rank]`, bias `[width]`: as linear layers
    hold them. Two stand-ins are equal only where they are the same object: a walk may share its states then."""

    norm: str
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + self.bias.nbytes

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The repaired stream, `[batch, tokens, width]` in and out."""
        down, up, bias = (t.to(x) for t in (self.down, self.up, self.bias))
        return x + F.linear(F.linear(NORMS[self.norm](x), down), up, bias)

    def to(self, device: torch.device | str) -> "StandIn":
        """The same on a device."""
        return StandIn(self.norm, self.down.to(device), self.up.to(device), self.bias.to(device))


class Linear(nn.Linear):
    """A linear layer whose weights may be of another type than what goes through it, as ComfyUI's are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


class Repair(nn.Module):
    """A stand-in in an encoder's module tree: what it adds to the stream.

    linear: the class of its two layers, called as `torch.nn.Linear` is; ComfyUI's operations bring their own.
    """

    def __init__(self, standin: StandIn, linear: Callable[..., nn.Linear] = Linear):
        super().__init__()
        self.norm, (rank, width) = standin.norm, standin.down.shape
        # No dtype is named: ComfyUI might cast the bias to it, too, and T5's huge channels do not survive float16.
        self.down = linear(width, rank, bias=False, device="meta")
        self.up = linear(rank, width, bias=True, device="meta")
        for layer, key, tensor in (
            (self.down, "weight", standin.down), (self.up, "weight", standin.up), (self.up, "bias", standin.bias)
        ):  # fmt: skip
            setattr(layer, key, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(NORMS[self.norm](x)))

    def extra_repr(self) -> str:
        return f"repaired by a stand-in of rank {self.down.weight.shape[0]}"
