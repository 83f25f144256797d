"""Pruned encoders written to files, from the files that they were loaded from or from memory."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from ....skrr_engine.disk.atomic import claim, unnamed
from ....skrr_engine.disk.safetensors import NAMES, Entry, tensor_bytes
from ....skrr_engine.encoder.standin import StandInModule
from ....skrr_engine.files.encoder_file import Checkpoint, CheckpointError
from ....skrr_engine.files.layout import Layout, layout_of
from ....skrr_engine.files.narrow import Piece
from ....skrr_engine.files.pruned import write_pruned
from ....skrr_engine.plan.model import Plan, Provenance
from ....skrr_engine.weights.tensor import PackedWeight
from ..clip.views import Pruned, View, dense_model
from ..plans import folder as library

FOLDER = "text_encoders"
HEAD = "lm_head"
"""The head of a language model that writes text: most text encoders are made without."""


class InMemory:
    """An encoder of a CLIP as a source for `write_pruned`: its weights without LoRAs, packed ones as they are, and what
    its tokenizer needs of a file (a vocabulary, for some). pruned: what is left out of it; its tensors are there where
    the CLIP is no copy of our own."""

    record = None

    def __init__(self, clip, view: View, pruned: Pruned | None = None):
        self.path = Path(f"{view.name} in memory")
        self.metadata = {"format": "pt"}
        transformer = dense_model(clip).get_submodule(view.path).transformer
        backup = clip.patcher.backup
        state = transformer.state_dict()
        added = tuple(f"{path}." for path, m in transformer.named_modules() if isinstance(m, StandInModule))
        state = {key: tensor for key, tensor in state.items() if not key.startswith(added)}
        patched = {k: backup[view.prefix + k].weight for k in state if view.prefix + k in backup}
        self._tensors = {**named_as_in_files({**state, **patched}), **tokenizer_tensors(clip, view)}
        self._tensors = {k: t.pristine() if isinstance(t, PackedWeight) else t for k, t in self._tensors.items()}
        plain = (torch.Tensor, PackedWeight)
        odd = [k for k, t in self._tensors.items() if type(t) not in plain or t.dtype not in NAMES]
        if odd:
            raise CheckpointError(
                f"{view.name} is quantised in a way that can't be saved from memory: load it with Load CLIP (Skrr),"
                " which copies from its file"
            )
        self.packed = {k for k, t in self._tensors.items() if isinstance(t, PackedWeight)}
        self._gone = pruned.gone if pruned else {}
        self.entries = {k: Entry(NAMES[t.dtype], tuple(t.shape)) for k, t in self._tensors.items()} | self._gone

    @property
    def layout(self) -> Layout:
        found = layout_of(self.entries)
        if found is None:
            raise CheckpointError(f"{self.path}: its tensors are not named as Skrr knows them")
        return found

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key].detach().cpu()

    def piece(self, key: str, piece: Piece) -> torch.Tensor:
        """What stays of a tensor."""
        own = self._tensors[key].detach()
        return own.cpu() if key in self._gone else piece.cut(own).cpu()

    def check_unchanged(self) -> None:
        """Nobody writes to it while a node runs."""

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for key in self._tensors:
            for chunk in tensor_bytes(self.tensor(key)):
                digest.update(chunk)
        return digest.hexdigest()


def named_as_in_files(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors under the names by which ComfyUI tells its encoder in a file: those of Qwen3-VL with 4B and 8B
    parameters differ from the module's own."""
    known = "visual.deepstack_merger_list.0.norm.weight" in state and "model.layers.49.mlp.up_proj.weight" not in state
    return {f"model.{k}" if known and k.startswith("visual.") else k: t for k, t in state.items()}


def tokenizer_tensors(clip, view: View) -> dict[str, torch.Tensor]:
    """What ComfyUI's tokenizer for an encoder is made from, by the names that an encoder's file has for it. Raises
    CheckpointError where that can't be written."""
    own = getattr(clip.tokenizer, view.name, clip.tokenizer)
    ask = getattr(own, "skrr_state_dict", getattr(own, "state_dict", dict))  # see apply.GuardedTokenizer
    state = ask()
    found = {key.removeprefix(f"{view.name}."): value for key, value in state.items() if value is not None}
    raw = {k: torch.tensor(list(value), dtype=torch.uint8) for k, value in found.items() if isinstance(value, bytes)}
    found = {**found, **raw}
    odd = next((key for key, value in found.items() if not torch.is_tensor(value)), None)
    if odd is not None:
        raise CheckpointError(
            f"{view.name}: its tokenizer's {odd} can't be saved from memory: load it with Load CLIP (Skrr), which"
            " copies from its file"
        )
    return found


def source_of(clip, view: View, pruned: Pruned):
    """What an encoder is saved from: the file that it was loaded from, where that is known, or memory. Raises
    CheckpointError."""
    return Checkpoint.again(pruned.file) if pruned.file else InMemory(clip, view, pruned)


def save(
    clip, view: View, pruned: Pruned, name: str, refitted: Mapping[str, torch.Tensor] | None = None
) -> tuple[str, int]:  # fmt: skip
    """Write what is left of an encoder into ComfyUI's text_encoders folder; returns the file's name and its bytes.

    refitted: see write_pruned. Raises SkrrError. No file is ever written over, whoever else saves one at the same
    moment.
    """
    stem = library.file_name(name, "a file").removesuffix(".json").removesuffix(".safetensors")
    folder = library.folder_to_write(FOLDER)
    source = source_of(clip, view, pruned)
    plan, skipped = None, 0
    if pruned.plan is not None and pruned.level is not None:
        plan, skipped = (
            Plan(encoders={view.name: pruned.plan}, provenance=Provenance(source="saved")),
            pruned.level.skipped,
        )
    spare = spare_head(clip, source.layout)
    with unnamed(folder / f"{stem}.safetensors") as whole:
        written = write_pruned(
            source, whole, view.name, plan, skipped, pruned.unread, pruned.fitted, view.shape.blocks, spare, refitted
        )
        for out in library.free_paths(FOLDER, folder, stem, ".safetensors"):
            with contextlib.suppress(FileExistsError):  # another process was quicker
                claim(whole, out)
                break
    return out.name, written


def spare_head(clip, layout: Layout) -> set[str]:
    """Names of an encoder file's tensors that are its writing head's, where the CLIP has none."""
    if any(HEAD in path.split(".") for path, _ in dense_model(clip).named_modules()):
        return set()
    return {key for key in layout.entries if HEAD in key.split(".")}
