"""Avro, Protobuf and JSON Schema: written by confluent-kafka's serializers against a real registry, and from files."""

import importlib
import io
import json
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import fastavro
import msgspec
import pydantic
import pytest
from confluent_kafka.schema_registry import Schema, SchemaReference, SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer as _AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer as _JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer as _ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kafkasrcd.daemon.configuration import load
from kafkasrcd.errors import ConfigurationError
from kafkasrcd.workers.protobuf_format import message_indexes
from tests.format_travel import Bad, Travel
from tests.registry_server import RegistryServer

# The type checkers disagree on what their constructors take.
AvroSerializer: Any = _AvroSerializer
JSONSerializer: Any = _JSONSerializer
ProtobufSerializer: Any = _ProtobufSerializer

fuzz = hypothesis_settings(deadline=None, derandomize=True, max_examples=300)


@pytest.fixture
def subject() -> str:
    """Of this test alone; a serializer appends ``-value``."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def client(schema_registry: RegistryServer) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": schema_registry.url}) as client:
        yield client


def context(subject: str) -> SerializationContext:
    return SerializationContext(subject, MessageField.VALUE)


# ---- Avro ------------------------------------------------------------------------------------------------------------


class Status(Enum):
    NEW = "NEW"
    PAID = "PAID"


@dataclass
class Line:
    name: str
    price: Decimal


@dataclass
class Order:
    id: UUID
    at: datetime
    day: date
    status: Status
    token: bytes
    lines: list[Line]
    note: str | None = None
    labels: dict[str, int] | None = None


ORDER_SCHEMA: dict[str, Any] = {
    "type": "record",
    "name": "Order",
    "namespace": "shop",
    "fields": [
        {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "status", "type": {"type": "enum", "name": "Status", "symbols": ["NEW", "PAID"]}},
        {"name": "token", "type": "bytes"},
        {
            "name": "lines",
            "type": {
                "type": "array",
                "items": {
                    "type": "record",
                    "name": "Line",
                    "fields": [
                        {"name": "name", "type": "string"},
                        {
                            "name": "price",
                            "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
                        },
                    ],
                },
            },
        },
        {"name": "note", "type": ["null", "string"], "default": None},
        {"name": "labels", "type": ["null", {"type": "map", "values": "long"}], "default": None},
    ],
}
ORDER: dict[str, Any] = {
    "id": UUID(int=7),
    "at": datetime(2026, 1, 31, 12, 0, 0, 5_000, tzinfo=UTC),
    "day": date(2026, 1, 31),
    "status": "PAID",
    "token": b"\0\xff",
    "lines": [{"name": "tea", "price": Decimal("12.50")}],
    "note": None,
    "labels": {"a": 2**40},
}
TYPED = Order(
    ORDER["id"],
    ORDER["at"],
    ORDER["day"],
    Status.PAID,
    b"\0\xff",
    [Line("tea", Decimal("12.50"))],
    None,
    {"a": 2**40},
)


class Model(pydantic.BaseModel):
    id: UUID
    at: datetime
    lines: list[dict[str, Decimal | str]]


def test_avro_from_a_registry(schema_registry: RegistryServer, client: SchemaRegistryClient, subject: str) -> None:
    raw = AvroSerializer(client, json.dumps(ORDER_SCHEMA))(ORDER, context(subject))
    assert raw is not None
    url = schema_registry.url
    assert Travel(value_format="avro", registry=url)(raw, None) == [ORDER, None]
    assert Travel(Order, value_format="avro", registry=url)(raw, None) == [TYPED, None]
    (model,) = Travel(Model, value_format="avro", registry=url)(raw)
    assert (model.id, model.at, model.lines) == (ORDER["id"], ORDER["at"], ORDER["lines"])


def test_avro_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "order.avsc").write_text(json.dumps(ORDER_SCHEMA))
    raw = avro(ORDER_SCHEMA, ORDER)
    row = {"value_format": "avro", "value_schema": "order.avsc"}
    good, empty, torn, longer = Travel(folder=tmp_path, row=row)(raw, b"", raw[:-1], raw + b"\0")
    assert good == ORDER
    assert isinstance(empty, Bad)
    assert isinstance(torn, Bad)
    assert longer == Bad("ValueError: 1 bytes more than its schema has")
    assert Travel(Order, folder=tmp_path, row=row)(raw) == [TYPED]


def test_avro_that_does_not_fit_the_annotation_says_where(tmp_path: Path) -> None:
    class Numbered(msgspec.Struct):
        lines: list[dict[str, int]]

    (tmp_path / "order.avsc").write_text(json.dumps(ORDER_SCHEMA))
    travel = Travel(Numbered, folder=tmp_path, value_format="avro", value_schema="order.avsc")
    assert travel(avro(ORDER_SCHEMA, ORDER)) == [Bad("$.lines[0][...]: expected int, got str")]


def test_avro_evolves_and_a_reader_s_schema_reads_old_and_new(
    schema_registry: RegistryServer, client: SchemaRegistryClient, subject: str, tmp_path: Path
) -> None:
    old = {
        "type": "record",
        "name": "User",
        "fields": [{"name": "name", "type": "string"}, {"name": "age", "type": "int"}],
    }
    new = {
        "type": "record",
        "name": "User",
        "fields": [
            {"name": "name", "type": "string"},
            {"name": "age", "type": "long"},
            {"name": "mail", "type": "string", "default": "none"},
        ],
    }
    raws = [
        AvroSerializer(client, json.dumps(old))({"name": "a", "age": 1}, context(subject)),
        AvroSerializer(client, json.dumps(new))({"name": "b", "age": 2, "mail": "b@x"}, context(subject)),
    ]
    as_written = [{"name": "a", "age": 1}, {"name": "b", "age": 2, "mail": "b@x"}]
    assert Travel(value_format="avro", registry=schema_registry.url)(*raws) == as_written
    (tmp_path / "reader.avsc").write_text(
        json.dumps({**new, "fields": [*new["fields"][1:], {"name": "vip", "type": "boolean", "default": False}]})
    )
    read = Travel(value_format="avro", value_reader_schema="reader.avsc", folder=tmp_path, registry=schema_registry.url)
    assert read(*raws) == [{"age": 1, "mail": "none", "vip": False}, {"age": 2, "mail": "b@x", "vip": False}]


def test_avro_with_references_of_references(
    schema_registry: RegistryServer, client: SchemaRegistryClient, subject: str
) -> None:
    def record(name: str, field: str, kind: Any) -> str:
        fields = [{"name": field, "type": kind}]
        return json.dumps({"type": "record", "name": name, "namespace": "shop", "fields": fields})

    inner = Schema(record("Country", "code", "string"), "AVRO")
    client.register_schema(f"{subject}-country", inner)
    to_country = [SchemaReference("shop.Country", f"{subject}-country", 1)]
    client.register_schema(f"{subject}-city", Schema(record("City", "country", "shop.Country"), "AVRO", to_country))
    to_city = [*to_country, SchemaReference("shop.City", f"{subject}-city", 1)]
    user = {
        "type": "record",
        "name": "User",
        "namespace": "shop",
        "fields": [{"name": "home", "type": "shop.City"}, {"name": "born", "type": ["null", "shop.Country"]}],
    }
    serializer = AvroSerializer(client, Schema(json.dumps(user), "AVRO", to_city))
    value = {"home": {"country": {"code": "PL"}}, "born": {"code": "DE"}}
    raw = serializer(value, context(subject))
    assert Travel(value_format="avro", registry=schema_registry.url)(raw) == [value]


def test_what_a_registry_s_values_can_be_wrong_in(
    schema_registry: RegistryServer, client: SchemaRegistryClient, subject: str
) -> None:
    raw = AvroSerializer(client, json.dumps(ORDER_SCHEMA))(ORDER, context(subject))
    assert raw is not None
    other = schema_registry.register(f"{subject}-json", json.dumps(CITY_SCHEMA), "JSON")
    travel = Travel(value_format="avro", registry=schema_registry.url)
    unknown, of_another_type, headless, empty, torn, good = travel(
        b"\0\x7f\0\0\0" + raw[5:], b"\0" + other.to_bytes(4) + raw[5:], b"{}", b"", raw[:-3], raw
    )
    assert unknown == Bad(f"the registry at {schema_registry.url} has no schema {0x7F000000}")
    assert of_another_type == Bad(f"schema {other} is of type JSON, not AVRO")
    assert headless.reason.startswith("ValueError: no schema registry's header (it begins with 7b 7d)")
    assert empty.reason.startswith("ValueError: no schema registry's header (it is empty)")
    assert isinstance(torn, Bad)
    assert good == ORDER


def test_a_value_of_any_depth_harms_nobody(tmp_path: Path) -> None:
    """A segmentation fault would end this test, and all others."""
    chain = {"type": "record", "name": "Chain", "fields": [{"name": "next", "type": ["null", "Chain"]}]}
    (tmp_path / "chain.avsc").write_text(json.dumps(chain))
    travel = Travel(folder=tmp_path, value_format="avro", value_schema="chain.avsc")
    for depth in (1_000, 10_000, 1_000_000):
        first, deep, last = travel(b"\2\0", b"\2" * depth + b"\0", b"\2\0")
        assert first == last == {"next": {"next": None}}
        assert deep.reason.startswith("RecursionError: ")
    (shallow,) = travel(b"\2" * 200 + b"\0")
    assert shallow["next"]["next"]
    tree = {
        "type": "record",
        "name": "Tree",
        "fields": [{"name": "text", "type": "string"}, {"name": "leaves", "type": {"type": "array", "items": "Tree"}}],
    }
    (tmp_path / "tree.avsc").write_text(json.dumps(tree))
    value: dict[str, Any] = {"text": "x" * 5_000, "leaves": [{"text": "a", "leaves": []}] * 20}
    assert Travel(folder=tmp_path, value_format="avro", value_schema="tree.avsc")(avro(tree, value)) == [value]


def test_objects_of_referenced_types_arrive_as_such(
    schema_registry: RegistryServer, client: SchemaRegistryClient, subject: str
) -> None:
    price = {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}
    money = {"type": "record", "name": "shop.Money", "fields": [{"name": "price", "type": price}]}
    client.register_schema(f"{subject}-money", Schema(json.dumps(money), "AVRO"))
    order = {"type": "record", "name": "shop.Bill", "fields": [{"name": "sum", "type": "shop.Money"}]}
    schema = Schema(json.dumps(order), "AVRO", [SchemaReference("shop.Money", f"{subject}-money", 1)])
    value = {"sum": {"price": Decimal("12.50")}}
    raw = AvroSerializer(client, schema)(value, context(subject))
    assert Travel(value_format="avro", registry=schema_registry.url)(raw) == [value]


def avro(schema: Any, value: Any) -> bytes:
    stream = io.BytesIO()
    library: Any = fastavro
    library.schemaless_writer(stream, fastavro.parse_schema(schema), value)
    return stream.getvalue()


# ---- Protobuf --------------------------------------------------------------------------------------------------------

PROTO = """
syntax = "proto3";
package shop%s;
import "google/protobuf/timestamp.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/wrappers.proto";
import "google/protobuf/struct.proto";
import "money%s.proto";

