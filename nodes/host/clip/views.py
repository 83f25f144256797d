"""CLIP objects as encoders: which text encoders a CLIP holds, and each one as a row of sub-blocks."""

import functools
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import comfy.model_management
import comfy.sd1_clip
from torch import nn

from ....skrr_engine.disk.safetensors import Entry
from ....skrr_engine.encoder import families
from ....skrr_engine.encoder.actions import SKIP, Action
from ....skrr_engine.encoder.row import EncoderError, Numbers, Row
from ....skrr_engine.encoder.standin import StandIn
from ....skrr_engine.encoder.tree import fork
from ....skrr_engine.files.companion import Fitted
from ....skrr_engine.files.encoder_file import Stamp
from ....skrr_engine.files.layout import Layout
from ....skrr_engine.plan.model import EncoderPlan, Level

TRANSFORMER = "transformer."
"""Where the architecture stands below ComfyUI's SDClipModel."""

ATTACHMENT = "skrr"
"""Under this name a patcher carries what is pruned, through every clone."""


@dataclass(frozen=True)
class Pruned:
    """What is left out of one encoder. plan, level: by a plan (None: no plan); unread: sub-blocks that no conditioning
    reads; shape: of the dense encoder where that was never in memory; file: that it was loaded from, where known;
    fitted: the level's stand-ins and units, nothing where it has none or their file is missing; gone: of a CLIP of our
    own, whose encoder can't be looked up: name -> tensor that the whole one has besides, or at another size."""

    plan: EncoderPlan | None = None
    level: Level | None = None
    unread: tuple[int, ...] = ()
    shape: Numbers | None = None
    file: Stamp | None = None
    fitted: Fitted = Fitted()  # noqa: RUF009 - frozen
    gone: Mapping[str, Entry] = field(default_factory=dict)

    @functools.cached_property
    def removed(self) -> dict[int, Action]:
        """Removed or narrowed sub-block -> what is done at its place. An unread one that another re-uses stays; one
        that is narrowed goes."""
        by_plan = self.fitted.assignment(self.plan, self.level) if self.level else {}
        needed = {action.through(place) for place, action in by_plan.items()}
        whole = {i for i, action in by_plan.items() if action.units is None}
        return {**by_plan, **{i: SKIP for i in self.unread if i not in needed | whole}}

    @property
    def shares(self) -> dict[int, Fraction]:
        """Removed or narrowed sub-block -> the share of its units that stays."""
        by_plan = self.plan.shares(self.level) if self.level else {}
        return {i: by_plan[i] if a.units is not None else Fraction(0) for i, a in self.removed.items()}

    @property
    def standins(self) -> dict[int, StandIn]:
        """Place -> the stand-in there."""
        found = {i: getattr(action, "standin", action) for i, action in self.removed.items()}
        return {i: standin for i, standin in found.items() if isinstance(standin, StandIn)}

    @property
    def standin_bytes(self) -> int:
        """Bytes that the stand-ins add to the encoder."""
        return sum(action.nbytes for action in self.removed.values())


@dataclass(frozen=True)
class View:
    """One text encoder of a CLIP. name: its attribute (`t5xxl`, `clip_l`, ...), which plans use; path: below the CLIP's
    cond_stage_model; shape: dense; whole: its row of sub-blocks, None where it was loaded without some of them."""

    name: str
    path: str
    shape: Numbers
    whole: Row | None

    @property
    def row(self) -> Row:
        """The dense row. Raises EncoderError where it is not in memory."""
        if self.whole is None:
            raise EncoderError(
                f"{self.name} was loaded without its removed parts, so no other plan can be put on it: choose the plan"
                " in the loader, or load it there with neither plan nor trim"
            )
        return self.whole

    @property
    def prefix(self) -> str:
        """What stands before the row's paths, below cond_stage_model."""
        return f"{self.path}.{TRANSFORMER}"


def dense_model(clip) -> nn.Module:
    """The CLIP's cond_stage_model with all the sub-blocks that are in memory."""
    return clip.patcher.model if hasattr(clip.patcher, "skrr_tree") else clip.cond_stage_model


def as_dense(clip):
    """The same CLIP with nothing left out, to be loaded and run so; weights, LoRAs and other packs' patches are its
    own. `clip` stays as it is."""
    twin = clip.clone()
    if hasattr(twin.patcher, "skrr_tree"):
        twin.cond_stage_model = twin.patcher.skrr_tree = twin.patcher.model
        twin.patcher.skrr_forwards = {}
        twin.patcher.set_attachments(ATTACHMENT, {})
        twin.patcher.size, twin.patcher.patches_uuid = 0, uuid.uuid4()
    return twin


