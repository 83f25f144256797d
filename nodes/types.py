"""What the pack's nodes hand to each other."""

from comfy_api.latest import io

SkrrPlan = io.Custom("SKRR_PLAN")
"""A `skrr_engine.plan.Plan`."""

CATEGORY = "Skrr"


def advanced(field: io.Input) -> io.Input:
    """An input that frontends show only among a node's advanced ones (ComfyUI 0.3.75 has no parameter for this yet)."""
    field.extra_dict = {**field.extra_dict, "advanced": True}
    return field


def own_prompts_input() -> io.Input:
    """Prompts to fit and compare on."""
    return advanced(
        io.String.Input(
            "own_prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="Your own prompts, one a line, in place of the built-in ones. Give several hundred.",
        )
    )


def tuning_input(levels: str) -> io.Input:
    """Of linear stand-ins, together. levels: of which levels, for the tooltip."""
    return advanced(
        io.Int.Input(
            "tuning",
            default=0,
            min=0,
            max=2000,
            optional=True,
            tooltip=f"Steps in which all stand-ins are improved together at the end, {levels}. 150 are enough; 0: none,"
            " which is quicker.",
        )
    )


def rank_input() -> io.Input:
    """Of linear stand-ins."""
    return advanced(
        io.Int.Input(
            "rank",
            default=16,
            min=1,
            max=512,
            optional=True,
            tooltip="Size of the linear stand-ins. 16 costs about 0.2 % of what is removed from T5-XXL.",
        )
    )
