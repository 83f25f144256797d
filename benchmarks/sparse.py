"""Unstructured pruning on Shapes: pictures against sparsity, by method, for text encoder, denoiser and both.

The paper of Ramesh and Zhao (arXiv 2411.15113) did this with Stable Diffusion 2; its claims are looked for here on
SmolLM2-135M and Shapes' trained denoiser, and the pictures put beside fp8, GGUF and narrower parts at equal bytes.
Fills docs/sparse.md, docs/images/sparse.png and sparse_bytes.png.

    python -m benchmarks.sparse [--quick] [--seeds 1] [--per-task 10] [--only SECTION ...]

Hours on 2 cores, and takes up where it was stopped (.cache/sparse): more seeds and more pictures can be added later.
`--page` measures nothing: it writes what is there. --quick is a cut of some minutes that writes nothing here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from benchmarks import equal_bytes, pages
from benchmarks.shapes import evaluate, report, scenes
from benchmarks.standins import cell
from skrr_engine.measure import prompts
from skrr_engine.plan.words import duration
from skrr_engine.weights.prune import prunable, sparsify
from skrr_engine.weights.statistics import Pair, Statistics, gathering

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache" / "sparse"
DOCS = HERE.parent / "docs"
PAGE, PLOT, BYTES_PLOT = DOCS / "sparse.md", DOCS / "images" / "sparse.png", DOCS / "images" / "sparse_bytes.png"
WAYS = {
    "magnitude": ("magnitude", "layer"),
    "magnitude, global": ("magnitude", "global"),
    "Wanda": ("wanda", "layer"),
    "SparseGPT": ("sparsegpt", "layer"),
    "OWL": ("owl", "layer"),
}
"""Name -> method and scope."""
TENS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
FINER = dict.fromkeys(("text encoder", "denoiser", "both"), (0.35, 0.45, 0.475, 0.55))
"""Between the tens, where the drop is."""
PAPER = (0.475, 0.35)
"""What the paper takes from text encoder and U-Net together."""
CALIBRATED, DENOISED = 64, 24
"""Prompts of all kinds for the text encoder; captions that are painted for the denoiser. None is judged on."""
PICTURES = ("overall", "exact", "lpips", "mse", "D_cond", "D_null")


@dataclass(frozen=True)
class Point:
    """What is pruned, how, and how much. text, denoiser: shares of the prunable weights of each; seed: of calibration
    and of the pictures' noise."""

    way: str
    text: float
    denoiser: float
    seed: int


def at(part: str, way: str, share: float, seed: int) -> Point:
    """A point of a part's curve."""
    return Point(way, share * (part != "denoiser"), share * (part != "text encoder"), seed)


