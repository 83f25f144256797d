"""Makes the table of sizes in docs/artists.md: T5-XXL's weights with the shipped plans, computed, not measured.

Run from the repository's root: python docs/make_sizes.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from skrr_engine.plan.model import Plan, shipped  # noqa: E402

PAGE = ROOT / "docs" / "artists.md"
BEGIN, END = "<!-- made by docs/make_sizes.py -->\n", "<!-- end -->\n"
ASKED = (0.25, 0.34, 0.42)
FILES = {
    "fp16, bf16": 9.52,
    "fp8 scaled": 5.16,
    "GGUF Q8_0": 5.06,
    "fp8": 4.89,
    "GGUF Q6_K": 3.91,
    "GGUF Q5_K_M": 3.39,
    "GGUF Q4_K_M": 2.90,
}
"""GB of T5-XXL's files, as in the README's table."""


def table() -> str:
    """Markdown: a row a file, a column for each sparsity asked for, with the level that answers it of the shipped plan
    that removes the least there."""
    plans = {name: Plan.read(path).encoder("t5xxl") for name, path in shipped().items()}
    least = {share: min(entry.choose(share).sparsity for entry in plans.values()) for share in ASKED}
    heads = [f"`sparsity` {share}" for share in ASKED]
    rows = [["T5-XXL in", "whole", *heads], ["---", *["---:"] * (len(heads) + 1)]]
    rows += [[name, f"{size:.2f}", *(f"{size * (1 - least[s]):.2f}" for s in ASKED)] for name, size in FILES.items()]
    found = {name: ", ".join(f"{entry.choose(share).sparsity:.1%}" for share in ASKED) for name, entry in plans.items()}
    levels = [f"`{name}` {shares}" for name, shares in found.items()]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{text}\n\nWhat the shipped plans remove there: {'; '.join(levels)}.\n"


def main() -> None:
    """Write the table into the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
