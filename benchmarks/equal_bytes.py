"""Discrepancy against kept bytes: quantisation alone, and with Skrr on top, on SmolLM2-135M's real weights.

One plan is searched on the float32 encoder (kept in .cache/, so that a second run is quick) and put on it in five
precisions. Every discrepancy is against the dense float32 encoder, on prompts that the search has not seen. Writes
docs/equal_bytes.md and docs/images/equal_bytes.png.

    python benchmarks/equal_bytes.py [--quick]
"""

import argparse
import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks import smollm2
from skrr_engine import cli, families
from skrr_engine.discrepancy import Meter
from skrr_engine.encoders import Encoder, load
from skrr_engine.plan import EncoderPlan, Level, Plan
from skrr_engine.prompts import generate
from skrr_engine.rewire import assignment
from skrr_engine.trace import Tracer

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (0.15, 0.30, 0.42)
PROMPTS, HELD_OUT, HELD_OUT_SEED = 6, 24, 1
PRECISIONS = ("bf16", "fp8 scaled", "Q8_0", "Q5_0", "Q4_0")
"""Q4_K and Q5_K need widths of whole 256s; SmolLM2 is 576 wide."""


def stored(weight: torch.Tensor, precision: str) -> tuple[torch.Tensor, int]:
    """A weight as it comes out of a file of this precision, and its bytes there."""
    if precision == "bf16":
        return weight.bfloat16().float(), 2 * weight.numel()
    if precision == "fp8 scaled":  # one scale a tensor, in float32
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale, weight.numel() + 4
    import gguf

    kind = gguf.GGMLQuantizationType[precision]
    raw = gguf.quants.quantize(weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(raw, kind)).reshape(weight.shape), raw.nbytes


def quantised(module: nn.Module, precision: str) -> tuple[nn.Module, dict[str, int]]:
    """A copy of an encoder in this precision, and the bytes of each parameter. Norms are float32, as in GGUF files; the
    token embedding has at least 8 bits, as artists' 4-bit and 5-bit files have it."""
    twin, sizes = copy.deepcopy(module), {}
    for name, parameter in twin.named_parameters():
        if parameter.ndim < 2:
            sizes[name] = 4 * parameter.numel()
            continue
        own = "Q8_0" if "embed" in name and precision in ("Q5_0", "Q4_0") else precision
        parameter.data, sizes[name] = stored(parameter.data, own)
    return twin, sizes


def kept_bytes(row, sizes: dict[str, int], removed) -> int:
    """Bytes of what is left of an encoder."""
    gone = {key for index in removed for key in row.sub_blocks[index].tensors()}
    return sum(size for name, size in sizes.items() if name not in gone)


def front(points: list[tuple[float, float]]) -> set[int]:
    """Positions of the points that no other point beats in both numbers (smaller is better)."""
    beaten = {
        i for i, (x, y) in enumerate(points) for a, b in points if a <= x and b <= y and (a, b) != (x, y)
    }  # fmt: skip
    return set(range(len(points))) - beaten


def find_plan(folder: str, path: Path, quick: bool) -> EncoderPlan:
    """The plan in .cache/, searched now where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = ("0.15",) if quick else tuple(map(str, LEVELS))
        arguments = ["search", "--encoder", folder, "--out", str(path), "--name", "smollm2", "--beam", "1"]
        arguments += ["--sparsity", levels[-1], "--levels", ",".join(levels), "--count", str(2 if quick else PROMPTS)]
        if cli.main(arguments):
            raise SystemExit(1)
    return Plan.read(path).encoder("smollm2")


def measure(encoder: Encoder, plan: EncoderPlan, prompts: list[str]) -> list[dict]:
    """A row for each precision and level."""
    batches, null = encoder.batches(prompts), encoder.batch([encoder.tokenize("")])
    levels: list[Level | None] = [None, *plan.levels]
    removed = [assignment(plan.order[: level.skipped], level.reuse) if level else {} for level in levels]
    rows = []
    for precision in PRECISIONS:
        twin, sizes = quantised(encoder.module, precision)
        row = families.find(twin)
        meter = Meter(encoder.module, Tracer(twin, row), batches, null)
        for gone, found in zip(removed, meter.measure(removed), strict=True):
            size = kept_bytes(row, sizes, gone)
            rows.append({"precision": precision, "sparsity": row.sparsity(gone), "bytes": size, "found": found})
        print(f"{precision}: measured", flush=True)
    best = front([(r["bytes"], r["found"].total) for r in rows])
    return [{**r, "front": i in best} for i, r in enumerate(rows)]


def table(rows: list[dict]) -> str:
    """As Markdown."""
    lines = ["| precision | removed | kept | D | D_cond | D_null | Pareto |", "|---|---:|---:|---:|---:|---:|:-:|"]
    for r in rows:
        d = r["found"]
        numbers = f"{d.total:.4g} | {d.conditional:.4g} | {d.null:.4g}"
        mark = "●" if r["front"] else ""
        lines.append(f"| {r['precision']} | {r['sparsity']:.1%} | {r['bytes'] / 1e6:.1f} MB | {numbers} | {mark} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """D over kept bytes, a line a precision, the Pareto front marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for precision in PRECISIONS:
        own = [r for r in rows if r["precision"] == precision]
        axes.plot([r["bytes"] / 1e6 for r in own], [r["found"].total for r in own], marker="o", label=precision)
    best = [r for r in rows if r["front"]]
    ringed = {"s": 160, "facecolors": "none", "edgecolors": "black", "label": "Pareto front"}
    axes.scatter([r["bytes"] / 1e6 for r in best], [r["found"].total for r in best], **ringed)
    axes.set(xlabel="kept MB", ylabel="D against dense float32", yscale="log")
    axes.set_title("SmolLM2-135M; on each line 0, 15, 30 and 42 % removed, from the right")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one level and few prompts; writes nothing to docs/")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = str(smollm2.ensure(ROOT / ".cache" / "smollm2"))
    name = "equal_bytes_quick.json" if options.quick else "equal_bytes.json"
    plan = find_plan(folder, ROOT / ".cache" / "benchmark" / name, options.quick)
    rows = measure(load(folder), plan, generate(4 if options.quick else HELD_OUT, HELD_OUT_SEED))
    print(table(rows))
    if not options.quick:
        plot(rows, ROOT / "docs" / "images" / "equal_bytes.png")
        page = ROOT / "docs" / "equal_bytes.md"
        text = page.read_text(encoding="utf-8") if page.exists() else "# Equal bytes\n\n<!-- table -->\n<!-- end -->\n"
        start, end = text.index("<!-- table -->"), text.index("<!-- end -->")
        page.write_text(f"{text[:start]}<!-- table -->\n{table(rows)}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
