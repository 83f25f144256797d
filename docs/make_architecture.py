"""Writes docs/architecture.md: the rooms of the code as its imports show them. Run it after rooms or imports change.

python docs/make_architecture.py
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"

ENGINE = ("disk", "plan", "encoder", "measure", "standins", "search", "weights", "files", "cli")
"""The engine's rooms in their order: none imports one to its right."""

NODES = ("drawing", "host", "")
"""The rooms of nodes/ in their order; "" are the nodes themselves."""

CHANGES = (
    ("a family of encoders", "skrr_engine/encoder/families/", "one file, and its line in the table"),
    ("what can be done at a place", "skrr_engine/encoder/actions.py", "one class with the protocol's three methods"),
    ("what D measures", "skrr_engine/measure/discrepancy.py", "a Criterion"),
    ("a denoiser's text projection", "skrr_engine/measure/projection.py", "one row of RECIPES"),
    ("the calibration prompts", "skrr_engine/measure/prompts.py", "words and forms"),
    ("how removals are chosen", "skrr_engine/search/", "a file beside skip.py and reuse.py, and a line in job.py"),
    ("which single weights go", "skrr_engine/weights/criteria.py", "a criterion, and its line in prune.py"),
    ("a plan's format", "skrr_engine/plan/model.py", "the field; then docs/plan.schema.json, see tests/test_plan.py"),
    ("which level answers a request", "skrr_engine/plan/choose.py", "the only place that picks one"),
    ("what ComfyUI's versions have", "nodes/host/versions.py", "looked for, never asked by number"),
    ("a node's inputs", "nodes/", "the node's file; then locales/strings.txt and web/docs"),
)


@dataclass(frozen=True)
class Arrow:
    """One import: from a module to another of ours, both by their dotted names."""

    source: str
    target: str


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the engine and the nodes."""
    found = {}
    for package in ("skrr_engine", "nodes"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> list[Arrow]:
    """All imports between modules of ours, those inside functions and for types, too."""
    known = modules()
    return [Arrow(name, target) for name, path in known.items() for target in targets(name, path, known)]


def targets(name: str, path: Path, known) -> Iterator[str]:
    """What one module imports of ours."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in known else ".".join(base)


def foreign(path: Path) -> set[str]:
    """Top-level packages of others that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def room(name: str) -> str:
    """The room that a module is in: `skrr_engine.plan`, `nodes.host`, ...; the package itself for what is in none."""
    package, *inner = name.split(".")
    rooms = ENGINE if package == "skrr_engine" else NODES
    return f"{package}.{inner[0]}" if inner and inner[0] in rooms else package


def between() -> set[tuple[str, str]]:
    """Rooms that import from rooms."""
    pairs = {(room(arrow.source), room(arrow.target)) for arrow in arrows()}
    return {(a, b) for a, b in pairs if a != b and b != "skrr_engine" and not a == "skrr_engine"}


def sentence(package: str) -> str:
    """What a room is, as its own first line says."""
    path = ROOT / package.replace(".", "/") / "__init__.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n\n")[0].replace("\n", " ")


def page() -> str:
    """The whole page."""
    engine = [f"skrr_engine.{name}" for name in ENGINE]
    host = ["nodes", "nodes.drawing", "nodes.host"]
    lines = [
        "# How the parts stand to each other",
        "",
        "Made by `docs/make_architecture.py` from the imports; `tests/test_architecture.py` fails where an arrow runs",
        "back. The engine's rooms in their order, none imports one to its right:",
        "",
        "**" + " <- ".join(ENGINE) + "**",
        "",
        "```mermaid",
        "graph RL",
        *(f"  {a.replace('.', '_')}[{a.split('.')[-1]}] --> {b.replace('.', '_')}[{b.split('.')[-1]}]"
          for a, b in sorted(reduced(between()))),
        "```",
        "",
        "Arrows that others imply are left out.",
        "",
        "| room | what it is |",
        "|---|---|",
        *(f"| `{name.replace('.', '/')}/` | {sentence(name)} |" for name in (*engine, *host)),
        "",
        "`skrr_engine/errors.py` and `skrr_engine/memory.py` (how much may be taken, and stores that stay within it)",
        "are the ground floor: every room may use them.",
        "",
        "## Where do I change ...",
        "",
        "| what | where | how |",
        "|---|---|---|",
        *(f"| {what} | `{where}` | {how} |" for what, where, how in CHANGES),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def reduced(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without the arrows that longer ways imply."""

    def reaches(start: str, end: str, left: set) -> bool:
        return any(a == start and (b == end or reaches(b, end, left - {(a, b)})) for a, b in left)

    return {(a, b) for a, b in pairs if not reaches(a, b, pairs - {(a, b)})}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
