"""Memory Report: what the text encoders weigh, and what Skrr has saved."""

from comfy_api.latest import io, ui

from .host import versions as features
from .types import CATEGORY


class SkrrMemoryReport(io.ComfyNode):
    """Shows how much memory the text encoders take, how much Skrr saves, and which of their parts are left."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrMemoryReport",
            display_name="Memory Report",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("vram", "size of clip", "memory map"),
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoders, pruned or not."),
                io.Model.Input(
                    "model", optional=True, tooltip="The diffusion model, to show its share of the pipeline."
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE, to show its share of the pipeline."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Where the bytes are, in words."),
                io.Image.Output(display_name="map", tooltip="Which parts are left, as a picture."),
                io.Int.Output(display_name="saved_bytes", tooltip="How many bytes Skrr saves."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, model=None, vae=None) -> io.NodeOutput:
        from .drawing.report import as_image, as_text
        from .host.clip import memory
        from .host.maps import shown
        from .host.talk import show

        encoders = memory.encoders(clip)
        others = {
            "model": memory.model_bytes(model) if model is not None else 0,
            "VAE": memory.vae_bytes(vae) if vae is not None else 0,
        }
        packed = memory.packing(model.model) if model is not None else None
        text = as_text(encoders, others, memory.loaded_bytes(clip), packed)
        saved = sum(encoder.saved for encoder in encoders)
        show("\n".join(line for line in text.splitlines() if "saved" in line), cls.hidden.unique_id)
        on_node = {**ui.PreviewText(text).as_dict(), **shown(clip, cls.hidden)}
        return io.NodeOutput(text, as_image(encoders, others), saved, ui=on_node)
