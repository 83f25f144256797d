"""A search as it is asked for, by the node, the command line or a script: set up once, here, for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .. import __version__
from ..errors import SearchError
from ..measure.calibration import Calibration
from ..measure.meter import Meter
from ..measure.processes import Team
from ..measure.projection import TextProjection
from ..measure.prompts import sha256 as prompts_sha256
from ..plan.model import EncoderPlan, Plan, Provenance
from ..standins.fit import Fitting, halved
from ..standins.tune import Kept
from . import baselines, run, widths, with_standins
from . import repair as repairing
from .allocate import Table
from .entry import Found
from .progress import Progress
from .resume import State
from .settings import Settings
from .skip import SkipList

Report = Callable[[Progress], None]
Saved = Sequence[SkipList] | Table
Save = Callable[[Saved], None]


@dataclass(frozen=True)
class Job:
    """name: of the encoder's entry in the plan. calibration: (prompts, whether in the order of a race) -> how the
    encoder is measured on them. prompts: all of them. projection: the denoiser's, None for the bare embeddings.
    fitting: of stand-ins, None for none. method: one of search.METHODS; "" for the usual one. seed: of "random".
    Raises SearchError."""

    name: str
    calibration: Callable[[Sequence[str], bool], Calibration]
    prompts: Sequence[str]
    settings: Settings = Settings()  # noqa: RUF009 - frozen
    projection: TextProjection | None = None
    fitting: Fitting | None = None
    method: str = ""
    seed: int = 0
    team: Team = field(default_factory=Team)

    def __post_init__(self):
        object.__setattr__(self, "method", self.method or ("standins" if self.fitting else "skrr"))
        if self.method in ("standins", "widths") and self.fitting is None:
            raise SearchError(f"the method {self.method} fits stand-ins: give their rank, like 16")
        _ = self.split

    @functools.cached_property
    def split(self) -> tuple[list[str], list[str]]:
        """Prompts that stand-ins are fitted on (none without them), and those that candidates are measured on."""
        return ([], list(self.prompts)) if self.fitting is None else halved(self.prompts)

    @functools.cached_property
    def meter(self) -> Meter:
        """Measures candidates."""
        calibration = self.calibration(self.split[1], self.settings.delta > 0)
        return Meter(calibration, self.projection, team=self.team)

    @functools.cached_property
    def fitted(self) -> Calibration:
        """What stand-ins are fitted on."""
        return self.calibration(self.split[0], False)

    def release(self) -> None:
        """Let go of what was measured; where that is asked for again, it is made anew."""
        for name in ("meter", "fitted"):
            vars(self).pop(name, None)

    def facts(self) -> list:
        """What decides the outcome beside encoder, prompts' tokens and projection; see resume.fingerprint."""
        settings = self.settings
        if self.method == "widths":  # the sizes that levels are fitted for, whichever of them is asked for
            settings = sorted({*settings.targets, *settings.further}), settings.at_least
        return [__version__, repr(settings), repr(self.fitting), self.method, self.seed]

    def state_facts(self) -> list:
        """The same of what is saved after each step: a table of widths serves every size."""
        if self.method != "widths":
            return self.facts()
        return [__version__, "widths", repr(replace(self.fitting, tuning=0))]

    def run(
        self,
        report: Report = lambda progress: None,
        save: Save = lambda beam: None,
        beam: Saved = (),
        state: State | None = None,
    ) -> Found:
        """Search. report: called before every sub-block's forward, what it raises ends the search; save: called with
        the beam, or the table of widths, after each step; beam: a saved one to go on from; state: of the search, beside
        whose file a tuning is kept. Raises SearchError."""
        if self.method == "widths":
            table = beam if isinstance(beam, Table) else Table()
            return widths.search(
                self.fitted, self.meter, self.settings, self.fitting, report, save, table, self.kept(state)
            )
        if self.method == "standins":
            return with_standins.search(self.fitted, self.meter, self.settings, self.fitting, report, save, beam)
        if self.method == "skrr":
            entry = run.search(self.meter, self.settings, report, save, beam)
        else:
            entry = self._baseline(report, save, beam)
        if self.fitting is None:
            return Found(entry)
        told = entry.extensions["search"]
        return with_standins.best_rank(self.fitted, self.meter, entry.order, self.settings, self.fitting, told)

    def kept(self, state: State | None) -> Callable[[int], Kept] | None:
        """Where the tuning of a level with so many steps is kept, beside the state of the search."""
        if state is None or not self.fitting.tuning:
            return None
        return lambda end: Kept(
            state.path.with_name(f"{state.path.name}.{end}.tuning"), f"{state.key} {end} {self.fitting.tuning}"
        )

    def _baseline(self, report: Report, save: Save, beam: Sequence[SkipList]) -> EncoderPlan:
        """Another method's order; its levels' discrepancies are Skrr's."""
        meter = self.meter
        if self.method == "random":
            order = baselines.random_order(meter, self.seed)
        elif self.method == "shortgpt":
            order = baselines.shortgpt_order(meter)
        else:
            batches, _ = meter.calibration.batches()  # they may have been halved on one device and not on another
            self.team.agree(repr([batch.prompts for batch in batches]))
            own = Meter(meter.calibration, team=self.team, criterion=baselines.ANGLE_OF_OUTPUT)
            order = baselines.finercut_order(own, self.settings.sparsity, report, save, beam=beam)
        return baselines.plan_of(meter, order, self.settings.targets, self.method)

    def repair(
        self,
        entry: EncoderPlan,
        orders: Mapping[int, torch.Tensor],
        targets: Sequence[float] = (),
        report: Report = lambda progress: None,
    ) -> Found:
        """Stand-ins for an entry that is there already; see repair.repair. Raises SearchError."""
        return repairing.repair(self.fitted, self.meter, entry, orders, self.fitting, targets, report)

    def unfinished(self, skips: SkipList) -> EncoderPlan:
        """The entry of a search that was stopped at `skips`."""
        return run.unfinished(self.meter.row, skips, self.settings, self.fitting is not None)

    def plan(self, entry: EncoderPlan) -> Plan:
        """The plan with this entry, and where it comes from."""
        provenance = Provenance(
            source="search" if self.method in ("skrr", "standins", "widths") else self.method,
            projection=self.projection and self.projection.name,
            denoiser=self.projection and self.projection.denoiser,
            prompts=len(self.prompts),
            prompts_sha256=prompts_sha256(self.prompts),
            beam=1 if self.method in ("standins", "widths") else self.settings.beam,
            created_with=f"skrr {__version__}",
        )
        return Plan(encoders={self.name: entry}, provenance=provenance)
