"""How good an encoder's pictures are: captions in, pictures by ComfyUI's own sampler, and a verdict on them.

`python -m benchmarks.shapes.evaluate [--plan PLAN] [--per-task N]` judges the dense encoder, or one level of a plan.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn

from benchmarks.shapes import detector, encoder, scenes
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import Assignment
from skrr_engine.encoder.rewire import rewire, undo
from skrr_engine.encoder.trace import Tracer
from skrr_engine.files.folder import Encoder, load
from skrr_engine.measure.calibration import Calibration, grouped
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.projection import TextProjection, from_file

HERE = Path(__file__).resolve().parent
DENOISER, DECODER = HERE / "shapes_denoiser.safetensors", HERE / "shapes_decoder.safetensors"
STEPS, CFG, SAMPLER, SCHEDULER = 6, 3.0, "euler", "simple"
SEED = 1000  # picture i has the noise of seed 1000 + i, whatever the encoder


class Painter:
    """ComfyUI's loaders, sampler and decoder on Shapes' two files. Needs encoder.activate_comfyui() before it."""

    def __init__(self, denoiser: Path = DENOISER, decoder: Path = DECODER):
        import comfy.sd
        import comfy.utils

        self.model = comfy.sd.load_diffusion_model(str(denoiser))
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(decoder)))

    def paint(
        self, texts: Sequence[torch.Tensor], null: torch.Tensor, seeds: Sequence[int], cfg: float = CFG
    ) -> np.ndarray:
        """A picture for each text `[tokens, 576]`, uint8 `[n, 64, 64, 3]`; null: the empty prompt's `[tokens, 576]`.

        Texts of one length are sampled together; the pictures are those of as many runs of KSampler.
        """
        found = np.zeros((len(texts), scenes.SIZE, scenes.SIZE, 3), dtype=np.uint8)
        groups: dict[int, list[int]] = {}
        for i, text in enumerate(texts):
            groups.setdefault(len(text), []).append(i)
        for members in groups.values():
            for start in range(0, len(members), 64):
                chosen = members[start : start + 64]
                found[chosen] = self._paint(
                    torch.stack([texts[i] for i in chosen]), null, [seeds[i] for i in chosen], cfg
                )
        return found

    @torch.inference_mode()
    def _paint(self, texts: torch.Tensor, null: torch.Tensor, seeds: Sequence[int], cfg: float) -> np.ndarray:
        import comfy.sample

        latent = torch.zeros(len(seeds), 16, scenes.SIZE // 8, scenes.SIZE // 8)
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed) for seed in seeds])
        no_pooled = {"pooled_output": None}  # as CLIPTextEncode has it of an encoder without a pooled vector
        positive, negative = [[texts, dict(no_pooled)]], [[null.unsqueeze(0), dict(no_pooled)]]
        latent = comfy.sample.sample(
            self.model, noise, STEPS, cfg, SAMPLER, SCHEDULER, positive, negative, latent, disable_pbar=True
        )
        return (self.vae.decode(latent).clamp(0, 1) * 255).round().byte().numpy()


@dataclass(frozen=True)
class Verdict:
    """scores: of each task, the share of pictures that do what it asks; overall: their mean; exact: the share of
    pictures that are right in every detail; mse, lpips: mean distance to the dense encoder's picture of the same seed
    (pixels in 0..1; None where it isn't measured); D_cond, D_null, null_norm: as `discrepancy` prints them, on these
    prompts."""

    scores: dict[str, float]
    overall: float
    exact: float
    mse: float
    lpips: float | None
    D_cond: float
    D_null: float
    null_norm: float


class Studio:
    """The encoder, the painter, the prompts, and what the dense encoder makes of them.

    per_task: prompts of each task (60 at most). lpips: whether that distance is measured (needs stlpips-pytorch).
    """

    def __init__(self, per_task: int = 60, lpips: bool = True):
        encoder.activate_comfyui()
        self.encoder: Encoder = load(str(encoder.ensure()))
        self.painter = Painter()
        self.projection: TextProjection = from_file(DENOISER)
        self.prompts = scenes.evaluation(per_task)
        self.captions = [p.caption for p in self.prompts]
        self.tracer = Tracer(self.encoder.module, self.encoder.row)
        self.distance = perceptual() if lpips else None

    @functools.cached_property
    def embedded(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What the dense encoder makes of the prompts and of the empty one (see `embed`)."""
        return self.embed(self.encoder.module, {})

    @functools.cached_property
    def dense(self) -> np.ndarray:
        """The dense encoder's pictures."""
        return self.paint(*self.embedded)

    def paint(self, texts: Sequence[torch.Tensor], null: torch.Tensor, cfg: float = CFG) -> np.ndarray:
        """The prompts' pictures, each with its own noise, from their embeddings and the empty prompt's."""
        return self.painter.paint(texts, null, range(SEED, SEED + len(texts)), cfg)

    def meter(self, captions: Sequence[str], race: bool = False, **options) -> Meter:
        """A Meter on these captions, through the denoiser's projection unless another (or None) is given. race: in the
        order of a race."""
        return Meter(self.calibration(captions, race), **{"projection": self.projection, **options})

    def calibration(self, captions: Sequence[str], race: bool = False) -> Calibration:
        """These captions as the encoder is measured and fitted on them."""
        batches, null = self.encoder.batches(captions, race=race), self.encoder.batch([self.encoder.tokenize("")])
        return Calibration(self.encoder.module, self.tracer, batches, null)

    @torch.no_grad()
    def embed(self, module: nn.Module, removed: Assignment) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The prompts' embeddings `[tokens, 576]` and the empty prompt's, by a module of the encoder's kind with an
        assignment in it."""
        ids = [self.encoder.tokenize(caption) for caption in self.captions]
        texts: list = [None] * len(ids)
        replaced = rewire(module, families.find(module), removed)
        try:
            for members in grouped([len(tokens) for tokens in ids], lambda length: len(ids)):
                ((hidden, _),) = self.encoder.batch([ids[i] for i in members]).run(module)
                for i, tokens in zip(members, hidden, strict=True):
                    texts[i] = tokens
            ((null, _),) = self.encoder.batch([self.encoder.tokenize("")]).run(module)
        finally:
            undo(module, replaced)
        return texts, null[0]

    @torch.no_grad()
    def judge(self, removed: Assignment, module: nn.Module | None = None) -> tuple[Verdict, np.ndarray]:
        """The verdict on an assignment, and its pictures. module: of the encoder's kind, where it isn't the encoder."""
        texts, null = self.embed(module or self.encoder.module, removed)
        made = self.paint(texts, null)
        return self.verdict(texts, null, made, self.dense), made

    def verdict(
        self, texts: Sequence[torch.Tensor], null: torch.Tensor, made: np.ndarray, dense: np.ndarray
    ) -> Verdict:
        """The verdict on pictures that were painted from these embeddings, beside the dense encoder's."""
        error = ((made.astype(np.float64) - dense) / 255) ** 2
        far = None if self.distance is None else self.distance(made, dense)
        return Verdict(
            *scores(self.prompts, made), float(error.mean()), far,
            self.error(texts, self.embedded[0]), self.error([null], [self.embedded[1]]),
            float(self.projection(null).double().norm(dim=-1).mean()),
        )  # fmt: skip

    def error(self, texts: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> float:
        """Mean squared error of projected embeddings over all tokens and features."""
        pairs = [(self.projection(a).double(), self.projection(b).double()) for a, b in zip(texts, dense, strict=True)]
        return float(sum((a - b).square().sum() for a, b in pairs)) / sum(a.numel() for a, _ in pairs)


def scores(prompts: Sequence[scenes.Prompt], made: np.ndarray) -> tuple[dict[str, float], float, float]:
    """Of pictures, uint8 `[n, 64, 64, 3]`: each task's score, their mean, and the share right in every detail."""
    seen = [detector.detect(picture) for picture in made]
    found = {}
    for task in scenes.TASKS:
        own = [detector.passes(p, things) for p, things in zip(prompts, seen, strict=True) if p.task == task]
        found[task] = sum(own) / len(own)
    exact = sum(detector.exact(p, things) for p, things in zip(prompts, seen, strict=True)) / len(prompts)
    return found, sum(found.values()) / len(found), exact


def perceptual():
    """LPIPS (shift-tolerant AlexNet, the weights of stlpips-pytorch): mean over pairs of uint8 pictures."""
    # Its modules import two debugging aids that they never use; others (matplotlib) must not take these for real.
    aids = {"IPython": "embed", "torchsummary": "summary"}
    missing = {name: attribute for name, attribute in aids.items() if importlib.util.find_spec(name) is None}
    for name, attribute in missing.items():
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], attribute, None)
    from stlpips_pytorch import stlpips

    for name in missing:
        del sys.modules[name]

    net = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)

    @torch.no_grad()
    def measure(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(a), 60):
            pair = (torch.from_numpy(x[start : start + 60]).permute(0, 3, 1, 2).float() / 255 for x in (a, b))
            total += float(net(*pair, normalize=True).sum())
        return total / len(a)

    return measure


