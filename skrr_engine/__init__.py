"""The Skrr engine: text encoders of image models made smaller by skipping and re-using sub-blocks (arXiv 2502.08690).

Plain PyTorch, no ComfyUI. One artefact, the plan (`plan.Plan`), passes between all parts:
prompts -> trace -> skip -> reuse -> plan -> rewire -> pruned encoder.
"""

__version__ = "0.1.0"
