"""Shapes, the small trained text-to-image model: its world, its detector, its files, and its workflow in ComfyUI."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks.shapes import detector, install, scenes
from skrr_engine.encoder.actions import Reuse, assignment
from skrr_engine.plan.model import Plan

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "benchmarks" / "shapes"
WORKFLOW = REPO / "example_workflows" / "api" / "shapes_dense_vs_pruned.json"
PLAN = FOLDER / "skrr_plan.json"


def seen(prompts, pictures) -> float:
    """The mean of the tasks' scores."""
    from benchmarks.shapes.evaluate import scores

    return scores(prompts, pictures)[1]


def some(per_task: int) -> list[scenes.Prompt]:
    """The last evaluation prompts of each task."""
    prompts = scenes.evaluation()
    return [p for task in scenes.TASKS for p in [q for q in prompts if q.task == task][-per_task:]]


def test_captions_are_disjoint():
    judged = [p.caption for p in scenes.evaluation()]
    assert len(judged) == len(set(judged)) == 360
    assert {task: sum(p.task == task for p in scenes.evaluation()) for task in scenes.TASKS} == dict.fromkeys(
        scenes.TASKS, 60
    )
    trained = [p.caption for p in scenes.training(6000)]
    assert len(trained) == len(set(trained)) and not set(trained) & set(judged)
    for seed in range(3):
        assert len(set(scenes.calibration(24, seed))) == 24 and not set(scenes.calibration(24, seed)) & set(judged)


def test_a_caption_has_one_scene():
    found = {}
    for prompt in [*scenes.training(6000), *scenes.evaluation()]:
        assert found.setdefault(prompt.caption, set(prompt.scene)) == set(prompt.scene), prompt.caption


CHANGES = {
    "none": lambda image, draw: image,
    "noise": lambda image, draw: image + draw.normal(0, 16, image.shape),
    "blur": lambda image, draw: ndimage.gaussian_filter(image, (1, 1, 0)),
    "shift": lambda image, draw: np.roll(image, draw.integers(-3, 4, 2), (0, 1)),
    "dark": lambda image, draw: image * 0.93,
}


@pytest.mark.parametrize("change", CHANGES)
def test_detector_on_rendered_truth(change):
    """At least 98 % of the scenes right in every detail, whatever a painter may do to them."""
    draw, prompts = np.random.default_rng(0), scenes.evaluation()
    right = 0
    for prompt in prompts:
        image = CHANGES[change](scenes.render(prompt.scene).astype(float), draw)
        things = detector.detect(np.clip(image, 0, 255).astype(np.uint8))
        right += detector.exact(prompt, things) and detector.passes(prompt, things)
    assert right / len(prompts) >= 0.98


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        ("single object", lambda s: (replace(s[0], shape="cross" if s[0].shape != "cross" else "circle"),)),
        ("two objects", lambda s: s[:1]),
        ("counting", lambda s: s[1:]),
        ("colours", lambda s: (replace(s[0], colour="grey"),)),
        ("position", lambda s: (replace(s[0], place=s[1].place), replace(s[1], place=s[0].place))),
        ("colour attribution", lambda s: (replace(s[0], colour=s[1].colour), replace(s[1], colour=s[0].colour))),
    ],
)
def test_wrong_pictures_fail(task, wrong):
    for prompt in (p for p in scenes.evaluation() if p.task == task):
        assert not detector.passes(prompt, detector.detect(scenes.render(wrong(prompt.scene)))), prompt.caption


def test_files():
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [file.name for file in files] == ["shapes_decoder.safetensors", "shapes_denoiser.safetensors"]
    assert sum(file.stat().st_size for file in files) < 12e6


@pytest.fixture(scope="module")
def studio(comfy):
    """Judges encoders on 5 prompts of each task, by ComfyUI's own sampler."""
    from benchmarks.shapes.evaluate import Studio

    return Studio(5, lpips=False)


def plan_level(number: int):
    """A level of the plan that Skrr found, as an assignment."""
    (entry,) = Plan.read(PLAN).encoders.values()
    level = entry.levels[number]
    return assignment(entry.order[: level.skipped], level.reuse), level


def test_discrepancies_are_the_meters(studio):
    removed, _ = plan_level(0)
    found, _ = studio.judge(removed)
    (wanted,) = studio.meter(studio.captions).measure([removed])
    for mine, theirs in ((found.D_cond, wanted.conditional), (found.D_null, wanted.null)):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert found.null_norm == pytest.approx(wanted.null_norm, rel=1e-9)


