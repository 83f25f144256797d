"""What is too large for a plan: safetensors, a few MB, beside it or in a pruned encoder file; plans name it by hash.

A file holds the stand-ins of all levels of a plan, under names like `t5xxl.17.46.down`: encoder, length of the level's
prefix, place, and `down`, `up` or `bias` (see encoder/standin.py); and of each place that is narrowed at some level all
its units, those that stay longest first: `t5xxl.units.46`, int32. At a level the first so many of them stay. One file
serves every precision of the encoder. Such files are untrusted input, as plans are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..disk import safetensors as header
from ..disk.atomic import abandoned, claim, file_sha256, replacing, unnamed
from ..encoder.actions import Assignment, assignment
from ..encoder.standin import NORMS, StandIn
from ..errors import SkrrError, first_line
from ..plan.model import EncoderPlan, Level, Plan, StandIns
from ..plan.text import PlanError

ENDING = ".standins.safetensors"
FORMAT = {"format": "skrr-standins", "version": "1"}
VERSIONS = ("1", "2")
"""The second knows units."""
PARTS = ("down", "up", "bias")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BYTES = 1 << 30


class StandInError(SkrrError):
    """Stand-ins that can't be had or used; one line that names the file and the remedy."""


def beside(plan: str | os.PathLike[str]) -> Path:
    """The usual place of the stand-ins of a plan's file."""
    return Path(plan).with_name(Path(plan).stem + ENDING)


Found = Mapping[str, Mapping[int, Mapping[int, StandIn]]]
"""Encoder -> length of a level's prefix -> place -> stand-in."""
Orders = Mapping[str, Mapping[int, torch.Tensor]]
"""Encoder -> place -> numbers of all its units, int64 or int32, those that stay longest first."""


@dataclass(frozen=True)
class Fitted:
    """What a level's companion file holds of an encoder. standins: place -> what stands there; units: narrowed place ->
    numbers of all its units, those that stay longest first."""

    standins: Mapping[int, StandIn] = field(default_factory=dict)
    units: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def assignment(self, entry: EncoderPlan, level: Level) -> Assignment:
        """What is done to the encoder at a level; nothing where the units that it needs are missing."""
        narrowed = entry.narrowed(level)
        if not narrowed.keys() <= self.units.keys():
            return {}
        left = {place: self.units[place][:count] for place, count in narrowed.items()}
        return assignment(entry.left(level), level.reuse, self.standins, left)


