"""The walk: many candidates through one pass over an encoder's sub-blocks, states shared and kept."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch

from ..encoder.actions import Action, Assignment
from ..encoder.standin import StandIn
from ..memory import Store, out_of_memory
from .sums import double

MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a module raises on a batch that it does not expect; a host's interruption is none of them."""


def attempt(act: Callable):
    """What `act` returns; None where it can't be done. Running out of memory is no answer to that, nor is being
    interrupted (ComfyUI asks for that before every operation, and tells of it once)."""
    try:
        return act()
    except MISFITS as error:
        if out_of_memory(error):
            raise
        return None


def agree(found: Sequence[torch.Tensor] | None, expected: Sequence[torch.Tensor]) -> bool:
    """Whether these are the same tensors, but for rounding (of half precision, too)."""
    if found is None or [t.shape for t in found] != [t.shape for t in expected]:
        return False
    pairs = [(double(f).nan_to_num(), double(e).nan_to_num()) for f, e in zip(found, expected, strict=True)]
    return all(float((f - e).norm()) <= 0.02 * float(e.norm()) for f, e in pairs)


def parted(members: Sequence[int], index: int, candidates: Sequence[Assignment]) -> dict[Action, tuple[int, ...]]:
    """Candidates by what they do at a sub-block: keep it (its own index), or an action in its place."""
    groups: dict[Action, list[int]] = {}
    for member in members:
        groups.setdefault(candidates[member].get(index, index), []).append(member)
    return {action: tuple(group) for action, group in groups.items()}


def forwards(length: int, candidates: Sequence[Assignment]) -> int:
    """How many sub-block forwards a walk over a row of `length` sub-blocks takes for these candidates."""
    streams: list[tuple[int, ...]] = [tuple(range(len(candidates)))] if candidates else []
    total = 0
    for index in range(length):
        groups = [parted(members, index, candidates) for members in streams]
        streams = [members for group in groups for members in group.values()]
        total += sum(isinstance(action, int) for group in groups for action in group)
    return total


@dataclass(frozen=True)
class Stream:
    """A residual stream that some candidates share so far; taps: its states at the boundaries already passed."""

    x: torch.Tensor
    members: tuple[int, ...]
    taps: dict[int, torch.Tensor]


STRIDE = 4
"""Every how many sub-blocks a walk leaves the states that later ones are sure to start from."""


class Prefix:
    """What candidates remove before a sub-block: those that remove the same share their state there. Equal ones are
    one object (see `of`), so that nothing but its address is hashed where it is looked for. repairs: its stand-ins."""

    _known: ClassVar[WeakValueDictionary] = WeakValueDictionary()

    def __init__(self, parent: "Prefix | None" = None, action: Action = None):
        repairs = frozenset() if parent is None else parent.repairs
        self.parent, self.repairs = parent, repairs | {action} if isinstance(action, StandIn) else repairs

    def of(self, index: int, action: Action) -> "Prefix":
        """The one that also does `action` at `index`, behind all that this one removes."""
        key = self, index, action
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Prefix(self, action)
        return found


NOTHING = Prefix()


def prefixes(candidate: Assignment, length: int) -> list[Prefix]:
    """What a candidate removes before each of `length` sub-blocks."""
    found, prefix = [], NOTHING
    for index in range(length):
        found.append(prefix)
        if index in candidate:
            prefix = prefix.of(index, candidate[index])
    return found


class Place(NamedTuple):
    """Where a `Shelf` holds a state: of which trace, whether of a stacked walk, in front of which sub-block, and what
    is removed before."""

    tag: object
    stacked: bool
    index: int
    prefix: Prefix

    @property
    def repairs(self) -> frozenset[StandIn]:
        """The stand-ins that made its state."""
        return self.prefix.repairs


class Shelf:
    """States of one trace kept between walks. store: where; tag: the trace's name there; few: walks of at most so many
    candidates leave all their states, larger ones only those that several candidates share, and every state in front
    of a landmark; landmarks: sub-blocks that are likely to be removed next: what a candidate with j < i removed leaves
    in front of i is where the one with both removed starts; places: where anything may lie, kept by the caller from
    walk to walk; stacked: whether the walk stacks streams. What such a walk left is only for its like: all others stay
    exact to the last bit. prefixes: of each candidate, by its id, for callers that walk the same ones over many
    traces."""

    def __init__(
        self, store: Store, tag, few: int, landmarks: Collection[int], places: set[int], stacked: bool = False,
        prefixes: dict[int, list[Prefix]] | None = None,
    ):  # fmt: skip
        self.store, self.tag, self.few, self.landmarks, self.places = store, tag, few, landmarks, places
        self.stacked = stacked
        self._prefixes = {} if prefixes is None else prefixes

    def _of(self, candidate: Assignment, length: int) -> list[Prefix]:
        known = self._prefixes.get(id(candidate), ())
        if len(known) < length:
            known = self._prefixes[id(candidate)] = prefixes(candidate, length)
        return known

    def latest(self, candidate: Assignment, length: int) -> Place | None:
        """The last place at which this candidate's state is held; None where none is."""
        before = self._of(candidate, length)
        for index in sorted((index for index in self.places if index < length), reverse=True):
            for stacked in (False, True)[: 1 + self.stacked]:
                place = self.tag, stacked, index, before[index]
                if place in self.store:
                    return Place(*place)
        return None

    def leave(self, index: int, stream: Stream, candidates: Sequence[Assignment]) -> None:
        """Called with each stream in front of each sub-block: holds its state if it is likely to be of use."""
        sure = index % STRIDE == 0 and (len(stream.members) > 1 or len(candidates) <= self.few)
        if index and (sure or index in self.landmarks):
            prefix = self._of(candidates[stream.members[0]], index + 1)[index]
            self.store.put(Place(self.tag, self.stacked, index, prefix), (stream.x, stream.taps))
            self.places.add(index)
