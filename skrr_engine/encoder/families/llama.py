"""Llama-type decoders read as encoders: Llama, Mistral, Qwen2.5, Qwen3. Norms stand in the block."""

import re

from torch import nn

from .family import Family
from .residual import file_heads, key_value_heads, module_at, pairs


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "model.layers", "layers")
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    if not found or hasattr(found[1][0], "pre_feedforward_layernorm"):
        return None
    return found if all(hasattr(block, part) for block in found[1] for part in parts) else None


def width(block: nn.Module) -> int:
    return block.input_layernorm.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    return pairs(blocks, path, ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))


LLAMA = Family(
    name="llama",
    norm="rms",
    find_blocks=find_blocks,
    width=width,
    sub_blocks=sub_blocks,
    bodies=lambda block: iter((block,)),
    children=frozenset(("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")),
    attention=lambda block: block.self_attn,
    arguments=frozenset(
        ("hidden_states", "attention_mask", "freqs_cis", "optimized_attention", "past_key_value", "sliding_window")
    ),
    ins=frozenset(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    outs=frozenset(("o_proj", "down_proj")),
    heads=key_value_heads,
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)model\.(?:language_model\.)?layers\.(?P<block>\d+)\.(?:"
        r"(?:(?P<attention>self_attn|input_layernorm)|(?P<feed_forward>mlp|post_attention_layernorm))\.(?P<rest>.+)"
        r"|(?P<other>.+))"
    ),
    file_width="input_layernorm.weight",
    file_unused=re.compile(r"(?:model\.)?vision_tower\..+"),
    file_heads=file_heads,
)