def grid(pictures: np.ndarray, columns: int, gap: int = 4) -> np.ndarray:
    """Pictures as one, row after row, uint8 `[height, width, 3]`."""
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def main() -> None:
    """Judge and print."""
    from skrr_engine.encoder.actions import assignment
    from skrr_engine.plan.model import Plan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", help="a plan for the Shapes encoder; without one, the dense encoder is judged")
    parser.add_argument("--sparsity", type=float, default=1.0, help="the plan's level at or below it (default: all)")
    parser.add_argument("--per-task", type=int, default=60, help="prompts of each task (default and at most 60)")
    parser.add_argument("--grid", help="save some of the pictures as a PNG")
    options, start = parser.parse_args(), time.monotonic()
    studio = Studio(options.per_task, lpips=False)
    if options.plan:
        entry = next(iter(Plan.read(options.plan).encoders.values()))
        level = entry.choose(options.sparsity)
        removed = assignment(entry.order[: level.skipped], level.reuse)
    else:
        removed = {}
    found, made = studio.judge(removed)
    for name, value in asdict(found)["scores"].items():
        print(f"{name:<20} {value:.3f}")
    print(f"{'overall':<20} {found.overall:.3f}\n{'right in all details':<20} {found.exact:.3f}")
    if options.grid:
        from PIL import Image

        step = max(1, len(made) // 48)
        Image.fromarray(grid(made[::step][:48], 8)).save(options.grid)
    print(f"took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
