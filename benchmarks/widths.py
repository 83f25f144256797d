"""What narrowed sub-blocks under one budget are worth: discrepancies and pictures at equal bytes, on real encoders.

On SmolLM2-135M behind Shapes: as printed, whole parts with stand-ins (the best before), and widths, from 25 to 70 % of
the parameters in blocks; ranks, prompts and calibration seeds; what could be added to the method, each at equal
evaluations; where widths must not be trusted; equal bytes anew; and the time that it takes. On Gemma 3 270M: the
discrepancies alone. Fills docs/quality.md and docs/images/quality.png.

    python -m benchmarks.widths [--quick] [--only SECTION ...]

Hours on 2 cores, and takes up where it was stopped (.cache/shapes, .cache/widths). `--page` measures nothing: it writes
what is there, and leaves out the rest. --quick is a cut of 15 minutes that writes nothing here.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file

from benchmarks import equal_bytes, gemma270m, pages, refine
from benchmarks import standins as before
from skrr_engine import __version__
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, Action, Assignment, Narrow, assignment
from skrr_engine.encoder.standin import StandIn, standin_of
from skrr_engine.encoder.trace import Tracer
from skrr_engine.encoder.units import units_of
from skrr_engine.files.folder import load
from skrr_engine.measure import prompts
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.plan.words import duration
from skrr_engine.search import allocate, widths
from skrr_engine.search import run as paper
from skrr_engine.search.allocate import Table
from skrr_engine.search.repair import filled
from skrr_engine.search.resume import State
from skrr_engine.search.settings import Settings
from skrr_engine.standins import fit as standin
from skrr_engine.standins import tune
from skrr_engine.standins.fit import Fitting
from skrr_engine.standins.refit import refit

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "widths"
TABLE = HERE / "widths_table.json"
"""The table of the usual case, which takes longest."""
PAGE, PLOT = HERE.parent / "docs" / "quality.md", HERE.parent / "docs" / "images" / "quality.png"
LEVELS = (0.25, 0.33, 0.42, 0.50, 0.60, 0.70)  # of the parameters in blocks
FITTED, RANKED = 256, 24  # prompts
RANKED_SEED = 7000
RACED = 128
"""Prompts of the racing beam search that is timed."""


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


@dataclass(frozen=True)
class Tuned(Fit):
    """The same, and all stand-ins tuned together at the end, in so many steps."""

    steps: int = tune.STEPS

    def __str__(self) -> str:
        return f"{super().__str__()}, tuned"

    @property
    def before(self) -> Fit:
        """What is tuned."""
        return Fit(self.rank, self.count, self.refit)


BETTER = (Fit(64), Fit(refit=True), Fit(64, refit=True))
"""What is fitted in the end, beside the usual, at the largest share that all ways reach."""


class Unknown(Exception):
    """What was not measured yet, where nothing is to be measured."""


class Bench(before.Bench):
    """The laboratory of Shapes, with tables of widths that are kept. measuring: whether what is not there is
    measured."""

    def __init__(self, per_task: int = 60, measuring: bool = True):
        super().__init__(per_task)
        if not measuring:
            kept = self.lab.kept

            def known(what: Sequence, make) -> dict:
                def refuse() -> dict:
                    raise Unknown(repr(what)[:80])

                return kept(what, refuse)

            self.lab.kept = known

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
        if case == Case() and not name and not state.path.exists() and TABLE.exists():
            shutil.copy(TABLE, state.path)  # measured before; delete it to measure anew
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
        path = state_path(f"fit {case} {fit} {sorted(left.items())}"[:40] + digest(case, fit, left)).with_suffix(
            ".safetensors"
        )
        if path.exists():
            removed = read_fit(path, bare)
            return removed, self.counted(run.shares(chosen), removed)
        fitted = self.fitted(case.kind, fit.count, case.seed)
        if isinstance(fit, Tuned):
            base, _ = self.at(run, table, steps, share, fit.before, case)
        start = time.monotonic()
        if isinstance(fit, Tuned):
            removed = tune.tuned(fitted, self.lab.studio.projection, base, fit.steps)
        elif fit.refit:
            removed = refit(fitted, bare, Fitting(rank=fit.rank))
        else:
            found, _ = standin.fit(fitted, bare, Fitting(rank=fit.rank))
            removed = {place: action.repaired(found[place]) for place, action in bare.items()}
        log(f"fit {fit} at {share:.0%}", time.monotonic() - start, True)
        write_fit(path, removed)
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


def digest(*facts) -> str:
    """Of what something depends on."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def write_fit(path: Path, removed: Assignment) -> None:
    """Keep an assignment's stand-ins and refitted out-projections."""
    found = {}
    for place, action in removed.items():
        standin_ = standin_of(action)
        found |= {f"{place}.{part}": getattr(standin_, part).contiguous() for part in ("down", "up", "bias")}
        if getattr(action, "out", None) is not None:
            found[f"{place}.out"] = action.out.contiguous()
    save_file(found, path, {"norm": standin_.norm})


