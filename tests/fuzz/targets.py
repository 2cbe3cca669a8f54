"""What is fuzzed: each target with its seeds, which are what really comes there."""

import base64
import contextlib
import importlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple
from uuid import UUID
from zlib import crc32

import fastavro
import msgspec
from fastavro import _read_py
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from kafkasrcd.errors import RingCorrupted
from kafkasrcd.message import decode_headers, encode_headers
from kafkasrcd.settings import SchemaRegistrySettings
from kafkasrcd.workers import control, extensions, protobuf_format
from kafkasrcd.workers.formats import Format, Kind, Shape
from kafkasrcd.workers.frame import Columns, RecordError, decode_frame, encode_frame
from kafkasrcd.workers.payload import decoder_of
from kafkasrcd.workers.preparing import Preparer
from kafkasrcd.workers.ring import PAGE, RingReader, RingWriter, format_ring, ring_bytes
from kafkasrcd.workers.schema_cache import Complete, SchemaCache
from kafkasrcd.workers.schema_document import Reference, RegistryAway, SchemaDocument, SchemaName
from kafkasrcd.workers.schema_registry import SchemaRegistry

Target = Callable[[bytes], None]


class Fuzzed(NamedTuple):
    """``target`` raises, or ends the process, where it finds something."""

    target: Target
    seeds: Sequence[bytes]


# ---- Shared memory ---------------------------------------------------------------------------------------------------


def frame() -> Fuzzed:
    """A frame is what was encoded, or is refused; also one with the right checksum and the wrong columns."""
    whole = Columns([3, 5], [-1, 7], [b"value", None], [b"k", None], [encode_headers([("h", None)]), None])
    prepared = Columns([7], [1], [None], [b"a"], None, [RecordError(0, "E", "why")], [b"raw"], [b"raw key"])
    plain = Columns(range(4), [1] * 4, [b"1", b"22", b"", b"4444"])

    def target(data: bytes) -> None:
        for payload in (data, _with_checksum(data)):
            try:
                columns = decode_frame(payload)
            except RingCorrupted:
                continue
            count = len(columns.values)
            every = (columns.offsets, columns.timestamps, columns.keys, columns.headers, columns.raws, columns.raw_keys)
            assert all(len(column) == count for column in every if column is not None)
            assert all(0 <= error.index < count for error in columns.errors)

    return Fuzzed(target, [b"".join(encode_frame(columns).parts) for columns in (whole, prepared, plain)])


def _with_checksum(payload: bytes) -> bytes:
    """With the checksum that a frame of its sizes has."""
    if len(payload) < 48:
        return payload
    column_bytes, error_bytes = int.from_bytes(payload[28:32], "little"), int.from_bytes(payload[44:48], "little")
    sound = crc32(payload[48 : 48 + column_bytes], crc32(payload[4:48], crc32(b"\0\0\0\0")))
    return crc32(payload[len(payload) - error_bytes :], sound).to_bytes(4, "little") + payload[4:]


def ring() -> Fuzzed:
    """What lies in a ring is read as it was published, or refused."""
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    size = ring_bytes(PAGE)

    def published(*payloads: bytes) -> bytes:
        memory = memoryview(bytearray(size))
        format_ring(memory, PAGE, 7, 0)
        writer = RingWriter(memory, 7, bell)
        for payload in payloads:
            assert writer.publish([payload])
        return bytes(memory)

    def target(data: bytes) -> None:
        memory = memoryview(bytearray(data[:size].ljust(size, b"\0")))
        try:
            reader = RingReader(memory, 7, bell)
            while (read := reader.read()) is not None:
                assert len(read[0]) <= PAGE
                reader.release(read[1])
        except RingCorrupted:
            pass

    return Fuzzed(target, [published(), published(b"one"), published(b"x" * 1000, b"y" * 900, b"z" * 1500)])


