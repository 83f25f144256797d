"""Files with packed weights loaded: ComfyUI's own loaders make the model, and the weights are never dense in it."""

import os

import comfy.model_management
import comfy.sd
import folder_paths
from torch import nn

from ....skrr_engine.files.encoder_file import Checkpoint, CheckpointError
from ....skrr_engine.weights.packed import nonzero
from ....skrr_engine.weights.tensor import PackedWeight, planted, smaller
from .. import versions as features
from ..files.fill import cause
from ..files.load import load as load_encoders
from ..plans.inputs import Choice
from .derive import pairs_of
from .patcher import with_packed
from .save import FOLDERS

WORTH = 0.2
"""The share of zeros in a dense weight from which it may be one whose zeros were stored: packed weights of encoders
whose names a checkpoint has joined."""


def path_of(choice: str) -> str:
    """The file of a name that `model_files` lists. Raises CheckpointError."""
    path = features.model_path(choice)
    if path is None:
        raise CheckpointError(f'there is no file "{choice[:100]}": choose one of the list')
    return path


def load(choice: str, type_name: str, node_id: str | None = None) -> tuple:
    """(MODEL, CLIP, VAE) of a file by its name, None for what it has not. type_name: of a text encoder (see ComfyUI's
    CLIP loaders). Raises SkrrError."""
    path, (folder, _, name) = path_of(choice), choice.replace("\\", "/").partition("/")
    if folder == FOLDERS["text encoder"]:
        return None, load_encoders([name], type_name, Choice(None, 0.0, 0.0), "default", True, node_id), None
    checkpoint = Checkpoint(path)
    if not checkpoint.packed:
        raise CheckpointError(f"{os.path.basename(path)}: no weight in it is packed; load it with ComfyUI's own node")
    state, seeds = {}, []
    for key, entry in checkpoint.entries.items():
        if entry.kept:
            state[key] = tensor = checkpoint.tensor(key)
            if isinstance(tensor, PackedWeight):
                tensor.seed = []
                seeds.append(tensor)
    checkpoint.check_unchanged()
    whole = folder == FOLDERS["checkpoint"]
    loader = comfy.sd.load_state_dict_guess_config if whole else comfy.sd.load_diffusion_model_state_dict
    folders = {"embedding_directory": folder_paths.get_folder_paths("embeddings")} if whole else {}
    try:
        found = loader(state, **folders, **features.static(loader))
    except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path.name}: ComfyUI can't make a model of it ({cause(error)})") from error
    model, clip, vae = found[:3] if isinstance(found, tuple) else (found, None, None)
    if model is None:
        raise CheckpointError(f"{checkpoint.path.name}: ComfyUI knows no model that it could be; get the file again")
    patchers = [patcher for patcher in (model, clip and clip.patcher) if patcher is not None]
    if any(patcher.loaded_size() for patcher in patchers):  # ComfyUI counts dense weights there
        comfy.model_management.unload_all_models()
    for patcher in patchers:
        planted(patcher.model, seeds)
        with_packed(patcher)
    if clip is not None:
        repack(clip.cond_stage_model)
        with_packed(clip.patcher)
    return model, clip, vae


def repack(tree: nn.Module) -> None:
    """Pack dense weights that have many zeros: those that lie joined in a checkpoint (OpenCLIP's attention)."""
    for _, layer in pairs_of(tree):
        weight = layer.weight
        if isinstance(weight, PackedWeight) or hasattr(weight, "_qdata"):
            continue
        zeros = 1 - int(nonzero(weight).sum()) / weight.numel()
        if zeros >= WORTH:
            layer.weight = nn.Parameter(smaller(weight.detach()), requires_grad=False)
