"""Formats that need no schema: what each makes of a value, why one is refused, and that no bytes do more harm."""

import contextlib
import enum
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kafkasrcd.errors import ConfigurationError
from kafkasrcd.settings import FormatSettings, Settings
from kafkasrcd.workers import extensions
from kafkasrcd.workers.formats import Format, Formats, Kind
from kafkasrcd.workers.frame import RecordError
from kafkasrcd.workers.handler_target import HandlerTarget
from kafkasrcd.workers.payload import decoder_of
from kafkasrcd.workers.reasons import reason_of
from tests.format_travel import Bad, Travel

fuzz = hypothesis_settings(deadline=None, derandomize=True, max_examples=300)


@dataclass
class User:
    id: int


@dataclass
class Order:
    user: User


class Model(pydantic.BaseModel):
    id: int


class Colour(enum.Enum):
    RED = "red"


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "payload_type", "raw", "payload"),
    [
        ("json", Any, b'{"a": [1]}', {"a": [1]}),
        ("json", Order, b'{"user": {"id": 7}}', Order(User(7))),
        ("string", Any, "żółw".encode(), "żółw"),
        ("string", str, b"", ""),
        ("bytes", Any, b"\xff\0", b"\xff\0"),
        ("bytes", bytes, b"", b""),
        ("msgpack", Any, msgspec.msgpack.encode({"a": b"\0", 1: None}), {"a": b"\0", 1: None}),
        ("msgpack", Order, msgspec.msgpack.encode(Order(User(7))), Order(User(7))),
        ("msgpack", Model, msgspec.msgpack.encode({"id": 7}), Model(id=7)),
    ],
)
def test_a_value_and_a_tombstone(kind: str, payload_type: Any, raw: bytes, payload: Any) -> None:
    assert Travel(payload_type, value_format=kind)(raw, None, raw) == [payload, None, payload]


@pytest.mark.parametrize(
    ("kind", "payload_type", "raw", "reason"),
    [
        ("json", Order, b'{"user": {"id": "7"}}', "$.user.id: expected int, got str"),
        ("json", Order, b'{"user": {}}', "$.user: object missing required field id"),
        ("json", Order, b"[]", "$: expected object, got array"),
        ("json", list[int], b"[1, 2, null]", "$[2]: expected int, got null"),
        ("json", dict[str, int], b'{"a": 1.5}', "$[...]: expected int, got float"),
        ("json", Model, b'{"id": "x"}', "$.id: input should be a valid integer, unable to parse string as an integer"),
        ("json", Colour, b'"blue"', "$: invalid enum value 'blue'"),
        ("json", Order, b"", "DecodeError: Input data was truncated"),
        ("json", Any, b"", "JSONDecodeError: "),
        ("string", Any, b"a\xff", "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 1"),
        ("msgpack", Order, msgspec.msgpack.encode({"user": {"id": "7"}}), "$.user.id: expected int, got str"),
        ("msgpack", Any, b"\xc1", "DecodeError: "),
        ("msgpack", Any, b"", "DecodeError: Input data was truncated"),
    ],
)
def test_a_bad_value_says_where_and_why_and_harms_no_other(
    kind: str, payload_type: Any, raw: bytes, reason: str
) -> None:
    first, bad, last = Travel(payload_type, value_format=kind)(None, raw, None)
    assert (first, last) == (None, None)
    assert isinstance(bad, Bad)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.CUSTOM])
@pytest.mark.parametrize("payload_type", [Any, str, bytes, Order])
def test_no_format_takes_a_record_error_for_a_value(kind: Kind, payload_type: Any) -> None:
    try:
        decode = decoder_of(Format(kind=kind), payload_type)
    except TypeError:
        return
    with pytest.raises(Exception, match=r"."):
        decode(RecordError(0, "RecordTooLarge", "too large"))


def test_reasons_are_unicode_whatever_was_raised() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert reason_of(ValueError("a\udcff")) == r"ValueError: a\udcff"
    assert reason_of(Silent()) == "Silent: (no text: RuntimeError)"


# ---- which format a topic has ----------------------------------------------------------------------------------------


def test_the_first_row_that_matches_counts_and_what_it_leaves_out_is_the_default() -> None:
    formats = Formats(
        Settings(
            value_format="msgpack",
            key_format="string",
            formats={
                "^orders": FormatSettings(value_format="string"),
                "orders": FormatSettings(value_format="bytes", key_format="json"),
                "clicks": FormatSettings(key_format="json"),
            },
        )
    )
    assert (formats.value("orders").kind, formats.key("orders").kind) == (Kind.STRING, Kind.STRING)
    assert (formats.value("clicks").kind, formats.key("clicks").kind) == (Kind.MSGPACK, Kind.JSON)
    assert formats.value("others").kind is Kind.MSGPACK
    assert formats.value("orders").setting == "formats.^orders.value_format"
    assert formats.value("clicks").setting == "value_format"


