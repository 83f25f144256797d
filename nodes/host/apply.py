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

import copy
import dataclasses
import functools
import time
import uuid
from collections.abc import Callable, Mapping

import comfy.ops
import torch
from torch import nn

from ...skrr_engine.plan import Plan, PlanError
from ...skrr_engine.repair import Repair
from ...skrr_engine.rewire import fork, rewire
from ...skrr_engine.row import EncoderError
from .encoders import ATTACHMENT, TRANSFORMER, Pruned, View, pruning, size, views, views_of

LINEAR = comfy.ops.manual_cast.Linear
"""Of what stand-ins are made: ComfyUI's layers, which work wherever their weights are, and in whatever type."""

EVERYTHING = 1 << 62
"""A weight budget in bytes that no encoder exceeds."""


def derive(clip, pruned: Mapping[str, Pruned]):
    """A CLIP with these encoders pruned (others keep what they have); `clip` stays as it is. Raises EncoderError."""
    known, before = views(clip), pruning(clip)
    pruned = {**before, **{name: carried(entry, before.get(name, entry)) for name, entry in pruned.items()}}
    derived = clip.clone()
    patcher = derived.patcher
    patcher.__class__ = pruned_class(type(patcher))
    patcher.plant(known, pruned)
    patcher.set_attachments(ATTACHMENT, pruned)
    patcher.size = 0
    patcher.patches_uuid = uuid.uuid4()  # else ComfyUI would take the dense tree's load state for this one's
    derived.cond_stage_model = guard(patcher.skrr_tree, known, pruned, patcher.model)
    derived.tokenizer = guarded_tokenizer(clip.tokenizer)
    return derived


def carried(entry: Pruned, before: Pruned) -> Pruned:
    """What is left out of an encoder now, with what stays true of it: the file, and that some of it is not read."""
    return dataclasses.replace(entry, file=entry.file or before.file, unread=entry.unread or before.unread)


def make_tree(
    dense: nn.Module, known: Mapping[str, View], pruned: Mapping[str, Pruned]
) -> tuple[nn.Module, dict[str, Callable]]:
    """A fork of a cond_stage_model with these encoders pruned, and path of a `forward` below it -> the placeholder's,
    for all that was left out. Encoders that were loaded pruned are as they should be."""
    fresh = {name: entry for name, entry in pruned.items() if entry.shape is None}
    paths = [known[name].prefix + path for name in fresh for s in known[name].row.sub_blocks for path in s.parts]
    tree = fork(dense, [*paths, *(f"{view.prefix}x" for view in known.values())])
    forwards = {}
    for name, entry in fresh.items():
        view = known[name]
        for path in rewire(tree.get_submodule(view.path).transformer, view.row, entry.removed, LINEAR):
            forwards[f"{view.prefix}{path}.forward"] = tree.get_submodule(view.prefix + path).forward
    return tree, forwards


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
    if any(entry.removed for entry in pruned.values()):
        clip.tokenizer = guarded_tokenizer(clip.tokenizer)
    return clip


class GuardedModel:
    """Mixed into the class of a cond_stage_model of ours: notes how long it encodes, and refuses what left-out
    sub-blocks would spoil. skrr_run: the tree that runs, where that is another one (see `derive`); skrr_trimmed:
    `(name, blocks, first unread sub-block)` of each trimmed encoder; skrr_seconds: of the last encoding, None before
    it."""

    skrr_run: nn.Module | None
    skrr_trimmed: tuple[tuple[str, int, int], ...]
    skrr_seconds: float | None

    def _skrr_runs(self):
        """What runs: a tree, or how this one was before it was guarded."""
        return super() if self.skrr_run is None else self.skrr_run

    def encode_token_weights(self, *args, **kwargs):
        start = time.perf_counter()
        out = self._skrr_runs().encode_token_weights(*args, **kwargs)
        self.skrr_seconds = time.perf_counter() - start
        return out

    def reset_clip_options(self):
        return self._skrr_runs().reset_clip_options()

    def set_clip_options(self, options):
        layer = options.get("layer")
        for name, blocks, first_unread in self.skrr_trimmed if isinstance(layer, int) else ():
            passed = blocks if abs(layer) > blocks else layer + 1 if layer >= 0 else blocks + layer + 1
            if 2 * passed > first_unread:
                raise EncoderError(
                    f"layer {layer} of {name} is asked for, but what it reads was trimmed away: put CLIP Set Last Layer"
                    " before the Skrr node"
                )
        return self._skrr_runs().set_clip_options(options)

    def generate(self, *args, **kwargs):
        if not self.skrr_trimmed:
            return self._skrr_runs().generate(*args, **kwargs)
        refuse_text(*(name for name, *_ in self.skrr_trimmed))


