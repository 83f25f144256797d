"""How well a plan fits an encoder that it may not have been made for: a fine-tune, another file, another precision."""

from collections.abc import Mapping, Sequence

from ...skrr_engine.measure.meter import Meter
from ...skrr_engine.measure.prompts import broad, generate
from ...skrr_engine.measure.prompts import sha256 as prompts_sha256
from ...skrr_engine.plan.model import Plan, Provenance
from ...skrr_engine.standins.fit import halved
from .clip.prompts import Conditioning
from .clip.views import Pruned, View
from .search import calibrating, projecting

PROMPTS = 24
"""How many it is measured on."""
BEYOND = 2.0
"""How many times the discrepancy that a plan was made with is still taken for a fit: other prompts alone make less."""


def told(clip, model, plan: Plan, matched: Mapping[str, View], pruned: Mapping[str, Pruned]) -> list[str]:
    """A line for each encoder that a plan removes something from: D here, beside D where it was made. matched: the
    plan's entry -> encoder; model: a MODEL or None. Raises EncoderError, ProjectionError."""
    through = plan.provenance.projection
    found = []
    for view in matched.values():
        entry = pruned[view.name]
        if not entry.removed:
            continue
        if through and model is None:
            found.append(
                f"{view.name}: not checked, as the plan was made through a diffusion model's text projection"
                f" ({through}): connect such a MODEL"
            )
            continue
        made_with = prompts_of(plan.provenance)
        texts = (halved(made_with)[1] if entry.fitted.standins else list(made_with))[:PROMPTS]
        d, nothing = discrepancy(clip, model if through else None, view, entry, texts)
        found.append(line(view.name, d, nothing, entry.level and entry.level.discrepancy, len(texts)))
    return found


def discrepancy(clip, model, view: View, entry: Pruned, texts: Sequence[str]) -> tuple[float, float]:
    """D of what is left out of an encoder, and that of an encoder that says nothing."""
    conditioning = Conditioning(clip, view)
    projection, _ = projecting(clip, model, conditioning)
    meter = Meter(calibrating(conditioning, view, None)(texts, False), projection)
    (found,) = meter.measure([entry.removed])
    return found.total, meter.nothing()


def prompts_of(provenance: Provenance) -> Sequence[str]:
    """The built-in prompts that a plan was made with, where it was; else some."""
    for make in (broad, generate):
        texts = make(provenance.prompts) if provenance.prompts else []
        if texts and prompts_sha256(texts) == provenance.prompts_sha256:
            return texts
    return broad(8 * PROMPTS)


def line(name: str, d: float, nothing: float, known: float | None, count: int) -> str:
    """What to tell of it. nothing: the discrepancy of an encoder that says nothing; known: where the plan was made."""
    here = f"{name}: D on {count} prompts is {d:.4g} here, {d / nothing:.1%} of what an encoder that says nothing has"
    if not known:
        return f"{here}; the plan does not say what it was where it was made"
    if d <= BEYOND * known:
        return f"{here}, {known:.4g} where the plan was made: it fits"
    return (
        f"{here}, {d / known:.1f} times the {known:.4g} where the plan was made: it does not fit this encoder well;"
        " repair it with Repair Skrr Plan, or search a plan for this file"
    )
