"""The plan: which sub-blocks of a text encoder are skipped or narrowed, in which order, and what stands in for them.

A plan is 1 to 10 KB of JSON, independent of the weights' precision. It is untrusted input: reading checks every field,
and every failure is a `PlanError` of one line that names the field, what was expected and the way out. Version 2 knows
narrowed sub-blocks; plans without any are written as version 1, which earlier Skrrs read.

Sub-blocks are numbered as in the paper: `2 * block` is self-attention, `2 * block + 1` is the feed-forward.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ..disk.atomic import replacing
from .text import _REMEDY, MAX_BYTES, PlanError, _dumped, _expected, _found, _listed, _parse, _quoted

MAX_BLOCKS = 512
MAX_WIDTH = 65_536
MAX_RANK = 4_096
MAX_UNITS = 1 << 20
MAX_STEPS = 8_192
SPARSITY_TOLERANCE = 1e-9
_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"
_ONE_LINE = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]+$"
_SUB_BLOCK_KEY = r"^(0|[1-9][0-9]{0,3})$"


def is_name(text: str) -> bool:
    """Whether an encoder may be called so in a plan."""
    return re.fullmatch(_NAME, text) is not None


class _Part(BaseModel):
    """A frozen part of a plan. A field's description is what a message says was expected there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _plan_error(type(self), error) from None


def _plan_error(part: type[_Part], error: ValidationError) -> PlanError:
    """The first thing that is wrong with `part`, its path relative to that part."""
    first = error.errors(include_url=False)[0]
    path = tuple(first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, PlanError):
        return PlanError(cause.problem, path + cause.path)
    if len(path) > 1 and path[-1] == "[key]":
        path = path[:-1]
    if path[:1] in (("reuse",), ("ranks",)):
        path = tuple(map(str, path))
    if first["type"] == "extra_forbidden":
        return PlanError("unknown field; remove it, or update Skrr where the plan comes from a newer version", path)
    what = part.model_fields[str(path[0])].description if path else "fields with readable names"
    if first["type"] == "missing":
        return PlanError(f"missing, expected {what}; {_REMEDY}", path)
    return PlanError(_expected(what, first["input"]), path)


def _integer_keys(value: Any) -> Any:
    """JSON writes the skipped sub-blocks of a re-use map as decimal strings."""
    if not isinstance(value, dict):
        return value
    return {int(k) if isinstance(k, str) and re.fullmatch(_SUB_BLOCK_KEY[1:-1], k) else k: v for k, v in value.items()}


_SubBlock = Annotated[int, Field(strict=True, ge=0, lt=2 * MAX_BLOCKS)]
_Name = Annotated[str, Field(strict=True, pattern=_NAME)]
_Text = Annotated[str, Field(strict=True, min_length=1, max_length=200, pattern=_ONE_LINE)]
_Count = Annotated[int, Field(strict=True, ge=0, le=10**9)]
_Number = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Rank = Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)]
_Sorted = PlainSerializer(lambda places: dict(sorted(places.items())))
_Ranks = Annotated[dict[_SubBlock, _Rank], BeforeValidator(_integer_keys), _Sorted]
_Reuse = Annotated[dict[_SubBlock, _SubBlock], BeforeValidator(_integer_keys), _Sorted]
_Units = Annotated[int, Field(strict=True, ge=1, le=MAX_UNITS)]
_Sha256 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
_STEP_EXPECTED = f"an integer from 0 to {2 * MAX_BLOCKS - 1}, or a pair of one and a number of units from 1 up"


def _step(value: Any) -> Any:
    """A step of an order: a sub-block that is removed, or `(sub-block, units that stay)`. Raises PlanError."""
    pair = list(value) if isinstance(value, list | tuple) else [value, 1]
    if len(pair) != 2 or not all(type(n) is int for n in pair):
        raise PlanError(_expected(_STEP_EXPECTED, value))
    if not (0 <= pair[0] < 2 * MAX_BLOCKS and 1 <= pair[1] <= MAX_UNITS):
        raise PlanError(_expected(_STEP_EXPECTED, value))
    return tuple(pair) if isinstance(value, list | tuple) else value


