"""What linear stand-ins are worth: discrepancies and pictures at equal sparsity, on SmolLM2-135M behind Shapes.

Compares, at 25 to 60 % of the parameters in blocks, the paper's order with re-use, the same order with stand-ins (the
search unaware of them), and the order found by what stand-ins can repair (aware); ranks, kinds and numbers of prompts
to fit on, calibration seeds, an 8-bit and a 4-bit encoder; and where stand-ins must not be trusted: prompts of kinds
that they were not fitted on, LoRAs, changed weights. Writes docs/standins.md and docs/images/standins.png.

    python -m benchmarks.standins [--quick]

Some hours on 2 cores, and takes up where it was stopped (.cache/shapes); --quick is a cut of 15 minutes that writes
nothing here. The aware order takes most of it: it is kept in benchmarks/standins_order.json; `--search` finds it anew.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import equal_bytes
from benchmarks.pages import fill
from benchmarks.shapes import scenes
from benchmarks.shapes.table import Laboratory, block_share
from skrr_engine.cli.commands import duration
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import Assignment, assignment
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure import prompts
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.plan.model import Plan
from skrr_engine.search import skip, with_standins
from skrr_engine.search.settings import Settings
from skrr_engine.search.skip import SkipList
from skrr_engine.standins import fit as standin
from skrr_engine.standins.fit import Fitting

HERE = Path(__file__).resolve().parent
PAGE, PLOT = HERE.parent / "docs" / "standins.md", HERE.parent / "docs" / "images" / "standins.png"
ORDER = HERE / "standins_order.json"
LEVELS = (0.25, 0.33, 0.42, 0.50, 0.60)  # of the parameters in blocks
MIDDLE, MOST = 0.42, 0.60
SEARCHED = 72  # prompts of the aware search: 63 to fit on, 9 to rank on
FITTED = 256  # prompts that stand-ins are fitted on, where nothing else is said
UNSEEN = 4321  # seed of the prompts that are measured on: nothing is fitted on them
EACH = 12  # of each kind
KINDS = ("long prompts", "captions", "tags and weights", "other languages", "two prompts in one")


def of_kind(kind: str) -> list[str]:
    """Unseen prompts of one kind; `shapes` are the evaluation's captions."""
    if kind == "shapes":
        return [p.caption for p in scenes.evaluation(EACH)]
    return prompts.of_kind(kind, EACH, UNSEEN)


CALIBRATION = {
    "all kinds": prompts.broad,
    "long prompts only": prompts.generate,
    "Shapes captions": lambda count, seed: scenes.calibration(count, seed),
}


class Bench:
    """The laboratory of Shapes with meters and orders for stand-ins. unseen: kind -> a meter on prompts of that kind
    that nothing was fitted on."""

    def __init__(self, per_task: int = 60):
        self.lab = Laboratory(per_task, (0,))
        self.row = self.lab.row
        self.printed = Plan.read(HERE / "shapes" / "skrr_plan.json").encoder("smollm2")

        self.unseen = functools.cache(lambda kind: self.lab.studio.meter(of_kind(kind)))

    def prefix(self, order: Sequence[int], share: float) -> tuple[int, ...]:
        """The first sub-blocks of an order that reach a share of the parameters in blocks, empty where it is short."""
        target = share * sum(self.row.parameter_counts) / self.row.total
        end = skip.reaching(order, self.row.parameter_counts, self.row.total, target)
        return tuple(order[:end]) if self.row.sparsity(order[:end]) >= target - 1e-9 else ()

    def fit(self, order: Sequence[int], rank: int, kind: str, count: int, seed: int, module=None) -> Assignment:
        """Stand-ins for an order. module: of the encoder's kind, where it is another."""
        texts = CALIBRATION[kind](count, seed)
        calibration = self.lab.studio.calibration(texts) if module is None else self.calibration_of(module, texts)
        return standin.fit(calibration, assignment(order), Fitting(rank=rank))[0]

    def calibration_of(self, module, texts: Sequence[str]) -> Calibration:
        """Of a changed copy of the encoder."""
        encoder = self.lab.studio.encoder
        batches, null = encoder.batches(texts), encoder.batch([encoder.tokenize("")])
        return Calibration(module, Tracer(module, families.find(module)), batches, null)

    def errors(self, removed: Assignment) -> dict[str, float]:
        """D_cond on unseen prompts of every kind, and D_null."""
        found = {}
        for kind in ("shapes", *KINDS):
            (d,) = self.unseen(kind).measure([removed])
            found[kind], null = d.conditional, d.null
        return {**found, "null": null}

    def measured(
        self, name: str, order: Sequence[int], rank: int = 0, kind: str = "all kinds", count: int = FITTED,
        seed: int = 0, reuse: dict | None = None, pictures: bool = False,
    ) -> dict:  # fmt: skip
        """A row: errors, kept bytes in bf16, and scores where pictures are wanted. rank 0: no stand-ins."""

        @functools.cache
        def removed() -> Assignment:
            return self.fit(order, rank, kind, count, seed) if rank else assignment(order, reuse)

        key = ("standins", tuple(order), rank, kind, count, seed, sorted((reuse or {}).items()))
        found = self.lab.kept(("errors", *key, EACH, UNSEEN), lambda: self.errors(removed()))
        if pictures:
            found |= self.lab.kept(("pictures", *key), lambda: asdict(self.lab.studio.judge(removed())[0]))
        bytes_ = 2 * (self.row.total - sum(self.row.parameter_counts[i] for i in order))
        bytes_ += sum(4 * self.row.width * (rank + 1) for _ in order) if rank else 0
        return {**found, "name": name, "removed": block_share(self.lab, order), "bytes": bytes_}


