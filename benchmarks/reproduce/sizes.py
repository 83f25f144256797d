"""Other sizes: does the method carry over from SmolLM2 (30 blocks, 576 wide) to Gemma 3 270M (18 blocks, 640 wide)?
There is no denoiser for the second, so both are judged by their bare embeddings on unseen captions."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

from benchmarks import gemma270m
from benchmarks.reproduce import choices
from benchmarks.reproduce.lab import ROOT, Lab, Unknown, line
from benchmarks.widths import Bare
from skrr_engine.encoder.actions import assignment
from skrr_engine.measure import prompts
from skrr_engine.measure.meter import Meter
from skrr_engine.search import baselines

LEVELS = (0.15, 0.25, 0.42)
UNSEEN, UNSEEN_SEED = 16, 4321
ENCODERS: dict[str, Callable[[], str]] = {
    "SmolLM2-135M": lambda: str(ROOT / ".cache" / "smollm2"),
    "Gemma 3 270M": lambda: str(gemma270m.ensure(ROOT / ".cache" / "gemma270m")),
}
HOW = ("Skrr", "Skrr, per parameter", "ShortGPT", "Random")


def orders(lab: Lab, meter: Meter) -> dict[str, Sequence[int]]:
    """Each way's order, to the strongest level."""
    costs = meter.row.parameter_counts
    target = LEVELS[-1] * sum(costs)

    def measure(lists: Sequence[tuple[int, ...]]) -> list[float]:
        return [d.total for d in meter.measure([assignment(order) for order in lists], stack=True)]

    search = functools.partial(choices.beam, measure, costs, target, shortlist=lab.cut.shortlist)
    shuffled = list(range(len(costs)))
    random.Random(0).shuffle(shuffled)
    ways = (search().order, search(per_parameter=True).order, baselines.shortgpt_order(meter), shuffled)
    return dict(zip(HOW, ways, strict=True))


def of_encoder(lab: Lab, name: str) -> list[dict]:
    """Rows {name, how, level, D}: D beside that of an encoder that says nothing."""
    bare = Bare(ENCODERS[name](), name)
    meter = Meter(bare.calibration(prompts.of_kind("captions", lab.cut.captions, 0)))
    unseen = Meter(bare.calibration(prompts.of_kind("captions", UNSEEN, UNSEEN_SEED)))
    nothing, counts, found = unseen.nothing(), bare.row.parameter_counts, []
    for how, order in orders(lab, meter).items():
        for level in LEVELS:
            end = next(n for n in range(len(order) + 1) if sum(counts[i] for i in order[:n]) >= level * sum(counts))
            (d,) = unseen.measure([assignment(order[:end])])
            found.append({"name": name, "how": how, "level": level, "D": d.total / nothing, "skipped": end})
    return found


def measure(lab: Lab) -> list[dict]:
    """Of all encoders."""
    found = []
    for name in ENCODERS:
        what = ("sizes", name, lab.cut.captions, lab.cut.shortlist, LEVELS, UNSEEN)
        try:
            found += lab.kept(what, functools.partial(lambda name: {"rows": of_encoder(lab, name)}, name))["rows"]
        except Unknown:
            continue
    return found


def show(rows: Sequence[dict]) -> str:
    """Relative D by encoder, way and level."""
    lines = [line(("encoder", "how", *(f"{level:.0%}" for level in LEVELS))), "|---|---|" + len(LEVELS) * "---:|"]
    for name, how in dict.fromkeys((row["name"], row["how"]) for row in rows):
        own = {row["level"]: row for row in rows if (row["name"], row["how"]) == (name, how)}
        lines.append(line([name, how, *(f"{own[level]['D']:.3g}" for level in LEVELS)]))
    return "\n".join(lines)