_Step = Annotated[
    Any,
    AfterValidator(_step),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": 2 * MAX_BLOCKS - 1},
                {
                    "type": "array",
                    "prefixItems": [
                        {"type": "integer", "minimum": 0, "maximum": 2 * MAX_BLOCKS - 1},
                        {"type": "integer", "minimum": 1, "maximum": MAX_UNITS},
                    ],
                    "minItems": 2,
                    "maxItems": 2,
                },
            ]
        }
    ),
]
_Extensions = Annotated[
    dict[Annotated[str, Field(strict=True)], Any], Field(json_schema_extra={"additionalProperties": True})
]

_TEXT_EXPECTED = "a text of 1 to 200 characters on one line"
_COUNT_EXPECTED = "an integer from 0 to 1000000000"
_EXTENSIONS_EXPECTED = "an object (Skrr carries it through unread)"


class StandIns(_Part):
    """The linear stand-ins of a level (see encoder/standin.py): the SHA-256 of the file that holds them, and each rank.

    Where that file is missing, the level is used with its re-use map alone.
    """

    sha256: _Sha256 = Field(description="64 hexadecimal digits in lower case")
    ranks: Annotated[_Ranks, Field(min_length=1)] = Field(
        description='an object like {"5": 16}, skipped sub-block to the rank of its stand-in, '
        f"integers from 0 to {2 * MAX_BLOCKS - 1} without leading zeros and ranks from 1 to {MAX_RANK}",
        json_schema_extra={"propertyNames": {"pattern": _SUB_BLOCK_KEY}, "maxProperties": 2 * MAX_BLOCKS},
    )

    def nbytes(self, width: int) -> int:
        """Bytes of the stand-ins in an encoder of this width: two float16 factors each, and a float32 bias."""
        return sum(4 * width * (rank + 1) for rank in self.ranks.values())


class Units(_Part):
    """The units of an encoder with narrowed sub-blocks: how many each attention and each feed-forward has (key/value
    heads, neurons), and the SHA-256 of the file that says in which order they go.

    Where that file is missing, the encoder stays whole.
    """

    sha256: _Sha256 = Field(description="64 hexadecimal digits in lower case")
    attention: _Units = Field(description=f"an integer from 1 to {MAX_UNITS}")
    feed_forward: _Units = Field(description=f"an integer from 1 to {MAX_UNITS}")

    def of(self, place: int) -> int:
        """Of a sub-block."""
        return self.feed_forward if place % 2 else self.attention


class Level(_Part):
    """One strength of a plan: the first `skipped` steps of the encoder's order are taken.

    `reuse` maps a skipped sub-block to the kept one of the same type that stands in for it (paper, algorithm 2).
    `sparsity` is the fraction (0 to 1) of the encoder's parameters, embedding included, that the level removes.
    `standins` repair places of this level, instead of what `reuse` does there; None where there are none.
    `discrepancy` is D of this level (paper, algorithm 1), stand-ins in place, or None where nobody measured it.
    """

    skipped: Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)] = Field(
        description=f"an integer from 1 to {MAX_STEPS}, the length of a prefix of order"
    )
    reuse: _Reuse = Field(
        description='an object like {"5": 7}, skipped sub-block to the kept one that stands in for it, '
        f"integers from 0 to {2 * MAX_BLOCKS - 1} without leading zeros",
        json_schema_extra={"propertyNames": {"pattern": _SUB_BLOCK_KEY}, "maxProperties": 2 * MAX_BLOCKS},
    )
    sparsity: Annotated[_Number, Field(le=1)] = Field(description="a number from 0 to 1")
    standins: StandIns | None = Field(default=None, description="an object with sha256 and ranks, or null")
    discrepancy: _Number | None = Field(default=None, description="a finite number from 0 up, or null")
    extensions: _Extensions = Field(default_factory=dict, description=_EXTENSIONS_EXPECTED)

    def standin_bytes(self, width: int) -> int:
        """Bytes of its stand-ins in an encoder of this width, 0 where it has none."""
        return self.standins.nbytes(width) if self.standins else 0


