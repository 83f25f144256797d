"""The null term, by guidance: pictures by plans searched with and without it, and by the dense encoder with noise on
its empty prompt, which is the paper's argument against FID."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch

from benchmarks.reproduce.lab import IMAGES, LEVELS, Lab, Method, known, line
from benchmarks.shapes import evaluate, scenes
from skrr_engine.encoder.actions import assignment

GUIDANCE = (1.0, 3.0, 9.0)
METHODS = {"with the null term": Method(), "without": Method(null=0.0)}
NOISE = (0.0, 0.1, 0.3, 1.0)
"""Of the empty prompt's embedding: the noise's length beside each token's."""
BINS = 8
"""Side of the squares whose mean colours stand for a picture in the Fréchet distance."""


def looks(pictures: np.ndarray) -> np.ndarray:
    """Pictures, uint8 `[n, 64, 64, 3]`, as the mean brightness of squares, float64 `[n, 64]`."""
    n, side = len(pictures), scenes.SIZE // BINS
    return pictures.reshape(n, BINS, side, BINS, side, 3).astype(np.float64).mean(axis=(2, 4, 5)).reshape(n, -1) / 255


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between normal distributions fitted to two samples `[n, features]`: what FID is, of any
    features."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, directions = np.linalg.eigh(first)
    root = (directions * np.sqrt(values.clip(0))) @ directions.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    apart = a.mean(axis=0) - b.mean(axis=0)
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * middle)


def judged(lab: Lab, texts, null: torch.Tensor, cfg: float) -> dict:
    """Scores at a guidance, beside the dense encoder's pictures at the same; fid: to the rendered truth."""
    studio = lab.studio
    dense = lab.dense_at(cfg)
    made = studio.paint(texts, null, cfg)
    truth = np.stack([scenes.render(prompt.scene) for prompt in studio.prompts])
    found = asdict(studio.verdict(texts, null, made, dense))
    return {**found, "fid": frechet(looks(made), looks(truth)), "dense fid": frechet(looks(dense), looks(truth))}


def of_plan(lab: Lab, name: str, cfg: float) -> dict:
    """A plan's row at the strongest level, calibration seed 0."""
    order = lab.prefix(lab.search(METHODS[name], 0).order, LEVELS[-1])

    def find() -> dict:
        return judged(lab, *lab.studio.embed(lab.encoder.module, assignment(order)), cfg)

    return {"name": name, "cfg": cfg, **lab.kept(("guidance", order, cfg, lab.cut.per_task), find)}


def of_noise(lab: Lab, size: float, cfg: float = evaluate.CFG) -> dict:
    """The dense encoder with noise on the empty prompt's embedding."""

    def find() -> dict:
        texts, null = lab.studio.embedded
        noise = torch.randn(null.shape, generator=torch.Generator().manual_seed(0))
        noise *= size * null.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return judged(lab, texts, null + noise, cfg)

    return {"name": f"{size:.0%}", "size": size, "cfg": cfg} | lab.kept(("noise", size, cfg, lab.cut.per_task), find)


def measure(lab: Lab) -> dict:
    """{"guidance": rows, "noise": rows}."""
    noise = known(*(functools.partial(of_noise, lab, size) for size in NOISE))
    makes = [functools.partial(of_plan, lab, name, cfg) for cfg in (3.0, 1.0, 9.0) for name in METHODS]
    return {"guidance": known(*makes), "noise": noise}


def show_guidance(rows: Sequence[dict]) -> str:
    """By guidance."""
    lines = [line(("guidance", "searched", "D_cond", "D_null", "null norm", "overall", "all details", "LPIPS"))]
    lines.append("|---:|---|" + 6 * "---:|")
    for row in sorted(rows, key=lambda row: (row["cfg"], row["name"])):
        cells = [f"{row['cfg']:g}", row["name"], *(f"{row[key]:.3g}" for key in ("D_cond", "D_null", "null_norm"))]
        lines.append(line([*cells, *(f"{row[key]:.2f}" for key in ("overall", "exact")), f"{row['lpips']:.3f}"]))
    return "\n".join(lines)


def show_noise(rows: Sequence[dict]) -> str:
    """By size of the noise."""
    head = ("noise on the empty prompt", "D_null", "overall", "all details", "LPIPS", "Fréchet distance to the truth")
    lines = [line(head), "|---:|" + 5 * "---:|"]
    for row in rows:
        cells = [row["name"], f"{row['D_null']:.3g}", *(f"{row[key]:.2f}" for key in ("overall", "exact"))]
        lines.append(line([*cells, f"{row['lpips']:.4f}", f"{row['fid']:.4f}"]))
    return "\n".join(lines)


def plot(found: dict) -> None:
    """Scores and LPIPS over guidance."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for name in METHODS:
        own = sorted((row for row in found["guidance"] if row["name"] == name), key=lambda row: row["cfg"])
        for axis, key in zip(axes, ("overall", "lpips"), strict=True):
            axis.plot([row["cfg"] for row in own], [row[key] for row in own], marker="o", label=name)
    for axis, name in zip(axes, ("score of the pictures", "LPIPS to the dense encoder's"), strict=True):
        axis.set(xlabel="guidance (CFG)", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(IMAGES / "reproduction_null.png", dpi=110)
