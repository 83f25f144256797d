"""Gemma 2 and 3 read as encoders: like Llama, with a second norm behind each body ("sandwich")."""

import re

from torch import nn

from .residual import module_at, pairs

NAME = "gemma"
NORM = "rms"
FILE_KEY = re.compile(
    r"(?P<prefix>(?:.*\.)?)model\.(?:language_model\.)?layers\.(?P<block>\d+)\.(?:"
    r"(?:(?P<attention>self_attn|input_layernorm|post_attention_layernorm)"
    r"|(?P<feed_forward>mlp|pre_feedforward_layernorm|post_feedforward_layernorm))\.(?P<rest>.+)|(?P<other>.+))"
)
FILE_WIDTH = "pre_feedforward_layernorm.weight"
FILE_UNUSED = re.compile(r"(?:model\.)?vision_tower\..+")


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "model.layers", "layers")
    if not found or not hasattr(found[1][0], "pre_feedforward_layernorm"):
        return None
    # Gemma 3n and 4 add a third sub-block to each block and share keys between blocks: not this family.
    return None if hasattr(found[1][0], "per_layer_input_gate") else found


def width(block: nn.Module) -> int:
    return block.input_layernorm.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    attention = ("input_layernorm", "self_attn", "post_attention_layernorm")
    feed_forward = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")
    return pairs(blocks, path, attention, feed_forward)
