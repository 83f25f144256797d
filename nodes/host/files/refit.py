"""Out-projections of narrowed parts fitted anew before an encoder is saved: better pictures from the same bytes."""

import dataclasses

import comfy.model_management
import comfy.utils
import torch

from ....skrr_engine.disk.safetensors import DTYPES
from ....skrr_engine.encoder.units import units_of
from ....skrr_engine.files.companion import Fitted
from ....skrr_engine.measure.prompts import broad
from ....skrr_engine.standins.fit import Fitting
from ....skrr_engine.standins.refit import refit
from ..clip.prompts import Conditioning
from ..clip.views import Pruned, View
from ..search import calibrating

PROMPTS = 1024
"""That out-projections are fitted on: with few, pictures gain nothing."""

PLAIN = ("F32", "F16", "BF16")


def why_not(clip, view: View, pruned: Pruned, entries) -> str | None:
    """Why an encoder's out-projections can't be fitted anew, in a line; None where they can. entries: of the tensors
    that it is saved from."""
    if not any(action.units is not None for action in pruned.removed.values()):
        return ""
    if view.whole is None:
        return "saved as it is: to refit it, put Load Skrr Plan behind the whole encoder instead"
    if any(key.startswith(view.prefix) for key in clip.patcher.patches):
        return "saved as it is: to refit it, take the LoRAs off, which are not saved"
    kinds = {entry.dtype for entry in entries.values() if len(entry.shape) == 2}
    return None if kinds <= set(PLAIN) else "saved as it is: only files of 16 or 32 bit can be refitted"


def refitted(
    clip, view: View, pruned: Pruned, source, node_id: str | None, prompts: int = PROMPTS
) -> tuple[Pruned, dict[str, torch.Tensor]]:  # fmt: skip
    """What is left out with its stand-ins fitted anew, and the out-projections of narrowed parts by the names that the
    source has for them. source: what it is saved from (see pruned.Source)."""
    rank = max((standin.rank for standin in pruned.standins.values()), default=Fitting.rank)
    fitting = Fitting(rank=rank)
    calibration = calibrating(Conditioning(clip, view), view, fitting)(broad(prompts), False)
    bar = comfy.utils.ProgressBar(1000, node_id=node_id)

    def tick(share: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(int(share * 1000), 1000)

    found = refit(calibration, pruned.removed, fitting, tick)
    layout = source.layout
    names = {layout.name(key): key for key in layout.entries}
    tensors, standins = {}, {}
    for place, action in found.items():
        standins[place] = getattr(action, "standin", action)
        if getattr(action, "out", None) is not None:
            key = names[f"{units_of(view.row, place).out_path}.weight"]
            tensors[key] = action.out.to("cpu", DTYPES[layout.entries[key].dtype])
    standins = {place: standin.to("cpu") for place, standin in standins.items() if place in pruned.standins}
    return dataclasses.replace(pruned, fitted=Fitted(standins, pruned.fitted.units)), tensors
