"""Avro: the worker's half. A record is read with the schema that it was written with, as the reader's where there is
one, and goes on as MessagePack."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import fastavro
from fastavro.schema import load_schema, parse_schema

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers import extensions
from kafkasrcd.workers.formats import Format, Shape
from kafkasrcd.workers.registered import HEADER_BYTES, Registered
from kafkasrcd.workers.schema_cache import SchemaCache
from kafkasrcd.workers.schema_document import Reference, SchemaDocument

_AS_OBJECTS: Final = frozenset(
    {
        "decimal",
        "uuid",
        "date",
        "time-millis",
        "time-micros",
        "local-timestamp-millis",
        "local-timestamp-micros",
    }
)
"""Logical types whose Python objects MessagePack does not know."""

Read = Callable[[bytes, int], bytes]
"""A record's bytes, and where the value begins in them, to MessagePack."""


def preparer_of(form: Format, shape: Shape, base_directory: Path, schemas: SchemaCache | None) -> Any:
    """See ``preparing.Preparer``. Raises ConfigurationError where a schema's file cannot be used."""
    reader = None
    if form.reader_schema:
        reader = _from_file(base_directory / form.reader_schema, f"{_side(form)}_reader_schema")
    if form.schema:
        return _FromFile(_reading(_from_file(base_directory / form.schema, f"{_side(form)}_schema"), reader, shape))
    if schemas is None:
        raise ConfigurationError(f"{form.setting}: avro needs schema_registry.url, or {_side(form)}_schema")

    def read(document: SchemaDocument) -> Read:
        return _reading(parsed(document.text, document.references), reader, shape)

    return _FromRegistry(Registered(schemas, "AVRO", read))


def parsed(text: str, references: Iterable[Reference] = ()) -> Any:
    """The schema, as fastavro wants it."""
    named: dict[str, Any] = {}
    for reference in references:
        parse_schema(json.loads(reference.text), named_schemas=named)
    return parse_schema(json.loads(text), named_schemas=named)


class _FromFile:
    def __init__(self, read: Read) -> None:
        self._read = read

    def need(self, raw: bytes) -> None:
        """Nothing is needed."""

    def prepare(self, raw: bytes) -> bytes:
        return self._read(raw, 0)


class _FromRegistry:
    def __init__(self, registered: Registered[Read]) -> None:
        self._registered = registered
        self.need = registered.need

    def prepare(self, raw: bytes) -> bytes:
        return self._registered.of(raw)(raw, HEADER_BYTES)


def _reading(writer: Any, reader: Any, shape: Shape) -> Read:
    read_one = fastavro.schemaless_reader
    encode = extensions.encode
    has_objects = shape is Shape.PLAIN and (_has_objects(writer) or (reader is not None and _has_objects(reader)))

    def read(raw: bytes, start: int) -> bytes:
        stream = io.BytesIO(raw)
        stream.seek(start)
        value: Any = read_one(stream, writer, reader)
        left = len(raw) - stream.tell()
        if left:
            raise ValueError(f"{left} bytes more than its schema has")
        return encode(extensions.with_extensions(value) if has_objects else value)

    return read


def _has_objects(schema: Any) -> bool:
    if isinstance(schema, dict):
        return schema.get("logicalType") in _AS_OBJECTS or any(_has_objects(each) for each in schema.values())
    return isinstance(schema, list) and any(_has_objects(each) for each in schema)


def _from_file(path: Path, setting: str) -> Any:
    try:
        path.read_bytes()  # whose errors say more than the library's
        return load_schema(str(path))
    except Exception as error:  # noqa: BLE001 - the library's, the file system's, JSON's
        raise ConfigurationError(
            f"{setting}: {path} holds no Avro schema that can be used: {type(error).__name__}: {error}"
        ) from None


def _side(form: Format) -> str:
    return form.setting.rpartition("_")[0]
