"""From librdkafka's messages to frames in a ring."""

from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Message

from kafkasrcd.message import encode_headers
from kafkasrcd.workers.frame import RECORD_OVERHEAD, Columns, EncodedFrame, RecordError, encode_frame
from kafkasrcd.workers.ring import PAGE

# As confluent_kafka's annotations leave them: an offset that may be None, headers that may be a dict of str. What was
# consumed from a broker has an offset, and its headers are pairs of bytes.
_offset: Final = cast(Callable[[Message], int], Message.offset)
_headers: Final = cast(Callable[[Message], list[tuple[str, bytes | None]] | None], Message.headers)

Publish = Callable[[EncodedFrame], None]
"""Hands a frame to the ring, blocking while that is full."""


def columns_of(messages: Sequence[Message]) -> Columns:
    """The columns of ``messages``: records of one partition, in offset order, none of them an error.

    One C loop a column: 0.3 µs a record in all, where a Python loop with a call for each would take three times that.
    """
    first, last = _offset(messages[0]), _offset(messages[-1])
    offsets: Sequence[int] = range(first, last + 1)
    if len(offsets) != len(messages):
        offsets = list(map(_offset, messages))
    keys = list(map(Message.key, messages))
    headers = list(map(_headers, messages))
    return Columns(
        offsets,
        # Message format 0 has none, and librdkafka then leaves 0 beside the type that says so.
        [-1 if kind == TIMESTAMP_NOT_AVAILABLE else at for kind, at in map(Message.timestamp, messages)],
        list(map(Message.value, messages)),
        None if keys.count(None) == len(keys) else keys,
        [encode_headers(pairs) if pairs else None for pairs in headers] if any(headers) else None,
    )


def hand_off(
    messages: Sequence[Message], largest: int, publish: Publish, prepare: Callable[[Columns], Columns] | None = None
) -> None:
    """Publish ``messages`` in as few frames of at most ``largest`` bytes as halving gives.

    A record that fits no frame goes as an error in its place, with what Kafka has, where that alone fits, or with no
    bytes at all: the handler's side decides on it. ``prepare``: the worker's half of their format.
    """
    columns = columns_of(messages)
    _publish(columns if prepare is None else prepare(columns), largest, publish)


def _publish(columns: Columns, largest: int, publish: Publish) -> None:
    frame = encode_frame(columns)
    if frame.size > largest:
        count = len(columns.offsets)
        if count > 1:
            _publish(columns.part(0, count // 2), largest, publish)
            _publish(columns.part(count // 2, count), largest, publish)
            return
        frame = encode_frame(_too_large(columns, largest))
    publish(frame)


def _too_large(columns: Columns, largest: int) -> Columns:
    """What fits in place of the one record of ``columns``."""
    whole = (columns.values, columns.keys, columns.headers, columns.raws, columns.raw_keys)
    size = sum(len(column[0] or b"") for column in whole if column)
    pages = -(-2 * (size + PAGE) // PAGE)
    reason = (
        f"a record of {size} bytes, where supervisor.ring_bytes allows {largest - RECORD_OVERHEAD}: "
        f"set it to {pages * PAGE} or more"
    )
    too_large = RecordError(0, "RecordTooLarge", reason)
    if columns.raws is not None:
        whole_but_prepared = msgspec.structs.replace(
            columns,
            values=[None],
            keys=columns.keys if columns.raw_keys is None else [None],
            errors=columns.errors or [too_large],
        )
        if encode_frame(whole_but_prepared).size <= largest:
            return whole_but_prepared
    for error in (*columns.errors, too_large):
        left_out = msgspec.structs.replace(error, left_out=True)
        without = Columns(columns.offsets, columns.timestamps, [None], errors=[left_out])
        if encode_frame(without).size <= largest:
            break
    return without