def pristine_fork(clip, paths: Iterable[str]) -> nn.Module:
    """A fork (see rewire.fork) of the CLIP's dense tree without the object patches that are on it now: they may be
    those of another branch, whose CLIP is loaded."""
    dense = dense_model(clip)
    tree = fork(dense, paths)
    for name, original in clip.patcher.object_patches_backup.items():
        parent, _, attribute = name.rpartition(".")
        try:
            ours, theirs = tree.get_submodule(parent), dense.get_submodule(parent)
        except AttributeError:
            continue  # below something that is no module: shared
        if ours is not theirs:
            vars(ours).pop(attribute, None)
            if getattr(original, "__self__", None) is not theirs:
                setattr(ours, attribute, original)
    return tree


def pruning(clip) -> dict[str, Pruned]:
    """Encoder name -> what is left out there; empty for a CLIP that we have not touched."""
    return clip.patcher.get_attachment(ATTACHMENT) or {}


def views(clip) -> dict[str, View]:
    """The CLIP's text encoders that Skrr knows, by name. Raises EncoderError where there is none."""
    return views_of(dense_model(clip), pruning(clip))


def seen(clip) -> tuple[dict[str, View], dict[str, EncoderError]]:
    """The CLIP's text encoders that Skrr knows, and why it does not know the others, both by name."""
    return looked_at(dense_model(clip), pruning(clip))


def views_of(tree: nn.Module, known: Mapping[str, Pruned]) -> dict[str, View]:
    """The text encoders in a cond_stage_model, of which `known` have been pruned; see `views`."""
    found, others = looked_at(tree, known)
    if not found:
        nothing = EncoderError("this CLIP holds no text encoder that Skrr knows: connect another CLIP")
        raise next(iter(others.values()), nothing)
    return found


def looked_at(tree: nn.Module, known: Mapping[str, Pruned]) -> tuple[dict[str, View], dict[str, EncoderError]]:
    """See `seen`, of a cond_stage_model."""
    found, others = {}, {}
    for path, module in tree.named_modules():
        if not isinstance(module, comfy.sd1_clip.SDClipModel):
            continue
        name = path.rpartition(".")[2]
        if name in known and known[name].shape is not None:
            found[name] = View(name, path, known[name].shape, None)
            continue
        try:
            row = families.find(module.transformer)
        except EncoderError as error:
            others[name] = error
            continue
        found[name] = View(name, path, numbers_of(row, module.transformer), row)
    return found, others


def choose(clip, name: str = "auto") -> View:
    """The encoder of that name; for `auto` the one with the most parameters."""
    found = views(clip)
    if name in ("", "auto"):
        return max(found.values(), key=lambda view: view.shape.total)
    if name not in found:
        raise EncoderError(f'this CLIP has no encoder "{name[:40]}": choose auto or one of {", ".join(found)}')
    return found[name]


def numbers_of(row: Row, module: nn.Module) -> Numbers:
    """Of an encoder in memory, its bytes as ComfyUI counts them."""
    return Numbers(
        row.family, row.blocks, row.width, row.total, row.parameter_counts, size(module), row.sub_block_bytes,
        row.unit_parameters, row.unit_bytes,
    )  # fmt: skip


def numbers_of_file(row: Row, module: nn.Module, layout: Layout) -> Numbers:
    """Of an encoder whose sub-blocks are yet to be read from a file: as its modules hold them where they have room
    for them, as the file does where they have none (quantised weights), and none where the file lacks them."""
    counts, sizes, total, total_bytes = [], [], row.total, size(module)
    unit_counts, unit_sizes = list(row.unit_parameters), list(row.unit_bytes)
    layers, in_units = dict(module.named_modules()), families.by_name(row.family).in_units

    def weights(key: str) -> int:  # a quantised layer's own count, however the file packs them
        path, _, kind = layout.name(key).rpartition(".")
        layer = layers.get(path)
        return layer.in_features * layer.out_features if kind == "weight" and hasattr(layer, "in_features") else 0

    for sub_block, keys in zip(row.sub_blocks, layout.extended(row.blocks).keys, strict=True):
        held = sub_block.tensors()
        count, nbytes = sub_block.parameter_count(), sum(tensor.nbytes for tensor in held.values())
        coming = [key for key in keys if layout.name(key) not in held]
        counts.append((count if keys else 0) + sum(map(weights, coming)))
        sizes.append((nbytes if keys else 0) + sum(layout.entries[key].nbytes for key in coming))
        more = [key for key in coming if in_units(layout.name(key))]
        unit_counts[sub_block.index] += sum(map(weights, more))
        unit_sizes[sub_block.index] += sum(layout.entries[key].nbytes for key in more)
        total, total_bytes = total - count + counts[-1], total_bytes - nbytes + sizes[-1]
    return Numbers(
        row.family, row.blocks, row.width, total, tuple(counts), total_bytes, tuple(sizes), tuple(unit_counts),
        tuple(unit_sizes),
    )  # fmt: skip


def size(module: nn.Module) -> int:
    """Bytes of a module's weights, as ComfyUI counts them."""
    return comfy.model_management.module_size(module)
