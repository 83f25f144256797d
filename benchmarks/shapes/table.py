"""`make shapes-table`: the paper's Table 1 and its ablations on Shapes, judged by pictures; writes RESULTS.md.

Hours on 2 cores, and takes up where it was stopped: plans and verdicts are kept in .cache/shapes, named by what they
depend on (the weights, the plan, the prompts, the sampler). `--quick` is a cut of 15 minutes that writes nothing here.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn

from benchmarks import equal_bytes
from benchmarks.shapes import encoder, evaluate, report, scenes
from skrr_engine import __version__
from skrr_engine.cli.commands import duration
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import Assignment, assignment
from skrr_engine.measure.discrepancy import COSINE, Criterion
from skrr_engine.measure.prompts import sha256 as prompts_sha256
from skrr_engine.plan.model import EncoderPlan, Plan, Provenance
from skrr_engine.search import baselines
from skrr_engine.search.run import search
from skrr_engine.search.settings import Settings

HERE = Path(__file__).resolve().parent
CACHE = encoder.CACHE / "results"
LEVELS = (0.24, 0.32, 0.42)  # of the parameters in blocks
CALIBRATION = {8: 8, 11: 8}  # captions by number of tokens: few lengths make large batches, which a CPU runs faster
LACO_LEAST = (0.9, 0.7, 0.0)  # the first similarity that reaches the level


class Laboratory:
    """A Studio with a memory: what was found once is read from the disk."""

    def __init__(self, per_task: int, seeds: Sequence[int]):
        self.studio = evaluate.Studio(per_task)
        self.row, self.seeds, self.per_task = self.studio.encoder.row, seeds, per_task
        weights = b"".join(path.read_bytes() for path in (evaluate.DENOISER, evaluate.DECODER))
        settings = (per_task, evaluate.STEPS, evaluate.CFG, evaluate.SAMPLER, evaluate.SCHEDULER, evaluate.SEED)
        self.basis = hashlib.sha256(weights + repr(settings).encode()).hexdigest()[:16]
        share = sum(self.row.parameter_counts) / self.row.total
        self.targets = [level * share for level in LEVELS]

    def kept(self, what: Sequence, make: Callable[[], dict]) -> dict:
        """What `make` returns for `what`, from the disk where it is there."""
        return kept(CACHE, self.basis, what, make)

    def plan(self, name: str, seed: int, make: Callable[[Laboratory, int], EncoderPlan]) -> EncoderPlan:
        """A method's plan for a calibration seed."""

        def find() -> dict:
            captions = self.captions(seed)
            provenance = Provenance(
                source="search", projection="context_embedder", denoiser="shapes", prompts=len(captions),
                prompts_sha256=prompts_sha256(captions), created_with=f"skrr {__version__}",
            )  # fmt: skip
            return {"plan": Plan(encoders={"smollm2": make(self, seed)}, provenance=provenance).to_json()}

        found = self.kept(("plan", name, seed, sorted(CALIBRATION.items()), self.targets), find)
        return Plan.from_json(found["plan"]).encoder("smollm2")

    def captions(self, seed: int) -> list[str]:
        """The calibration captions of a seed: the first of each length."""
        by_length: dict[int, list[str]] = {length: [] for length in CALIBRATION}
        for caption in scenes.calibration(300, seed):
            by_length.get(len(self.studio.encoder.tokenize(caption)), []).append(caption)
        return [caption for length, count in CALIBRATION.items() for caption in by_length[length][:count]]

    def meter(self, seed: int, **options):
        """On the calibration captions of a seed."""
        return self.studio.meter(self.captions(seed), **options)

    def verdict(self, removed: Assignment, module: nn.Module | None = None, what: Sequence = ()) -> dict:
        """The verdict on an assignment. module: a changed copy of the encoder; what: how it was changed."""
        key = ("verdict", *what, sorted((place, action.target) for place, action in removed.items()))
        return self.kept(key, lambda: asdict(self.studio.judge(removed, module)[0]))


