"""A model of our own, made from one that others hold: its weights can be changed one by one.

The copy has modules of its own throughout, and its patcher is no clone of the other's in ComfyUI's sense, since the two
share no weight that either loads or patches. Until a weight is replaced, its bytes are the other's.
"""

import copy
import uuid

import comfy.model_patcher
import comfy.utils
from torch import nn

from ..clip.cut import PUT_ON
from ..clip.patcher import PrunedPatcher
from .patcher import SparsePatcher, sparse_class

LOADED = (
    "device", "model_loaded_weight_memory", "lowvram_patch_counter", "model_lowvram", "current_weight_patches_uuid",
    "model_offload_buffer_memory", "current_patcher", "dynamic_vbars", "dynamic_pins", "dynamic_patchers",
)  # fmt: skip
"""What ComfyUI notes on a model that it has loaded."""
FAULTED = ("_v", "_v_weight", "_v_bias", "_v_signature", "_pins", "_pin_state", "_prefetch", "weight_lowvram_function",
           "bias_lowvram_function")  # fmt: skip
"""What dynamic VRAM puts onto a layer."""
PLANTED = ("skrr_views", "skrr_tree", "skrr_forwards", "_own", "_dropped")
"""What a PrunedPatcher holds of its fork."""


def own_tree(patcher, tree: nn.Module) -> nn.Module:
    """A copy of a patcher's model, or of a fork of it, without patches, on the offload device."""
    with patcher.use_ejected():
        pristine = {id(comfy.utils.get_attr(patcher.model, k)): own.weight for k, own in patcher.backup.items()}
        hooked = {id(comfy.utils.get_attr(patcher.model, k)): own[0] for k, own in patcher.hook_backup.items()}
        pristine = {**pristine, **hooked}
        memo: dict[int, object] = {}
        for weight in tree.parameters():
            found = pristine.get(id(weight), weight).detach().to(patcher.offload_device)
            memo[id(weight)] = nn.Parameter(found, requires_grad=False)
        for buffer in tree.buffers():
            memo[id(buffer)] = buffer.detach().to(patcher.offload_device, copy=True)
        own = [(module, name) for module in tree.modules() for name in (*PUT_ON, *FAULTED) if name in vars(module)]
        own += [(root, name) for root in (tree, patcher.model) for name in LOADED if name in vars(root)]
        for module, name in [*own, (tree, "skrr_run")]:
            value = vars(module).get(name)
            if not isinstance(value, bool | int | float | str | None):  # those are one object wherever they stand
                memo[id(value)] = None
        made = copy.deepcopy(tree, memo)
        for name, original in patcher.object_patches_backup.items():
            parent, _, attribute = name.rpartition(".")
            try:
                theirs, source, ours = (root.get_submodule(parent) for root in (patcher.model, tree, made))
            except AttributeError:
                continue  # of a part that the fork has not
            if getattr(original, "__self__", None) is theirs:
                vars(ours).pop(attribute, None)
            elif isinstance(source, type(theirs)):  # no placeholder
                setattr(ours, attribute, copy.deepcopy(original, memo))
    for module in made.modules():
        for name in (*PUT_ON, *FAULTED):
            vars(module).pop(name, None)
    for name in LOADED:
        if name != "current_patcher":  # of all these, what ComfyUI asks for before it sets it
            vars(made).pop(name, None)
    return made


def own_patcher(patcher, made: nn.Module):
    """A patcher of a model of our own that has all which others have put onto `patcher`: LoRAs, object patches, hooks
    and options."""
    found = patcher.clone()
    base = next(kind for kind in type(patcher).__mro__ if not issubclass(kind, PrunedPatcher | SparsePatcher))
    if getattr(patcher, "is_dynamic", bool)():
        base = comfy.model_patcher.ModelPatcher  # dynamic VRAM moves bytes that are not packed
    found.__class__ = sparse_class(base)
    for name in PLANTED:
        vars(found).pop(name, None)
    comfy.model_patcher.ModelPatcher(made, patcher.load_device, patcher.offload_device)  # notes on it what is loaded
    found.model, found.parent, found.size, found.patches_uuid = made, None, 0, uuid.uuid4()
    found.backup, found.object_patches_backup, found.hook_backup, found.pinned = {}, {}, {}, set()
    found.cached_hook_patches, found.current_hooks, found.is_injected = {}, None, False
    for name, value in (("backup_buffers", {}), ("cached_patcher_init", None), ("clone_base_uuid", uuid.uuid4())):
        if hasattr(found, name):
            setattr(found, name, value)
    return found
