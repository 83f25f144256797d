"""A node that loads the Shapes text encoder; its denoiser and decoder are loaded by ComfyUI's own nodes."""

import folder_paths


class ShapesCLIPLoader:
    """Load CLIP (Shapes): the frozen SmolLM2-135M that Shapes is conditioned on."""

    DESCRIPTION = "Loads the text encoder of the small Shapes model (SmolLM2-135M)."
    CATEGORY = "Skrr/Shapes"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        """The files in models/text_encoders."""
        tooltip = "shapes/model.safetensors, which python -m benchmarks.shapes.install puts there"
        return {"required": {"clip_name": (folder_paths.get_filename_list("text_encoders"), {"tooltip": tooltip})}}

    def load(self, clip_name: str):
        """The CLIP, as a node's output."""
        from .smollm2_clip import load

        return (load(folder_paths.get_full_path_or_raise("text_encoders", clip_name)),)


NODE_CLASS_MAPPINGS = {"ShapesCLIPLoader": ShapesCLIPLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"ShapesCLIPLoader": "Load CLIP (Shapes)"}
