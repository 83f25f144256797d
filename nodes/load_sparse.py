"""Load Sparse: files without the weights that were taken out, loaded without ever making them dense."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY


class SkrrLoadSparse(io.ComfyNode):
    """Loads what Save Sparse has written: a diffusion model, a text encoder or a checkpoint.

    Its weights are read packed and stay so in RAM and VRAM.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        types = features.loader_types("CLIPLoader")
        return io.Schema(
            node_id="SkrrLoadSparse",
            display_name="Load Sparse",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("load model", "load checkpoint", "compressed-tensors"),
            inputs=[
                io.Combo.Input("file", options=features.model_files(), tooltip="A file, with its folder below models."),
                *(
                    [
                        io.Combo.Input(
                            "type", options=types, optional=True, tooltip="Of a text encoder: the model that it is for."
                        )
                    ]
                    if types
                    else []
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The diffusion model, where the file has one."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders, where the file has some."),
                io.Vae.Output(display_name="VAE", tooltip="The VAE, where the file has one."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        if file is None or features.listed(file, features.model_files()) is not None:
            return True
        return f'there is no file "{file[:100]}": put it into models/diffusion_models, text_encoders or checkpoints'

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs) -> str:
        """Runs again when the file has changed."""
        return features.model_state(file)

    @classmethod
    def execute(cls, file, type="stable_diffusion") -> io.NodeOutput:
        from .host.sparse.load import load
        from .host.talk import say

        model, clip, vae = load(file, type, cls.hidden.unique_id)
        given = [name for name, value in (("MODEL", model), ("CLIP", clip), ("VAE", vae)) if value is not None]
        say(f"{file}: {', '.join(given)}", cls.hidden.unique_id)
        return io.NodeOutput(model, clip, vae)
