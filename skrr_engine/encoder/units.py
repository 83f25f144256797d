"""Units: what a sub-block is made of and can be narrowed by.

A unit is a neuron of a feed-forward, or in attention a key/value head with the query heads that read it. A sub-block
is a sum over its units, taken by its out-projection: unit u owns some rows of every in-projection and the matching
columns of the out-projection, and no unit reads another. So a sub-block narrowed to some units is itself with those
rows and columns alone; no weight changes. Units are numbered as they lie in the weights.

`masked` runs a whole sub-block as if it were narrowed, `cut` makes the narrow one, whose weights are copies.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import families
from .row import Call, EncoderError, Row, describe
from .tree import fork, replace, shallow, share_weights

Cut = Callable[[nn.Module, torch.Tensor, int], "torch.Tensor | None"]
"""(projection, indices, dimension 0 or 1) -> those rows or columns of its weight, in its own form; None where they
can't be cut."""


@dataclass(frozen=True)
class Units:
    """A sub-block's units. count: how many; ins: path below the encoder -> in-projection; out: the out-projection, at
    out_path; heads: whether they are an attention's."""

    count: int
    ins: dict[str, nn.Module]
    out_path: str
    out: nn.Module
    heads: bool

    @property
    def inner(self) -> int:
        """Width of what the out-projection takes."""
        return columns_of(self.out)

    @property
    def size(self) -> int:
        """Columns of the out-projection for each unit."""
        return self.inner // self.count

    def columns(self, units: torch.Tensor) -> torch.Tensor:
        """The out-projection's columns of some units."""
        return spread(units, self.size)

    def mask(self, units: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`[inner]`, one at the columns of some units, zero elsewhere; of the kind of `like`."""
        found = torch.zeros(self.inner, dtype=like.dtype, device=like.device)
        found[self.columns(units).to(like.device)] = 1
        return found


def spread(units: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers of the rows or columns of some units, `size` for each, int64."""
    return (units.long().unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


def columns_of(layer: nn.Module) -> int:
    """How wide the states are that a linear layer takes; quantised weights report their logical shape."""
    width = getattr(layer, "in_features", None)
    return layer.weight.shape[1] if width is None else width


def rows_of(layer: nn.Module) -> int:
    """How wide the states are that a linear layer gives."""
    width = getattr(layer, "out_features", None)
    return layer.weight.shape[0] if width is None else width


def units_of(row: Row, place: int) -> Units:
    """The units of a sub-block. Raises EncoderError where it can't be narrowed."""
    family, sub_block = families.by_name(row.family), row.sub_blocks[place]
    ins, outs = {}, {}
    for path, part in sub_block.parts.items():
        for name, layer in part.named_modules(prefix=path):
            kind = name.rpartition(".")[2]
            if kind in family.ins:
                ins[name] = layer
            elif kind in family.outs:
                outs[name] = layer
    if len(outs) != 1 or not ins:
        raise EncoderError(f"{describe(place)} has no projections that Skrr knows, so it can't be narrowed")
    ((out_path, out),) = outs.items()
    if sub_block.is_attention:
        attention = next(m for p in sub_block.parts.values() for m in p.modules() if out in m.children())
        count = family.heads(attention)
    else:
        count = columns_of(out)
    if count < 1 or any(rows_of(layer) % count for layer in ins.values()) or columns_of(out) % count:
        raise EncoderError(f"{describe(place)} has projections that its {count} heads don't divide: not narrowed")
    return Units(count, ins, out_path, out, sub_block.is_attention)


@contextlib.contextmanager
def reading(out: nn.Module, seen: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """While it lasts, `seen` is called with what the out-projection takes `[batch, tokens, inner]`; what it returns, if
    anything, goes in instead."""

    def before(module, args):
        given = seen(args[0])
        return None if given is None else (given, *args[1:])

    handle = out.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def masked(row: Row, place: int, units: torch.Tensor, x: torch.Tensor, call: Call) -> torch.Tensor:
    """The stream behind a sub-block of which only some units act, `[batch, tokens, width]`; its weights stay whole."""
    own = units_of(row, place)
    with reading(own.out, lambda hidden: hidden * own.mask(units, hidden)):
        return row.sub_blocks[place].apply(x, call)


def refitted(
    row: Row, place: int, units: torch.Tensor, out: torch.Tensor, x: torch.Tensor, call: Call
) -> torch.Tensor:  # fmt: skip
    """The same with another out-projection `[width, columns of the units]` in place of what is left of its own."""
    own = units_of(row, place)
    hidden, _ = activations(row, place, x, call)
    bias = getattr(own.out, "bias", None)
    made = hidden.index_select(-1, own.columns(units).to(hidden.device)) @ out.to(hidden).T
    return row.sub_blocks[place].finish(x, made if bias is None else made + bias.to(made))


def activations(row: Row, place: int, x: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sub-block's out-projection takes, `[batch, tokens, inner]`, and the stream behind the sub-block."""
    found = []
    with reading(units_of(row, place).out, lambda hidden: found.append(hidden.clone())):
        behind = row.sub_blocks[place].apply(x, call)
    return found[0], behind


def out_weight(out: nn.Module) -> torch.Tensor:
    """What an out-projection multiplies with, float32 `[width, inner]`, however it is stored (patches included)."""
    weight = getattr(out, "weight", None)
    plain = type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in (torch.float32, torch.float64)
    if plain and weight.ndim == 2 and type(out) is nn.Linear:
        return weight.detach().float()
    device = weight.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = out(torch.eye(columns_of(out), dtype=dtype, device=device).unsqueeze(0))[0].float()
    bias = getattr(out, "bias", None)
    return (found if bias is None else found - bias.to(found)).T


def index_cut(weight: torch.Tensor, indices: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """Rows or columns of a plain tensor, of any type of whole bytes; None for any other kind of tensor."""
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return None
    indices = indices.to(weight.device)
    if weight.device.type != "meta" and weight.itemsize == 1 and weight.dtype.is_floating_point:
        return weight.detach().view(torch.uint8).index_select(dimension, indices).view(weight.dtype)
    return weight.detach().index_select(dimension, indices)


@dataclass
class Take:
    """Some features of a state, `[..., width]` to `[..., n]`."""

    index: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.index.device != x.device:  # it moves once
            self.index = self.index.to(x.device)
        return x.index_select(-1, self.index)


@dataclass
class Put:
    """Features at their places among `width`, the others zero: `[..., n]` to `[..., width]`."""

    index: torch.Tensor
    width: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.index.device != x.device:
            self.index = self.index.to(x.device)
        return x.new_zeros((*x.shape[:-1], self.width)).index_copy_(-1, self.index, x)


@dataclass(frozen=True)
class Build:
    """How the modules of placeholders are made. linear: class of a stand-in's layers, called as `torch.nn.Linear` is;
    cut: see Cut; bias: likewise of a bias's rows; rounded: (tensor, dtype, seed) -> a patched weight as it is stored;
    cleaned: called with the copy of a layer that is to be narrowed, to take off what a host had put on the original."""

    linear: Callable[..., nn.Linear]
    cut: Cut
    bias: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None] = lambda bias, index: index_cut(bias, index, 0)
    rounded: Callable[[torch.Tensor, torch.dtype, int | None], torch.Tensor] = lambda tensor, dtype, seed: tensor.to(
        dtype
    )
    cleaned: Callable[[nn.Module], None] = lambda layer: None


def plain_cut(layer: nn.Module, index: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """A plain weight's rows or columns; see Cut."""
    return index_cut(layer.weight, index, dimension)


class NarrowLayer:
    """Mixed into the class of a projection of which only some rows or columns are left.

    skrr_before, skrr_after: what is done to its input and output. Where a projection into heads has lost some, their
    outputs are filled up with zeros, which attention hands on as zeros: so attention itself, its norms, its rotary
    tables and the position bias stay as they are. skrr_dimension: 0 where rows are left, 1 where columns are;
    skrr_index: which; skrr_full: how many there were.
    """

    skrr_before: tuple[Take | Put, ...]
    skrr_after: tuple[Take | Put, ...]
    skrr_dimension: int
    skrr_index: torch.Tensor
    skrr_full: int
    skrr_build: Build

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        for step in self.skrr_before:
            x = step(x)
        x = super().forward(x, *args, **kwargs)
        for step in self.skrr_after:
            x = step(x)
        return x

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **kwargs) -> torch.Tensor:
        """For whoever patches the weight (LoRA): at its full size, the missing rows or columns zero."""
        base = getattr(super(), "convert_weight", None)
        return self._grown(weight if base is None else base(weight, inplace=inplace, **kwargs), self.skrr_dimension)

    def convert_bias(self, bias: torch.Tensor, inplace: bool = False, **kwargs) -> torch.Tensor:
        """The same for the bias, which goes with the rows."""
        return self._grown(bias, 0 if self.skrr_dimension == 0 else None)

    def _grown(self, tensor: torch.Tensor, dimension: int | None) -> torch.Tensor:
        if dimension is None:
            return tensor
        shape = list(tensor.shape)
        shape[dimension] = self.skrr_full
        return tensor.new_zeros(shape).index_copy_(dimension, self.skrr_index.to(tensor.device), tensor)

    def set_weight(self, weight: torch.Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """A weight that was patched at its full size, cut again."""
        weight = weight.index_select(self.skrr_dimension, self.skrr_index.to(weight.device))
        base = getattr(super(), "set_weight", None)
        if base is None:
            return self._set("weight", weight, inplace_update, seed, return_weight)
        return base(weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight, **kwargs)

    def set_bias(self, bias: torch.Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """The same for the bias."""
        if self.skrr_dimension == 0:
            bias = bias.index_select(0, self.skrr_index.to(bias.device))
        return self._set("bias", bias, inplace_update, seed, return_weight)

    def _set(self, name: str, tensor: torch.Tensor, inplace_update: bool, seed: int | None, return_weight: bool):
        own = getattr(self, name)
        tensor = self.skrr_build.rounded(tensor, own.dtype, seed)
        if return_weight:
            return tensor
        if inplace_update:
            own.data.copy_(tensor)
        else:
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        return None


class PartLayer(nn.Module):
    """In place of a projection whose weight can't be cut: it stays whole, shared, and some of its features are used.

    layer: the projection; before, after: what is done to its input and output. Whatever else is asked of this module,
    or put onto it, is the projection's: a host patches and moves that, under this module's name.
    """

    def __init__(self, layer: nn.Module, before: tuple[Take | Put, ...] = (), after: tuple[Take | Put, ...] = ()):
        super().__init__()
        share_weights(self, layer)
        self.__dict__.update(layer=layer, before=before, after=after)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        for step in self.before:
            x = step(x)
        x = self.layer(x, *args, **kwargs)
        for step in self.after:
            x = step(x)
        return x

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)

    def __setattr__(self, name: str, value) -> None:
        layer = self.__dict__.get("layer")
        super().__setattr__(name, value) if layer is None else setattr(layer, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.layer, name)

    def extra_repr(self) -> str:
        return "used in part"


@functools.cache
def narrow_class(base: type) -> type:
    """`base`, a class of linear layers, with NarrowLayer's ways."""
    return base if issubclass(base, NarrowLayer) else type(f"Narrow{base.__name__}", (NarrowLayer, base), {})


def narrow_layer(layer: nn.Module, own: Units, units: torch.Tensor, is_out: bool, build: Build) -> nn.Module:
    """A copy of one of a sub-block's projections with the weights of some units alone; the layer itself stays. Where
    `build.cut` can't cut its weight, the layer is used in part."""
    full = columns_of(layer) if is_out else rows_of(layer)
    index = spread(units.cpu(), full // own.count)
    weight = getattr(layer, "weight", None)
    bias = None if is_out else getattr(layer, "bias", None)
    cut = build.cut(layer, index, 1 if is_out else 0)
    cut_bias = None if bias is None else build.bias(bias, index)
    if cut is None or (bias is not None and cut_bias is None):
        if is_out:
            return PartLayer(layer, before=(*((Take(index),) if own.heads else ()), Put(index, full)))
        return PartLayer(layer, after=() if own.heads else (Take(index),))
    twin = shallow(layer)
    twin.__class__ = narrow_class(type(layer))
    build.cleaned(twin)
    if weight is not None:
        twin.weight = nn.Parameter(cut, requires_grad=False)
    if cut_bias is not None:
        twin.bias = nn.Parameter(cut_bias, requires_grad=False)
    twin.skrr_dimension, twin.skrr_index, twin.skrr_full = 1 if is_out else 0, index, full
    twin.skrr_before = (Take(index),) if is_out and own.heads else ()
    twin.skrr_after = (Put(index, full),) if own.heads and not is_out else ()
    twin.skrr_build = build
    if hasattr(layer, "in_features" if is_out else "out_features"):
        setattr(twin, "in_features" if is_out else "out_features", len(index))
    return twin


def cut(
    row: Row,
    place: int,
    units: torch.Tensor,
    build: Build,
    out: torch.Tensor | None = None,
) -> dict[str, nn.Module]:
    """Path -> a copy of each part of a sub-block that holds projections, with the weights of some units alone; what is
    not a projection is shared with the sub-block. out: what the out-projection's columns are to be instead, None where
    they stay."""
    own = units_of(row, place)
    layers = {**own.ins, own.out_path: own.out}
    found = {}
    for path, part in row.sub_blocks[place].parts.items():
        inside = [name for name in layers if name.startswith(f"{path}.")]
        if not inside:
            continue
        twin = fork(part, [name.removeprefix(f"{path}.") for name in inside])
        for name in inside:
            narrow = narrow_layer(layers[name], own, units, name == own.out_path, build)
            if out is not None and name == own.out_path and isinstance(narrow, NarrowLayer):
                narrow.weight = nn.Parameter(out.to(narrow.weight), requires_grad=False)
            replace(twin, name.removeprefix(f"{path}."), narrow)
        shared = set(part.modules())
        for module in twin.modules():
            if module not in shared:  # a host may have put another's forward there for now
                vars(module).pop("forward", None)
        found[path] = twin
    return found
