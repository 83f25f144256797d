"""Load CLIP (Skrr), and its forms for two, three and four files: text encoders loaded without what a plan removes."""

from comfy_api.latest import io

from .host import versions as features
from .host.plans import inputs as choice
from .types import CATEGORY

NO_PLAN = "none"
TRIM = "Leave out layers that the model never reads. Pictures stay the same; the CLIP can't write text."


class LoadCLIP(io.ComfyNode):
    """Loads text encoders without what a plan removes: that is never read from the file, nor held in RAM or VRAM.

    Works on fp32, fp16, bf16, fp8 and scaled fp8 files, on files from Save Skrr Encoder (which need no plan), and on
    .gguf files where ComfyUI-GGUF is installed.
    """

    FILES = 1
    NODE_ID, NAME, MODEL = "SkrrCLIPLoader", "Load CLIP (Skrr)", "CLIPLoader"

    @classmethod
    def file_inputs(cls) -> list[str]:
        """Ids of the inputs that name files, as ComfyUI's own loaders have them."""
        return ["clip_name"] if cls.FILES == 1 else [f"clip_name{i + 1}" for i in range(cls.FILES)]

    @classmethod
    def define_schema(cls) -> io.Schema:
        types = features.loader_types(cls.MODEL)
        return io.Schema(
            node_id=cls.NODE_ID,
            display_name=cls.NAME,
            category=CATEGORY,
            description=" ".join(LoadCLIP.__doc__.split()),
            **features.aliases("load text encoder", "t5", "save memory", "low vram"),
            inputs=[
                *(
                    io.Combo.Input(name, options=files, tooltip="A text encoder's file.")
                    for name, files in zip(cls.file_inputs(), features.encoder_files(cls.FILES), strict=True)
                ),
                *([io.Combo.Input("type", options=types, tooltip="The model that they are for.")] if types else []),
                *choice.inputs(NO_PLAN),
                io.Boolean.Input("trim", default=True, optional=True, tooltip=TRIM),
                io.Combo.Input("device", options=["default", "cpu"], optional=True, tooltip="Where to encode."),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="The text encoders, without what the plan removes.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def offered(cls) -> set[str]:
        """The names of all files that it offers."""
        return {name for names in features.encoder_files(cls.FILES) for name in names}

    @classmethod
    def validate_inputs(
        cls, plan, plan_json="", clip_name="", clip_name1="", clip_name2="", clip_name3="", clip_name4=""
    ) -> bool | str:
        found = choice.validate(plan, plan_json, NO_PLAN)
        for name in (clip_name, clip_name1, clip_name2, clip_name3, clip_name4):
            if name and features.listed(name, cls.offered()) is None:
                return f'there is no text encoder "{name[:100]}": put the file into models/text_encoders'
        return found

    @classmethod
    def fingerprint_inputs(cls, plan, plan_json="", **kwargs) -> str:
        """Runs again when the plan's file has changed, or the stand-ins that it may name, or an encoder's file."""
        files = [kwargs.get(key) for key in cls.file_inputs()]
        return choice.fingerprint(plan, plan_json) + features.encoder_state(files)

    @classmethod
    def execute(
        cls, plan, sparsity, type="sd3", size_gb=0.0, plan_json="", trim=True, device="default", **files
    ) -> io.NodeOutput:
        from .host.files.load import load, path_of
        from .host.maps import shown

        names = [features.listed(files[key], cls.offered()) or files[key] for key in cls.file_inputs()]
        for name in names:
            path_of(name)
        chosen = choice.read(plan, plan_json, sparsity, size_gb, NO_PLAN)
        clip = load(names, type, chosen, device, trim, cls.hidden.unique_id)
        return io.NodeOutput(clip, ui=shown(clip, cls.hidden, chosen.plan))


class SkrrCLIPLoader(LoadCLIP):
    pass


class SkrrDualCLIPLoader(LoadCLIP):
    FILES = 2
    NODE_ID, NAME, MODEL = "SkrrDualCLIPLoader", "Load CLIP (Skrr, two files)", "DualCLIPLoader"


class SkrrTripleCLIPLoader(LoadCLIP):
    FILES = 3
    NODE_ID, NAME, MODEL = "SkrrTripleCLIPLoader", "Load CLIP (Skrr, three files)", "TripleCLIPLoader"


class SkrrQuadrupleCLIPLoader(LoadCLIP):
    FILES = 4
    NODE_ID, NAME, MODEL = "SkrrQuadrupleCLIPLoader", "Load CLIP (Skrr, four files)", "QuadrupleCLIPLoader"
