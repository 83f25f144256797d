"""What the search is calibrated on: how many captions, and of which kind, against D on captions that no search has seen
and pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from benchmarks.reproduce.lab import LEVELS, QUICK, SHORT, Lab, Method, known, line
from skrr_engine.encoder.actions import assignment

COUNTS = {QUICK: (4, 16), SHORT: (4, 8, 16, 64)}
"""Cut -> captions; all of them else."""
ALL = (4, 8, 16, 64, 256, 1024)
KINDS = ("all kinds", "long prompts only")


def row_of(lab: Lab, kind: str, count: int, share: float) -> dict:
    """One plan, calibration seed 0."""
    order = lab.prefix(lab.search(Method(kind=kind), 0, count=count).order, share)
    row = {"kind": kind, "count": count, "level": share}
    return {**row, **(lab.error(order) if lab.sliced else lab.verdict(assignment(order)))}


def measure(lab: Lab) -> list[dict]:
    """Rows, on the cut's first blocks alone, where that is less than all: then without pictures."""
    wanted = [("Shapes captions", count) for count in COUNTS.get(lab.cut, ALL)]
    wanted += [(kind, max(lab.cut.captions, 16)) for kind in KINDS]
    lab = lab.slice()
    return known(
        *(
            functools.partial(row_of, lab, kind, count, share)
            for kind, count in wanted
            for share in (LEVELS[2], LEVELS[1])
        )
    )


def show(rows: Sequence[dict]) -> str:
    """By kind and number."""
    painted = any("overall" in row for row in rows)
    head = ("level", "searched on", "prompts", "D_cond unseen", "D_null")
    lines = [line((*head, "overall", "all details", "LPIPS") if painted else head)]
    lines.append("|---|---|" + (6 if painted else 3) * "---:|")
    for share in LEVELS:
        for row in (row for row in rows if row["level"] == share):
            cells = [f"{share:.0%}", row["kind"], row["count"], f"{row['D_c']:.3g}", f"{row['D_0']:.3g}"]
            cells += [f"{row[key]:.3f}" for key in ("overall", "exact", "lpips") if painted]
            lines.append(line(cells))
    return "\n".join(lines)