def read_fit(path: Path, bare: Assignment) -> Assignment:
    """The same, put into what it was fitted to."""
    tensors = load_file(path)
    made = {}
    for place, action in bare.items():
        parts = [tensors[f"{place}.{part}"] for part in ("down", "up", "bias")]
        made[place] = action.repaired(StandIn("rms", *parts))
        if f"{place}.out" in tensors:
            made[place] = replace(made[place], out=tensors[f"{place}.out"])
    return made


def log(what: str, seconds: float, whole: bool) -> None:
    """Note how long something took, for the table of times."""
    with (CACHE / "times.jsonl").open("a", encoding="utf-8") as file:
        threads = torch.get_num_threads()
        file.write(json.dumps({"what": what, "seconds": seconds, "whole": whole, "threads": threads}) + "\n")


def levels(bench: Bench, chosen: Sequence[float] = LEVELS) -> list[dict]:
    """Widths, and what they stand beside: as printed, and whole parts with stand-ins, as benchmarks/standins.py has
    measured them on the same prompts and pictures."""
    rows = there(*(functools.partial(bench.row_of, "widths, rank 16", share) for share in chosen))
    rows += there(*(functools.partial(bench.row_of, "widths, tuned", share, Tuned()) for share in sorted(chosen)[::-1]))
    rows += there(*(functools.partial(bench.row_of, f"widths, {fit}", before.MOST, fit) for fit in BETTER))
    names = ("as printed", "as printed, without re-use", "aware order, rank 16")
    rows += [row for row in published(before.PAGE) if row["name"] in names]
    return sorted(rows, key=lambda row: -row["bytes"])


def published(page: Path) -> list[dict]:
    """The rows of a page's table of levels."""
    found = []
    for row in pages.rows(page, "levels"):
        name, *cells = row.items()
        numbers = {head: float(cell.rstrip("%")) for head, cell in cells if cell}
        found.append(
            {**numbers, "name": name[1], "removed": numbers["removed"] / 100, "bytes": 1e6 * numbers["kept MB"]}
        )
    return found


def there(*makes) -> list[dict]:
    """The rows of those that are known, or can be measured."""
    found = []
    for make in makes:
        try:
            found.append(make())
        except Unknown as error:
            print(f"not measured yet: {error}", flush=True)
    return found


def variants(bench: Bench) -> list[dict]:
    """Ranks, prompts, refit."""
    fits = (Fit(), Tuned(), Fit(64), Tuned(64), Fit(refit=True), Fit(64, refit=True), Tuned(refit=True), Fit(16, 1024))
    return there(
        *(
            functools.partial(bench.row_of, f"{share:.0%}: {fit}", share, fit)
            for share in (before.MOST, before.MIDDLE)
            for fit in fits
        ),
        lambda: bench.row_of("42%: calibration seed 1", before.MIDDLE, case=Case(seed=1)),
        lambda: bench.row_of("42%: fitted on Shapes captions", before.MIDDLE, case=Case("Shapes captions")),
    )


MOVES = {
    "exchanges: a width back here, one less there": ("wider",),
    f"rank {refine.WIDE} where it costs least, paid for by units": ("rank",),
    f"exchanges and rank {refine.WIDE}": ("wider", "rank"),
    "another place run again where no unit is left": ("again", "again, bare"),
}
"""What is tried after the allocation -> the kinds of moves that it takes."""


