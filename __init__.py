"""Skrr for ComfyUI: text encoders that take less memory, by leaving out what pictures can do without."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI asks for the pack's nodes."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES
    from .nodes.host import server as routes
    from .nodes.host.plans import folder as library

    library.register()
    routes.register()

    class Skrr(ComfyExtension):
        async def get_node_list(self) -> list:
            return NODES

    return Skrr()
