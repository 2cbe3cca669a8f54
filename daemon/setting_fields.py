"""Every setting by its dotted name, with its type: read from the model, so that there is one list of them."""

import difflib
import json
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import msgspec
from msgspec import inspect

from kafkasrcd.settings import Settings


class SettingField(msgspec.Struct, frozen=True):
    """One setting. ``annotation`` is its Python type, ``type`` what msgspec knows of it, None being left out."""

    name: str
    annotation: Any
    type: inspect.Type
    optional: bool
    default: Any

    @property
    def is_table(self) -> bool:
        """Whether its keys are the user's own, as those of ``extra_config``."""
        return isinstance(self.type, inspect.DictType)

    @property
    def rows(self) -> "dict[str, SettingField]":
        """For a table of tables, such as ``formats``: the settings that each of them may have, by their names."""
        if isinstance(self.type, inspect.DictType) and isinstance(self.type.value_type, inspect.StructType):
            return {field.name: field for field in _walk(self.type.value_type.cls, "")}
        return {}

    @property
    def is_list(self) -> bool:
        return isinstance(self.type, inspect.ListType)

    def expected(self) -> str:
        """What it may hold, in words."""
        return _expected(self.type)


def _walk(model: type[msgspec.Struct], prefix: str) -> Iterator[SettingField]:
    types = inspect.type_info(model)
    assert isinstance(types, inspect.StructType)
    for declared, inspected in zip(msgspec.structs.fields(model), types.fields, strict=True):
        name = prefix + declared.name
        if isinstance(inspected.type, inspect.StructType):
            yield from _walk(inspected.type.cls, f"{name}.")
            continue
        kind, optional = inspected.type, False
        if isinstance(kind, inspect.UnionType):
            (kind,) = (each for each in kind.types if not isinstance(each, inspect.NoneType))
            optional = True
        default = declared.default if declared.default is not msgspec.NODEFAULT else declared.default_factory()
        yield SettingField(name, declared.type, kind, optional, default)


FIELDS: dict[str, SettingField] = {field.name: field for field in _walk(Settings, "")}
SECTIONS = frozenset(name.rpartition(".")[0] for name in FIELDS if "." in name)
TABLES = frozenset(name for name, field in FIELDS.items() if field.is_table)


def owner_of(name: str) -> SettingField | None:
    """The field that ``name`` sets: itself, or the table it is a key of. None where there is none.

    >>> owner_of("extra_config.sasl.password").name
    'extra_config'
    """
    if name in FIELDS:
        return FIELDS[name]
    for table in TABLES:
        if name.startswith(f"{table}.") and name != f"{table}.":
            return FIELDS[table]
    return None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was most likely meant to be, if any is near.

    The last part counts by itself too, so that ``processes`` finds ``handler.processes``.
    """
    candidates = list(known)
    if close := difflib.get_close_matches(name, candidates, n=1, cutoff=0.75):
        return close[0]
    by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in candidates}
    close = difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=1, cutoff=0.8)
    return by_last_part[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing."""
    found = nearest(name, known)
    return f"; did you mean '{found}'?" if found else ""


def shown(value: object) -> str:
    """A value as a message quotes it: short, on one line, written as TOML would have it."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "a table"
        case list():
            return "a list"
        case Enum():
            return shown(value.value)
        case int() if abs(value) >= 10**40:  # str() refuses numbers of more than 4300 digits
            return "a huge number"
        case int() | float():
            return str(value)
        case str():
            # As JSON, any control character is visible and none reaches the terminal.
            text = value if len(value) <= 60 else f"{value[:60]}…"
            return f"'{json.dumps(text, ensure_ascii=not text.isprintable())[1:-1]}'".replace('\\"', '"')
        case _:
            return shown(str(value))


def kind_of(value: object) -> str:
    """What a value is, without showing it."""
    match value:
        case str():
            return "a text"
        case bool():
            return "true or false"
        case int():
            return "a whole number"
        case float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def _expected(kind: inspect.Type) -> str:
    match kind:
        case inspect.IntType() | inspect.FloatType():
            noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            multiple = f", a multiple of {kind.multiple_of:g}" if kind.multiple_of else ""
            if kind.gt is not None:
                return f"{noun} above {_number(kind.gt)} and up to {_number(kind.le)}{multiple}"
            return f"{noun} from {_number(kind.ge)} to {_number(kind.le)}{multiple}"
        case inspect.EnumType():
            return "one of " + ", ".join(str(member.value) for member in kind.cls)
        case inspect.ListType():
            return "a list of texts"
        case inspect.DictType():
            return "a table of texts"
        case _:
            return "a text"


def _number(value: float | None) -> str:
    return f"{value:.0f}" if value is not None and value == int(value) else str(value)