def tried(bench: Bench, share: float) -> list[dict]:
    """What could be added to the method, around what it finds at a share."""

    @functools.cache
    def found() -> tuple[widths.Search, Assignment, dict, list[refine.Move]]:
        run, table = bench.table(Case())
        base, more = bench.narrowed(share)
        start = time.monotonic()
        made = refine.moves(run, table, base)
        log(f"{len(made)} moves at {share:.0%}", time.monotonic() - start, True)
        print(refine.counts_of(made), flush=True)
        return run, base, more, made

    def moved(kinds: Sequence[str]) -> tuple[Assignment, dict]:
        run, base, more, made = found()
        chosen = refine.traded(run, base, made, kinds)
        print(kinds, [(m.place, m.kind, m.lost) for m in chosen], flush=True)
        freed = sum(m.freed for m in chosen)
        assigned = refine.filled_again(run, refine.with_moves(base, chosen))
        return assigned, {**more, "bytes": more["bytes"] - freed, "accepted": len(chosen)}

    return there(
        lambda: bench.row_of("as found", share),
        *(
            lambda name=name, kinds=kinds: bench.judged(name, (share, "moved", kinds), lambda: moved(kinds), False)
            for name, kinds in MOVES.items()
        ),
    )


PRECISIONS = ("Q8_0", "Q5_0", "Q4_0", "fp8", "bf16")
PICTURED = [("Q8_0", 0.42), ("Q5_0", 0.0), ("Q5_0", 0.25), ("Q5_0", 0.42), ("Q4_0", 0.0)]
"""Precisions and shares that are judged by pictures, too."""
EQUAL, EQUAL_EACH = (0.25, 0.42, 0.60, 0.70), 6
"""Shares, and unseen prompts of each kind, at which precisions are compared."""


