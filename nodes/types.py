"""What the pack's nodes hand to each other."""

from comfy_api.latest import io

SkrrPlan = io.Custom("SKRR_PLAN")
"""A `skrr_engine.plan.Plan`."""

CATEGORY = "Skrr"
