"""Sparsify Weights: the smallest weights of a diffusion model and of text encoders taken out, and not stored."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY, advanced, own_prompts_input

AUTO = "auto"
METHODS = (AUTO, "magnitude", "wanda", "sparsegpt", "owl")
EACH = ("magnitude", "wanda")
"""What AUTO takes for the diffusion model and for text encoders; docs/sparse.md has why."""
PROMPTS = 64
"""Built-in prompts, where none are given."""


class SkrrSparsify(io.ComfyNode):
    """Takes single weights out of the diffusion model, of the text encoders, or of both, and stores only the others.

    The weights stay in RAM and VRAM in this smaller form, and are unpacked one layer at a time when they are used.
    LoRAs work as before.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrSparsify",
            display_name="Sparsify Weights",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("sparse", "unstructured pruning", "smaller model", "save memory"),
            inputs=[
                io.Model.Input("model", optional=True, tooltip="The diffusion model. It stays as it is."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders. They stay as they are. Put nodes that leave out parts before this one.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=AUTO,
                    tooltip="Which weights go. auto: magnitude for the diffusion model, wanda for text encoders."
                    " magnitude: the smallest, at once. The others look at prompts first, and at a few sampling steps,"
                    " which takes a while.",
                ),
                io.Float.Input(
                    "model_sparsity",
                    default=0.35,
                    min=0.0,
                    max=0.95,
                    step=0.005,
                    tooltip="How much of the diffusion model's weights to take out; 0 leaves it as it is.",
                ),
                io.Float.Input(
                    "clip_sparsity",
                    default=0.475,
                    min=0.0,
                    max=0.95,
                    step=0.005,
                    tooltip="How much of the text encoders' weights to take out; 0 leaves them as they are.",
                ),
                advanced(
                    io.String.Input(
                        "exclude",
                        default="",
                        optional=True,
                        tooltip="Layers that stay whole: parts of their names, with * for anything, separated by"
                        " commas, like *time_embed*, *out*",
                    )
                ),
                own_prompts_input(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The smaller diffusion model."),
                io.Clip.Output(display_name="CLIP", tooltip="The smaller text encoders."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, method=AUTO) -> bool | str:
        # None: another node gives it
        if method is None or method in METHODS:
            return True
        return f'there is no method "{method[:40]}": choose one of {", ".join(METHODS)}'

    @classmethod
    def execute(
        cls, method, model_sparsity, clip_sparsity, model=None, clip=None, exclude="", own_prompts=""
    ) -> io.NodeOutput:
        from ..skrr_engine.measure.prompts import broad, from_text
        from .host.sparse.derive import sparse
        from .host.talk import say

        prompts = from_text(own_prompts) if own_prompts.strip() else broad(PROMPTS)
        patterns = [pattern.strip() for pattern in exclude.split(",") if pattern.strip()]
        shares, methods = (model_sparsity, clip_sparsity), EACH if method == AUTO else (method, method)
        model, clip, lines = sparse(model, clip, methods, shares, prompts, patterns, cls.hidden.unique_id)
        say("\n".join(lines), cls.hidden.unique_id)
        return io.NodeOutput(model, clip)
