"""Where plans live: `models/skrr_plans/`, those that ship with the pack, and searches that were interrupted."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

import folder_paths

from ...skrr_engine import plan as plans
from ...skrr_engine import standin_file
from ...skrr_engine.plan import Plan, PlanError

FOLDER = "skrr_plans"
SHIPPED = " (shipped)"
"""Behind the names of plans that come with the pack."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")
SEARCH_KEY = "search_key"
"""In an encoder's `extensions`: which inputs the plan was searched with (see search.fingerprint)."""

UNFINISHED_KEY = "unfinished_search_key"
"""The same, where the search was stopped before its end."""


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
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise PlanError(f'there is no plan "{name[:100]}": put its .json into models/{FOLDER}, or paste it as text')
    return path


def file_sha256(name: str) -> str:
    """Of a plan's file; "" where there is none."""
    try:
        return hashlib.sha256(Path(path_of(name)).read_bytes()).hexdigest()
    except (PlanError, OSError):
        return ""  # told when the node runs


def standins_state() -> str:
    """Changes when a file of stand-ins comes, goes or changes."""
    found = []
    for path in (path for folder in folders() for path in sorted(folder.rglob(f"*{standin_file.ENDING}"))):
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


def save(plan: Plan, name: str, standins: bytes = b"") -> str:
    """Write a plan as `name`, under a numbered name where another plan has it already; returns the file's name.
    standins: the bytes of its stand-ins' file, which goes beside it."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    wanted = file_name(name)
    stem, number = wanted.removesuffix(".json"), 1
    while (folder / wanted).exists() or standin_file.beside(folder / wanted).exists():  # a renamed plan's may be left
        number += 1
        wanted = f"{stem}_{number}.json"
    if standins:
        standin_file.write(standin_file.beside(folder / wanted), standins)
    plan.write(folder / wanted)
    return wanted


def save_unfinished(plan: Plan, name: str, key: str) -> str:
    """Write what a stopped search has found, as `name`_so_far; over what an earlier stop of the same search left."""
    known = searched(key, UNFINISHED_KEY)
    if known is None:
        return save(plan, file_name(name).removesuffix(".json")[:90] + "_so_far")
    plan.write(path_of(known[0]))
    return known[0]


def searched(key: str, mark: str = SEARCH_KEY) -> tuple[str, Plan] | None:
    """The saved plan that a search with this key gave, and its name; not one whose stand-ins are missing. mark: see
    SEARCH_KEY, UNFINISHED_KEY."""
    for name in folder_paths.get_filename_list(FOLDER):
        try:
            plan = Plan.read(path_of(name))
        except PlanError:
            continue  # told to whoever loads it
        if any((entry.extensions or {}).get(mark) == key for entry in plan.encoders.values()):
            named = {x.standins.sha256 for entry in plan.encoders.values() for x in entry.levels if x.standins}
            if all(standin_file.find(folders(), digest) for digest in named):
                return name, plan
    return None


def state(key: str):
    """The state.State of the search with this key, kept while it runs."""
    from ...skrr_engine.state import State

    folder = Path(folder_paths.get_user_directory()) / "skrr_searches"
    folder.mkdir(parents=True, exist_ok=True)
    return State(folder / f"{key}.json", key)
