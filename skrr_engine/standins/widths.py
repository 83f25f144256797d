"""A place at several widths: which of its units stay longest, and the stand-ins that belong to each width.

Units are ranked by what they add to the stream: the root of the mean square of their activation times their outgoing
weight, tokens weighted as a fit weights them. At a width the first so many of them stay, so widths are nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..encoder import families
from ..encoder.actions import SKIP, Action, Narrow
from ..encoder.row import EncoderError
from ..encoder.standin import NORMS
from ..encoder.trace import Trace
from ..encoder.units import Units, out_weight, reading, units_of
from ..measure.sums import double
from .fit import Fitting, Gram, Pair, Streams, best_ridge, factored, solve, stand_in

SHARES = (3 / 4, 1 / 2, 1 / 3, 1 / 5, 1 / 8, 1 / 16)
"""Of a place's units: the widths that are tried between all and none."""

GROUP = 32
"""Neurons are kept in multiples of so many, where there are plenty: some types of weights come in such blocks."""


def ladder(own: Units, shares: Sequence[float] = SHARES) -> list[int]:
    """The widths of a place that are tried, falling, 0 last."""
    group = GROUP if own.count >= 16 * GROUP else 1
    tried = {round(share * own.count / group) * group for share in shares}
    return [*sorted((n for n in tried if 0 < n < own.count), reverse=True), 0]


def units_at(streams: Streams) -> Units | None:
    """The units of the place where the streams are; None where it can't be narrowed."""
    try:
        return units_of(streams.row, len(streams.passed))
    except EncoderError:
        return None


def hidden(streams: Streams, own: Units) -> Iterator[tuple[int, Trace, Pair, torch.Tensor]]:
    """Every batch's number, trace and streams at this place, and what the place's out-projection takes of the dense
    one, `[batch, tokens, inner]`."""
    seen: list[torch.Tensor] = []
    with reading(own.out, lambda x: seen.append(x.clone())):
        for number, trace, pair in streams.here():
            yield number, trace, pair, seen.pop()
            seen.clear()


def ranking(streams: Streams, own: Units, null_share: float) -> torch.Tensor:
    """Numbers of a place's units, int64 on the CPU, those that add most to the dense stream first. null_share: of the
    null prompt in all weight."""
    squares: torch.Tensor | None = None
    null, total = (torch.zeros(()), 0.0), 0.0
    for number, trace, pair, activation in hidden(streams, own):
        weights = streams.weights(number, trace, pair.behind).flatten()
        own_squares = (double(activation.flatten(0, 1).square()) * double(weights).unsqueeze(1)).sum(dim=0)
        if number == 0:
            null = own_squares, float(weights.sum())
            continue
        squares = own_squares if squares is None else squares + own_squares
        total += float(weights.sum())
    if null[1]:
        squares = squares + null[0] * (null_share * total / null[1])
    outgoing = double(out_weight(own.out)).square().sum(dim=0).to(squares.device)
    scores = (squares * outgoing).reshape(own.count, own.size).sum(dim=1)
    return scores.cpu().argsort(descending=True, stable=True)


def fits(
    streams: Streams, own: Units | None, order: torch.Tensor, widths: Sequence[int], fitting: Fitting
) -> list[Action]:  # fmt: skip
    """What is done at this place at each of these widths: the first so many units of `order`, and a stand-in fitted to
    what is missing then to the dense stream behind it. own: None where only a width of 0 is asked for."""
    place, row = len(streams.passed), streams.row
    sub_block, norm, width = row.sub_blocks[place], families.by_name(row.family).norm, row.width
    every = kept = None
    null = None
    prompts, share = 0, 0.0
    batches = hidden(streams, own) if own else ((*found, None) for found in streams.here())
    for number, trace, pair, activation in batches:
        if every is None:
            every = Gram.of(width, pair.behind.device, len(widths) * width)
            kept = Gram.of(width, pair.behind.device)
        weights = streams.weights(number, trace, pair.behind)
        masks = [own.mask(order[:n], activation) if n else None for n in widths]
        behind = [pair.pruned if m is None else sub_block.finish(pair.pruned, own.out(activation * m)) for m in masks]
        z, r = NORMS[norm](pair.pruned.float()), torch.cat([pair.behind.float() - b.float() for b in behind], dim=-1)
        if number == 0:
            null = z.flatten(0, 1), r.flatten(0, 1), weights.flatten()
            continue
        share += float(weights.sum())
        every.add(z.flatten(0, 1), r.flatten(0, 1), weights.flatten())
        stay = torch.arange(prompts, prompts + len(z)) % max(fitting.held_out, 1) != fitting.held_out - 1
        prompts += len(z)
        last = r[stay][..., -width:]  # of the narrowest: for the ridge
        kept.add(z[stay].flatten(0, 1), last.flatten(0, 1), weights[stay].flatten())
    z, r, weights = null
    held = every.part(len(widths) - 1, width).without(kept)
    read = float(weights.sum())
    scaled = weights * (fitting.null * share / read if read else 0.0)
    every.add(z, r, scaled)
    kept.add(z, r[:, -width:], scaled)
    ridge = best_ridge(kept, held, fitting)
    del kept, held
    factor = factored(every, ridge)
    found: list[Action] = []
    for number, n in enumerate(widths):
        fitted = stand_in(solve(every.part(number, width), fitting.rank, ridge, factor), norm)
        fitted = fitted.to(streams.calibration.device)
        found.append((Narrow(order[:n].sort().values) if n else SKIP).repaired(fitted))
    return found
