"""Plans as text from strangers: JSON within bounds, and errors of one line that name the field and the remedy."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ..errors import SkrrError, printable

MAX_BYTES = 65_536
MAX_DEPTH = 32

_REMEDY = "correct it, or export the plan again"
_SURROGATE = re.compile("[\ud800-\udfff]")


class PlanError(SkrrError):
    """A plan that cannot be used. Its message is one line: where, what was expected, and the remedy.

    `path` holds the field as a tuple of names and list positions, `problem` the message without it, and `source` the
    name of the file or node that the plan came from.
    """

    def __init__(self, problem: str, path: tuple[str | int, ...] = (), source: str = ""):
        self.problem, self.path, self.source = problem, path, source
        super().__init__(printable(": ".join(part for part in (source, _path_text(path), problem) if part)))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _path_text(path: tuple[str | int, ...]) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", part) else _quoted(part))
    return text


def _found(value: Any) -> str:
    """What stands in the place of a value, short enough for a message and on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else "a number beyond 64 bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"an object of {len(value)}" if isinstance(value, dict) else type(value).__name__


def _expected(what: str, found: Any) -> str:
    return f"expected {what}, found {_found(found)}; {_REMEDY}"


def _listed(values: Any) -> str:
    values = [str(value) for value in values]
    return ", ".join(values[:64]) + (", ..." if len(values) > 64 else "")


class _Doubled:
    """Stands for an object that names `key` more than once."""

    def __init__(self, key: str):
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Doubled:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            return _Doubled(key)
        seen[key] = value
    return seen


def _parse(text: str | bytes) -> dict[str, Any]:
    """JSON text into an object of bounded size and depth, without doubled names and with finite numbers only."""
    text = _decoded(text)
    try:
        data = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise PlanError(f"expected JSON, found a fault at {where} ({error.msg}); {_REMEDY}") from None
    except RecursionError:
        raise _too_deep(()) from None
    except ValueError:
        raise PlanError(f"expected JSON, found a number with too many digits; {_REMEDY}") from None
    _check_values(data, ())
    if not isinstance(data, dict):
        raise PlanError(_expected("an object with format, version, encoders and provenance", data))
    return data


def _decoded(text: str | bytes) -> str:
    if not isinstance(text, (str, bytes)):
        raise PlanError(f"expected JSON text, found {type(text).__name__}; {_REMEDY}")
    try:
        raw = text.encode("utf-8") if isinstance(text, str) else text
        if len(raw) > MAX_BYTES:
            raise PlanError(f"expected at most {MAX_BYTES} bytes, found more; drop extensions or levels")
        text = raw.decode("utf-8")
    except UnicodeError:
        raise PlanError("expected UTF-8 text, found other bytes; save the plan as UTF-8") from None
    if text.startswith("\ufeff"):
        raise PlanError("expected JSON, found a byte order mark; save the plan as UTF-8 without BOM")
    return text


def _too_deep(path: tuple[str | int, ...]) -> PlanError:
    return PlanError(f"expected at most {MAX_DEPTH} levels of nesting, found more; {_REMEDY}", path[:6])


def _check_values(value: Any, path: tuple[str | int, ...]) -> None:
    if len(path) > MAX_DEPTH:
        raise _too_deep(path)
    if isinstance(value, _Doubled):
        raise PlanError(f"expected every field once, found it twice; {_REMEDY}", (*path, value.key))
    if isinstance(value, float) and not math.isfinite(value):
        raise PlanError(_expected("a finite number", value), path)
    if isinstance(value, str) and _SURROGATE.search(value):
        raise PlanError(_expected("whole Unicode characters", value), path)
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if isinstance(key, str):
            _check_values(key, (*path, key))
        _check_values(child, (*path, key))


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
