"""Text encoders loaded without what a plan removes: it is neither read from the file nor ever held in memory.

ComfyUI's own loader makes the CLIP. It is handed a state dict in which every tensor can be looked at (it tells encoders
apart by names and shapes) but from which sub-blocks are not copied. The CLIP so made has all its modules, with nothing
in their weights. What the conditioning reads is asked of it, the removed sub-blocks are taken out, and only then the
kept ones are copied from the file.
"""

import contextlib
import dataclasses
import inspect
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import comfy.sd
import folder_paths
import torch

from ...skrr_engine.budget import out_of_memory
from ...skrr_engine.checkpoint import Checkpoint, CheckpointError
from ...skrr_engine.errors import first_line
from ...skrr_engine.row import EncoderError, describe
from ...skrr_engine.trace import Tracer
from . import features
from .apply import carried, match, prune_owned
from .choice import Choice
from .conditioning import Conditioning
from .encoders import TRANSFORMER, Pruned, Shape, View, views
from .progress import say
from .trim import trimmed

SCALES = ("scale_weight", "weight_scale")
"""What the names of a quantised weight's scale end with, in files of before and of now."""
PROJECTION = "text_projection.weight"

SMALL = 1024
"""Tensors of at most so many bytes are always handed to the loader: by some of them it tells how weights are stored."""


class Sheltered(dict):
    """A state dict whose `hidden` tensors can be asked for by name, but are not among its keys."""

    def __init__(self, visible: Mapping[str, torch.Tensor], hidden: Mapping[str, torch.Tensor]):
        super().__init__(visible)
        self.hidden = hidden

    def __contains__(self, key) -> bool:
        return super().__contains__(key) or key in self.hidden

    def __missing__(self, key) -> torch.Tensor:
        return self.hidden[key]

    def get(self, key, default=None):
        return self[key] if key in self else default


@dataclass(frozen=True)
class EncoderFile:
    """One file to load from, its tensors by the names that ComfyUI's encoder has for them. tensors: all that it uses,
    also those that a pruned file has left out, but for small ones only their dtypes and shapes (mapped from the file
    where ComfyUI maps); places: name -> sub-block, for those of sub-blocks; origin: name -> name in the file, for those
    that are yet to be read; absent: names of those that a pruned file has left out."""

    checkpoint: Checkpoint
    tensors: Mapping[str, torch.Tensor]
    places: Mapping[str, int]
    origin: Mapping[str, str]
    absent: Set[str]

    @classmethod
    def open(cls, path: str) -> "EncoderFile":
        """Open a file; nothing but its header is read. Raises CheckpointError."""
        if not path.lower().endswith((".safetensors", ".sft")):
            raise CheckpointError(
                f"{os.path.basename(path)}: Skrr loads .safetensors and .gguf files; load this one with ComfyUI's"
                " own loader and put Load Skrr Plan behind it"
            )
        checkpoint = Checkpoint(path)
        if checkpoint.problem is not None:
            raise CheckpointError(checkpoint.problem)
        layout, mapped = checkpoint.known_layout, features.mapped_state_dict(path)
        checkpoint.check_unchanged()  # what is mapped is what was opened
        used, stored, absent, keys = checkpoint.used, {}, {}, {}
        for key, entry in checkpoint.entries.items():
            name = layout.name(key) if layout else key
            if key not in used:
                continue
            if not entry.kept:
                absent[name] = entry.stand_in()
            elif mapped:
                stored[name] = mapped[key]
            elif entry.nbytes <= SMALL:
                stored[name] = checkpoint.tensor(key)
            else:
                stored[name] = entry.stand_in()
                keys[id(stored[name])] = key
        tensors = features.converted_quants(dict(stored), checkpoint.metadata)
        origin = {name: keys[id(tensor)] for name, tensor in tensors.items() if id(tensor) in keys}
        places = {name: place for name in tensors if (place := layout.place(name)) is not None} if layout else {}
        return cls(checkpoint, {**tensors, **absent}, places, origin, absent.keys())

    def fetch(self, key: str):
        """A tensor with its bytes."""
        return self.checkpoint.tensor(self.origin[key]) if key in self.origin else self.tensors[key]

    def sheltered(self, visible: Iterable[str]) -> Sheltered:
        """A state dict of these tensors, from which all others can be asked for."""
        visible = set(visible)
        hidden = {key: tensor for key, tensor in self.tensors.items() if key not in visible}
        return Sheltered({key: self.fetch(key) for key in sorted(visible, key=self._start)}, hidden)

    def hollow(self) -> Sheltered:
        """Everything but the sub-blocks."""
        return self.sheltered(self.tensors.keys() - self.withheld)

    @property
    def withheld(self) -> set[str]:
        """What `hollow` leaves out."""
        return {key for key in self.tensors if self._hides(key)}

    @property
    def lacks(self) -> set[int]:
        """The sub-blocks that a pruned file has left out."""
        places = (self.checkpoint.layout.place(name) for name in self.absent)
        return {place for place in places if place is not None}

    def _start(self, key: str) -> int:
        """Where a tensor begins in the file; 0 for those that are not read from it any more."""
        return self.checkpoint.start(self.origin[key]) if key in self.origin else 0

    def _hides(self, key: str) -> bool:
        place, tensor = self.places.get(key), self.tensors[key]
        return key in self.absent or (place is not None and torch.is_tensor(tensor) and tensor.nbytes > SMALL)

    def kept(self, removed) -> dict[int, list[str]]:
        """Sub-block -> names of its tensors, for those that stay; both in the order of the file."""
        found: dict[int, list[str]] = {}
        for key, place in sorted(self.places.items(), key=lambda item: self._start(item[0])):
            if place not in removed:
                found.setdefault(place, []).append(key)
        return found


