"""A plan put onto a CLIP.

`derive` gives a second CLIP that shares every weight with the first, minus what is left out. Its patcher stays a
*clone* of the incoming one in ComfyUI's sense (`patcher.model` is the same object), because the two share weights:
ComfyUI then unpatches and swaps them correctly, whichever runs next. It differs in what it loads, counts and lists.

What is run is the shared tree, too, as any other pack knows it: while the derived CLIP is loaded, the left-out modules'
`forward` is that of a placeholder, by the same mechanism as ComfyUI's object patches. So other packs' patches of it act
whether they came before or behind ours, and all go when another clone is loaded. What is *looked at* (state dict, LoRA
keys, sizes) is a fork: containers of its own, leaves shared, placeholders in place of what is left out.

`prune_owned` rewires a CLIP in place that nobody else holds, so that what is left out is really freed.
"""

import dataclasses
import uuid
from collections.abc import Mapping

from ....skrr_engine.encoder.rewire import rewire
from ....skrr_engine.encoder.units import Build
from .cut import building
from .guard import guard, guarded_tokenizer
from .patcher import plant
from .views import ATTACHMENT, Pruned, pruning, views


def derive(clip, pruned: Mapping[str, Pruned]):
    """A CLIP with these encoders pruned (others keep what they have); `clip` stays as it is. Raises EncoderError."""
    known, before = views(clip), pruning(clip)
    pruned = {**before, **{name: carried(entry, before.get(name, entry)) for name, entry in pruned.items()}}
    derived = clip.clone()
    patcher = derived.patcher
    plant(patcher, known, pruned)
    patcher.set_attachments(ATTACHMENT, pruned)
    patcher.size = 0
    patcher.patches_uuid = uuid.uuid4()  # else ComfyUI would take the dense tree's load state for this one's
    derived.cond_stage_model = guard(patcher.skrr_tree, known, pruned, patcher.model)
    derived.tokenizer = guarded_tokenizer(clip.tokenizer)
    return derived


def carried(entry: Pruned, before: Pruned) -> Pruned:
    """What is left out of an encoder now, with what stays true of it: the file, and that some of it is not read."""
    return dataclasses.replace(entry, file=entry.file or before.file, unread=entry.unread or before.unread)


def prune_owned(clip, pruned: Mapping[str, Pruned], build: Build | None = None):
    """Rewire a CLIP that was made for us alone, in place; what is left out is freed. build: how what is left of
    narrowed parts is made, by default as copies. Returns it."""
    known, build = views(clip), build or building(clip.patcher.offload_device, {})
    record = {}
    for name, entry in pruned.items():
        view = known[name]
        rewire(clip.cond_stage_model.get_submodule(view.path).transformer, view.row, entry.removed, build)
        gone = (entry.shape or view.shape) if entry.removed else None
        record[name] = dataclasses.replace(entry, shape=gone)
    clip.patcher.set_attachments(ATTACHMENT, record)
    clip.patcher.size = 0
    clip.patcher.patches_uuid = uuid.uuid4()
    guard(clip.cond_stage_model, known, record)
    if any(entry.removed for entry in pruned.values()):
        clip.tokenizer = guarded_tokenizer(clip.tokenizer)
    return clip
