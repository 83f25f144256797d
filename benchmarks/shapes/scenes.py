"""The world of Shapes: coloured shapes on a light ground, captions that describe them, and pictures of both.

A scene is a fixed function of its caption: fixed places, one size, what has no colour in the caption is grey. So there
is one right picture for each caption, and whatever is wrong in a generated one is the model's fault, or the encoder's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels of a picture's side
RADIUS = 11.0  # of a shape, in pixels
GROUND = (236, 236, 230)
COLOURS = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (40, 80, 214),
    "yellow": (236, 196, 30),
    "purple": (140, 50, 170),
    "orange": (240, 124, 24),
    "grey": (120, 120, 120),
}
NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
}
SHAPES = tuple(NOUNS)
NAMED = tuple(colour for colour in COLOURS if colour != "grey")
NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3", "a group of three"), 4: ("four", "4", "a group of four")}
CENTRE, LEFT, RIGHT, TOP, BOTTOM = (32, 32), (16, 32), (48, 32), (32, 16), (32, 48)
CORNERS = ((16, 16), (48, 16), (16, 48), (48, 48))
PLACES = {2: (LEFT, RIGHT), 3: (CORNERS[0], CORNERS[1], BOTTOM), 4: CORNERS}
TASKS = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
FRAMES = (
    "{}", "{} on a plain background", "a picture of {}", "an image of {}", "a drawing of {}", "a simple drawing of {}",
    "{}, flat colours", "an icon of {}", "a photo of {}", "there is {}", "an illustration of {}",
    "a poster that shows {}", "{} in the picture",     "we see {}", "a small painting of {}",
)  # fmt: skip
WEIGHTS = (0.07, 0.13, 0.21, 0.13, 0.25, 0.21)  # of the tasks in the training captions


@dataclass(frozen=True)
class Thing:
    """One shape in a picture. place: its centre (x, y) in pixels."""

    shape: str
    colour: str
    place: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A caption, the task that it belongs to, and the things that its picture shows."""

    task: str
    caption: str
    scene: tuple[Thing, ...]


def render(scene: Iterable[Thing], samples: int = 4) -> np.ndarray:
    """The picture of a scene, uint8 `[64, 64, 3]`; edges are smoothed over `samples` x `samples` points a pixel."""
    image = np.broadcast_to(np.array(GROUND, dtype=np.float64), (SIZE, SIZE, 3)).copy()
    for thing in scene:
        cover = coverage(thing.shape, thing.place, samples=samples)[..., None]
        image = image * (1 - cover) + np.array(COLOURS[thing.colour]) * cover
    return np.rint(image).astype(np.uint8)


def coverage(shape: str, place: tuple[float, float], radius: float = RADIUS, samples: int = 4) -> np.ndarray:
    """Share of each pixel that a shape covers, float64 `[64, 64]`."""
    points = (np.arange(SIZE * samples) + 0.5) / samples
    x, y = (points[None, :] - place[0]) / radius, (points[:, None] - place[1]) / radius
    inside = {
        "circle": lambda: x**2 + y**2 <= 1,
        "square": lambda: np.maximum(abs(x), abs(y)) <= 0.88,
        "triangle": lambda: (y <= 0.85) & (2.1 * abs(x) <= y + 1.05),
        "cross": lambda: (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1),
    }[shape]()
    return inside.reshape(SIZE, samples, SIZE, samples).mean(axis=(1, 3))


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def plural(noun: str) -> str:
    """Of a shape's noun."""
    return noun + ("es" if noun[-1] in "sx" else "s")


def draw(task: str, rng: random.Random) -> Prompt:
    """A random prompt of a task."""
    return Prompt(task, *DRAWS[task](rng))


def _noun(shape: str, rng: random.Random) -> str:
    return rng.choice(NOUNS[shape])


def _framed(words: str, rng: random.Random) -> str:
    return rng.choice(FRAMES).format(words)


def _single(rng: random.Random):
    shape = rng.choice(SHAPES)
    noun = _noun(shape, rng)
    words = rng.choice((article(noun), f"one {noun}", f"a single {noun}"))
    return _framed(words, rng), (Thing(shape, "grey", CENTRE),)


def _colours(rng: random.Random):
    shape, colour = rng.choice(SHAPES), rng.choice(NAMED)
    noun = _noun(shape, rng)
    words = rng.choice((article(f"{colour} {noun}"), f"one {colour} {noun}", f"a {noun} that is {colour}"))
    return _framed(words, rng), (Thing(shape, colour, CENTRE),)


