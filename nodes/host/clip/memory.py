"""What a CLIP weighs, dense and pruned, and where: beside the other models of the pipeline."""

import os
from collections import Counter
from dataclasses import dataclass

from torch import nn

from ....skrr_engine.weights.tensor import packed_weights
from .views import Pruned, dense_model, pruning, size, views


@dataclass(frozen=True)
class Packing:
    """Weights that are stored without their zeros. layers: how many; places, left: of them all, dense and without;
    saved: bytes."""

    layers: int = 0
    places: int = 0
    left: int = 0
    saved: int = 0

    @property
    def sparsity(self) -> float:
        """The share that is gone."""
        return 1 - self.left / self.places if self.places else 0.0


def packing(module: nn.Module) -> Packing:
    """Of all packed weights below a module."""
    weights = [weight for weight in packed_weights(module).values() if weight.packed is not None]
    return Packing(
        len(weights),
        sum(weight.numel() for weight in weights),
        sum(len(weight.packed.values) for weight in weights),
        sum(weight.dense_nbytes - weight.nbytes for weight in weights),
    )


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of one encoder's weights: dense (with all its sub-blocks) and now; pruned: what is in place, or None.

    precision: what most of its bytes are stored as; ram, vram: where those that are left lie now; idle: bytes of
    left-out sub-blocks that are in RAM all the same, since the CLIP that it came from keeps them; disk: of its file, 0
    where that is not known; seconds: of the last prompt, None where it was not one of ours that encoded it; packed:
    what is stored without its zeros.
    """

    name: str
    family: str
    blocks: int
    dense: int
    now: int
    pruned: Pruned | None
    precision: str
    ram: int
    vram: int
    idle: int
    disk: int
    seconds: float | None
    packed: Packing = Packing()  # noqa: RUF009 - frozen

    @property
    def saved(self) -> int:
        return self.dense - self.now


def encoders(clip) -> list[EncoderMemory]:
    """Each encoder of the CLIP that Skrr knows."""
    return [encoder_memory(clip, view) for view in views(clip).values()]


def encoder_memory(clip, view) -> EncoderMemory:
    """One encoder's."""
    pruned = pruning(clip).get(view.name)
    child = clip.cond_stage_model.get_submodule(view.path)
    now = size(child)
    gone = view.shape.bytes_of(pruned.shares) - pruned.standin_bytes if pruned else 0
    ram, vram, kinds = placed(child)
    whole = sum(placed(dense_model(clip).get_submodule(view.path))[:2])
    packed = packing(child)
    return EncoderMemory(
        name=view.name,
        family=view.shape.family,
        blocks=view.shape.blocks,
        dense=now + gone + packed.saved,
        now=now,
        pruned=pruned,
        precision=kinds.most_common(1)[0][0] if kinds else "none",
        ram=ram,
        vram=vram,
        idle=whole - ram - vram,
        disk=pruned.file.size if pruned and pruned.file and os.path.isfile(pruned.file.path) else 0,
        seconds=getattr(clip.cond_stage_model, "skrr_seconds", None),
        packed=packed,
    )


def placed(module: nn.Module) -> tuple[int, int, Counter]:
    """Bytes of a module's weights in RAM and on an accelerator, and bytes by how they are stored."""
    ram = vram = 0
    kinds: Counter = Counter()
    for tensor in module.parameters():
        if tensor.device.type == "cpu":
            ram += tensor.nbytes
        else:
            vram += tensor.nbytes
        kinds[precision(tensor)] += tensor.nbytes
    return ram, vram, kinds


def precision(tensor) -> str:
    """How a weight is stored, in a word: "bfloat16", "float8_e4m3fn", "Q5_K", ..."""
    kind = getattr(tensor, "tensor_type", None)  # ComfyUI-GGUF
    return getattr(kind, "name", None) or str(getattr(tensor, "_qdata", tensor).dtype).removeprefix("torch.")


def model_bytes(model) -> int:
    """Bytes of a MODEL's weights."""
    return model.model_size()


def vae_bytes(vae) -> int:
    """Bytes of a VAE's weights."""
    return vae.patcher.model_size()


def loaded_bytes(clip) -> int:
    """Bytes that ComfyUI counts as loaded for this CLIP now."""
    return clip.patcher.loaded_size()
