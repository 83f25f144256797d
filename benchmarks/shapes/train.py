"""Train Shapes: `python -m benchmarks.shapes.train`, half an hour on 2 cores; takes up where it was stopped.

Captions' embeddings are computed once by the frozen encoder, then the decoder and the denoiser are trained. Everything
is seeded; state is kept in .cache/shapes/train and written whole or not at all. Ends by writing the two weight files
and training.json (the schedule and the loss curve) beside this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.shapes import encoder, model, scenes

HERE = Path(__file__).resolve().parent
STATE = encoder.CACHE / "train"
DENOISER, DECODER = HERE / "shapes_denoiser.safetensors", HERE / "shapes_decoder.safetensors"
SEED = 0
CAPTIONS = 6000
DECODER_STEPS, DECODER_BATCH, DECODER_RATE = 500, 8, 1e-3
BATCH, RATE, WARMUP, DECAY, NULL_SHARE = 64, 1e-3, 300, 0.01, 0.1
EMA = 0.999
EVERY = 200  # steps between two saved states


def written(path: Path, value) -> None:
    """`torch.save`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(value, partial)
    os.replace(partial, path)


def embeddings(prompts: list[scenes.Prompt], path: Path) -> list[torch.Tensor]:
    """Each caption's embedding `[tokens, 576]`, and the empty prompt's as the last; computed once."""
    if path.exists():
        return torch.load(path)
    from skrr_engine.files.folder import load

    frozen = load(str(encoder.ensure()))
    captions = [p.caption for p in prompts] + [""]
    by_length: dict[int, list[int]] = {}
    ids = [frozen.tokenize(caption) for caption in captions]
    for i, tokens in enumerate(ids):
        by_length.setdefault(len(tokens), []).append(i)
    found: list = [None] * len(captions)
    with torch.inference_mode():
        for members in by_length.values():
            for start in range(0, len(members), 32):
                group = members[start : start + 32]
                ((hidden, _),) = frozen.batch([ids[i] for i in group]).run(frozen.module)
                for i, tokens in zip(group, hidden, strict=True):
                    found[i] = tokens.clone()
    written(path, found)
    return found


def train_decoder(latents: torch.Tensor, images: np.ndarray, path: Path) -> dict[str, torch.Tensor]:
    """The decoder's weights. latents, images: of all distinct scenes. Noise on the latents teaches it clean edges."""
    if path.exists():
        return torch.load(path)
    net = model.decoder(SEED)
    optimizer = torch.optim.AdamW(net.parameters(), lr=DECODER_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, DECODER_RATE, DECODER_STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(SEED)
    target = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    start = time.monotonic()
    for step in range(DECODER_STEPS):
        chosen = torch.randint(len(images), (DECODER_BATCH,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        level = 0.25 * torch.rand(DECODER_BATCH, 1, 1, 1, generator=generator)
        out = net(model.process_out(latents[chosen] + level * noise))
        loss = (out - target[chosen]).square().mean() + 0.1 * (out - target[chosen]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == DECODER_STEPS - 1:
            print(f"decoder {step}: loss {loss.item():.5f}, {time.monotonic() - start:.0f} s", flush=True)
    written(path, net.state_dict())
    return net.state_dict()


class Captions:
    """Draws batches: captions of one length, or the empty prompt, with their scenes' latents."""

    def __init__(self, texts: list[torch.Tensor], targets: torch.Tensor):
        self.texts, self.targets, self.null = texts[:-1], targets, texts[-1]
        groups: dict[int, list[int]] = {}
        for i, text in enumerate(self.texts):
            groups.setdefault(len(text), []).append(i)
        self.groups = [(torch.tensor(members), len(members)) for _, members in sorted(groups.items())]

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Context `[batch, tokens, 576]` and latents `[batch, 16, 8, 8]`."""
        if torch.rand((), generator=generator) < NULL_SHARE:
            # ComfyUI repeats a short null condition up to four times to run it in one batch with a caption's
            times = int(torch.randint(1, 5, (), generator=generator))
            chosen = torch.randint(len(self.texts), (BATCH,), generator=generator)
            return self.null.repeat(times, 1).expand(BATCH, -1, -1), self.targets[chosen]
        sizes = torch.tensor([float(size) for _, size in self.groups])
        members, size = self.groups[int(torch.multinomial(sizes, 1, generator=generator))]
        chosen = members[torch.randint(size, (BATCH,), generator=generator)]
        return torch.stack([self.texts[i] for i in chosen.tolist()]), self.targets[chosen]


def rate(step: int, steps: int) -> float:
    """Share of RATE at a step: warm-up, flat, then down to a hundredth over the last 40 %."""
    down = (steps - step) / (0.4 * steps)
    return min((step + 1) / WARMUP, 1.0, max(down, 0.01))


def train_denoiser(captions: Captions, steps: int, folder: Path) -> tuple[dict[str, torch.Tensor], list]:
    """The denoiser's averaged weights and its loss curve `[[step, loss], ...]`."""
    net = model.denoiser(SEED)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    generator, first, curve, seconds = torch.Generator().manual_seed(SEED + 1), 0, [], 0.0
    path = folder / f"denoiser_{steps}.pt"
    if path.exists():
        saved = torch.load(path)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        average, first, curve, seconds = saved["average"], saved["step"], saved["curve"], saved["seconds"]
    start, running = time.monotonic() - seconds, []
    for step in range(first, steps):
        context, x = captions.draw(generator)
        t = torch.rand(BATCH, generator=generator)
        sigma = model.FLOW_SHIFT * t / (1 + (model.FLOW_SHIFT - 1) * t)
        noise = torch.randn(x.shape, generator=generator)
        noised = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        out = net(noised, sigma * 1000, context=context)
        loss = (out - (noise - x)).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        keep = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in net.named_parameters():
                average[name].lerp_(p, 1 - keep)
        running.append(loss.item())
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            curve.append([step + 1, round(float(np.mean(running)), 5)])
            running, seconds = [], time.monotonic() - start
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            written(path, {**state, "average": average, "step": step + 1, "curve": curve, "seconds": seconds})
            print(f"denoiser {step + 1}/{steps}: loss {curve[-1][1]}, {seconds:.0f} s", flush=True)
    return average, curve


def main() -> None:
    """Train and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7000, help="of the denoiser")
    steps, start = parser.parse_args().steps, time.monotonic()
    encoder.activate_comfyui()
    torch.manual_seed(SEED)
    prompts = scenes.training(CAPTIONS, SEED)
    pictures = {prompt.scene: scenes.render(prompt.scene) for prompt in prompts}
    images = np.stack(list(pictures.values()))
    latents = model.Latents.fit(images)
    texts = embeddings(prompts, STATE / f"embeddings_{CAPTIONS}_{SEED}.pt")
    print(f"{len(prompts)} captions, {len(images)} scenes; embedded after {time.monotonic() - start:.0f} s", flush=True)
    decoder = train_decoder(latents.of(images), images, STATE / f"decoder_{DECODER_STEPS}.pt")
    targets = latents.of(np.stack([pictures[prompt.scene] for prompt in prompts]))
    weights, curve = train_denoiser(Captions(texts, targets), steps, STATE)
    save_file(model.half(weights.items()), DENOISER)
    save_file(model.half(decoder.items(), "taesd_decoder."), DECODER)
    told = {
        "seed": SEED,
        "captions": len(prompts),
        "scenes": len(images),
        "steps": steps,
        "batch": BATCH,
        "loss": curve,
    }
    (HERE / "training.json").write_text(json.dumps(told) + "\n", encoding="utf-8")
    print(f"done after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
