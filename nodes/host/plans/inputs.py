"""Which plan and which of its levels a node's inputs ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comfy_api.latest import io

from .. import versions as features
from . import folder as library

if TYPE_CHECKING:
    from ....skrr_engine.encoder.row import Numbers
    from ....skrr_engine.plan.model import EncoderPlan, Level, Plan
    from ..clip.views import Pruned, View


@dataclass(frozen=True)
class Choice:
    """A plan (None: none asked for), and how much it may remove: `sparsity` at most, or, where `gigabytes` is not 0,
    as little as brings the encoder to that many (10**9 bytes)."""

    plan: Plan | None
    sparsity: float
    gigabytes: float

    def level(
        self, name: str, shape: Numbers, entry: EncoderPlan, together: int | None = None
    ) -> tuple[Level | None, str]:
        """The level for an encoder (None: it fits dense), and a line that says the choice. together: the length of the
        level that was chosen for all encoders together, see `together`. Raises PlanError."""
        from ....skrr_engine.plan.choose import at_size, size_at

        if self.gigabytes > 0:
            asked = f"asked for at most {self.gigabytes:.2f} GB"
        else:
            asked = f"asked for at most {self.sparsity:.0%}"
        if together is not None:
            level, asked = entry.level(together) if together else None, f"{asked} over all encoders"
        else:
            level = at_size(shape, entry, self.gigabytes * 1e9) if self.gigabytes > 0 else entry.choose(self.sparsity)
        if level is None:
            return None, f"{name}: {asked}, it has {shape.total_bytes / 1e9:.2f} GB as it is: nothing removed"
        shares = entry.shares(level)
        narrowed = sum(share > 0 for share in shares.values())
        also = f" and narrows {narrowed}" if narrowed else ""
        left = size_at(shape, entry, level) / 1e9
        return level, (
            f"{name}: {asked}, using the level that skips {len(shares) - narrowed} of {2 * shape.blocks} sub-blocks"
            f"{also}: {shape.sparsity(shares):.1%} removed, {left:.2f} GB left"
        )

    def together(self, known: Mapping[str, View], matched: Mapping[str, View]) -> dict[str, int | None]:
        """Entry of the plan -> the length of the level that one budget over all encoders gives it (0: it stays whole),
        None for each where the plan holds no such budget for these encoders. known: all of the CLIP; matched: those
        that entries are for, by the entries' names. Raises PlanError."""
        from ....skrr_engine.plan.choose import at_size_together

        groups = self.plan.together
        if not groups or not {name for group in groups for name in group.levels} <= matched.keys():
            return dict.fromkeys(matched)
        if self.gigabytes > 0:
            others = {view.name for view in matched.values()}
            shapes = {name: view.shape for name, view in known.items() if name not in others}
            shapes |= {name: view.shape for name, view in matched.items()}
            group = at_size_together(shapes, self.plan, self.gigabytes * 1e9)
        else:
            group = self.plan.choose_together(self.sparsity)
        return {name: group.levels.get(name, 0) if group else 0 for name in matched}

    def all_pruned(self, known: Mapping[str, View], matched: Mapping[str, View]) -> tuple[dict[str, Pruned], list[str]]:
        """What is to be left out of a CLIP's encoders (by their own names), and what to tell. known, matched: see
        `together`. Raises PlanError, StandInError."""
        chosen, found, lines = self.together(known, matched), {}, []
        for name, view in matched.items():
            found[view.name], told = self.pruned(name, view, self.plan.encoder(name), chosen[name])
            lines += told
        return found, lines

    def pruned(
        self, name: str, view: View, entry: EncoderPlan, together: int | None = None
    ) -> tuple[Pruned, list[str]]:  # fmt: skip
        """What is to be left out of an encoder by the plan's entry `name`, and what to tell. together: see `level`.
        Raises PlanError, StandInError."""
        from ....skrr_engine.files.companion import of_level
        from ....skrr_engine.files.narrow import check
        from ..clip.views import Pruned

        if view.whole is not None:
            check(view.whole, entry, name)
        level, line = self.level(view.name, view.shape, entry, together)
        if level is None:
            return Pruned(), [line]
        fitted, problem = of_level(library.folders(), name, entry, level)
        if problem and entry.narrowed(level):
            return Pruned(), [problem]
        return Pruned(entry, level, fitted=fitted), [line, *([problem] if problem else [])]


def at_most_input() -> io.Input:
    """The sparsity by which a level of a plan is chosen."""
    return io.Float.Input(
        "sparsity",
        default=0.45,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How much to remove at most: the strongest level of the plan at or below this is used.",
    )


def size_gb_input() -> io.Input:
    """The size by which one is chosen instead, 10**9 bytes."""
    return io.Float.Input(
        "size_gb",
        default=0.0,
        min=0.0,
        max=1000.0,
        step=0.05,
        optional=True,
        tooltip="Instead of a sparsity: bring the encoder (all of them, where they are on one budget) to this many GB,"
        " removing as little as it takes. 0: off.",
    )


def inputs(none: str | None = None) -> list:
    """The inputs with which a node lets an artist choose a plan and a level; `none`: the entry for no plan."""
    return [
        io.Combo.Input(
            "plan",
            options=[*([none] if none else []), *library.names()],
            tooltip="A plan from models/skrr_plans, or one that ships with Skrr.",
        ),
        at_most_input(),
        io.String.Input(
            "plan_json",
            default="",
            multiline=True,
            optional=True,
            tooltip="A plan as text. It replaces the one chosen above and travels inside the workflow.",
        ),
        size_gb_input(),
    ]


def read(plan: str, plan_json: str, sparsity: float, size_gb: float, none: str | None = None) -> Choice:
    """The choice that a node's inputs stand for. Raises PlanError."""
    from ....skrr_engine.plan.model import Plan

    if plan_json.strip():
        return Choice(Plan.from_json(plan_json.strip(), "the pasted plan"), sparsity, size_gb)
    if plan == none:
        return Choice(None, sparsity, size_gb)
    return Choice(Plan.read(library.path_of(plan)), sparsity, size_gb)


def fingerprint(plan: str | None, plan_json: str | None) -> str:
    """For fingerprint_inputs: changes with the plan, pasted or in its file, and when stand-ins that it names come or
    go. None, where another node gives a text: with any plan and any stand-ins."""
    from ....skrr_engine.plan.model import Plan
    from ....skrr_engine.plan.text import PlanError

    if plan_json is None or (plan is None and not plan_json.strip()):
        return f"{plan} {library.files_state('*.json')} {library.standins_state()}"
    text = plan_json.strip()
    try:
        chosen = Plan.from_json(text) if text else Plan.read(library.path_of(plan))
    except PlanError:  # told when the node runs
        return text or library.file_sha256(plan)
    return f"{text or library.file_sha256(plan)} {library.has_standins(chosen)}"


def validate(plan: str | None, plan_json: str | None, none: str | None = None) -> bool | str:
    """For validate_inputs: a pasted plan stands in for a file that a friend's machine lacks. None: another node gives
    that text, which only the run can tell."""
    linked = plan is None or plan_json is None
    if linked or plan_json.strip() or plan == none or features.listed(plan, library.names()):
        return True
    return f'there is no plan "{plan[:100]}" here: choose another, or paste one as text'
