"""Stand-ins tuned together on the discrepancy itself, by Adam (arXiv 1412.6980); no weight of the encoder changes.

Each stand-in is fitted at its own place (fit.py), but what is read is made by all of them. So they are moved together,
a few prompts a step, down the gradient of D. It is taken back through the encoder sub-block by sub-block, each run once
more on the way: beside the streams between them, the activations of one sub-block alone are held at a time.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..disk.atomic import replacing
from ..encoder.actions import KEEP, Action, Assignment
from ..encoder.row import Call
from ..encoder.standin import StandIn, standin_of
from ..encoder.trace import Reading, Trace
from ..errors import SearchError
from ..measure.calibration import Batch, Calibration
from ..measure.discrepancy import Projection, features, read_only, tokens_read
from ..measure.walk import Walk
from ..memory import Store, out_of_memory, retried
from .fit import DTYPE, MAX_TUNING

STEPS = 150
"""That are enough, where nothing else is asked."""
PROMPTS = 16
"""In each step, drawn by lot; the null prompt comes on top."""
RATE = 0.02
"""How far a step takes a tensor, relative to the median size of its numbers; it falls to 0 in the end."""
WARM = 10
"""Steps until the rate is reached."""
EVERY = 5
"""After so many steps a tuning is kept."""
LARGE = 1e6
"""The discrepancy times this has a gradient that half precision holds where it is read."""


def tuned(
    calibration: Calibration,
    projection: Projection | None,
    removed: Assignment,
    steps: int = STEPS,
    tick: Callable[[float], None] = lambda share: None,
    kept: Kept | None = None,
) -> dict[int, Action]:
    """An assignment with its stand-ins tuned, all of them its own. calibration: the prompts to tune on; projection:
    what reads them, None for the bare embeddings. tick: called before every sub-block's forward with the share of the
    work that is done; what it raises ends it. kept: where it is, to go on from after that. Raises TuningError."""
    # Tensors of inference mode, which ComfyUI runs nodes in, can't be part of a gradient.
    try:
        with torch.inference_mode(False), torch.no_grad():
            return Tuning(calibration, projection, removed, tick).run(steps, kept)
    except RuntimeError as error:  # kernels of quantised weights may have no derivative
        reason = "there is too little memory" if out_of_memory(error) else str(error).partition("\n")[0]
        raise TuningError(f"the gradient can't be taken: {reason}") from None


class TuningError(SearchError):
    """Stand-ins that can't be tuned in this encoder, or on this machine; they are as they were."""


