"""Put Shapes into a ComfyUI: `python -m benchmarks.shapes.install COMFYUI_FOLDER`.

Copies the denoiser, the decoder and the encoder's folder into its models, and the loader node into its custom_nodes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.shapes import encoder

HERE = Path(__file__).resolve().parent


def files() -> dict[str, Path]:
    """Place below a ComfyUI's base folder -> file of Shapes."""
    source = encoder.ensure()
    found = {
        "models/diffusion_models/shapes_denoiser.safetensors": HERE / "shapes_denoiser.safetensors",
        "models/vae/shapes_decoder.safetensors": HERE / "shapes_decoder.safetensors",
    }
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        found[f"models/text_encoders/shapes/{name}"] = source / name
    return found


def put(folder: Path, place: Callable[[Path, Path], object] = shutil.copyfile) -> None:
    """Put the model's files below a ComfyUI's base folder. place: (from, to) -> copies or links a file."""
    for name, path in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        place(path, folder / name)


def main() -> None:
    """Install and say what to do next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ComfyUI's base folder, which holds models/ and custom_nodes/")
    folder = parser.parse_args().folder
    if not (folder / "custom_nodes").is_dir():
        raise SystemExit(f"{folder}: no custom_nodes folder in it; give ComfyUI's own folder")
    put(folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE / "comfy_nodes", folder / "custom_nodes" / "shapes", dirs_exist_ok=True, ignore=ignored)
    print("Shapes is installed: restart ComfyUI and open the template 'shapes dense vs pruned'")


if __name__ == "__main__":
    main()
