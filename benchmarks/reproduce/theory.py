"""Lemma 3.1 and theorem 3.2 (benchmarks/bound.py) on real streams: how near the bound is, and whether the theorem's
condition tells which re-uses are accepted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import bound
from benchmarks.reproduce.lab import IMAGES, LEVELS, Lab, Method, Unknown, line
from skrr_engine.encoder.actions import SKIP, Reuse, assignment
from skrr_engine.measure.meter import Meter
from skrr_engine.search.reuse import neighbours

STRIDE = 6
"""Every how manieth sub-block's single skip and re-use is held against the bound."""


def bounds(meter: Meter, plans: dict[str, Sequence[int]]) -> list[dict]:
    """The bound beside the true error, both beside the dense stream's length behind the last sub-block: of single skips
    and re-uses, and of plans' orders. Means over the prompts of one length."""
    row = meter.row
    lemma = bound.Lemma(row, meter.calibration.trace(1))
    singles = [(f"skip {i}", assignment([i])) for i in range(0, len(row), STRIDE)]
    singles += [
        (f"re-use {i} > {j}", assignment([i], {i: j}))
        for i in range(0, len(row), STRIDE)
        for j in neighbours(i, frozenset((i,)), len(row))[:1]
    ]
    found = []
    for name, removed in [*singles, *((name, assignment(order)) for name, order in plans.items())]:
        d = lemma.distances(removed)
        true, secant, local = ((x / d.dense).numpy() for x in (d.true, d.secant, d.local))
        found.append({"name": name, "true": float(true.mean()), "secant": float(secant.mean())})
        found[-1] |= {"local": float(local.mean()), "holds": bool((secant >= true * (1 - 1e-6)).all())}
    slopes = [float(lemma.slope_at(i, i).mean()) for i in range(len(row))]
    return [{"name": "slopes", "slopes": slopes}, *found]


def tries(meter: Meter, orders: Sequence[Sequence[int]] = ()) -> list[dict]:
    """Re-uses that algorithm 2 would try: of every sub-block skipped alone, by its two neighbours of its type; and,
    with `orders`, of each order's places in turn, those accepted so far in place."""
    row = meter.row
    lemma = bound.Lemma(row, meter.calibration.trace(1))

    def tried(place: int, targets: Sequence[int], before: dict, where: str) -> list[dict]:
        candidates = [before, *({**before, place: Reuse(j)} for j in targets)]
        skipped, *others = [d.total for d in meter.measure(candidates, stack=True)]
        return [
            {
                "where": where, "place": place, "target": j, "gain": d / skipped,
                "theta": bound.relative_distance(row, place, j),
                "moved": float((lemma.moved(place, j) / lemma.moved(place, None)).mean()),
            }
            for j, d in zip(targets, others, strict=True)
        ]  # fmt: skip

    found = []
    for place in range(len(row)):
        found += tried(place, neighbours(place, frozenset((place,)), len(row)), {place: SKIP}, "alone")
    for number, order in enumerate(orders):
        actions = dict(assignment(order))
        for place in order:
            targets = neighbours(place, frozenset(order), len(row))
            made = tried(place, targets, actions, f"plan {number}") if targets else []
            best = min(made, key=lambda t: t["gain"], default=None)
            if best and best["gain"] < 1:
                actions[place] = Reuse(best["target"])
            found += made
    return found


def measure(lab: Lab) -> dict:
    """{"bounds": rows, "tries": rows}; what is not known is left out."""
    method, seed = Method(), 0

    def orders() -> dict[str, tuple[int, ...]]:
        order = lab.search(method, seed).order
        return {f"skip list at {share:.0%}": lab.prefix(order, share) for share in LEVELS}

    def meter() -> Meter:
        return lab.meter(method, lab.cut.captions, seed)

    makes: dict[str, Callable[[], list[dict]]] = {
        "bounds": lambda: bounds(meter(), orders()),
        "tries": lambda: tries(meter(), list(orders().values())),
    }
    found = {}
    for name, make in makes.items():
        what = ("theory", name, method, lab.cut.captions, lab.cut.shortlist, seed, LEVELS, STRIDE)
        try:
            found[name] = lab.kept(what, functools.partial(lambda make: {"rows": make()}, make))["rows"]
        except Unknown:
            continue
    return found