def aware_order(bench: Bench, again: bool = False) -> list[int]:
    """The order that stand-ins make up for best, to MOST."""
    if ORDER.exists() and not again:
        return json.loads(ORDER.read_text(encoding="utf-8"))["order"]
    fitted, ranked = meters(bench)
    share = sum(bench.row.parameter_counts) / bench.row.total
    start = time.monotonic()

    def save(beam: Sequence[SkipList]) -> None:
        (path,) = beam
        print(f"{duration(time.monotonic() - start):>8}  {len(path.order)} removed, {path.order[-1]} last", flush=True)
        ORDER.write_text(json.dumps({"order": path.order, "steps": path.trail}) + "\n", encoding="utf-8")

    search = with_standins.Search(fitted, ranked, Settings(MOST * share), Fitting(), lambda progress: None)
    return list(search.run(SkipList((), 0.0), save).order)


def meters(bench: Bench) -> tuple[Calibration, Meter]:
    """The prompts to fit on, and a meter, in the order of a race, on those to rank on."""
    fitted_on, ranked_on = standin.halved(prompts.broad(SEARCHED))
    return bench.lab.studio.calibration(fitted_on), bench.lab.studio.meter(ranked_on, race=True)


def levels(bench: Bench, aware: Sequence[int], chosen: Sequence[float] = LEVELS) -> list[dict]:
    """As printed, unaware and aware, at every level that the orders reach."""
    rows = []
    for share in chosen:
        printed, aware_prefix = bench.prefix(bench.printed.order, share), bench.prefix(aware, share)
        if printed:
            level = next((x for x in bench.printed.levels if x.skipped == len(printed)), None)
            if level is not None:
                rows.append(bench.measured("as printed", printed, reuse=level.reuse, pictures=True))
            else:
                rows.append(bench.measured("as printed, without re-use", printed, pictures=True))
            rows.append(bench.measured("printed order, rank 16", printed, 16, pictures=share == MIDDLE))
        if aware_prefix:
            rows.append(bench.measured("aware order, skipped only", aware_prefix))
            rows.append(bench.measured("aware order, rank 16", aware_prefix, 16, pictures=True))
    return rows


def variants(bench: Bench, aware: Sequence[int]) -> list[dict]:
    """At 42 %: ranks, kinds and numbers of prompts, seeds."""
    order = bench.prefix(aware, MIDDLE)
    rows = [bench.measured(f"rank {rank}", order, rank, pictures=True) for rank in (4, 16, 64)]
    rows += [bench.measured(f"{count} prompts", order, 16, count=count) for count in (64, 1024)]
    rows += [bench.measured(f"calibration seed {seed}", order, 16, seed=seed, pictures=True) for seed in (1, 2)]
    for kind in ("long prompts only", "Shapes captions"):
        rows.append(bench.measured(f"fitted on {kind}", order, 16, kind, pictures=True))
    return rows


