"""The worker's half of a format: what is done to records before they are handed off.

Nothing here depends on which format it is; ``Preparer`` is what a format has to offer.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from confluent_kafka import Message

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import SchemaRegistrySettings, Settings
from kafkasrcd.workers.control import Quarantined
from kafkasrcd.workers.formats import WITH_SCHEMA, Format, Formats, Kind, Shape
from kafkasrcd.workers.frame import Columns, RecordError
from kafkasrcd.workers.partition_memory import PREPARING, UNKNOWN
from kafkasrcd.workers.reasons import reason_of

if TYPE_CHECKING:
    from kafkasrcd.workers.schema_cache import SchemaCache

EXTRAS: Final = {
    Kind.AVRO: ("fastavro", "avro"),
    Kind.PROTOBUF: ("google.protobuf", "protobuf"),
    Kind.JSON_SCHEMA: ("jsonschema_rs", "json-schema"),
}
"""The module a format needs, and the extra of kafkasrcd that brings it."""


NONE_REFUSED: Final[Mapping[int, Quarantined]] = MappingProxyType({})


class Preparer(Protocol):
    """One format's, for values or for keys."""

    def need(self, raw: bytes) -> None:
        """See that what ``prepare`` needs for ``raw`` is here. Raises RegistryAway where it cannot be had now.

        May block for the registry's timeout, and for a compiler; not where it was called for such a record before.
        """
        ...

    def prepare(self, raw: bytes) -> bytes:
        """What the handler builds from. Raises anything where ``raw`` is not what its format says."""
        ...


class Preparation:
    """What is done to the records of one topic. ``cells`` are the partition's: PREPARING is the offset in hand.

    ``refused``: records, by offset, that are passed on as errors unprepared.
    """

    def __init__(
        self,
        values: Preparer | None,
        keys: Preparer | None,
        cells: memoryview,
        refused: Mapping[int, Quarantined] = NONE_REFUSED,
    ) -> None:
        self._values = values
        self._keys = keys
        self._cells = cells
        self._refused = refused

    def ready(self, messages: Sequence[Message]) -> int:
        """How many of ``messages``, from the first on, can be prepared now; raises RegistryAway where none can."""
        for index, message in enumerate(messages):
            if message.offset() in self._refused:
                continue
            try:
                self.need(message.value(), message.key())
            except Exception:
                if index == 0:
                    raise
                return index
        return len(messages)

    def need(self, value: object, key: object) -> None:
        """See that a record with these can be prepared now; raises RegistryAway where it cannot."""
        if self._values is not None and value is not None:
            self._values.need(_bytes(value))
        if self._keys is not None and key is not None:
            self._keys.need(_bytes(key))

    def prepare(self, columns: Columns) -> Columns:
        """``columns`` with what the handler builds from. A record that cannot be prepared is an error in its place."""
        errors = list(columns.errors)
        if self._keys is not None and columns.keys is not None:
            columns.raw_keys, columns.keys = (
                columns.keys,
                self._column(self._keys, columns.keys, columns, "its key: ", errors),
            )
        values: list[bytes | None] = list(columns.values)
        if self._values is not None:
            values = self._column(self._values, columns.values, columns, "", errors)
        for error in errors:
            values[error.index] = None
        if values != columns.values:
            columns.raws, columns.values = columns.values, values
        columns.errors = errors
        return columns

    def _column(
        self,
        preparer: Preparer,
        column: Sequence[bytes | None],
        columns: Columns,
        what: str,
        errors: list[RecordError],
    ) -> list[bytes | None]:
        prepare = preparer.prepare
        prepared: list[bytes | None] = []
        append = prepared.append
        cells = self._cells
        refused = self._refused
        for offset, raw in zip(columns.offsets, column, strict=True):
            if raw is None:
                append(None)
                continue
            if refused and offset in refused:
                append(None)
                errors.append(_error_of(len(prepared) - 1, refused[offset]))
                continue
            try:
                cells[PREPARING] = offset  # should it end this process, or never end
                append(prepare(raw))
            except Exception as error:  # noqa: BLE001 - whatever is raised is about the record
                append(None)
                errors.append(RecordError(len(prepared) - 1, type(error).__name__, what + reason_of(error)))
        cells[PREPARING] = UNKNOWN
        return prepared


