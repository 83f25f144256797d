"""Plans that searches have left, found again by what they were searched with."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import folder_paths

from ....skrr_engine.disk.atomic import replacing
from ....skrr_engine.errors import SkrrError
from ....skrr_engine.plan.model import Plan
from .folder import FOLDER, FolderError, file_name, file_sha256, has_standins, path_of, save

FOUND, SO_FAR = "plan", "so_far"
"""Endings of notes on saved plans (see Note): of searches that have ended, and of those that were stopped."""


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


def state(key: str):
    """The state.State of the search with this key, kept while it runs. Raises FolderError."""
    from ....skrr_engine.search.resume import State

    return State(searches() / f"{key}.json", key)
