"""The real frontend in a browser: it loads with the pack, opens the example workflows, and finds the help pages."""

import json
import os
import re
import runpy
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from browser import HELP_IMAGES, IMAGES, build, picture, run, wait_for_map

REPO = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPO / "example_workflows").glob("*.json"))
IN_WORKFLOWS = [
    "SkrrLoadPlan",
    "SkrrMemoryReport",
    "SkrrPrune",
    "SkrrRepairPlan",
    "SkrrEditPlan",
    "SkrrCompare",
    "SkrrSaveEncoder",
]
IN_WORKFLOWS += ["SkrrDualCLIPLoader", "SkrrTripleCLIPLoader", "SkrrSparsify", "SkrrSaveSparse", "SkrrLoadSparse"]
LOADERS = ["SkrrCLIPLoader", "SkrrDualCLIPLoader", "SkrrTripleCLIPLoader", "SkrrQuadrupleCLIPLoader"]
PAGES = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), *(REPO / "web" / "docs").glob("*.md")]
NODES = [*dict.fromkeys([*IN_WORKFLOWS, *LOADERS]), "SkrrTrimUnread"]

LOAD = """
async (workflow) => {
  const app = window.app;
  await app.loadGraphData(workflow, true, true, null);
  const { output } = await app.graphToPrompt();
  const nodes = app.graph.serialize().nodes;
  return JSON.stringify({
    missing: app.graph._nodes.filter((n) => !(n.type in LiteGraph.registered_node_types)).map((n) => n.type),
    boxes: app.graph._nodes.map((n) => [n.type, ...n.getBounding()]),
    widgets: Object.fromEntries(nodes.map((n) => [n.id, n.widgets_values ?? []])),
    links: [...app.graph.links.values()].length,
    prompt: output,
  });
}
"""

SELECT = """
(type) => {
  const { graph, canvas } = window.app, node = LiteGraph.createNode(type);
  graph.clear();
  graph.add(node);
  node.pos = [1000, 300];  // clear of the side bar that help opens in
  canvas.ds.reset();
  canvas.selectNode(node);
}
"""


def test_nodes_are_in_the_menu(page):
    script = "(keys) => keys.map((k) => [LiteGraph.registered_node_types[k]].map((n) => [n.title, n.category])[0])"
    assert dict(zip(NODES, map(tuple, page.evaluate(script, NODES)), strict=True)) == {
        "SkrrPrune": ("Skrr Prune", "Skrr"),
        "SkrrRepairPlan": ("Repair Skrr Plan", "Skrr"),
        "SkrrLoadPlan": ("Load Skrr Plan", "Skrr"),
        "SkrrEditPlan": ("Edit Skrr Plan", "Skrr"),
        "SkrrMemoryReport": ("Memory Report", "Skrr"),
        "SkrrCompare": ("Skrr Compare", "Skrr"),
        "SkrrCLIPLoader": ("Load CLIP (Skrr)", "Skrr"),
        "SkrrSparsify": ("Sparsify Weights", "Skrr"),
        "SkrrSaveSparse": ("Save Sparse", "Skrr"),
        "SkrrLoadSparse": ("Load Sparse", "Skrr"),
        "SkrrDualCLIPLoader": ("Load CLIP (Skrr, two files)", "Skrr"),
        "SkrrTripleCLIPLoader": ("Load CLIP (Skrr, three files)", "Skrr"),
        "SkrrQuadrupleCLIPLoader": ("Load CLIP (Skrr, four files)", "Skrr"),
        "SkrrSaveEncoder": ("Save Skrr Encoder", "Skrr"),
        "SkrrTrimUnread": ("Trim Unread Layers", "Skrr"),
    }


def test_each_node_has_a_workflow():
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text())["nodes"]}
    assert used >= set(IN_WORKFLOWS)