def headers() -> Fuzzed:
    """Headers of a record are pairs, or an ordinary error."""
    pairs: list[tuple[str, bytes | None]] = [("a", b"1"), ("a", None), ("\N{EURO SIGN}", b"")]

    def target(data: bytes) -> None:
        try:
            found = decode_headers(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        assert decode_headers(encode_headers(found.items_all())).items_all() == found.items_all()

    return Fuzzed(target, [encode_headers(pairs), encode_headers([])])


def control_packet() -> Fuzzed:
    """A packet of the control channel is a message, or an ordinary error."""
    ours, theirs = control.ControlChannel.pair()
    other = control.ControlChannel(theirs)
    messages: list[control.ControlMessage] = [
        control.Setup(settings=b"{}", base_directory="/", store_url="sqlite://", slot=1),
        control.HandlerReady((("orders", Shape.TYPED), ("", Shape.PLAIN))),
        control.OffsetOutOfRange(position=1, log_start=2, high_watermark=3),
        control.WorkerFault("why"),
        control.Exit(),
    ]

    def target(data: bytes) -> None:
        if not data:
            return
        os.write(theirs.fileno(), data)
        try:
            received = ours.receive()
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        assert received is not None
        other.send(received[0])
        assert ours.receive() == received

    return Fuzzed(target, [msgspec.msgpack.encode(message) for message in messages])


# ---- Formats ---------------------------------------------------------------------------------------------------------


AVRO_SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Node",
    "fields": [
        {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "at_us", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "local", "type": {"type": "long", "logicalType": "local-timestamp-millis"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "clock", "type": {"type": "long", "logicalType": "time-micros"}},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}},
        {"name": "hash", "type": {"type": "fixed", "name": "Hash", "size": 4}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "share", "type": ["null", "float", "double", "boolean", "bytes"]},
        {"name": "labels", "type": {"type": "map", "values": ["null", "long", "string"]}},
        {"name": "children", "type": {"type": "array", "items": "Node"}},
    ],
}
AVRO_LEAF: dict[str, Any] = {
    "id": UUID(int=7),
    "at": datetime(2026, 1, 31, tzinfo=UTC),
    "at_us": datetime(1969, 1, 31, microsecond=5, tzinfo=UTC),
    "local": datetime(2026, 1, 31),  # noqa: DTZ001 - what the logical type is
    "day": date(2026, 1, 31),
    "clock": time(1, 2, 3, 4),
    "kind": "B",
    "hash": b"\0\1\2\3",
    "price": Decimal("12.50"),
    "share": 0.5,
    "labels": {"a": 1, "b": None, "c": "x"},
    "children": [],
}


def avro() -> Fuzzed:
    """Any value of a rich schema that refers to itself; what is built is what fastavro reads."""
    schema = fastavro.parse_schema(AVRO_SCHEMA)
    library: Any = fastavro
    in_python: Any = _read_py

    def written(value: Any) -> bytes:
        stream = io.BytesIO()
        library.schemaless_writer(stream, schema, value)
        return stream.getvalue()

    def expected(raw: bytes) -> Any:
        with contextlib.suppress(Exception):
            in_python.schemaless_reader(io.BytesIO(raw), schema, None)  # whose lines guide the fuzzer; C's do not
        return library.schemaless_reader(io.BytesIO(raw), schema, None)

    tree = {**AVRO_LEAF, "children": [AVRO_LEAF, {**AVRO_LEAF, "share": b"x"}]}
    target = _of_format(_folder_with("avsc", json.dumps(AVRO_SCHEMA)), Kind.AVRO, expected, most_bytes=1_000)
    return Fuzzed(target, [written(AVRO_LEAF), written(tree)])


PROTO = """
syntax = "proto3";
import "google/protobuf/any.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/field_mask.proto";
import "google/protobuf/struct.proto";
import "google/protobuf/timestamp.proto";
import "google/protobuf/wrappers.proto";
message Node {
  enum Kind { A = 0; B = 1; }
  int64 id = 1; string name = 2; bytes token = 3; Kind kind = 4; double share = 5; float part = 6; sint32 minus = 7;
  fixed64 fixed = 8; repeated int32 numbers = 9; map<string, Node> nodes = 10; repeated Node children = 11;
  google.protobuf.Timestamp at = 12; google.protobuf.Duration took = 13; google.protobuf.StringValue note = 14;
  google.protobuf.Struct more = 15; google.protobuf.Any any = 16; google.protobuf.FieldMask mask = 17;
  oneof choice { string text = 18; Node node = 19; bool flag = 20; }
  google.protobuf.Int64Value wrapped = 21; google.protobuf.Value value = 22; map<int32, bytes> tokens = 23;
}
"""


