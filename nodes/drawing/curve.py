"""The curve that grows while a search runs: discrepancy against sparsity, as a picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .report import BACKGROUND, COLOURS, FAINT, TEXT

WIDTH, HEIGHT = 480, 260
LEFT, TOP, RIGHT, BOTTOM = 64, 40, 20, 40
"""Pixels around the plot."""


def draw(points: Sequence[tuple[float, float]], target: float, title: str) -> Image.Image:
    """points: (sparsity, discrepancy) after each step so far; target: the sparsity at which the search ends."""
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font, large = ImageDraw.Draw(image), ImageFont.load_default(size=11), ImageFont.load_default(size=14)
    right = max(target, *(x for x, _ in points), 0.01)
    top = max((y for _, y in points), default=0.0) * 1.1 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / right, y / top
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    pen.text((LEFT, 12), title, TEXT, large)
    for part in range(5):
        x, y = right * part / 4, top * part / 4
        pen.line((*place(0, y), *place(right, y)), fill=COLOURS["skipped"])
        pen.text((LEFT - 6, place(0, y)[1]), f"{y:.3g}", FAINT, font, anchor="rm")
        share = f"{x:.0%}" if right >= 0.2 else f"{x:.1%}"
        pen.text((place(x, 0)[0], HEIGHT - BOTTOM + 6), share, FAINT, font, anchor="mt")
    pen.text((WIDTH - RIGHT, HEIGHT - 12), "removed", FAINT, font, anchor="rm")
    pen.text((8, TOP - 8), "D", FAINT, font, anchor="lm")
    pen.line((*place(target, 0), *place(target, top)), fill=COLOURS["re-used"])
    spots = [place(x, y) for x, y in [(0.0, 0.0), *points]]
    pen.line([c for spot in spots for c in spot], fill=COLOURS["kept"], width=2)
    for x, y in spots[1:]:
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=COLOURS["kept"])
    return image
