"""What all parts of the proof share: the card and its memory, sizes, files of random weights, lines of results."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAN, SPARSITY = "pixart-sigma", 0.42
GB = 1e9


def emit(**line) -> None:
    """One line of results, at once."""
    print(json.dumps(rounded(line)), flush=True)


def rounded(value):
    """Numbers with five digits; what JSON has no word for as text."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def target(name: str, value: float | None, wanted: float, at_most: bool) -> dict:
    """A target beside its number, as the page shows it."""
    met = None if value is None else bool(value <= wanted if at_most else value >= wanted)
    return {"name": name, "value": value, "wanted": wanted, "at_most": at_most, "met": met}


@dataclass(frozen=True)
class T5:
    """Sizes of a T5 encoder."""

    width: int = 4096
    ffn: int = 10240
    heads: int = 64
    d_kv: int = 64
    vocab: int = 32128
    blocks: int = 24

    @property
    def config(self) -> dict:
        """As ComfyUI's configuration names them."""
        return {"d_model": self.width, "d_ff": self.ffn, "d_kv": self.d_kv, "num_heads": self.heads,
                "num_layers": self.blocks, "vocab_size": self.vocab}  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of its file."""
        inner = self.heads * self.d_kv
        found = {"shared.weight": (self.vocab, self.width), "encoder.final_layer_norm.weight": (self.width,)}
        for block in range(self.blocks):
            attention, feed_forward = f"encoder.block.{block}.layer.0.", f"encoder.block.{block}.layer.1."
            found |= {f"{attention}SelfAttention.{name}.weight": (inner, self.width) for name in "qkv"}
            found[f"{attention}SelfAttention.o.weight"] = (self.width, inner)
            found |= {f"{feed_forward}DenseReluDense.wi_{n}.weight": (self.ffn, self.width) for n in (0, 1)}
            found[f"{feed_forward}DenseReluDense.wo.weight"] = (self.width, self.ffn)
            found |= {f"{before}layer_norm.weight": (self.width,) for before in (attention, feed_forward)}
        found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, self.heads)
        return found


XXL = T5()
"""T5-XXL v1.1."""

SMALL = {"old": T5(4096, 16, 2, 4, 64), "new": T5(32, 10240, 2, 4, 64)}
"""For a rehearsal: with the one size by which ComfyUI 0.3.75 (a later one) takes a file for T5-XXL's."""


