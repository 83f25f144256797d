"""What the search is calibrated on: how many captions, and of which kind, against D on captions that no search has seen
and pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from benchmarks.reproduce.lab import LEVELS, QUICK, SHORT, Lab, Method, known, line
from skrr_engine.encoder.actions import assignment

COUNTS = {QUICK: (4, 8), SHORT: (4, 8, 16)}
"""Cut -> captions; all of them else."""
ALL = (4, 8, 16, 64, 256, 1024)
KINDS = ("all kinds", "long prompts only")


def row_of(lab: Lab, kind: str, count: int, share: float) -> dict:
    """One plan, calibration seed 0."""
    order = lab.prefix(lab.search(Method(kind=kind), 0, count=count).order, share)
    return {"kind": kind, "count": count, "level": share, **lab.verdict(assignment(order))}


def measure(lab: Lab) -> list[dict]:
    """Rows."""
    wanted = [("Shapes captions", count) for count in COUNTS.get(lab.cut, ALL)]
    wanted += [(kind, lab.cut.captions) for kind in KINDS]
    return known(
        *(
            functools.partial(row_of, lab, kind, count, share)
            for kind, count in wanted
            for share in (LEVELS[2], LEVELS[1])
        )
    )


def show(rows: Sequence[dict]) -> str:
    """By kind and number."""
    lines = [line(("level", "searched on", "prompts", "D_cond unseen", "D_null", "overall", "all details", "LPIPS"))]
    lines.append("|---|---|" + 6 * "---:|")
    for share in LEVELS:
        for row in (row for row in rows if row["level"] == share):
            cells = [f"{share:.0%}", row["kind"], row["count"], f"{row['D_c']:.3g}", f"{row['D_0']:.3g}"]
            lines.append(line([*cells, *(f"{row[key]:.2f}" for key in ("overall", "exact")), f"{row['lpips']:.3f}"]))
    return "\n".join(lines)
