"""A comparison of two text encoders in words and as pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...skrr_engine.measure.compare import Comparison, verdict
from .report import BACKGROUND, FAINT, TEXT, as_tensor

SCALE = ((30, 30, 60), (70, 130, 180), (230, 160, 60), (255, 245, 200))
"""From no error to the largest: dark, blue, orange, pale. Its brightness alone tells, too."""

WIDTH, ROW, MARGIN, LABEL = 800, 18, 14, 40
TITLE = 26


def as_text(c: Comparison) -> str:
    """The verdict, the discrepancies and the null norms, then each prompt: its tokens' cosine and relative error."""
    d = c.discrepancy
    through = "through the model's text projection" if c.projected else "bare, without a model's text projection"
    lines = [
        verdict(c),
        f"D_cond {d.conditional:.4g}, D_null {d.null:.4g} ({through})",
        f"null norm {c.dense_null_norm:.4g} dense, {d.null_norm:.4g} pruned: {c.growth:.3g} x",
    ]
    for number, p in enumerate(c.prompts, 1):
        worst = int(p.error.argmax())
        lines.append(
            f"{number}. cosine {p.cosine.mean():.3f} (lowest {p.cosine.min():.3f}), relative error"
            f" {p.error.mean():.3f} (largest {p.error.max():.3f}, token {worst}): {p.prompt[:80]}"
        )
    return "\n".join(lines)


def colours(values: np.ndarray, top: float) -> np.ndarray:
    """Numbers from 0 to `top` as `[..., 3]` bytes; what is not finite as the top."""
    shares = np.where(np.isfinite(values), values, np.inf) / max(top, 1e-12)
    at = np.clip(shares, 0, 1) * (len(SCALE) - 1)
    stops = np.array(SCALE, dtype=float)
    low = np.minimum(at.astype(int), len(SCALE) - 2)
    part = (at - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def heat_map(c: Comparison) -> torch.Tensor:
    """Relative error of each token, one row a prompt, `[1, height, width, 3]`, 0 to 1."""
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=11)
    top = max(float(p.error.nan_to_num(0, 0, 0).max()) for p in c.prompts)
    longest = max(len(p.error) for p in c.prompts)
    height = 2 * MARGIN + TITLE + 16 + len(c.prompts) * (ROW + 3) + 36
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), "relative error of each token", TEXT, font)
    plot = WIDTH - 2 * MARGIN - LABEL
    y = MARGIN + TITLE
    for share in range(5):
        pen.text((MARGIN + LABEL + plot * share / 4, y), str(round((longest - 1) * share / 4)), FAINT, small, "mt")
    y += 16
    for number, p in enumerate(c.prompts, 1):
        pen.text((MARGIN, y + ROW / 2), str(number), FAINT, small, anchor="lm")
        strip = Image.fromarray(colours(p.error.numpy()[None], top))
        image.paste(strip.resize((max(1, plot * len(p.error) // longest), ROW), Image.NEAREST), (MARGIN + LABEL, y))
        y += ROW + 3
    scale = Image.fromarray(colours(np.linspace(0, 1, 120)[None], 1.0)).resize((120, 10))
    image.paste(scale, (MARGIN + LABEL, y + 10))
    pen.text((MARGIN + LABEL + 128, y + 15), f"0 to {top:.3g}", FAINT, small, anchor="lm")
    return as_tensor(image)


def grid(dense: torch.Tensor, pruned: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Pictures of both sides, `[batch, height, width, 3]` each, pair by pair under the prompts where there are as many;
    pruned ones are brought to the size of the dense ones. Returns `[1, height, width, 3]`."""
    pairs = list(zip(dense, pruned, strict=False))
    height, width = dense.shape[1:3]
    font = ImageFont.load_default(size=max(12, min(28, width // 24)))
    bar = font.size + 14
    image = Image.new("RGB", (2 * width + 3 * MARGIN, bar + len(pairs) * (height + bar) + MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for column, label in enumerate(("dense", "pruned")):
        pen.text((MARGIN + column * (width + MARGIN) + width / 2, bar / 2), label, TEXT, font, anchor="mm")
    for number, pair in enumerate(pairs):
        top = bar + number * (height + bar)
        text = prompts[number] if len(prompts) == len(pairs) and prompts[number].isascii() else ""  # the font's letters
        pen.text((MARGIN, top + bar / 2), shortened(f"{number + 1}. {text}", font, 2 * width), FAINT, font, anchor="lm")
        for column, picture in enumerate(pair):
            pixels = (picture[..., :3].cpu().clamp(0, 1) * 255).round().byte().numpy()
            place = (MARGIN + column * (width + MARGIN), top + bar)
            image.paste(Image.fromarray(pixels).resize((width, height), Image.LANCZOS), place)
    return as_tensor(image)


def shortened(text: str, font, width: float) -> str:
    """A text cut so that it fits."""
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-4] + "..." if text.endswith("...") else text[:-3] + "..."
    return text