def kept_bytes(row, sizes: dict[str, int], removed: Assignment, again: int = 34) -> int:
    """Bytes of what is left of an encoder in some precision: rows of in-projections go alone; of an out-projection the
    columns that stay, or, where they lie in blocks, the less of these columns at 8 bits and all of it. sizes: of each
    parameter, whole; again: bytes of 32 weights that were put into blocks anew, 0 where there are none."""
    family = families.by_name(row.family)
    total = sum(sizes.values()) + sum(action.nbytes for action in removed.values())
    for place, action in removed.items():
        own = row.sub_blocks[place].tensors()
        if action.units is None:
            total -= sum(sizes[key] for key in own)
            continue
        total += 4 * len(action.units)
        units = units_of(row, place)
        share = Fraction(len(action.units), units.count)
        for key in filter(family.in_units, own):
            left = int(sizes[key] * share)
            if again and key.rpartition(".")[0] == units.out_path:
                left = min(int(own[key].numel() * share) * again // 32, sizes[key])
            total -= sizes[key] - left
    return total


def equal(bench: Bench) -> list[dict]:
    """Quantised encoders, whole and narrowed: bytes, and discrepancy to the float32 encoder on unseen prompts of all
    kinds; of some, pictures."""
    module, kinds = bench.lab.studio.encoder.module, ("shapes", *before.KINDS)
    texts = [text for kind in kinds for text in before.of_kind(kind)[:EQUAL_EACH]]
    fits = [(share, Fit()) for share in EQUAL] + [(before.MOST, Fit(64))]
    rows = []
    for precision in PRECISIONS:
        own, wide = (equal_bytes.PRECISIONS[p] for p in (precision, equal_bytes.EMBEDDING.get(precision, precision)))
        twin = functools.cache(lambda own=own, wide=wide: equal_bytes.quantised(module, own, wide))

        def find(twin=twin, precision=precision) -> dict:
            encoder, sizes = twin()
            row, blocks = families.find(encoder), 34 if precision.startswith("Q") else 0
            made = [({}, {"removed": 0.0}), *(bench.narrowed(share, fit) for share, fit in fits)]
            batches, null = bench.calibration_of(module, texts).batches()
            calibration = Calibration(module, Tracer(encoder, row), batches, null)
            meter = Meter(calibration, bench.lab.studio.projection, against=bench.lab.studio.tracer)
            found = meter.measure([removed for removed, _ in made], stack=True)
            return {
                "D": [d.total for d in found],
                "removed": [more["removed"] for _, more in made],
                "bytes": [kept_bytes(row, sizes, removed, blocks) for removed, _ in made],
            }

        def judge(share: float, fit: Fit, twin=twin) -> dict:
            return asdict(bench.lab.studio.judge(bench.narrowed(share, fit)[0] if share else {}, twin()[0])[0])

        key = ("widths equal bytes", precision, tuple(fits), Case(), EQUAL_EACH, before.UNSEEN)
        for found in there(lambda find=find, key=key: bench.lab.kept(key, find)):
            for number, (share, fit) in enumerate([(0.0, Fit()), *fits]):
                name = precision + (f", rank {fit.rank}" if fit.rank != Fit().rank else "")
                rows.append({k: found[k][number] for k in ("D", "removed", "bytes")} | {"name": name})
                if (precision, share) in PICTURED and fit == Fit():
                    what = ("widths equal bytes, pictures", precision, share, Case(), fit)
                    for verdict in there(lambda w=what, s=share, f=fit, j=judge: bench.lab.kept(w, lambda: j(s, f))):
                        rows[-1] |= {k: verdict[k] for k in before.PICTURES}
    for key in ("D", "lpips"):
        known = [number for number, r in enumerate(rows) if key in r]
        for number in equal_bytes.front([(rows[n]["bytes"], rows[n][key]) for n in known]):
            rows[known[number]][f"front by {key}"] = "●"
    return rows


def changed(bench: Bench, share: float = 0.42) -> list[dict]:
    """Widths of the plain encoder in one with a LoRA, and in one whose weights have all been changed a little: D_cond
    on captions and long prompts against the changed encoder itself, whole."""
    rows = []
    for name in ("LoRA on all feed-forwards", "all weights changed"):
        for size in (0.05, 0.2):

            def find(name=name, size=size) -> dict:
                twin = copy.deepcopy(bench.lab.studio.encoder.module)
                generator = torch.Generator().manual_seed(0)
                for key, parameter in twin.named_parameters():
                    if parameter.ndim != 2 or "embed" in key or ("LoRA" in name and "down_proj" not in key):
                        continue
                    high, wide = parameter.shape
                    change = torch.randn(high, 8, generator=generator) @ torch.randn(8, wide, generator=generator)
                    if "LoRA" not in name:
                        change = torch.randn(high, wide, generator=generator)
                    parameter.data += change * (size * parameter.data.norm() / change.norm())
                removed, _ = bench.narrowed(share)
                bare = {place: bare_of(action) for place, action in removed.items()}
                found, _ = standin.fit(
                    bench.calibration_of(twin, before.CALIBRATION["all kinds"](FITTED, 0)), bare, Fitting()
                )
                fresh = {place: action.repaired(found[place]) for place, action in bare.items()}
                texts = before.of_kind("captions") + before.of_kind("long prompts")
                meter = Meter(bench.calibration_of(twin, texts), bench.lab.studio.projection)
                names = ("as it is", "stand-ins fitted anew")
                return dict(zip(names, (d.conditional for d in meter.measure([removed, fresh])), strict=True))

            found = there(lambda find=find, n=name, size=size: bench.lab.kept(("widths changed", n, size, share), find))
            rows += [{**r, "name": f"{name}, {size:.0%} of each weight's size"} for r in found]
    return rows


def bare_of(action: Action) -> Action:
    """What is left of an action without its stand-in."""
    return Narrow(action.units) if action.units is not None else SKIP


class Bare:
    """Gemma 3 270M, or another folder's encoder, without a denoiser: discrepancies of its bare embeddings."""

    def __init__(self, folder: str, name: str):
        self.name, self.encoder = name, load(folder)
        self.row = self.encoder.row
        self.tracer = Tracer(self.encoder.module, self.row)
        self.unseen = functools.cache(
            lambda kind: Meter(self.calibration(prompts.of_kind(kind, before.EACH, before.UNSEEN)))
        )

    def calibration(self, texts: Sequence[str], race: bool = False) -> Calibration:
        """These prompts as the encoder is measured and fitted on them."""
        batches, null = self.encoder.batches(texts, race=race), self.encoder.batch([self.encoder.tokenize("")])
        return Calibration(self.encoder.module, self.tracer, batches, null)

    def errors(self, removed: Assignment) -> dict:
        """D_cond on unseen prompts of every kind, and D_null."""
        found = {}
        for kind in before.KINDS:
            (d,) = self.unseen(kind).measure([removed])
            found[kind], null = d.conditional, d.null
        return {**found, "null": null}


SECOND = (0.25, 0.42, 0.60)
SECOND_FITTED, SECOND_RANKED, SECOND_BEAM = 128, 16, 1
"""Levels, prompts to fit on and to judge by, and the beam search's width, on the second encoder."""


def second(folder: str, name: str, measuring: bool) -> list[dict]:
    """The same curves on an encoder without a denoiser: as printed (racing), and widths."""
    if not measuring:
        paths = [state_path(f"{name} {how} {at}") for at in SECOND for how in ("as printed, racing", "widths, rank 16")]
        known = [(path, json.loads(path.read_text())) for path in paths if path.exists()]
        return [{**row, "name": "widths, rank 16" if "widths" in path.name else "as printed"} for path, row in known]
    lab = Bare(folder, name)
    row, share = lab.row, sum(lab.row.parameter_counts) / lab.row.total
    judged_on = prompts.broad(SECOND_RANKED, RANKED_SEED)
    fitted, targets = lab.calibration(prompts.broad(SECOND_FITTED, 0)), [level * share for level in SECOND]

    def keep(how: str, at: float, removed: Assignment, gone: float) -> None:
        numbers = sum(4 * len(a.units) for a in removed.values() if a.units is not None)
        bytes_ = 2 * row.total * (1 - gone) + sum(a.nbytes for a in removed.values()) + numbers
        found = {"removed": gone / share, "bytes": bytes_, **lab.errors(removed)}
        state_path(f"{name} {how} {at}").write_text(json.dumps(found))

    run = widths.Search(fitted, Meter(lab.calibration(judged_on)), Settings(0.1), Fitting())
    state, start = State(state_path(f"{name} widths"), f"{name} {SECOND_FITTED} {SECOND_RANKED}"), time.monotonic()
    table = run.measure(state.save, state.load(len(row)) or Table())
    log(f"{name}: widths", time.monotonic() - start, True)
    steps = run.steps(table)
    for at, target in zip(SECOND, targets, strict=True):
        chosen = steps[: run.reaching(steps, target)]
        if not state_path(f"{name} widths, rank 16 {at}").exists():
            removed = filled(run.fitted, run.bare(chosen, table), run.fitting)
            keep("widths, rank 16", at, removed, row.sparsity(run.shares(chosen)))
    if not state_path(f"{name} as printed, racing {SECOND[-1]}").exists():
        start = time.monotonic()
        settings = Settings(targets[-1], tuple(targets[:-1]), SECOND_BEAM)
        entry = paper.search(Meter(lab.calibration(judged_on, race=True)), settings)
        log(f"{name}: as printed, racing", time.monotonic() - start, True)
        for at, level in zip(SECOND, entry.levels, strict=True):
            order = entry.order[: level.skipped]
            keep("as printed, racing", at, assignment(order, level.reuse), row.sparsity(order))
    return second(folder, name, False)


SLICE = 8
"""Blocks of the encoder that is timed: its first ones."""


def timed_beside(bench: Bench) -> list[dict]:
    """Seconds of the racing beam search and of the measurement, allocation and fit of widths, in one run of one
    process, to the same target, on the encoder's first blocks: with all of them it takes hours."""

    @functools.cache
    def module():
        twin = copy.deepcopy(bench.lab.studio.encoder.module)
        layers = next(m for m in twin.modules() if isinstance(m, torch.nn.ModuleList))
        del layers[SLICE:]
        twin.config.num_hidden_layers = SLICE
        return twin

    def meter(texts: Sequence[str], race: bool) -> Meter:
        encoder = replace(bench.lab.studio.encoder, module=module(), row=families.find(module()))
        batches, null = encoder.batches(texts, race=race), encoder.batch([encoder.tokenize("")])
        calibration = Calibration(module(), Tracer(module(), encoder.row), batches, null)
        return Meter(calibration, bench.lab.studio.projection)

    def target(row) -> float:
        return before.MIDDLE * sum(row.parameter_counts) / row.total

    def race() -> None:
        found = meter(prompts.broad(RACED, 0), True)
        paper.search(found, Settings(target(found.row)))

    def best() -> None:
        fitted = bench.calibration_of(module(), prompts.broad(FITTED, 0))
        run = widths.Search(fitted, meter(prompts.broad(RANKED, RANKED_SEED), False), Settings(0.1), Fitting())
        table = run.measure(lambda table: None)
        steps = run.steps(table)
        filled(run.fitted, run.bare(steps[: run.reaching(steps, target(run.row))], table), run.fitting)

    ways = {
        f"racing beam search, 3 wide, {RACED} prompts, with re-use": race,
        f"widths: measured, allocated, fitted; {FITTED} prompts and {RANKED}": best,
    }

    def find() -> dict:
        found = {}
        for name, act in ways.items():
            start, used = time.monotonic(), time.process_time()
            act()
            found[name] = [time.monotonic() - start, time.process_time() - used]
            print(name, found[name], flush=True)
        return found

    rows = []
    for found in there(lambda: bench.lab.kept(("widths time", RANKED, RACED, FITTED, SLICE), find)):
        rows += [{"name": n, "seconds": found[n][0], "processor seconds": found[n][1]} for n in ways]
    return rows


SECTIONS = ("levels", "variants", "equal", "changed", "time", "tried", "second")
SHOWN = ("removed", "bytes", *before.ERRORS, *before.PICTURES)


def sections(bench: Bench, wanted: Sequence[str], measuring: bool, chosen: Sequence[float] = LEVELS) -> dict[str, str]:
    """The tables of the page, in the order in which they are measured."""
    found = {}
    for name in wanted:
        if name == "levels":
            found[name] = before.table(levels(bench, chosen), SHOWN, "how")
        elif name == "variants":
            found[name] = before.table(variants(bench), SHOWN, "widths at")
        elif name == "equal":
            columns = ("removed", "bytes", "D", *before.PICTURES, "front by D", "front by lpips")
            found[name] = before.table(equal(bench), columns, "precision")
        elif name == "changed":
            found[name] = before.table(changed(bench), ("as it is", "stand-ins fitted anew"), "D_cond at 42 %")
        elif name == "time":
            found[name] = before.table(
                timed_beside(bench), ("seconds", "processor seconds"), f"the first {SLICE} blocks, to 42 %, one thread"
            )
        elif name == "tried":
            found[name] = before.table(tried(bench, before.MOST), ("accepted", *SHOWN), "at 60 %")
        elif name == "second":
            rows = second(str(gemma270m.ensure()) if measuring else "", "gemma270m", measuring)
            found[name] = before.table(rows, ("removed", "bytes", *before.KINDS, "null"), "Gemma 3 270M")
        if found[name].count("\n") < 2:
            found[name] = "*Not measured yet.*"
        print(found[name], flush=True)
    return found


def main() -> None:
    """Measure, print, and write unless it is the quick cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="42 %% only, few prompts; writes nothing to docs/")
    parser.add_argument("--page", action="store_true", help="measure nothing, write what is there")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure")
    parser.add_argument("--shares", help="of the levels, in the order in which they are measured, like 0.42,0.6")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    bench = Bench(5 if options.quick else 60, not options.page)
    shares = tuple(map(float, options.shares.split(","))) if options.shares else LEVELS
    if options.quick:
        row = bench.row_of("widths, rank 16", before.MIDDLE, Fit(count=64), Case(count=64, ranked=8))
        print(before.table([row], SHOWN, "how"))
        return
    found = sections(bench, options.only, not options.page, shares)
    if options.page:
        pages.fill(PAGE, found)
        names = {
            "as printed": "as printed",
            "aware order, rank 16": "whole parts, stand-ins",
            "widths, rank 16": "widths",
        }
        rows = sorted(levels(bench), key=lambda row: row["removed"])
        before.plot([{**r, "name": names[n]} for n in names for r in rows if r["name"].startswith(n)], PLOT)


if __name__ == "__main__":
    main()
