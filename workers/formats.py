"""How the values and keys of each topic are written.

``json``, ``string``, ``bytes`` and ``msgpack`` are decoded in the handler process: the frame has a record's own bytes.
The others have two halves. The worker *prepares*: it reads what only a schema, or the user's class, can read, and
hands off bytes that the handler process *builds* the payload from. So a bad record fails in the worker, alone, and the
costly half runs beside each other for all partitions.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

import msgspec

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.message import decode_headers
from kafkasrcd.settings import FormatSettings, Settings
from kafkasrcd.workers.topic_matcher import topic_matcher

CUSTOM_PREFIX: Final = "custom:"
HEADER_BYTES: Final = 5
MAGIC: Final = 0
"""A registry's serializers write this byte first, then the schema's id, big-endian."""
GUID_MAGIC: Final = 1
GUID_HEADER_BYTES: Final = 17
"""Or, into a header of the record, this one and a GUID."""
VALUE_SCHEMA_HEADER: Final = "__value_schema_id"
KEY_SCHEMA_HEADER: Final = "__key_schema_id"
"""Headers that say which schema a record was written with; its value, or key, is then the bare document."""


class Kind(StrEnum):
    """What a format is called in the settings."""

    JSON = "json"
    STRING = "string"
    BYTES = "bytes"
    MSGPACK = "msgpack"
    AVRO = "avro"
    PROTOBUF = "protobuf"
    JSON_SCHEMA = "json_schema"
    CUSTOM = "custom"


WITH_SCHEMA: Final = frozenset({Kind.AVRO, Kind.PROTOBUF, Kind.JSON_SCHEMA})
PREPARED: Final = WITH_SCHEMA | {Kind.CUSTOM}


class Shape(StrEnum):
    """What a handler's annotation makes of a record: the worker prepares what can be read as that."""

    PLAIN = "plain"
    """Python's own objects."""
    TYPED = "typed"
    """What msgspec builds."""
    MESSAGE = "message"
    """A generated class of protobuf's."""


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """How values, or keys, are written. ``setting``: where that is said. Files are as the settings have them."""

    kind: Kind
    setting: str = "value_format"
    deserializer: str = ""
    """With ``custom``: ``package.module:Class``."""
    schema: str = ""
    reader_schema: str = ""
    message: str = ""

    @property
    def name(self) -> str:
        """As the settings have it."""
        return f"{CUSTOM_PREFIX}{self.deserializer}" if self.kind is Kind.CUSTOM else self.kind.value

    @property
    def is_prepared(self) -> bool:
        """Whether the worker has a part in it."""
        return self.kind in PREPARED

    @property
    def needs_registry(self) -> bool:
        """Whether records say in a header which of a registry's schemas they were written with."""
        return self.kind in WITH_SCHEMA and not self.schema

    def schema_id(self, raw: bytes | None, headers: bytes | None = None) -> int | None:
        """Which of a registry's schemas the value ``raw`` says it was written with; None where it does not say, or its
        record does, in encoded ``headers``."""
        if not self.needs_registry or raw is None or len(raw) < HEADER_BYTES or raw[0] != MAGIC:
            return None
        if schema_header(headers, VALUE_SCHEMA_HEADER):
            return None
        return int.from_bytes(raw[1:HEADER_BYTES])


def schema_header(headers: bytes | None, name: str) -> bytes:
    """The first header of ``name`` among encoded ``headers``; empty where there is none, as for most records."""
    if headers is None or name.encode() not in headers:
        return b""
    return next((value for each, value in decode_headers(headers).items_all() if each == name), None) or b""


JSON: Final = Format(kind=Kind.JSON)
BYTES: Final = Format(kind=Kind.BYTES, setting="key_format")


def kind_of_format(text: str) -> tuple[Kind, str]:
    """The format that a setting names, and its class where it is ``custom:…``. Raises ValueError."""
    if text.startswith(CUSTOM_PREFIX):
        return Kind.CUSTOM, text.removeprefix(CUSTOM_PREFIX)
    kind = Kind(text)
    if kind is Kind.CUSTOM:
        raise ValueError("custom without a class")
    return kind, ""


class Formats:
    """The formats of one configuration. Raises ConfigurationError for one that does not exist."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        try:
            self._rows = [(topic_matcher(pattern), pattern, row) for pattern, row in settings.formats.items()]
        except re.error as error:
            raise ConfigurationError(f"formats has a key that is no regular expression: {error}") from None

    def value(self, topic: str) -> Format:
        """Of the values of ``topic``."""
        return self._value(*self._row(topic))

    def key(self, topic: str) -> Format:
        """Of the keys of ``topic``."""
        return self._key(*self._row(topic))

    def all(self) -> Iterator[Format]:
        """Those of all rows, and those of topics that no row names."""
        for pattern, row in (*self._settings.formats.items(), ("", _NO_ROW)):
            yield self._value(pattern, row)
            yield self._key(pattern, row)

    def _value(self, pattern: str, row: FormatSettings) -> Format:
        text, setting = row.value_format, f"formats.{pattern}.value_format"
        if not text:
            text, setting = self._settings.value_format, "value_format"
        return _format(text, setting, row.value_schema, row.value_reader_schema, row.value_message)

    def _key(self, pattern: str, row: FormatSettings) -> Format:
        text, setting = row.key_format, f"formats.{pattern}.key_format"
        if not text:
            text, setting = self._settings.key_format, "key_format"
        return _format(text, setting, row.key_schema, row.key_reader_schema, row.key_message)

    def certain(self) -> Iterator[tuple[str, Format, Format]]:
        """The topics that are subscribed to by name, with the formats of values and keys: what is known beforehand."""
        for topic in self._settings.topics:
            if not topic.startswith("^"):
                yield topic, self.value(topic), self.key(topic)

    @property
    def has_rows(self) -> bool:
        """Whether topics differ."""
        return bool(self._rows)

    def _row(self, topic: str) -> tuple[str, FormatSettings]:
        for matches, pattern, row in self._rows:
            if matches(topic):
                return pattern, row
        return "", _NO_ROW


_NO_ROW: Final = FormatSettings()


def _format(text: str, setting: str, schema: str, reader_schema: str, message: str) -> Format:
    try:
        kind, deserializer = kind_of_format(text)
    except ValueError:
        raise ConfigurationError(f"{setting}: there is no format {text!r}") from None
    return Format(
        kind=kind,
        setting=setting,
        deserializer=deserializer,
        schema=schema,
        reader_schema=reader_schema,
        message=message,
    )
