"""The proof on a GPU (benchmarks/gpu), as far as a machine without one can rehearse it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import page
from skrr_engine.memory import out_of_memory

ROOT = Path(__file__).resolve().parents[1]


def rehearse(folder: Path, parts: str, *more: str) -> list[dict]:
    """The lines of a rehearsal of these parts: those printed, after they were held against those in both files."""
    out = folder / "out"
    command = [sys.executable, "benchmarks/gpu/prove.py", "--rehearse", "--kit", os.devnull, "--parts", parts]
    done = subprocess.run(
        [*command, "--results", str(folder / "results"), *more], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    assert done.returncode == (1 if any("error" in line for line in lines) else 0), done.stderr
    if any("card" in line for line in lines):
        for place in (folder / "results", out):
            text = (place / "rehearsal.jsonl").read_text(encoding="utf-8")
            assert [json.loads(line) for line in text.splitlines()] == lines
    return lines


def of(lines: list[dict], what: str) -> list[dict]:
    return [line for line in lines if line.get("what") == what]


def written(folder: Path, *wanted: str) -> None:
    """The page that page.py makes of a rehearsal's results says these."""
    page.write(folder / "results", folder / "gpu.md", folder / "gpu.png")
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    assert [words for words in wanted if words not in text] == [], text


def errors(lines: list[dict]) -> dict[str, str]:
    return {line["part"]: line["error"] for line in lines if "error" in line}


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path):
    lines = rehearse(tmp_path, "rates,failing,hanging,racing,python,exact,streamed,standins,oom")
    assert errors(lines) == {
        "engine:failing": "RuntimeError: this part fails on purpose", "engine:hanging": "it took too long",
    }  # fmt: skip
    racing, exact, streamed = of(lines, "search")
    assert racing["ended"] and exact["ended"] and streamed["ended"], "small searches that did not end"
    assert racing["order"] == exact["order"] == streamed["order"], "the searches must agree"
    assert streamed["read_gb"] > 10 * streamed["memory_gb"], "nothing was streamed"
    assert racing["first_s"] > 0 and racing["tflops"] > 0 and of(lines, "rates")[0]["tflops"]["float32"] > 0
    (fitted,), (tight,) = of(lines, "stand-ins"), of(lines, "out of memory")
    assert fitted["D_repaired"] < fitted["D_bare"] and tight["same_plan"]
    written(tmp_path, "| rehearsal | racing |", "- engine:hanging: it took too long", "two fifths of what")
    assert "function calls" in (tmp_path / "out" / "profile_python.txt").read_text(encoding="utf-8")


def test_the_real_comfyui(tmp_path):
    lines = rehearse(tmp_path, "comfy:fp16,comfy:scaled-fp8,widths,nodes")
    assert not errors(lines)
    first, second, narrow = of(lines, "memory")
    states = {state["state"]: state for state in first["lines"]}
    assert set(states) == {
        "dense", "plan", "dense again", "dense, LoRA", "plan, LoRA", "dense after LoRA", "plan after LoRA",
        "loaded pruned",
    }  # fmt: skip
    for found in (first, second, narrow):
        assert all(state["finite"] and state.get("same_output", True) for state in found["lines"])
        counted = {state["state"]: state["loaded_gb"] for state in found["lines"]}
        assert counted["plan"] == counted["loaded pruned"] == pytest.approx(found["kept"] * counted["dense"], rel=0.01)
    time = of(lines, "time")[0]
    assert 0.5 < time["kept_bytes"] < time["kept_work"] < 1 and time["ratios"]["loaded pruned"]["one_s"] > 0
    (beside,) = of(lines, "widths")
    assert beside["off"] < 1e-5 and beside["changed"] > 0.1 and narrow["kept"] != first["kept"]
    (node,) = of(lines, "node")
    assert node["skipped"] > 0 and node["D"] > 0
    written(tmp_path, "T5-XXL fp16 in ComfyUI", "| loaded pruned |", "Skrr Prune on a small T5", "on the CPU")


def test_the_time_ends_it(tmp_path):
    lines = rehearse(tmp_path, "hanging,exact", "--minutes", "0.1")
    found, over = errors(lines), "the proof's time was over"
    assert found.pop("engine:hanging") == over
    if found:  # a busy machine: the next part had just begun
        assert found == {"engine:exact": over}
    else:
        assert {"part": "engine:exact", "skipped": "no time was left"}.items() <= lines[-2].items()
    assert lines[-1]["over"] and lines[-1]["at_s"] < 60


def state(name: str, size: float, **more) -> dict:
    peak = {"tensors": size, "card": size}
    sizes = dict.fromkeys(("counted_gb", "loaded_gb", "allocated_gb", "used_gb"), size)
    return {"state": name, **sizes, "first_peak_gb": peak, "eight_peak_gb": peak, **more}


def made_up(card: str) -> list[dict]:
    met = {"name": "share of the GEMM rate", "value": 0.7, "wanted": 0.6, "at_most": False, "met": True}
    missed = {"name": "whole search, seconds", "value": 700, "wanted": 600, "at_most": True, "met": False}
    return [
        {"part": "comfy", "card": card, "memory_gb": 80.0, "torch": "2.11.0", "cuda": "13.0", "transformers": "5.17.0"},
        {"part": "comfy:fp16", "what": "memory", "name": "T5-XXL fp16", "way": "ComfyUI 0.3.75", "held": "allocated_gb",
         "kept": 0.58, "targets": [], "lines": [state("dense", 9.5), state("loaded pruned", 5.5, same_output=True)]},
        {"part": "engine:racing", "what": "search", "name": "racing", "first_s": 3.1, "second_s": 4.2, "removals": 20,
         "seconds": 90, "whole_s": 700, "ended": False, "tflops": 450, "gemm_share": 0.7, "peak_gb": 20.0,
         "memory_gb": 35.0, "targets": [met, missed]},
        {"part": "engine:oom", "error": "it took too long", "said": ""},
        {"over": True, "failed": ["engine:oom"], "targets": {"met": 1, "missed": 1}},
    ]  # fmt: skip


def test_the_page(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    page.write(results, docs / "gpu.md", docs / "images" / "gpu.png")
    assert "Not yet run" in (docs / "gpu.md").read_text() and not (docs / "images").exists()
    for card in ("NVIDIA One", "NVIDIA Two"):
        text = "".join(json.dumps(line) + "\n" for line in made_up(card))
        (results / f"{card}.jsonl").write_text(text, encoding="utf-8")
    page.write(results, docs / "gpu.md", docs / "images" / "gpu.png")
    text = (docs / "gpu.md").read_text()
    assert "Not yet run" not in text and "![VRAM and speed](images/gpu.png)" in text
    assert "| racing | whole search, seconds | at most 600 | 700, **missed** | 700, **missed** |" in text
    assert "| loaded pruned | 5.5 | 5.5 | 5.5 | 5.5 | - | 5.5 | 5.5 | yes |" in text
    assert text.count("- engine:oom: it took too long") == 2
    assert (docs / "images" / "gpu.png").stat().st_size > 5000


def test_the_page_that_is_there():
    """docs/gpu.md is what page.py writes of the results that are there."""
    written = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert ("Not yet run" in written) == (not list(page.RESULTS.glob("*.jsonl")))
    assert "python3 benchmarks/gpu/prove.py" in written


def test_what_cuda_says_when_it_is_full():
    sayings = (
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    )
    assert all(out_of_memory(RuntimeError(saying)) for saying in sayings)
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
