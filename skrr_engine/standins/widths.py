"""A place at several widths: which of its units stay longest, and the stand-ins that belong to each width.

Units are ranked by what they add to the stream: the root of the mean square of their activation times their outgoing
weight, tokens weighted as a fit weights them. At a width the first so many of them stay, so widths are nested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..encoder import families
from ..encoder.actions import SKIP, Action, Narrow
from ..encoder.row import EncoderError, Row
from ..encoder.standin import NORMS
from ..encoder.trace import Trace
from ..encoder.units import Units, activations, out_weight, reading, units_of
from ..measure.sums import double
from .fit import Fitting, Gram, Pair, Streams, best_ridge, factored, solve, stand_in

SHARES = (3 / 4, 1 / 2, 1 / 4, 1 / 10)
"""Of a place's units: the widths that are tried between all and none."""

TARGETS = len(SHARES) + 1
"""How many stand-ins are fitted to one place together: one for each of these widths, and for none left."""

GROUP = 32
"""Neurons are kept in multiples of so many, where there are plenty: some types of weights come in such blocks."""


def ladder(own: Units, shares: Sequence[float] = SHARES) -> list[int]:
    """The widths of a place that are tried, falling, 0 last."""
    group = GROUP if own.count >= 16 * GROUP else 1
    tried = {round(share * own.count / group) * group for share in shares}
    return [*sorted((n for n in tried if 0 < n < own.count), reverse=True), 0]


def units_at(streams: Streams) -> Units | None:
    """The units of the place where the streams are; None where it can't be narrowed."""
    return units_or_none(streams.row, len(streams.passed))


def count_at(row: Row, place: int) -> int:
    """How many units a place has; 1, all or nothing, where it can't be narrowed."""
    own = units_or_none(row, place)
    return 1 if own is None else own.count


def units_or_none(row: Row, place: int) -> Units | None:
    """The units of a place; None where it can't be narrowed."""
    try:
        return units_of(row, place)
    except EncoderError:
        return None


class Survey:
    """What a place's out-projection takes of the dense stream, batch by batch `[batch, tokens, inner]`: held as far as
    an eighth of the memory goes, and else computed again."""

    def __init__(self, streams: Streams, own: Units):
        self.streams, self.own, self.place = streams, own, len(streams.passed)
        self._held: dict[int, torch.Tensor] = {}
        self._room = streams.calibration.memory // 8

    def batches(self) -> Iterator[tuple[int, Trace, Pair, torch.Tensor]]:
        """Every batch's number, trace and streams at this place, and its activations."""
        seen: list[torch.Tensor] = []
        with reading(self.own.out, lambda x: seen.append(x.clone())):
            for number, trace, pair in self.streams.here():
                found = self._held.get(number)
                if found is None:
                    if not seen:  # the stream behind the place was known
                        self.streams.row.sub_blocks[self.place].apply(pair.dense, trace.calls[self.place])
                    found = seen[-1]
                    if found.nbytes <= self._room:
                        self._room -= found.nbytes
                        self._held[number] = found
                seen.clear()
                yield number, trace, pair, found


def ranking(survey: Survey, null_share: float) -> torch.Tensor:
    """Numbers of a place's units, int64 on the CPU, those that add most to the dense stream first. null_share: of the
    null prompt in all weight."""
    own = survey.own
    squares: torch.Tensor | None = None
    null, total = (torch.zeros(()), 0.0), 0.0
    for number, trace, pair, activation in survey.batches():
        weights = survey.streams.weights(number, trace, pair.behind).flatten()
        here = (activation.flatten(0, 1).float().square() * weights.to(activation.device).float().unsqueeze(1)).sum(
            dim=0
        )
        here = double(here)
        if number == 0:
            null = here, float(weights.sum())
            continue
        squares = here if squares is None else squares + here
        total += float(weights.sum())
    if null[1]:
        squares = squares + null[0] * (null_share * total / null[1])
    outgoing = double(out_weight(own.out)).square().sum(dim=0).to(squares.device)
    scores = (squares * outgoing).reshape(own.count, own.size).sum(dim=1)
    return scores.cpu().argsort(descending=True, stable=True)


def narrower(
    survey: Survey, order: torch.Tensor, widths: Sequence[int]
) -> Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """What gives the streams behind the place at each of these widths (falling), from the stream before it and its
    activations. Where the out-projection's sum is added as it is, each width's is that of the next smaller one and what
    the units between them add: all together cost one product."""
    own, sub_block = survey.own, survey.streams.row.sub_blocks[survey.place]
    if not additive(sub_block):
        return lambda x, activation: [
            sub_block.finish(x, own.out(activation * own.mask(order[:n], activation))) if n else x for n in widths
        ]
    weight, bias = out_weight(own.out), getattr(own.out, "bias", None)
    rising = sorted(n for n in widths if n)
    bands = [own.columns(order[a:b]).to(weight.device) for a, b in zip([0, *rising], rising, strict=False)]
    parts = [weight[:, band].T.contiguous() for band in bands]

    def behind(x: torch.Tensor, activation: torch.Tensor) -> list[torch.Tensor]:
        found, done = {0: x}, torch.zeros((), device=x.device)
        for n, band, part in zip(rising, bands, parts, strict=True):
            done = done + activation.index_select(-1, band).float() @ part
            found[n] = sub_block.finish(x.float(), done if bias is None else done + bias.float())
        return [found[n] for n in widths]

    return behind


def additive(sub_block) -> bool:
    """Whether what an out-projection gives is added to the stream as it is."""
    return getattr(sub_block, "post", None) is None


def fits(
    streams: Streams, survey: Survey | None, order: torch.Tensor, widths: Sequence[int], fitting: Fitting
) -> list[Action]:  # fmt: skip
    """What is done at this place at each of these widths: the first so many units of `order`, and a stand-in fitted to
    what is missing then to the dense stream behind it. survey: None where only a width of 0 is asked for."""
    row = streams.row
    norm, width = families.by_name(row.family).norm, row.width
    at_widths = narrower(survey, order, widths) if survey else lambda x, activation: [x]
    every = kept = None
    null = None
    prompts, share = 0, 0.0
    batches = survey.batches() if survey else ((*found, None) for found in streams.here())
    for number, trace, pair, activation in batches:
        if every is None:
            every = Gram.of(width, pair.behind.device, len(widths) * width)
            kept = Gram.of(width, pair.behind.device)
        weights = streams.weights(number, trace, pair.behind)
        if activation is not None and pair.pruned is not pair.dense:
            activation, _ = activations(row, survey.place, pair.pruned, trace.calls[survey.place])
        behind = at_widths(pair.pruned, activation)
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
