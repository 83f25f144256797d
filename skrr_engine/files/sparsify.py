"""Weights of files pruned and packed, tensor by tensor: of text encoders and denoisers, in one file or a folder's."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from ..disk.safetensors import DTYPES, Entry
from ..weights.packed import Packed
from ..weights.prune import sparsify
from ..weights.stored import FLOATS
from ..weights.tensor import smaller
from .encoder_file import CHECKPOINT, Checkpoint, CheckpointError
from .sparse import WEIGHT, SparseError

STAY = (
    "*_embedding.weight", "*embeddings.weight", "*embed_tokens.weight", "*relative_attention_bias.weight",
    "*wte.weight", "shared.weight", "*.shared.weight", "*lm_head.weight", "first_stage_model.*", "vae.*",
)  # fmt: skip
"""Names of embeddings and of VAEs in files, whose modules can't be looked at. A head that writes text is often one."""
SCALES = ("scale_weight", "weight_scale")


class Files:
    """The safetensors files of a model, one or a folder's. Raises CheckpointError."""

    def __init__(self, path: str | Path):
        path = Path(path)
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not paths:
            raise CheckpointError(f"{path}: no .safetensors file in this folder; give the folder of an encoder")
        self.checkpoints = [Checkpoint(own) for own in paths]
        self.of = {key: own for own in self.checkpoints for key, entry in own.entries.items() if entry.kept}
        self.metadata = self.checkpoints[0].metadata if len(paths) == 1 else {}
        packed = next((own for own in self.checkpoints if own.packed), None)
        if packed is not None:
            raise SparseError(f"{packed.path.name}: its zeros are not stored already; start from the dense file")

    @property
    def size(self) -> int:
        return sum(own.stamp.size for own in self.checkpoints)

    @property
    def kind(self) -> str:
        """See sparse.KINDS."""
        if any(key.startswith(CHECKPOINT[1]) for key in self.of):
            return "checkpoint"
        return "text encoder" if any(own.known_layout for own in self.checkpoints) else "diffusion model"

    def entry(self, key: str) -> Entry:
        return self.of[key].stored(key)

    def tensor(self, key: str) -> torch.Tensor:
        return self.of[key].tensor(key)

    def check_unchanged(self) -> None:
        for own in self.checkpoints:
            own.check_unchanged()

    def prunable(self, exclude: Sequence[str] = ()) -> list[str]:
        """Names of the weights that may go: see prune.prunable. exclude: patterns of names that stay. Raises
        SparseError where there is none."""
        found = []
        for key in self.of:
            entry = self.entry(key)
            if not key.endswith(WEIGHT) or len(entry.shape) < 2 or DTYPES.get(entry.dtype) not in FLOATS:
                continue
            if not any(fnmatchcase(key, pattern) for pattern in (*STAY, *exclude)):
                found.append(key)
        if not found:
            raise SparseError(f"{self.checkpoints[0].path.name}: no weight in it may go; give the file of an encoder"
                              " or a denoiser in fp32, fp16, bf16 or fp8, and exclude less")  # fmt: skip
        return found

    def layer(self, key: str) -> nn.Module:
        """A weight as prune.sparsify takes it, with its scale where it has one."""
        layer = nn.Module()
        layer.weight = nn.Parameter(self.tensor(key), requires_grad=False)
        scales = (f"{key.removesuffix(WEIGHT)}.{scale}" for scale in SCALES)
        scale = next((self.tensor(scale) for scale in scales if scale in self.of), None)
        if scale is not None:
            layer.scale_weight = scale
        return layer


def by_magnitude(files: Files, sparsity: float, exclude: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of files, the smallest of each prunable weight gone, packed where that is smaller. Raises
    SkrrError."""
    prunable = set(files.prunable(exclude))
    for key in files.of:
        if key in prunable:
            ((_, weight),) = sparsify([(key, files.layer(key))], sparsity)
            yield key, smaller(weight)
        else:
            yield key, files.tensor(key)


def as_found(files: Files, found: Mapping[str, Packed], own_values: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of files, those of which a pruned one is known packed by it. found: name of a layer -> its pruned
    weight; own_values: whether the values that stay are its own, not the file's."""
    unseen = dict(found)
    for key in files.of:
        name = next((name for name in names_of(key) if name in unseen), None)
        if name is None:
            yield key, files.tensor(key)
            continue
        pruned, weight = unseen.pop(name).unpack(), files.tensor(key)
        if own_values:
            yield key, smaller(pruned.to(weight.dtype))
        else:
            gone = pruned == 0
            yield key, smaller(torch.where(gone, torch.zeros((), dtype=weight.dtype), weight))
    if unseen:
        raise SparseError(f"{files.checkpoints[0].path.name}: {next(iter(unseen))[-80:]} is not in it under that name;"
                          " take the method magnitude")  # fmt: skip


def names_of(key: str) -> Iterator[str]:
    """What a layer may be called whose weight has this name in a file: with fewer and fewer of its prefixes."""
    if key.endswith(WEIGHT):
        parts = key.removesuffix(WEIGHT).split(".")
        yield from (".".join(parts[start:]) for start in range(len(parts)))
