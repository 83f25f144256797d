"""What the search costs: the naive loop, the exact search and racing in one run; `--quick` ends in 10 minutes.

Work is counted in sub-block x token forwards by the sub-blocks themselves, whoever calls them. The naive loop measures
each candidate by whole passes over what it keeps, equal sets merged. Where it would take hours, its forwards are
counted from the candidates, its seconds from a sample of them, and both are marked. Seconds are the process's own time:
with one thread, those of a machine that does nothing else.

Writes docs/images/search_scaling.png and prints the tables of docs/search.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.smollm2 import ensure  # noqa: E402
from skrr_engine.encoder import families  # noqa: E402
from skrr_engine.encoder.actions import assignment  # noqa: E402
from skrr_engine.encoder.trace import Tracer  # noqa: E402
from skrr_engine.files.folder import import_transformers, load  # noqa: E402
from skrr_engine.measure.calibration import (
    Batch,  # noqa: E402
    Calibration,
    grouped,  # noqa: E402
)
from skrr_engine.measure.meter import Meter  # noqa: E402
from skrr_engine.measure.prompts import generate, of_kind  # noqa: E402
from skrr_engine.plan.model import EncoderPlan  # noqa: E402
from skrr_engine.search import skip  # noqa: E402
from skrr_engine.search.run import search  # noqa: E402
from skrr_engine.search.settings import Settings  # noqa: E402

ORDER = (
    52, 34, 14, 10, 36, 16, 35, 50, 24, 18, 12, 58, 32, 33, 37, 40, 8, 11, 9, 28, 29, 46, 38, 39, 44, 27, 26, 25, 13,
    22, 7, 6, 51, 53, 56, 47,
)  # fmt: skip
"""SmolLM2's skip list to 42 %, exact, k = 3, on `generate(4, 1)`: where single steps are measured from."""

MODES = {"exact": 0.0, "racing": 0.05}


@dataclass
class Count:
    """Sub-block forwards: tokens x sub-blocks; weight bytes, counted anew whenever another sub-block is applied."""

    work: int = 0
    touched: int = 0
    last: object = field(default=None, repr=False)

    def watch(self, row) -> Count:
        """Count what this row's sub-blocks are asked for from now on."""
        for sub_block in row.sub_blocks:
            apply = type(sub_block).apply

            def counting(x, call, apply=apply, sub_block=sub_block):
                self.work += x.shape[0] * x.shape[1]
                if self.last is not sub_block:
                    self.last = sub_block
                    self.touched += sum(t.nbytes for t in sub_block.tensors().values())
                return apply(sub_block, x, call)

            sub_block.apply = counting
        return self


class Counted(Meter):
    """Counts what the naive loop would do for the same candidates. work, touched: see `Count`; passes: its batches,
    the null prompt's included (None: as many as the meter's own)."""

    work = touched = 0
    passes: int | None = None

    def count(self, candidates) -> None:
        forwards = sum(naive_forwards(c, len(self.tracer.row)) for c in candidates)
        self.work += sum(self._tokens) * forwards
        parameters = self.tracer.row.parameter_counts
        kept = sum(sum(parameters) - sum(parameters[i] for i, by in c.items() if by is None) for c in candidates)
        self.touched += kept * 4 * (self.passes or len(self._tokens))

    def lowest(self, candidates, keep, delta=0.0, below=math.inf, tick=None):
        self.count(candidates)
        return super().lowest(candidates, keep, delta, below, tick)


class Naive(Counted):
    """The naive loop itself."""

    def lowest(self, candidates, keep, delta=0.0, below=math.inf, tick=None):
        self.count(candidates)
        return naive_scores(self, candidates)


def naive_scores(meter: Meter, candidates) -> list[float]:
    """Every candidate by whole passes of its own, all prompts, nothing shared, nothing kept."""
    found = []
    for candidate in candidates:
        meter._states.clear()
        found.append(meter.measure([candidate])[0].total)
    return found