def preparation_of(
    settings: Settings,
    topic: str,
    shape: Shape,
    base_directory: Path,
    schema_directory: str,
    cells: memoryview,
    refused: Mapping[int, Quarantined] = NONE_REFUSED,
) -> Preparation | None:
    """What is done to the records of ``topic``; None where the worker has no part in its formats.

    Raises ConfigurationError where a format cannot be used.
    """
    formats = Formats(settings)
    value, key = formats.value(topic), formats.key(topic)
    if not value.is_prepared and not key.is_prepared:
        return None
    schemas = None
    if value.needs_registry or key.needs_registry:
        schemas = _schema_cache(settings.schema_registry, base_directory, schema_directory)
    return Preparation(
        _preparer(value, shape, base_directory, schemas, settings),
        _preparer(key, Shape.PLAIN, base_directory, schemas, settings),
        cells,
        refused,
    )


def modules_of(settings: Settings) -> list[str]:
    """What the workers of all topics will import for their formats: 30 to 50 ms and 8 MB each, unless it is done before
    they are forked."""
    modules: set[str] = set()
    for form in Formats(settings).all():
        if form.kind in EXTRAS and _is_installed(EXTRAS[form.kind][0]):
            modules.add(_home(form))
            if form.needs_registry:
                modules |= {"kafkasrcd.workers.schema_cache", "kafkasrcd.workers.schema_registry"}
    return sorted(modules)


def _home(form: Format) -> str:
    return f"kafkasrcd.workers.{form.kind.value}_format"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is not there, either
        return False


def _preparer(
    form: Format, shape: Shape, base_directory: Path, schemas: "SchemaCache | None", settings: Settings
) -> Preparer | None:
    if not form.is_prepared:
        return None
    if form.kind is Kind.CUSTOM:
        from kafkasrcd.workers.custom_format import CustomPreparer

        return CustomPreparer(form, settings.handler.path, base_directory)
    require_extra(form)
    # Each format's library is loaded where it is needed, and nowhere else; see ``modules_of``.
    home = importlib.import_module(_home(form))
    preparer: Preparer = home.preparer_of(form, shape, base_directory, schemas)
    return preparer


def _schema_cache(settings: SchemaRegistrySettings, base_directory: Path, schema_directory: str) -> "SchemaCache":
    # Here, since TLS and HTTP are some megabytes that a worker without a registry does not pay.
    from kafkasrcd.workers.schema_cache import SchemaCache
    from kafkasrcd.workers.schema_registry import SchemaRegistry

    return SchemaCache(SchemaRegistry(settings, base_directory), Path(schema_directory) if schema_directory else None)


def check_form(form: Format, base_directory: Path) -> None:
    """See that a format's library and the schemas in files can be used; asks no registry and runs no user's code.

    Raises ConfigurationError.
    """
    require_extra(form)
    if form.kind in WITH_SCHEMA:
        schemas = _schema_cache(SchemaRegistrySettings(), base_directory, "")
        importlib.import_module(_home(form)).preparer_of(form, Shape.PLAIN, base_directory, schemas)


def require_extra(form: Format) -> None:
    """Raises ConfigurationError where the library of a format is not installed."""
    if form.kind in EXTRAS:
        module, extra = EXTRAS[form.kind]
        try:
            importlib.import_module(module)
        except ImportError:
            raise ConfigurationError(
                f"{form.setting}: {form.kind.value} needs a library that is not installed: pip install "
                f"'kafkasrcd[{extra}]'"
            ) from None


def _error_of(index: int, refused: Quarantined) -> RecordError:
    return RecordError(index, refused.error, refused.reason, refused.attempts, refused.traceback)


def _bytes(item: object) -> bytes:
    return item if isinstance(item, bytes) else b""
