"""T5Gemma's encoder (Stable Audio 3): Gemma's sandwich of norms under other names, attention in both directions."""

import re

from torch import nn

from .family import Family
from .residual import file_heads, key_value_heads, module_at, pairs

ATTENTION = ("pre_self_attn_layernorm", "self_attn", "post_self_attn_layernorm")
FEED_FORWARD = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "model.encoder.layers", "encoder.layers", "layers")
    parts = (*ATTENTION, *FEED_FORWARD)
    return found if found and all(hasattr(block, part) for block in found[1] for part in parts) else None


def width(block: nn.Module) -> int:
    return block.pre_self_attn_layernorm.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    return pairs(blocks, path, ATTENTION, FEED_FORWARD, (True, False))


T5GEMMA = Family(
    name="t5gemma",
    norm="rms",
    find_blocks=find_blocks,
    width=width,
    sub_blocks=sub_blocks,
    bodies=lambda block: iter((block,)),
    children=frozenset((*ATTENTION, *FEED_FORWARD)),
    attention=lambda block: block.self_attn,
    arguments=frozenset(("hidden_states", "attention_mask", "freqs_cis")),
    ins=frozenset(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    outs=frozenset(("o_proj", "down_proj")),
    heads=key_value_heads,
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)model\.encoder\.layers\.(?P<block>\d+)\.(?:"
        r"(?:(?P<attention>self_attn|pre_self_attn_layernorm|post_self_attn_layernorm)"
        r"|(?P<feed_forward>mlp|pre_feedforward_layernorm|post_feedforward_layernorm))\.(?P<rest>.+)|(?P<other>.+))"
    ),
    file_width="pre_self_attn_layernorm.weight",
    file_unused=re.compile(r"model\.decoder\..+"),
    file_heads=file_heads,
)
