"""Values that say which schema they were written with: what each schema reads with is looked up once.

A value begins with a header that says it, or, with newer serializers, a header of its record does.
"""

from collections.abc import Callable
from typing import Generic, TypeVar
from uuid import UUID

from kafkasrcd.workers.formats import (
    GUID_HEADER_BYTES,
    GUID_MAGIC,
    HEADER_BYTES,
    KEY_SCHEMA_HEADER,
    MAGIC,
    VALUE_SCHEMA_HEADER,
)
from kafkasrcd.workers.reasons import SaysWhere
from kafkasrcd.workers.schema_cache import Complete, SchemaCache
from kafkasrcd.workers.schema_document import NoSuchSchema, SchemaDocument, SchemaName

T = TypeVar("T")


class WrongSchema(SaysWhere):
    """The schema that a record names is not one that it can have been written with."""


class Registered(Generic[T]):
    """``read`` makes of a schema what records are read with; ``kind`` is what it must be; ``complete``: the cache's.

    ``header`` is what a header of the record says, and empty where there is none.
    """

    def __init__(
        self,
        schemas: SchemaCache,
        kind: str,
        read: Callable[[SchemaDocument], T],
        complete: Complete | None = None,
    ) -> None:
        self._schemas = schemas
        self._kind = kind
        self._read = read
        self._complete = complete
        self._known: dict[bytes, T | WrongSchema] = {}
        """By what names it."""

    def need(self, raw: bytes, header: bytes = b"") -> None:
        """Have the schema of ``raw`` here. Raises RegistryAway; says nothing of what is wrong with ``raw``."""
        prefix = _prefix(raw, header)
        if prefix in self._known or (number := _named(prefix)) is None:
            return
        try:
            document = self._schemas.get(number, self._complete)
        except NoSuchSchema:
            return  # it may exist one day: asked for again with the next record
        if document.kind != self._kind:
            self._known[prefix] = WrongSchema(f"schema {number} is of type {document.kind}, not {self._kind}")
            return
        try:
            self._known[prefix] = self._read(document)
        except Exception as error:  # noqa: BLE001 - what libraries raise for a schema that they cannot use
            self._known[prefix] = WrongSchema(f"schema {number} cannot be used: {type(error).__name__}: {error}")

    def of(self, raw: bytes, header: bytes = b"") -> T:
        """What ``raw`` is read with, after ``need``. Raises ValueError, NoSuchSchema or WrongSchema."""
        known = self._known.get(_prefix(raw, header))
        if known is None:
            number = check_header(raw, header)
            raise NoSuchSchema(f"the registry at {self._schemas.registry.name} has no schema {number}")
        if isinstance(known, WrongSchema):
            raise known
        return known


def check_header(raw: bytes, header: bytes = b"") -> SchemaName:
    """The schema that ``header`` names, or where there is none, ``raw``. Raises ValueError where neither does."""
    number = _named(_prefix(raw, header))
    if number is not None:
        return number
    if header:
        raise ValueError(f"its header {VALUE_SCHEMA_HEADER} or {KEY_SCHEMA_HEADER} names no schema: {header.hex(' ')}")
    begins = f"it begins with {raw[:HEADER_BYTES].hex(' ')}" if raw else "it is empty"
    raise ValueError(
        f"no schema registry's header ({begins}): no registry's serializer wrote it; for a schema from a file set "
        "value_schema, or key_schema"
    )


def body(raw: bytes, header: bytes) -> tuple[bytes, int]:
    """After ``check_header``: where what comes after the schema's name is, in ``header`` or in ``raw``, and from which
    place on. In Protobuf that is which message it is."""
    if not header:
        return raw, HEADER_BYTES
    return header, GUID_HEADER_BYTES if header[0] == GUID_MAGIC else HEADER_BYTES


def _prefix(raw: bytes, header: bytes) -> bytes:
    """In ``raw`` there are ids only: a GUID before the document is what no serializer writes."""
    return header[:GUID_HEADER_BYTES] if header else raw[:HEADER_BYTES]


def _named(prefix: bytes) -> SchemaName | None:
    if len(prefix) >= HEADER_BYTES and prefix[0] == MAGIC:
        return int.from_bytes(prefix[1:HEADER_BYTES])
    if len(prefix) == GUID_HEADER_BYTES and prefix[0] == GUID_MAGIC:
        return UUID(bytes=prefix[1:])
    return None
