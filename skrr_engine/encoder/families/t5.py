"""T5 and UMT5: norm and residual stand inside the sub-block.

T5's block 0 owns the position bias of the whole encoder and hands it on; its placeholder keeps it. UMT5 has one bias
per block, which goes with its attention.
"""

import inspect
import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from ..row import Call, Placeholder, SubBlock, parameter_count
from .family import Family
from .residual import from_transformers, module_at

BIAS = "SelfAttention.relative_attention_bias."


def stays(block: int, rest: str, keys: Collection[str]) -> bool:
    """Whether a tensor of block 0's attention belongs to the whole encoder: its bias, where block 1 has none."""
    return block == 0 and rest.startswith(BIAS) and not any(f"encoder.block.1.layer.0.{BIAS}" in key for key in keys)


def file_heads(block: int, shape: Callable[[str], tuple[int, ...] | None]) -> int | None:
    """How many heads attentions have by their tensors in a file: block 0's table of biases has a column for each."""
    table = shape(f"encoder.block.0.layer.0.{BIAS}weight")
    return table[1] if table is not None and len(table) == 2 else None


def find_blocks(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    found = module_at(encoder, "encoder.block", "block")
    return found if found and hasattr(found[1][0], "layer") else None


def width(block: nn.Module) -> int:
    return block.layer[0].layer_norm.weight.shape[0]


def sub_blocks(blocks: nn.ModuleList, path: str):
    # One bias for all where block 1 has none of its own (an encoder of a single block loses nothing by keeping it).
    shared = getattr(blocks[-1].layer[0].SelfAttention, "relative_attention_bias", None) is None or len(blocks) == 1
    for i, block in enumerate(blocks):
        yield T5Attention(2 * i, f"{path}.{i}.layer.0", block.layer[0], shared and i == 0)
        yield T5FeedForward(2 * i + 1, {f"{path}.{i}.layer.1": block.layer[-1]})


def bodies(block: nn.Module):
    """A T5 block and its two layers."""
    return iter((block, *block.layer))


def clamped(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A stream as a block hands it on behind one of its layers: transformers' blocks clamp what overflows in fp16."""
    if x.dtype != torch.float16 or not from_transformers(layer):
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), largest - 1000, largest)  # a tensor: asking for its value makes a GPU wait
    return x.clamp(-limit, limit)