class EncoderPlan(_Part):
    """What a plan says about one text encoder of `blocks` blocks of `width` channels.

    `order` lists steps, the most dispensable first: a sub-block that is removed, or a pair of one and the number of its
    units that stay. Every level is a prefix of it with a re-use map of its own. `units` says what units there are, None
    where no step narrows. Steps are those that a budget takes in turn: any prefix is the best there is for its size.
    """

    family: _Name = Field(
        description="the name of an architecture: a letter, then at most 31 letters, digits, '_' or '-'"
    )
    blocks: Annotated[int, Field(strict=True, ge=1, le=MAX_BLOCKS)] = Field(
        description=f"an integer from 1 to {MAX_BLOCKS}"
    )
    width: Annotated[int, Field(strict=True, ge=1, le=MAX_WIDTH)] = Field(
        description=f"an integer from 1 to {MAX_WIDTH}"
    )
    order: Annotated[tuple[_Step, ...], Field(min_length=1, max_length=MAX_STEPS)] = Field(
        description="a list of at least one sub-block, each an integer from 0 to 2 * blocks - 1 and named once, or of"
        " steps like [7, 640] that narrow one",
        json_schema_extra={"uniqueItems": True},
    )
    units: Units | None = Field(
        default=None, description="an object with sha256, attention and feed_forward, or null where nothing is narrowed"
    )
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=2 * MAX_BLOCKS)] = Field(
        description="a list of at least one level, each an object"
    )
    extensions: _Extensions = Field(default_factory=dict, description=_EXTENSIONS_EXPECTED)

    @model_validator(mode="after")
    def _consistent(self) -> EncoderPlan:
        self._check_order()
        for index, level in enumerate(self.levels):
            self._check_step(index, level)
            self._check_reuse(("levels", index, "reuse"), level)
            self._check_standins(("levels", index, "standins", "ranks"), level)
        return self

    def _check_order(self) -> None:
        left: dict[int, int] = {}
        for index, step in enumerate(self.order):
            path = ("order", index)
            place, units = step if isinstance(step, tuple) else (step, 0)
            if place >= 2 * self.blocks:
                raise PlanError(_expected(f"an integer from 0 to {2 * self.blocks - 1}", place), path)
            if units and self.units is None:
                raise PlanError(f"missing, as order narrows sub-blocks; {_REMEDY}", ("units",))
            if left.get(place) == 0:
                raise PlanError(f"expected every sub-block once, found {place} again; {_REMEDY}", path)
            if units and units >= (before := left.get(place, self.units.of(place))):
                raise PlanError(_expected(f"fewer than {before} units of sub-block {place}", units), path)
            left[place] = units

    def _check_step(self, index: int, level: Level) -> None:
        path = ("levels", index)
        least, floor = 1, 0.0
        if index:
            least, floor = self.levels[index - 1].skipped + 1, self.levels[index - 1].sparsity
        if level.skipped > len(self.order):
            what = f"at most {len(self.order)}, the length of order"
            raise PlanError(_expected(what, level.skipped), (*path, "skipped"))
        if level.skipped < least:
            what = f"at least {least}, more than in the level before"
            raise PlanError(_expected(what, level.skipped), (*path, "skipped"))
        if level.sparsity < floor:
            what = f"at least {floor!r}, the sparsity of the level before"
            raise PlanError(_expected(what, level.sparsity), (*path, "sparsity"))

    def _check_reuse(self, path: tuple[str | int, ...], level: Level) -> None:
        touched = self.left(level)
        skipped = {place for place, units in touched.items() if not units}
        for place, target in level.reuse.items():
            here = (*path, str(place))
            if place not in skipped:
                what = f"one of the {len(skipped)} sub-blocks that this level skips as the place of a re-use"
                raise PlanError(_expected(what, place), here)
            if target >= 2 * self.blocks:
                raise PlanError(_expected(f"an integer from 0 to {2 * self.blocks - 1}", target), here)
            if target % 2 != place % 2:
                kind = "a feed-forward sub-block (odd)" if place % 2 else "an attention sub-block (even)"
                raise PlanError(_expected(f"{kind}, the type of its place", target), here)
            if target in touched:
                raise PlanError(_expected("a sub-block that this level keeps", target), here)

    def _check_standins(self, path: tuple[str | int, ...], level: Level) -> None:
        touched = self.left(level)
        for place, rank in (level.standins.ranks if level.standins else {}).items():
            if place not in touched:
                what = f"one of the {len(touched)} sub-blocks that this level changes as the place of a stand-in"
                raise PlanError(_expected(what, place), (*path, str(place)))
            if rank > self.width:
                raise PlanError(_expected(f"at most {self.width}, the width", rank), (*path, str(place)))

    def left(self, level: Level | int) -> dict[int, int]:
        """Sub-block -> the number of its units that stay at a level, 0 where it is removed; those that the level
        changes, in the order in which it first does. level: or a number of steps."""
        steps = self.order[: level if isinstance(level, int) else level.skipped]
        return dict(step if isinstance(step, tuple) else (step, 0) for step in steps)

    def shares(self, level: Level | int) -> dict[int, Fraction]:
        """The same as shares of each sub-block's units."""
        return {i: Fraction(n, self.units.of(i)) if n else Fraction(0) for i, n in self.left(level).items()}

    def narrowed(self, level: Level | int) -> dict[int, int]:
        """The narrowed ones of them alone."""
        return {place: units for place, units in self.left(level).items() if units}

    def narrowable(self) -> set[int]:
        """The sub-blocks that some step narrows, whether a later one removes them or not."""
        return {step[0] for step in self.order if isinstance(step, tuple)}

    def level(self, skipped: int) -> Level:
        """The level of exactly `skipped` steps. Raises PlanError that names the levels there are."""
        for level in self.levels:
            if level.skipped == skipped:
                return level
        have = _listed(level.skipped for level in self.levels)
        raise PlanError(f"no level takes {_found(skipped)} steps; choose one of {have}", ("levels",))

    def choose(self, sparsity: float) -> Level:
        """The strongest level whose sparsity (fraction, 0 to 1) is at or below the one asked for.

        Raises PlanError that names the smallest level's sparsity where even that one is above.
        """
        for level in reversed(self.levels):
            if level.sparsity <= sparsity + SPARSITY_TOLERANCE:
                return level
        smallest = self.levels[0].sparsity
        raise PlanError(
            f"no level at or below a sparsity of {sparsity:.6g}; the smallest has {smallest!r}, ask for that or more",
            ("levels",),
        )

    def check(self, family: str, blocks: int, width: int, encoder_name: str) -> None:
        """Raises PlanError unless the plan was made for an encoder of this family, block count and width."""
        for field, found in (("family", family), ("blocks", blocks), ("width", width)):
            wanted = getattr(self, field)
            if wanted != found:
                raise PlanError(
                    f"the plan is made for {self._kind()}: expected {field} {_found(wanted)}, found {_found(found)} "
                    f"in the encoder {_quoted(encoder_name)}; choose a plan made for this encoder"
                )

    def check_units(self, counts: Mapping[int, int], lengths: Mapping[int, Collection[int]], encoder_name: str) -> None:
        """Raises PlanError unless the sub-blocks that some step narrows have as many units as the plan says. counts:
        sub-block -> how many the encoder's has, where that is known; lengths: which its units must divide."""
        for place in sorted(self.narrowable()):
            field, wanted = "feed_forward" if place % 2 else "attention", self.units.of(place)
            odd = [length for length in lengths.get(place, ()) if length % wanted]
            if odd or counts.get(place, wanted) != wanted:
                found = counts.get(place, f"a projection of length {odd[0]}" if odd else None)
                raise PlanError(
                    f"the plan is made for {self._kind()}: expected units.{field} {wanted}, found {found} at sub-block"
                    f" {place} of the encoder {_quoted(encoder_name)}; choose a plan made for this encoder"
                )

    def _kind(self) -> str:
        return f"a {self.family} encoder of {self.blocks} blocks and width {self.width}"


