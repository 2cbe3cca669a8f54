"""MessagePack between a worker and a handler process, with the types that it does not know.

A handler whose annotation has a type reads a decimal, a date or a UUID from its text, as msgspec does. One without gets
the object itself: it then travels as an extension, whose content is that text.
"""

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final, cast
from uuid import UUID

import msgspec

_TYPES: Final[tuple[type, ...]] = (Decimal, date, time, datetime, timedelta, UUID)
_CODES: Final = {kind: code for code, kind in enumerate(_TYPES, 1)}


def with_extensions(value: Any) -> Any:
    """``value`` with each such object in it as an extension. MessagePack itself has datetimes with a time zone."""
    kind = type(value)
    if kind is dict:
        return {key: with_extensions(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [with_extensions(item) for item in value]
    code = _CODES.get(kind)
    if code is None or (kind is datetime and value.tzinfo is not None):
        return value
    return msgspec.msgpack.Ext(code, str(msgspec.to_builtins(value)).encode())


def _from_extension(code: int, data: memoryview) -> Any:
    if not 1 <= code <= len(_TYPES):
        raise ValueError(f"an extension of type {code}, which is not known here")
    return msgspec.convert(bytes(data).decode(), _TYPES[code - 1])


encode: Final = msgspec.msgpack.Encoder().encode
decode_plain: Final = cast(Callable[[Any], Any], msgspec.msgpack.Decoder(ext_hook=_from_extension).decode)
