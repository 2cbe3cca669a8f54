"""Avro: the worker's half. A record is read with the schema that it was written with, as the reader's where there is
one, and goes on as MessagePack."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import fastavro
from fastavro import _read_py
from fastavro.schema import load_schema, parse_schema

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers import extensions
from kafkasrcd.workers.formats import HEADER_BYTES, Format, Shape
from kafkasrcd.workers.registered import Registered
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

_SHALLOW_BYTES: Final = 1_000
"""Of a schema that refers to itself, a value has at most as many levels as bytes, and fastavro's reader in C takes some
2 kB of the stack for each: 4,000 levels end the process. Its reader in Python raises."""

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
        return _reading(AvroSchema.parsed(document.text, document.references), reader, shape)

    return _FromRegistry(Registered(schemas, "AVRO", read))


class AvroSchema:
    """A schema as fastavro wants it. ``named``: every type in it that has a name, references included."""

    def __init__(self, schema: Any, named: Mapping[str, Any]) -> None:
        self.schema = schema
        self.has_objects = _has_objects(schema) or any(map(_has_objects, named.values()))
        self.is_recursive = any(_reaches(name, definition, named, set()) for name, definition in named.items())

    @classmethod
    def parsed(cls, text: str, references: Iterable[Reference] = ()) -> "AvroSchema":
        """Raises what fastavro and JSON raise for one that is none."""
        named: dict[str, Any] = {}
        for reference in references:
            parse_schema(json.loads(reference.text), named_schemas=named)
        return cls(parse_schema(json.loads(text), named_schemas=named), named)


class _FromFile:
    def __init__(self, read: Read) -> None:
        self._read = read

    def need(self, raw: bytes, header: bytes = b"") -> None:
        """Nothing is needed."""

    def prepare(self, raw: bytes, header: bytes = b"") -> bytes:
        return self._read(raw, 0)


class _FromRegistry:
    def __init__(self, registered: Registered[Read]) -> None:
        self._registered = registered
        self.need = registered.need

    def prepare(self, raw: bytes, header: bytes = b"") -> bytes:
        return self._registered.of(raw, header)(raw, 0 if header else HEADER_BYTES)


def _reading(writer: AvroSchema, reader: AvroSchema | None, shape: Shape) -> Read:
    in_c: Any = fastavro.schemaless_reader
    in_python: Any = _read_py.schemaless_reader
    encode = extensions.encode
    as_schema = None if reader is None else reader.schema
    both = [writer] if reader is None else [writer, reader]
    has_objects = shape is Shape.PLAIN and any(schema.has_objects for schema in both)
    is_recursive = any(schema.is_recursive for schema in both)

    def read(raw: bytes, start: int) -> bytes:
        stream = io.BytesIO(raw)
        stream.seek(start)
        is_deep = is_recursive and len(raw) > _SHALLOW_BYTES
        value: Any = (in_python if is_deep else in_c)(stream, writer.schema, as_schema)
        left = len(raw) - stream.tell()
        if left:
            raise ValueError(f"{left} bytes more than its schema has")
        return encode(extensions.with_extensions(value) if has_objects else value)

    return read


def _has_objects(schema: Any) -> bool:
    if isinstance(schema, dict):
        return schema.get("logicalType") in _AS_OBJECTS or any(_has_objects(each) for each in schema.values())
    return isinstance(schema, list) and any(_has_objects(each) for each in schema)


def _reaches(name: str, schema: Any, named: Mapping[str, Any], seen: set[str]) -> bool:
    """Whether a value of ``schema`` may hold one of the type ``name``."""
    if isinstance(schema, str):
        if schema == name:
            return True
        if schema in seen or schema not in named:
            return False
        seen.add(schema)
        return _reaches(name, named[schema], named, seen)
    if isinstance(schema, list):
        return any(_reaches(name, each, named, seen) for each in schema)
    if isinstance(schema, dict):
        inside = [field["type"] for field in schema.get("fields", ())]
        inside += [schema[part] for part in ("items", "values") if part in schema]
        if isinstance(schema.get("type"), dict | list):
            inside.append(schema["type"])
        return any(_reaches(name, each, named, seen) for each in inside)
    return False


def _from_file(path: Path, setting: str) -> AvroSchema:
    try:
        path.read_bytes()  # whose errors say more than the library's
        named: dict[str, Any] = {}
        return AvroSchema(load_schema(str(path), named_schemas=named), named)
    except Exception as error:  # noqa: BLE001 - the library's, the file system's, JSON's
        raise ConfigurationError(
            f"{setting}: {path} holds no Avro schema that can be used: {type(error).__name__}: {error}"
        ) from None


def _side(form: Format) -> str:
    return form.setting.rpartition("_")[0]
