"""From a record's value to the payload a handler asked for."""

import sys
from collections.abc import Callable
from typing import Any, cast

import msgspec
import orjson

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers.extensions import decode_plain
from kafkasrcd.workers.formats import Format, Kind, Shape
from kafkasrcd.workers.user_code import UserCodeError, load_deserializer

Decode = Callable[[Any], Any]
"""A record's value (bytes, not null) to the payload; raises whatever its library raises for a value that is not.

It is given a RecordError in the place of a value that never came, and must raise for that, too."""

_EXPECTED = {
    Kind.STRING: "str",
    Kind.BYTES: "bytes",
}


def decoder_of(form: Format, payload_type: Any) -> Decode:
    """What the handler process does to values of ``form``: all of it, or the half after the worker's.

    Raises TypeError for a type that no such value can be read as, ConfigurationError for a class of the user's that
    cannot be used.
    """
    match form.kind:
        case Kind.JSON | Kind.JSON_SCHEMA:
            return payload_decoder(payload_type)
        case Kind.STRING if payload_type in (str, Any, None):
            return bytes.decode
        case Kind.BYTES if payload_type in (bytes, Any, None):
            return _as_it_is
        case Kind.STRING | Kind.BYTES:
            raise TypeError(f"a value of format {form.kind.value} is {_EXPECTED[form.kind]}")
        case Kind.CUSTOM:
            return _custom_decoder(form)
        case Kind.PROTOBUF if shape_of(payload_type) is Shape.MESSAGE:
            return payload_type.FromString  # type: ignore[no-any-return]
        case _:
            return _msgpack_decoder(payload_type)


def key_decoder_of(form: Format) -> Decode | None:
    """What the handler process does to keys of ``form``; None where that is nothing.

    Raises ConfigurationError for a class of the user's that cannot be used.
    """
    return None if form.kind is Kind.BYTES else decoder_of(form, Any)


def refusing(error: Exception) -> Decode:
    """For what becomes known only when a topic is met: each record is refused, with the reason."""

    def decode(value: object) -> Any:
        raise error

    return decode


def shape_of(payload_type: Any) -> Shape:
    """What the worker prepares for an annotation."""
    message: Any = sys.modules.get("google.protobuf.message")  # loaded already where the type is one of its own
    if message is not None and isinstance(payload_type, type) and issubclass(payload_type, message.Message):
        return Shape.MESSAGE
    if payload_type is Any or payload_type is None or _pydantic_validator(payload_type, "python") is not None:
        return Shape.PLAIN
    return Shape.TYPED


def payload_decoder(payload_type: Any) -> Decode:
    """JSON to ``payload_type``; raises TypeError for a type that no JSON can be read as.

    ``Any`` is orjson's plain objects; a pydantic model or dataclass validates itself; everything else is msgspec's.
    """
    if payload_type is Any or payload_type is None:
        return orjson.loads
    if (validate := _pydantic_validator(payload_type, "json")) is not None:
        return validate
    _refuse_what_cannot_be_read(payload_type)
    return msgspec.json.Decoder(payload_type).decode


def _msgpack_decoder(payload_type: Any) -> Decode:
    if payload_type is Any or payload_type is None:
        return decode_plain
    if (validate := _pydantic_validator(payload_type, "python")) is not None:
        model: Decode = validate  # for the closure's type
        return lambda value: model(decode_plain(value))
    _refuse_what_cannot_be_read(payload_type)
    return cast(Decode, msgspec.msgpack.Decoder(payload_type).decode)


def _custom_decoder(form: Format) -> Decode:
    try:
        build = load_deserializer(form.deserializer).build
    except UserCodeError as error:
        raise ConfigurationError(f"{form.setting}: {error}") from error.__cause__

    def decode(value: Any) -> Any:
        if type(value) is not bytes:
            raise TypeError("no bytes")
        return build(value)

    return decode


def _as_it_is(value: Any) -> bytes:
    if type(value) is not bytes:
        raise TypeError("no bytes")
    return value


def _pydantic_validator(payload_type: Any, source: str) -> Decode | None:
    """Where the type is pydantic's: its own validation, of JSON or of Python's objects."""
    pydantic: Any = sys.modules.get("pydantic")  # loaded already where the type is one of its own
    if pydantic is None or not isinstance(payload_type, type):
        return None
    if issubclass(payload_type, pydantic.BaseModel):
        model = cast(Any, payload_type)
        return cast(Decode, model.model_validate_json if source == "json" else model.model_validate)
    if pydantic.dataclasses.is_pydantic_dataclass(payload_type):
        adapter = pydantic.TypeAdapter(payload_type)
        return cast(Decode, adapter.validate_json if source == "json" else adapter.validate_python)
    return None


def _refuse_what_cannot_be_read(payload_type: Any) -> None:
    try:
        msgspec.json.schema(payload_type)  # the decoder takes any class, and then no record
    except TypeError as error:
        raise TypeError(str(error).splitlines()[-1]) from None
