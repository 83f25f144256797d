"""OWL: layers with more outliers among their scores keep more of their weights.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
arXiv 2310.05175, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import nn

from .criteria import wanda
from .statistics import Statistics

M, LAMBDA = 5.0, 0.08
"""A score is an outlier from M times its layer's mean on; how far a layer's sparsity may be from the whole one's."""


def layer(name: str) -> str:
    """The layer that a module belongs to: its name up to the first number (`layers.3.mlp.up_proj`: `layers.3`), which
    is a block of most models; a name without one is a layer of its own."""
    parts = name.split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[:end])


def outlier_ratios(
    pairs: Sequence[tuple[str, nn.Module]], statistics: Statistics, m: float = M
) -> dict[str, float]:  # fmt: skip
    """Layer -> the share of its scores A = |W| ||X|| above m times their mean (the paper's layerwise outlier
    distribution D)."""
    members: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in pairs:
        members.setdefault(layer(name), []).append((name, module))
    found = {}
    for own, inside in members.items():
        count = sum(module.weight.numel() for _, module in inside)
        mean = sum(float(wanda(*pair, statistics).double().sum()) for pair in inside) / count
        found[own] = sum(int((wanda(*pair, statistics) > m * mean).sum()) for pair in inside) / count
    return found


def counts(
    pairs: Sequence[tuple[str, nn.Module]],
    sparsity: float,
    statistics: Statistics,
    m: float = M,
    lamda: float = LAMBDA,
) -> dict[str, int]:
    """How many weights of each module go: `sparsity` of all of them together, to the number.

    As in the authors' code the layers' shares lie on a line in D that is 2 lamda long (shorter where a share would
    leave 0 to 1), here around the mean by weights, so that all together are what was asked for.
    """
    ratios = outlier_ratios(pairs, statistics, m)
    sizes = {name: module.weight.numel() for name, module in pairs}
    total = sum(sizes.values())
    mean = sum(ratios[layer(name)] * size for name, size in sizes.items()) / total
    above, below = max(ratios.values()) - mean, mean - min(ratios.values())
    rooms = [(2 * lamda, above + below), (sparsity, above), (1 - sparsity, below)]
    slope = min((room / length for room, length in rooms if length > 0), default=0.0)
    shares = accumulate((sparsity - slope * (ratios[layer(name)] - mean)) * size for name, size in sizes.items())
    ends = [round(share) for share in shares]
    ends[-1] = round(sparsity * total)
    return {name: end - start for name, start, end in zip(sizes, [0, *ends], ends, strict=False)}
