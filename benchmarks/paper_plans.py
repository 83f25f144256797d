"""The plans that the paper prints for T5-XXL, as the plan files that Skrr ships.

Source: Seo, Jeong, Seo, Chun, arXiv 2502.08690 v1. The paper states its levels as 27.0, 32.4 and 41.9 %, which are the
SD3 order's prefixes of 13, 16 and 21 sub-blocks; the sparsities here are counted from the parameters that each prefix
removes. Re-use maps are printed for PixArt-Sigma at three levels only; every other level skips without re-use.

Run from the repository's root: python -m benchmarks.paper_plans
"""

from __future__ import annotations

from pathlib import Path

from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance

BLOCKS = 24
WIDTH = 4096
HIDDEN = 10_240
VOCABULARY = 32_128
ATTENTION = 4 * WIDTH * WIDTH + WIDTH
FEED_FORWARD = 3 * WIDTH * HIDDEN + WIDTH
RELATIVE_BIAS = 32 * 64
TOTAL = VOCABULARY * WIDTH + BLOCKS * (ATTENTION + FEED_FORWARD) + RELATIVE_BIAS + WIDTH

ORDERS = {
    "pixart-sigma": (
        46, 5, 6, 47, 44, 2, 11, 24, 23, 17, 18, 45,
        10, 30, 29, 40, 39, 38, 37, 42, 25, 22, 43, 36,
    ),
    "sd3": (
        46, 5, 45, 6, 11, 2, 22, 23, 17, 18, 30, 29,
        43, 44, 20, 1, 41, 42, 40, 39, 38, 37, 21, 16,
    ),
    "flux1-dev": (
        46, 45, 5, 6, 11, 20, 19, 22, 23, 30, 29, 47,
        2, 44, 32, 31, 18, 17, 37, 36, 43, 40, 39, 42,
    ),
}  # fmt: skip

REUSE = {
    "pixart-sigma": {
        12: {2: 4, 5: 7, 11: 13, 17: 19, 18: 16, 23: 21},
        17: {2: 4, 5: 7, 6: 4, 11: 13, 17: 19, 18: 20, 23: 21},
        21: {2: 0, 5: 7, 6: 4, 10: 12, 11: 9, 17: 19, 18: 16, 23: 21, 25: 27},
    },
}


def sparsity(skipped: tuple[int, ...]) -> float:
    """The fraction of T5-XXL's parameters, embedding included, in these sub-blocks, to six decimals."""
    return round(sum(FEED_FORWARD if sub_block % 2 else ATTENTION for sub_block in skipped) / TOTAL, 6)


def paper_plan(denoiser: str) -> Plan:
    """The printed order for one denoiser, every prefix of it a level."""
    order, reuse = ORDERS[denoiser], REUSE.get(denoiser, {})
    levels = tuple(
        Level(skipped=count, reuse=reuse.get(count, {}), sparsity=sparsity(order[:count]))
        for count in range(1, len(order) + 1)
    )
    encoder = EncoderPlan(family="t5", blocks=BLOCKS, width=WIDTH, order=order, levels=levels)
    provenance = Provenance(source="paper", denoiser=denoiser, created_with="skrr 0.1.0")
    return Plan(encoders={"t5xxl": encoder}, provenance=provenance)


def main() -> None:
    """Writes the shipped plans."""
    folder = Path(__file__).parent.parent / "skrr_engine" / "plan" / "shipped"
    for denoiser in ORDERS:
        paper_plan(denoiser).write(folder / f"{denoiser}.json")


if __name__ == "__main__":
    main()
