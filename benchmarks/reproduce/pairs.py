"""The paper's figure 4: pairs of sub-blocks whose removal leaves the embedding's angle nearly as it was, and makes the
null embedding explode. Does the squared error tell what the angle hides?"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from benchmarks.bound import rank_correlation
from benchmarks.reproduce.lab import IMAGES, Lab, Method, Unknown, known, line
from benchmarks.shapes import evaluate
from skrr_engine.encoder.actions import assignment

CAPTIONS = 4
SHOWN = 4
"""Pairs of each kind that are judged by pictures."""


def every(lab: Lab) -> list[dict]:
    """All pairs of feed-forwards, which the paper's pair is one of: {pair, cosine, mse, null_norm, null}. cosine: mean
    of the projected embedding's tokens to the dense one's; mse, null: of captions and the empty prompt; null_norm:
    beside the dense encoder's."""
    pairs = list(itertools.combinations(range(1, len(lab.row), 2), 2))

    def find() -> dict:
        candidates = [assignment(pair) for pair in pairs]
        squares, angles = (lab.meter(Method(cosine=cosine), CAPTIONS, 0) for cosine in (False, True))
        norm = squares.null_norm()
        made = zip(squares.measure(candidates, stack=True), angles.measure(candidates, stack=True), strict=True)
        values = [
            {"cosine": 1 - a.conditional, "mse": s.conditional, "null": s.null, "null_norm": s.null_norm / norm}
            for s, a in made
        ]
        return {"rows": values}

    rows = lab.kept(("pairs of feed-forwards", CAPTIONS), find)["rows"]
    return [{"pair": pair, **row} for pair, row in zip(pairs, rows, strict=True)]


def change(row: dict) -> float:
    """How far the null embedding's length is from the dense one's, as a factor from 1 on."""
    return max(row["null_norm"], 1 / row["null_norm"])


def disjoint(rows: Sequence[dict]) -> list[dict]:
    """The first SHOWN of these that have no sub-block in common."""
    found, seen = [], set()
    for row in rows:
        if len(found) < SHOWN and not seen & set(row["pair"]):
            found.append(row)
            seen |= set(row["pair"])
    return found