class Together(_Part):
    """Levels of several encoders that belong together: what one budget over all of them leaves of each.

    `levels` maps an encoder to the length of its level; encoders of the plan that it does not name stay whole.
    `sparsity` is the share of all their parameters that is removed (those of encoders that stay whole count, too).
    `discrepancy` is the sum of each level's D beside that of an encoder that says nothing, None where it is not known.
    """

    sparsity: Annotated[_Number, Field(le=1)] = Field(description="a number from 0 to 1")
    levels: Annotated[dict[_Name, Annotated[int, Field(strict=True, ge=1, le=MAX_STEPS)]], Field(min_length=1)] = Field(
        description='an object like {"t5xxl": 40}, encoder to the length of one of its levels',
        json_schema_extra={"additionalProperties": False},
    )
    discrepancy: _Number | None = Field(default=None, description="a finite number from 0 up, or null")


class Provenance(_Part):
    """Where a plan comes from: `source` ("search", "paper", "manual"), and, where known, how it was searched.

    `prompts` is the number of calibration prompts and `prompts_sha256` their hash (see `prompts.sha256`).
    """

    source: _Text = Field(description=_TEXT_EXPECTED)
    projection: _Text | None = Field(default=None, description=_TEXT_EXPECTED)
    denoiser: _Text | None = Field(default=None, description=_TEXT_EXPECTED)
    prompts: _Count | None = Field(default=None, description=_COUNT_EXPECTED)
    prompts_sha256: _Sha256 | None = Field(default=None, description="64 hexadecimal digits in lower case")
    beam: _Count | None = Field(default=None, description=_COUNT_EXPECTED)
    created_with: _Text | None = Field(default=None, description=_TEXT_EXPECTED)