def show_bounds(rows: Sequence[dict]) -> str:
    """Error and bounds, relative to the dense stream."""
    lines = [line(("removed", "true error", "lemma, the pair's own constants", "lemma, constants at the dense stream"))]
    lines.append("|---|---:|---:|---:|")
    singles = {kind: [r for r in rows if r["name"].startswith(kind)] for kind in ("skip ", "re-use ")}
    singles["skip "] = [r for r in singles["skip "] if "list" not in r["name"]]
    for kind, own in singles.items():
        middle = [f"{np.median([r[key] for r in own]):.3g}" for key in ("true", "secant", "local")]
        lines.append(line([f"one {kind.strip()}, median of {len(own)}", *middle]))
    for row in rows:
        if "list" in row["name"]:
            lines.append(line([row["name"], *(f"{row[key]:.3g}" for key in ("true", "secant", "local"))]))
    return "\n".join(lines)


def summary(rows: Sequence[dict]) -> list[dict]:
    """Of each kind of tries: how many, accepted, the condition's part in it, and what predicts."""
    kinds = {"attention, alone": lambda t: t["where"] == "alone" and t["place"] % 2 == 0}
    kinds["feed-forward, alone"] = lambda t: t["where"] == "alone" and t["place"] % 2
    kinds["within skip lists"] = lambda t: t["where"] != "alone"
    kinds["all"] = lambda t: True
    found = []
    for name, chosen in kinds.items():
        own = [t for t in rows if chosen(t)]
        if not own:
            continue
        gains, accepted = [t["gain"] for t in own], [t["gain"] < 1 for t in own]
        made = {"name": name, "tries": len(own), "accepted": sum(accepted)}
        made["held accepted"] = sum(t["theta"] < 1 for t, a in zip(own, accepted, strict=True) if a)
        made["held refused"] = sum(t["theta"] < 1 for t, a in zip(own, accepted, strict=True) if not a)
        made["least"] = min(t["theta"] for t in own)
        for key in ("theta", "moved"):
            made[key] = bound.rank_correlation([t[key] for t in own], gains)
            made[f"{key} tells"] = bound.told_apart([t[key] for t in own], accepted)
        found.append(made)
    return found


def show_tries(rows: Sequence[dict]) -> str:
    """What the condition says of re-uses."""
    head = ("re-uses tried", "number", "accepted", "condition holds: accepted", "refused", "least ratio")
    head += ("rank correlation: parameters", "what they do", "told apart: parameters", "what they do")
    lines = [line(head), "|---|" + 9 * "---:|"]
    for s in summary(rows):
        cells = [s["name"], s["tries"], s["accepted"], s["held accepted"], s["held refused"], f"{s['least']:.3f}"]
        cells += [f"{s[key]:.2f}" for key in ("theta", "moved", "theta tells", "moved tells")]
        lines.append(line(cells))
    return "\n".join(lines)


def plot(found: dict) -> None:
    """Predictors of acceptance; the bound beside the error."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4))
    names = {"theta": "|theta_i - theta_j| / |theta_i|", "moved": "|F_j(x) - F_i(x)| / |F_i(x)|"}
    for axis, (key, name) in zip(axes, names.items(), strict=False):
        for kind in (0, 1):
            own = [t for t in found["tries"] if t["place"] % 2 == kind]
            label = "feed-forward" if kind else "attention"
            axis.scatter([t[key] for t in own], [t["gain"] for t in own], s=14, alpha=0.7, label=label)
        axis.axhline(1, color="grey", linestyle=":")
        axis.axvline(1, color="grey", linestyle=":")
        axis.set(xlabel=name, ylabel="D with the re-use / D of the skip", yscale="log")
    axes[1].set_xscale("log")
    axes[0].legend()
    rows = [row for row in found["bounds"] if "true" in row]
    for key, name in (("secant", "the pair's own constants"), ("local", "constants at the dense stream")):
        axes[2].scatter([row["true"] for row in rows], [row[key] for row in rows], s=18, label=name)
    ends = [min(row["true"] for row in rows), max(row["true"] for row in rows)]
    axes[2].plot(ends, ends, color="grey", linestyle=":", label="equal")
    axes[2].set(xlabel="true error, relative", ylabel="bound, relative", xscale="log", yscale="log")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(IMAGES / "reproduction_theory.png", dpi=110)
