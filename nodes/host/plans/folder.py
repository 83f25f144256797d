"""Where plans live: `models/skrr_plans/`, those that ship with the pack, and searches that were interrupted."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ....skrr_engine.disk.atomic import numbered
from ....skrr_engine.errors import SkrrError
from ....skrr_engine.files import companion as standin_file
from ....skrr_engine.plan import model as plans
from ....skrr_engine.plan.model import Plan
from ....skrr_engine.plan.text import PlanError
from .. import versions as features

FOLDER = "skrr_plans"
SHIPPED = " (shipped)"
"""Behind the names of plans that come with the pack."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")


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


def has_standins(plan: Plan) -> bool:
    """Whether all the files of stand-ins that a plan names are here."""
    return all(standin_file.find(folders(), digest) for digest in standin_file.digests(plan))
