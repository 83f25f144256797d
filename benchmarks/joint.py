"""What one budget over several encoders is worth: relative D beside the same share of each, at equal kept bytes.

Three small encoders with random weights (T5, CLIP, Llama), one of them with feed-forwards that hardly matter; stand-ins
of rank 2. Compared are the allocation by relative D, the same by plain D (encoders whose embeddings are large in
numbers then count more), and the same share of each encoder. Fills docs/search.md; two minutes on one core.

    python -m benchmarks.joint
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import small
import torch

from benchmarks.pages import fill
from skrr_engine.encoder import families
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.search import joint, widths
from skrr_engine.search.repair import filled
from skrr_engine.search.settings import Settings
from skrr_engine.standins.fit import Fitting

LENGTHS = [7, 9, 7, 12, 5, 9, 11, 8, 6, 10]
SHARES = (0.2, 0.3, 0.4)
SEEDS = (0, 1, 2)
LOUD = 8.0
"""How much larger the numbers of one encoder are made, which says no more for that."""


def encoders(seed: int) -> dict[str, torch.nn.Module]:
    """The three, with weights of a seed."""
    found = {name: small.build(name, 3, seed=10 * seed + n) for n, name in enumerate(("clip", "t5", "llama"))}
    for layer in found["llama"].layers:
        layer.mlp.down_proj.weight.mul_(0.05)
    found["clip"].text_model.final_layer_norm.weight.mul_(LOUD)
    return found


def calibration(name: str, module: torch.nn.Module, seed: int) -> Calibration:
    """Random prompts of a seed."""
    batches = [small.batch(name, ids) for ids in small.prompts(LENGTHS, seed)]
    return Calibration(module, Tracer(module, families.find(module)), batches, small.batch(name, [[2]]))


def compared(seed: int) -> dict[tuple[str, float], tuple[float, float]]:
    """(how, share) -> relative D on unseen prompts, and the share that went."""
    runs, tables, members, unseen = {}, {}, {}, {}
    for name, module in encoders(seed).items():
        run = widths.Search(
            calibration(name, module, 0), Meter(calibration(name, module, 5)), Settings(0.01), Fitting(rank=2)
        )
        runs[name], tables[name] = run, run.measure(lambda table: None)
        members[name] = joint.Member(run.steps(tables[name]), run.counts, run.row, run.meter.nothing())
        unseen[name] = Meter(calibration(name, module, 9))
    plain = {name: dataclasses.replace(member, nothing=1.0) for name, member in members.items()}
    total = sum(member.shape.total for member in members.values())

    def error(ends: Mapping[str, int]) -> float:
        found = 0.0
        for name, end in ends.items():
            run = runs[name]
            removed = filled(run.fitted, run.bare(members[name].steps[:end], tables[name]), run.fitting) if end else {}
            found += unseen[name].measure([removed])[0].total / unseen[name].nothing()
        return found

    rows = {}
    for share in SHARES:
        ways = {
            "one budget, by relative D": joint.at_sparsity(members, share),
            "one budget, by plain D": joint.at_sparsity(plain, share),
            "the same share of each": {n: run.reaching(members[n].steps, share) for n, run in runs.items()},
        }
        for how, ends in ways.items():
            gone = sum(members[name].removed(end) for name, end in ends.items()) / total
            rows[how, share] = error(ends), gone
    return rows


def main() -> None:
    """Measure and write."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    found = [compared(seed) for seed in SEEDS]
    lines = ["| how | " + " | ".join(f"{share:.0%} asked: removed, D" for share in SHARES) + " |"]
    lines.append("|---|" + "---:|" * len(SHARES))
    for how in dict.fromkeys(how for how, _ in found[0]):
        cells = []
        for share in SHARES:
            own = [rows[how, share] for rows in found]
            cells.append(f"{statistics.mean(g for _, g in own):.1%}, {statistics.mean(d for d, _ in own):.3g}")
        lines.append(f"| {how} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    print(table)
    fill(ROOT / "docs" / "search.md", {"joint": table})


if __name__ == "__main__":
    main()