def load(
    names: Sequence[str],
    type_name: str,
    chosen: Choice,
    device: str = "default",
    trim: bool = True,
    node_id: str | None = None,
    disable_dynamic: bool = False,
):
    """A CLIP from text-encoder files (by their names in ComfyUI's folders), pruned as chosen.

    Raises CheckpointError, PlanError, EncoderError.
    """
    paths = [path_of(name) for name in names]
    if any(path.lower().endswith(".gguf") for path in paths):
        clip, files, states = load_gguf(names, type_name, device), [], []
    else:
        files = [EncoderFile.open(path) for path in paths]
        states = [file.hollow() for file in files]
        clip = load_hollow(files, states, type_name, device, disable_dynamic)
    known = views(clip)
    homes = {id(file): home_of(file, known, clip) for file in files}
    known |= {home.name: home for home in homes.values() if home}
    lines = []
    for file, state in zip(files, states, strict=True):
        if home := homes[id(file)]:
            lines += check_given(clip, file, home, state.keys(), type_name)
    pruned = {home.name: recorded(file) for file in files if (home := homes[id(file)]) and file.checkpoint.record}
    own = {name for name, entry in pruned.items() if entry.plan is not None}
    lines += [f"{os.path.basename(pruned[name].file.path)}: pruned already, its own plan stays" for name in own]
    lines += [
        f"{os.path.basename(p.file.path)}: was saved without the stand-ins that its plan names, and pictures may break;"
        " save it again from the dense file with them in models/skrr_plans"
        for p in pruned.values()
        if p.level and p.level.standins and not p.standins
    ]
    if chosen.plan is not None:
        for name, view in match(known, chosen.plan).items():
            if view.name not in own:
                by_plan, told = chosen.pruned(name, view, chosen.plan.encoder(name))
                pruned[view.name] = carried(by_plan, pruned.get(view.name, by_plan))
                lines += told
    for file in files:
        if home := homes[id(file)]:
            now = pruned.get(home.name, Pruned())
            pruned[home.name] = dataclasses.replace(now, shape=home.shape, file=file.checkpoint.stamp)
    if trim:
        for view in known.values():
            pruned[view.name] = trimmed(clip, view, pruned.get(view.name, Pruned()))
            if pruned[view.name].unread:
                lines.append(
                    f"{view.name}: {len(pruned[view.name].unread)} sub-blocks that no conditioning reads left out"
                )
    for file in files:
        if home := homes[id(file)]:
            pruned[home.name] = without_lacking(clip, file, home, pruned[home.name], trim, type_name)
    prune_owned(clip, pruned)
    for file, state in zip(files, states, strict=True):
        if home := homes[id(file)]:
            fill(clip, file, home, pruned[home.name].removed, state)
        file.checkpoint.check_unchanged()
    features.set_reload(clip.patcher, reload, (tuple(names), type_name, chosen, device, trim))
    say("\n".join(lines) or "loaded as it is", node_id)
    return clip


