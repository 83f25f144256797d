"""What a picture shows: a detector of coloured shapes that knows nothing of how the picture was made, and the scores.

It is verified on rendered truth, with noise, blur and shifts (tests/test_shapes.py and the table's first line).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .scenes import COLOURS, GROUND, RADIUS, SHAPES, SIZE, Prompt, Thing, coverage

LEAST_AREA = 60  # pixels: a quarter of the smallest shape
CONTRAST = 48.0  # distance from the ground, in sRGB steps, from which a pixel belongs to a thing
LEAST_OVERLAP = 0.6  # intersection over union with the best template, below which a thing is no known shape


def templates() -> dict[str, np.ndarray]:
    """Each shape's mask in the middle of a picture, bool `[64, 64]`."""
    middle = (SIZE // 2, SIZE // 2)
    return {shape: coverage(shape, middle, RADIUS) > 0.5 for shape in SHAPES}


TEMPLATES = templates()


def detect(image: np.ndarray) -> list[Thing]:
    """The things in a picture, uint8 `[64, 64, 3]`; what is no known shape or no known colour is left out.

    A thing is a connected region that differs from the ground; its shape the template with the largest intersection
    over union after the best shift, its colour the nearest to the median of its inner pixels.
    """
    away = np.linalg.norm(image.astype(np.float64) - GROUND, axis=-1)
    regions, count = ndimage.label(away > CONTRAST)
    found = []
    for number in range(1, count + 1):
        region = regions == number
        if region.sum() < LEAST_AREA:
            continue
        shape, place, overlap = best_template(region)
        inner = ndimage.binary_erosion(region)
        colour = nearest(np.median(image[inner if inner.any() else region].astype(np.float64), axis=0))
        if overlap >= LEAST_OVERLAP:
            found.append(Thing(shape, colour, place))
    return found


def best_template(region: np.ndarray) -> tuple[str, tuple[int, int], float]:
    """The shape that a region, bool `[64, 64]`, is most like, the centre of that template, and their overlap."""
    rows, columns = np.nonzero(region)
    y, x = (int(rows.min() + rows.max() + 1) // 2, int(columns.min() + columns.max() + 1) // 2)
    best = ("", (x, y), 0.0)
    for shape, template in TEMPLATES.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                moved = ndimage.shift(template, (y + dy - SIZE // 2, x + dx - SIZE // 2), order=0)
                overlap = float((moved & region).sum() / (moved | region).sum())
                if overlap > best[2]:
                    best = (shape, (x + dx, y + dy), overlap)
    return best


def nearest(colour: np.ndarray) -> str:
    """The name of the nearest colour, in sRGB."""
    return min(COLOURS, key=lambda name: float(np.sum((colour - COLOURS[name]) ** 2)))


def passes(prompt: Prompt, things: Sequence[Thing]) -> bool:
    """Whether a picture does what its task asks, as in GenEval.

    single object, two objects: the shapes are there; counting: exactly so many of the shape; colours, colour
    attribution: a shape of each colour asked for; position: the first thing stands to the right side of the second.
    """
    wanted = prompt.scene
    if prompt.task in ("single object", "two objects"):
        return not Counter(t.shape for t in wanted) - Counter(t.shape for t in things)
    if prompt.task == "counting":
        return sum(t.shape == wanted[0].shape for t in things) == len(wanted)
    if prompt.task in ("colours", "colour attribution"):
        return not Counter((t.shape, t.colour) for t in wanted) - Counter((t.shape, t.colour) for t in things)
    first, second = wanted
    return any(
        beside(a.place, b.place) == beside(first.place, second.place)
        for a in things for b in things
        if a.shape == first.shape and b.shape == second.shape
    )  # fmt: skip


def beside(a: tuple[int, int], b: tuple[int, int]) -> str:
    """On which side of `b` the place `a` is."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def exact(prompt: Prompt, things: Sequence[Thing], slack: float = 6.0) -> bool:
    """Whether a picture is right in every detail: the very things of the scene, each within `slack` pixels."""
    left = list(things)
    for wanted in prompt.scene:
        fits = [
            t for t in left if (t.shape, t.colour) == (wanted.shape, wanted.colour)
            and max(abs(t.place[0] - wanted.place[0]), abs(t.place[1] - wanted.place[1])) <= slack
        ]  # fmt: skip
        if not fits:
            return False
        left.remove(fits[0])
    return not left
