"""A plan put onto a CLIP.

`derive` gives a second CLIP that shares every weight with the first, minus what is left out. Its module tree is a fork
(containers of its own, leaves shared) with placeholders in it; the incoming tree is never touched. Its patcher stays a
*clone* of the incoming one in ComfyUI's sense (`patcher.model` is the same object), because the two share weights:
ComfyUI then unpatches and swaps them correctly, whichever runs next. It differs in what it loads, counts and lists.

`prune_owned` rewires a CLIP in place that nobody else holds, so that what is left out is really freed.
"""

import dataclasses
import functools
import time
import uuid
from collections.abc import Mapping

import comfy.ops
import torch
from torch import nn

from ...skrr_engine.plan import Plan, PlanError
from ...skrr_engine.repair import Repair
from ...skrr_engine.rewire import fork, rewire
from ...skrr_engine.row import EncoderError
from .encoders import ATTACHMENT, Pruned, View, dense_model, pruning, size, views, views_of

LINEAR = comfy.ops.manual_cast.Linear
"""Of what stand-ins are made: ComfyUI's layers, which work wherever their weights are, and in whatever type."""

EVERYTHING = 1 << 62
"""A weight budget in bytes that no encoder exceeds."""


def derive(clip, pruned: Mapping[str, Pruned]):
    """A CLIP with these encoders pruned (others keep what they have); `clip` stays as it is. Raises EncoderError."""
    known, before = views(clip), pruning(clip)
    carried = {n: dataclasses.replace(p, file=p.file or before.get(n, p).file) for n, p in pruned.items()}
    pruned = {**before, **carried}
    derived = clip.clone()
    patcher = derived.patcher
    tree = make_tree(dense_model(clip), known, pruned)
    patcher.__class__ = pruned_class(type(patcher))
    patcher.skrr_views, patcher.skrr_tree = known, tree
    patcher.set_attachments(ATTACHMENT, pruned)
    patcher.size = 0
    patcher.patches_uuid = uuid.uuid4()  # else ComfyUI would take the dense tree's load state for this one's
    derived.cond_stage_model = guard(tree, known, pruned)
    return derived


def make_tree(dense: nn.Module, known: Mapping[str, View], pruned: Mapping[str, Pruned]) -> nn.Module:
    """A fork of a cond_stage_model with these encoders pruned; those that were loaded pruned are as they should be."""
    fresh = {name: entry for name, entry in pruned.items() if entry.shape is None}
    paths = [known[name].prefix + path for name in fresh for s in known[name].row.sub_blocks for path in s.parts]
    tree = fork(dense, [*paths, *(f"{view.prefix}x" for view in known.values())])
    for name, entry in fresh.items():
        rewire(tree.get_submodule(known[name].path).transformer, known[name].row, entry.removed, LINEAR)
    return tree


def prune_owned(clip, pruned: Mapping[str, Pruned]):
    """Rewire a CLIP that was made for us alone, in place; what is left out is freed. Returns it."""
    known = views(clip)
    record = {}
    for name, entry in pruned.items():
        view = known[name]
        rewire(clip.cond_stage_model.get_submodule(view.path).transformer, view.row, entry.removed, LINEAR)
        gone = (entry.shape or view.shape) if entry.removed else None
        record[name] = dataclasses.replace(entry, shape=gone)
    clip.patcher.set_attachments(ATTACHMENT, record)
    clip.patcher.size = 0
    clip.patcher.patches_uuid = uuid.uuid4()
    guard(clip.cond_stage_model, known, record)
    return clip


class GuardedModel:
    """Mixed into the class of a cond_stage_model of ours: notes how long it encodes, and refuses what left-out
    sub-blocks would spoil. skrr_trimmed: `(name, blocks, first unread sub-block)` of each trimmed encoder;
    skrr_seconds: of the last encoding, None before it."""

    skrr_trimmed: tuple[tuple[str, int, int], ...]
    skrr_seconds: float | None

    def encode_token_weights(self, *args, **kwargs):
        start = time.perf_counter()
        out = super().encode_token_weights(*args, **kwargs)
        self.skrr_seconds = time.perf_counter() - start
        return out

    def set_clip_options(self, options):
        layer = options.get("layer")
        for name, blocks, first_unread in self.skrr_trimmed if isinstance(layer, int) else ():
            passed = blocks if abs(layer) > blocks else layer + 1 if layer >= 0 else blocks + layer + 1
            if 2 * passed > first_unread:
                raise EncoderError(
                    f"layer {layer} of {name} is asked for, but what it reads was trimmed away: put CLIP Set Last Layer"
                    " before the Skrr node"
                )
        super().set_clip_options(options)

    def generate(self, *args, **kwargs):
        if not self.skrr_trimmed:
            return super().generate(*args, **kwargs)
        names = ", ".join(name for name, *_ in self.skrr_trimmed)
        raise EncoderError(f"{names} was trimmed for conditioning and can't write text: use the dense CLIP for that")


