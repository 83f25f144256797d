"""Trim Unread Layers: leave out what no conditioning reads."""

from comfy_api.latest import io

from .host import versions as features
from .types import CATEGORY


class SkrrTrimUnread(io.ComfyNode):
    """Leaves out the layers of the text encoders that your model never reads. Pictures stay the same to the last bit.

    Many models read a hidden state before the last one; what comes behind it only costs memory. No plan and no search
    are needed. The output can encode prompts, but can't write text.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SkrrTrimUnread",
            display_name="Trim Unread Layers",
            category=CATEGORY,
            description=" ".join(cls.__doc__.split()),
            **features.aliases("unused layers", "save memory"),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, as your model uses them (after CLIP Set Last Layer).")
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The text encoders without unread layers."),
                io.Int.Output(display_name="saved_bytes", tooltip="How many bytes that saves."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        from .drawing.report import human
        from .host.clip.derive import derive
        from .host.clip.trim import told
        from .host.clip.views import views
        from .host.maps import shown
        from .host.talk import say

        pruned, lines, saved = {}, [], 0
        for view in [view for view in views(clip).values() if view.whole is not None]:
            pruned[view.name], line = told(clip, view)
            size = view.shape.bytes_of(pruned[view.name].unread)
            saved += size
            lines += [f"{line}, {human(size)}" if size else line] if line else []
        say("\n".join(lines) or "every layer is read: nothing to trim", cls.hidden.unique_id)
        out = derive(clip, pruned)
        return io.NodeOutput(out, saved, ui=shown(out, cls.hidden))
