"""Models, CLIPs and checkpoints with packed weights, saved: to files of ComfyUI's names, without LoRAs."""

import contextlib
from collections.abc import Mapping

import comfy.model_management
import torch

from ....skrr_engine.disk.atomic import claim, unnamed
from ....skrr_engine.errors import SkrrError
from ....skrr_engine.files.sparse import write_sparse
from ....skrr_engine.weights.tensor import packed_weights
from ..clip.views import Pruned, choose, pruning
from ..files.save import save as save_encoder
from ..plans import folder as library

ATTACHMENT = "skrr_sparse"
"""Under this name a patcher carries how its weights were pruned: `(method, sparsity)`."""

FOLDERS = {"text encoder": "text_encoders", "diffusion model": "diffusion_models", "checkpoint": "checkpoints"}


def save(model, clip, vae, name: str, encoder: str = "auto") -> tuple[str, int]:
    """Write what is given into ComfyUI's folder for it: a MODEL alone, a CLIP's encoder alone, or all as a checkpoint;
    returns the file's name with its folder, and its bytes. Raises SkrrError."""
    given = [patcher for patcher in (model, clip and clip.patcher) if patcher is not None]
    if not given:
        raise SkrrError("neither a MODEL nor a CLIP: connect one of them, or both")
    if not any(packed_weights(patcher.model) for patcher in given):
        raise SkrrError("no weight of this is packed, so there is nothing to save here: connect what comes from"
                        " Sparsify Weights, or use ComfyUI's own Save nodes")  # fmt: skip
    comfy.model_management.unload_all_models()  # takes the LoRAs off
    if model is None:
        view = choose(clip, encoder.strip())
        pruned = pruning(clip).get(view.name, Pruned())
        file, size = save_encoder(clip, view, pruned, name)
        return f"{FOLDERS['text encoder']}/{file}", size
    parts = {"clip": clip and clip.get_sd(), "vae": vae and vae.get_sd()}
    kind = "diffusion model" if clip is None and vae is None else "checkpoint"
    state = model.model.state_dict_for_saving(parts["clip"], parts["vae"])
    odd = next((key for key, value in state.items() if not torch.is_tensor(value)), None)
    if odd is not None:
        raise SkrrError(f"this model is quantised in a way ({odd[:40]}) that can't be saved packed: take its file of 16"
                        " bit, or of plain fp8")  # fmt: skip
    how = {"diffusion model": model.get_attachment(ATTACHMENT)}
    how |= {"text encoder": clip.patcher.get_attachment(ATTACHMENT)} if clip is not None else {}
    return write(kind, name, state, {key: value for key, value in how.items() if value})


def write(kind: str, name: str, state: Mapping[str, torch.Tensor], how: Mapping[str, tuple[str, float]]):
    """Write tensors into the folder for their kind, under a name of their own; returns that and the file's bytes."""
    where = FOLDERS[kind]
    stem = library.file_name(name, "a file").removesuffix(".json").removesuffix(".safetensors")
    folder = library.folder_to_write(where)
    method = ", ".join(dict.fromkeys(method for method, _ in how.values()))
    shares = {part: share for part, (_, share) in how.items()}

    def tensors():
        for key, tensor in state.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield key, tensor

    with unnamed(folder / f"{stem}.safetensors") as whole:
        size = write_sparse(whole, tensors(), kind, method, shares)
        for out in library.free_paths(where, folder, stem, ".safetensors"):
            with contextlib.suppress(FileExistsError):  # another process was quicker
                claim(whole, out)
                break
    return f"{where}/{out.name}", size
