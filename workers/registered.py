"""Values whose header names their schema: what each schema reads with is looked up once."""

from collections.abc import Callable
from typing import Generic, TypeVar

from kafkasrcd.workers.formats import HEADER_BYTES, MAGIC
from kafkasrcd.workers.reasons import SaysWhere
from kafkasrcd.workers.schema_cache import Complete, SchemaCache
from kafkasrcd.workers.schema_document import NoSuchSchema, SchemaDocument

T = TypeVar("T")


class WrongSchema(SaysWhere):
    """The schema that a record names is not one that it can have been written with."""


class Registered(Generic[T]):
    """``read`` makes of a schema what records are read with; ``kind`` is what it must be; ``complete``: the cache's."""

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
        """By header."""

    def need(self, raw: bytes) -> None:
        """Have the schema of ``raw`` here. Raises RegistryAway; says nothing of what is wrong with ``raw``."""
        header = raw[:HEADER_BYTES]
        if header in self._known or len(header) < HEADER_BYTES or header[0] != MAGIC:
            return
        number = int.from_bytes(header[1:])
        try:
            document = self._schemas.get(number, self._complete)
        except NoSuchSchema:
            return  # it may exist one day: asked for again with the next record
        if document.kind != self._kind:
            self._known[header] = WrongSchema(f"schema {number} is of type {document.kind}, not {self._kind}")
            return
        try:
            self._known[header] = self._read(document)
        except Exception as error:  # noqa: BLE001 - what libraries raise for a schema that they cannot use
            self._known[header] = WrongSchema(f"schema {number} cannot be used: {type(error).__name__}: {error}")

    def of(self, raw: bytes) -> T:
        """What ``raw`` is read with, after ``need``. Raises ValueError, NoSuchSchema or WrongSchema."""
        known = self._known.get(raw[:HEADER_BYTES])
        if known is None:
            number = check_header(raw)
            raise NoSuchSchema(f"the registry at {self._schemas.registry.name} has no schema {number}")
        if isinstance(known, WrongSchema):
            raise known
        return known


def check_header(raw: bytes) -> int:
    """The id in the header of ``raw``. Raises ValueError where it has none."""
    if len(raw) < HEADER_BYTES or raw[0] != MAGIC:
        begins = f"it begins with {raw[:HEADER_BYTES].hex(' ')}" if raw else "it is empty"
        raise ValueError(
            f"no schema registry's header ({begins}): no registry's serializer wrote it; for a schema from a file set "
            "value_schema, or key_schema"
        )
    return int.from_bytes(raw[1:HEADER_BYTES])
