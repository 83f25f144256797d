"""Calibration prompts: what a search encodes to compare a pruned encoder with the dense one.

The paper calibrates on 1,000 image prompts of 150 to 250 characters (it says tokens, but its printed
examples have 24 to 37 words). `generate` makes such prompts from a seed, `from_file` reads an artist's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

from ..errors import SkrrError

MIN_LENGTH = 150
MAX_LENGTH = 250
MAX_PROMPTS = 100_000
MAX_LINE = 10_000
MAX_FILE_BYTES = 64 * 2**20
MAX_IN_VAIN = 20_000
"""Prompts drawn in a row without a new one among them, after which there is none left."""

T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")


class PromptError(SkrrError):
    """Calibration prompts that can't be used. The message is one line."""


WORDS = SimpleNamespace(**json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8")))
"""What prompts are made of, by kind. A pair is a noun's singular and plural; a language, its subjects, where they are
and how they are pictured: a phrase of each makes a prompt."""

Noun = tuple[str, str]


class _Draw:
    """A seeded choice that gives the same sequence on every Python: it uses nothing of `Random` but `random()`."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def one(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different choices."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _looks(draw: _Draw, colour: str) -> str:
    if draw.below(2):
        return f"{colour} {draw.one(WORDS.materials)}"
    return f"{draw.one(WORDS.qualities)} {colour}"


def _one_or_more(draw: _Draw, noun: Noun, looks: str) -> str:
    return f"{draw.one(WORDS.numbers)} {looks} {noun[1]}" if draw.below(2) else _a(f"{looks} {noun[0]}")


def _objects(draw: _Draw) -> str:
    first, second, third = (
        _one_or_more(draw, noun, _looks(draw, colour))
        for noun, colour in zip(draw.some(WORDS.things, 3), draw.some(WORDS.colours, 3), strict=True)
    )
    placed = f"{first} {draw.one(WORDS.positions)} {second}"
    if draw.below(2):
        return f"{placed}, with {third} {draw.one(WORDS.asides)}"
    return f"{placed} {draw.one(WORDS.surfaces)}"


def _counts(draw: _Draw) -> str:
    (_, first), (_, second) = draw.some(WORDS.things, 2)
    one, two = draw.some(WORDS.colours, 2)
    counted = f"{draw.one(WORDS.numbers)} {one} {first} and {draw.one(WORDS.numbers)} {_looks(draw, two)} {second}"
    return f"{draw.one(('exactly ', '', 'a row of ', 'a group of '))}{counted} {draw.one(WORDS.surfaces)}"


def _people(draw: _Draw) -> str:
    person, garment = draw.one(WORDS.people), draw.one(WORDS.garments)
    age, colour = draw.one(WORDS.ages), draw.one(WORDS.colours)
    if draw.below(3) == 0:
        who = f"{draw.one(WORDS.numbers)} {age} {person[1]} in {colour} {garment[1]}"
    else:
        who = f"{_a(f'{age} {person[0]}')} in {_a(f'{colour} {garment[0]}')}"
    return f"{who} {draw.one(WORDS.activities)} {draw.one(WORDS.settings)}"


def _pair(draw: _Draw) -> str:
    (first, _), (second, _) = draw.some(WORDS.people, 2)
    (one, _), (two, _) = draw.some(WORDS.garments, 2)
    colour, other = draw.some(WORDS.colours, 2)
    return (
        f"{_a(f'{draw.one(WORDS.ages)} {first}')} in {_a(f'{colour} {one}')} standing {draw.one(WORDS.positions[:2])} "
        f"{_a(second)} in {_a(f'{other} {two}')} {draw.one(WORDS.settings)}"
    )


def _animals(draw: _Draw) -> str:
    animal, worn = draw.one(WORDS.animals), _a(f"{draw.one(WORDS.colours)} {draw.one(WORDS.wearables)}")
    doing = f"{draw.one(WORDS.behaviours)} {draw.one(WORDS.settings)}"
    if draw.below(2):
        return f"{draw.one(WORDS.numbers)} {animal[1]}, each wearing {worn}, {doing}"
    return f"{_a(animal[0])} wearing {worn}, {doing}"


def _animal_and_thing(draw: _Draw) -> str:
    thing = _one_or_more(draw, draw.one(WORDS.things), _looks(draw, draw.one(WORDS.colours)))
    animal, doing = _a(draw.one(WORDS.animals)[0]), draw.one(WORDS.behaviours)
    return f"{animal} {doing} {draw.one(WORDS.positions[:6])} {thing} {draw.one(WORDS.settings)}"


def _lettering(draw: _Draw) -> str:
    carrier = _a(f"{_looks(draw, draw.one(WORDS.colours))} {draw.one(WORDS.carriers)}")
    beside = _a(f"{draw.one(WORDS.colours)} {draw.one(WORDS.things)[0]}")
    return (
        f"{carrier} {draw.one(('that reads', 'with the words', 'that says'))} '{draw.one(WORDS.wordings)}' "
        f"{draw.one(WORDS.positions[:6])} {beside} {draw.one(WORDS.settings)}"
    )


def _places(draw: _Draw) -> str:
    place = _a(f"{draw.one(WORDS.place_qualities)} {draw.one(WORDS.places)}")
    return f"{place} with {_listed(draw.some(WORDS.features, 2))}"


def _traffic(draw: _Draw) -> str:
    first, second = draw.some(WORDS.vehicles, 2)
    one, two = draw.some(WORDS.colours, 2)
    vehicle = _one_or_more(draw, first, one)
    place = _a(f"{draw.one(WORDS.place_qualities)} {draw.one(WORDS.places)}")
    return f"{vehicle} {draw.one(WORDS.positions[:6])} {_a(f'{two} {second[0]}')} near {place}"


def _food(draw: _Draw) -> str:
    (_, first), (_, second) = draw.some(WORDS.foods, 2)
    dish = _a(f"{draw.one(WORDS.colours)} {draw.one(WORDS.dishes)}")
    beside = _a(f"{_looks(draw, draw.one(WORDS.colours))} {draw.one(WORDS.things)[0]}")
    return (
        f"{dish} with {draw.one(WORDS.numbers)} {first} and {draw.one(WORDS.numbers)} {second}, "
        f"placed {draw.one(WORDS.positions[:6])} {beside} {draw.one(WORDS.surfaces)}"
    )


SUBJECTS = (
    _objects, _counts, _people, _pair, _animals, _animal_and_thing, _lettering, _places, _traffic, _food,
)  # fmt: skip
FORMS = (
    "{style} of {subject}, {camera} lit by {light}, with {details}",
    "{subject}. {Style} lit by {light}. {Camera} with {details}.",
    "{subject}, {style}, {camera}, {light}, {details}",
    "{camera} of {subject}, lit by {light}. The picture is {style} with {details}.",
)


def _prompt(draw: _Draw) -> str:
    """One prompt with as few details as reach the least length; it may come out too long."""
    parts = {"subject": draw.one(SUBJECTS)(draw), "style": draw.one(WORDS.styles), "light": draw.one(WORDS.lights)}
    parts["camera"] = draw.one(WORDS.cameras)
    parts.update(Style=_sentence(parts["style"]), Camera=_sentence(parts["camera"]))
    form, details = draw.one(FORMS), draw.some(WORDS.details, 4)
    text = ""
    for count in range(1, len(details) + 1):
        text = _sentence(form.format(**parts, details=_listed(details[:count])))
        if len(text) >= MIN_LENGTH:
            break
    return text


def _sentence(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def generate(count: int = 1000, seed: int = 0) -> list[str]:
    """`count` different image prompts of 150 to 250 characters, the same for a seed on every Python and platform.

    A longer list starts with the shorter one: `generate(10) == generate(1000)[:10]`. Raises PromptError where count is
    not from 0 to 100,000.
    """
    draw = _Draw(seed)
    return _different(lambda: _prompt(draw), count, lambda prompt: MIN_LENGTH <= len(prompt) <= MAX_LENGTH)


def _short(draw: _Draw) -> str:
    """A caption of a few words."""
    first, second = (_one_or_more(draw, noun, draw.one(WORDS.colours)) for noun in draw.some(WORDS.things, 2))
    nouns = (*WORDS.things, *WORDS.animals, *WORDS.people, *WORDS.vehicles, *WORDS.foods)
    bare, other = (_a(noun[0]) for noun in draw.some(nouns, 2))
    subject = draw.one(
        (first, bare, f"{bare} {draw.one(WORDS.positions)} {other}", f"{first} and {second}", f"{bare} and {other}",
         f"{draw.one(WORDS.numbers)} {draw.one(nouns)[1]}")
    )  # fmt: skip
    forms = ("{}", "{}", "a photo of {}", "a drawing of {}", "{} on a plain background", "a picture of {}")
    return draw.one(forms).format(subject)


def _scene(draw: _Draw) -> str:
    """What a long prompt is about, alone."""
    return draw.one(SUBJECTS)(draw)


def _tagged(draw: _Draw) -> str:
    """Words between commas, some of them weighted as ComfyUI writes it."""
    person, place = draw.one(WORDS.people)[0], draw.one(WORDS.places)
    words = [
        f"{draw.one(WORDS.ages)} {person}",
        f"{draw.one(WORDS.colours)} {draw.one(WORDS.garments)[0]}",
        place,
        draw.one(WORDS.lights),
    ]
    words = [*words, draw.one(WORDS.styles).split(" ", 1)[1], *draw.some(WORDS.tags, 2 + draw.below(6))]
    return ", ".join(
        f"({w}:{draw.one(WORDS.weights)})" if draw.below(6) == 0 else w for w in draw.some(words, len(words))
    )


def _foreign(draw: _Draw) -> str:
    """A prompt in another language."""
    return ", ".join(draw.one(part) for part in draw.one(WORDS.languages))


def _long(draw: _Draw) -> str:
    """Two prompts in one."""
    return f"{_prompt(draw)} {_prompt(draw)}"


KINDS = {
    "long prompts": (_prompt, 6),
    "captions": (_short, 6),
    "scenes": (_scene, 3),
    "tags and weights": (_tagged, 2),
    "other languages": (_foreign, 2),
    "two prompts in one": (_long, 1),
}
"""Kind of prompt -> what draws one, and its share among `broad` ones."""


def broad(count: int = 1000, seed: int = 0) -> list[str]:
    """`count` different prompts of all kinds that artists write: long and short ones, tags, weights, lettering, other
    languages. For what learns from prompts (standin.py) and must not meet a kind that it has never seen.

    The same for a seed everywhere; a longer list starts with the shorter one. Raises PromptError as `generate` does.
    """
    draw, kinds = _Draw(seed), tuple(kind for kind, share in KINDS.values() for _ in range(share))
    return _different(lambda: draw.one(kinds)(draw), count)


def of_kind(kind: str, count: int, seed: int = 0) -> list[str]:
    """`count` different prompts of one of KINDS; otherwise as `broad`. Raises PromptError where there are fewer."""
    draw, kinds = _Draw(seed), (KINDS[kind][0],)
    return _different(lambda: draw.one(kinds)(draw), count)


def _different(make: Callable[[], str], count: int, fits: Callable[[str], bool] = lambda prompt: True) -> list[str]:
    """So many different ones of what `make` gives and `fits` lets through, in the order in which they come first."""
    if not 0 <= count <= MAX_PROMPTS:
        raise PromptError(f"count: expected 0 to {MAX_PROMPTS} prompts, found {count}; ask for fewer")
    prompts: dict[str, None] = {}
    in_vain = 0
    while len(prompts) < count:
        prompt = make()
        in_vain = in_vain + 1 if prompt in prompts or not fits(prompt) else 0
        if in_vain > MAX_IN_VAIN:
            raise PromptError(f"count: there are only {len(prompts)} different prompts of this kind; ask for fewer")
        if not in_vain:
            prompts[prompt] = None
    return list(prompts)


def segments(prompt: str) -> list[str]:
    """A prompt in the parts that ComfyUI tokenises one by one: what is in parentheses apart from what is not, without
    its weight, as in `a (red:1.2) cube`; escaped parentheses are text."""
    found, left = [], [(prompt.replace("\\)", "\0\1").replace("\\(", "\0\2"), True)]
    while left:
        text, group = left.pop()
        if not group:
            found.append(text.replace("\0\1", ")").replace("\0\2", "("))
            continue
        for part in reversed(_split(text)):
            group = len(part) > 1 and part[0] == "(" and part[-1] == ")"
            left.append((_unweighted(part[1:-1]) if group else part, group))
    return found


def _split(text: str) -> list[str]:
    """A text cut before and behind its outermost pairs of parentheses."""
    parts, start, depth = [], 0, 0
    for place, letter in enumerate(text):
        if letter == "(":
            if depth == 0:
                parts.append(text[start:place])
                start = place
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[start : place + 1])
                start = place + 1
    return [part for part in (*parts, text[start:]) if part]


def _unweighted(text: str) -> str:
    """What stands in parentheses, without `:1.2` at its end."""
    before, _, weight = text.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return text
    return before or text


def from_text(text: str) -> list[str]:
    """The prompts in a text, one a line, stripped and without blank lines.

    Raises PromptError where none is left, where one is longer than 10,000 characters, where there are more than
    100,000, or where the text holds NUL or broken characters.
    """
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    prompts = []
    for number, line in enumerate(lines, 1):
        if prompt := line.strip():
            _check_line(prompt, number)
            prompts.append(prompt)
    if not prompts:
        raise PromptError("the prompts: expected at least one line of text, found none; write one prompt a line")
    if len(prompts) > MAX_PROMPTS:
        raise PromptError(f"the prompts: expected at most {MAX_PROMPTS}, found {len(prompts)}; leave some out")
    return prompts


def _check_line(prompt: str, number: int) -> None:
    if len(prompt) > MAX_LINE:
        found = f"expected at most {MAX_LINE} characters, found {len(prompt)}"
        raise PromptError(f"the prompts: line {number}: {found}; write one prompt a line")
    if "\0" in prompt or _SURROGATE.search(prompt):
        raise PromptError(f"the prompts: line {number}: expected text, found broken characters; save the file as UTF-8")


def from_file(path: str | os.PathLike[str]) -> list[str]:
    """The prompts in a UTF-8 file of at most 64 MiB, read as `from_text` does. Raises PromptError, also for no file."""
    name = str(Path(path)).encode("unicode_escape").decode("ascii")
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PromptError(f"{name}: cannot be read ({error.strerror}); choose a text file of prompts") from None
    if len(raw) > MAX_FILE_BYTES:
        raise PromptError(f"{name}: expected at most {MAX_FILE_BYTES} bytes, found more; leave some prompts out")
    try:
        return from_text(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PromptError(f"{name}: expected UTF-8, found another byte at {error.start}; save it as UTF-8") from None
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from None


def sha256(prompts: Sequence[str]) -> str:
    """The hash that a plan's provenance holds: 64 hexadecimal digits of the prompts' UTF-8, joined by line feeds."""
    return hashlib.sha256("\n".join(prompts).encode("utf-8")).hexdigest()
