"""Skrr Compare: what pruning has done to the conditioning, and to pictures."""

from comfy_api.latest import io, ui

from .host import versions as features
from .types import CATEGORY

EXAMPLES = """a red cube on top of a blue sphere
two dogs and a black cat under a wooden table
a street sign that says "OPEN", rainy evening, photograph
a portrait of an old fisherman, oil painting
"""


class SkrrCompare(io.ComfyNode):
    """Compares two text encoders on your prompts, token by token, and says what to expect of pictures.

    With pictures made by both, it puts them side by side, too.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrCompare",
            display_name="Skrr Compare",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("compare clip", "compare text encoders", "side by side"),
            inputs=[
                io.Clip.Input("dense", tooltip="The text encoders as they were, from the loader."),
                io.Clip.Input("pruned", tooltip="The same text encoders from a node of Skrr."),
                io.String.Input(
                    "prompts", default=EXAMPLES, multiline=True, tooltip="Prompts to compare on, one a line."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The diffusion model: D is then measured through its text projection, as in the search.",
                ),
                io.Image.Input("images_dense", optional=True, tooltip="Pictures made with the dense encoders."),
                io.Image.Input("images_pruned", optional=True, tooltip="The same pictures made with the pruned ones."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The verdict and the numbers."),
                io.Image.Output(display_name="heat_map", tooltip="Relative error of each token, a row a prompt."),
                io.Image.Output(display_name="grid", tooltip="The pictures of both sides, labelled."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dense, pruned, prompts, model=None, images_dense=None, images_pruned=None) -> io.NodeOutput:
        from comfy_execution.graph_utils import ExecutionBlocker

        from ..skrr_engine.measure.compare import compare
        from ..skrr_engine.measure.prompts import from_text
        from .drawing.comparison import as_text, grid, heat_map
        from .host.clip.readings import projection, readings
        from .host.talk import show

        texts = from_text(prompts)
        before, after = readings(dense, [*texts, ""]), readings(pruned, [*texts, ""])
        through = projection(model, dense, before[0][0][0].shape[-1]) if model is not None else None
        compared = compare(texts, before, after, through)
        text, heat = as_text(compared), heat_map(compared)
        pictures = images_dense is not None and images_pruned is not None
        # without pictures from both sides, nodes behind the grid wait for them; the others run
        sides = grid(images_dense, images_pruned, texts) if pictures else ExecutionBlocker(None)
        shown = [ui.PreviewImage(image, cls=cls).as_dict() for image in ([heat, sides] if pictures else [heat])]
        show(text, cls.hidden.unique_id)
        on_node = {**ui.PreviewText(text).as_dict(), "images": [image for part in shown for image in part["images"]]}
        return io.NodeOutput(text, heat, sides, ui=on_node)
