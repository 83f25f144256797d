"""The engine's one kind of error that people see."""


class SkrrError(ValueError):
    """Something that its user can mend. The message is one line: what is wrong, where, and what to do about it."""


def printable(text: str) -> str:
    """A text from outside as it may be shown: escapes in place of what moves the cursor, breaks the line, turns the
    direction of reading or can't be seen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in one of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class SearchError(SkrrError):
    """A search that can't reach what was asked of it; one line that says why and what to do."""
