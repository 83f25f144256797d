"""Sub-blocks behind the last hidden state that a conditioning reads: they cost memory and change nothing."""

import dataclasses

from ....skrr_engine.encoder.trace import Tracer
from .prompts import Conditioning
from .views import TRANSFORMER, Pruned, View, pruning


def unread(clip, view: View) -> tuple[int, ...]:
    """The sub-blocks of an encoder that no conditioning of this CLIP reads, as its layer choice is now. Nothing is
    loaded for it."""
    found = Conditioning(clip, view)
    tracer = Tracer(found.encoder, view.row, TRANSFORMER)
    boundaries = tracer.find_boundaries(tracer.trace(found.null().run))
    return tuple(range(2 * max(boundaries, default=view.shape.blocks), 2 * view.shape.blocks))


def trimmed(clip, view: View, pruned: Pruned | None = None) -> Pruned:
    """What is left out of an encoder (`pruned`; by default what is now), and what is unread besides."""
    now = pruned or pruning(clip).get(view.name, Pruned())
    return dataclasses.replace(now, unread=unread(clip, view))