def refined(bench: Bench, aware: Sequence[int]) -> list[dict]:
    """The order at 42 % refined in two ways, at about as many evaluations: by the search's own exchanges, and by
    an evolution in EvoPress's manner: offspring exchange one or two sub-blocks for others of their kind, at random, and
    the best one takes its parent's place where it is better. Stand-ins are fitted anew for each."""
    order, settings = bench.prefix(aware, MIDDLE), Settings(MIDDLE)

    def exchanges() -> dict:
        search = with_standins.Search(*meters(bench), settings, Fitting(), lambda progress: None)
        search.skips, accepted = SkipList(tuple(order), 0.0), 0
        for place in search.least_at_home(2):
            better = search.exchanged(place)
            search.skips, accepted = better or search.skips, accepted + (better is not None)
        return {"order": search.skips.order, "accepted": accepted}

    def evolution(generations: int = 6, offspring: int = 4) -> dict:
        fitted, ranked = meters(bench)
        lot = random.Random(0)

        def score(candidate: Sequence[int]) -> float:
            found, _ = standin.fit(fitted, assignment(candidate), Fitting())
            return ranked.measure([found])[0].total

        def child(parent: Sequence[int]) -> tuple[int, ...]:
            made = list(parent)
            for _ in range(lot.choice((1, 2))):
                place = lot.choice(made)
                others = [i for i in range(place % 2, len(bench.row), 2) if i not in made]
                made = [i for i in made if i != place] + [lot.choice(others)]
            return tuple(made)

        best, accepted = (score(order), tuple(order)), 0
        for _ in range(generations):
            leader = min((score(made), made) for made in (child(best[1]) for _ in range(offspring)))
            best, accepted = min(best, leader), accepted + (leader < best)
        return {"order": best[1], "accepted": accepted}

    rows = [bench.measured("as found", order, 16)]
    for name, make in (("2 exchanges of up to 13 candidates", exchanges), ("6 generations of 4 offspring", evolution)):
        found = bench.lab.kept(("refined", name, tuple(order)), make)
        rows.append({**bench.measured(name, found["order"], 16), "accepted": found["accepted"]})
    return rows


def quantised(bench: Bench, aware: Sequence[int]) -> list[dict]:
    """The stand-ins of the float32 encoder in 8-bit and 4-bit ones, at 42 %: one file for all."""
    rows, order = [], bench.prefix(aware, MIDDLE)
    level = bench.printed.levels[-1]
    printed = assignment(bench.printed.order[: level.skipped], level.reuse)
    for precision in ("fp8", "Q4_0"):
        own = equal_bytes.PRECISIONS[precision]
        wide = equal_bytes.PRECISIONS[equal_bytes.EMBEDDING.get(precision, precision)]
        twin, sizes = equal_bytes.quantised(bench.lab.studio.encoder.module, own, wide)
        row = families.find(twin)
        for name, removed, bytes_ in (
            ("whole", lambda: {}, 0), ("as printed", lambda: printed, 0),
            ("aware, rank 16", lambda: bench.fit(order, 16, "all kinds", FITTED, 0), 4 * row.width * 17 * len(order)),
        ):  # fmt: skip
            found = bench.lab.kept(
                ("quantised", precision, name, tuple(order), FITTED),
                lambda removed=removed, twin=twin: asdict(bench.lab.studio.judge(removed(), twin)[0]),
            )
            gone = {"whole": {}, "as printed": printed}.get(name, dict.fromkeys(order))
            kept = equal_bytes.kept_bytes(row, sizes, gone) + bytes_
            rows.append(
                {**found, "name": f"{precision}, {name}", "removed": block_share(bench.lab, gone), "bytes": kept}
            )
    return rows


