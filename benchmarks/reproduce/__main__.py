"""The papers' experiments and theory on models that run here: fills docs/reproduction.md.

    python -m benchmarks.reproduce [--quick | --short] [--only NAME ...] [--page]

Meant to take a night on 2 free cores, two hours with --short, a quarter of one with --quick. Takes up where it was
stopped: what was found is kept in .cache/reproduce. --page measures nothing: it writes what is there, of each
experiment the cut of which most is there, and leaves out the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks import pages
from benchmarks.reproduce import beams, calibration, criterion, null_term, pairs, sizes, theory
from benchmarks.reproduce.lab import FULL, IMAGES, QUICK, ROOT, SHORT, Cut, Lab
from skrr_engine.plan.words import duration

PAGE = ROOT / "docs" / "reproduction.md"
MISSING = "*Not measured yet.*"


@dataclass(frozen=True)
class Experiment:
    """measure: a lab's rows, as one list or as lists by name; tables: mark on the page -> table of what was measured;
    plot: draws what was measured, where there is something to draw; cut: how it was measured, in words."""

    measure: Callable[[Lab], list | dict]
    tables: dict[str, Callable]
    plot: Callable | None = None
    cut: Callable[[Cut], str] = str


def on_first_blocks(cut: Cut) -> str:
    """Of what needs no pictures."""
    where = f"the encoder's first {cut.blocks} blocks alone" if cut.blocks else "all blocks"
    return f"{where}, no pictures; {replace(cut, shortlist=0 if cut.blocks else cut.shortlist).searched}"


def part(name: str, show: Callable) -> Callable:
    """A table of one of several lists."""
    return lambda found: show(found[name])


EXPERIMENTS = {
    "theory": Experiment(
        theory.measure,
        {"bounds": part("bounds", theory.show_bounds), "tries": part("tries", theory.show_tries)},
        theory.plot,
        lambda cut: f"{cut.captions} captions, the bounds on those of one length; one seed",
    ),
    "pairs": Experiment(
        pairs.measure,
        {"pairs": pairs.show, "predictors": pairs.show_predictors},
        pairs.plot,
        lambda cut: f"{pairs.CAPTIONS} captions; {6 * cut.per_task} pictures of each painted pair",
    ),
    "criterion": Experiment(criterion.measure, {"criterion": criterion.show}, criterion.plot),
    "reuse": Experiment(criterion.published, {"reuse": criterion.show_reuse}, cut=lambda cut: criterion.PUBLISHED),
    "beams": Experiment(beams.measure, {"beams": beams.show}, cut=on_first_blocks),
    "null": Experiment(
        null_term.measure,
        {"guidance": part("guidance", null_term.show_guidance), "noise": part("noise", null_term.show_noise)},
        null_term.plot,
    ),
    "calibration": Experiment(calibration.measure, {"calibration": calibration.show}, cut=on_first_blocks),
    "sizes": Experiment(
        sizes.measure,
        {"sizes": sizes.show},
        cut=lambda cut: f"{replace(cut, seeds=(0,)).searched}, {sizes.UNSEEN} others to judge by",
    ),
}


def size(found: list | dict) -> int:
    """Number of rows."""
    return len(found) if isinstance(found, list) else sum(map(len, found.values()))


def written(experiment: Experiment, found: list | dict, lab: Lab) -> dict[str, str]:
    """The tables of what was measured, each under its cut."""
    tables = {}
    for mark, show in experiment.tables.items():
        try:
            tables[mark] = f"*Measured with {experiment.cut(lab.cut)}.*\n\n{show(found)}"
        except (KeyError, ValueError):  # a part that was not measured
            tables[mark] = MISSING
    return tables


def main() -> None:
    """Measure, print; or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuts = parser.add_mutually_exclusive_group()
    cuts.add_argument("--quick", action="store_const", const=QUICK, dest="cut", help="a cut of a quarter of an hour")
    cuts.add_argument("--short", action="store_const", const=SHORT, dest="cut", help="a cut of two hours")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments")
    parser.add_argument("--page", action="store_true", help="measure nothing, write what is there")
    options, start = parser.parse_args(), time.monotonic()
    torch.set_grad_enabled(False)
    if options.page:
        page(options.only)
        return
    lab = Lab(options.cut or FULL)
    for name in options.only:
        print(f"{duration(time.monotonic() - start):>8}  {name}", flush=True)
        found = EXPERIMENTS[name].measure(lab)
        for table in written(EXPERIMENTS[name], found, lab).values():
            print(table, flush=True)
    print(f"took {duration(time.monotonic() - start)}")


def page(wanted: list[str]) -> None:
    """Write what is there into the page, and draw it."""
    import matplotlib

    matplotlib.use("Agg")
    IMAGES.mkdir(exist_ok=True)
    labs = [Lab(cut, measuring=False) for cut in (FULL, SHORT, QUICK)]
    for name in wanted:
        experiment = EXPERIMENTS[name]
        found, lab = max(((experiment.measure(lab), lab) for lab in labs), key=lambda pair: size(pair[0]))
        if not size(found):
            pages.fill(PAGE, dict.fromkeys(experiment.tables, MISSING))
            continue
        pages.fill(PAGE, written(experiment, found, lab))
        with contextlib.suppress(KeyError):  # a part that was not measured
            if experiment.plot:
                experiment.plot(found)


if __name__ == "__main__":
    main()
