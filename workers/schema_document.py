"""What a schema registry has, and how it can fail to have it."""

from uuid import UUID

import msgspec

from kafkasrcd.workers.reasons import SaysWhere

SchemaName = int | UUID
"""What a registry knows a schema by: the id it gave, or, in newer ones, a GUID, which is the same everywhere."""


class RegistryAway(Exception):
    """The registry does not answer, or not with an answer to the question: a reason to wait. The message says what."""


class NoSuchSchema(SaysWhere):
    """The registry says that it has no schema of that id."""


class Reference(msgspec.Struct, frozen=True):
    """A schema that another one refers to, by ``name``."""

    name: str
    text: str


class SchemaDocument(msgspec.Struct, frozen=True, kw_only=True):
    """A schema and all that it refers to, directly or not; what is referred to comes first.

    ``kind``: AVRO, PROTOBUF or JSON. ``compiled``: what its format made of it and keeps.
    """

    kind: str
    text: str
    references: tuple[Reference, ...] = ()
    compiled: bytes = b""
