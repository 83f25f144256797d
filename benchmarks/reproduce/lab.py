"""What the experiments share: the encoder and its pictures, cuts, searches and verdicts that are kept on the disk."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import standins
from benchmarks.reproduce import choices
from benchmarks.shapes import encoder, evaluate, scenes, table
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import Assignment, assignment
from skrr_engine.encoder.trace import Tracer
from skrr_engine.files.folder import Encoder, load
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.discrepancy import COSINE, Criterion
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.projection import from_file

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "reproduce"
IMAGES = ROOT / "docs" / "images"
LEVELS = (0.25, 0.33, 0.42)  # of the parameters in blocks
LENGTHS = (8, 11)  # tokens of the calibration captions: few lengths make large batches


@dataclass(frozen=True)
class Cut:
    """How much is measured. captions: to search on, half of them of each length; shortlist: candidates of each list and
    step, those that added least when last measured (0: all); seeds: of the captions; per_task: pictures of each of six
    tasks; beams: widths; blocks: the first so many of the encoder, where its searches are the subject and not its
    pictures (0: all)."""

    captions: int
    shortlist: int
    seeds: tuple[int, ...]
    per_task: int
    beams: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 0

    @property
    def searched(self) -> str:
        """How it searches, in words."""
        likeliest = f"the {self.shortlist} likeliest" if self.shortlist else "all"
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return f"{self.captions} captions to search on, {likeliest} candidates in each step, at most {seeds}"

    def __str__(self) -> str:
        return f"{self.searched}; {6 * self.per_task} pictures each"


FULL, SHORT, QUICK = (
    Cut(16, 0, (0, 1, 2), 60),
    Cut(8, 6, (0, 1, 2), 8, blocks=8),
    Cut(4, 4, (0,), 4, (1, 3), 5),
)
"""Meant for a night, for two hours and for a quarter of an hour on 2 free cores."""


@dataclass(frozen=True)
class Method:
    """A search. projection, cosine, null: what D is (see discrepancy.py); per_parameter, width, merged: see
    choices.beam; kind: of the captions."""

    projection: bool = True
    cosine: bool = False
    null: float = 1.0
    per_parameter: bool = False
    width: int = 1
    merged: bool = True
    kind: str = "Shapes captions"

    @property
    def options(self) -> dict:
        """Of a Meter, as far as they are not the usual ones."""
        criterion = replace(COSINE if self.cosine else Criterion(), null=self.null)
        return {"criterion": criterion, **({} if self.projection else {"projection": None})}


class Unknown(Exception):
    """What was not measured yet, where nothing is to be measured."""


class Lab:
    """measuring: whether what is not there is measured. sliced: whether the encoder is the cut's first blocks alone,
    which nothing can be painted by. dense_at: guidance -> the dense encoder's pictures."""

    def __init__(self, cut: Cut, measuring: bool = True, sliced: bool = False):
        self.cut, self.measuring, self.sliced = cut, measuring, sliced
        files = (evaluate.DENOISER, evaluate.DECODER)
        self.dense_at = functools.cache(lambda cfg: self.studio.paint(*self.studio.embedded, cfg))
        self.basis = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]

    def slice(self) -> Lab:
        """The lab of the cut's first blocks alone, few enough to measure all candidates; itself where they are all."""
        if not self.cut.blocks:
            return self
        return Lab(replace(self.cut, shortlist=0), self.measuring, sliced=True)

    @functools.cached_property
    def studio(self) -> evaluate.Studio:
        """Painter and judge."""
        return evaluate.Studio(self.cut.per_task)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder; without the painter where nothing is measured."""
        whole = self.studio.encoder if self.measuring and not self.sliced else load(str(encoder.ensure()))
        return first_blocks(whole, self.cut.blocks) if self.sliced else whole

    @property
    def row(self):
        return self.encoder.row

    def kept(self, what: Sequence, make: Callable[[], dict]) -> dict:
        """What `make` returns for `what`, from the disk where it is there. Raises Unknown where nothing is measured."""

        def refuse() -> dict:
            raise Unknown(repr(what)[:80])

        what = (*what, "blocks", self.cut.blocks) if self.sliced else what
        return table.kept(CACHE, self.basis, what, make if self.measuring else refuse)

    def captions(self, kind: str, count: int, seed: int) -> list[str]:
        """To search on: of Shapes, the first of each of two lengths; else as they come."""
        if kind != "Shapes captions":
            return standins.CALIBRATION[kind](count, seed)
        by_length: dict[int, list[str]] = {length: [] for length in LENGTHS}
        for caption in scenes.calibration(60 * count, seed):
            by_length.get(len(self.encoder.tokenize(caption)), []).append(caption)
        return [caption for own in by_length.values() for caption in own[: -(-count // len(LENGTHS))]][:count]

    def meter(self, method: Method, count: int, seed: int) -> Meter:
        """On the captions of a seed."""
        return self.meter_on(self.captions(method.kind, count, seed), method)

    def meter_on(self, captions: Sequence[str], method: Method = Method()) -> Meter:  # noqa: B008 - frozen
        """On some captions."""
        batches, null = self.encoder.batches(captions), self.encoder.batch([self.encoder.tokenize("")])
        calibration = Calibration(self.encoder.module, Tracer(self.encoder.module, self.row), batches, null)
        return Meter(calibration, **{"projection": from_file(evaluate.DENOISER), **method.options})

    @functools.cached_property
    def unseen(self) -> Meter:
        """D on captions that no search has seen: the evaluation's."""
        return self.meter_on([p.caption for p in scenes.evaluation(8)])

    def target(self, share: float) -> float:
        """Parameters that a share of those in blocks is."""
        return share * sum(self.row.parameter_counts)

    def prefix(self, order: Sequence[int], share: float) -> tuple[int, ...]:
        """The first sub-blocks of an order that remove a share of the parameters in blocks."""
        counts, end = self.row.parameter_counts, 0
        while sum(counts[i] for i in order[:end]) < self.target(share):
            end += 1
        return tuple(order[:end])

    def removed(self, order: Iterable[int]) -> float:
        """Share of the parameters in blocks."""
        return sum(self.row.parameter_counts[i] for i in order) / sum(self.row.parameter_counts)

    def measure(self, meter: Meter) -> choices.Measure:
        """Of lists of skipped sub-blocks."""
        return lambda orders: [d.total for d in meter.measure([assignment(order) for order in orders], stack=True)]

    def search(self, method: Method, seed: int, share: float = LEVELS[-1], count: int = 0) -> choices.Found:
        """The order that a method finds. count: of captions, where they are not the cut's."""
        count = count or self.cut.captions

        def find() -> dict:
            measure = self.measure(self.meter(method, count, seed))
            costs, target = self.row.parameter_counts, self.target(share)
            options = {"shortlist": self.cut.shortlist, "per_parameter": method.per_parameter}
            return asdict(choices.beam(measure, costs, target, method.width, method.merged, **options))

        what = ("search", method, count, self.cut.shortlist, seed, share, LENGTHS)
        found = self.kept(what, find)
        return choices.Found(tuple(found["order"]), tuple(found["trail"]), found["evaluations"])

    def verdict(self, removed: Assignment) -> dict:
        """The verdict on pictures (see evaluate.Verdict), and D on captions that no search has seen."""
        key = sorted((place, action.target) for place, action in removed.items())

        def find() -> dict:
            found, _ = self.studio.judge(removed)
            return {**asdict(found), **self._unseen(removed)}

        return self.kept(("verdict", key, self.cut.per_task), find)

    def error(self, order: Iterable[int]) -> dict:
        """D on captions that no search has seen, of skips."""
        return self.kept(("unseen", tuple(order)), lambda: self._unseen(assignment(order)))

    def _unseen(self, removed: Assignment) -> dict:
        (d,) = self.unseen.measure([removed])
        return {"D": d.total, "D_c": d.conditional, "D_0": d.null}


def first_blocks(encoder: Encoder, blocks: int) -> Encoder:
    """An encoder of the same modules that ends behind so many blocks, with the final norm."""
    twin = copy.copy(encoder.module)
    twin._modules = {**encoder.module._modules, "layers": encoder.module.layers[:blocks]}
    return replace(encoder, module=twin, row=families.find(twin))


def known(*makes: Callable[[], dict]) -> list[dict]:
    """The rows of those that are there, or can be measured."""
    found = []
    for make in makes:
        try:
            found.append(make())
        except Unknown:
            continue
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def line(cells: Sequence) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
