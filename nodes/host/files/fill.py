"""A hollow CLIP filled from an encoder's file; nothing that is run may stay unfilled."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import torch

from ....skrr_engine.encoder.row import EncoderError, describe
from ....skrr_engine.encoder.trace import Tracer
from ....skrr_engine.errors import first_line
from ....skrr_engine.files.encoder_file import CheckpointError
from ....skrr_engine.files.narrow import Narrowing
from ....skrr_engine.memory import out_of_memory
from ..clip.prompts import Conditioning
from ..clip.trim import trimmed
from ..clip.views import TRANSFORMER, Pruned, View
from .encoder_file import EncoderFile, Sheltered

SCALES = ("scale_weight", "weight_scale")
"""What the names of a quantised weight's scale end with, in files of before and of now."""
PROJECTION = "text_projection.weight"


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


def fill(
    clip, file: EncoderFile, home: View, pruned: Pruned, state: Mapping[str, torch.Tensor], cut: Narrowing
) -> None:  # fmt: skip
    """Put a file's kept sub-blocks into the pruned CLIP, and what is left of narrowed ones. Raises CheckpointError
    where one is missing or misshapen. cut: what stays of the tensors of narrowed ones.

    Each is read and copied on its own, so that no more than one is held twice; where ComfyUI maps files, all are handed
    over at once, with what the hollow CLIP has already, its `state` (a tensor that is not handed over would be taken as
    missing).
    """
    name = file.checkpoint.path.name
    missing: set[str] = set()
    where = ""
    removed = {place for place, action in pruned.removed.items() if action.units is None}
    module = clip.cond_stage_model.get_submodule(home.path).transformer
    try:
        if not file.origin:
            coming = {key: file.fetch(key, cut) for keys in file.kept(removed).values() for key in keys}
            absent, _ = clip.load_sd(Sheltered({**state, **coming}, file.tensors))
            kept = [s for i, s in enumerate(home.row.sub_blocks) if i not in removed]
            missing |= {key for key in absent for s in kept if key.startswith(tuple(f"{path}." for path in s.parts))}
            missing |= {key for s in kept for path in s.parts for key in weightless(path, module.get_submodule(path))}
        kept = file.kept(removed) if file.origin else {}
        for index, keys in kept.items():
            for path in home.row.sub_blocks[index].parts:
                part = module.get_submodule(path)  # the part itself, or what is left of it
                own = {key.removeprefix(f"{path}."): file.fetch(key, cut) for key in keys if key.startswith(f"{path}.")}
                where = f"{path}: "
                absent = part.load_state_dict(own, strict=False).missing_keys
                absent = [key for key in absent if not key.startswith("standin.")]
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
