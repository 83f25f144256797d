"""A device without float64, as Metal is and Intel Arc, made of the CPU: tensors that say that they lie elsewhere."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

DEVICE = torch.device("meta")
MOVES = ("_to_copy", "copy_", "index")
"""Operations that take tensors of two devices."""


class Elsewhere(torch.Tensor):
    """A tensor on that device; inner: where it really lies."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        strides, offset = inner.stride(), inner.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides, offset, dtype=inner.dtype, device=DEVICE, requires_grad=False
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return act(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, the device is there to make tensors on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return act(func, args, kwargs or {})


def act(func, args, kwargs):
    """An operation, on the CPU in truth. Refuses float64 on the device, and tensors of both in one operation."""
    tensors = []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    here = [t for t in tensors if isinstance(t, Elsewhere)]
    asked = kwargs.get("device")
    name = func.__name__.partition(".")[0]
    if here and name not in MOVES and any(t.ndim for t in tensors if not isinstance(t, Elsewhere)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if name.endswith("_") and not name.startswith("_"):
        return args[0]
    if DEVICE != asked if asked is not None else not here:
        return out
    return tree_map_only(torch.Tensor, wrapped, out)


def inner(value):
    return value.inner if isinstance(value, Elsewhere) else value


def wrapped(t: torch.Tensor) -> Elsewhere:
    if t.dtype == torch.float64:
        raise TypeError("this device has no float64")
    return Elsewhere(t)


def move(module: nn.Module) -> nn.Module:
    """A module on that device, in place."""
    for part in module.modules():
        for key, t in part._parameters.items():
            if t is not None:
                part._parameters[key] = nn.Parameter(wrapped(t.detach()), requires_grad=False)
        for key, t in part._buffers.items():
            if t is not None:
                part._buffers[key] = wrapped(t.detach())
    return module
