"""JSON Schema: the worker's half. A document is validated, and goes on as it is, without the registry's header."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jsonschema_rs
import orjson

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers.formats import HEADER_BYTES, Format, Shape
from kafkasrcd.workers.reasons import SaysWhere, path_of
from kafkasrcd.workers.registered import Registered
from kafkasrcd.workers.schema_cache import SchemaCache
from kafkasrcd.workers.schema_document import Reference, SchemaDocument

_NO_BASE = "json-schema:///"
"""What the library puts before a reference that is relative to nothing."""


class Invalid(SaysWhere):
    """A document that is not as its schema says."""


Validate = Callable[[Any], None]


def preparer_of(form: Format, shape: Shape, base_directory: Path, schemas: SchemaCache | None) -> Any:
    """See ``preparing.Preparer``. Raises ConfigurationError where a schema's file cannot be used."""
    side = form.setting.rpartition("_")[0]
    if form.schema:
        path = base_directory / form.schema
        try:
            return _FromFile(_validator(path.read_text()))
        except Exception as error:  # noqa: BLE001 - the library's, the file system's
            raise ConfigurationError(
                f"{side}_schema: {path} holds no JSON Schema that can be used: {type(error).__name__}: {error}"
            ) from None
    if schemas is None:
        raise ConfigurationError(f"{form.setting}: json_schema needs schema_registry.url, or {side}_schema")

    def read(document: SchemaDocument) -> Validate:
        return _validator(document.text, document.references)

    return _FromRegistry(Registered(schemas, "JSON", read))


class _FromFile:
    def __init__(self, validate: Validate) -> None:
        self._validate = validate

    def need(self, raw: bytes, header: bytes = b"") -> None:
        """Nothing is needed."""

    def prepare(self, raw: bytes, header: bytes = b"") -> bytes:
        self._validate(orjson.loads(raw))
        return raw


class _FromRegistry:
    def __init__(self, registered: Registered[Validate]) -> None:
        self._registered = registered
        self.need = registered.need

    def prepare(self, raw: bytes, header: bytes = b"") -> bytes:
        validate = self._registered.of(raw, header)
        document = raw if header else raw[HEADER_BYTES:]
        validate(orjson.loads(document))
        return document


def _validator(text: str, references: Iterable[Reference] = ()) -> Validate:
    """Raises what the library raises for a schema that is none, or that refers to what is not there."""
    known = {reference.name: json.loads(reference.text) for reference in references}

    def retrieve(uri: str) -> Any:
        """By the name that the registry has for it. Nothing is fetched from where a schema says it is."""
        name = uri.removeprefix(_NO_BASE)
        for each in (uri, name, name.rpartition("/")[2]):
            if each in known:
                return known[each]
        raise ValueError(f"it refers to {name!r}, which is not among its references")

    is_valid_or_errors = jsonschema_rs.validator_for(json.loads(text), retriever=retrieve)

    def validate(document: Any) -> None:
        if not is_valid_or_errors.is_valid(document):
            error = next(iter(is_valid_or_errors.iter_errors(document)))
            raise Invalid(f"{path_of(error.instance_path)}: {error.message}")

    return validate
