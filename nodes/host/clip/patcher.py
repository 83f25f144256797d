"""The patcher of a derived CLIP: it loads, counts and lists only what the fork keeps."""

import functools
from collections.abc import Callable, Mapping

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from ....skrr_engine.encoder.standin import StandInModule
from ....skrr_engine.encoder.units import NarrowLayer
from .cut import gguf_dense
from .guard import refusing
from .tree import make_tree
from .views import ATTACHMENT, TRANSFORMER, Pruned, View, size, views_of

EVERYTHING = 1 << 62
"""A weight budget in bytes that no encoder exceeds."""


class PrunedPatcher:
    """Mixed into the class of the incoming patcher. skrr_views: of the dense tree; skrr_tree: the fork; skrr_forwards:
    what takes the place of the left-out modules' forwards in the dense tree while this patcher is loaded."""

    skrr_views: dict[str, View]
    skrr_tree: nn.Module
    skrr_forwards: dict[str, Callable]

    def patch_model(self, *args, **kwargs):
        others = self.object_patches
        self.object_patches = {**others, **self.skrr_forwards}  # what is left out stays so, whoever patches it
        try:
            return super().patch_model(*args, **kwargs)
        finally:
            self.object_patches = others

    @functools.cached_property
    def _dropped(self) -> set[int]:
        """Identities of the dense tree's modules that the fork has left out, or has cut copies of; containers on its
        path excepted."""
        kept = {id(module) for module in self.skrr_tree.modules()}
        names = {name for name, _ in self.skrr_tree.named_modules()} - self._own.keys()
        return {id(m) for name, m in self.model.named_modules() if id(m) not in kept and name not in names}

    @functools.cached_property
    def _own(self) -> dict[str, nn.Module]:
        """Path -> layer, of all in the fork whose weights are its own: what is left of narrowed parts, and stand-ins.
        ComfyUI does not see them: it looks at the dense tree."""
        found = {}
        for path, module in self.skrr_tree.named_modules():
            if isinstance(module, NarrowLayer):
                found[path] = module
            elif isinstance(module, StandInModule):
                found |= {f"{path}.{name}": layer for name, layer in module.named_children()}
        return found

    def model_patches_to(self, device):
        super().model_patches_to(device)
        if device == self.offload_device:  # ComfyUI calls it with a dtype, too
            for layer in self._own.values():
                released(layer).to(device)

    def _place_own(self, device: torch.device, budget: int) -> int:
        """Patch the fork's own layers, and bring them to a device as far as a budget in bytes goes, the largest first;
        others stay where they are, and are cast when they are used. Returns the bytes that are there."""
        used = 0
        for path, layer in sorted(self._own.items(), key=lambda item: -size(item[1])):
            fits = used + size(layer) <= budget
            target = device if fits else self.offload_device
            patch(layer, path, self.patches, target)
            layer.to(target)
            if fits:
                used += size(layer)
            cast(layer, not fits)
        return used

    def partially_unload(self, device_to, memory_to_free=0, *args, **kwargs):
        freed = super().partially_unload(device_to, memory_to_free, *args, **kwargs)
        for layer in sorted(self._own.values(), key=size, reverse=True):
            if freed >= memory_to_free:
                break
            if any(parameter.device != device_to for parameter in layer.parameters()):
                freed += size(layer)
                self.model.model_loaded_weight_memory -= size(layer)
                layer.to(device_to)
                cast(layer, True)
        return freed

    def model_size(self):
        if self.size == 0:
            self.size = size(self.skrr_tree)
        return self.size

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        if clone.model is self.model:
            clone.__class__ = pruned_class(type(clone))  # some loaders' clone() sets its own
            clone.skrr_views, clone.skrr_tree, clone.skrr_forwards = self.skrr_views, self.skrr_tree, self.skrr_forwards
        else:  # ComfyUI has loaded it anew, for another device or without dynamic VRAM
            pruned = self.get_attachment(ATTACHMENT)
            plant(clone, views_of(clone.model, pruned), pruned)
        return clone

    def model_state_dict(self, filter_prefix=None):
        state = self.skrr_tree.state_dict()
        return {k: v for k, v in state.items() if filter_prefix is None or k.startswith(filter_prefix)}

    def _load_list(self, *args, **kwargs):
        return [entry for entry in super()._load_list(*args, **kwargs) if not self._is_dropped(entry)]

    def _is_dropped(self, entry: tuple) -> bool:
        return any(isinstance(part, nn.Module) and id(part) in self._dropped for part in entry)

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs):
        # A full load moves the whole tree, dropped sub-blocks too; a load without a limit moves what is listed.
        options = {"device_to": device_to, "force_patch_weights": force_patch_weights, "full_load": False, **kwargs}
        budget = EVERYTHING if full_load else lowvram_model_memory
        used = self._place_own(device_to or self.offload_device, budget)
        super().load(lowvram_model_memory=budget if full_load else max(0, budget - used), **options)
        if full_load:
            self.model.model_loaded_weight_memory = self.model_size()
        else:
            self.model.model_loaded_weight_memory += used


