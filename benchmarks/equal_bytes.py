"""Discrepancy against kept bytes: quantisation alone, and with Skrr on top, on SmolLM2-135M's real weights.

One plan is searched on the float32 encoder (kept in .cache/benchmark, so that a second run is quick) and put on the
encoder in seven precisions. Every discrepancy is against the dense float32 encoder, on prompts that the search has not
seen. Prints the table of docs/equal_bytes.md and writes it there, with docs/images/equal_bytes.png beside it.

    python benchmarks/equal_bytes.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch crawls where other work shares the cores
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks import smollm2
from benchmarks.pages import fill
from skrr_engine import cli
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import Assignment, assignment
from skrr_engine.encoder.row import Row
from skrr_engine.encoder.trace import Tracer
from skrr_engine.files.folder import load
from skrr_engine.measure.calibration import Batch, Calibration
from skrr_engine.measure.discrepancy import Discrepancy
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.prompts import generate
from skrr_engine.plan.model import EncoderPlan, Plan
from skrr_engine.plan.words import duration

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (0.15, 0.30, 0.42)
HELD_OUT_SEED = 1  # the search's prompts have seed 0


@dataclass(frozen=True)
class Cut:
    """How much is run. beam, calibration: the search's width and number of prompts; held_out: prompts measured on."""

    beam: int
    calibration: int
    held_out: int


FULL, QUICK = Cut(beam=2, calibration=6, held_out=48), Cut(beam=1, calibration=2, held_out=8)


