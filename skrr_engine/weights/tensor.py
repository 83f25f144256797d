"""A packed weight as a tensor: it has the dense one's shape, type and device, and is unpacked where it is used.

A module's weight can be one, whatever the module: linear layers and convolutions of any class run on it. Whoever looks
at it, moves it or asks for its bytes meets what is packed; whoever computes with it, or asks for it in a type (`to`
with a dtype), meets the dense weight, which is made on the device where it lies and is gone after that.
"""

from collections.abc import Callable, Iterable

import torch
from torch.utils._pytree import tree_map

from .packed import Packed, pack, pays

ATEN = torch.ops.aten
SAME = {ATEN.detach.default, ATEN.alias.default, ATEN.lift_fresh.default}
LIKE = {
    ATEN.empty_like.default, ATEN.zeros_like.default, ATEN.ones_like.default, ATEN.full_like.default,
    ATEN.rand_like.default, ATEN.randn_like.default,
}  # fmt: skip
"""What looks only at a tensor's shape."""

Step = Callable[[torch.Tensor], torch.Tensor]


class Held:
    """What a PackedWeight stands for. stored: Packed, or dense once it has been written to, None before its first
    bytes; wrap: what makes a weight of the numbers that are stored (a quantised tensor's scale); patch: what is done to
    the weight when it is used."""

    def __init__(self, stored: Packed | torch.Tensor | None, wrap: Step | None = None, patch: Step | None = None):
        self.stored, self.wrap, self.patch = stored, wrap, patch

    def dense(self, device: torch.device) -> torch.Tensor:
        """The weight on a device."""
        found = self.stored.unpack(device) if isinstance(self.stored, Packed) else self.stored.to(device)
        found = found if self.wrap is None else self.wrap(found)
        return found if self.patch is None else self.patch(found)

    def to(self, device: torch.device, **options) -> "Held":
        """The same on a device."""
        return Held(None if self.stored is None else self.stored.to(device, **options), self.wrap, self.patch)


class PackedWeight(torch.Tensor):
    """See the module. held: what it stands for, which all aliases (`detach`) share; seed: where this is a list, the
    weight is one to be loaded: tensors that it is copied into are noted there, and left as they are."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Held
    seed: list | None

    @staticmethod
    def __new__(cls, held: Held, shape=None, dtype: torch.dtype | None = None, device: torch.device | None = None):
        shape, dtype = shape or held.stored.shape, dtype or held.stored.dtype
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device or held.stored.device)
        made.held, made.seed = held, None
        return made

    @classmethod
    def of(cls, packed: Packed, like: torch.Tensor | None = None, wrap: Step | None = None) -> "PackedWeight":
        """A weight of what is packed. like: the weight whose numbers these are, where those are not the weight itself;
        wrap: makes such a one of its numbers."""
        return cls(Held(packed, wrap), packed.shape, packed.dtype if like is None else like.dtype)

    def __init__(self, *args, **kwargs):
        pass

    def __repr__(self, **kwargs) -> str:
        return f"PackedWeight({list(self.shape)}, {self.dtype}, {self.nbytes} of {self.dense_nbytes} bytes)"

    @property
    def packed(self) -> Packed | None:
        """What is stored, None where it has been written to."""
        return self.held.stored if isinstance(self.held.stored, Packed) else None

    def dense(self) -> torch.Tensor:
        """The dense weight, where this one lies."""
        if self.held.stored is None:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.held.dense(self.device)

    def patched(self, patch: Step) -> "PackedWeight":
        """The same weight, to which `patch` is done when it is used. Nothing else is done to it then."""
        return PackedWeight(Held(self.held.stored, self.held.wrap, patch), self.shape, self.dtype, self.device)

    def pristine(self) -> "PackedWeight":
        """The same weight without a patch."""
        return PackedWeight(Held(self.held.stored, self.held.wrap), self.shape, self.dtype, self.device)

    def cast(self, dtype: torch.dtype) -> "PackedWeight":
        """The same weight in another type, still packed; what becomes zero there keeps its place."""
        packed = self.packed
        if packed is None or dtype == self.dtype:
            return self.pristine()
        return PackedWeight.of(Packed(packed.values.to(dtype), packed.mask, packed.shape))

    # What hosts count and ask. The bytes are those that it takes.

    @property
    def nbytes(self) -> int:
        return self.nelement() * self.itemsize

    @property
    def dense_nbytes(self) -> int:
        """Bytes that it would take dense."""
        return self.numel() * self.itemsize

    def nelement(self) -> int:
        """As many elements as take its bytes; `numel` counts those of the dense weight."""
        stored = self.held.stored
        return self.numel() if stored is None else -(-stored.nbytes // self.itemsize)

    def is_contiguous(self, *args, **kwargs) -> bool:
        """Not: whoever wants its bytes in a row asks for `contiguous`, and gets the dense weight."""
        return False

    def contiguous(self, *args, **kwargs) -> torch.Tensor:
        return self.dense().contiguous()

    def is_pinned(self, *args) -> bool:
        return False

    def to(self, *args, **kwargs):
        """Packed on another device; dense where it is asked for in a type."""
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        device = self.device if device is None else device
        if dtype is not None:
            moved = self.held.to(device, non_blocking=non_blocking)
            return PackedWeight(moved, self.shape, self.dtype, device).dense().to(dtype)
        if device == self.device and not copy:
            return self
        return PackedWeight(self.held.to(device, non_blocking=non_blocking, copy=copy), self.shape, self.dtype, device)

    def cpu(self, *args) -> "PackedWeight":
        return self.to(torch.device("cpu"))

    def __tensor_flatten__(self):
        return [], (self.held, self.shape, self.dtype, self.device)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return PackedWeight(*context)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            if func in SAME:
                return cls(first.held, first.shape, first.dtype, first.device)
            if func is ATEN.clone.default:
                return cls(first.held.to(first.device, copy=True), first.shape, first.dtype, first.device)
            if func is ATEN._to_copy.default:
                named = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking") and v is not None}
                moved = first.to(**named, copy=True)
                return moved if kwargs.get("dtype") in (None, first.dtype) else moved.to(kwargs["dtype"])
            if func in LIKE:
                return like(func, first, args[1:], kwargs)
            if func is ATEN.copy_.default:
                return write(first, args[1])
        elif func is ATEN.copy_.default:
            return copy_onto(first, args[1], *args[2:], **kwargs)
        dense = tree_map(unpacked, (args, kwargs))
        out = func(*dense[0], **dense[1])
        if isinstance(first, cls) and func._schema.is_mutable:
            first.held.stored, first.held.wrap, first.held.patch = dense[0][0], None, None
            return first
        return out


def unpacked(value):
    """A value, dense where it is a packed weight."""
    return value.dense() if isinstance(value, PackedWeight) else value


def like(func, first: PackedWeight, args: tuple, kwargs: dict):
    """A new tensor of a weight's shape: to be filled with a packed one where no more than a device is asked for."""
    device = kwargs.get("device") or first.device
    if func is ATEN.empty_like.default and kwargs.get("dtype") is None:
        return PackedWeight(Held(None), first.shape, first.dtype, torch.device(device))
    return func(torch.empty((), dtype=first.dtype, device=first.device).expand(first.shape), *args, **kwargs)