def naive_forwards(candidate: dict, length: int) -> int:
    """Sub-blocks that a pass over what a candidate keeps and re-uses runs."""
    return length - sum(by is None for by in candidate.values())


@dataclass
class Run:
    """One search. work, touched: see `Count`; seconds: of the search alone; plan: an EncoderPlan."""

    work: int
    touched: int
    seconds: float
    plan: object


def run_search(meter: Meter, settings: Settings) -> Run:
    count = Count().watch(meter.tracer.row)
    start = time.process_time()
    plan = search(meter, settings)
    return Run(count.work, count.touched, time.process_time() - start, plan)


def synthetic(blocks: int, seed: int = 0, width: int = 64):
    """A T5 with random weights whose sub-blocks matter to very different degrees."""
    transformers = import_transformers()
    torch.manual_seed(seed)
    config = transformers.T5Config(
        num_layers=blocks, vocab_size=1000, d_model=width, d_kv=16, d_ff=2 * width, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    module = transformers.T5EncoderModel(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for sub_block in families.find(module).sub_blocks:
        gain = 10 ** float(torch.empty(()).uniform_(-1.0, 0.0, generator=draw))
        for tensor in sub_block.tensors().values():
            if tensor.ndim == 2:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * gain / tensor.shape[1] ** 0.5)
    return module


def synthetic_meter(module, prompts: int, seed: int = 0, kind=Meter, race: bool = False) -> Meter:
    """Random prompts of 8 to 23 tokens, batches of up to 8. race: in the order of a race."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 24, (prompts,), generator=draw).tolist()
    texts = [torch.randint(3, 1000, (length,), generator=draw) for length in lengths]
    groups = [[texts[i] for i in group] for group in grouped(lengths, lambda length: 8, race)]

    def batch(ids) -> Batch:
        ids = torch.stack(ids)

        def run(module, times=1):
            return [(module(input_ids=ids.repeat(times, 1)).last_hidden_state, None)]

        return Batch(run, len(ids))

    null = batch([torch.tensor([1])])
    return kind(Calibration(module, Tracer(module, families.find(module)), [batch(g) for g in groups], null, 2**31))


def whole(prompts: int, seeds: int) -> list[dict]:
    """The three searches from nothing to 42 % with re-use, on synthetic encoders of 24 sub-blocks."""
    rows = []
    for seed in range(seeds):
        module = synthetic(12, seed)
        runs = {"naive": run_search(synthetic_meter(module, prompts, seed, Naive), Settings(delta=0.0))}
        runs |= {
            m: run_search(synthetic_meter(module, prompts, seed, race=d > 0), Settings(delta=d))
            for m, d in MODES.items()
        }
        naive = runs["naive"]
        d = {mode: run.plan.levels[-1].discrepancy for mode, run in runs.items()}
        for mode, run in runs.items():
            row = {"seed": seed, "mode": mode, "work": run.work, "seconds": run.seconds, "touched": run.touched}
            row |= {"fewer": naive.work / run.work, "faster": naive.seconds / run.seconds, "D": d[mode]}
            same = hash_of(run.plan) == hash_of(naive.plan)
            rows.append({**row, "same plan": same, "D above naive": d[mode] / d["naive"] - 1})
            show(rows[-1])
        assert runs["exact"].plan.levels == naive.plan.levels, "the exact search must give the naive loop's plan"
    return rows


def smollm2_steps(prompts: int, depths: list[int], seed: int) -> list[dict]:
    """One step at k = 3 with `depth` sub-blocks gone: its beam is ORDER's prefix and two lists beside it."""
    encoder = load(str(ensure(ROOT / ".cache" / "smollm2")))
    null, rows = encoder.batch([encoder.tokenize("")]), []
    for depth in depths:
        beam = [skip.SkipList((*ORDER[: depth - 1], ORDER[depth - 1 + i]), 0.0) for i in range(3)] if depth else []
        orders = skip.expand(beam or [skip.SkipList((), 0.0)], len(encoder.row))
        candidates = [assignment(order) for order in orders]
        found = {}
        for mode, delta in MODES.items():
            batches = encoder.batches(generate(prompts, seed), race=delta > 0)
            meter = Counted(encoder.module, Tracer(encoder.module, encoder.row), batches, null, memory=4 * 2**30)
            count = Count().watch(encoder.row)
            if mode == "exact":  # the first: its batches are those of the naive loop
                passes = len(meter._tokens)
                sampled = candidates[:: max(1, len(candidates) // 3)][:3]
                pace = naive_pace(meter, sampled, count)
            meter.passes = passes
            start = time.process_time()
            scores = meter.lowest(candidates, 3, delta)
            seconds = time.process_time() - start
            best = sorted(range(len(scores)), key=lambda i: (scores[i], orders[i][-1], i))[:3]
            found[mode] = [orders[i] for i in best]
            rows.append({
                "removed": depth, "candidates": len(candidates), "mode": mode, "work": count.work, "seconds": seconds,
                "fewer": meter.work / count.work, "faster (naive sampled)": pace * meter.work / seconds,
                "weights touched, fewer": meter.touched / count.touched,
                "microseconds a forward": seconds / count.work * 1e6,
                "naive microseconds": pace * 1e6, "kept as exact": sum(o in found["exact"] for o in found[mode]),
            })  # fmt: skip
            show(rows[-1])
    return rows


def smollm2_whole(
    prompts: int, seeds: Sequence[int], modes: Sequence[str], folder: Path, memory: int, beam: int = 3
) -> list[dict]:
    """Whole searches to 42 % with re-use on SmolLM2 and captions. The naive loop's work is counted from the same
    candidates, its seconds from three of them, timed at the start and after every sixth step. `folder` keeps what was
    run; racing's plan and `D` are compared with the exact search's where that is there."""
    rows = []
    for seed in seeds:
        captions = of_kind("captions", prompts, seed)
        for mode in modes:
            path, exact = (folder / f"{m}-{prompts}-{beam}-{seed}.json" for m in (mode, "exact"))
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = one_search(captions, mode, beam, path.with_suffix(".part"), memory)
                path.write_text(json.dumps(found), encoding="utf-8")
            found, plan = read_search(path)
            row = {"prompts": prompts, "seed": seed, "mode": mode, **found, "removed": len(plan.order)}
            row |= {"D": plan.levels[-1].discrepancy, "plan": hash_of(plan)}
            if exact.exists():
                wanted = read_search(exact)[1]
                row |= {"D above exact": row["D"] / wanted.levels[-1].discrepancy - 1}
                row |= {
                    "same sub-blocks": set(plan.order) == set(wanted.order),
                    "same plan": row["plan"] == hash_of(wanted),
                }
            rows.append(row)
            show(row)
    return rows


def read_search(path: Path) -> tuple[dict, EncoderPlan]:
    """What `one_search` found: its numbers, and its plan."""
    found = json.loads(path.read_text(encoding="utf-8"))
    plan = EncoderPlan.model_validate(found.pop("plan"))
    return {k: v for k, v in found.items() if not isinstance(v, list)}, plan


def hash_of(plan: EncoderPlan) -> str:
    """Alike where order and re-uses are."""
    level = plan.levels[-1]
    return hashlib.sha256(repr((plan.order, sorted(level.reuse.items()))).encode()).hexdigest()[:8]


def one_search(captions: Sequence[str], mode: str, beam: int, part: Path, memory: int) -> dict:
    """What a search took, beside what the naive loop would take, and its plan. part: holds each step's numbers; a
    search that was stopped goes on from there (what it kept of states is lost, which costs it some work)."""
    encoder = load(str(ensure(ROOT / ".cache" / "smollm2")))
    delta, kind = (0.0, Naive) if mode == "naive" else (MODES[mode], Counted)
    tracer, null = Tracer(encoder.module, encoder.row), encoder.batch([encoder.tokenize("")])
    # The naive loop has batches of one length, whatever a race has.
    plain = Meter(Calibration(encoder.module, tracer, encoder.batches(captions), null, memory))
    meter = kind(Calibration(encoder.module, tracer, encoder.batches(captions, race=delta > 0), null, memory))
    meter.passes = len(plain._tokens)
    steps = json.loads(part.read_text(encoding="utf-8")) if part.exists() else []
    last = {"work": 0, "naive": 0, "touched": 0, "naive touched": 0, "seconds": 0.0, "beam": [], "paces": []}
    last |= steps[-1] if steps else {}
    begun = [skip.SkipList(tuple(order), trail[-1], tuple(trail)) for order, trail in last["beam"]]
    count = Count(last["work"], last["touched"]).watch(encoder.row)
    meter.work, meter.touched, paces = last["naive"], last["naive touched"], last["paces"]
    sampled = [assignment((i,)) for i in range(0, len(encoder.row), len(encoder.row) // 3)]
    clock = Clock(last["seconds"])

    def pause() -> None:
        """Time the naive loop, beside whatever else the machine is doing now."""
        with clock.stopped():
            paces.append(naive_pace(plain, sampled, count))

    def now() -> dict:
        return {"work": count.work, "naive": meter.work, "touched": count.touched, "naive touched": meter.touched,
                "seconds": clock.seconds(), "fewer": meter.work / count.work, "paces": [*paces]}  # fmt: skip

    def after_step(paths: Sequence[skip.SkipList]) -> None:
        steps.append({**now(), "beam": [(path.order, path.trail) for path in paths]})
        part.write_text(json.dumps(steps), encoding="utf-8")
        told = f"D {paths[0].discrepancy:.4g}, {steps[-1]['seconds']:.0f} s, {steps[-1]['fewer']:.2f} x fewer forwards"
        print(f"{mode}, {len(captions)} prompts, step {len(steps)}: {told}", file=sys.stderr, flush=True)
        if len(steps) % 6 == 0:
            pause()

    pause()
    plan = search(meter, Settings(beam=beam, delta=delta), save=after_step, beam=begun)
    found = now()
    found |= {"faster (naive sampled)": sum(paces) / len(paces) * found["naive"] / found["seconds"]}
    found |= {"weights touched, fewer": found["naive touched"] / found["touched"]}
    return {**found, "plan": plan.model_dump(mode="json")}


class Clock:
    """Seconds of this process's own time since it was made, whatever else the machine does, without those in which it
    stood; begins at `seconds`."""

    def __init__(self, seconds: float = 0.0):
        self.start = time.process_time() - seconds

    def seconds(self) -> float:
        return time.process_time() - self.start

    @contextmanager
    def stopped(self):
        begun = time.process_time()
        yield
        self.start += time.process_time() - begun


def naive_pace(meter: Meter, candidates: list[dict], count: Count) -> float:
    """Seconds of this process's own time that the naive loop takes for a sub-block x token forward. candidates: a few;
    count: watches the meter's encoder; what it has counted is left as it was."""
    work, touched, start = count.work, count.touched, time.process_time()
    naive_scores(meter, candidates)
    seconds = time.process_time() - start
    meter._states.clear()  # what is timed next starts with nothing
    pace = seconds / (count.work - work)
    count.work, count.touched = work, touched
    return pace


def scaling() -> list[dict]:
    """How the first four removals' work grows with prompts, sub-blocks and k, on synthetic encoders."""
    cases = [("prompts", n, (n, 24, 3)) for n in (16, 32, 64, 128, 256, 512)]
    cases += [("sub-blocks", n, (64, n, 3)) for n in (24, 48, 96)]
    cases += [("k", n, (64, 24, n)) for n in (1, 2, 3, 4)]
    rows = []
    for what, value, (prompts, sub_blocks, width) in cases:
        module = synthetic(sub_blocks // 2)
        row = families.find(module)
        for mode, delta in MODES.items():
            meter = synthetic_meter(module, prompts, race=delta > 0)
            count = Count().watch(meter.tracer.row)
            start = time.process_time()

            def lowest(candidates, keep, meter=meter, delta=delta):
                return meter.lowest(candidates, keep, delta)

            steps = skip.search(lowest, row.parameter_counts, row.total, 0.8, width)
            for _ in range(4):
                next(steps)
            seconds = time.process_time() - start
            rows.append({"by": what, what: value, "mode": mode, "work": count.work, "seconds": seconds})
            show(rows[-1])
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Work against prompts, sub-blocks and k, both axes logarithmic, beside a linear slope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for axis, what in zip(axes, ("prompts", "sub-blocks", "k"), strict=True):
        for mode in MODES:
            points = [(r[what], r["work"]) for r in rows if r["by"] == what and r["mode"] == mode]
            axis.plot(*zip(*points, strict=True), marker="o", label=mode)
        first = points[0]
        ends = [first[0], points[-1][0]]
        axis.plot(ends, [first[1], first[1] * ends[1] / ends[0]], ":", color="grey", label="linear")
        axis.set(xlabel=what, xscale="log", yscale="log", xticks=[p[0] for p in points])
        axis.set_xticklabels([str(p[0]) for p in points])
        axis.minorticks_off()
    axes[0].set_ylabel("sub-block x token forwards")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def gemm_rate(tokens: int = 256, width: int = 576, hidden: int = 1536) -> float:
    """GFLOP/s of a matrix product of SmolLM2's feed-forward's shape."""
    x, w = torch.randn(tokens, width), torch.randn(hidden, width)
    best = math.inf
    for _ in range(50):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * tokens * width * hidden / best / 1e9


def show(row: dict) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="within 10 minutes on 2 cores")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--prompts", type=int, help="(default: 256; 64 for whole searches on SmolLM2)")
    options.add_argument("--seeds", type=int, default=5, help="of the whole searches (default: 5)")
    options.add_argument("--seed", type=int, help="of the whole searches on SmolLM2: this one alone")
    options.add_argument(
        "--folder", default=ROOT / ".cache" / "search", type=Path, help="keeps these (default: %(default)s)"
    )
    options.add_argument(
        "--memory", type=int, default=4, help="GiB that these may take beside the encoder (default: 4)"
    )
    options.add_argument(
        "--mode", choices=("naive", *MODES), help="of the whole searches on SmolLM2 (default: exact and racing)"
    )
    options.add_argument("--depths", help="removals before the step measured on SmolLM2 (default: 0,6,12,18,24,30,33)")
    options.add_argument("--only", choices=("whole", "smollm2", "search", "scaling"))
    options = options.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    quick = options.quick
    depths = [int(d) for d in (options.depths or ("0,24" if quick else "0,6,12,18,24,30,33")).split(",")]
    rate = gemm_rate()
    print(f"GEMM floor: {rate:.1f} GFLOP/s on {options.threads} thread(s)")
    if options.only in (None, "whole"):
        whole(options.prompts or (64 if quick else 256), 2 if quick else options.seeds)
    if options.only in (None, "smollm2"):
        rows = smollm2_steps(options.prompts or (32 if quick else 256), depths, 0)
        flops = 2 * 106_168_320 / 60  # SmolLM2's weights in sub-blocks, a mean sub-block
        for mode in MODES:
            chosen = [r for r in rows if r["mode"] == mode]
            spent = sum(r["work"] for r in chosen) * flops / sum(r["seconds"] for r in chosen) / 1e9
            print(f"{mode}: {spent:.1f} GFLOP/s, {spent / rate:.0%} of the GEMM rate")
    if options.only == "search" or (options.only is None and not quick):
        modes = [options.mode] if options.mode else list(MODES)
        seeds = range(options.seeds) if options.seed is None else [options.seed]
        smollm2_whole(options.prompts or 64, seeds, modes, options.folder, options.memory * 2**30)
    if options.only in (None, "scaling"):
        path = ROOT / "docs" / "images" / "search_scaling.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plot(scaling(), path)
        print(f"plot: {path}")
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
