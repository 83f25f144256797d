"""Save Skrr Encoder: what is left of a pruned encoder, as a file of its own."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY


class SkrrSaveEncoder(io.ComfyNode):
    """Writes a pruned text encoder to models/text_encoders: only what is left of it, with the plan inside.

    Load it with Load CLIP (Skrr), which needs no plan then. LoRAs on the CLIP are not written.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrSaveEncoder",
            display_name="Save Skrr Encoder",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("save clip", "pruned file"),
            inputs=[
                io.Clip.Input("clip", tooltip="A CLIP from Skrr Prune, Load Skrr Plan or Load CLIP (Skrr)."),
                io.String.Input(
                    "encoder",
                    default="auto",
                    tooltip="Which of its text encoders: auto takes the largest; or its name.",
                ),
                io.String.Input(
                    "file_name", default="skrr_encoder", tooltip="Name of the file in models/text_encoders."
                ),
                io.Boolean.Input(
                    "trim", default=True, optional=True, tooltip="Leave out layers that the model never reads, too."
                ),
                io.Boolean.Input(
                    "refit",
                    default=True,
                    optional=True,
                    tooltip="Fit what is left of narrowed parts anew, for better pictures at the same size. Takes a few"
                    " minutes; for encoders of 16 or 32 bit.",
                ),
            ],
            outputs=[io.String.Output(display_name="file_name", tooltip="Name of the file that was written.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, encoder, file_name, trim=True, refit=True) -> io.NodeOutput:
        from ..skrr_engine.encoder.row import EncoderError
        from .drawing.report import human
        from .host.clip.trim import trimmed
        from .host.clip.views import choose, pruning
        from .host.files.refit import refitted, why_not
        from .host.files.save import save, source_of
        from .host.talk import say

        view = choose(clip, encoder.strip())
        pruned = pruning(clip).get(view.name)
        if trim and view.whole is not None:
            pruned = trimmed(clip, view, pruned)
        if pruned is None or not pruned.removed:
            raise EncoderError(f"nothing of {view.name} is left out, so there is nothing to save: prune it first")
        node = cls.hidden.unique_id
        own, told = {}, None
        if refit:
            source = source_of(clip, view, pruned)
            told = why_not(clip, view, pruned, source.entries)
            if told is None:
                pruned, own = refitted(clip, view, pruned, source, node)
                told = f"{len(own)} narrowed parts refitted"
        name, size = save(clip, view, pruned, file_name, own)
        also = f"; {told}" if told else ""
        say(f'{view.name} saved as "{name}" in models/text_encoders, {human(size)}{also}', node)
        return io.NodeOutput(name)
