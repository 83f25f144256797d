"""CLIP's text encoder (L, H, G): pre-norm blocks with the residual in the block."""

import re

from torch import nn

from .family import Family
from .residual import module_at, pairs


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "text_model.encoder.layers", "encoder.layers")  # transformers 5 has no text_model
    return found if found and hasattr(found[1][0], "layer_norm1") else None


def width(block: nn.Module) -> int:
    return block.layer_norm1.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    return pairs(blocks, path, ("layer_norm1", "self_attn"), ("layer_norm2", "mlp"))


CLIP = Family(
    name="clip",
    norm="layer",
    find_blocks=find_blocks,
    width=width,
    sub_blocks=sub_blocks,
    bodies=lambda block: iter((block,)),
    children=frozenset(("layer_norm1", "self_attn", "layer_norm2", "mlp")),
    attention=lambda block: block.self_attn,
    arguments=frozenset(("x", "mask", "optimized_attention")),
    ins=frozenset(("q_proj", "k_proj", "v_proj", "fc1")),
    outs=frozenset(("out_proj", "fc2")),
    heads=lambda attention: getattr(attention, "heads", None) or attention.num_heads,
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)text_model\.encoder\.layers\.(?P<block>\d+)\."
        r"(?:(?:(?P<attention>self_attn|layer_norm1)|(?P<feed_forward>mlp|layer_norm2))\.(?P<rest>.+)|(?P<other>.+))"
    ),
    file_width="layer_norm1.weight",
    file_unused=re.compile(r"(?:vision_model|visual_projection)\..+"),
)
