"""From librdkafka's messages to frames: nothing lost, nothing out of order, nothing that a ring cannot carry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_NOT_AVAILABLE
from confluent_kafka import Message as KafkaMessage
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kafkasrcd.message import Message
from kafkasrcd.settings import SupervisorSettings
from kafkasrcd.workers.frame import Columns, EncodedFrame, RecordError, decode_frame
from kafkasrcd.workers.record_batch import columns_of, hand_off
from kafkasrcd.workers.ring import PAGE, largest_payload

Headers = list[tuple[str, str | bytes | None]]


def kafka_message(
    offset: int,
    value: bytes | None = b"value",
    key: bytes | None = None,
    headers: Headers | None = None,
    timestamp_ms: int = 1_000,
) -> KafkaMessage:
    return KafkaMessage(
        topic="orders",
        partition=3,
        offset=offset,
        key=key,
        value=value,
        headers=headers,
        timestamp=(TIMESTAMP_CREATE_TIME, timestamp_ms),
    )


@dataclass
class Ring:
    """Takes what is published; decoded as the handler's side would."""

    frames: list[EncodedFrame] = field(default_factory=list[EncodedFrame])

    def publish(self, frame: EncodedFrame) -> None:
        self.frames.append(frame)

    @property
    def columns(self) -> list[Columns]:
        return [decode_frame(b"".join(frame.parts)) for frame in self.frames]

    @property
    def offsets(self) -> list[list[int]]:
        return [list(columns.offsets) for columns in self.columns]

    @property
    def records(self) -> list[Message[bytes | None]]:
        return [
            Message(value, key, "orders", 3, offset, timestamp, headers)
            for columns in self.columns
            for offset, value, timestamp, key, headers in zip(
                columns.offsets,
                columns.values,
                columns.timestamps,
                columns.keys or [None] * len(columns.values),
                columns.headers or [None] * len(columns.values),
                strict=True,
            )
        ]


def handed_off(messages: Sequence[KafkaMessage], largest: int = 1 << 20) -> Ring:
    ring = Ring()
    hand_off(messages, largest, ring.publish)
    return ring


def test_every_field_arrives() -> None:
    pairs: Headers = [("trace", b"1"), ("empty", b""), ("trace", None), ("trace", b"2")]
    ring = handed_off(
        [
            kafka_message(5, b"full", b"key", pairs, 1_700_000_000_123),
            kafka_message(6, None, b"tombstone"),
            kafka_message(9, b"", None, []),
            kafka_message(10, b"late", b"", [("a", None)], -1),
        ]
    )
    full, tombstone, empty, late = ring.records
    assert (full.offset, full.payload, full.key, full.timestamp_ms) == (5, b"full", b"key", 1_700_000_000_123)
    assert full.headers.items_all() == tuple(pairs)
    assert (tombstone.offset, tombstone.payload, tombstone.key) == (6, None, b"tombstone")
    assert (empty.offset, empty.payload, empty.key) == (9, b"", None)
    assert empty.headers.items_all() == ()
    assert (late.offset, late.key, late.timestamp) == (10, b"", None)
    assert late.headers.items_all() == (("a", None),)
    (frame,) = ring.frames
    assert (frame.records, frame.next_offset, frame.record_bytes) == (4, 11, len(b"fullkeytombstonelate"))


def test_columns_that_no_record_needs_are_left_out() -> None:
    columns = columns_of([kafka_message(offset) for offset in (7, 8, 9)])
    assert columns.offsets == range(7, 10)
    assert columns.keys is columns.headers is None


def test_gaps_in_the_offsets_are_kept() -> None:
    """Transaction markers and compaction leave them."""
    assert handed_off([kafka_message(offset) for offset in (1, 2, 5, 100)]).offsets == [[1, 2, 5, 100]]


def test_a_batch_too_large_is_halved_until_it_fits() -> None:
    messages = [kafka_message(offset, bytes(1000)) for offset in range(8)]
    whole = handed_off(messages).frames[0].size
    assert handed_off(messages, whole).offsets == [list(range(8))]
    assert handed_off(messages, whole - 1).offsets == [[0, 1, 2, 3], [4, 5, 6, 7]]
    uneven = [kafka_message(offset, bytes(3000 if offset == 5 else 10)) for offset in range(8)]
    assert handed_off(uneven, 3100).offsets == [[0, 1, 2, 3], [4, 5], [6, 7]]