def protobuf() -> Fuzzed:
    """Any value of a schema with every kind of field that refers to itself; with a registry's header, too."""
    files = protobuf_format.compiled(PROTO, ())
    pool: Any = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(files).file:
        pool.Add(file)
    node: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("Node"))
    numbers = {"id": 7, "share": 0.5, "part": 1.5, "minus": -3, "fixed": 9, "numbers": [1, 2, 3], "wrapped": 5}
    texts = {"name": "ann", "token": "AP8=", "kind": "B", "note": "x", "mask": "a.b", "tokens": {1: "/w=="}}
    times = {"at": "2026-01-31T12:00:00.005Z", "took": "-1.5s", "more": {"a": [None, True, "x", 1.5]}, "value": [1]}
    nested = {"nodes": {"k": numbers}, "children": [texts, {}], "node": {"text": "t"}, "any": {"@type": "a/Node"}}
    seeds = [
        json_format.ParseDict(each, node(), descriptor_pool=pool).SerializeToString()
        for each in (numbers, texts, times, nested)
    ]
    of_file = _of_format(_folder_with("proto", PROTO), Kind.PROTOBUF)
    document = SchemaDocument(kind="PROTOBUF", text=PROTO, compiled=files)
    registered = _preparer(Format(kind=Kind.PROTOBUF), Shape.PLAIN, Path(), _Known(document))

    def target(data: bytes) -> None:
        of_file(data)
        raw = _HEADER + data
        registered.need(raw)
        with contextlib.suppress(Exception):
            registered.prepare(raw)

    return Fuzzed(target, [*seeds, b"\0" + seeds[0], b"\2\0" + seeds[1], b"\4\0\0" + seeds[0]])


JSON_SCHEMA: dict[str, Any] = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "multipleOf": 3},
        "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "mail": {"format": "email"},
        "tags": {"type": "array", "uniqueItems": True, "items": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        "head": {"$ref": "#/$defs/node"},
    },
    "patternProperties": {"^x-": {"const": 1.5}},
    "additionalProperties": {"type": ["object", "number", "boolean"]},
    "required": ["id"],
}


def json_schema() -> Fuzzed:
    """Any document."""
    documents: list[Any] = [
        {"id": 3, "name": "ann", "tags": ["a", None], "head": {"next": {"next": {}}}, "x-a": 1.5},
        {"id": 2**70, "mail": "a@b", "tags": ["a", "a"], "x-b": 2, "other": {"a": [1e300, -0.0]}},
        {"id": -1, "name": "Ann\N{EURO SIGN}", "head": []},
    ]
    folder = _folder_with("json", json.dumps(JSON_SCHEMA))
    return Fuzzed(_of_format(folder, Kind.JSON_SCHEMA), [json.dumps(document).encode() for document in documents])


def payload() -> Fuzzed:
    """What is built from JSON, MessagePack and text without a worker's half."""
    types = (Any, dict[str, Any], list[int | str | None], datetime, Decimal)
    kinds = (Kind.JSON, Kind.MSGPACK)
    decoders = [decoder_of(Format(kind=kind), each) for kind in kinds for each in types]
    decoders.append(decoder_of(Format(kind=Kind.STRING), str))
    value: Any = [{"a": 1.5}, Decimal("1.5"), timedelta(1), UUID(int=1), date(2026, 1, 31), None]

    def target(data: bytes) -> None:
        for decode in decoders:
            with contextlib.suppress(Exception):
                decode(data)

    packed = extensions.encode(extensions.with_extensions(value))
    return Fuzzed(target, [packed, msgspec.json.encode(value), b'"2026-01-31T00:00:00Z"', b"[1,null]"])


def _of_format(folder: Path, kind: Kind, expected: Callable[[bytes], Any] | None = None, most_bytes: int = 0) -> Target:
    """Both halves, for a handler without an annotation and for one with a type; an error of either is the record's.

    ``expected`` reads a value of at most ``most_bytes`` in another way, with the same result.
    """
    (path,) = folder.iterdir()
    form = Format(kind=kind, schema=path.name)
    plain, typed = (_preparer(form, shape, folder) for shape in (Shape.PLAIN, Shape.TYPED))
    build_plain = decoder_of(form, Any)
    build_typed = decoder_of(form, dict[str, bool | int | float | str | list[Any] | dict[str, Any] | None])

    def target(data: bytes) -> None:
        with contextlib.suppress(Exception):
            build_typed(typed.prepare(data))
        try:
            prepared = plain.prepare(data)
        except Exception:
            return
        built = build_plain(prepared)
        if expected is not None and len(data) <= most_bytes:
            assert repr(built) == repr(expected(data)), (built, expected(data))

    return target


# ---- The schema registry ---------------------------------------------------------------------------------------------


