"""T5Gemma's encoder (Stable Audio 3): Gemma's sandwich of norms under other names, attention in both directions."""

import dataclasses
import re

from torch import nn

from .gemma import FEED_FORWARD, GEMMA
from .residual import module_at, pairs

ATTENTION = ("pre_self_attn_layernorm", "self_attn", "post_self_attn_layernorm")


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "model.encoder.layers", "encoder.layers", "layers")
    parts = (*ATTENTION, *FEED_FORWARD)
    return found if found and all(hasattr(block, part) for block in found[1] for part in parts) else None


def width(block: nn.Module) -> int:
    return block.pre_self_attn_layernorm.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    return pairs(blocks, path, ATTENTION, FEED_FORWARD, (True, False))


T5GEMMA = dataclasses.replace(
    GEMMA,
    name="t5gemma",
    find_blocks=find_blocks,
    width=width,
    sub_blocks=sub_blocks,
    children=frozenset((*ATTENTION, *FEED_FORWARD)),
    arguments=frozenset(("hidden_states", "attention_mask", "freqs_cis")),
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)model\.encoder\.layers\.(?P<block>\d+)\.(?:"
        r"(?:(?P<attention>self_attn|pre_self_attn_layernorm|post_self_attn_layernorm)"
        r"|(?P<feed_forward>mlp|pre_feedforward_layernorm|post_feedforward_layernorm))\.(?P<rest>.+)|(?P<other>.+))"
    ),
    file_width="pre_self_attn_layernorm.weight",
    file_unused=re.compile(r"model\.decoder\..+"),
)
