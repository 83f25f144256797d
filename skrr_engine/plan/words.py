"""Plans and times in words."""

from collections.abc import Iterable

from ..errors import printable
from .model import EncoderPlan, Level, Plan

COLUMNS = 24
"""Blocks in one line of a map."""


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3 h 10 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def describe_plan(plan: Plan) -> str:
    """A plan in words, with a map of each encoder's strongest level."""
    came = plan.provenance
    facts = (
        ("denoiser", came.denoiser),
        ("projection", came.projection),
        ("prompts", came.prompts),
        ("beam", came.beam),
    )
    lines = [printable(f"plan from {came.source}" + "".join(f", {k} {v}" for k, v in facts if v is not None))]
    for name, entry in plan.encoders.items():
        lines.append(f"{name}: {entry.family}, {entry.blocks} blocks, {entry.width} wide; {steps(entry)}")
        how = entry.extensions.get("search")
        if isinstance(how, dict) and how.get("mode") == "racing":
            delta = how.get("delta")  # an extension: nobody has checked it
            risk = f", delta {delta:g}" if isinstance(delta, float) else ""
            lines.append(f"  found by racing{risk}: near-equal candidates may have been mistaken")
        lines += [describe_level(entry, level) for level in entry.levels]
        lines += ["", *plan_map(entry, entry.levels[-1])]
    for group in plan.together:
        steps_of = ", ".join(f"{name} {skipped} steps" for name, skipped in group.levels.items())
        d = "" if group.discrepancy is None else f", D beside an encoder that says nothing {group.discrepancy:.4g}"
        lines.append(f"together {group.sparsity:.1%} of all: {steps_of}{d}")
    return "\n".join(lines)


def steps(entry: EncoderPlan) -> str:
    """An order in words: all of it where whole sub-blocks go, else how long it is and what is narrowed."""
    if entry.units is None:
        return "order " + ",".join(map(str, entry.order))
    units = f"{entry.units.attention} heads or {entry.units.feed_forward} neurons"
    return f"{len(entry.order)} steps, sub-blocks narrowed to some of their {units}"


def changes(entry: EncoderPlan, level: Level, sub_blocks: int, standins: int) -> str:
    """What a level does, in a line: "12 of 48 sub-blocks skipped, 30 narrowed, 42 repaired by stand-ins".

    sub_blocks: of the encoder; standins: how many stand-ins are there."""
    left = entry.left(level)
    gone, narrowed = sum(not units for units in left.values()), sum(units > 0 for units in left.values())
    parts = [f"{gone} of {sub_blocks} sub-blocks skipped", *([f"{narrowed} narrowed"] if narrowed else [])]
    if standins:
        parts.append(f"{standins} repaired by stand-ins")
    elif level.reuse or not narrowed:
        parts.append(f"{len(level.reuse)} of them re-used")
    return ", ".join(parts)


def describe_level(entry: EncoderPlan, level: Level) -> str:
    """A level in one line."""
    measured = "" if level.discrepancy is None else f", D {level.discrepancy:.4g}"
    ranks = level.standins.ranks if level.standins else {}
    reused, instead = (
        " ".join(f"{i}>{j}" for i, j in level.reuse.items() if (i in ranks) == repaired) for repaired in (False, True)
    )
    more = f", re-use {reused}" if reused else ""
    if ranks:
        more += f", {len(ranks)} linear stand-in{'s' if len(ranks) > 1 else ''} of {in_words(ranks.values())}"
    narrowed = len(entry.narrowed(level))
    if instead and not narrowed:  # without its companion a level that narrows does nothing
        more += f"; without them {instead}"
    gone = len(entry.left(level)) - narrowed
    some = f", {narrowed:3} narrowed" if entry.units else ""
    return f"  {gone:3} skipped{some}: sparsity {level.sparsity:.1%}{measured}{more}"


def in_words(ranks: Iterable[int]) -> str:
    """Ranks of stand-ins: "rank 16", "ranks 4 to 16"."""
    known = set(ranks)
    least, most = min(known), max(known)
    return f"rank {least}" if least == most else f"ranks {least} to {most}"


def plan_map(entry: EncoderPlan, level: Level) -> list[str]:
    """Attention above feed-forward: a block's number where kept, `.` where skipped, `~` where a stand-in repairs it,
    `>j` where it re-uses block j, `25%` where that share of its units stays."""
    shares = entry.shares(level)
    repaired = level.standins.ranks if level.standins else {}

    def cell(index: int) -> str:
        if index not in shares:
            return str(index // 2)
        if shares[index]:
            return f"{max(0.01, float(shares[index])):.0%}"
        if index in repaired:
            return "~"
        return f">{level.reuse[index] // 2}" if index in level.reuse else "."

    rows = []
    for start in range(0, entry.blocks, COLUMNS):
        for kind, label in enumerate(("attention", "feed-forward")):
            cells = [cell(2 * block + kind) for block in range(start, min(start + COLUMNS, entry.blocks))]
            rows.append(f"  {label:<13}" + "".join(f"{c:>5}" for c in cells))
    return rows