enum Status { UNKNOWN = 0; PAID = 1; }
message Other { string x = 1; }
message Order {
  message Line { string name = 1; Money price = 2; }
  int64 id = 1;
  string user_name = 2;
  bytes token = 3;
  Status status = 4;
  google.protobuf.Timestamp at = 5;
  google.protobuf.Duration took = 6;
  google.protobuf.StringValue note = 7;
  google.protobuf.Struct more = 8;
  repeated Line lines = 9;
  map<string, int32> counts = 10;
  optional int32 maybe = 11;
  oneof choice { string text = 12; uint64 number = 13; }
}
"""
MONEY = 'syntax = "proto3"; package shop%s; message Money { int64 cents = 1; }'


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """The folder of the ``.proto`` files, and the module generated of them, under names that are this module's own."""
    folder = tmp_path_factory.mktemp("proto")
    mark = uuid.uuid4().hex[:8]
    (folder / f"order{mark}.proto").write_text(PROTO % (mark, mark))
    (folder / f"money{mark}.proto").write_text(MONEY % mark)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--python_out={folder}"]
    well_known = Path(str(importlib.import_module("grpc_tools").__file__)).parent / "_proto"
    files = [str(path) for path in folder.glob("*.proto")]
    subprocess.run([*command, f"-I{well_known}", *files], check=True, timeout=60)
    sys.path.insert(0, str(folder))
    yield folder, importlib.import_module(f"order{mark}_pb2")
    sys.path.remove(str(folder))


