"""SmolLM2 as a CLIP, through ComfyUI's own Llama classes, which have no loader node for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.llama as llama
import comfy.utils
import torch
from comfy import sd1_clip
from transformers import AutoTokenizer


@dataclass
class SmolLM2Config(llama.Llama2Config):
    """SmolLM2-135M; `head_dim` is no field of ComfyUI's class."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    rope_theta: float = 100000.0
    head_dim = 64


class SmolLM2(llama.BaseLlama, torch.nn.Module):
    """Architecture class, as ComfyUI's Llama2 beside it."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__()
        config = SmolLM2Config(**config_dict)
        self.num_layers = config.num_hidden_layers
        self.model = llama.Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


class SmolLM2Model(sd1_clip.SDClipModel):
    """Its SDClipModel: last hidden state after the final norm."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        model_options = {**(model_options or {}), "model_name": "smollm2"}
        super().__init__(
            device=device,
            layer="last",
            textmodel_json_config={},
            dtype=dtype,
            special_tokens={"pad": 0},
            layer_norm_hidden_state=False,
            model_class=SmolLM2,
            model_options=model_options,
        )


class SmolLM2ClipModel(sd1_clip.SD1ClipModel):
    """What a CLIP holds as cond_stage_model; the encoder is its `smollm2`."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, name="smollm2", clip_model=SmolLM2Model, model_options=model_options or {}
        )


def tokenizer_class(folder: str, ends: bool = True) -> type:
    """Tokenizer class over the tokenizer in a transformers folder. ends: whether it puts a start and an end token."""

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                folder, pad_with_end=False, embedding_size=576, embedding_key="smollm2", tokenizer_class=AutoTokenizer,
                has_start_token=ends, has_end_token=ends, pad_to_max_length=False, max_length=99999999, min_length=1,
                pad_token=0, tokenizer_data=tokenizer_data or {},
            )  # fmt: skip

    class SmolLM2Tokenizer(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data or {},
                name="smollm2",
                tokenizer=Tokenizer,
            )

    return SmolLM2Tokenizer


def load(path: str | Path) -> comfy.sd.CLIP:
    """A CLIP of an encoder's .safetensors with its tokenizer beside it.

    Raises ValueError in one line where it isn't SmolLM2's whole file.
    """
    path = Path(path)
    if not (path.parent / "tokenizer.json").is_file():
        raise ValueError(f"{path.name}: no tokenizer.json beside it; run python -m benchmarks.shapes.install again")
    target = SimpleNamespace(clip=SmolLM2ClipModel, tokenizer=tokenizer_class(str(path.parent)), params={})
    clip = comfy.sd.CLIP(target, model_options={})
    missing, unexpected = clip.load_sd(comfy.utils.load_torch_file(str(path), safe_load=True))
    wrong = [key for key in (*missing, *unexpected) if "logit_scale" not in key and "text_projection" not in key]
    if wrong:
        raise ValueError(f"{path.name}: not SmolLM2-135M ({wrong[0]}); run python -m benchmarks.shapes.install again")
    return clip
