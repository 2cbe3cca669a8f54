"""Why a record could not be read, in the words of an operator: where in the document, and what was wrong there."""

import re
import sys
from typing import Any, Final

import msgspec

_AT_PATH: Final = re.compile(r"^(?P<what>.*) - at `(?P<path>\$.*)`$", re.DOTALL)


class SaysWhere(Exception):
    """An error whose text needs no name before it: it begins with the path, or is a whole sentence."""


def reason_of(error: BaseException) -> str:
    """One sentence, starting with the path where one is known.

    >>> reason_of(msgspec.ValidationError("Expected `int`, got `str` - at `$.user.id`"))
    '$.user.id: expected int, got str'
    """
    if isinstance(error, msgspec.ValidationError):
        text = str(error)
        match = _AT_PATH.match(text)
        path, what = ("$", text) if match is None else (match["path"], match["what"])
        what = what.replace("`", "")
        return printable(f"{path}: {what[:1].lower()}{what[1:]}")
    if isinstance(error, SaysWhere):
        return text_of(error)
    pydantic: Any = sys.modules.get("pydantic_core")
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        return printable("; ".join(_of_pydantic(each) for each in error.errors(include_url=False)[:3]))
    return f"{type(error).__name__}: {text_of(error)}"


def path_of(parts: Any) -> str:
    """JSONPath of keys and indexes.

    >>> path_of(["user", "ids", 3, "a b"])
    '$.user.ids[3]["a b"]'
    """
    path = "$"
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if str(part).isidentifier() else f'["{part}"]'
    return path


def _of_pydantic(error: Any) -> str:
    what = str(error["msg"])
    return f"{path_of(error['loc'])}: {what[:1].lower()}{what[1:]}"


def text_of(error: BaseException) -> str:
    """``str(error)``, also where the user's ``__str__`` raises."""
    try:
        return printable(str(error))
    except Exception as second:  # noqa: BLE001 - the user's code may raise anything
        return f"(no text: {type(second).__name__})"


def printable(text: str) -> str:
    """With what is no Unicode escaped: it could not be sent to the supervisor."""
    return text.encode(errors="backslashreplace").decode()