def fill(module: Any) -> Any:
    message = module.Order(id=2**40, user_name="ann", token=b"\xff", status=1, text="t")
    message.at.FromDatetime(datetime(2026, 1, 31, 12, tzinfo=UTC))
    message.took.FromTimedelta(timedelta(seconds=90))
    message.note.value = "n"
    message.more.update({"a": [1, None]})
    line = message.lines.add(name="tea")
    line.price.cents = 1250
    message.counts["a"] = 1
    return message


FILLED: dict[str, Any] = {
    "id": 2**40,
    "user_name": "ann",
    "token": b"\xff",
    "status": "PAID",
    "at": datetime(2026, 1, 31, 12, tzinfo=UTC),
    "took": timedelta(seconds=90),
    "note": "n",
    "more": {"a": [1.0, None]},
    "lines": [{"name": "tea", "price": {"cents": 1250}}],
    "counts": {"a": 1},
    "text": "t",
}


@dataclass
class ProtoOrder:
    id: int
    user_name: str
    status: str
    at: datetime
    took: timedelta
    token: bytes
    maybe: int | None = None
    number: int | None = None


def serializer_of(message: Any, client: SchemaRegistryClient) -> Any:
    return ProtobufSerializer(message, client, {"use.deprecated.format": False})


def test_protobuf_from_a_registry_with_references(
    schema_registry: RegistryServer,
    client: SchemaRegistryClient,
    subject: str,
    generated: tuple[Path, Any],
    tmp_path: Path,
) -> None:
    _, module = generated
    message = fill(module)
    raw = serializer_of(module.Order, client)(message, context(subject))
    url = schema_registry.url
    assert Travel(value_format="protobuf", registry=url)(raw, None) == [FILLED, None]
    (typed,) = Travel(ProtoOrder, value_format="protobuf", registry=url, schema_directory=tmp_path)(raw)
    assert typed == ProtoOrder(2**40, "ann", "PAID", FILLED["at"], timedelta(seconds=90), b"\xff")
    assert Travel(module.Order, value_format="protobuf", registry=url)(raw) == [message]
    nested = serializer_of(module.Order.Line, client)(message.lines[0], context(subject + "n"))
    assert Travel(value_format="protobuf", registry=url)(nested) == [{"name": "tea", "price": {"cents": 1250}}]
    # What protoc made of it is kept, too: the next worker needs no compiler.
    assert Travel(value_format="protobuf", registry=url, schema_directory=tmp_path)(raw) == [FILLED]


