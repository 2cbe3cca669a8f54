"""Frames: many records of one partition as columns, so that a batch costs a few C loops and not a Python object each.

Layout, little-endian: a fixed header; then the columns ``offsets`` (int64; left out where they are consecutive),
``timestamps`` (int64, ms, -1 for none), the lengths of values, keys, headers, raw values and raw keys (int32, -1 for
null; all but the first left out where none has any); then values, keys, encoded headers, raw values and raw keys, one
after the other; then the errors. A checksum covers header, columns and errors: with those sound, no value can be cut at
the wrong place.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from kafkasrcd.errors import RingCorrupted

# crc, flags, base, next, count, then in bytes: columns, values, keys, headers with what is raw, errors.
_HEADER: Final = Struct("<IIqqIIIIII")
_OFFSETS: Final = 1
_KEYS: Final = 2
_HEADERS: Final = 4
_NULL_VALUES: Final = 8
_RAWS: Final = 16
_RAW_KEYS: Final = 32
_INT32: Final = "i"
_INT64: Final = "q"

RECORD_OVERHEAD: Final = 32 + _HEADER.size
"""Bytes a record needs in a frame of its own, beside its key, value and headers, rounded up."""

if sys.byteorder != "little" or array(_INT32).itemsize != 4 or array(_INT64).itemsize != 8:
    raise ImportError("kafkasrcd needs a little-endian machine with 32-bit int and 64-bit long long")


class RecordError(msgspec.Struct, frozen=True, array_like=True):
    """A record of the frame that is not to be handled: its place in the frame, the error's name, and the reason; where
    it has ended workers, how often, and the stacks of the last one. ``left_out``: key, value and headers did not fit
    the frame, and Kafka alone has them."""

    index: int
    error: str
    reason: str
    attempts: int = 1
    traceback: str = ""
    left_out: bool = False


class Columns(msgspec.Struct):
    """Records of one partition, in offset order. All sequences have the same length, or are None for "none has it".

    A value, key or encoded headers may be None (null). ``raws`` and ``raw_keys``: the bytes that Kafka has, where
    values and keys are not these but what was made of them.
    """

    offsets: Sequence[int]
    timestamps: Sequence[int]
    values: Sequence[bytes | None]
    keys: Sequence[bytes | None] | None = None
    headers: Sequence[bytes | None] | None = None
    errors: Sequence[RecordError] = ()
    raws: Sequence[bytes | None] | None = None
    raw_keys: Sequence[bytes | None] | None = None

    def raw_key(self, index: int) -> bytes | None:
        """The key of a record as Kafka has it."""
        keys = self.keys if self.raw_keys is None else self.raw_keys
        return None if keys is None else keys[index]

    def part(self, start: int, stop: int) -> "Columns":
        """The records from ``start`` up to ``stop``."""
        return Columns(
            self.offsets[start:stop],
            self.timestamps[start:stop],
            self.values[start:stop],
            self.keys and self.keys[start:stop],
            self.headers and self.headers[start:stop],
            [
                msgspec.structs.replace(error, index=error.index - start)
                for error in self.errors
                if start <= error.index < stop
            ],
            self.raws and self.raws[start:stop],
            self.raw_keys and self.raw_keys[start:stop],
        )


class EncodedFrame(NamedTuple):
    """A ring's payload in ``parts``, so that they are copied once, into the ring; and what it carries."""

    parts: list[bytes]
    size: int
    records: int
    next_offset: int
    record_bytes: int
    """Key and value bytes, as Kafka has them."""


_encode_errors = msgspec.msgpack.Encoder().encode
_decode_errors = msgspec.msgpack.Decoder(list[RecordError]).decode