def packed(found: Found, orders: Orders | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """Stand-ins and units as a file names them, and a text that says the norms of each encoder's stand-ins."""
    tensors: dict[str, torch.Tensor] = {
        f"{name}.units.{place}": order.to("cpu", torch.int32).contiguous()
        for name, places in (orders or {}).items()
        for place, order in places.items()
    }
    norms = set()
    for name, levels in found.items():
        for level, standins in levels.items():
            for place, standin in standins.items():
                norms.add(f"{name}:{standin.norm}")
                for part in PARTS:
                    tensors[f"{name}.{level}.{place}.{part}"] = getattr(standin, part).cpu().contiguous()
    return tensors, ",".join(sorted(norms))


def encoded(plan: Plan, found: Found, orders: Orders | None = None) -> tuple[Plan, bytes]:
    """A plan that names its stand-ins and units, and their file's bytes: the same for the same. Levels without an entry
    stay as they are."""
    tensors, norms = packed(found, orders)
    data = safetensors_bytes(tensors, {**FORMAT, "version": VERSIONS[1 if orders else 0], "norms": norms})
    digest = hashlib.sha256(data).hexdigest()

    def named(level: Level, standins: Mapping[int, StandIn] | None) -> Level:
        if not standins:
            return level
        ranks = {place: standin.rank for place, standin in sorted(standins.items())}
        return level.model_copy(update={"standins": StandIns(sha256=digest, ranks=ranks)})

    def of_entry(name: str, entry: EncoderPlan) -> EncoderPlan:
        levels = tuple(named(level, found.get(name, {}).get(level.skipped)) for level in entry.levels)
        own = entry.units is not None and name in (orders or {})
        units = entry.units.model_copy(update={"sha256": digest}) if own else entry.units
        return entry.model_copy(update={"levels": levels, "units": units})

    return plan.model_copy(update={"encoders": {n: of_entry(n, e) for n, e in plan.encoders.items()}}), data


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of these, always in one order (safetensors' own writer shuffles the metadata)."""
    entries = {key: header.Entry(header.NAMES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}
    listed = {key: entries[key] for key in sorted(entries, key=lambda key: (-entries[key].itemsize, key))}
    pieces = (chunk for key in listed for chunk in header.tensor_bytes(tensors[key]))
    return b"".join([header.write(listed, metadata), *pieces])


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


def write_both(path: str | os.PathLike[str], plan: Plan, data: bytes) -> None:
    """Write a plan, and its stand-ins beside it, in place of what is there: both or, where they don't fit, neither.
    Raises PlanError, OSError."""
    text = plan.to_json().encode("ascii")
    with replacing(path) as first, replacing(beside(path)) as second:
        for file, part in ((first, text), (second, data)):
            file.write(part)
            file.flush()


IN_THE_MAKING = "plan-"
"""See files.unnamed: of plans whose stand-ins may have their name already."""


def write_new(paths: Iterable[Path], plan: Plan, data: bytes = b"") -> Path:
    """Write a plan, and its stand-ins beside it, under the first of these names, all in one folder, that is free for
    both; returns it. Nothing is written over, whoever else writes at the same moment. Raises PlanError, OSError."""
    text = plan.to_json().encode("ascii")
    paths = iter(paths)
    path = next(paths)
    with unnamed(path, IN_THE_MAKING) as whole, unnamed(beside(path)) as standins:
        write(whole, text)
        clear_stranded(path.parent, whole.stat().st_mtime)
        if data:
            write(standins, data)
        while not claimed(path, whole, standins if data else None):
            path = next(paths)
    return path


def claimed(path: Path, plan: Path, standins: Path | None) -> bool:
    """Give a plan's whole file, and its stand-ins', their names; False where one of the names is taken. Raises
    WriteError."""
    try:
        if standins is not None:
            claim(standins, beside(path))
        elif beside(path).exists():  # of a plan that was renamed
            return False
    except FileExistsError:
        return False
    try:
        claim(plan, path)
    except OSError as error:
        if standins is not None:
            beside(path).unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def clear_stranded(folder: Path, now: float) -> None:
    """Remove what a process that was killed within `write_new` an hour ago has left in a folder: a plan without a name,
    and its stand-ins where they have got theirs and no plan names them. now: see files.remove_abandoned."""
    for left in abandoned(folder, now, IN_THE_MAKING):
        with contextlib.suppress(OSError):
            try:
                plan = Plan.from_json(left.read_bytes())
            except PlanError:
                plan = None  # killed in the middle of a write
            for digest in digests(plan) if plan else ():
                path = find([folder], digest)
                texts = (other.read_bytes() for other in folder.rglob("*.json"))
                if path is not None and not any(digest.encode() in text for text in texts):
                    path.unlink()
            left.unlink()


def digests(plan: Plan) -> set[str]:
    """The hashes of the companion files that a plan names."""
    return {digest for e in plan.encoders.values() for x in e.levels for digest in level_digests(e, x)}


def level_digests(entry: EncoderPlan, level: Level) -> set[str]:
    """The hashes of the files that a level needs: of its stand-ins, and of its units where it narrows."""
    named = (level.standins, entry.units if entry.narrowed(level) else None)
    return {part.sha256 for part in named if part is not None}


def read(path: str | os.PathLike[str], name: str, entry: EncoderPlan, level: Level) -> Fitted:
    """What a level of the plan's entry `name` needs of its file, each tensor checked. Raises StandInError."""
    path = Path(path)
    if sha256(path) not in level_digests(entry, level):
        raise StandInError(f"{path.name}: not the stand-ins that this plan names; get the file that came with the plan")
    with opened(path) as (metadata, fetch):
        if metadata.get("format") != FORMAT["format"] or metadata.get("version") not in VERSIONS:
            raise StandInError(f"{path.name}: no stand-ins that this Skrr can read; update Skrr, or get it again")
        return checked(fetch, metadata.get("norms", ""), path.name, name, entry, level)


Fetch = Callable[[str], "torch.Tensor | None"]
"""A companion file's tensor of this name, None where it has none."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Mapping[str, str], Fetch]]:
    """A companion file's metadata, and what fetches its tensors while this lasts. Raises StandInError where it, or a
    tensor of it, can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())

            def fetch(key: str) -> torch.Tensor | None:
                return file.get_tensor(key).clone() if key in names else None  # else it would stay the file's own bytes

            yield file.metadata() or {}, fetch
    except StandInError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise StandInError(f"{path.name}: can't be read as safetensors ({first_line(error)}); get it again") from None


def checked(fetch: Fetch, norms: str, source: str, name: str, entry: EncoderPlan, level: Level) -> Fitted:
    """What a level needs out of named tensors and their norms, as `packed` gives both. Raises StandInError."""
    units = {
        place: checked_units(fetch, source, f"{name}.units.{place}", entry, place) for place in entry.narrowed(level)
    }
    if level.standins is None:
        return Fitted(units=units)
    norm = dict(part.split(":", 1) for part in norms.split(",") if ":" in part).get(name)
    if norm not in NORMS:
        raise StandInError(f"{source}: no stand-ins for {name} that this Skrr can read; update Skrr, or get it again")
    found = {}
    for place, rank in level.standins.ranks.items():
        shapes = dict(zip(PARTS, ((rank, entry.width), (entry.width, rank), (entry.width,)), strict=True))
        parts = {}
        for part, shape in shapes.items():
            key = f"{name}.{level.skipped}.{place}.{part}"
            tensor = fetch(key)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
                has = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise StandInError(f"{source}: {key}: expected floats {list(shape)}, found {has}; get it again")
            if not bool(tensor.float().isfinite().all()):
                raise StandInError(f"{source}: {key}: holds numbers that are not finite; get it again")
            parts[part] = tensor
        found[place] = StandIn(norm, **parts)
    return Fitted(found, units)


def checked_units(fetch: Fetch, source: str, key: str, entry: EncoderPlan, place: int) -> torch.Tensor:
    """The numbers of all units of a place, int64, from a named tensor. Raises StandInError."""
    order, count = fetch(key), entry.units.of(place)
    if order is None or order.dtype != torch.int32 or tuple(order.shape) != (count,):
        has = "missing" if order is None else f"{order.dtype} {list(order.shape)}"
        raise StandInError(f"{source}: {key}: expected torch.int32 [{count}], found {has}; get it again")
    order = order.long()
    if not torch.equal(order.sort().values, torch.arange(count)):
        raise StandInError(f"{source}: {key}: expected each unit from 0 to {count - 1} once; get it again")
    return order


def sha256(path: Path) -> str:
    """Of a file of stand-ins. Raises StandInError where there is none, or a file too large to be one."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise StandInError(f"{path.name}: too large for stand-ins; get the file that came with the plan")
        return file_sha256(path)
    except OSError as error:
        raise StandInError(f"{path.name}: can't be read ({error.strerror}); put it beside the plan") from None


@functools.lru_cache(maxsize=256)
def known_sha256(path: Path, size: int, changed: int) -> str:
    """`sha256`, asked for once for as long as a file's size and time stay."""
    return sha256(path)


def find(folders: Iterable[Path], wanted: str, first: Path | None = None) -> Path | None:
    """The file of stand-ins with this hash: `first`, where it is that, or any in the folders; None where none is."""
    candidates = [first] if first is not None else []
    candidates += [path for folder in folders for path in sorted(Path(folder).rglob(f"*{ENDING}"))]
    for path in candidates:
        try:
            stat = path.stat()
            if known_sha256(path, stat.st_size, stat.st_mtime_ns) == wanted:
                return path
        except (StandInError, OSError):
            continue
    return None


def of_level(
    folders: Iterable[Path], name: str, entry: EncoderPlan, level: Level, first: Path | None = None
) -> tuple[Fitted, str]:
    """What a level needs of its companion file, and what to tell where that is missing (then there is nothing). Raises
    StandInError for a file of the right hash that holds the wrong things."""
    wanted = level_digests(entry, level)
    if not wanted:
        return Fitted(), ""
    if len(wanted) > 1:
        raise StandInError(f"{name}: the plan names two files for one level; export it again")
    path = find(folders, min(wanted), first)
    if path is not None:
        return read(path, name, entry, level), ""
    put = "put the file beside the plan, or into models/skrr_plans"
    if entry.narrowed(level):
        return Fitted(), (
            f"{name}: the file of this plan's units and stand-ins (*{ENDING}) is missing, so the encoder stays whole:"
            f" {put}"
        )
    return Fitted(), (
        f"{name}: the file of this plan's stand-ins (*{ENDING}) is missing: the plan only skips and re-uses now,"
        f" and pictures may break; {put}"
    )


def of_entry(
    folders: Iterable[Path], name: str, entry: EncoderPlan, first: Path | None = None
) -> dict[int, torch.Tensor]:
    """Place -> numbers of all its units, of every place that an entry's order narrows: what fitting it anew, at any of
    its lengths, takes. Raises StandInError where their file is missing."""
    places = sorted({step[0] for step in entry.order if isinstance(step, tuple)})
    if not places:
        return {}
    path = find(folders, entry.units.sha256, first)
    if path is None:
        raise StandInError(
            f"{name}: the file of this plan's units and stand-ins (*{ENDING}) is missing, so it can't be fitted anew:"
            " put the file beside the plan, or into models/skrr_plans"
        )
    with opened(path) as (_, fetch):
        return {i: checked_units(fetch, path.name, f"{name}.units.{i}", entry, i) for i in places}
