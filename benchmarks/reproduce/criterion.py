"""What D should be: with and without the projection, as squared error and as angle, per sub-block and per parameter;
and skips against skips with re-uses: the paper's ablations."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from benchmarks import pages
from benchmarks.reproduce.lab import IMAGES, LEVELS, Lab, Method, known, line, spread
from benchmarks.shapes import report
from benchmarks.shapes.scenes import TASKS
from skrr_engine.encoder.actions import assignment

METHODS = {
    "MSE, projection (as printed)": Method(),
    "MSE, no projection": Method(projection=False),
    "MSE, projection, per parameter": Method(per_parameter=True),
    "cosine, projection": Method(cosine=True),
    "cosine, no projection": Method(projection=False, cosine=True),
    "MSE, no projection, per parameter": Method(projection=False, per_parameter=True),
    "cosine, projection, per parameter": Method(cosine=True, per_parameter=True),
}
PRINTED = "MSE, projection (as printed)"
PUBLISHED = (
    "16 captions to search on, all candidates, a beam of 3, three seeds, 360 pictures each (benchmarks/shapes/table.py)"
)
"""How the re-uses' table was measured."""


def judged(lab: Lab, name: str, method: Method, share: float, seed: int) -> dict:
    """A row: one plan at one level."""
    order = lab.prefix(lab.search(method, seed).order, share)
    found = lab.verdict(assignment(order))
    own = {"name": name, "level": share, "seed": seed, "removed": lab.removed(order)}
    return {**own, "attentions": sum(i % 2 == 0 for i in order), "feed_forwards": sum(i % 2 for i in order), **found}


def measure(lab: Lab) -> list[dict]:
    """Rows, the most telling first."""
    return known(
        *(
            functools.partial(judged, lab, name, method, share, seed)
            for seed in lab.cut.seeds
            for share in reversed(LEVELS)
            for name, method in METHODS.items()
        )
    )


def grouped(rows: Sequence[dict]) -> dict[tuple[float, str], list[dict]]:
    """(level, name) -> its rows, one for each seed."""
    keys = sorted({(row["level"], name) for row in rows for name in [row["name"]]}, key=lambda key: key[0])
    names = list(dict.fromkeys(row["name"] for row in rows))
    keys.sort(key=lambda key: (key[0], names.index(key[1])))
    return {key: [row for row in rows if (row["level"], row["name"]) == key] for key in keys}


def show(rows: Sequence[dict]) -> str:
    """The criteria's table."""
    lines = [
        line(("level", "D is", "seeds", "attentions, feed-forwards removed", "overall", "all details", "LPIPS", "D_cond"
              " unseen", "D_null")),
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for (level, name), own in grouped(rows).items():
        mean = {key: np.mean([row[key] for row in own]) for key in ("lpips", "D_c", "D_0", "attentions")}
        cells = [f"{level:.0%}", name, len(own), f"{mean['attentions']:.1f},"]
        cells[-1] += f" {np.mean([row['feed_forwards'] for row in own]):.1f}"
        cells += [spread([row[key] for row in own]) for key in ("overall", "exact")]
        lines.append(line([*cells, f"{mean['lpips']:.3f}", f"{mean['D_c']:.3g}", f"{mean['D_0']:.3g}"]))
    return "\n".join(lines)


def published(lab: Lab) -> list[dict[str, str]]:
    """Skips alone and with re-uses: rows of benchmarks/shapes/RESULTS.md, which benchmarks/shapes/table.py measured."""
    return [row for row in pages.rows(report.PAGE, "table") if row["method"].startswith("Skrr")]


def show_reuse(rows: Sequence[dict[str, str]]) -> str:
    """Per task."""
    columns = ("removed", "overall", "all details", *TASKS, "LPIPS", "D_cond", "D_null")
    lines = [line(("how", *columns)), "|---|" + len(columns) * "---:|"]
    names = {"Skrr without re-use": "skip", "Skrr": "skip and re-use"}
    lines += [line([names[row["method"]], *(row[column] for column in columns)]) for row in rows]
    return "\n".join(lines)


def plot(rows: Sequence[dict]) -> None:
    """Score over what is removed, and over D."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        groups = [own for (_, key), own in grouped(rows).items() if key == name]
        removed = [100 * np.mean([row["removed"] for row in own]) for own in groups]
        scores = [[row["overall"] for row in own] for own in groups]
        bars = [np.std(s, ddof=1) if len(s) > 1 else 0 for s in scores]
        style = {"marker": "o", "color": f"C{number}", "linestyle": "--" if "per parameter" in name else "-"}
        axes[0].errorbar(removed, [np.mean(s) for s in scores], bars, capsize=3, label=name, **style)
        own = [row for row in rows if row["name"] == name]
        axes[1].scatter([row["D"] for row in own], [row["overall"] for row in own], s=20, color=f"C{number}")
    axes[0].set(xlabel="removed, % of the parameters in blocks", ylabel="score of the pictures", ylim=(0, 1.03))
    axes[1].set(xlabel="D on unseen captions (MSE, projection)", ylabel="score of the pictures", xscale="log")
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(IMAGES / "reproduction_criterion.png", dpi=110)