def registry() -> Fuzzed:
    """Whatever a registry answers is a schema or a reason to wait, and whatever the schema is, records fail alone."""

    def no_compiler(*_: object) -> bytes:
        raise protobuf_format.NotCompiled("protoc is not what is fuzzed here")

    module: Any = protobuf_format
    module._compile = no_compiler
    asked = _Answers()
    forms = [Format(kind=kind) for kind in (Kind.AVRO, Kind.PROTOBUF, Kind.JSON_SCHEMA)]

    def target(data: bytes) -> None:
        for form in forms:
            asked.answers = data.split(b"\n")
            preparer = _preparer(form, Shape.PLAIN, Path(), SchemaCache(asked, None))
            try:
                preparer.need(_HEADER)
            except RegistryAway:
                continue
            for value in (b"", b"{}", b"\0\2\2a", b"[null, 1]"):
                with contextlib.suppress(Exception):
                    preparer.prepare(_HEADER + value)

    def answer(schema: str, kind: str = "AVRO", references: Sequence[str] = ()) -> bytes:
        named = [{"name": name, "subject": name, "version": 1} for name in references]
        return json.dumps({"schema": schema, "schemaType": kind, "references": named}).encode()

    order = {"type": "record", "name": "Order", "fields": [{"name": "node", "type": ["null", "Node"]}]}
    external = {"$ref": "node.json#/$defs/node"}
    descriptor = base64.b64encode(
        descriptor_pb2.FileDescriptorProto(
            name="a.proto", message_type=[descriptor_pb2.DescriptorProto(name="A")]
        ).SerializeToString()
    ).decode()
    return Fuzzed(
        target,
        [
            answer(json.dumps(AVRO_SCHEMA)),
            b"\n".join((answer(json.dumps(order), references=["Node"]), answer(json.dumps(AVRO_SCHEMA)))),
            answer('"string"'),
            answer(json.dumps(JSON_SCHEMA), "JSON"),
            b"\n".join((answer(json.dumps(external), "JSON", ["node.json"]), answer(json.dumps(JSON_SCHEMA), "JSON"))),
            b"\n".join((answer(PROTO, "PROTOBUF"), answer(descriptor, "PROTOBUF"))),
            b'{"error_code":40403,"message":"Schema not found"}',
            b"<html>",
        ],
    )


def schema_file() -> Fuzzed:
    """A file of the kept schemas is what was written, or as if it were not there."""
    folder = Path(mkdtemp(prefix="kafkasrcd-fuzz-"))
    asked = _Answers()
    cache = SchemaCache(asked, folder)
    document = SchemaDocument(kind="AVRO", text='"string"', references=(Reference("a", '"int"'),), compiled=b"\0\1")
    cache.put(1, document)
    (path,) = folder.rglob("1.json")
    seed = path.read_bytes()

    def target(data: bytes) -> None:
        path.write_bytes(data)
        try:
            found = cache.get(1)
        except RegistryAway:
            return
        assert found == document, "one that a checksum vouches for"

    return Fuzzed(target, [seed])


class _Answers(SchemaRegistry):
    """A registry that gives ``answers`` one after the other, to whatever it is asked."""

    def __init__(self) -> None:
        super().__init__(SchemaRegistrySettings(url="http://127.0.0.1:1"), Path())
        self.answers: list[bytes] = []

    def _request(self, path: str, number: SchemaName | None = None) -> bytes:
        if not self.answers:
            raise RegistryAway("it has no more answers")
        return self.answers.pop(0)


class _Known(SchemaCache):
    """One schema under every id."""

    def __init__(self, document: SchemaDocument) -> None:
        super().__init__(_Answers(), None)
        self._document = document

    def get(self, number: SchemaName, complete: Complete | None = None) -> SchemaDocument:
        return self._document


_HEADER = b"\0\0\0\0\1"


def _preparer(form: Format, shape: Shape, folder: Path, schemas: SchemaCache | None = None) -> Preparer:
    preparer: Preparer = importlib.import_module(f"kafkasrcd.workers.{form.kind.value}_format").preparer_of(
        form, shape, folder, schemas
    )
    return preparer


def _folder_with(suffix: str, schema: str) -> Path:
    folder = Path(mkdtemp(prefix="kafkasrcd-fuzz-"))
    (folder / f"schema.{suffix}").write_text(schema)
    return folder


TARGETS: Mapping[str, Callable[[], Fuzzed]] = {
    make.__name__: make
    for make in (frame, ring, headers, control_packet, payload, avro, protobuf, json_schema, registry, schema_file)
}
