"""A level of a plan put into an encoder: placeholders in place of its skipped sub-blocks, without parameters of their
own but for those of linear stand-ins.

Rewiring happens in place, on a module tree that the caller owns, at the original indices. Nothing is copied,
renumbered or edited, so quantised weights, LoRA keys and layer taps keep working. `fork` makes an owned tree of an
encoder that someone else owns.
"""

import copy
from collections.abc import Iterable, Mapping

from torch import nn

from .actions import Assignment, Layer
from .row import Row
from .standin import Linear


def fork(root: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A second module tree, whose modules above each of `paths` are shallow copies and whose others are shared.

    Replacing the modules at `paths` in the fork leaves `root` as it is; parameters stay the very same objects.
    """
    copies: dict[str, nn.Module] = {"": shallow(root)}
    for path in paths:
        names = path.split(".")
        for depth in range(1, len(names)):
            prefix = ".".join(names[:depth])
            if prefix not in copies:
                parent = copies[".".join(names[: depth - 1])]
                copies[prefix] = parent._modules[names[depth - 1]] = shallow(parent._modules[names[depth - 1]])
    return copies[""]


def shallow(module: nn.Module) -> nn.Module:
    """A module of its own that shares its children, parameters and buffers with `module`. Its methods are its own, too:
    a host that has patched one of them and put it back leaves it on the module, bound to that."""
    twin = copy.copy(module)
    for name in [name for name, value in vars(module).items() if getattr(value, "__self__", None) is module]:
        del twin.__dict__[name]
    for registry in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[registry] = module.__dict__[registry].copy()
    return twin


def rewire(encoder: nn.Module, row: Row, removed: Assignment, linear: Layer = Linear) -> dict[str, nn.Module]:
    """Put placeholders in place of the removed sub-blocks of `encoder` (whose row is `row`), in place.

    linear: class of the layers of what is put in. Returns path -> module that stood there; give it to `undo` to have
    the encoder as it was.
    """
    replaced = {}
    for place, action in removed.items():
        for path, placeholder in action.placeholders(row, place, linear).items():
            replaced[path] = replace(encoder, path, placeholder)
    return replaced


def undo(encoder: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Put back what `rewire` replaced."""
    for path, module in replaced.items():
        replace(encoder, path, module)


def replace(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Set the module at `path` below `root`; returns the one that stood there."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    old = parent._modules[name]
    parent._modules[name] = module
    return old
