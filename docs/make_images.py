"""Makes docs/images/memory_report.png: the node Memory Report on a T5-XXL of PixArt's layout, with the shipped plan.

The encoder has T5-XXL's real shapes on torch's meta device, which counts bytes but holds none: nothing is downloaded,
and nothing is encoded. Needs what the tests need (`make env`).

Run from the repository's root: python docs/make_images.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import comfy_runtime

ROOT = Path(__file__).resolve().parents[1]
PLAN = "pixart-sigma"
SPARSITY = 0.42


def main() -> None:
    """Write the picture and the report's words."""
    with tempfile.TemporaryDirectory() as base:
        comfy_runtime.activate(comfy_runtime.comfyui_root(ROOT / ".cache"), Path(base))
        pack = comfy_runtime.load_pack(ROOT)
        report = comfy_runtime.pack_module(pack, "nodes.memory_report").SkrrMemoryReport
        text, image, _ = report.execute(pruned(pack, shapes_of_t5xxl())).args
    save(image, ROOT / "docs" / "images" / "memory_report.png")
    sys.stdout.write(text + "\n")


def pruned(pack, clip):
    """What Load Skrr Plan makes of a CLIP with the shipped plan."""
    apply = comfy_runtime.pack_module(pack, "nodes.host.clip.derive")
    plans = comfy_runtime.pack_module(pack, "skrr_engine.plan.model")
    entry = plans.Plan.read(plans.shipped()[PLAN]).encoder("t5xxl")
    return apply.derive(clip, {"t5xxl": apply.Pruned(entry, entry.choose(SPARSITY))})


def shapes_of_t5xxl():
    """A CLIP of ComfyUI's PixArt classes in fp16 whose tensors are shapes without bytes."""
    import comfy.sd
    import comfy.text_encoders.pixart_t5 as pixart
    import torch

    target = SimpleNamespace(clip=pixart.pixart_te(), tokenizer=pixart.PixArtTokenizer, params={})
    options = {"dtype": torch.float16, "initial_device": torch.device("meta")}
    return comfy.sd.CLIP(target, model_options=options)


def save(image, path: Path) -> None:
    """A ComfyUI IMAGE `[1, height, width, 3]` as a PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(path)


if __name__ == "__main__":
    main()