def reload(names, type_name, chosen, device, trim, disable_dynamic=False):
    """The patcher of the same CLIP, loaded anew: for ComfyUI's `cached_patcher_init`."""
    return load(names, type_name, chosen, device, trim, disable_dynamic=disable_dynamic).patcher


def path_of(name: str) -> str:
    """A text encoder's file by its name. Raises CheckpointError."""
    path = features.encoder_path(name)
    if path is None:
        raise CheckpointError(f'there is no text encoder "{name[:100]}": put the file into models/text_encoders')
    return path


def recorded(file: EncoderFile) -> Pruned:
    """What a pruned file says that it has left out."""
    record, layout = file.checkpoint.record, file.checkpoint.layout
    if record.plan is not None:
        record.plan.check(layout.family, layout.blocks, layout.width, record.encoder)
    level = record.plan.level(record.skipped) if record.plan else None
    return Pruned(record.plan, level, record.unread, None, file.checkpoint.stamp, file.checkpoint.standins)


def load_hollow(
    files: Sequence[EncoderFile], states: list[Sheltered], type_name: str, device: str, disable_dynamic: bool
):
    """A CLIP of ComfyUI's for these files, on the CPU, with nothing in its sub-blocks yet. states: of each file what
    is handed over; ComfyUI may put others into the list, under the names that it goes on with."""
    options = {"initial_device": torch.device("cpu")}  # never to the accelerator before it is pruned
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip_type = getattr(comfy.sd.CLIPType, type_name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    extra = {"disable_dynamic": True} if disable_dynamic else {}
    names = ", ".join(file.checkpoint.path.name for file in files)
    with quiet_about_missing(set().union(*(file.withheld for file in files))):
        try:
            return comfy.sd.load_text_encoder_state_dicts(
                states,
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
                clip_type=clip_type,
                model_options=options,
                **extra,
            )
        except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{names}: ComfyUI can't make a text encoder of type {type_name} of it ({cause(error)});"
                " choose another type or file"
            ) from error


def cause(error: Exception) -> str:
    """What went wrong, in one line. torch puts a title above the causes when tensors don't fit a module."""
    title, *causes = [line.strip(" \t.") for line in str(error).splitlines() if line.strip()] or [""]
    return causes[0][:300] if causes and title.endswith(":") else first_line(error)


def check_given(clip, file: EncoderFile, home: View, given: Collection[str], type_name: str) -> list[str]:
    """See that an encoder has, outside its sub-blocks, all that its conditioning reads; returns what is to be told.

    given: names of what it was loaded from. Files may lack what is never run, or not by this type (vision towers, heads
    to write text with): that is found out by poisoning it with NaN, and it is zero from then on, as it would hold
    whatever was in memory. Raises CheckpointError.
    """
    name = file.checkpoint.path.name
    inside = tuple(f"{path}." for s in home.row.sub_blocks for path in s.parts)
    state = clip.cond_stage_model.get_submodule(home.path).transformer.state_dict(keep_vars=True)
    place = file.checkpoint.layout.extended(home.shape.blocks).place
    absent = {
        key: tensor.data
        for key, tensor in state.items()
        if key not in given and place(key) is None and not key.endswith(SCALES)
        and tensor.is_floating_point() and tensor.numel()
    }  # fmt: skip
    if not absent:
        return []
    shared = [key for key in absent if key.startswith(inside)]  # T5's position bias: in a sub-block, but for all
    read, told = shared or read_of(clip, home, absent), []
    for key in [key for key in read or () if key.endswith(PROJECTION)]:
        read.remove(key)
        absent[key].copy_(torch.eye(*absent[key].shape))
        told.append(f"{name}: lacks {key}; the pooled vector, which SDXL and SD3 read, is not projected")
    if read:
        raise CheckpointError(f"{name}: lacks {shortly(read)}, which type {type_name} reads; get the file again")
    if read is None:
        told.append(f"{name}: lacks {shortly(absent)}, and whether {type_name} reads it can't be told")
    return told


