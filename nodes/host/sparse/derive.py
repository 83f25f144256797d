"""A MODEL or a CLIP with the smallest of its weights gone, and the others packed."""

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn

from ....skrr_engine.encoder.standin import StandInModule
from ....skrr_engine.weights.prune import prunable, sparsify
from ....skrr_engine.weights.statistics import Pair, Statistics
from ....skrr_engine.weights.tensor import smaller
from ..clip.cut import requantising
from ..clip.guard import guard
from ..clip.views import ATTACHMENT, Pruned, pruning, seen
from .own import own_patcher, own_tree


def own_model(model):
    """A MODEL of our own, dense as yet; `model` stays as it is."""
    return own_patcher(model, own_tree(model, model.model))


def own_clip(clip):
    """A CLIP of our own, dense as yet, without what a plan has left out; `clip` stays as it is. No other plan can be
    put onto what a plan has left something out of."""
    found = clip.clone()
    tree = own_tree(clip.patcher, clip.cond_stage_model)
    found.patcher = own_patcher(clip.patcher, tree)
    found.cond_stage_model = tree
    known, pruned = seen(clip)[0], pruning(clip)
    record = {name: carried(entry, known[name]) for name, entry in pruned.items() if name in known}
    found.patcher.set_attachments(ATTACHMENT, record)
    if record:
        guard(tree, known, record)
    return found


def carried(entry: Pruned, view) -> Pruned:
    """What is left out of an encoder, of a tree that has nothing else in it."""
    return dataclasses.replace(entry, shape=view.shape if entry.removed else entry.shape, file=None)


def pairs_of(tree: nn.Module, exclude: Sequence[str] = ()) -> list[Pair]:
    """The layers of a tree that may lose weights, with their names; see `prunable`. Stand-ins stay: they are small, and
    make up for what is gone already."""
    own = [name for name, module in tree.named_modules() if isinstance(module, StandInModule)]
    return prunable(tree, [*exclude, *(f"{name}.*" for name in own)])


def pack_weights(
    pairs: Sequence[Pair], sparsity: float, method: str, statistics: Statistics | None, tick: Callable[[float], None]
) -> None:
    """Prune the weights of these layers, in place, and pack those that are smaller so. tick: told the share that is
    done. Raises SkrrError; some are pruned then."""
    layers = dict(pairs)
    for done, (name, weight) in enumerate(sparsify(pairs, sparsity, method, statistics=statistics)):
        tick(done / len(layers))
        put(layers[name], weight)
    tick(1.0)


def put(layer: nn.Module, numbers) -> None:
    """Give a layer other numbers, in the form that its weight has; packed where that is smaller."""
    wrap = requantising(layer.weight) if hasattr(layer.weight, "_qdata") else None
    layer.weight = nn.Parameter(smaller(numbers, layer.weight, wrap), requires_grad=False)
