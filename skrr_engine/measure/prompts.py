"""Calibration prompts: what a search encodes to compare a pruned encoder with the dense one.

The paper calibrates on 1,000 image prompts of 150 to 250 characters (it says tokens, but its printed
examples have 24 to 37 words). `generate` makes such prompts from a seed, `from_file` reads an artist's own.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
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


# fmt: off
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "turquoise", "golden",
    "silver", "crimson", "olive green", "navy blue", "pale blue", "dark green", "lavender", "ivory", "copper",
)
MATERIALS = (
    "wooden", "ceramic", "glass", "brass", "plastic", "stone", "paper", "leather", "porcelain", "woven", "rusty metal",
    "polished steel", "marble", "cardboard", "knitted",
)
QUALITIES = (
    "small", "large", "tiny", "oversized", "old", "shiny", "dusty", "cracked", "striped", "spotted", "round", "tall",
    "antique", "brand-new", "hand-painted", "worn", "transparent", "folded",
)
THINGS = (
    ("cup", "cups"), ("teapot", "teapots"), ("bowl", "bowls"), ("vase", "vases"), ("lamp", "lamps"),
    ("clock", "clocks"), ("suitcase", "suitcases"), ("umbrella", "umbrellas"), ("book", "books"), ("candle", "candles"),
    ("chair", "chairs"), ("bottle", "bottles"), ("basket", "baskets"), ("toy robot", "toy robots"), ("cube", "cubes"),
    ("sphere", "spheres"), ("guitar", "guitars"), ("typewriter", "typewriters"), ("camera", "cameras"),
    ("backpack", "backpacks"), ("hat", "hats"), ("bicycle helmet", "bicycle helmets"), ("box", "boxes"),
    ("telephone", "telephones"), ("kite", "kites"), ("skateboard", "skateboards"), ("key", "keys"), ("drum", "drums"),
    ("wine glass", "wine glasses"), ("picture frame", "picture frames"), ("teddy bear", "teddy bears"),
    ("alarm clock", "alarm clocks"), ("watering can", "watering cans"), ("hourglass", "hourglasses"),
)
SURFACES = (
    "on a kitchen table", "on a marble counter", "on a checkered tablecloth", "on a weathered bench", "on a windowsill",
    "on a concrete floor", "on a mossy rock", "on a velvet cushion", "on a workbench", "on a patterned rug",
    "on the hood of a parked car", "on a stack of old newspapers", "on wet sand", "on a piano", "on a narrow shelf",
)
POSITIONS = (
    "to the left of", "to the right of", "on top of", "behind", "in front of", "next to", "underneath", "above",
    "leaning against", "half hidden behind", "floating above", "far behind", "just below", "directly opposite",
)
ASIDES = ("in the background", "in the foreground", "to the left of them", "to the right of them", "in the far corner")
AGES = ("young", "elderly", "middle-aged", "tall", "smiling", "freckled", "tired", "cheerful", "serious", "bearded")
PEOPLE = (
    ("fisherman", "fishermen"), ("dancer", "dancers"), ("chef", "chefs"), ("astronaut", "astronauts"),
    ("nurse", "nurses"), ("farmer", "farmers"), ("violinist", "violinists"), ("firefighter", "firefighters"),
    ("student", "students"), ("mechanic", "mechanics"), ("gardener", "gardeners"), ("teacher", "teachers"),
    ("cyclist", "cyclists"), ("painter", "painters"), ("scientist", "scientists"), ("busker", "buskers"),
    ("knight", "knights"), ("woman", "women"), ("man", "men"), ("sailor", "sailors"), ("baker", "bakers"),
    ("carpenter", "carpenters"), ("traveler", "travelers"), ("shepherd", "shepherds"),
)
GARMENTS = (
    ("coat", "coats"), ("sweater", "sweaters"), ("apron", "aprons"), ("raincoat", "raincoats"), ("scarf", "scarves"),
    ("dress", "dresses"), ("jacket", "jackets"), ("hat", "hats"), ("uniform", "uniforms"), ("shirt", "shirts"),
    ("robe", "robes"), ("pair of overalls", "pairs of overalls"), ("cape", "capes"), ("vest", "vests"),
)
ACTIVITIES = (
    "repairing an old radio", "reading a newspaper", "carrying a ladder", "feeding pigeons", "drinking tea",
    "playing chess", "painting a wall", "waiting for a train", "looking at a map", "laughing at a joke",
    "holding a lantern", "watching the rain", "sorting fresh vegetables", "tuning a guitar", "pushing a wooden cart",
    "writing in a notebook", "kneading bread dough", "taking a photograph", "crossing a rope bridge", "flying a kite",
    "sweeping the floor", "peeling apples", "pointing at the sky", "dancing barefoot",
)
ANIMALS = (
    ("red fox", "red foxes"), ("tabby cat", "tabby cats"), ("border collie", "border collies"), ("horse", "horses"),
    ("owl", "owls"), ("elephant", "elephants"), ("sea turtle", "sea turtles"), ("rabbit", "rabbits"),
    ("penguin", "penguins"), ("tiger", "tigers"), ("parrot", "parrots"), ("brown bear", "brown bears"),
    ("giraffe", "giraffes"), ("hedgehog", "hedgehogs"), ("goldfish", "goldfish"), ("swan", "swans"),
    ("goat", "goats"), ("frog", "frogs"), ("octopus", "octopuses"), ("crow", "crows"), ("squirrel", "squirrels"),
    ("dachshund", "dachshunds"), ("highland cow", "highland cows"), ("chameleon", "chameleons"),
)
BEHAVIOURS = (
    "sleeping", "playing", "staring into the camera", "looking up", "hiding", "standing very still", "resting",
    "searching for food", "yawning", "moving slowly", "shaking off water", "looking over one shoulder",
)
WEARABLES = (
    "collar", "ribbon", "bow tie", "knitted hat", "bandana", "tiny backpack", "flower crown", "saddle cloth", "scarf",
)
SETTINGS = (
    "in a crowded market", "on a quiet beach", "in an empty theater", "beside a frozen lake", "in a sunlit kitchen",
    "under a stone bridge", "on a rooftop terrace", "in a bamboo forest", "at a small train station", "in a greenhouse",
    "in a narrow alley", "on a snowy mountain path", "in a library with high shelves", "in a field of sunflowers",
    "at the edge of a cliff", "in a workshop full of tools", "on a busy street corner", "in an old subway car",
    "beside a garden pond", "in a desert canyon", "on the deck of a ship", "in a foggy pine forest", "at a fairground",
    "in an abandoned factory", "in a laundromat", "on a village square",
)
PLACES = (
    "lighthouse", "mountain village", "harbor town", "bamboo temple", "city skyline", "desert fortress", "waterfall",
    "railway station", "cathedral", "farmhouse", "glass skyscraper", "windmill", "castle ruin", "floating market",
    "suspension bridge", "tea house", "observatory", "vineyard", "ski lodge", "botanical garden", "space station",
    "canal town", "roadside diner", "amphitheater",
)
PLACE_QUALITIES = (
    "remote", "bustling", "abandoned", "tranquil", "futuristic", "medieval", "crumbling", "colorful", "snow-covered",
    "overgrown", "moonlit", "sleepy", "majestic", "tiny", "sprawling",
)
FEATURES = (
    "laundry hanging between the walls", "a winding stone staircase", "a row of lanterns", "boats tied to a pier",
    "ivy climbing over every surface", "smoke rising from the chimneys", "a flock of birds overhead",
    "a single bicycle near the entrance", "puddles that mirror the sky", "a field of wildflowers in front",
    "distant mountains on the horizon", "a crooked wooden fence", "an old truck parked outside",
    "a clock over the gate", "tall cypress trees on both sides", "a broken statue in the middle",
)
VEHICLES = (
    ("bus", "buses"), ("vintage car", "vintage cars"), ("bicycle", "bicycles"), ("tram", "trams"), ("truck", "trucks"),
    ("sailboat", "sailboats"), ("hot air balloon", "hot air balloons"), ("motorcycle", "motorcycles"),
    ("steam train", "steam trains"), ("scooter", "scooters"), ("taxi", "taxis"), ("canoe", "canoes"),
    ("tractor", "tractors"), ("spaceship", "spaceships"), ("camper van", "camper vans"), ("airplane", "airplanes"),
)
FOODS = (
    ("strawberry", "strawberries"), ("lemon", "lemons"), ("croissant", "croissants"), ("dumpling", "dumplings"),
    ("boiled egg", "boiled eggs"), ("pancake", "pancakes"), ("apple", "apples"), ("cupcake", "cupcakes"),
    ("sushi roll", "sushi rolls"), ("doughnut", "doughnuts"), ("fig", "figs"), ("taco", "tacos"),
    ("slice of cake", "slices of cake"), ("grilled shrimp", "grilled shrimps"), ("olive", "olives"),
    ("cherry tomato", "cherry tomatoes"), ("waffle", "waffles"), ("sandwich", "sandwiches"),
)
DISHES = ("plate", "bowl", "tray", "platter", "basket", "cutting board", "lunch box", "cake stand")
CARRIERS = (
    "sign", "billboard", "neon sign", "book cover", "chalkboard", "T-shirt", "banner", "poster", "coffee mug",
    "wooden plank", "street sign", "shop window", "cardboard sign", "birthday cake", "brick wall", "postage stamp",
    "train ticket", "cereal box",
)
WORDINGS = (
    "OPEN ALL NIGHT", "FRESH BREAD", "Hello World", "NO SWIMMING", "Room 42", "Happy Birthday", "LOST CAT",
    "PLATFORM 9", "Take a Seat", "THE LAST TRAIN", "EXIT", "Coffee First", "Do Not Disturb", "1984", "WELCOME HOME",
    "Keep Left", "SALE 50%", "Once Upon a Time", "GATE 7", "Good Morning", "Mind the Gap", "FISH & CHIPS", "Thank You",
    "BEWARE OF DOG", "JAZZ TONIGHT", "Route 66", "SLOW DOWN", "Handle with Care", "Dream Big", "CLOSED",
)
STYLES = (
    "a photograph", "a watercolor painting", "an oil painting", "a pencil sketch", "a digital illustration",
    "a pixel art image", "a woodblock print", "a claymation still", "a 3D render", "a comic book panel",
    "a charcoal drawing", "a black and white photograph", "an art deco poster", "a paper cut-out collage",
    "an isometric illustration", "a film still", "a stained glass design", "a children's book illustration",
    "an anime scene", "an impressionist painting", "a low-poly render", "a pastel drawing", "a polaroid picture",
)
LIGHTS = (
    "soft morning light", "golden hour light", "harsh midday sun", "neon light", "candlelight", "overcast daylight",
    "moonlight", "dramatic side lighting", "warm lamplight", "cold blue light", "dappled sunlight", "stormy light",
    "bright studio lighting", "the glow of a campfire", "backlight through fog", "the first light of dawn",
)
CAMERAS = (
    "a close-up", "a wide-angle shot", "an aerial view", "a low-angle shot", "a macro shot", "a centered portrait",
    "an eye-level view", "a fisheye view", "a telephoto shot", "a symmetrical view", "a bird's-eye view",
    "a panoramic view", "a long exposure", "a tilted shot",
)
DETAILS = (
    "shallow depth of field", "highly detailed textures", "muted colors", "vivid contrasting colors", "a calm mood",
    "fine film grain", "long shadows", "a mysterious atmosphere", "crisp focus", "visible brush strokes",
    "a nostalgic mood", "drifting snowflakes", "light rain", "dust floating in the air", "a blurred background",
    "plenty of empty space", "reflections on wet ground", "a playful tone", "thick outlines", "a limited color palette",
)
LANGUAGES = (
    # subjects, where they are, how they are pictured: a phrase of each makes a prompt
    (("eine schwarze Katze", "zwei rote Äpfel", "ein alter Fischer", "drei gelbe Kerzen", "ein grünes Fahrrad"),
     ("auf einem Holztisch", "im Regen", "am Strand bei Sonnenuntergang", "vor einer blauen Tür", "im Wald"),
     ("Ölgemälde", "Fotografie", "Aquarell", "Bleistiftzeichnung")),
    (("un chat noir", "deux pommes rouges", "une vieille dame", "trois bougies jaunes", "un vélo vert"),
     ("sur une table en bois", "sous la pluie", "au bord de la mer", "devant une porte bleue", "dans la forêt"),
     ("peinture à l'huile", "photographie", "aquarelle", "dessin au crayon")),
    (("un gato negro", "dos manzanas rojas", "un viejo pescador", "tres velas amarillas", "una bicicleta verde"),
     ("sobre una mesa de madera", "bajo la lluvia", "en la playa al atardecer", "en el bosque"),
     ("pintura al óleo", "fotografía", "acuarela", "dibujo a lápiz")),
    (("чёрная кошка", "два красных яблока", "старый рыбак", "три жёлтые свечи", "зелёный велосипед"),
     ("на деревянном столе", "под дождём", "на берегу моря на закате", "в лесу"),
     ("картина маслом", "фотография", "акварель", "рисунок карандашом")),
    (("一只黑猫", "两个红苹果", "一位老渔夫", "三支黄色的蜡烛", "一辆绿色自行车"),
     ("在木桌上", "在雨中", "在日落的海滩上", "在蓝色的门前", "在森林里"),
     ("油画", "摄影", "水彩画", "铅笔素描")),
    (("黒い猫", "二つの赤いりんご", "年老いた漁師", "三本の黄色いろうそく", "緑の自転車"),
     ("木のテーブルの上", "雨の中", "夕暮れの海辺", "青い扉の前", "森の中"),
     ("油絵", "写真", "水彩画", "鉛筆画")),
)
TAGS = (
    "masterpiece", "best quality", "highly detailed", "8k", "sharp focus", "cinematic lighting", "bokeh", "concept art",
    "trending", "award winning", "intricate", "dynamic pose", "looking at viewer", "full body", "upper body",
    "no humans", "simple background", "outdoors", "solo", "from above",
)
WEIGHTS = ("1.1", "1.2", "1.3", "1.4", "0.8", "0.6")
# fmt: on

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
        return f"{colour} {draw.one(MATERIALS)}"
    return f"{draw.one(QUALITIES)} {colour}"


def _one_or_more(draw: _Draw, noun: Noun, looks: str) -> str:
    return f"{draw.one(NUMBERS)} {looks} {noun[1]}" if draw.below(2) else _a(f"{looks} {noun[0]}")


def _objects(draw: _Draw) -> str:
    first, second, third = (
        _one_or_more(draw, noun, _looks(draw, colour))
        for noun, colour in zip(draw.some(THINGS, 3), draw.some(COLOURS, 3), strict=True)
    )
    placed = f"{first} {draw.one(POSITIONS)} {second}"
    if draw.below(2):
        return f"{placed}, with {third} {draw.one(ASIDES)}"
    return f"{placed} {draw.one(SURFACES)}"


def _counts(draw: _Draw) -> str:
    (_, first), (_, second) = draw.some(THINGS, 2)
    one, two = draw.some(COLOURS, 2)
    counted = f"{draw.one(NUMBERS)} {one} {first} and {draw.one(NUMBERS)} {_looks(draw, two)} {second}"
    return f"{draw.one(('exactly ', '', 'a row of ', 'a group of '))}{counted} {draw.one(SURFACES)}"


def _people(draw: _Draw) -> str:
    person, garment = draw.one(PEOPLE), draw.one(GARMENTS)
    age, colour = draw.one(AGES), draw.one(COLOURS)
    if draw.below(3) == 0:
        who = f"{draw.one(NUMBERS)} {age} {person[1]} in {colour} {garment[1]}"
    else:
        who = f"{_a(f'{age} {person[0]}')} in {_a(f'{colour} {garment[0]}')}"
    return f"{who} {draw.one(ACTIVITIES)} {draw.one(SETTINGS)}"


def _pair(draw: _Draw) -> str:
    (first, _), (second, _) = draw.some(PEOPLE, 2)
    (one, _), (two, _) = draw.some(GARMENTS, 2)
    colour, other = draw.some(COLOURS, 2)
    return (
        f"{_a(f'{draw.one(AGES)} {first}')} in {_a(f'{colour} {one}')} standing {draw.one(POSITIONS[:2])} "
        f"{_a(second)} in {_a(f'{other} {two}')} {draw.one(SETTINGS)}"
    )


def _animals(draw: _Draw) -> str:
    animal, worn = draw.one(ANIMALS), _a(f"{draw.one(COLOURS)} {draw.one(WEARABLES)}")
    doing = f"{draw.one(BEHAVIOURS)} {draw.one(SETTINGS)}"
    if draw.below(2):
        return f"{draw.one(NUMBERS)} {animal[1]}, each wearing {worn}, {doing}"
    return f"{_a(animal[0])} wearing {worn}, {doing}"


def _animal_and_thing(draw: _Draw) -> str:
    thing = _one_or_more(draw, draw.one(THINGS), _looks(draw, draw.one(COLOURS)))
    return f"{_a(draw.one(ANIMALS)[0])} {draw.one(BEHAVIOURS)} {draw.one(POSITIONS[:6])} {thing} {draw.one(SETTINGS)}"


def _lettering(draw: _Draw) -> str:
    carrier = _a(f"{_looks(draw, draw.one(COLOURS))} {draw.one(CARRIERS)}")
    beside = _a(f"{draw.one(COLOURS)} {draw.one(THINGS)[0]}")
    return (
        f"{carrier} {draw.one(('that reads', 'with the words', 'that says'))} '{draw.one(WORDINGS)}' "
        f"{draw.one(POSITIONS[:6])} {beside} {draw.one(SETTINGS)}"
    )


def _places(draw: _Draw) -> str:
    place = _a(f"{draw.one(PLACE_QUALITIES)} {draw.one(PLACES)}")
    return f"{place} with {_listed(draw.some(FEATURES, 2))}"


def _traffic(draw: _Draw) -> str:
    first, second = draw.some(VEHICLES, 2)
    one, two = draw.some(COLOURS, 2)
    vehicle = _one_or_more(draw, first, one)
    place = _a(f"{draw.one(PLACE_QUALITIES)} {draw.one(PLACES)}")
    return f"{vehicle} {draw.one(POSITIONS[:6])} {_a(f'{two} {second[0]}')} near {place}"


def _food(draw: _Draw) -> str:
    (_, first), (_, second) = draw.some(FOODS, 2)
    dish = _a(f"{draw.one(COLOURS)} {draw.one(DISHES)}")
    beside = _a(f"{_looks(draw, draw.one(COLOURS))} {draw.one(THINGS)[0]}")
    return (
        f"{dish} with {draw.one(NUMBERS)} {first} and {draw.one(NUMBERS)} {second}, placed {draw.one(POSITIONS[:6])} "
        f"{beside} {draw.one(SURFACES)}"
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
    parts = {"subject": draw.one(SUBJECTS)(draw), "style": draw.one(STYLES), "light": draw.one(LIGHTS)}
    parts["camera"] = draw.one(CAMERAS)
    parts.update(Style=_sentence(parts["style"]), Camera=_sentence(parts["camera"]))
    form, details = draw.one(FORMS), draw.some(DETAILS, 4)
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
    first, second = (_one_or_more(draw, noun, draw.one(COLOURS)) for noun in draw.some(THINGS, 2))
    bare, other = (_a(noun[0]) for noun in draw.some((*THINGS, *ANIMALS, *PEOPLE, *VEHICLES, *FOODS), 2))
    subject = draw.one(
        (first, bare, f"{bare} {draw.one(POSITIONS)} {other}", f"{first} and {second}", f"{bare} and {other}",
         f"{draw.one(NUMBERS)} {draw.one((*THINGS, *ANIMALS, *PEOPLE, *VEHICLES, *FOODS))[1]}")
    )  # fmt: skip
    forms = ("{}", "{}", "a photo of {}", "a drawing of {}", "{} on a plain background", "a picture of {}")
    return draw.one(forms).format(subject)


def _scene(draw: _Draw) -> str:
    """What a long prompt is about, alone."""
    return draw.one(SUBJECTS)(draw)


def _tagged(draw: _Draw) -> str:
    """Words between commas, some of them weighted as ComfyUI writes it."""
    person, place = draw.one(PEOPLE)[0], draw.one(PLACES)
    words = [f"{draw.one(AGES)} {person}", f"{draw.one(COLOURS)} {draw.one(GARMENTS)[0]}", place, draw.one(LIGHTS)]
    words = [*words, draw.one(STYLES).split(" ", 1)[1], *draw.some(TAGS, 2 + draw.below(6))]
    return ", ".join(f"({w}:{draw.one(WEIGHTS)})" if draw.below(6) == 0 else w for w in draw.some(words, len(words)))


def _foreign(draw: _Draw) -> str:
    """A prompt in another language."""
    return ", ".join(draw.one(part) for part in draw.one(LANGUAGES))


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