def test_protobuf_registered_as_text(
    schema_registry: RegistryServer, subject: str, generated: tuple[Path, Any]
) -> None:
    folder, module = generated
    money, order = sorted(path.name for path in folder.glob("*.proto"))
    schema_registry.register(f"{subject}-money", (folder / money).read_text(), "PROTOBUF")
    references = [{"name": money, "subject": f"{subject}-money", "version": 1}]
    number = schema_registry.register(subject, (folder / order).read_text(), "PROTOBUF", references)
    # The second message of the schema: one index, which is 1, and 2 in zigzag; then the first one in that.
    header = b"\0" + number.to_bytes(4)
    message = fill(module)
    first, second, line, wrong = Travel(value_format="protobuf", registry=schema_registry.url)(
        header + b"\0" + module.Other(x="y").SerializeToString(),
        header + b"\2\2" + message.SerializeToString(),
        header + b"\4\2\0" + message.lines[0].SerializeToString(),
        header + b"\2\x14",
    )
    assert first == {"x": "y"}
    assert second == FILLED
    assert line == {"name": "tea", "price": {"cents": 1250}}
    assert wrong == Bad("ValueError: its header names message [10] of its schema, which has no such one")


def test_protobuf_evolves_and_each_record_is_read_by_its_own_schema(
    schema_registry: RegistryServer, subject: str
) -> None:
    text = 'syntax = "proto3"; message Order { Line line = 1; } message Line { int64 id = 1; %s}'
    old = schema_registry.register(f"{subject}-old", text % "", "PROTOBUF")
    new = schema_registry.register(f"{subject}-new", text % "string name = 2; repeated string tags = 3; ", "PROTOBUF")
    line = b"\x08\x07"
    raw_old = b"\0" + old.to_bytes(4) + b"\0\n\2" + line
    raw_new = b"\0" + new.to_bytes(4) + b"\0\n\x08" + line + b"\x12\x01a\x1a\x01t"
    without, whole = {"line": {"id": 7}}, {"line": {"id": 7, "name": "a", "tags": ["t"]}}
    url = schema_registry.url
    assert Travel(value_format="protobuf", registry=url)(raw_old, raw_new) == [without, whole]
    assert Travel(value_format="protobuf", registry=url)(raw_new, raw_old) == [whole, without]


