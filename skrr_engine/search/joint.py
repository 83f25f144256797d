"""One budget over several encoders that a denoiser reads side by side: a byte goes where it costs least in any of them.

What is read of each encoder is another part of the conditioning (other tokens, other features, another vector), so the
discrepancy of all is a sum. Each part is taken beside the mean square of what it is when dense: an encoder whose
embeddings are large in numbers is not more important for that. Then the steps of all encoders, each bought at its own
price (see allocate.py), are one list in the order of that relative discrepancy for each byte of their files, and any
budget is a prefix of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..encoder.row import Numbers
from ..errors import SearchError
from . import allocate
from .allocate import Step
from .widths import BYTES, shares_of


@dataclass(frozen=True)
class Member:
    """One of the encoders. steps: of its own allocation, the cheapest first; counts: units of each place; shape: of the
    encoder, its bytes as its file holds them; nothing: the discrepancy of an encoder that says nothing (see
    Meter.nothing)."""

    steps: Sequence[Step]
    counts: Mapping[int, int]
    shape: Numbers
    nothing: float

    @property
    def factor(self) -> float:
        """What a step's price is multiplied with: relative discrepancy for each byte of the file."""
        places = range(len(self.shape.parameter_counts))
        size = sum(self.shape.sub_block_bytes[i] for i in places) / max(sum(self.shape.parameter_counts), 1)
        return BYTES / max(size, 1e-9) / max(self.nothing, 1e-30)

    def removed(self, end: int) -> float:
        """Parameters that are gone after so many steps."""
        return self.shape.sparsity(self.shares(end)) * self.shape.total

    def bytes_left(self, end: int, rank: int) -> float:
        """Bytes that are left after so many steps, stand-ins of this rank counted."""
        shares = self.shares(end)
        return self.shape.total_bytes - self.shape.bytes_of(shares) + 4 * self.shape.width * (rank + 1) * len(shares)

    def shares(self, end: int) -> dict:
        """Place -> share of its units that stays after so many steps."""
        return shares_of(allocate.left(self.steps[:end]), self.counts)


def order(members: Mapping[str, Member]) -> list[str]:
    """Whose next step is taken, in turn. Of equal prices, the encoder that is named first goes first."""
    prices = [
        (step.price * member.factor, place, number, name)
        for place, (name, member) in enumerate(members.items())
        for number, step in enumerate(member.steps)
    ]
    return [name for *_, name in sorted(prices)]


def ends_at(members: Mapping[str, Member], within: Callable[[Mapping[str, int]], bool]) -> dict[str, int]:
    """Encoder -> how many of its steps the budget takes, 0 for none: as long as `within` says that the budget bears
    so many. Raises SearchError where it bears no step at all."""
    ends = dict.fromkeys(members, 0)
    for name in order(members):
        longer = {**ends, name: ends[name] + 1}
        if not within(longer):
            break
        ends = longer
    if not any(ends.values()):
        raise SearchError("no part of these encoders is as small as what is to be removed: ask for more")
    return ends


def at_sparsity(members: Mapping[str, Member], sparsity: float) -> dict[str, int]:
    """The steps that stay at or below a share of all encoders' parameters. Raises SearchError."""
    total = sum(member.shape.total for member in members.values())
    return ends_at(
        members, lambda ends: sum(members[n].removed(end) for n, end in ends.items()) <= sparsity * total + 1e-6
    )


def at_bytes(members: Mapping[str, Member], limit: float, rank: int) -> dict[str, int]:
    """The least steps that bring all encoders together to so many bytes. Raises SearchError where none do, or none is
    needed."""

    def size(ends: Mapping[str, int]) -> float:
        return sum(members[name].bytes_left(end, rank) for name, end in ends.items())

    ends = dict.fromkeys(members, 0)
    if size(ends) <= limit:
        raise SearchError(
            f"these encoders take {size(ends) / 1e9:.2f} GB as they are, no more than the {limit / 1e9:.2f} GB asked"
            " for: nothing to remove"
        )
    for name in order(members):
        ends[name] += 1
        if size(ends) <= limit:
            return ends
    raise SearchError(
        f"{limit / 1e9:.2f} GB can't be reached: with nothing left in their blocks these encoders take"
        f" {size(ends) / 1e9:.2f} GB; ask for more, or load files of lower precision"
    )
