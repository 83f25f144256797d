"""A plan put onto a CLIP: a derived CLIP that shares every weight with the one it came from, minus the skipped ones.

The derived CLIP's module tree is a fork (containers of its own, leaves shared) with placeholders in it; the incoming
tree is never touched. Its patcher stays a *clone* of the incoming one in ComfyUI's sense (`patcher.model` is the same
object), because the two share weights: ComfyUI then unpatches and swaps them correctly, whichever runs next. It differs
in what it loads, counts and lists: only what the fork keeps.
"""

import functools
import uuid
from dataclasses import dataclass

from torch import nn

from ...skrr_engine.plan import EncoderPlan, Level, Plan, PlanError
from ...skrr_engine.rewire import assignment, fork, rewire
from .encoders import View, dense_model, pruning, size, views

EVERYTHING = 1 << 62
"""A weight budget in bytes that no encoder exceeds."""


@dataclass(frozen=True)
class Pruned:
    """What one encoder of a derived CLIP has pruned: the plan's entry, and the level of it in place."""

    plan: EncoderPlan
    level: Level

    @property
    def removed(self) -> dict[int, int | None]:
        """Skipped sub-block -> the one it re-uses, or None."""
        return assignment(self.plan.order[: self.level.skipped], self.level.reuse)


def derive(clip, pruned: dict[str, Pruned]):
    """A CLIP with these encoders pruned (those pruned before keep what they have); `clip` stays as it is."""
    pruned = {**pruning(clip), **pruned}
    dense = dense_model(clip)
    known = views(clip)
    paths = [known[n].prefix + p for n in pruned for s in known[n].row.sub_blocks for p in s.parts]
    tree = fork(dense, paths)
    for name, entry in pruned.items():
        view = known[name]
        rewire(tree.get_submodule(view.path).transformer, view.row, entry.removed)
    derived = clip.clone()
    derived.cond_stage_model = tree
    patcher = derived.patcher
    patcher.__class__ = pruned_class(type(patcher))
    patcher.skrr_pruned, patcher.skrr_tree = pruned, tree
    patcher.size = 0
    patcher.patches_uuid = uuid.uuid4()  # else ComfyUI would take the dense tree's load state for this one's
    return derived


def match(clip, plan: Plan) -> dict[str, View]:
    """Which of the CLIP's encoders each of the plan's entries is for.

    By name; an entry whose name the CLIP lacks goes to its only encoder of the same shape. Entries for encoders that
    the CLIP does not hold at all are left out, but at least one must fit. Raises PlanError.
    """
    known = views(clip)
    found = {}
    for name, entry in plan.encoders.items():
        shape = (entry.family, entry.blocks, entry.width)
        alike = [v for v in known.values() if (v.row.family, v.row.blocks, v.row.width) == shape]
        if name in known:
            row = known[name].row
            entry.check(row.family, row.blocks, row.width, name)
            found[name] = known[name]
        elif len(alike) == 1:
            found[name] = alike[0]
    if not found:
        wanted = ", ".join(f"{n} ({e.family}, {e.blocks} blocks, {e.width} wide)" for n, e in plan.encoders.items())
        has = ", ".join(f"{v.name} ({v.row.family}, {v.row.blocks} blocks, {v.row.width} wide)" for v in known.values())
        raise PlanError(f"the plan is for {wanted}, but this CLIP holds {has}: choose a plan for one of these")
    return found


class PrunedPatcher:
    """Mixed into the class of the incoming patcher. skrr_pruned: encoder name -> Pruned; skrr_tree: the fork."""

    skrr_pruned: dict[str, Pruned]
    skrr_tree: nn.Module

    @functools.cached_property
    def _dropped(self) -> set[int]:
        """Identities of the dense tree's modules that the fork has left out, containers on its path excepted."""
        kept = {id(module) for module in self.skrr_tree.modules()}
        names = {name for name, _ in self.skrr_tree.named_modules()}
        return {id(m) for name, m in self.model.named_modules() if id(m) not in kept and name not in names}

    def model_size(self):
        if self.size == 0:
            self.size = size(self.skrr_tree)
        return self.size

    def clone(self, *args, **kwargs):
        clone = super().clone(*args, **kwargs)
        clone.__class__ = type(self)  # some loaders' clone() sets its own
        clone.skrr_pruned, clone.skrr_tree = self.skrr_pruned, self.skrr_tree
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
        budget = EVERYTHING if full_load else lowvram_model_memory
        super().load(device_to, budget, force_patch_weights, False, **kwargs)
        if full_load:
            self.model.model_loaded_weight_memory = self.model_size()


@functools.cache
def pruned_class(base: type) -> type:
    """`base`, a ModelPatcher class (ComfyUI's, ComfyUI-GGUF's, ...), with PrunedPatcher's ways."""
    return base if issubclass(base, PrunedPatcher) else type(f"Pruned{base.__name__}", (PrunedPatcher, base), {})
