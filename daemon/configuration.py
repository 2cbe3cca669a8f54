"""Loading the configuration: where values come from, which one counts, and everything that is wrong, at once.

Precedence, strongest first: the command line (``-s handler.processes=4``), the environment (``KAFKASRCD_BROKERS``),
the TOML file, the default. A list is replaced as a whole; ``extra_config`` and ``handler.topics`` are merged by key.
"""

import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kafkasrcd.daemon import configuration_rules, format_check
from kafkasrcd.daemon.configuration_problem import Problem
from kafkasrcd.daemon.configuration_sources import (
    COMMAND_LINE,
    Entry,
    environment_entries,
    file_entries,
    ignored_variables,
    is_list,
    is_table,
    override_entries,
    read_document,
    split_list,
)
from kafkasrcd.daemon.setting_fields import FIELDS, TABLES, SettingField, did_you_mean, kind_of, owner_of, shown
from kafkasrcd.daemon.value_references import Expanded, UnresolvedReference, expand
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import Settings
from kafkasrcd.workers.redaction import HIDDEN, hide_url_passwords, is_secret

T = TypeVar("T", bound=msgspec.Struct)

DEFAULT = "default"
DEFAULT_PATHS = (Path("kafkasrcd.toml"), Path("/etc/kafkasrcd/kafkasrcd.toml"))


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The effective settings, and where each came from.

    ``origins``: dotted name to "default", the file's path, "environment KAFKASRCD_X" or "command line"; a table such
    as ``extra_config`` has one for each of its keys. ``path``: the file, None where there is none. ``secrets``: the
    names whose values must not be shown. ``warnings``: one line each; what is allowed and probably not meant.
    """

    settings: Settings
    origins: dict[str, str]
    path: Path | None
    secrets: frozenset[str]
    warnings: tuple[str, ...]

    @property
    def base_directory(self) -> Path:
        """What relative paths in the settings are relative to: the file's folder, or the working directory."""
        return Path.cwd() if self.path is None else self.path.absolute().parent

    def shown_values(self) -> dict[str, Any]:
        """The effective value of each name in ``origins``, as plain data, with secrets hidden."""
        plain = _flat(msgspec.to_builtins(self.settings))
        return {name: self._shown(name, plain[name]) for name in self.origins}

    def _shown(self, name: str, value: Any) -> Any:
        if value and name in self.secrets:
            return HIDDEN
        return hide_url_passwords(value) if isinstance(value, str) else value


def find_file() -> Path | None:
    """The configuration file that is used where none is named, if there is one."""
    for path in DEFAULT_PATHS:
        try:
            if path.exists():
                return path
        except PermissionError:
            return path  # it may well be there; that it cannot be read is for ``load`` to say
    return None


def load(
    path: Path | None,
    overrides: Mapping[str, str],
    environ: Mapping[str, str],
    *,
    only: Collection[str] | None = None,
) -> Configuration:
    """Load and check the configuration.

    ``path`` None: no file. ``overrides``: dotted names and text, from the command line. ``only``: the settings that
    are wanted; all others keep their defaults, unread and unchecked, so that a person who may not read the daemon's
    credentials can still ask it for its status.

    Reads the file and what references name; connects to nothing. Raises ConfigurationError, with one line for each
    problem.
    """
    origin = str(path)
    document = {} if path is None else read_document(path)
    found: list[Entry | Problem] = [
        *file_entries(document, origin),
        *environment_entries(environ),
        *override_entries(overrides),
    ]
    # A later source replaces an earlier one's entry for the same name.
    entries = {entry.name: entry for entry in found if isinstance(entry, Entry) and _wanted(entry.name, only)}
    problems = [problem for problem in found if isinstance(problem, Problem)] if only is None else []
    problems += _doubles(found) if only is None else []

    base_directory = Path.cwd() if path is None else path.absolute().parent
    values: dict[str, Any] = {}
    secrets: set[str] = set()
    for entry in entries.values():
        try:
            value, secret = _resolve(entry, environ, base_directory)
        except _Unusable as error:
            problems.append(Problem(entry.name, str(error), origin=entry.origin))
            continue
        values[entry.name] = value
        if secret:
            secrets.add(entry.name)

    settings = _build(Settings, "", values)
    origins = {name: DEFAULT for name in FIELDS if name not in TABLES or not _keys_of(name, entries)}
    origins |= {name: entry.origin for name, entry in entries.items()}
    warnings: list[str] = []
    if only is None:
        unusable = {name for problem in problems for name in (problem.setting, *problem.involves) if name}
        report = configuration_rules.check(settings)
        problems += [problem for problem in report.problems if not problem.depends_on(unusable)]
        if not problems:
            problems += format_check.check_files(settings, base_directory)
        warnings += report.warnings
        warnings += (f"environment {name}: there is no such setting; ignored" for name in ignored_variables(environ))
        warnings += _exposed_secrets(path, entries, values)
    if problems:
        raise ConfigurationError("\n".join(_lines(problems, origins, path)))
    return Configuration(
        settings=settings, origins=origins, path=path, secrets=frozenset(secrets), warnings=tuple(warnings)
    )


class _Unusable(Exception):
    """A value that its setting cannot hold; the message says what is allowed."""


