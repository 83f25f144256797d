"""The nodes in other languages: complete, and loaded by the real frontend."""

import json
from pathlib import Path

import pytest

from browser import build, start

REPO = Path(__file__).resolve().parents[1]
LANGUAGES = ["en", "zh", "ja", "ko", "fr", "de", "es", "ru"]


def node_defs(language: str) -> dict:
    return json.loads((REPO / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_complete(server, language):
    """Every node, input, tooltip and output of the live server is there, nothing else is, and English is as the nodes
    themselves say it."""
    info = {k: n for k, n in server.get("/object_info").items() if k.startswith("Skrr") and "Test" not in k}
    defs = node_defs(language)
    assert defs.keys() == info.keys()
    for key, node in info.items():
        entry = defs[key]
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        assert entry["inputs"].keys() == inputs.keys(), key
        assert entry["outputs"].keys() == {str(n) for n in range(len(node["output"]))}, key
        texts = [entry["display_name"], entry["description"]]
        for part in [*entry["inputs"].values(), *entry["outputs"].values()]:
            assert part.keys() == {"name", "tooltip"}, key
            texts += part.values()
        assert all(text and text.isprintable() for text in texts), key
        if language == "en":
            assert (entry["display_name"], entry["description"]) == (node["display_name"], node["description"])
            assert {n: (n, e[1]["tooltip"]) for n, e in inputs.items()} == {
                n: (e["name"], e["tooltip"]) for n, e in entry["inputs"].items()
            }
        elif language not in ("fr", "de", "es"):  # texts in other scripts show what was left in English
            assert not entry["description"].isascii() and not entry["display_name"].isascii(), key


@pytest.fixture(params=["ja", "fr"])
def language(request, page):
    """A language that the frontend is opened in, and English again behind it."""
    page.server.post("/api/settings", {"Comfy.Locale": request.param})
    start(page, page.server)
    yield request.param
    page.server.post("/api/settings", {"Comfy.Locale": "en"})
    start(page, page.server)


def test_frontend_shows_them(page, language):
    """Frontend 1.32.9 loses what packs bring: web/js/locales.js is what puts it back there."""
    defs = node_defs(language)["SkrrLoadPlan"]
    title = page.evaluate("() => LiteGraph.registered_node_types.SkrrLoadPlan.title")
    node = page.evaluate("""
    () => {
      const node = LiteGraph.createNode("SkrrLoadPlan");
      const { inputs, outputs, widgets } = node;
      return {
        labels: [inputs[0].localized_name, widgets.find((w) => w.name === "sparsity").label, outputs[1].localized_name],
        names: [inputs[0].name, widgets.find((w) => w.name === "sparsity").name, outputs[1].name],
      };
    }
    """)
    assert title == defs["display_name"]
    parts = [defs["inputs"]["clip"], defs["inputs"]["sparsity"], defs["outputs"]["1"]]
    assert node == {"labels": [part["name"] for part in parts], "names": ["clip", "sparsity", "plan"]}
    build(page, [(1, "SkrrLoadPlan", (500, 300), {})])
    place = page.evaluate("() => window.app.canvas.convertOffsetToCanvas(skrrTest.node(1).getConnectionPos(true, 0))")
    page.mouse.move(place[0] + 4, place[1] + 60)
    page.mouse.move(place[0] + 4, place[1] + 1, steps=4)
    page.get_by_text(parts[0]["tooltip"]).wait_for()
