"""Repair Skrr Plan: stand-ins for a plan that is there already."""

from comfy_api.latest import io

from .host import versions as features
from .host.plans.inputs import Choice, at_most_input
from .types import CATEGORY, SkrrPlan, advanced, own_prompts_input, rank_input, tuning_input


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
                at_most_input(),
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
                own_prompts_input(),
                rank_input(),
                tuning_input("at each level"),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The smaller text encoders."),
                SkrrPlan.Output(display_name="plan", tooltip="The repaired plan."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, clip, plan, sparsity, widths, plan_name, model=None, prompts=256, own_prompts="", rank=16, tuning=0
    ) -> io.NodeOutput:
        from ..skrr_engine.measure.prompts import broad, from_text
        from ..skrr_engine.standins.fit import Fitting
        from .host.clip.derive import derive
        from .host.clip.views import views
        from .host.maps import shown
        from .host.plans.match import match
        from .host.search import repair_plan
        from .host.talk import say

        texts = from_text(own_prompts) if own_prompts.strip() else broad(prompts)
        node, pruned, lines = cls.hidden.unique_id, {}, []
        matched = match(views(clip), plan)
        for name in matched:
            plan.encoder(name).choose(sparsity)  # refuses, before any work, what no level answers for
        made = repair_plan(
            clip, model, matched, plan, texts, plan_name, node, Fitting(rank=rank, tuning=tuning), widths
        )
        for name, view in matched.items():
            pruned[view.name], told = Choice(made, sparsity, 0.0).pruned(name, view, made.encoder(name))
            lines += told
        say("\n".join(lines), node)
        out = derive(clip, pruned)
        return io.NodeOutput(out, made, ui=shown(out, cls.hidden, made))