def _resolve(entry: Entry, environ: Mapping[str, str], base_directory: Path) -> tuple[Any, bool]:
    """The value of an entry, and whether it must be hidden. Raises _Unusable."""
    field = owner_of(entry.name)
    assert field is not None, entry.name
    secret = _is_secret_setting(entry.name)
    textual = entry.textual

    def expanded(text: str) -> str:
        nonlocal secret, textual
        result = expand(text, environ, base_directory) if entry.expandable else Expanded(text, (), False)
        secret = secret or result.secret
        textual = textual or bool(result.references)
        if "\0" in result.text or not _is_unicode(result.text):
            raise _Unusable("a text must be Unicode without NUL characters")
        return result.text

    value = entry.value
    try:
        if isinstance(value, str):
            value = expanded(value)
        elif is_list(value):
            value = [expanded(item) if isinstance(item, str) else item for item in value]
    except UnresolvedReference as error:
        raise _Unusable(str(error)) from None
    given = "a hidden value" if secret else hide_url_passwords(shown(value))
    if field.is_table:
        return _table_value(entry.name, value, given), secret
    return _converted(field, value, given, textual=textual), secret


def _converted(field: SettingField, value: Any, given: str, *, textual: bool) -> Any:
    if textual and isinstance(value, str):
        if field.optional and not value:
            return None
        if field.is_list:
            try:
                value = split_list(value)
            except (ValueError, RecursionError):
                raise _Unusable(f"expected texts separated by commas, or a TOML array, got {given}") from None
    try:
        return msgspec.convert(value, field.annotation, strict=not textual)
    except msgspec.ValidationError:
        pass
    hint = ""
    if isinstance(field.type, msgspec.inspect.EnumType) and isinstance(value, str):
        hint = did_you_mean(value, [str(member.value) for member in field.type.cls])
    if field.is_list and is_list(value):
        (item,) = [item for item in value if not isinstance(item, str)][:1]
        given = f"{kind_of(item)} in it"
    raise _Unusable(f"expected {field.expected()}, got {given}{hint}")


def _table_value(name: str, value: Any, given: str) -> str:
    """The text of a table's key. librdkafka takes all its settings as text, so numbers and switches need no quotes."""
    if isinstance(value, str):
        return value
    if name.startswith("extra_config.") and isinstance(value, bool | int | float) and not given.startswith("a huge"):
        return str(value).lower()
    raise _Unusable(f"expected a text, got {given}")


def _is_secret_setting(name: str) -> bool:
    # Topic names are data: the one called "orders.key" hides nothing.
    return not name.startswith(("handler.topics.", "formats.")) and is_secret(name)


def _is_unicode(text: str) -> bool:
    """False for what the environment or command line had that was not UTF-8; Python keeps it as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _build(model: type[T], prefix: str, values: Mapping[str, Any]) -> T:
    """The model from usable values; what is missing keeps its default."""
    arguments: dict[str, Any] = {}
    for declared in msgspec.structs.fields(model):
        name = prefix + declared.name
        if name in TABLES:
            table = {key.removeprefix(f"{name}."): values[key] for key in _keys_of(name, values)}
            arguments[declared.name] = _rows(table, declared.type) if FIELDS[name].rows else table
        elif name in values:
            arguments[declared.name] = values[name]
        elif name not in FIELDS:
            arguments[declared.name] = _build(declared.type, f"{name}.", values)
    return model(**arguments)


def _rows(table: Mapping[str, Any], annotation: Any) -> dict[str, Any]:
    """A table of tables: the last part of each name is a setting, what comes before it the user's own key."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        row, _, key = name.rpartition(".")
        rows.setdefault(row, {})[key] = value
    return msgspec.convert(rows, annotation)  # type: ignore[no-any-return]


def _keys_of(table: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{table}.")]


def _wanted(name: str, only: Collection[str] | None) -> bool:
    return only is None or name in only


def _doubles(found: Iterable[Entry | Problem]) -> Iterator[Problem]:
    """Keys of a table that one source gives twice: TOML sees ``"a.b"`` and ``a.b`` as different."""
    seen: set[tuple[str, str]] = set()
    for entry in found:
        if isinstance(entry, Entry):
            if (entry.name, entry.origin) in seen:
                yield Problem(entry.name, "is given twice", origin=entry.origin)
            seen.add((entry.name, entry.origin))


def _exposed_secrets(path: Path | None, entries: Mapping[str, Entry], values: Mapping[str, Any]) -> Iterator[str]:
    literal = [
        entry
        for name, entry in entries.items()
        if _is_secret_setting(name) and entry.value and values.get(name) == entry.value
    ]
    for entry in literal:
        if entry.origin == COMMAND_LINE:
            yield f"{entry.name}: everyone on this host can read a command line; use ${{file:/path}} or the environment"
    in_file = [entry.name for entry in literal if entry.origin == str(path)]
    if path is not None and in_file and path.stat().st_mode & stat.S_IROTH:
        yield (
            f"{path}: everyone on this host can read it, and it holds {', '.join(in_file)}; "
            "use ${file:/path} or ${credential:NAME}, or take the file's read permission for others away"
        )


def _lines(problems: Iterable[Problem], origins: Mapping[str, str], path: Path | None) -> Iterator[str]:
    for problem in problems:
        origin = problem.origin or origins.get(problem.setting, DEFAULT)
        if origin == DEFAULT:  # what is missing is missing in the file
            origin = "" if path is None else str(path)
        yield msgspec.structs.replace(problem, origin=origin).line()
    if path is None and any(problem.setting == "topics" for problem in problems):
        searched = " or ".join(str(each) for each in DEFAULT_PATHS)
        yield f"no configuration file was used: name one with --config, or have {searched}; `kafkasrcd init` writes one"


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; a user's table appears whole and by key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if name in FIELDS or not is_table(value):
            flat[name] = value
        if is_table(value):
            flat |= _flat(value, f"{name}.")
    return flat
