"""What the pack's nodes hand to each other."""

from comfy_api.latest import io

SkrrPlan = io.Custom("SKRR_PLAN")
"""A `skrr_engine.plan.Plan`."""

CATEGORY = "Skrr"


def advanced(field: io.Input) -> io.Input:
    """An input that frontends show only among a node's advanced ones (ComfyUI 0.3.75 has no parameter for this yet)."""
    field.extra_dict = {**field.extra_dict, "advanced": True}
    return field
