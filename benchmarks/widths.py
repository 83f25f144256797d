"""What narrowed sub-blocks under one budget are worth: discrepancies and pictures at equal bytes, on real encoders.

On SmolLM2-135M behind Shapes: as printed, whole parts with stand-ins (the best before), and widths, from 25 to 70 % of
the parameters in blocks; ranks, prompts and calibration seeds; what could be added to the method, each at equal
evaluations; where widths must not be trusted; equal bytes anew; and the time that it takes. On Gemma 3 270M: the
discrepancies alone. Fills docs/quality.md and docs/images/quality.png.

    python -m benchmarks.widths [--quick] [--only SECTION ...]

Hours on 2 cores, and takes up where it was stopped (.cache/shapes, .cache/widths); --quick is a cut of 15 minutes that
writes nothing here.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import standins as before
from benchmarks.pages import fill
from benchmarks.shapes import evaluate, scenes
from benchmarks.shapes.table import block_share
from skrr_engine import __version__
from skrr_engine.encoder.actions import Assignment, assignment
from skrr_engine.measure import prompts
from skrr_engine.plan.words import duration
from skrr_engine.search import allocate, widths
from skrr_engine.search.allocate import Table
from skrr_engine.search.resume import State
from skrr_engine.search.settings import Settings
from skrr_engine.standins import fit as standin
from skrr_engine.standins.fit import Fitting
from skrr_engine.standins.refit import refit

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "widths"
PAGE, PLOT = HERE.parent / "docs" / "quality.md", HERE.parent / "docs" / "images" / "quality.png"
LEVELS = (0.25, 0.33, 0.42, 0.50, 0.60, 0.70)  # of the parameters in blocks
FITTED, RANKED = 256, 64  # prompts
RANKED_SEED = 7000
FEWER = 24
"""Prompts that widths are judged on where many tables are made."""


@dataclass(frozen=True)
class Case:
    """How the places are measured. kind: of the prompts that are fitted on; count, seed: how many, and of which seed;
    ranked: others that widths are judged on."""

    kind: str = "all kinds"
    count: int = FITTED
    seed: int = 0
    rank: int = 16
    ranked: int = RANKED


@dataclass(frozen=True)
class Fit:
    """How a level is fitted at the end. rank: of the stand-ins; count: prompts; refit: out-projections, too."""

    rank: int = 16
    count: int = FITTED
    refit: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.count} prompts" + (", out-projections refitted" if self.refit else "")


class Bench(before.Bench):
    """The laboratory of Shapes, with tables of widths that are kept."""

    def fitted(self, kind: str, count: int, seed: int):
        """The prompts that are fitted on."""
        return self.lab.studio.calibration(before.CALIBRATION[kind](count, seed))

    def search(self, case: Case, base: Assignment | None = None, made=widths.Search) -> widths.Search:
        """What measures all places."""
        judged_on = before.CALIBRATION[case.kind](case.ranked, RANKED_SEED + case.seed)
        fitted, meter = self.fitted(case.kind, case.count, case.seed), self.lab.studio.meter(judged_on)
        return made(fitted, meter, Settings(0.1), Fitting(rank=case.rank), base=base)

    def table(self, case: Case, name: str = "", run: widths.Search | None = None) -> tuple[widths.Search, Table]:
        """Of all places, from the disk as far as it was measured. run: another way to measure them, of this name."""
        run = run or self.search(case)
        state = State(state_path(f"smollm2 {case}{name}"), f"{__version__} {case}")
        known = state.load(len(self.row))
        start, done = time.monotonic(), len(known.curves) if known else 0

        def save(table: Table) -> None:
            state.save(table)
            print(f"{duration(time.monotonic() - start):>8}  place {len(table.curves)}", flush=True)

        table = run.measure(save, known or Table())
        if done < len(self.row):
            log(f"table {case}{name}", time.monotonic() - start, done == 0)
        return run, table

    def target(self, share: float) -> float:
        """A share of the parameters in blocks as one of all."""
        return share * sum(self.row.parameter_counts) / self.row.total

    def at(self, run: widths.Search, table: Table, steps, share: float, fit: Fit, case: Case):
        """What is done to the encoder at a share of the parameters in blocks, and what was kept."""
        chosen = steps[: run.reaching(steps, self.target(share))]
        left = allocate.left(chosen)
        bare = assignment(left, units={place: widths.units_kept(table, place, n) for place, n in left.items() if n})
        fitted, start = self.fitted(case.kind, fit.count, case.seed), time.monotonic()
        if fit.refit:
            removed = refit(fitted, bare, Fitting(rank=fit.rank))
        else:
            found, _ = standin.fit(fitted, bare, Fitting(rank=fit.rank))
            removed = {place: action.repaired(found[place]) for place, action in bare.items()}
        log(f"fit {fit} at {share:.0%}", time.monotonic() - start, True)
        return removed, self.counted(run.shares(chosen), removed)

    def counted(self, shares, removed: Assignment) -> dict:
        """Share removed of the parameters in blocks, and bytes kept in 16 bit, stand-ins and unit numbers counted."""
        gone = self.row.sparsity(shares)
        numbers = sum(4 * len(a.units) for a in removed.values() if a.units is not None)
        bytes_ = 2 * self.row.total * (1 - gone) + sum(a.nbytes for a in removed.values()) + numbers
        return {"removed": gone * self.row.total / sum(self.row.parameter_counts), "bytes": bytes_}

    def narrowed(self, share: float, fit: Fit = Fit(), case: Case = Case()) -> tuple[Assignment, dict]:  # noqa: B008
        """Widths as the engine finds them."""
        run, table = self.table(case)
        return self.at(run, table, run.steps(table), share, fit, case)

    def judged(self, name: str, key: Sequence, make, pictures: bool = True) -> dict:
        """A row: errors on unseen prompts of every kind and, where wanted, scores. make: () -> (assignment, more)."""
        once = functools.cache(make)
        parts = ("widths errors", *key, before.EACH, before.UNSEEN)
        found = self.lab.kept(parts, lambda: {**self.errors(once()[0]), **once()[1]})
        if pictures:
            found |= self.lab.kept(("widths pictures", *key), lambda: asdict(self.lab.studio.judge(once()[0])[0]))
        return {**found, "name": name}

    def row_of(
        self, name: str, share: float, fit: Fit = Fit(), case: Case = Case(), pictures: bool = True  # noqa: B008
    ) -> dict:  # fmt: skip
        """A row of widths."""
        return self.judged(name, (share, fit, case), lambda: self.narrowed(share, fit, case), pictures)


def state_path(name: str) -> Path:
    """Where a table is kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / ("".join(c if c.isalnum() else "_" for c in name) + ".json")


