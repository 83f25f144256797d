"""Where plans live: `models/skrr_plans/`, those that ship with the pack, and searches that were interrupted."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import folder_paths

from ...skrr_engine import plan as plans
from ...skrr_engine import standin_file
from ...skrr_engine.errors import SkrrError
from ...skrr_engine.files import numbered, replacing
from ...skrr_engine.plan import Plan, PlanError
from . import features

FOLDER = "skrr_plans"
SHIPPED = " (shipped)"
"""Behind the names of plans that come with the pack."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
FOUND, SO_FAR = "plan", "so_far"
"""Endings of notes on saved plans (see Note): of searches that have ended, and of those that were stopped."""


class FolderError(SkrrError):
    """No folder to write to; one line that says why and what to do."""


def register() -> None:
    """Make `models/skrr_plans` known to ComfyUI; folders from extra_model_paths.yaml stay."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.folder_names_and_paths[FOLDER][0], {".json"})


def folders() -> list[Path]:
    """Where the files of plans and of their stand-ins are."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]


def names() -> list[str]:
    """All plans by the names that nodes offer: the artist's own, then the shipped ones."""
    return [*folder_paths.get_filename_list(FOLDER), *(name + SHIPPED for name in plans.shipped())]


def path_of(name: str) -> str:
    """File of a plan by its name. Raises PlanError where there is none."""
    shipped = plans.shipped()
    if name.removesuffix(SHIPPED) in shipped and name.endswith(SHIPPED):
        return str(shipped[name.removesuffix(SHIPPED)])
    for spelling in features.spellings(name):
        if (path := folder_paths.get_full_path(FOLDER, spelling)) is not None:
            return path
    raise PlanError(f'there is no plan "{name[:100]}": put its .json into models/{FOLDER}, or paste it as text')


def file_sha256(name: str) -> str:
    """Of a plan's file; "" where there is none."""
    try:
        return hashlib.sha256(Path(path_of(name)).read_bytes()).hexdigest()
    except (PlanError, OSError):
        return ""  # told when the node runs


def standins_state() -> str:
    """Changes when a file of stand-ins comes, goes or changes."""
    return files_state(f"*{standin_file.ENDING}")


def files_state(pattern: str) -> str:
    """Changes when a file of this pattern comes, goes or changes in the plans' folders."""
    found = []
    for path in (path for folder in folders() for path in sorted(folder.rglob(pattern))):
        with contextlib.suppress(OSError):  # a dangling link, or gone meanwhile
            stat = path.stat()
            found.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
    return " ".join(found)


def file_name(name: str, what: str = "a plan") -> str:
    """The file name of a new plan. what: it is for, in the error. Raises PlanError where the name could be a path."""
    stem = name.strip().removesuffix(".json")
    if not NAME.fullmatch(stem):
        raise PlanError(
            f'"{name[:40]}" can\'t name {what}: use up to 100 letters, digits, spaces, dots, hyphens and underscores'
        )
    return stem + ".json"


def folder_to_write(kind: str) -> Path:
    """The first of ComfyUI's folders of a kind that can be written to; made where it is not there. Raises
    FolderError."""
    problems = []
    for folder in map(Path, folder_paths.get_folder_paths(kind)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            cause = "is no folder" if isinstance(error, FileExistsError) else error.strerror
            problems.append(f"{folder}: {cause}")
    raise FolderError(
        f"nothing can be written to models/{kind} ({'; '.join(problems)}): allow writing there, or name another folder"
        " in extra_model_paths.yaml"
    )


def free_paths(kind: str, folder: Path, stem: str, ending: str) -> Iterator[Path]:
    """Names for a new file, numbered, that none of ComfyUI's folders of a kind has: it would hide the new one."""
    taken = folder_paths.get_full_path
    return (path for path in numbered(folder, stem, ending) if taken(kind, path.name) is None)


def save(plan: Plan, name: str, standins: bytes = b"") -> str:
    """Write a plan as `name`, under a numbered name where another plan has it already; returns the file's name.
    standins: the bytes of its stand-ins' file, which goes beside it. Raises SkrrError."""
    stem = file_name(name).removesuffix(".json")
    paths = free_paths(FOLDER, folder_to_write(FOLDER), stem, ".json")
    return standin_file.write_new(paths, plan, standins).name


@dataclass(frozen=True)
class Note:
    """What a search remembers of a plan that it has saved: its name, and the SHA-256 of the file as it was written. A
    plan's own words are not trusted for that: it may have been edited, copied, or come from somebody else."""

    name: str
    sha256: str


def searches() -> Path:
    """The folder of searches' states and notes. Raises FolderError."""
    folder = Path(folder_paths.get_user_directory()) / "skrr_searches"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder}: can't be made ({error.strerror}); allow writing there") from None
    return folder


def remember(key: str, kind: str, name: str, plan: Plan) -> None:
    """Note the plan that the search with this key has just saved. kind: FOUND, SO_FAR."""
    note = Note(name, hashlib.sha256(plan.to_json().encode("ascii")).hexdigest())
    try:
        with replacing(searches() / f"{key}.{kind}") as file:
            file.write(json.dumps(asdict(note)).encode("ascii"))
    except (SkrrError, OSError) as error:  # the plan is there all the same
        logging.warning("[Skrr] a later search with these inputs will not find its plan: %s", error)


def noted(key: str, kind: str) -> Note | None:
    """The note of the search with this key."""
    try:
        note = Note(**json.loads((searches() / f"{key}.{kind}").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return note if isinstance(note.name, str) and note.sha256 else None


def save_searched(plan: Plan, name: str, key: str, standins: bytes = b"") -> str:
    """Write what a search has found (see `save`), for `searched` to find."""
    saved = save(plan, name, standins)
    remember(key, FOUND, saved, plan)
    return saved


def save_unfinished(plan: Plan, name: str, key: str) -> str:
    """Write what a stopped search has found, as `name`_so_far; over what an earlier stop of the same search left, as
    long as nobody has changed that."""
    before = noted(key, SO_FAR)
    if before is not None and file_sha256(before.name) == before.sha256:
        saved = before.name
        plan.write(path_of(saved))
    else:
        saved = save(plan, file_name(name).removesuffix(".json")[:90] + "_so_far")
    remember(key, SO_FAR, saved, plan)
    return saved


def searched(key: str) -> tuple[str, Plan] | None:
    """The saved plan that the search with this key has found, and its name, which may be another by now; None where it
    is gone or was changed, or its stand-ins are missing."""
    note = noted(key, FOUND)
    if note is None:
        return None
    for name in sorted(folder_paths.get_filename_list(FOLDER), key=lambda name: name != note.name):
        if file_sha256(name) == note.sha256:
            plan = Plan.read(path_of(name))
            return (name, plan) if has_standins(plan) else None
    return None


def has_standins(plan: Plan) -> bool:
    """Whether all the files of stand-ins that a plan names are here."""
    return all(standin_file.find(folders(), digest) for digest in standin_file.digests(plan))


def state(key: str):
    """The state.State of the search with this key, kept while it runs. Raises FolderError."""
    from ...skrr_engine.state import State

    return State(searches() / f"{key}.json", key)
