"""The module tree of a derived CLIP: containers of its own, leaves shared with the dense one, and what is left of
narrowed parts beside them."""

from collections.abc import Callable, Mapping

import comfy.utils
from torch import nn

from ....skrr_engine.encoder.rewire import rewire
from ....skrr_engine.encoder.tree import fork
from .cut import building
from .views import Pruned, View


def make_tree(
    patcher, known: Mapping[str, View], pruned: Mapping[str, Pruned]
) -> tuple[nn.Module, dict[str, Callable]]:
    """A fork of a patcher's model, a cond_stage_model, with these encoders pruned, and path of a `forward` below it ->
    the placeholder's, for all that was left out. Encoders that were loaded pruned are as they should be."""
    dense = patcher.model
    fresh = {name: entry for name, entry in pruned.items() if entry.shape is None}
    paths = [known[name].prefix + path for name in fresh for s in known[name].row.sub_blocks for path in s.parts]
    tree = fork(dense, [*paths, *(f"{view.prefix}x" for view in known.values())])
    patched = {id(comfy.utils.get_attr(dense, key)): own.weight for key, own in patcher.backup.items()}
    build = building(patcher.offload_device, patched)
    forwards = {}
    for name, entry in fresh.items():
        view = known[name]
        for path in rewire(tree.get_submodule(view.path).transformer, view.row, entry.removed, build):
            forwards[f"{view.prefix}{path}.forward"] = tree.get_submodule(view.prefix + path).forward
    return tree, forwards
