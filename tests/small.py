"""Small encoders of every family, seeded, in transformers' classes; ComfyUI's are in comfy_nodes/builders.py."""

from collections.abc import Callable, Mapping

import torch
import transformers as hf
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, Reuse
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure.calibration import Batch, Calibration
from skrr_engine.measure.meter import Meter

DECODER = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8,
}  # fmt: skip
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
CLIP = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "eos_token_id": 2}


def t5(layers: int):
    return hf.T5EncoderModel(hf.T5Config(num_layers=layers, **T5))


def umt5(layers: int):
    return hf.UMT5EncoderModel(hf.UMT5Config(num_layers=layers, **T5))


def clip(layers: int):
    return hf.CLIPTextModel(hf.CLIPTextConfig(num_hidden_layers=layers, **CLIP))


def llama(layers: int):
    return hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=layers, **DECODER))


def mistral(layers: int):
    return hf.MistralModel(hf.MistralConfig(num_hidden_layers=layers, **DECODER))


def qwen2(layers: int):
    config = {k: v for k, v in DECODER.items() if k != "head_dim"}
    return hf.Qwen2Model(hf.Qwen2Config(num_hidden_layers=layers, **config))


def qwen3(layers: int):
    return hf.Qwen3Model(hf.Qwen3Config(num_hidden_layers=layers, **DECODER))


def gemma2(layers: int):
    return hf.Gemma2Model(hf.Gemma2Config(num_hidden_layers=layers, sliding_window=4, **DECODER))


def gemma3(layers: int):
    return hf.Gemma3TextModel(hf.Gemma3TextConfig(num_hidden_layers=layers, sliding_window=4, **DECODER))


def t5gemma(layers: int):
    config = hf.T5GemmaModuleConfig(
        num_hidden_layers=layers, sliding_window=4, query_pre_attn_scalar=8, attn_implementation="eager", **DECODER
    )
    config.dropout_rate, config.is_encoder_decoder = 0.0, True  # as T5GemmaConfig gives them on
    return T5GemmaEncoder(config)


def gpt_oss(layers: int):
    config = hf.GptOssConfig(
        num_hidden_layers=layers, sliding_window=4, num_local_experts=4, num_experts_per_tok=2,
        attn_implementation="eager", **DECODER,
    )  # fmt: skip
    return hf.GptOssModel(config)


BUILDERS = {f.__name__: f for f in (t5, umt5, clip, llama, mistral, qwen2, qwen3, gemma2, gemma3, t5gemma, gpt_oss)}
NARROWED = tuple(name for name in BUILDERS if name != "gpt_oss")
"""Those whose sub-blocks all have units."""
FAMILY = {"umt5": "t5", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gemma2": "gemma", "gemma3": "gemma"}


def build(name: str, layers: int = 4, seed: int = 0):
    """A seeded encoder whose sub-blocks all matter, ready to run."""
    torch.manual_seed(seed)
    module = BUILDERS[name](layers).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in key and parameter.ndim == 1:
            parameter.data.add_(0.1 * noise)
        elif parameter.ndim == 2 and parameter.shape[0] != 100:
            parameter.data.copy_(noise * (0.3 + 1.2 * torch.rand((), generator=generator)) / parameter.shape[1] ** 0.5)
    return module


def family_of(name: str) -> str:
    return FAMILY.get(name, name)


def options_of(name: str) -> dict:
    """What its forward is told so that it caches no keys and values."""
    return {"use_cache": False} if family_of(name) in ("llama", "gemma", "gpt_oss") else {}


def forward(name: str, ids: list[list[int]]) -> Callable:
    """The last hidden state of an encoder on token ids of one length."""
    options = options_of(name)
    return lambda module: module(input_ids=torch.tensor(ids), **options).last_hidden_state


def actions(short: Mapping) -> dict:
    """An assignment from a short form: removed sub-block -> None, the sub-block that it re-uses, or an action."""
    return {i: SKIP if j is None else Reuse(j) if isinstance(j, int) else j for i, j in short.items()}


def batch(name: str, ids: list[list[int]]) -> Batch:
    return Batch(lambda module, times=1: [(forward(name, ids * times)(module), None)], len(ids))


def meter(name: str, module, prompts: list[list[list[int]]], null: list[int], projection=None, limit: int = 0) -> Meter:
    """A meter over batches of token ids."""
    tracer = Tracer(module, families.find(module))
    batches = [batch(name, ids) for ids in prompts]
    return Meter(Calibration(module, tracer, batches, batch(name, [null])), projection, limit)


def prompts(lengths: list[int], seed: int = 0) -> list[list[list[int]]]:
    """One batch of a single prompt for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, 100, (length,), generator=generator).tolist()] for length in lengths]
