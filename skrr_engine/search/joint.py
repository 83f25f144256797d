"""One budget over several encoders that a denoiser reads side by side: a byte goes where it costs least in any of them.

What is read of each encoder is another part of the conditioning (other tokens, other features, another vector), so the
discrepancy of all is a sum. Each part is taken beside the mean square of what it is when dense: an encoder whose
embeddings are large in numbers is not more important for that. Then the steps of all encoders, each bought at its own
price (see allocate.py), are one list in the order of that relative discrepancy for each byte of their files, and any
budget is a prefix of it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def prefixes(
    members: Mapping[str, Member], amount: Callable[[Member, int], float]
) -> Iterator[tuple[dict[str, int], float]]:  # fmt: skip
    """After no step, and after each in turn: encoder -> how many of its steps are taken, and the sum over encoders of
    `amount(member, steps)`."""
    ends = dict.fromkeys(members, 0)
    amounts = {name: amount(member, 0) for name, member in members.items()}
    yield ends, sum(amounts.values())
    for name in order(members):
        ends = {**ends, name: ends[name] + 1}
        amounts[name] = amount(members[name], ends[name])
        yield ends, sum(amounts.values())


def at_sparsity(members: Mapping[str, Member], sparsity: float) -> dict[str, int]:
    """Encoder -> how many of its steps stay at or below a share of all encoders' parameters, 0 for none. Raises
    SearchError where not even one does."""
    limit = sparsity * sum(member.shape.total for member in members.values()) + 1e-6
    within = itertools.takewhile(lambda step: step[1] <= limit, prefixes(members, Member.removed))
    ends = [ends for ends, _ in within][-1]
    if not any(ends.values()):
        raise SearchError("no part of these encoders is as small as what is to be removed: ask for more")
    return ends


def at_bytes(members: Mapping[str, Member], limit: float, rank: int) -> dict[str, int]:
    """The least steps that bring all encoders together to so many bytes. Raises SearchError where none do, or none is
    needed."""
    steps = prefixes(members, lambda member, end: member.bytes_left(end, rank))
    _, size = next(steps)
    if size <= limit:
        raise SearchError(
            f"these encoders take {size / 1e9:.2f} GB as they are, no more than the {limit / 1e9:.2f} GB asked"
            " for: nothing to remove"
        )
    for ends, size in steps:  # noqa: B007 - the last one is told
        if size <= limit:
            return ends
    raise SearchError(
        f"{limit / 1e9:.2f} GB can't be reached: with nothing left in their blocks these encoders take"
        f" {size / 1e9:.2f} GB; ask for more, or load files of lower precision"
    )
