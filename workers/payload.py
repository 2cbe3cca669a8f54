"""From a record's value to the payload a handler asked for."""

import sys
from collections.abc import Callable
from typing import Any, cast

import msgspec
import orjson

Decode = Callable[[Any], Any]
"""A record's value (bytes, not null) to the payload; raises whatever its library raises for a value that is not."""


def payload_decoder(payload_type: Any) -> Decode:
    """JSON to ``payload_type``; raises TypeError for a type that no JSON can be read as.

    ``Any`` is orjson's plain objects; a pydantic model or dataclass validates itself; everything else is msgspec's.
    """
    if payload_type is Any or payload_type is None:
        return orjson.loads
    pydantic: Any = sys.modules.get("pydantic")  # loaded already where the type is one of its own
    if pydantic is not None and isinstance(payload_type, type):
        if issubclass(payload_type, pydantic.BaseModel):
            return cast(Any, payload_type).model_validate_json  # type: ignore[no-any-return]
        if pydantic.dataclasses.is_pydantic_dataclass(payload_type):
            return pydantic.TypeAdapter(payload_type).validate_json  # type: ignore[no-any-return]
    try:
        msgspec.json.schema(payload_type)  # the decoder takes any class, and then no record
    except TypeError as error:
        raise TypeError(str(error).splitlines()[-1]) from None
    return msgspec.json.Decoder(payload_type).decode
