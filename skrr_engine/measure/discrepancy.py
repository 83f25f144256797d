"""How far a pruned encoder's conditioning is from the dense one's: `D = MSE(f_c) + MSE(f_0)`, `f = proj(E(.))`.

Paper, algorithm 1. The MSE covers exactly the tokens that the denoiser reads; where it reads several tensors of one
encoder (hidden states and a pooled vector), each has its own mean and the means add up. Sums are float64 (see sums.py).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..encoder.trace import Reading
from .sums import double

Projection = Callable[[torch.Tensor], torch.Tensor]
"""The denoiser's own text projection, `[batch, tokens, width] -> [batch, tokens, features]` (see projection.py)."""


@dataclass(frozen=True)
class Discrepancy:
    """conditional, null: mean squared errors; null_norm: mean L2 norm of the projected null embedding's tokens."""

    conditional: float
    null: float
    null_norm: float = float("nan")

    @property
    def total(self) -> float:
        return self.conditional + self.null

    @property
    def finite(self) -> float | None:
        """The total, for a plan; None where the encoder overflowed."""
        return finite(self.total)


def finite(number: float) -> float | None:
    """A number as JSON takes it; None where it is not finite."""
    return number if math.isfinite(number) else None


def features(reading: Reading, projection: Projection | None) -> Reading:
    """What the denoiser makes of a reading: its first tensor, the token embeddings, projected; or each that has a
    projection of its own (see projection.Projections)."""
    if projection is None:
        return reading
    parts = getattr(projection, "parts", (projection,))
    return [(part(t) if part else t, mask) for (t, mask), part in itertools.zip_longest(reading, parts[: len(reading)])]


def squared_errors(dense: Reading, pruned: Reading) -> list[torch.Tensor]:
    """Sum of squared errors over the read tokens, one float64 vector `[batch]` per tensor of the readings."""
    sums = []
    for (d, mask), (p, _) in zip(dense, pruned, strict=True):
        error = double(p.float() - d.to(p.device)).square_()
        sums.append(read_only(error, mask).sum(dim=(1, 2)).cpu())
    return sums


def read_only(t: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`[batch, tokens, ...]` with zeros where a token is not read, whatever stood there."""
    if mask is None:
        return t
    return t.masked_fill(mask.to(t.device).eq(0).reshape(*mask.shape, *[1] * (t.ndim - 2)), 0)


def counts(reading: Reading) -> list[torch.Tensor]:
    """Number of read elements, one float64 vector `[batch]` per tensor of the reading."""
    return [tokens_read(t, mask) * t.shape[2] for t, mask in reading]


def tokens_read(t: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Number of read tokens, float64 `[batch]`, of a reading's tensor and its mask."""
    tokens = torch.full((t.shape[0],), float(t.shape[1])) if mask is None else mask.sum(dim=1).cpu()
    return tokens.double()


def angles(dense: Reading, pruned: Reading) -> list[torch.Tensor]:
    """Sum of `1 - cosine` over the read tokens, one float64 vector `[batch]` per tensor of the readings."""
    sums = []
    for (d, mask), (p, _) in zip(dense, pruned, strict=True):
        angle = (1 - torch.cosine_similarity(double(p), double(d.to(p.device)), dim=-1)).clamp_(min=0)
        sums.append(read_only(angle, mask).sum(dim=1).cpu())
    return sums


@dataclass(frozen=True)
class Criterion:
    """What `D` is made of. errors: contributions of each prompt, not negative; elementwise: whether they are summed
    over a token's features, too; null: weight of the null prompt's term."""

    errors: Callable[[Reading, Reading], list[torch.Tensor]] = squared_errors
    elementwise: bool = True
    null: float = 1.0


COSINE = Criterion(angles, elementwise=False)
"""The angle to the dense embedding instead of the squared error (the paper's ablation)."""


def token_norm(reading: Reading) -> float:
    """Mean L2 norm of the read tokens of the first tensor of a reading."""
    t, mask = reading[0]
    norms = read_only(double(t).norm(dim=-1), mask)
    return float(norms.sum() / tokens_read(t, mask).sum().clamp(min=1))
