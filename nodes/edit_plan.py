"""Edit Skrr Plan: change by hand which parts of a text encoder are left out."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY, SkrrPlan


class SkrrEditPlan(io.ComfyNode):
    """Shows the text encoders part by part: click one to keep it, to skip it, or to let another stand in for it.

    It starts from what the incoming CLIP leaves out. Your edits replace that, and travel inside the workflow.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrEditPlan",
            display_name="Edit Skrr Plan",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("plan editor", "prune by hand", "skip layers"),
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoders, dense or with a plan from Load Skrr Plan or Skrr Prune."
                ),
                io.String.Input(
                    "edited",
                    default="",
                    optional=True,
                    tooltip="The edited plan as text; the map writes it. Empty: as the incoming CLIP is.",
                ),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders with the edited plan."),
                SkrrPlan.Output(display_name="plan", tooltip="The edited plan."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,  # runs with nothing behind it, and tells a page that was reloaded its map again
        )

    @classmethod
    def validate_inputs(cls, edited="") -> bool | str:
        from ..skrr_engine.plan.model import Plan
        from ..skrr_engine.plan.text import PlanError

        try:
            # None: another node gives the text, which only the run can tell
            return not (edited or "").strip() or bool(Plan.from_json(edited.strip(), "the edited plan"))
        except PlanError as error:
            return str(error)

    @classmethod
    def execute(cls, clip, edited="") -> io.NodeOutput:
        from comfy_execution.graph_utils import ExecutionBlocker

        from ..skrr_engine.plan.model import Plan
        from .host.clip.derive import derive
        from .host.clip.views import pruning
        from .host.maps import of_clip, plan_of, shown
        from .host.plans.match import replaced

        if edited.strip():
            out = derive(clip, replaced(clip, Plan.from_json(edited.strip(), "the edited plan")))
        else:
            out = clip
        plan = plan_of(pruning(out))
        # without a plan, nodes behind the plan's output wait for one; those behind the CLIP run
        return io.NodeOutput(out, plan or ExecutionBlocker(None), ui=shown(out, cls.hidden, plan, of_clip(clip)))