def shortly(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def read_of(clip, home: View, absent: Mapping[str, torch.Tensor]) -> list[str] | None:
    """Which of these tensors of a hollow encoder its conditioning reads, by their names; None where that can't be told.
    Leaves zeros in them."""
    for tensor in absent.values():
        tensor.zero_()
    try:
        found = Conditioning(clip, home)
        run, hollow = found.null().run, Tracer(found.encoder, home.row, TRANSFORMER).hollow
    except (EncoderError, KeyError):
        return None

    def shows(keys: Iterable[str]) -> bool:
        for key in keys:
            absent[key].fill_(float("nan"))
        try:
            return any(bool(t.isnan().any()) for t, _ in run(hollow))
        finally:
            for key in keys:
                absent[key].zero_()

    return [key for key in absent if shows([key])] if shows(list(absent)) else []


def without_lacking(clip, file: EncoderFile, home: View, pruned: Pruned, trim: bool, type_name: str) -> Pruned:
    """What is left out of an encoder, and besides what its file lacks and this type does not read either. What the file
    calls unread was so for the type that it was saved for. Raises CheckpointError where it is read now."""
    by_plan = dataclasses.replace(pruned, unread=()).removed
    cut = {i for i, keys in enumerate(file.checkpoint.layout.extended(home.shape.blocks).keys) if not keys}
    lacks = (file.lacks | cut) - by_plan.keys()
    unread = pruned.unread if trim else ()
    if lacks and not trim:
        unread = tuple(i for i in trimmed(clip, home, pruned).unread if i in lacks)
    read = sorted(lacks - set(unread))
    if cut & set(read):
        raise CheckpointError(
            f"{file.checkpoint.path.name}: holds {home.shape.blocks - len(cut) // 2} of the {home.shape.blocks} blocks"
            f" of {home.name}, but type {type_name} reads more of them: get the whole file"
        )
    if read:
        record = file.checkpoint.record
        more = f" and {len(read) - 1} more" if len(read) > 1 else ""
        raise CheckpointError(
            f"{file.checkpoint.path.name}: was saved without {describe(read[0])}{more}, which type {type_name} reads;"
            f" choose the type that it was saved for, or load {record.source['name']}"
        )
    return dataclasses.replace(pruned, unread=unread)


def home_of(file: EncoderFile, known: Mapping[str, View], clip) -> View | None:
    """Which of a hollow CLIP's encoders a file is, by its shape, with the bytes that it will have; None where Skrr
    knows neither. A file may lack an encoder's last blocks (see `without_lacking`). Raises CheckpointError."""
    layout = file.checkpoint.known_layout
    if layout is None:
        return None
    alike = [v for v in known.values() if (v.shape.family, v.shape.width) == (layout.family, layout.width)]
    found = min((v for v in alike if v.shape.blocks >= layout.blocks), key=lambda v: v.shape.blocks, default=None)
    if found is None:
        shapes = [(v.name, v.shape) for v in known.values()]
        wanted = ", ".join(f"{name} ({s.family}, {s.blocks} blocks, {s.width} wide)" for name, s in shapes)
        raise CheckpointError(
            f"{file.checkpoint.path.name}: holds {layout.family}, {layout.blocks} blocks, {layout.width} wide, but the"
            f" chosen type makes {wanted} of it: choose the type that this file is for"
        )
    module = clip.cond_stage_model.get_submodule(found.path).transformer
    return dataclasses.replace(found, shape=Shape.of_file(found.row, module, layout))


def fill(clip, file: EncoderFile, home: View, removed, state: Mapping[str, torch.Tensor]) -> None:
    """Put a file's kept sub-blocks into the pruned CLIP. Raises CheckpointError where one is missing or misshapen.

    Each is read and copied on its own, so that no more than one is held twice; where ComfyUI maps files, all are handed
    over at once, with what the hollow CLIP has already, its `state` (a tensor that is not handed over would be taken as
    missing).
    """
    name = file.checkpoint.path.name
    missing: set[str] = set()
    where = ""
    try:
        if not file.origin:
            coming = {key: file.fetch(key) for keys in file.kept(removed).values() for key in keys}
            absent, _ = clip.load_sd(Sheltered({**state, **coming}, file.tensors))
            kept = [s for i, s in enumerate(home.row.sub_blocks) if i not in removed]
            missing |= {key for key in absent for s in kept if key.startswith(tuple(f"{path}." for path in s.parts))}
            missing |= {key for s in kept for path, part in s.parts.items() for key in weightless(path, part)}
        kept = file.kept(removed) if file.origin else {}
        for index, keys in kept.items():
            for path, part in home.row.sub_blocks[index].parts.items():
                own = {key.removeprefix(f"{path}."): file.fetch(key) for key in keys if key.startswith(f"{path}.")}
                where = f"{path}: "
                absent = part.load_state_dict(own, strict=False).missing_keys
                missing |= {f"{path}.{key}" for key in absent} | weightless(path, part)
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error) or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name}: {where}{cause(error)}; get the file again") from None
    place = file.checkpoint.layout.place
    missing = {k for k in missing if place(k) is not None and not k.endswith(SCALES)} | scaleless(file, removed)
    if missing:
        raise CheckpointError(f"{name}: lacks {shortly(missing)}; get the file again")


