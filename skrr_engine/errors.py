"""The engine's one kind of error that people see."""


class SkrrError(ValueError):
    """Something that its user can mend. The message is one line: what is wrong, where, and what to do about it."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in one of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
