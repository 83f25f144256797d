"""Load Skrr Plan: put a plan that somebody has searched to use."""

from comfy_api.latest import io

from .host import versions as features
from .host.plans import inputs as choice
from .types import CATEGORY, SkrrPlan, advanced


class SkrrLoadPlan(io.ComfyNode):
    """Makes a text encoder smaller with a plan: from models/skrr_plans, from those that ship with Skrr, or as text.

    A plan works on every file of its encoder, whatever its precision.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrLoadPlan",
            display_name="Load Skrr Plan",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("prune", "smaller text encoder", "skip layers", "save memory"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders. They stay as they are; the output is a smaller one."),
                *choice.inputs(),
                advanced(
                    io.Boolean.Input(
                        "check",
                        default=False,
                        optional=True,
                        tooltip="Measure on a few prompts how well the plan fits this file, and say so. For fine-tunes"
                        " and other precisions; takes a minute, and the memory of the whole encoder.",
                    )
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For check alone: the diffusion model that reads the prompts.",
                ),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The smaller text encoders."),
                SkrrPlan.Output(display_name="plan", tooltip="The plan, for other nodes of Skrr."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, plan, plan_json="") -> bool | str:
        return choice.validate(plan, plan_json)

    @classmethod
    def fingerprint_inputs(cls, plan, plan_json="", **kwargs) -> str:
        """Runs again when the plan's file has changed, or the stand-ins that it may name."""
        return choice.fingerprint(plan, plan_json)

    @classmethod
    def execute(
        cls, clip, plan, sparsity, size_gb=0.0, plan_json="", check=False, model=None
    ) -> io.NodeOutput:  # fmt: skip
        from .host.clip.derive import derive
        from .host.clip.views import views
        from .host.maps import shown
        from .host.plans.match import match
        from .host.talk import say

        chosen = choice.read(plan, plan_json, sparsity, size_gb)
        known = views(clip)
        matched = match(known, chosen.plan)
        pruned, lines = chosen.all_pruned(known, matched)
        if check:
            from .host.transfer import told

            lines += told(clip, model, chosen.plan, matched, pruned)
        say("\n".join(lines), cls.hidden.unique_id)
        out = derive(clip, pruned)
        return io.NodeOutput(out, chosen.plan, ui=shown(out, cls.hidden, chosen.plan))