def _counting(rng: random.Random):
    number, shape, colour = rng.choice(tuple(PLACES)), rng.choice(SHAPES), rng.choice((*NAMED, *["grey"] * 6))
    named = "" if colour == "grey" else f"{colour} "
    words = f"{rng.choice(NUMBERS[number])} {named}{plural(_noun(shape, rng))}"
    return _framed(words, rng), tuple(Thing(shape, colour, place) for place in PLACES[number])


def _beside(a: str, b: str, rng: random.Random) -> str:
    return rng.choice(("{} and {}", "{} with {}", "{} next to {}", "{} beside {}")).format(a, b)


def _two(rng: random.Random):
    first, second = rng.sample(SHAPES, 2)
    words = _beside(article(_noun(first, rng)), article(_noun(second, rng)), rng)
    return _framed(words, rng), (Thing(first, "grey", LEFT), Thing(second, "grey", RIGHT))


def _attribution(rng: random.Random):
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(NAMED, 2)
    names = [article(f"{colour} {_noun(shape, rng)}") for shape, colour in zip(shapes, colours, strict=True)]
    things = zip(shapes, colours, (LEFT, RIGHT), strict=True)
    return _framed(_beside(*names, rng), rng), tuple(Thing(*thing) for thing in things)


RELATIONS = (
    # how it is said, where the first thing named stands, where the second
    ("{} to the left of {}", LEFT, RIGHT),
    ("{} left of {}", LEFT, RIGHT),
    ("{} to the right of {}", RIGHT, LEFT),
    ("{} right of {}", RIGHT, LEFT),
    ("{} above {}", TOP, BOTTOM),
    ("{} over {}", TOP, BOTTOM),
    ("{} below {}", BOTTOM, TOP),
    ("{} under {}", BOTTOM, TOP),
)


def _position(rng: random.Random):
    first, second = rng.sample(SHAPES, 2)
    words, *places = rng.choice(RELATIONS)
    words = words.format(article(_noun(first, rng)), article(_noun(second, rng)))
    return _framed(words, rng), (Thing(first, "grey", places[0]), Thing(second, "grey", places[1]))


DRAWS = dict(zip(TASKS, (_single, _two, _counting, _colours, _position, _attribution), strict=True))


def distinct(task: str, count: int, rng: random.Random, without: Iterable[str] = ()) -> list[Prompt]:
    """Random prompts of a task, no caption twice and none of `without`. Raises ValueError where there aren't enough."""
    seen, found = set(without), []
    for _ in range(200 * count + 1000):
        prompt = draw(task, rng)
        if len(found) == count:
            break
        if prompt.caption not in seen:
            seen.add(prompt.caption)
            found.append(prompt)
    if len(found) < count:
        raise ValueError(f"there are only {len(found)} captions of {task!r}; ask for fewer than {count}")
    return found


def evaluation(per_task: int = 60) -> list[Prompt]:
    """The prompts that pictures are judged on, the same in every run; none is a training or calibration caption."""
    rng = random.Random("shapes evaluation")
    prompts = {task: distinct(task, 60, rng) for task in TASKS}
    return [prompt for task in TASKS for prompt in prompts[task][:per_task]]


def training(count: int, seed: int = 0) -> list[Prompt]:
    """Captions to train on, tasks by WEIGHTS; as many as there are where a task has fewer."""
    rng = random.Random(f"shapes training {seed}")
    held_out, prompts = {p.caption for p in evaluation()}, []
    for task, weight in zip(TASKS, WEIGHTS, strict=True):
        wanted = round(count * weight)
        if task == "single object":  # 315 captions in all
            wanted = min(wanted, 200)
        prompts += distinct(task, wanted, rng, held_out)
    return prompts


def calibration(count: int, seed: int = 0) -> list[str]:
    """Captions for a plan's search, all tasks alike; none is an evaluation caption."""
    rng = random.Random(f"shapes calibration {seed}")
    held_out = {p.caption for p in evaluation()}
    each = [-(-count // len(TASKS))] * len(TASKS)
    found = [distinct(task, n, rng, held_out) for task, n in zip(TASKS, each, strict=True)]
    return [p.caption for row in zip(*found, strict=True) for p in row][:count]