def chosen(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Pairs to paint: of those with a cosine of 0.8 to 0.95, where the null norm changes most and least; and others,
    evenly over the squared error."""
    near = sorted((row for row in rows if 0.8 <= row["cosine"] <= 0.95), key=change)
    half = len(near) // 2
    rest = sorted(rows, key=lambda row: row["mse"])[:: max(1, len(rows) // SHOWN)][:SHOWN]
    return {
        "null norm as it was": disjoint(near[:half]),
        "null norm far off": disjoint(near[half:][::-1]),
        "any": rest,
    }


def measure(lab: Lab) -> dict:
    """{"every": all pairs, "chosen": those to paint, with a verdict where there is one}."""
    try:
        rows = every(lab)
    except Unknown:
        return {}

    def judged(kind: str, row: dict) -> dict:
        verdicts = known(functools.partial(lab.verdict, assignment(row["pair"])))
        return {"kind": kind, **row, **(verdicts[0] if verdicts else {})}

    found = [judged(kind, row) for kind, own in chosen(rows).items() for row in own]
    if lab.measuring:
        pictures(lab, rows)
    return {"every": rows, "chosen": found}


def pictures(lab: Lab, rows: Sequence[dict]) -> None:
    """Draw the same prompts by the dense encoder and without a pair of each kind, a line each."""
    from PIL import Image

    kinds = chosen(rows)
    pairs = [kinds[kind][0]["pair"] for kind in ("null norm as it was", "null norm far off") if kinds[kind]]
    every = max(1, lab.cut.per_task // 2)
    made = [lab.studio.dense, *(lab.studio.judge(assignment(pair))[1] for pair in pairs)]
    columns = len(made[0][::every])
    sheet = evaluate.grid(np.concatenate([one[::every] for one in made]), columns)
    Image.fromarray(sheet).save(IMAGES / "reproduction_pairs_pictures.png")


def show(found: dict) -> str:
    """The chosen pairs with a high cosine."""
    head = ("pair", "cosine", "null norm, of the dense one's", "MSE on captions", "MSE on the empty prompt", "overall")
    lines = [line((*head, "all details", "LPIPS")), "|---|" + 7 * "---:|"]
    for row in sorted((r for r in found["chosen"] if r["kind"] != "any"), key=change, reverse=True):
        pair = " and ".join(f"{i}" for i in row["pair"])
        cells = [f"{row['cosine']:.3f}", f"{row['null_norm']:.2f}", *(f"{row[key]:.3g}" for key in ("mse", "null"))]
        painted = [f"{row[key]:.2f}" if key in row else "" for key in ("overall", "exact", "lpips")]
        lines.append(line([pair, *cells, *painted]))
    return "\n".join(lines)


def predictors(rows: Sequence[dict]) -> dict[tuple[str, str], float]:
    """Rank correlation of each number with the painted pairs' LPIPS and lost score."""
    values = {
        "angle, 1 - cosine": [1 - row["cosine"] for row in rows],
        "MSE on captions": [row["mse"] for row in rows],
        "MSE on the empty prompt": [row["null"] for row in rows],
        "D, both": [row["mse"] + row["null"] for row in rows],
        "change of the null norm": [change(row) for row in rows],
    }
    ends = {"lpips": [row["lpips"] for row in rows], "overall": [-row["overall"] for row in rows]}
    return {(name, key): rank_correlation(own, end) for name, own in values.items() for key, end in ends.items()}


def show_predictors(found: dict) -> str:
    """What holds over all pairs; and what tells how painted ones look, where they are painted."""
    near = [row for row in found["every"] if row["cosine"] >= 0.8]
    far = [row for row in near if change(row) > 2]
    ends = [rank_correlation([1 - row["cosine"] for row in found["every"]], [f(row) for row in found["every"]])
            for f in (lambda row: row["mse"], change)]  # fmt: skip
    text = (
        f"Of {len(found['every'])} pairs, {len(near)} keep a cosine of at least 0.8; in {len(far)} of these the null"
        f" norm changes more than twofold (at most {max(map(change, near), default=1):.2f}-fold). Rank correlation of"
        f" the angle, all pairs: {ends[0]:.2f} with MSE on captions, {ends[1]:.2f} with the change of the null norm."
    )
    painted = list({tuple(row["pair"]): row for row in found["chosen"] if "overall" in row}.values())
    if len(painted) < SHOWN:
        return text
    told = predictors(painted)
    lines = [line((f"rank correlation, {len(painted)} painted pairs", "with LPIPS", "with the score lost"))]
    lines.append("|---|---:|---:|")
    for name in dict.fromkeys(name for name, _ in told):
        lines.append(line([name, *(f"{told[name, key]:.2f}" for key in ("lpips", "overall"))]))
    return "\n".join([*lines, "", text])


def plot(found: dict) -> None:
    """D over cosine, coloured by the null norm; the chosen pairs by their numbers."""
    from matplotlib import colors, pyplot

    rows = found["every"]
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5))
    norm = colors.LogNorm(vmin=0.2, vmax=5)
    dots = axis.scatter(
        [row["cosine"] for row in rows], [row["mse"] + row["null"] for row in rows],
        c=[row["null_norm"] for row in rows], cmap="coolwarm", norm=norm, s=14,
    )  # fmt: skip
    for row in found["chosen"]:
        axis.annotate(" and ".join(map(str, row["pair"])), (row["cosine"], row["mse"] + row["null"]), fontsize=7)
    axis.set(xlabel="cosine to the dense embedding, captions", ylabel="D (captions and empty prompt)", yscale="log")
    figure.colorbar(dots, label="null norm, of the dense one's")
    axis.grid(alpha=0.3)
    figure.savefig(IMAGES / "reproduction_pairs.png", dpi=110, bbox_inches="tight")
