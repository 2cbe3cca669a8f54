"""The three places a setting can come from, each read into entries of (dotted name, value as written, origin)."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from kafkasrcd.daemon.configuration_problem import Problem
from kafkasrcd.daemon.setting_fields import FIELDS, SECTIONS, TABLES, did_you_mean, kind_of, nearest, owner_of
from kafkasrcd.errors import ConfigurationError

ENVIRONMENT_PREFIX = "KAFKASRCD_"
COMMAND_LINE = "command line"

# Variables with our prefix that are no settings: the command line's own, and what tests hand to processes they start.
_RESERVED = re.compile(r"KAFKASRCD_(CONFIG|TEST_\w+)")

# Tables whose keys are topics, and how they are written as text.
_BY_TOPIC_EXAMPLES = {"handler.topics": "topic=module:function", "formats": "topic.value_format=avro"}
_BY_TOPIC = tuple(f"{table}." for table in _BY_TOPIC_EXAMPLES)

# Kubernetes sets these in every container of a namespace that has a service called kafkasrcd.
_SERVICE_LINK = re.compile(r"KAFKASRCD_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


class Entry(msgspec.Struct, frozen=True):
    """One setting as one source has it.

    ``textual``: the source knows only text, so "4" is a number where one is wanted. ``expandable``: references in it
    are replaced.
    """

    name: str
    value: Any
    origin: str
    textual: bool
    expandable: bool


Found = Iterator[Entry | Problem]


def read_document(path: Path) -> dict[str, Any]:
    """The TOML document in ``path``. Raises ConfigurationError, with one line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: there is no such file; `kafkasrcd init` writes one to start from") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigurationError(f"{path}: cannot be read: {reason or error}") from None
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}: not UTF-8 text (at line {line}); save the file as UTF-8") from None
    except RecursionError:
        raise ConfigurationError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError is one; so is the refusal of a number of over 4300 digits
        raise ConfigurationError(f"{path}: not valid TOML: {_one_line(str(error))}") from None


def file_entries(document: Mapping[str, Any], origin: str) -> Found:
    """The settings in a TOML document; an unknown name is a Problem."""
    yield from _walk(document, "", origin)


def environment_entries(environ: Mapping[str, str]) -> Found:
    """The settings in the environment.

    ``KAFKASRCD_BROKERS``; a section is set off by two underscores, as in ``KAFKASRCD_HANDLER__TARGET``. A key of
    ``extra_config`` follows two underscores, with ``_`` for each dot and ``__`` for an underscore:
    ``KAFKASRCD_EXTRA_CONFIG__SASL_PASSWORD`` is ``sasl.password``. Values are taken literally: a password may have
    any characters, and what is in the environment needs no reference to get there.

    A name that is near a setting's is a Problem. Any other is left out, see ``ignored_variables``: the environment is
    not ours alone, and an image may well set KAFKASRCD_VERSION.
    """
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or _is_foreign(variable):
            continue
        origin = f"environment {variable}"
        name = _setting_of(variable)
        if owner_of(name) is None or name.startswith(_BY_TOPIC):
            if (problem := _unknown_variable(variable, name)) is not None:
                yield problem
        else:
            yield from _textual(name, environ[variable], origin, expandable=False)


