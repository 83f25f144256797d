"""Tensors of a file's narrowed sub-blocks: which are cut, how, and what is read of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..disk.safetensors import Entry
from ..encoder.row import Row
from ..encoder.units import index_cut, spread, units_of
from ..plan.model import EncoderPlan, Level
from .layout import Layout, cuts


@dataclass(frozen=True)
class Piece:
    """What stays of a tensor. index: of which rows (dimension 0) or columns (1), int64; entry: as it is then."""

    index: torch.Tensor
    dimension: int
    entry: Entry

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the whole tensor."""
        return index_cut(tensor, self.index, self.dimension)


@dataclass(frozen=True)
class Narrowing:
    """pieces: name -> what stays of it, for the tensors of narrowed sub-blocks that are cut; whole: names, without
    `.weight`, of those projections that can't be, as they are quantised in blocks: they stay and are used in part."""

    pieces: Mapping[str, Piece]
    whole: frozenset[str]


def check(shape: Row | Layout, entry: EncoderPlan, name: str) -> None:
    """Raises PlanError unless an entry of a plan is made for this encoder: its family, blocks and width and, where
    steps narrow sub-blocks, how many units these have; EncoderError where an encoder in memory can't be narrowed.

    shape: a Row, whose units are known; a file's Layout, whose attention may leave its heads open: then they must
    divide its projections. name: of the encoder, for the message.
    """
    entry.check(shape.family, shape.blocks, shape.width, name)
    places = entry.narrowable()
    if isinstance(shape, Row):
        entry.check_units({place: units_of(shape, place).count for place in places}, {}, name)
        return
    counts, lengths = {}, {}
    for place in places:
        cut, _ = cuts(shape.family, shape.keys[place], shape.entries, shape.rotated)
        lengths[place] = [shape.entries[key].shape[dimension] for key, dimension in cut.items()]
        if place % 2:  # each length is the number of neurons
            odd = [length for length in lengths[place] if length != entry.units.feed_forward]
            counts |= {place: odd[0]} if odd else {}
        elif (heads := shape.heads(place // 2)) is not None:
            counts[place] = heads
    entry.check_units(counts, lengths, name)


def narrowing(layout: Layout, entry: EncoderPlan, level: Level, units: Mapping[int, torch.Tensor]) -> Narrowing:
    """What a level's narrowed sub-blocks keep of a file's tensors. units: see companion.Fitted. Nothing where they are
    missing. Raises PlanError where the plan is made for an encoder of other units."""
    pieces: dict[str, Piece] = {}
    whole: set[str] = set()
    narrowed = {place: count for place, count in entry.narrowed(level).items() if place in units}
    if narrowed:
        check(layout, entry, layout.family)
    for place, count in narrowed.items():
        kept = units[place][:count].long().sort().values
        cut, odd = cuts(layout.family, layout.keys[place], layout.entries, layout.rotated)
        whole |= odd
        for key, dimension in cut.items():
            dense = layout.entries[key]
            index = spread(kept, dense.shape[dimension] // entry.units.of(place))
            shape = (*dense.shape[:dimension], len(index), *dense.shape[dimension + 1 :])
            pieces[key] = Piece(index, dimension, Entry(dense.dtype, shape))
    return Narrowing(pieces, frozenset(whole))
