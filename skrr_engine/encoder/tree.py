"""Module trees: copies that share their leaves, and modules replaced by path."""

import copy
from collections.abc import Iterable

from torch import nn


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


def share_weights(module: nn.Module, other: nn.Module) -> None:
    """Let a module have another's registries of parameters, buffers and children, not copies: whoever replaces one of
    them in either replaces it in both."""
    for registry in ("_parameters", "_buffers", "_modules"):
        module.__dict__[registry] = other.__dict__[registry]


def replace(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Set the module at `path` below `root`; returns the one that stood there."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    old = parent._modules[name]
    parent._modules[name] = module
    return old
