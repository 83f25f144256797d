"""One-shot unstructured pruning of any model: which modules, which method, and their weights with zeros in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..errors import SkrrError, printable
from . import criteria, owl, sparsegpt
from .choose import lowest, lowest_of_rows
from .criteria import Criterion
from .statistics import Pair, Statistics
from .stored import stored

METHODS = ("magnitude", "wanda", "sparsegpt", "owl")
"""owl: Wanda's scores with OWL's shares of the layers."""
SCOPES = ("layer", "global")
CALIBRATED = frozenset(METHODS) - {"magnitude"}
"""The methods that need statistics; sparsegpt needs hessians in them."""


def prunable(root: nn.Module, exclude: Sequence[str] = ()) -> list[Pair]:
    """The modules whose weights may go, with their names, in the model's order: linear layers and convolutions, those
    of ComfyUI's operations, too. Embeddings (and what shares its weight with one), norms, biases and transposed
    convolutions stay.

    exclude: patterns of names that stay, as a shell has them (`*.proj_out`, `final_layer*`).
    """
    kept = {id(m.weight) for m in root.modules() if isinstance(m, nn.Embedding)}
    found = []
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        if not torch.is_tensor(weight) or weight.ndim < 2 or id(weight) in kept or not _linear(module):
            continue
        if not any(fnmatchcase(name, pattern) for pattern in exclude):
            kept.add(id(weight))  # the next one that shares it
            found.append((name, module))
    return found


def _linear(module: nn.Module) -> bool:
    """ComfyUI's linear layers of mixed precision are none of torch's."""
    own = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return own or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def sparsify(
    pairs: Sequence[Pair],
    sparsity: float,
    method: str = "magnitude",
    scope: str = "layer",
    statistics: Statistics | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The pruned weights, one at a time, each with its name: dense, of the stored type, exact zeros where pruned.

    pairs: see `prunable`; nothing in them is changed. sparsity: share of all their weights that are zero in the end,
    0 to below 1, to the very number (SparseGPT's new values may round to zero beyond that); weights that are zero
    already go first. method: one of METHODS. scope: `layer` takes that share of each module (Wanda: of each of its
    rows, as in its paper), `global` of all together, by one threshold (magnitude and wanda only; Wanda's scores are
    each in the units of a module's inputs). statistics: of calibration inputs, for all methods but magnitude. A scaled
    weight's numbers (fp8) come back in its own scale.

    Raises SkrrError at once for what can't be asked for, and on the way for a weight that has no zeros to give, one
    that is not all numbers, and one without statistics.
    """
    if method not in METHODS:
        raise SkrrError(f'method: there is no "{printable(str(method))}"; take one of {", ".join(METHODS)}')
    if scope not in SCOPES:
        raise SkrrError(f'scope: there is no "{printable(str(scope))}"; take one of {", ".join(SCOPES)}')
    if scope == "global" and method not in ("magnitude", "wanda"):
        raise SkrrError(f"scope: {method} has its own shares of the layers; take scope layer, or the method magnitude")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise SkrrError(f"sparsity: {printable(str(sparsity))} is no share; give a number from 0 to below 1")
    if method in CALIBRATED and statistics is None:
        raise SkrrError(f"method: {method} needs calibration inputs; give some, or take the method magnitude")
    return _sparsify(list(pairs), sparsity, method, scope, statistics)


def _sparsify(pairs: list[Pair], sparsity: float, method: str, scope: str, statistics: Statistics | None):
    if not pairs:
        return
    if method == "sparsegpt":
        yield from _by_sparsegpt(pairs, sparsity, statistics)
        return
    criterion = criteria.magnitude if method == "magnitude" else criteria.wanda
    scores = functools.partial(_scores, criterion, statistics=statistics)
    if scope == "global":
        total = sum(module.weight.numel() for _, module in pairs)
        masks = lowest(lambda: (scores(*pair) for pair in pairs), round(sparsity * total))
        for (name, module), gone in zip(pairs, masks, strict=True):
            yield name, stored(name, module).zeroed(gone)
        return
    counts = owl.counts(pairs, sparsity, statistics) if method == "owl" else {}
    choose: Callable = lowest_of_rows if method != "magnitude" else _lowest_of_all
    for name, module in pairs:
        count = counts.get(name, round(sparsity * module.weight.numel()))
        yield name, stored(name, module).zeroed(choose(scores(name, module), count))


def _by_sparsegpt(pairs: list[Pair], sparsity: float, statistics: Statistics):
    for name, module in pairs:
        own, count = stored(name, module), round(sparsity * module.weight.numel())
        values, hessian = _finite(name, own.values()), _finite(name, statistics.hessian(name))
        yield name, own.rounded(sparsegpt.pruned(values, hessian, count)) if count else own.data.clone()


def _scores(criterion: Criterion, name: str, module: nn.Module, statistics: Statistics | None) -> torch.Tensor:
    return _finite(name, criterion(name, module, statistics))


def _finite(name: str, found: torch.Tensor) -> torch.Tensor:
    if not bool(found.isfinite().all()):
        raise SkrrError(f"{printable(name)}: its weights or its inputs are not all numbers; get the file again")
    return found


def _lowest_of_all(scores: torch.Tensor, count: int) -> torch.Tensor:
    (gone,) = lowest(lambda: [scores], count)
    return gone
