"""What is done at the places of a row: the assignment of a level."""

from collections.abc import Iterable, Mapping

from .standin import StandIn

Action = int | StandIn | None
"""What is done at a removed sub-block's place: another, kept sub-block is re-used, a linear stand-in repairs the
stream, or nothing."""

Assignment = Mapping[int, Action]
"""Removed sub-block -> what is done at its place. All others are kept."""


def assignment(
    order: Iterable[int], reuse: Mapping[int, int] | None = None, standins: Mapping[int, StandIn] | None = None
) -> dict[int, Action]:
    """The assignment of a level: its skipped sub-blocks, some of which re-use another or are repaired."""
    actions: dict[int, Action] = {**(reuse or {}), **(standins or {})}
    return {i: actions.get(i) for i in order}
