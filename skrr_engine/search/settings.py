"""What a search is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..encoder.row import Numbers
from ..errors import SearchError
from ..measure.elimination import ROUNDING
from ..plan.model import EncoderPlan


@dataclass(frozen=True)
class Settings:
    """What a search is asked for. sparsity: target, as a fraction of all encoder parameters; levels: further
    sparsities to give re-use maps for; beam: width k; reuse: whether algorithm 2 runs; delta: about how likely a step
    may lose one of its best candidates (measure/elimination.py), and how likely a level's re-use map has a mistake; 0
    for the exact search. For widths: further, more sparsities that levels are fitted for, as far as they can be
    reached; at_least: whether levels remove as much as asked or a little more, rather than a little less."""

    sparsity: float = 0.42
    levels: tuple[float, ...] = ()
    beam: int = 3
    reuse: bool = True
    delta: float = 0.05
    further: tuple[float, ...] = ()
    at_least: bool = False

    def __post_init__(self):
        for value in (self.sparsity, *self.levels, *self.further):
            if not 0 < value < 1:
                raise SearchError(f"a sparsity of {value} makes no sense: give a fraction between 0 and 1, like 0.42")
        if max(self.levels, default=0) > self.sparsity:
            raise SearchError(
                f"level {max(self.levels)} is above the target sparsity {self.sparsity}: raise the target or drop it"
            )
        if not 1 <= self.beam <= 64:
            raise SearchError(f"a beam of {self.beam} makes no sense: use 1 to 64 (the paper uses 3)")
        if not 0 <= self.delta < 0.5:
            raise SearchError(f"a delta of {self.delta} makes no sense: use 0 (exact) to 0.5, like 0.05")

    def reuse_delta(self, skipped: int) -> float:
        """How likely each of a level's re-uses may be a mistake. They are few candidates each, but unlike a beam's list
        nothing makes up for a wrong one."""
        return self.delta / max(1, skipped)

    @property
    def targets(self) -> list[float]:
        """The sparsities that levels are wanted for, rising."""
        return sorted({*self.levels, self.sparsity})

    @property
    def rounding(self) -> float:
        """How far apart equal discrepancies may be, beside them."""
        return ROUNDING if self.delta else 0.0


def sizes_of(entry: EncoderPlan, more: Iterable[float] = ()) -> Settings:
    """Asking, for widths, for the sizes that a plan's levels have, and more."""
    *further, largest = sorted({*(level.sparsity for level in entry.levels), *more})
    return Settings(largest, further=tuple(further))


def sparsity_for(limit: float, numbers: Numbers, rank: int = 0) -> float:
    """The sparsity that brings an encoder to `limit` bytes, stand-ins of a rank (0: none) at all its places included;
    its sub-blocks may be of another precision than the rest. Raises SearchError where none does, or none is needed."""
    dense, blocks = numbers.total_bytes, sum(numbers.sub_block_bytes)
    if limit >= dense:
        raise SearchError(
            f"the encoder takes {dense / 1e9:.2f} GB as it is, no more than the {limit / 1e9:.2f} GB asked for: ask for"
            " less, or leave it whole"
        )
    standins = len(numbers.sub_block_bytes) * 4 * numbers.width * (rank + 1) if rank else 0
    gone = dense - limit + standins
    if gone >= blocks:
        least = (dense - blocks + standins) / 1e9
        raise SearchError(
            f"{limit / 1e9:.3g} GB can't be reached: without all its blocks this encoder takes {least:.2f} GB; ask for"
            " more than that"
        )
    return gone / blocks * sum(numbers.parameter_counts) / numbers.total
