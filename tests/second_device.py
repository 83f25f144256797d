"""A device that is not the CPU, for machines that have no other: tensors that say "meta" of themselves and hold their
values on the CPU. What mixes them with the CPU's fails as it would with CUDA.

    with SecondDevice() as device:
        device.take(module)     # its weights lie there now
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
"""Of all devices that torch knows without a driver, the one that nothing else here uses."""

DEVICE = torch.device(NAME)
ATEN = torch.ops.aten
MIXING = {
    ATEN._to_copy.default, ATEN.copy_.default, ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default,
    ATEN._index_put_impl_.default, ATEN._local_scalar_dense.default,
}  # fmt: skip
"""What may be given tensors of both: copies, and the CPU's indices."""


class Held(torch.Tensor):
    """A tensor on the second device; `values`: on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.values = values
        return made

    def __repr__(self, **_):
        return f"Held({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def values_of(x):
    return x.values if isinstance(x, Held) else x


def held(x):
    return Held(x) if isinstance(x, torch.Tensor) and not isinstance(x, Held) else x


def on_cpu(x):
    """What an operation is given in place of an argument."""
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else values_of(x)


def run(func, args, kwargs):
    """An operation on values; its result lies where its arguments do, or where it was asked to."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Held)]
    if ours and func not in MIXING and any(x.ndim for x in tensors if not isinstance(x, Held)):
        raise RuntimeError(f"{func}: expected all tensors to be on one device, found {DEVICE} and cpu")
    asked = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)), None)
    out = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    if func._schema.is_mutable:
        return args[0]
    return tree_map(held, out) if (bool(ours) if asked is None else asked.type == NAME) else out


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """What torch would not even begin with such a device: making tensors there, and products of vectors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, Held)]
        if ours and name in ("matmul", "__matmul__", "scaled_dot_product_attention"):
            if len(ours) < len(tensors):
                raise RuntimeError(f"{name}: expected all tensors to be on one device")
            with torch._C.DisableTorchFunction():
                return Held(func(*tree_map(values_of, args), **tree_map(values_of, kwargs)))
        if not any(self.names(x) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        plain = lambda x: torch.device("cpu") if self.names(x) else values_of(x)  # noqa: E731
        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        same = args and isinstance(args[0], Held) and out is args[0].values
        return args[0] if same else tree_map(held, out)

    @staticmethod
    def names(x) -> bool:
        return (isinstance(x, torch.device) and x.type == NAME) or (isinstance(x, str) and x == NAME)


class SecondDevice(contextlib.ExitStack):
    """While it is open, `DEVICE` can be used."""

    def __enter__(self):
        super().__enter__()
        autocast = torch.autocast
        self.callback(setattr, torch, "autocast", autocast)
        torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()  # it asks a driver
        self.enter_context(Calls())
        self.enter_context(Operations())
        return self

    @staticmethod
    def take(module: torch.nn.Module) -> torch.nn.Module:
        """Move a module there, in place."""
        moved: dict[int, torch.nn.Parameter] = {}
        for part in module.modules():
            for key, p in part._parameters.items():
                if p is not None:
                    made = moved.setdefault(id(p), torch.nn.Parameter(Held(p.detach()), requires_grad=False))
                    part._parameters[key] = made
            for key, buffer in part._buffers.items():
                part._buffers[key] = buffer if buffer is None else Held(buffer.detach())
        return module
