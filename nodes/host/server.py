"""What the browser asks the server for: a plan checked, and as a map, before anything runs."""

import sys

LARGEST = 1000.0
"""Of the numbers that nodes take."""


def register() -> None:
    """Add `POST /skrr/plan`, where a server runs.

    {"plan": name, "plan_json": text, "sparsity": number, "size_gb": number}, as Load Skrr Plan's inputs, gives {"map":
    see plan_map, "plan": text}, or {"error": one line}. For a size the map is empty: which level comes to that is told
    by the encoder's bytes.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)  # ComfyUI as a library has none
    if getattr(server, "instance", None) is None:
        return

    from aiohttp import web

    @server.instance.routes.post("/skrr/plan")
    async def plan(request):
        try:
            asked = await request.json()
        except ValueError:
            asked = None
        return web.json_response(answer(asked))


def answer(asked) -> dict:
    """The answer to what a browser sent, which may be anything."""
    from ...skrr_engine.errors import SkrrError
    from ..drawing.plan_map import of_plan
    from .plans import inputs as choice

    kinds = {"plan": (str,), "plan_json": (str,), "sparsity": (int, float), "size_gb": (int, float)}
    given = {"size_gb": 0.0, **asked} if isinstance(asked, dict) else {}
    for field, kind in kinds.items():
        value = given.get(field)
        if not isinstance(value, kind) or (str not in kind and not 0 <= value <= LARGEST):
            return {"error": f"{field}: expected in the request, found nothing usable; reload the page"}
    try:
        chosen = choice.read(given["plan"], given["plan_json"], given["sparsity"], given["size_gb"])
        encoders = of_plan(chosen.plan, given["sparsity"]) if not chosen.gigabytes else []
        return {"map": encoders, "plan": chosen.plan.to_json()}
    except SkrrError as error:
        return {"error": str(error)}
