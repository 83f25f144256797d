"""A level of a plan put into an encoder: placeholders in place of its removed and narrowed sub-blocks. Only linear
stand-ins, and the copies of what is left of narrowed sub-blocks, have parameters.

Rewiring happens in place, on a module tree that the caller owns, at the original indices. Nothing that stays is copied,
renumbered or edited, so quantised weights, LoRA keys and layer taps keep working. `tree.fork` makes an owned tree of an
encoder that someone else owns.
"""

from collections.abc import Mapping

from torch import nn

from .actions import Assignment
from .row import Row
from .standin import Linear
from .tree import replace
from .units import Build, plain_cut

BUILD = Build(Linear, plain_cut)
"""With plain torch."""


def rewire(encoder: nn.Module, row: Row, removed: Assignment, build: Build = BUILD) -> dict[str, nn.Module]:
    """Put placeholders in place of the removed sub-blocks of `encoder` (whose row is `row`), in place.

    build: how what is put in is made. Returns path -> module that stood there; give it to `undo` to have
    the encoder as it was.
    """
    replaced = {}
    for place, action in removed.items():
        for path, placeholder in action.placeholders(row, place, build).items():
            replaced[path] = replace(encoder, path, placeholder)
    return replaced


def undo(encoder: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Put back what `rewire` replaced."""
    for path, module in replaced.items():
        replace(encoder, path, module)