def test_protobuf_from_a_file(generated: tuple[Path, Any]) -> None:
    folder, module = generated
    (order,) = (path.name for path in folder.glob("order*.proto"))
    package = module.Order.DESCRIPTOR.file.package
    row = {"value_format": "protobuf", "value_schema": order, "value_message": f"{package}.Order"}
    message = fill(module)
    raw = message.SerializeToString()
    good, empty, bad = Travel(folder=folder, row=row)(raw, b"", b"\xff")
    assert good == FILLED
    assert empty["id"] == 0
    assert empty["lines"] == []
    assert "at" not in empty
    assert bad.reason.startswith("DecodeError: ")
    assert Travel(module.Order, folder=folder, row=row)(raw) == [message]
    with pytest.raises(
        ConfigurationError, match=r"formats\.orders\.value_message: missing; .* has shop.*\.Other, shop"
    ):
        Travel(folder=folder, value_format="protobuf", value_schema=order)
    with pytest.raises(ConfigurationError, match="has no message 'Nope'"):
        Travel(folder=folder, row={**row, "value_message": "Nope"})


@fuzz
@given(st.binary(max_size=12))
def test_message_indexes_of_any_bytes(raw: bytes) -> None:
    try:
        indexes, start = message_indexes(raw, 0)
    except ValueError:
        return
    assert indexes
    assert 0 < start <= len(raw)


# ---- JSON Schema -----------------------------------------------------------------------------------------------------

USER_SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "User",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "ids": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "home": {"$ref": "city.json"},
    },
    "required": ["name"],
}
CITY_SCHEMA = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "required": ["zip"]}


def test_json_schema_from_a_registry_with_a_reference(
    schema_registry: RegistryServer, client: SchemaRegistryClient, subject: str
) -> None:
    client.register_schema(f"{subject}-city", Schema(json.dumps(CITY_SCHEMA), "JSON"))
    references = [SchemaReference("city.json", f"{subject}-city", 1)]
    schema = Schema(json.dumps(USER_SCHEMA), "JSON", references)
    value = {"name": "a", "ids": [1], "home": {"zip": 1}}
    raw = JSONSerializer(schema, client)(value, context(subject))
    assert raw is not None
    header = raw[:5]
    good, tombstone, minus, missing, at_home, no_json = Travel(
        value_format="json_schema", registry=schema_registry.url
    )(
        raw,
        None,
        header + b'{"name": "a", "ids": [3, -1]}',
        header + b"{}",
        header + b'{"name": "a", "home": {}}',
        header + b"{",
    )
    assert (good, tombstone) == (value, None)
    assert minus == Bad("$.ids[1]: -1 is less than the minimum of 0")
    assert missing == Bad('$: "name" is a required property')
    assert at_home == Bad('$.home: "zip" is a required property')
    assert no_json.reason.startswith("JSONDecodeError: ")


def test_json_schema_from_a_file_travels_once(tmp_path: Path) -> None:
    class User(msgspec.Struct):
        name: str

    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}
    (tmp_path / "user.json").write_text(json.dumps(schema))
    travel = Travel(User, folder=tmp_path, value_format="json_schema", value_schema="user.json")
    assert travel(b'{"name": "abc"}', b'{"name": "abcd"}') == [
        User("abc"),
        Bad('$.name: "abcd" is longer than 3 characters'),
    ]
    assert travel.columns(b'{"name": "abc"}').raws is None


def test_a_schema_that_refers_elsewhere_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "user.json").write_text('{"$ref": "http://127.0.0.1:9/evil.json"}')
    with pytest.raises(ConfigurationError, match="which is not among its references"):
        Travel(folder=tmp_path, value_format="json_schema", value_schema="user.json")


