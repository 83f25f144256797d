"""What table.py found, as Markdown and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.pages import fill, rows

from .scenes import TASKS

HERE = Path(__file__).resolve().parent
PAGE = HERE / "RESULTS.md"
ORDER = ("Random", "ShortGPT", "LaCo", "FinerCut", "Skrr without re-use", "Skrr")


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation over calibration seeds where there are several."""
    values = np.array(values, dtype=float)
    text = f"{values.mean():.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.{digits}f}"


def main_table(rows: Sequence[dict], dense: dict | None = None) -> str:
    """Table 1: a line for each method and level, means over seeds."""
    head = [
        "method",
        "removed",
        "overall",
        "all details",
        *TASKS,
        "LPIPS",
        "pixel MSE",
        "D_cond",
        "D_null",
        "null norm",
    ]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    if dense is not None:
        lines.append(line("dense", "0 %", [dense]))
    for level in sorted({row["level"] for row in rows}):
        for method in ORDER:
            own = [row for row in rows if (row["method"], row["level"]) == (method, level)]
            if own:
                lines.append(line(method, f"{100 * np.mean([row['sparsity'] for row in own]):.1f} %", own))
    return "\n".join(lines)


def line(name: str, removed: str, rows: Sequence[dict]) -> str:
    """One line of the tables."""
    cells = [name, removed, spread([r["overall"] for r in rows]), spread([r["exact"] for r in rows])]
    cells += [f"{np.mean([r['scores'][task] for r in rows]):.2f}" for task in TASKS]
    cells += ["" if rows[0]["lpips"] is None else f"{np.mean([r['lpips'] for r in rows]):.3f}"]
    cells += [f"{np.mean([r['mse'] for r in rows]):.4f}"]
    cells += [f"{np.mean([r[key] for r in rows]):.3g}" for key in ("D_cond", "D_null", "null_norm")]
    return f"| {' | '.join(cells)} |"


def plain_table(rows: Sequence[dict], first: str) -> str:
    """The ablations', or, where the rows say what is kept, the precisions'."""
    sized = "kept" in rows[0]
    head = [first, "removed", *(["kept MB"] if sized else []), "overall", "all details", "LPIPS", "D_cond", "D_null"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["method"], f"{100 * row['sparsity']:.1f} %", *([f"{row['kept'] / 1e6:.1f}"] if sized else [])]
        cells += [f"{row[key]:.3f}" for key in ("overall", "exact", "lpips")]
        cells += [f"{row[key]:.3g}" for key in ("D_cond", "D_null")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(tables: dict[str, str]) -> None:
    """Put tables into RESULTS.md, each between its marks, and draw the plots of all that stands there beside it."""
    fill(PAGE, tables)
    plots()


def number(cell: str) -> tuple[float, float]:
    """A cell's mean and spread: "0.895 ± 0.030", "42.5 %", "9.49"."""
    mean, _, spread = cell.removesuffix("%").partition("±")
    return float(mean), float(spread or 0)


def plots() -> None:
    """images/scores.png: score over sparsity; images/bytes.png: score over kept bytes; images/proxy.png: over D;
    images/loss.png: the training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    table = rows(PAGE, "table")

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for method in ORDER:
        own = [row for row in table if row["method"] == method]
        overall = [number(row["overall"]) for row in own]
        mean, spread = zip(*overall, strict=True)
        removed = [number(row["removed"])[0] for row in own]
        axes.errorbar(removed, mean, spread, marker="o", capsize=3, label=method)
    axes.axhline(number(table[0]["overall"])[0], color="grey", linestyle=":", label="dense")
    axes.set(xlabel="removed, % of the parameters in blocks", ylabel="overall score", ylim=(0, 1.03))
    finish(figure, axes, folder / "scores.png")

    if rows(PAGE, "bytes"):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
        for precision in dict.fromkeys(row["precision"] for row in rows(PAGE, "bytes")):
            own = [row for row in rows(PAGE, "bytes") if row["precision"] == precision]
            points = [(number(row["kept MB"])[0], number(row["overall"])[0]) for row in own]
            axes.plot(*zip(*points, strict=True), marker="o", label=precision)
        axes.set(xlabel="kept MB (from the right: dense, 24, 32, 42 %)", ylabel="overall score", ylim=(0, 1.03))
        finish(figure, axes, folder / "bytes.png")

    loss = json.loads((HERE / "training.json").read_text(encoding="utf-8"))["loss"]
    figure, axes = pyplot.subplots(figsize=(6, 3))
    axes.plot(*zip(*loss, strict=True), label="training loss")
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    finish(figure, axes, folder / "loss.png")

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for method in ORDER:
        own = [row for row in table if row["method"] == method]
        errors = [number(row["D_cond"])[0] + number(row["D_null"])[0] for row in own]
        axes.scatter(errors, [number(row["overall"])[0] for row in own], label=method)
    axes.set(xlabel="D on the evaluation prompts", ylabel="overall score", xscale="log", ylim=(0, 1.03))
    finish(figure, axes, folder / "proxy.png")


def finish(figure, axes, path: Path) -> None:
    """Legend, grid, file."""
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
