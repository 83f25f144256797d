"""Skrr Prune: search a plan for a text encoder and put it to use."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY, SkrrPlan, advanced

PAPER, STANDINS = "paper", "linear stand-ins"


class SkrrPrune(io.ComfyNode):
    """Finds out which parts of a text encoder your pictures can do without, and leaves them out.

    The search takes a while, can be interrupted, and goes on where it stopped. Its plan is saved in
    models/skrr_plans; a second run with the same inputs uses that at once.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrPrune",
            display_name="Skrr Prune",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("search plan", "smaller text encoder", "t5", "save memory"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders. They stay as they are; the output is a smaller one."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The diffusion model that reads the prompts. Its text projection makes the plan better.",
                ),
                io.String.Input(
                    "encoder",
                    default="auto",
                    tooltip="Which text encoder to prune: auto takes the largest; or its name, like t5xxl or clip_l.",
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.42,
                    min=0.01,
                    max=0.95,
                    step=0.01,
                    tooltip="How much of the encoder to remove. Up to 0.42 keeps pictures good; past 0.5 they break.",
                ),
                io.Int.Input(
                    "beam",
                    default=3,
                    min=1,
                    max=16,
                    tooltip="How many plans the search follows side by side. 3 is best.",
                ),
                io.Boolean.Input(
                    "reuse",
                    default=True,
                    tooltip="Let kept parts stand in for removed ones where that helps. Costs no memory.",
                ),
                io.Int.Input(
                    "prompts",
                    default=128,
                    min=1,
                    max=10000,
                    tooltip="How many built-in prompts to compare on. More is slower, and better with stand-ins.",
                ),
                io.String.Input("plan_name", default="my_plan", tooltip="Name of the plan file in models/skrr_plans."),
                io.String.Input(
                    "own_prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Your own prompts, one a line, in place of the built-in ones.",
                ),
                advanced(
                    io.Boolean.Input(
                        "exact",
                        default=False,
                        optional=True,
                        tooltip="Follow the paper's algorithm to the letter. Several times slower, hardly ever better.",
                    )
                ),
                io.Combo.Input(
                    "quality",
                    options=[PAPER, STANDINS],
                    default=PAPER,
                    optional=True,
                    tooltip="How removed parts are made up for: as in the paper, or by small linear maps fitted to them"
                    " (a few MB). Those come far closer to the whole encoder; give them 500 prompts or more.",
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
                SkrrPlan.Output(display_name="plan", tooltip="The plan, for other nodes of Skrr."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, clip, encoder, sparsity, beam, reuse, prompts, plan_name, model=None, own_prompts="", exact=False,
        quality=PAPER, rank=16,
    ) -> io.NodeOutput:  # fmt: skip
        from ..skrr_engine.files.companion import of_level
        from ..skrr_engine.measure.prompts import broad, from_text, generate
        from ..skrr_engine.search.settings import Settings
        from ..skrr_engine.standins.fit import Fitting
        from .host.clip.derive import derive
        from .host.clip.trim import trimmed
        from .host.clip.views import Pruned, choose
        from .host.maps import shown
        from .host.plans.folder import folders
        from .host.search import find_plan
        from .host.talk import say

        fitting = Fitting(rank=rank) if quality == STANDINS else None
        texts = from_text(own_prompts) if own_prompts.strip() else (broad if fitting else generate)(prompts)
        view = choose(clip, encoder.strip())
        node = cls.hidden.unique_id
        settings = Settings(sparsity, (), beam, reuse, 0.0 if exact else Settings.delta)
        plan = find_plan(clip, model, view, settings, texts, plan_name, node, fitting)
        entry = plan.encoder(view.name)
        level = entry.levels[-1]
        standins, problem = of_level(folders(), view.name, entry, level)
        pruned = trimmed(clip, view, Pruned(entry, level, standins=standins))
        gone = f"{level.skipped} of {len(view.row)} sub-blocks skipped, {level.sparsity:.1%} of it gone"
        unread = f", {len(pruned.unread)} more that no conditioning reads" if pruned.unread else ""
        bare = "" if model is not None else "; searched without a MODEL's text projection: connect one for better plans"
        say("\n".join([f"{view.name}: {gone}{unread}{bare}", *([problem] if problem else [])]), node)
        out = derive(clip, {view.name: pruned})
        return io.NodeOutput(out, plan, ui=shown(out, cls.hidden, plan))