# ---- files that hold no schema ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("avro", None, "No such file or directory"),
        ("avro", "{", "holds no Avro schema that can be used"),
        ("avro", '{"type": "recor"}', "holds no Avro schema that can be used"),
        ("protobuf", None, "No such file or directory"),
        ("protobuf", "message Order {", "holds no Protobuf schema that can be used: NotCompiled: "),
        ("json_schema", None, "No such file or directory"),
        ("json_schema", "{", "holds no JSON Schema that can be used"),
        ("json_schema", '{"type": 3}', "holds no JSON Schema that can be used"),
    ],
)
def test_a_file_without_a_schema(kind: str, content: str | None, reason: str, tmp_path: Path) -> None:
    name = {"avro": "x.avsc", "protobuf": "x.proto", "json_schema": "x.json"}[kind]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError) as refused:
        Travel(folder=tmp_path, value_format=kind, value_schema=name)
    assert str(refused.value).startswith("formats.orders.value_schema: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [
        ("avro", "fastavro", "avro"),
        ("protobuf", "google.protobuf", "protobuf"),
        ("json_schema", "jsonschema_rs", "json-schema"),
    ],
)
def test_a_missing_library_is_named_with_what_brings_it(
    kind: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert extra in extras["optional-dependencies"]
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "kafkasrcd.toml"
    path.write_text(
        f"topics = ['a']\nhandler.target = 'a:b'\nvalue_format = '{kind}'\nschema_registry.url = 'http://r:1'\n"
    )
    with pytest.raises(ConfigurationError) as refused:
        load(path, {}, {})
    assert str(refused.value) == (
        f"{path}: value_format: {kind} needs a library that is not installed: pip install 'kafkasrcd[{extra}]'"
    )


# ---- any bytes at all ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def travels(
    tmp_path_factory: pytest.TempPathFactory, generated: tuple[Path, Any]
) -> dict[str, tuple[Callable[..., list[Any]], bytes]]:
    """Each format from a file, and a good value of it."""
    folder, module = generated
    (order,) = (path.name for path in folder.glob("order*.proto"))
    message_name = module.Order.DESCRIPTOR.full_name
    files = tmp_path_factory.mktemp("schemas")
    (files / "order.avsc").write_text(json.dumps(ORDER_SCHEMA))
    (files / "user.json").write_text('{"properties": {"a": {"type": "integer"}}}')
    return {
        "avro": (
            Travel(folder=files, value_format="avro", value_schema="order.avsc"),
            avro(ORDER_SCHEMA, ORDER),
        ),
        "protobuf": (
            Travel(folder=folder, value_format="protobuf", value_schema=order, value_message=message_name),
            fill(module).SerializeToString(),
        ),
        "json_schema": (
            Travel(folder=files, value_format="json_schema", value_schema="user.json"),
            b'{"a": 1}',
        ),
    }


@pytest.fixture(scope="module")
def registered(schema_registry: RegistryServer, generated: tuple[Path, Any]) -> dict[str, tuple[Travel, bytes]]:
    """Each format from the registry, and a good value of it."""
    _, module = generated
    mark = uuid.uuid4().hex[:8]
    with SchemaRegistryClient({"url": schema_registry.url}) as client:
        of_avro = AvroSerializer(client, json.dumps(ORDER_SCHEMA))(ORDER, context(f"fuzz-avro-{mark}"))
        of_protobuf = serializer_of(module.Order, client)(fill(module), context(f"fuzz-protobuf-{mark}"))
        of_json = JSONSerializer(json.dumps({"title": "City", **CITY_SCHEMA}), client)(
            {"zip": 1}, context(f"fuzz-json-{mark}")
        )
    url = schema_registry.url
    return {
        "avro": (Travel(value_format="avro", registry=url), of_avro),
        "protobuf": (Travel(value_format="protobuf", registry=url), of_protobuf),
        "json_schema": (Travel(value_format="json_schema", registry=url), of_json),
    }


@fuzz
@given(st.sampled_from(["avro", "protobuf", "json_schema"]), st.data())
def test_no_bytes_after_a_registry_s_header_do_more_than_fail_alone(
    registered: dict[str, tuple[Travel, bytes]], kind: str, data: st.DataObject
) -> None:
    travel, good = registered[kind]
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3), label="changes")):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    raw = data.draw(st.binary(max_size=40) | st.just(bytes(changed)) | st.binary(max_size=30).map(good[:5].__add__))
    (alone,) = travel(good)
    first, _, last = travel(good, raw, good)
    assert first == last == alone


@fuzz
@given(st.sampled_from(["avro", "protobuf", "json_schema"]), st.data())
def test_no_bytes_do_more_than_fail_alone(
    travels: dict[str, tuple[Callable[..., list[Any]], bytes]], kind: str, data: st.DataObject
) -> None:
    travel, good = travels[kind]
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3), label="changes")):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    raw = data.draw(st.binary(max_size=40) | st.just(bytes(changed)), label="raw")
    (alone,) = travel(good)
    first, _, last = travel(good, raw, good)
    assert first == last == alone
