"""Repair Skrr Plan: stand-ins for a plan that is there already."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY, SkrrPlan, advanced


class SkrrRepairPlan(io.ComfyNode):
    """Makes a plan better without a search: fits small linear maps to the places of the parts that it removes.

    The repaired plan is saved in models/skrr_plans, with a file beside it that belongs to it; a second run with the
    same inputs uses that at once.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrRepairPlan",
            display_name="Repair Skrr Plan",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("heal", "stand-ins", "better plan"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, whole. They stay as they are."),
                SkrrPlan.Input("plan", tooltip="The plan, from Load Skrr Plan or Skrr Prune."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The diffusion model that reads the prompts. It makes plans with widths better.",
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.45,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much to remove at most: the strongest level of the plan at or below this is used.",
                ),
                io.Boolean.Input(
                    "widths",
                    default=False,
                    tooltip="Find narrower parts that come to the same sizes instead: better, and as long as a search.",
                ),
                io.String.Input("plan_name", default="repaired", tooltip="Name of the plan file in models/skrr_plans."),
                advanced(
                    io.Int.Input(
                        "prompts",
                        default=256,
                        min=16,
                        max=10000,
                        optional=True,
                        tooltip="How many built-in prompts to fit on.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "own_prompts",
                        default="",
                        multiline=True,
                        optional=True,
                        tooltip="Your own prompts, one a line, in place of the built-in ones. Give several hundred.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "rank",
                        default=16,
                        min=1,
                        max=512,
                        optional=True,
                        tooltip="Size of the linear stand-ins. 16 costs about 0.2 % of what is removed from T5-XXL.",
                    )
                ),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The smaller text encoders."),
                SkrrPlan.Output(display_name="plan", tooltip="The repaired plan."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, clip, plan, sparsity, widths, plan_name, model=None, prompts=256, own_prompts="", rank=16
    ) -> io.NodeOutput:
        from ..skrr_engine.measure.prompts import broad, from_text
        from ..skrr_engine.standins.fit import Fitting
        from .host.clip.derive import derive
        from .host.clip.views import views
        from .host.maps import shown
        from .host.plans.inputs import Choice
        from .host.plans.match import match
        from .host.search import repair_plan
        from .host.talk import say

        texts = from_text(own_prompts) if own_prompts.strip() else broad(prompts)
        node, pruned, lines = cls.hidden.unique_id, {}, []
        matched = match(views(clip), plan)
        for name in matched:
            plan.encoder(name).choose(sparsity)  # refuses, before any work, what no level answers for
        made = repair_plan(clip, model, matched, plan, texts, plan_name, node, Fitting(rank=rank), widths)
        for name, view in matched.items():
            pruned[view.name], told = Choice(made, sparsity, 0.0).pruned(name, view, made.encoder(name))
            lines += told
        say("\n".join(lines), node)
        out = derive(clip, pruned)
        return io.NodeOutput(out, made, ui=shown(out, cls.hidden, made))