LEAST_DENSE, LEAST_PRUNED = 0.95, 0.80


def test_dense_and_pruned_scores(studio):
    """A level of about 20 % of the encoder: painted well, and smaller."""
    removed, level = plan_level(0)
    assert 0.17 < level.sparsity < 0.23
    assert studio.judge({})[0].overall >= LEAST_DENSE
    assert studio.judge(removed)[0].overall >= LEAST_PRUNED


def no_mask(module):
    """Attention that sees what comes after."""

    def hook(attention, args, kwargs):
        n = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "attention_mask": torch.zeros(1, 1, n, n)}

    for layer in module.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def wrong_norm(module):
    """A norm that subtracts the mean, as CLIP's do and Llama's don't, with the weights of the wrong sub-block."""
    for layer in module.layers:
        layer.input_layernorm.weight, layer.post_attention_layernorm.weight = (
            layer.post_attention_layernorm.weight, layer.input_layernorm.weight,
        )  # fmt: skip


@pytest.mark.parametrize("broken", [no_mask, wrong_norm])
def test_a_broken_encoder_fails(studio, broken):
    module = copy.deepcopy(studio.encoder.module)
    broken(module)
    assert studio.judge({}, module)[0].overall < LEAST_PRUNED


def test_reuse_of_the_wrong_block_fails(studio):
    removed, _ = plan_level(0)
    kept = [i for i in range(len(studio.encoder.row)) if i not in removed]
    wrong = {i: Reuse(max((j for j in kept if j % 2 == i % 2), key=lambda j: abs(j - i))) for i in removed}
    assert studio.judge(wrong)[0].overall < LEAST_PRUNED


@pytest.fixture(scope="module")
def shapes_server(comfyui_root):
    """A ComfyUI with the pack and Shapes."""
    import comfy_runtime

    with comfy_runtime.Server(comfyui_root, {"skrr": REPO, "shapes": FOLDER / "comfy_nodes"}) as server:
        install.put(server.base, lambda source, target: target.symlink_to(source))
        yield server


def test_the_workflow_paints(shapes_server, studio):
    """The demo's workflow in the real ComfyUI, with the plan instead of a search: its pictures are the studio's."""
    from benchmarks import demo
    from benchmarks.shapes import evaluate

    workflow = demo.with_plan(json.loads(WORKFLOW.read_text()), Plan.read(PLAN))
    for node in workflow.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = evaluate.STEPS
        if node["class_type"] == "SkrrLoadPlan":
            node["inputs"]["sparsity"] = 0.23
    chosen = studio.prompts  # all: a task's score from a picture or two would be a lottery
    found = demo.paint(shapes_server, workflow, chosen)
    assert seen(chosen, found["dense"]) >= LEAST_DENSE and seen(chosen, found["pruned"]) >= LEAST_PRUNED
    stored = copy.deepcopy(studio.encoder.module).half().float()  # ComfyUI holds the weights in float16
    for kind, removed in (("dense", {}), ("pruned", plan_level(0)[0])):
        texts, null = studio.embed(stored, removed)
        positions = [studio.prompts.index(p) for p in chosen]
        seeds = range(evaluate.SEED, evaluate.SEED + len(chosen))
        wanted = studio.painter.paint([texts[i] for i in positions], null, seeds)
        assert np.abs(found[kind].astype(int) - wanted).max() <= 3, kind  # of 255; batches round differently
    report = demo.report(shapes_server, workflow)
    assert "smollm2" in report and "saved" in report


def test_loader_errors(shapes_server):
    import comfy_runtime

    base = shapes_server.base / "models" / "text_encoders"
    (base / "alone.safetensors").symlink_to(FOLDER / "shapes_decoder.safetensors")
    (base / "shapes" / "wrong.safetensors").symlink_to(FOLDER / "shapes_decoder.safetensors")
    for name, words in (("alone.safetensors", "no tokenizer.json"), ("shapes/wrong.safetensors", "not SmolLM2-135M")):
        nodes = {
            "1": {"class_type": "ShapesCLIPLoader", "inputs": {"clip_name": name}},
            "2": {"class_type": "SkrrMemoryReport", "inputs": {"clip": ["1", 0]}},
        }
        with pytest.raises(comfy_runtime.PromptError, match=words):
            shapes_server.run(nodes)
