"""GPT-OSS read as an encoder (Lens): Llama's blocks, with sinks in attention and a mixture of experts behind it.

Its feed-forward is router and experts together: they go or stay as one, and have no units that could be narrowed.
"""

import dataclasses
import re

from torch import nn

from .llama import LLAMA
from .residual import from_transformers, module_at, pairs

ATTENTION, FEED_FORWARD = ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "model.layers", "layers")
    if not found or not all(hasattr(block, part) for block in found[1] for part in (*ATTENTION, *FEED_FORWARD)):
        return None
    return found if all(hasattr(b.self_attn, "sinks") and hasattr(b.mlp, "router") for b in found[1]) else None


def sub_blocks(blocks: nn.ModuleList, path: str):
    tuples = from_transformers(blocks[0].self_attn)
    return pairs(blocks, path, ATTENTION, FEED_FORWARD, (tuples, tuples))


GPT_OSS = dataclasses.replace(
    LLAMA,
    name="gpt_oss",
    find_blocks=find_blocks,
    sub_blocks=sub_blocks,
    arguments=frozenset(("hidden_states", "attention_mask", "freqs_cis")),
    ins=frozenset(("q_proj", "k_proj", "v_proj")),
    outs=frozenset(("o_proj",)),
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)model\.layers\.(?P<block>\d+)\.(?:"
        r"(?:(?P<attention>self_attn|input_layernorm)"
        r"|(?P<feed_forward>mlp(?=\.(?:router|experts)\.)|post_attention_layernorm))\.(?P<rest>.+)"
        r"|(?P<other>.+))"
    ),
    file_unused=re.compile(r"lm_head\..+"),
)
