"""The effective configuration as text: TOML that could be loaded again, but for the hidden secrets."""

import json
import re
from typing import Any

from kafkasrcd.daemon.configuration import Configuration
from kafkasrcd.daemon.setting_fields import FIELDS, owner_of

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_COMMENT_COLUMN = 56


def as_toml(configuration: Configuration) -> str:
    """Every setting in effect, each with a comment that says where it comes from."""
    values = configuration.shown_values()
    sections: dict[str, list[str]] = {"": []}
    for name in FIELDS:
        sections.setdefault(_place(name)[0], [])
    for name, value in values.items():
        section, key = _place(name)
        if key:
            sections.setdefault(section, []).append(_line(key, value, configuration.origins[name]))
    blocks = [
        "\n".join([*([f"[{section}]"] if section else []), *lines]) for section, lines in sections.items() if lines
    ]
    return "\n\n".join(blocks)


def as_json(configuration: Configuration) -> str:
    """An object with each setting's ``value`` (null where unset) and ``origin``, by its dotted name."""
    values = configuration.shown_values()
    rows = {name: {"value": value, "origin": configuration.origins[name]} for name, value in values.items()}
    return json.dumps(rows, indent=2)


def _place(name: str) -> tuple[str, str]:
    """The section a setting stands in and its key there; a table without keys has none."""
    field = owner_of(name)
    assert field is not None, name
    if field.rows and name != field.name:
        row, _, key = name.removeprefix(f"{field.name}.").rpartition(".")
        return f"{field.name}.{_text(row)}", key
    if field.is_table:
        return field.name, name[len(field.name) + 1 :]
    section, _, key = name.rpartition(".")
    return section, key


def _line(key: str, value: Any, origin: str) -> str:
    quoted = key if _BARE_KEY.fullmatch(key) else _text(key)
    setting = f"# {quoted} is unset" if value is None else f"{quoted} = {_text(value)}"
    return f"{setting:<{_COMMENT_COLUMN}}  # {_comment(origin)}"


def _text(value: Any) -> str:
    # JSON's strings, numbers, lists and switches are TOML's, except for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