@pytest.fixture
def named_files(page):
    """The files that the workflows' loaders name, empty: ComfyUI takes the workflows, and stops at a loader."""
    files = runpy.run_path(str(REPO / "docs" / "make_workflows.py"))["FILES"]
    paths = [page.server.base / "models" / folder / name for folder, names in files.items() for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    yield
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens(page, named_files, path):
    workflow = json.loads(path.read_text())
    opened = json.loads(page.evaluate(LOAD, workflow))
    assert opened["missing"] == []
    assert len(opened["boxes"]) == len(workflow["nodes"]) and opened["links"] == len(workflow["links"])
    saved = {str(node["id"]): node.get("widgets_values", []) for node in workflow["nodes"]}
    kept = {key: opened["widgets"][key][: len(values)] for key, values in saved.items()}  # newer widgets may follow
    assert kept == saved
    assert_prompt_fits(opened["prompt"], page.server.get("/object_info"))
    assert overlapping(opened["boxes"]) == []
    assert_runs_but_for_the_files(page.server, opened["prompt"])


def assert_runs_but_for_the_files(server, prompt: dict) -> None:
    """ComfyUI takes the prompt: every link, number and name passes its checks. It stops where an empty file is read."""
    done = server.wait(server.prompt(prompt))
    (kind, told), *_ = [message for message in done["status"]["messages"] if message[0] == "execution_error"]
    assert "Loader" in told["node_type"], (kind, told["node_type"], told["exception_message"])


@pytest.mark.parametrize(
    "path", sorted((REPO / "example_workflows" / "api").glob("*.json")), ids=lambda path: path.stem
)
def test_api_form(server, path):
    """It is of the workflow of its name, and this server's nodes take it."""
    prompt, info = json.loads(path.read_text()), server.get("/object_info")
    assert_prompt_fits(prompt, info)
    workflow = json.loads((REPO / "example_workflows" / path.name).read_text())
    runs = {(str(node["id"]), node["type"]) for node in workflow["nodes"] if not node["mode"] and node["type"] in info}
    assert {(key, node["class_type"]) for key, node in prompt.items()} == runs


def assert_prompt_fits(prompt: dict, info: dict) -> None:
    """Every required input of our nodes is there, and nothing that they don't know."""
    for node in (node for node in prompt.values() if node["class_type"] in NODES):
        known = info[node["class_type"]]["input"]
        given = node["inputs"].keys()
        assert known["required"].keys() <= given, node
        assert given <= known["required"].keys() | known.get("optional", {}).keys(), node
        for name, (kind, *_) in {**known["required"], **known.get("optional", {})}.items():
            if name in given and kind in ("FLOAT", "INT"):  # a text there: the widgets are out of step with the JSON
                assert isinstance(node["inputs"][name], int | float), (node, name)
        if node["class_type"] == "SkrrLoadPlan":
            assert node["inputs"]["plan"] in str(known["required"]["plan"])


def overlapping(boxes: list) -> list[tuple[str, str]]:
    """Pairs of nodes that cover one another."""
    found = []
    for number, (a, ax, ay, aw, ah) in enumerate(boxes):
        for b, bx, by, bw, bh in boxes[number + 1 :]:
            if ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah:
                found.append((a, b))
    return found


BEFORE = ["t5xxl", 0.3, 2, False, 64, "mine", "", False, "paper", 8]
"""Skrr Prune's values as a workflow saved them before it narrowed parts."""


def old_workflow(values: list) -> dict:
    node = {
        "id": 1, "type": "SkrrPrune", "pos": [100, 100], "size": [430, 400], "flags": {}, "order": 0, "mode": 0,
        "inputs": [{"name": "clip", "type": "CLIP", "link": None}, {"name": "model", "type": "MODEL", "link": None}],
        "outputs": [{"name": n, "type": t, "links": None} for n, t in (("CLIP", "CLIP"), ("plan", "SKRR_PLAN"))],
        "properties": {}, "widgets_values": values,
    }  # fmt: skip
    return {
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "groups": [],
        "config": {},
        "version": 0.4,
    }


@pytest.mark.parametrize(
    ("values", "quality"),
    [
        (BEFORE, "paper"),
        ([*BEFORE[:8], "linear stand-ins", 8], "linear stand-ins"),
        (BEFORE[:8], "as in the paper"),  # from before there was a quality
    ],
)
def test_workflows_from_before_mean_what_they_meant(page, values, quality):
    (prompt,) = json.loads(page.evaluate(LOAD, old_workflow(values)))["prompt"].values()
    names = ["encoder", "sparsity", "beam", "reuse", "prompts", "plan_name", "own_prompts", "exact"]
    assert [prompt["inputs"][name] for name in names] == values[:8]
    assert prompt["inputs"]["quality"] == quality and prompt["inputs"]["size_gb"] == 0
    assert prompt["inputs"]["rank"] == (8 if len(values) > 8 else 16)


def test_advanced_inputs_are_hidden(page):
    """On the canvas: what most artists need is there, the rest behind "Show Advanced", or where a workflow sets it."""
    seen = "() => skrrTest.node(1).widgets.filter((w) => skrrTest.node(1).isWidgetVisible(w)).map((w) => w.name)"
    build(page, [(1, "SkrrPrune", (0, 0), {})])
    assert page.evaluate(seen) == ["sparsity", "plan_name", "quality", "size_gb", "plan_map"]
    rows = "() => skrrTest.node(1).widgets.filter((w) => skrrTest.node(1).isWidgetVisible(w)).map((w) => w.y)"
    page.wait_for_timeout(300)  # drawn
    y = page.evaluate(rows)
    assert all(20 <= b - a <= 30 for a, b in zip(y, y[1:], strict=False)), f"gaps between the rows: {y}"
    menu = "() => window.app.canvas.getNodeMenuOptions(skrrTest.node(1)).map((option) => option?.content)"
    assert "Show Advanced" in page.evaluate(menu)
    page.evaluate("() => skrrTest.node(1).toggleAdvanced()")
    assert {"encoder", "beam", "own_prompts", "exact", "rank"} < {*page.evaluate(seen)}
    build(page, [(1, "SkrrRepairPlan", (0, 0), {})])
    assert page.evaluate(seen) == ["sparsity", "widths", "plan_name", "plan_map"]
    usual = ["auto", 0.42, 3, True, 0, "my_plan", "", False, "best", 16, 0]
    for values, shown in ((usual, False), ([*usual[:6], "a red cube", *usual[7:]], True)):
        page.evaluate(LOAD, old_workflow(values))
        assert ("own_prompts" in page.evaluate(seen)) == shown


def test_workflows_are_offered_as_templates(server):
    assert sorted(server.get("/workflow_templates")["skrr"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/skrr/{path.stem}.jpg").startswith(b"\xff\xd8")


def loader(page, node: str) -> None:
    """A loader with files and a plan chosen."""
    names = ["t5xxl_fp16", "clip_l", "clip_g", "llama_3.1_8b_instruct_fp8_scaled"]
    keys = ["clip_name"] if node == "SkrrCLIPLoader" else [f"clip_name{n + 1}" for n in range(FILES[node])]
    files = {key: f"{name}.safetensors" for key, name in zip(keys, names, strict=False)}
    kinds = {"SkrrTripleCLIPLoader": {}, "SkrrQuadrupleCLIPLoader": {}}.get(node, {"type": "sd3"})
    build(page, [(1, node, (0, 0), {**files, **kinds, "plan": "sd3 (shipped)", "sparsity": 0.42})])
    wait_for_map(page, 1)
    picture(page, node, [1], folder=HELP_IMAGES)


def trimmed(page, node: str) -> None:
    """Behind a CLIP with layers that are never read, after a run."""
    nodes = [(1, "SkrrTestCLIP", (0, 0), {"kind": "sdxl"}), (2, node, (320, 0), {})]
    build(page, [*nodes, (3, "SkrrMemoryReport", (860, 0), {})], [(1, 0, 2, "clip"), (2, 0, 3, "clip")])
    run(page)
    wait_for_map(page, 2)
    picture(page, node, [2], folder=HELP_IMAGES)


def repaired(page, node: str) -> None:
    """Behind the plan that it repairs, after a run."""
    entry = {
        "family": "t5", "blocks": 5, "width": 64, "order": [3, 0, 6],
        "levels": [{"skipped": 3, "reuse": {"6": 4}, "sparsity": 0.03}],
    }  # fmt: skip
    plan = {"format": "skrr-plan", "version": 1, "encoders": {"t5xxl": entry}, "provenance": {"source": "manual"}}
    nodes = [
        (1, "SkrrTestCLIP", (0, 0), {"kind": "flux"}),
        (2, "SkrrLoadPlan", (320, 0), {"plan_json": json.dumps(plan), "sparsity": 1.0}),
        (3, node, (860, 0), {"prompts": 32, "rank": 4, "sparsity": 1.0}),
        (4, "SkrrMemoryReport", (1400, 0), {}),
    ]
    build(page, nodes, [(1, 0, 2, "clip"), (1, 0, 3, "clip"), (2, 1, 3, "plan"), (3, 0, 4, "clip")])
    run(page)
    wait_for_map(page, 3)
    arcs = {n: dict((e, a) for e, _, a in page.evaluate("(id) => skrrTest.cells(id)", n))["t5xxl"] for n in (2, 3)}
    assert arcs == {2: [[6, 4]], 3: []}, "an arc to what no longer stands in"
    picture(page, node, [2, 3], folder=HELP_IMAGES)


def alone(page, node: str) -> None:
    """As it comes."""
    build(page, [(1, node, (0, 0), {})])
    picture(page, node, [1], folder=HELP_IMAGES)


FILES = {"SkrrCLIPLoader": 1, "SkrrDualCLIPLoader": 2, "SkrrTripleCLIPLoader": 3, "SkrrQuadrupleCLIPLoader": 4}
PICTURED = {
    **dict.fromkeys(LOADERS, loader),
    "SkrrTrimUnread": trimmed,
    "SkrrSaveEncoder": alone,
    "SkrrRepairPlan": repaired,
    **dict.fromkeys(("SkrrSparsify", "SkrrSaveSparse", "SkrrLoadSparse"), alone),
}
"""Nodes whose pictures are made here; other tests make the others."""


PICTURE_OF = """
([name, width]) => {
  const titles = [...document.querySelectorAll("*")].filter((e) => !e.children.length && e.textContent.trim() === name);
  return titles.some((card) => {
    while (card && !card.querySelector("img")) card = card.parentElement; // found anew: the frontend may draw it again
    return [...(card?.querySelectorAll("img") ?? [])].some((i) => i.complete && i.naturalWidth === width);
  });
}
"""


def test_template_browser(page):
    """All workflows are there with their pictures, and one opens by a click."""
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    for path in WORKFLOWS:
        name = page.get_by_text(path.stem, exact=True).first
        name.scroll_into_view_if_needed()  # pictures are loaded when in sight
        page.wait_for_function(PICTURE_OF, arg=[path.stem, Image.open(path.with_suffix(".jpg")).width])
    chosen = page.get_by_text("skrr_load_plan_flux", exact=True).first
    chosen.scroll_into_view_if_needed()
    if os.environ.get("SKRR_IMAGES") and page.frontend == "1.32.9":
        page.wait_for_timeout(700)
        page.screenshot(path=IMAGES / "templates.png", clip={"x": 98, "y": 73, "width": 1404, "height": 854})
    chosen.click()
    page.wait_for_function("() => window.app.graph._nodes.some((n) => n.type === 'SkrrLoadPlan')")
    page.wait_for_function("() => document.querySelectorAll('.skrr-map [data-state=kept]').length > 0")
    page.keyboard.press("Escape")  # the frontends may tell which model files this machine lacks


@pytest.mark.parametrize("node", NODES)
def test_help_page(page, node):
    """The frontend asks for <node>/<language>.md first, then, in every language, for <node>.md; all inputs and outputs
    are explained there, and its picture is shown."""
    if node in PICTURED:
        PICTURED[node](page, node)
    assert (HELP_IMAGES / f"{node}.png").is_file(), "SKRR_IMAGES=1 makes it"
    with page.expect_response(lambda r: urlsplit(r.url).path.endswith(f"/extensions/skrr/docs/{node}.md")) as answer:
        page.evaluate(SELECT, node)  # this alone asks for it where the last node's help is still open
        page.get_by_test_id("info-button").click()
    assert answer.value.ok
    info = page.server.get("/object_info")[node]
    page.get_by_role("heading", name="What the messages mean").wait_for()
    text = answer.value.text()
    assert text.startswith(f"# {info['display_name']}\n")
    names = [*info["input"]["required"], *info["input"].get("optional", {}), *info["output_name"]]
    assert [name for name in names if f"| `{name}`" not in text] == []
    image = page.locator(f"img[src$='docs/images/{node}.png']")
    image.wait_for()
    page.wait_for_function("(image) => image.complete && image.naturalWidth > 100", arg=image.element_handle())


def test_every_input_and_output_has_a_tooltip(server):
    for key, node in server.get("/object_info").items():
        if key in NODES:
            inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
            assert [name for name, entry in inputs.items() if not entry[1].get("tooltip")] == [], key
            assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"]), key


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_links_and_pictures_are_there(path):
    """Whatever a page names in this repository exists, headings included."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]* src=\"([^\"]+)\"", text):
        if urlsplit(target).scheme:
            continue
        name, _, heading = target.partition("#")
        found = path.parent / name if name else path
        assert found.exists(), target
        if heading:
            lines = [line.lstrip("# ") for line in found.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
            assert heading in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines], target


def test_table_of_sizes_is_made_by_its_script():
    made = runpy.run_path(str(REPO / "docs" / "make_sizes.py"))["table"]()
    assert made in (REPO / "docs" / "artists.md").read_text(encoding="utf-8")