@hypothesis_settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3000) | st.none()), min_size=1, max_size=30),
    st.sampled_from([largest_payload(PAGE), 700, 250]),
)
def test_frames_fit_and_hold_every_record_in_order(gaps_and_sizes: list[tuple[int, int | None]], largest: int) -> None:
    messages: list[KafkaMessage] = []
    offset = 0
    for gap, size in gaps_and_sizes:
        offset += gap
        messages.append(kafka_message(offset, None if size is None else bytes([offset % 256]) * size, b"k"))
    ring = handed_off(messages, largest)
    records = {record.offset: record for record in ring.records}
    assert [offset for offsets in ring.offsets for offset in offsets] == [message.offset() for message in messages]
    failed: set[int] = set()
    for frame, columns in zip(ring.frames, ring.columns, strict=True):
        failed |= {columns.offsets[error.index] for error in columns.errors}
        assert frame.size <= largest or columns.errors
    for message in messages:
        at = message.offset()
        assert at is not None
        alone = handed_off([message]).frames[0].size
        assert (at in failed) == (alone > largest)
        assert records[at].payload == (None if at in failed else message.value())


def too_large(message: KafkaMessage, largest: int) -> str:
    """The reason that is handed off in place of ``message``."""
    (columns,) = handed_off([message], largest).columns
    (error,) = columns.errors
    assert (error.index, error.error, error.left_out) == (0, "RecordTooLarge", True)
    assert list(columns.values) == [None]
    return error.reason


@pytest.mark.parametrize("where", ["value", "key", "headers"])
@pytest.mark.parametrize("size", [40_000, 20 * PAGE, 123_457, 3_000_000])
def test_what_the_error_says_to_set_is_accepted_and_enough(where: str, size: int) -> None:
    big = bytes(size)
    message = kafka_message(
        12,
        big if where == "value" else None,
        big if where == "key" else None,
        [("big", big)] if where == "headers" else None,
    )
    reason = too_large(message, largest_payload(65_536))
    said = int(reason.split("a record of ")[1].split()[0])
    assert size <= said < size + 200
    assert said > int(reason.split("allows ")[1].split(":")[0])
    advised = int(reason.split("set it to ")[1].split()[0])
    settings = msgspec.convert({"ring_bytes": advised}, SupervisorSettings)
    assert handed_off([message], largest_payload(settings.ring_bytes)).columns[0].errors == ()


def test_a_record_that_is_refused_and_too_large_keeps_its_reason_where_that_fits() -> None:
    ring = Ring()
    stacks = 'File "formats.py", line 3 in prepare'

    def refusing(error: RecordError) -> Callable[[Columns], Columns]:
        return lambda columns: msgspec.structs.replace(columns, values=[None], raws=columns.values, errors=[error])

    message = kafka_message(7, bytes(2_000))
    hand_off([message], 1_000, ring.publish, refusing(RecordError(0, "WorkerTimeout", "it hung", 3, stacks)))
    hand_off([message], 1_000, ring.publish, refusing(RecordError(0, "WorkerTimeout", "it hung", 3, stacks * 100)))
    (refused,), (too_large,) = (columns.errors for columns in ring.columns)
    assert refused == RecordError(0, "WorkerTimeout", "it hung", 3, stacks, left_out=True)
    assert (too_large.error, too_large.left_out) == ("RecordTooLarge", True)


def test_neighbours_of_a_record_too_large_are_not_touched() -> None:
    messages = [kafka_message(offset, bytes(5000) if offset == 4 else b"small") for offset in range(8)]
    ring = handed_off(messages, largest_payload(PAGE))
    assert [offset for offsets in ring.offsets for offset in offsets] == list(range(8))
    assert [record.payload for record in ring.records] == [None if at == 4 else b"small" for at in range(8)]
    failed = [columns.offsets[error.index] for columns in ring.columns for error in columns.errors]
    assert failed == [4]


def test_the_error_in_place_of_a_record_fits_any_ring() -> None:
    message = kafka_message(2**62, bytes(900_000), bytes(900_000), [("h", bytes(900_000))], 2**40)
    (frame,) = handed_off([message], largest_payload(PAGE)).frames
    assert frame.size <= largest_payload(PAGE)
    assert frame.next_offset == 2**62 + 1


def test_a_time_that_the_broker_does_not_have_is_none() -> None:
    """Message format 0 has no timestamps; whatever stands beside the type "not available" is to be ignored."""
    message = KafkaMessage(topic="orders", partition=3, offset=1, value=b"", timestamp=(TIMESTAMP_NOT_AVAILABLE, 0))
    (record,) = handed_off([message]).records
    assert record.timestamp is None


def test_what_was_made_of_a_record_may_be_too_large_for_a_frame_that_carries_the_record() -> None:
    ring = Ring()

    def prepare(columns: Columns) -> Columns:
        return msgspec.structs.replace(columns, values=[b"x" * 1_000] * len(columns.offsets), raws=columns.values)

    hand_off([kafka_message(7, b"small", b"key"), kafka_message(8, b"small")], 1_000, ring.publish, prepare)
    first, second = ring.columns
    assert (list(first.values), list(first.raws or ())) == ([None], [b"small"])
    assert list(first.keys or ()) == [b"key"]
    assert [(error.error, error.left_out) for error in first.errors] == [("RecordTooLarge", False)]
    assert list(second.offsets) == [8]
