"""The patcher of a derived CLIP: it loads, counts and lists only what the fork keeps."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ....skrr_engine.encoder.standin import StandInModule
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
        """Identities of the dense tree's modules that the fork has left out, containers on its path excepted."""
        kept = {id(module) for module in self.skrr_tree.modules()}
        names = {name for name, _ in self.skrr_tree.named_modules()}
        return {id(m) for name, m in self.model.named_modules() if id(m) not in kept and name not in names}

    @functools.cached_property
    def _standins(self) -> list[nn.Module]:
        """The stand-ins in the fork, which ComfyUI does not see: it looks at the dense tree."""
        return [module for module in self.skrr_tree.modules() if isinstance(module, StandInModule)]

    def model_patches_to(self, device):
        super().model_patches_to(device)
        if isinstance(device, torch.device):  # ComfyUI calls it with a dtype, too
            for standin in self._standins:
                standin.to(device)

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
        super().load(lowvram_model_memory=EVERYTHING if full_load else lowvram_model_memory, **options)
        if full_load:
            self.model.model_loaded_weight_memory = self.model_size()


@functools.cache
def pruned_class(base: type) -> type:
    """`base`, a ModelPatcher class (ComfyUI's, ComfyUI-GGUF's, ...), with PrunedPatcher's ways."""
    return base if issubclass(base, PrunedPatcher) else type(f"Pruned{base.__name__}", (PrunedPatcher, base), {})


def plant(patcher, known: Mapping[str, View], pruned: Mapping[str, Pruned]) -> None:
    """Turn a patcher, in place, into one of a fork of the model that it has now. Raises EncoderError, before it is."""
    tree, forwards = make_tree(patcher.model, known, pruned)
    for view in (known[name] for name, entry in pruned.items() if entry.unread):
        for path in (view.path, f"{view.path}.{TRANSFORMER.rstrip('.')}"):
            if hasattr(patcher.model.get_submodule(path), "generate"):
                forwards[f"{path}.generate"] = refusing(view.name)
    patcher.__class__ = pruned_class(type(patcher))
    patcher.skrr_views, patcher.skrr_tree, patcher.skrr_forwards = known, tree, forwards
