"""The nodes in other languages: complete, and loaded by the real frontend."""

import json
from pathlib import Path

import pytest

from browser import start

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


@pytest.mark.parametrize("language", ["ja", "fr"])
def test_frontend_shows_them(page, language):
    page.server.post("/api/settings", {"Comfy.Locale": language})
    try:
        start(page, page.server)
        defs = node_defs(language)["SkrrLoadPlan"]
        title = page.evaluate("() => LiteGraph.registered_node_types.SkrrLoadPlan.title")
        labels = page.evaluate("""
        () => {
          const node = LiteGraph.createNode("SkrrLoadPlan");
          return [node.inputs[0].localized_name, node.widgets.find((w) => w.name === "sparsity").label];
        }
        """)
        assert title == defs["display_name"]
        assert labels == [defs["inputs"]["clip"]["name"], defs["inputs"]["sparsity"]["name"]]
    finally:
        page.server.post("/api/settings", {"Comfy.Locale": "en"})
        start(page, page.server)
