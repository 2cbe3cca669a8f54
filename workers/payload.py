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

    ``Any`` is orjson's plain objects; a pydantic model validates itself; everything else is msgspec's.
    """
    if payload_type is Any or payload_type is None:
        return orjson.loads
    pydantic = sys.modules.get("pydantic")  # loaded already where the type is one of its models
    if pydantic is not None and isinstance(payload_type, type) and issubclass(payload_type, pydantic.BaseModel):
        return cast(Any, payload_type).model_validate_json  # type: ignore[no-any-return]
    return msgspec.json.Decoder(payload_type).decode
