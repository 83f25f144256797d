"""A memory report in words and as a picture."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...skrr_engine.encoder.actions import KEEP
from ...skrr_engine.plan.words import in_words

COLOURS = {
    "kept": (70, 130, 180), "skipped": (48, 48, 52), "re-used": (230, 160, 60), "stand-in": (0, 160, 120),
    "narrowed": (70, 130, 180),
}  # fmt: skip
"""Told apart by the colour-blind, too: blue, near black, orange, bluish green."""

BACKGROUND, TEXT, FAINT = (24, 24, 27), (235, 235, 235), (150, 150, 155)
CELL, GAP, MARGIN = 22, 3, 16


def human(count: int) -> str:
    """Bytes as people say them, in powers of ten as file sizes are."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return f"{count} bytes"


def share(part: int, whole: int) -> str:
    """Part of a whole in percent."""
    return f"{part / whole:.1%}" if whole else "0 %"


def as_text(encoders, others: dict[str, int], loaded: int, model=None) -> str:
    """Bytes of each encoder dense, now and saved, where they are, its part of the pipeline, a map of its sub-blocks.

    encoders: host.memory.EncoderMemory; others: name -> bytes of the pipeline's other models (0 where not connected);
    loaded: bytes that ComfyUI counts as loaded for the encoders; model: host.memory.Packing of the diffusion model.
    """
    dense = sum(e.dense for e in encoders)
    now = sum(e.now for e in encoders)
    rest = sum(others.values())
    lines = []
    for e in encoders:
        lines += [headline(e), *map_lines(e), *packed_lines(e.packed), places(e)]
        if e.idle:
            lines.append(
                f"  {human(e.idle)} of removed weights stay in RAM while the loader's CLIP is cached;"
                " use Load CLIP (Skrr) to never load them"
            )
    lines.append(f"text encoders: {human(now)} of {human(dense)}, saved {human(dense - now)}; loaded: {human(loaded)}")
    for name, count in others.items():
        if count:
            lines += [f"{name}: {human(count)}", *(packed_lines(model) if name == "model" and model else [])]
    if rest:
        lines.append(
            f"whole pipeline: {human(now + rest)} of {human(dense + rest)};"
            f" text encoders are {share(now, now + rest)} of it, {share(dense, dense + rest)} without Skrr"
        )
    seconds = next((e.seconds for e in encoders if e.seconds is not None), None)
    return "\n".join(lines + ([f"last prompt encoded in {seconds:.2f} s"] if seconds is not None else []))


def headline(e) -> str:
    """One encoder in a line."""
    saved = f"saved {human(e.saved)} ({share(e.saved, e.dense)})"
    return f"{e.name}: {human(e.now)} of {human(e.dense)}, {saved}, {e.precision}"


def packed_lines(packing) -> list[str]:
    """What is stored without its zeros, nothing where that is none."""
    if not packing.layers:
        return []
    count, gone = packing.layers, f"{packing.sparsity:.1%}"
    return [f"  packed: {count} layers, {gone} of their weights gone, {human(packing.saved)} less than dense"]


def places(e) -> str:
    """Where an encoder's bytes are."""
    disk = f"; file {human(e.disk)}" if e.disk else ""
    return f"  in RAM {human(e.ram)}, in VRAM {human(e.vram)}{disk}"


def state_of(encoder, index: int) -> tuple[str, int | None]:
    """What is at a sub-block's place: kept, narrowed, skipped, a stand-in, or re-used, and then which one is."""
    removed = encoder.pruned.removed if encoder.pruned else {}
    action = removed.get(index, KEEP)
    return action.word, action.target


def shares_of(encoder) -> dict:
    """Removed or narrowed sub-block -> the share of its units that stays."""
    return encoder.pruned.shares if encoder.pruned else {}