@functools.cache
def guarded_class(base: type) -> type:
    """`base`, a cond_stage_model's class, with GuardedModel's ways."""
    return base if issubclass(base, GuardedModel) else type(f"Guarded{base.__name__}", (GuardedModel, base), {})


def guard(tree: nn.Module, known: Mapping[str, View], pruned: Mapping[str, Pruned]) -> nn.Module:
    """Give a tree of ours GuardedModel's ways; returns it."""
    tree.__class__ = guarded_class(type(tree))
    unread = [(known[name], entry.unread) for name, entry in pruned.items() if entry.unread]
    tree.skrr_trimmed = tuple((view.name, view.shape.blocks, min(gone)) for view, gone in unread)
    tree.skrr_seconds = None
    return tree


def match(known: Mapping[str, View], plan: Plan) -> dict[str, View]:
    """Which of a CLIP's encoders each of the plan's entries is for: entry's name -> view.

    By name; an entry that bears its family's name only (as the command line gives where it knows no better) goes to the
    only encoder of its shape. Entries for encoders that the CLIP does not hold are left out, but at least one must fit.
    Raises PlanError.
    """
    found = {}
    for name, entry in plan.encoders.items():
        shape = (entry.family, entry.blocks, entry.width)
        alike = [v for v in known.values() if (v.shape.family, v.shape.blocks, v.shape.width) == shape]
        if name in known:
            entry.check(known[name].shape.family, known[name].shape.blocks, known[name].shape.width, name)
            found[name] = known[name]
        elif name == entry.family and len(alike) == 1:
            found[name] = alike[0]
    if not found:
        wanted = ", ".join(f"{n} ({e.family}, {e.blocks} blocks, {e.width} wide)" for n, e in plan.encoders.items())
        shapes = [(v.name, v.shape) for v in known.values()]
        has = ", ".join(f"{name} ({s.family}, {s.blocks} blocks, {s.width} wide)" for name, s in shapes)
        raise PlanError(f"the plan is for {wanted}, but this CLIP holds {has}: choose a plan for one of these")
    return found


def replaced(clip, plan: Plan) -> dict[str, Pruned]:
    """What is left out of a CLIP's encoders when a plan's strongest levels take the place of what is left out by plan
    now; encoders that are so already are not named. Raises PlanError, and EncoderError for an encoder that was loaded
    without its removed parts."""
    known, now = views(clip), pruning(clip)
    wanted = {view.name: plan.encoder(name) for name, view in match(known, plan).items()}
    found = {}
    for name, view in known.items():
        before = now.get(name, Pruned())
        entry = wanted.get(name)
        level = entry and entry.levels[-1]
        if entry:
            exact = round(view.shape.sparsity(entry.order[: level.skipped]), 6)
            level = level.model_copy(update={"sparsity": exact})
            entry = entry.model_copy(update={"levels": (level,)})
        same = level and before.level and level.standins == before.level.standins
        after = dataclasses.replace(before, plan=entry, level=level, standins=before.standins if same else {})
        if after.removed != before.removed:
            _ = view.row  # refuses an encoder that was loaded pruned
            found[name] = after
    return found


class PrunedPatcher:
    """Mixed into the class of the incoming patcher. skrr_views: of the dense tree; skrr_tree: the fork."""

    skrr_views: dict[str, View]
    skrr_tree: nn.Module

    @functools.cached_property
    def _dropped(self) -> set[int]:
        """Identities of the dense tree's modules that the fork has left out, containers on its path excepted."""
        kept = {id(module) for module in self.skrr_tree.modules()}
        names = {name for name, _ in self.skrr_tree.named_modules()}
        return {id(m) for name, m in self.model.named_modules() if id(m) not in kept and name not in names}

    @functools.cached_property
    def _repairs(self) -> list[nn.Module]:
        """The stand-ins in the fork, which ComfyUI does not see: it looks at the dense tree."""
        return [module for module in self.skrr_tree.modules() if isinstance(module, Repair)]

    def model_patches_to(self, device):
        super().model_patches_to(device)
        if isinstance(device, torch.device):  # ComfyUI calls it with a dtype, too
            for repair in self._repairs:
                repair.to(device)

    def model_size(self):
        if self.size == 0:
            self.size = size(self.skrr_tree)
        return self.size

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.__class__ = pruned_class(type(clone))  # some loaders' clone() sets its own
        clone.skrr_views, clone.skrr_tree = self.skrr_views, self.skrr_tree
        if clone.model is not self.model:  # ComfyUI has loaded it anew, for another device or without dynamic VRAM
            pruned = self.get_attachment(ATTACHMENT)
            clone.skrr_views = views_of(clone.model, pruned)
            clone.skrr_tree = make_tree(clone.model, clone.skrr_views, pruned)
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
