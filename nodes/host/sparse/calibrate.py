"""What layers are given while prompts are encoded, or while pictures of them are sampled for a few steps."""

from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.sample
import torch

from ....skrr_engine.errors import SkrrError
from ....skrr_engine.weights.prune import CALIBRATED
from ....skrr_engine.weights.statistics import Pair, Statistics, seen

PICTURES, STEPS, SIDE = 4, 4, 64
"""Of a denoiser: how many prompts it samples, for how many steps, at what width and height of its latents."""


def encoding(clip, prompts: Sequence[str]) -> Callable[[], None]:
    """Encodes prompts with a CLIP."""

    def run() -> None:
        for prompt in prompts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)

    return run


def sampling(model, clip, prompts: Sequence[str], side: int = SIDE) -> Callable[[], None]:
    """Samples pictures of prompts, which `clip` encodes, for a few steps. side: see SIDE."""
    conditionings = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in [*prompts[:PICTURES], ""]]

    def run() -> None:
        latent = model.get_model_object("latent_format")
        shape = [1, latent.latent_channels, *[1] * (getattr(latent, "latent_dimensions", 2) - 2), side, side]
        empty = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        *positives, negative = conditionings
        for seed, positive in enumerate(positives):
            noise = comfy.sample.prepare_noise(empty, seed)
            comfy.sample.sample(
                model, noise, STEPS, 1.0, "euler", "simple", positive, negative, empty, disable_pbar=True, seed=seed
            )

    return run


def looking(method: str, pairs: Sequence[Pair], run: Callable[[], None] | None) -> Statistics | None:
    """Statistics of what `run` gives these layers, where a method needs them; None where it needs none. Raises
    SkrrError."""
    if method not in CALIBRATED:
        return None
    if run is None:
        raise SkrrError(f'method "{method}" looks at what the diffusion model is given: connect the CLIP whose prompts'
                        " it reads, or take the method magnitude")  # fmt: skip
    return seen(pairs, run, method == "sparsegpt")
