"""One encoder file, as ComfyUI's own loader is shown it."""

import functools
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch

from ....skrr_engine.files.encoder_file import Checkpoint, CheckpointError
from ....skrr_engine.files.narrow import Narrowing, narrowing
from ....skrr_engine.weights.tensor import PackedWeight
from .. import versions as features
from ..clip.views import Pruned

SMALL = 1024
"""Tensors of at most so many bytes are always handed to the loader: by some of them it tells how weights are stored."""


class Sheltered(dict):
    """A state dict whose `hidden` tensors can be asked for by name, but are not among its keys."""

    def __init__(self, visible: Mapping[str, torch.Tensor], hidden: Mapping[str, torch.Tensor]):
        super().__init__(visible)
        self.hidden = hidden

    def __contains__(self, key) -> bool:
        return super().__contains__(key) or key in self.hidden

    def __missing__(self, key) -> torch.Tensor:
        return self.hidden[key]

    def get(self, key, default=None):
        return self[key] if key in self else default


@dataclass(frozen=True)
class EncoderFile:
    """One file to load from, its tensors by the names that ComfyUI's encoder has for them. tensors: all that it uses,
    also those that a pruned file has left out, but for small ones only their dtypes and shapes (mapped from the file
    where ComfyUI maps); places: name -> sub-block, for those of sub-blocks; origin: name -> name in the file, for those
    that are yet to be read; absent: names of those that a pruned file has left out; seeds: the packed weights that were
    fetched, to be planted (see weights/tensor.py)."""

    checkpoint: Checkpoint
    tensors: Mapping[str, torch.Tensor]
    places: Mapping[str, int]
    origin: Mapping[str, str]
    absent: Set[str]
    seeds: list[PackedWeight] = field(default_factory=list)

    @classmethod
    def open(cls, path: str) -> "EncoderFile":
        """Open a file; nothing but its header is read. Raises CheckpointError."""
        if not path.lower().endswith((".safetensors", ".sft")):
            raise CheckpointError(
                f"{os.path.basename(path)}: Skrr loads .safetensors and .gguf files; load this one with ComfyUI's"
                " own loader and put Load Skrr Plan behind it"
            )
        checkpoint = Checkpoint(path)
        if checkpoint.problem is not None:
            raise CheckpointError(checkpoint.problem)
        layout, mapped = checkpoint.known_layout, None if checkpoint.packed else features.mapped_state_dict(path)
        checkpoint.check_unchanged()  # what is mapped is what was opened
        used, stored, absent, keys = checkpoint.used, {}, {}, {}
        narrowed = checkpoint.record.narrowed if checkpoint.record else {}
        for key, entry in checkpoint.entries.items():
            name = layout.name(key) if layout else key
            if key not in used:
                continue
            if not entry.kept:
                absent[name] = entry.stand_in()
            elif key in narrowed:
                stored[name] = entry.stand_in()
                keys[id(stored[name])] = key
            elif mapped:
                stored[name] = mapped[key]
            elif entry.nbytes <= SMALL:
                stored[name] = checkpoint.tensor(key)
            else:
                stored[name] = entry.stand_in()
                keys[id(stored[name])] = key
        tensors = features.converted_quants(dict(stored), checkpoint.metadata)
        origin = {name: keys[id(tensor)] for name, tensor in tensors.items() if id(tensor) in keys}
        places = {name: place for name in tensors if (place := layout.place(name)) is not None} if layout else {}
        return cls(checkpoint, {**tensors, **absent}, places, origin, absent.keys())

    def fetch(self, key: str, cut: Narrowing | None = None):
        """A tensor with its bytes. cut: what stays of those of narrowed parts."""
        stored = self.origin.get(key)
        piece = None if cut is None else cut.pieces.get(stored or self._stored_names.get(key))
        if stored is None:
            return self.tensors[key] if piece is None else piece.cut(self.tensors[key])
        already = self.checkpoint.record is not None and stored in self.checkpoint.record.narrowed
        if piece is not None and not already:
            return self.checkpoint.piece(stored, piece)
        found = self.checkpoint.tensor(stored)
        if isinstance(found, PackedWeight):
            found.seed = []
            self.seeds.append(found)
        return found

    @functools.cached_property
    def _stored_names(self) -> dict[str, str]:
        """Key -> what the file calls that tensor."""
        layout = self.checkpoint.known_layout
        return {layout.name(stored): stored for stored in layout.entries} if layout else {}

    def narrowing(self, pruned: Pruned) -> Narrowing:
        """What stays of the tensors of parts that are narrowed. Raises PlanError."""
        if pruned.level is None or not pruned.fitted.units:
            return Narrowing({}, frozenset())
        return narrowing(self.checkpoint.layout, pruned.plan, pruned.level, pruned.fitted.units)

    def sheltered(self, visible: Iterable[str]) -> Sheltered:
        """A state dict of these tensors, from which all others can be asked for."""
        visible = set(visible)
        hidden = {key: tensor for key, tensor in self.tensors.items() if key not in visible}
        return Sheltered({key: self.fetch(key) for key in sorted(visible, key=self._start)}, hidden)

    def hollow(self) -> Sheltered:
        """Everything but the sub-blocks."""
        return self.sheltered(self.tensors.keys() - self.withheld)

    @property
    def withheld(self) -> set[str]:
        """What `hollow` leaves out."""
        return {key for key in self.tensors if self._hides(key)}

    @property
    def lacks(self) -> set[int]:
        """The sub-blocks that a pruned file has left out."""
        places = (self.checkpoint.layout.place(name) for name in self.absent)
        return {place for place in places if place is not None}

    def _start(self, key: str) -> int:
        """Where a tensor begins in the file; 0 for those that are not read from it any more."""
        return self.checkpoint.start(self.origin[key]) if key in self.origin else 0

    def _hides(self, key: str) -> bool:
        place, tensor = self.places.get(key), self.tensors[key]
        return key in self.absent or (place is not None and torch.is_tensor(tensor) and tensor.nbytes > SMALL)

    def kept(self, removed) -> dict[int, list[str]]:
        """Sub-block -> names of its tensors, for those that stay; both in the order of the file."""
        found: dict[int, list[str]] = {}
        for key, place in sorted(self.places.items(), key=lambda item: self._start(item[0])):
            if place not in removed:
                found.setdefault(place, []).append(key)
        return found