def encode_frame(columns: Columns) -> EncodedFrame:
    """The frame of ``columns``, which have at least one record."""
    flags = 0
    offsets = columns.offsets
    count = len(offsets)
    base = offsets[0]
    last = offsets[-1]
    parts: list[bytes] = []
    if last - base != count - 1:  # offsets strictly increase: consecutive exactly where the span is the count
        flags |= _OFFSETS
        parts.append(array(_INT64, offsets).tobytes())
    parts.append(array(_INT64, columns.timestamps).tobytes())
    lengths, values, nulls = _pack(columns.values)
    if nulls:
        flags |= _NULL_VALUES
    parts.append(lengths)
    keys = headers = errors = b""
    rest: list[bytes] = []
    raw_bytes = len(values)
    if columns.keys is not None:
        flags |= _KEYS
        lengths, keys, _ = _pack(columns.keys)
        parts.append(lengths)
    raw_key_bytes = len(keys)
    if columns.headers is not None:
        flags |= _HEADERS
        lengths, headers, _ = _pack(columns.headers)
        parts.append(lengths)
        rest.append(headers)
    if columns.raws is not None:
        flags |= _RAWS
        lengths, raws, _ = _pack(columns.raws)
        parts.append(lengths)
        rest.append(raws)
        raw_bytes = len(raws)
    if columns.raw_keys is not None:
        flags |= _RAW_KEYS
        lengths, raws, _ = _pack(columns.raw_keys)
        parts.append(lengths)
        rest.append(raws)
        raw_key_bytes = len(raws)
    if columns.errors:
        errors = _encode_errors(columns.errors)
    column_bytes = b"".join(parts)
    rest_bytes = sum(map(len, rest))
    header = _HEADER.pack(
        0, flags, base, last + 1, count, len(column_bytes), len(values), len(keys), rest_bytes, len(errors)
    )
    checksum = crc32(errors, crc32(column_bytes, crc32(header)))
    parts = [checksum.to_bytes(4, "little"), header[4:], column_bytes, values, keys, *rest, errors]
    return EncodedFrame(parts, sum(map(len, parts)), count, last + 1, raw_bytes + raw_key_bytes)


def decode_frame(payload: bytes) -> Columns:
    """The columns of a payload whose parts ``encode_frame`` made; raises RingCorrupted for any other."""
    if len(payload) < _HEADER.size:
        raise RingCorrupted(f"a frame of {len(payload)} bytes has no header")
    (checksum, flags, base, next_offset, count, column_bytes, *sizes) = _HEADER.unpack_from(payload)
    start = _HEADER.size
    end = start + column_bytes
    if end + sum(sizes) != len(payload):
        raise RingCorrupted(f"a frame of {len(payload)} bytes says it has {end + sum(sizes)}")
    value_bytes, key_bytes, _, error_bytes = sizes
    errors_at = len(payload) - error_bytes
    sound = crc32(payload[start:end], crc32(payload[4:start], crc32(b"\0\0\0\0")))
    if crc32(payload[errors_at:], sound) != checksum:
        raise RingCorrupted("a frame's columns do not have their checksum")
    offsets: Sequence[int] = range(base, next_offset)
    if flags & _OFFSETS:
        offsets = array(_INT64, payload[start : start + 8 * count])
        start += 8 * count
    timestamps = array(_INT64, payload[start : start + 8 * count])
    start += 8 * count
    values = _unpack(payload, start, count, end, nulls=bool(flags & _NULL_VALUES))
    start += 4 * count
    end += value_bytes
    keys = headers = raws = raw_keys = None
    if flags & _KEYS:
        keys = _unpack(payload, start, count, end, nulls=True)
        start += 4 * count
    end += key_bytes
    if flags & _HEADERS:
        headers = _unpack(payload, start, count, end, nulls=True)
        start += 4 * count
    if flags & (_RAWS | _RAW_KEYS):
        end += _bytes_of(headers)
        if flags & _RAWS:
            raws = _unpack(payload, start, count, end, nulls=True)
            start += 4 * count
        if flags & _RAW_KEYS:
            raw_keys = _unpack(payload, start, count, end + _bytes_of(raws), nulls=True)
    errors = _decode_errors(payload[errors_at:]) if error_bytes else ()
    return Columns(offsets, timestamps, values, keys, headers, errors, raws, raw_keys)


def _bytes_of(column: Sequence[bytes | None] | None) -> int:
    return sum(len(item) for item in column or () if item is not None)


def _pack(column: Sequence[bytes | None]) -> tuple[bytes, bytes, bool]:
    """The column's lengths and bytes, and whether it has nulls. The common case has none and is two C loops."""
    try:
        return array(_INT32, map(len, column)).tobytes(), b"".join(column), False  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    except TypeError:
        lengths = array(_INT32, [-1 if item is None else len(item) for item in column])
        return lengths.tobytes(), b"".join([item for item in column if item is not None]), True


def _unpack(payload: bytes, lengths_at: int, count: int, start: int, *, nulls: bool) -> Sequence[bytes | None]:
    lengths: Iterable[int] = array(_INT32, payload[lengths_at : lengths_at + 4 * count])
    items: list[bytes | None] = []
    append = items.append
    if not nulls:
        for length in lengths:
            end = start + length
            append(payload[start:end])
            start = end
        return items
    for length in lengths:
        if length < 0:
            append(None)
        else:
            append(payload[start : start + length])
            start += length
    return items