def map_lines(encoder) -> list[str]:
    """Attention above feed-forward, one sign a block: `#` kept, `0` to `9` narrowed to so many tenths, `.` skipped, `r`
    re-used, `~` a stand-in; then who re-uses whom, and what the stand-ins take."""
    signs = {"kept": "#", "skipped": ".", "re-used": "r", "stand-in": "~"}
    shares = shares_of(encoder)
    lines = []
    for kind, label in enumerate(("attention   ", "feed-forward")):
        places = range(kind, 2 * encoder.blocks, 2)
        states = [(state_of(encoder, place)[0], shares.get(place)) for place in places]
        row = "".join(str(int(10 * share)) if state == "narrowed" else signs[state] for state, share in states)
        lines.append(f"  {label} {row}")
    narrowed = [share for place, share in shares.items() if state_of(encoder, place)[0] == "narrowed"]
    if narrowed:
        mean = sum(map(float, narrowed)) / len(narrowed)
        lines.append(f"  narrowed: {len(narrowed)} (0 to 9, tenths that stay), to {mean:.0%} on average")
    pairs = [(i, state_of(encoder, i)[1]) for i in range(2 * encoder.blocks)]
    told = [f"{'feed-forward' if i % 2 else 'attention'} {i // 2} by {j // 2}" for i, j in pairs if j is not None]
    if told:
        lines.append("  stood in for: " + ", ".join(told))
    if encoder.pruned and encoder.pruned.standins:
        rank = in_words(standin.rank for standin in encoder.pruned.standins.values())
        count, size = len(encoder.pruned.standins), human(encoder.pruned.standin_bytes)
        lines.append(f"  repaired by linear stand-ins: {count} (~), {rank}, {size}")
    return lines


def as_image(encoders, others: dict[str, int]) -> torch.Tensor:
    """The report as a picture, `[1, height, width, 3]`, 0 to 1."""
    font, small = ImageFont.load_default(size=16), ImageFont.load_default(size=11)
    widest = max(e.blocks for e in encoders)
    width = max(2 * MARGIN + 110 + widest * (CELL + GAP), 640)
    height = 2 * MARGIN + len(encoders) * (2 * (CELL + GAP) + 78) + 64
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    for e in encoders:
        draw.text(
            (MARGIN, y), f"{e.name}   {human(e.now)} of {human(e.dense)}   saved {share(e.saved, e.dense)}", TEXT, font
        )
        y += 26
        draw_bar(draw, y, width, e.now, max(x.dense for x in encoders), e.dense)
        y += 16
        for kind, label in enumerate(("attention", "feed-forward")):
            draw.text((MARGIN, y + 4), label, FAINT, small)
            for block in range(e.blocks):
                place = 2 * block + kind
                stays = float(shares_of(e).get(place, 1))
                draw_cell(draw, MARGIN + 90 + block * (CELL + GAP), y, *state_of(e, place), block, small, stays)
            y += CELL + GAP
        y += 36
    dense, now, rest = sum(e.dense for e in encoders), sum(e.now for e in encoders), sum(others.values())
    total = f"text encoders {human(now)} of {human(dense)}, saved {human(dense - now)}"
    if rest:
        total += f"; whole pipeline {human(now + rest)} of {human(dense + rest)}"
    draw.text((MARGIN, y), total, TEXT, font)
    draw_legend(draw, y + 28, small)
    return as_tensor(image)


def as_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)[None]


def draw_bar(draw, y: int, width: int, now: int, longest: int, dense: int) -> None:
    """What is left of an encoder on what it was, all encoders at one scale."""
    full = width - 2 * MARGIN
    for size, colour in ((dense, COLOURS["skipped"]), (now, COLOURS["kept"])):
        draw.rectangle((MARGIN, y, MARGIN + max(1, full * size // max(longest, 1)), y + 8), fill=colour)


def draw_cell(draw, x: int, y: int, state: str, stand_in: int | None, block: int, font, stays: float = 1.0) -> None:
    """One sub-block: its block's number, or the number of the block that stands in; a narrowed one is filled to the
    share of its units that stays."""
    narrowed = state == "narrowed"
    draw.rectangle((x, y, x + CELL, y + CELL), fill=COLOURS["skipped" if narrowed else state])
    if narrowed:
        draw.rectangle((x, y + round(CELL * (1 - stays)), x + CELL, y + CELL), fill=COLOURS["narrowed"])
    text = {"skipped": "", "stand-in": "~"}.get(state, str(block if stand_in is None else stand_in // 2))
    draw.text((x + CELL // 2, y + CELL // 2), text, (0, 0, 0) if state == "re-used" else TEXT, font, anchor="mm")


def draw_legend(draw, y: int, font) -> None:
    """What the colours mean."""
    x = MARGIN
    reused = "re-uses the block of that number"
    told = {
        "kept": "kept", "narrowed": "narrowed to what is filled", "skipped": "skipped", "re-used": reused,
        "stand-in": "stand-in",
    }  # fmt: skip
    for state, words in told.items():
        top = y + 6 if state == "narrowed" else y
        draw.rectangle((x, y, x + 12, y + 12), fill=COLOURS["skipped"])
        draw.rectangle((x, top, x + 12, y + 12), fill=COLOURS[state])
        draw.text((x + 18, y), words, FAINT, font)
        x += 32 + int(font.getlength(words))