def changed_weights(bench: Bench, aware: Sequence[int]) -> list[dict]:
    """Stand-ins of the plain encoder in one with a LoRA on its kept feed-forwards, and in one whose weights have all
    been changed a little: D_cond on captions and long prompts against the changed encoder itself, without removals."""
    order = bench.prefix(aware, MIDDLE)
    level = bench.printed.levels[-1]
    printed = assignment(bench.printed.order[: level.skipped], level.reuse)

    def lora(name: str, weight: torch.Tensor, generator) -> torch.Tensor:
        if "down_proj" not in name or int(name.split(".")[1]) * 2 + 1 in order:
            return torch.zeros_like(weight)
        up, down = (torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 8), (8, weight.shape[1])))
        return up @ down

    def everywhere(name: str, weight: torch.Tensor, generator) -> torch.Tensor:
        return torch.randn(weight.shape, generator=generator) if weight.ndim == 2 else torch.zeros_like(weight)

    rows = []
    for name, make in (("LoRA on kept feed-forwards", lora), ("all weights changed", everywhere)):
        for size in (0.05, 0.2):

            def find(make=make, size=size) -> dict:
                twin = copy.deepcopy(bench.lab.studio.encoder.module)
                generator = torch.Generator().manual_seed(0)
                for key, parameter in twin.named_parameters():
                    if "embed" not in key:
                        change = make(key, parameter.data, generator)
                        if change.norm() > 0:
                            parameter.data += change * (size * parameter.data.norm() / change.norm())
                texts = of_kind("captions") + of_kind("long prompts")
                meter = Meter(bench.calibration_of(twin, texts), bench.lab.studio.projection)
                repaired = bench.fit(order, 16, "all kinds", FITTED, 0)
                fresh = bench.fit(order, 16, "all kinds", FITTED, 0, twin)
                found = meter.measure([printed, assignment(order), repaired, fresh])
                names = ("as printed", "skipped only", "stand-ins of the plain encoder", "fitted anew")
                return dict(zip(names, (d.conditional for d in found), strict=True))

            found = bench.lab.kept(("changed", name, size, tuple(order), FITTED), find)
            rows.append({**found, "name": f"{name}, {size:.0%} of each weight's size"})
    return rows


def cell(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict], columns: Sequence[str], first: str) -> str:
    """Rows as Markdown; columns: keys, `removed` in percent, `bytes` in MB."""
    show = {"removed": lambda v: f"{v:.1%}", "bytes": lambda v: f"{v / 1e6:.1f}"}
    lines = [f"| {first} | " + " | ".join({"bytes": "kept MB"}.get(c, c) for c in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for row in rows:
        cells = [show.get(c, cell)(row[c]) if row.get(c) is not None else "" for c in columns]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


ERRORS = ("shapes", *KINDS, "null")
PICTURES = ("overall", "exact", "lpips")


def write(found: dict[str, str], rows: Sequence[dict]) -> None:
    """The tables into docs/standins.md, and the plot."""
    fill(PAGE, found)
    plot(rows, PLOT)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Errors and scores over what is removed: a line for each name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = [row for row in rows if row["name"] == name]
        for axis, key in zip(axes, ("captions", "overall"), strict=True):
            points = [(100 * row["removed"], row[key]) for row in own if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name, color=f"C{number}")
    axes[0].set(xlabel="removed, % of the parameters in blocks", ylabel="D_cond on unseen captions", yscale="log")
    axes[1].set(xlabel="removed, % of the parameters in blocks", ylabel="score of the pictures", ylim=(0, 1.03))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="42 %% only, 5 prompts a task, writes nothing here")
    parser.add_argument("--search", action="store_true", help="find the aware order anew, and nothing else")
    options, start = parser.parse_args(), time.monotonic()
    torch.set_grad_enabled(False)
    bench = Bench(5 if options.quick else 60)
    if options.search:
        aware_order(bench, again=True)
        return
    aware = aware_order(bench)
    if options.quick:
        print(table(levels(bench, aware, (MIDDLE,)), ("removed", "bytes", *ERRORS, *PICTURES), "how"))
    else:
        rows = levels(bench, aware)
        found = {
            "levels": table(rows, ("removed", "bytes", *ERRORS, *PICTURES), "how"),
            "variants": table(variants(bench, aware), (*ERRORS, *PICTURES), "at 42 %, aware order"),
            "refined": table(refined(bench, aware), ("accepted", *ERRORS), "at 42 %, rank 16"),
            "quantised": table(quantised(bench, aware), ("removed", "bytes", "D_cond", *PICTURES), "encoder"),
            "changed": table(
                changed_weights(bench, aware),
                ("as printed", "skipped only", "stand-ins of the plain encoder", "fitted anew"),
                "D_cond at 42 %",
            ),
        }
        write(found, rows)
    print(f"took {duration(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
