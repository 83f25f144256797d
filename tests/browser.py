"""The real frontend, driven for the browser tests: graphs are built, run and looked at."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
IMAGES = REPO / "docs" / "images"
HELP_IMAGES = REPO / "web" / "docs" / "images"
FIRST_RUN = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
}
"""No first-run dialog, and nothing that covers the graph in a picture."""

READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.SkrrPrune"

HELP = """
window.skrrTest = {
  ended: new Set(),
  node: (id) => window.app.graph.getNodeById(id),
  widget: (id, name) => skrrTest.node(id).widgets.find((w) => w.name === name),
  element: (id) => skrrTest.widget(id, "plan_map").element,
  build(nodes, links) {
    const { graph, canvas } = window.app;
    window.app.clean(); // what earlier nodes of these numbers have shown
    graph.clear();
    canvas.ds.reset();
    for (const [id, type, pos, values] of nodes) {
      const node = LiteGraph.createNode(type);
      node.id = id;
      node.pos = pos;
      graph.add(node);
      for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((w) => w.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
    }
    for (const [from, output, to, input] of links) {
      const [source, target] = [skrrTest.node(from), skrrTest.node(to)];
      const end = target.inputs.findIndex((slot) => slot.name === input);
      if (end < 0 || !source.connect(output, target, end)) throw new Error(`no link to ${input}`);
    }
  },
  point(id, index) {
    const cell = skrrTest.element(id).querySelector(`[data-encoder=t5xxl] [data-cell="${index}"]`);
    cell.dispatchEvent(new PointerEvent("pointerenter"));
    return skrrTest.element(id).querySelector(".skrr-said").textContent;
  },
  cells: (id) => [...skrrTest.element(id).querySelectorAll(".skrr-encoder")].map((encoder) => [
    encoder.dataset.encoder,
    [...encoder.querySelectorAll("[data-cell]")]
      .map((c) => [Number(c.dataset.cell), c.dataset.state, c.dataset.target ? Number(c.dataset.target) : null])
      .sort((a, b) => a[0] - b[0]),
    [...encoder.querySelectorAll("path")].map((p) => [Number(p.dataset.place), Number(p.dataset.target)]),
  ]),
};
for (const end of ["execution_success", "execution_error", "execution_interrupted"])
  window.app.api.addEventListener(end, (event) => skrrTest.ended.add(event.detail.prompt_id));
"""


def start(page, server) -> None:
    """Open the frontend and wait until its nodes are there."""
    page.goto(server.url, timeout=120_000)
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(HELP)


def start_over(page) -> None:
    """Stop what the server runs, and open the frontend anew."""
    page.server.post("/queue", {"clear": True})
    for _ in range(300):
        if not page.server.get("/queue")["queue_running"]:
            break
        page.server.interrupt()
        page.wait_for_timeout(100)
    start(page, page.server)


def seen(page, folder: Path, name: str) -> str:
    """What there is to see of a page: writes a picture into `folder`; returns its path, then the console's end."""
    path = folder / (re.sub(r"[^\w.-]+", "_", name) + ".png")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        page.screenshot(path=path, timeout=5_000)
    except Exception as error:  # a page that is gone must not hide why the test failed
        path = f"no picture: {error}"
    return "\n".join([str(path), *page.problems, *page.lines[-30:]])


def build(page, nodes: Sequence[tuple], links: Sequence[tuple] = ()) -> None:
    """A new graph. nodes: (id, type, (x, y), widget values); links: (id, output, id, name of the input)."""
    page.evaluate("([nodes, links]) => skrrTest.build(nodes, links)", [list(nodes), list(links)])


def run(page, timeout: float = 120) -> dict:
    """Queue the graph as the button does; returns the history entry of the prompt once it has succeeded."""
    before = set(page.server.get("/history"))
    queue(page)
    deadline = timeout * 10
    while not (new := set(page.server.get("/history")) - before):
        deadline -= 1
        assert deadline > 0, "the prompt did not end in time"
        page.wait_for_timeout(100)
    (prompt,) = new
    page.wait_for_function("(id) => skrrTest.ended.has(id)", arg=prompt)  # what it told has come to the page
    entry = page.server.get("/history")[prompt]
    told = [message.get("exception_message") for _, message in entry["status"]["messages"]]
    assert entry["status"]["status_str"] == "success", [words for words in told if words]
    return entry


def queue(page) -> None:
    """Queue the graph as the button does, and don't wait for it. Fails with the words of the page's error dialog."""
    page.evaluate("async () => { await window.app.queuePrompt(0); }")


def cells(page, node: int) -> dict[str, list]:
    """What a node's map shows: encoder's name -> [(sub-block, state, stand-in)], then its arcs."""
    found = page.evaluate("(id) => skrrTest.cells(id)", node)
    return {name: [[tuple(c) for c in drawn], sorted(tuple(a) for a in arcs)] for name, drawn, arcs in found}


def wait_for_map(page, node: int) -> None:
    """Until a node's map is drawn."""
    page.wait_for_function("(id) => skrrTest.cells(id).length > 0", arg=node)


def expected(entry: dict, level: dict) -> list:
    """What a map must show of an encoder's entry in a plan, both as JSON: see `cells`."""
    skipped = set(entry["order"][: level["skipped"]])
    reuse = {int(place): target for place, target in level["reuse"].items()}

    def state(index: int) -> str:
        return "reused" if index in reuse else "skipped" if index in skipped else "kept"

    places = range(2 * entry["blocks"])
    return [[(i, state(i), reuse.get(i)) for i in places], sorted(reuse.items())]


def value(page, node: int, name: str) -> Any:
    """A widget's value."""
    return page.evaluate("([id, name]) => skrrTest.widget(id, name).value", [node, name])


def said(page, node: int) -> str:
    """The line below a node's map."""
    return page.evaluate("(id) => skrrTest.element(id).querySelector('.skrr-said').textContent", node)


def workflow(page) -> dict:
    """The graph as ComfyUI saves it."""
    return json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))


def load(page, graph: dict) -> None:
    """Open a saved graph."""
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph, true, true, null); }", graph)


def picture(page, name: str, nodes: Sequence[int], folder: Path = IMAGES, margin: int = 14) -> None:
    """Write `name`.png of some nodes into docs/images or another folder, where SKRR_IMAGES asks for pictures."""
    if not os.environ.get("SKRR_IMAGES") or page.frontend != "1.32.9":
        return
    frame = """
        (ids) => {
          const boxes = ids.map(skrrTest.node).map((n) => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]);
          const canvas = window.app.canvas, [left, top] = [420, 240];
          const x = Math.min(...boxes.map((b) => b[0])), y = Math.min(...boxes.map((b) => b[1]));
          const right = Math.max(...boxes.map((b) => b[0] + b[2])), low = Math.max(...boxes.map((b) => b[1] + b[3]));
          canvas.ds.scale = 1;
          canvas.ds.offset[0] = left - x;
          canvas.ds.offset[1] = top - y;
          canvas.deselectAll?.();
          canvas.setDirty(true, true);
          return [left, top, right - x, low - y];
        }
        """
    left, top, width, height = page.evaluate(frame, list(nodes))
    clip = {"x": left - margin, "y": top - margin, "width": width + 2 * margin, "height": height + 2 * margin}
    page.mouse.move(5, 5)
    page.wait_for_timeout(700)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", clip=clip)


def palette(page, name: str) -> None:
    """Change ComfyUI's colours: "dark" or "light"."""
    page.evaluate("(name) => window.app.extensionManager.setting.set('Comfy.ColorPalette', name)", name)
    page.wait_for_timeout(500)