class Bench:
    """The pictures of Shapes with weights set to zero, kept on the disk by what they depend on."""

    def __init__(self, per_task: int, measuring: bool = True, cache: Path = CACHE):
        self.per_task, self.measuring, self.cache = per_task, measuring, cache
        weights = b"".join(path.read_bytes() for path in (evaluate.DENOISER, evaluate.DECODER))
        sampler = (evaluate.STEPS, evaluate.CFG, evaluate.SAMPLER, evaluate.SCHEDULER, CALIBRATED, DENOISED)
        self.basis = hashlib.sha256(weights + repr(sampler).encode()).hexdigest()[:16]

    def kept(self, what: Sequence, make: Callable[[], dict]) -> dict | None:
        """What `make` finds, from the disk where it is there; None where it is not, and nothing is measured."""
        path = self.path(what, ".json")
        if not path.exists():
            if not self.measuring:
                return None
            start = time.monotonic()
            found = {"what": repr(what), **make()}
            _written(path, lambda partial: partial.write_text(json.dumps(found), encoding="utf-8"))
            print(f"{duration(time.monotonic() - start):>8}  {what}  {found.get('overall', '')}", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def path(self, what: Sequence, ending: str) -> Path:
        self.cache.mkdir(parents=True, exist_ok=True)
        return self.cache / (hashlib.sha256(f"{self.basis}{what!r}".encode()).hexdigest()[:24] + ending)

    @functools.cached_property
    def studio(self) -> evaluate.Studio:
        return evaluate.Studio(self.per_task)

    @functools.cached_property
    def encoder(self) -> list[Pair]:
        """What can be pruned of the text encoder."""
        return prunable(self.studio.encoder.module)

    @functools.cached_property
    def denoiser(self) -> list[Pair]:
        """The same of the denoiser."""
        return prunable(self.studio.painter.model.model.diffusion_model)

    @functools.lru_cache(2)  # noqa: B019
    def text_statistics(self, seed: int) -> Statistics:
        """The text encoder's, on prompts of all kinds."""
        start = time.monotonic()
        with gathering(self.encoder, hessian=True) as found:
            for batch in self.studio.encoder.batches(prompts.broad(CALIBRATED, seed)):
                batch.run(self.studio.encoder.module)
        print(f"{duration(time.monotonic() - start):>8}  the text encoder's statistics, seed {seed}", flush=True)
        return found

    @functools.lru_cache(2)  # noqa: B019
    def denoiser_statistics(self, seed: int) -> Statistics:
        """The denoiser's, while it paints captions that the dense encoder has read."""
        encoder, texts = self.studio.encoder, []
        for caption in scenes.calibration(DENOISED, seed):
            ((hidden, _),) = encoder.batch([encoder.tokenize(caption)]).run(encoder.module)
            texts.append(hidden[0])
        ((null, _),) = encoder.batch([encoder.tokenize("")]).run(encoder.module)
        with gathering(self.denoiser, hessian=True) as found:
            self.studio.painter.paint(texts, null[0], range(9000 + seed, 9000 + seed + len(texts)))
        return found

    def weights(self, part: str, way: str, share: float, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The pruned weights of a part."""
        method, scope = WAYS[way]
        pairs = self.encoder if part == "text encoder" else self.denoiser
        statistics = None
        if method != "magnitude":
            statistics = (self.text_statistics if part == "text encoder" else self.denoiser_statistics)(seed)
        return sparsify(pairs, share, method, scope, statistics)

    @contextlib.contextmanager
    def put(self, part: str, way: str, share: float, seed: int) -> Iterator[None]:
        """Pruned weights in their places for a while."""
        pairs = dict(self.encoder if part == "text encoder" else self.denoiser)
        before = {name: module.weight.data for name, module in pairs.items()}
        made = list(self.weights(part, way, share, seed)) if share else []
        for name, weight in made:
            pairs[name].weight.data = weight
        try:
            yield
        finally:
            for name, weight in before.items():
                pairs[name].weight.data = weight

    def texts(self, way: str, share: float, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The captions' embeddings by a pruned text encoder, kept on the disk for the points that share them."""
        if not share:
            return self.studio.texts, self.studio.null
        calibrated = seed if WAYS[way][0] != "magnitude" else 0
        path = self.path(("texts", self.per_task, way, share, calibrated), ".pt")
        if not path.exists():
            with self.put("text encoder", way, share, calibrated):
                found = self.studio.embed(self.studio.encoder.module, {})
            _written(path, lambda partial: torch.save(found, partial))
        return torch.load(path)

    @functools.lru_cache(4)  # noqa: B019
    def dense(self, seed: int) -> np.ndarray:
        """The dense pair's pictures from the noise of a seed."""
        return self.studio.painter.paint(self.studio.texts, self.studio.null, self.noise(seed)) if seed else (
            self.studio.dense
        )  # fmt: skip

    def noise(self, seed: int) -> range:
        start = evaluate.SEED + 10_000 * seed
        return range(start, start + len(self.studio.prompts))

    def point(self, point: Point) -> dict | None:
        """The verdict on a point."""

        def judge() -> dict:
            texts, null = self.texts(point.way, point.text, point.seed)
            with self.put("denoiser", point.way, point.denoiser, point.seed):
                return self.verdict(texts, null, point.seed)

        return self.kept(("point", self.per_task, point), judge)

    def verdict(self, texts: list[torch.Tensor], null: torch.Tensor, seed: int) -> dict:
        """Of the pictures of these embeddings, against the dense pair's."""
        studio, dense = self.studio, self.dense(seed)
        made = studio.painter.paint(texts, null, self.noise(seed))
        tasks, overall, exact = evaluate.scores(studio.prompts, made)
        return {
            "scores": tasks, "overall": overall, "exact": exact, "lpips": studio.distance(made, dense),
            "mse": float((((made.astype(np.float64) - dense) / 255) ** 2).mean()),
            "D_cond": studio.error(texts, studio.texts), "D_null": studio.error([null], [studio.null]),
        }  # fmt: skip

    def layers(self) -> dict | None:
        """Each layer's output error at 50 % by each method, as a share of what its output is."""

        def find() -> dict:
            statistics, modules = self.text_statistics(0), dict(self.encoder)
            errors: dict[str, dict[str, float]] = {}
            for way in ("magnitude", "Wanda", "SparseGPT"):
                for name, weight in self.weights("text encoder", way, 0.5, 0):
                    hessian, own = statistics.hessian(name)[0], modules[name].weight
                    errors.setdefault(name, {})[way] = _through(weight - own, hessian) / _through(own, hessian)
            return {"errors": errors}

        return self.kept(("layers", 0.5), find)

    def sized(self, precision: str, share: float, way: str = "magnitude") -> dict | None:
        """The text encoder pruned and then rounded to a precision (`fp8`; `bf16`): its bytes, and its pictures."""

        def find() -> dict:
            twin = self.studio.encoder.module
            store = equal_bytes.PRECISIONS[precision]
            before = {key: p.data for key, p in twin.named_parameters()}
            keys = {f"{name}.weight" for name, _ in self.encoder}
            try:
                with self.put("text encoder", way, share, 0):
                    _, sizes = _rounded(twin, store)
                    bytes_ = sum(
                        packed(size, parameter) if key in keys else size
                        for key, size, parameter in ((key, sizes[key], p.data) for key, p in twin.named_parameters())
                    )
                    texts, null = self.studio.embed(twin, {})
            finally:
                for key, p in twin.named_parameters():
                    p.data = before[key]
            return {"bytes": bytes_, **self.verdict(texts, null, 0)}

        return self.kept(("sized", self.per_task, precision, share, way), find)


def _rounded(module: nn.Module, store: equal_bytes.Store) -> tuple[nn.Module, dict[str, int]]:
    """An encoder with its matrices as a file of some precision gives them, and the bytes of each parameter there."""
    sizes = {}
    for key, parameter in module.named_parameters():
        sizes[key] = parameter.nbytes
        if parameter.ndim > 1:
            parameter.data, sizes[key] = store(parameter.data)
    return module, sizes


def packed(dense: int, weight: torch.Tensor) -> int:
    """Bytes of a matrix as its numbers that are not zero, a bit for each, and where each row begins (8 bytes); dense
    where that is less. dense: its bytes so."""
    kept = int((weight != 0).sum()) * dense // weight.numel()
    return min(dense, kept + -(-weight.shape[1] // 8) * weight.shape[0] + 8 * weight.shape[0])


def _through(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared output of a weight on inputs with these second moments."""
    return float(((weight @ hessian) * weight).double().sum())


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """A file, whole or not at all."""
    partial = path.with_suffix(f".part{os.getpid()}")
    write(partial)
    os.replace(partial, path)


COARSE = (0.4, 0.5)
"""Where methods are compared first."""


def points(seeds: Sequence[int], coarse: bool = False) -> list[Point]:
    """All points, what says most first. coarse: magnitude at the tens, the others at COARSE."""
    found = []
    for seed in seeds:
        found.append(Point("magnitude", *PAPER, seed))
        found += [at(part, "magnitude", share, seed) for share in TENS for part in FINER]
        others = [way for way in WAYS if way != "magnitude"]
        found += [at(part, way, share, seed) for share in COARSE for way in others for part in FINER]
        if coarse:
            continue
        found += [at(part, "magnitude", share, seed) for part, shares in FINER.items() for share in shares]
        found += [Point(way, *PAPER, seed) for way in others]
        rest = sorted(set(TENS) - set(COARSE), key=lambda share: abs(share - 0.45))
        found += [at(part, way, share, seed) for share in rest for way in others for part in FINER]
        found += [at(part, way, share, seed) for part, shares in FINER.items() for share in shares for way in others]
    return found


def rows(bench: Bench, seeds: Sequence[int]) -> list[dict]:
    """What was found: {part, way, share, found: [verdict of each seed]}."""
    shares = {part: sorted({*TENS, *finer}) for part, finer in FINER.items()}
    made = []
    for part, of_part in shares.items():
        for way in WAYS:
            for share in of_part:
                found = [f for seed in seeds if (f := bench.point(at(part, way, share, seed)))]
                made.append({"part": part, "way": way, "share": share, "found": found})
    return made


def table(made: Sequence[dict], key: str, digits: int) -> str:
    """A line for each part and method, a column for each share that was measured; means, and spreads over seeds."""
    shares = sorted({row["share"] for row in made if row["found"]})
    lines = ["| pruned | method | seeds | " + " | ".join(f"{share:.3g}" for share in shares) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(shares))
    for part in FINER:
        for way in WAYS:
            own = {row["share"]: row["found"] for row in made if (row["part"], row["way"]) == (part, way)}
            counts = sorted({len(found) for found in own.values() if found})
            if counts:
                cells = [report.spread([f[key] for f in own[s]], digits) if own.get(s) else "" for s in shares]
                many = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
                lines.append(f"| {part} | {way} | {many} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_table(bench: Bench, seeds: Sequence[int]) -> str:
    """What the paper takes away, by each method."""
    lines = ["| method | seeds | " + " | ".join(PICTURES) + " |", "|---|---:|" + "---:|" * len(PICTURES)]
    for way in WAYS:
        found = [f for seed in seeds if (f := bench.point(Point(way, *PAPER, seed)))]
        if found:
            cells = [report.spread([f[key] for f in found], 4 if key in ("lpips", "mse") else 3) for key in PICTURES]
            lines.append(f"| {way} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers_table(found: dict) -> str:
    """Output errors of all layers at 50 %, by kinds of layers."""
    errors = found["errors"]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in errors))
    ways = list(next(iter(errors.values())))
    lines = ["| layer | " + " | ".join(ways) + " | SparseGPT below magnitude | Wanda below magnitude |"]
    lines.append("|---|" + "---:|" * (len(ways) + 2))
    for kind in (*kinds, "all"):
        own = [e for name, e in errors.items() if kind in (name.rpartition(".")[2], "all")]
        below = [f"{sum(e[way] < e['magnitude'] for e in own)} of {len(own)}" for way in ("SparseGPT", "Wanda")]
        lines.append(
            f"| {kind} | {' | '.join(cell(float(np.mean([e[w] for e in own]))) for w in ways)} | {' | '.join(below)} |"
        )
    return "\n".join(lines)


SIZED = (("bf16", 0.475), ("fp8", 0.3), ("bf16", 0.3), ("fp8", 0.475), ("bf16", 0.4), ("fp8", 0.4))
"""Precisions and sparsities of the text encoder whose bytes are counted."""


def sized(bench: Bench) -> list[dict]:
    """Pruned text encoders, and what the other pages' tables have at their bytes."""
    found = []
    for way in ("magnitude", "SparseGPT"):
        for precision, share in SIZED:
            if row := bench.sized(precision, share, way):
                found.append({**row, "name": f"{precision}, {way} {share:.1%}"})
    return found


def others() -> list[dict]:
    """Rows of the other pages, with their pictures: widths, whole and narrowed GGUF files."""
    found = []
    for row in pages.rows(DOCS / "quality.md", "levels"):
        if row["how"] in ("widths, rank 16", "widths, rank 64, 256 prompts"):
            found.append(
                {"name": f"bf16, widths {row['removed']}" + (", rank 64" if "64" in row["how"] else ""), **row}
            )
    for row in pages.rows(DOCS / "quality.md", "equal"):
        if row["overall"] and row["removed"] != "0.0%":
            found.append({"name": f"{row['precision']}, widths {row['removed']}", **row})
    for row in pages.rows(HERE / "shapes" / "RESULTS.md", "bytes"):
        if row["removed"] == "0.0 %":
            found.append({"name": f"{row['precision']}, whole", **row})
    return [
        {
            "name": row["name"], "bytes": 1e6 * float(row["kept MB"]), "overall": float(row["overall"]),
            "exact": float(row.get("exact") or row["all details"]),
            "lpips": float(row.get("lpips") or row["LPIPS"]),
        }
        for row in found
    ]  # fmt: skip


def bytes_table(own: Sequence[dict], theirs: Sequence[dict]) -> str:
    """All of them by their bytes."""
    lines = ["| text encoder | kept MB | overall | all details | LPIPS | D_cond |", "|---|---:|---:|---:|---:|---:|"]
    for row in sorted((*own, *theirs), key=lambda row: -row["bytes"]):
        marked = f"**{row['name']}**" if row in own else row["name"]
        cells = [f"{row['bytes'] / 1e6:.1f}", f"{row['overall']:.3f}", f"{row['exact']:.3f}", f"{row['lpips']:.4f}"]
        lines.append(f"| {marked} | {' | '.join(cells)} | {cell(row.get('D_cond'))} |")
    return "\n".join(lines)


def plot(made: Sequence[dict], path: Path) -> None:
    """Scores and distances over sparsity, a panel for each part, a line for each method."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, len(FINER), figsize=(13, 7), sharex=True, sharey="row")
    for column, part in enumerate(FINER):
        for number, way in enumerate(WAYS):
            own = [row for row in made if (row["part"], row["way"]) == (part, way) and row["found"]]
            for line, key in enumerate(("overall", "lpips")):
                of_key = [[f[key] for f in row["found"]] for row in own]
                axes[line][column].errorbar(
                    [100 * row["share"] for row in own], [np.mean(v) for v in of_key],
                    [np.std(v, ddof=1) if len(v) > 1 else 0 for v in of_key],
                    marker="o", markersize=4, capsize=2, label=way, color=f"C{number}",
                )  # fmt: skip
        axes[0][column].set(title=part, ylim=(0, 1.03))
        axes[1][column].set(xlabel="weights set to zero, %", yscale="log")
    axes[0][0].set_ylabel("score of the pictures")
    axes[1][0].set_ylabel("LPIPS to the dense pictures")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def plot_bytes(own: Sequence[dict], theirs: Sequence[dict], path: Path) -> None:
    """Scores over kept bytes."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.8))
    groups: dict[str, list[dict]] = {}
    for row in (*own, *theirs):
        kind = "whole" if "whole" in row["name"] else row["name"].rpartition(" ")[0] if row in own else "widths"
        groups.setdefault(kind, []).append(row)
    for number, (kind, members) in enumerate(groups.items()):
        points_ = sorted((row["bytes"] / 1e6, row["overall"]) for row in members)
        axes.plot(*zip(*points_, strict=True), "s" if kind == "whole" else "o-", label=kind, color=f"C{number}")
    for row in groups.get("whole", []):
        axes.annotate(row["name"].partition(",")[0], (row["bytes"] / 1e6, row["overall"]), fontsize=8, rotation=30)
    axes.set(xlabel="kept MB of the text encoder", ylabel="score of the pictures")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


SECTIONS = ("coarse", "layers", "bytes", "points")
"""What is measured, in this order: the points that say most first, all others last."""


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 pictures a point, magnitude; writes nothing here")
    parser.add_argument("--page", action="store_true", help="measure nothing, write what is there")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--per-task", type=int, default=10, help="pictures of each of the six tasks at each point")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.quick:
        bench = Bench(2, cache=CACHE / "quick")
        made = [
            {"part": part, "way": "magnitude", "share": share, "found": [bench.point(at(part, "magnitude", share, 0))]}
            for part in FINER
            for share in (0.3, 0.5, 0.7)
        ]
        print(table(made, "overall", 3))
        return
    seeds, bench = range(options.seeds), Bench(options.per_task, not options.page)
    if not options.page:
        for name in options.only:
            if name == "layers":
                bench.layers()
            elif name == "bytes":
                sized(bench)
            else:
                for point in points(seeds, name == "coarse"):
                    bench.point(point)
        return
    made, own, found = rows(bench, seeds), sized(bench), bench.layers()
    tables = {
        "scores": table(made, "overall", 2),
        "distances": table(made, "lpips", 4),
        "paper": paper_table(bench, seeds),
        "layers": layers_table(found) if found else "*Not measured yet.*",
        "bytes": bytes_table(own, others()),
    }
    pages.fill(PAGE, tables)
    print("\n\n".join(tables.values()))
    plot(made, PLOT)
    plot_bytes(own, others(), BYTES_PLOT)


if __name__ == "__main__":
    main()
