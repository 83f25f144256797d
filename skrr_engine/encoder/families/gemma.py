"""Gemma 2 and 3 read as encoders: like Llama, with a second norm behind each body ("sandwich")."""

import re

from torch import nn

from .family import Family
from .residual import file_heads, key_value_heads, module_at, pairs

ATTENTION = ("input_layernorm", "self_attn", "post_attention_layernorm")
FEED_FORWARD = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "model.layers", "layers")
    return found if found and hasattr(found[1][0], "pre_feedforward_layernorm") else None


def width(block: nn.Module) -> int:
    return block.input_layernorm.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    return pairs(blocks, path, ATTENTION, FEED_FORWARD)


GEMMA = Family(
    name="gemma",
    norm="rms",
    find_blocks=find_blocks,
    width=width,
    sub_blocks=sub_blocks,
    bodies=lambda block: iter((block,)),
    children=frozenset((*ATTENTION, *FEED_FORWARD)),
    attention=lambda block: block.self_attn,
    arguments=frozenset(
        ("hidden_states", "attention_mask", "freqs_cis", "optimized_attention", "past_key_value", "sliding_window")
    ),
    ins=frozenset(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    outs=frozenset(("o_proj", "down_proj")),
    heads=key_value_heads,
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)model\.(?:language_model\.)?layers\.(?P<block>\d+)\.(?:"
        r"(?:(?P<attention>self_attn|input_layernorm|post_attention_layernorm)"
        r"|(?P<feed_forward>mlp|pre_feedforward_layernorm|post_feedforward_layernorm))\.(?P<rest>.+)|(?P<other>.+))"
    ),
    file_width="pre_feedforward_layernorm.weight",
    file_unused=re.compile(r"(?:model\.)?vision_tower\..+"),
    file_heads=file_heads,
)
