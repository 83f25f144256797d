"""The patcher of a model with packed weights: a LoRA is added to the unpacked weight when that is used."""

import collections
import functools

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ....skrr_engine.weights.tensor import PackedWeight, packed_weights
from .. import versions as features
from ..clip.cut import rounded

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])


class SparsePatcher:
    """Mixed into ComfyUI's patcher. What is packed loads, moves and counts as packed."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, *args, **kwargs):
        weight, set_weight, convert = comfy.model_patcher.get_key_weight(self.model, key)
        now = kwargs.get("return_weight") or (args and args[0])
        if not isinstance(weight, PackedWeight) or key not in self.patches or now:
            return super().patch_weight_to_device(key, device_to, inplace_update, *args, **kwargs)
        if key not in self.backup:
            self.backup[key] = Backup(weight.to(self.offload_device), False)
        pristine = self.backup[key].weight.to(weight.device)
        patch = functools.partial(patched, patches=self.patches[key], key=key, convert=convert, set_weight=set_weight)
        comfy.utils.set_attr_param(self.model, key, pristine.patched(patch))


def patched(weight: torch.Tensor, patches: list, key: str, convert, set_weight) -> torch.Tensor:
    """A dense weight with patches on it, to the bit as ComfyUI makes it of a weight that it loads."""
    kind = features.patching_type(weight.device)
    found = comfy.model_management.cast_to_device(weight, weight.device, kind, copy=True)
    if convert is not None:
        found = convert(found, inplace=True)
    found, seed = comfy.lora.calculate_weight(patches, found, key), features.seed_of(key)
    if set_weight is None:
        return rounded(found, weight.dtype, seed)
    return set_weight(found, inplace_update=False, seed=seed, return_weight=True)


def with_packed(patcher):
    """A patcher, in place, ready for packed weights where its model has some; returns it."""
    if packed_weights(patcher.model):
        patcher.__class__ = sparse_class(type(patcher))
        patcher.size = 0
    return patcher


@functools.cache
def sparse_class(base: type) -> type:
    """`base`, a ModelPatcher class, with SparsePatcher's ways."""
    return base if issubclass(base, SparsePatcher) else type(f"Sparse{base.__name__}", (SparsePatcher, base), {})
