"""Load Skrr Plan: put a plan that somebody has searched to use."""

from comfy_api.latest import io

from .host import versions as features
from .host.plans import inputs as choice
from .types import CATEGORY, SkrrPlan


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
    def execute(cls, clip, plan, sparsity, size_gb=0.0, plan_json="") -> io.NodeOutput:
        from .host.clip.derive import derive
        from .host.clip.views import views
        from .host.maps import shown
        from .host.plans.match import match
        from .host.talk import say

        chosen = choice.read(plan, plan_json, sparsity, size_gb)
        pruned, lines = {}, []
        for name, view in match(views(clip), chosen.plan).items():
            entry = chosen.plan.encoder(name)
            pruned[view.name], told = chosen.pruned(name, view, entry)
            lines += told
        say("\n".join(lines), cls.hidden.unique_id)
        out = derive(clip, pruned)
        return io.NodeOutput(out, chosen.plan, ui=shown(out, cls.hidden, chosen.plan))
