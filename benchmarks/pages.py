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
