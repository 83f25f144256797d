"""docs/gpu.md and its plots from what prove.py found on each card; without any, the page says how to get it.

python benchmarks/gpu/page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
COMMAND = """\
    sh benchmarks/gpu/pack.sh [COMFYUI]     # where there is a network; COMFYUI: the folder of a later ComfyUI
    python3 benchmarks/gpu/prove.py         # on the machine with the GPU: no network, 9 minutes
    python3 benchmarks/gpu/page.py          # this page
"""
INTRO = """\
# On a GPU

<!-- Written by benchmarks/gpu/page.py: change it there. -->

What Skrr does on a CUDA card, measured by `benchmarks/gpu/prove.py` in one run: random weights in true shapes, which
tell memory and speed and nothing of quality, dense beside pruned in the same process. The parts run in the order of
their weight; one that fails costs only itself, and all of it is over after 9 minutes. `make gpu` runs it where there is
a GPU, and rehearses it on the CPU with small shapes elsewhere.

"""
NOT_YET = """\
**Not yet run: no CUDA device has come by.** The rehearsal on the CPU is green. On a machine with one:

"""
HOW = """
## Run it

The machine needs PyTorch, transformers, safetensors, numpy, aiohttp, einops, PIL, scipy, psutil and tqdm. What else is
needed travels in `.gpu/kit.tar.gz` (ComfyUI and wheels, for Python 3.12 on Linux x86-64), beside this folder. Results
go to `benchmarks/gpu/results/<card>.jsonl`, and to the folder in `$OUT` where that is set. `--parts racing,oom` runs
only these, with `--append` beside what an earlier run found.