class Plan(_Part):
    """A plan for one or several text encoders, by name (`t5xxl`, `clip_l`, ...), with its provenance."""

    model_config = ConfigDict(json_schema_extra={"required": ["format", "version", "encoders", "provenance"]})

    format: Literal["skrr-plan"] = Field(default="skrr-plan", description="'skrr-plan' (other files are no plans)")
    version: Annotated[int, Field(strict=True, ge=1, le=2)] = Field(
        default=1, description="version 1 or 2 (newer plans need a newer Skrr)"
    )
    encoders: Annotated[dict[_Name, EncoderPlan], Field(min_length=1)] = Field(
        description="an object of at least one encoder, each an object under its name: a letter, then at most 31 "
        "letters, digits, '_' or '-'",
        json_schema_extra={"additionalProperties": False},
    )
    provenance: Provenance = Field(description="an object")
    together: Annotated[tuple[Together, ...], Field(max_length=2 * MAX_BLOCKS)] = Field(
        default=(), description="a list of levels that belong together, each an object"
    )

    @model_validator(mode="before")
    @classmethod
    def _versioned(cls, data: Any) -> Any:
        """The version that a new plan needs."""
        entries = data.get("encoders") if isinstance(data, dict) and "version" not in data else None
        narrows = isinstance(entries, dict) and any(getattr(entry, "units", None) for entry in entries.values())
        return {**data, "version": 2} if narrows or (entries and data.get("together")) else data

    @model_validator(mode="after")
    def _check_version(self) -> Plan:
        if self.version < 2 and any(entry.units for entry in self.encoders.values()):
            raise PlanError(_expected("version 2, as sub-blocks are narrowed", self.version), ("version",))
        if self.version < 2 and self.together:
            raise PlanError(_expected("version 2, as levels belong together", self.version), ("version",))
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Plan:
        floor = 0.0
        for index, group in enumerate(self.together):
            path = ("together", index)
            if group.sparsity < floor:
                what = f"at least {floor!r}, the sparsity of the one before"
                raise PlanError(_expected(what, group.sparsity), (*path, "sparsity"))
            floor = group.sparsity
            for name, skipped in group.levels.items():
                here = (*path, "levels", name)
                if name not in self.encoders:
                    raise PlanError(_expected(f"one of {_listed(sorted(self.encoders))}", name), here)
                if all(level.skipped != skipped for level in self.encoders[name].levels):
                    have = _listed(level.skipped for level in self.encoders[name].levels)
                    raise PlanError(_expected(f"one of {have}, the levels of {name}", skipped), here)
        return self

    def choose_together(self, sparsity: float) -> Together:
        """The strongest levels that belong together whose sparsity, of all encoders, is at or below the one asked for.
        Raises PlanError that names the smallest where even that one is above."""
        for group in reversed(self.together):
            if group.sparsity <= sparsity + SPARSITY_TOLERANCE:
                return group
        smallest = self.together[0].sparsity
        raise PlanError(
            f"nothing at or below a sparsity of {sparsity:.6g}; the smallest has {smallest!r}, ask for that or more",
            ("together",),
        )

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "the plan") -> Plan:
        """Reads and checks a plan of at most 64 KiB, also as `to_json` gives it. `source` names where the text comes
        from in messages. Raises PlanError."""
        try:
            data = _parse(text)
            for field in ("format", "version"):
                if field not in data:
                    raise PlanError(f"missing, expected {cls.model_fields[field].description}; {_REMEDY}", (field,))
            plan = cls(**data)
            plan.to_json()  # refuses what could not be written again: some texts are longer in Skrr's form
            return plan
        except PlanError as error:
            raise PlanError(error.problem, error.path, source) from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads a plan from a file, at most 64 KiB of it. Raises PlanError, also where there is no such file."""
        path = Path(path)
        try:
            if not path.is_file():
                what = "a folder" if path.is_dir() else "nothing"
                raise PlanError(f"expected a plan file, found {what}; choose a .json file", source=str(path))
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise PlanError(f"cannot be read ({error.strerror}); check the file", source=str(path)) from None
        return cls.from_json(text, source=str(path))

    def encoder(self, name: str) -> EncoderPlan:
        """What the plan says about the encoder `name`. Raises PlanError that names the encoders there are."""
        if name not in self.encoders:
            problem = f"nothing for {_quoted(name)}; the plan has {_listed(sorted(self.encoders))}, choose one of them"
            raise PlanError(problem, ("encoders",))
        return self.encoders[name]

    def to_json(self) -> str:
        """The plan as text: ASCII, one level a line, equal plans giving equal texts. Raises PlanError above 64 KiB."""
        try:
            text = _plan_text(self)
            _parse(text)
        except PlanError:
            raise
        except (TypeError, ValueError, RecursionError):
            raise PlanError("the plan's extensions hold what JSON cannot; keep to plain finite values") from None
        return text

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file, whole or not at all. Raises PlanError."""
        text = self.to_json()
        try:
            with replacing(path) as file:
                file.write(text.encode("ascii"))
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); choose another place"
            raise PlanError(problem, source=str(path)) from None


