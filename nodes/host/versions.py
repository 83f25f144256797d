"""What one ComfyUI has and another lacks: found out by looking for it, here and nowhere else."""

import inspect
import os
from collections.abc import Collection, Iterable

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import nodes
import torch
from comfy_api.latest import io

MODEL_FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")
"""Where ComfyUI has files that may hold packed weights."""


def loader_types(node: str) -> list[str]:
    """The values of `type` that a loader node of ComfyUI's offers; empty where it has no such input."""
    inputs = nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES() if node in nodes.NODE_CLASS_MAPPINGS else {}
    entry = inputs.get("required", {}).get("type")
    if not entry:
        return []
    return list(entry[0]) if isinstance(entry[0], list | tuple) else list(entry[1].get("options", []))


def encoder_files(files: int = 1) -> list[list[str]]:
    """What a loader of so many files offers for each: all text-encoder files, ComfyUI's and, where ComfyUI-GGUF is
    installed, `.gguf` ones. LTX-2's second file is a checkpoint; these stand behind the others."""
    known = set(folder_paths.get_filename_list("text_encoders"))
    if "clip_gguf" in folder_paths.folder_names_and_paths:
        known |= set(folder_paths.get_filename_list("clip_gguf"))
    offered = [sorted(known) for _ in range(files)]
    if files == 2 and ltx_files_in_checkpoints():
        offered[1] += [name for name in folder_paths.get_filename_list("checkpoints") if name not in known]
    return offered


def ltx_files_in_checkpoints() -> bool:
    """Whether this ComfyUI takes part of LTX-2's text encoder from a checkpoint."""
    return "LTXAVTextEncoderLoader" in nodes.NODE_CLASS_MAPPINGS


def spellings(name: str) -> list[str]:
    """A file's name as it may be in ComfyUI's lists: workflows from Windows separate folders by `\\`."""
    return [name, name.replace("\\", "/"), name.replace("/", "\\")]


def listed(name: str, names: Collection[str]) -> str | None:
    """A name as a list has it (see `spellings`), None where it is not in there."""
    return next((spelling for spelling in spellings(name) if spelling in names), None)


def encoder_path(name: str) -> str | None:
    """The file of a name that `encoder_files` lists."""
    folders = ["text_encoders", "clip_gguf", *(["checkpoints"] if ltx_files_in_checkpoints() else [])]
    known = [folder for folder in folders if folder in folder_paths.folder_names_and_paths]
    wanted = [(folder, spelling) for folder in known for spelling in dict.fromkeys(spellings(name))]
    return next((path for folder, spelling in wanted if (path := folder_paths.get_full_path(folder, spelling))), None)


def encoder_state(names: Iterable[str | None]) -> str:
    """A text that changes with text encoders' files; names that are not known yet (linked inputs) say nothing."""
    paths = [path for name in names if isinstance(name, str) and (path := encoder_path(name))]
    return str([(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)])


def model_files() -> list[str]:
    """The safetensors files of diffusion models, checkpoints and text encoders, as `folder/name`."""
    known = [(folder, name) for folder in MODEL_FOLDERS for name in folder_paths.get_filename_list(folder)]
    return [f"{folder}/{name}" for folder, name in known if name.lower().endswith((".safetensors", ".sft"))]


def model_path(choice: str) -> str | None:
    """The file of a name that `model_files` lists."""
    folder, _, name = choice.replace("\\", "/").partition("/")
    found = [folder_paths.get_full_path(folder, own) for own in spellings(name)] if folder in MODEL_FOLDERS else []
    return next((path for path in found if path), None)


def model_state(choice: str | None) -> str:
    """A text that changes with the file of a name that `model_files` lists."""
    path = model_path(choice) if isinstance(choice, str) else None
    status = os.stat(path) if path else None
    return f"{status.st_size} {status.st_mtime_ns}" if status else ""


def gguf_loader(files: int):
    """ComfyUI-GGUF's loader node for so many files, or None where that pack is not installed."""
    prefix = {1: "", 2: "Dual", 3: "Triple", 4: "Quadruple"}[files]
    return nodes.NODE_CLASS_MAPPINGS.get(f"{prefix}CLIPLoaderGGUF")


def pack_of(node: type) -> str:
    """The folder of the pack that a node's class comes from."""
    return getattr(node, "RELATIVE_PYTHON_MODULE", node.__module__).removeprefix("custom_nodes.")


def mapped_state_dict(path: str) -> dict | None:
    """A file's tensors the way that dynamic VRAM wants them (weights stay in the file until used); None where this
    ComfyUI has no dynamic VRAM or it is off, and safetensors' own mapping does."""
    management = getattr(comfy, "memory_management", None)
    if not getattr(management, "aimdo_enabled", False):
        return None
    return comfy.utils.load_torch_file(path, safe_load=True)


def converted_quants(state: dict, metadata: dict) -> dict:
    """A state dict with older forms of quantisation brought to what this ComfyUI's encoders expect.

    0.3.75 takes the metadata's own words with the tensors; later ones convert both.
    """
    convert = getattr(comfy.utils, "convert_old_quants", None)
    if convert is not None:
        state, _ = convert(state, model_prefix="", metadata=metadata)
    elif "_quantization_metadata" in metadata:
        state["_quantization_metadata"] = metadata["_quantization_metadata"]
    return state


def set_reload(patcher, factory, arguments: tuple) -> None:
    """Tell ComfyUI how to load a patcher's model anew, where it wants to know (multi-GPU, dynamic VRAM)."""
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (factory, arguments)


def aliases(*words: str) -> dict[str, list[str]]:
    """A schema's search aliases, as its keyword arguments: other words that artists search a node by."""
    return {"search_aliases": ["skrr", *words]} if "search_aliases" in io.Schema.__dataclass_fields__ else {}


def patching_type(device: torch.device) -> torch.dtype:
    """The type that LoRAs are added to weights in."""
    chosen = getattr(comfy.model_management, "lora_compute_dtype", None)
    return torch.float32 if chosen is None else chosen(device)


def seed_of(key: str) -> int:
    """What the rounding of a patched weight is seeded with."""
    return (getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed)(key)


def static(loader) -> dict[str, bool]:
    """What tells a loader of ComfyUI's to make a model without dynamic VRAM, as its keyword arguments."""
    return {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(loader).parameters else {}