def released(layer: nn.Module) -> nn.Module:
    """A layer of a fork's own as it is without patches; returns it."""
    for name, own in vars(layer).pop("skrr_pristine", {}).items():
        layer._parameters[name] = own
    return layer


def patch(layer: nn.Module, path: str, patches: Mapping[str, list], device: torch.device) -> None:
    """Put a patcher's patches (LoRA) onto a layer of a fork's own, in place of those it has; as ComfyUI does it."""
    released(layer)
    for name in ("weight", "bias"):
        key, own = f"{path}.{name}", layer._parameters.get(name)
        if key not in patches or own is None:
            continue
        is_gguf = hasattr(own, "tensor_type")
        if is_gguf:
            dense = gguf_dense(own).to(device, torch.float32)
        else:
            dense = comfy.model_management.cast_to_device(own, device, torch.float32, copy=True)
        out = comfy.lora.calculate_weight(patches[key], getattr(layer, f"convert_{name}")(dense, inplace=True), key)
        vars(layer).setdefault("skrr_pristine", {})[name] = own
        if is_gguf:  # in 16 bit for as long as the patches are on it
            out = out.index_select(layer.skrr_dimension, layer.skrr_index.to(out.device)).half()
            layer._parameters[name] = nn.Parameter(out, requires_grad=False)
        else:
            getattr(layer, f"set_{name}")(out, inplace_update=False, seed=comfy.model_patcher.string_to_seed(key))


def cast(layer: nn.Module, on: bool) -> None:
    """Whether a layer's weights are cast where they are used, as they lie elsewhere."""
    if on:
        layer.comfy_cast_weights = True
    else:
        vars(layer).pop("comfy_cast_weights", None)


@functools.cache
def pruned_class(base: type) -> type:
    """`base`, a ModelPatcher class (ComfyUI's, ComfyUI-GGUF's, ...), with PrunedPatcher's ways."""
    return base if issubclass(base, PrunedPatcher) else type(f"Pruned{base.__name__}", (PrunedPatcher, base), {})


def plant(patcher, known: Mapping[str, View], pruned: Mapping[str, Pruned]) -> None:
    """Turn a patcher, in place, into one of a fork of the model that it has now. Raises EncoderError, before it is."""
    tree, forwards = make_tree(patcher, known, pruned)
    for view in (known[name] for name, entry in pruned.items() if entry.unread):
        for path in (view.path, f"{view.path}.{TRANSFORMER.rstrip('.')}"):
            if hasattr(patcher.model.get_submodule(path), "generate"):
                forwards[f"{path}.generate"] = refusing(view.name)
    patcher.__class__ = pruned_class(type(patcher))
    for name in ("_own", "_dropped"):  # of the fork before
        vars(patcher).pop(name, None)
    patcher.skrr_views, patcher.skrr_tree, patcher.skrr_forwards = known, tree, forwards
