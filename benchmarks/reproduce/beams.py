"""The beam's width, with and without merging equal sets; random search and evolution with as many evaluations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from benchmarks.reproduce import choices
from benchmarks.reproduce.lab import LEVELS, Lab, Method, known, line, spread

SHARES = (LEVELS[0], LEVELS[-1])
RIVALS = {"random search": choices.random_search, "evolution": choices.evolution}


def row_of(lab: Lab, name: str, found: choices.Found, share: float, seed: int, evaluations: int) -> dict:
    """A plan's row: D where it was searched, and on captions that no search has seen."""
    own = {"name": name, "level": share, "seed": seed, "removed": lab.removed(found.order), "D": found.trail[-1]}
    return {**own, "unseen": lab.error(found.order)["D"], "evaluations": evaluations, "set": sorted(found.order)}


def of_beam(lab: Lab, name: str, method: Method, share: float, seed: int) -> dict:
    """A beam's row at a level, a prefix of its list at the strongest."""
    whole = lab.search(method, seed)
    order = lab.prefix(whole.order, share)
    found = choices.Found(order, whole.trail[: len(order)], whole.evaluations)
    return row_of(lab, name, found, share, seed, whole.evaluations)


def of_rival(lab: Lab, name: str, share: float, seed: int) -> dict:
    """With as many evaluations as the beam of 1 took for all levels."""
    count = lab.search(Method(), seed).evaluations

    def find() -> dict:
        measure = lab.measure(lab.meter(Method(), lab.cut.captions, seed))
        costs, target = lab.row.parameter_counts, lab.target(share)
        return asdict(RIVALS[name](measure, costs, target, count, seed))

    made = lab.kept(("rival", name, share, seed, count, lab.cut.captions), find)
    found = choices.Found(tuple(made["order"]), tuple(made["trail"]), made["evaluations"])
    return row_of(lab, name, found, share, seed, made["evaluations"])


def measure(lab: Lab) -> list[dict]:
    """Rows, the cheapest first, on the cut's first blocks alone."""
    lab, widths, makes = lab.slice(), lab.cut.beams, []
    ways = {"beam 1": Method(), "beam 1, per parameter": Method(per_parameter=True)}
    for width in widths[1:]:
        ways |= {f"beam {width}": Method(width=width), f"beam {width}, not merged": Method(width=width, merged=False)}
    for seed in lab.cut.seeds:
        makes += [functools.partial(of_rival, lab, name, share, seed) for share in SHARES for name in RIVALS]
        makes += [
            functools.partial(of_beam, lab, name, method, share, seed)
            for name, method in ways.items()
            for share in SHARES
        ]
    return known(*makes)


def show(rows: Sequence[dict]) -> str:
    """D by way and level."""
    lines = [line(("level", "how", "seeds", "evaluations", "D as searched", "D unseen")), "|---|---|" + 4 * "---:|"]
    names = sorted({row["name"] for row in rows}, key=lambda name: ("beam" not in name, name))
    for level in SHARES:
        for name in names:
            own = [row for row in rows if (row["level"], row["name"]) == (level, name)]
            if own:
                cells = [f"{level:.0%}", name, len(own), f"{np.mean([row['evaluations'] for row in own]):.0f}"]
                lines.append(line([*cells, *(spread([row[key] for row in own]) for key in ("D", "unseen"))]))
    return "\n".join(lines)