def ignored_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that are no setting, nor look as if they were meant to be one."""
    return [
        variable
        for variable in sorted(environ)
        if variable.startswith(ENVIRONMENT_PREFIX)
        and not _is_foreign(variable)
        and owner_of(_setting_of(variable)) is None
        and _unknown_variable(variable, _setting_of(variable)) is None
    ]


def override_entries(overrides: Mapping[str, str]) -> Found:
    """The settings given on the command line: dotted names, as in ``handler.processes``."""
    for name, text in overrides.items():
        if owner_of(name) is None:
            yield _unknown(name, COMMAND_LINE)
        else:
            yield from _textual(name, text, COMMAND_LINE, expandable=True)


def variable_of(name: str) -> str:
    """The environment variable that sets the setting ``name``."""
    if name.startswith("extra_config."):
        key = name.removeprefix("extra_config.").replace("_", "__").replace(".", "_")
        return f"{ENVIRONMENT_PREFIX}EXTRA_CONFIG__{key.upper()}"
    return ENVIRONMENT_PREFIX + name.replace(".", "__").upper()


def split_list(text: str) -> list[Any]:
    """A list written as text: comma-separated, or, where an item has a comma in it, as a TOML array.

    Raises ValueError where it starts as an array and is none.
    """
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    items = tomllib.loads(f"items = {text}")
    array: Any = items.pop("items")
    if items or not is_list(array):
        raise ValueError("not an array")
    return array


def _setting_of(variable: str) -> str:
    rest = variable.removeprefix(ENVIRONMENT_PREFIX)
    table = "EXTRA_CONFIG__"
    if rest.startswith(table):
        words = rest.removeprefix(table).lower().split("__")
        return "extra_config." + "_".join(word.replace("_", ".") for word in words)
    return rest.lower().replace("__", ".")


def _walk(table: Mapping[str, Any], prefix: str, origin: str) -> Found:
    for key, value in table.items():
        name = prefix + key
        if name in SECTIONS:
            if is_table(value):
                yield from _walk(value, f"{name}.", origin)
            else:
                yield Problem(name, f"expected a section [{name}], got {kind_of(value)}", origin=origin)
        elif name in TABLES:
            if is_table(value):
                yield from _leaves(value, f"{name}.", origin)
            else:
                hint = "; the topics to subscribe to stand above the first [section]" if key == "topics" else ""
                yield Problem(name, f"expected a table, got {kind_of(value)}{hint}", origin=origin)
        elif name in FIELDS:
            yield Entry(name, value, origin, textual=False, expandable=True)
        else:
            yield _unknown(name, origin)


def _leaves(table: Mapping[str, Any], prefix: str, origin: str) -> Found:
    """A user's own keys. Without quotes TOML reads ``security.protocol`` as nested tables; both are meant alike."""
    for key, value in table.items():
        if is_table(value) and value:
            yield from _leaves(value, f"{prefix}{key}.", origin)
        elif key:
            yield _unknown_in_row(prefix + key, origin) or Entry(
                prefix + key, value, origin, textual=False, expandable=True
            )
        else:
            yield Problem(prefix + '""', "a name must not be empty", origin=origin)


def _textual(name: str, text: str, origin: str, *, expandable: bool) -> Found:
    if name not in TABLES:
        if (problem := _unknown_in_row(name, origin)) is not None:
            yield problem
        else:
            yield Entry(name, text, origin, textual=True, expandable=expandable)
        return
    for pair in split_pairs(text):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            yield Problem(name, "expected name=value, or several separated by commas", origin=origin)
        else:
            yield from _textual(f"{name}.{key.strip()}", value.strip(), origin, expandable=expandable)


def split_pairs(text: str) -> list[str]:
    """The ``name=value`` parts of a table written as text."""
    return [pair for pair in text.split(",") if pair.strip()]


def _unknown_in_row(name: str, origin: str) -> Problem | None:
    """What is wrong with a name in a table of tables, as in ``formats.orders.value_format``."""
    field = owner_of(name)
    rows = {} if field is None else field.rows
    if field is None or not rows:
        return None
    row, _, key = name.removeprefix(f"{field.name}.").rpartition(".")
    if key in rows and row:
        return None
    text = f"expected [{field.name}.<topic>] with {', '.join(rows)}{did_you_mean(key, rows)}"
    return Problem(name, text, origin=origin)


def _unknown(name: str, origin: str) -> Problem:
    if name in SECTIONS:
        first = next(field for field in FIELDS if field.startswith(f"{name}."))
        return Problem(name, f"is a section; set one of its settings, such as {first}", origin=origin)
    known = [*FIELDS, *SECTIONS]
    return Problem(name, f"there is no such setting{did_you_mean(name, known)}", involves=_meant(name), origin=origin)


def _unknown_variable(variable: str, name: str) -> Problem | None:
    origin = f"environment {variable}"
    for table, example in _BY_TOPIC_EXAMPLES.items():
        if name.startswith(f"{table}."):
            text = f"a topic's name has no place in a variable's; use {variable_of(table)}='{example},…'"
            return Problem("", text, involves=(table,), origin=origin)
    if found := nearest(name, FIELDS):
        text = f"there is no such setting; did you mean '{variable_of(found)}'?"
        return Problem("", text, involves=(found,), origin=origin)
    # Two underscores are how a setting in a section is written, and little else is.
    return Problem("", "there is no such setting", origin=origin) if "." in name else None


def _is_foreign(variable: str) -> bool:
    return _RESERVED.fullmatch(variable) is not None or _SERVICE_LINK.fullmatch(variable) is not None


def _meant(name: str) -> tuple[str, ...]:
    """The setting that was probably meant, so that its absence is not reported as well."""
    found = nearest(name, FIELDS)
    return (found,) if found else ()


def is_table(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value of a document is a table; their keys are always text."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _one_line(text: str) -> str:
    return " ".join(text.split())
