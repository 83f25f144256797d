"""How far a pruned encoder's conditioning is from the dense one's: `D = MSE(f_c) + MSE(f_0)`, `f = proj(E(.))`.

Paper, algorithm 1. The MSE covers exactly the tokens that the denoiser reads; where it reads several tensors of one
encoder (hidden states and a pooled vector), each has its own mean and the means add up. Sums are float64.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .rewire import Assignment
from .trace import Reading, Run, Tracer, forwards

Projection = Callable[[torch.Tensor], torch.Tensor]
"""The denoiser's own text projection, `[batch, tokens, width] -> [batch, tokens, features]` (see projection.py)."""


@dataclass(frozen=True)
class Batch:
    """Prompts of one length. run: the encoder's forward on them; prompts: how many."""

    run: Run
    prompts: int


@dataclass(frozen=True)
class Discrepancy:
    """conditional, null: mean squared errors; null_norm: mean L2 norm of the projected null embedding's tokens."""

    conditional: float
    null: float
    null_norm: float = float("nan")

    @property
    def total(self) -> float:
        return self.conditional + self.null


def features(reading: Reading, projection: Projection | None) -> Reading:
    """What the denoiser makes of a reading: its first tensor, the token embeddings, projected."""
    if projection is None:
        return reading
    (tokens, mask), *others = reading
    return [(projection(tokens), mask), *others]


def squared_errors(dense: Reading, pruned: Reading) -> list[torch.Tensor]:
    """Sum of squared errors over the read tokens, one float64 vector `[batch]` per tensor of the readings."""
    sums = []
    for (d, mask), (p, _) in zip(dense, pruned, strict=True):
        error = (p.float() - d.to(p.device)).double().square_()
        if mask is not None:
            error *= mask.to(error).unsqueeze(-1)
        sums.append(error.sum(dim=(1, 2)).cpu())
    return sums


def counts(reading: Reading) -> list[torch.Tensor]:
    """Number of read elements, one float64 vector `[batch]` per tensor of the reading."""
    found = []
    for t, mask in reading:
        tokens = torch.full((t.shape[0],), float(t.shape[1])) if mask is None else mask.sum(dim=1).cpu()
        found.append(tokens.double() * t.shape[2])
    return found


def token_norm(reading: Reading) -> float:
    """Mean L2 norm of the read tokens of the first tensor of a reading."""
    t, mask = reading[0]
    norms = t.double().norm(dim=-1)
    weights = torch.ones_like(norms) if mask is None else mask.to(norms)
    return float((norms * weights).sum() / weights.sum())


class Meter:
    """Measures candidates' discrepancies on one encoder and one set of prompts.

    encoder: the dense encoder, as `Batch.run` takes it; never changed. tracer: of the same encoder. batches: of the
    calibration prompts; null: of the empty one. projection: see `Projection`. limit: states held at once by the walk
    (0: any number).
    """

    def __init__(
        self,
        encoder: nn.Module,
        tracer: Tracer,
        batches: Sequence[Batch],
        null: Batch,
        projection: Projection | None = None,
        limit: int = 0,
    ):
        self.tracer, self.projection, self.limit = tracer, projection, limit
        self.batches = [null, *batches]
        self._dense = [
            [(t.float().cpu(), mask) for t, mask in self._features(batch.run(encoder))] for batch in self.batches
        ]
        totals = [torch.stack([c.sum() for c in counts(d)]) for d in self._dense]
        conditional = torch.stack(totals[1:]).sum(dim=0) if batches else torch.ones_like(totals[0])
        self._scale = [totals[0], *[conditional] * len(batches)]

    def _features(self, reading: Reading) -> Reading:
        return features(reading, self.projection)

    def null_norm(self) -> float:
        """Of the dense encoder."""
        return token_norm(self._dense[0])

    def measure(
        self, candidates: Sequence[Assignment], tick: Callable[[float], None] | None = None
    ) -> list[Discrepancy]:
        """Each candidate's discrepancy. tick: called before every sub-block's forward with the share of this call's
        work that is done; what it raises ends the measurement."""
        parts = torch.zeros(len(candidates), 2, dtype=torch.float64)
        norms = [float("nan")] * len(candidates)
        work = forwards(len(self.tracer.row), candidates) * len(self.batches)
        ticks = itertools.count()
        step = None if tick is None else lambda: tick(next(ticks) / work)
        for k, batch in enumerate(self.batches):
            trace = self.tracer.trace(batch.run)
            dense = [(t.to(trace.x.device), mask) for t, mask in self._dense[k]]
            for member, reading in self.tracer.walk(trace, candidates, self.limit, step):
                pruned = self._features(reading)
                errors = squared_errors(dense, pruned)
                parts[member, min(k, 1)] += sum(e.sum() / n for e, n in zip(errors, self._scale[k], strict=True))
                if k == 0:
                    norms[member] = token_norm(pruned)
        return [Discrepancy(float(c), float(z), n) for (z, c), n in zip(parts, norms, strict=True)]
