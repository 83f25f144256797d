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
from collections.abc import Collection, Iterator, Mapping, Sequence

import comfy.sd
import folder_paths
import torch

from ....skrr_engine.files.encoder_file import CheckpointError
from ....skrr_engine.files.narrow import Narrowing
from ....skrr_engine.memory import out_of_memory
from ....skrr_engine.weights.tensor import planted
from .. import versions as features
from ..clip.cut import hollow
from ..clip.derive import carried, prune_owned
from ..clip.trim import told
from ..clip.views import Pruned, View, numbers_of_file, seen
from ..plans.inputs import Choice
from ..plans.match import match
from ..sparse.patcher import with_packed
from ..talk import say
from .encoder_file import EncoderFile, Sheltered
from .fill import cause, check_given, fill, without_lacking


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
    clip, files, states = made(names, type_name, device, disable_dynamic)
    known, others = seen(clip)
    if not known and chosen.plan is not None:
        raise next(iter(others.values()))
    lines = [f"{name}: loaded whole, {error}" for name, error in others.items()]
    homes = [home_of(file, known, clip) if known else None for file in files]
    known |= {home.name: home for home in homes if home}
    placed = [(file, home, state) for file, home, state in zip(files, homes, states, strict=True) if home]
    for file, home, state in placed:
        lines += check_given(clip, file, home, state.keys(), type_name)
    pruned, told_of_plans = planned(placed, known, chosen)
    lines += told_of_plans
    for file, home, _ in placed:
        now = pruned.get(home.name, Pruned())
        pruned[home.name] = dataclasses.replace(now, shape=home.shape, file=file.checkpoint.stamp)
    for view in known.values() if trim else ():
        pruned[view.name], line = told(clip, view, pruned.get(view.name, Pruned()))
        lines += [line] if line else []
    for file, home, _ in placed:
        pruned[home.name] = without_lacking(clip, file, home, pruned[home.name], trim, type_name)
    cuts = {home.name: file.narrowing(pruned[home.name]) for file, home, _ in placed}
    if known:
        prune_owned(clip, pruned, hollow(uncut(clip, placed, cuts)) if placed else None)
    for file, home, state in placed:
        fill(clip, file, home, pruned[home.name], state, cuts[home.name])
    for file in files:
        planted(clip.cond_stage_model, file.seeds)
        file.checkpoint.check_unchanged()
    with_packed(clip.patcher)
    features.set_reload(clip.patcher, reload, (tuple(names), type_name, chosen, device, trim))
    say("\n".join(lines) or "loaded as it is", node_id)
    return clip


def made(names: Sequence[str], type_name: str, device: str, disable_dynamic: bool):
    """A CLIP of ComfyUI's for these files, with nothing in the sub-blocks that Skrr knows; the files, and what of each
    was handed over. A `.gguf` CLIP is whole, and has neither."""
    paths = [path_of(name) for name in names]
    if any(path.lower().endswith(".gguf") for path in paths):
        return load_gguf(names, type_name, device), [], []
    files = [EncoderFile.open(path) for path in paths]
    disable_dynamic = disable_dynamic or any(file.checkpoint.packed for file in files)
    states = [file.hollow() for file in files]
    clip = load_hollow(files, states, type_name, device, disable_dynamic)
    if not seen(clip)[0] and any(file.checkpoint.known_layout for file in files):  # known by its names alone
        states = [file.sheltered(file.tensors) for file in files]
        clip = load_hollow(files, states, type_name, device, disable_dynamic)
    return clip, files, states


def planned(placed, known: Mapping[str, View], chosen: Choice) -> tuple[dict[str, Pruned], list[str]]:
    """What is left out of each encoder by its file and by the chosen plan, and what to tell. placed: (file, its
    encoder, ...). Raises PlanError, StandInError."""
    pruned = {home.name: recorded(file) for file, home, _ in placed if file.checkpoint.record}
    own = {name for name, entry in pruned.items() if entry.plan is not None}
    lines = [f"{os.path.basename(pruned[name].file.path)}: pruned already, its own plan stays" for name in own]
    lines += [
        f"{os.path.basename(p.file.path)}: was saved without the stand-ins that its plan names, and pictures may break;"
        " save it again from the dense file with them in models/skrr_plans"
        for p in pruned.values()
        if p.level and p.level.standins and not p.fitted.standins
    ]
    if chosen.plan is not None:
        matched = {name: view for name, view in match(known, chosen.plan).items() if view.name not in own}
        by_plan, more = chosen.all_pruned(known, matched)
        pruned |= {name: carried(entry, pruned.get(name, entry)) for name, entry in by_plan.items()}
        lines += more
    return pruned, lines


def uncut(clip, placed, cuts: Mapping[str, Narrowing]) -> set[int]:
    """Identities of the projections that stay whole in narrowed parts, as their file can't be cut there."""
    return {
        id(clip.cond_stage_model.get_submodule(f"{home.prefix}{file.checkpoint.layout.name(layer)}"))
        for file, home, _ in placed
        for layer in cuts[home.name].whole
    }


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
    return Pruned(record.plan, level, record.unread, None, file.checkpoint.stamp, file.checkpoint.fitted)


def load_hollow(
    files: Sequence[EncoderFile], states: list[Sheltered], type_name: str, device: str, disable_dynamic: bool
):
    """A CLIP of ComfyUI's for these files, on the CPU, with nothing in its sub-blocks yet. states: of each file what
    is handed over; ComfyUI may put others into the list, under the names that it goes on with."""
    options = {"initial_device": torch.device("cpu")}  # never to the accelerator before it is pruned
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip_type = getattr(comfy.sd.CLIPType, type_name.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    loader = comfy.sd.load_text_encoder_state_dicts
    extra = features.static(loader) if disable_dynamic else {}
    names = ", ".join(file.checkpoint.path.name for file in files)
    with quiet_about_missing(set().union(*(file.withheld for file in files))):
        try:
            found = loader(
                states,
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
                clip_type=clip_type,
                model_options=options,
                **extra,
            )
            for file in files:
                planted(found.cond_stage_model, file.seeds)
            return found
        except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{names}: ComfyUI can't make a text encoder of type {type_name} of it ({cause(error)});"
                " choose another type or file"
            ) from error


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
    return dataclasses.replace(found, shape=numbers_of_file(found.row, module, layout))


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
