"""What the engine must know of an architecture, in one value that can't be half filled."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass

from torch import nn

from ..row import EncoderError, SubBlock


def _none_stays(block: int, rest: str, keys: Collection[str]) -> bool:
    return False


def _none_known(block: int, shape: Callable[[str], tuple[int, ...] | None]) -> int | None:
    return None


@dataclass(frozen=True)
class Family:
    """name: in plans. norm: what kind its norms are, a key of standin.NORMS.

    In modules. find_blocks: encoder -> (path, its list of blocks), None where it is none of this family; width: of a
    block's residual stream; sub_blocks: (blocks, path) -> attention and feed-forward of each block in turn; bodies:
    block -> the modules whose children and arguments must be known; children: names of theirs that may hold weights;
    arguments: that attention may take, in ComfyUI's classes. ins, outs: last names of the projections into a
    sub-block's units and out of them (see units.py), in modules and in files; heads: an attention module -> how many
    key/value heads it has.

    In files. file_key: names of a block's tensors, with the groups prefix, block, attention, feed_forward, rest, other;
    file_width: the ending of a tensor as long as the stream is wide; file_unused: what follows a prefix but no text
    encoder uses; stays: (block, rest, all names) -> whether a sub-block's tensor belongs to the whole encoder all the
    same; file_heads: (block, ending of a tensor's name -> its shape, None where there is none) -> how many key/value
    heads the block's attention has, None where its tensors don't tell.
    """

    name: str
    norm: str
    find_blocks: Callable[[nn.Module], tuple[str, nn.ModuleList] | None]
    width: Callable[[nn.Module], int]
    sub_blocks: Callable[[nn.ModuleList, str], Iterator[SubBlock]]
    bodies: Callable[[nn.Module], Iterator[nn.Module]]
    children: Set[str]
    attention: Callable[[nn.Module], nn.Module]
    arguments: Set[str]
    ins: Set[str]
    outs: Set[str]
    heads: Callable[[nn.Module], int]
    file_key: re.Pattern
    file_width: str
    file_unused: re.Pattern
    stays: Callable[[int, str, Collection[str]], bool] = _none_stays
    file_heads: Callable[[int, Callable[[str], tuple[int, ...] | None]], int | None] = _none_known

    def in_units(self, key: str) -> bool:
        """Whether a tensor of a sub-block, by its name, lies in its units: they own rows of what leads into them, and
        columns of what leads out."""
        *_, layer, kind = ("", *key.split("."))
        return (layer in self.ins and kind in ("weight", "bias")) or (layer in self.outs and kind == "weight")

    def check(self, encoder: nn.Module, blocks: nn.ModuleList) -> None:
        """Raises EncoderError where a block does more than this family's do: a walk over it would not be what it
        computes."""
        for number, block in enumerate(blocks):
            odd = self._odd(block)
            if odd:
                raise EncoderError(
                    f"{type(encoder).__name__} looks like a {self.name} encoder, but block {number} has {odd}, which"
                    " Skrr can't walk: it is left as it is"
                )

    def _odd(self, block: nn.Module) -> str:
        """What of a block is unknown, in a word or two; "" where nothing is."""
        for body in self.bodies(block):
            own = [name for name, _ in (*body.named_parameters(recurse=False), *body.named_buffers(recurse=False))]
            more = [name for name, child in body.named_children() if name not in self.children and weighs(child)]
            if own or more:
                return (own + more)[0]
        attention = self.attention(block)
        if type(attention).__module__.startswith("comfy."):
            taken = inspect.signature(attention.forward).parameters
            plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            unknown = [name for name, p in taken.items() if p.kind in plain and name not in self.arguments]
            if unknown:
                return f"an attention that takes {unknown[0]}"
        return ""


def weighs(module: nn.Module) -> bool:
    """Whether a module holds parameters or buffers."""
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
