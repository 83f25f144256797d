"""Other ways to choose what is removed, to compare with: each gives an order of sub-blocks, for a plan like Skrr's.

- random: sub-blocks in a seeded order.
- shortgpt: whole blocks, ordered once by block influence, 1 - mean cosine(block input, block output), lowest first.
- finercut: sub-blocks, greedy, measured anew at every step by the angle of the output: no projection, no null prompt,
  no re-use.

LaCo merges the weights of following blocks, which no plan can hold: `laco` changes an encoder instead.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import torch

from ..encoder.actions import assignment
from ..encoder.row import Row
from ..measure.discrepancy import COSINE, Criterion
from ..measure.meter import Meter
from ..measure.sums import double
from ..plan.model import EncoderPlan
from . import run as search
from . import skip
from .entry import entry_of, level_of

ANGLE_OF_OUTPUT = Criterion(COSINE.errors, COSINE.elementwise, null=0.0)
"""FinerCut's criterion, for a Meter without a projection."""


def random_order(meter: Meter, seed: int = 0) -> list[int]:
    """All sub-blocks in a seeded order."""
    order = list(range(meter.readable()))
    random.Random(seed).shuffle(order)
    return order


def block_influence(meter: Meter) -> list[float]:
    """Of each block, 1 - mean cosine between what goes in and what comes out, over the calibration prompts' tokens.
    Processes of one team may round differently: they take each other's numbers."""
    row = meter.row
    sums, tokens = torch.zeros(row.blocks, dtype=torch.float64), 0
    for trace in meter.calibration.traces():
        x = trace.x
        tokens += x.shape[0] * x.shape[1]
        for block in range(row.blocks):
            before = x
            for index in (2 * block, 2 * block + 1):
                x = row.sub_blocks[index].apply(x, trace.calls[index])
            sums[block] += torch.cosine_similarity(double(before), double(x), dim=-1).sum().cpu()
    influence = (1 - sums / tokens).unsqueeze(1).numpy()
    return meter.team.shared(range(row.blocks), lambda own: influence[list(own)])[:, 0].tolist()


def shortgpt_order(meter: Meter) -> list[int]:
    """Blocks of least influence first, attention and feed-forward of each together."""
    influence = block_influence(meter)[: meter.readable() // 2]
    blocks = sorted(range(len(influence)), key=lambda block: (influence[block], block))
    return [index for block in blocks for index in (2 * block, 2 * block + 1)]


def finercut_order(meter: Meter, target: float, *watch, beam: Sequence[skip.SkipList] = ()) -> list[int]:
    """Greedy removals up to a sparsity. meter: with ANGLE_OF_OUTPUT and no projection; watch, beam: `report` and `save`
    of search.search, and where to go on from."""
    settings = search.Settings(sparsity=target, beam=1, reuse=False, delta=0.0)
    return list(search.search(meter, settings, *watch, beam=beam).order)


def plan_of(meter: Meter, order: Sequence[int], targets: Sequence[float], method: str) -> EncoderPlan:
    """An order as an encoder's entry of a plan: a level for each target, with its discrepancy by `meter`."""
    row = meter.row
    costs = row.parameter_counts
    ends = sorted({skip.reaching(order, costs, row.total, target) for target in targets})
    short = row.sparsity(order[: ends[-1]])
    if short < max(targets):
        raise skip.SearchError(
            f"a sparsity of {max(targets):.0%} can't be reached: removing everything comes to {short:.1%}; ask for less"
        )
    found = meter.measure([assignment(order[:end]) for end in ends])
    levels = [level_of(row, end, order[:end], d.finite) for end, d in zip(ends, found, strict=True)]
    return entry_of(row, levels, order, {"mode": method})


def laco(
    row: Row, similarity: Callable[[list[int]], float], target: float, span: int = 4, least: float = 0.9, low: int = 0,
    gap: int = 1,
) -> list[int]:  # fmt: skip
    """LaCo, in place: returns the sub-blocks of the blocks merged away, for the caller to skip.

    row: of an encoder that the caller owns; its kept blocks' weights change. similarity: mean cosine of the output to
    the dense encoder's, with these sub-blocks skipped and the weights as they are at the call. From the last blocks on:
    the up to `span - 1` blocks behind block l are merged into it, `theta_l + sum_m (theta_(l+m) - theta_l)`, where the
    output stays at least `least` similar; else l goes on to the block before. Ends at the target sparsity, or below
    block `low`. gap: how many blocks l goes down after a merge.
    """
    removed: list[int] = []
    block = row.blocks - span
    while block >= low and row.sparsity(removed) < target:
        behind = [b for b in range(block + 1, row.blocks) if 2 * b not in removed][: span - 1]
        before = [(tensor, tensor.detach().clone()) for tensor in floats(row, block)]
        gone = [*removed, *(index for b in behind for index in (2 * b, 2 * b + 1))]
        merge(row, block, behind)
        if behind and similarity(gone) >= least:
            removed = gone
            block -= gap
        else:
            for tensor, value in before:
                tensor.data.copy_(value)
            block -= 1
    return removed


def floats(row: Row, block: int) -> Iterator[torch.Tensor]:
    """A block's floating-point tensors, in the same order for every block."""
    for index in (2 * block, 2 * block + 1):
        yield from (tensor for tensor in row.sub_blocks[index].tensors().values() if tensor.is_floating_point())


def merge(row: Row, block: int, behind: Sequence[int]) -> None:
    """Put `theta_l + sum_m (theta_(l+m) - theta_l)` in place of each tensor of block l."""
    for tensor, *others in zip(floats(row, block), *(floats(row, b) for b in behind), strict=True):
        tensor.data.copy_(tensor + sum((other - tensor for other in others), torch.zeros_like(tensor)))
