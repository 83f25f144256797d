"""Save Sparse: what Sparsify Weights has made, as a file without the zeros."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY


class SkrrSaveSparse(io.ComfyNode):
    """Writes a diffusion model, a text encoder or a whole checkpoint without the weights that were taken out.

    Load it with Load Sparse. LoRAs are not written.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrSaveSparse",
            display_name="Save Sparse",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("save model", "save checkpoint", "compressed-tensors"),
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A diffusion model. Alone it goes to models/diffusion_models, with the others to"
                    " models/checkpoints.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Text encoders. Without a model one goes to models/text_encoders."
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of a checkpoint, written as it is."),
                io.String.Input("file_name", default="skrr_sparse", tooltip="Name of the file."),
                io.String.Input(
                    "encoder",
                    default="auto",
                    optional=True,
                    tooltip="Which text encoder, where there is no model: auto takes the largest; or its name.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="file_name", tooltip="Folder and name of the file that was written.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, file_name, model=None, clip=None, vae=None, encoder="auto") -> io.NodeOutput:
        from .drawing.report import human
        from .host.sparse.save import save
        from .host.talk import say

        name, size = save(model, clip, vae, file_name, encoder)
        say(f'saved as "{name}", {human(size)}', cls.hidden.unique_id)
        return io.NodeOutput(name)