def _plan_text(plan: Plan) -> str:
    """A plan's fields as its parts dump them, laid out for people: a line for a level, the encoders by their names."""
    data = plan.model_dump(exclude_defaults=True)
    encoders = ",\n".join(f"    {_dumped(name)}: {_encoder_text(e)}" for name, e in sorted(data["encoders"].items()))
    groups = ",\n".join(f"    {_dumped(group)}" for group in data.get("together", ()))
    together = f',\n  "together": [\n{groups}\n  ]' if groups else ""
    return (
        f'{{\n  "format": {_dumped(plan.format)},\n  "version": {_dumped(plan.version)},\n'
        f'  "encoders": {{\n{encoders}\n  }},\n  "provenance": {_dumped(data["provenance"])}{together}\n}}\n'
    )


def _encoder_text(data: dict[str, Any]) -> str:
    levels = ",\n".join(f"        {_dumped(level)}" for level in data["levels"])
    texts = {name: _dumped(value) for name, value in data.items()} | {"levels": f"[\n{levels}\n      ]"}
    return "{\n" + ",\n".join(f'      "{name}": {text}' for name, text in texts.items()) + "\n    }"


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a plan, as strict as a schema can say; `docs/plan.schema.json` holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Plan.model_json_schema()}


def shipped() -> dict[str, Path]:
    """The plans that come with Skrr: name to file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "shipped").glob("*.json"))}