def cast(dtype: torch.dtype, scaled: bool, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A weight rounded to a type; scaled: so that its largest value is the type's, by one float32 scale a tensor."""
    scale = weight.abs().max() / torch.finfo(dtype).max if scaled else torch.ones(())
    return (weight / scale).to(dtype).float() * scale, weight.numel() * dtype.itemsize + (4 if scaled else 0)


def gguf_blocks(kind: str, shift: int, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A weight through gguf's own code, in blocks of 32 along its rows that begin `shift` weights later."""
    from gguf import GGMLQuantizationType, quants

    raw = quants.quantize(weight.roll(-shift, 1).numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[kind])).roll(shift, 1), raw.nbytes


Store = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""A float32 weight `[out, in]` -> what comes back out of a file of some precision, and its bytes there."""

PRECISIONS: dict[str, Store] = {
    "bf16": functools.partial(cast, torch.bfloat16, False),
    "fp8": functools.partial(cast, torch.float8_e4m3fn, False),
    "fp8 scaled": functools.partial(cast, torch.float8_e4m3fn, True),
    "Q8_0": functools.partial(gguf_blocks, "Q8_0", 0),
    "Q5_0": functools.partial(gguf_blocks, "Q5_0", 0),
    "Q4_1": functools.partial(gguf_blocks, "Q4_1", 16),  # these weights come from Q4_1: see docs/equal_bytes.md
    "Q4_0": functools.partial(gguf_blocks, "Q4_0", 0),
}
EMBEDDING = {"Q5_0": "Q8_0", "Q4_1": "Q8_0", "Q4_0": "Q8_0"}
"""The token embedding's precision, where it isn't the sub-blocks' own."""


def quantised(module: nn.Module, store: Store, embedding: Store) -> tuple[nn.Module, dict[str, int]]:
    """A copy of an encoder as files of some precision give it, and the bytes of each parameter there.

    store: for the sub-blocks' linear weights; embedding: for all other matrices. Norms stay float32, 4 bytes a weight.
    """
    twin, sizes = copy.deepcopy(module), {}
    inside = {key for sub_block in families.find(module).sub_blocks for key in sub_block.tensors()}
    for key, parameter in twin.named_parameters():
        if parameter.ndim < 2:
            sizes[key] = parameter.nbytes
        else:
            parameter.data, sizes[key] = (store if key in inside else embedding)(parameter.data)
    return twin, sizes


def kept_bytes(row: Row, sizes: dict[str, int], removed: Iterable[int]) -> int:
    """Bytes of what is left of an encoder without these sub-blocks."""
    gone = {key for index in removed for key in row.sub_blocks[index].tensors()}
    return sum(size for key, size in sizes.items() if key not in gone)


@dataclass(frozen=True)
class Point:
    """One precision at one sparsity (a fraction of all parameters): its bytes and its discrepancy."""

    precision: str
    sparsity: float
    kept: int
    found: Discrepancy


def measure(
    module: nn.Module, batches: Sequence[Batch], null: Batch, precision: str, removals: Sequence[Assignment]
) -> list[Point]:
    """The points of an encoder in one precision, one for each assignment, against the dense encoder as it came."""
    own = PRECISIONS[precision]
    twin, sizes = quantised(module, own, PRECISIONS[EMBEDDING.get(precision, precision)])
    row = families.find(twin)
    meter = Meter(Calibration(module, Tracer(twin, row), batches, null), against=Tracer(module, families.find(module)))
    return [
        Point(precision, row.sparsity(list(gone)), kept_bytes(row, sizes, gone), found)
        for gone, found in zip(removals, meter.measure(removals), strict=True)
    ]


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """The Pareto front: positions of the points that no other is as good as in both numbers and better in one
    (smaller is better)."""
    beaten = {i for i, (x, y) in enumerate(points) for a, b in points if a <= x and b <= y and (a, b) != (x, y)}
    return set(range(len(points))) - beaten


def best(points: Sequence[Point]) -> set[int]:
    """The same of kept bytes and D."""
    return front([(p.kept, p.found.total) for p in points])


def mean_square(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Of the dense encoder's conditioning: the discrepancy of an encoder that gives zeros."""
    read = [t.double() for batch in batches for t, _ in batch.run(module)]
    return float(sum(t.square().sum() for t in read)) / sum(t.numel() for t in read)


def find_plan(folder: str, cut: Cut) -> EncoderPlan:
    """The plan in .cache/benchmark, searched now where it is not there."""
    path = ROOT / ".cache" / "benchmark" / f"equal_bytes_beam{cut.beam}_prompts{cut.calibration}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["search", "--encoder", folder, "--out", str(path), "--name", "smollm2", "--beam", str(cut.beam)]
        arguments += ["--sparsity", str(LEVELS[-1]), "--levels", ",".join(map(str, LEVELS[:-1]))]
        if cli.main([*arguments, "--count", str(cut.calibration)]):
            raise SystemExit(1)
    return Plan.read(path).encoder("smollm2")


def table(points: Sequence[Point]) -> str:
    """As Markdown."""
    lines = ["| precision | removed | kept MB | D | D_cond | D_null | on the Pareto front |"]
    lines.append("|---|---:|---:|---:|---:|---:|:-:|")
    chosen = best(points)
    for i, p in enumerate(points):
        numbers = f"{p.found.total:.3g} | {p.found.conditional:.3g} | {p.found.null:.3g}"
        mark = "●" if i in chosen else ""
        lines.append(f"| {p.precision} | {p.sparsity:.1%} | {p.kept / 1e6:.1f} | {numbers} | {mark} |")
    return "\n".join(lines)


def plot(points: Sequence[Point], zeros: float, path: Path) -> None:
    """D over kept bytes, a colour a precision, a marker a sparsity, the Pareto front ringed and joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    markers = dict(zip(sorted({p.sparsity for p in points}), "os^D", strict=True))
    for number, precision in enumerate(PRECISIONS):
        own = [p for p in points if p.precision == precision]
        colour = f"C{number}"
        axes.plot([p.kept / 1e6 for p in own], [p.found.total for p in own], color=colour, alpha=0.4)
        for p in own:
            axes.plot(p.kept / 1e6, p.found.total, markers[p.sparsity], color=colour, markersize=7)
        axes.plot([], [], color=colour, linewidth=4, label=precision)
    for sparsity, marker in markers.items():
        axes.plot([], [], marker, color="grey", label=f"{sparsity:.0%} removed" if sparsity else "dense")
    chosen = sorted((points[i].kept / 1e6, points[i].found.total) for i in best(points))
    axes.plot(
        *zip(*chosen, strict=True), "--o", color="black", linewidth=1, markersize=14, markerfacecolor="none",
        label="Pareto front",
    )  # fmt: skip
    axes.axhline(zeros, color="grey", linestyle=":", label="an encoder that gives zeros")
    axes.set(xlabel="kept MB", ylabel="D against the dense float32 encoder, held-out prompts", yscale="log")
    axes.set_title("SmolLM2-135M: discrepancy at equal bytes")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Measure, print, and write unless it is the quick cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prompts; writes nothing to docs/")
    options = parser.parse_args()
    cut, start = QUICK if options.quick else FULL, time.monotonic()
    torch.set_grad_enabled(False)
    folder = str(smollm2.ensure(ROOT / ".cache" / "smollm2"))
    plan = find_plan(folder, cut)
    print(f"the plan is there after {duration(time.monotonic() - start)}", flush=True)
    encoder = load(folder)
    batches = encoder.batches(generate(cut.held_out, HELD_OUT_SEED))
    null = encoder.batch([encoder.tokenize("")])
    removals = [{}, *(assignment(plan.order[: level.skipped], level.reuse) for level in plan.levels)]
    points = [p for precision in PRECISIONS for p in measure(encoder.module, batches, null, precision, removals)]
    zeros = mean_square(encoder.module, batches) + mean_square(encoder.module, [null])
    print(f"{table(points)}\n\nD of an encoder that gives zeros: {zeros:.4g}")
    if not options.quick:
        plot(points, zeros, ROOT / "docs" / "images" / "equal_bytes.png")
        fill(ROOT / "docs" / "equal_bytes.md", {"table": table(points)})
    print(f"took {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
