"""Rows and columns of weights as ComfyUI and its packs hold them: plain, quantised by layouts, or as in GGUF files."""

import dataclasses
from collections.abc import Collection, Mapping

import comfy.float
import comfy.ops
import torch
from torch import nn

from ....skrr_engine.encoder.units import Build, index_cut

LINEAR = comfy.ops.manual_cast.Linear
"""Of what stand-ins are made: ComfyUI's layers, which work wherever their weights are, and in whatever type."""

PUT_ON = (
    "weight_function", "bias_function", "comfy_patched_weights", "comfy_cast_weights", "prev_comfy_cast_weights",
)  # fmt: skip
"""What ComfyUI puts onto a layer while it is loaded."""

BLOCK = 32
"""Weights in a block of Q8_0."""


def building(device: torch.device, pristine: Mapping[int, torch.Tensor]) -> Build:
    """How narrow copies of layers that others own are made. device: where they lie; pristine: identity of a parameter
    that is patched at the moment -> the weight without the patches."""

    def unpatched(tensor: torch.Tensor) -> torch.Tensor:
        return pristine.get(id(tensor), tensor)

    def cut(layer: nn.Module, index: torch.Tensor, dimension: int) -> torch.Tensor | None:
        found = cut_weight(unpatched(layer.weight), index, dimension)
        return None if found is None else found.to(device)

    return Build(LINEAR, cut, lambda bias, index: index_cut(unpatched(bias), index, 0).to(device), rounded, cleaned)


def hollow(whole: Collection[int]) -> Build:
    """How narrow layers are made whose weights are yet to come. whole: identities of layers that are to stay whole."""

    def empty(tensor: torch.Tensor, index: torch.Tensor, dimension: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dimension] = len(index)
        return tensor.new_empty(shape)

    def cut(layer: nn.Module, index: torch.Tensor, dimension: int) -> torch.Tensor | None:
        if id(layer) in whole:
            return None
        weight = getattr(layer, "weight", None)
        return torch.empty(0) if weight is None else empty(weight, index, dimension)

    return Build(LINEAR, cut, lambda bias, index: empty(bias, index, 0), rounded, cleaned)


def cleaned(layer: nn.Module) -> None:
    """Take off what a loaded model's layer carries; class attributes say what holds otherwise."""
    for name in PUT_ON:
        vars(layer).pop(name, None)


def rounded(tensor: torch.Tensor, dtype: torch.dtype, seed: int | None) -> torch.Tensor:
    """A patched weight as ComfyUI stores it."""
    return comfy.float.stochastic_rounding(tensor, dtype, seed=0 if seed is None else seed)


def cut_weight(weight: torch.Tensor, index: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """Rows or columns of a weight in its own form; None where they can't be cut."""
    if hasattr(weight, "tensor_type"):
        return cut_gguf(weight, index, dimension)
    if hasattr(weight, "_qdata"):
        return cut_quantised(weight, index, dimension)
    return index_cut(weight, index, dimension)


def cut_quantised(weight, index: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """Of ComfyUI's QuantizedTensor: where it holds an element for each weight, and scales for all of them or for each
    row. Columns of int8 may have been rotated into each other: they stay."""
    data, rows = weight._qdata, weight.shape[0]
    if data.shape != weight.shape or (data.dtype == torch.int8 and dimension):
        return None
    params = getattr(weight, "_layout_params", None)
    named = () if params is not None else dataclasses.fields(weight._params)
    own = params if params is not None else {field.name: getattr(weight._params, field.name) for field in named}
    fresh = {}
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            if tuple(value.shape) not in ((rows,), (rows, 1)):
                return None
            value = value if dimension else index_cut(value, index, 0)
        fresh[name] = value
    found = index_cut(data, index, dimension)
    if "orig_shape" in fresh:
        fresh["orig_shape"] = type(fresh["orig_shape"])(found.shape)
    return requantising(weight)(found, **fresh)


def requantising(weight):
    """What makes a QuantizedTensor of other numbers, as one of ComfyUI's is made of its own; it holds none of those.
    Named arguments: params that are others."""
    kind, layout = type(weight), getattr(weight, "_layout_type", None) or getattr(weight, "_layout_cls", None)
    params = getattr(weight, "_layout_params", None)
    of_class = params is None
    named = dataclasses.fields(weight._params) if of_class else ()
    template = weight._params if of_class else None
    own = {field.name: getattr(template, field.name) for field in named} if of_class else dict(params)

    def made(data: torch.Tensor, **others):
        found = {k: v.to(data.device) if isinstance(v, torch.Tensor) else v for k, v in {**own, **others}.items()}
        return kind(data, layout, dataclasses.replace(template, **found) if of_class else found)

    return made


def cut_gguf(weight, index: torch.Tensor, dimension: int) -> torch.Tensor | None:
    """Of ComfyUI-GGUF's tensors. Rows are whole blocks, and stay as they are. Columns lie across blocks: they are put
    into blocks of 8 bits anew where that takes less than the whole."""
    import gguf

    raw, shape = weight.detach().as_subclass(torch.Tensor), tuple(weight.tensor_shape)
    kinds = gguf.GGMLQuantizationType
    plain = weight.tensor_type in (kinds.F32, kinds.F16, kinds.BF16)
    fresh = (len(index), shape[1]) if dimension == 0 else (shape[0], len(index))
    if plain or dimension == 0:
        found = index_cut(raw.reshape(shape) if plain else raw.reshape(shape[0], -1), index, dimension)
        return like(weight, found, weight.tensor_type, fresh)
    size = shape[0] * len(index) // BLOCK * gguf.GGML_QUANT_SIZES[kinds.Q8_0][1]
    if len(index) % BLOCK or size >= raw.nbytes:
        return None
    dense = gguf_dense(weight).numpy()
    found = torch.from_numpy(gguf.quants.quantize(dense[:, index.numpy()], kinds.Q8_0))
    return like(weight, found.to(raw.device), kinds.Q8_0, fresh)


def gguf_dense(weight) -> torch.Tensor:
    """The numbers of one of that pack's tensors, float32 on the CPU."""
    import gguf

    raw, shape = weight.detach().as_subclass(torch.Tensor), tuple(weight.tensor_shape)
    if raw.dtype.is_floating_point:
        return raw.reshape(shape).float().cpu()
    return torch.from_numpy(gguf.quants.dequantize(raw.cpu().numpy(), weight.tensor_type)).reshape(shape)


def like(weight, raw: torch.Tensor, kind, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of that pack's class."""
    made = raw.as_subclass(type(weight))
    made.tensor_type, made.tensor_shape, made.patches = kind, torch.Size(shape), []
    return made
