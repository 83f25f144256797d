"""The paper's theory in code: how far two streams can be apart (lemma 3.1), and when a re-use keeps them nearer than a
skip (theorem 3.2). `benchmarks/reproduce/theory.py` holds it against real encoders.

Skrr's own notes have of both only what follows, in our words. An encoder is a row of maps `x + F(x; theta_i)`. Each is
Lipschitz in x with a constant L_i, and in theta with one constant K for all. So behind sub-block i the distance e_i of
the pruned stream from the dense one is at most

    kept        (1 + L_i) e_(i-1)
    skipped               e_(i-1) + |F(x; theta_i)|                        where that is at most K |theta_i|
    j re-used   (1 + L_j) e_(i-1) + |F(x; theta_j) - F(x; theta_i)|        where that is at most K |theta_j - theta_i|

with x the dense stream there. So a re-use has the smaller term where `|theta_i - theta_j| < |theta_i|`: the theorem's
condition. Norms are Euclidean over all tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from skrr_engine.encoder.actions import Assignment
from skrr_engine.encoder.row import Row
from skrr_engine.encoder.trace import Trace

Map = Callable[[torch.Tensor], torch.Tensor]


def length(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each prompt's stream `[prompts, tokens, width]`, float64 `[prompts]`."""
    return x.double().flatten(1).norm(dim=1)


def inner(row: Row, index: int, trace: Trace, place: int | None = None) -> Map:
    """F of a sub-block, `[prompts, tokens, width]` in and out, called as the attention at `place` (its own) was."""
    call = trace.calls[index if place is None else place]
    return lambda x: row.sub_blocks[index].apply(x, call) - x


def slope(f: Map, x: torch.Tensor, steps: int = 8, seed: int = 0) -> torch.Tensor:
    """The largest singular value of f's Jacobian at x, of each prompt, float64 `[prompts]`, by power iteration from
    below: the Lipschitz constant near x. f must not mix prompts."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    found = torch.zeros(len(x), dtype=torch.float64)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no forward derivative
        for _ in range(steps):
            v = v / length(v).clamp(min=1e-30).to(v.dtype).view(-1, 1, 1)
            _, along = torch.func.jvp(f, (x,), (v,))
            found = length(along)
            (v,) = torch.func.vjp(f, x)[1](along)
    return found.detach()


@dataclass(frozen=True)
class Distances:
    """Of each prompt, float64 `[prompts]`, behind the last sub-block. true: the pruned stream's distance from the dense
    one. secant: the lemma's bound with the smallest constants that this very pair of streams allows,
    `|F(x') - F(x)| / |x' - x|`, so it is never below the true one. local: with the constants near the dense stream,
    which the lemma needs to hold further out, too. dense: the dense stream's length."""

    true: torch.Tensor
    secant: torch.Tensor
    local: torch.Tensor
    dense: torch.Tensor


class Lemma:
    """Lemma 3.1 on one batch of prompts. slopes: (sub-block, place) -> its constant near the dense stream there."""

    def __init__(self, row: Row, trace: Trace):
        self.row, self.trace = row, trace
        self.dense = [trace.x]
        for index in range(len(row)):
            self.dense.append(row.sub_blocks[index].apply(self.dense[-1], trace.calls[index]))
        self.slopes: dict[tuple[int, int], torch.Tensor] = {}

    def slope_at(self, index: int, place: int) -> torch.Tensor:
        """The constant of a sub-block's F near the dense stream at a place."""
        if (index, place) not in self.slopes:
            f = inner(self.row, index, self.trace, place)
            self.slopes[index, place] = slope(f, self.dense[place])
        return self.slopes[index, place]

    def moved(self, place: int, target: int | None) -> torch.Tensor:
        """What a skip (None) or a re-use of `target` changes at a place where nothing else has changed: the length of
        `F_i(x)`, or of `F_j(x) - F_i(x)`, `[prompts]`."""
        x = self.dense[place]
        made = 0.0 if target is None else inner(self.row, target, self.trace, place)(x)
        return length(made - inner(self.row, place, self.trace)(x))

    def distances(self, removed: Assignment) -> Distances:
        """Of an assignment of skips and re-uses."""
        x = self.trace.x
        apart = secant = local = torch.zeros(len(x), dtype=torch.float64)
        for place in range(len(self.row)):
            action, dense = removed.get(place), self.dense[place]
            index = place if action is None else action.target
            moved = 0.0 if action is None else self.moved(place, index)
            if index is None:
                secant, local, step = secant + moved, local + moved, 0.0
            else:
                f = inner(self.row, index, self.trace, place)
                step = f(x)
                grown = length(step - f(dense)) / apart.clamp(min=1e-30)
                secant = torch.where(apart > 0, (1 + grown) * secant, 0.0) + moved
                local = (1 + self.slope_at(index, place)) * local + moved
            x = x + step
            apart = length(x - self.dense[place + 1])
        return Distances(apart, secant, local, length(self.dense[-1]))


def theta(row: Row, index: int) -> dict[str, torch.Tensor]:
    """A sub-block's parameters by their names within it: the same for all sub-blocks of its type."""
    block = row.block_paths[index // 2]
    return {key.removeprefix(f"{block}."): t.detach() for key, t in row.sub_blocks[index].tensors().items()}


def relative_distance(row: Row, place: int, target: int) -> float:
    """`|theta_i - theta_j| / |theta_i|`, i the place's own sub-block, j the re-used one: the theorem's condition is
    that this is below 1."""
    own, other = theta(row, place), theta(row, target)
    apart = sum(float((own[key].double() - other[key].double()).square().sum()) for key in own)
    return (apart / sum(float(t.double().square().sum()) for t in own.values())) ** 0.5


def ranks(values) -> np.ndarray:
    """Ranks from 0, equal values share their mean."""
    _, place, count = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count + 1) / 2)[place]


def rank_correlation(a, b) -> float:
    """Spearman's rank correlation; nan where one of them says nothing."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else float("nan")


def told_apart(scores, accepted) -> float:
    """How often a random accepted one has a lower score than a random refused one (0.5: no better than chance)."""
    yes = [s for s, a in zip(scores, accepted, strict=True) if a]
    no = [s for s, a in zip(scores, accepted, strict=True) if not a]
    if not yes or not no:
        return float("nan")
    return sum((y < n) + 0.5 * (y == n) for y in yes for n in no) / (len(yes) * len(no))