class T5FeedForward(SubBlock):
    """`x + DenseReluDense(layer_norm(x))`."""

    def apply(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        (body,) = self.parts.values()
        return clamped(body(x.clone()), body)  # ComfyUI's adds into its input

    def finish(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return clamped(x + out, *self.parts.values())

    def placeholders(
        self,
        reused: "T5FeedForward | None" = None,
        standin: nn.Module | None = None,
        left: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, nn.Module]:
        if left is not None:
            return {path: NarrowT5Layer(part, standin) for path, part in left.items()}
        return {path: FeedForwardPlaceholder(reused, standin) for path in self.parts}


class NarrowT5Layer(nn.Module):
    """In place of a layer of which some units are left: what these make of the stream, and what a stand-in adds.

    left: the narrower copy of the layer; its children are this module's, too.
    """

    def __init__(self, left: nn.Module, standin: nn.Module | None):
        super().__init__()
        self._modules.update(left._modules)
        self.standin = standin
        self.__dict__["left"] = left

    def forward(self, *args, **kwargs):
        if self.standin is None:
            return self.left(*args, **kwargs)
        added = self.standin(args[0] if args else kwargs["hidden_states"])  # before ComfyUI's adds into its input
        out = self.left(*args, **kwargs)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added


class FeedForwardPlaceholder(Placeholder):
    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.standin is not None:
            return x + self.standin(x)
        return x if self.reused is None else self.reused.apply(x, Call())


class T5Attention(SubBlock):
    """`x + SelfAttention(layer_norm(x))`; `shared_bias`: it owns the position bias of the whole encoder."""

    def __init__(self, index: int, path: str, body: nn.Module, shared_bias: bool):
        super().__init__(index, {path: body})
        self.path, self.body, self.shared_bias = path, body, shared_bias

    def tensors(self) -> dict[str, torch.Tensor]:
        kept = f"{self.path}.SelfAttention.relative_attention_bias."
        return {k: v for k, v in super().tensors().items() if not (self.shared_bias and k.startswith(kept))}

    def parameter_count(self) -> int:
        bias = self.body.SelfAttention.relative_attention_bias if self.shared_bias else None
        return super().parameter_count() - (parameter_count(bias.weight) if bias is not None else 0)

    def apply(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        return clamped(call.again(self.body, x.clone())[0], self.body)  # ComfyUI's adds into its input

    def finish(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return clamped(x + out, self.body)

    def placeholders(
        self,
        reused: "T5Attention | None" = None,
        standin: nn.Module | None = None,
        left: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, nn.Module]:
        if left is not None:
            return {path: NarrowT5Layer(part, standin) for path, part in left.items()}
        kept = BiasKeeper(self.body.SelfAttention) if self.shared_bias else None
        return {self.path: AttentionPlaceholder(reused, standin, kept)}


class BiasKeeper(nn.Module):
    """What is left of block 0's attention: its table of relative position biases, under its old name."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        plain = {k: v for k, v in vars(attention).items() if not k.startswith("_") and k != "training"}
        self.__dict__.update(plain)  # bucket count and distance, which compute_bias reads
        self.relative_attention_bias = attention.relative_attention_bias
        self.__dict__["source"] = type(attention)
        self.hf = from_transformers(attention)
        # transformers 4 hands the mask on inside the bias; 5 adds it to the scores itself.
        self.masks = self.hf and "layer_head_mask" in inspect.signature(self.source.forward).parameters

    def _relative_position_bucket(self, *args, **kwargs):
        return self.source._relative_position_bucket(*args, **kwargs)

    def bias(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The position bias `[1, heads, tokens, tokens]` as block 0's attention would hand it on."""
        tokens = x.shape[1]
        if not self.hf:
            return self.source.compute_bias(self, tokens, tokens, x.device, x.dtype)
        bias = self.source.compute_bias(self, tokens, tokens, device=x.device)
        return bias if mask is None or not self.masks else bias + mask[:, :, :, :tokens]


class AttentionPlaceholder(Placeholder):
    """In place of a T5 attention layer. `SelfAttention` is the kept bias of block 0, None elsewhere."""

    BIAS = ("past_bias", "position_bias")  # ComfyUI's name and transformers'

    def __init__(self, reused: T5Attention | None, standin: nn.Module | None, kept: BiasKeeper | None):
        super().__init__(reused, standin)
        self.SelfAttention = kept

    def forward(self, *args, **kwargs):
        x, call = Call.split(args, kwargs)
        if self.idle:
            return self.handed(x, None, call)
        call, bias = self.with_bias(x, call)
        if self.record is not None:
            self.record(x, call)
        if self.standin is not None:
            return self.handed(x + self.standin(x), bias, call)
        return self.handed(x if self.reused is None else self.reused.apply(x, call), bias, call)

    @staticmethod
    def handed(x: torch.Tensor, bias: torch.Tensor | None, call: Call) -> tuple:
        """What the block takes apart: transformers' T5 is given the attention weights, too."""
        return (x, bias, None) if "position_bias" in call.kwargs else (x, bias)

    def with_bias(self, x: torch.Tensor, call: Call) -> tuple[Call, torch.Tensor | None]:
        """The call with the kept bias filled in, and the bias that goes on to the next block."""
        if call.args:  # ComfyUI: (mask, past_bias, optimized_attention)
            mask, past, *rest = call.args
            past = past if self.SelfAttention is None else self.SelfAttention.bias(x, mask)
            return Call((mask, past, *rest), call.kwargs, call.hidden), past
        name = next((n for n in self.BIAS if n in call.kwargs), None)
        past = call.kwargs.get(name)
        if self.SelfAttention is not None:
            mask = call.kwargs.get("mask", call.kwargs.get("attention_mask"))
            past = self.SelfAttention.bias(x, mask)
        kwargs = call.kwargs if name is None else {**call.kwargs, name: past}
        return Call((), kwargs, call.hidden), past


T5 = Family(
    name="t5",
    norm="rms",
    find_blocks=find_blocks,
    width=width,
    sub_blocks=sub_blocks,
    bodies=bodies,
    children=frozenset(("layer", "layer_norm", "SelfAttention", "DenseReluDense")),
    attention=lambda block: block.layer[0],
    arguments=frozenset(("x", "mask", "past_bias", "optimized_attention")),
    ins=frozenset(("q", "k", "v", "wi", "wi_0", "wi_1")),
    outs=frozenset(("o", "wo")),
    heads=lambda attention: getattr(attention, "n_heads", None) or attention.num_heads,
    file_key=re.compile(
        r"(?P<prefix>(?:.*\.)?)encoder\.block\.(?P<block>\d+)\.(?:"
        r"layer\.(?:(?P<attention>0)|(?P<feed_forward>1))\.(?P<rest>.+)|(?P<other>.+))"
    ),
    file_width="layer.0.layer_norm.weight",
    file_unused=re.compile(r"(?:decoder|lm_head)\..+"),
    stays=stays,
    file_heads=file_heads,
)