"""


@dataclass(frozen=True)
class Run:
    """What was found on a card: its name and all lines."""

    card: str
    lines: Sequence[Mapping]

    @classmethod
    def read(cls, path: Path) -> Run:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return cls(next(line["card"] for line in lines if "card" in line), lines)

    def of(self, what: str) -> list[Mapping]:
        """Lines of one kind; where a part ran twice, the last ones."""
        found = {(line["part"], line["name"]): line for line in self.lines if line.get("what") == what}
        return list(found.values())


def number(value) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *[[number(cell) for cell in row] for row in rows]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def targets(runs: Sequence[Run]) -> str:
    """Every target on every card."""
    cells: dict[tuple, dict[str, str]] = {}
    for run in runs:
        for line in run.lines:
            for t in line.get("targets", []) if isinstance(line.get("targets"), list) else []:
                key = (
                    line["part"],
                    line["name"],
                    t["name"],
                    ("at most " if t["at_most"] else "at least ") + number(t["wanted"]),
                )
                word = {True: "met", False: "**missed**", None: "unknown"}[t["met"]]
                cells.setdefault(key, {})[run.card] = f"{number(t['value'])}, {word}"
    rows = [[*key[1:], *(found.get(run.card) for run in runs)] for key, found in cells.items()]
    return table(["part", "target", "wanted", *(run.card for run in runs)], rows) if rows else ""


MEMORY = {
    "counted_gb": "ComfyUI counts", "loaded_gb": "loaded", "allocated_gb": "in tensors", "used_gb": "of the card",
}  # fmt: skip


def memory(run: Run) -> str:
    """What each CLIP held, and at most."""
    found = []
    for line in run.of("memory"):
        rows = [
            [
                state["state"], *(state.get(key) for key in MEMORY), state.get("load_peak_gb", {}).get("card"),
                state["first_peak_gb"]["card"], state["eight_peak_gb"]["card"], state.get("same_output"),
            ]
            for state in line["lines"]
        ]  # fmt: skip
        kept = f", {line['kept']:.1%} of its bytes kept" if line.get("kept") else ""
        heads = ["GB", *MEMORY.values(), "peak, loading", "peak, 1 prompt", "peak, 8 prompts", "same output"]
        found.append(f"{line['name']} in {line['way']}{kept}:\n\n{table(heads, rows)}")
    return "".join(found)


def times(runs: Sequence[Run]) -> str:
    rows = [
        [run.card, line["name"], line["way"], line["kept_bytes"], line["ratios"]["loaded pruned"].get("load_s"),
         line["apply_s"], line["kept_work"], line["dense"]["eight_s"], line["ratios"]["plan"]["eight_s"],
         line["ratios"]["loaded pruned"]["eight_s"]]
        for run in runs for line in run.of("time")
    ]  # fmt: skip
    heads = ["card", "file", "way", "kept bytes", "load, of dense", "apply, s", "kept work", "8 prompts dense, s",
             "plan, of dense", "loaded pruned, of dense"]  # fmt: skip
    return table(heads, rows) if rows else ""


def searches(runs: Sequence[Run]) -> str:
    rows = [
        [run.card, line["name"], line["first_s"], line["second_s"], line["removals"], line["seconds"], line["whole_s"],
         line["ended"], line["tflops"], line.get("gemm_share"), line["peak_gb"], line["memory_gb"]]
        for run in runs for line in run.of("search")
    ]  # fmt: skip
    heads = ["card", "search", "first removal, s", "second, s", "removals", "seconds", "whole, s", "to its end",
             "TFLOP/s", "of the GEMM rate", "peak, GB", "of, GB"]  # fmt: skip
    return table(heads, rows) if rows else ""


OTHERS = ("rates", "re-use", "python", "stand-ins", "widths", "out of memory", "nccl", "precision", "node")
SKIPPED = {"part", "at_s", "what", "name", "targets", "plans", "order"}


def others(run: Run) -> str:
    """What has no table of its own: a line for each part."""
    found = []
    for what in OTHERS:
        for line in run.of(what):
            facts = ", ".join(f"{key} {fact(value)}" for key, value in line.items() if key not in SKIPPED)
            found.append(f"- {line['name']}: {facts}\n")
            for dtype, plan in line.get("plans", {}).items():
                found.append(
                    f"  - {dtype}: D {number(plan['D_in_float32'])} in float32, {len(plan['order'])} removed,"
                    f" same sub-blocks {number(plan['same_sub_blocks'])}, same order {number(plan['same_order'])},"
                    f" same re-uses {number(plan['same_reuse'])}\n"
                )
    return "".join(found) + "\n"


def fact(value) -> str:
    """A value in a line."""
    return (
        "{" + ", ".join(f"{k}: {fact(v)}" for k, v in value.items()) + "}" if isinstance(value, dict) else number(value)
    )


def failures(run: Run) -> str:
    lines = [
        f"- {line['part']}: {line.get('error') or line.get('skipped')}\n"
        for line in run.lines
        if "error" in line or "skipped" in line
    ]
    return "Not measured:\n\n" + "".join(lines) + "\n" if lines else ""


def plot(runs: Sequence[Run], path: Path) -> bool:
    """VRAM of each file, dense and pruned, and the searches' share of the GEMM rate; False where there is neither."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{run.card}\n{line['name']}\n{line['way']}", line)
        for run in runs
        for line in run.of("memory")
        if line["kept"]
    ]
    shares = [
        (f"{run.card}\n{s['name']}", s["gemm_share"]) for run in runs for s in run.of("search") if s.get("gemm_share")
    ]
    if not bars and not shares:
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1.6 + 0.5 * max(len(bars), len(shares), 4)))
    for at, (_, line) in enumerate(bars):
        states = {state["state"]: state[line["held"]] for state in line["lines"]}
        last = [name for name in states if name.startswith("loaded ")][-1]
        axes[0].barh(at - 0.2, states["dense"], 0.4, color="#999999", label="dense" if at == 0 else None)
        axes[0].barh(at + 0.2, states[last], 0.4, color="#2a78b5", label="loaded without" if at == 0 else None)
    axes[0].set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes[0].set_xlabel("GB of VRAM that the encoder holds")
    axes[1].barh(range(len(shares)), [share for _, share in shares], color="#2a78b5")
    axes[1].axvline(0.6, color="#b52a2a", linestyle=":", label="target")
    axes[1].set_yticks(range(len(shares)), [name for name, _ in shares], fontsize=7)
    axes[1].set_xlabel("search: share of the GEMM rate")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def write(results: Path, page: Path, picture: Path) -> None:
    """The page from all `*.jsonl` in a folder."""
    runs = [Run.read(path) for path in sorted(results.glob("*.jsonl"))]
    text = INTRO
    if not runs:
        page.write_text(text + NOT_YET + COMMAND + HOW.rstrip() + "\n", encoding="utf-8")
        return
    for run in runs:
        first = next(line for line in run.lines if "card" in line)
        text += f"{run.card}: {number(first['memory_gb'])} GB, torch {first['torch']}, CUDA {first['cuda']},"
        text += f" transformers {first['transformers']}.\n\n"
    picture.parent.mkdir(parents=True, exist_ok=True)
    if plot(runs, picture):
        text += f"![VRAM and speed]({picture.relative_to(page.parent).as_posix()})\n\n"
    text += "## Targets\n\n" + targets(runs) + "## Time\n\n" + times(runs) + "## Search\n\n" + searches(runs)
    for run in runs:
        text += f"## {run.card}\n\n" + memory(run) + others(run) + failures(run)
    page.write_text(text + HOW.lstrip() + COMMAND, encoding="utf-8")


def main() -> None:
    write(RESULTS, ROOT / "docs" / "gpu.md", ROOT / "docs" / "images" / "gpu.png")


if __name__ == "__main__":
    sys.exit(main())
