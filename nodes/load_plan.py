"""Load Skrr Plan: put a plan that somebody has searched to use."""

import hashlib

from comfy_api.latest import io

from ..skrr_engine.level import at_sparsity
from ..skrr_engine.plan import Plan
from .host import library
from .host.apply import Pruned, derive, match
from .host.progress import say
from .types import CATEGORY, SkrrPlan


class SkrrLoadPlan(io.ComfyNode):
    """Makes a text encoder smaller with a plan: from models/skrr_plans, from those that ship with Skrr, or as text.

    A plan works on every file of its encoder, whatever its precision.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = library.names()
        return io.Schema(
            node_id="SkrrLoadPlan",
            display_name="Load Skrr Plan",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoders. They stay as they are; the output is a smaller copy."
                ),
                io.Combo.Input(
                    "plan", options=names, tooltip="A plan from models/skrr_plans, or one that ships with Skrr."
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.45,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much to remove at most: the strongest level of the plan at or below this is used.",
                ),
                io.String.Input(
                    "plan_json",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="A plan as text. It replaces the one chosen above and travels inside the workflow.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="CLIP"), SkrrPlan.Output(display_name="plan")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, plan, plan_json="") -> bool | str:
        """A pasted plan stands in for a file that a friend's machine lacks."""
        return (
            True
            if plan_json or plan in library.names()
            else f'there is no plan "{plan[:100]}" here: choose another, or paste one'
        )

    @classmethod
    def fingerprint_inputs(cls, plan, plan_json="", **kwargs) -> str:
        """Runs again when the plan's file has changed."""
        if plan_json.strip():
            return plan_json
        with open(library.path_of(plan), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    @classmethod
    def execute(cls, clip, plan, sparsity, plan_json="") -> io.NodeOutput:
        pasted = plan_json.strip()
        loaded = Plan.from_json(pasted, "the pasted plan") if pasted else Plan.read(library.path_of(plan))
        pruned, lines = {}, []
        for name, view in match(clip, loaded).items():
            entry = loaded.encoder(name)
            level = at_sparsity(view.row, entry, sparsity)
            pruned[view.name] = Pruned(entry, level)
            lines.append(
                f"{view.name}: asked for at most {sparsity:.0%}, using the level of {level.sparsity:.1%}"
                f" ({level.skipped} of {len(view.row)} sub-blocks skipped)"
            )
        say("\n".join(lines), cls.hidden.unique_id)
        return io.NodeOutput(derive(clip, pruned), loaded)
