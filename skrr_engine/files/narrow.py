"""Tensors of a file's narrowed sub-blocks: which are cut, how, and what is read of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..disk.safetensors import Entry
from ..encoder import families
from ..encoder.units import index_cut, spread
from ..plan.model import EncoderPlan, Level
from .layout import Layout

PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
"""Types of weights that hold an element for each weight, in the order of rows and columns."""


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


def narrowing(layout: Layout, entry: EncoderPlan, level: Level, units: Mapping[int, torch.Tensor]) -> Narrowing:
    """What a level's narrowed sub-blocks keep of a file's tensors. units: see companion.Fitted. Nothing where they are
    missing."""
    pieces: dict[str, Piece] = {}
    whole: set[str] = set()
    for place, count in entry.narrowed(level).items():
        if place in units:
            kept = units[place][:count].long().sort().values
            more, odd = of_place(layout, layout.keys[place], kept, entry.units.of(place))
            pieces |= more
            whole |= odd
    return Narrowing(pieces, frozenset(whole))


def of_place(layout: Layout, keys, kept: torch.Tensor, count: int) -> tuple[dict[str, Piece], set[str]]:
    """The same of one sub-block. kept: numbers of the units that stay, rising; count: of all of them."""
    family = families.by_name(layout.family)
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        layer, _, kind = key.rpartition(".")
        layers.setdefault(layer, {})[kind] = key
    pieces, whole = {}, set()
    for layer, kinds in layers.items():
        name = layer.rpartition(".")[2]
        if "weight" not in kinds or not (name in family.ins or name in family.outs):
            continue
        dimension = 1 if name in family.outs else 0
        tensors = {kind: layout.entries[key] for kind, key in kinds.items()}
        full = tensors["weight"].shape[dimension] if len(tensors["weight"].shape) == 2 else 0
        if not full or full % count or not cuttable(tensors):
            whole.add(layer)
            continue
        index = spread(kept, full // count)
        rows = tensors["weight"].shape[0]
        for kind, entry in tensors.items():
            goes = kind == "weight" or (dimension == 0 and entry.shape[:1] == (rows,) and kind != "comfy_quant")
            if goes and (kind == "weight" or entry.count > 1 or rows == 1):
                shape = list(entry.shape)
                shape[dimension if kind == "weight" else 0] = len(index)
                piece = Piece(index, dimension if kind == "weight" else 0, Entry(entry.dtype, tuple(shape)))
                pieces[kinds[kind]] = piece
    return pieces, whole


def cuttable(tensors: Mapping[str, Entry]) -> bool:
    """Whether a layer's weight can be cut: an element for each weight, and scales for all of it or for each row."""
    weight = tensors["weight"]
    scales = [entry for kind, entry in tensors.items() if kind not in ("weight", "bias", "comfy_quant")]
    fits = all(entry.count <= 1 or entry.shape in ((weight.shape[0],), (weight.shape[0], 1)) for entry in scales)
    return weight.dtype in PLAIN and fits
