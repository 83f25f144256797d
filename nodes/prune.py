"""Skrr Prune: search a plan for a text encoder and put it to use."""

from comfy_api.latest import io

from .host import versions as features
from .host.plans.inputs import Choice, size_gb_input
from .types import CATEGORY, SkrrPlan, advanced, own_prompts_input, rank_input, tuning_input

BEST, PARTS, PAPER = "best", "whole parts with stand-ins", "as in the paper"
METHODS = {BEST: "widths", PARTS: "standins", PAPER: "skrr"}
BEFORE = {"paper": PAPER, "linear stand-ins": PARTS}
"""What earlier workflows call them."""

ENOUGH = {BEST: 320, PARTS: 512, PAPER: 128}
"""Prompts where none are asked for."""


ALL = "all"
"""In place of an encoder's name: all of them, on one budget."""
WITHOUT = "searched without a MODEL's text projection: connect one for better plans"


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
                advanced(
                    io.String.Input(
                        "encoder",
                        default="auto",
                        tooltip="Which text encoder to prune: auto takes the largest; or its name, like t5xxl; or all,"
                        " on one budget (best quality only).",
                    )
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.42,
                    min=0.01,
                    max=0.95,
                    step=0.01,
                    tooltip="How much of the encoder to remove. 0.42 is a good start: look at your pictures, and remove"
                    " less where they suffer.",
                ),
                advanced(
                    io.Int.Input(
                        "beam",
                        default=3,
                        min=1,
                        max=16,
                        tooltip="As in the paper only: how many plans the search follows side by side. 3 is best.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "reuse",
                        default=True,
                        tooltip="Not with the best quality: let kept parts stand in for removed ones where that helps.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "prompts",
                        default=0,
                        min=0,
                        max=10000,
                        tooltip="How many built-in prompts to fit and compare on. 0: enough for the chosen quality.",
                    )
                ),
                io.String.Input("plan_name", default="my_plan", tooltip="Name of the plan file in models/skrr_plans."),
                own_prompts_input(),
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
                    options=[BEST, PARTS, PAPER],
                    default=BEST,
                    optional=True,
                    tooltip="best: parts are made narrower, each as far as pictures bear it, and small linear maps make"
                    " up for what is gone. Whole parts: the same without narrowing. As in the paper: parts are skipped,"
                    " and others stand in for them.",
                ),
                rank_input(),
                size_gb_input(),
                tuning_input("for the size that you ask for (best quality)"),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The smaller text encoders."),
                SkrrPlan.Output(display_name="plan", tooltip="The plan, for other nodes of Skrr."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, quality=BEST) -> bool | str:
        # None: another node gives it
        if quality is None or quality in METHODS or quality in BEFORE:
            return True
        return f'there is no quality "{quality[:40]}": choose one of {", ".join(METHODS)}'

    @classmethod
    def execute(
        cls, clip, encoder, sparsity, beam, reuse, prompts, plan_name, model=None, own_prompts="", exact=False,
        quality=PAPER, rank=16, size_gb=0.0, tuning=0,
    ) -> io.NodeOutput:  # fmt: skip
        from ..skrr_engine.measure.prompts import broad, from_text, generate
        from ..skrr_engine.plan.text import PlanError
        from ..skrr_engine.search.settings import Settings, sparsity_for
        from ..skrr_engine.search.widths import LEVELS
        from ..skrr_engine.standins.fit import Fitting
        from .host.clip.derive import derive
        from .host.clip.trim import trimmed
        from .host.clip.views import choose, views
        from .host.maps import shown
        from .host.plans.match import match
        from .host.search import find_plan, find_together
        from .host.talk import say

        quality = BEFORE.get(quality, quality)
        fitting = None if quality == PAPER else Fitting(rank=rank, tuning=tuning if quality == BEST else 0)
        count = prompts or ENOUGH[quality]
        texts = from_text(own_prompts) if own_prompts.strip() else (broad if fitting else generate)(count)
        node = cls.hidden.unique_id
        if encoder.strip() == ALL:
            if quality != BEST:
                raise PlanError(f'encoder "{ALL}": one budget over all encoders takes the quality "{BEST}"; choose it')
            settings = Settings(sparsity, further=LEVELS)
            plan = find_together(clip, model, settings, size_gb, texts, plan_name, node, fitting)
            known = views(clip)
            pruned, lines = Choice(plan, sparsity, size_gb).all_pruned(known, match(known, plan))
            pruned = {name: trimmed(clip, known[name], entry) for name, entry in pruned.items()}
        else:
            view = choose(clip, encoder.strip())
            _ = view.row  # refuses an encoder that was loaded pruned
            if size_gb > 0:
                sparsity = sparsity_for(size_gb * 1e9, view.shape, rank if fitting else 0)
            if quality == BEST:
                settings = Settings(sparsity, further=LEVELS, at_least=size_gb > 0)
            else:
                settings = Settings(sparsity, (), beam, reuse, 0.0 if exact else Settings.delta)
            plan = find_plan(clip, model, view, settings, texts, plan_name, node, fitting, METHODS[quality])
            entry = plan.encoder(view.name)
            if quality != BEST:  # its one level may be above what was asked for by as much as a part
                sparsity, size_gb = entry.levels[-1].sparsity, 0.0
            pruned, lines = Choice(plan, sparsity, size_gb).pruned(view.name, view, entry)
            pruned = {view.name: trimmed(clip, view, pruned)}
            if unread := pruned[view.name].unread:
                lines.append(f"{len(unread)} more that no conditioning reads left out")
        if model is None:
            lines.append(WITHOUT)
        say("\n".join(lines), node)
        out = derive(clip, pruned)
        return io.NodeOutput(out, plan, ui=shown(out, cls.hidden, plan))
