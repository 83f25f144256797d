"""The Skrr engine: text encoders of image models made smaller by skipping and re-using sub-blocks (arXiv 2502.08690).

Plain PyTorch, no ComfyUI. One artefact, the plan, passes between all parts: prompts -> calibration -> measure -> search
-> plan -> rewire -> pruned encoder. docs/architecture.md shows the rooms; these are the verbs to begin with:

    plan = skrr_engine.find_plan(encoder, tokenizer, prompts)
    skrr_engine.prune(encoder, plan)
"""

from importlib import import_module

__version__ = "0.1.0"

VERBS = {
    "Plan": "plan.model", "SkrrError": "errors", "find_plan": "verbs", "discrepancy": "verbs", "prune": "verbs",
    "write_pruned": "verbs",
}  # fmt: skip
"""Name -> module that has it, imported on first use: a plan is read without torch."""

__all__ = ["__version__", *VERBS]


def __getattr__(name: str):
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{VERBS[name]}", __name__), name)
