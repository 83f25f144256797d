"""What CLIP, Llama and Gemma share: the residual addition stands in the block, `x + post(body(norm(x)))`."""

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..row import Call, Placeholder, SubBlock
from ..tree import share_weights


class ResidualSubBlock(SubBlock):
    """A sub-block whose norm, body and optional second norm are attributes of the block.

    norm, body, post: modules (post may be None); paths: theirs below the encoder, in that order;
    tuple_out: whether the body returns `(output, something)` rather than its output.
    """

    def __init__(self, index: int, norm, body, post, paths: tuple[str, ...], tuple_out: bool):
        modules = [m for m in (norm, body, post) if m is not None]
        super().__init__(index, dict(zip(paths, modules, strict=True)))
        self.norm, self.body, self.post, self.paths, self.tuple_out = norm, body, post, paths, tuple_out

    def branch(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """`post(body(norm(x)))`, what the block adds to its residual stream."""
        out = call.again(self.body, self.norm(x))
        out = out[0] if self.tuple_out else out
        return out if self.post is None else self.post(out)

    def apply(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        return x + self.branch(x, call)

    def finish(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return x + (out if self.post is None else self.post(out))

    def placeholders(
        self,
        reused: "ResidualSubBlock | None" = None,
        standin: nn.Module | None = None,
        left: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, nn.Module]:
        norm, body, *post = self.paths
        if left is not None:
            narrow = NarrowBody(left[body], standin, self)
            return {norm: Through(self.norm), body: narrow, **{p: Through(self.post) for p in post}}
        place = Body(reused, standin, self.tuple_out)
        if hasattr(self.body, "is_sliding"):  # read by transformers' Gemma 3 blocks
            place.is_sliding = self.body.is_sliding
        return {norm: nn.Identity(), body: place, **{p: nn.Identity() for p in post}}


class Body(Placeholder):
    """In place of an attention or feed-forward module: adds nothing, a re-used branch, or a stand-in. Its block's norms
    are identities, so it sees the residual stream itself."""

    def __init__(self, reused: ResidualSubBlock | None, standin: nn.Module | None, tuple_out: bool):
        super().__init__(reused, standin)
        self.tuple_out = tuple_out

    def forward(self, *args, **kwargs):
        x, call = Call.split(args, kwargs)
        if self.record is not None:
            self.record(x, call)
        if self.standin is not None:
            out = self.standin(x)
        else:
            out = x.new_zeros(()) if self.reused is None else self.reused.branch(x, call)
        return (out, advanced(call.kwargs.get("past_key_value"), x.shape[1])) if self.tuple_out else out


class NarrowBody(nn.Module):
    """In place of a body of which some units are left: adds what these make of the stream, and what a stand-in does.

    left: the narrower copy of the body; its children are this module's, too. The norms of its block only hand on what
    they get (see Through), so that it sees the residual stream itself, which the stand-in needs; it uses theirs.
    """

    def __init__(self, left: nn.Module, standin: nn.Module | None, place: ResidualSubBlock):
        super().__init__()
        self._modules.update(left._modules)
        self.standin = standin
        self.__dict__.update(left=left, place=place)
        if hasattr(left, "is_sliding"):
            self.is_sliding = left.is_sliding

    def forward(self, *args, **kwargs):
        x, call = Call.split(args, kwargs)
        out = call.again(self.left, own_forward(self.place.norm, x))
        out, *rest = out if self.place.tuple_out else (out,)
        out = out if self.place.post is None else own_forward(self.place.post, out)
        out = out if self.standin is None else out + self.standin(x)
        return (out, *rest) if self.place.tuple_out else out


class Through(nn.Module):
    """In place of a norm that a `NarrowBody` uses: hands on what it gets, and holds the norm's weights under their
    names."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        share_weights(self, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def own_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a module's class makes of a state, whatever forward a host has put on the module."""
    return type(module).forward(module, x)


def advanced(past_key_value, tokens: int):
    """ComfyUI's key-value cache after a skipped attention: nothing stored, but its position moves on with the text."""
    if isinstance(past_key_value, tuple) and len(past_key_value) == 3:
        keys, values, position = past_key_value
        return keys, values, position + tokens
    return past_key_value


def pairs(
    blocks: nn.ModuleList,
    path: str,
    attention: tuple[str, ...],
    feed_forward: tuple[str, ...],
    tuples: tuple[bool, bool] | None = None,
):
    """Both sub-blocks of each block in turn, from the attribute names (norm, body[, second norm]) in the block. tuples:
    whether an attention and a feed-forward return `(output, something)`; by default an attention where it looks so."""
    tuples = (returns_tuple(blocks[0].self_attn), False) if tuples is None else tuples
    for i, block in enumerate(blocks):
        for kind, names in enumerate((attention, feed_forward)):
            modules = [getattr(block, name) for name in names] + [None] * (3 - len(names))
            paths = tuple(f"{path}.{i}.{name}" for name in names)
            yield ResidualSubBlock(2 * i + kind, *modules, paths, tuples[kind])


def module_at(encoder: nn.Module, *paths: str) -> tuple[str, nn.ModuleList] | None:
    """The first of the paths at which the encoder has a non-empty list of blocks."""
    for path in paths:
        found = encoder
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            return path, found
    return None


def returns_tuple(attention: nn.Module) -> bool:
    """Whether an attention returns `(output, weights or cache)`: transformers' always does, ComfyUI's where it can be
    given a key-value cache."""
    return from_transformers(attention) or "past_key_value" in inspect.signature(attention.forward).parameters


def from_transformers(module: nn.Module) -> bool:
    """Whether a module is transformers' rather than ComfyUI's: the two return differently shaped results."""
    return type(module).__module__.startswith("transformers.")


def key_value_heads(attention: nn.Module) -> int:
    """How many key/value heads an attention with grouped queries has."""
    own = getattr(attention, "num_kv_heads", None)
    return attention.config.num_key_value_heads if own is None else own


def file_heads(block: int, shape: Callable[[str], tuple[int, ...] | None]) -> int | None:
    """The same by its tensors in a file, where its keys have a norm, which is as long as a head (see Family)."""
    keys, norm = (shape(f"layers.{block}.self_attn.{name}.weight") for name in ("k_proj", "k_norm"))
    return keys[0] // norm[0] if keys and norm and norm[0] and keys[0] % norm[0] == 0 else None