class Card:
    """The GPU, or, in a rehearsal, the CPU in its place: then there is no memory to measure."""

    def __init__(self, rehearse: bool):
        import torch

        self.torch, self.rehearse = torch, rehearse
        self.cuda = torch.cuda.is_available() and not rehearse
        self.device = torch.device("cuda" if self.cuda else "cpu")
        if not (self.cuda or rehearse):
            raise SystemExit("torch sees no CUDA device here: --rehearse runs the same on the CPU, with small shapes")

    @property
    def name(self) -> str:
        return self.torch.cuda.get_device_name() if self.cuda else "rehearsal"

    def targets(self, *found: dict) -> list[dict]:
        """Targets, which a rehearsal has none of."""
        return list(found) if self.cuda else []

    @property
    def total(self) -> int:
        """Bytes of its memory."""
        return self.torch.cuda.get_device_properties(0).total_memory if self.cuda else 1 << 34

    def sync(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes in torch's tensors."""
        return self.torch.cuda.memory_allocated() if self.cuda else 0

    def used(self) -> int:
        """Bytes of the card that are taken, by whatever."""
        if not self.cuda:
            return 0
        free, total = self.torch.cuda.mem_get_info()
        return total - free

    def clean(self) -> None:
        """Give back what nothing holds any more, and let a peak start anew."""
        gc.collect()
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def reset_peak(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most bytes in torch's tensors since `reset_peak`."""
        return self.torch.cuda.max_memory_allocated() if self.cuda else 0

    @contextlib.contextmanager
    def limited(self, size: int) -> Iterator[None]:
        """As if the card had only so many bytes."""
        if self.cuda:
            self.clean()
            self.torch.cuda.set_per_process_memory_fraction(min(size / self.total, 1.0))
        try:
            yield
        finally:
            if self.cuda:
                self.torch.cuda.set_per_process_memory_fraction(1.0)
                self.clean()

    @contextlib.contextmanager
    def crowded(self, leave: int) -> Iterator[None]:
        """With so much of the card held by something else that only `leave` bytes are free."""
        ballast = None
        if self.cuda:
            self.clean()
            size = int(self.torch.cuda.mem_get_info()[0] - leave)
            ballast = self.torch.empty(max(size, 0), dtype=self.torch.uint8, device=self.device)
        try:
            yield
        finally:
            del ballast
            self.clean()

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, int]]:
        """Peaks of what happens inside, in the dictionary it gives: `tensors` (torch's own count) and `used` (of the
        whole card, looked at every 2 ms: what is not torch's, as ComfyUI's dynamic VRAM, is seen only so)."""
        found = {"tensors": 0, "used": 0}
        self.reset_peak()
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.002):
                found["used"] = max(found["used"], self.used())

        thread = threading.Thread(target=look, daemon=True)
        if self.cuda:
            thread.start()
        try:
            yield found
        finally:
            self.sync()
            over.set()
            if self.cuda:
                thread.join()
            found["tensors"], found["used"] = self.peak(), max(found["used"], self.used())

    def seconds(self, act: Callable[[], object], times: int = 10) -> float:
        """The median of what `act` takes; it runs once more before that."""
        act()
        self.sync()
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            act()
            self.sync()
            taken.append(time.perf_counter() - start)
        return sorted(taken)[len(taken) // 2]


def scratch(size: int) -> Path:
    """A folder with room for so many bytes, in RAM where that is possible."""
    import shutil
    import tempfile

    for place in ("/dev/shm", tempfile.gettempdir()):
        if os.path.isdir(place) and shutil.disk_usage(place).free > size * 1.2:
            folder = Path(place) / f"skrr-gpu-{os.environ.get('SKRR_GPU_RUN', os.getpid())}"
            folder.mkdir(exist_ok=True)
            return folder
    raise OSError(f"no room for {size / GB:.1f} GB, neither in /dev/shm nor in {tempfile.gettempdir()}")


def gains(sizes: T5) -> list[float]:
    """How much each sub-block's output counts: sub-blocks of trained encoders matter to very different degrees."""
    import random

    draw = random.Random(0)
    return [10 ** draw.uniform(-1.0, 0.0) for _ in range(2 * sizes.blocks)]


def values(card: Card, key: str, shape: tuple[int, ...], generator, gain: list[float]):
    """Random weights of one of T5's tensors, float32 on the card."""
    torch = card.torch
    if len(shape) == 1:
        return torch.ones(shape, device=card.device)
    noise = torch.randn(shape, generator=generator, device=card.device)
    if key == "shared.weight":
        return noise
    scale = 0.5 if "relative_attention_bias" in key else shape[-1] ** -0.5
    if key.endswith((".o.weight", ".wo.weight")):
        _, _, block, _, layer, *_ = key.split(".")
        scale *= gain[2 * int(block) + int(layer)]
    return noise.mul_(scale)


def t5_file(card: Card, sizes: T5, kind: str, folder: Path) -> Path:
    """A safetensors file of T5 with random weights, made on the card: `fp16`, `fp8` or `scaled_fp8` (each weight in fp8
    with a scale beside it and a marker, as artists have them)."""
    torch = card.torch
    from skrr_engine.disk.safetensors import Entry, write

    folder = folder / f"{sizes.width}x{sizes.ffn}"
    folder.mkdir(exist_ok=True)
    path = folder / f"t5xxl_{kind}.safetensors"
    if path.exists():
        return path
    scaled = {k for k in sizes.shapes() if kind == "scaled_fp8" and k.endswith(tuple(f".{n}.weight" for n in LINEARS))}
    entries = {"scaled_fp8": Entry("F8_E4M3", (0,))} if scaled else {}
    for key, shape in sizes.shapes().items():
        eight = key in scaled or kind == "fp8"
        entries[key] = Entry("F8_E4M3" if eight else "F16", shape)
        if key in scaled:
            entries[key.removesuffix("weight") + "scale_weight"] = Entry("F32", ())
    generator, gain, partial = torch.Generator(card.device).manual_seed(0), gains(sizes), path.with_suffix(".part")
    with open(partial, "wb") as file:
        file.write(write(entries, {"format": "pt"}))
        for key, shape in sizes.shapes().items():
            t = values(card, key, shape, generator, gain)
            scale = t.abs().max() / 448 if key in scaled else None
            t = t if scale is None else t / scale
            t = t.to(torch.float8_e4m3fn if entries[key].dtype == "F8_E4M3" else torch.float16)
            file.write(raw(t))
            if scale is not None:
                file.write(raw(scale))
    partial.rename(path)
    return path


LINEARS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
"""The linear layers of a T5 block."""


def raw(t) -> memoryview:
    """A tensor's bytes."""
    import torch

    return memoryview(t.reshape(-1).view(torch.uint8).cpu().numpy())


def t5_on_card(card: Card, sizes: T5, dtype):
    """transformers' T5 encoder with random weights, made on the card."""
    torch = card.torch
    from skrr_engine.files.folder import import_transformers

    transformers = import_transformers()
    config = transformers.T5Config(
        **sizes.config, relative_attention_num_buckets=32, feed_forward_proj="gated-gelu", use_cache=False
    )
    with torch.device("meta"):
        module = transformers.T5EncoderModel(config)
    module = module.to(dtype).to_empty(device=card.device).eval().requires_grad_(False)
    module.tie_weights()
    generator, gain, shapes = torch.Generator(card.device).manual_seed(0), gains(sizes), sizes.shapes()
    own = module.state_dict(keep_vars=True)
    for key, shape in shapes.items():
        own[key].copy_(values(card, key, shape, generator, gain))
    return module


def token_ids(prompts: int, tokens: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of one length that end as T5's do."""
    import random

    draw = random.Random(seed)
    return [[*(draw.randrange(3, vocab) for _ in range(tokens - 1)), 1] for _ in range(prompts)]


@dataclass(frozen=True)
class Sizes:
    """What the parts work on. t5: of a file for ComfyUI; search: the encoder of the search parts; prompts, fitted,
    tokens: of the search's prompts, of those that stand-ins are fitted on, and of each."""

    t5: T5
    search: T5
    prompts: int
    fitted: int
    tokens: int

    @classmethod
    def of(cls, rehearse: bool, newer: bool) -> Sizes:
        if not rehearse:
            return cls(XXL, XXL, 128, 256, 256)
        return cls(SMALL["new" if newer else "old"], T5(64, 96, 4, 16, 200, 6), 12, 20, 10)


@dataclass(frozen=True)
class Work:
    """What a part is given. seconds: that it has left; out: folder for what is more than a line (None: nowhere)."""

    card: Card
    sizes: Sizes
    seconds: float
    out: Path | None
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    @property
    def rehearse(self) -> bool:
        return self.card.rehearse

    def write(self, name: str, text: str) -> None:
        """A small file beside the results."""
        if self.out is not None:
            (self.out / name).write_text(text[:200_000], encoding="utf-8")


def log(text: str) -> None:
    """For people, beside the results."""
    print(text, file=sys.stderr, flush=True)