def write(target: PackedWeight, source: torch.Tensor) -> PackedWeight:
    """Put other values into a weight: it stays packed where they are."""
    held = target.held
    if isinstance(source, PackedWeight) and source.dtype == target.dtype:
        found = source.held.to(target.device, copy=True)
        held.stored, held.wrap, held.patch = found.stored, found.wrap, found.patch
    else:
        values = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        held.stored, held.wrap, held.patch = values.copy_(source), None, None
    return target


def copy_onto(target: torch.Tensor, source: PackedWeight, *args, **kwargs) -> torch.Tensor:
    """Fill a dense tensor with a packed weight, which is moved to its device packed."""
    if source.seed is not None:
        source.seed.append(target)
        return target
    return target.copy_(source.to(target.device).dense(), *args, **kwargs)


def smaller(numbers: torch.Tensor, like: torch.Tensor | None = None, wrap: Step | None = None) -> torch.Tensor:
    """A weight in the form that takes fewer bytes in a file, packed or dense. like, wrap: see `PackedWeight.of`."""
    packed = pack(numbers)
    if pays(packed):
        return PackedWeight.of(packed, like, wrap)
    return numbers if wrap is None else wrap(numbers)


def planted(module: torch.nn.Module, seeds: Iterable[PackedWeight]) -> None:
    """Have packed weights in a module where others were to be written to: see PackedWeight. They take the type of what
    they stand for."""
    places = {id(tensor): seed for seed in seeds for tensor in seed.seed}
    for part in module.modules():
        for name, weight in part._parameters.items():
            seed = places.get(id(weight))
            if seed is not None:
                found = seed.cast(weight.dtype).to(weight.device)
                part._parameters[name] = torch.nn.Parameter(found, requires_grad=False)


def packed_weights(module: torch.nn.Module) -> dict[str, PackedWeight]:
    """Name -> packed weight, of all that are below a module."""
    return {name: weight for name, weight in module.named_parameters() if isinstance(weight, PackedWeight)}