def weightless(path: str, part: torch.nn.Module) -> set[str]:
    """Names of the weights that layers below `path` were not given: some of ComfyUI's layers have none until then."""
    layers = [(name, m) for name, m in part.named_modules() if hasattr(m, "in_features")]
    return {".".join(filter(None, (path, name, "weight"))) for name, m in layers if m.weight is None}


def scaleless(file: EncoderFile, removed) -> set[str]:
    """Names of the scales that a file's quantised weights lack, in the sub-blocks that stay. A layer of ComfyUI's
    takes 1 for a scale that it is not given."""
    names, found = file.tensors.keys(), set()
    marked = any(key.endswith("scaled_fp8") for key in file.checkpoint.entries)
    for key, place in file.places.items():
        layer, _, last = key.rpartition(".")
        if place in removed or last != "weight":
            continue
        quantised = f"{layer}.comfy_quant" in names
        tensor = file.tensors[key]
        if quantised or (marked and tensor.ndim == 2 and tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)):
            scales = [f"{layer}.{scale}" for scale in (*SCALES, "weight_s_rel")]
            if not any(scale in names for scale in scales):
                found.add(scales[int(quantised)])
    return found


def load_gguf(names: Sequence[str], type_name: str, device: str):
    """A CLIP made by ComfyUI-GGUF's loader for us alone. Raises CheckpointError where that pack is not installed."""
    loader = features.gguf_loader(len(names))
    if loader is None:
        raise CheckpointError(
            f"{names[0]}: .gguf files need the pack ComfyUI-GGUF by city96: install it with ComfyUI-Manager and start"
            " ComfyUI again"
        )
    keys = ["clip_name"] if len(names) == 1 else [f"clip_name{i + 1}" for i in range(len(names))]
    arguments = {**dict(zip(keys, names, strict=True)), "type": type_name}
    try:
        inspect.signature(loader.load_clip).bind(loader, **arguments)
    except (AttributeError, TypeError):
        raise CheckpointError(
            f"{names[0]}: .gguf files need the pack ComfyUI-GGUF by city96, but {features.pack_of(loader)} has a node"
            " under the name of its loader: take that pack out, or load the file with its node"
        ) from None
    clip = loader().load_clip(**arguments)[0]
    if device == "cpu":
        clip.patcher.load_device = clip.patcher.offload_device = torch.device("cpu")
    return clip


@contextlib.contextmanager
def quiet_about_missing(withheld: Collection[str]) -> Iterator[None]:
    """ComfyUI's loader warns of every tensor that it was not given; of those withheld on purpose it shall not."""

    def wanted(record: logging.LogRecord) -> bool:
        title, _, rest = str(record.msg).partition(": ")
        if title == "clip missing":
            others = [key for key in re.findall(r"'([^']+)'", rest) if key not in withheld]
            record.msg = f"{title}: {others}"
            return bool(others)
        layer = str(record.msg).removeprefix("Missing weight for layer ")
        return layer == record.msg or f"{layer}.weight" not in withheld

    logging.getLogger().addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(wanted)
