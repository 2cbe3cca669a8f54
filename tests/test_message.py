"""The envelope: what a handler sees of a record."""

from datetime import UTC, datetime

import msgspec
import pytest

from kafkasrcd import Headers, Message
from kafkasrcd.message import encode_headers


def test_a_payload_is_enough_in_a_test() -> None:
    message = Message({"order": 1})
    assert message.payload == {"order": 1}
    assert (message.key, message.topic, message.partition, message.offset) == (None, "", 0, 0)
    assert message.timestamp is None
    assert dict(message.headers) == {}


def test_a_timestamp_is_aware_and_exact() -> None:
    message = Message(None, timestamp_ms=1_700_000_000_123)
    assert message.timestamp == datetime(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=UTC)
    assert Message(None, timestamp_ms=0).timestamp == datetime(1970, 1, 1, tzinfo=UTC)


def test_headers_are_a_mapping_with_every_value_of_a_repeated_name() -> None:
    pairs: list[tuple[str, bytes | None]] = [("trace", b"1"), ("empty", b""), ("null", None), ("trace", b"2")]
    headers = Message(None, encoded_headers=encode_headers(pairs)).headers
    assert isinstance(headers, Headers)
    assert dict(headers) == {"trace": b"2", "empty": b"", "null": None}
    assert headers.get_all("trace") == [b"1", b"2"]
    assert headers.get_all("absent") == []
    assert list(headers.items_all()) == pairs
    assert headers.get("absent", b"-") == b"-"
    assert len(headers) == 3
    assert "trace" in repr(headers)


def test_a_message_cannot_be_changed() -> None:
    message = Message(1)
    with pytest.raises(AttributeError):
        message.payload = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(message, msgspec.Struct)