def test_a_handler_whose_annotation_does_not_fit_is_told_so() -> None:
    target = HandlerTarget("shop:handle", print, False, False, Order, decoder_of(Format(kind=Kind.JSON), Order))
    with pytest.raises(ConfigurationError) as refused:
        target.reading(Format(kind=Kind.STRING))
    assert str(refused.value) == (
        "handler target 'shop:handle': no value of format string can be read as Order (a value of format string is "
        "str); use Message[str], or another value_format"
    )
    with pytest.raises(ConfigurationError, match="a value of format string is str"):
        target.reading_or_refusing(Format(kind=Kind.STRING)).decode(b"x")


# ---- a class of the user's -------------------------------------------------------------------------------------------

CUSTOM = """
import os, signal
from kafkasrcd import Deserializer

class Lines(Deserializer):
    def prepare(self, raw):
        if raw == b"die":
            os.kill(os.getpid(), signal.SIGKILL)
        if raw == b"text":
            return "no bytes"
        return raw.upper()

    def build(self, prepared):
        return prepared.decode().split(",")

class Half:
    def build(self, prepared):
        return prepared

class Plain(Deserializer):
    def build(self, prepared):
        return prepared
"""


@pytest.fixture
def custom(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "own_format.py").write_text(CUSTOM)
    before = list(sys.path)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("own_format", None)


def test_a_class_of_the_user_s_has_a_half_in_each_process(custom: Path) -> None:
    travel = Travel(value_format="custom:own_format:Lines")
    good, bad, tombstone, undecodable = travel(b"a,b", b"text", None, b"\xff")
    assert (good, tombstone) == (["A", "B"], None)
    assert bad == Bad("TypeError: prepare returned str, not bytes")
    assert undecodable.reason.startswith("UnicodeDecodeError: ")
    assert list(travel.columns(b"a,b").values) == [b"A,B"], "the worker's half"


def test_what_prepare_leaves_as_it_is_travels_once(custom: Path) -> None:
    columns = Travel(value_format="custom:own_format:Plain").columns(b"a", b"b", None)
    assert columns.raws is None
    assert list(columns.values) == [b"a", b"b", None]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_format:Half", "value_format: 'own_format:Half' has no prepare: it needs prepare"),
        ("own_format:Gone", "value_format: 'own_format:Gone' cannot be used: AttributeError: module 'own_format'"),
        ("no_such_module:Lines", "value_format: 'no_such_module:Lines' cannot be used: ModuleNotFoundError"),
    ],
)
def test_a_class_that_cannot_be_used(name: str, reason: str, custom: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Travel(value_format=f"custom:{name}")
    assert str(refused.value).startswith(f"formats.orders.{reason}")


# ---- between the processes -------------------------------------------------------------------------------------------

OBJECTS = [
    Decimal("12.50"),
    date(2026, 1, 31),
    time(12, 30, 0, 5),
    datetime(2026, 1, 31, 12),  # noqa: DTZ001 - one without a zone is meant
    datetime(2026, 1, 31, 12, tzinfo=UTC),
    timedelta(days=1, microseconds=5),
    UUID(int=7),
    b"\0",
    2**63,
    1.5,
    None,
]


def test_objects_that_messagepack_does_not_know_arrive_as_they_were() -> None:
    value = {"list": OBJECTS, "nested": {"tuple": tuple(OBJECTS)}}
    arrived = extensions.decode_plain(extensions.encode(extensions.with_extensions(value)))
    assert arrived == {"list": OBJECTS, "nested": {"tuple": OBJECTS}}


# ---- any bytes at all ------------------------------------------------------------------------------------------------


@fuzz
@given(
    st.sampled_from(["json", "string", "msgpack"]), st.sampled_from([Any, str, Order, Model]), st.binary(max_size=64)
)
def test_no_bytes_do_more_than_fail_alone(kind: str, payload_type: Any, raw: bytes) -> None:
    good = {"json": b'"x"', "string": b"x", "msgpack": b"\xa1x"}[kind]
    if kind == "string" and payload_type not in (Any, str):
        return
    travel = Travel(payload_type, value_format=kind)
    (alone,) = travel(good)
    first, _, last = travel(good, raw, good)
    assert first == last == alone


@fuzz
@given(st.binary(max_size=64))
def test_no_bytes_are_a_broken_extension_that_does_harm(raw: bytes) -> None:
    with contextlib.suppress(Exception):
        extensions.decode_plain(raw)
