"""Skrr for ComfyUI: text encoders that take less memory, by leaving out what pictures can do without."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI asks for the pack's nodes."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES
    from .nodes.host import library, routes

    library.register()
    routes.register()

    class Skrr(ComfyExtension):
        async def get_node_list(self) -> list:
            return NODES

    return Skrr()
