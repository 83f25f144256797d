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
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import comfy.sd
import folder_paths
import torch

from ...skrr_engine.budget import out_of_memory
from ...skrr_engine.checkpoint import Checkpoint, CheckpointError
from ...skrr_engine.errors import first_line
from . import features
from .apply import match, prune_owned
from .choice import Choice
from .encoders import Pruned, Shape, View, views
from .progress import say
from .trim import trimmed, unread

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
                stored[name] = checkpoint.read(key)
            else:
                stored[name] = entry.stand_in()
                keys[id(stored[name])] = key
        tensors = features.converted_quants(dict(stored), checkpoint.metadata)
        origin = {name: keys[id(tensor)] for name, tensor in tensors.items() if id(tensor) in keys}
        places = {name: place for name in tensors if (place := layout.place(name)) is not None} if layout else {}
        return cls(checkpoint, {**tensors, **absent}, places, origin, absent.keys())

    def fetch(self, key: str):
        """A tensor with its bytes."""
        return self.checkpoint.read(self.origin[key]) if key in self.origin else self.tensors[key]

    def sheltered(self, visible: Iterable[str]) -> Sheltered:
        """A state dict of these tensors, from which all others can be asked for."""
        visible = set(visible)
        hidden = {key: tensor for key, tensor in self.tensors.items() if key not in visible}
        return Sheltered({key: self.fetch(key) for key in visible}, hidden)

    def hollow(self) -> Sheltered:
        """Everything but the sub-blocks."""
        return self.sheltered(key for key in self.tensors if not self._hides(key))

    def _hides(self, key: str) -> bool:
        place, tensor = self.places.get(key), self.tensors[key]
        return key in self.absent or (place is not None and torch.is_tensor(tensor) and tensor.nbytes > SMALL)

    def kept(self, removed) -> dict[int, list[str]]:
        """Sub-block -> names of its tensors, for those that stay."""
        found: dict[int, list[str]] = {}
        for key, place in self.places.items():
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
    pruned = {home.name: recorded(file) for file in files if (home := homes[id(file)]) and file.checkpoint.record}
    lines = [f"{p.file}: pruned already, its own plan stays" for p in pruned.values()]
    lines += [
        f"{p.file}: was saved without the stand-ins that its plan names, and pictures may break; save it again from the"
        " dense file with them in models/skrr_plans"
        for p in pruned.values()
        if p.level and p.level.standins and not p.standins
    ]
    if chosen.plan is not None:
        for name, view in match(known, chosen.plan).items():
            if view.name not in pruned:
                entry = chosen.plan.encoder(name)
                pruned[view.name], told = chosen.pruned(name, view, entry)
                lines += told
    for file in files:
        if home := homes[id(file)]:
            now = pruned.get(home.name, Pruned())
            without = tuple(sorted({*now.unread, *cut_off(clip, file, home, type_name)}))
            path = str(file.checkpoint.path)
            pruned[home.name] = dataclasses.replace(now, unread=without, shape=home.shape, file=path)
    if trim:
        for view in known.values():
            pruned[view.name] = trimmed(clip, view, pruned.get(view.name, Pruned()), load=False)
            if pruned[view.name].unread:
                lines.append(
                    f"{view.name}: {len(pruned[view.name].unread)} sub-blocks that no conditioning reads left out"
                )
    prune_owned(clip, pruned)
    for file, state in zip(files, states, strict=True):
        if home := homes[id(file)]:
            fill(clip, file, home, pruned[home.name].removed, state)
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
    return Pruned(record.plan, level, record.unread, None, file.checkpoint.path.name, file.checkpoint.standins)


def load_hollow(files: Sequence[EncoderFile], states: list, type_name: str, device: str, disable_dynamic: bool):
    """A CLIP of ComfyUI's for these files, on the CPU, with nothing in its sub-blocks yet. states: what it is made of,
    whose names ComfyUI may change (in this list)."""
    options = {"initial_device": torch.device("cpu")}  # never to the accelerator before it is pruned
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip_type = getattr(comfy.sd.CLIPType, type_name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    extra = {"disable_dynamic": True} if disable_dynamic else {}
    names = ", ".join(file.checkpoint.path.name for file in files)
    with quiet_about_missing():
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
                f"{names}: ComfyUI can't make a text encoder of type {type_name} of it ({first_line(error)});"
                " choose another type or file"
            ) from error


def home_of(file: EncoderFile, known: Mapping[str, View], clip) -> View | None:
    """Which of a hollow CLIP's encoders a file is, by its shape, with the bytes that it will have; None where Skrr
    knows neither. A file may lack an encoder's last blocks (see `cut_off`). Raises CheckpointError."""
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


def cut_off(clip, file: EncoderFile, home: View, type_name: str) -> tuple[int, ...]:
    """The sub-blocks that a file lacks because others have cut its last blocks off. Raises CheckpointError where a
    conditioning reads them."""
    layout = file.checkpoint.layout.extended(home.shape.blocks)
    lacking = tuple(i for i, keys in enumerate(layout.keys) if not keys)
    if lacking and not set(lacking) <= set(unread(clip, home, load=False)):
        raise CheckpointError(
            f"{file.checkpoint.path.name}: holds {home.shape.blocks - len(lacking) // 2} of the {home.shape.blocks}"
            f" blocks of {home.name}, but type {type_name} reads more of them: get the whole file"
        )
    return lacking


def fill(clip, file: EncoderFile, home: View, removed, state: Mapping[str, torch.Tensor]) -> None:
    """Put a file's kept sub-blocks into the pruned CLIP. Raises CheckpointError where one is missing or misshapen.

    Each is read and copied on its own, so that no more than one is held twice; where ComfyUI maps files, all are handed
    over at once, with what the hollow CLIP has already, its `state` (a tensor that is not handed over would be taken as
    missing).
    """
    name = file.checkpoint.path.name
    needed = {key for i, s in enumerate(home.row.sub_blocks) if i not in removed for key in s.tensors()}
    missing = min(needed - file.tensors.keys(), default=None)
    if missing is not None:
        raise CheckpointError(f"{name}: lacks {missing}; get the file again")
    where = ""
    try:
        if not file.origin:
            kept = {key: file.fetch(key) for keys in file.kept(removed).values() for key in keys}
            clip.load_sd(Sheltered({**state, **kept}, file.tensors))
            return
        for index, keys in file.kept(removed).items():
            for path, part in home.row.sub_blocks[index].parts.items():
                own = {key.removeprefix(f"{path}."): file.fetch(key) for key in keys if key.startswith(f"{path}.")}
                where = f"{path}: "
                part.load_state_dict(own, strict=False)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        lines = [line.strip(" \t.") for line in str(error).splitlines()]
        raise CheckpointError(f"{name}: {where}{lines[-1]}; get the file again") from None


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
def quiet_about_missing() -> Iterator[None]:
    """ComfyUI's loader warns of every tensor that it was not given; here that is on purpose."""

    def wanted(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("clip missing", "Missing weight for layer"))

    logging.getLogger().addFilter(wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(wanted)