def log(what: str, seconds: float, whole: bool) -> None:
    """Note how long something took, for the table of times."""
    with (CACHE / "times.jsonl").open("a", encoding="utf-8") as file:
        threads = torch.get_num_threads()
        file.write(json.dumps({"what": what, "seconds": seconds, "whole": whole, "threads": threads}) + "\n")


def levels(bench: Bench, chosen: Sequence[float] = LEVELS) -> list[dict]:
    """As printed, whole parts with stand-ins, and widths."""
    rows = []
    aware = before.aware_order(bench)
    for share in chosen:
        known = before.levels(bench, aware, (share,))
        rows += [row for row in known if row["name"].startswith("as printed") or row["name"] == "aware order, rank 16"]
        rows.append(bench.row_of("widths, rank 16", share))
        rows.append(bench.row_of("widths, rank 64, refitted, 1024 prompts", share, Fit(64, 1024, True)))
    return rows


def variants(bench: Bench, share: float) -> list[dict]:
    """Ranks, prompts, refit, seeds and prompts of the kind that is painted."""
    fits = (
        Fit(), Fit(refit=True), Fit(64), Fit(64, refit=True), Fit(16, 1024), Fit(16, 1024, True), Fit(64, 1024),
        Fit(64, 1024, True),
    )  # fmt: skip
    rows = [bench.row_of(str(fit), share, fit) for fit in fits]
    for seed in (1, 2):
        rows.append(bench.row_of(f"calibration seed {seed}", share, case=Case(seed=seed, ranked=FEWER)))
    rows.append(bench.row_of(f"{FEWER} prompts to judge widths on", share, case=Case(ranked=FEWER), pictures=False))
    rows.append(bench.row_of("fitted on Shapes captions", share, case=Case("Shapes captions")))
    return rows


class Coarse(widths.Search):
    """A ladder of half as many widths."""

    rungs = (1 / 2, 1 / 5, 1 / 16)


def tried(bench: Bench, share: float) -> list[dict]:
    """What could be added to the method, at equal evaluations: a second allocation around the first."""
    case = Case(ranked=FEWER)
    rows = [bench.row_of("as found, 6 widths a place", share, case=case, pictures=False)]
    run, first = bench.table(case, " coarse", bench.search(case, made=Coarse))
    rows.append(
        bench.judged(
            "3 widths a place", (share, "coarse", case), lambda: bench.at(run, first, run.steps(first), share, Fit(), case),
            pictures=False,
        )
    )  # fmt: skip

    def again() -> tuple[Assignment, dict]:
        base, _ = bench.at(run, first, run.steps(first), share, Fit(), case)
        around, second = bench.table(case, f" coarse around {share}", bench.search(case, base, Coarse))
        return bench.at(around, second, around.steps(second), share, Fit(), case)

    rows.append(bench.judged("3 widths a place, then 3 around that", (share, "around", case), again, pictures=False))
    return rows


def main() -> None:
    """Measure, print, and write unless it is the quick cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a cut of 15 minutes; writes nothing to docs/")
    parser.add_argument("--only", nargs="+", help="sections to run")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    bench = Bench()
    columns = ("removed", "bytes", *before.ERRORS, *before.PICTURES)
    print(
        before.table([bench.row_of("widths, rank 16", share) for share in (0.42, 0.60, 0.25)], columns, "how"),
        flush=True,
    )
    print(before.table(levels(bench), columns, "how"), flush=True)


if __name__ == "__main__":
    main()