def kept(folder: Path, basis: str, what: Sequence, make: Callable[[], dict]) -> dict:
    """What `make` returns for `what` on a basis, from a file in `folder` where it is there, else kept there."""
    key = hashlib.sha256(f"{basis}{what!r}".encode()).hexdigest()[:24]
    path = folder / f"{key}.json"
    if not path.exists():
        start = time.monotonic()
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"what": repr(what)[:400], **found}), encoding="utf-8")
        os.replace(partial, path)
        print(f"{duration(time.monotonic() - start):>8}  {repr(what)[:90]}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def skrr(lab: Laboratory, seed: int, beam: int = 3, **options) -> EncoderPlan:
    """The paper's algorithm, exactly; options: of the meter."""
    settings = Settings(lab.targets[-1], tuple(lab.targets[:-1]), beam, reuse=True, delta=0.0)
    return search(lab.meter(seed, **options), settings)


def shortgpt(lab: Laboratory, seed: int) -> EncoderPlan:
    meter = lab.meter(seed)
    return baselines.plan_of(meter, baselines.shortgpt_order(meter), lab.targets, "shortgpt")


def finercut(lab: Laboratory, seed: int) -> EncoderPlan:
    meter = lab.meter(seed)
    own = lab.meter(seed, projection=None, criterion=baselines.ANGLE_OF_OUTPUT)
    return baselines.plan_of(meter, baselines.finercut_order(own, lab.targets[-1]), lab.targets, "finercut")


def random(lab: Laboratory, seed: int) -> EncoderPlan:
    meter = lab.meter(seed)
    return baselines.plan_of(meter, baselines.random_order(meter, seed), lab.targets, "random")


def laco(lab: Laboratory, seed: int, level: int) -> dict:
    """The verdict on an encoder whose last blocks were merged."""
    studio = lab.studio

    def find() -> dict:
        batches = studio.encoder.batches(lab.captions(seed))
        dense = [batch.run(studio.encoder.module)[0][0] for batch in batches]
        for least in LACO_LEAST:
            twin = copy.deepcopy(studio.encoder.module)
            row = families.find(twin)

            def similarity(gone, twin=twin, row=row) -> float:
                replaced = evaluate.rewire(twin, row, assignment(gone))
                out = [batch.run(twin)[0][0] for batch in batches]
                evaluate.undo(twin, replaced)
                near = [torch.cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(dense, out, strict=True)]
                return float(torch.cat(near).mean())

            removed = baselines.laco(row, similarity, lab.targets[level], least=least)
            if row.sparsity(removed) >= lab.targets[level]:
                break
        found = lab.verdict(assignment(removed), twin, ("laco", seed, level))
        return {**found, "least": least, "sparsity": row.sparsity(removed), "removed": len(removed)}

    return lab.kept(("laco", seed, level, sorted(CALIBRATION.items()), LACO_LEAST, lab.targets), find)


METHODS = {"Random": random, "ShortGPT": shortgpt, "FinerCut": finercut, "Skrr": skrr}
ABLATIONS = {
    "beam 1": functools.partial(skrr, beam=1),
    "beam 2": functools.partial(skrr, beam=2),
    "beam 4": functools.partial(skrr, beam=4),
    "beam 1, without the projection": functools.partial(skrr, beam=1, projection=None),
    "beam 1, cosine instead of MSE": functools.partial(skrr, beam=1, criterion=COSINE),
    "beam 1, without the null term": functools.partial(skrr, beam=1, criterion=replace(Criterion(), null=0.0)),
}
"""What is changed of the paper's search; the criterion's parts at a beam of 1, which takes a third of the time."""
PRECISIONS = ("bf16", "fp8", "Q8_0", "Q5_0", "Q4_0")


def table_one(lab: Laboratory) -> list[dict]:
    """Rows {method, level, seed, sparsity, ...verdict}."""
    rows = []
    for seed in lab.seeds:
        for method, make in METHODS.items():
            plan = lab.plan(method, seed, make)
            for number, level in enumerate(plan.levels):
                gone = plan.order[: level.skipped]
                told = {"level": number, "seed": seed, "sparsity": block_share(lab, gone), "removed": level.skipped}
                if method == "Skrr":
                    rows.append({"method": "Skrr without re-use", **told, **lab.verdict(assignment(gone))})
                rows.append({"method": method, **told, **lab.verdict(assignment(gone, level.reuse))})
        for number in range(len(LEVELS)):
            found = laco(lab, seed, number)
            share = found["sparsity"] * lab.row.total / sum(lab.row.parameter_counts)
            rows.append({**found, "method": "LaCo", "level": number, "seed": seed, "sparsity": share})
    return rows


def block_share(lab: Laboratory, gone: Sequence[int]) -> float:
    """Removed share of the parameters in blocks."""
    return lab.row.sparsity(gone) * lab.row.total / sum(lab.row.parameter_counts)


def ablations(lab: Laboratory, chosen: Sequence[str] = tuple(ABLATIONS)) -> list[dict]:
    """Rows at the strongest level, with re-use, calibration seed 0."""
    rows = []
    for name, make in {"as printed (beam 3)": skrr, **{name: ABLATIONS[name] for name in chosen}}.items():
        plan = lab.plan("Skrr" if make is skrr else name, 0, make)
        level = plan.levels[-1]
        found = lab.verdict(assignment(plan.order[: level.skipped], level.reuse))
        rows.append({"method": name, "sparsity": block_share(lab, plan.order[: level.skipped]), **found})
    return rows


def bytes_in_pictures(lab: Laboratory) -> list[dict]:
    """Rows {method: precision, kept, sparsity, ...verdict}, with Skrr's plan of seed 0."""
    plan, rows = lab.plan("Skrr", 0, skrr), []
    for precision in PRECISIONS:
        own = equal_bytes.PRECISIONS[precision]
        twin, sizes = equal_bytes.quantised(
            lab.studio.encoder.module, own,
            equal_bytes.PRECISIONS[equal_bytes.EMBEDDING.get(precision, precision)],
        )  # fmt: skip
        row = families.find(twin)
        for level in (None, *plan.levels):
            gone = plan.order[: level.skipped] if level else ()
            removed = assignment(gone, level.reuse if level else {})
            found = lab.verdict(removed, twin, ("precision", precision))
            kept = equal_bytes.kept_bytes(row, sizes, removed)
            rows.append({"method": precision, "sparsity": block_share(lab, gone), "kept": kept, **found})
    return rows


PARTS: dict[str, Callable[[Laboratory], str]] = {
    "detector": lambda lab: (
        f"Detector on rendered truth with noise: {detector_score(lab):.1%} of the scenes right in every detail."
    ),
    "table": lambda lab: report.main_table(table_one(lab), lab.verdict({})),
    "bytes": lambda lab: report.plain_table(bytes_in_pictures(lab), "precision"),
    "ablations": lambda lab: report.plain_table(ablations(lab), "Skrr at 42 %"),
}
"""Section of RESULTS.md -> what finds it."""


def main() -> None:
    """Find what is not known yet, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 12 prompts a task, no ablations")
    parser.add_argument("--only", choices=PARTS, help="find and write this part of RESULTS.md only")
    options, start = parser.parse_args(), time.monotonic()
    torch.set_grad_enabled(False)
    if options.quick:
        print(report.main_table(table_one(Laboratory(12, (0,)))))
    else:
        lab = Laboratory(60, (0, 1, 2))
        for name in [options.only] if options.only else PARTS:
            report.write({name: PARTS[name](lab)})
    print(f"took {duration(time.monotonic() - start)}")


def detector_score(lab: Laboratory) -> float:
    """Share of the evaluation prompts' rendered scenes, with noise on them, that the detector has right."""
    draw, right = np.random.default_rng(0), 0
    for prompt in lab.studio.prompts:
        noisy = scenes.render(prompt.scene) + draw.normal(0, 12, (scenes.SIZE, scenes.SIZE, 3))
        seen = evaluate.detector.detect(np.clip(noisy, 0, 255).astype(np.uint8))
        right += evaluate.detector.exact(prompt, seen)
    return right / len(lab.studio.prompts)


if __name__ == "__main__":
    main()
