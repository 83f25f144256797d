"""Sub-blocks behind the last hidden state that a conditioning reads: they cost memory and change nothing."""

import dataclasses

from ....skrr_engine.encoder.trace import Tracer
from ....skrr_engine.errors import first_line
from ....skrr_engine.measure.walk import MISFITS
from ....skrr_engine.memory import out_of_memory
from .prompts import Conditioning
from .views import TRANSFORMER, Pruned, View, pruning


def unread(clip, view: View) -> tuple[int, ...]:
    """The sub-blocks of an encoder that no conditioning of this CLIP reads, as its layer choice is now. Nothing is
    loaded for it."""
    found = Conditioning(clip, view)
    tracer = Tracer(found.encoder, view.row, TRANSFORMER)
    boundaries = tracer.find_boundaries(tracer.trace(found.null().run))
    return tuple(range(2 * max(boundaries, default=view.shape.blocks), 2 * view.shape.blocks))


def told(clip, view: View, pruned: Pruned | None = None) -> tuple[Pruned, str]:
    """`trimmed`, and a line; where it can't be told what is read, all stays, and the line says so: a default must never
    keep a CLIP from being loaded."""
    try:
        found = trimmed(clip, view, pruned)
    except MISFITS as error:
        if out_of_memory(error):
            raise
        now = pruned or pruning(clip).get(view.name, Pruned())
        return now, f"{view.name}: nothing trimmed, as what the model reads of it can't be told ({first_line(error)})"
    more = f"{view.name}: {len(found.unread)} sub-blocks that no conditioning reads left out" if found.unread else ""
    return found, more


def trimmed(clip, view: View, pruned: Pruned | None = None) -> Pruned:
    """What is left out of an encoder (`pruned`; by default what is now), and what is unread besides."""
    now = pruned or pruning(clip).get(view.name, Pruned())
    return dataclasses.replace(now, unread=unread(clip, view))
