"""Pages whose tables are written by the benchmarks that measured them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

END = "<!-- end -->"


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables into a page, each between its marks `<!-- name -->` and `<!-- end -->`. Raises SystemExit where a mark
    is missing."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->")
        if not mark:
            raise SystemExit(f"{page.name} has no mark <!-- {name} -->")
        text = f"{before}{mark}\n{table}\n{END}{rest.partition(END)[2]}"
    page.write_text(text, encoding="utf-8")


def rows(page: Path, name: str) -> list[dict[str, str]]:
    """The rows of a page's table, each by its columns' heads; empty where it is not filled yet."""
    text = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")[2].partition(END)[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
