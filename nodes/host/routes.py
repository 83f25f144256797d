"""What the browser asks the server for: a plan checked, and as a map, before anything runs."""

import sys


def register() -> None:
    """Add `POST /skrr/plan`, where a server runs.

    {"plan": name, "plan_json": text, "sparsity": number}, as Load Skrr Plan's inputs, gives {"map": see plan_map,
    "plan": text}, or {"error": one line}.
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
    from ..plan_map import of_plan
    from . import choice

    kinds = {"plan": str, "plan_json": str, "sparsity": int | float}
    for field, kind in kinds.items():
        if not isinstance(asked, dict) or not isinstance(asked.get(field), kind):
            return {"error": f"{field}: expected in the request, found nothing usable; reload the page"}
    try:
        chosen = choice.read(asked["plan"], asked["plan_json"], asked["sparsity"], 0.0)
    except SkrrError as error:
        return {"error": str(error)}
    return {"map": of_plan(chosen.plan, asked["sparsity"]), "plan": chosen.plan.to_json()}
