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
from skrr_engine.standins.fit import Fitting

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "widths"
PAGE, PLOT = HERE.parent / "docs" / "quality.md", HERE.parent / "docs" / "images" / "quality.png"
LEVELS = (0.25, 0.33, 0.42, 0.50, 0.60, 0.70)  # of the parameters in blocks
FITTED, RANKED = 256, 64  # prompts
RANKED_SEED = 7000


@dataclass(frozen=True)
class Case:
    """How widths are found. kind, count, seed: of the prompts that are fitted on; rank: of the stand-ins."""

    kind: str = "all kinds"
    count: int = FITTED
    seed: int = 0
    rank: int = 16
    ranked: int = RANKED


class Bench(before.Bench):
    """The laboratory of Shapes, with tables of widths that are kept."""

    def search(self, case: Case, base: Assignment | None = None) -> widths.Search:
        studio, make = self.lab.studio, before.CALIBRATION[case.kind]
        fitted = studio.calibration(make(case.count, case.seed))
        meter = studio.meter(make(case.ranked, RANKED_SEED + case.seed))
        return widths.Search(fitted, meter, Settings(0.1), Fitting(rank=case.rank), base=base)

    def table(self, case: Case) -> tuple[widths.Search, Table]:
        """Of all places, from the disk as far as it was measured."""
        run, state = self.search(case), State(state_path(f"smollm2 {case}"), f"{__version__} {case}")
        known = state.load(len(self.row))
        start, done = time.monotonic(), len(known.curves) if known else 0

        def save(table: Table) -> None:
            state.save(table)
            print(f"{duration(time.monotonic() - start):>8}  place {len(table.curves)}", flush=True)

        table = run.measure(save, known or Table())
        if done < len(self.row):
            log(f"table {case}", time.monotonic() - start, done == 0)
        return run, table

    def target(self, share: float) -> float:
        """A share of the parameters in blocks as one of all."""
        return share * sum(self.row.parameter_counts) / self.row.total

    def narrowed(self, case: Case, share: float) -> tuple[Assignment, dict]:
        """What is done to the encoder at a share of the parameters in blocks, and what was kept."""
        run, table = self.table(case)
        return self.at(run, table, run.steps(table), share)

    def at(self, run: widths.Search, table: Table, steps, share: float) -> tuple[Assignment, dict]:
        chosen = steps[: run.reaching(steps, self.target(share))]
        removed = run.fit(chosen, table)
        shares = run.shares(chosen)
        gone = self.row.sparsity(shares) * self.row.total / sum(self.row.parameter_counts)
        bytes_ = 2 * self.row.total * (1 - self.row.sparsity(shares)) + sum(a.nbytes for a in removed.values())
        return removed, {"removed": gone, "bytes": bytes_}

    def judged(self, name: str, key: Sequence, make, pictures: bool = True) -> dict:
        """A row: errors on unseen prompts of every kind and, where wanted, scores. make: () -> (assignment, more)."""
        once = functools.cache(make)
        found = self.lab.kept(("widths errors", *key, before.EACH, before.UNSEEN), lambda: self.errors(once()[0]) | once()[1])
        if pictures:
            found |= self.lab.kept(("widths pictures", *key), lambda: asdict(self.lab.studio.judge(once()[0])[0]))
        return {**found, "name": name}


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
    aware = before.aware_order(bench)
    rows = [row for row in before.levels(bench, aware, chosen) if row["name"] in ("as printed", "aware order, rank 16")]
    for share in chosen:
        for case in (Case(), Case(rank=64)):
            rows.append(bench.judged(f"widths, rank {case.rank}", (case, share), lambda c=case, s=share: bench.narrowed(c, s)))
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
    for row in levels(bench, (0.42,)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
