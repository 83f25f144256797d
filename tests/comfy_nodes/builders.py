"""Small and real CLIPs for the tests, through ComfyUI's own classes."""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import comfy.sd
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.llama as llama
import torch
from comfy import sd1_clip
from transformers import AutoTokenizer

SMALL_T5 = {"d_model": 64, "d_ff": 160, "d_kv": 16, "num_heads": 4, "num_layers": 5}
SMALL_CLIP = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def seeded(clip, seed: int = 0):
    """Fill a CLIP's weights with seeded noise of a size that keeps every sub-block's share of the stream alive."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(clip.cond_stage_model.named_parameters()):
        if parameter.ndim == 0:  # logit_scale, which no conditioning reads
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and parameter.ndim == 1:
            values = 0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise
        else:
            values = noise * (0.5 if parameter.shape[0] > 10000 else 1.2 / max(parameter.shape[-1], 1) ** 0.5)
        parameter.data.copy_(values.to(parameter.dtype))
    return clip


def build(clip_class, tokenizer, **model_options):
    """A CLIP of these classes, with options that override their configurations."""
    target = SimpleNamespace(clip=clip_class, tokenizer=tokenizer, params={})
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32, **model_options})


def flux(seed: int = 0, layers: int = 5):
    """T5 + CLIP-L in Flux's layout."""
    return seeded(
        build(
            comfy.text_encoders.flux.flux_clip(),
            comfy.text_encoders.flux.FluxTokenizer,
            t5xxl_model_config={**SMALL_T5, "num_layers": layers},
            clip_l_model_config=SMALL_CLIP,
        ),
        seed,
    )


def sdxl(seed: int = 0):
    """CLIP-L + CLIP-G in SDXL's layout."""
    return seeded(
        build(
            comfy.sdxl_clip.SDXLClipModel,
            comfy.sdxl_clip.SDXLTokenizer,
            clip_l_model_config=SMALL_CLIP,
            clip_g_model_config={**SMALL_CLIP, "num_hidden_layers": 5},
        ),
        seed,
    )


def hunyuan_video(seed: int = 0):
    """CLIP-L pooled + a Llama whose hidden state -3 is read, behind a template that is cut away."""
    llama = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2}
    return seeded(
        build(
            comfy.text_encoders.hunyuan_video.hunyuan_video_clip(),
            comfy.text_encoders.hunyuan_video.HunyuanVideoTokenizer,
            llama_model_config={**llama, "num_key_value_heads": 1},
            clip_l_model_config=SMALL_CLIP,
        ),
        seed,
    )


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
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, name="smollm2", clip_model=SmolLM2Model, model_options=model_options or {}
        )


def smollm2_tokenizer(folder: str):
    """Tokenizer class over the tokenizer in a transformers folder."""

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(
                folder, pad_with_end=False, embedding_size=576, embedding_key="smollm2", tokenizer_class=AutoTokenizer,
                has_start_token=False, has_end_token=False, pad_to_max_length=False, max_length=99999999, min_length=1,
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


def smollm2(folder: str):
    """SmolLM2-135M with its real weights, from its transformers folder."""
    from safetensors.torch import load_file

    clip = build(SmolLM2ClipModel, smollm2_tokenizer(folder))
    state = load_file(os.path.join(folder, "model.safetensors"))
    missing, _ = clip.load_sd(state)
    if missing:
        raise ValueError(f"SmolLM2's weights lack {missing[:3]}")
    return clip


def random_llama(seed: int = 0, layers: int = 5, folder: str = ""):
    """A small Llama with noise for weights and SmolLM2's tokenizer."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = {**small, "num_key_value_heads": 2}
    return seeded(build(SmolLM2ClipModel, smollm2_tokenizer(folder), smollm2_model_config=config), seed)


def build_kind(kind: str, seed: int = 0, folder: str = ""):
    """A CLIP by the name that the test nodes have for it."""
    return (
        smollm2(folder)
        if kind == "smollm2"
        else {"flux": flux, "sdxl": sdxl, "hunyuan_video": hunyuan_video}[kind](seed)
    )