class Tuning:
    """A tuning under way; see `tuned`. prompts: in each step."""

    def __init__(
        self,
        calibration: Calibration,
        projection: Projection | None,
        removed: Assignment,
        tick: Callable[[float], None],
        prompts: int = PROMPTS,
    ):
        self.calibration, self.tracer, self.projection = calibration, calibration.tracer, projection
        self.row, self.tick, self.prompts = self.tracer.row, tick, prompts
        self.last = 2 * max(self.tracer.know_boundaries(calibration.trace(0)))
        self.walk, self.goals = Walk(self.tracer), Store(calibration.memory // 4)
        self.step, self.steps, self.passed, self.passes = 0, 1, 0, 1
        self.loose = {place: retyped(action, torch.float32) for place, action in removed.items()}
        found = {place: standin_of(action) for place, action in self.loose.items()}
        self.learned = {place: (own.down, own.up, own.bias) for place, own in found.items() if own is not None}
        batches, null = calibration.batches()
        # One by one: what is drawn must not depend on how many fit into memory together.
        self.pieces = [null, *(piece for batch in batches for piece in singly(batch))]

    def run(self, steps: int, kept: Kept | None = None) -> dict[int, Action]:
        """All steps that are left."""
        flat = [p.requires_grad_(True) for own in self.learned.values() for p in own]
        sizes = [float(p.detach().abs().median()) for p in flat]
        adam = torch.optim.Adam([{"params": [p], "lr": 0.0} for p in flat or [torch.zeros(1)]])
        self.steps = max(steps, 1)
        for self.step in range(kept.load(flat, adam) if kept else 0, steps):
            for group, size in zip(adam.param_groups, sizes, strict=False):
                group["lr"] = RATE * size * (1 - self.step / steps) * min(1.0, (self.step + 1) / WARM)
            retried(self.gradient, self._shrink)
            adam.step()
            if kept and ((self.step + 1) % EVERY == 0 or self.step + 1 == steps):
                kept.save(self.step + 1, flat, adam)
        return {place: retyped(action, DTYPE) for place, action in self.loose.items()}

    def gradient(self) -> None:
        """Put that of D on this step's prompts into every learned tensor's `grad`."""
        for own in self.learned.values():
            for p in own:
                p.grad = torch.zeros_like(p)
        lot, numbers = random.Random(self.step), range(1, len(self.pieces))
        chosen: list[int] = []
        while sum(self.pieces[n].prompts for n in chosen) < self.prompts:
            chosen += lot.choices(numbers, [self.pieces[n].prompts for n in numbers])
        self.passed, self.passes = 0, 2 * self.last * (1 + len(chosen))
        traces = [self._trace(number) for number in (0, *chosen)]
        goals = [self._goal(number, trace) for number, trace in zip((0, *chosen), traces, strict=True)]
        # The null prompt's mean and that of all others, of each tensor that is read.
        totals = [[sum(n) for n in zip(*map(elements, part), strict=True)] for part in (goals[:1], goals[1:])]
        self._add(traces, goals, [totals[0], *[totals[1]] * len(chosen)])

    def _shrink(self) -> bool:
        self.goals.clear()
        self.goals.capacity //= 2
        return self.calibration.shrink()

    def _trace(self, number: int) -> Trace:
        trace = self.tracer.trace(self.pieces[number].run)
        return replace(trace, calls=tuple(ordinary(call) for call in trace.calls))

    def _goal(self, number: int, trace: Trace) -> Reading:
        """What is read of the dense encoder."""

        def make() -> Reading:
            ((_, reading),) = self.walk(trace, [{}], step=lambda: self._tick(0))
            return [(t.float(), mask) for t, mask in features(reading, self.projection)]

        return self.goals.get(number, make)

    def _tick(self, passed: int = 1) -> None:
        self.tick((self.step + min(self.passed / self.passes, 0.999)) / self.steps)
        self.passed += passed

    def _add(self, traces: Sequence[Trace], goals: Sequence[Reading], totals: Sequence[Sequence[float]]) -> None:
        """Add the gradient on some pieces, place after place on all of them together: the weights of a streamed encoder
        come in once on each way. totals: what each piece's squared errors are divided by, for each tensor read."""
        boundaries, first = self.tracer.boundaries, min(self.learned, default=self.last)
        xs, taps = [trace.x for trace in traces], [{} for _ in traces]
        size = self.last * sum(x.nbytes for x in xs)
        where = xs[0].device if size <= self.calibration.memory // 4 else torch.device("cpu")
        streams: list[list[torch.Tensor]] = []
        for place in range(self.last):
            streams.append([x.to(where) for x in xs] if place >= first else [])
            xs = [self._apply(place, x, trace) for x, trace in zip(xs, traces, strict=True)]
            if place % 2 and (place + 1) // 2 in boundaries:
                for tap, x in zip(taps, xs, strict=True):
                    tap[(place + 1) // 2] = x
        read = [self._read_back(*piece) for piece in zip(traces, taps, goals, totals, strict=True)]
        backs = [torch.zeros_like(x) for x in xs]
        for place in reversed(range(first, self.last)):
            own, through = self.learned.get(place, ()), self.loose.get(place, KEEP).through(place)
            used = self.row.sub_blocks[place if through is None else through]
            with plain(used.parts.values(), xs[0]):
                for i, (trace, held, (found, factor)) in enumerate(zip(traces, streams.pop(), read, strict=True)):
                    back = backs[i] + found.get((place + 1) // 2, 0) if place % 2 else backs[i]
                    x = held.to(back.device, copy=True)
                    with torch.enable_grad(), writable(x.shape):
                        y = self._apply(place, x.requires_grad_(True), trace)
                        backs[i], *grads = torch.autograd.grad(y, (x, *own), back)
                    for p, grad in zip(own, grads, strict=True):
                        p.grad += factor * grad

    def _apply(self, place: int, x: torch.Tensor, trace: Trace) -> torch.Tensor:
        self._tick()
        return self.loose.get(place, KEEP).apply(x, self.row, place, trace.calls[place])

    def _read_back(
        self, trace: Trace, taps: dict[int, torch.Tensor], goal: Reading, totals: Sequence[float]
    ) -> tuple[dict[int, torch.Tensor], float]:
        """The gradient of D at the states that are read (behind how many blocks -> it), over a factor, so that half
        precision holds it; and that factor."""
        leaves = {behind: t.detach().clone().requires_grad_(True) for behind, t in taps.items()}
        roots = [root for root in (self.tracer.hollow, self.projection) if isinstance(root, nn.Module)]
        with torch.enable_grad(), plain(roots):
            reading = features(self.tracer.read(trace, leaves), self.projection)
            errors = [
                read_only(t.float() - g, mask).square().sum() for (t, _), (g, mask) in zip(reading, goal, strict=True)
            ]
            loss = sum(error / max(total, 1) for error, total in zip(errors, totals, strict=True)) * LARGE
            if not loss.requires_grad:
                raise TuningError("the gradient can't be taken: this encoder hands none on")
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {behind: grad.float() for behind, grad in zip(leaves, grads, strict=True) if grad is not None}
        size = max(float(grad.abs().max()) for grad in found.values()) or 1.0
        return {behind: (grad / size).to(taps[behind].dtype) for behind, grad in found.items()}, size / LARGE


@dataclass(frozen=True)
class Kept:
    """Where a tuning under way is kept. path: its file; key: of all that decides what comes out."""

    path: Path
    key: str

    PARTS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def save(self, step: int, learned: Sequence[torch.Tensor], adam: torch.optim.Adam) -> None:
        """After so many steps. Raises WriteError."""
        tensors = {f"{n}.value": p.detach().cpu() for n, p in enumerate(learned)}
        for n, p in enumerate(learned):
            tensors |= {f"{n}.{part}": adam.state[p][part].cpu() for part in self.PARTS}
        with replacing(self.path) as file:
            file.write(save(tensors, {"key": self.key, "step": str(step)}))

    def load(self, learned: Sequence[torch.Tensor], adam: torch.optim.Adam) -> int:
        """Put what is kept into these tensors and their optimiser; how many steps were done. 0, and nothing is put
        anywhere, where there is none, or not of this tuning."""
        try:
            with safe_open(self.path, "pt") as file:
                told = file.metadata() or {}
                step = int(told.get("step", 0))
                names = [f"{n}.{part}" for n in range(len(learned)) for part in ("value", *self.PARTS)]
                tensors = {name: file.get_tensor(name) for name in names} if {*names} == {*file.keys()} else {}
        except (OSError, ValueError, SafetensorError):
            return 0
        whole = bool(tensors) and all(
            tensors[name].shape == learned[int(name.partition(".")[0])].shape for name in names
        )
        whole = whole and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values())
        if told.get("key") != self.key or not whole or not 0 < step <= MAX_TUNING:
            return 0
        for n, p in enumerate(learned):
            p.data.copy_(tensors[f"{n}.value"])
            parts = {part: tensors[f"{n}.{part}"].to(p.device) for part in self.PARTS}
            adam.state[p] = {"step": torch.tensor(float(step)), **parts}
        return step

    def forget(self) -> None:
        """It has ended."""
        with contextlib.suppress(OSError):  # one that can't go spoils nothing
            self.path.unlink(missing_ok=True)


def singly(batch: Batch) -> list[Batch]:
    """A batch's prompts, each on its own, in their order; the batch itself where it can't be split."""
    halves = batch.halves()
    return list(halves) if len(halves) == 1 else [piece for half in halves for piece in singly(half)]


def elements(reading: Reading) -> list[float]:
    """How many numbers are read of each tensor of a reading."""
    return [float(tokens_read(t, mask).sum()) * t.shape[-1] for t, mask in reading]


def retyped(action: Action, dtype: torch.dtype) -> Action:
    """An action whose stand-in, where it has one, has factors of another type, all tensors its own."""
    old = standin_of(action)
    if old is None:
        return action
    made = StandIn(old.norm, *(t.detach().to(dtype, copy=True) for t in (old.down, old.up)), old.bias.detach().clone())
    return made if old is action else replace(action, standin=made)


def ordinary(value):
    """The same with copies of all tensors that came about in inference mode."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, Call):
        return Call(ordinary(value.args), ordinary(value.kwargs), value.hidden)
    if isinstance(value, dict):
        return {key: ordinary(part) for key, part in value.items()}
    return type(value)(map(ordinary, value)) if type(value) in (tuple, list) else value


def writable(shape: torch.Size) -> torch.autograd.graph.saved_tensors_hooks:
    """While it lasts, states of this shape that a gradient needs are kept as copies: an encoder may write into them
    later (ComfyUI's T5 adds what a sub-block makes to the stream in place)."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone() if t.shape == shape else t, lambda t: t)


@contextlib.contextmanager
def plain(roots: Iterable[nn.Module], like: torch.Tensor | None = None) -> Iterator[None]:
    """While it lasts, weights of these modules that came about in inference mode are copies that a gradient may pass.
    like: those that must be cast to its type or device are left alone: what is made of them is a copy anyway."""
    swapped = []
    for module in {m for root in roots for m in root.modules() if not isinstance(m, nn.Embedding)}:
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if type(t) not in (nn.Parameter, torch.Tensor) or not t.is_inference():
                    continue
                if like is None or (t.dtype, t.device) == (like.dtype, like.device):
                    swapped.append((table, name, t))
                    table[name] = nn.Parameter(t.clone(), requires_grad=False) if type(t) is nn.Parameter else t.clone()
    try:
        yield
    finally:
        for table, name, t in swapped:
            table[name] = t
