"""Linear stand-ins fitted in closed form: what a removed place needs so that the stream goes on as before.

At place i, `norm(x)` of the *pruned* encoder's own stream is regressed (ridge) onto what is missing to the *dense*
stream behind i: all that the sub-block added, or, where some of its units stay, what these leave. Places are taken in
order, each with the earlier stand-ins in place: a fit also corrects what earlier removals left. The fitted map is cut
to a low rank by reduced-rank regression: the directions in which the fitted part is largest are kept.

Every token counts by the inverse mean square of its dense stream: what reads the stream normalises each token, so
errors matter relative to its size (some tokens are a thousand times larger than others). Nothing but Gram matrices is
kept of the tokens: a few `[width, width]` ones, summed in float64 (see sums.py).

The idea is that of ReplaceMe (arXiv 2505.02819) and of reduced-rank regression (Izenman 1975); the tests and
benchmarks/standins.py tell what it does here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..encoder import families
from ..encoder.actions import KEEP, SKIP, Action
from ..encoder.standin import NORMS, StandIn
from ..encoder.trace import Trace
from ..errors import SearchError
from ..measure.calibration import Calibration
from ..measure.sums import double, place
from ..memory import free_memory, retried
from ..plan.model import MAX_RANK

DTYPE = torch.float16
"""What the two factors are stored as; the bias is float32 (T5 has channels that float16 can't hold)."""


MAX_TUNING = 10_000


@dataclass(frozen=True)
class Fitting:
    """How stand-ins are fitted. rank: of each; ranks: where there are any, those to choose from at the end; ridges:
    tried, relative to the mean eigenvalue of the Gram matrix, the one best on held-out prompts is taken; null: share of
    the null prompt in all weight; held_out: every so many-th prompt chooses the ridge and is fitted on only after that
    (0: the first ridge is taken); swaps: exchanges that a search tries at its end (see search/with_standins.py);
    tuning: steps in which all of a level are then tuned together (see tune.py)."""

    RANKS: ClassVar[tuple[int, ...]] = (4, 8, 16, 32, 64)

    rank: int = 16
    ranks: tuple[int, ...] = ()
    ridges: tuple[float, ...] = (0.003, 0.03, 0.3)
    null: float = 0.1
    held_out: int = 5
    swaps: int = 2
    tuning: int = 0

    def __post_init__(self):
        if not 1 <= self.rank <= MAX_RANK:
            raise SearchError(f"a rank of {self.rank} makes no sense for stand-ins: use 1 to {MAX_RANK}, like 16")
        if not 0 <= self.tuning <= MAX_TUNING:
            raise SearchError(f"{self.tuning} steps of tuning: use 0 (none) to {MAX_TUNING}, like 150")


MAX_MEASURED = 64
"""Prompts that a search with stand-ins ranks candidates on; all others are fitted on."""


LEAST_METER = 2**20
"""Bytes with which a meter still works, computing again what it can't hold."""

MATRICES = 15
"""How many `[width, width]` float64 matrices a fit holds at once: four Gram matrices, and what solving takes."""


def fit_bytes(width: int, targets: int = 1) -> int:
    """Bytes that a fit takes for its matrices, beside its meter's: 2 GB where the encoder is 4096 wide. targets: how
    many stand-ins are fitted to one place together."""
    return (MATRICES + targets - 1) * 8 * width * width


def meter_bytes(memory: int, width: int, targets: int = 1) -> int:
    """Bytes for each of a search's two meters, where it may take so many beside the encoder. Raises SearchError where
    they do not hold a fit."""
    share = (memory - fit_bytes(width, targets)) // 2
    if share < LEAST_METER:
        raise SearchError(
            f"fitting stand-ins of an encoder {width} wide takes {least_bytes(width, targets) / 1e9:.2g} GB beside it,"
            f" and {memory / 1e9:.2g} GB may be used: free memory, or search without stand-ins"
        )
    return share


def least_bytes(width: int, targets: int = 1) -> int:
    """Bytes that a search with stand-ins takes at least, beside the encoder."""
    return fit_bytes(width, targets) + 2 * LEAST_METER


def halved(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to fit on, and others to measure candidates on: every 8th, at most MAX_MEASURED. Raises SearchError."""
    if len(set(prompts)) < 16:
        raise SearchError(f"{len(set(prompts))} prompts are too few to fit stand-ins on: give at least 16, better 500")
    measured = list(dict.fromkeys(prompts))[::8][:MAX_MEASURED]
    apart = set(measured)
    return [p for p in prompts if p not in apart], measured


@dataclass
class Gram:
    """Weighted sums over tokens of features z `[tokens, width]` and targets r `[tokens, targets]`, float64; rr: of each
    target's squares."""

    weight: float
    z: torch.Tensor
    r: torch.Tensor
    zz: torch.Tensor
    zr: torch.Tensor
    rr: torch.Tensor

    @classmethod
    def of(cls, width: int, device, targets: int | None = None) -> Gram:
        """Of no tokens. targets: as many as features, unless they are given."""
        targets = width if targets is None else targets
        shapes = ((width,), (targets,), (width, width), (width, targets), (targets,))
        return cls(0.0, *(torch.zeros(*shape, dtype=torch.float64, device=place(device)) for shape in shapes))

    def part(self, number: int, width: int) -> Gram:
        """The same of the number-th `width` targets alone; nothing is copied."""
        own = slice(number * width, (number + 1) * width)
        return Gram(self.weight, self.z, self.r[own], self.zz, self.zr[:, own], self.rr[own])

    def without(self, other: Gram) -> Gram:
        """Of those tokens alone that the other has not."""
        pairs = ((self.z, other.z), (self.r, other.r), (self.zz, other.zz), (self.zr, other.zr), (self.rr, other.rr))
        return Gram(self.weight - other.weight, *(own - less for own, less in pairs))

    def add(self, z: torch.Tensor, r: torch.Tensor, weights: torch.Tensor) -> None:
        """Some more tokens; weights `[tokens]`."""
        if not len(z):
            return
        z, r = z.float(), r.float()
        weights = weights.to(z).unsqueeze(1)
        weighted = z * weights
        # Products of one batch in float32, sums of batches in float64: the ridge is far above what that loses.
        self.weight += float(double(weights).sum())
        self.z += double(weighted).sum(dim=0)
        self.r += double(r * weights).sum(dim=0)
        self.zz += double(weighted.T @ z)
        self.zr += double(weighted.T @ r)
        self.rr += (double(r).square() * double(weights)).sum(dim=0)

    def join(self, other: Gram) -> None:
        """Add another's tokens to these, in place."""
        self.weight += other.weight
        pairs = ((self.z, other.z), (self.r, other.r), (self.zz, other.zz), (self.zr, other.zr), (self.rr, other.rr))
        for own, more in pairs:
            own += more

    def error(self, fit: Fit) -> float:
        """Weighted sum of squared errors of a fit on these tokens."""
        down, up, bias = fit
        own = ((down.T @ (self.zz @ down)) * (up @ up.T)).sum() + 2 * (self.z @ down @ up) @ bias
        cross = ((down.T @ self.zr) * up).sum() + bias @ self.r
        return float(self.rr.sum() + own + self.weight * (bias @ bias) - 2 * cross)


Fit = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""down `[width, rank]`, up `[rank, width]`, bias `[width]`, float64."""


def factored(gram: Gram, ridge: float) -> torch.Tensor:
    """The Cholesky factor of the features' covariance with a ridge: all that a fit has of its features. Raises
    SearchError."""
    zz = gram.zz - torch.outer(gram.z, gram.z / gram.weight)
    zz.diagonal().add_(ridge * zz.diagonal().mean() + 1e-12)
    try:
        return torch.linalg.cholesky(zz)
    except torch.linalg.LinAlgError:
        raise SearchError(
            "the encoder's states are not finite in this precision, so no stand-ins can be fitted: use bfloat16"
        ) from None


def solve(gram: Gram, rank: int, ridge: float, factor: torch.Tensor | None = None) -> Fit:
    """The ridge regression of r on z with a bias, cut to a rank where that costs least. factor: see `factored`, where
    it is known."""
    factor = factored(gram, ridge) if factor is None else factor
    mean_z, mean_r = gram.z / gram.weight, gram.r / gram.weight
    zr = gram.zr - torch.outer(gram.z, mean_r)
    up = leading(lambda basis: zr.T @ torch.cholesky_solve(zr @ basis, factor), len(mean_r), rank, zr.device)
    down = torch.cholesky_solve(zr @ up, factor)
    return down, up.T, mean_r - mean_z @ down @ up.T


def leading(
    times: Callable[[torch.Tensor], torch.Tensor], width: int, rank: int, device: torch.device, rounds: int = 8
) -> torch.Tensor:
    """Orthonormal columns `[width, rank]` that span about the leading eigenvectors of a symmetric, non-negative matrix,
    given as what it makes of some columns: by subspace iteration, which costs a few thin products where all
    eigenvectors of a wide encoder cost minutes."""
    columns = min(rank + 8, width)
    start = torch.randn(width, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = start.to(device)
    for _ in range(rounds):
        basis = torch.linalg.qr(times(basis)).Q
    inner = basis.T @ times(basis)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    return basis @ vectors[:, values.argsort(descending=True)[:rank]]


def stand_in(fit: Fit, norm: str) -> StandIn:
    """A fit as it is stored: the factors' columns of equal size, so that neither overflows."""
    down, up, bias = fit
    scale = down.norm(dim=0).clamp(min=1e-12).sqrt() * len(bias) ** -0.25
    return StandIn(norm, (down / scale).T.to(DTYPE).contiguous(), (up.T * scale).to(DTYPE).contiguous(), bias.float())


@dataclass
class Pair:
    """The dense and the pruned stream of one batch before a place, `[batch, tokens, width]`, the same object where
    nothing was removed so far; behind, kept: what this place's own sub-block makes of each, done: what the place's
    action makes of the pruned one without its stand-in, where these are known."""

    place: int
    dense: torch.Tensor
    pruned: torch.Tensor
    behind: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    done: torch.Tensor | None = None

    def to(self, device) -> Pair:
        """The same on a device."""
        dense = self.dense.to(device)
        behind = None if self.behind is None else self.behind.to(device)
        pruned = dense if self.pruned is self.dense else self.pruned.to(device)
        kept = behind if self.kept is self.behind else None if self.kept is None else self.kept.to(device)
        done = pruned if self.done is self.pruned else None if self.done is None else self.done.to(device)
        return Pair(self.place, dense, pruned, behind, kept, done)


class Streams:
    """The dense and the pruned stream of every batch of a calibration, taken from sub-block to sub-block.

    They are held on their device up to a quarter of its memory, beyond that in RAM, and beyond that not at all:
    then they are computed anew, from the first sub-block, when they are asked for. passed: what is done at the places
    behind us. tick: called before every batch at a place, and before a batch passes one.
    """

    def __init__(self, calibration: Calibration, tick: Callable[[], None]):
        self.calibration, self.row, self.tick = calibration, calibration.tracer.row, tick
        self.passed: list[Action] = []
        self._held: dict[int, Pair] = {}
        self._masks: dict[int, torch.Tensor | None] = {}
        self._room = self._rooms()

    def _rooms(self) -> dict[str, int]:
        """Bytes that may be held on the device, and beside it in RAM."""
        beside = 0
        if self.calibration.device.type != "cpu":
            beside = free_memory("cpu") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return {"device": self.calibration.memory // 4, "cpu": beside}

    def traces(self) -> Iterable[tuple[int, Trace]]:
        """Every batch, numbered; number 0 is the null prompt's."""
        yield 0, self.calibration.trace(0)
        yield from enumerate(self.calibration.traces(), 1)

    def mask(self, number: int, trace: Trace) -> torch.Tensor | None:
        """Which of a batch's tokens the conditioning reads, `[batch, tokens]`; None where all, as far as is known."""
        if number not in self._masks:
            tracer = self.calibration.tracer
            reading = tracer.read(trace, dict.fromkeys(tracer.know_boundaries(self.calibration.trace(0)), trace.x))
            masks = [mask for _, mask in reading if mask is not None and mask.shape == trace.x.shape[:2]]
            self._masks[number] = masks[0] if masks else None
        return self._masks[number]

    def weights(self, number: int, trace: Trace, behind: torch.Tensor) -> torch.Tensor:
        """Of a batch's tokens, `[batch, tokens]`: the inverse mean square of the dense stream, zero where nobody
        reads."""
        size = double(behind).square().mean(dim=-1)
        weights = 1 / size.clamp(min=1e-3 * float(size.median()) + 1e-12)
        mask = self.mask(number, trace)
        return weights if mask is None else weights * mask.to(weights)

    def here(self, kept: bool = False) -> Iterable[tuple[int, Trace, Pair]]:
        """Every batch's number, trace and streams at this place, `behind` known, and, where asked for, `kept`."""
        for number, trace in self.traces():
            self.tick()
            pair = self._held.get(number, Pair(0, trace.x, trace.x))
            if pair.dense.device != trace.x.device:
                pair = pair.to(trace.x.device)
            while pair.place < len(self.passed):
                pair = self._passed(pair, trace)
            if pair.behind is None:
                pair.behind = self._apply(pair.place, pair.dense, trace)
            if kept and pair.pruned is not pair.dense:
                pair.kept = self._apply(pair.place, pair.pruned, trace)
            elif kept:
                pair.kept = pair.behind
            yield number, trace, pair
            self._hold(number, pair)

    def guarded(self, act: Callable):
        """What `act` returns; where the device runs out of memory, what was held is let go of, the batches and the room
        are halved, and it is tried again."""
        return retried(act, self._shrink)

    def _shrink(self) -> bool:
        self._held, self._masks = {}, {}
        again = self.calibration.shrink()
        self._room = self._rooms()
        return again

    def _apply(self, index: int, x: torch.Tensor, trace: Trace) -> torch.Tensor:
        return self.row.sub_blocks[index].apply(x, trace.calls[index])

    def _passed(self, pair: Pair, trace: Trace) -> Pair:
        """One place further."""
        self.tick()
        place, action = pair.place, self.passed[pair.place]
        behind = pair.behind if pair.behind is not None else self._apply(place, pair.dense, trace)
        if action == KEEP and pair.pruned is pair.dense:
            pruned = behind
        elif action == KEEP and pair.kept is not None:
            pruned = pair.kept
        elif pair.done is not None:
            pruned = action.completed(pair.pruned, pair.done)
        else:
            pruned = action.apply(pair.pruned, self.row, place, trace.calls[place])
        return Pair(place + 1, behind, pruned)

    def _hold(self, number: int, pair: Pair) -> None:
        size = 5 * pair.dense.nbytes  # with what is behind
        if number not in self._held:
            where = next((place for place, room in self._room.items() if room >= size), None)
            if where is None:
                return
            self._room[where] -= size
        else:
            where = "device" if self._held[number].dense.device == pair.dense.device else "cpu"
        self._held[number] = pair.to("cpu") if where == "cpu" else pair

    def pass_by(self, kept: bool) -> None:
        """Take all that is held through this place together: the weights of a streamed encoder come in once."""
        for _ in self.here(kept):
            pass

    def go_on(self, action: Action) -> None:
        """To the next place; action: what is done at this one."""
        self.passed.append(action)


def fit(
    calibration: Calibration,
    removed: Mapping[int, Action],
    fitting: Fitting,
    tried: Iterable[int] = (),
    tick: Callable[[float], None] = lambda share: None,
) -> tuple[dict[int, StandIn], dict[int, Tried]]:
    """Stand-ins for removed and narrowed sub-blocks; and for others that are kept, each as if it alone were removed on
    top.

    calibration: the prompts that are fitted on. removed: sub-block -> SKIP, or Narrow without a stand-in, where one is
    to be fitted; a stand-in or a re-used sub-block stays what it is. tried: kept sub-blocks to fit a stand-in for as
    well. tick: called before every sub-block of every batch with the share of the work that is done; what it raises
    ends the fit.
    """
    row = calibration.tracer.row
    norm, tried = families.by_name(row.family).norm, set(tried)
    last = max([*removed, *tried], default=-1)
    streams = Streams(calibration, lambda: tick(len(streams.passed) / (last + 1)))
    found, trials = {}, {}
    for index in range(last + 1):
        action = removed.get(index, KEEP)
        if action.open or index in tried:
            at = action if action.open else SKIP
            trial = streams.guarded(functools.partial(fit_here, streams, norm, fitting, at, index in tried))
            if action.open:
                found[index], action = trial.standin, action.repaired(trial.standin)
            else:
                trials[index] = trial
        else:
            streams.guarded(functools.partial(streams.pass_by, action == KEEP))
        streams.go_on(action)
    return found, trials


def fit_here(streams: Streams, norm: str, fitting: Fitting, action: Action, trying: bool) -> Tried:
    """The stand-in beside what `action` does at the place where the streams are; see `grams`."""
    kept, held, harm = grams(streams, norm, fitting, action, trying)
    ridge = best_ridge(kept, held, fitting)
    kept.join(held)
    del held  # of a wide encoder these matrices are large: see `fit_bytes`
    chosen = solve(kept, fitting.rank, ridge)
    fitted = stand_in(chosen, norm).to(streams.calibration.device)
    return Tried(fitted, kept.error(chosen) - harm)


@dataclass(frozen=True)
class Tried:
    """A stand-in for a sub-block that is still kept. harm: how much further from the dense stream the stream behind it
    would be with the stand-in than with the sub-block: weighted squared error, in units of the tokens' mean squares."""

    standin: StandIn
    harm: float


def grams(
    streams: Streams, norm: str, fitting: Fitting, action: Action, trying: bool
) -> tuple[Gram, Gram, float]:  # fmt: skip
    """The Gram matrices at the place where the streams are: of the prompts to fit on, and of those held out; and, where
    its sub-block is kept and only `trying`, the weighted squared error of the stream behind it."""
    null = prompts = 0
    share = harm = 0.0
    kept = held = None
    for number, trace, pair in streams.here(kept=trying):
        behind, weights = pair.behind, streams.weights(number, trace, pair.behind)
        if kept is None:
            kept, held = (Gram.of(behind.shape[-1], behind.device) for _ in range(2))
        batch, tokens, width = behind.shape
        done = action.apply(pair.pruned, streams.row, pair.place, trace.calls[pair.place])
        pair.done = None if trying else done
        z, r = NORMS[norm](pair.pruned.float()), behind.float() - done.float()
        error = 0.0
        if trying and pair.kept is not behind:
            off = double(pair.kept) - double(behind)
            error = float((off.square().sum(dim=-1) * weights).sum())
        if number == 0:
            null = z.reshape(-1, width), r.reshape(-1, width), weights.flatten(), error
            continue
        harm += error
        share += float(weights.sum())
        out = torch.arange(prompts, prompts + batch) % max(fitting.held_out, 1) == fitting.held_out - 1
        prompts += batch
        for gram, chosen in ((kept, ~out), (held, out)):
            gram.add(z[chosen].reshape(-1, width), r[chosen].reshape(-1, width), weights[chosen].flatten())
    z, r, weights, error = null
    read = float(weights.sum())
    scale = fitting.null * share / read if read else 0.0
    kept.add(z, r, weights * scale)
    return kept, held, harm + scale * error


def best_ridge(kept: Gram, held: Gram, fitting: Fitting) -> float:
    """The ridge that is best on the tokens held out."""
    if held.weight and len(fitting.ridges) > 1:
        return min(fitting.ridges, key=lambda r: held.error(solve(kept, fitting.rank, r)))
    return fitting.ridges[0]