def refuse_text(*names: str):
    """Raises EncoderError for encoders whose last layers are gone."""
    raise EncoderError(
        f"{', '.join(names)} was trimmed for conditioning and can't write text: use the dense CLIP for that"
    )


class GuardedEncoder:
    """Mixed into the class of a trimmed encoder in a tree of ours: it writes no text. skrr_name: its name."""

    skrr_name: str

    def generate(self, *args, **kwargs):
        refuse_text(self.skrr_name)


def refusing(name: str) -> Callable:
    """A `generate` for an encoder of that name."""
    return lambda *args, **kwargs: refuse_text(name)


class GuardedTokenizer:
    """Mixed into the class of a pruned CLIP's tokenizer: ComfyUI asks it for its part of a file just when it saves the
    CLIP or a checkpoint, whose weights would have holes that no loader but ours knows."""

    def state_dict(self):
        raise EncoderError(
            "this CLIP is pruned, and a file saved so would not load again: use Save Skrr Encoder, or save the CLIP"
            " from before the Skrr node"
        )

    def skrr_state_dict(self) -> dict:
        """What the tokenizer adds to an encoder's file."""
        return super().state_dict()


def guarded_tokenizer(tokenizer):
    """A tokenizer of our own that shares all with `tokenizer`, with GuardedTokenizer's ways."""
    twin = copy.copy(tokenizer)
    twin.__class__ = guarded_class(type(tokenizer), GuardedTokenizer)
    return twin


@functools.cache
def guarded_class(base: type, guard: type) -> type:
    """`base`, a class of ComfyUI's, with the ways of one of the guards."""
    return base if issubclass(base, guard) else type(f"Guarded{base.__name__}", (guard, base), {})


def guard(
    tree: nn.Module, known: Mapping[str, View], pruned: Mapping[str, Pruned], run: nn.Module | None = None
) -> nn.Module:
    """Give a tree of ours GuardedModel's ways, and its trimmed encoders GuardedEncoder's; returns it. run: the tree
    that runs instead, where there is one."""
    tree.__class__ = guarded_class(type(tree), GuardedModel)
    unread = [(known[name], entry.unread) for name, entry in pruned.items() if entry.unread]
    tree.skrr_trimmed = tuple((view.name, view.shape.blocks, min(gone)) for view, gone in unread)
    tree.skrr_seconds = None
    tree.__dict__["skrr_run"] = run  # not a child: its weights are not this tree's
    for view, _ in unread:
        child = tree.get_submodule(view.path)
        child.__class__ = guarded_class(type(child), GuardedEncoder)
        child.skrr_name = view.name
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
    """Mixed into the class of the incoming patcher. skrr_views: of the dense tree; skrr_tree: the fork; skrr_forwards:
    what takes the place of the left-out modules' forwards in the dense tree while this patcher is loaded."""

    skrr_views: dict[str, View]
    skrr_tree: nn.Module
    skrr_forwards: dict[str, Callable]

    def plant(self, known: Mapping[str, View], pruned: Mapping[str, Pruned]) -> None:
        """Make the fork of the model that this patcher has now."""
        self.skrr_views = known
        self.skrr_tree, self.skrr_forwards = make_tree(self.model, known, pruned)
        for view in (known[name] for name, entry in pruned.items() if entry.unread):
            for path in (view.path, f"{view.path}.{TRANSFORMER.rstrip('.')}"):
                if hasattr(self.model.get_submodule(path), "generate"):
                    self.skrr_forwards[f"{path}.generate"] = refusing(view.name)

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
        if clone.model is self.model:
            clone.skrr_views, clone.skrr_tree, clone.skrr_forwards = self.skrr_views, self.skrr_tree, self.skrr_forwards
        else:  # ComfyUI has loaded it anew, for another device or without dynamic VRAM
            pruned = self.get_attachment(ATTACHMENT)
            clone.plant(views_of(clone.model, pruned), pruned)
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
