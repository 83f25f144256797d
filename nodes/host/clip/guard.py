"""What a pruned CLIP refuses: to be read where its sub-blocks were left out."""

import copy
import functools
import time
from collections.abc import Callable, Mapping

from torch import nn

from ....skrr_engine.encoder.row import EncoderError
from .views import Pruned, View


class GuardedModel:
    """Mixed into the class of a cond_stage_model of ours: notes how long it encodes, and refuses what left-out
    sub-blocks would spoil. skrr_run: the tree that runs, where that is another one (see `derive`); skrr_trimmed:
    `(name, blocks, first unread sub-block)` of each trimmed encoder; skrr_seconds: of the last encoding, None before
    it."""

    skrr_run: nn.Module | None
    skrr_trimmed: tuple[tuple[str, int, int], ...]
    skrr_seconds: float | None

    def _skrr_runs(self):
        """What runs: a tree, or how this one was before it was guarded."""
        return super() if self.skrr_run is None else self.skrr_run

    def encode_token_weights(self, *args, **kwargs):
        start = time.perf_counter()
        out = self._skrr_runs().encode_token_weights(*args, **kwargs)
        self.skrr_seconds = time.perf_counter() - start
        return out

    def reset_clip_options(self):
        return self._skrr_runs().reset_clip_options()

    def set_clip_options(self, options):
        layer = options.get("layer")
        for name, blocks, first_unread in self.skrr_trimmed if isinstance(layer, int) else ():
            passed = blocks if abs(layer) > blocks else layer + 1 if layer >= 0 else blocks + layer + 1
            if 2 * passed > first_unread:
                raise EncoderError(
                    f"layer {layer} of {name} is asked for, but what it reads was trimmed away: put CLIP Set Last Layer"
                    " before the Skrr node"
                )
        return self._skrr_runs().set_clip_options(options)

    def generate(self, *args, **kwargs):
        if not self.skrr_trimmed:
            return self._skrr_runs().generate(*args, **kwargs)
        refuse_text(*(name for name, *_ in self.skrr_trimmed))


def refuse_text(*names: str):
    """Raises EncoderError for encoders whose last layers are gone."""
    raise EncoderError(
        f"{', '.join(names)} was trimmed for conditioning and can't write text: use the dense CLIP for that"
    )


class GuardedEncoder:
    """Mixed into the class of a trimmed encoder in a tree of ours: it writes no text. skrr_name: its name."""

    skrr_name: str

    def generate(self, *args, **kwargs):
        refuse_text(self.skrr_name)


def refusing(name: str) -> Callable:
    """A `generate` for an encoder of that name."""
    return lambda *args, **kwargs: refuse_text(name)


class GuardedTokenizer:
    """Mixed into the class of a pruned CLIP's tokenizer: ComfyUI asks it for its part of a file just when it saves the
    CLIP or a checkpoint, whose weights would have holes that no loader but ours knows."""

    def state_dict(self):
        raise EncoderError(
            "this CLIP is pruned, and a file saved so would not load again: use Save Skrr Encoder, or save the CLIP"
            " from before the Skrr node"
        )

    def skrr_state_dict(self) -> dict:
        """What the tokenizer adds to an encoder's file."""
        return super().state_dict()


def guarded_tokenizer(tokenizer):
    """A tokenizer of our own that shares all with `tokenizer`, with GuardedTokenizer's ways."""
    twin = copy.copy(tokenizer)
    twin.__class__ = guarded_class(type(tokenizer), GuardedTokenizer)
    return twin


@functools.cache
def guarded_class(base: type, guard: type) -> type:
    """`base`, a class of ComfyUI's, with the ways of one of the guards."""
    return base if issubclass(base, guard) else type(f"Guarded{base.__name__}", (guard, base), {})


def guard(
    tree: nn.Module, known: Mapping[str, View], pruned: Mapping[str, Pruned], run: nn.Module | None = None
) -> nn.Module:
    """Give a tree of ours GuardedModel's ways, and its trimmed encoders GuardedEncoder's; returns it. run: the tree
    that runs instead, where there is one."""
    tree.__class__ = guarded_class(type(tree), GuardedModel)
    unread = [(known[name], entry.unread) for name, entry in pruned.items() if entry.unread]
    tree.skrr_trimmed = tuple((view.name, view.shape.blocks, min(gone)) for view, gone in unread)
    tree.skrr_seconds = None
    tree.__dict__["skrr_run"] = run  # not a child: its weights are not this tree's
    for view, _ in unread:
        child = tree.get_submodule(view.path)
        child.__class__ = guarded_class(type(child), GuardedEncoder)
        child.skrr_name = view.name
    return tree
