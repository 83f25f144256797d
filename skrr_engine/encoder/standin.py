"""A linear stand-in: the small map that stands at a place from which a sub-block was removed.

At its place the stream becomes `x + norm(x) down up + bias`, with `down` `[width, rank]` and `up` `[rank, width]`. The
norm is of the kind that the family's own norms are, without weights: those are part of `down`. So a stand-in needs
nothing of the sub-block that it stands for, and one serves every precision of an encoder. standins/fit.py fits them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .actions import Action
from .units import Build

if TYPE_CHECKING:
    from .row import Row

EPSILON = 1e-6
NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rms": lambda x: F.rms_norm(x, (x.shape[-1],), None, EPSILON),
    "layer": lambda x: F.layer_norm(x, (x.shape[-1],), None, None, EPSILON),
}
"""Kind of norm -> `[..., width]` to the same shape, each token's mean square (variance) brought to one."""


@dataclass(frozen=True, eq=False)
class StandIn(Action):
    """One fitted map. norm: a key of NORMS; down `[rank, width]`, up `[width, rank]`, bias `[width]`: as linear layers
    hold them. Two stand-ins are equal only where they are the same object: a walk may share its states then."""

    norm: str
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    word = "stand-in"
    fitted = True

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + self.bias.nbytes

    def apply(self, x: torch.Tensor, *where) -> torch.Tensor:
        """The stream `[batch, tokens, width]` behind the place, whichever (`where`) that is."""
        down, up, bias = (t.to(x) for t in (self.down, self.up, self.bias))
        return x + F.linear(F.linear(NORMS[self.norm](x), down), up, bias)

    def completed(self, x: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        return self.apply(x)

    def module(self, linear: Callable[..., nn.Linear]) -> StandInModule:
        """It as a module, whose layers are of the class `linear`."""
        return StandInModule(self, linear)

    def placeholders(self, row: Row, place: int, build: Build) -> dict[str, nn.Module]:
        return row.sub_blocks[place].placeholders(standin=self.module(build.linear))

    def to(self, device: torch.device | str) -> StandIn:
        """The same on a device."""
        return StandIn(self.norm, self.down.to(device), self.up.to(device), self.bias.to(device))


def standin_of(action: Action) -> StandIn | None:
    """An action's stand-in, which may be the action itself; None where it has none."""
    found = getattr(action, "standin", action)
    return found if isinstance(found, StandIn) else None


class Linear(nn.Linear):
    """A linear layer whose weights may be of another type than what goes through it, as ComfyUI's are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


class StandInModule(nn.Module):
    """A stand-in in an encoder's module tree: what it adds to the stream.

    linear: the class of its two layers.
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
        return f"stand-in of rank {self.down.weight.shape[0]}"
