"""The module tree of a derived CLIP: containers of its own, leaves shared with the dense one."""

from collections.abc import Callable, Mapping

import comfy.ops
from torch import nn

from ....skrr_engine.encoder.rewire import rewire
from ....skrr_engine.encoder.tree import fork
from .views import Pruned, View

LINEAR = comfy.ops.manual_cast.Linear
"""Of what stand-ins are made: ComfyUI's layers, which work wherever their weights are, and in whatever type."""


def make_tree(
    dense: nn.Module, known: Mapping[str, View], pruned: Mapping[str, Pruned]
) -> tuple[nn.Module, dict[str, Callable]]:
    """A fork of a cond_stage_model with these encoders pruned, and path of a `forward` below it -> the placeholder's,
    for all that was left out. Encoders that were loaded pruned are as they should be."""
    fresh = {name: entry for name, entry in pruned.items() if entry.shape is None}
    paths = [known[name].prefix + path for name in fresh for s in known[name].row.sub_blocks for path in s.parts]
    tree = fork(dense, [*paths, *(f"{view.prefix}x" for view in known.values())])
    forwards = {}
    for name, entry in fresh.items():
        view = known[name]
        for path in rewire(tree.get_submodule(view.path).transformer, view.row, entry.removed, LINEAR):
            forwards[f"{view.prefix}{path}.forward"] = tree.get_submodule(view.prefix + path).forward
    return tree, forwards
