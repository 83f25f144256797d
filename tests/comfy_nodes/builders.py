"""Small and real CLIPs for the tests, through ComfyUI's own classes."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.hidream
import comfy.text_encoders.hunyuan_image
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.pixart_t5 as pixart
import torch

# ComfyUI loads this folder by its path, outside any package.
SHAPES = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes" / "comfy_nodes"
_spec = importlib.util.spec_from_file_location("smollm2_clip", SHAPES / "smollm2_clip.py")
smollm2_clip = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = smollm2_clip  # its dataclasses look for their module there
_spec.loader.exec_module(smollm2_clip)

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


SMALL_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 2}


def hidream(seed: int = 0):
    """HiDream's four encoders; the Llama's hidden states travel in the conditioning's dictionary."""
    return seeded(
        build(
            comfy.text_encoders.hidream.hidream_clip(),
            comfy.text_encoders.hidream.HiDreamTokenizer,
            t5xxl_model_config=SMALL_T5,
            clip_l_model_config=SMALL_CLIP,
            clip_g_model_config=SMALL_CLIP,
            llama_model_config={**SMALL_LLAMA, "num_key_value_heads": 1},
        ),
        seed,
    )


def hunyuan_image(seed: int = 0):
    """Qwen2.5-VL, and a ByT5 that is run for quoted text only."""
    return seeded(
        build(
            comfy.text_encoders.hunyuan_image.te(byt5=True),
            comfy.text_encoders.hunyuan_image.HunyuanImageTokenizer,
            qwen25_7b_model_config={**SMALL_LLAMA, "num_key_value_heads": 1},
            clip_l_model_config={**SMALL_T5, "num_layers": 3},  # the name that this ByT5 goes by
        ),
        seed,
    )


class Letters:
    """A tokenizer for Mistral, whose own comes in its file: a token a letter, 20 in all."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        pass

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        letters = [(3 + ord(letter) % 90, 1.0) for letter in text][:20]
        return {"mistral3_24b": [letters + [(0, 1.0)] * (20 - len(letters))]}

    def state_dict(self):
        return {}


def flux2(seed: int = 0):
    """A Mistral in Flux 2's layout: three of its hidden states are joined."""
    config = {**SMALL_LLAMA, "num_key_value_heads": 1, "num_hidden_layers": 33, "vocab_size": 100}
    return seeded(build(comfy.text_encoders.flux.flux2_te(), Letters, mistral3_24b_model_config=config), seed)


def shapes_of_t5xxl():
    """T5-XXL in PixArt's layout in fp16 whose tensors are shapes without bytes: nothing can be encoded with it."""
    options = {"dtype": torch.float16, "initial_device": torch.device("meta")}
    target = SimpleNamespace(clip=pixart.pixart_te(), tokenizer=pixart.PixArtTokenizer, params={})
    return comfy.sd.CLIP(target, model_options=options)


def smollm2(folder: str):
    """SmolLM2-135M with its real weights, from its transformers folder."""
    from safetensors.torch import load_file

    clip = build(smollm2_clip.SmolLM2ClipModel, smollm2_clip.tokenizer_class(folder, ends=False))
    state = load_file(os.path.join(folder, "model.safetensors"))
    missing, _ = clip.load_sd(state)
    if missing:
        raise ValueError(f"SmolLM2's weights lack {missing[:3]}")
    return clip


def random_llama(seed: int = 0, layers: int = 5, folder: str = ""):
    """A small Llama with noise for weights and SmolLM2's tokenizer."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = {**small, "num_key_value_heads": 2}
    return seeded(
        build(
            smollm2_clip.SmolLM2ClipModel, smollm2_clip.tokenizer_class(folder, ends=False), smollm2_model_config=config
        ),
        seed,
    )


def build_kind(kind: str, seed: int = 0, folder: str = ""):
    """A CLIP by the name that the test nodes have for it."""
    if kind == "smollm2":
        return smollm2(folder)
    if kind == "t5xxl shapes":
        return shapes_of_t5xxl()
    return {"flux": flux, "sdxl": sdxl, "hunyuan_video": hunyuan_video}[kind](seed)
