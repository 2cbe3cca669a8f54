"""Frames: what goes in comes out, and what was damaged does not."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kafkasrcd.errors import RingCorrupted
from kafkasrcd.message import Headers, Message, encode_headers
from kafkasrcd.workers.frame import RECORD_OVERHEAD, Columns, EncodedFrame, RecordError, decode_frame, encode_frame

INT64 = st.integers(-(2**63), 2**63 - 1)
HEADER_BYTES = 48

deterministic = hypothesis_settings(deadline=None, derandomize=True, max_examples=300)


def maybe(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes | None]:
    return st.none() | values


header_pairs = st.lists(
    st.tuples(st.sampled_from(["trace", "Trace", "", "\N{EURO SIGN}"]), maybe(st.binary(max_size=9))), max_size=4
)


@st.composite
def offsets_of(draw: st.DrawFn) -> list[int]:
    """As Kafka gives them: strictly increasing, with gaps or without."""
    gaps = draw(st.lists(st.just(1) | st.integers(1, 10**6), max_size=20))
    offsets = [draw(st.integers(0, 2**62))]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    return offsets


@st.composite
def columns_of(draw: st.DrawFn) -> Columns:
    offsets = draw(offsets_of())
    count = len(offsets)

    def column(items: st.SearchStrategy[bytes | None]) -> list[bytes | None]:
        return draw(st.lists(items, min_size=count, max_size=count))

    headers = maybe(header_pairs.map(encode_headers))
    errors = st.builds(RecordError, st.integers(0, count - 1), st.text(max_size=9), st.text(max_size=30))
    return Columns(
        offsets,
        draw(st.lists(INT64, min_size=count, max_size=count)),
        column(draw(st.sampled_from([st.binary(max_size=40), maybe(st.binary(max_size=40)), st.none()]))),
        column(maybe(st.binary(max_size=12))) if draw(st.booleans()) else None,
        column(headers) if draw(st.booleans()) else None,
        draw(st.lists(errors, max_size=3)),
        column(maybe(st.binary(max_size=40))) if draw(st.booleans()) else None,
        column(maybe(st.binary(max_size=12))) if draw(st.booleans()) else None,
    )


def payload_of(frame: EncodedFrame) -> bytes:
    return b"".join(frame.parts)


def listed(columns: Columns) -> tuple[object, ...]:
    """Whatever kinds of sequences its columns are."""

    def plain(column: Sequence[object] | None) -> list[object] | None:
        return None if column is None else list(column)

    return (
        list(columns.offsets),
        list(columns.timestamps),
        list(columns.values),
        plain(columns.keys),
        plain(columns.headers),
        list(columns.errors),
        plain(columns.raws),
        plain(columns.raw_keys),
    )


@deterministic
@given(columns_of())
def test_what_goes_in_comes_out(columns: Columns) -> None:
    frame = encode_frame(columns)
    payload = payload_of(frame)
    assert listed(decode_frame(payload)) == listed(columns)
    assert frame.size == len(payload)
    assert frame.records == len(columns.offsets)
    assert frame.next_offset == columns.offsets[-1] + 1
    values = columns.values if columns.raws is None else columns.raws
    keys = columns.keys if columns.raw_keys is None else columns.raw_keys
    keyed = [*values, *(keys or ())]
    assert frame.record_bytes == sum(len(item) for item in keyed if item is not None)


@deterministic
@given(maybe(st.binary(max_size=300)), maybe(st.binary(max_size=300)), maybe(header_pairs.map(encode_headers)))
def test_one_record_needs_no_more_than_the_overhead_says(
    value: bytes | None, key: bytes | None, headers: bytes | None
) -> None:
    frame = encode_frame(Columns([2**62], [2**62], [value], [key], [headers], (), [value], [key]))
    items = (value, key, headers, value, key)
    assert frame.size <= RECORD_OVERHEAD + sum(len(item) for item in items if item is not None)


@deterministic
@given(columns_of(), st.data())
def test_parts_of_columns_add_up_to_the_whole(columns: Columns, data: st.DataObject) -> None:
    columns.errors = [error for error in columns.errors if error.index < len(columns.offsets)]
    cut = data.draw(st.integers(1, len(columns.offsets)), label="cut")
    parts = [columns.part(0, cut), columns.part(cut, len(columns.offsets))]
    for name in ("offsets", "timestamps", "values", "keys", "headers", "raws", "raw_keys"):
        whole = getattr(columns, name)
        assert whole is None or [*(getattr(parts[0], name)), *(getattr(parts[1], name))] == list(whole)
    moved = [(error.index + at, error.reason) for at, part in ((0, parts[0]), (cut, parts[1])) for error in part.errors]
    assert sorted(moved) == sorted((error.index, error.reason) for error in columns.errors)
    assert parts[0].raw_key(0) == (columns.raw_keys or columns.keys or [None])[0]


def test_consecutive_offsets_take_no_room() -> None:
    many = range(5, 1005)
    dense = encode_frame(Columns(many, [-1] * 1000, [b""] * 1000))
    sparse = encode_frame(Columns([*many[:-1], 2000], [-1] * 1000, [b""] * 1000))
    assert sparse.size == dense.size + 8 * 1000


def test_headers_with_repeated_names_keep_every_value_in_order() -> None:
    pairs = [("a", b"1"), ("b", None), ("a", b"2"), ("a", b"")]
    decoded = decode_frame(payload_of(encode_frame(Columns([0], [-1], [b""], None, [encode_headers(pairs)]))))
    assert decoded.headers is not None
    headers = Message(None, encoded_headers=decoded.headers[0]).headers
    assert headers.items_all() == tuple(pairs)
    assert headers.get_all("a") == [b"1", b"2", b""]
    assert headers == Headers(pairs)


def sample() -> Columns:
    """Something in every column."""
    return Columns(
        [3, 4, 9],
        [100, -1, 2**40],
        [b"first", None, b""],
        [b"key", None, b"another"],
        [encode_headers([("trace", b"\x01")]), None, None],
        [RecordError(1, "RecordTooLarge", "a record of 9 bytes")],
        [b"raw", b"value", None],
        [b"raw", None, b"key"],
    )


def test_any_changed_byte_of_header_columns_and_errors_is_noticed() -> None:
    columns = sample()
    frame = encode_frame(columns)
    payload = bytearray(payload_of(frame))
    column_bytes = 3 * (8 + 8 + 5 * 4)
    end_of_columns = HEADER_BYTES + column_bytes
    start_of_errors = len(payload) - len(frame.parts[-1])
    assert [len(part) for part in frame.parts[:3]] == [4, HEADER_BYTES - 4, column_bytes], "the test knows the layout"
    for place in [*range(end_of_columns), *range(start_of_errors, len(payload))]:
        right = payload[place]
        for difference in range(1, 256):
            payload[place] = right ^ difference
            with pytest.raises(RingCorrupted):
                pytest.fail(f"byte {place} changed by {difference:#x}: {decode_frame(bytes(payload))!r}")
        payload[place] = right
    assert listed(decode_frame(bytes(payload))) == listed(columns)


def test_a_changed_byte_of_a_value_moves_no_other() -> None:
    columns = sample()
    frame = encode_frame(columns)
    payload = bytearray(payload_of(frame))
    start = HEADER_BYTES + len(frame.parts[2])
    for place in range(start, len(payload) - len(frame.parts[-1])):
        payload[place] ^= 0xFF
        decoded = decode_frame(bytes(payload))
        payload[place] ^= 0xFF
        assert list(decoded.offsets) == columns.offsets
        assert list(decoded.timestamps) == columns.timestamps
        wrong = 0
        for before, after in (
            (columns.values, decoded.values),
            (columns.keys, decoded.keys),
            (columns.headers, decoded.headers),
            (columns.raws, decoded.raws),
            (columns.raw_keys, decoded.raw_keys),
        ):
            assert before is not None
            assert after is not None
            assert [item if item is None else len(item) for item in after] == [
                item if item is None else len(item) for item in before
            ]
            wrong += sum(old != new for old, new in zip(before, after, strict=True))
        assert wrong == 1


@deterministic
@given(columns_of(), st.data())
def test_a_frame_of_another_length_is_refused(columns: Columns, data: st.DataObject) -> None:
    payload = payload_of(encode_frame(columns))
    shorter = data.draw(st.integers(0, len(payload) - 1), label="length")
    longer = data.draw(st.binary(min_size=1, max_size=50), label="more")
    for damaged in (payload[:shorter], payload + longer, longer + payload):
        with pytest.raises(RingCorrupted):
            decode_frame(damaged)


@hypothesis_settings(deadline=None, derandomize=True, max_examples=1000)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(RingCorrupted):
        decode_frame(payload)


def test_frames_overwritten_in_part_are_refused_or_right_up_to_their_values() -> None:
    """As a writer would leave them that writes where it must not: a piece of one frame within another."""
    chance = random.Random(3)
    refused = 0
    for _ in range(5000):
        count = chance.randrange(1, 9)
        columns = Columns(
            range(count), [chance.randrange(99)] * count, [chance.randbytes(chance.randrange(20)) for _ in range(count)]
        )
        payload = bytearray(payload_of(encode_frame(columns)))
        other = payload_of(encode_frame(sample()))
        start, source = chance.randrange(len(payload)), chance.randrange(len(other))
        piece = other[source : source + chance.randrange(1, 30)]
        payload[start : start + len(piece)] = piece
        try:
            decoded = decode_frame(bytes(payload))
        except RingCorrupted:
            refused += 1
        else:
            assert list(decoded.offsets) == list(columns.offsets)
            assert list(decoded.timestamps) == columns.timestamps
            assert [len(value or b"") for value in decoded.values] == [len(value or b"") for value in columns.values]
            assert decoded.keys is decoded.headers is decoded.raws is decoded.raw_keys is None
            assert list(decoded.errors) == []
    assert 2000 < refused < 5000
